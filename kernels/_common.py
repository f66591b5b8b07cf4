"""What the kernels' wrappers share: a tensor seen as (N, C, S) with strides, and launch arithmetic."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class View(NamedTuple):
    """A tensor as (N, C, S): S is the product of its spatial axes, strides are in elements."""

    data: Tensor
    n: int
    c: int
    s: int
    n_stride: int
    c_stride: int
    s_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.n_stride, self.c_stride, self.s_stride

    @property
    def channels_last(self) -> bool:
        """Whether neighbouring threads should walk along channels."""
        return self.s == 1 or self.c_stride < self.s_stride


def view(x: Tensor) -> View:
    """``x`` as it lies; copied only where its spatial axes are not one axis with one step."""
    n, c = x.shape[0], x.shape[1]
    s, step = 1, 1
    for k, (size, stride) in enumerate(zip(reversed(x.shape[2:]), reversed(x.stride()[2:]))):
        if k == 0:
            step = stride
        if size != 1 and s != 1 and stride != s * step:
            return view(x.contiguous())
        if s == 1:
            step = stride
        s *= size
    return View(x, n, c, s, x.stride(0), x.stride(1), step if s > 1 else 1)


def output(x: Tensor, channels: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor like ``x``, in its memory format, with another number of channels or dtype."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    form = torch.contiguous_format
    if last is not None and not x.is_contiguous() and x.stride(1) == 1 and x.shape[1] > 1:
        form = last
    shape = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device, memory_format=form)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


class Aot(NamedTuple):
    """One ahead-of-time compile: a kernel, its argument types and its constants (see aot.py)."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    warps: int = 4


def signature(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> dict[str, str]:
    """Types for all arguments: pointers as given, constants as such, the rest (sizes and strides) i64."""
    return {
        name: "constexpr" if name in constants else types.get(name, "i64") for name in kernel.arg_names
    }


next_power_of_2 = triton.next_power_of_2
