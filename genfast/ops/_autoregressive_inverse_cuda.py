"""ops.autoregressive_inverse on a CUDA GPU: the degree-ordered engine, and the parallel parts of its backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import OPS
from ..reference.autoregressive_inverse import PRODUCT, TAILS, autoregressive_univariate
from ._cuda_engine_items import Layer, LevelItems, level_items

_FIELDS = "stream item_list tables order weights z scratch n rows items inputs width"
_CUDA = kernels(
    "_cuda",
    "degree_ordered_scratch",
    degree_ordered=f"{_FIELDS} statics statics_width x logdet given transform bins tails inverse zuko options",
    degree_ordered_backward=f"{_FIELDS} units slopes by_value constant kept",
)

# Transform of the engine.
_TRANSFORMS = {
    "affine:exp": 0,
    "affine:softclamp": 1,
    "affine:sigmoid2": 2,
    "affine:softplus": 3,
    "affine:additive": 4,
    "bernoulli": 5,
    "spline": 6,
}
_MOST = 2**31  # weights: the engine counts them in 32 bits


def _engine_options(transform: str, options: Sequence[float]) -> tuple[int, int, int, bool, bool, list[float]]:
    """Which transform, bins, tails, whether the spline is inverted, and zuko's; then the other numbers."""
    if transform != "spline":
        return _TRANSFORMS[transform], 0, 0, False, False, list(options)
    flip, bins, tails, zuko, *rest = options
    return _TRANSFORMS[transform], int(bins), int(tails), not flip, bool(zuko), rest


def _aligned(t: Tensor) -> Tensor:
    """What the engine loads four floats at a time: a slice of something larger may begin anywhere."""
    return t.clone() if t.data_ptr() % 16 else t


def _scratch(z: Tensor, rows: int) -> Tensor | None:
    floats = _CUDA.degree_ordered_scratch(len(z), rows)
    return z.new_empty(floats) if floats else None


