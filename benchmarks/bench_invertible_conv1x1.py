"""Invertible 1x1 convolution with its activation norm and split: the first half of a Glow step, forward and
backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor, log_scale: Tensor, bias: Tensor, plu: genfast.ops.PLU) -> tuple[Tensor, Tensor, Tensor]:
    """Norm, assembled weight, convolution, split, as one writes them."""
    positions = x.shape[2] * x.shape[3]
    x = x * log_scale.exp().reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
    eye = torch.eye(len(plu.perm), device=x.device)
    lower, upper = plu.lower.tril(-1) + eye, plu.upper.triu(1) + torch.diag(plu.sign_s * plu.log_s.exp())
    y = F.conv2d(x, (lower @ upper)[plu.perm][:, :, None, None])
    y_a, y_b = (t.contiguous(memory_format=_form(x)) for t in y.chunk(2, 1))
    return y_a, y_b, ((log_scale.sum() + plu.log_s.sum()) * positions).expand(x.shape[0])


def trick(x: Tensor, log_scale: Tensor, bias: Tensor, plu: genfast.ops.PLU) -> tuple[Tensor, Tensor, Tensor]:
    """The norm folded into the convolution's weight and bias."""
    eye = torch.eye(len(plu.perm), device=x.device)
    lower, upper = plu.lower.tril(-1) + eye, plu.upper.triu(1) + torch.diag(plu.sign_s * plu.log_s.exp())
    weight = (lower @ upper)[plu.perm]
    y = F.conv2d(x, (weight * log_scale.exp())[:, :, None, None], weight @ bias)
    y_a, y_b = (t.contiguous(memory_format=_form(x)) for t in y.chunk(2, 1))
    return y_a, y_b, ((log_scale.sum() + plu.log_s.sum()) * x.shape[2] * x.shape[3]).expand(x.shape[0])


def ours(x: Tensor, log_scale: Tensor, bias: Tensor, plu: genfast.ops.PLU) -> tuple[Tensor, Tensor, Tensor]:
    half = x.shape[1] // 2
    (y_a, y_b), logdet = genfast.ops.actnorm_conv1x1(x, log_scale, bias, plu, log_scale=True, split=half)
    return y_a, y_b, logdet


def _form(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _case(shape: tuple[int, ...], channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    n, c, h, w = shape

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x = torch.randn(shape, device=device).contiguous(memory_format=form).requires_grad_()
        halves = [torch.randn(n, c // 2, h, w, device=device).contiguous(memory_format=form) for _ in range(2)]
        log_scale, bias, log_s = ((0.1 * torch.randn(c, device=device)).requires_grad_() for _ in range(3))
        lower, upper = ((0.3 * torch.randn(c, c, device=device)).requires_grad_() for _ in range(2))
        perm, sign = torch.randperm(c, device=device), torch.randn(c, device=device).sign()
        plu = genfast.ops.PLU(perm, lower, upper, sign, log_s)
        weights = (*halves, torch.randn(n, device=device))
        return lambda: gradients(function(x, log_scale, bias, plu), (x, log_scale, bias, lower, upper, log_s), weights)

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(ours),
    }
    elements = n * c * h * w
    # float32: the forward reads x and writes y; the backward reads grad y twice (dx, dW) and x, and writes dx.
    name = f"actnorm_conv1x1 {shape}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=4 * 6 * elements, flops=6 * c * elements, quick=quick)


CASES = [
    _case((64, 12, 16, 16), True, True),
    _case((64, 48, 4, 4), True, True),
    _case((64, 12, 16, 16), False, False),
    _case((64, 24, 8, 8), True, False),
    _case((64, 48, 4, 4), False, False),
    _case((64, 96, 16, 16), True, False),
]
