"""The rules of sums, factors and elementwise products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autograd_rule import otherwise
from .handlers import T, handles, sum_of_present
from .in_place import may_overwrite, overwritten
from .sweeps import Sweeps, add_rows
from .tape import Handler, Maybe, Rule, Tape


class Scale(Rule):
    """y = m x with m constant in x: masks, gains, folded norms."""

    kind = "exact, factor"

    def __init__(self, tape: Tape, x: Tensor, m: Tensor) -> None:
        self.m, self.shape = m, x.shape
        self.value = m.detach()
        self.x: Maybe = x.detach() if tape.keep_inputs and m.requires_grad else None

    @property
    def collects(self) -> bool:
        return self.m.requires_grad

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        return [(b * self.value).sum_to_size(self.shape)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,), (direction,) = b, t
        if self.m.requires_grad and cotangent is not None:
            for start, part, z in sweeps.products(cotangent, direction, self.x):
                sweeps.collect_rows(self.m, part * z, start)
        return [direction * self.value if wanted and direction is not None else None]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        if self.m.requires_grad:
            assert self.x is not None
            sweeps.collect(self.m, (cotangent * self.x).sum_to_size(self.m.shape))
        return self.pull(sweeps, c) if wanted else [None]

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis + y.dim() - x.dim()


def scale(tape: Tape, x: Tensor, m: Tensor) -> Tensor:
    """Records m x; m a tensor that does not depend on x."""
    rule = Scale(tape, x, m)
    y = x.detach() * rule.value
    rule.per_sample = y.dim() == x.dim() > 0 and y.shape[0] == x.shape[0]
    result: Tensor = tape.record(rule, (x,), y)
    return result


class Add(Rule):
    """y = alpha_1 x_1 + alpha_2 x_2, where one may be constant in x: residuals, biases."""

    kind = "exact, sum"
    prefix = True

    def __init__(self, terms: list[tuple[Tensor, bool, float]]) -> None:
        self.alphas = [alpha for _, active, alpha in terms if active]
        self.shapes = [x.shape for x, active, _ in terms if active]
        self.constants = [(x, alpha) for x, active, alpha in terms if not active and x.requires_grad]
        self.y = torch.Size()

    @property
    def collects(self) -> bool:
        return bool(self.constants)

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        found: list[Maybe] = []
        for alpha, shape in zip(self.alphas, self.shapes):
            part = b if self.prefix else b.sum_to_size(shape)
            found.append(part if alpha == 1 else part * alpha)
        return found

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = b
        if cotangent is not None:
            for x, alpha in self.constants:
                sweeps.collect_bias(x, cotangent, alpha=alpha)
        total: Maybe = None
        if wanted:
            for direction, alpha in zip(t, self.alphas):
                if direction is not None:
                    part = direction if alpha == 1 else direction * alpha
                    total = part if total is None else add_rows(total, part) if self.prefix else total + part
            if total is not None and not self.prefix and total.shape != self.y:
                total = total.expand(self.y)
        return [total]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        for x, alpha in self.constants:
            sweeps.collect_rows(x, cotangent * alpha, 0)
        return self.pull(sweeps, c) if wanted else [None] * len(self.ins)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if self.prefix else -1


def add(
    a: Any, b: Any, beta: float, place: Tensor | None, alpha: float, tape: Tape
) -> tuple[Add, list[Tensor], Tensor]:
    """(rule, active terms, value) of alpha a + beta b, in place of ``place`` (which is a) if given."""
    terms = [(x, tape.slot(x) >= 0, s) for x, s in ((a, alpha), (b, beta)) if isinstance(x, Tensor)]
    rule = Add(terms)
    left, right = (x.detach() if isinstance(x, Tensor) else x for x in (a, b))
    if place is not None:
        y = place.data.add_(right, alpha=beta)  # ``data`` counts no version: what rules keep is in other memory
    else:
        y = torch.add(left, right, alpha=beta) if alpha == 1 else torch.sub(right, left, alpha=-alpha)
    rule.prefix = all(x.shape == y.shape for x, active, _ in terms if active)
    rule.per_sample = y.dim() > 0 and all(
        x.dim() == y.dim() and x.shape[0] == y.shape[0] for x, active, _ in terms if active
    )
    rule.y = y.shape
    return rule, [x for x, active, _ in terms if active], y


def _arithmetic(sign: float, reverse: bool = False, in_place: bool = False) -> Handler:
    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
        alpha = sign * kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if "out" in kwargs or any(isinstance(x, Tensor) and not x.is_floating_point() for x in (a, b)):
            return otherwise(tape, func, args, kwargs)
        if in_place:
            rule, inputs, y = add(a, b, alpha, a if may_overwrite(tape, func, a) else None, 1, tape)
            return overwritten(tape, rule, inputs, a, y)
        rule, inputs, y = add(a, b, 1, None, alpha, tape) if reverse else add(a, b, alpha, None, 1, tape)
        return tape.record(rule, inputs, y)

    return handler


handles(torch.add, T.add, T.__add__, T.__radd__)(_arithmetic(1))
handles(torch.sub, T.sub, T.__sub__)(_arithmetic(-1))
handles(torch.rsub, T.__rsub__)(_arithmetic(-1, reverse=True))
handles(T.add_, T.__iadd__)(_arithmetic(1, in_place=True))
handles(T.sub_, T.__isub__)(_arithmetic(-1, in_place=True))


class Multiply(Rule):
    """y = a b of two active tensors."""

    kind = "exact, smooth"
    curved = True

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = a.detach(), b.detach()
        self.saved: tuple[Maybe, Maybe, Maybe] = (None, None, None)
        self.per_sample = a.dim() == b.dim() > 0 and a.shape[0] == b.shape[0]

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if self.a.shape == self.b.shape else -1

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        return [(b * self.b).sum_to_size(self.a.shape), (b * self.a).sum_to_size(self.b.shape)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        ta, tb = t
        self.saved = (b[0], ta, tb)
        if not wanted:
            return [None]
        parts = [x for x in (None if ta is None else ta * self.b, None if tb is None else tb * self.a) if x is not None]
        return [parts[0] + parts[1] if len(parts) > 1 else parts[0]]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        b, ta, tb = self.saved
        found: list[Maybe] = self.pull(sweeps, c) if c[0] is not None else [None, None]
        if b is not None:
            if tb is not None:
                found[0] = sum_of_present(found[0], (b * tb).sum_to_size(self.a.shape))
            if ta is not None:
                found[1] = sum_of_present(found[1], (b * ta).sum_to_size(self.b.shape))
        return found


@handles(torch.mul, T.mul, T.__mul__, T.__rmul__, torch.multiply, T.multiply)
def _mul(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
    if "out" in kwargs:
        return otherwise(tape, func, args, kwargs)
    if tape.slot(a) < 0:
        a, b = b, a
    if not isinstance(b, Tensor):
        return scale(tape, a, torch.full((), b, dtype=a.dtype, device=a.device))
    if tape.slot(b) < 0:
        return scale(tape, a, b)
    return tape.record(Multiply(a, b), (a, b), a.detach() * b.detach())


@handles(torch.div, T.div, T.__truediv__, torch.true_divide, T.true_divide)
def _div(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
    if tape.slot(a) < 0 or tape.slot(b) >= 0 or kwargs.get("rounding_mode") or "out" in kwargs:
        return otherwise(tape, func, args, kwargs)
    if not isinstance(b, Tensor):
        return scale(tape, a, torch.full((), 1 / b, dtype=a.dtype, device=a.device))
    with torch.enable_grad():
        m = b.reciprocal()
    return scale(tape, a, m)


@handles(torch.neg, T.neg, T.__neg__)
def _neg(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return scale(tape, args[0], torch.full((), -1.0, dtype=args[0].dtype, device=args[0].device))
