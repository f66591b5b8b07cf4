"""The rules of products with weights: linear layers, convolutions and matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.linear import OP, OP_INPUT, OP_WEIGHT
from .autograd_rule import otherwise
from .handlers import T, autocast_dtype, cast, handles, mixed_dtypes, named_arguments, sum_of_present, trainable
from .sweeps import Sweeps
from .tape import HANDLERS, Handler, Maybe, Rule, Tape

LINEAR, LINEAR_INPUT, LINEAR_WEIGHT = OP.direct, OP_INPUT.direct, OP_WEIGHT.direct


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
        self.w = cast(weight.detach(), dtype)
        self.x = cast(x.detach(), dtype)
        self.y: Maybe = _product(LINEAR, self.x, self.w, None if bias is None else cast(bias.detach(), dtype), None)
        if not (tape.keep_inputs and weight.requires_grad):
            self.x = None

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if axis < x.dim() - 1 else -1

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        b = cast(b, self.w.dtype)  # where autocast sums it with a wider one
        if self.w.shape[0] == 1:  # an outer product, which a library multiplies slowly
            return [cast(b * self.w, self.dtype)]
        return [cast(_product(LINEAR_INPUT, b, self.w, None, 0.0), self.dtype)]

    def _weight(self, sweeps: Sweeps, b: Tensor, z: Tensor) -> None:
        b = cast(b, z.dtype)
        sweeps.collect(self.weight, LINEAR_WEIGHT(b.reshape(-1, b.shape[-1]), z.reshape(-1, z.shape[-1])), fresh=True)

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,), (direction,) = b, t
        if direction is not None:
            direction = cast(direction, self.w.dtype)
        if cotangent is not None:
            if self.weight.requires_grad:
                for _, part, z in sweeps.products(cotangent, direction, self.x):
                    self._weight(sweeps, part, z)
            if self.bias is not None and self.bias.requires_grad:
                sweeps.collect_bias(self.bias, cotangent)
        return [_product(LINEAR, direction, self.w, None, None) if wanted and direction is not None else None]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        if self.weight.requires_grad:
            assert self.x is not None
            self._weight(sweeps, cotangent, self.x[: cotangent.shape[0]])
        if self.bias is not None and self.bias.requires_grad:
            sweeps.collect(self.bias, cotangent.sum_to_size(self.bias.shape))
        return self.pull(sweeps, c) if wanted else [None]


@handles(F.linear)
def _linear(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = named_arguments(args, kwargs, ("input", "weight", "bias"), (None,))
    if (
        tape.slot(x) < 0
        or tape.slot(weight) >= 0
        or tape.slot(bias) >= 0
        or x.dim() < 2
        or mixed_dtypes(x, weight, bias)
    ):
        return otherwise(tape, func, args, kwargs)
    rule = Linear(tape, x, weight, bias)
    y, rule.y = rule.y, None
    return tape.record(rule, (x,), y)


class Convolution(Weighted):
    kind = "exact, convolution"

    def __init__(
        self,
        tape: Tape,
        x: Tensor,
        weight: Tensor,
        bias: Maybe,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> None:
        self.weight, self.bias, self.dtype = weight, bias, x.dtype
        self.options = (stride, padding, dilation, transposed, output_padding, groups)
        self.to: dict[str, Any] = {"dtype": autocast_dtype(x)}
        if x.dim() == 4 and x.is_cpu:
            if weight.shape[2:] == (1, 1) and max(stride) > 1 and (x.shape[1] % 16 or weight.shape[0] % 16):
                # In channels_last these write beyond their memory (oneDNN in torch 2.13, seen with AVX2 and 3 to 6
                # channels).
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
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            b, x, self.w, sizes, *self.options, mask
        )
        return found

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        b = b.to(**self.to)
        # only its shape and strides are read, so nothing is ever written to it
        like = (
            b.new_empty(0).as_strided((0,), (1,))
            if not b.shape[0]
            else torch.empty_strided((b.shape[0], *self.shape[1:]), self.strides, dtype=b.dtype, device=b.device)
        )
        return [self._backward(b, like, [True, False, False])[0].to(self.dtype)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,), (direction,) = b, t
        if direction is not None:
            direction = direction.to(**self.to)
        if cotangent is not None:
            if self.weight.requires_grad:
                for _, part, z in sweeps.products(cotangent, direction, self.x):
                    sweeps.collect(self.weight, self._backward(part, z, [False, True, False])[1], fresh=True)
            if self.bias is not None and self.bias.requires_grad:
                sweeps.collect_bias(self.bias, cotangent, (1, -1, *(1,) * (cotangent.dim() - 2)))
        if not wanted or direction is None:
            return [None]
        return [torch.ops.aten.convolution(direction, self.w, None, *self.options)]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        assert cotangent is not None
        mask = [wanted, self.weight.requires_grad, trainable(self.bias)]
        if not mask[1]:
            if self.bias is not None and mask[2]:
                sweeps.collect(self.bias, cotangent.sum(dim=(0, *range(2, cotangent.dim()))))
            return self.pull(sweeps, c) if wanted else [None]
        assert self.x is not None
        found = self._backward(cotangent, self.x[: cotangent.shape[0]], mask)
        sweeps.collect(self.weight, found[1], fresh=True)
        if self.bias is not None and mask[2]:
            sweeps.collect(self.bias, found[2])
        return [found[0].to(self.dtype) if wanted else None]


def _sizes(value: Any, n: int) -> list[int]:
    values = [int(value)] * n if isinstance(value, int) else [int(v) for v in value]
    return values * n if len(values) == 1 else values


def _convolution(n: int, transposed: bool) -> Handler:
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding")
    names += ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
    defaults = (None, 1, 0, 0, 1, 1) if transposed else (None, 1, 0, 1, 1)

    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias, stride, padding, *rest = named_arguments(args, kwargs, names, defaults)
        output_padding, groups, dilation = rest if transposed else (0, rest[1], rest[0])
        if tape.slot(x) < 0 or tape.slot(weight) >= 0 or tape.slot(bias) >= 0 or x.dim() != n + 2 or not x.shape[0]:
            return otherwise(tape, func, args, kwargs)
        if mixed_dtypes(x, weight, bias):
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
        return (
            found if found.dim() == like.dim() and found.shape[1:] == like.shape[1:] else found.sum_to_size(like.shape)
        )

    @staticmethod
    def _right(g: Tensor, a: Tensor, like: Tensor) -> Tensor:
        """The gradient of B."""
        if like.dim() == 2 and g.dim() > 2:  # one product instead of one for each sample
            return a.reshape(-1, a.shape[-1]).t() @ g.reshape(-1, g.shape[-1])
        found = a.mT @ g
        return (
            found if found.dim() == like.dim() and found.shape[1:] == like.shape[1:] else found.sum_to_size(like.shape)
        )

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (c,) = g
        assert c is not None
        found: list[Maybe] = []
        if self.active[0]:
            found.append(self._left(c, self.b, self.a).to(self.dtypes[0]))
        if self.active[1]:
            found.append(self._right(c, self.a, self.b).to(self.dtypes[1]))
        return found

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        directions = iter(t)
        ta = next(directions) if self.active[0] else None
        tb = next(directions) if self.active[1] else None
        ta, tb = (None if x is None else x.to(self.a.dtype) for x in (ta, tb))
        (cotangent,) = b
        if self.curved:
            self.saved = (cotangent, ta, tb)
        elif cotangent is not None and self.collects:
            if self.active[0]:
                for start, part, z in sweeps.products(cotangent, ta, self.a):
                    sweeps.collect_rows(self.leaves[1], self._right(part, z, self.b), start)
            else:
                for start, part, z in sweeps.products(cotangent, tb, self.b):
                    sweeps.collect_rows(self.leaves[0], self._left(part, z, self.a), start)
        if not wanted:
            return [None]
        total = None if ta is None else ta @ self.b
        return [sum_of_present(total, None if tb is None else self.a @ tb)]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        (cotangent,) = c
        if not self.curved:
            assert cotangent is not None
            if self.collects:
                if self.active[0]:
                    sweeps.collect(self.leaves[1], self._right(cotangent, self.a, self.b))
                else:
                    sweeps.collect(self.leaves[0], self._left(cotangent, self.b, self.a))
            return self.pull(sweeps, c) if wanted else [None]
        b, ta, tb = self.saved
        found: list[Maybe] = [None, None] if cotangent is None else self.pull(sweeps, c)
        if b is not None:
            if tb is not None:
                found[0] = sum_of_present(found[0], self._left(b, tb, self.a).to(self.dtypes[0]))
            if ta is not None:
                found[1] = sum_of_present(found[1], self._right(b, ta, self.b).to(self.dtypes[1]))
        return found


@handles(torch.matmul, T.matmul, T.__matmul__, torch.bmm, T.bmm, torch.mm, T.mm)
def _matmul(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = args[0], args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2"))
    if "out" in kwargs or not isinstance(b, Tensor) or min(a.dim(), b.dim()) < 2:
        return otherwise(tape, func, args, kwargs)
    if mixed_dtypes(a, b):
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
