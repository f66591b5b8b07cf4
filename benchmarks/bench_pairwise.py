"""Sums over pairs of rows: MMD, kernel distance and nearest rows, beside the matrices that one writes and slices of
them.

No peer: KeOps streams such sums too, for few features, and compiles each with a compiler that it looks for at run time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients
from genfast.ops.pairwise import wae_scales

Pairs = Callable[[Tensor, Tensor], Tensor]
ROWS = 256  # of a slice


def _squared(x: Tensor, y: Tensor) -> Tensor:
    norms = x.square().sum(-1).unsqueeze(-1) + y.square().sum(-1).unsqueeze(-2)
    return (norms - 2 * x @ y.mT).clamp_min(0)


def _imq(x: Tensor, y: Tensor) -> Tensor:
    d, total = _squared(x, y), 0.0
    for s in wae_scales(x.shape[-1]):
        total = total + s / (s + d)
    assert isinstance(total, Tensor)
    return total


def _rbf(x: Tensor, y: Tensor) -> Tensor:
    return (_squared(x, y) * (-0.5 / x.shape[-1])).exp()


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def _unbiased(x: Tensor, y: Tensor, pairs: Pairs) -> Tensor:
    n, m = x.shape[-2], y.shape[-2]
    xx, yy, xy = pairs(x, x), pairs(y, y), pairs(x, y)
    own = [k.sum((-2, -1)) - k.diagonal(dim1=-2, dim2=-1).sum(-1) for k in (xx, yy)]
    return own[0] / (n * (n - 1)) + own[1] / (m * (m - 1)) - 2 * xy.mean((-2, -1))


def _sliced(x: Tensor, y: Tensor, pairs: Pairs) -> Tensor:
    """A few rows at a time, computed again in the backward."""

    def total(rows: Tensor, all_rows: Tensor) -> Tensor:
        return pairs(rows, all_rows).sum((-2, -1))

    def rows_of(a: Tensor, b: Tensor) -> Tensor:
        parts = [
            checkpoint(total, part, b, use_reentrant=False) if a.requires_grad else total(part, b)
            for part in a.split(ROWS, -2)
        ]
        return torch.stack(parts).sum(0)

    n, m = x.shape[-2], y.shape[-2]
    diagonals = [pairs(t.unsqueeze(-2), t.unsqueeze(-2)).sum((-3, -2, -1)) for t in (x, y)]
    own = [rows_of(t, t) - diagonal for t, diagonal in zip((x, y), diagonals)]
    return own[0] / (n * (n - 1)) + own[1] / (m * (m - 1)) - 2 * rows_of(x, y) / (n * m)


def _work(function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...], backward: bool) -> Work:
    torch.manual_seed(0)
    x = torch.randn(shape, device=_ceilings.DEVICE, requires_grad=backward)
    y = torch.randn(shape, device=_ceilings.DEVICE) * 1.5 + 0.2
    if not backward:
        return lambda: function(x, y)
    weights = torch.ones_like(function(x, y))
    return lambda: gradients((function(x, y),), (x,), (weights,))


def _case(
    name: str,
    shape: tuple[int, ...],
    pairs: Pairs,
    ours: Callable[[Tensor, Tensor], Tensor],
    backward: bool,
    quick: bool,
) -> Case:
    def eager(x: Tensor, y: Tensor) -> Tensor:
        return _unbiased(x, y, pairs)

    def work(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Work]:
        return lambda: _work(function, shape, backward)

    providers = {
        "reference": work(eager),
        "compile": work(torch.compile(eager, dynamic=False)),
        "trick": work(lambda x, y: _sliced(x, y, pairs)),
        "genfast": work(ours),
    }
    *batch, n, c = shape
    # Half of two matrices and one whole; the gradient to x: two products of x with itself and two with y.
    flops = (batch[0] if batch else 1) * n * n * c * (4 + (8 if backward else 0))
    return Case(f"{name} {shape}{'' if backward else ' forward'}", providers, flops=flops, quick=quick)


def _nearest_case(shape: tuple[int, int], backward: bool, quick: bool) -> Case:
    def matrix(x: Tensor, y: Tensor) -> Tensor:
        return _squared(x, y).min(1).values.sqrt()

    def sliced(x: Tensor, y: Tensor) -> Tensor:
        """The library's distances, a few rows at a time, and the chosen ones again with a derivative."""
        with torch.no_grad():
            index = torch.cat([torch.cdist(part, y).argmin(1) for part in x.split(ROWS)])
        return (x - y[index]).square().sum(1).sqrt()

    providers = {
        "reference": lambda: _work(matrix, shape, backward),
        "compile": lambda: _work(torch.compile(matrix, dynamic=False), shape, backward),
        "trick": lambda: _work(sliced, shape, backward),
        "genfast": lambda: _work(lambda x, y: genfast.ops.nearest_neighbors(x, y)[0][:, 0], shape, backward),
    }
    n, c = shape
    return Case(
        f"nearest_neighbors {shape}{'' if backward else ' forward'}", providers, flops=2 * n * n * c, quick=quick
    )


def _distance(x: Tensor, y: Tensor) -> Tensor:
    return genfast.ops.kernel_distance(x, y)


def _mmd_imq(x: Tensor, y: Tensor) -> Tensor:
    return genfast.ops.mmd(x, y, kernel="imq")


def _mmd_rbf(x: Tensor, y: Tensor) -> Tensor:
    return genfast.ops.mmd(x, y, kernel="rbf", bandwidths=x.shape[-1] ** 0.5)


CASES = [
    *(_case("mmd imq", (1024, 8), _imq, _mmd_imq, backward, True) for backward in (False, True)),
    *(_case("mmd rbf", (4096, 64), _rbf, _mmd_rbf, backward, False) for backward in (False, True)),
    *(
        _case("kernel_distance", (10, 1000, 2048), _polynomial, _distance, backward, False)
        for backward in (False, True)
    ),
    *(_nearest_case((8192, 256), backward, False) for backward in (False, True)),
]
