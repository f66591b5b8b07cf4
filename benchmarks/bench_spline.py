"""The rational-quadratic spline of 8 bins, forward and backward with its log-derivative, from three tensors and from one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients

BINS, BOUND, MINIMUM = 8, 3.0, 1e-3


def _knots(logits: Tensor) -> tuple[Tensor, Tensor]:
    sizes = MINIMUM + (1 - MINIMUM * BINS) * F.softmax(logits, dim=-1)
    knots = F.pad(torch.cumsum(sizes, dim=-1), (1, 0)) * 2 * BOUND - BOUND
    knots = torch.cat((knots[..., :-1], torch.full_like(knots[..., :1], BOUND)), -1)
    return knots, knots[..., 1:] - knots[..., :-1]


def _evaluated(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """nflows' rational_quadratic_spline with its bin search, without the check of its domain, which waits for the device."""
    x_knots, widths = _knots(widths)
    y_knots, heights = _knots(heights)
    derivatives = MINIMUM + F.softplus(derivatives)
    k = ((x[..., None] >= x_knots[..., :-1]).sum(-1, keepdim=True) - 1).clamp_min(0)
    x0, w, y0, h = (v.gather(-1, k)[..., 0] for v in (x_knots, widths, y_knots, heights))
    d0, d1 = derivatives.gather(-1, k)[..., 0], derivatives[..., 1:].gather(-1, k)[..., 0]
    s = h / w
    theta = (x - x0) / w
    t = theta * (1 - theta)
    denominator = s + (d0 + d1 - 2 * s) * t
    y = y0 + h * (s * theta.square() + d0 * t) / denominator
    rise = s.square() * (d1 * theta.square() + 2 * s * t + d0 * (1 - theta).square())
    return y, rise.log() - 2 * denominator.log()


def eager(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """As nflows writes it: the elements inside the bound are taken out by a mask, and put back."""
    derivatives = F.pad(derivatives, (1, 1), value=math.log(math.exp(1 - MINIMUM) - 1))
    inside = (x >= -BOUND) & (x <= BOUND)
    y, logdet = torch.zeros_like(x), torch.zeros_like(x)
    y[~inside] = x[~inside]
    y[inside], logdet[inside] = _evaluated(x[inside], widths[inside, :], heights[inside, :], derivatives[inside, :])
    return y, logdet


def trick(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """All elements, clamped, and a choice at the end: no indices, no count to wait for."""
    derivatives = F.pad(derivatives, (1, 1), value=math.log(math.exp(1 - MINIMUM) - 1))
    inside = (x >= -BOUND) & (x <= BOUND)
    y, logdet = _evaluated(x.clamp(-BOUND, BOUND), widths, heights, derivatives)
    return torch.where(inside, y, x), torch.where(inside, logdet, torch.zeros_like(logdet))


def peer(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """nflows' own."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    found: tuple[Tensor, Tensor] = unconstrained_rational_quadratic_spline(x, widths, heights, derivatives, tail_bound=BOUND)
    return found


def ours(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    return genfast.ops.rational_quadratic_spline(x, widths, heights, derivatives, bound=BOUND)


def _case(elements: int, packed: bool, quick: bool) -> Case:
    counts = (BINS, BINS, BINS - 1)

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x = torch.randn(elements, device=device, requires_grad=True)
        params = torch.randn(elements, sum(counts), device=device)
        gy, gl = torch.randn(elements, device=device), torch.randn(elements, device=device)
        if packed:
            params.requires_grad_()
            return lambda: gradients(function(x, params), (x, params), (gy, gl))
        parts = [p.contiguous().requires_grad_() for p in params.split(counts, -1)]
        return lambda: gradients(function(x, *parts), (x, *parts), (gy, gl))

    def taken(function: Work) -> Work:
        return (lambda x, params: function(x, *params.split(counts, -1))) if packed else function

    def provider(function: Work) -> Work:
        return lambda: work(taken(function))

    def packed_ours(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return genfast.ops.rational_quadratic_spline_packed(x, params, BINS, bound=BOUND)

    providers = {
        "reference": provider(eager),
        "compile": lambda: work(torch.compile(taken(trick), dynamic=False)),
        "trick": provider(trick),
        "peer": provider(peer),
        "genfast": lambda: work(packed_ours if packed else ours),
    }
    # float32: the forward reads x and 3K - 1 parameters and writes y and logdet; the backward reads those, two cotangents, and
    # writes dx and the parameters' gradients.
    size = sum(counts)
    name = f"rational_quadratic_spline {'packed ' if packed else ''}{elements}"
    return Case(name, providers, bytes=4 * elements * ((1 + size + 2) + (1 + size + 2 + 1 + size)), quick=quick)


CASES = [
    _case(16_384, False, True),
    _case(16_384, True, False),
    _case(1_048_576, False, False),
    _case(1_048_576, True, False),
]
