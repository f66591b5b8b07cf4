"""What the choices of the kernels bound by memory are tried on (see tune.py), mostly images of 64 channels of 64 x 64.

A size is the bytes that a call moves, inputs and outputs; the batch follows from it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.tune import TINY, Job, Sweep, Work
from genfast.kernels import (
    activation,
    actnorm,
    affine_coupling,
    bias_act,
    diagonal_gaussian,
    discretized_logistic_mixture,
    gated_activation,
    interpolate,
    minibatch_discrimination,
    minibatch_stddev,
    pixel_norm,
    sample_norm,
    spline,
    squeeze,
    upfirdn2d,
)

SIZES = {TINY: 0, "256 MB": 1 << 28, "1 GB": 1 << 30}
SIDE = 64


def images(moved: int, tensors: float, dtype: torch.dtype, device: str, channels: int = 64) -> Tensor:
    """Random images, so many that ``tensors`` times them are ``moved`` bytes; two small ones of odd shape where that is
    0."""
    if not moved:
        return torch.randn(2, 6, 14, 50, device=device).to(dtype)
    batch = max(4, round(moved / (tensors * channels * SIDE * SIDE * dtype.itemsize)) // 4 * 4)
    return torch.randn(batch, channels, SIDE, SIDE, device=device, dtype=dtype)


def job(work: Work, x: Tensor, tensors: float, more: int = 0) -> Job:
    return Job(work, round(tensors * x.numel() * x.element_size()) + more)


def few(x: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Small parameters."""
    return 0.1 * torch.randn(shape, device=x.device, dtype=dtype or torch.float32)


def actnorm_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    scale, bias = few(x, x.shape[1]), few(x, x.shape[1])
    return job(lambda: actnorm.actnorm(x, scale, bias, True, False), x, 2)


def actnorm_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    x, d = (images(size, 3, dtype, device) for _ in range(2))
    scale, bias, g = few(x, x.shape[1]), few(x, x.shape[1]), few(x, x.shape[0])
    return job(lambda: actnorm.actnorm_backward(d, g, x, scale, bias, True, False), x, 3)


def coupling_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    """Half of the channels moved: x and y, and of params as much as x."""
    x, params = (images(size, 3, dtype, device) for _ in range(2))
    settings = None, None, "sigmoid", "shift_scale", False, False, False
    return job(lambda: affine_coupling.affine_coupling(x, params, *settings), x, 3)


def coupling_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    """d, dx and dparams, of x and of params the half that counts."""
    d, x, params = (images(size, 4, dtype, device) for _ in range(3))
    g, settings = few(x, x.shape[0]), (None, None, "sigmoid", "shift_scale", False, False, False)
    return job(lambda: affine_coupling.affine_coupling_backward(d, g, x, params, *settings), x, 4)


_SPLINE = (8, "linear", "nflows", False, (-3.0, 3.0, -3.0, 3.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0))


