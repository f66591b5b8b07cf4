"""The loss of PixelCNN++, forward and backward, and its sampler."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(params: Tensor, x: Tensor) -> Tensor:
    """The published loss, for x (N, 3, H, W) in [-1, 1] and without its permutations to channels last."""
    k = params.shape[1] // 10
    logits, blocks = params[:, :k], params[:, k:].unflatten(1, (3, 3, k))
    means, log_scales, coeffs = blocks[:, :, 0], blocks[:, :, 1].clamp(min=-7.0), blocks[:, :, 2].tanh()
    red, green = x[:, :1], x[:, 1:2]
    mean_g = means[:, 1] + coeffs[:, 0] * red
    mean_b = means[:, 2] + coeffs[:, 1] * red + coeffs[:, 2] * green
    centered = x[:, :, None] - torch.stack((means[:, 0], mean_g, mean_b), 1)
    inv_stdv = torch.exp(-log_scales)
    plus_in, min_in, mid_in = (inv_stdv * c for c in (centered + 1 / 255, centered - 1 / 255, centered))
    cdf_delta = torch.sigmoid(plus_in) - torch.sigmoid(min_in)
    log_pdf_mid = mid_in - log_scales - 2.0 * F.softplus(mid_in)
    inner = torch.where(cdf_delta > 1e-5, torch.log(cdf_delta.clamp(min=1e-12)), log_pdf_mid - math.log(127.5))
    upper = torch.where(x[:, :, None] > 0.999, -F.softplus(min_in), inner)
    log_probs = torch.where(x[:, :, None] < -0.999, plus_in - F.softplus(plus_in), upper)
    return -torch.logsumexp(log_probs.sum(1) + F.log_softmax(logits, dim=1), dim=1)


def sample_eager(params: Tensor, uniforms: Tensor) -> Tensor:
    """The published sampler on given uniforms: one-hot selection of a component, colour by colour."""
    k = params.shape[1] // 10
    blocks = params[:, k:].unflatten(1, (3, 3, k))
    chosen = (params[:, :k].softmax(1).cumsum(1) <= uniforms[:, :1]).sum(1).clamp(max=k - 1)
    picked = F.one_hot(chosen, k).movedim(-1, 1)[:, None, None] * blocks
    means, log_scales, coeffs = picked.sum(3).unbind(2)
    log_scales, coeffs = log_scales.clamp(min=-7.0), coeffs.tanh()
    noise = uniforms[:, 1:].clamp(1e-5, 1 - 1e-5).logit()
    drawn: list[Tensor] = []
    for c in range(3):
        value = means[:, c] + log_scales[:, c].exp() * noise[:, c]
        if c == 1:
            value = value + coeffs[:, 0] * drawn[0]
        if c == 2:
            value = value + coeffs[:, 1] * drawn[0] + coeffs[:, 2] * drawn[1]
        drawn.append(((value.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1)
    return ((torch.stack(drawn, 1) + 1) * 127.5).round().long()


def _inputs(shape: tuple[int, ...], form: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Parameters like those of a model in training, and 8-bit pixels."""
    torch.manual_seed(0)
    n, k, h, w = shape
    params = torch.randn((n, 10 * k, h, w), device=_ceilings.DEVICE).contiguous(memory_format=form)
    return params, torch.randint(256, (n, 3, h, w), dtype=torch.uint8, device=_ceilings.DEVICE)


def _case(shape: tuple[int, ...], channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    n, k, h, w = shape

    def work(function: Work, scaled: bool) -> Work:
        params, x = _inputs(shape, form)
        params.requires_grad_()
        given = x * (2 / 255) - 1 if scaled else x
        gy = torch.rand(n, h, w, device=_ceilings.DEVICE)
        return lambda: gradients((function(params, given),), (params,), (gy,))

    providers = {
        "reference": lambda: work(eager, True),
        "compile": lambda: work(torch.compile(eager, dynamic=False), True),
        "genfast": lambda: work(genfast.ops.discretized_logistic_mixture_nll, False),
    }
    # float32: both read the parameters, the forward writes the nll, the backward the gradient; levels are a byte each.
    name = f"discretized_logistic_mixture_nll {n}x{h}x{w}, K={k}{' channels_last' if channels_last else ''}"
    return Case(name, providers, bytes=n * h * w * (4 * (3 * 10 * k + 2) + 6), quick=quick)


def _sampling(shape: tuple[int, ...], quick: bool) -> Case:
    n, k, h, w = shape

    def work(function: Work) -> Work:
        params, _ = _inputs(shape, torch.contiguous_format)
        uniforms = torch.rand(n, 4, h, w, device=_ceilings.DEVICE)
        return lambda: function(params, uniforms).float()

    providers = {
        "reference": lambda: work(sample_eager),
        "compile": lambda: work(torch.compile(sample_eager, dynamic=False)),
        "genfast": lambda: work(genfast.ops.discretized_logistic_mixture_sample),
    }
    return Case(f"discretized_logistic_mixture_sample {n}x{h}x{w}, K={k}", providers, quick=quick)


CASES = [
    _case((16, 10, 32, 32), False, True),
    _case((16, 10, 32, 32), True, False),
    _sampling((16, 10, 32, 32), False),
    _sampling((16, 10, 1, 1), True),  # a pixel, as an autoregressive sampler asks for it
]
