"""A training step of Glow (L=3, K=8, hidden 64) on real 32x32 RGB patches, batch 16: loss, backward, Adam."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work

BATCH = 16


@functools.cache
def _batch() -> Tensor:
    photos = genfast.data.load("photos", count=64)
    return genfast.models.dequantize(photos.train[:BATCH], generator=torch.Generator().manual_seed(0)).to(
        _ceilings.DEVICE
    )


def _step(model: nn.Module, loss: Callable[[Any], Tensor], compiled: bool = False) -> Work:
    model.to(_ceilings.DEVICE)
    with torch.no_grad():
        loss(model)  # sets the activation norms
    if compiled:
        loss = torch.compile(loss, dynamic=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def run() -> None:
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()

    # Left out of the peak: any way of training holds them, and activations are what reversibility saves.
    run.gradient_bytes = sum(p.nbytes for p in model.parameters())  # type: ignore[attr-defined]
    return run


def _negative_log_likelihood(model: Any) -> Tensor:
    result: Tensor = -model.log_prob(_batch()).mean()
    return result


def _normflows(steps: int) -> Callable[[], Work] | None:
    try:
        import normflows as nf
    except ImportError:
        return None

    def make() -> Work:
        base, merges, flows = [], [], []
        for i in range(3):
            channels = 3 * 2 ** (4 - i)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it calls a deprecated factorisation
                blocks = [nf.flows.GlowBlock(channels, 64, split_mode="channel", scale=True) for _ in range(steps)]
            flows.append([*blocks, nf.flows.Squeeze()])
            side = 32 // 2 ** (3 - i)
            if i:
                merges.append(nf.flows.Merge())
                base.append(nf.distributions.DiagGaussian((channels // 2, side, side)))
            else:
                base.append(nf.distributions.DiagGaussian((channels, side, side)))
        return _step(nf.MultiscaleFlow(base, flows, merges), lambda m: m.forward_kld(_batch()))

    return make


PLAIN = genfast.models.plain(genfast.models.Glow)


def _case(steps: int, quick: bool, compiled: bool) -> Case:
    def glow(model: Any, **options: Any) -> Work:
        torch.manual_seed(0)
        return _step(model(steps=steps, hidden=64, **options), _negative_log_likelihood)

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: glow(PLAIN, channels_last=False)}
    if compiled:
        providers["compile"] = lambda: _step(
            PLAIN(steps=steps, hidden=64, channels_last=False), _negative_log_likelihood, compiled=True
        )
    providers["trick"] = lambda: glow(PLAIN, channels_last=True)
    peer = _normflows(steps)
    if peer is not None:
        providers["peer"] = peer
    providers["genfast"] = lambda: glow(genfast.models.Glow)
    providers["genfast reversible"] = lambda: glow(genfast.models.Glow, reversible=True)
    notes = {"trick": "the plain model in channels_last", "peer": "normflows"}
    return Case(f"glow train step L=3 K={steps} batch {BATCH}", providers, quick=quick, notes=notes)


# torch.compile of the plain model takes minutes at K=8, so the quick run shows a smaller one without it.
CASES = [_case(2, True, False), _case(8, False, True), _case(32, False, False)]
