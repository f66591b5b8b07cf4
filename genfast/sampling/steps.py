"""The lowering of a network: the values that it has so far, and the steps that compute them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .. import _backend
from ..programs.errors import LoweringError
from ..programs.pixel_program import Buffer, Step, padded
from .inputs import Conditions

_CPU: Any = _backend.extension("_cpu")[0]
_ORDER = "SRPQF"


class NotCausalError(LoweringError):
    """A network has no pixel program because it sees what it predicts, or what comes later: no sampler is right for
    it."""


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
    margin: tuple[int, int, int, int] = (
        0,
        0,
        0,
        0,
    )  # zeros around it that a later slice takes off: left, right, above, below


@dataclass
class Tap:
    row: int
    column: int
    weight: Tensor  # (O, I), zeros where masked
    live: Tensor  # bool (O, I)


@dataclass
class Lowering:
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

    def when(self, source: str, tap: Tap) -> str:
        if tap.row > 0:
            raise self.error("reads rows below its own, so it is not causal", NotCausalError)
        if tap.row < 0 or source in "SR":
            return "R"
        if source == "F" or tap.column > 0:
            return "F"
        return "P" if tap.column < 0 else source

    def convolve(
        self,
        x: Value,
        taps: list[Tap],
        out: int,
        bias: Tensor | None,
        *,
        stride: int = 1,
        up: int = 1,
        phases: dict[int, list[Tap]] | None = None,
        relu: bool = False,
    ) -> Value:
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

    def check_colours(self, x: Value, out: int, taps: list[Tap], colour: int) -> None:
        rows = self.members(out, colour)
        for t in taps:
            if t.column:
                continue
            for later in range(colour + 1 - x.late, self.colours):
                if bool(t.live[rows][:, self.members(x.channels, later)].any()):
                    raise self.error(
                        f"lets colour {colour} see colour {later} of its own pixel; give it "
                        f"data_channels={self.colours}",
                        NotCausalError,
                    )

    def members(self, channels: int, colour: int) -> list[int]:
        """The channels of one colour."""
        per = channels // self.colours
        if self.order == "blocked":
            return list(range(colour * per, (colour + 1) * per))
        return list(range(colour, channels, self.colours))

    def product(
        self,
        x: Value,
        y: Value,
        taps: list[Tap],
        bias: Tensor | None,
        add: Value | None,
        *,
        relu: bool,
        colour: int | None = None,
        **options: Any,
    ) -> list[Step]:
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
                        kind,
                        scale=a.scale,
                        out=y.buffer,
                        out_offset=at,
                        count=count,
                        a=a.buffer,
                        a_offset=at,
                        b=-1 if b is None else b.buffer,
                        b_offset=at,
                        weight=weight,
                    )
                )
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
                steps.append(
                    Step("copy", scale=x.scale, out=y.buffer, out_offset=to, count=1, a=x.buffer, a_offset=from_)
                )
        return y

    def shift(self, x: Value, down: int, right: int) -> Value:
        x = self.spread(x)
        known = self.when(x.known, Tap(-down, -right, torch.empty(0), torch.empty(0)))
        y = self.new(known, x.channels, x.scale)
        self.reach(x.buffer, -down, -right)
        for steps, colour in self.lists(known):
            for at, count in self.ranges(x.channels, colour):
                steps.append(
                    Step(
                        "copy",
                        scale=x.scale,
                        out=y.buffer,
                        out_offset=at,
                        count=count,
                        a=x.buffer,
                        a_offset=at,
                        arg0=down,
                        arg1=right,
                    )
                )
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
                    steps.append(
                        Step("copy", scale=p.scale, out=y.buffer, out_offset=to, count=per, a=p.buffer, a_offset=at)
                    )
                    to += per
        return y

    def part(self, x: Value, first: int, count: int) -> Value:
        """``count`` channels from ``first`` on."""
        x = self.spread(x)
        grouped = self.colours > 1 and x.channels % self.colours == 0
        if self.colours > 1 and (
            not grouped or self.order == "blocked" or first % self.colours or count % self.colours
        ):
            raise self.error("takes channels out of a map so that their colours do not stay in order")
        y = self.new(x.known, count, x.scale)
        for steps, colour in self.lists(x.known):
            for g in range(self.colours) if colour is None else [colour]:
                steps.append(
                    Step(
                        "copy",
                        scale=x.scale,
                        out=y.buffer,
                        out_offset=g * padded(count // self.colours),
                        count=count // self.colours,
                        a=x.buffer,
                        a_offset=g * padded(x.channels // self.colours) + first // self.colours,
                    )
                )
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
        return self.convolve(
            x, [Tap(0, 0, diagonal, diagonal > 0)], x.channels, torch.full((x.channels,), float(offset))
        )

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
                    Step(
                        "categorical", scale=y.scale, count=count, a=y.buffer, a_offset=first, arg0=-1, arg1=at + first
                    )
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
                raise self.error(
                    f"gates {half} channels whose halves do not agree in their colours (of {self.colours})"
                )
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
                        kind,
                        scale=x.scale,
                        out=y.buffer,
                        out_offset=to,
                        count=per,
                        a=x.buffer,
                        a_offset=at,
                        b=x.buffer,
                        b_offset=at + per,
                    )
                )
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
                        "concat_elu",
                        scale=x.scale,
                        out=y.buffer,
                        out_offset=g * padded(2 * per),
                        count=per,
                        a=x.buffer,
                        a_offset=g * padded(per),
                        arg0=per,
                    )
                )
        return y

    def entered(self, scale: float, offset: float, ones: int = 0) -> Value:
        """The image as floating point, with ``ones`` more channels of 1."""
        colours = self.shape[0]
        y = self.new("Q", colours + ones, 1, exact=True)
        y.late = 1
        y.scaled = None if ones else (scale, offset)
        for c in range(colours + ones):
            factors = torch.tensor([scale, offset] if c < colours else [0.0, 1.0], dtype=torch.float64)
            step = Step(
                "input", out=y.buffer, out_offset=c, count=1, weight=self.constant(factors), arg0=min(c, colours - 1)
            )
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
            step = Step(
                "embed", out=y.buffer, out_offset=c, count=1, weight=self.constant(column), arg0=c, arg1=padded(1)
            )
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


def dense_weight(module: Any, mask: Tensor | None) -> tuple[Tensor, Tensor]:
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


def taps_of(weight: Tensor, live: Tensor, center: Sequence[int], dilation: Sequence[int], period: int = 0) -> list[Tap]:
    """Of a kernel over (row, column), (time,) or (frame, row, column); a frame is ``period`` rows."""
    taps = []
    for tap in itertools.product(*(range(k) for k in weight.shape[2:])):
        at = [(t - c) * d for t, c, d in zip(tap, center, dilation)]
        row, column = (*at, 0)[:2] if len(at) < 3 else (at[0] * period + at[1], at[2])
        index: tuple[Any, ...] = (slice(None), slice(None))
        taps.append(Tap(row, column, weight[index + tap], live[index + tap]))
    return taps
