"""What a call costs beside the work: ops on tensors of one element, without a gradient, against ATen ops of like
arity."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from typing import Any

import torch

import genfast
from benchmarks import _ceilings
from genfast._registry import OPS

LIMIT = 3e-6  # seconds over ATen that an op may cost


def pairs() -> dict[str, tuple[Callable[[], Any], Callable[[], Any], str]]:
    """Per op: a call of ours, an ATen call with as many tensors in and out, and that one's name."""
    with torch.device(_ceilings.DEVICE):
        x, params, image = torch.randn(1, 2), torch.randn(1, 2), torch.randn(1, 1, 1, 1)
        weight = torch.ones(2)
        full = torch.ones(1, 1)
        filters = torch.ones(1, 1, 1, 1)
        two = torch.ones(2)
        gates = torch.randn(1, 2, 1, 1)
    aten = torch.ops.aten
    return {
        "affine_coupling": (
            lambda: genfast.ops.affine_coupling(x, params),
            lambda: aten._prelu_kernel_backward(x, x, weight),
            "_prelu_kernel_backward (3 in, 2 out)",
        ),
        "actnorm": (
            lambda: genfast.ops.actnorm(x, two, two),
            lambda: aten.native_layer_norm(x, (2,), two, two, 1e-5),
            "native_layer_norm (3 in, 3 out)",
        ),
        "squeeze": (
            lambda: genfast.ops.squeeze(image, 1),
            lambda: aten.pixel_unshuffle(image, 1),
            "pixel_unshuffle (1 in, 1 out)",
        ),
        "masked_conv": (
            lambda: genfast.ops.masked_conv2d(image, filters, mask_type="B"),
            lambda: aten.conv2d(image, filters),
            "conv2d (2 in, 1 out)",
        ),
        "gated_activation": (
            lambda: genfast.ops.gated_activation(gates),
            lambda: aten.glu(gates, 1),
            "glu (1 in, 1 out)",
        ),
        "channel_mix": (
            lambda: OPS["channel_mix"](image, None, full, None, 1),
            lambda: aten.conv2d(image, filters),
            "conv2d (2 in, 1 out)",
        ),
    }


def measure() -> list[dict[str, Any]]:
    """Best seconds per call of both, and their difference; on a GPU those that the host takes to launch a call."""
    found = []
    # Not so many launches in a row that they fill the queue, and the host waits.
    number, setup = (200, torch.cuda.synchronize) if _ceilings.DEVICE == "cuda" else (2000, lambda: None)
    with torch.no_grad():
        for name, (ours, theirs, label) in pairs().items():
            for f in (ours, theirs):
                f()
            best = [min(timeit.repeat(f, setup, number=number, repeat=15)) / number for f in (ours, theirs)]
            found.append(
                {
                    "op": name,
                    "aten": label,
                    "genfast_s": best[0],
                    "aten_s": best[1],
                    "over_s": best[0] - best[1],
                    "within_limit": best[0] - best[1] <= LIMIT,
                }
            )
    return found
