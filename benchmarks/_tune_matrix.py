"""What the choices of the kernels bound by arithmetic are tried on, at the sizes of the goals (see tune.py).

FLOPs are those of the dense product that a library would take, so that the rates compare with its rate. float32 is TF32
here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._tune_memory import SIZES, few, images, job
from benchmarks.tune import TINY, Job, Sweep, Work
from genfast.kernels import (
    contextual_similarity,
    gram_matrix,
    invertible_conv1x1,
    masked_conv,
    masked_linear,
    modulated_conv,
    pairwise,
)

HALF, BOTH = (torch.bfloat16,), (torch.bfloat16, torch.float32)
TF32 = {torch.float32: 2e-3}


def tf32(work: Work) -> Work:
    """``work`` with TF32 allowed."""

    def allowed() -> Any:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return work()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return allowed


def gram_forward(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Job:
    n, c, s = size
    x = torch.randn(size, device=device).to(dtype)
    return Job(tf32(lambda: gram_matrix.gram_matrix(x, 1.0 / s, 0.0)), x.nbytes, 2 * n * c * c * s)


def gram_product(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Job:
    n, c, s = size
    x, d = torch.randn(size, device=device).to(dtype), torch.randn(n, c, c, device=device)
    return Job(tf32(lambda: gram_matrix.gram_matrix_backward(x, d, 1.0 / c, 0.0)), 2 * x.nbytes, 2 * n * c * c * s)


GRAMS = {
    TINY: (2, 20, 70),
    "512 channels, 128 x 128": (1, 512, 1 << 14),
    "1024 channels, 128 x 128": (1, 1024, 1 << 14),
    "2048 channels, 64 x 64": (1, 2048, 1 << 12),
    "8 of 512 channels, 64 x 64": (8, 512, 1 << 12),
}
PAIRS = {TINY: (3, 5, 7), "16384 rows of 256": (128, 128, 256)}


def pairs(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Normalised rows, as many as an image of that size has positions."""
    high, across, c = size
    x, y = (F.normalize(torch.randn(1, high * across, c, device=device), dim=2).to(dtype) for _ in range(2))
    return x, y


