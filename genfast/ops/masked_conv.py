"""ops.masked_conv1d/2d/3d: causal convolutions that multiply live taps only."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _allocator, reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from .._tensors import memory_format
from . import _check
from ._autocast import autocast

_NAME = "masked_conv"
_FIELDS = "is_double relu x x_stride y y_stride weight centre taps tap_count kernel n cin cout groups d h w threads"
_CPU = kernels(
    "_cpu",
    masked_conv=f"{_FIELDS} bias",
    masked_conv_backward=f"{_FIELDS} grad_y grad_stride saved saved_stride grad_weight grad_bias",
)
_ORDERS = ("interleaved", "blocked")
_ACTIVATIONS = ("none", "relu")


def check_masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: Sequence[int],
    groups: int,
    center: Sequence[int],
    activation: str,
) -> None:
    """x (N, C, *spatial), weight (O, C / groups, *kernel) and the options fit."""
    dims = x.dim() - 2
    op = f"masked_conv{dims}d" if dims in (1, 2, 3) else _NAME
    _check.floating(op, x=x, weight=weight, bias=bias)
    if dims not in (1, 2, 3):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, C, *spatial) with 1, 2 or 3 spatial axes")
    if weight.dim() != x.dim():
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected (O, C / groups, *kernel), kernel of {dims} axes"
        )
    _check.choice(op, "mask_type", mask_type, ("A", "B"))
    _check.choice(op, "group_order", group_order, _ORDERS)
    _check.choice(op, "activation", activation, _ACTIVATIONS)
    for name, value in (("data_channels", data_channels), ("groups", groups)):
        if value < 1:
            raise ValueError(f"{op}: {name}={value}, expected at least 1")
    channels, out, kernel = x.shape[1], weight.shape[0], weight.shape[2:]
    for name, value in (("x's channels", channels), ("weight's output channels", out)):
        if value % data_channels:
            raise ValueError(f"{op}: {name} are {value}, not a multiple of data_channels={data_channels}")
        if value % groups:
            raise ValueError(f"{op}: {name} are {value}, not a multiple of groups={groups}")
    if not out:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected at least one output channel")
    if weight.shape[1] * groups != channels:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected {channels // groups} input channels per group "
            f"(x has {channels}, groups={groups})"
        )
    if len(dilation) != dims or min(dilation) < 1:
        raise ValueError(f"{op}: dilation={tuple(dilation)}, expected {dims} numbers of at least 1")
    if len(center) != dims or any(not 0 <= c < k for c, k in zip(center, kernel)):
        raise ValueError(f"{op}: center={tuple(center)}, expected a position inside the kernel {tuple(kernel)}")
    if bias is not None:
        _check.shape(op, "bias", bias, (out,), "one per output channel")


def _check_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: Sequence[int],
    groups: int,
    center: Sequence[int],
    activation: str,
    wanted: Sequence[bool],
) -> None:
    check_masked_conv(x, weight, None, mask_type, data_channels, group_order, dilation, groups, center, activation)
    op, of = f"{_NAME}_backward", (x.shape[0], weight.shape[0], *x.shape[2:])
    _check.shapes(op, grad_y=(grad_y, of, "that of the output"))
    if activation == "relu":  # without it y is not read
        _check.shapes(op, y=(y, of, "that of the output"))
    _check.flags(op, "wanted", wanted, 3)


@functools.lru_cache(1024)
def _plan(
    xs: tuple[int, ...],
    ws: tuple[int, ...],
    dtype: torch.dtype,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: tuple[int, ...],
    groups: int,
    center: tuple[int, ...],
    activation: str,
) -> tuple[Any, Any]:
    """The forward and the backward kernel with the live taps, and which pairs of channels live in the centre tap."""
    kernel = ws[2:]
    mask = reference.conv_mask(ws, center, mask_type, data_channels, group_order, groups)
    every: tuple[Any, ...] = (slice(None), slice(None))
    centre = mask[every + center]
    taps = []
    for index, tap in enumerate(itertools.product(*(range(k) for k in kernel))):
        if tap < center or (tap == center and bool(centre.any())):
            offset = [(t - c) * d for t, c, d in zip(tap, center, dilation)]
            taps += [0] * (3 - len(offset)) + offset + [index]
    size = 1
    for k in kernel:
        size *= k
    d, h, w = (1,) * (3 - len(kernel)) + xs[2:]
    fields = {
        "is_double": dtype is torch.float64,
        "relu": activation == "relu",
        "taps": torch.tensor(taps, dtype=torch.int64),
        "tap_count": len(taps) // 4,
        "kernel": size,
        "n": xs[0],
        "cin": xs[1],
        "cout": ws[0],
        "groups": groups,
        "d": d,
        "h": h,
        "w": w,
        "centre": None if bool(centre.all()) else centre.to(torch.uint8).contiguous(),
    }
    return _CPU.masked_conv.prepare(**fields), _CPU.masked_conv_backward.prepare(**fields)


@functools.lru_cache(4096)
def _strides(stride: tuple[int, ...]) -> Tensor:
    """Strides as n, c, d, h, w."""
    return torch.tensor([*stride[:2], *(0,) * (5 - len(stride)), *stride[2:]], dtype=torch.int64)


def _lies(like: Tensor, channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of an output with ``channels``, dense in the order of ``like``."""
    shape = (like.shape[0], channels, *like.shape[2:])
    form = memory_format(like)
    last = form != torch.contiguous_format
    order = [0, *range(2, like.dim()), 1] if last else range(like.dim())
    stride, step = [0] * like.dim(), 1
    for axis in reversed(list(order)):
        stride[axis] = step
        step *= max(1, shape[axis])
    return shape, tuple(stride)


