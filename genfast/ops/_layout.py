"""How the C++ kernels see a tensor: (N, C, S) with strides, S the product of the spatial axes.

A kernel walks along S (NCHW) or along C (channels_last, and plain vectors (N, C)), whichever is contiguous.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _allocator
from .._tensors import CHANNELS_LAST


class Layout(NamedTuple):
    """Sizes and strides, in elements, of a tensor as (N, C, S)."""

    form: torch.memory_format  # the format of an output in the same order
    walks_channels: bool
    fits: bool  # whether the strides describe the tensor as it lies; a copy is needed where not
    dense: bool  # whether empty_like already gives that format
    n: int
    c: int
    s: int
    n_stride: int
    c_stride: int
    s_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        """What a C++ kernel's View takes beside the address."""
        return self.n_stride, self.c_stride, self.s_stride

    def view(self, x: Tensor) -> tuple[Tensor, int, int, int]:
        """``x``, which lies so, as a C++ kernel's View."""
        return x, self.n_stride, self.c_stride, self.s_stride

    def empty_like(self, x: Tensor) -> Tensor:
        """An uninitialised tensor like ``x``, which lies so, dense in the same order."""
        if not self.dense:
            return torch.empty_like(x, memory_format=self.form)
        return torch.empty_like(x) if self.small else _allocator.empty_like(x)

    @property
    def small(self) -> bool:
        """Whether it is dense and below the allocator's least block in any dtype."""
        return self.dense and self.n * self.c * self.s * 8 < _allocator.MINIMUM


def _collapses(sizes: tuple[int, ...], strides: tuple[int, ...], step: int) -> bool:
    """Whether the axes are one axis with the given step."""
    for size, stride in zip(reversed(sizes), reversed(strides)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


@functools.lru_cache(4096)
def describe(shape: tuple[int, ...], stride: tuple[int, ...]) -> Layout:
    """How a tensor of this shape and stride lies."""
    n, c = shape[0], shape[1]
    sizes, steps = shape[2:], stride[2:]
    s = 1
    for size in sizes:
        s *= size
    first, last = torch.contiguous_format, CHANNELS_LAST.get(len(shape))
    if not n * c * s:
        return Layout(first, len(shape) == 2, True, False, n, c, s, 0, 0, 0)
    if len(shape) == 2:
        return Layout(
            first,
            True,
            stride[1] == 1 or c == 1,
            (n == 1 or stride[0] == c) and (c == 1 or stride[1] == 1),
            n,
            c,
            1,
            stride[0],
            1,
            1,
        )
    if _collapses(sizes, steps, 1) and (c == 1 or stride[1] >= s or last is None):
        dense = (n == 1 or stride[0] == c * s) and (c == 1 or stride[1] == s)
        return Layout(first, False, True, dense, n, c, s, stride[0], stride[1], 1)
    step = next((t for size, t in zip(reversed(sizes), reversed(steps)) if size != 1), c)
    if last is not None and stride[1] == 1 and step >= c and _collapses(sizes, steps, step):
        dense = step == c and (n == 1 or stride[0] == c * s)
        return Layout(last, True, True, dense, n, c, s, stride[0], 1, step)
    return Layout(first, False, False, False, n, c, s, c * s, s, 1)


def layout(x: Tensor) -> Layout:
    """How ``x`` lies."""
    return describe(x.shape, x.stride())


def aligned(own: Layout, like: Layout) -> Layout | None:
    """``own`` told in the order of ``like``, or None where that takes a copy. One channel or one position lies in
    both."""
    if not own.fits:
        return None
    if own.walks_channels == like.walks_channels:
        return own
    if like.walks_channels and (own.c == 1 or own.c_stride == 1):
        return own._replace(form=like.form, walks_channels=True, c_stride=1)
    if not like.walks_channels and (own.s == 1 or own.s_stride == 1):
        return own._replace(form=like.form, walks_channels=False, s_stride=1)
    return None


def laid_out(x: Tensor, like: Layout | None = None) -> tuple[Tensor, Layout]:
    """``x`` and its layout in the order of ``like`` (its own order without), copied only where it must be."""
    own = layout(x)
    found = (own if own.fits else None) if like is None else aligned(own, like)
    if found is not None:
        return x, found
    x = x.contiguous(memory_format=own.form if like is None else like.form)
    found = layout(x) if like is None else aligned(layout(x), like)
    assert found is not None
    return x, found
