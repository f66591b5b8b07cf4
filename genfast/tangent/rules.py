"""The rules by which a critic's functions are recorded: products, maps that are linear, and everything else.

Each handler runs one function on active tensors, without autograd, and records a ``Rule``. What has none here is recorded
by ``Autograd``, which differentiates that one function twice by PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_map

from ..ops.linear import OP, OP_INPUT, OP_WEIGHT
from .tape import HANDLERS, PASSED, Handler, Maybe, PlainLayoutNeeded, Rule, Tape, Unsupported, add_rows

T = torch.Tensor
LINEAR, LINEAR_INPUT, LINEAR_WEIGHT = OP.direct, OP_INPUT.direct, OP_WEIGHT.direct


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Registers a handler for these functions."""

    def register(handler: Handler) -> Handler:
        for f in functions:
            HANDLERS[f] = handler
        return handler

    return register


def trainable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of ``x`` is done: autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def _mixed(*tensors: Any) -> bool:
    """Whether the factors of a product differ in dtype after autocast, which PyTorch refuses."""
    return len({autocast_dtype(x) for x in tensors if isinstance(x, Tensor)}) > 1


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


# ---- weights ----


def _product(function: Callable[..., Any], x: Tensor, *rest: Any) -> Tensor:
    """A product of the rows of x (..., K)."""
    if x.dim() == 2:
        y = function(x, *rest)
        return y if isinstance(y, Tensor) else y[0]
    y = _product(function, x.reshape(-1, x.shape[-1]), *rest)
    return y.view(*x.shape[:-1], y.shape[-1])


class Weighted(Rule):
    """A product with a weight, and a bias: ``w`` and ``x`` are what is multiplied, in the product's dtype."""

    prefix = True
    fresh = True
    weight: Tensor
    bias: Maybe
    w: Tensor
    x: Maybe

    @property
    def collects(self) -> bool:
        return self.weight.requires_grad or trainable(self.bias)

    def release(self) -> None:
        del self.w, self.x


class Linear(Weighted):
    kind = "exact, product"

    def __init__(self, tape: Tape, x: Tensor, weight: Tensor, bias: Maybe) -> None:
        self.weight, self.bias, self.dtype = weight, bias, x.dtype
        dtype = autocast_dtype(x)
        self.w = _cast(weight.detach(), dtype)
        self.x = _cast(x.detach(), dtype)
        self.y: Maybe = _product(LINEAR, self.x, self.w, None if bias is None else _cast(bias.detach(), dtype), None)
        if not (tape.keep_inputs and weight.requires_grad):
            self.x = None

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if axis < x.dim() - 1 else -1

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        b = _cast(b, self.w.dtype)  # where autocast sums it with a wider one
        if self.w.shape[0] == 1:  # an outer product, which a library multiplies slowly
            return [_cast(b * self.w, self.dtype)]
        return [_cast(_product(LINEAR_INPUT, b, self.w, None, 0.0), self.dtype)]

    def _weight(self, tape: Tape, b: Tensor, z: Tensor) -> None:
        b = _cast(b, z.dtype)
        tape.collect(self.weight, LINEAR_WEIGHT(b.reshape(-1, b.shape[-1]), z.reshape(-1, z.shape[-1])), fresh=True)

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,), (direction,) = b, t
        if direction is not None:
            direction = _cast(direction, self.w.dtype)
        if cotangent is not None:
            if self.weight.requires_grad:
                for _, part, z in tape.products(cotangent, direction, self.x):
                    self._weight(tape, part, z)
            if self.bias is not None and self.bias.requires_grad:
                tape.collect_bias(self.bias, cotangent)
        return [_product(LINEAR, direction, self.w, None, None) if wanted and direction is not None else None]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        if self.weight.requires_grad:
            assert self.x is not None
            self._weight(tape, cotangent, self.x[: cotangent.shape[0]])
        if self.bias is not None and self.bias.requires_grad:
            tape.collect(self.bias, cotangent.sum_to_size(self.bias.shape))
        return self.pull(tape, c) if wanted else [None]


