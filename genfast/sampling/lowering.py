"""Lowers a causal PyTorch network to a pixel program.

The network is traced with torch.fx; every call in its graph becomes steps over feature maps. What does not depend on
the image (conditioning) is computed by PyTorch once, by calling its modules. The rest is ordered by when it is known
(see programs/pixel_program.py), which is also a proof that it is causal: a value that would need the future, or the
colour that it predicts, is refused by name.

A module is read instead of called only where its class is one of those below, or a subclass that changes nothing a call
could use; others are traced through. Hooks are refused, but for those that compute a weight. Calls are bound to their
signatures, and an argument that no rule reads must have its default. A value stands for a tensor: what writes into it
in place gives all of the tensor's names the new value.

With C colours drawn one after the other, channels lie colour by colour, and the steps of a pixel run once for each
colour, on that colour's channels only, so that all passes together cost one forward pass.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import nn as gnn
from .._calls import weights_of_calls
from ..programs.errors import LoweringError
from ..programs.pixel_program import Program, Step, padded
from . import module_rules  # noqa: F401  registers the rules of modules, and of functions
from .inputs import Conditions, Unknown
from .rules import lower_call
from .steps import Lowering, NotCausalError, Value
from .tracing import trace, where

_CALLS: dict[str, Callable[[fx.GraphModule, Any], Callable[..., Any]]] = {
    "call_module": lambda graph, target: graph.get_submodule(str(target)),
    "call_function": lambda graph, target: target,
    "call_method": lambda graph, target: lambda x, *a, **k: getattr(x, target)(*a, **k),
}
_TAKE_CONSTANTS = frozenset({F.conv1d, F.conv2d, F.conv3d})


@dataclass
class Lowered:
    """A network's program, and what it was made from."""

    program: Program
    statics: Callable[[Conditions], list[Tensor]]  # from the conditions to the maps that the program reads
    graph: fx.GraphModule
    recorded: dict[fx.Node, tuple[int, Value]] | None  # where in a pixel's record each value is
    blocked: bool  # the network's output lies colour by colour, not level by level


def lower(
    network: nn.Module,
    shape: tuple[int, int, int],
    *,
    levels: int,
    head: str = "categorical",
    conditions: Conditions | None = None,
    entry: tuple[float, float] | Tensor | None = None,
    group_order: str | None = None,
    frames: int = 1,
    panel: int | None = None,
    dims: int = 2,
    record_all: bool = False,
) -> Lowered:
    """The pixel program of ``network``, and a function from the conditions to the maps that it reads.

    Args:
        network: in evaluation mode; integer images (N, C, H, W) to logits (N, levels * C, H, W), level by level, or to
            mixture parameters. Sequences (N, C, L) are images of L rows of one pixel.
        shape: (C, H, W); of a video (C, frames * H, W).
        frames: of a video (N, C, frames, H, W).
        head: "categorical" or "logistic_mixture".
        conditions: what the network is called with besides the image; tensors of one row, or :class:`Unknown`.
        entry: how levels become the floats that the network takes: a factor and what is added, or a table (levels, C)
            or, of one colour, (levels, features); None where it takes whole numbers.
        group_order: how the colours lie where no layer says so.
        panel: how many columns of a product's weights lie together; None for what the CPU's engine takes, 0 for all.
        dims: spatial axes of what the network takes: 1 for sequences, 3 for videos.
        record_all: the program also records every value inside the network, to find where it goes wrong; it cannot draw
            then.

    Raises:
        LoweringError: naming the module that has no pixel program.
    """
    with weights_of_calls(network), torch.no_grad():
        given = conditions or Conditions()
        return _lower(network, shape, levels, head, given, entry, group_order, frames, panel, dims, record_all)


def _lower(
    network: nn.Module,
    shape: tuple[int, int, int],
    levels: int,
    head: str,
    conditions: Conditions,
    entry: tuple[float, float] | Tensor | None,
    group_order: str | None,
    frames: int,
    panel: int | None,
    dims: int,
    record_all: bool,
) -> Lowered:
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
    low = Lowering(
        graph, shape, levels, head, panel, dims=dims, recorded={} if record_all else None, conditions=conditions
    )
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


def _image(low: Lowering, entry: tuple[float, float] | Tensor | None) -> Value:
    """What the network is given: whole numbers, or floats made of them."""
    if entry is None:
        return Value("image", "Q", low.shape[0], -1, 1, [], levels=True)
    return low.looked_up(entry) if isinstance(entry, Tensor) else low.entered(*entry)


def _lower_node(low: Lowering, node: fx.Node, dynamic: set[fx.Node]) -> Any:
    if node.op not in ("call_module", "call_function", "call_method"):
        raise low.error(f"a {node.op} has no pixel program")

    def operand(n: fx.Node) -> Any:
        return low.values[n] if n in dynamic else _materialise(low, n)

    if node.target in _TAKE_CONSTANTS:
        image_of = node.args[0] if node.args else node.kwargs.get("input")

        def operand_or_constant(n: fx.Node) -> Any:
            return operand(n) if n is image_of else _constant(low, n, dynamic)

        args, kwargs = fx.node.map_arg((list(node.args), dict(node.kwargs)), operand_or_constant)
        return lower_call(low, node, args, kwargs, dynamic)
    args, kwargs = fx.node.map_arg((list(node.args), dict(node.kwargs)), operand)
    return lower_call(low, node, args, kwargs, dynamic)


def _constant(low: Lowering, node: fx.Node, dynamic: set[fx.Node]) -> Any:
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


def _materialise(low: Lowering, a: fx.Node) -> Any:
    """A value of the condition becomes a feature map where it meets the image."""
    if a not in low.values:
        module = low.graph.get_submodule(str(a.target)) if a.op == "call_module" else None
        channels = module.out_channels if isinstance(module, gnn.ConditionBias) else _static_channels(low, a)
        low.values[a] = low.static(a, channels)
    return low.values[a]


def _static_channels(low: Lowering, a: fx.Node) -> int:
    """How many channels a value of the condition has, by computing it for one image."""
    if any(isinstance(v, Unknown) for _, v in low.conditions.items()):
        raise low.error(
            f"takes {a.name}, which is no genfast.nn.ConditionBias of the context; prepare it with a context"
        )
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


def _draw(low: Lowering, y: Value, head: str) -> None:
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


def _finish(low: Lowering, graph: fx.GraphModule, frames: int, gap: int) -> Lowered:
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
        channels,
        height,
        width,
        low.levels,
        1 + channels if mixture else channels,
        record,
        low.buffers,
        low.begin,
        [*itertools.chain(*low.pixel), *low.after],
        low.end,
        torch.cat([*low.weights, torch.zeros(64, dtype=torch.float32)]),
        [n.name for n in low.statics],
        frames,
        gap,
    )
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
                raise ValueError(
                    f"context: a map of {size} positions, expected ({height}, {width}) as the image, or a vector"
                )
            made = value.new_zeros(*value.shape[:-1], room)
            made[..., place] = value
            found.append(made.contiguous())
        return found

    return Lowered(program, statics, graph, low.recorded, low.order == "blocked" and low.head == "categorical")
