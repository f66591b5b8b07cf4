"""Any axis as the channels: an op over (N, C, ...) applied along another axis of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from torch import Tensor


def axis(op: str, x: Tensor, dim: int) -> int:
    """``dim`` counted from the front, or an error."""
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"{op}: dim={dim!r}, expected an int")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{op}: dim={dim} of x with shape {tuple(x.shape)}, expected one of its {x.dim()} axes")
    return dim % x.dim()


def along(x: Tensor, dim: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """``function``, which takes (N, C, ...) and keeps the shape, with axis ``dim`` as C: a view where x is
    contiguous."""
    if dim == 1:
        return function(x)
    before, after = prod(x.shape[:dim]), x.shape[dim + 1 :]
    return function(x.reshape(before, x.shape[dim], *([prod(after)] if after else []))).reshape(x.shape)