@handles(F.linear)
def _linear(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = _named(args, kwargs, ("input", "weight", "bias"), (None,))
    if tape.slot(x) < 0 or tape.slot(weight) >= 0 or tape.slot(bias) >= 0 or x.dim() < 2 or _mixed(x, weight, bias):
        return otherwise(tape, func, args, kwargs)
    rule = Linear(tape, x, weight, bias)
    y, rule.y = rule.y, None
    return tape.record(rule, (x,), y)


class Convolution(Weighted):
    kind = "exact, convolution"

    def __init__(
        self, tape: Tape, x: Tensor, weight: Tensor, bias: Maybe, stride: list[int], padding: list[int], dilation: list[int],
        transposed: bool, output_padding: list[int], groups: int,
    ) -> None:  # fmt: skip
        self.weight, self.bias, self.dtype = weight, bias, x.dtype
        self.options = (stride, padding, dilation, transposed, output_padding, groups)
        self.to: dict[str, Any] = {"dtype": autocast_dtype(x)}
        if x.dim() == 4 and x.is_cpu:
            if weight.shape[2:] == (1, 1) and max(stride) > 1 and (x.shape[1] % 16 or weight.shape[0] % 16):
                # In channels_last these write beyond their memory (oneDNN in torch 2.13, seen with AVX2 and 3 to 6 channels).
                self.to["memory_format"] = torch.contiguous_format
            elif tape.channels_last:  # oneDNN's convolutions are 1.1 to 4 times as fast
                self.to["memory_format"] = torch.channels_last
                tape.converted = tape.converted or not x.is_contiguous(memory_format=torch.channels_last)
        to, dtype = self.to, self.to["dtype"]
        self.w = weight.detach().to(**to)
        x = x.detach().to(**to)
        self.x = x
        self.y: Maybe = torch.ops.aten.convolution(
            self.x, self.w, None if bias is None else bias.detach().to(dtype), *self.options
        )
        self.shape, self.strides = x.shape, x.stride()
        if not (tape.keep_inputs and weight.requires_grad):
            self.x = None

    def _backward(self, b: Tensor, x: Tensor, mask: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        sizes = [b.shape[1]] if mask[2] else None
        b, x = b.to(**self.to), x.to(**self.to)
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(b, x, self.w, sizes, *self.options, mask)
        return found

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        b = b.to(**self.to)
        # only its shape and strides are read, so nothing is ever written to it
        like = b.new_empty(0).as_strided((0,), (1,)) if not b.shape[0] else torch.empty_strided(
            (b.shape[0], *self.shape[1:]), self.strides, dtype=b.dtype, device=b.device
        )  # fmt: skip
        return [self._backward(b, like, [True, False, False])[0].to(self.dtype)]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,), (direction,) = b, t
        if direction is not None:
            direction = direction.to(**self.to)
        if cotangent is not None:
            if self.weight.requires_grad:
                for _, part, z in tape.products(cotangent, direction, self.x):
                    tape.collect(self.weight, self._backward(part, z, [False, True, False])[1], fresh=True)
            if self.bias is not None and self.bias.requires_grad:
                tape.collect_bias(self.bias, cotangent, (1, -1, *(1,) * (cotangent.dim() - 2)))
        if not wanted or direction is None:
            return [None]
        return [torch.ops.aten.convolution(direction, self.w, None, *self.options)]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        mask = [wanted, self.weight.requires_grad, trainable(self.bias)]
        if not mask[1]:
            if self.bias is not None and mask[2]:
                tape.collect(self.bias, cotangent.sum(dim=(0, *range(2, cotangent.dim()))))
            return self.pull(tape, c) if wanted else [None]
        assert self.x is not None
        found = self._backward(cotangent, self.x[: cotangent.shape[0]], mask)
        tape.collect(self.weight, found[1], fresh=True)
        if self.bias is not None and mask[2]:
            tape.collect(self.bias, found[2])
        return [found[0].to(self.dtype) if wanted else None]


def _sizes(value: Any, n: int) -> list[int]:
    values = [int(value)] * n if isinstance(value, int) else [int(v) for v in value]
    return values * n if len(values) == 1 else values


def _convolution(n: int, transposed: bool) -> Handler:
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding")
    names += ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    defaults = (None, 1, 0, 0, 1, 1) if transposed else (None, 1, 0, 1, 1)

    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias, stride, padding, *rest = _named(args, kwargs, names, defaults)
        output_padding, groups, dilation = rest if transposed else (0, rest[1], rest[0])
        if tape.slot(x) < 0 or tape.slot(weight) >= 0 or tape.slot(bias) >= 0 or x.dim() != n + 2 or not x.shape[0]:
            return otherwise(tape, func, args, kwargs)
        if _mixed(x, weight, bias):
            return otherwise(tape, func, args, kwargs)
        stride, dilation = _sizes(stride, n), _sizes(dilation, n)
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
            if padding == "same" and any(p % 2 for p in total):
                return otherwise(tape, func, args, kwargs)
            padding = [p // 2 for p in total] if padding == "same" else 0
        rule = Convolution(
            tape, x, weight, bias, stride, _sizes(padding, n), dilation, transposed, _sizes(output_padding, n), groups
        )
        y, rule.y = rule.y, None
        return tape.record(rule, (x,), y)

    return handler


for _n in (1, 2, 3):
    HANDLERS[getattr(F, f"conv{_n}d")] = _convolution(_n, False)
    HANDLERS[getattr(F, f"conv_transpose{_n}d")] = _convolution(_n, True)


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

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        return [(b * self.value).sum_to_size(self.shape)]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,), (direction,) = b, t
        if self.m.requires_grad and cotangent is not None:
            for start, part, z in tape.products(cotangent, direction, self.x):
                tape.collect_rows(self.m, part * z, start)
        return [direction * self.value if wanted and direction is not None else None]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        if self.m.requires_grad:
            assert self.x is not None
            tape.collect(self.m, (cotangent * self.x).sum_to_size(self.m.shape))
        return self.pull(tape, c) if wanted else [None]

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

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        found: list[Maybe] = []
        for alpha, shape in zip(self.alphas, self.shapes):
            part = b if self.prefix else b.sum_to_size(shape)
            found.append(part if alpha == 1 else part * alpha)
        return found

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = b
        if cotangent is not None:
            for x, alpha in self.constants:
                tape.collect_bias(x, cotangent, alpha=alpha)
        total: Maybe = None
        if wanted:
            for direction, alpha in zip(t, self.alphas):
                if direction is not None:
                    part = direction if alpha == 1 else direction * alpha
                    total = part if total is None else add_rows(total, part) if self.prefix else total + part
            if total is not None and not self.prefix and total.shape != self.y:
                total = total.expand(self.y)
        return [total]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        for x, alpha in self.constants:
            tape.collect_rows(x, cotangent * alpha, 0)
        return self.pull(tape, c) if wanted else [None] * len(self.ins)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if self.prefix else -1


def add(a: Any, b: Any, beta: float, place: Tensor | None, alpha: float, tape: Tape) -> tuple[Add, list[Tensor], Tensor]:
    """(rule, active terms, value) of alpha a + beta b, in place of ``place`` (which is a) if given."""
    terms = [(x, tape.slot(x) >= 0, s) for x, s in ((a, alpha), (b, beta)) if isinstance(x, Tensor)]
    rule = Add(terms)
    left, right = (x.detach() if isinstance(x, Tensor) else x for x in (a, b))
    if place is not None:
        y = place.data.add_(right, alpha=beta)  # ``data`` counts no version: what rules keep is in other memory
    else:
        y = torch.add(left, right, alpha=beta) if alpha == 1 else torch.sub(right, left, alpha=-alpha)
    rule.prefix = all(x.shape == y.shape for x, active, _ in terms if active)
    rule.per_sample = y.dim() > 0 and all(x.dim() == y.dim() and x.shape[0] == y.shape[0] for x, active, _ in terms if active)
    rule.y = y.shape
    return rule, [x for x, active, _ in terms if active], y


def _readers(x: Tensor) -> int:
    """How many tensors other than ``x`` read its memory."""
    # one for the tensor and one for the storage object that asks
    count: int = torch._C._storage_Use_Count(x.untyped_storage()._cdata) - 2  # type: ignore[attr-defined]
    return count


def overwritten(tape: Tape, rule: Rule, inputs: Sequence[Tensor], place: Tensor, y: Tensor) -> Tensor:
    """Records a rule whose output takes the place of ``place``."""
    tape.record(rule, inputs, y)
    return taken(tape, place, y)


def taken(tape: Tape, place: Tensor, y: Tensor) -> Tensor:
    """``place`` with the active ``y`` in its place."""
    slot = tape.slot(y)
    if slot < 0 or y.shape != place.shape or y.dtype != place.dtype:
        raise Unsupported(f"{tape.calling} in place, whose result does not depend on x or has another shape or dtype")
    if y.data_ptr() != place.data_ptr():
        place.data = y.detach()
    if tape.slot(place) < 0:
        place.requires_grad_()
    tape.move(place, slot)
    return place


def may_overwrite(tape: Tape, func: Any, place: Any) -> bool:
    """Whether the memory of ``place`` may be overwritten: nothing else reads it.

    Where only rules do, which keep what their sweeps need, the result takes its place in memory of its own (False).
    A constant becomes active, as it does in PyTorch.
    """
    if not isinstance(place, Tensor):
        raise Unsupported(f"{_name(func)} in place on a {type(place).__name__}")
    readers = _readers(place)
    slot = tape.slot(place)
    if slot < 0:
        parts = (part for m in tape.modules for part in m.modules())
        lasting = any(place is x for part in parts for x in (*part.buffers(False), *vars(part).values()))
        if readers or place.requires_grad or lasting or not place.dtype.is_floating_point:
            raise Unsupported(f"{_name(func)} of a value that depends on x into a tensor that does not")
        return False
    if not readers:
        return True
    ours = {id(x): x for x in (place._base,) if x is not None}  # handlers make views of aliases that no one else sees
    if readers == len(ours):
        return True
    for rule in tape.rules:
        for value in vars(rule).values():
            for x in value if isinstance(value, list) else (value,):
                if isinstance(x, Tensor) and x is not place:
                    ours[id(x)] = x
                    if x._base is not None:
                        ours[id(x._base)] = x._base
    pointer = place.untyped_storage().data_ptr()
    if readers > sum(x.untyped_storage().data_ptr() == pointer for x in ours.values()):
        raise Unsupported(f"{_name(func)} in place on memory that another tensor reads")
    return False


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

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        return [(b * self.b).sum_to_size(self.a.shape), (b * self.a).sum_to_size(self.b.shape)]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        ta, tb = t
        self.saved = (b[0], ta, tb)
        if not wanted:
            return [None]
        parts = [x for x in (None if ta is None else ta * self.b, None if tb is None else tb * self.a) if x is not None]
        return [parts[0] + parts[1] if len(parts) > 1 else parts[0]]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        b, ta, tb = self.saved
        found: list[Maybe] = self.pull(tape, c) if c[0] is not None else [None, None]
        if b is not None:
            if tb is not None:
                found[0] = _sum(found[0], (b * tb).sum_to_size(self.a.shape))
            if ta is not None:
                found[1] = _sum(found[1], (b * ta).sum_to_size(self.b.shape))
        return found


def _sum(a: Maybe, b: Maybe) -> Maybe:
    return b if a is None else a if b is None else a + b


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


class MatMul(Rule):
    """C = A B, one or both active."""

    kind = "exact, product"

    def __init__(self, tape: Tape, a: Tensor, b: Tensor) -> None:
        self.leaves = (a, b)
        dtype = autocast_dtype(a)
        self.dtypes = (a.dtype, b.dtype)
        self.a, self.b = a.detach().to(dtype), b.detach().to(dtype)
        self.active = (tape.slot(a) >= 0, tape.slot(b) >= 0)
        self.curved = all(self.active)
        self.y: Maybe = self.a @ self.b
        active = [x for x, on in zip((a, b), self.active) if on]
        self.per_sample = all(x.dim() == self.y.dim() and x.shape[0] == self.y.shape[0] for x in active) and (
            self.y.dim() >= 3 or self.active == (True, False)
        )
        self.saved: tuple[Maybe, Maybe, Maybe] = (None, None, None)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        batch = self.active == (True, False) and axis == x.dim() - 2 or axis < x.dim() - 2
        return axis if batch and x.dim() == y.dim() else -1

    @property
    def collects(self) -> bool:
        return not self.curved and any(x.requires_grad for x, on in zip(self.leaves, self.active) if not on)

    @staticmethod
    def _left(g: Tensor, b: Tensor, like: Tensor) -> Tensor:
        """The gradient of A, of the rows of the batch that g holds."""
        found = g @ b.mT
        return found if found.dim() == like.dim() and found.shape[1:] == like.shape[1:] else found.sum_to_size(like.shape)

    @staticmethod
    def _right(g: Tensor, a: Tensor, like: Tensor) -> Tensor:
        """The gradient of B."""
        if like.dim() == 2 and g.dim() > 2:  # one product instead of one for each sample
            return a.reshape(-1, a.shape[-1]).t() @ g.reshape(-1, g.shape[-1])
        found = a.mT @ g
        return found if found.dim() == like.dim() and found.shape[1:] == like.shape[1:] else found.sum_to_size(like.shape)

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        (c,) = g
        assert c is not None
        found: list[Maybe] = []
        if self.active[0]:
            found.append(self._left(c, self.b, self.a).to(self.dtypes[0]))
        if self.active[1]:
            found.append(self._right(c, self.a, self.b).to(self.dtypes[1]))
        return found

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        directions = iter(t)
        ta = next(directions) if self.active[0] else None
        tb = next(directions) if self.active[1] else None
        ta, tb = (None if x is None else x.to(self.a.dtype) for x in (ta, tb))
        (cotangent,) = b
        if self.curved:
            self.saved = (cotangent, ta, tb)
        elif cotangent is not None and self.collects:
            if self.active[0]:
                for start, part, z in tape.products(cotangent, ta, self.a):
                    tape.collect_rows(self.leaves[1], self._right(part, z, self.b), start)
            else:
                for start, part, z in tape.products(cotangent, tb, self.b):
                    tape.collect_rows(self.leaves[0], self._left(part, z, self.a), start)
        if not wanted:
            return [None]
        total = None if ta is None else ta @ self.b
        return [_sum(total, None if tb is None else self.a @ tb)]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        if not self.curved:
            assert cotangent is not None
            if self.collects:
                if self.active[0]:
                    tape.collect(self.leaves[1], self._right(cotangent, self.a, self.b))
                else:
                    tape.collect(self.leaves[0], self._left(cotangent, self.b, self.a))
            return self.pull(tape, c) if wanted else [None]
        b, ta, tb = self.saved
        found: list[Maybe] = [None, None] if cotangent is None else self.pull(tape, c)
        if b is not None:
            if tb is not None:
                found[0] = _sum(found[0], self._left(b, tb, self.a).to(self.dtypes[0]))
            if ta is not None:
                found[1] = _sum(found[1], self._right(b, ta, self.b).to(self.dtypes[1]))
        return found


@handles(torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm, torch.mm, T.mm)
def _matmul(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    if "out" in kwargs or not isinstance(b, Tensor) or min(a.dim(), b.dim()) < 2:
        return otherwise(tape, func, args, kwargs)
    if _mixed(a, b):
        return otherwise(tape, func, args, kwargs)
    if tape.slot(b) < 0 and b.dim() == 2:
        with torch.enable_grad():
            weight = b.t()
        return _linear(tape, F.linear, (a, weight), {})
    rule = MatMul(tape, a, b)
    y, rule.y = rule.y, None
    return tape.record(rule, [x for x, on in zip((a, b), rule.active) if on], y)


@handles(torch.addmm, T.addmm)
def _addmm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 3 or tape.slot(args[0]) >= 0 or tape.slot(args[2]) >= 0 or args[0].dim() != 1:
        return otherwise(tape, func, args, kwargs)
    with torch.enable_grad():
        weight = args[2].t()
    return _linear(tape, F.linear, (args[1], weight, args[0]), {})


# ---- linear maps without parameters ----


class Reshape(Rule):
    kind = "exact, linear"
    prefix = True

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.shape, self.to = x.shape, y.shape
        self.per_sample = x.dim() > 0 and y.dim() > 0 and x.shape[0] == y.shape[0]
        self.prefix = self.per_sample

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if x.shape[: axis + 1] == y.shape[: axis + 1] else -1

    def _as(self, g: Tensor, shape: Sequence[int]) -> Tensor:
        return g.reshape(g.shape[0], *shape[1:]) if self.prefix else g.reshape(shape)

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._as(g[0], self.shape)]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        return [self._as(t[0], self.to) if wanted and t[0] is not None else None]


def reshaping(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if func is T.view and not isinstance(args[1] if len(args) > 1 else 0, torch.dtype):
        func = T.reshape  # a convolution may have left another memory format than the critic's author expects
    y = func(x.detach(), *args[1:], **kwargs)
    if not y.dtype.is_floating_point or y.dtype != x.dtype:
        raise Unsupported("a view of other dtype")
    return tape.record(Reshape(x, y), (x,), y)


_PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")


class Map(Rule):
    """A linear function of one active tensor; its transpose is PyTorch's own derivative."""

    kind = "exact, linear"

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], per_sample: bool, prefix: bool) -> None:
        self.func, self.args, self.kwargs = func, args[1:], kwargs
        self.per_sample, self.prefix = per_sample, prefix
        self.shape, self.dtype, self.memory = args[0].shape, args[0].dtype, args[0].stride()
        x = args[0].detach()
        with torch.enable_grad():
            self.x = x.requires_grad_()
            y = func(self.x, *self.args, **kwargs)
        self.single = isinstance(y, Tensor)
        ys = [y] if self.single else list(y)
        self.edges = [get_gradient_edge(v) for v in ys]
        self.y: Any = y.detach() if self.single else tuple(v.detach() for v in ys)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        name = _name(self.func)
        if name in _PERMUTATIONS:  # y is a view of x
            found = [j for j in range(y.dim()) if (y.stride(j), y.shape[j]) == (x.stride(axis), x.shape[axis])]
            return found[0] if len(found) == 1 else -1
        if name in ("mean", "sum", "select"):
            dim = self.kwargs.get("dim", self.args[0] if self.args else None)
            dims = [d % x.dim() for d in _flat_ints(dim)] if dim is not None else []
            if not dims or axis in dims:
                return -1
            kept = x.dim() == y.dim()
            return axis - (0 if kept else sum(d < axis for d in dims))
        if name in ("chunk", "split"):
            dim = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else 0)
            return axis if dim % x.dim() != axis else -1
        if name in ("contiguous", "clone", "to", "float", "double"):
            return axis
        if name == "__getitem__" and isinstance(self.args[0], int) and axis > 0:
            return axis - 1
        return -1

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        ys: list[Any] = self.edges
        x = self.x
        rows = next(v.shape[0] for v in g if v is not None) if self.prefix else 0
        if self.prefix and rows != self.shape[0]:
            with torch.enable_grad():
                x = torch.empty_strided((rows, *self.shape[1:]), self.memory, dtype=self.dtype, device=self.x.device)
                x = x.zero_().requires_grad_()
                y = self.func(x, *self.args, **self.kwargs)
            ys = [y] if self.single else list(y)
        pairs = [(y, v) for y, v in zip(ys, g) if v is not None]
        return list(torch.autograd.grad([y for y, _ in pairs], x, [v for _, v in pairs], retain_graph=True))

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if not wanted or t[0] is None:
            return [None] * len(self.outs)
        y = self.func(t[0], *self.args, **self.kwargs)
        return [y] if self.single else list(y)


