"""Sampling from a masked autoregressive flow, and the gradient through its samples: D passes against one in degree
order."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, captured
from genfast.sampling import DegreeProgram, Layer

CLAMP = math.log(1e-3)
Flow = list[list[Layer]]


def _flow(inputs: int, transforms: int, hidden: tuple[int, ...], device: str | None = None) -> Flow:
    """MADEs as zuko's MAF makes them: ascending and descending orders in turn, two parameters an input."""
    torch.manual_seed(0)
    device = _ceilings.DEVICE if device is None else device
    flow = []
    for t in range(transforms):
        order = torch.arange(inputs) if t % 2 == 0 else torch.arange(inputs).flip(0)
        degrees = [order, *(torch.arange(h) % max(1, inputs - 1) for h in hidden), order.repeat_interleave(2) - 1]
        layers = []
        for i, (before, after) in enumerate(zip(degrees, degrees[1:])):
            linear = nn.Linear(len(before), len(after), device=device)
            mask = (after[:, None] >= before).to(device)
            layers.append(Layer(linear.weight, linear.bias, mask, after="relu" if i < len(hidden) else "none"))
        flow.append(layers)
    return flow


def _network(layers: list[Layer], x: Tensor, weights: list[Tensor] | None = None) -> Tensor:
    for i, layer in enumerate(layers):
        assert layer.mask is not None
        x = F.linear(x, layer.weight * layer.mask if weights is None else weights[i], layer.bias)
        x = x.relu() if layer.after == "relu" else x
    params: Tensor = x.unflatten(1, (-1, 2))
    return params


