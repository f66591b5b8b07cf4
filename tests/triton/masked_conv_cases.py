"""Comparisons of the masked convolution's Triton kernels with a dense float64 convolution, for any device.

The interpreter (tests/triton/test_masked_conv.py) runs them on small CPU tensors, tests/gpu on CUDA tensors.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from genfast._verify import relative_error
from genfast.kernels.masked_conv import masked_conv, masked_conv_backward
from tests.conftest import poisoned
from tests.triton.flow_cases import FORWARD, GRADIENT

ALL = [True, True, True]


def live(weight: Tensor, mask_type: str, g: int, order: str, groups: int, center: list[int]) -> Tensor:
    """Which weights are live, tap by tap and channel by channel as the definition reads."""
    out, inner = weight.shape[:2]
    colours = {"interleaved": lambda c, channels: c % g, "blocked": lambda c, channels: c * g // channels}[order]
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        if tap < tuple(center):
            mask[(slice(None), slice(None), *tap)] = True
        elif tap == tuple(center):
            for o, i in itertools.product(range(out), range(inner)):
                of_o, of_i = colours(o, out), colours(o // (out // groups) * inner + i, inner * groups)
                mask[(o, i, *tap)] = of_i < of_o if mask_type == "A" else of_i <= of_o
    return mask


def dense(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    dilation: list[int],
    groups: int,
    center: list[int],
    activation: str,
) -> Tensor:
    """The convolution of the masked weight, padded so that ``center`` lies on the position of the output."""
    pad: list[int] = []
    for size, d, c in zip(weight.shape[2:], dilation, center):
        pad = [c * d, (size - 1 - c) * d, *pad]
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[x.dim() - 2]
    y = conv(F.pad(x, pad), torch.where(mask, weight, 0.0), bias, dilation=dilation, groups=groups)
    return y.relu() if activation == "relu" else y


# x's shape, Cout, the kernel, and what the call is made of.
CASES: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]] = {
    "one element": ((1, 1, 1), 1, (1,), dict()),
    "one element, A": ((2, 1, 3), 2, (1,), dict(mask_type="A")),
    "sequence": ((2, 3, 19), 5, (3,), dict(mask_type="A", activation="relu")),
    "sequence, last tap": ((2, 17, 37), 18, (2,), dict(center=[1], dilation=[4])),
    "first layer": ((2, 3, 5, 7), 9, (7, 7), dict(mask_type="A", g=3, activation="relu")),
    "first layer, grey": ((2, 1, 6, 5), 18, (5, 5), dict(mask_type="A", bias=False)),
    "primes": ((3, 11, 5, 7), 13, (3, 3), dict(activation="relu")),
    "even kernel": ((2, 10, 4, 6), 4, (2, 4), dict(center=[1, 2])),
    "rows above": ((2, 10, 5, 6), 6, (2, 3), dict(center=[1, 3])),
    "rows above and the row": ((1, 10, 5, 6), 6, (2, 3), dict(center=[1, 2])),
    "row": ((2, 9, 3, 8), 6, (1, 3), dict(center=[0, 2], g=3, order="blocked", activation="relu")),
    "column": ((2, 9, 6, 3), 6, (3, 1), dict(mask_type="A", g=3)),
    "nothing is seen": ((2, 10, 4, 3), 6, (3, 3), dict(mask_type="A", center=[0, 0])),
    "dilated": ((1, 12, 9, 8), 12, (3, 3), dict(dilation=[2, 3], g=3)),
    "dilated beyond the image": ((1, 12, 3, 4), 3, (3, 3), dict(dilation=[4, 5])),
    "1x1": ((2, 18, 5, 6), 33, (1, 1), dict(g=3, order="blocked", activation="relu")),
    "1x1, A": ((2, 18, 5, 6), 7, (1, 1), dict(mask_type="A", g=3)),
    "groups": ((2, 18, 5, 4), 24, (3, 3), dict(groups=2, g=3, activation="relu")),
    "groups, blocked": ((2, 20, 5, 4), 10, (3, 3), dict(groups=2, g=3, order="blocked", mask_type="A")),
    "depthwise": ((2, 6, 5, 5), 6, (3, 3), dict(groups=6, g=3)),
    "more channels than a tile": ((1, 34, 4, 5), 70, (2, 3), dict(center=[1, 1], g=3, activation="relu")),
    "more positions than a tile": ((3, 9, 7, 11), 5, (3, 3), dict(activation="relu")),
    "volume": ((2, 10, 3, 4, 3), 6, (3, 3, 3), dict(activation="relu", g=2)),
    "volume, A": ((1, 3, 3, 2, 5), 4, (2, 3, 3), dict(mask_type="A", center=[1, 1, 1], dilation=[1, 2, 1])),
    "volume, even": ((1, 9, 2, 3, 4), 3, (1, 2, 4), dict(center=[0, 1, 2])),
    "empty batch": ((0, 3, 4, 5), 6, (3, 3), dict(activation="relu")),
}


def arguments(label: str, like: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the case of that label by name; dead weights are NaN."""
    shape, out, kernel, given = CASES[label]
    chosen = dict(
        mask_type="B", g=1, order="interleaved", dilation=[1] * len(kernel), groups=1, bias=True, activation="none"
    )
    chosen |= dict(center=[k // 2 for k in kernel]) | given
    inner = shape[1] // chosen["groups"]
    weight = torch.randn((out, inner, *kernel), **like) / math.sqrt(inner * math.prod(kernel))
    mask = live(weight, chosen["mask_type"], chosen["g"], chosen["order"], chosen["groups"], chosen["center"])
    mask = mask.to(weight.device)
    bias = torch.randn(out, **like) if chosen.pop("bias") else None
    return chosen | dict(x=torch.randn(shape, **like), weight=weight.masked_fill(~mask, math.nan), bias=bias, mask=mask)


def check(a: dict[str, Any], grad_y: Tensor | None = None, wanted: list[bool] = ALL) -> tuple[Tensor, ...]:
    """Runs both kernels and compares each output with the dense convolution's in float64; returns them."""
    x, weight, bias, mask = (a[name] for name in ("x", "weight", "bias", "mask"))
    rest = (a["mask_type"], a["g"], a["order"], a["dilation"], a["groups"], a["center"], a["activation"])
    with poisoned():
        y = masked_conv(x, weight, bias, *rest)
    exact = [None if t is None else t.detach().cpu().double() for t in (x, weight.masked_fill(~mask, 0), bias)]
    exact = [None if t is None else t.requires_grad_() for t in exact]
    expected = dense(*exact, mask.cpu(), a["dilation"], a["groups"], a["center"], a["activation"])
    assert (y.shape, y.dtype) == (expected.shape, x.dtype)
    assert relative_error(y, expected.detach()) <= FORWARD[x.dtype]
    if grad_y is None:
        grad_y = torch.randn_like(y)
    with poisoned():
        found = masked_conv_backward(grad_y, x, weight, y, *rest, wanted)
    # The reference's derivative at the kernel's own output, so that rounding at the kink does not count.
    linear = dense(*exact, mask.cpu(), a["dilation"], a["groups"], a["center"], "none")
    d = grad_y.cpu().double() * (y.cpu() > 0) if a["activation"] == "relu" else grad_y.cpu().double()
    given = [t for t in exact if t is not None]
    gradients = [*torch.autograd.grad(linear, given, d), d.sum((0, *range(2, d.dim())))][:3]
    for f, e, shape, want, name in zip(
        found, gradients, (x.shape, weight.shape, y.shape[1:2]), wanted, ("x", "w", "b")
    ):
        if not want:
            assert f.shape == (0,)
            continue
        assert f.shape == shape
        error = relative_error(f, e)
        assert error <= GRADIENT[x.dtype], f"gradient of {name} is off by {error:.1e}"
    if wanted[1]:
        assert torch.equal(found[1][~mask], torch.zeros_like(found[1][~mask]))
    return y, *found
