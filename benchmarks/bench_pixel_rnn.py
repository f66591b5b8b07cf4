"""The recurrences of PixelRNN, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def _case(diagonal: bool, shape: tuple[int, int, int, int], quick: bool) -> Case:
    n, hidden, height, width = shape
    taps = 2 if diagonal else 3
    name = "diagonal_lstm" if diagonal else "row_lstm"

    def work(function: Callable[..., Tensor]) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        gates = torch.randn(n, 4 * hidden, height, width, device=device).requires_grad_()
        weight = (torch.randn(4 * hidden, hidden, taps, device=device) / (taps * hidden) ** 0.5).requires_grad_()
        cotangent = torch.randn(shape, device=device)
        return lambda: gradients([function(gates, weight)], [gates, weight], [cotangent])

    # A Python loop over torch's ops, rows or columns of the skewed map taken apart in one call.
    plain = getattr(genfast.reference, name)
    providers = {
        "reference": lambda: work(lambda gates, weight: plain(gates, weight)[0]),
        "genfast": lambda: work(getattr(genfast.ops, name)),
    }
    positions = n * height * width
    # float32: the forward reads the gates and writes h and the five states; the backward reads these and grad h and
    # writes the gradient of the gates. 8 k h^2 FLOPs a position forward, twice that backward.
    return Case(
        f"{name} {shape}",
        providers,
        bytes=4 * positions * hidden * (4 + 1 + 5 + 5 + 1 + 4),
        flops=3 * positions * 8 * taps * hidden**2,
        quick=quick,
    )


# At the first shape the products of the Row LSTM bind the loop too; at the second what binds it is calling torch.
CASES = [_case(diagonal, shape, True) for shape in ((16, 64, 28, 28), (4, 32, 28, 28)) for diagonal in (False, True)]
