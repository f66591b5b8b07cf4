"""Neural style transfer by optimisation of the image (Gatys, Ecker and Bethge, arXiv:1508.06576)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _pictures, losses
from ..losses.features import Normalization

PICTURES = ("china", "flower")
STYLE_LAYERS = {
    "gram": ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),  # arXiv:1508.06576, figure 2
    "contextual": ("relu3_2", "relu4_2"),  # arXiv:1803.02077, section 4.1, conv3_2 and conv4_2
}
MARGIN = 0.01  # from 0 and 1 at which the optimisation begins: nearer, the sigmoid is flat


class StyleTransfer(NamedTuple):
    """What :func:`style_transfer` returns.

    image: (N, C, H, W) in [0, 1].
    losses: of the initial image, the lowest so far after each step, and last of ``image``.
    """

    image: Tensor
    losses: list[float]


def picture(name: str, size: int, *, background: str = "white") -> Tensor:
    """A picture as (1, 3, H, W) in [0, 1], its longer side scaled to ``size`` pixels.

    Args:
        name: a file that Pillow reads, or "china" or "flower": photographs that scikit-learn ships.
        size: at least 1.
        background: the colour behind what is transparent; see :func:`genfast.data.picture`.

    Raises:
        FileNotFoundError: no such file. OSError: a file that is no picture. ValueError: a size below 1, or a picture
            that
            :func:`genfast.data.picture` refuses.
        ImportError: the two photographs need scikit-learn.

    Example:
        >>> from genfast.models.neural_style import picture
        >>> picture("china", 64).shape
        torch.Size([1, 3, 43, 64])
    """
    from PIL import Image

    if size < 1:
        raise ValueError(f"picture: size={size}, expected at least 1")
    _pictures.colour(background)
    if Path(name).is_file():
        image = _pictures.picture(name, background=background)
    elif name in PICTURES:
        image = Image.fromarray(
            _pictures.scikit_learn(f"the photograph {name!r} needs").load_sample_image(f"{name}.jpg")
        )
    else:
        raise FileNotFoundError(f"picture: {name!r} is neither a file nor one of {', '.join(map(repr, PICTURES))}")
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    resized = np.array(image.resize((width, height), Image.Resampling.LANCZOS))
    return torch.from_numpy(resized).permute(2, 0, 1)[None].float() / 255


def _checked(name: str, image: Tensor) -> Tensor:
    if not isinstance(image, Tensor) or not image.is_floating_point():
        said = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"style_transfer: {name} is {said}, expected a floating-point tensor with values in [0, 1]")
    if image.dim() not in (3, 4) or not image.numel():
        raise ValueError(f"style_transfer: {name} has shape {tuple(image.shape)}, expected (N, C, H, W) or (C, H, W)")
    return image.detach() if image.dim() == 4 else image.detach()[None]


def _initial(init: str | Tensor, content: Tensor, style: Tensor, seed: int) -> Tensor:
    if isinstance(init, Tensor):
        image = _checked("init", init).to(content)
        if image.shape != content.shape:
            raise ValueError(
                f"style_transfer: init has shape {tuple(image.shape)}, expected content's, {tuple(content.shape)}"
            )
        return image.clone()
    if init == "content":
        return content.clone()
    if init == "style":
        return F.interpolate(style, content.shape[2:], mode="bilinear", antialias=True).expand_as(content).clone()
    if init == "noise":
        return torch.rand(content.shape, generator=torch.Generator().manual_seed(seed)).to(content)
    raise ValueError(f"style_transfer: init={init!r}, expected 'content', 'noise', 'style' or an image")


def _relative(loss: losses.PerceptualLoss | losses.StyleLoss) -> None:
    """Divides the weights by the mean square of the target: the terms become relative errors, in any network alike."""
    targets = loss._target or ()
    loss.weights = tuple(w / max(float(t.square().mean()), 1e-30) for w, t in zip(loss.weights, targets))


def _descend(
    z: Tensor, energy: Callable[[], Tensor], steps: int, optimizer: str, lr: float | None, progress: bool
) -> list[float]:
    """Changes ``z`` in ``steps`` steps; the initial energy, and the lowest so far after each step."""
    from tqdm import tqdm

    bar = tqdm(total=steps, unit="step", desc="style transfer", disable=not (progress and sys.stderr.isatty()))
    history: list[float] = []
    descent: torch.optim.Optimizer
    if optimizer == "lbfgs":
        # One call makes all steps, as the line search's last evaluation then serves the next step. The loss has no
        # scale of its own, so that no tolerance could tell when to stop.
        descent = torch.optim.LBFGS(
            [z],
            1.0 if lr is None else lr,
            max_iter=steps,
            max_eval=4 * steps + 20,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
    else:
        descent = torch.optim.Adam([z], 0.2 if lr is None else lr)

    def evaluate() -> Tensor:
        value = energy()
        z.grad = torch.autograd.grad(value, z)[0].contiguous()  # L-BFGS views it as one row
        value = value.detach()
        step = descent.state[z].get("n_iter", 0) if optimizer == "lbfgs" else len(history)
        found = float(value)
        if not math.isfinite(found):  # sigmoid(z) is bounded, so no line search should meet this
            raise RuntimeError(
                f"style_transfer: the loss is {found}; are images, weights and network finite, and in range?"
            )
        lowest = min([found, *history[-1:]])
        if step < len(history):
            history[step] = lowest
        else:
            bar.update(min(len(history), 1))  # the first evaluation is of no step
            bar.set_postfix_str(f"loss {lowest:.4g}", refresh=False)
            history.append(lowest)
        return value

    with bar:
        if optimizer == "lbfgs":
            descent.step(evaluate)  # type: ignore[arg-type]
        else:
            for _ in range(steps):
                evaluate()
                descent.step()  # type: ignore[call-arg]
            bar.update()
    return history


def style_transfer(
    content: Tensor,
    style: Tensor,
    network: nn.Module,
    *,
    normalization: Normalization,
    steps: int = 200,
    optimizer: str = "lbfgs",
    lr: float | None = None,
    loss: str = "gram",
    content_layers: str | Sequence[str] = "relu4_2",
    style_layers: str | Sequence[str] | None = None,
    style_layer_weights: float | Sequence[float] | None = None,
    content_weight: float = 1.0,
    style_weight: float = 100.0,
    tv_weight: float = 0.0,
    relative: bool = True,
    init: str | Tensor = "content",
    seed: int = 0,
    progress: bool = False,
) -> StyleTransfer:
    """An image with the content of one and the style of another (Gatys et al., arXiv:1508.06576, equation 7).

    Minimises content_weight * :class:`genfast.losses.PerceptualLoss` + style_weight * :class:`genfast.losses.StyleLoss`
    (or
    :class:`genfast.losses.ContextualLoss`, Mechrez et al., arXiv:1803.02077) + tv_weight * squared
    :func:`genfast.losses.total_variation` over the image, with one pass of the network a step and both targets kept.

    Args:
        content, style: (N, C, H, W) or (C, H, W) in [0, 1]; the style may be of another size and its batch may be 1.
        network, normalization: as of :class:`genfast.losses.FeatureExtractor`.
        steps: of the optimiser; L-BFGS takes one to two evaluations a step.
        optimizer: "lbfgs" (with a strong Wolfe line search) or "adam". Both change z in image = sigmoid(z), which keeps
            the
            image within [0, 1]: an image clamped at the end is not the one whose loss was low. For half images take
                "adam":
            the first steps of L-BFGS are so short that they round to none.
        lr: of the optimiser; default 1 for L-BFGS and 0.2 for Adam.
        loss: of the style: "gram" or "contextual".
        content_layers, style_layers: names of layers; by default those of the papers, by the names of
            :func:`genfast.losses.vgg_features`.
        style_layer_weights: one per style layer, or one for all; by default 1 / number of layers.
        content_weight, style_weight, tv_weight: a term with weight 0 is left out.
        relative: divide each layer's squared error by the mean square of its target, so that weights mean the same in
            every network; without, the terms are the papers' and the weights have to follow the network.
        init: "content", "noise" (uniform, by ``seed``), "style" or an image of the content's shape.
        seed: of the noise. The same arguments give the same image on the same machine.
        progress: a progress bar on a terminal.

    Returns:
        :class:`StyleTransfer`: the image in [0, 1], in the content's shape (N, C, H, W), dtype and device, and the
        losses.

    Raises:
        ValueError: options or shapes that do not fit. TypeError: images that are no floating-point tensors.
        RuntimeError: the loss is not finite.

    Example:
        >>> import torch, genfast
        >>> network, images = genfast.losses.random_features(width=4), torch.rand(2, 3, 32, 32).split(1)
        >>> image, values = genfast.models.style_transfer(*images, network, normalization=None, steps=3)
        >>> image.shape, values[-1] < values[0]
        (torch.Size([1, 3, 32, 32]), True)
    """
    content, style = _checked("content", content), _checked("style", style)
    if loss not in STYLE_LAYERS:
        raise ValueError(f"style_transfer: loss={loss!r}, expected one of {', '.join(map(repr, STYLE_LAYERS))}")
    if optimizer not in ("lbfgs", "adam"):
        raise ValueError(f"style_transfer: optimizer={optimizer!r}, expected 'lbfgs' or 'adam'")
    if steps < 1:
        raise ValueError(f"style_transfer: steps={steps}, expected at least 1")
    if min(content_weight, style_weight, tv_weight) < 0 or content_weight + style_weight == 0:
        raise ValueError(
            f"style_transfer: content_weight={content_weight}, style_weight={style_weight} and tv_weight={tv_weight}, "
            "expected none below 0, and not both of content and style 0"
        )
    if style.shape[0] not in (1, content.shape[0]) or style.shape[1] != content.shape[1]:
        raise ValueError(
            f"style_transfer: style has shape {tuple(style.shape)} and content {tuple(content.shape)}; expected as "
            "many channels, and a batch of 1 or of the content's size"
        )
    style = style.to(content)
    style_layers = STYLE_LAYERS[loss] if style_layers is None else style_layers
    if style_layer_weights is None:
        style_layer_weights = 1.0 if isinstance(style_layers, str) else 1 / len(style_layers)
    parts: dict[str, losses.PerceptualLoss | losses.StyleLoss | losses.ContextualLoss] = {}
    if content_weight:
        parts["content"] = losses.PerceptualLoss(network, content_layers, normalization=normalization)
    if style_weight:
        kind = losses.StyleLoss if loss == "gram" else losses.ContextualLoss
        parts["style"] = kind(network, style_layers, style_layer_weights, normalization=normalization)
    together = losses.FeatureLosses(
        weights={k: {"content": content_weight, "style": style_weight}[k] for k in parts}, **parts
    )
    together.set_target(**{k: {"content": content, "style": style}[k] for k in parts})
    for part in parts.values():
        if relative and not isinstance(part, losses.ContextualLoss):
            _relative(part)

    def energy(image: Tensor) -> Tensor:
        total: Tensor = together(image)
        return total + tv_weight * losses.total_variation(image, kind="squared") if tv_weight else total

    wide = torch.promote_types(content.dtype, torch.float32)
    z = (
        torch.logit(_initial(init, content, style, seed).to(wide).clamp(MARGIN, 1 - MARGIN))
        .contiguous()
        .requires_grad_()
    )

    def image() -> Tensor:
        return torch.sigmoid(z).to(content.dtype)

    history = _descend(z, lambda: energy(image()), steps, optimizer, lr, progress)
    with torch.no_grad():
        result = image()
        history.append(float(energy(result)))
    return StyleTransfer(result, history)
