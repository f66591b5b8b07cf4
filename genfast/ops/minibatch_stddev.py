"""ops.minibatch_stddev: the standard deviation over groups of the batch as more channels, in one pass each way."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _allocator, reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._layout import Layout, describe, laid_out

_NAME = "minibatch_stddev"
_FIELDS = "is_double x y n c s group features eps channels_last threads"
_CPU = kernels("_cpu", minibatch_stddev=_FIELDS, minibatch_stddev_backward=f"{_FIELDS} grad")


def _check_options(group_size: int, features: int, eps: float) -> None:
    for name, value in (("group_size", group_size), ("features", features)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{_NAME}: {name}={value!r}, expected an int")
        if value < 1:
            raise ValueError(f"{_NAME}: {name}={value}, expected at least 1")
    if not 0 < eps < math.inf:
        raise ValueError(f"{_NAME}: eps={eps}, expected a positive number")


def _check_shapes(xs: tuple[int, ...], group_size: int, features: int) -> None:
    if len(xs) < 2:
        raise ValueError(f"{_NAME}: x has shape {tuple(xs)}, expected (N, C, ...)")
    if xs[1] % features or not xs[1]:
        raise ValueError(f"{_NAME}: x has {xs[1]} channels, expected a positive multiple of features={features}")
    if xs[0] > group_size and xs[0] % group_size:
        raise ValueError(
            f"{_NAME}: a batch of {xs[0]} is not a multiple of group_size={group_size}; change either, or drop the "
            "last batch"
        )


def _check_forward(x: Tensor, group_size: int, features: int, eps: float) -> None:
    _check.floating(_NAME, x=x)
    _check_options(group_size, features, eps)
    _check_shapes(x.shape, group_size, features)


class _Plan(NamedTuple):
    layout: Layout  # of x
    group: int  # samples in a group
    shape: tuple[int, ...]  # of y
    strides: tuple[int, ...]


@functools.lru_cache(1024)
def _plan(xs: tuple[int, ...], stride: tuple[int, ...], group_size: int, features: int, eps: float) -> _Plan:
    """What a call needs but its tensors. Raises for arguments that do not fit."""
    _check_options(group_size, features, eps)
    _check_shapes(xs, group_size, features)
    a = describe(xs, stride)
    shape = (xs[0], xs[1] + features, *xs[2:])
    strides = torch.empty(shape, device="meta", memory_format=a.form).stride()
    return _Plan(a, min(group_size, a.n), shape, strides)


def _cpu(x: Tensor, group_size: int, features: int, eps: float) -> Tensor:
    plan = _plan(x.shape, x.stride(), group_size, features, eps)
    a = plan.layout
    if not a.fits:
        return _cpu(laid_out(x)[0], group_size, features, eps)
    y = _allocator.empty_strided(plan.shape, plan.strides, x.dtype)
    _CPU.minibatch_stddev(
        is_double=x.dtype is torch.float64,
        x=a.view(x),
        y=y,
        n=a.n,
        c=a.c,
        s=a.s,
        group=plan.group,
        features=features,
        eps=eps,
        channels_last=a.walks_channels,
        threads=torch.get_num_threads(),
    )
    return y


def _cpu_backward(grad_y: Tensor, x: Tensor, group_size: int, features: int, eps: float) -> Tensor:
    x, a = laid_out(x)
    grad_y, g = laid_out(grad_y.to(x.dtype), a._replace(c=a.c + features))
    dx = a.empty_like(x)
    _CPU.minibatch_stddev_backward(
        is_double=x.dtype is torch.float64,
        x=a.view(x),
        grad=g.view(grad_y),
        y=dx,
        n=a.n,
        c=a.c,
        s=a.s,
        group=_plan(x.shape, x.stride(), group_size, features, eps).group,
        features=features,
        eps=eps,
        channels_last=a.walks_channels,
        threads=torch.get_num_threads(),
    )
    return dx


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, group_size, features, eps in (
        ("one feature", (4, 5, 3, 7), 4, 1, 1e-8),
        ("groups and features", (6, 6, 4, 5), 3, 2, 1e-2),
        ("fewer than a group", (3, 4, 11), 4, 2, 1e-3),
        ("vectors", (8, 6), 2, 3, 1e-8),
    ):
        yield Sample(label, (torch.randn(shape, generator=generator, dtype=torch.float64), group_size, features, eps))


OP = Op(
    "minibatch_stddev(Tensor x, int group_size, int features, float eps)",
    reference=reference.minibatch_stddev,
    outputs={"y": "(N, C + features, ...) like x"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad_y, x, *options -> x",
        reference=reference.minibatch_stddev_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def minibatch_stddev(x: Tensor, *, group_size: int | None = 4, features: int = 1, eps: float = 1e-8) -> Tensor:
    """x with the standard deviation over groups of its batch as more channels, by which a critic sees a lack of
    variety.

    The batch is taken in N / G groups of G = min(group_size, N) samples, N / G apart; each of the F features is C / F
    channels, and its statistic the mean over them and all positions of sqrt(var + eps), var over the group.
    Differentiable to any order.

    It couples the samples of a group: the gradient of a critic's summed output by one sample holds what that sample
        does to
    the scores of the others. A gradient penalty is exact for that sum, but no longer a bound on each sample's own
    slope, and WGAN-GP's authors leave out layers that do this; StyleGAN2 keeps it under R1 on purpose.

    Args:
        x: (N, C, ...) floating point; images, contiguous or channels_last, sequences or vectors (N, C).
        group_size: samples of a group at most; None for the whole batch.
        features: F, how many channels are added; divides C.
        eps: added to the variance.

    Returns:
        (N, C + F, ...) in x's dtype and memory format: x and then the statistics. Half types are summed in float32.

    Raises:
        TypeError: x that is not a floating-point tensor, sizes that are no int.
        ValueError: a batch larger than ``group_size`` and no multiple of it, channels that are no multiple of
            ``features``, sizes below 1, an ``eps`` that is not positive.

    Source: Progressive Growing of GANs (arXiv:1710.10196, section 3), in the form of StyleGAN2 (arXiv:1912.04958).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.minibatch_stddev(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 17, 4, 4])
    """
    _check.floating(_NAME, x=x)
    if group_size is None:
        group_size = max(1, x.shape[0]) if x.dim() else 1
    _check_options(group_size, features, eps)
    result: Tensor = OP(x, group_size, features, float(eps))
    return result
