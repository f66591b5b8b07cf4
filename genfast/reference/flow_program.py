"""A normalising flow as a flat program: z and log |det dz/dx| of x, step after step.

The program comes as ``code``, in the format that genfast/programs/flow_program.py describes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoregressive_inverse import TAILS, affine_log_scale, program_activation
from .spline import rational_quadratic_spline_packed

HEADER, STEP = 8, 14
PRODUCT, POINT, AFFINE, SPLINE, SCALE, CONSTANT, BASE = range(7)
SCALES = ("exp", "softclamp", "sigmoid", "softplus", "additive", "given")
MODES = ("scale_then_shift", "inverse", "shift_then_scale", "inverse_shift_first")
BASES = ("normal", "logistic")


def flow_program(
    x: Tensor,
    context: Tensor | None,
    weights: Tensor,
    code: Tensor,
    options: Sequence[float],
    rows: int,
    tile: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (z (N, D), total (N,), values): total is log |det dz/dx|, and the base's density where the program ends
    with it; values, with ``keep``, are every row and the total, (tiles, rows + 1, tile) in one vector, else empty.

    Half types are computed in float32, which total keeps.
    """
    dtype = x.dtype
    if x.element_size() < 4:
        x, weights = x.float(), weights.float()
        context = None if context is None else context.float()
    numbers = code.tolist()
    inputs, _, _, _, count, outputs = numbers[:6]
    values: dict[int, Tensor] = {i: x[:, i] for i in range(inputs)}
    if context is not None:
        values |= {inputs + i: context[:, i] for i in range(context.shape[1])}
    total = x.new_zeros(len(x))

    def columns(offset: int, length: int) -> Tensor | None:
        if offset < 0:
            return None
        return torch.stack([values[row] for row in numbers[offset : offset + length]], 1) if length else x[:, :0]

    for i in range(count):
        start = HEADER + STEP * i
        operation, first, units, kind, *f = numbers[start : start + STEP]
        if operation == CONSTANT:
            total = total + weights[f[0]]
            continue
        if operation == BASE:
            z = columns(f[0], units)
            assert z is not None
            total = total + _base(z, kind).sum(1)
            continue
        if operation == PRODUCT:
            made = _product(columns, numbers, weights, units, kind, f)
        elif operation == POINT:
            source, gate, added = (columns(offset, units) for offset in f[:3])
            assert source is not None
            made = program_activation(kind, source)
            made = made if gate is None else made * gate
            made = made if added is None else made + added
        elif operation == SPLINE:
            bins, zuko, inverse, constant = f[2], f[3], f[4], f[5]
            width = 2 * bins + (bins - 1 + (0, 2, 1)[kind])
            z, params = columns(f[0], units), columns(f[1], units * width)
            assert z is not None
            assert params is not None
            made, slope = rational_quadratic_spline_packed(
                z,
                params.unflatten(1, (units, width)),
                bins,
                TAILS[kind],
                "zuko" if zuko else "nflows",
                bool(inverse),
                list(options[constant : constant + 9]),
            )
            total = total + slope.sum(1)
        else:
            z = columns(f[0], units)
            assert z is not None
            if operation == AFFINE:
                a, t, constant = columns(f[1], units), columns(f[2], units), f[4]
            else:
                index = numbers[f[4] : f[4] + units]
                a, t = (None if offset < 0 else weights[[offset + j for j in index]].expand_as(z) for offset in f[1:3])
                constant = -1
            made, log_s = _affine(z, a, t, SCALES[kind], MODES[f[3]], options[constant] if constant >= 0 else 0.0)
            if operation == AFFINE or not f[5]:
                total = total + log_s.sum(1)
        values |= {first + j: made[:, j] for j in range(units)}
    latent = columns(outputs, inputs)
    assert latent is not None
    kept = x.new_empty(0)
    if keep and len(x):
        every = torch.stack([*(values[row] for row in range(rows)), total], 1).detach()
        padding = every[-1:].expand(-len(every) % tile, -1)  # the last tile repeats the last sample
        kept = torch.cat([every, padding]).unflatten(0, (-1, tile)).transpose(1, 2).flatten()
    return latent.contiguous().to(dtype), total, kept.to(dtype)


def flow_program_backward(
    grad_z: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor,
    values: Tensor,
    code: Tensor,
    options: Sequence[float],
    rows: int,
    tile: int,
    need_x: bool,
    need_context: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dx, dcontext, dweights), the first two empty where they are not needed: autograd through the program."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [t for t in (x, context, weights) if t is not None]
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in given]
        made = flow_program(
            leaves[0], leaves[1] if context is not None else None, leaves[-1], code, options, rows, tile, False
        )
        pairs = [(o, g.to(o.dtype)) for o, g in zip(made, (grad_z, grad_total)) if g is not None and o.requires_grad]
        grads: Sequence[Tensor | None] = [None] * len(leaves)
        if pairs:
            grads = torch.autograd.grad(
                [o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=differentiable, allow_unused=True
            )
    every = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves)]
    empty = x.new_empty(0)
    return (every[0] if need_x else empty, every[1] if context is not None and need_context else empty, every[-1])


def _product(columns: object, numbers: list[int], weights: Tensor, units: int, activation: int, f: list[int]) -> Tensor:
    """act(W h + bias + added), the weights beyond ``live`` inputs of a unit left out."""
    weight, stride, bias, inputs, sources, places, out, live, added = f[:9]
    index = torch.tensor(numbers[out : out + units])[:, None] * stride + torch.tensor(numbers[places : places + inputs])
    matrix = weights[(weight + index).to(weights.device)]
    if live >= 0:
        reach = torch.tensor(numbers[live : live + units])[:, None] > torch.arange(inputs)
        matrix = torch.where(reach.to(weights.device), matrix, matrix.new_zeros(()))
    h = columns(sources, inputs) @ matrix.t()  # type: ignore[operator]
    if bias >= 0:
        h = h + weights[[bias + r for r in numbers[out : out + units]]]
    extra = columns(added, units)  # type: ignore[operator]
    return program_activation(activation, h if extra is None else h + extra)


def _affine(
    x: Tensor, a: Tensor | None, t: Tensor | None, scale: str, mode: str, constant: float
) -> tuple[Tensor, Tensor]:
    """(z, log |dz/dx|) of z = s x + t, s (x + t) or the inverse of one of them; no a stands for s = 1, no t for 0."""
    if a is None:
        log_s, s = torch.zeros_like(x), torch.ones_like(x)
    elif scale == "given":
        log_s, s = a.abs().log(), a
    else:
        log_s = affine_log_scale(a, {"sigmoid": "sigmoid2"}.get(scale, scale), constant)
        s = log_s.exp()
    shift = torch.zeros_like(x) if t is None else t
    if mode == "scale_then_shift":
        return s * x + shift, log_s
    if mode == "shift_then_scale":
        return s * (x + shift), log_s
    return ((x - shift) / s if mode == "inverse" else x / s - shift), -log_s


def _base(z: Tensor, kind: int) -> Tensor:
    if BASES[kind] == "normal":
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    return -(F.softplus(z) + F.softplus(-z))
