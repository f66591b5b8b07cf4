"""A dense weight as the matrix of spectral normalisation, told as it lies in memory, for the C++ and Triton kernels
alike."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor


class Axes(NamedTuple):
    """A weight as it lies: (a, h, b) with h the index of u. ``order`` is how its axes but that one stand in memory."""

    a: int
    h: int
    b: int
    rest: tuple[int, ...]  # sizes of the axes but dim
    order: tuple[int, ...] | None  # None: as they are numbered


@functools.lru_cache(1024)
def axes(shape: tuple[int, ...], stride: tuple[int, ...], dim: int) -> Axes | None:
    """None where the weight is not dense."""
    by_stride = sorted(range(len(shape)), key=lambda i: (-stride[i], i))
    step = 1
    for i in reversed(by_stride):
        if shape[i] != 1 and stride[i] != step:
            return None
        step *= shape[i]
    at = by_stride.index(dim)
    before, after = by_stride[:at], by_stride[at + 1 :]
    numbered = [i for i in range(len(shape)) if i != dim]
    order = tuple(numbered.index(i) for i in (*before, *after))
    known = all(a < b for a, b in zip(order, order[1:]))
    return Axes(
        math.prod(shape[i] for i in before),
        shape[dim],
        math.prod(shape[i] for i in after),
        tuple(shape[i] for i in numbered),
        None if known else order,
    )


def to_memory(v: Tensor, a: Axes) -> Tensor:
    """v in the order in which the weight lies."""
    return v if a.order is None else v.reshape(a.rest).permute(a.order).reshape(-1)


def from_memory(v: Tensor, a: Axes) -> Tensor:
    if a.order is None:
        return v
    inverse = sorted(range(len(a.order)), key=a.order.__getitem__)
    return v.reshape([a.rest[i] for i in a.order]).permute(inverse).reshape(-1)


def dense(weight: Tensor, dim: int) -> tuple[Tensor, Axes]:
    """The weight and how it lies; copied where it is not dense."""
    found = axes(weight.shape, weight.stride(), dim)
    if found is None:
        weight = torch.empty_like(weight).copy_(weight)  # dense, in the order that a caller is told to expect
        found = axes(weight.shape, weight.stride(), dim)
        assert found is not None
    return weight, found