def _empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor like ``x``, dense in its order."""
    return _allocator.empty_strided(*_lies(x, x.shape[1]), x.dtype)


class _Call(NamedTuple):
    """A forward call that has been checked: the kernel and how its output lies."""

    kernel: Any
    y_shape: tuple[int, ...]
    y_stride: tuple[int, ...]
    small: bool  # below the allocator's least block


_CALLS: dict[Any, _Call] = {}  # by everything that decides about a call but the numbers


def _prepared(key: Any, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]) -> _Call:
    check_masked_conv(x, weight, bias, *options)
    mask_type, data_channels, group_order, dilation, groups, center, activation = options
    kernel, _ = _plan(
        x.shape, weight.shape, x.dtype, mask_type, data_channels, group_order, dilation, groups, center, activation
    )
    shape, stride = _lies(x, weight.shape[0])
    small = math.prod(shape) * x.element_size() < _allocator.MINIMUM
    if len(_CALLS) >= 4096:
        _CALLS.clear()
    kernel = kernel.prepare(x_stride=_strides(x.stride()), y_stride=_strides(stride))
    call = _CALLS[key] = _Call(kernel, shape, stride, small)
    return call


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    dtype = x.dtype
    options = tuple(tuple(o) if isinstance(o, list) else o for o in options)
    key = (
        x.shape,
        x.stride(),
        dtype,
        weight.shape,
        weight.dtype,
        None if bias is None else (bias.shape, bias.dtype),
        options,
    )
    call = _CALLS.get(key) or _prepared(key, x, weight, bias, options)
    if weight.dtype is not dtype or not weight.is_contiguous():
        weight = weight.to(dtype).contiguous()
    if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
        bias = bias.to(dtype).contiguous()
    y = (torch.empty_strided if call.small else _allocator.empty_strided)(call.y_shape, call.y_stride, dtype=dtype)
    if not y.numel():
        return y
    call.kernel(x=x, weight=weight, bias=bias, y=y, threads=torch.get_num_threads())
    return y


def _cpu_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: Sequence[int],
    groups: int,
    center: Sequence[int],
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    _, kernel = _plan(
        tuple(x.shape),
        tuple(weight.shape),
        x.dtype,
        mask_type,
        data_channels,
        group_order,
        tuple(dilation),
        groups,
        tuple(center),
        activation,
    )
    dtype, own = x.dtype, weight.dtype
    grad_y, y, weight = grad_y.to(dtype), y.to(dtype), weight.to(dtype).contiguous()
    dx = _empty_like(x) if wanted[0] else x.new_empty(0)
    dw = torch.empty_like(weight) if wanted[1] else weight.new_empty(0)
    db = weight.new_empty(weight.shape[0] if wanted[2] else 0)
    if not x.numel() or not y.numel():
        return dx.zero_(), dw.zero_().to(own), db.zero_().to(own)
    kernel(
        grad_y=grad_y,
        grad_stride=_strides(grad_y.stride()),
        saved=y,
        saved_stride=_strides(y.stride()),
        x=x,
        x_stride=_strides(x.stride()),
        weight=weight,
        y=dx if wanted[0] else None,
        y_stride=_strides(dx.stride() if wanted[0] else x.stride()),
        grad_weight=dw if wanted[1] else None,
        grad_bias=db if wanted[2] else None,
        threads=torch.get_num_threads(),
    )
    return dx, dw.to(own), db.to(own)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def made(label: str, xs: tuple[int, ...], ws: tuple[int, ...], bias: bool, *options: Any) -> Sample:
        x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (xs, ws, ws[:1]))
        return Sample(label, (x, w / (w[0].numel() ** 0.5), b if bias else None, *options))

    yield made("A 2-D", (2, 3, 7, 6), (8, 3, 5, 5), True, "A", 1, "interleaved", [1, 1], 1, [2, 2], "none")
    yield made("B 2-D relu", (2, 8, 6, 7), (5, 8, 3, 3), True, "B", 1, "interleaved", [1, 1], 1, [1, 1], "relu")
    yield made("A colours", (2, 3, 5, 6), (6, 3, 3, 5), False, "A", 3, "interleaved", [1, 1], 1, [1, 2], "none")
    yield made(
        "B colours blocked dilated", (2, 6, 6, 8), (9, 6, 3, 3), True, "B", 3, "blocked", [2, 1], 1, [1, 1], "none"
    )
    yield made("B groups", (2, 6, 5, 5), (4, 3, 3, 3), True, "B", 1, "interleaved", [1, 2], 2, [1, 1], "none")
    yield made("even kernel", (2, 4, 5, 6), (20, 4, 2, 4), False, "B", 1, "interleaved", [1, 1], 1, [1, 2], "none")
    yield made("1x1 colours", (2, 6, 4, 5), (6, 6, 1, 1), True, "B", 3, "interleaved", [1, 1], 1, [0, 0], "relu")
    yield made("B 1-D dilated", (2, 4, 19), (6, 4, 2), True, "B", 1, "interleaved", [4], 1, [1], "none")
    yield made("A 3-D", (2, 2, 3, 5, 4), (3, 2, 3, 3, 3), True, "A", 1, "interleaved", [1, 1, 1], 1, [1, 1, 1], "none")


OP = Op(
    "masked_conv(Tensor x, Tensor weight, Tensor? bias, str mask_type, int data_channels, str group_order, int[] "
    "dilation, int groups, int[] center, str activation)",
    reference=reference.masked_conv,
    outputs={"y": "(N, weight.shape[0], ...) like x"},
    check=check_masked_conv,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad_y, x, weight, y, *options, wanted -> x, weight, bias",
        # Without a ReLU the backward needs nothing of the output; x stands in its place.
        saved={"y": "y if activation == 'relu' else x"},
        outputs={"weight": "contiguous like weight", "bias": "(weight.shape[0],) like weight"},
        reference=reference.masked_conv_backward,
        check=_check_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def _several(op: str, name: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    found = (value,) * dims if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(found) != dims or not all(isinstance(v, (int, torch.SymInt)) for v in found):
        raise ValueError(f"{op}: {name}={value!r}, expected one number or {dims}")
    return found


def _masked_conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: int | Sequence[int],
    groups: int,
    center: int | Sequence[int] | None,
    activation: str | None,
) -> Tensor:
    op = f"masked_conv{dims}d"
    for name, t in (("x", x), ("weight", weight)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a torch.Tensor")
        if t.dim() != dims + 2:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {dims + 2} axes")
    if bias is not None:
        _check.tensors(op, bias=bias)
    at = tuple([k // 2 for k in weight.shape[2:]]) if center is None else _several(op, "center", center, dims)
    x, weight, bias = autocast(x, weight, bias)
    result: Tensor = OP(
        x,
        weight,
        bias,
        mask_type,
        data_channels,
        group_order,
        _several(op, "dilation", dilation, dims),
        groups,
        at,
        activation or "none",
    )
    return result


_DOC = """Masked convolution over {axes}: only taps before the centre in raster order are computed, and the centre as
    ``mask_type`` and the colours allow.

    Args:
        x: (N, C, {axes}) floating point, in any strides.
        weight: (O, C / groups, *kernel). It is never changed; weights that the mask covers do not reach the output
            whatever they hold, and their gradient is exactly zero.
        bias: (O,) or None.
        mask_type: "A" leaves the centre out (first layer), "B" takes it.
        data_channels: colours per pixel. At the centre, outputs of colour k see inputs of colours < k ("A") or <= k
            ("B").
        group_order: which channel is which colour: "interleaved" (c mod data_channels) or "blocked" (contiguous
            blocks).
        dilation: one number or one per axis.
        groups: convolution groups.
        center: the tap that lies on the output's position, one number or one per axis; None for kernel // 2. With
            kernel - 1 every tap is causal (WaveNet; the down-right shifted convolutions of PixelCNN++).
        activation: None or "relu", fused.

    Returns:
        (N, O, {axes}), of x's spatial size and memory format; x counts as zero outside.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: PixelRNN (arXiv:1601.06759, section 3.4).

    Example:
        >>> import torch, genfast
        >>> x, w = torch.randn({example_x}), torch.randn({example_w})
        >>> genfast.ops.masked_conv{dims}d(x, w, mask_type="B").shape
        torch.Size([{example_y}])
    """


def masked_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    data_channels: int = 1,
    group_order: str = "interleaved",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    center: int | Sequence[int] | None = None,
    activation: str | None = None,
) -> Tensor:
    return _masked_conv(1, x, weight, bias, mask_type, data_channels, group_order, dilation, groups, center, activation)


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    data_channels: int = 1,
    group_order: str = "interleaved",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    center: int | Sequence[int] | None = None,
    activation: str | None = None,
) -> Tensor:
    return _masked_conv(2, x, weight, bias, mask_type, data_channels, group_order, dilation, groups, center, activation)


def masked_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask_type: str,
    data_channels: int = 1,
    group_order: str = "interleaved",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    center: int | Sequence[int] | None = None,
    activation: str | None = None,
) -> Tensor:
    return _masked_conv(3, x, weight, bias, mask_type, data_channels, group_order, dilation, groups, center, activation)


for _dims, _function in enumerate((masked_conv1d, masked_conv2d, masked_conv3d), 1):
    _side = ", ".join(["6"] * _dims)
    _function.__doc__ = _DOC.format(
        dims=_dims,
        axes=("L", "H, W", "D, H, W")[_dims - 1],
        example_x=f"2, 4, {_side}",
        example_w=f"8, 4, {', '.join(['3'] * _dims)}",
        example_y=f"2, 8, {_side}",
    )
