"""The inverse of an autoregressive transformation, as one writes it: a pass of the network for each level of inputs.

x_i = f(z_i; theta_i(x)), where theta_i sees inputs of lower levels only; logdet = log |det dx/dz| = sum_i log
|f'(z_i)|. The network comes as ``packed`` and ``code``, in the format that genfast/programs/degree_program.py
describes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .spline import rational_quadratic_spline_packed

TAILS = ("linear", "none", "circular")
ACTIVATIONS = ("none", "relu", "leaky_relu", "elu", "tanh", "sigmoid", "softplus", "silu", "gelu")
_FUNCTIONS = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
}
HEADER = 9
PRODUCT, POINT = 0, 1


@dataclass
class Step:
    """One layer of the program: act(W source + bias + context) + residual, or act(source) gate + residual."""

    kind: int
    activation: int
    source: int
    source_units: int
    first: int
    units: int
    bias: int
    context: int
    gate: int
    sources: list[int]  # POINT: the unit that each one is made of
    residual: list[int]
    weight: Tensor | None = None


def autoregressive_inverse(
    z: Tensor, packed: Tensor, statics: Tensor | None, code: Tensor, transform: str, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Returns (x, logdet): (N, D) and (N,); sums in float32 where z is of a half type."""
    wide = z.dtype if z.element_size() >= 4 else torch.float32
    u, packed = z.to(wide), packed.to(wide)
    statics = None if statics is None else statics.to(wide)
    numbers = code.tolist()
    inputs, width, levels = numbers[:3]
    order = torch.tensor(numbers[HEADER : HEADER + inputs], dtype=torch.int64, device=z.device)
    ends = numbers[HEADER + inputs : HEADER + inputs + levels]
    steps = _steps(numbers, packed)
    u = u.index_select(1, order)
    known: list[Tensor] = []
    logdet = u.new_zeros(len(u))
    start = 0
    for end in ends:
        x = torch.cat([*known, torch.zeros_like(u[:, start:])], 1)
        params = _network(x, packed, statics, steps).unflatten(1, (inputs, width))
        solved, slope = autoregressive_univariate(u[:, start:end], params[:, start:end], transform, options)
        known.append(solved)
        logdet = logdet + slope.sum(1)
        start = end
    x = torch.cat(known, 1) if known else u
    return x.index_select(1, order.argsort()).to(z.dtype), logdet


def autoregressive_inverse_backward(
    grad_x: Tensor | None,
    grad_logdet: Tensor | None,
    z: Tensor,
    x: Tensor,
    packed: Tensor,
    statics: Tensor | None,
    code: Tensor,
    transform: str,
    options: Sequence[float],
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (dz, dpacked, dstatics), the second empty without ``weights``, the third without statics.

    Autograd through every pass: exact, since the Jacobian is triangular. x is what the forward gave.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [t if t.requires_grad else t.detach().requires_grad_() for t in (z, packed, statics) if t is not None]
        found = autoregressive_inverse(
            leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None, code, transform, options
        )
        pairs = [(o, g.to(o.dtype)) for o, g in zip(found, (grad_x, grad_logdet)) if g is not None and o.requires_grad]
        grads: list[Tensor | None] = [None] * len(leaves)
        if pairs:
            grads = list(
                torch.autograd.grad(
                    [o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=differentiable, allow_unused=True
                )
            )
    dz, dpacked, *rest = (torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves))
    return dz, dpacked if weights else z.new_empty(0), rest[0] if rest else z.new_empty(0)


def autoregressive_univariate(
    z: Tensor, params: Tensor, transform: str, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(x, log |dx/dz|), each of z's shape; params (*z.shape, P).

    "affine:<scale>": z = s x + t, or x = s z + t with the option ``flip``; s of a by ``scale``. "bernoulli": z are
    uniforms. "spline": z = the rational-quadratic spline of x, or x that of z with ``flip``; options flip, bins, tails,
    zuko, its nine.
    """
    if transform == "bernoulli":
        chance = params[..., 0].sigmoid()
        return torch.where(chance.isnan(), chance, (z < chance).to(z.dtype)).to(z.dtype), torch.zeros_like(z)
    if transform == "spline":
        flip, bins, tails, zuko, *rest = options
        return rational_quadratic_spline_packed(
            z, params, int(bins), TAILS[int(tails)], "zuko" if zuko else "nflows", not flip, rest
        )
    flip, scale_first, constant = options
    scale = transform.removeprefix("affine:")
    if scale == "additive":
        t = params[..., 0]
        return (z + t if flip else z - t), torch.zeros_like(z)
    a, t = params.unbind(-1) if scale_first else params.flip(-1).unbind(-1)
    log_s = affine_log_scale(a, scale, constant)
    s = log_s.exp()
    return (s * z + t, log_s) if flip else ((z - t) / s, -log_s)


def affine_log_scale(a: Tensor, scale: str, constant: float) -> Tensor:
    """log s(a): of "exp" e^a, "softclamp" a / (1 + |a / constant|), "sigmoid2" sigmoid(a + 2) + constant, "softplus"
    softplus(a) + constant."""
    if scale == "exp":
        return a
    if scale == "softclamp":
        return a / (1 + (a / constant).abs())
    if scale == "sigmoid2":
        return (torch.sigmoid(a + 2) + constant).log()
    return (F.softplus(a) + constant).log()


def program_activation(number: int, x: Tensor) -> Tensor:
    """The activation that stands in a program as ``number``."""
    y: Tensor = _FUNCTIONS[ACTIVATIONS[number]](x)
    return y


def _steps(numbers: list[int], packed: Tensor) -> list[Step]:
    inputs, _, levels, count, groups = numbers[:5]
    at = HEADER + inputs + levels
    steps = []
    for i in range(count):
        fields = numbers[at + 11 * i : at + 11 * i + 11]
        sources, residual = (numbers[f : f + fields[5]] if f >= 0 else [] for f in fields[9:])
        kind, activation, source, source_units, first, units, bias, context, gate = fields[:9]
        steps.append(Step(kind, activation, source, source_units, first, units, bias, context, gate, sources, residual))
    at += 11 * count
    rows: list[list[Tensor]] = [[] for _ in steps]
    for i in range(groups):
        _, layer, _, units, live, offset, stride = numbers[at + 7 * i : at + 7 * i + 7]
        if steps[layer].kind == PRODUCT:
            block = packed[offset : offset + units * stride].view(units, stride)[:, :live]
            rows[layer].append(F.pad(block, (0, steps[layer].source_units - live)))
    for step, blocks in zip(steps, rows):
        step.weight = torch.cat(blocks) if blocks else None
    return steps


def _network(x: Tensor, packed: Tensor, statics: Tensor | None, steps: list[Step]) -> Tensor:
    """The parameters (N, D * P) in sorted order; ``units`` holds every unit, the inputs first."""
    units = x
    for s in steps:
        if s.kind == PRODUCT:
            assert s.weight is not None
            h = units[:, s.source : s.source + s.source_units] @ s.weight.t()
            h = h + packed[s.bias : s.bias + s.units] if s.bias >= 0 else h
            if s.context >= 0 and statics is not None:
                h = h + statics[:, s.context : s.context + s.units]
        else:
            h = units[:, s.sources]
        h = program_activation(s.activation, h)
        if s.gate >= 0 and statics is not None:
            h = h * statics[:, s.gate : s.gate + s.units]
        if s.residual:
            h = h + units[:, s.residual]
        units = torch.cat([F.pad(units, (0, s.first - units.shape[1])), h], 1)
    return units[:, steps[-1].first :]
