"""Tests of the kernels as programs: compiled ahead of time, launched on fake tensors, emulated on the host."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def addresses(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a kernel's argument struct with each tensor's address in its place, as ctypes takes them."""
    return {name: value.data_ptr() if isinstance(value, Tensor) else value for name, value in fields.items()}
