"""stub"""
import torch
def draw_categorical(logits, u, temperature=1.0):
    p = torch.softmax(logits.double() / temperature, -1)
    return (p.cumsum(-1) <= u.double()[..., None]).sum(-1).clamp_max(logits.shape[-1] - 1)
def naive_sample(network, images, uniforms, given, *, levels, head, context=None, temperature=1.0, progress=False):
    n, C = images.shape[:2]
    for r in range(given, images.shape[2]):
        for c in range(images.shape[3]):
            for ch in range(C):
                y = network(images) if context is None else network(images, context)
                y = y.unflatten(1, (levels, C))[:, :, ch, r, c]
                images[:, ch, r, c] = draw_categorical(y, uniforms[:, ch, r, c], temperature)
    return images