def forward(
    z: Tensor, packed: Tensor, statics: Tensor | None, code: Tensor, transform: str, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(x, logdet) in one launch."""
    plan = level_items(code, z.device)
    if plan.size >= _MOST:
        return reference.autoregressive_inverse(z, packed, statics, code, transform, options)
    z, packed = z.contiguous(), _aligned(packed.to(z.dtype).contiguous())
    statics = None if statics is None else statics.to(z.dtype).contiguous()
    x, logdet = torch.empty_like(z), z.new_empty(len(z))
    if len(z):
        with torch.cuda.device(z.device):
            number, bins, tails, inverse, zuko, numbers = _engine_options(transform, options)
            _CUDA.degree_ordered(
                stream=torch.cuda.current_stream().cuda_stream,
                item_list=plan.items,
                tables=plan.tables,
                order=plan.order,
                weights=packed,
                statics=statics,
                statics_width=plan.statics,
                z=z,
                x=x,
                logdet=logdet,
                scratch=_scratch(z, plan.rows),
                n=len(z),
                rows=plan.rows,
                items=len(plan.items),
                inputs=plan.inputs,
                width=plan.width,
                given=plan.given,
                transform=number,
                bins=bins,
                tails=tails,
                inverse=inverse,
                zuko=zuko,
                options=numbers,
            )
    return x, logdet


def backward(
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
    """(dz, dpacked, dstatics). With x known, all units and all derivatives of each unit or input by its own arguments
    are computed at once; what remains is a recurrence over the levels, which the engine runs; the gradients of the
    weights are then products of the units with their cotangents."""
    plan = level_items(code, z.device)
    if plan.size >= _MOST:
        return reference.autoregressive_inverse_backward(
            grad_x, grad_logdet, z, x, packed, statics, code, transform, options, weights
        )
    items, tables = plan.backward()
    n, dtype = len(z), z.dtype
    z, packed = z.detach(), packed.detach().to(dtype)
    statics = None if statics is None else statics.detach().to(dtype)
    grad_x = torch.zeros_like(z) if grad_x is None else grad_x.detach().to(dtype).contiguous()
    grad_logdet = z.new_zeros(n) if grad_logdet is None else grad_logdet.detach().to(dtype)
    transposed = torch.cat([packed.new_zeros(1), packed])[plan.index]
    values, slopes = _values(plan, x.detach().to(dtype), packed, transposed, statics)
    z_slope, by_value, z_constant, constant = _univariate(plan, z, values, grad_logdet, transform, options)
    kept = torch.empty_like(values)
    if n:
        with torch.cuda.device(z.device):
            _CUDA.degree_ordered_backward(
                stream=torch.cuda.current_stream().cuda_stream,
                item_list=items,
                tables=tables,
                order=plan.order,
                weights=transposed,
                z=grad_x,
                slopes=slopes,
                by_value=by_value,
                constant=constant,
                kept=kept,
                scratch=_scratch(z, plan.units),
                n=n,
                rows=plan.units,
                units=plan.units,
                items=len(items),
                inputs=plan.inputs,
                width=plan.width,
            )
    dz = (z_slope * kept[:, : plan.inputs] + z_constant).index_select(1, plan.places)
    dpacked = _weight_gradient(plan, values, kept) if weights else packed.new_empty(0)
    dstatics = z.new_empty(0) if statics is None else _statics_gradient(plan, values, kept, statics)
    return dz, dpacked, dstatics


def _weight(layer: Layer, transposed: Tensor) -> Tensor:
    """(source_units, units)."""
    size = layer.source_units * layer.stride
    return transposed[layer.base : layer.base + size].view(-1, layer.stride)[:, : layer.units]


def _point(plan: LevelItems, layer: Layer) -> Tensor:
    return plan.tables[layer.sources : layer.sources + layer.units].long()


def _values(
    plan: LevelItems, x: Tensor, packed: Tensor, transposed: Tensor, statics: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N, U): all units, and what each one's activation and gate multiply its cotangent by."""
    values, slopes = x.new_empty(len(x), plan.units), x.new_empty(len(x), plan.units)
    values[:, : plan.inputs] = x.index_select(1, plan.sorted)
    for layer in plan.layers:
        here = slice(layer.first, layer.first + layer.units)
        if layer.kind == PRODUCT:
            h = values[:, layer.source : layer.source + layer.source_units] @ _weight(layer, transposed)
            if layer.bias >= 0:
                h += packed[layer.bias : layer.bias + layer.units]
            if layer.context >= 0 and statics is not None:
                h += statics[:, layer.context : layer.context + layer.units]
        else:
            h = values.index_select(1, _point(plan, layer))
        with torch.enable_grad():
            h.requires_grad_()
            active = layer.function(h)
            (slope,) = torch.autograd.grad(active.sum(), h)
        active = active.detach()
        if layer.gate >= 0 and statics is not None:
            gate = statics[:, layer.gate : layer.gate + layer.units]
            active, slope = active * gate, slope * gate
        if layer.residual >= 0:
            active = active + values.index_select(1, plan.tables[layer.residual : layer.residual + layer.units].long())
        values[:, here], slopes[:, here] = active, slope
    return values, slopes


def _univariate(
    plan: LevelItems, z: Tensor, values: Tensor, grad_logdet: Tensor, transform: str, options: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the sorted inputs: dx/dz, dx/dparams, and what grad_logdet adds to the cotangents of z and of the
    parameters."""
    flat = values[:, plan.parameters : plan.parameters + plan.inputs * plan.width]
    params = flat.reshape(len(z), plan.inputs, plan.width)
    z = z.index_select(1, plan.sorted)
    wanted = grad_logdet[:, None].expand_as(z)
    if transform == "spline":
        flip, bins, tails, zuko, *rest = options
        backward = OPS["rational_quadratic_spline_packed_backward"].preferred[z.device.type][0]
        args = (z, params, int(bins), TAILS[int(tails)], "zuko" if zuko else "nflows", not flip, rest)
        return (*backward(torch.ones_like(z), None, *args), *backward(None, wanted.contiguous(), *args))
    z, params = z.requires_grad_(), params.requires_grad_()
    with torch.enable_grad():
        x, logdet = autoregressive_univariate(z, params, transform, options)
        found = torch.autograd.grad(x.sum(), (z, params), retain_graph=True)
        constants: Sequence[Tensor | None] = (None, None)
        if logdet.requires_grad:
            constants = torch.autograd.grad(logdet, (z, params), wanted, allow_unused=True)
    z_constant, constant = (torch.zeros_like(t) if c is None else c for c, t in zip(constants, (z, params)))
    return found[0], found[1].contiguous(), z_constant, constant.contiguous()


def _weight_gradient(plan: LevelItems, values: Tensor, kept: Tensor) -> Tensor:
    flat = values.new_zeros(len(plan.index) + 1)
    for layer in plan.layers:
        if layer.kind == PRODUCT:
            source = values[:, layer.source : layer.source + layer.source_units]
            _weight(layer, flat[1:]).copy_(source.t() @ kept[:, layer.first : layer.first + layer.units])
    grad = flat[plan.inverse]
    for layer in plan.layers:
        if layer.bias >= 0:
            grad[layer.bias : layer.bias + layer.units] = kept[:, layer.first : layer.first + layer.units].sum(0)
    return grad


def _statics_gradient(plan: LevelItems, values: Tensor, kept: Tensor, statics: Tensor) -> Tensor:
    grad = torch.zeros_like(statics)
    for layer in plan.layers:
        cotangent = kept[:, layer.first : layer.first + layer.units]
        if layer.context >= 0:
            grad[:, layer.context : layer.context + layer.units] = cotangent
        if layer.gate >= 0:
            active = layer.function(values.index_select(1, _point(plan, layer)))
            grad[:, layer.gate : layer.gate + layer.units] = cotangent * active
    return grad
