"""ops.pixel_norm: y = x / sqrt(mean_c x^2 + eps), in one pass each way."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._channels import along, axis
from ._layout import Layout, describe, laid_out

_NAME = "pixel_norm"
_CPU = kernels(
    "_cpu",
    pixel_norm="is_double x y n c s eps channels_last threads",
    pixel_norm_backward="is_double x grad y n c s eps channels_last threads",
)


def _check_arguments(xs: tuple[int, ...], eps: float) -> None:
    _check_eps(eps)
    if len(xs) < 2:
        raise ValueError(f"{_NAME}: x has shape {tuple(xs)}, expected (N, C, ...)")


def _check_eps(eps: float) -> None:
    if not 0 < eps < math.inf:
        raise ValueError(f"{_NAME}: eps={eps}, expected a positive number")


def _check_forward(x: Tensor, eps: float) -> None:
    _check.floating(_NAME, x=x)
    _check_arguments(x.shape, eps)


@functools.lru_cache(1024)
def _plan(xs: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, eps: float) -> tuple[Layout, Any]:
    """x's layout and the kernel, prepared for it. Raises for arguments that do not fit."""
    _check_arguments(xs, eps)
    a = describe(xs, stride)
    return a, _CPU.pixel_norm.prepare(
        is_double=dtype is torch.float64, x=a.strides, n=a.n, c=a.c, s=a.s, eps=eps, channels_last=a.walks_channels
    )


def _cpu(x: Tensor, eps: float) -> Tensor:
    a, kernel = _plan(x.shape, x.stride(), x.dtype, eps)
    if not a.fits:
        return _cpu(laid_out(x)[0], eps)
    y = a.empty_like(x)
    kernel(x=x, y=y, threads=torch.get_num_threads())
    return y


def _cpu_backward(grad_y: Tensor, x: Tensor, eps: float) -> Tensor:
    x, a = laid_out(x)
    grad_y, g = laid_out(grad_y.to(x.dtype), a)
    dx = a.empty_like(x)
    _CPU.pixel_norm_backward(
        is_double=x.dtype is torch.float64,
        x=a.view(x),
        grad=g.view(grad_y),
        y=dx,
        n=a.n,
        c=a.c,
        s=a.s,
        eps=eps,
        channels_last=a.walks_channels,
        threads=torch.get_num_threads(),
    )
    return dx


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, eps in (
        ("images", (3, 5, 4, 7), 1e-8),
        ("vectors", (6, 9), 1e-2),
        ("sequences", (2, 40, 19), 1e-5),
    ):
        # Not a plain normal: a cotangent drawn from the same seed would be x itself, along which the gradient vanishes.
        yield Sample(label, (0.5 + torch.randn(shape, generator=generator, dtype=torch.float64), eps))


OP = Op(
    "pixel_norm(Tensor x, float eps)",
    reference=reference.pixel_norm,
    outputs={"y": "like x"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad_y, x, eps -> x", reference=reference.pixel_norm_backward, kernels={"cpu": _cpu_backward, "triton": _NAME}
    ),
    samples=_samples,
)


def pixel_norm(x: Tensor, *, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Feature vectors of unit mean square: y = x / sqrt(mean_c x^2 + eps) at each position.

    Differentiable to any order.

    Args:
        x: floating point, of any shape; (N, C, ...) with the default ``dim``, contiguous or channels_last.
        dim: the axis of the features, over which the mean is.
        eps: added to the mean square; keeps zeros at zero.

    Returns:
        y in x's shape, dtype and memory format; half types are squared and summed in float32.

    Raises:
        TypeError: x that is not a floating-point tensor.
        ValueError: a ``dim`` that x lacks, an ``eps`` that is not positive.

    Source: Progressive Growing of GANs (arXiv:1710.10196, section 4.2).

    Example:
        >>> import torch, genfast
        >>> latent = genfast.ops.pixel_norm(torch.randn(16, 512))
        >>> y = genfast.ops.pixel_norm(torch.randn(2, 64, 8, 8))
    """
    _check.floating(_NAME, x=x)
    return along(x, axis(_NAME, x, dim), lambda t: OP(t, float(eps)))
