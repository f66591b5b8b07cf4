"""Checks shared by the ops: each raises an error that names the argument, what it was and what was expected."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .._derived import readable_now
from .._registry import check_number


def floating(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating point, on one device. The first is always there; of the others None is not looked
    at."""
    first: Tensor | None = None
    for name, t in tensors.items():
        if t is None and first is not None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a torch.Tensor")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected a floating-point dtype")
        if first is None:
            first, first_name = t, name
        elif t.device != first.device:
            raise ValueError(
                f"{op}: {name} is on {t.device} and {first_name} on {first.device}; move both to one device"
            )


def number(op: str, **values: object) -> None:
    """No value is a tensor that requires a gradient, which a number would lose in silence; nor has one among its
    items."""
    for name, value in values.items():
        check_number(op, name, value)


def tensors(op: str, **named: Any) -> None:
    """All are tensors: before what would ask for a shape or for an axis."""
    for name, t in named.items():
        if not isinstance(t, Tensor):
            what = repr(t) if t is None or isinstance(t, (bool, int, float, str)) else f"a {type(t).__name__}"
            raise TypeError(f"{op}: {name} is {what}, expected a torch.Tensor")


def permutation(op: str, name: str, order: Tensor) -> None:
    """``order`` holds each of 0 to n - 1 once. For references: kernels look at the numbers themselves."""
    if order.is_cpu and readable_now(order) and not torch.equal(order.sort().values, torch.arange(len(order))):
        raise ValueError(f"{op}: {name} is no permutation of 0 to {len(order) - 1}")


def shapes(op: str, **expected: tuple[Tensor | None, Sequence[int], str]) -> None:
    """Of each tensor the shape that goes with it, and why; None is not looked at. For the arguments of backward ops."""
    for name, (tensor, size, why) in expected.items():
        if tensor is not None:
            shape(op, name, tensor, tuple(size), why)


def same_dtype(op: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
    """All given tensors have ``dtype``, where a kernel converts nothing."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {tensor.dtype}, expected {dtype}")


def flags(op: str, name: str, value: Sequence[bool], count: int) -> None:
    """A list of so many flags."""
    if len(value) != count:
        raise ValueError(f"{op}: {name} holds {len(value)} flags, expected {count}")


def choice(op: str, name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r}, expected one of {', '.join(map(repr, allowed))}")


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str = "") -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}{' (' + why + ')' if why else ''}"
        )
