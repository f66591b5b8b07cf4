"""Autoregressive flows: a MAF's log_prob, training step and sampling beside zuko's, a spline coupling flow beside nflows'.

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
from genfast.reference import autoregressive_flows as plain
from genfast.reference.flow import Flow as PlainFlow


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


def _zuko_cases(kind: str, dim: int, n: int, transforms: int, hidden: int, quick: bool) -> list[Case]:
    """The three uses of one flow; without zuko there are no weights, and no cases."""
    if not _installed("zuko"):
        return []

    def theirs() -> Any:
        torch.manual_seed(0)
        return zuko_flow(kind, dim, transforms, hidden).to(_ceilings.DEVICE)

    def ours() -> models.Flow:
        return from_zuko(theirs()).to(_ceilings.DEVICE)

    def reference() -> Any:
        return from_zuko(theirs(), plain.AUTOREGRESSIVE, PlainFlow).to(_ceilings.DEVICE)

    x, z = (lambda: _x(n, dim)), (lambda: _noise(n, dim))
    live = sum(int(m.mask.sum()) for m in theirs().modules() if hasattr(m, "mask") and isinstance(m, nn.Linear))
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

    return [
        Case(
            f"{title}: log_prob",
            {
                "reference": lambda: density(reference()), "compile": lambda: density(reference(), True),
                "peer": peer_density, "genfast": lambda: density(ours()),
            },
            flops=2 * n * live, quick=quick,
        ),
        Case(
            f"{title}: training step",
            {
                "reference": lambda: training(reference()), "compile": lambda: training(reference(), True),
                "peer": peer_step, "genfast": lambda: training(ours()),
            },
            flops=6 * n * live, quick=False,
        ),
        Case(
            f"{title}: sampling",
            {"reference": lambda: sampling(reference()), "peer": peer_sampling, "genfast": lambda: sampling(ours())},
            flops=2 * n * live, quick=quick, once=() if quick else ("reference", "peer"),
        ),
    ]  # fmt: skip


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
                    mask, lambda a, b: their_nn.nets.ResidualNet(a, b, hidden_features=hidden, num_blocks=2), num_bins=bins,
                    tails="linear", tail_bound=5.0,
                )
            )  # fmt: skip
        flow = flows.Flow(transforms.CompositeTransform(steps), distributions.StandardNormal([dim]))
        return flow.to(_ceilings.DEVICE)

    def ours(family: Any, base: Any) -> Any:
        steps = []
        for transform in theirs()._transform._transforms:
            moved = transform.transform_features
            mask = torch.ones(dim, dtype=torch.bool)
            mask[moved] = False
            net = transform.transform_net
            conditioner = plain.ResidualMLP(dim - len(moved), len(moved) * (3 * bins - 1), hidden, 2)
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
                "reference": lambda: density(ours(plain.AUTOREGRESSIVE, PlainFlow)), "peer": lambda: density(theirs()),
                "genfast": lambda: density(ours(gnn, models.Flow)),
            },
            quick=False,
        ),
        Case(
            f"{title}: training step",
            {
                "reference": lambda: training(ours(plain.AUTOREGRESSIVE, PlainFlow)),
                "compile": lambda: training(ours(plain.AUTOREGRESSIVE, PlainFlow), True),
                "peer": lambda: training(theirs()), "genfast": lambda: training(ours(gnn, models.Flow)),
            },
            quick=False,
        ),
    ]  # fmt: skip


CASES = [
    *_zuko_cases("MAF", 16, 64, 2, 64, True),
    *_zuko_cases("MAF", 64, 256, 5, 512, False),
    *_zuko_cases("NSF", 64, 256, 3, 64, False),
    *_nflows_case(64, 256, 5, 128, 8),
]
