"""ops.sample_norm: the Euclidean norm of each sample, with derivatives that are zero where a sample is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._rows import per_batch, rows

_NAME = "sample_norm"
_FIELDS = "is_double squared x out n d x_stride threads"
_CPU = kernels("_cpu", sample_norm=_FIELDS, sample_norm_backward=f"{_FIELDS} grad norm")


def _check_forward(x: Tensor, squared: bool) -> None:
    _check.floating(_NAME, x=x)
    if x.dim() < 2:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, expected (N, ...)")


def _cpu(x: Tensor, squared: bool) -> Tensor:
    if x.dim() < 2 or not x.dtype.is_floating_point:
        _check_forward(x, squared)
    x, r = rows(x)
    out = x.new_empty(r.n)
    _CPU.sample_norm(
        is_double=x.dtype is torch.float64,
        squared=squared,
        x=x,
        out=out,
        n=r.n,
        d=r.size,
        x_stride=r.stride,
        threads=torch.get_num_threads(),
    )
    return out


def _cpu_backward(x: Tensor, norm: Tensor, grad: Tensor, squared: bool) -> Tensor:
    x, r = rows(x)
    grad, norm = per_batch(grad, x.dtype), per_batch(norm, x.dtype)
    dx = r.layout.empty_like(x)
    _CPU.sample_norm_backward(
        is_double=x.dtype is torch.float64,
        squared=squared,
        grad=grad,
        x=x,
        norm=norm,
        out=dx,
        n=r.n,
        d=r.size,
        x_stride=r.stride,
        threads=torch.get_num_threads(),
    )
    return dx


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape in (("images", (3, 5, 4, 7)), ("vectors", (6, 9)), ("sequences", (2, 3, 11))):
        for squared in (False, True):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield Sample(f"{label}{' squared' if squared else ''}", (x, squared))


OP = Op(
    "sample_norm(Tensor x, bool squared)",
    reference=reference.sample_norm,
    outputs={"norm": "(N,) like x as accumulator"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "x, norm, grad, squared -> x",
        reference=reference.sample_norm_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def sample_norm(x: Tensor, *, squared: bool = False) -> Tensor:
    """The Euclidean norm of each sample, over all axes but the first.

    The gradient is x / |x|, and zero at a sample that is zero, as are all higher derivatives there; never NaN. Squares
    are added in float64, so no float32 value is too large or too small, in an order that the number of threads does not
    change.

    Args:
        x: (N, ...) floating point.
        squared: gives |x|^2 = sum x^2, whose gradient is 2 x everywhere.

    Returns:
        (N,), float32 for half-precision x; differentiable to any order.

    Raises:
        TypeError, ValueError: integers, or a scalar.

    Source: WGAN-GP (arXiv:1704.00028, equation 3: the norm is each sample's own).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.sample_norm(torch.ones(2, 4, 2, 2))
        tensor([4., 4.])
    """
    result: Tensor = OP(x.unsqueeze(1) if isinstance(x, Tensor) and x.dim() == 1 else x, squared)
    return result
