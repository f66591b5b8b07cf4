"""The contextual loss of two feature maps, with its gradients, beside the one product that it contains."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work

Loss = Callable[[Tensor, Tensor], Tensor]
BANDWIDTH = 0.5


def rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Centred and of length one, in float32; rounded to the features' type, in which they are multiplied."""
    mean = y.float().mean((0, 2, 3), keepdim=True)
    first, second = (F.normalize(t.float() - mean, dim=1).flatten(2).to(t.dtype) for t in (x, y))
    return first, second


def eager(x: Tensor, y: Tensor) -> Tensor:
    """The common port's code, S-aiueo32's: a dozen arrays of N x M."""
    first, second = rows(x, y)
    distance = 1 - torch.bmm(first.mT, second).float()
    relative = distance / (distance.min(2, keepdim=True)[0] + 1e-5)
    weight = torch.exp((1 - relative) / BANDWIDTH)
    similarity = weight / weight.sum(2, keepdim=True)
    return -torch.log(similarity.max(1)[0].mean(1) + 1e-5).mean()


def panel(first: Tensor, second: Tensor) -> Tensor:
    distance = 1 - (first @ second).float()
    r = distance.min(1, keepdim=True)[0] + 1e-5
    return torch.softmax(distance * (-1 / (BANDWIDTH * r)), 1).max(0)[0]


def chunked(x: Tensor, y: Tensor) -> Tensor:
    """A loop over panels of rows, each made again in the backward: two products, and no array of N x M."""
    first, second = rows(x, y)
    losses = []
    for a, b in zip(first.mT, second):
        found = [checkpoint(panel, part, b, use_reentrant=False) for part in a.split(256)]
        losses.append(torch.stack(found).max(0)[0].mean())
    return -torch.log(torch.stack(losses) + 1e-5).mean()


def _case(
    shape: tuple[int, int, int, int], wanted: str, quick: bool, *, dtype: str = "float32", priority: int = 1
) -> Case:
    kind = _ceilings.DTYPES[dtype]

    def maps() -> list[Tensor]:
        torch.manual_seed(0)
        return [torch.randn(shape, device=_ceilings.DEVICE).to(kind) for _ in range(2)]

    def work(loss: Loss) -> Work:
        x, y = maps()
        inputs = {"forward": (), "x": (x,), "both": (x, y)}[wanted]
        for t in inputs:
            t.requires_grad_()

        def run() -> list[Tensor | None]:
            value = loss(x, y)
            found = torch.autograd.grad(value, inputs) if inputs else ()
            # A product that the library rounds to bfloat16 has ties, which decide which rows have a gradient.
            return [value, *((None,) * len(found) if kind is torch.bfloat16 else found)]

        return run

    def product() -> Work:
        first, second = rows(*maps())
        return lambda: torch.bmm(first.mT, second)

    providers: dict[str, Callable[[], Work]] = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(chunked),
        "floor": product,
        "genfast": lambda: work(genfast.nn.ContextualSimilarityLoss("s-aiueo32", bandwidth=BANDWIDTH)),
    }
    b, c, h, w = shape
    flops = 2 * b * (h * w) ** 2 * c * {"forward": 1, "x": 2, "both": 3}[wanted]
    title = {"forward": "forward", "x": "forward and backward to x", "both": "forward and backward to both"}[wanted]
    # Among so many columns a few have two rows within rounding of their maximum: which one has the gradient then
    # differs.
    tolerance = 2e-2 if h * w > 4096 else 1e-3
    name = f"contextual_similarity {shape} {title}{'' if dtype == 'float32' else f' {dtype}'}"
    notes = {"genfast": "in bfloat16 the value is compared, and not the gradient"} if kind is torch.bfloat16 else {}
    return Case(
        name,
        providers,
        flops=flops,
        quick=quick,
        tolerance=None if kind is torch.bfloat16 else tolerance,
        notes=notes,
        dtype=dtype,
        priority=priority,
    )


CASES = [
    _case((1, 256, 32, 32), "x", True),
    _case((1, 256, 64, 64), "forward", False),
    _case((1, 256, 64, 64), "x", False),
    _case((1, 256, 64, 64), "both", False),
    _case((1, 256, 128, 128), "x", False),
]

if _ceilings.DEVICE == "cuda":  # 16384, 65536 and 4096 positions
    CASES += [
        _case((1, 512, size, size), wanted, False, dtype=dtype, priority=0)
        for size in (128, 256, 64)
        for dtype in ("bfloat16", "float32")
        for wanted in ("forward", "x")
    ]
