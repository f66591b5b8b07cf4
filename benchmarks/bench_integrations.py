"""Models made with zuko, nflows and normflows, as their libraries run them and after ``genfast.accelerate``.

The same models with the same weights: the tests hold their training steps equal, and the samples are compared here.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work
from benchmarks.bench_glow import BATCH, _batch

FEATURES, ROWS = 64, 256


def _train(model: nn.Module, loss: Callable[[Any, Tensor], Tensor], x: Tensor) -> Work:
    optimizer = torch.optim.Adam(model.parameters())

    def run() -> None:
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()

    return run


def _sample(model: nn.Module, draw: Callable[[Any], Tensor]) -> Work:
    @torch.no_grad()
    def run() -> Tensor:
        torch.manual_seed(1)
        return draw(model)

    return run


def _case(
    name: str, peer: str, make: Callable[[], nn.Module], work: Callable[[nn.Module], Work], quick: bool
) -> list[Case]:
    """The model as it is and accelerated; nothing where its library is not installed."""
    if importlib.util.find_spec(peer) is None:
        return []

    def provider(accelerated: bool) -> Work:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the peers call deprecated factorisations
            model = make().to(_ceilings.DEVICE)
        if accelerated:
            genfast.accelerate(model)
        return work(model)

    providers = {"reference": lambda: provider(False), "genfast": lambda: provider(True)}
    return [Case(f"accelerate {peer}: {name}", providers, quick=quick, notes={"reference": f"{peer} as it is"})]


def _rows() -> Tensor:
    return torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0)).to(_ceilings.DEVICE)


def _zuko_loss(flow: Any, x: Tensor) -> Tensor:
    loss: Tensor = -flow().log_prob(x).mean()
    return loss


def _nsf() -> nn.Module:
    import zuko

    flow: nn.Module = zuko.flows.NSF(FEATURES)
    return flow


def _maf() -> nn.Module:
    import zuko

    flow: nn.Module = zuko.flows.MAF(FEATURES, transforms=5, hidden_features=(512, 512))
    return flow


def _coupling_flow() -> nn.Module:
    from nflows import distributions, flows, transforms
    from nflows.nn.nets import ResidualNet
    from nflows.utils import create_alternating_binary_mask

    steps = []
    for i in range(4):
        steps += [
            transforms.LULinear(FEATURES),
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                create_alternating_binary_mask(FEATURES, even=i % 2 == 0),
                lambda inputs, outputs: ResidualNet(inputs, outputs, hidden_features=128),
                num_bins=8,
                tails="linear",
                tail_bound=3.0,
            ),
        ]
    flow: nn.Module = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([FEATURES]))
    return flow


def _glow() -> nn.Module:
    import normflows as nf

    flows, merges, bases = [], [], []
    for i in range(3):
        channels, side = 3 * 2 ** (4 - i), 32 // 2 ** (3 - i)
        flows.append([*(nf.flows.GlowBlock(channels, 64) for _ in range(4)), nf.flows.Squeeze()])
        bases.append(nf.distributions.DiagGaussian((channels // 2 if i else channels, side, side)))
        merges += [nf.flows.Merge()] if i else []
    model: nn.Module = nf.MultiscaleFlow(bases, flows, merges)
    with torch.no_grad():
        model.forward_kld(_batch().cpu())  # sets the activation norms
    return model


CASES = [
    *_case(f"NSF({FEATURES}) train step, batch {ROWS}", "zuko", _nsf, lambda m: _train(m, _zuko_loss, _rows()), True),
    *_case(f"NSF({FEATURES}) sample, batch {ROWS}", "zuko", _nsf, lambda m: _sample(m, lambda f: f().sample((ROWS,))),
    False),
    *_case(
        f"MAF({FEATURES}, 5 of 512-512) sample, batch {ROWS}", "zuko", _maf,
        lambda m: _sample(m, lambda f: f().sample((ROWS,))), False,
    ),
    *_case(
        f"MAF({FEATURES}, 5 of 512-512) train step, batch {ROWS}", "zuko", _maf, lambda m: _train(m, _zuko_loss,
        _rows()), False
    ),
    *_case(
        f"spline coupling flow train step, batch {ROWS}", "nflows", _coupling_flow,
        lambda m: _train(m, lambda f, x: -f.log_prob(x).mean(), _rows()), False,
    ),
    *_case(
        f"Glow L=3 K=4 train step, batch {BATCH}", "normflows", _glow,
        lambda m: _train(m, lambda f, x: f.forward_kld(x), _batch()), False,
    ),
]  # fmt: skip
