"""Lowers a causal PyTorch network to a pixel program.

The network is traced with torch.fx; every call in its graph becomes steps over feature maps. What does not depend on the
image (conditioning) is computed by PyTorch once, by calling its modules. The rest is ordered by when it is known (see
programs/pixel_program.py), which is also a proof that it is causal: a value that would need the future, or the colour that it
predicts, is refused by name.

A module is read instead of called only where its class is one of those below, or a subclass that changes nothing a call could
use; others are traced through. Hooks are refused, but for those that compute a weight. Calls are bound to their signatures, and
an argument that no rule reads must have its default. A value stands for a tensor: what writes into it in place gives all of the
tensor's names the new value.

With C colours drawn one after the other, channels lie colour by colour, and the steps of a pixel run once for each colour,
on that colour's channels only, so that all passes together cost one forward pass.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType, SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import _backend, ops
from .. import nn as gnn
from .._calls import class_of, hook_in_the_way, stands_for, weights_of_calls
from ..programs.errors import LoweringError
from ..programs.pixel_program import Buffer, Program, Step, padded
from .inputs import Conditions, Unknown

_CPU: Any = _backend.extension("_cpu")[0]
_ORDER = "SRPQF"
_CALLS: dict[str, Callable[[fx.GraphModule, Any], Callable[..., Any]]] = {
    "call_module": lambda graph, target: graph.get_submodule(str(target)),
    "call_function": lambda graph, target: target,
    "call_method": lambda graph, target: lambda x, *a, **k: getattr(x, target)(*a, **k),
}


class NotCausalError(LoweringError):
    """A network has no pixel program because it sees what it predicts, or what comes later: no sampler is right for it."""


@dataclass
class Value:
    """A tensor of the network: which buffer holds it, and when it is known."""

    name: str
    known: str
    channels: int
    buffer: int
    scale: int
    place: list[int]  # where each channel lies
    late: int = 0  # 1: colour k is known from pass k + 1 on (the image itself)
    levels: bool = False  # the image as whole numbers, which no buffer holds
    scaled: tuple[float, float] | None = None  # of the image as floating point: its factor and its offset
    logistic_of: Value | None = None  # whose sigmoid this is
    margin: tuple[int, int, int, int] = (0, 0, 0, 0)  # zeros around it that a later slice takes off: left, right, above, below


@dataclass
class _Tap:
    row: int
    column: int
    weight: Tensor  # (O, I), zeros where masked
    live: Tensor  # bool (O, I)


class _Root(nn.Module):
    """Calls the network as anyone would, so that a forward of its own and its hooks are met by the tracer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.network(x, *args, **kwargs)


