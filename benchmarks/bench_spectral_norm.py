"""One power iteration and the scaled weight, forward and backward, against torch's parametrisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """What the parametrisation computes, as a function."""
    matrix = weight.flatten(1)
    with torch.no_grad():
        u = F.normalize(matrix @ v, dim=0, eps=1e-12)
        v = F.normalize(matrix.mT @ u, dim=0, eps=1e-12)
    return weight / torch.vdot(u, matrix @ v)


class _Trick(torch.autograd.Function):
    """Two products of matrix and vector: sigma is what W^T u is normalised by; the closed form backward."""

    @staticmethod
    def forward(ctx, weight, u, v):
        matrix = weight.flatten(1)
        left = F.normalize(torch.mv(matrix, v), dim=0, eps=1e-12)
        right = torch.mv(matrix.mT, left)
        sigma = torch.linalg.vector_norm(right)
        right = right / sigma
        normed = weight / sigma
        ctx.save_for_backward(normed, left, right, sigma)
        return normed

    @staticmethod
    def backward(ctx, grad):
        normed, left, right, sigma = ctx.saved_tensors
        inner = torch.dot(grad.flatten(), normed.flatten())
        return torch.addr(grad.flatten(1), left, right * -inner).div_(sigma).view_as(grad), None, None


def ours(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return genfast.ops.spectral_norm(weight, u, v)[0]


def _case(shape: tuple[int, ...], quick: bool) -> Case:
    def made() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        weight, cotangent = (torch.randn(shape, device=_ceilings.DEVICE) for _ in range(2))
        u, _, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        return weight.requires_grad_(), u[:, 0].contiguous(), v[0].contiguous(), cotangent

    def work(function: Function) -> Work:
        weight, u, v, cotangent = made()
        return lambda: gradients((function(weight, u, v),), (weight,), (cotangent,))

    def module() -> Work:
        weight, u, v, cotangent = made()
        layer = (
            nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
            if len(shape) == 4
            else nn.Linear(shape[1], shape[0], False)
        )
        layer.to(_ceilings.DEVICE)
        layer.weight.data.copy_(weight.detach())
        parametrizations.spectral_norm(layer)
        held = layer.parametrizations.weight
        held[0]._u.copy_(u)
        held[0]._v.copy_(v)
        return lambda: gradients((layer.weight,), (held.original,), (cotangent,))

    providers = {
        "reference": module,
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(_Trick.apply),
        "genfast": lambda: work(ours),
    }
    # float32: the forward reads W three times and writes once; the backward reads the gradient twice, W once, writes
    # once.
    return Case(f"spectral_norm {shape}", providers, bytes=32 * math.prod(shape), quick=quick)


CASES = [
    _case((256, 128, 4, 4), True),
    _case((512, 512, 3, 3), False),
    _case((64, 3, 4, 4), False),
    _case((512, 512), False),
]
