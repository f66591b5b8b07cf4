"""The rules of assignments at an index and of a choice by a condition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd_rule import otherwise
from .handlers import T, handles, trainable
from .in_place import may_overwrite, taken
from .linear_maps import of_index
from .sweeps import Sweeps
from .tape import Maybe, Rule, Tape, Unsupported


class SetItem(Rule):
    """y = x with ``value`` at ``key``; one or both active."""

    kind = "exact, linear"

    def __init__(
        self, key: Any, active: tuple[bool, bool], shapes: tuple[torch.Size, torch.Size], per_sample: bool
    ) -> None:
        self.key, self.active, self.shapes, self.per_sample = key, active, shapes, per_sample

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        found: list[Maybe] = []
        if self.active[0]:
            rest = g[0].clone()
            rest[self.key] = 0
            found.append(rest)
        if self.active[1]:
            found.append(_summed(g[0][self.key], self.shapes[1]))
        return found

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if not wanted:
            return [None]
        directions = iter(t)
        base, value = (next(directions) if on else None for on in self.active)
        like = base if base is not None else value
        assert like is not None
        y = like.new_zeros(self.shapes[0]) if base is None else base.clone()
        y[self.key] = 0 if value is None else value
        return [y]


def _summed(g: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a value that was broadcast, and may have had more axes of length one than its place."""
    return (
        g.sum_to_size(shape)
        if g.dim() >= len(shape)
        else g.reshape((1,) * (len(shape) - g.dim()) + g.shape).sum_to_size(shape)
    )


def _put(place: Tensor, key: Any, value: Any) -> Tensor:
    y = place.clone()
    y[key] = value
    return y


def _has_active(tape: Tape, key: Any) -> bool:
    return any(_has_active(tape, k) for k in key) if isinstance(key, (tuple, list)) else tape.slot(key) >= 0


@handles(T.__setitem__)
def _setitem(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    place, key, value = args
    active = (tape.slot(place) >= 0, tape.slot(value) >= 0)
    if not any(active) or _has_active(tape, key):
        raise Unsupported("an assignment at an index that depends on x")
    may_overwrite(tape, func, place)
    if trainable(value) and not active[1]:
        taken(tape, place, otherwise(tape, _put, (place, key, value), {}))
        return None
    base, new = place.detach(), value.detach() if isinstance(value, Tensor) else value
    y = _put(base, key, new)
    per_sample = of_index(base, func, (key,), {}) and (not active[1] or value.dim() == base[key].dim() == base.dim())
    if per_sample and active[1]:
        per_sample = value.shape[0] == base.shape[0]
    if isinstance(key, (list, Tensor)) or isinstance(key, tuple) and any(isinstance(k, (list, Tensor)) for k in key):
        key = _fixed_key(key)
    shapes = (base.shape, value.shape if isinstance(value, Tensor) else torch.Size())
    rule = SetItem(key, active, shapes, per_sample)
    taken(tape, place, tape.record(rule, [x for x, on in zip((place, value), active) if on], y))
    return None


def _fixed_key(key: Any) -> Any:
    """An index in memory of its own, since the critic may change its own afterwards."""
    if isinstance(key, tuple):
        return tuple(_fixed_key(k) for k in key)
    return key.clone() if isinstance(key, Tensor) else list(key) if isinstance(key, list) else key


@handles(torch.where, T.where)
def _where(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3 or any(isinstance(x, Tensor) and tape.slot(x) < 0 and x.requires_grad for x in args):
        return otherwise(tape, func, args, kwargs)
    condition, a, b = args if func is torch.where else (args[1], args[0], args[2])
    rule = Where(tape, condition, a, b)
    left, right = (x.detach() if isinstance(x, Tensor) else x for x in (a, b))
    y: Tensor = torch.where(condition, left, right)
    rule.per_sample = all(x.shape == y.shape for x in (a, b) if tape.slot(x) >= 0)
    return tape.record(rule, [x for x in (a, b) if tape.slot(x) >= 0], y)


class Where(Rule):
    """One of two by a condition that is constant near x."""

    kind = "exact, mask"

    def __init__(self, tape: Tape, condition: Tensor, a: Any, b: Any) -> None:
        self.condition = condition
        self.active = (tape.slot(a) >= 0, tape.slot(b) >= 0)
        self.shapes = [x.shape for x in (a, b) if tape.slot(x) >= 0]

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        zero = g[0].new_zeros(())
        found = []
        if self.active[0]:
            found.append(torch.where(self.condition, g[0], zero))
        if self.active[1]:
            found.append(torch.where(self.condition, zero, g[0]))
        return [x.sum_to_size(shape) for x, shape in zip(found, self.shapes)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if not wanted:
            return [None]
        zero = next(x for x in t if x is not None).new_zeros(())
        directions = iter(t)
        a, b_ = (next(directions) if on else None for on in self.active)
        return [torch.where(self.condition, zero if a is None else a, zero if b_ is None else b_)]
