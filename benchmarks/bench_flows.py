"""Autoregressive flows: a MAF's log_prob, training step and sampling beside zuko's, a spline coupling flow beside
nflows'.

All providers hold the same weights, zuko's or nflows', so that densities, gradients and samples are the same numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import _ceilings
from benchmarks._case import Case, Work
from benchmarks.tabular import from_zuko, zuko_flow
from genfast import models
from genfast import nn as gnn
from genfast.models.conditioners import ResidualMLP
from genfast.nn import plain


def _installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@functools.cache
def _x(n: int, dim: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(1)).to(_ceilings.DEVICE)


@functools.cache
def _noise(n: int, dim: int) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(2)).to(_ceilings.DEVICE)


def _step(module: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor, compiled: bool = False) -> Work:
    def loss() -> Tensor:
        return -log_prob(x).mean()

    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)
    made = torch.compile(loss, dynamic=False) if compiled else loss

    def run() -> None:
        optimizer.zero_grad()
        made().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


def _density(log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Work:
    def run() -> Tensor:
        with torch.no_grad():
            return log_prob(x)

    return run


def _own(kind: str, dim: int, transforms: int, hidden: int, layers: Any, family: Any) -> Any:
    """The same architecture from a seed, where zuko is not installed."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"normalising": False} if kind == "MAF" else {"transform": "spline", "convention": "zuko"}
    steps = []
    for i in range(transforms):
        made = layers.MADENetwork(
            dim, (hidden, hidden), outputs=2 if kind == "MAF" else 23, order="reversed" if i % 2 else None
        )
        steps.append(layers.MaskedAutoregressive(made, **options))
    return family(models.DiagonalGaussian(dim, trainable=False), steps)


def _live(kind: str, dim: int, transforms: int, hidden: int) -> int:
    """Weights that a mask leaves, of degrees 1 to D - 1 over and over."""
    inputs, units = torch.arange(1, dim + 1), 1 + torch.arange(hidden) % (dim - 1)
    outputs = inputs.repeat_interleave(2 if kind == "MAF" else 23)
    pairs = (units[:, None] >= inputs).sum() + (units[:, None] >= units).sum() + (outputs[:, None] > units).sum()
    return transforms * int(pairs)


def _zuko_cases(kind: str, dim: int, n: int, transforms: int, hidden: int, quick: bool) -> list[Case]:
    """The three uses of one flow, on zuko's weights if it is there."""
    with_peer = _installed("zuko")

    def theirs() -> Any:
        torch.manual_seed(0)
        return zuko_flow(kind, dim, transforms, hidden).to(_ceilings.DEVICE)

    def made(layers: Any, family: Any) -> Any:
        if with_peer:
            return from_zuko(theirs(), layers, family).to(_ceilings.DEVICE)
        return _own(kind, dim, transforms, hidden, layers, family).to(_ceilings.DEVICE)

    def ours() -> Any:
        return made(gnn, models.Flow)

    def reference() -> Any:
        return made(plain, models.plain(models.Flow))

    x, z = (lambda: _x(n, dim)), (lambda: _noise(n, dim))
    live = _live(kind, dim, transforms, hidden)
    title = f"{kind} {dim} features, {transforms} x {hidden}-{hidden}, batch {n}"

    def density(flow: Any, compiled: bool = False) -> Work:
        return _density(torch.compile(flow.log_prob, dynamic=False) if compiled else flow.log_prob, x())

    def peer_density() -> Work:
        flow = theirs()
        return _density(lambda v: flow().log_prob(v), x())

    def peer_step() -> Work:
        flow = theirs()
        return _step(flow, lambda v: flow().log_prob(v), x())

    def training(flow: Any, compiled: bool = False) -> Work:
        return _step(flow, flow.log_prob, x(), compiled)

    def sampling(flow: Any) -> Work:
        def run() -> Tensor:
            with torch.no_grad():
                drawn: Tensor = flow.inverse(z())[0]
            return drawn

        return run

    def peer_sampling() -> Work:
        flow = theirs()

        def run() -> Tensor:
            with torch.no_grad():
                drawn: Tensor = flow().transform.inv(z())
            return drawn

        return run

    def providers(
        work: Callable[..., Work], peer: Callable[[], Work], compiled: bool = True
    ) -> dict[str, Callable[[], Work]]:
        found: dict[str, Callable[[], Work]] = {"reference": lambda: work(reference())}
        if compiled:
            found["compile"] = lambda: work(reference(), True)
        if with_peer:
            found["peer"] = peer
        return found | {"genfast": lambda: work(ours())}

    slow = ("reference", "peer") if with_peer else ("reference",)
    return [
        Case(f"{title}: log_prob", providers(density, peer_density), flops=2 * n * live, quick=quick),
        Case(f"{title}: training step", providers(training, peer_step), flops=6 * n * live, quick=False),
        Case(
            f"{title}: sampling",
            providers(sampling, peer_sampling, False),
            flops=2 * n * live,
            quick=quick,
            once=() if quick else slow,
        ),
    ]


