"""ops.gated_activation: y = tanh(f + V_f) sigma(g + V_g), in one pass each way."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _allocator, reference
from .._native import kernels
from .._registry import Op, Sample
from . import _check
from ._layout import Layout, describe, laid_out

_NAME = "gated_activation"
_FIELDS = "is_double x bias y n c s groups bias_mode channels_last threads"
_CPU = kernels("_cpu", gated_activation=_FIELDS, gated_activation_backward=f"{_FIELDS} grad grad_bias")
_NONE, _CHANNEL, _SAMPLE, _FULL = range(4)  # as in kernels.h


def _check_shapes(xs: tuple[int, ...], bs: tuple[int, ...] | None, groups: int) -> int:
    """How the bias is spread, or an error."""
    if groups < 1:
        raise ValueError(f"{_NAME}: groups={groups}, expected at least 1")
    if len(xs) < 2 or not xs[1] or xs[1] % (2 * groups):
        of = f"a multiple of 2 groups = {2 * groups}" if groups > 1 else "even"
        raise ValueError(
            f"{_NAME}: x has shape {tuple(xs)}, expected (N, 2C, ...) with a number of channels that is {of}"
        )
    if bs is None:
        return _NONE
    if bs == xs:
        return _FULL
    if bs == xs[1:2]:
        return _CHANNEL
    if bs == xs[:2]:
        return _SAMPLE
    wide = xs[1]
    raise ValueError(
        f"{_NAME}: bias has shape {tuple(bs)}, expected ({wide},), ({xs[0]}, {wide}) or x's shape {tuple(xs)}"
    )


def _check_forward(x: Tensor, bias: Tensor | None, groups: int) -> None:
    _check.floating(_NAME, x=x, bias=bias)
    _check_shapes(tuple(x.shape), None if bias is None else tuple(bias.shape), groups)


def _check_backward(grad_y: Tensor, x: Tensor, bias: Tensor | None, groups: int) -> None:
    _check_forward(x, bias, groups)
    expected = (x.shape[0], x.shape[1] // 2, *x.shape[2:])
    _check.shapes(f"{_NAME}_backward", grad_y=(grad_y, expected, "half the channels of x"))


class _Plan(NamedTuple):
    forward: Any  # the kernels, prepared
    backward: Any
    layout: Layout  # of x
    mode: int  # how the bias is spread
    shape: tuple[int, ...]  # of y
    strides: tuple[int, ...]


@functools.lru_cache(1024)
def _plan(
    xs: tuple[int, ...], x_stride: tuple[int, ...], dtype: torch.dtype, bs: tuple[int, ...] | None, groups: int
) -> _Plan:
    """What a call needs but its tensors. Raises for shapes that do not fit."""
    mode = _check_shapes(tuple(xs), None if bs is None else tuple(bs), groups)
    a = describe(xs, x_stride)
    shape = (xs[0], xs[1] // 2, *xs[2:])
    fields = {
        "is_double": dtype is torch.float64,
        "x": a.strides,
        "n": a.n,
        "c": a.c // 2,
        "s": a.s,
        "groups": groups,
        "bias_mode": mode,
        "channels_last": a.walks_channels,
    }
    forward, backward = (k.prepare(**fields) for k in (_CPU.gated_activation, _CPU.gated_activation_backward))
    return _Plan(forward, backward, a, mode, shape, torch.empty(shape, device="meta", memory_format=a.form).stride())


def _arguments(x: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, tuple[Any, ...] | None, _Plan]:
    """x and bias as the kernel takes them, the latter with its strides."""
    if bias is not None or not x.dtype.is_floating_point:
        _check.floating(_NAME, x=x, bias=bias)
    plan = _plan(x.shape, x.stride(), x.dtype, None if bias is None else bias.shape, groups)
    a = plan.layout
    if not a.fits:
        return _arguments(laid_out(x)[0], bias, groups)
    if bias is None:
        return x, None, plan
    bias = bias.to(x.dtype)
    if plan.mode == _FULL:
        bias, b = laid_out(bias, a)
        return x, b.view(bias), plan
    return x, (bias.contiguous(), a.c if plan.mode == _SAMPLE else 0, 1, 0), plan


def _cpu(x: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    x, bias_view, plan = _arguments(x, bias, groups)
    y = _allocator.empty_strided(plan.shape, plan.strides, x.dtype)
    plan.forward(x=x, bias=bias_view, y=y, threads=torch.get_num_threads())
    return y


def _cpu_backward(grad_y: Tensor, x: Tensor, bias: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    x, bias_view, plan = _arguments(x, bias, groups)
    dx = plan.layout.empty_like(x)
    half = plan.layout._replace(c=plan.layout.c // 2)
    grad_y, g = laid_out(grad_y.to(x.dtype), half)
    summed = bias is not None and plan.mode != _FULL
    dbias = x.new_empty(bias.shape if bias is not None and summed else 0)
    plan.backward(x=x, bias=bias_view, grad=g.view(grad_y), y=dx, grad_bias=dbias, threads=torch.get_num_threads())
    return dx, dbias.to(bias.dtype) if bias is not None and summed else dbias


def _backward(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return None, None, None
    x, bias = ctx.saved_tensors
    dx, dbias = _OP_BACKWARD(grad_y, x, bias, *ctx.options)
    if bias is None:
        return dx, None, None
    return dx, dx.to(bias.dtype) if bias.shape == x.shape else dbias, None


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, xs, bs, groups in (
        ("plain", (3, 6, 4, 7), None, 1),
        ("bias", (3, 6, 4, 7), (6,), 1),
        ("bias of each sample", (2, 12, 5), (2, 12), 3),
        ("bias of each sample and 3 groups", (2, 12, 3, 5), (2, 12), 3),
        ("spatial bias", (2, 4, 3, 6), (2, 4, 3, 6), 2),
        ("vectors", (6, 10), (10,), 1),
    ):
        x, bias = (None if s is None else torch.randn(s, generator=generator, dtype=torch.float64) for s in (xs, bs))
        yield Sample(label, (x, bias, groups))


_OP_BACKWARD = Op(
    "gated_activation_backward(Tensor grad_y, Tensor x, Tensor? bias, int groups)",
    reference=reference.gated_activation_backward,
    outputs={"x": "like x", "bias": "like bias if bias is not None and bias.shape != x.shape"},
    check=_check_backward,
    check_before_kernels=True,
    kernels={"cpu": _cpu_backward, "triton": _NAME},
)

# The backward is written here, since the gradient of a bias of x's shape is that of x.
OP = Op(
    "gated_activation(Tensor x, Tensor? bias, int groups)",
    reference=reference.gated_activation,
    outputs={"y": "(N, C // 2, ...) like x"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    saves="x, bias",
    backward=_backward,
    samples=_samples,
)


def gated_activation(x: Tensor, bias: Tensor | None = None, *, groups: int = 1) -> Tensor:
    """The gated unit of PixelCNN and WaveNet: y = tanh(f + V_f) sigmoid(g + V_g), f and g the halves of x.

    Args:
        x: (N, 2C, ...) floating point; NCHW, channels_last, sequences or vectors.
        bias: what the unit is conditioned on, V = [V_f | V_g] in the order of x's channels: (2C,), a sample each (N,
            2C), or spatial, of x's own shape.
        groups: the channels are so many blocks of 2C / groups, each [f | g], so that colour groups which stand in
            blocks do not mix; 1 is ``f, g = x.chunk(2, dim=1)``.

    Returns:
        (N, C, ...) in x's dtype and memory format. The backward recomputes both maps: only x and bias are kept.

    Raises:
        TypeError: integer x or bias.
        ValueError: a number of channels that is no multiple of 2 ``groups``, a bias or devices that do not fit.

    Source: Gated PixelCNN (arXiv:1606.05328, equation 2), WaveNet (arXiv:1609.03499, equations 2 and 3).

    Example:
        >>> import torch, genfast
        >>> x, condition = torch.randn(2, 64, 8, 8), torch.randn(2, 64)
        >>> y = genfast.ops.gated_activation(x, condition)
    """
    result: Tensor = OP(x, bias, groups)
    return result
