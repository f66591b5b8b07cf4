"""Masked linear layers of autoregressive networks, forward and backward, and a whole MADE."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients
from genfast.nn import plain

Layers = Sequence[plain.MaskedLinear]
Run = Callable[[Layers, Tensor], Tensor]


def _sorted(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device=order.device))


class _Mask:
    """A layer's mask as zuko, nflows and normflows keep it: a tensor that multiplies the weight at each call."""

    def __init__(self, layers: Layers) -> None:
        self.masks = [layer.mask.to(layer.weight.dtype) for layer in layers]

    def __call__(self, layers: Layers, x: Tensor) -> Tensor:
        last = len(layers) - 1
        for i, (layer, mask) in enumerate(zip(layers, self.masks)):
            x = F.linear(x, mask * layer.weight, layer.bias)
            x = F.relu(x) if i < last or not last else x
        return x


class _Blocks:
    """The best arrangement of library calls: sorted outputs in blocks, each a product with the inputs that it can
    reach."""

    def __init__(self, layers: Layers, blocks: int = 6) -> None:
        self.plans = []
        for layer in layers:
            cuts = [len(layer.rows) * b // blocks for b in range(blocks + 1)]
            pieces = [(a, b, int(layer.counts[b - 1])) for a, b in zip(cuts, cuts[1:])]
            sorted_mask = layer.mask[layer.rows][:, layer.columns].to(layer.weight.dtype)
            # Units that are sorted already are not gathered.
            rows = None if _sorted(layer.rows) else layer.rows
            columns = None if _sorted(layer.columns) else layer.columns
            self.plans.append((pieces, [sorted_mask[a:b, :k] for a, b, k in pieces], rows, columns))

    def __call__(self, layers: Layers, x: Tensor) -> Tensor:
        last = len(layers) - 1
        for i, (layer, (pieces, masks, rows, columns)) in enumerate(zip(layers, self.plans)):
            weight = layer.weight if rows is None else layer.weight[rows]
            bias = layer.bias if rows is None else layer.bias[rows]
            if columns is not None:
                weight, x = weight[:, columns], x[:, columns]
            parts = [F.linear(x[:, :k], m * weight[a:b, :k], bias[a:b]) for (a, b, k), m in zip(pieces, masks)]
            x = torch.cat(parts, 1)
            x = x if rows is None else x[:, rows.argsort()]
            x = F.relu(x) if i < last or not last else x
        return x


def _ours(layers: Layers, x: Tensor) -> Tensor:
    last = len(layers) - 1
    for i, layer in enumerate(layers):
        x = layer(x, "relu" if i < last or not last else "none")
    return x


def _case(
    name: str,
    n: int,
    make: Callable[[], Layers],
    backward: bool,
    quick: bool,
    *,
    dtype: str = "float32",
    priority: int = 1,
) -> Case:
    kind = _ceilings.DTYPES[dtype]

    def work(arrange: Callable[[Layers], Run], compiled: bool = False) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        layers = [layer.to(device, kind) for layer in nn.ModuleList(make())]
        run = arrange(layers)
        x = torch.randn(n, layers[0].in_features, device=device).to(kind).requires_grad_(backward)
        grad = torch.randn(n, layers[-1].out_features, device=device).to(kind)
        wanted = [x, *(p for layer in layers for p in (layer.weight, layer.bias))]
        function = torch.compile(run, dynamic=False) if compiled else run

        def forward() -> Tensor:
            with torch.no_grad():
                return function(layers, x)

        return (lambda: gradients((function(layers, x),), wanted, (grad,))) if backward else forward

    live = sum(int(layer.counts.sum()) for layer in make())
    providers = {
        "reference": lambda: work(_Mask),
        "compile": lambda: work(_Mask, compiled=True),
        "trick": lambda: work(_Blocks),
        "genfast": lambda: work(lambda _: _ours),
    }
    passes = 3 if backward else 1
    title = (
        f"masked_linear {name}, batch {n}{'' if backward else ', forward'}{'' if dtype == 'float32' else f', {dtype}'}"
    )
    return Case(title, providers, flops=2 * passes * n * live, quick=quick, dtype=dtype, priority=priority)


def _layer(inputs: int, outputs: int) -> Callable[[], Layers]:
    """Between two sorted hidden layers of a network over 64 features."""

    def make() -> Layers:
        degrees = [torch.arange(size) * 63 // size + 1 for size in (inputs, outputs)]
        return [genfast.nn.MaskedLinear(*degrees)]

    return make


def _shuffled() -> Layers:
    """As zuko and nflows number hidden units, 1, 2, ..., 63, 1, 2, ..."""
    degrees = torch.arange(512) % 63 + 1
    return [genfast.nn.MaskedLinear(degrees, degrees)]


def _made(hidden: tuple[int, ...], outputs: int) -> Callable[[], Layers]:
    return lambda: list(genfast.nn.MADENetwork(64, hidden, outputs=outputs).linears)  # type: ignore[arg-type]


CASES = [
    _case("512-512", 256, _layer(512, 512), False, False),
    _case("512-512", 256, _layer(512, 512), True, False),
    _case("512-512 degrees 1, 2, ..., 1, 2, ...", 256, lambda: _shuffled(), True, False),
    _case("MADE 64-512-512-128", 256, _made((512, 512), 2), False, False),
    _case("MADE 64-512-512-128", 256, _made((512, 512), 2), True, True),
    _case("MADE 64-512-512-128", 1, _made((512, 512), 2), False, False),
    _case("MADE 64-64-64-1472", 256, _made((64, 64), 23), True, False),
    _case("64-64", 256, _layer(64, 64), False, False),
]

if _ceilings.DEVICE == "cuda":
    CASES += [
        _case(name, 4096, make, True, False, dtype=dtype, priority=0)
        for name, make in (("2048-2048", _layer(2048, 2048)), ("MADE 64-512-512-128", _made((512, 512), 2)))
        for dtype in ("bfloat16", "tf32")
    ]
