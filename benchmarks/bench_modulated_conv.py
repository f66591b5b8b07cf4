"""Modulated convolution with demodulation and noise at StyleGAN2's sizes, forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients


def eager(x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
    """A weight for each sample as groups of one convolution: the paper's section 2.2, NVlabs' ``fused_modconv``."""
    n, i = styles.shape
    w = weight[None] * styles.reshape(n, 1, i, 1, 1)
    w = w * (w.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    y = F.conv2d(x.reshape(1, n * i, *x.shape[2:]), w.flatten(0, 1), padding=1, groups=n)
    return y.reshape(n, -1, *y.shape[2:]) + noise


def trick(x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
    """Activations scaled before and after one convolution, coefficients from a small product, noise added in the same
    pass."""
    d = (styles.square() @ weight.square().sum((2, 3)).t() + 1e-8).rsqrt()
    y = F.conv2d(x * styles[:, :, None, None], weight, padding=1)
    return torch.addcmul(noise, y, d[:, :, None, None])


def ours(x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor) -> Tensor:
    return genfast.ops.modulated_conv2d(x, weight, styles, noise=noise, padding=1)


def _case(n: int, channels: int, size: int, quick: bool) -> Case:
    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        shapes = (n, channels, size, size), (channels, channels, 3, 3), (n, channels), (n, 1, size, size)
        inputs = [torch.randn(s, device=device).requires_grad_() for s in shapes]
        gy = torch.randn(shapes[0], device=device)
        return lambda: gradients((function(*inputs),), inputs, (gy,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(ours),
    }
    # A convolution, its gradient for x and its gradient for the weight.
    flops = 3 * 2 * n * channels * channels * 9 * size * size
    return Case(f"modulated_conv2d {(n, channels, size, size)}", providers, flops=flops, quick=quick)


CASES = [_case(8, 256, 16, True), _case(8, 512, 4, False), _case(8, 128, 64, False), _case(1, 256, 32, False)]