def similarity(prior: bool, mean: bool, product: int) -> Any:
    def make(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Job:
        x, y = pairs(size, dtype, device)
        spatial = [torch.rand(1, x.shape[1], n, device=device) for n in size[:2]] if prior else [None, None]
        settings = (0.1 if prior else 0.0, 0.5, 1e-2, "cosine", "sources", mean)
        # The indices of winners are left out: of two that rounding makes equal another tile may find the other.
        work = tf32(lambda: contextual_similarity.contextual_similarity(x, y, *spatial, *settings)[0])
        return Job(work, 2 * x.nbytes, product * 2 * x.shape[1] ** 2 * x.shape[2])

    return make


def similarity_backward(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Job:
    x, y = pairs(size, dtype, device)
    settings = (None, None, 0.0, 0.5, 1e-2, "cosine", "sources")
    found = contextual_similarity.contextual_similarity(x, y, *settings, False)
    d = torch.randn(x.shape[:2], device=device)

    def work() -> Any:
        return contextual_similarity.contextual_similarity_backward(d, x, y, *settings, *found, True, True)

    return Job(tf32(work), 4 * x.nbytes, 8 * x.shape[1] ** 2 * x.shape[2])


def kernel_sums(size: tuple[int, int], dtype: torch.dtype, device: str) -> Job:
    n, c = size
    x = torch.randn(1, n, c, device=device).to(dtype)
    work = tf32(lambda: pairwise.pairwise_kernel_sum(x, None, "polynomial", [1.0 / c], 3, 1.0, True))
    return Job(work, x.nbytes, 2 * n * n * c)


_MASK = ("B", 1, "interleaved", [1, 1], 1)


def convolution(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, int]:
    """channels_last images, a weight and the FLOPs of its dense convolution."""
    n, c, side, k = size
    x = torch.randn(n, side, side, c, device=device).to(dtype).movedim(3, 1)
    weight = (torch.randn(c, c, k, k, device=device) / (c * k * k) ** 0.5).to(dtype)
    return x, weight, 2 * x.numel() * c * k * k


def masked_forward(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Job:
    x, weight, flops = convolution(size, dtype, device)
    bias, center = few(x, x.shape[1], dtype=dtype), [size[3] // 2] * 2
    return Job(tf32(lambda: masked_conv.masked_conv(x, weight, bias, *_MASK, center, "relu")), 2 * x.nbytes, flops)


def masked_weight(size: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Job:
    x, weight, flops = convolution(size, dtype, device)
    d, center, wanted = torch.randn_like(x), [size[3] // 2] * 2, [False, True, False]
    work = tf32(lambda: masked_conv.masked_conv_backward(d, x, weight, x, *_MASK, center, "none", wanted))
    return Job(work, 2 * x.nbytes, flops)


CONVOLUTIONS = {
    TINY: (2, 10, 9, 3),
    "64 of 128 channels, 64 x 64, 3 x 3": (64, 128, 64, 3),
    "64 of 128 channels, 32 x 32, 7 x 7": (64, 128, 32, 7),
    "32 of 256 channels, 32 x 32, 5 x 5": (32, 256, 32, 5),
}


def staircase(units: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    places = torch.arange(units, device=device)
    return places, places, places + 1


def linear_forward(size: tuple[int, int], dtype: torch.dtype, device: str) -> Job:
    n, units = size
    x = torch.randn(n, units, device=device).to(dtype)
    weight, bias = few(x, units, units, dtype=dtype), few(x, units, dtype=dtype)
    order = staircase(units, device)
    work = tf32(lambda: masked_linear.masked_linear(x, weight, bias, *order, "relu"))
    return Job(work, 2 * x.nbytes, 2 * n * units * units)


def linear_weight(size: tuple[int, int], dtype: torch.dtype, device: str) -> Job:
    n, units = size
    x, d = (torch.randn(n, units, device=device).to(dtype) for _ in range(2))
    weight, order = few(x, units, units, dtype=dtype), staircase(units, device)
    work = tf32(lambda: masked_linear.masked_linear_backward(d, x, weight, None, *order, [False, True, False]))
    return Job(work, 2 * x.nbytes, 2 * n * units * units)


LAYERS = {TINY: (9, 20), "65536 of 512": (1 << 16, 512), "4096 of 1024": (1 << 12, 1 << 10), "256 of 512": (256, 512)}


def mixed(channels: int) -> Any:
    def make(size: int, dtype: torch.dtype, device: str) -> Job:
        x = images(size, 2, dtype, device, channels)
        weight, bias = few(x, x.shape[1], x.shape[1]), few(x, x.shape[1])
        return job(tf32(lambda: invertible_conv1x1.channel_mix(x, None, weight, bias, x.shape[1] // 2)), x, 2)

    return make


def scaled(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    scale, noise = few(x, *x.shape[:2], dtype=dtype), few(x, 1, 1, *x.shape[2:], dtype=dtype)
    return job(lambda: modulated_conv.channel_scale(x, scale, noise), x, 2)


SWEEPS: list[Sweep] = [
    Sweep("gram_matrix", "forward", gram_forward, GRAMS, HALF),
    Sweep("gram_matrix", "product", gram_product, GRAMS, HALF),
    Sweep("contextual_similarity", "least", similarity(False, False, 3), PAIRS, HALF),
    Sweep("contextual_similarity", "greatest", similarity(False, False, 3), PAIRS, HALF),
    Sweep("contextual_similarity", "mass", similarity(False, False, 3), PAIRS, HALF),
    Sweep("contextual_similarity", "prior", similarity(True, False, 3), PAIRS, HALF),
    Sweep("contextual_similarity", "sums", similarity(False, True, 4), PAIRS, HALF),
    Sweep("contextual_similarity", "backward", similarity_backward, PAIRS, HALF),
    Sweep("masked_conv", "product", masked_forward, CONVOLUTIONS, BOTH, TF32),
    Sweep("masked_conv", "weight_grad", masked_weight, CONVOLUTIONS, BOTH, TF32),
    Sweep("masked_linear", "product", linear_forward, LAYERS, BOTH, TF32),
    Sweep("masked_linear", "weight_grad", linear_weight, LAYERS, BOTH, TF32),
    Sweep("pairwise", "sums", kernel_sums, {TINY: (20, 7), "8192 rows of 2048": (8192, 2048)}, BOTH, TF32),
    Sweep("invertible_conv1x1", "product", mixed(48), SIZES, BOTH, TF32),
    Sweep("modulated_conv", "forward", scaled, SIZES, BOTH),
]
