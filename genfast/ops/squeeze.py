"""ops.squeeze and ops.unsqueeze: blocks of positions to channels and back, in both channel orders."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Op, Sample
from .._tensors import memory_format
from ..reference.squeeze import ORDERS
from . import _check
from ._layout import describe

_CPU = kernels("_cpu", squeeze="is_double x y n c h w factor space_to_depth inverse channels_last threads")


def _check_forward(x: Tensor, factor: int, order: str, inverse: bool) -> None:
    op = "unsqueeze" if inverse else "squeeze"
    _check.choice(op, "order", order, ORDERS)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, C, H, W)")
    if factor < 1:
        raise ValueError(f"{op}: factor={factor}, expected at least 1")
    if inverse and x.shape[1] % (factor * factor):
        raise ValueError(f"{op}: x has {x.shape[1]} channels, expected a multiple of factor^2 = {factor * factor}")
    if not inverse and (x.shape[2] % factor or x.shape[3] % factor):
        raise ValueError(f"{op}: x has {x.shape[2]}x{x.shape[3]} positions, expected multiples of factor={factor}")


def _empty(x: Tensor, factor: int, inverse: bool) -> Tensor:
    n, c, h, w = x.shape
    f = factor
    shape = (n, c // (f * f), h * f, w * f) if inverse else (n, c * f * f, h // f, w // f)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake(x: Tensor, factor: int, order: str, inverse: bool) -> Tensor:
    return _empty(x, factor, inverse)


class _Plan(NamedTuple):
    """All that a call needs but its pointers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    kernel: Any


@functools.lru_cache(1024)
def _plan(
    xs: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, factor: int, order: str, inverse: bool
) -> _Plan | None:
    """None where something must be checked or copied first."""
    if len(xs) != 4 or factor < 1 or order not in ORDERS:
        return None
    (n, c, h, w), f = xs, factor
    if (c % (f * f) if inverse else h % f or w % f) or not describe(xs, stride).dense:
        return None
    a = describe(xs, stride)
    c, h, w = (c // (f * f), h * f, w * f) if inverse else (c * f * f, h // f, w // f)
    wide_c, wide_h, wide_w = (c, h, w) if inverse else xs[1:]
    strides = (c * h * w, 1, w * c, c) if a.walks_channels else (c * h * w, h * w, w, 1)
    kernel = _CPU.squeeze.prepare(
        is_double=dtype is torch.float64,
        n=n,
        c=wide_c,
        h=wide_h,
        w=wide_w,
        factor=f,
        space_to_depth=order == "space_to_depth",
        inverse=inverse,
        channels_last=a.walks_channels,
    )
    return _Plan((n, c, h, w), strides, kernel)


def _cpu(x: Tensor, factor: int, order: str, inverse: bool) -> Tensor:
    plan = _plan(x.shape, x.stride(), x.dtype, factor, order, inverse)
    if plan is None:
        _check_forward(x, factor, order, inverse)
        if not x.numel():
            return _empty(x, factor, inverse)
        return _cpu(x.contiguous(memory_format=memory_format(x)), factor, order, inverse)
    y = _allocator.empty_strided(plan.shape, plan.stride, x.dtype)
    plan.kernel(x=x, y=y, threads=torch.get_num_threads())
    return y


def _backward(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    factor, order, inverse = ctx.options
    return None if grad is None else OP(grad, factor, order, not inverse), None, None, None


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    x = torch.randn((2, 12, 6, 12), generator=generator, dtype=torch.float64)
    for order in ORDERS:
        for factor in (2, 3):
            yield Sample(f"{order} by {factor}", (x, factor, order, False))
        yield Sample(f"{order} by 2 inverse", (x, 2, order, True))


OP = Op(
    "squeeze(Tensor x, int factor, str order, bool inverse) -> Tensor",
    reference=reference.squeeze,
    argument_dtypes={"x": None},  # pictures of bytes too
    dtypes=_backend.DTYPES | {"triton": (*_backend.DTYPES["triton"], torch.uint8, torch.int64)},
    check=_check_forward,
    fake=_fake,
    kernels={"cpu": _cpu, "triton": "squeeze"},
    saves="",
    backward=_backward,
    samples=_samples,
)


def squeeze(
    x: Tensor, factor: int = 2, *, order: Literal["pixel_unshuffle", "space_to_depth"] = "pixel_unshuffle"
) -> Tensor:
    """Moves f x f blocks of positions into channels: (N, C, H, W) to (N, f^2 C, H/f, W/f). Volume preserving.

    Args:
        x: (N, C, H, W); H and W multiples of ``factor``. The memory format is kept.
        factor: f, at least 1.
        order: where channel c of block offset (i, j) goes: "pixel_unshuffle" c f^2 + i f + j (PyTorch,
            normflows) or "space_to_depth" (i f + j) C + c (RealNVP, TensorFlow).

    Raises:
        ValueError: a shape, factor or order that does not fit.

    Source: RealNVP (arXiv:1605.08803, section 3.6).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.squeeze(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 12, 4, 4])
    """
    result: Tensor = OP(x, factor, order, False)
    return result


def unsqueeze(
    x: Tensor, factor: int = 2, *, order: Literal["pixel_unshuffle", "space_to_depth"] = "pixel_unshuffle"
) -> Tensor:
    """The inverse of :func:`squeeze`: (N, f^2 C, H, W) to (N, C, f H, f W).

    Example:
        >>> import torch, genfast
        >>> x = torch.randn(2, 3, 8, 8)
        >>> torch.equal(genfast.ops.unsqueeze(genfast.ops.squeeze(x)), x)
        True
    """
    result: Tensor = OP(x, factor, order, True)
    return result