class _Proxy(fx.Proxy):
    """A proxy that sees ``h += y`` and the like, which fx takes for ``h = h + y``, though every name of h sees the sum."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise LoweringError(f"{self.node.name}: sets .{name} of a tensor, which has no pixel program")
        super().__setattr__(name, value)


def _in_place(function: Any) -> Any:
    def call(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


_IN_PLACE_OPERATORS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift,
)  # fmt: skip
for _operator in _IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_operator.__name__.strip('_')}__", _in_place(_operator))


class _Tracer(fx.Tracer):
    def __init__(self, conditions: Conditions) -> None:
        super().__init__(autowrap_modules=(ops,))
        self.conditions = conditions
        self.image: fx.Node | None = None
        self.dynamic: set[fx.Node] = set()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The image and every condition that is a tensor become placeholders; what else the network is called with is fixed."""

        def entered(label: str, value: Any) -> Any:
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            if isinstance(value, (Tensor, Unknown)):
                return self.create_proxy("placeholder", f"condition_{label}", (), {})
            raise LoweringError(f"the condition {label!r} is a {type(value).__name__}, expected a tensor")

        image = self.create_proxy("placeholder", "image", (), {})
        c = self.conditions
        args = [entered(k, v) for k, v in zip(c.names, c.args)]
        keywords = {k: entered(k, v) for k, v in c.kwargs.items()}
        return functools.partial(root_fn, **keywords), [self.root, image, *args]

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node: fx.Node = super().create_node(kind, target, *args, **kwargs)
        if self.image is None and kind == "placeholder":
            self.image = node
        if node is self.image or any(n in self.dynamic for n in node.all_input_nodes):
            self.dynamic.add(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: list[fx.Node] = []
        fx.node.map_aggregate((args, kwargs), lambda a: given.append(a.node) if isinstance(a, fx.Proxy) else None)
        path = self.path_of_module(m)
        if given and not any(n in self.dynamic for n in given):  # of the condition: called by PyTorch, whatever it is
            return self.create_proxy("call_module", path, args, kwargs)
        leaf = self.is_leaf_module(m, path)
        hook = hook_in_the_way(m, weights=leaf)
        if hook:
            raise LoweringError(
                f"{_shown(path)} ({class_of(m).__name__}): has {hook}, which no pixel program runs; remove it, or sample with "
                "method='naive'"
            )
        return super().call_module(m, m._call_impl, args, kwargs)  # past a compiled form of the call

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Our containers are traced through, and so is a forward of one's own; torch's parts are refused by name.
        if stands_for(m, (*_MODULES, *_REFUSED)) is not None:
            return True
        cls = class_of(m)
        library = cls.__module__.startswith(("torch.nn.modules.", "torch.ao.nn."))
        return (
            library and stands_for(m, (cls,)) is not None and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )


def _shown(path: str) -> str:
    """A module's name inside the network that the caller gave."""
    return path.removeprefix("network").removeprefix(".") or "the network"


def trace(network: nn.Module, conditions: Conditions) -> fx.GraphModule:
    """The call of ``network`` with an image and ``conditions`` as a graph of modules that this file knows, under "network.".

    Raises:
        LoweringError: its Python code depends on values, or takes other arguments, or a module is called with hooks.
    """
    root = _Root(network)
    try:
        graph = _Tracer(conditions).trace(root)
    except LoweringError:
        raise
    except Exception as error:  # whatever a network's own code says of a tensor that has no numbers
        raise LoweringError(f"{class_of(network).__name__}: its forward cannot be traced: {error}") from error
    return fx.GraphModule(root, graph)


@dataclass
class _Lowering:
    graph: fx.GraphModule
    shape: tuple[int, int, int]
    levels: int
    head: str
    panel: int | None = None
    colours: int = 1  # groups in which channels lie
    passes: int = 1  # passes over a pixel
    order: str = "interleaved"
    period: int = 0  # rows from a frame to the next; 0 where there are no frames
    dims: int = 2  # spatial axes of what the network takes
    recorded: dict[fx.Node, tuple[int, Value]] | None = None  # for finding a fault: where each value is recorded
    values: dict[fx.Node, Any] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    begin: list[Step] = field(default_factory=list)
    pixel: list[list[Step]] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)
    end: list[Step] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    size: int = 0
    statics: list[fx.Node] = field(default_factory=list)
    views: list[Value] = field(default_factory=list)  # values whose tensors share memory with others'
    where: str = ""
    conditions: Conditions = field(default_factory=Conditions)

    # ---- layout ----

    def error(self, text: str, kind: type[LoweringError] = LoweringError) -> LoweringError:
        return kind(f"{self.where}: {text}")

    def place(self, channels: int) -> list[int]:
        """Where each channel lies: colour by colour, each in whole vectors."""
        if self.colours == 1 or channels % self.colours:
            return list(range(channels))
        per = channels // self.colours
        room = padded(per)
        if self.order == "blocked":
            return [c // per * room + c % per for c in range(channels)]
        return [c % self.colours * room + c // self.colours for c in range(channels)]

    def room(self, channels: int) -> int:
        if self.colours == 1 or channels % self.colours:
            return padded(channels)
        return self.colours * padded(channels // self.colours)

    def grouped(self, channels: int) -> bool:
        return self.colours == 1 or channels % self.colours == 0

    def new(self, known: str, channels: int, scale: int, *, exact: bool = False) -> Value:
        name = f"{self.where.replace('.', '_')}"
        taken = sum(b.name.split("#")[0] == name for b in self.buffers)
        name = f"{name}#{taken + 1}" if taken else name
        place = list(range(channels)) if exact else self.place(channels)
        self.buffers.append(Buffer(name, channels if exact else self.room(channels), scale))
        return Value(name, known, channels, len(self.buffers) - 1, scale, place)

    def constant(self, values: Tensor) -> int:
        """Puts ``values`` among the weights; returns where they lie."""
        flat = values.detach().to(torch.float32, copy=True).flatten()
        at = self.size
        room = padded(flat.numel())
        self.weights += [flat, flat.new_zeros(room - flat.numel())]
        self.size += room
        return at

    def panels(self, matrix: Tensor) -> int:
        """(K, columns), columns in whole vectors, as blocks of columns that the kernel reads one after the other."""
        block = self.panel
        if block is None:
            lanes = _CPU.lanes()
            block = lanes * (4 if lanes == 16 else 2)
        return self.constant(torch.cat([part.reshape(-1) for part in matrix.split(block or matrix.shape[1], 1)]))

    def reach(self, buffer: int, row: int, column: int) -> None:
        """Makes sure that a tap at this offset is in the buffer."""
        b = self.buffers[buffer]
        b.rows = max(b.rows, 1 - row)
        b.left, b.right = max(b.left, -column), max(b.right, column)

    def lists(self, known: str) -> list[tuple[list[Step], int | None]]:
        """Where steps of a value go, with the colour of each pass; None for all at once."""
        if known in "SR":
            return [(self.begin, None)]
        if known == "F":
            return [(self.end, None)]
        if known == "Q":
            return [(self.after, None)]
        return [(steps, g if self.passes > 1 else None) for g, steps in enumerate(self.pixel)]

    def ranges(self, channels: int, colour: int | None) -> list[tuple[int, int]]:
        """(first, count) of the channels, as they lie, of one colour or of all."""
        if self.colours == 1 or channels % self.colours:
            return [(0, channels)]
        per = channels // self.colours
        groups = range(self.colours) if colour is None else [colour]
        return [(g * padded(per), per) for g in groups]

    # ---- products ----

    def when(self, source: str, tap: _Tap) -> str:
        if tap.row > 0:
            raise self.error("reads rows below its own, so it is not causal", NotCausalError)
        if tap.row < 0 or source in "SR":
            return "R"
        if source == "F" or tap.column > 0:
            return "F"
        return "P" if tap.column < 0 else source

    def convolve(
        self, x: Value, taps: list[_Tap], out: int, bias: Tensor | None, *, stride: int = 1, up: int = 1,
        phases: dict[int, list[_Tap]] | None = None, relu: bool = False,
    ) -> Value:  # fmt: skip
        """The convolution of ``x``; ``phases`` gives the taps per place inside an upsampled pixel."""
        every = taps if phases is None else [t for part in phases.values() for t in part]
        every = [t for t in every if bool(t.live.any())]
        source = x.known if not x.late or self.passes == 1 else "P"
        known = max((self.when(source, t) for t in every), key=_ORDER.index, default="R")
        if self.passes > 1 and known == "Q":
            raise self.error("sees the colour that is still to be drawn", NotCausalError)
        if self.passes > 1 and known == "P" and not (self.grouped(out) and self.grouped(x.channels)):
            raise self.error(f"{x.channels} to {out} channels are no multiple of the {self.colours} colours")
        y = self.new(known, out, x.scale * stride // up)
        for t in every:
            self.reach(x.buffer, t.row, t.column)
        for phase, part in (phases or {0: taps}).items():
            part = [t for t in part if bool(t.live.any())]
            options = dict(stride=stride, up=up, phase=phase, scale=y.scale)
            if known != "P" and known != "Q":
                steps = self.begin if known == "R" else self.end
                steps += self.product(x, y, part, bias, None, relu=relu, **options)
                continue
            above = [t for t in part if t.row < 0]
            here = [t for t in part if t.row == 0]
            partial = None
            if above:
                self.where, kept = f"{self.where}.above", self.where
                partial = self.new("R", out, y.scale)
                self.where = kept
                self.begin += self.product(x, partial, above, bias, None, relu=False, **options)
            for steps, colour in self.lists(known):
                if colour is not None:
                    self.check_colours(x, out, here, colour)
                steps += self.product(x, y, here, None if above else bias, partial, relu=relu, colour=colour, **options)
        return y

    def check_colours(self, x: Value, out: int, taps: list[_Tap], colour: int) -> None:
        rows = self.members(out, colour)
        for t in taps:
            if t.column:
                continue
            for later in range(colour + 1 - x.late, self.colours):
                if bool(t.live[rows][:, self.members(x.channels, later)].any()):
                    raise self.error(
                        f"lets colour {colour} see colour {later} of its own pixel; give it data_channels={self.colours}",
                        NotCausalError,
                    )

    def members(self, channels: int, colour: int) -> list[int]:
        """The channels of one colour."""
        per = channels // self.colours
        if self.order == "blocked":
            return list(range(colour * per, (colour + 1) * per))
        return list(range(colour, channels, self.colours))

    def product(
        self, x: Value, y: Value, taps: list[_Tap], bias: Tensor | None, add: Value | None, *, relu: bool,
        colour: int | None = None, **options: Any,
    ) -> list[Step]:  # fmt: skip
        """The step that computes one colour's channels of ``y``, or all of them."""
        if colour is None:
            first, room = 0, padded(self.buffers[y.buffer].channels)
        else:
            room = padded(y.channels // self.colours)
            first = colour * room
        lies = torch.tensor([p - first for p in y.place])
        inside = (lies >= 0) & (lies < room)
        columns = lies[inside]

        def scattered(values: Tensor) -> Tensor:
            made = torch.zeros(room, *values.shape[1:], dtype=torch.float32)
            made[columns] = values.detach().float()[inside]
            return made

        where, blocks = [], []
        grouped = self.colours > 1 and x.channels % self.colours == 0
        pieces = [(self.members(x.channels, g), g * padded(x.channels // self.colours)) for g in range(self.colours)]
        if not grouped or self.buffers[x.buffer].channels == x.channels != self.room(x.channels):
            pieces = [(list(range(x.channels)), 0)]
        for t in taps:
            for members, at in pieces:
                if bool(t.live[inside][:, members].any()):
                    where.append((t.row, t.column, at, len(members)))
                    blocks.append(scattered(t.weight[:, members]).t())
        merged: list[tuple[int, int, int, int]] = []
        pixel = self.buffers[x.buffer].channels
        for row, column, at, length in where:
            if merged:
                r, c, a, n = merged[-1]
                if r == row and a == 0 and at == 0 and length == pixel and n % pixel == 0 and column == c + n // pixel:
                    merged[-1] = (r, c, a, n + length)
                    continue
            merged.append((row, column, at, length))
        weight = self.panels(torch.cat(blocks)) if blocks else 0
        at_bias = -1 if bias is None else self.constant(scattered(bias))
        return [
            Step(
                "conv", out=y.buffer, out_offset=first, count=room, a=x.buffer, b=-1 if add is None else add.buffer,
                b_offset=first, weight=weight, bias=at_bias, taps=merged, relu=relu, **options,
            )
        ]  # fmt: skip

    # ---- everything else ----

    def pointwise(self, kind: str, a: Value, b: Value | None = None, *, weight: int = -1) -> Value:
        """A function of one or two values, channel by channel."""
        a, b = self.spread(a), None if b is None else self.spread(b)
        known = max((v.known for v in (a, b) if v is not None), key=_ORDER.index)
        if b is not None and (b.channels != a.channels or b.scale != a.scale):
            raise self.error(f"has operands of {a.channels} and {b.channels} channels at 1/{a.scale} and 1/{b.scale}")
        y = self.new(known, a.channels, a.scale)
        for steps, colour in self.lists(known):
            for at, count in self.ranges(a.channels, colour):
                steps.append(
                    Step(
                        kind, scale=a.scale, out=y.buffer, out_offset=at, count=count, a=a.buffer, a_offset=at,
                        b=-1 if b is None else b.buffer, b_offset=at, weight=weight,
                    )
                )  # fmt: skip
        return y

    def spread(self, x: Value) -> Value:
        """``x`` with its channels where :meth:`place` has them; the image lies otherwise, as convolutions take it."""
        x = self.entered(1.0, 0.0) if x.levels else x
        if x.place == self.place(x.channels):
            return x
        if self.passes > 1:
            raise self.error("takes the image before a masked convolution does, which data_channels > 1 does not allow")
        y = self.new(x.known, x.channels, x.scale)
        for steps, _ in self.lists(x.known):
            for from_, to in zip(x.place, y.place):
                steps.append(Step("copy", scale=x.scale, out=y.buffer, out_offset=to, count=1, a=x.buffer, a_offset=from_))
        return y

    def shift(self, x: Value, down: int, right: int) -> Value:
        x = self.spread(x)
        known = self.when(x.known, _Tap(-down, -right, torch.empty(0), torch.empty(0)))
        y = self.new(known, x.channels, x.scale)
        self.reach(x.buffer, -down, -right)
        for steps, colour in self.lists(known):
            for at, count in self.ranges(x.channels, colour):
                steps.append(
                    Step(
                        "copy", scale=x.scale, out=y.buffer, out_offset=at, count=count, a=x.buffer, a_offset=at, arg0=down,
                        arg1=right,
                    )
                )  # fmt: skip
        return y

    def concatenate(self, parts: Sequence[Value]) -> Value:
        if len({p.scale for p in parts}) > 1:
            raise self.error("joins maps of different sizes")
        parts = [self.spread(p) for p in parts]
        total = sum(p.channels for p in parts)
        if self.colours > 1 and (self.order == "blocked" or any(p.channels % self.colours for p in parts)):
            raise self.error("joins channels whose colours do not stay in order")
        known = max((p.known for p in parts), key=_ORDER.index)
        y = self.new(known, total, parts[0].scale)
        for steps, colour in self.lists(known):
            for g in range(self.colours) if colour is None else [colour]:
                to = g * padded(total // self.colours)
                for p in parts:
                    per = p.channels // self.colours
                    at = g * padded(per)
                    steps.append(Step("copy", scale=p.scale, out=y.buffer, out_offset=to, count=per, a=p.buffer, a_offset=at))
                    to += per
        return y

    def part(self, x: Value, first: int, count: int) -> Value:
        """``count`` channels from ``first`` on."""
        x = self.spread(x)
        grouped = self.colours > 1 and x.channels % self.colours == 0
        if self.colours > 1 and (not grouped or self.order == "blocked" or first % self.colours or count % self.colours):
            raise self.error("takes channels out of a map so that their colours do not stay in order")
        y = self.new(x.known, count, x.scale)
        for steps, colour in self.lists(x.known):
            for g in range(self.colours) if colour is None else [colour]:
                steps.append(
                    Step(
                        "copy", scale=x.scale, out=y.buffer, out_offset=g * padded(count // self.colours),
                        count=count // self.colours, a=x.buffer,
                        a_offset=g * padded(x.channels // self.colours) + first // self.colours,
                    )
                )  # fmt: skip
        return y

    def affine(self, x: Value, factor: float, offset: float) -> Value:
        """factor x + offset."""
        if x.levels or x.scaled is not None:
            before = x.scaled or (1.0, 0.0)
            return self.entered(before[0] * factor, before[1] * factor + offset)
        if factor != 1 or not offset:
            x = self.pointwise("scale", x, weight=self.constant(torch.tensor([factor])))
        if not offset:
            return x
        diagonal = torch.eye(x.channels)
        return self.convolve(x, [_Tap(0, 0, diagonal, diagonal > 0)], x.channels, torch.full((x.channels,), float(offset)))

    # ---- tensors and their memory ----

    def rank(self) -> int:
        return self.dims + 2

    def axis(self, number: int) -> int:
        return number + self.rank() if number < 0 else number

    def overwrite(self, old: Value, new: Value) -> None:
        """Every name of a tensor that is written into in place sees what was written."""
        if old is new:
            return
        if old.levels:
            raise self.error("writes in place into the images that the network is given")
        if any(v is old for v in self.views):
            raise self.error("writes in place into a tensor that shares its memory with a part or the whole of another")

        def seen(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(seen(v) for v in value)
            return new if value is old else value

        for node, value in self.values.items():
            self.values[node] = seen(value)

    def record(self, node: fx.Node, y: Value) -> None:
        """Writes a value out beside what pixels are drawn from."""
        if self.recorded is None or y.levels or (y.late and self.passes > 1):
            return
        at = sum(self.buffers[v.buffer].channels for _, v in self.recorded.values())
        self.recorded[node] = (at, y)
        spread = y.place == self.place(y.channels)
        for steps, colour in self.lists(y.known):
            for first, count in self.ranges(y.channels, colour) if spread else [(0, y.channels)]:
                steps.append(
                    Step("categorical", scale=y.scale, count=count, a=y.buffer, a_offset=first, arg0=-1, arg1=at + first)
                )

    def gate(self, x: Value, kind: str, blocks: int) -> Value:
        """f(first half) * sigmoid(second half), the halves inside each of ``blocks`` contiguous groups of channels."""
        x = self.spread(x)
        half = x.channels // 2
        if x.channels % (2 * blocks):
            raise self.error(f"has {x.channels} channels, expected a multiple of {2 * blocks}")
        lies_by_colour = self.colours > 1 and x.channels % self.colours == 0
        if lies_by_colour:
            if half % self.colours or blocks != (self.colours if self.order == "blocked" else 1):
                raise self.error(f"gates {half} channels whose halves do not agree in their colours (of {self.colours})")
            pieces, per = self.colours, half // self.colours
        else:
            pieces, per = blocks, half // blocks
        y = self.new(x.known, half, x.scale)
        for steps, colour in self.lists(x.known):
            for g in range(pieces) if colour is None else [colour]:
                at = g * padded(2 * per) if lies_by_colour else g * 2 * per
                to = g * padded(per) if lies_by_colour else g * per
                steps.append(
                    Step(
                        kind, scale=x.scale, out=y.buffer, out_offset=to, count=per, a=x.buffer, a_offset=at, b=x.buffer,
                        b_offset=at + per,
                    )
                )  # fmt: skip
        return y

    def concat_elu(self, x: Value) -> Value:
        x = self.spread(x)
        if self.colours > 1 and (self.order == "blocked" or x.channels % self.colours):
            raise self.error("doubles channels whose colours do not stay in order")
        y = self.new(x.known, 2 * x.channels, x.scale)
        per = x.channels // self.colours
        for steps, colour in self.lists(x.known):
            for g in range(self.colours) if colour is None else [colour]:
                steps.append(
                    Step(
                        "concat_elu", scale=x.scale, out=y.buffer, out_offset=g * padded(2 * per), count=per, a=x.buffer,
                        a_offset=g * padded(per), arg0=per,
                    )
                )  # fmt: skip
        return y

    def entered(self, scale: float, offset: float, ones: int = 0) -> Value:
        """The image as floating point, with ``ones`` more channels of 1."""
        colours = self.shape[0]
        y = self.new("Q", colours + ones, 1, exact=True)
        y.late = 1
        y.scaled = None if ones else (scale, offset)
        for c in range(colours + ones):
            factors = torch.tensor([scale, offset] if c < colours else [0.0, 1.0], dtype=torch.float64)
            step = Step("input", out=y.buffer, out_offset=c, count=1, weight=self.constant(factors), arg0=min(c, colours - 1))
            if self.passes > 1 and c < colours:
                self.pixel[c].append(step)  # moved behind the drawing of colour c when the head is known
            else:
                self.after.append(step)
        return y

    def looked_up(self, table: Tensor) -> Value:
        """The image as a table (levels, C) gives it, colour by colour, or (levels, features) of one colour."""
        colours = self.shape[0]
        if table.shape[1] != colours:
            return self.embedded(table)
        y = self.new("Q", colours, 1, exact=True)
        y.late = 1
        for c in range(colours):
            column = torch.zeros(len(table), padded(1), dtype=torch.float32)
            column[:, 0] = table[:, c]
            step = Step("embed", out=y.buffer, out_offset=c, count=1, weight=self.constant(column), arg0=c, arg1=padded(1))
            (self.pixel[c] if self.passes > 1 else self.after).append(step)
        return y

    def embedded(self, weight: Tensor) -> Value:
        if self.shape[0] != 1:
            raise self.error(f"embeds {self.shape[0]} colours, expected one")
        if weight.shape[0] < self.levels:
            raise self.error(f"has {weight.shape[0]} levels, the image has {self.levels}")
        features = weight.shape[1]
        y = self.new("Q", features, 1)
        table = torch.zeros(weight.shape[0], padded(features), dtype=torch.float32)
        table[:, torch.tensor(y.place)] = weight.detach().float().cpu()
        self.after.append(
            Step("embed", out=y.buffer, count=features, weight=self.constant(table), arg0=0, arg1=padded(features))
        )
        return y

    def static(self, node: fx.Node, channels: int) -> Value:
        """A value of the condition as a feature map."""
        y = self.new("R", channels, 1)
        self.begin.append(Step("static", out=y.buffer, count=self.buffers[y.buffer].channels, arg0=len(self.statics)))
        self.statics.append(node)
        return y


def _dense(module: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(weight, live) of a convolution with its groups written out, (O, C, *kernel)."""
    weight = module.weight.detach().float().cpu()
    live = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask.cpu()
    weight = torch.where(live, weight, weight.new_zeros(()))
    if module.groups == 1:
        return weight, live
    out, per = weight.shape[:2]
    full = weight.new_zeros(out, per * module.groups, *weight.shape[2:])
    alive = torch.zeros_like(full, dtype=torch.bool)
    for g in range(module.groups):
        rows, columns = slice(g * out // module.groups, (g + 1) * out // module.groups), slice(g * per, (g + 1) * per)
        full[rows, columns], alive[rows, columns] = weight[rows], live[rows]
    return full, alive


def _taps(weight: Tensor, live: Tensor, center: Sequence[int], dilation: Sequence[int], period: int = 0) -> list[_Tap]:
    """Of a kernel over (row, column), (time,) or (frame, row, column); a frame is ``period`` rows."""
    taps = []
    for tap in itertools.product(*(range(k) for k in weight.shape[2:])):
        at = [(t - c) * d for t, c, d in zip(tap, center, dilation)]
        row, column = (*at, 0)[:2] if len(at) < 3 else (at[0] * period + at[1], at[2])
        index: tuple[Any, ...] = (slice(None), slice(None))
        taps.append(_Tap(row, column, weight[index + tap], live[index + tap]))
    return taps


# ---- rules: what a call becomes ----


@dataclass(frozen=True)
class _Rule:
    """How calls of one function, method or class are lowered."""

    lower: Callable[..., Any]
    reads: frozenset[str]  # arguments that it takes account of; every other one must have its default
    signature: inspect.Signature | None = None  # None: that of the class's forward
    in_place: bool = False


_FUNCTIONS: dict[Any, _Rule] = {}
_MODULES: dict[type, _Rule] = {}
_REFUSED = (gnn.RowLSTM, gnn.DiagonalBiLSTM)  # so that they are named as a whole


_Lower = TypeVar("_Lower", bound=Callable[..., Any])


def _function(signature: Callable[..., Any], *targets: Any, in_place: Sequence[Any] = ()) -> Callable[[_Lower], _Lower]:
    """Registers a rule for functions, operators and (as strings) methods of tensors, all of this signature."""

    def register(rule: _Lower) -> _Lower:
        reads = frozenset(inspect.signature(rule).parameters) - {"low"}
        for writes, several in ((False, targets), (True, in_place)):
            for target in several:
                _FUNCTIONS[target] = _Rule(rule, reads, inspect.signature(signature), writes)
        return rule

    return register


def _module(*classes: type) -> Callable[[_Lower], _Lower]:
    """Registers a rule for modules of these classes; it is given the module and, by the names of forward, the arguments."""

    def register(rule: _Lower) -> _Lower:
        reads = frozenset(inspect.signature(rule).parameters) - {"low", "module", "x"}
        for cls in classes:
            _MODULES[cls] = _Rule(rule, reads)
        return rule

    return register


def _bound(low: _Lowering, rule: _Rule, signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The arguments by name; an error where one is given that the rule does not read."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise low.error(f"is called with arguments that have no pixel program ({error})") from error
    first = next(iter(signature.parameters))  # what it is applied to
    for name, value in bound.arguments.items():
        default = signature.parameters[name].default
        same = value is default or (type(value) is type(default) and value == default)
        if name not in rule.reads and name not in ("inplace", first) and not same:
            shown = "a feature map" if isinstance(value, Value) else repr(value)
            raise low.error(f"is called with {name}={shown}, which has no pixel program")
    return bound.arguments


def _call(low: _Lowering, node: fx.Node, args: list[Any], kwargs: dict[str, Any], dynamic: set[fx.Node]) -> Any:
    """Lowers one call; what it writes into in place has the new value under all its names."""
    module = None
    if node.op == "call_module":
        module = low.graph.get_submodule(str(node.target))
        cls = stands_for(module, _MODULES)
        if cls is None:
            kind = class_of(module)
            raise low.error(f"a {kind.__module__}.{kind.__qualname__} has no pixel program")
        rule, signature = _MODULES[cls], _forward_signature(cls)
        given = _bound(low, rule, signature, args, kwargs)
        first = next(iter(signature.parameters))
        operand = given.pop(first)
        given["x"], in_place = operand, bool(getattr(module, "inplace", False))
        given = {k: v for k, v in given.items() if k == "x" or k in rule.reads} | {"module": module}
    else:
        name = getattr(node.target, "__name__", node.target)
        if node.target not in _FUNCTIONS:
            raise low.error(f"calls {name}, which has no pixel program")
        rule = _FUNCTIONS[node.target]
        assert rule.signature is not None
        given = _bound(low, rule, rule.signature, args, kwargs)
        operand = given[next(iter(rule.signature.parameters))]
        in_place = rule.in_place or bool(given.get("inplace", False))
        given = {k: v for k, v in given.items() if k in rule.reads}
    if isinstance(operand, Value) and operand.levels and in_place:
        raise low.error("writes in place into the images that the network is given")
    if module is not None and rule.lower not in _TAKE_LEVELS and any(isinstance(v, Value) and v.levels for v in given.values()):
        raise low.error("takes floats, and is given whole numbers; say by Sampler(input=...) which floats they are")
    if rule.lower not in _TAKE_LEVELS:
        entered = functools.cache(lambda: low.entered(1.0, 0.0))
        given = {k: entered() if isinstance(v, Value) and v.levels else v for k, v in given.items()}
    if rule.lower not in (_pad, _slice):
        for value in _flat(given.values()):
            if isinstance(value, Value) and any(value.margin):
                raise low.error("takes a padded map, which has a pixel program only where a slice makes it as large as it was")
    result = rule.lower(low, **given)
    if in_place:
        written = next(iter(node.all_input_nodes), None)
        if written not in dynamic or not isinstance(operand, Value):
            raise low.error("writes in place into a tensor that does not depend on the image")
        low.overwrite(operand, result)
    return result


@functools.cache
def _forward_signature(cls: Any) -> inspect.Signature:
    signature = inspect.signature(cls.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _value(low: _Lowering, x: Any) -> Value:
    if not isinstance(x, Value):
        raise low.error(f"takes {x!r}, expected a feature map")
    return x


# ---- rules of modules ----


@_module(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
def _same(low: _Lowering, module: nn.Module, x: Value) -> Value:
    if module.training and getattr(module, "p", False):
        raise low.error("drops units at random, since it stays in training mode")
    return x


@_module(gnn.ScaleLevels)
def _scale_levels(low: _Lowering, module: gnn.ScaleLevels, x: Value) -> Value:
    return low.affine(x, 2 / (module.levels - 1), -1.0)


@_module(gnn.LevelEmbedding)
def _level_embedding(low: _Lowering, module: gnn.LevelEmbedding, x: Value) -> Value:
    if not x.levels:
        raise low.error("takes the image itself")
    return low.embedded(module.weight)


@_module(gnn.AppendOnes)
def _append_ones(low: _Lowering, module: gnn.AppendOnes, x: Value) -> Value:
    if x.scaled is None:
        raise low.error("takes the scaled image, straight from ScaleLevels")
    return low.entered(*x.scaled, ones=1)


@_module(gnn.Shift)
def _shift(low: _Lowering, module: gnn.Shift, x: Value) -> Value:
    if low.dims == 3:
        raise low.error("moves a video, which has no pixel program")
    if low.dims == 1 and module.right:
        return low.shift(x, module.down, 0)
    return low.shift(x, module.down, module.right)


@_module(gnn.ConcatELU)
def _concat_elu(low: _Lowering, module: gnn.ConcatELU, x: Value) -> Value:
    return low.concat_elu(x)


@_module(gnn.GatedActivation)
def _gated(low: _Lowering, module: gnn.GatedActivation, x: Value, bias: Any = None) -> Value:
    return _gated_activation(low, x, bias, module.groups)


@_module(nn.ReLU, nn.Tanh, nn.Sigmoid)
def _unary(low: _Lowering, module: nn.Module, x: Value) -> Value:
    kind = {nn.ReLU: _relu, nn.Tanh: _tanh, nn.Sigmoid: _sigmoid}[stands_for(module, (nn.ReLU, nn.Tanh, nn.Sigmoid))]  # type: ignore[index]
    result: Value = kind(low, x)
    return result


@_module(nn.ELU)
def _elu_module(low: _Lowering, module: nn.ELU, x: Value) -> Value:
    if module.alpha != 1:
        raise low.error(f"is {module}, expected alpha=1")
    return low.pointwise("elu", x)


@_module(nn.LeakyReLU)
def _leaky_relu_module(low: _Lowering, module: nn.LeakyReLU, x: Value) -> Value:
    return _leaky_relu(low, x, module.negative_slope)


@_module(nn.GLU)
def _glu_module(low: _Lowering, module: nn.GLU, x: Value) -> Value:
    return _glu(low, x, module.dim)


@_module(gnn.MaskedConv1d, gnn.MaskedConv2d, gnn.MaskedConv3d)
def _masked(low: _Lowering, module: Any, x: Value) -> Value:
    weight, live = _dense(module, module.mask)
    taps = _taps(weight, live, module.center, module.dilation, low.period)
    return low.convolve(x, taps, module.out_channels, _bias(module), relu=module.activation == "relu")


@_module(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _one_by_one(low: _Lowering, module: Any, x: Value) -> Value:
    if set(module.kernel_size) != {1} or set(module.stride) != {1} or set(module.padding) - {0}:
        raise low.error(
            f"is {module}, which sees the future; use genfast.nn.MaskedConv{len(module.kernel_size)}d (only 1 x 1 "
            "convolutions need no mask)",
            NotCausalError,
        )
    dims = len(module.kernel_size)
    return low.convolve(x, _taps(*_dense(module, None), (0,) * dims, (1,) * dims), module.out_channels, _bias(module))


@_module(gnn.DownShiftedConv2d, gnn.DownRightShiftedConv2d)
def _shifted(low: _Lowering, module: Any, x: Value) -> Value:
    rows, columns = module.kernel_size
    centre = columns // 2 if isinstance(module, gnn.DownShiftedConv2d) else columns - 1
    _expect(low, module, padding=(0, 0), dilation=(1, 1))
    if module.stride[0] != module.stride[1]:
        raise low.error(f"has stride={module.stride}, expected one number")
    taps = _taps(*_dense(module, None), (rows - 1, centre), (1, 1))
    return low.convolve(x, taps, module.out_channels, _bias(module), stride=module.stride[0])


@_module(gnn.DownShiftedConvTranspose2d, gnn.DownRightShiftedConvTranspose2d)
def _shifted_transposed(low: _Lowering, module: Any, x: Value) -> Value:
    vertical = isinstance(module, gnn.DownShiftedConvTranspose2d)
    edge = (module.kernel_size[1] - 1) // 2 if vertical else 0
    weight = module.weight.detach().float().cpu()  # (I, O, kh, kw)
    step = module.stride[0]
    _expect(low, module, padding=(0, 0), dilation=(1, 1), output_padding=(0, 1) if vertical else (0, 0))
    if module.stride[0] != module.stride[1] or module.groups != 1 or x.scale % step:
        raise low.error(f"has stride={module.stride}, groups={module.groups}, which has no pixel program")
    phases: dict[int, list[_Tap]] = {}
    for r, c in itertools.product(range(step), repeat=2):
        part = phases.setdefault(r * step + c, [])
        for kr, kc in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
            # out row = step * source row + kr, out column = step * source column + kc - edge
            if (r - kr) % step == 0 and (c + edge - kc) % step == 0:
                w = weight[:, :, kr, kc].t()
                part.append(_Tap((r - kr) // step, (c + edge - kc) // step, w, torch.ones_like(w, dtype=torch.bool)))
    return low.convolve(x, [], module.out_channels, _bias(module), up=step, phases=phases)


@_module(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(low: _Lowering, module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Value) -> Value:
    """As it is in evaluation mode, a diagonal 1 x 1 convolution."""
    if module.running_mean is None or module.running_var is None:
        raise low.error("has no running statistics, so an image depends on the others of its batch")
    if module.training:
        raise low.error("stays in training mode, so an image depends on the others of its batch")
    scale = (module.running_var.detach() + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight.detach()
    bias = -module.running_mean * scale + (0 if module.bias is None else module.bias.detach())
    diagonal = torch.diag(scale.float().cpu())
    return low.convolve(x, [_Tap(0, 0, diagonal, diagonal != 0)], module.num_features, bias.float().cpu())


def _expect(low: _Lowering, module: Any, **settings: Any) -> None:
    for name, value in settings.items():
        if getattr(module, name) != value:
            raise low.error(f"has {name}={getattr(module, name)!r}, expected {value!r}")


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().float().cpu()


# ---- rules of functions ----


@_function(lambda input, *, out=None: None, torch.relu, "relu", in_place=[torch.relu_, "relu_"])
@_function(lambda input, inplace=False: None, F.relu)
def _relu(low: _Lowering, input: Value) -> Value:
    return low.pointwise("relu", _value(low, input))


@_function(lambda input, *, out=None: None, torch.tanh, F.tanh, "tanh", in_place=[torch.tanh_, "tanh_"])
def _tanh(low: _Lowering, input: Value) -> Value:
    return low.pointwise("tanh", _value(low, input))


@_function(lambda input, *, out=None: None, torch.sigmoid, F.sigmoid, "sigmoid", in_place=[torch.sigmoid_, "sigmoid_"])
def _sigmoid(low: _Lowering, input: Value) -> Value:
    x = low.spread(_value(low, input))
    y = low.pointwise("sigmoid", x)
    y.logistic_of = x
    return y


@_function(lambda input, alpha=1.0, inplace=False: None, F.elu, in_place=[F.elu_])
def _elu(low: _Lowering, input: Value) -> Value:
    return low.pointwise("elu", _value(low, input))


@_function(lambda input, negative_slope=0.01, inplace=False: None, F.leaky_relu, in_place=[F.leaky_relu_])
def _leaky_relu(low: _Lowering, input: Value, negative_slope: float = 0.01) -> Value:
    x = low.spread(_value(low, input))
    if not isinstance(negative_slope, (int, float)):
        raise low.error(f"takes negative_slope={negative_slope!r}, expected a number")
    # relu(x) - slope relu(-x), of which one is zero, so that nothing is lost to rounding.
    below = low.pointwise("relu", low.affine(x, -1.0, 0.0))
    return low.pointwise("add", low.pointwise("relu", x), low.affine(below, -float(negative_slope), 0.0))


@_function(lambda input, p=0.5, training=True, inplace=False: None, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
def _dropout(low: _Lowering, input: Value, p: float = 0.5, training: bool = True) -> Value:
    if training and p:
        raise low.error("drops units at random, since it is called with training=True")
    return _value(low, input)


@_function(lambda input, other: None, operator.add, in_place=[operator.iadd])
@_function(lambda input, other, *, alpha=1, out=None: None, torch.add, "add", in_place=["add_"])
def _add(low: _Lowering, input: Any, other: Any, alpha: Any = 1) -> Value:
    if not isinstance(alpha, (int, float)):
        raise low.error(f"takes alpha={alpha!r}, expected a number")
    if isinstance(input, (int, float)) and alpha == 1:
        input, other = other, input
    x = _value(low, input)
    if isinstance(other, (int, float)):
        return low.affine(x, 1.0, alpha * other)
    y = _value(low, other)
    return low.pointwise("add", x, y if alpha == 1 else low.affine(y, alpha, 0.0))


@_function(lambda input, other: None, operator.sub, in_place=[operator.isub])
@_function(lambda input, other, *, alpha=1, out=None: None, torch.sub, torch.subtract, "sub", in_place=["sub_"])
def _sub(low: _Lowering, input: Any, other: Any, alpha: Any = 1) -> Value:
    if not isinstance(alpha, (int, float)):
        raise low.error(f"takes alpha={alpha!r}, expected a number")
    if isinstance(input, (int, float)):
        return low.affine(_value(low, other), -float(alpha), input)
    return _add(low, input, other, -alpha)


@_function(lambda input: None, operator.neg, "neg", torch.neg, torch.negative, in_place=["neg_"])
def _neg(low: _Lowering, input: Value) -> Value:
    return low.affine(_value(low, input), -1.0, 0.0)


@_function(lambda input, other: None, operator.mul, in_place=[operator.imul])
@_function(lambda input, other, *, out=None: None, torch.mul, torch.multiply, "mul", in_place=["mul_"])
def _mul(low: _Lowering, input: Any, other: Any) -> Value:
    if isinstance(input, (int, float)):
        input, other = other, input
    x = _value(low, input)
    if isinstance(other, (int, float)):
        return low.affine(x, float(other), 0.0)
    y = _value(low, other)
    if y.logistic_of is None:
        x, y = y, x
    if y.logistic_of is None:
        raise low.error("multiplies two maps neither of which is a sigmoid, which has no pixel program")
    return low.pointwise("linear_gate", x, y.logistic_of)


@_function(lambda input, other: None, operator.truediv, in_place=[operator.itruediv])
@_function(lambda input, other, *, rounding_mode=None, out=None: None, torch.div, torch.divide, "div", in_place=["div_"])
@_function(lambda input, other, *, out=None: None, torch.true_divide, "true_divide", in_place=["true_divide_"])
def _div(low: _Lowering, input: Any, other: Any) -> Value:
    if not isinstance(other, (int, float)):
        raise low.error("divides by a map, which has no pixel program")
    return low.affine(_value(low, input), 1 / other, 0.0)


@_function(lambda tensors, dim=0, *, out=None: None, torch.cat, torch.concat)
def _cat(low: _Lowering, tensors: Any, dim: int = 0) -> Value:
    if low.axis(dim) != 1:
        raise low.error(f"joins along axis {dim}, expected the channels (1)")
    return low.concatenate([_value(low, t) for t in tensors])


@_function(lambda input, dim=-1: None, F.glu)
def _glu(low: _Lowering, input: Value, dim: int = -1) -> Value:
    if low.axis(dim) != 1:
        raise low.error("takes glu along another axis than the channels (1)")
    return low.gate(_value(low, input), "linear_gate", 1)


@_function(lambda x, bias=None, *, groups=1: None, ops.gated_activation)
def _gated_activation(low: _Lowering, x: Value, bias: Any = None, groups: int = 1) -> Value:
    return low.gate(x if bias is None else low.pointwise("add", x, _value(low, bias)), "gate", groups)


@_function(lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None, F.conv1d, F.conv2d, F.conv3d)
def _convolution(
    low: _Lowering, input: Value, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Value:  # fmt: skip
    """As a subclass's forward calls it, with a weight of the network's own."""
    single = isinstance(weight, Tensor) and set(weight.shape[2:]) == {1} and weight.dim() == low.rank()
    plain = all(set(v if isinstance(v, (tuple, list)) else (v,)) == {of} for v, of in ((stride, 1), (padding, 0)))
    if not single or not plain or not isinstance(bias, (Tensor, NoneType)):
        raise low.error(f"calls {('', 'conv1d', 'conv2d', 'conv3d')[low.dims]} with a kernel that is not 1 x 1")
    dense, live = _dense(SimpleNamespace(weight=weight, groups=groups), None)
    taps = _taps(dense, live, (0,) * low.dims, (1,) * low.dims)
    return low.convolve(_value(low, input), taps, len(weight), None if bias is None else bias.detach().float().cpu())


@_function(lambda input, chunks, dim=0: None, torch.chunk, "chunk")
def _chunk(low: _Lowering, input: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    return _split(low, input, -(-_value(low, input).channels // chunks), dim)


@_function(lambda tensor, split_size_or_sections, dim=0: None, torch.split)
@_function(lambda tensor, split_size, dim=0: None, "split")
def _split(
    low: _Lowering, tensor: Value, split_size: Any = None, dim: int = 0, split_size_or_sections: Any = None
) -> tuple[Value, ...]:
    x, size = _value(low, tensor), split_size if split_size is not None else split_size_or_sections
    if low.axis(dim) != 1:
        raise low.error(f"splits along axis {dim}, expected the channels (1)")
    if isinstance(size, int):
        sizes = [min(size, x.channels - first) for first in range(0, x.channels, size)]
    else:
        sizes = [int(s) for s in size]
    parts = tuple(low.part(x, sum(sizes[:i]), s) for i, s in enumerate(sizes))
    low.views += [x, *parts]
    return parts


@_function(lambda input, index: None, operator.getitem)
def _slice(low: _Lowering, input: Any, index: Any) -> Any:
    if isinstance(input, (list, tuple)) and isinstance(index, (int, slice)):
        return input[index]
    x, indices = _value(low, input), index if isinstance(index, tuple) else (index,)
    if sum(i is Ellipsis for i in indices) == 1:
        at = indices.index(Ellipsis)
        indices = (*indices[:at], *[slice(None)] * (low.rank() - len(indices) + 1), *indices[at + 1 :])
    if not all(isinstance(i, slice) for i in indices) or len(indices) > low.rank() or indices[0] != slice(None):
        raise low.error(f"takes [{index!r}] of a map, which has no pixel program")
    if x.levels:
        raise low.error("takes a part of the image, which has no pixel program")
    if all(i == slice(None) for i in indices):
        return x
    y = x
    if len(indices) > 1 and indices[1] != slice(None):
        first, stop, step = indices[1].indices(x.channels)
        if step != 1 or stop <= first or any(x.margin):
            raise low.error(f"takes channels [{indices[1]}] of {x.channels}, which has no pixel program")
        y = low.part(x, first, stop - first)
    if any(i != slice(None) for i in indices[2:]):
        y = _cropped(low, y, indices[2:])
    low.views += [x, y]
    return y


def _cropped(low: _Lowering, x: Value, indices: Sequence[slice]) -> Value:
    if low.dims == 3:
        raise low.error("takes a part of the frames, which has no pixel program")
    left, right, above, below = x.margin
    margins = [[above, below], [left, right]]
    for axis, (index, size) in enumerate(zip(indices, low.shape[1:])):
        rows = size // x.scale + sum(margins[axis])
        first, stop, step = index.indices(rows)
        if step != 1 or stop <= first:
            raise low.error(f"takes [{index}] of {rows} rows or columns, which has no pixel program")
        margins[axis][0] -= first
        margins[axis][1] -= rows - stop
    return _within(low, x, (*margins[1], *margins[0]))


def _within(low: _Lowering, x: Value, margin: Any) -> Value:
    """``x`` with this margin: moved, where that makes it as large as it was."""
    left, right, above, below = margin
    if left + right or above + below:
        return replace(x, margin=margin, logistic_of=None, scaled=None)
    return low.shift(replace(x, margin=(0, 0, 0, 0)), above, left)


@_function(lambda input, pad, mode="constant", value=None: None, F.pad)
def _pad(low: _Lowering, input: Value, pad: Sequence[int], value: Any = None) -> Value:
    x = _value(low, input)
    if low.dims == 3 or len(pad) not in (2, 4) or len(pad) // 2 > low.dims or value not in (None, 0):
        raise low.error(f"pads by {tuple(pad)} with {value!r}, which has no pixel program")
    more = (0, 0, *pad) if low.dims == 1 else (*pad, 0, 0)[:4]
    if any(old < 0 < new for old, new in zip(x.margin, more)):
        raise low.error("pads where it has cut off, which has no pixel program")
    return _within(low, x, tuple(old + new for old, new in zip(x.margin, more)))


@_function(lambda input: None, "detach")
def _detach(low: _Lowering, input: Value) -> Value:
    return _value(low, input)


@_function(lambda input, *, memory_format=None: None, "clone", torch.clone)
def _clone(low: _Lowering, input: Value, memory_format: Any = None) -> Value:
    return replace(_value(low, input))


@_function(lambda input, memory_format=None: None, "contiguous")
def _contiguous(low: _Lowering, input: Value, memory_format: Any = None) -> Value:
    return _perhaps_a_copy(low, _value(low, input))


@_function(lambda input, memory_format=None: None, "float")
@_function(lambda input, dtype: None, "to", "type")
def _float(low: _Lowering, input: Value, dtype: Any = torch.float32) -> Value:
    x = _value(low, input)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or (not x.levels and dtype.itemsize < 4):
        raise low.error(f"converts to {dtype}, which has no pixel program")
    return low.entered(1.0, 0.0) if x.levels else _perhaps_a_copy(low, x)


def _perhaps_a_copy(low: _Lowering, x: Value) -> Value:
    """The same numbers, in a tensor of which nobody knows whether it is the same."""
    y = replace(x)
    low.views += [x, y]
    return y


_TAKE_CONSTANTS = frozenset({F.conv1d, F.conv2d, F.conv3d})
_TAKE_LEVELS = (_float, _level_embedding, _scale_levels, _add, _sub, _neg, _mul, _div, _same, _slice, _detach)


@dataclass
class Lowered:
    """A network's program, and what it was made from."""

    program: Program
    statics: Callable[[Conditions], list[Tensor]]  # from the conditions to the maps that the program reads
    graph: fx.GraphModule
    recorded: dict[fx.Node, tuple[int, Value]] | None  # where in a pixel's record each value is
    blocked: bool  # the network's output lies colour by colour, not level by level


def lower(
    network: nn.Module, shape: tuple[int, int, int], *, levels: int, head: str = "categorical",
    conditions: Conditions | None = None, entry: tuple[float, float] | Tensor | None = None, group_order: str | None = None,
    frames: int = 1, panel: int | None = None, dims: int = 2, record_all: bool = False,
) -> Lowered:  # fmt: skip
    """The pixel program of ``network``, and a function from the conditions to the maps that it reads.

    Args:
        network: in evaluation mode; integer images (N, C, H, W) to logits (N, levels * C, H, W), level by level, or to mixture
            parameters. Sequences (N, C, L) are images of L rows of one pixel.
        shape: (C, H, W); of a video (C, frames * H, W).
        frames: of a video (N, C, frames, H, W).
        head: "categorical" or "logistic_mixture".
        conditions: what the network is called with besides the image; tensors of one row, or :class:`Unknown`.
        entry: how levels become the floats that the network takes: a factor and what is added, or a table (levels, C) or, of
            one colour, (levels, features); None where it takes whole numbers.
        group_order: how the colours lie where no layer says so.
        panel: how many columns of a product's weights lie together; None for what the CPU's engine takes, 0 for all.
        dims: spatial axes of what the network takes: 1 for sequences, 3 for videos.
        record_all: the program also records every value inside the network, to find where it goes wrong; it cannot draw then.

    Raises:
        LoweringError: naming the module that has no pixel program.
    """
    with weights_of_calls(network), torch.no_grad():
        given = conditions or Conditions()
        return _lower(network, shape, levels, head, given, entry, group_order, frames, panel, dims, record_all)


def _lower(
    network: nn.Module, shape: tuple[int, int, int], levels: int, head: str, conditions: Conditions,
    entry: tuple[float, float] | Tensor | None, group_order: str | None, frames: int, panel: int | None, dims: int,
    record_all: bool,
) -> Lowered:  # fmt: skip
    graph = trace(network, conditions)
    nodes = list(graph.graph.nodes)
    image = next(n for n in nodes if n.op == "placeholder")
    dynamic = {image}
    for node in nodes:
        if any(n in dynamic for n in node.all_input_nodes):
            dynamic.add(node)
    called = [graph.get_submodule(str(n.target)) for n in nodes if n.op == "call_module" and n in dynamic]
    convs: list[Any] = [m for m in called if isinstance(m, (gnn.MaskedConv1d, gnn.MaskedConv2d, gnn.MaskedConv3d))]
    rows = shape[1] // frames
    volumes = [m for m in convs if isinstance(m, gnn.MaskedConv3d)]
    gap = max((max(m.center[1], m.kernel_size[1] - 1 - m.center[1]) * m.dilation[1] for m in volumes), default=0)
    low = _Lowering(graph, shape, levels, head, panel, dims=dims, recorded={} if record_all else None, conditions=conditions)
    low.passes = max((m.data_channels for m in convs), default=1)
    low.colours = max(low.passes, shape[0] if head == "categorical" else 1)
    if low.passes not in (1, shape[0]):
        raise LoweringError(f"data_channels={low.passes}, but the image has {shape[0]} colours")
    low.period = rows + gap if volumes else 0
    orders = {m.group_order for m in convs if m.data_channels > 1}
    if len(orders) > 1:
        raise LoweringError("its layers have different group_orders")
    low.order = next(iter(orders), group_order or "interleaved")
    if group_order not in (None, low.order):
        raise LoweringError(f"its layers have group_order={low.order!r}, expected {group_order!r}")
    if head == "logistic_mixture" and low.passes > 1:
        raise NotCausalError("a mixture draws all colours at once; its layers must have data_channels=1")
    low.pixel = [[] for _ in range(low.passes)]

    result: Any = None
    for node in nodes:
        low.where = where(graph, node)
        if node is image:
            low.values[node] = _image(low, entry)
        elif node.op == "output":
            result = node.args[0]
        elif node in dynamic:
            low.values[node] = _lower_node(low, node, dynamic)
            if isinstance(low.values[node], Value):
                low.record(node, low.values[node])
    if not isinstance(result, fx.Node) or result not in dynamic or not isinstance(low.values[result], Value):
        raise LoweringError("the network's output is not one tensor that depends on the image")
    _draw(low, low.values[result], head)
    return _finish(low, graph, frames, gap)


def _image(low: _Lowering, entry: tuple[float, float] | Tensor | None) -> Value:
    """What the network is given: whole numbers, or floats made of them."""
    if entry is None:
        return Value("image", "Q", low.shape[0], -1, 1, [], levels=True)
    return low.looked_up(entry) if isinstance(entry, Tensor) else low.entered(*entry)


def _lower_node(low: _Lowering, node: fx.Node, dynamic: set[fx.Node]) -> Any:
    if node.op not in ("call_module", "call_function", "call_method"):
        raise low.error(f"a {node.op} has no pixel program")

    def operand(n: fx.Node) -> Any:
        return low.values[n] if n in dynamic else _materialise(low, n)

    if node.target in _TAKE_CONSTANTS:
        image_of = node.args[0] if node.args else node.kwargs.get("input")

        def operand_or_constant(n: fx.Node) -> Any:
            return operand(n) if n is image_of else _constant(low, n, dynamic)

        args, kwargs = fx.node.map_arg((list(node.args), dict(node.kwargs)), operand_or_constant)
        return _call(low, node, args, kwargs, dynamic)
    args, kwargs = fx.node.map_arg((list(node.args), dict(node.kwargs)), operand)
    return _call(low, node, args, kwargs, dynamic)


def _constant(low: _Lowering, node: fx.Node, dynamic: set[fx.Node]) -> Any:
    """What follows from the network's own tensors alone, such as a weight times a constant."""
    waiting, seen = [node], set[fx.Node]()
    while waiting:
        n = waiting.pop()
        if n in dynamic or n.op == "placeholder":
            raise low.error(f"takes {node.name}, which depends on the image or the condition, for a constant")
        if n not in seen:
            seen.add(n)
            waiting += n.all_input_nodes
    return _static_values(low.graph, low.conditions, {node}, seen)[node]


def where(graph: fx.GraphModule, node: fx.Node) -> str:
    """How an error names a node: by its module, or by its own name and the module that calls it."""
    if node.op == "call_module":
        path, module = _shown(str(node.target)), graph.get_submodule(str(node.target))
        ours = stands_for(module, (*_MODULES, *_REFUSED)) is not None and not class_of(module).__name__.startswith("BatchNorm")
        return path if ours else f"{path} ({class_of(module).__name__})"
    inside = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = _shown(str(inside[-1])) if inside else "the network"
    return node.name if path == "the network" else f"{node.name} in {path}"


def _materialise(low: _Lowering, a: fx.Node) -> Any:
    """A value of the condition becomes a feature map where it meets the image."""
    if a not in low.values:
        module = low.graph.get_submodule(str(a.target)) if a.op == "call_module" else None
        channels = module.out_channels if isinstance(module, gnn.ConditionBias) else _static_channels(low, a)
        low.values[a] = low.static(a, channels)
    return low.values[a]


def _static_channels(low: _Lowering, a: fx.Node) -> int:
    """How many channels a value of the condition has, by computing it for one image."""
    if any(isinstance(v, Unknown) for _, v in low.conditions.items()):
        raise low.error(f"takes {a.name}, which is no genfast.nn.ConditionBias of the context; prepare it with a context")
    value = _static_values(low.graph, low.conditions, {a}).get(a)
    if not isinstance(value, Tensor) or value.dim() > low.rank() or not value.is_floating_point():
        raise low.error(f"takes {a.name}, which is no tensor of the image's axes")
    value = _as_map(value, low.rank())
    _, height, width = low.shape
    sizes = (math.prod(value.shape[2:4]), value.shape[4]) if low.dims == 3 else (*value.shape[2:], 1)[:2]
    if any(size not in (1, whole) for size, whole in zip(sizes, (height, width))):
        raise low.error(f"takes {a.name} of {tuple(value.shape[2:])} positions, expected those of the image or one")
    return int(value.shape[1])


def _as_map(value: Tensor, rank: int) -> Tensor:
    """With leading axes of 1, as an operation with the image's maps broadcasts it."""
    return value.reshape((1,) * (rank - value.dim()) + tuple(value.shape))


def _static_values(
    graph: fx.GraphModule, conditions: Conditions, taken: set[fx.Node], only: set[fx.Node] | None = None
) -> dict[fx.Node, Any]:
    """Everything in the graph that does not depend on the image, or ``only`` some of it, by running that part of it.

    Raises:
        LoweringError: one of the nodes that are taken is changed in place afterwards.
    """
    values = {f"condition_{label}": value for label, value in conditions.items()}
    image = next(n for n in graph.graph.nodes if n.op == "placeholder")
    known: dict[fx.Node, Any] = {}
    versions: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        if only is not None and node not in only:
            continue
        if node.op == "placeholder" and node is not image:
            known[node] = values[str(node.target)]
        elif node.op == "get_attr":
            known[node] = operator.attrgetter(str(node.target))(graph)
        elif node is not image and node.op in _CALLS and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = _CALLS[node.op](graph, node.target)(*args, **kwargs)
            if node in taken and isinstance(known[node], Tensor) and not known[node].is_inference():
                versions[node] = known[node]._version
    for node, version in versions.items():
        if known[node]._version != version:
            raise LoweringError(f"{where(graph, node)}: its output is changed in place, which has no pixel program")
    return known


def _draw(low: _Lowering, y: Value, head: str) -> None:
    """The steps that draw, and what then enters the network."""
    colours = low.shape[0]
    low.where = "head"
    if y.levels or any(y.margin):
        raise LoweringError("the output is the image, or a padded map")
    if y.known in "QF":
        raise NotCausalError(f"the output {y.name} depends on the pixel that it predicts")
    if y.scale != 1:
        raise LoweringError(f"the output has 1/{y.scale} of the image's size")
    if head == "logistic_mixture":
        per = 10 if colours == 3 else 3
        if y.channels % per:
            raise LoweringError(f"the output has {y.channels} channels, expected a multiple of {per} for a mixture")
        low.pixel[0].append(Step("mixture", count=y.channels, a=y.buffer, arg0=y.channels // per))
        return
    if y.channels != low.levels * colours:
        raise LoweringError(f"the output has {y.channels} channels, expected levels * colours = {low.levels * colours}")
    per = padded(low.levels)
    for c in range(colours):
        step = Step("categorical", count=low.levels, a=y.buffer, a_offset=c * per, arg0=c, arg1=c * low.levels)
        if low.passes > 1:
            steps = low.pixel[c]
            inputs = [s for s in steps if s.kind in ("input", "embed")]
            low.pixel[c] = [*(s for s in steps if s.kind not in ("input", "embed")), step, *inputs]
        else:
            low.pixel[0].append(step)


def _finish(low: _Lowering, graph: fx.GraphModule, frames: int, gap: int) -> Lowered:
    channels, height, width = low.shape
    for b in low.buffers:
        if height % b.scale or width % b.scale:
            raise LoweringError(f"a {height} x {width} image does not divide by the {b.scale} of {b.name}")
    mixture = low.head == "logistic_mixture"
    record = next(s.count for s in low.pixel[0] if s.kind == "mixture") if mixture else low.levels * channels
    for step in itertools.chain(low.begin, *low.pixel, low.after, low.end):
        if step.kind == "categorical" and step.arg0 < 0:
            step.arg1 += record
    if low.recorded is not None:
        low.recorded = {node: (record + at, y) for node, (at, y) in low.recorded.items()}
        record += sum(low.buffers[y.buffer].channels for _, y in low.recorded.values())
    program = Program(
        channels, height, width, low.levels, 1 + channels if mixture else channels, record, low.buffers, low.begin,
        [*itertools.chain(*low.pixel), *low.after], low.end,
        torch.cat([*low.weights, torch.zeros(64, dtype=torch.float32)]), [n.name for n in low.statics], frames, gap,
    )  # fmt: skip
    wanted = [(n, torch.tensor(low.values[n].place), low.buffers[low.values[n].buffer].channels) for n in low.statics]
    calls = {n: graph.get_submodule(str(n.target)) for n in low.statics if n.op == "call_module"}
    biases = {n for n, module in calls.items() if isinstance(module, gnn.ConditionBias)}
    places: dict[torch.device, list[Tensor]] = {}  # moved once: a copy from the host cannot be captured

    def statics(conditions: Conditions) -> list[Tensor]:
        """The condition's maps (N, rows, columns, channels as they lie), by running its part of the graph."""
        if not wanted:
            return []
        with torch.inference_mode(False), torch.no_grad():
            return maps(conditions)

    def maps(conditions: Conditions) -> list[Tensor]:
        known = _static_values(graph, conditions, {node for node, _, _ in wanted})
        found = []
        device = known[wanted[0][0]].device
        if device not in places:
            places[device] = [place.to(device) for _, place, _ in wanted]
        for (node, _, room), place in zip(wanted, places[device]):
            value = (known[node] if node in biases else _as_map(known[node], low.rank())).float().movedim(1, -1)
            if value.dim() == 5:  # a video: frame below frame
                value = value.flatten(1, 2)
            if value.dim() < 4:  # one vector for all positions, or a sequence
                value = value[:, None, None] if value.dim() == 2 else value[:, :, None]
            if node not in biases and tuple(value.shape[1:3]) != (1, 1):
                value = value.expand(-1, height, width, -1)
            if value.shape[1:3] not in ((1, 1), (height, width)):
                size = tuple(value.shape[1:3])
                raise ValueError(f"context: a map of {size} positions, expected ({height}, {width}) as the image, or a vector")
            made = value.new_zeros(*value.shape[:-1], room)
            made[..., place] = value
            found.append(made.contiguous())
        return found

    return Lowered(program, statics, graph, low.recorded, low.order == "blocked" and low.head == "categorical")
