"""NADE: the likelihood with its gradients, and sampling, at the size of binarised MNIST and at a small one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def _sizes(n: int, d: int, h: int, binary: bool) -> tuple[Tensor, list[Tensor]]:
    """x, with the share of ones that MNIST has, and the weights."""
    torch.manual_seed(0)
    device = _ceilings.DEVICE
    x = (torch.rand(n, d, device=device) < 0.19).float() if binary else torch.randn(n, d, device=device)
    weights = [
        torch.randn(d, h, device=device) / d**0.5,
        torch.randn(d, 1, h, device=device) / h**0.5,
        torch.zeros(d, 1, device=device),
        torch.zeros(h, device=device),
    ]
    return x, weights


def _plain(x: Tensor, w: Tensor, v: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return genfast.reference.nade(x, w, v, b, c, None, "sigmoid")


def _vectorised(x: Tensor, w: Tensor, v: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """No loop: all states at once by a cumulative sum, (N, D, H)."""
    steps = torch.cumsum(x[:, :-1, None] * w[:-1], 1)
    h = torch.sigmoid(torch.cat([c.expand(len(x), 1, -1), steps + c], 1))
    return torch.einsum("ndh,dph->ndp", h, v) + b


def _likelihood(n: int, d: int, h: int, binary: bool, quick: bool, compiled: bool) -> Case:
    def work(function: Callable[..., Tensor]) -> Work:
        x, weights = _sizes(n, d, h, binary)
        weights = [w.requires_grad_() for w in weights]
        cotangent = torch.randn(n, d, 1, device=x.device)
        return lambda: gradients([function(x, *weights)], weights, [cotangent])

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: work(_plain)}
    if compiled:  # the loop unrolls to a graph of some ten nodes a step, which takes minutes to compile beyond that
        providers["compile"] = lambda: work(torch.compile(_plain))
    providers |= {"trick": lambda: work(_vectorised), "genfast": lambda: work(genfast.ops.nade)}
    # Forward a product for the readout and an update, backward four; binary data spare the update and the activation of
    # zeros. 20 FLOPs stand for an activation, of which the backward takes another.
    live = 0.19 if binary else 1.0
    return Case(
        f"nade {'binary' if binary else 'real'} {(n, d, h)}",
        providers,
        flops=round(n * d * h * (2 + 4 + live * (2 + 2 + 2 + 2 * 20))),
        quick=quick,
        notes={
            "reference": "a Python loop over D, as pytorch-generative has it",
            "trick": "a cumulative sum over D: N D H numbers in memory",
            **(
                {}
                if compiled
                else {"compile": "not at this size: the loop over D unrolls, and takes minutes to compile"}
            ),
        },
    )


def _sampling(n: int, d: int, h: int, quick: bool) -> Case:
    def work(function: Callable[..., Any]) -> Work:
        _, weights = _sizes(n, d, h, True)
        uniforms = torch.rand(n, d, 1, device=_ceilings.DEVICE)
        return lambda: [function(uniforms, weights)]

    def naive(uniforms: Tensor, weights: list[Tensor]) -> Tensor:
        x = uniforms.new_zeros(uniforms.shape[:2])
        for i in range(d):
            x[:, i] = (uniforms[:, i, 0] < torch.sigmoid(_vectorised(x, *weights)[:, i, 0])).to(x.dtype)
        return x

    def incremental(uniforms: Tensor, weights: list[Tensor]) -> Tensor:
        return genfast.reference.nade_sample(uniforms, *weights, None, None, None, "sigmoid", "bernoulli")

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: work(incremental)}
    naively = quick or _ceilings.DEVICE == "cuda"  # beyond that it takes minutes
    if naively:
        providers["peer"] = lambda: work(naive)
    providers["genfast"] = lambda: work(lambda u, weights: genfast.ops.nade_sample(u, *weights))
    return Case(
        f"nade_sample {(n, d, h)}",
        providers,
        flops=n * d * h * (2 + 2 + 20),
        quick=quick,
        once=("peer",) if naively else (),
        notes={
            "reference": "a Python loop that keeps the state",
            "peer": "D passes over the whole vector, as pytorch-generative samples",
        },
    )


CASES = [
    _likelihood(64, 64, 128, True, True, True),
    _likelihood(64, 784, 500, True, False, False),
    _likelihood(64, 784, 500, False, False, False),
    _sampling(64, 64, 128, True),
    _sampling(64, 784, 500, False),
]

if _ceilings.DEVICE == "cuda":
    CASES += [_likelihood(1024, 784, 500, True, False, False), _sampling(1024, 784, 500, False)]
