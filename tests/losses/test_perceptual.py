"""Perceptual, style and contextual losses: against formulas written out, and against piq's style loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import losses

LAYERS = ["relu1_2", "relu2_2", "relu3_1"]


def network(width=4, dtype=torch.float64):
    return losses.random_features("vgg16", width=width, seed=1).to(dtype)


def images(*sizes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(n, 3, h, w, generator=generator, dtype=torch.float64).to(dtype) for n, h, w in sizes]


def features_by_hand(net, x, layers):
    found = {}
    for name, module in net.named_children():
        x = x.relu() if isinstance(module, nn.ReLU) else module(x)
        found[name] = x
        if name == layers[-1]:  # small images have nothing left in the later blocks
            break
    return [found[name] for name in layers]


def gram(f, normalize):
    n, c = f.shape[:2]
    g = torch.einsum("nci,ndi->ncd", f.flatten(2), f.flatten(2))
    return g / (c * f[0, 0].numel()) if normalize else g


def distance(kind, a, b, eps=1e-8):
    if kind == "mse":
        return ((a - b) ** 2).flatten(1).mean(1)
    if kind == "l1":
        return (a - b).abs().flatten(1).mean(1)
    a, b = (t / (t.pow(2).sum(1, keepdim=True) + eps).sqrt() for t in (a, b))
    return ((a - b) ** 2).sum(1).flatten(1).mean(1)


@pytest.mark.parametrize("kind", ["mse", "l1", "lpips"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_perceptual_loss_is_its_formula(kind, batch):
    net = network()
    x, y = images((3, 16, 20), (batch, 16, 20))
    weights = [1.0, 0.5, 2.0]
    pairs = zip(weights, features_by_hand(net, x, LAYERS), features_by_hand(net, y, LAYERS))
    expected = sum(w * distance(kind, a, b) for w, a, b in pairs)
    loss = losses.PerceptualLoss(net, LAYERS, weights, distance=kind, normalization=None, reduction="none")
    torch.testing.assert_close(loss(x, y), expected)
    loss = losses.PerceptualLoss(net, LAYERS, weights, distance=kind, normalization=None)
    torch.testing.assert_close(loss(x, y), expected.mean())
    loss.set_target(y)
    torch.testing.assert_close(loss(x), expected.mean())
    x = x[:1, :, :8, :8].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:1, :, :8, :8]), x)


def test_normalised_features_are_those_of_torchmetrics():
    lpips = pytest.importorskip("torchmetrics.functional.image.lpips")
    f = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    loss = losses.PerceptualLoss(nn.Sequential(nn.Identity()), "0", distance="lpips", normalization=None)
    torch.testing.assert_close(loss._prepare(f), lpips._normalize_tensor(f))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_style_loss_is_its_formula(normalize, batch):
    net = network()
    x, y = images((2, 16, 20), (batch, 24, 16))
    weights = [1.0, 0.5, 2.0]
    pairs = zip(weights, features_by_hand(net, x, LAYERS), features_by_hand(net, y, LAYERS))
    each = sum(w * ((gram(a, normalize) - gram(b, normalize)) ** 2).flatten(1).mean(1) for w, a, b in pairs)
    loss = losses.StyleLoss(net, LAYERS, weights, normalize=normalize, normalization=None)
    torch.testing.assert_close(loss(x, y), each.mean())
    loss.set_target(y)
    torch.testing.assert_close(loss(x), each.mean())
    every = losses.StyleLoss(net, LAYERS, weights, normalize=normalize, normalization=None, reduction="none")
    torch.testing.assert_close(every(x, y), each)
    one = losses.StyleLoss(net, LAYERS[:2], normalize=normalize, normalization=None)
    one.set_target(y[:1])
    assert torch.autograd.gradcheck(one, x[:1, :, :8, :8].clone().requires_grad_(), rtol=1e-4, atol=1e-6)


def test_the_style_loss_is_piqs():
    piq = pytest.importorskip("piq", exc_type=ImportError)
    net, weights = network(8, torch.float32), [1.0, 2.0, 0.5]
    x, y = images((2, 32, 32), (2, 32, 32), dtype=torch.float32)
    theirs = piq.StyleLoss(feature_extractor=net, layers=LAYERS, weights=weights)(x, y)
    ours = losses.StyleLoss(net, LAYERS, weights, normalize=False, normalization="imagenet")(x, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


def contextual(x, y, bandwidth, eps):
    """Mechrez et al., section 3.2: mean over targets of the best source, per sample."""
    mu = y.mean((0, 2, 3), keepdim=True)
    a, b = (F.normalize((t - mu).flatten(2), dim=1) for t in (x, y))
    d = (1 - torch.einsum("bcn,bcm->bnm", a, b)).clamp_min(0)
    w = ((1 - d / (d.min(2, keepdim=True).values + eps)) / bandwidth).exp()
    return (w / w.sum(2, keepdim=True)).max(1).values.mean(1)


def test_the_contextual_loss_is_its_formula():
    net = network()
    layers, weights = ["conv2_2", "conv3_1"], [1.0, 0.5]
    x, y = images((2, 16, 20), (2, 24, 16))
    pairs = list(zip(weights, features_by_hand(net, x, layers), features_by_hand(net, y, layers)))
    expected = sum(w * -contextual(a, b, 0.5, 2e-5).log().mean() for w, a, b in pairs)
    loss = losses.ContextualLoss(net, layers, weights, preset="official", normalization=None)
    torch.testing.assert_close(loss(x, y), expected)
    loss.set_target(y)
    torch.testing.assert_close(loss(x), expected)
    expected = sum(w * -contextual(a, b[:1].expand_as(b), 0.2, 2e-5).log().mean() for w, a, b in pairs)
    loss = losses.ContextualLoss(net, layers, weights, preset="official", bandwidth=0.2, normalization=None)
    torch.testing.assert_close(loss(x, y[:1]), expected)
    assert torch.autograd.gradcheck(lambda x: loss(x, y[:1]), x[:1, :, :8, :8].clone().requires_grad_(), atol=1e-4)


def every(net, **more):
    return {
        "content": losses.PerceptualLoss(net, "relu3_1", normalization="imagenet", **more),
        "style": losses.StyleLoss(net, LAYERS, normalization="imagenet", **more),
        "contextual": losses.ContextualLoss(net, "relu2_2", normalization="imagenet", **more),
    }


class Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.runs = inner, 0

    def forward(self, x):
        self.runs += 1
        return self.inner(x)


def test_several_losses_make_one_pass():
    net = network()
    x, y, z = images((1, 16, 16), (1, 16, 16), (1, 20, 16))
    parts, weights = every(net), {"style": 3.0, "contextual": 0.5}
    expected = {
        "content": parts["content"](x, y),
        "style": parts["style"](x, z),
        "contextual": parts["contextual"](x, z),
    }
    net[0] = first = Counted(net[0])
    together = losses.FeatureLosses(weights=weights, **every(net))
    assert not together.state_dict()
    assert not list(together.parameters())
    found = together.terms(x, content=y, style=z, contextual=z)
    assert first.runs == 3  # x, y, and z once for both
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    total = expected["content"] + 3 * expected["style"] + 0.5 * expected["contextual"]
    together.set_target(content=y, style=z)
    together.set_target(contextual=z)
    first.runs = 0
    torch.testing.assert_close(together(x), total)
    assert first.runs == 1
    torch.testing.assert_close(together(x, content=y), total)


@pytest.mark.parametrize("name", ["content", "style", "contextual"])
def test_no_gradient_reaches_targets_or_network(name):
    net = network().requires_grad_()
    x, y = (t.requires_grad_() for t in images((1, 16, 16), (1, 16, 16)))
    loss = every(net)[name]
    loss(x, y).backward()
    assert x.grad.abs().sum() > 0
    assert y.grad is None
    assert all(p.grad is None for p in net.parameters())
    loss.set_target(y)
    assert not any(t.requires_grad for t in loss._target)
    assert not loss.state_dict()
    assert not list(loss.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["content", "style", "contextual"])
def test_half_precision_is_near_and_finite(name, dtype):
    x, y = images((1, 32, 32), (1, 32, 32))
    expected = every(network(8))[name](x, y)
    x = x.to(dtype).requires_grad_()
    found = every(network(8, dtype))[name](x, y.to(dtype))
    found.backward()
    assert found.dtype == torch.float32
    assert float((found.detach() - expected).abs() / expected) < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert bool(x.grad.isfinite().all())
    loud = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False)).to(dtype)
    with torch.no_grad():
        loud[0].weight.copy_(300 * torch.eye(3)[:, :, None, None])
    arguments = {"layers": "0", "normalization": None}
    kinds = {"content": losses.PerceptualLoss, "style": losses.StyleLoss, "contextual": losses.ContextualLoss}
    assert bool(kinds[name](loud, **arguments)(x, torch.zeros_like(x)).isfinite())  # 300^2 is above float16's range


@pytest.mark.parametrize("name", ["content", "style", "contextual"])
@pytest.mark.parametrize("pair", ["equal", "constant", "black"])
def test_degenerate_images_are_finite(name, pair):
    x, y = images((1, 16, 16), (1, 16, 16), dtype=torch.float32)
    if pair == "equal":
        y = x.clone()
    else:
        x, y = (torch.full_like(t, 0.5 if pair == "constant" else 0.0) for t in (x, y))
    x.requires_grad_()
    for more in ({}, {"distance": "lpips"}) if name == "content" else ({},):
        net = network(4, torch.float32)
        loss = {"content": losses.PerceptualLoss, "style": losses.StyleLoss, "contextual": losses.ContextualLoss}[name](
            net, LAYERS, normalization=None, **more
        )
        value = loss(x, y)
        (grad,) = torch.autograd.grad(value, x)
        assert bool(value.isfinite())
        assert bool(grad.isfinite().all())
        if name != "contextual":
            assert value.item() == 0


@pytest.mark.slow
def test_a_loss_moves_and_compiles():
    net = network(4, torch.float32)
    x, y = images((1, 16, 16), (1, 16, 16), dtype=torch.float32)
    for name, loss in every(net).items():
        loss.set_target(y)
        expected = loss(x)
        torch.testing.assert_close(torch.compile(loss, fullgraph=True)(x), expected, msg=name)
    for loss in every(net).values():
        loss.double()
        assert loss(x.double(), y.double()).dtype == torch.float64


def test_errors_name_the_argument():
    net = network(4, torch.float32)
    x, y = images((2, 16, 16), (3, 16, 16), dtype=torch.float32)
    for kind in (losses.PerceptualLoss, losses.StyleLoss, losses.ContextualLoss):
        name = kind.__name__
        with pytest.raises(ValueError, match=f"{name}: 2 weights for 3 layers"):
            kind(net, LAYERS, [1.0, 2.0], normalization=None)
        with pytest.raises(ValueError, match=f"{name}: y is None and no target is set"):
            kind(net, LAYERS, normalization=None)(x)
        with pytest.raises(ValueError, match=f"{name}: y has a batch of 3 and x of 2 at relu1_2"):
            kind(net, LAYERS, normalization=None)(x, y)
        with pytest.raises(TypeError, match="normalization"):
            kind(net, LAYERS)
    with pytest.raises(ValueError, match="distance='cosine', expected one of 'mse'"):
        losses.PerceptualLoss(net, LAYERS, normalization=None, distance="cosine")
    with pytest.raises(ValueError, match="eps=0"):
        losses.PerceptualLoss(net, LAYERS, normalization=None, eps=0)
    for kind in (losses.PerceptualLoss, losses.StyleLoss):
        with pytest.raises(ValueError, match="reduction='sum'"):
            kind(net, LAYERS, normalization=None, reduction="sum")
    with pytest.raises(ValueError, match="expected images of one size"):
        losses.PerceptualLoss(net, LAYERS, normalization=None)(x, y[:2, :, :8])
    with pytest.raises(ValueError, match="no losses were given"):
        losses.FeatureLosses()
    with pytest.raises(TypeError, match="style is a Linear"):
        losses.FeatureLosses(style=nn.Linear(1, 1))
    one = losses.StyleLoss(net, LAYERS, normalization=None)
    for other, what in (
        (losses.StyleLoss(network(), LAYERS, normalization=None), "network"),
        (losses.StyleLoss(net, LAYERS, normalization="imagenet"), "normalization"),
        (losses.StyleLoss(net, LAYERS, normalization=None, value_range=(-1, 1)), "value_range"),
    ):
        with pytest.raises(ValueError, match=f"b and a differ in {what}"):
            losses.FeatureLosses(a=one, b=other)
    with pytest.raises(ValueError, match=r"weights names \['b'\]"):
        losses.FeatureLosses(a=one, weights={"b": 1.0})
    with pytest.raises(ValueError, match=r"targets names \['b'\]"):
        losses.FeatureLosses(a=one)(x, b=x)
    with pytest.raises(ValueError, match="y is None and no target is set"):
        losses.FeatureLosses(a=one)(x)
    with pytest.raises(ValueError, match="a has reduction 'none'"):
        losses.FeatureLosses(a=losses.StyleLoss(net, LAYERS, normalization=None, reduction="none"))(x, a=x)


# ---- total variation ----


def every_loss(net):
    options = {"normalization": None}
    return {
        "mse": losses.PerceptualLoss(net, LAYERS[:2], **options),
        "l1": losses.PerceptualLoss(net, LAYERS[:2], distance="l1", **options),
        "lpips": losses.PerceptualLoss(net, LAYERS[:2], distance="lpips", **options),
        "style": losses.StyleLoss(net, LAYERS[:2], **options),
        "contextual": losses.ContextualLoss(net, LAYERS[1], **options),
        "variation": lambda x, _: sum(
            losses.total_variation(x, kind=kind) for kind in ("anisotropic", "isotropic", "squared")
        ),
    }


@pytest.mark.parametrize("name", list(every_loss(network())))
def test_what_is_not_finite_and_nothing(name):
    loss = every_loss(network(dtype=torch.float32))[name]
    x, y = images((2, 12, 12), (2, 12, 12), dtype=torch.float32)
    for bad in (float("nan"), float("inf")):
        for which in (x, y) if name != "variation" else (x,):
            kept = which[1, 0, 5, 5].clone()
            which[1, 0, 5, 5] = bad
            leaf = x.clone().requires_grad_()
            value = loss(leaf, y)
            assert not bool(value.isfinite())
            (grad,) = torch.autograd.grad(value, leaf)
            # PyTorch's l1_loss has a sign for its gradient, which is 1 for infinity and 0 for what is not a number.
            assert name == "l1" or not bool(grad.isfinite().all())
            which[1, 0, 5, 5] = kept
    empty = x[:0].clone().requires_grad_()
    value = loss(empty, y[:0])
    assert float(value.detach()) == 0
    assert torch.autograd.grad(value, empty)[0].shape == empty.shape


@pytest.mark.parametrize("name", ["mse", "l1", "lpips", "style", "contextual"])
def test_autocast_with_a_target_that_was_kept(name):
    loss = every_loss(network(dtype=torch.float32))[name]
    x, y = images((1, 12, 12), (1, 12, 12), dtype=torch.float32)
    loss.set_target(y)
    expected = loss(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(x)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.01)
