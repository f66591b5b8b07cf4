"""The rational-quadratic spline of 8 bins, forward and backward with its log-derivative, from three tensors and from
one."""

from __future__ import annotations

import importlib.util
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
    """nflows' rational_quadratic_spline with its bin search, without the check of its domain, which waits for the
    device."""
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
    """All elements, clamped, and a choice at the end: no indices, no count to wait for. A bin's start is a masked
    sum."""
    inside = (x >= -BOUND) & (x <= BOUND)
    u = x.clamp(-BOUND, BOUND)
    w, h = (2 * BOUND * (MINIMUM + (1 - MINIMUM * BINS) * F.softmax(v, dim=-1)) for v in (widths, heights))
    derivatives = F.pad(MINIMUM + F.softplus(derivatives), (1, 1), value=1.0)
    k = (u[..., None] >= w.detach().cumsum(-1)[..., :-1] - BOUND).sum(-1, keepdim=True)
    before = torch.arange(BINS, device=x.device) < k
    x0, y0 = (torch.where(before, v, 0.0).sum(-1) - BOUND for v in (w, h))
    w, h, d0, d1 = (v.gather(-1, i)[..., 0] for v, i in ((w, k), (h, k), (derivatives, k), (derivatives, k + 1)))
    s = h / w
    theta = (u - x0) / w
    t = theta * (1 - theta)
    denominator = s + (d0 + d1 - 2 * s) * t
    y = y0 + h * (s * theta.square() + d0 * t) / denominator
    rise = s.square() * (d1 * theta.square() + 2 * s * t + d0 * (1 - theta).square())
    logdet = rise.log() - 2 * denominator.log()
    return torch.where(inside, y, x), torch.where(inside, logdet, torch.zeros_like(logdet))


def peer(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    """nflows' own."""
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    found: tuple[Tensor, Tensor] = unconstrained_rational_quadratic_spline(
        x, widths, heights, derivatives, tail_bound=BOUND
    )
    return found


def ours(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
    return genfast.ops.rational_quadratic_spline(x, widths, heights, derivatives, bound=BOUND)


def _case(
    elements: int, packed: bool, quick: bool, *, dtype: str = "float32", backward: bool = True, priority: int = 1
) -> Case:
    counts = (BINS, BINS, BINS - 1)
    kind = _ceilings.DTYPES[dtype]

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x = torch.randn(elements, device=device).to(kind).requires_grad_(backward)
        params = torch.randn(elements, sum(counts), device=device).to(kind)
        gy, gl = torch.randn(elements, device=device).to(kind), torch.randn(elements, device=device)
        leaves = [params] if packed else [p.contiguous() for p in params.split(counts, -1)]
        leaves = [p.requires_grad_(backward) for p in leaves]

        def run() -> list[Tensor]:
            y, logdet = function(x, *leaves)
            if not backward:
                return [y, logdet]
            return gradients((y, logdet), (x, *leaves), (gy, gl))

        return run

    def taken(function: Work) -> Work:
        def wide(x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
            """In float32, as autocast takes these functions: bins' borders in bfloat16 are off by more than a bin's
            width."""
            parts = params[0].float().split(counts, -1) if packed else [p.float() for p in params]
            y, logdet = function(x.float(), *parts)
            return y.to(kind), logdet

        return wide

    def provider(function: Work) -> Work:
        return lambda: work(taken(function))

    def packed_ours(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return genfast.ops.rational_quadratic_spline_packed(x, params, BINS, bound=BOUND)

    providers = {
        "reference": provider(eager),
        # Of the trick: compiled for a CPU by torch 2.13, nflows' form gives other gradients of the widths and heights.
        "compile": lambda: work(torch.compile(taken(trick), dynamic=False)),
        "trick": provider(trick),
    }
    if not backward:  # forward and backward shows it
        del providers["compile"]
    if importlib.util.find_spec("nflows") is not None and dtype == "float32":
        providers["peer"] = provider(peer)
    providers["genfast"] = lambda: work(packed_ours if packed else ours)
    # The forward reads x and 3K - 1 parameters and writes y and logdet; the backward reads those, two cotangents, and
    # writes dx and the parameters' gradients; logdet and its cotangent are float32.
    size = sum(counts)
    name = f"rational_quadratic_spline {'packed ' if packed else ''}{elements}"
    name += f"{'' if dtype == 'float32' else f' {dtype}'}{'' if backward else ' forward'}"
    moved = elements * (kind.itemsize * ((1 + size + 1) + (1 + size + 1 + 1 + size) * backward) + 4 * (1 + backward))
    # The derivative of logdet jumps at a knot, and rounding puts a few of a million elements on its other side.
    tolerance = 1e-2 if elements > 1 << 18 and dtype == "float32" else None
    return Case(name, providers, bytes=moved, quick=quick, tolerance=tolerance, dtype=dtype, priority=priority)


CASES = [
    _case(16_384, False, True),
    _case(16_384, True, False),
    _case(1_048_576, False, False),
    _case(1_048_576, True, False),
]

if _ceilings.DEVICE == "cuda":  # parameters of 276 MiB and of 1.1 GiB
    CASES += [
        _case(n // kind.itemsize << 20, True, False, dtype=dtype, backward=backward, priority=0)
        for n in (12, 48)
        for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for backward in (False, True)
    ]
    CASES.append(_case(3 << 20, False, False, priority=0))
