"""Rules of elementwise activations, maxima and softmax."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import T, _named, _pairs, _sum, check_in_place, handles, mapped, otherwise, overwritten, scale  # noqa: F401
from .tape import HANDLERS, Handler, Maybe, Rule, Tape


class SignMask(Rule):
    """y = x where x > 0, else slope x: one bit an element is kept."""

    kind = "exact, sign mask"
    prefix = True

    def __init__(self, x: Tensor, slope: float) -> None:
        self.slope = slope
        self.mask = x > 0

    def _apply(self, g: Tensor) -> Tensor:
        mask = self.mask[: g.shape[0]] if self.mask.dim() else self.mask
        return torch.where(mask, g, g * self.slope) if self.slope else g * mask

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._apply(g[0])]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        return [self._apply(t[0]) if wanted and t[0] is not None else None]


def _sign_mask(default: float, fixed: bool = False, in_place: bool = False) -> Handler:
    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "out" in kwargs:
            return otherwise(tape, func, args, kwargs)
        if fixed:
            x, inplace = _named(args, kwargs, ("input", "inplace"), (in_place,))
            slope = default
        else:
            x, slope, inplace = _named(args, kwargs, ("input", "negative_slope", "inplace"), (default, in_place))
        if inplace:
            check_in_place(tape, func, x)
        rule = SignMask(x.detach(), slope)
        y = F.leaky_relu(x.detach(), slope) if slope else torch.relu(x.detach())
        if inplace:
            return overwritten(tape, rule, (x,), x, y)
        return tape.record(rule, (x,), y)

    return handler


for _f in (F.relu, torch.relu, T.relu):
    HANDLERS[_f] = _sign_mask(0.0, fixed=True)
for _f in (T.relu_, torch.relu_, F.relu_):
    HANDLERS[_f] = _sign_mask(0.0, fixed=True, in_place=True)
HANDLERS[F.leaky_relu] = _sign_mask(0.01)
HANDLERS[F.leaky_relu_] = _sign_mask(0.01, in_place=True)


class Gather(Rule):
    """Values at saved positions of each map: maximum pooling."""

    kind = "exact, saved positions"

    def __init__(self, x: Tensor, y: Tensor, indices: Tensor, axes: int) -> None:
        self.shape, self.to, self.indices, self.axes = x.shape, y.shape, indices.flatten(-axes), axes

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        found = b.new_zeros(self.shape).flatten(-self.axes)
        return [found.scatter_add_(-1, self.indices, b.flatten(-self.axes)).view(self.shape)]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if not wanted or t[0] is None:
            return [None]
        return [t[0].flatten(-self.axes).gather(-1, self.indices).view(self.to)]


def _max_pool(n: int, with_indices: Any) -> Handler:
    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        if kwargs.get("return_indices") or len(args) > 6 or x.dim() != n + 2:
            return otherwise(tape, func, args, kwargs)
        options = {k: v for k, v in kwargs.items() if k not in ("input", "return_indices")}
        y, indices = with_indices(x.detach(), *args[1:], **options)
        return tape.record(Gather(x, y, indices, n), (x,), y)

    return handler


for _n in (1, 2, 3):
    HANDLERS[getattr(F, f"max_pool{_n}d")] = _max_pool(_n, getattr(F, f"max_pool{_n}d_with_indices"))
    HANDLERS[getattr(F, f"adaptive_max_pool{_n}d")] = _max_pool(_n, getattr(F, f"adaptive_max_pool{_n}d_with_indices"))


@handles(torch.abs, T.abs, T.__abs__)
def _abs(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return scale(tape, args[0], args[0].detach().sign())


@handles(F.hardtanh, F.relu6)
def _hardtanh(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is F.relu6:
        (x, inplace), low, high = _named(args, kwargs, ("input", "inplace"), (False,)), 0.0, 6.0
    else:
        x, low, high, inplace = _named(args, kwargs, ("input", "min_val", "max_val", "inplace"), (-1.0, 1.0, False))
    if inplace:
        return otherwise(tape, func, args, kwargs)
    v = x.detach()
    rule = Clamp((v > low) & (v < high))
    return tape.record(rule, (x,), v.clamp(low, high))


class Clamp(Rule):
    kind = "exact, mask"
    prefix = True

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [g[0] * self.mask[: g[0].shape[0]]]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        return [t[0] * self.mask[: t[0].shape[0]] if wanted and t[0] is not None else None]


class Softmax(Rule):
    """y = softmax(x): J = diag(y) - y y^T, symmetric; d<b, J t>/dx = J (b t - b <y, t> - t <y, b>)."""

    kind = "exact, smooth (softmax)"
    curved = True
    prefix = True

    def __init__(self, y: Tensor, dim: int) -> None:
        self.y, self.dim = y, dim
        self.per_sample = dim % y.dim() != 0
        self.saved: tuple[Maybe, Maybe] = (None, None)

    def _times(self, g: Tensor) -> Tensor:
        y = self.y[: g.shape[0]]
        return y * (g - (g * y).sum(self.dim, keepdim=True))

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._times(g[0])]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        self.saved = (b[0], t[0])
        return [self._times(t[0]) if wanted and t[0] is not None else None]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        b, t = self.saved
        if b is None or t is None:
            return [None if c[0] is None else self._times(c[0])]
        b, y = b[: t.shape[0]], self.y[: t.shape[0]]
        inner = b * t - b * (y * t).sum(self.dim, keepdim=True) - t * (y * b).sum(self.dim, keepdim=True)
        if c[0] is not None and c[0].shape == inner.shape:
            return [self._times(inner + c[0])]
        return [_add_rows(self._times(inner), None if c[0] is None else self._times(c[0]))]


def _add_rows(a: Tensor, b: Maybe) -> Tensor:
    """a + b, where one may hold the first rows of the batch alone."""
    if b is None:
        return a
    long, short = (a, b) if a.shape[0] > b.shape[0] else (b, a)
    long = long.clone()
    long[: short.shape[0]] += short
    return long


@handles(F.softmax, torch.softmax, T.softmax)
def _softmax(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dim is None or "dtype" in kwargs or len(args) > 2 or x.dim() < 2:
        return otherwise(tape, func, args, kwargs)
    y = torch.softmax(x.detach(), dim)
    return tape.record(Softmax(y, dim), (x,), y.detach())