def spline_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    """23 parameters an element; its log-derivative is float32."""
    each = 25 * dtype.itemsize + 4
    x = torch.randn(size // each // 64 or 150, 64, device=device).to(dtype)
    params = torch.randn(*x.shape, 23, device=device, dtype=dtype)
    return Job(lambda: spline.rational_quadratic_spline_packed(x, params, *_SPLINE), each * x.numel())


def spline_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    each = 49 * dtype.itemsize + 4
    x = torch.randn(size // each // 64 or 150, 64, device=device).to(dtype)
    params = torch.randn(*x.shape, 23, device=device, dtype=dtype)
    d, g = torch.randn_like(x), torch.randn(x.shape, device=device)
    return Job(lambda: spline.rational_quadratic_spline_packed_backward(d, g, x, params, *_SPLINE), each * x.numel())


def bias_act_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    bias = few(x, x.shape[1], dtype=dtype)
    return job(lambda: bias_act.bias_act(x, bias, "lrelu", 0.2, math.sqrt(2), 256.0), x, 2)


def bias_act_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    x, d = (images(size, 3, dtype, device) for _ in range(2))
    bias = few(x, x.shape[1], dtype=dtype)
    return job(lambda: bias_act.bias_act_backward(d, x, bias, "lrelu", 0.2, math.sqrt(2), 256.0), x, 3)


def leaky(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    return job(lambda: activation.leaky_relu_bits(x, 0.2), x, 2, x.numel() // 8)


def smooth(size: int, dtype: torch.dtype, device: str) -> Job:
    x, d = (images(size, 3, dtype, device) for _ in range(2))
    return job(lambda: activation.activation_chain(x, d, "gelu"), x, 3)


def gated_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 1.5, dtype, device, 128)
    bias = few(x, x.shape[1], dtype=dtype)
    return job(lambda: gated_activation.gated_activation(x, bias, 1), x, 1.5)


def gated_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2.5, dtype, device, 128)
    d, bias = torch.randn_like(x[:, ::2]), few(x, x.shape[1], dtype=dtype)
    return job(lambda: gated_activation.gated_activation_backward(d, x, bias, 1), x, 2.5)


def squeeze_move(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    return job(lambda: squeeze.squeeze(x, 2, "pixel_unshuffle", False), x, 2)


def pixel_norm_any(size: tuple[int, int], dtype: torch.dtype, device: str) -> Job:
    """Forward, then backward."""
    x, d = (images(size[1], 5, dtype, device, size[0]) for _ in range(2))
    return job(lambda: (pixel_norm.pixel_norm(x, 1e-8), pixel_norm.pixel_norm_backward(d, x, 1e-8)), x, 5)


def sample_norm_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 1, dtype, device)
    return job(lambda: sample_norm.sample_norm(x, False), x, 1)


def sample_norm_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    norm, g = x.flatten(1).float().norm(dim=1), few(x, x.shape[0])
    return job(lambda: sample_norm.sample_norm_backward(x, norm, g, False), x, 2)


def interpolate_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    real, fake = (images(size, 3, dtype, device) for _ in range(2))
    epsilon = torch.rand(real.shape[0], device=device)
    return job(lambda: interpolate.interpolate(real, fake, epsilon), real, 3)


def interpolate_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    real, fake, g = (images(size, 5, dtype, device) for _ in range(3))
    epsilon = torch.rand(real.shape[0], device=device)
    return job(lambda: interpolate.interpolate_backward(g, real, fake, epsilon, (True, True, True)), real, 5)


def gaussian_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    mean, log_variance, noise = (images(size, 4, dtype, device) for _ in range(3))
    return job(lambda: diagonal_gaussian.diagonal_gaussian(mean, log_variance, noise, None, None, False), mean, 4)


def gaussian_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    mean, log_variance, noise, d = (images(size, 6, dtype, device) for _ in range(4))
    g, wanted = few(mean, mean.shape[0]), (True, True, False, False, False)
    given = (mean, log_variance, noise, None, None, g, None, d, wanted)
    return job(lambda: diagonal_gaussian.diagonal_gaussian_backward(*given), mean, 6)


def _mixture(size: int, times: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, int]:
    """Ten components of three colours: 100 parameters a position, its levels as bytes."""
    each = times * 100 * dtype.itemsize + 7
    batch, side = (size // each // 1024 or 1, 32) if size else (2, 9)
    params = torch.randn(batch, 100, side, side, device=device, dtype=dtype)
    x = torch.randint(0, 256, (batch, 3, side, side), device=device, dtype=torch.uint8)
    return params, x, each * batch * side * side


def mixture_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    params, x, moved = _mixture(size, 1, dtype, device)
    return Job(lambda: discretized_logistic_mixture.discretized_logistic_mixture_nll(params, x, 256), moved)


def mixture_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    params, x, moved = _mixture(size, 2, dtype, device)
    g = torch.randn(x.shape[0], *x.shape[2:], device=device)
    return Job(lambda: discretized_logistic_mixture.discretized_logistic_mixture_nll_backward(params, x, g, 256), moved)


def mixture_sample(size: int, dtype: torch.dtype, device: str) -> Job:
    params, x, moved = _mixture(size, 1, dtype, device)
    u = torch.rand(x.shape[0], 4, *x.shape[2:], device=device)
    return Job(lambda: discretized_logistic_mixture.discretized_logistic_mixture_sample(params, u, 3, 256, 1.0), moved)


def blur(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=device)
    f = taps[:, None] * taps / 64
    return job(lambda: upfirdn2d.upfirdn2d(x, f, (1, 1), (1, 1), (2, 1, 2, 1), False, 1.0), x, 2)


def stddev_forward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 2, dtype, device)
    return job(lambda: minibatch_stddev.minibatch_stddev(x, min(4, x.shape[0]), 1, 1e-8), x, 2)


def stddev_backward(size: int, dtype: torch.dtype, device: str) -> Job:
    x = images(size, 3, dtype, device)
    d = torch.randn(x.shape[0], x.shape[1] + 1, *x.shape[2:], device=device, dtype=dtype)
    return job(lambda: minibatch_stddev.minibatch_stddev_backward(d, x, min(4, x.shape[0]), 1, 1e-8), x, 3)


def discrimination_forward(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Job:
    n, b, c = size
    m = torch.randn(size, device=device).to(dtype)
    return Job(lambda: minibatch_discrimination.pairwise_l1_kernel_sum(m, True), flops=n * n * b * (3 * c + 10))


def discrimination_backward(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> Job:
    n, b, c = size
    m, g = torch.randn(size, device=device).to(dtype), torch.randn(n, b, device=device)
    return Job(lambda: minibatch_discrimination.pairwise_l1_kernel_sum_backward(m, g), flops=n * n * b * (6 * c + 12))


def _sweep(family: str, choice: str, make: Any, sizes: dict[str, Any] = SIZES) -> Sweep:
    return Sweep(family, choice, make, sizes)


_NORMED = {TINY: (6, 0), "64 channels, 1 GB": (64, 1 << 30), "512 channels, 1 GB": (512, 1 << 30)}
_PAIRS = {TINY: (37, 2, 5), "N=1024, 100 kernels of 16": (1024, 100, 16), "N=256, 100 kernels of 5": (256, 100, 5)}

SWEEPS = [
    _sweep("affine_coupling", "forward", coupling_forward),
    _sweep("affine_coupling", "backward", coupling_backward),
    _sweep("spline", "forward", spline_forward),
    _sweep("spline", "backward", spline_backward),
    _sweep("actnorm", "forward", actnorm_forward),
    _sweep("actnorm", "backward", actnorm_backward),
    _sweep("bias_act", "forward", bias_act_forward),
    _sweep("bias_act", "backward", bias_act_backward),
    _sweep("activation", "leaky", leaky),
    _sweep("activation", "smooth", smooth),
    _sweep("gated_activation", "forward", gated_forward),
    _sweep("gated_activation", "backward", gated_backward),
    _sweep("squeeze", "move", squeeze_move),
    _sweep("pixel_norm", "norm", pixel_norm_any, _NORMED),
    _sweep("sample_norm", "forward", sample_norm_forward),
    _sweep("sample_norm", "backward", sample_norm_backward),
    _sweep("interpolate", "forward", interpolate_forward),
    _sweep("interpolate", "backward", interpolate_backward),
    _sweep("diagonal_gaussian", "forward", gaussian_forward),
    _sweep("diagonal_gaussian", "backward", gaussian_backward),
    _sweep("discretized_logistic_mixture", "forward", mixture_forward),
    _sweep("discretized_logistic_mixture", "backward", mixture_backward),
    _sweep("discretized_logistic_mixture", "sample", mixture_sample),
    _sweep("upfirdn2d", "filter", blur),
    _sweep("minibatch_stddev", "forward", stddev_forward),
    _sweep("minibatch_stddev", "backward", stddev_backward),
    _sweep("minibatch_discrimination", "forward", discrimination_forward, _PAIRS),
    _sweep("minibatch_discrimination", "backward", discrimination_backward, _PAIRS),
]
