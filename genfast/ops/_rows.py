"""How the C++ kernels see a batch whose samples are treated alike: N rows of D dense elements, in any order of the
axes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ._layout import Layout, describe


class Rows(NamedTuple):
    """N rows of ``size`` elements, ``stride`` apart; ``layout.empty_like`` makes an output in the same order."""

    layout: Layout
    n: int
    size: int
    stride: int
    inner: tuple[int, ...]  # strides within a sample


@functools.lru_cache(4096)
def _dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> Rows | None:
    """None where a sample is not dense."""
    a = describe(shape, stride)
    if not a.n * a.c * a.s:
        return Rows(a, a.n, 0, 0, ())
    if not a.fits or (a.s > 1 and a.s_stride != (a.c if a.walks_channels else 1)):
        return None
    if a.c > 1 and a.c_stride != (1 if a.walks_channels else a.s):
        return None
    return Rows(a, a.n, a.c * a.s, a.n_stride, tuple(t if size > 1 else 0 for size, t in zip(shape[1:], stride[1:])))


def rows(x: Tensor, like: Rows | None = None) -> tuple[Tensor, Rows]:
    """``x`` (N, C, ...) and its rows, in the order of ``like`` where given; copied only where it must be."""
    found = _dense(x.shape, x.stride())
    if found is not None and (like is None or found.inner == like.inner):
        return x, found
    x = x.contiguous(memory_format=describe(x.shape, x.stride()).form if like is None else like.layout.form)
    found = _dense(x.shape, x.stride())
    assert found is not None
    return x, found


def per_batch(epsilon: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) dense in ``dtype``."""
    return (epsilon if epsilon.dtype is dtype else epsilon.to(dtype)).contiguous()
