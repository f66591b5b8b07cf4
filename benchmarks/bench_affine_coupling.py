"""Affine coupling, forward and backward with the log-determinant, at the sizes of Glow's first levels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor, params: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    """What one writes: chunk, scale, multiply, add, concatenate, sum."""
    x_a, x_b = x.chunk(2, 1)
    r, t = params.chunk(2, 1)
    log_s = r if scale == "exp" else F.logsigmoid(r + 2) if scale == "sigmoid" else torch.tanh(r)
    # Half types are summed in float32, as ours are.
    return torch.cat((x_a * torch.exp(log_s) + t, x_b), 1), log_s.flatten(1).sum(1, dtype=torch.float32)


def trick(x: Tensor, params: Tensor, scale: str) -> tuple[Tensor, Tensor]:
    """The fewest library passes found: addcmul in place of multiply and add, written behind one copy of x."""
    width = x.shape[1] // 2
    r, t = params[:, :width], params[:, width:]
    log_s = r if scale == "exp" else F.logsigmoid(r + 2) if scale == "sigmoid" else torch.tanh(r)
    y_a = torch.addcmul(t, x[:, :width], log_s.exp())
    return torch.cat((y_a, x[:, width:]), 1), log_s.sum(tuple(range(1, x.dim())), dtype=torch.float32)


def _normflows(scale: str) -> Work | None:
    """normflows' block, whose parameters interleave shift and scale; its own network is the identity on ours."""
    try:
        import normflows
    except ImportError:
        return None
    if scale == "tanh":
        return None
    block = normflows.flows.AffineCoupling(torch.nn.Identity(), True, "exp" if scale == "exp" else "sigmoid_inv")

    def work(x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x_a, x_b = x.chunk(2, 1)
        (_, y_a), log_det = block([params, x_a])
        return torch.cat((y_a, x_b), 1), log_det

    return work


def _case(
    shape: tuple[int, ...],
    scale: str,
    channels_last: bool,
    quick: bool,
    *,
    dtype: str = "float32",
    backward: bool = True,
    priority: int = 1,
) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    kind = _ceilings.DTYPES[dtype]

    def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x, params, gy = (
            torch.randn(shape, device=device, dtype=kind).mul_(factor).contiguous(memory_format=form)
            for factor in (1, 0.3, 1)
        )
        return x.requires_grad_(backward), params.requires_grad_(backward), gy, torch.randn(shape[0], device=device)

    def work(function: Work) -> Work:
        x, params, gy, gl = inputs()
        return (
            (lambda: gradients(function(x, params), (x, params), (gy, gl))) if backward else lambda: function(x, params)
        )

    providers = {
        "reference": lambda: work(lambda x, p: eager(x, p, scale)),
        "compile": lambda: work(torch.compile(lambda x, p: eager(x, p, scale), dynamic=False)),
        "trick": lambda: work(lambda x, p: trick(x, p, scale)),
    }
    if not backward:  # forward and backward shows it
        del providers["compile"]
    peer = _normflows(scale)
    if peer is not None and dtype == "float32" and backward:

        def interleaved() -> Work:
            x, params, gy, gl = inputs()
            width = shape[1] // 2
            mixed = torch.stack((params[:, width:], params[:, :width]), 2).flatten(1, 2).detach()
            mixed = mixed.contiguous(memory_format=form).requires_grad_()

            def run() -> list[Tensor | None]:
                # The last gradient is computed, but lies in the peer's order of channels.
                return [*gradients(peer(x, mixed), (x, mixed), (gy, gl))[:-1], None]

            return run

        providers["peer"] = interleaved
    providers["genfast"] = lambda: work(lambda x, p: genfast.ops.affine_coupling(x, p, scale=scale))
    label = f"affine_coupling {scale} {shape}{' channels_last' if channels_last else ''}"
    label += f"{'' if dtype == 'float32' else f' {dtype}'}{'' if backward else ' forward'}"
    # Forward reads x and params and writes y; backward reads grad y, x_a and r and writes dx and dparams.
    moved = kind.itemsize * math.prod(shape) * (7 if backward else 3)
    return Case(label, providers, bytes=moved, quick=quick, dtype=dtype, priority=priority)


CASES = [
    _case((64, 48, 16, 16), "exp", False, True),
    _case((256, 12, 32, 32), "exp", False, True),
    _case((64, 48, 16, 16), "sigmoid", False, True),
    _case((256, 12, 32, 32), "sigmoid", False, True),
    _case((64, 48, 16, 16), "tanh", False, False),
    _case((256, 12, 32, 32), "tanh", False, False),
    _case((64, 48, 16, 16), "exp", True, False),
    _case((256, 12, 32, 32), "exp", True, False),
    _case((16, 12, 16, 16), "exp", False, False),
]

if _ceilings.DEVICE == "cuda":  # x of 256 MiB and of 1 GiB
    CASES += [
        _case((n // kind.itemsize, 64, 32, 32), "exp", False, False, dtype=dtype, backward=backward, priority=0)
        for n in (4096, 16384)
        for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
        for backward in (False, True)
    ]