def mapped(keeps: Callable[[Tensor, Any, tuple[Any, ...], dict[str, Any]], bool], prefix: bool = False) -> Handler:
    """A handler of a linear function of its first argument; ``keeps`` says whether axis 0 stays the batch."""

    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if tape.slot(args[0] if args else None) < 0 or any(tape.slot(a) >= 0 for a in (*args[1:], *kwargs.values())):
            return otherwise(tape, func, args, kwargs)
        per_sample = keeps(args[0], func, args[1:], kwargs)
        rule = Map(func, args, kwargs, per_sample, prefix and per_sample)
        y, rule.y = rule.y, None
        return tape.record(rule, (args[0],), y)

    return handler


def _flat_ints(values: Any) -> list[Any]:
    found: list[Any] = []
    for v in values if isinstance(values, (tuple, list)) else (values,):
        found += _flat_ints(v) if isinstance(v, (tuple, list)) else [v]
    return found


def _axes_but_first(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """All axes that are named differ from 0 (and some are)."""
    named = [
        kwargs[k] for k in ("dim", "dims", "axis", "dim0", "dim1", "axis0", "axis1", "source", "destination") if k in kwargs
    ]
    axes = _flat_ints([*rest, *named])
    return bool(axes) and all(isinstance(a, int) and not isinstance(a, bool) and a % max(x.dim(), 1) != 0 for a in axes)


def _last_axis(index: int) -> Callable[[Tensor, Any, tuple[Any, ...], dict[str, Any]], bool]:
    """The axis stands at ``rest[index]`` or as ``dim``."""

    def keeps(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        dim = kwargs.get("dim", rest[index] if len(rest) > index else 0)
        return isinstance(dim, int) and dim % x.dim() != 0

    return keeps


def _reduction(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", kwargs.get("axis", rest[0] if rest else None))
    axes = _flat_ints(dim) if dim is not None else []
    return bool(axes) and all(a % x.dim() != 0 for a in axes)


def _permutation(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(_flat_ints([*rest, *kwargs.values()])[0] % x.dim() == 0)


def _index(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    key = rest[0]
    if not isinstance(key, tuple) or not key:
        return False
    if all(isinstance(k, Tensor) and k.shape == x.shape[:1] and k.dtype == torch.int64 for k in key):
        return bool((key[0] == torch.arange(len(x), device=key[0].device)).all())  # one entry of each sample
    return bool((isinstance(key[0], slice) and key[0] == slice(None)) or (key[0] is Ellipsis and len(key) <= x.dim()))


def _images(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return x.dim() >= 3


def _padding(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(kwargs.get("pad", rest[0] if rest else ())) // 2 < x.dim()


def _always(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return x.dim() > 0


def _never(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


def _pairs(*names: str) -> list[Any]:
    """The functions and methods of these names, wherever they are."""
    return [getattr(where, n) for n in names for where in (torch, T, F) if hasattr(where, n)]


for _f in _pairs("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"):
    HANDLERS[_f] = reshaping
for _f in _pairs("permute"):
    HANDLERS[_f] = mapped(_permutation)
for _f in _pairs("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"):
    HANDLERS[_f] = mapped(_axes_but_first)
for _f in [*_pairs("t"), T.T.__get__, T.mT.__get__]:  # type: ignore[attr-defined]
    HANDLERS[_f] = mapped(_never)
for _f in _pairs("mean", "sum"):
    HANDLERS[_f] = mapped(_reduction)
for _f in _pairs("cumsum", "flip", "select", "narrow"):
    HANDLERS[_f] = mapped(_axes_but_first if "flip" in _f.__name__ else _last_axis(0))
for _f in _pairs("roll"):
    HANDLERS[_f] = mapped(_last_axis(1))
for _f in _pairs("chunk", "split", "tensor_split"):
    HANDLERS[_f] = mapped(_last_axis(1))
for _f in _pairs("unbind", "index_select", "gather"):
    HANDLERS[_f] = mapped(_last_axis(0))
for _f in _pairs(
    "expand", "expand_as", "repeat", "repeat_interleave", "tile", "broadcast_to", "diagonal", "tril", "triu", "rot90"
):
    HANDLERS[_f] = mapped(_never)
HANDLERS[T.__getitem__] = mapped(_index)
for _f in _pairs("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"):
    HANDLERS[_f] = mapped(_images, prefix=True)
for _f in _pairs("interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "unfold", "fold", "channel_shuffle"):
    HANDLERS[_f] = mapped(_images, prefix=True)
HANDLERS[T.unfold] = mapped(_last_axis(0))
for _f in _pairs("to", "float", "double", "half", "bfloat16", "contiguous", "clone", "type_as", "cpu", "cuda"):
    HANDLERS[_f] = mapped(_always)


@handles(F.pad, torch._C._nn.pad)
def _pad(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    return (otherwise if value else mapped(_padding, prefix=True))(tape, func, args, kwargs)


class Join(Rule):
    """cat or stack of tensors, of which some are active."""

    kind = "exact, linear"

    def __init__(self, tape: Tape, func: Any, tensors: Sequence[Tensor], dim: int) -> None:
        self.func, self.dim = func, dim
        self.parts = [(x.shape, tape.slot(x) >= 0, x if tape.slot(x) < 0 else None) for x in tensors]
        self.like = tensors[0].detach().new_empty(0)
        self.constants = [x for _, active, x in self.parts if not active and trainable(x)]
        self.per_sample = dim != 0 and tensors[0].dim() > 0

    @property
    def collects(self) -> bool:
        return bool(self.constants)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if x.dim() == y.dim() and self.dim != axis else -1

    def _split(self, g: Tensor) -> Sequence[Tensor]:
        stacked = self.func is torch.stack
        return list(g.unbind(self.dim) if stacked else g.split([shape[self.dim] for shape, _, _ in self.parts], self.dim))

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [part for part, (_, active, _) in zip(self._split(g[0]), self.parts) if active]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if b[0] is not None and self.constants:
            for part, (_, active, x) in zip(self._split(b[0]), self.parts):
                if not active and trainable(x):
                    assert x is not None
                    tape.collect_bias(x, part)
        if not wanted:
            return [None]
        directions = iter(t)
        values = [next(directions) if active else None for _, active, _ in self.parts]
        return [
            self.func(
                [self.like.new_zeros(shape) if v is None else v for v, (shape, _, _) in zip(values, self.parts)], self.dim
            )
        ]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        assert c[0] is not None
        for part, (_, active, x) in zip(self._split(c[0]), self.parts):
            if not active and trainable(x):
                assert x is not None
                tape.collect(x, part)
        return self.pull(tape, c)


@handles(torch.cat, torch.concat, torch.concatenate, torch.stack)
def _join(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0] if args else kwargs["tensors"]
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    func = torch.stack if func is torch.stack else torch.cat
    if "out" in kwargs or any(x.dtype != tensors[0].dtype or x.dim() != tensors[0].dim() for x in tensors):
        return otherwise(tape, func, args, kwargs)
    dim %= tensors[0].dim() + (func is torch.stack)
    rule = Join(tape, func, tensors, dim)
    return tape.record(rule, [x for x in tensors if tape.slot(x) >= 0], func([x.detach() for x in tensors], dim))


class SetItem(Rule):
    """y = x with ``value`` at ``key``; one or both active."""

    kind = "exact, linear"

    def __init__(self, key: Any, active: tuple[bool, bool], shapes: tuple[torch.Size, torch.Size], per_sample: bool) -> None:
        self.key, self.active, self.shapes, self.per_sample = key, active, shapes, per_sample

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        found: list[Maybe] = []
        if self.active[0]:
            rest = g[0].clone()
            rest[self.key] = 0
            found.append(rest)
        if self.active[1]:
            found.append(_summed(g[0][self.key], self.shapes[1]))
        return found

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
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
        g.sum_to_size(shape) if g.dim() >= len(shape) else g.reshape((1,) * (len(shape) - g.dim()) + g.shape).sum_to_size(shape)
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
    per_sample = _index(base, func, (key,), {}) and (not active[1] or value.dim() == base[key].dim() == base.dim())
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

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        zero = g[0].new_zeros(())
        found = []
        if self.active[0]:
            found.append(torch.where(self.condition, g[0], zero))
        if self.active[1]:
            found.append(torch.where(self.condition, zero, g[0]))
        return [x.sum_to_size(shape) for x, shape in zip(found, self.shapes)]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if not wanted:
            return [None]
        zero = next(x for x in t if x is not None).new_zeros(())
        directions = iter(t)
        a, b_ = (next(directions) if on else None for on in self.active)
        return [torch.where(self.condition, zero if a is None else a, zero if b_ is None else b_)]


# ---- random numbers ----


def _plain_like(tape: Tape, x: Tensor, function: Callable[..., Tensor], **options: Any) -> Tensor:
    """``function(x)`` in the memory order that x has in plain code, in which random numbers are drawn.

    Only convolutions work in another order here, and four axes show whether that is so.
    """
    if not tape.converted or options.get("memory_format") not in (None, torch.preserve_format):
        return function(x, **options)
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise PlainLayoutNeeded
    return function(x, **(options | {"memory_format": tape.memory_format}))


@handles(
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.dropout, torch.feature_dropout, torch.dropout_,
    torch.feature_dropout_,
)  # fmt: skip
def _dropout(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in (torch.dropout, torch.feature_dropout, torch.dropout_, torch.feature_dropout_):
        x, p, training = _named(args, kwargs, ("input", "p", "train"), ())
        inplace = func in (torch.dropout_, torch.feature_dropout_)
        draw = torch.dropout if func in (torch.dropout, torch.dropout_) else torch.feature_dropout
    else:
        x, p, training, inplace = _named(args, kwargs, ("input", "p", "training", "inplace"), (0.5, True, False))
        draw = func
    if not training or p == 0:
        return x
    of_elements = draw in (F.dropout, torch.dropout)  # one draw an element, in their order in memory, or one a channel
    ones = _plain_like(tape, x.detach(), torch.ones_like) if of_elements else torch.ones_like(x)
    mask = draw(ones, p, True)  # the same draws as on x itself
    if not inplace:
        return scale(tape, x, mask)
    may_overwrite(tape, func, x)
    return taken(tape, x, scale(tape, x, mask))


@handles(torch.rand_like, torch.randn_like, torch.empty_like, torch.zeros_like, torch.ones_like)
def _like(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Constants of the shape of x. Those without numbers may be filled with random ones next."""
    x = args[0] if args else kwargs["input"]
    if len(args) > 1 or kwargs.get("requires_grad"):
        return otherwise(tape, func, args, kwargs)
    options = {k: v for k, v in kwargs.items() if k != "input"}
    try:
        return _plain_like(tape, x.detach(), func, **options)
    except PlainLayoutNeeded:
        if func in (torch.rand_like, torch.randn_like):
            raise
        return func(x.detach(), **options)


# What draws a number for each element of what it is given, and where the argument stands that says whether it does.
DRAWING = {
    "alpha_dropout": 2, "bernoulli": -1, "gumbel_softmax": -1, "multinomial": -1, "normal": -1, "poisson": -1,
    "randint_like": -1, "rrelu": 3,
}  # fmt: skip


def _draws(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    place = DRAWING.get(name)
    if place is None:
        return False
    return place < 0 or bool(kwargs.get("training", args[place] if len(args) > place else False))


# ---- everything else ----


_ELEMENTWISE = {
    "celu", "clamp", "cos", "elu", "erf", "exp", "expm1", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log",
    "log1p", "logsigmoid", "mish", "pow", "relu", "relu6", "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus", "softsign",
    "sqrt", "square", "tanh", "tanhshrink",
}  # fmt: skip


class Autograd(Rule):
    """Any differentiable function, its own second derivative by PyTorch."""

    kind = "exact, PyTorch's own double backward"
    curved = True
    per_sample = False

    def __init__(self, tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "") -> None:
        self.inputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.locals: list[Tensor] = []
        local_inputs: dict[int, Tensor] = {}
        new_args, new_kwargs = self._local(tape, (args, kwargs), local_inputs)
        self.active = [local_inputs[id(a)] for a in self.inputs]
        with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            self.result = func(*new_args, **new_kwargs)
        found = self.result if isinstance(self.result, (tuple, list)) else (self.result,)
        self.ys = [y for y in found if isinstance(y, Tensor) and y.requires_grad]
        self.edges = [get_gradient_edge(y) for y in self.ys]  # the graph without its outputs' memory
        self.shapes = [(y.shape, y.dtype, y.device) for y in self.ys]
        self.name = name or _name(func)
        self.proven = "" if self.name in _ELEMENTWISE else self.name
        self.kind = f"{type(self).kind} ({self.name})"
        self.pulled: list[tuple[Tensor, int]] = []
        self.cotangents: list[Tensor] = []
        self.curvature: list[Maybe] = [None] * len(self.inputs)

    def _local(self, tape: Tape, a: Any, made: dict[int, Tensor]) -> Any:
        """Arguments with an alias, that a derivative can be taken by, of each tensor that requires gradients."""
        if isinstance(a, dict):
            return {k: self._local(tape, v, made) for k, v in a.items()}
        if isinstance(a, (tuple, list)) and not isinstance(a, torch.Size):
            values = [self._local(tape, x, made) for x in a]
            return type(a)(*values) if hasattr(a, "_fields") else type(a)(values)
        if not isinstance(a, Tensor) or not a.requires_grad:
            return a
        if id(a) not in made:
            made[id(a)] = alias = a.detach().requires_grad_()
            if tape.slot(a) >= 0:
                self.inputs.append(a)
            else:
                self.leaves.append(a)
                self.locals.append(alias)
        return made[id(a)]

    @property
    def collects(self) -> bool:
        return bool(self.leaves)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if self.name in _ELEMENTWISE and len(self.inputs) == 1 and x.shape == y.shape else -1

    def _grad(self, outs: Sequence[Any], wrt: Sequence[Tensor], g: Sequence[Tensor], graph: bool = False) -> list[Maybe]:
        if not outs or not wrt:
            return [None] * len(wrt)
        return list(torch.autograd.grad(outs, wrt, g, retain_graph=True, create_graph=graph, allow_unused=True))

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
        pairs = [(y, v) for y, v in zip(self.edges, g) if v is not None]
        return self._grad([y for y, _ in pairs], self.active, [v for _, v in pairs])

    def chain(self, tape: Tape, b: list[Maybe]) -> list[Maybe]:
        with torch.enable_grad():
            self.cotangents = [
                (torch.zeros(shape, dtype=dtype, device=device) if v is None else v.detach()).requires_grad_()
                for (shape, dtype, device), v in zip(self.shapes, b)
            ]
            found = self._grad(self.edges, self.active, self.cotangents, graph=True)
        self.pulled = [(x, i) for i, x in enumerate(found) if x is not None and x.requires_grad]
        return [None if x is None else x.detach() for x in found]

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        pairs = [(x, t[i]) for x, i in self.pulled if t[i] is not None]
        everything = [*self.cotangents, *self.active, *self.locals]
        try:
            found = self._grad([x for x, _ in pairs], everything, [v for _, v in pairs])  # type: ignore[misc]
        except RuntimeError as error:
            raise Unsupported(f"{self.name} has no second derivative ({error})") from error
        n, m = len(self.cotangents), len(self.active)
        self.curvature = found[n : n + m]
        for leaf, g in zip(self.leaves, found[n + m :]):
            if g is not None:
                tape.collect(leaf, g)
        return found[:n]

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        pairs = [(y, v) for y, v in zip(self.edges, c) if v is not None]
        found = self._grad([y for y, _ in pairs], [*self.active, *self.locals], [v for _, v in pairs])
        for leaf, g in zip(self.leaves, found[len(self.active) :]):
            if g is not None:
                tape.collect(leaf, g)
        return [_sum(a, b) for a, b in zip(found[: len(self.active)], self.curvature)]


REFUSED = {
    "__deepcopy__", "__reduce_ex__", "__set__", "__delete__", "apply_", "as_strided", "as_strided_", "backward", "grad",
    "map_", "map2_", "register_hook", "register_post_accumulate_grad_hook", "resize_", "resize_as_", "retain_grad", "set_",
    "share_memory_", "swap_tensors", "_make_dual", "make_dual",
}  # fmt: skip
IN_PLACE_OPERATORS = {
    f"__i{n}__": f"__{n}__"
    for n in ("add", "sub", "mul", "truediv", "div", "pow", "matmul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift")
}


def _out_of_place(func: Any, name: str) -> Any:
    """What a function that works in place computes; None for one that does not."""
    if name in IN_PLACE_OPERATORS:
        return getattr(T, IN_PLACE_OPERATORS[name], None)
    if name == "copy_":
        return lambda place, source, non_blocking=False: source.to(place.dtype).expand_as(place).clone()
    if not name.endswith("_") or name.endswith("__"):
        return None
    found = next((getattr(where, name[:-1]) for where in (T, torch, F) if hasattr(where, name[:-1])), None)
    if found is None or name[:-1] in ("bernoulli", "requires_grad"):
        raise Unsupported(f"{name} of a value that depends on x")
    return found


def otherwise(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Records any function by PyTorch's own derivatives."""
    name = _name(func)
    if name == "requires_grad_" and (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
        return args[0]  # it does already
    if "out" in kwargs or name in REFUSED:
        raise Unsupported(f"{name} of a value that depends on x")
    if tape.converted and _draws(name, args, kwargs):
        raise PlainLayoutNeeded
    place: Any = None
    twin = _out_of_place(func, name)
    if twin is not None or kwargs.get("inplace"):
        place = args[0] if args else kwargs["input"]
        may_overwrite(tape, func, place)
        if tape.slot(place) < 0:  # what is kept of it must stay the constant that it has been
            args, kwargs = (place.detach(), *args[1:]) if args else (), kwargs if args else kwargs | {"input": place.detach()}
    if twin is not None:
        func = twin
        handler = HANDLERS.get(twin)
        if handler is not None:
            result = handler(tape, twin, args, kwargs)
            return place if result is place else taken(tape, place, result)
    elif place is not None:
        kwargs = kwargs | {"inplace": False}
    rule = Autograd(tape, func, args, kwargs, name)
    if not rule.ys:  # comparisons, shapes, indices
        if place is not None:
            raise Unsupported(f"{name} of a value that depends on x, with a result that does not")
        if not isinstance(rule.result, Tensor):
            tape.escaped = tape.escaped or name
        return rule.result
    by_id = {id(y): y.detach() for y in rule.ys}
    tape.record(rule, rule.inputs, tuple(by_id.values()))

    def outside(value: Any) -> Any:
        return by_id.get(id(value), value)

    result = tree_map(outside, rule.result)
    rule.result, rule.ys = None, []
    return result if place is None else taken(tape, place, result)


HANDLERS["otherwise"] = otherwise


def _constant(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What has no derivative: comparisons, positions."""
    return func(*args, **kwargs)  # gradients are off


for _f in _pairs(
    "lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal", "not_equal", "isnan", "isinf",
    "isfinite", "isclose", "allclose", "equal", "argmax", "argmin", "argsort", "nonzero", "count_nonzero", "signbit",
    "__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__",
):  # fmt: skip
    HANDLERS[_f] = _constant


@handles(T.detach, T.data.__get__)  # type: ignore[attr-defined]
def _detach(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tape.escaped = tape.escaped or "detach"
    return args[0].detach()


def _name(func: Any) -> str:
    name: str = getattr(func, "__name__", "") or str(func)
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # of an attribute


def _named(args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], defaults: Sequence[Any]) -> list[Any]:
    """The arguments in the order of ``names``; the last ones have ``defaults``."""
    required = len(names) - len(defaults)
    found = list(args)
    for i in range(len(args), len(names)):
        found.append(kwargs[names[i]] if i < required else kwargs.get(names[i], defaults[i - required]))
    return found


PASSED.update(
    f
    for f in (
        T.size, T.dim, T.numel, T.stride, T.is_contiguous, T.is_floating_point, T.element_size, T.__len__, T.ndimension,
        T.is_complex, T.data_ptr, T.get_device, T.storage_offset, T.is_neg, T.is_conj, torch.is_floating_point, torch.numel,
        *(getattr(T, n).__get__ for n in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout", "is_cpu",
                                          "grad_fn", "is_leaf", "is_sparse", "is_mkldnn", "is_quantized", "is_nested", "names")
          if hasattr(T, n)),
    )
)  # fmt: skip