def _nflows_case(dim: int, n: int, layers: int, hidden: int, bins: int) -> list[Case]:
    """A training step of spline couplings with residual conditioners (arXiv:1906.04032), as nflows users write it."""
    if not _installed("nflows"):
        return []

    def theirs() -> Any:
        from nflows import distributions, flows, transforms
        from nflows import nn as their_nn

        torch.manual_seed(0)
        steps = []
        for i in range(layers):
            mask = torch.arange(dim) % 2 == i % 2
            steps.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(
                    mask,
                    lambda a, b: their_nn.nets.ResidualNet(a, b, hidden_features=hidden, num_blocks=2),
                    num_bins=bins,
                    tails="linear",
                    tail_bound=5.0,
                )
            )
        flow = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([dim]))
        return flow.to(_ceilings.DEVICE)

    def ours(family: Any, base: Any) -> Any:
        steps = []
        for transform in theirs()._transform._transforms:
            moved = transform.transform_features
            mask = torch.ones(dim, dtype=torch.bool)
            mask[moved] = False
            net = transform.transform_net
            conditioner = ResidualMLP(dim - len(moved), len(moved) * (3 * bins - 1), hidden, 2)
            conditioner.first.load_state_dict(net.initial_layer.state_dict())
            conditioner.last.load_state_dict(net.final_layer.state_dict())
            for own, other in zip(conditioner.blocks, net.blocks):
                for a, b in zip(own.children(), other.linear_layers):
                    a.load_state_dict(b.state_dict())
            steps.append(family.SplineCoupling(conditioner, mask=mask, bins=bins, bound=5.0, logit_scale=hidden**-0.5))
        return base(models.DiagonalGaussian(dim, trainable=False), steps).to(_ceilings.DEVICE)

    def density(flow: Any) -> Work:
        return _density(flow.log_prob, _x(n, dim))

    def training(flow: Any, compiled: bool = False) -> Work:
        return _step(flow, flow.log_prob, _x(n, dim), compiled)

    title = f"spline couplings, {dim} features, {layers} x residual {hidden}, {bins} bins, batch {n}"
    return [
        Case(
            f"{title}: log_prob",
            {
                "reference": lambda: density(ours(plain, models.plain(models.Flow))),
                "peer": lambda: density(theirs()),
                "genfast": lambda: density(ours(gnn, models.Flow)),
            },
            quick=False,
        ),
        Case(
            f"{title}: training step",
            {
                "reference": lambda: training(ours(plain, models.plain(models.Flow))),
                "compile": lambda: training(ours(plain, models.plain(models.Flow)), True),
                "peer": lambda: training(theirs()),
                "genfast": lambda: training(ours(gnn, models.Flow)),
            },
            quick=False,
        ),
    ]


CASES = [
    *_zuko_cases("MAF", 16, 64, 2, 64, True),
    *_zuko_cases("MAF", 64, 256, 5, 512, False),
    *_zuko_cases("NSF", 64, 256, 3, 64, False),
    *_nflows_case(64, 256, 5, 128, 8),
]
