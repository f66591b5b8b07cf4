"""Checks shared by the ops: each raises an error that names the argument, what it was and what was expected."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor


def floating(op: str, **tensors: Tensor | None) -> None:
    """All given tensors are floating point, on one device."""
    first: Tensor | None = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a torch.Tensor")
        if not t.dtype.is_floating_point:
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected a floating-point dtype")
        if first is None:
            first, first_name = t, name
        elif t.device != first.device:
            raise ValueError(f"{op}: {name} is on {t.device} and {first_name} on {first.device}; move both to one device")


def number(op: str, **values: object) -> None:
    """No value is a tensor that requires a gradient, which a number would lose in silence; nor has one among its items."""
    for name, value in values.items():
        for v in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(v, Tensor) and v.requires_grad:
                raise TypeError(
                    f"{op}: {name} is a tensor that requires a gradient, expected a number: no gradient flows to it; detach it"
                )


def choice(op: str, name: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r}, expected one of {', '.join(map(repr, allowed))}")


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...], why: str = "") -> None:
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(
            f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}{' (' + why + ')' if why else ''}"
        )
