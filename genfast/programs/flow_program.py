"""A whole flow, lowered to one flat program: every transform, its conditioner and the base density in one call.

The program is a vector ``code`` (int64) and a vector ``options`` (floating point), beside the flow's weights as one
vector. Every number that a sample passes through is a row: the D inputs first, then the K numbers of its context, then
what each step makes, in the order of the steps. ``total`` is the sum of log-determinants, and of the base's log
density.

    header   D, K, rows, weights, steps, outputs (offset in code), multiply-adds of a sample, 0
    steps    each 14 numbers: operation, first row that it makes, units (how many), kind, then f0 to f9
    tables   as the steps say, by their offset in code; -1 where there is none

    0 product   act(sum over j < live[r] of W(r, j) v[sources[j]] + bias + v[added[r]]), act of kind, one whose
                derivative follows from its value; W(r, j) = weights[f0 + out[r] f1 + columns[j]], the bias at
                weights[f2 + out[r]]. f: weight, its stride, bias, inputs, then tables: sources, columns, out, live
                (rising; -1: all), added
    1 point     act(v[source[r]]) v[gate[r]] + v[added[r]], any act. f: tables source, gate, added
    2 affine    of x with the rows a and t, the log scale by kind (exp, softclamp, sigmoid, softplus, additive), by mode
                s x + t, (x - t) / s, s (x + t), x / s - t. f: tables x, a, t, then mode, constant (offset in options)
    3 spline    the rational-quadratic spline; kind: linear, no or circular tails. f: tables x, params (units P), then
                bins, zuko, inverse, nine constants (offset in options)
    4 scale     as affine, with a and t of the weights for each feature; kind exp or given (s itself). f: table x,
                offsets of a and t, mode, table of each unit's place behind these offsets, 1 where the total is left
                alone
    5 constant  total += weights[f0]
    6 base      total += the log density of the rows, standard normal or logistic by kind. f: table x
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._registry import nothing_watches
from .._torch_private import flatten, unflatten
from ..ops.flow_program import OP, OP_BACKWARD
from ..reference.autoregressive_inverse import ACTIVATIONS, TAILS
from ..reference.flow_program import (
    AFFINE,
    BASE,
    BASES,
    CONSTANT,
    HEADER,
    MODES,
    POINT,
    PRODUCT,
    SCALE,
    SCALES,
    SPLINE,
    STEP,
)
from .errors import LoweringError

Rows = list[int]
Weight = Tensor | Callable[[], Tensor]
_FROM_VALUE = ACTIVATIONS[: ACTIVATIONS.index("softplus") + 1]


class FlowBuilder:
    """Collects the steps of a :class:`FlowProgram`; a layer adds its own and replaces ``features``, the rows of x."""

    def __init__(self, inputs: int, contexts: int = 0, dtype: torch.dtype = torch.float32) -> None:
        self.inputs, self.contexts, self.dtype = inputs, contexts, dtype
        self.features: Rows = list(range(inputs))
        self.context: Rows = list(range(inputs, inputs + contexts))
        self.rows = inputs + contexts
        self.multiplications = 0
        self.options: list[float] = []
        self.weights: list[Weight] = []
        self._offsets: dict[int, int] = {}
        self._size = 0
        self._steps: list[list[int]] = []

    def weight(self, t: Weight, size: int | None = None) -> int:
        """Where ``t`` begins in the vector of weights; a function that makes one needs its ``size``."""
        if id(t) not in self._offsets:
            self._offsets[id(t)] = self._size
            self.weights.append(t)
            self._size += t.numel() if isinstance(t, Tensor) else int(size or 0)
        return self._offsets[id(t)]

    def linear(
        self,
        weight: Weight,
        bias: Tensor | None,
        sources: Rows,
        *,
        units: int | None = None,
        mask: Tensor | None = None,
        activation: str = "none",
        added: Rows | None = None,
    ) -> Rows:
        """The rows of act((weight * mask) v[sources] + bias + v[added]), one for each row of ``weight``.

        Raises:
            LoweringError: the live inputs of the units are not nested, as those of a masked autoregressive network are.
        """
        if isinstance(weight, Tensor):
            units = weight.shape[0]
            if weight.dim() != 2 or weight.shape[1] != len(sources):
                raise LoweringError(f"a layer takes {weight.shape[1]} numbers, and {len(sources)} come in")
        assert units is not None
        if activation not in _FROM_VALUE:
            made = self.linear(weight, bias, sources, units=units, mask=mask, added=added)
            return self.point(activation, made)
        inputs = len(sources)
        out, columns, live = list(range(units)), list(range(inputs)), None
        if mask is not None and not bool(mask.all()):
            reached = mask.bool()
            counts, uses = reached.sum(1), reached.sum(0)
            order = counts.argsort(stable=True)
            places = sorted(range(inputs), key=lambda j: (-int(uses[j]), sources[j]))
            nested = torch.arange(inputs) < counts[order][:, None]
            if not torch.equal(reached[order][:, places], nested):
                raise LoweringError("the live inputs of a masked layer are not nested")
            out, columns, live = order.tolist(), places, counts[order].tolist()
        else:
            columns.sort(key=lambda j: sources[j])
        first = self._make(units)
        self._step(
            PRODUCT,
            first,
            units,
            _FROM_VALUE.index(activation),
            self.weight(weight, units * inputs),
            inputs,
            -1 if bias is None else self.weight(bias),
            inputs,
            [sources[j] for j in columns],
            columns,
            out,
            live,
            None if added is None else [added[r] for r in out],
        )
        self.multiplications += units * inputs if live is None else sum(live)
        rows = [0] * units
        for place, r in enumerate(out):
            rows[r] = first + place
        return rows

    def point(self, activation: str, source: Rows, *, gate: Rows | None = None, added: Rows | None = None) -> Rows:
        """The rows of act(v[source]) v[gate] + v[added]."""
        order = sorted(range(len(source)), key=source.__getitem__)
        first = self._make(len(source))

        def table(rows: Rows | None) -> list[int] | None:
            return None if rows is None else [rows[i] for i in order]

        self._step(POINT, first, len(source), ACTIVATIONS.index(activation), table(source), table(gate), table(added))
        rows = [0] * len(source)
        for place, i in enumerate(order):
            rows[i] = first + place
        return rows

    def affine(
        self, x: Rows, a: Rows | None, t: Rows | None, *, scale: str = "exp", mode: str = "scale_then_shift",
        constant: float | None = None,
    ) -> Rows:  # fmt: skip
        """The rows of the affine map of each of ``x`` by ``a`` and ``t``; adds its log-determinant to the total."""
        first = self._make(len(x))
        offset = -1 if constant is None else self._option(constant)
        kind = SCALES.index("additive" if a is None else scale)
        self._step(AFFINE, first, len(x), kind, list(x), a, t, MODES.index(mode), offset)
        return list(range(first, first + len(x)))

    def spline(self, x: Rows, params: Rows, *, bins: int, tails: str, zuko: bool, inverse: bool,
               constants: Sequence[float]) -> Rows:  # fmt: skip
        """The rows of the spline of each of ``x`` by its ``params``, as many for each of x one behind the other.

        ``constants`` are the packed op's nine.
        """
        first = self._make(len(x))
        self._step(
            SPLINE, first, len(x), TAILS.index(tails), list(x), list(params), bins, int(zuko), int(inverse),
            self._option(*constants),
        )  # fmt: skip
        return list(range(first, first + len(x)))

    def scale(
        self,
        x: Rows,
        s: Weight | None,
        t: Weight | None,
        *,
        kind: str = "exp",
        mode: str = "scale_then_shift",
        counts: bool = True,
    ) -> Rows:
        """The rows of an affine map whose numbers are weights, one for each of ``x``.

        ``counts`` says whether its log-determinant belongs to the total: that of what a conditioner makes does not.
        """
        first = self._make(len(x))
        offsets = [-1 if w is None else self.weight(w, len(x)) for w in (s, t)]
        places = list(range(len(x)))
        self._step(
            SCALE, first, len(x), SCALES.index(kind), list(x), *offsets, MODES.index(mode), places, int(not counts)
        )  # fmt: skip
        return list(range(first, first + len(x)))

    def constant(self, w: Weight) -> None:
        """Adds one number to the total."""
        self._step(CONSTANT, 0, 0, 0, self.weight(w, 1))

    def base(self, kind: str) -> None:
        """Adds the log density of the features, "normal" or "logistic"."""
        self._step(BASE, 0, len(self.features), BASES.index(kind), list(self.features))

    def build(self) -> FlowProgram:
        """The program of the steps so far."""
        code = [self.inputs, self.contexts, self.rows, self._size, len(self._steps), 0, self.multiplications, 0]
        place = HEADER + STEP * len(self._steps)
        tables: list[int] = []
        offsets: dict[tuple[int, ...], int] = {}
        for step in self._steps:
            fields = []
            for f in step:
                if isinstance(f, tuple):
                    if f not in offsets:
                        offsets[f] = place + len(tables)
                        tables += f
                    f = offsets[f]
                fields.append(f)
            code += fields + [0] * (STEP - len(fields))
        code[5] = place + len(tables)
        tables += self.features
        return FlowProgram(
            torch.tensor(code + tables, dtype=torch.int64), tuple(self.options), tuple(self.weights), self.inputs,
            self.rows, _tile(self._steps),
        )  # fmt: skip

    def _make(self, units: int) -> int:
        first = self.rows
        self.rows += units
        return first

    def _option(self, *numbers: float) -> int:
        offset = len(self.options)
        self.options += [float(v) for v in numbers]
        return offset

    def _step(self, operation: int, first: int, units: int, kind: int, *fields: int | list[int] | None) -> None:
        entries = [-1 if f is None else tuple(f) if isinstance(f, list) else f for f in fields]
        self._steps.append([operation, first, units, kind, *entries])  # type: ignore[list-item]


def _tile(steps: Sequence[Sequence[object]]) -> int:
    """Samples that go through together.

    The time hardly depends on it (3% between 32 and 128 for layers of up to 256 units) until a layer's weights no
    longer fit the second-level cache, where more samples a tile read them less often; small tiles divide a batch among
    threads.
    """
    products = [s for s in steps if s[0] == PRODUCT]
    largest = max((int(s[2]) * int(s[7]) for s in products), default=0)  # type: ignore[call-overload]
    return 32 if largest <= 1 << 16 else 64 if largest <= 1 << 17 else 128


@dataclass
class FlowProgram:
    """A flow in one call: ``program(x, context)`` gives z (N, D) and total (N,)."""

    code: Tensor
    options: tuple[float, ...]
    weights: tuple[Weight, ...]
    inputs: int
    rows: int
    tile: int

    def tensors(self) -> list[Tensor]:
        """The weights, those that a function makes of others among them."""
        return [w if isinstance(w, Tensor) else w() for w in self.weights]

    def __call__(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (N, D) and total (N,) of x (N, D) and context (N, K).

        Raises:
            TypeError, ValueError: dtypes or shapes that do not fit, by name.
        """
        tensors = self.tensors()
        if nothing_watches() and tensors and {t.dtype for t in tensors} == {x.dtype}:
            if not torch.is_grad_enabled():
                z, total, _ = self.call(x, context, flatten(tensors), False)
                return z, total
            z, total = _Call.apply(self, x, context, *tensors)  # type: ignore[no-untyped-call]
            return z, total
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, context, *tensors) if t is not None)
        weights = joined(tensors) if tensors else x.new_zeros(0)
        z, total, _ = self.call(x, context, weights, keep)
        return z, total

    def call(self, x: Tensor, context: Tensor | None, weights: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The op's outputs, z, total and the values that a backward reads."""
        outputs: tuple[Tensor, Tensor, Tensor] = OP(
            x, context, weights, self.code, list(self.options), self.rows, self.tile, keep
        )
        return outputs


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors in one vector, one behind the other, as a function of each."""
    return torch.cat([t.reshape(-1) for t in tensors])


class _Call(torch.autograd.Function):
    """The op on its separate weights, with one node of autograd for all of them.

    A vector made by torch.cat would cost a node for each weight and a copy of its gradient.
    """

    @staticmethod
    def forward(ctx, program: FlowProgram, x: Tensor, context: Tensor | None, *tensors: Tensor):  # type: ignore[no-untyped-def]
        weights = flatten(tensors)
        z, total, values = program.call(x, context, weights, True)
        ctx.program, ctx.has_context = program, context is not None
        ctx.tensors = tensors  # their shapes, and for a second derivative themselves; the numbers are in ``weights``
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights, values, x, *((context,) if ctx.has_context else ()))
        return z, total

    @staticmethod
    def backward(ctx, grad_z: Tensor | None, grad_total: Tensor | None):  # type: ignore[no-untyped-def]
        weights, values, x, *rest = ctx.saved_tensors
        context = rest[0] if ctx.has_context else None
        tensors, program = ctx.tensors, ctx.program
        needed = ctx.needs_input_grad
        if grad_z is None and grad_total is None:
            return (None,) * (3 + len(tensors))
        if torch.is_grad_enabled():  # a gradient of the gradient is asked for
            now = joined(tensors)
            if not torch.equal(now, weights):
                raise RuntimeError(
                    "FlowProgram: a weight was modified by an inplace operation between the forward and a backward "
                    "whose own derivative is asked for"
                )
            weights, values = now, values.new_empty(0)
        dx, dcontext, dweights = OP_BACKWARD(
            grad_z,
            grad_total,
            x,
            context,
            weights,
            values,
            program.code,
            list(program.options),
            program.rows,
            program.tile,
            needed[1],
            context is not None and needed[2],
        )
        return (
            None,
            dx if needed[1] else None,
            dcontext if context is not None and needed[2] else None,
            *unflatten(dweights, tensors),
        )
