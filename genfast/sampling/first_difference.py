"""Where a pixel program first differs from the network that it was made of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..programs.self_check import TOLERANCE, largest
from .lowering import Lowered
from .tracing import where


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps a copy of what each node gave, before anything could write into it."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.outputs: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        out = super().run_node(n)
        if isinstance(out, Tensor):
            self.outputs[n] = out.detach().clone()
        return out


def first_difference(
    lowered: Lowered, record: Tensor, call: Callable[[], Any], inputs: tuple[Any, ...], error: float
) -> str:
    """Where the program first differs from the network.

    Args:
        lowered: with all its values recorded.
        record: (H, W, numbers) what it recorded for one image; a sequence has W = 1, a video's frames lie one below
            another.
        call: runs the network itself, of which the modules' outputs are watched.
        inputs: of the graph.
        error: of the output, relative to its largest value: what begins it is not much smaller.
    """
    graph, recorded = lowered.graph, lowered.recorded or {}
    recorder = _Recorder(graph)
    with contextlib.suppress(Exception):  # a graph that does not run is compared as far as it came
        recorder.run(*inputs)
    outputs: dict[nn.Module, list[Tensor | None]] = {}

    def keep(module: nn.Module, _: Any, out: Any) -> None:
        outputs.setdefault(module, []).append(out.detach().clone() if isinstance(out, Tensor) else None)

    modules = {graph.get_submodule(str(n.target)) for n in recorded if n.op == "call_module"}
    handles = [m.register_forward_hook(keep) for m in modules]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    for node in graph.graph.nodes:
        expected = recorder.outputs.get(node)
        if node.op == "call_module":
            given = outputs.get(graph.get_submodule(str(node.target)), [])
            expected = given.pop(0) if given else expected
        if node not in recorded or expected is None:
            continue
        at, value = recorded[node]
        height, width = (size // value.scale for size in record.shape[:2])
        found = record[:height, :width, at + torch.tensor(value.place, device=record.device)].movedim(-1, 0).double()
        expected = expected[0].double().to(found.device)
        if expected.numel() != found.numel():
            return where(graph, node)
        difference = found - expected.reshape(found.shape)
        if not largest(difference) <= min(max(error / 10, 2 * TOLERANCE), 128 * TOLERANCE) * largest(expected):
            return where(graph, node)
    return "its output"
