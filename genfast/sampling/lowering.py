"""Lowers a causal PyTorch network to a pixel program.

The network is traced with torch.fx; every call in its graph becomes steps over feature maps. What does not depend on the
image (conditioning) is computed by PyTorch once. The rest is ordered by when it is known (see program.py), which is also a
proof that it is causal: a value that would need the future, or the colour that it predicts, is refused by name.

With C colours drawn one after the other, channels lie colour by colour, and the steps of a pixel run once for each colour,
on that colour's channels only, so that all passes together cost one forward pass.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import _backend, ops
from .. import nn as gnn
from .program import Buffer, Program, Step, padded

_CPU: Any = _backend.extension("_cpu")[0]
_ORDER = "SRPQF"
_IDENTITY = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_UNARY: dict[Any, str] = {
    nn.ReLU: "relu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.ELU: "elu",
    torch.relu: "relu", F.relu: "relu", F.relu_: "relu", F.elu: "elu", torch.tanh: "tanh", F.tanh: "tanh",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", "relu": "relu", "tanh": "tanh", "sigmoid": "sigmoid", "relu_": "relu",
}  # fmt: skip
_CONVS = (
    gnn.MaskedConv1d, gnn.MaskedConv2d, gnn.MaskedConv3d, gnn.DownShiftedConv2d, gnn.DownRightShiftedConv2d,
    gnn.DownShiftedConvTranspose2d, gnn.DownRightShiftedConvTranspose2d,
)  # fmt: skip
_LEAVES = (
    *_CONVS, *_IDENTITY, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, gnn.Shift, gnn.ScaleLevels,
    gnn.LevelEmbedding, gnn.AppendOnes, gnn.ConcatELU, gnn.GatedActivation, gnn.ConditionBias,
    gnn.RowLSTM, gnn.DiagonalBiLSTM,
)  # fmt: skip


_CALLS: dict[str, Callable[[fx.GraphModule, Any], Callable[..., Any]]] = {
    "call_module": lambda graph, target: graph.get_submodule(str(target)),
    "call_function": lambda graph, target: target,
    "call_method": lambda graph, target: lambda x, *a, **k: getattr(x, target)(*a, **k),
}


class LoweringError(NotImplementedError):
    """A network has no pixel program; names the part that stands in the way."""


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


@dataclass
class _Tap:
    row: int
    column: int
    weight: Tensor  # (O, I), zeros where masked
    live: Tensor  # bool (O, I)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_modules=(ops,))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Our containers are traced through; of torch's, only what is computed by parts that are known.
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


def trace(network: nn.Module, has_context: bool) -> fx.GraphModule:
    """``network(x)`` or ``network(x, context)`` as a graph of the modules that this file knows.

    Raises:
        LoweringError: its Python code depends on values, or takes other arguments.
    """
    try:
        graph = _Tracer().trace(network, None if has_context else {"context": None})
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        if not has_context and "concrete_args" in str(error):
            graph = _Tracer().trace(network)
        else:
            raise LoweringError(f"{type(network).__name__}: its forward cannot be traced: {error}") from error
    return fx.GraphModule(network, graph)


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
    values: dict[fx.Node, Any] = field(default_factory=dict)
    buffers: list[Buffer] = field(default_factory=list)
    begin: list[Step] = field(default_factory=list)
    pixel: list[list[Step]] = field(default_factory=list)
    after: list[Step] = field(default_factory=list)
    end: list[Step] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    size: int = 0
    statics: list[fx.Node] = field(default_factory=list)
    where: str = ""

    # ---- layout ----

    def error(self, text: str) -> LoweringError:
        return LoweringError(f"{self.where}: {text}")

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
            raise self.error("reads rows below its own, so it is not causal")
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
            raise self.error("sees the colour that is still to be drawn")
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
                        f"lets colour {colour} see colour {later} of its own pixel; give it data_channels={self.colours}"
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
            made = torch.zeros(room, *values.shape[1:])
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

    def shift(self, x: Value, down: int, right: int) -> Value:
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

    def gate(self, x: Value, kind: str, blocks: int) -> Value:
        """f(first half) * sigmoid(second half), the halves inside each of ``blocks`` contiguous groups of channels."""
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
        for c in range(colours + ones):
            factors = torch.tensor([scale, offset] if c < colours else [0.0, 1.0])
            step = Step("input", out=y.buffer, out_offset=c, count=1, weight=self.constant(factors), arg0=min(c, colours - 1))
            if self.passes > 1 and c < colours:
                self.pixel[c].append(step)  # moved behind the drawing of colour c when the head is known
            else:
                self.after.append(step)
        return y

    def embedded(self, module: gnn.LevelEmbedding) -> Value:
        if self.shape[0] != 1:
            raise self.error(f"embeds {self.shape[0]} colours, expected one")
        if module.weight.shape[0] < self.levels:
            raise self.error(f"has {module.weight.shape[0]} levels, the image has {self.levels}")
        features = module.weight.shape[1]
        y = self.new("Q", features, 1)
        table = torch.zeros(module.weight.shape[0], padded(features))
        table[:, torch.tensor(y.place)] = module.weight.detach().float().cpu()
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
    weight = torch.where(live, weight, torch.zeros(()))
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


def _convolution(low: _Lowering, module: Any, x: Value) -> Value:
    bias = None if module.bias is None else module.bias.detach().float().cpu()
    if isinstance(module, (gnn.MaskedConv1d, gnn.MaskedConv2d, gnn.MaskedConv3d)):
        weight, live = _dense(module, module.mask)
        taps = _taps(weight, live, module.center, module.dilation, low.period)
        return low.convolve(x, taps, module.out_channels, bias, relu=module.activation == "relu")
    if isinstance(module, (gnn.DownShiftedConvTranspose2d, gnn.DownRightShiftedConvTranspose2d)):
        edge = (module.kernel_size[1] - 1) // 2 if isinstance(module, gnn.DownShiftedConvTranspose2d) else 0
        weight = module.weight.detach().float().cpu()  # (I, O, kh, kw)
        step = module.stride[0]
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
        return low.convolve(x, [], module.out_channels, bias, up=step, phases=phases)
    weight, live = _dense(module, None)
    if isinstance(module, (gnn.DownShiftedConv2d, gnn.DownRightShiftedConv2d)):
        rows, columns = module.kernel_size
        center = (rows - 1, columns // 2 if isinstance(module, gnn.DownShiftedConv2d) else columns - 1)
        taps = _taps(weight, live, center, (1, 1))
        if module.stride[0] != module.stride[1]:
            raise low.error(f"has stride={module.stride}, expected one number")
        return low.convolve(x, taps, module.out_channels, bias, stride=module.stride[0])
    if set(module.kernel_size) != {1} or set(module.stride) != {1} or set(module.padding) - {0}:
        raise low.error(
            f"is {module}, which sees the future; use genfast.nn.MaskedConv{len(module.kernel_size)}d (only 1 x 1 "
            "convolutions need no mask)"
        )
    dims = len(module.kernel_size)
    return low.convolve(x, _taps(weight, live, (0,) * dims, (1,) * dims), module.out_channels, bias)


def _batch_norm(low: _Lowering, module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> tuple[list[_Tap], int, Tensor]:
    """As it is in evaluation mode, a diagonal 1 x 1 convolution."""
    if module.running_mean is None or module.running_var is None:
        raise low.error("has no running statistics, so an image depends on the others of its batch")
    scale = (module.running_var.detach() + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight.detach()
    bias = -module.running_mean * scale + (0 if module.bias is None else module.bias.detach())
    diagonal = torch.diag(scale.float().cpu())
    return [_Tap(0, 0, diagonal, diagonal != 0)], module.num_features, bias.float().cpu()


def _lower_module(low: _Lowering, module: nn.Module, args: list[Any]) -> Any:
    x = args[0]
    if isinstance(module, _IDENTITY):
        return x
    if isinstance(module, gnn.ScaleLevels):
        return low.entered(2 / (module.levels - 1), -1.0)
    if isinstance(module, gnn.LevelEmbedding):
        return low.embedded(module)
    x = low.entered(1.0, 0.0) if x.levels else x
    if isinstance(module, (*_CONVS, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _convolution(low, module, x)
    if isinstance(module, gnn.Shift) and low.period == 0:
        return low.shift(x, module.down, module.right)
    if isinstance(module, gnn.ConcatELU):
        return low.concat_elu(x)
    if isinstance(module, gnn.GatedActivation):
        bias = args[1] if len(args) > 1 else None
        return low.gate(x if bias is None else low.pointwise("add", x, bias), "gate", module.groups)
    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        return low.convolve(x, *_batch_norm(low, module))
    if type(module) in _UNARY:
        if isinstance(module, nn.ELU) and module.alpha != 1:
            raise low.error(f"is {module}, expected alpha=1")
        return low.pointwise(_UNARY[type(module)], x)
    if isinstance(module, gnn.AppendOnes):
        raise low.error("takes the scaled image, straight from ScaleLevels")
    raise low.error(f"a {type(module).__module__}.{type(module).__qualname__} has no pixel program")


def _lower_function(low: _Lowering, target: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if target in (torch.cat, torch.concat):
        axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        if axis != 1:
            raise low.error(f"joins along axis {axis}, expected the channels (1)")
        return low.concatenate(args[0])
    if target in (operator.add, torch.add, operator.iadd, "add", "add_") and all(isinstance(a, Value) for a in args[:2]):
        return low.pointwise("add", args[0], args[1])
    if target in (operator.mul, torch.mul) and isinstance(args[0], (int, float)):
        args = args[::-1]
    if target in (operator.mul, torch.mul, "mul", operator.truediv) and isinstance(args[1], (int, float)):
        factor = 1 / args[1] if target is operator.truediv else args[1]
        return low.pointwise("scale", args[0], weight=low.constant(torch.tensor([float(factor)])))
    if target in _UNARY and not (target is F.elu and (kwargs.get("alpha", 1) != 1 or len(args) > 1)):
        return low.pointwise(_UNARY[target], args[0])
    if target is F.glu:
        if (kwargs.get("dim", args[1] if len(args) > 1 else -1)) != 1:
            raise low.error("takes glu along another axis than the channels (1)")
        return low.gate(args[0], "linear_gate", 1)
    if target is ops.gated_activation:
        x = args[0]
        bias = args[1] if len(args) > 1 else kwargs.get("bias")
        return low.gate(x if bias is None else low.pointwise("add", x, bias), "gate", kwargs.get("groups", 1))
    raise low.error(f"calls {getattr(target, '__name__', target)}, which has no pixel program")


def lower(
    network: nn.Module, shape: tuple[int, int, int], *, levels: int, head: str = "categorical", has_context: bool = False,
    frames: int = 1, panel: int | None = None,
) -> tuple[Program, Callable[[Tensor | None], list[Tensor]]]:  # fmt: skip
    """The pixel program of ``network``, and a function from the context to the maps that it reads.

    Args:
        network: integer images (N, C, H, W) to logits (N, levels * C, H, W), level by level, or to mixture parameters.
            Sequences (N, C, L) are images of L rows of one pixel.
        shape: (C, H, W); of a video (C, frames * H, W).
        frames: of a video (N, C, frames, H, W).
        head: "categorical" or "logistic_mixture".
        panel: how many columns of a product's weights lie together; None for what the CPU's engine takes, 0 for all.

    Raises:
        LoweringError: naming the module that has no pixel program.
    """
    graph = trace(network, has_context)
    convs = [m for m in graph.modules() if isinstance(m, (gnn.MaskedConv1d, gnn.MaskedConv2d, gnn.MaskedConv3d))]
    rows = shape[1] // frames
    volumes = [m for m in convs if isinstance(m, gnn.MaskedConv3d)]
    gap = max((max(m.center[1], m.kernel_size[1] - 1 - m.center[1]) * m.dilation[1] for m in volumes), default=0)
    low = _Lowering(graph, shape, levels, head, panel)
    low.passes = max((m.data_channels for m in convs), default=1)
    low.colours = max(low.passes, shape[0] if head == "categorical" else 1)
    if low.passes not in (1, shape[0]):
        raise LoweringError(f"data_channels={low.passes}, but the image has {shape[0]} colours")
    low.period = rows + gap if volumes else 0
    orders = {m.group_order for m in convs if m.data_channels > 1}
    if len(orders) > 1:
        raise LoweringError("its layers have different group_orders")
    low.order = next(iter(orders), "interleaved")
    if head == "logistic_mixture" and low.passes > 1:
        raise LoweringError("a mixture draws all colours at once; its layers must have data_channels=1")
    low.pixel = [[] for _ in range(low.passes)]

    dynamic: set[fx.Node] = set()
    nodes = list(graph.graph.nodes)
    image = next(n for n in nodes if n.op == "placeholder")
    result: Any = None
    for node in nodes:
        low.where = str(node.target) if node.op == "call_module" else node.name
        if node is image:
            dynamic.add(node)
            low.values[node] = Value("image", "Q", shape[0], -1, 1, [], levels=True)
            continue
        if node.op == "output":
            result = node.args[0]
            continue
        if not any(n in dynamic for n in node.all_input_nodes):
            continue  # of the condition: PyTorch computes it
        dynamic.add(node)

        def operand(n: Any, into: fx.Node = node) -> Any:
            if not isinstance(n, fx.Node):
                return n
            if n in dynamic:
                value = low.values[n]
                if value.levels and into.op != "call_module":
                    return low.entered(1.0, 0.0)
                return value
            if n not in low.values:
                low.values[n] = n
            return n

        args = list(fx.node.map_arg(node.args, operand))
        kwargs = dict(fx.node.map_arg(node.kwargs, operand))
        args = [_materialise(low, a) if isinstance(a, fx.Node) else a for a in args]
        kwargs = {k: _materialise(low, a) if isinstance(a, fx.Node) else a for k, a in kwargs.items()}
        if node.op == "call_module":
            module = graph.get_submodule(str(node.target))
            if isinstance(module, gnn.AppendOnes) and len(node.all_input_nodes) == 1:
                before = node.all_input_nodes[0]
                scaled = graph.get_submodule(str(before.target)) if before.op == "call_module" else None
                if isinstance(scaled, gnn.ScaleLevels):
                    low.values[node] = low.entered(2 / (scaled.levels - 1), -1.0, ones=1)
                    continue
            low.where = f"{low.where} ({type(module).__name__})" if not isinstance(module, _LEAVES) else low.where
            low.values[node] = _lower_module(low, module, args)
        elif node.op in ("call_function", "call_method"):
            low.values[node] = _lower_function(low, node.target, args, kwargs)
        else:
            raise low.error(f"a {node.op} has no pixel program")
    if not isinstance(result, fx.Node) or result not in dynamic:
        raise LoweringError("the network's output is not one tensor that depends on the image")
    _draw(low, low.values[result], head)
    return _finish(low, graph, frames, gap)


def _materialise(low: _Lowering, a: fx.Node) -> Any:
    """A value of the condition becomes a feature map where it meets the image."""
    module = low.graph.get_submodule(str(a.target)) if a.op == "call_module" else None
    if not isinstance(module, gnn.ConditionBias):
        raise low.error(f"takes {a.name}, which is no genfast.nn.ConditionBias of the context")
    if low.values.get(a) is a:
        low.values[a] = low.static(a, module.out_channels)
    return low.values[a]


def _draw(low: _Lowering, y: Value, head: str) -> None:
    """The steps that draw, and what then enters the network."""
    colours = low.shape[0]
    low.where = "head"
    if y.known in "QF":
        raise LoweringError(f"the output {y.name} depends on the pixel that it predicts")
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
            inputs = [s for s in steps if s.kind == "input"]
            low.pixel[c] = [*(s for s in steps if s.kind != "input"), step, *inputs]
        else:
            low.pixel[0].append(step)


def _finish(
    low: _Lowering, graph: fx.GraphModule, frames: int, gap: int
) -> tuple[Program, Callable[[Tensor | None], list[Tensor]]]:
    channels, height, width = low.shape
    for b in low.buffers:
        if height % b.scale or width % b.scale:
            raise LoweringError(f"a {height} x {width} image does not divide by the {b.scale} of {b.name}")
    mixture = low.head == "logistic_mixture"
    record = next(s.count for s in low.pixel[0] if s.kind == "mixture") if mixture else low.levels * channels
    program = Program(
        channels, height, width, low.levels, 1 + channels if mixture else channels, record, low.buffers, low.begin,
        [*itertools.chain(*low.pixel), *low.after], low.end,
        torch.cat([*low.weights, torch.zeros(64)]), [n.name for n in low.statics], frames, gap,
    )  # fmt: skip
    wanted = [(n, torch.tensor(low.values[n].place), low.buffers[low.values[n].buffer].channels) for n in low.statics]
    image = next(n for n in graph.graph.nodes if n.op == "placeholder")
    places: dict[torch.device, list[Tensor]] = {}  # moved once: a copy from the host cannot be captured

    @torch.no_grad()
    def statics(context: Tensor | None) -> list[Tensor]:
        """The condition's maps (N, rows, columns, channels as they lie), by running its part of the graph."""
        if not wanted:
            return []
        known: dict[fx.Node, Any] = {}
        for node in graph.graph.nodes:
            if node.op == "placeholder" and node is not image:
                known[node] = context
            elif node.op == "get_attr":
                known[node] = operator.attrgetter(str(node.target))(graph)
            elif node is not image and node.op in _CALLS and all(n in known for n in node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = _CALLS[node.op](graph, node.target)(*args, **kwargs)
        found = []
        device = known[wanted[0][0]].device
        if device not in places:
            places[device] = [place.to(device) for _, place, _ in wanted]
        for (node, _, room), place in zip(wanted, places[device]):
            value = known[node].float().movedim(1, -1)
            if value.dim() == 5:  # a video: frame below frame
                value = value.flatten(1, 2)
            if value.dim() < 4:  # one vector for all positions, or a sequence
                value = value[:, None, None] if value.dim() == 2 else value[:, :, None]
            if value.shape[1:3] not in ((1, 1), (height, width)):
                size = tuple(value.shape[1:3])
                raise ValueError(f"context: a map of {size} positions, expected ({height}, {width}) as the image, or a vector")
            made = value.new_zeros(*value.shape[:-1], room)
            made[..., place] = value
            found.append(made.contiguous())
        return found

    return program, statics