def _solve(z: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    t, a = params.unbind(2)
    log_s = a / (1 + (a / CLAMP).abs())
    return (z - t) / log_s.exp(), -log_s.sum(1)


def eager(flow: Flow, z: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes: D passes of the network a transform, the mask applied in each."""
    logdet = z.new_zeros(len(z))
    for layers in reversed(flow):
        x, slope = torch.zeros_like(z), logdet
        for _ in range(z.shape[1]):
            x, slope = _solve(z, _network(layers, x))
        z, logdet = x, logdet + slope
    return z, logdet


def trick(flow: Flow, z: Tensor) -> tuple[Tensor, Tensor]:
    """The masks applied once."""
    logdet = z.new_zeros(len(z))
    for layers in reversed(flow):
        weights = [layer.weight * layer.mask for layer in layers if layer.mask is not None]
        x, slope = torch.zeros_like(z), logdet
        for _ in range(z.shape[1]):
            x, slope = _solve(z, _network(layers, x, weights))
        z, logdet = x, logdet + slope
    return z, logdet


def density(flow: Flow, x: Tensor) -> None:
    """The other direction, one pass a transform: what a log_prob takes."""
    for layers in flow:
        t, a = _network(layers, x).unbind(2)
        x = x * (a / (1 + (a / CLAMP).abs())).exp() + t


def _ours(flow: Flow) -> Callable[[Flow, Tensor], tuple[Tensor, Tensor]]:
    programs = [DegreeProgram.build(layers) for layers in flow]

    def run(_: Flow, z: Tensor) -> tuple[Tensor, Tensor]:
        logdet = z.new_zeros(len(z))
        for program in reversed(programs):
            z, slope = genfast.ops.autoregressive_inverse(z, program, "affine:softclamp")
            logdet = logdet + slope
        return z, logdet

    return run


def _peer(flow: Flow, z: Tensor, hidden: tuple[int, ...]) -> Work:
    """zuko's MAF on the same masks and weights."""
    zuko: Any = importlib.import_module("zuko")
    theirs = zuko.flows.MAF(z.shape[1], transforms=len(flow), hidden_features=hidden).to(_ceilings.DEVICE)
    for transform, layers in zip(theirs.transform.transforms, flow):
        for module, layer in zip([m for m in transform.hyper if hasattr(m, "mask")], layers):
            module.weight, module.bias, module.mask = layer.weight, layer.bias, layer.mask

    def run() -> list[Tensor | None]:
        with torch.no_grad():
            return [theirs().transform.inv(z), None]

    return run


def _noise(n: int, inputs: int) -> Tensor:
    return torch.randn(n, inputs, generator=torch.Generator().manual_seed(1)).to(_ceilings.DEVICE)


def _sampling(inputs: int, transforms: int, hidden: tuple[int, ...], n: int, *, quick: bool, priority: int = 1) -> Case:
    gpu = _ceilings.DEVICE == "cuda"

    def work(function: Callable[[Flow, Tensor], tuple[Tensor, Tensor] | None] | None) -> Work:
        flow = _flow(inputs, transforms, hidden)
        chosen = _ours(flow) if function is None else function
        z = _noise(n, inputs)

        def run() -> list[Tensor] | None:
            with torch.no_grad():
                found = chosen(flow, z)
            return None if found is None else list(found)

        return run

    def graph() -> Work:
        run, found = work(trick), []
        replay = captured([lambda: found.append(run())])

        def replayed() -> Any:
            replay()
            return found[-1]  # where the capture's last call writes

        return replayed

    providers = {
        "reference": lambda: work(eager),
        "trick": lambda: work(trick),
        **({"graph": graph} if gpu else {}),
        "peer": lambda: _peer(_flow(inputs, transforms, hidden), _noise(n, inputs), hidden),
        "floor": lambda: work(density),
        "genfast": lambda: work(None),
    }
    if importlib.util.find_spec("zuko") is None:
        del providers["peer"]

    def flops() -> int:
        return (
            2
            * n
            * sum(DegreeProgram.build(layers).multiplications for layers in _flow(inputs, transforms, hidden, "cpu"))
        )

    size = "-".join(map(str, hidden))
    name = f"autoregressive_inverse sample maf {transforms} x {size}, {n} of {inputs}"
    notes = {"trick": "masks applied once", "floor": "a log_prob: one pass a transform", "peer": "zuko"}
    if gpu:
        notes["graph"] = "all D passes of a transform as one CUDA graph, the masks applied once"
    once = () if gpu else ("reference", "trick", "peer")
    return Case(name, providers, flops=flops, quick=quick, notes=notes, once=once, priority=priority)


def _training(inputs: int, hidden: tuple[int, ...], n: int, *, quick: bool) -> Case:
    """A reverse-KL gradient: through x and logdet to the weights."""

    def work(function: Callable[[Flow, Tensor], tuple[Tensor, Tensor]] | None) -> Work:
        flow = _flow(inputs, 1, hidden)
        chosen = _ours(flow) if function is None else function
        z = _noise(n, inputs)
        leaves = [t for layers in flow for layer in layers for t in (layer.weight, layer.bias) if t is not None]

        def run() -> list[Tensor]:
            x, logdet = chosen(flow, z)
            loss = (x.square().sum(1) / 2 - logdet).mean()
            return [loss, *torch.autograd.grad(loss, leaves)]

        return run

    providers = {"reference": lambda: work(eager), "trick": lambda: work(trick), "genfast": lambda: work(None)}

    def flops() -> int:
        return 4 * 2 * n * DegreeProgram.build(_flow(inputs, 1, hidden, "cpu")[0]).multiplications

    name = f"autoregressive_inverse gradient maf {'-'.join(map(str, hidden))}, {n} of {inputs}"
    return Case(
        name,
        providers,
        flops=flops,
        quick=quick,
        notes={"trick": "masks applied once"},
        once=() if _ceilings.DEVICE == "cuda" else ("reference", "trick"),
    )


CASES = [
    _sampling(16, 2, (128, 128), 64, quick=True),
    _sampling(64, 5, (512, 512), 256, quick=False),
    _sampling(64, 5, (512, 512), 1, quick=False),
    _training(64, (512, 512), 256, quick=False),
]

if _ceilings.DEVICE == "cuda":
    CASES += [_sampling(64, 5, (512, 512), n, quick=False, priority=0) for n in (64, 1024)]
    CASES[2] = _sampling(64, 5, (512, 512), 1, quick=False, priority=0)
