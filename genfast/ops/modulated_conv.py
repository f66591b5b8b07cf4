"""ops.modulated_conv2d: the convolution of StyleGAN2, its activations scaled before and after one shared
convolution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from .._tensors import memory_format
from . import _check
from ._layout import laid_out, layout
from .upfirdn2d import Pair, downsample_padding, filter_size, parse_padding, upfirdn2d, upsample_padding

_NAME = "modulated_conv2d"
_CPU = kernels(
    "_cpu",
    channel_scale_backward="is_double channels_last x grad scale dx grad_scale grad_noise n c s threads",
    tap_energy="is_double weight out rows taps threads",
)


# ---- scale[n, c] x[n, c, ...] + noise[n, 0, ...] ----


def _check_scale(x: Tensor, scale: Tensor, noise: Tensor | None) -> None:
    _check.floating("channel_scale", x=x, scale=scale, noise=noise)
    if x.dim() < 2:
        raise ValueError(f"channel_scale: x has shape {tuple(x.shape)}, expected (N, C, ...)")
    _check.shape("channel_scale", "scale", scale, tuple(x.shape[:2]), "one per sample and channel")
    if noise is not None:
        batch = 1 if noise.dim() and noise.shape[0] == 1 else x.shape[0]
        _check.shape("channel_scale", "noise", noise, (batch, 1, *x.shape[2:]), "x's shape with one channel")


def _reference_scale(x: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
    return reference.channel_scale(x, scale, noise).contiguous(memory_format=memory_format(x))


def _library_scale(x: Tensor, scale: Tensor, noise: Tensor | None) -> Tensor:
    """One pass of the library, which a kernel of ours did not beat; the output's memory comes from the allocator."""
    _check_scale(x, scale, noise)
    own = layout(x)
    y = own.empty_like(x) if own.fits else torch.empty_like(x, memory_format=memory_format(x))
    spread = scale.to(x.dtype).reshape(*scale.shape, *[1] * (x.dim() - 2))
    if noise is None:
        return torch.mul(x, spread, out=y)
    return torch.addcmul(noise.to(x.dtype), x, spread, out=y)


def _reference_scale_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dscale, dnoise = reference.channel_scale_backward(grad_y, x, scale, noise)
    return dx.contiguous(memory_format=memory_format(x)), dscale, dnoise


def _cpu_scale_backward(
    grad_y: Tensor, x: Tensor, scale: Tensor, noise: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype
    x, a = laid_out(x)
    grad_y, g = laid_out(grad_y.to(dtype), a)
    s = scale.to(dtype).contiguous()
    dx, ds = a.empty_like(x), torch.empty_like(s)
    dnoise = x.new_empty(0 if noise is None else (a.n, 1, *x.shape[2:]))
    _CPU.channel_scale_backward(
        is_double=dtype is torch.float64,
        grad=g.view(grad_y),
        x=a.view(x),
        scale=s,
        dx=dx,
        grad_scale=ds,
        grad_noise=None if noise is None else dnoise,
        n=a.n,
        c=a.c,
        s=a.s,
        channels_last=a.walks_channels,
        threads=torch.get_num_threads(),
    )
    if noise is not None and noise.shape[0] != a.n:
        dnoise = dnoise.sum(0, keepdim=True)
    return dx, ds.to(scale.dtype), dnoise if noise is None else dnoise.to(noise.dtype)


def _samples_scale(generator: torch.Generator) -> Iterator[Sample]:
    for label, xs, ns in (
        ("plain", (3, 5, 4, 7), None),
        ("noise", (3, 5, 4, 7), (3, 1, 4, 7)),
        ("one noise", (2, 6, 5, 3), (1, 1, 5, 3)),
        ("vectors", (4, 9), (4, 1)),
    ):
        x, s, noise = (
            None if d is None else torch.randn(d, generator=generator, dtype=torch.float64) for d in (xs, xs[:2], ns)
        )
        yield Sample(label, (x, s, noise))


OP_SCALE = Op(
    "channel_scale(Tensor x, Tensor scale, Tensor? noise)",
    reference=_reference_scale,
    outputs={"y": "like x"},
    check=_check_scale,
    kernels={"cpu": _library_scale, "triton": "modulated_conv"},
    backward=Backward(
        "grad_y, x, scale, noise -> x, scale, noise",
        saved={"noise": "noise if ctx.needs_input_grad[2] else None"},
        outputs={"scale": "contiguous like scale", "noise": "contiguous like noise"},
        reference=_reference_scale_backward,
        kernels={"cpu": _cpu_scale_backward, "triton": "modulated_conv"},
    ),
    samples=_samples_scale,
)


# ---- sum over the taps of w^2 ----


def _check_energy(weight: Tensor) -> None:
    _check.floating("tap_energy", weight=weight)
    if weight.dim() < 3:
        raise ValueError(f"tap_energy: weight has shape {tuple(weight.shape)}, expected (O, I, taps...)")


def _cpu_energy(weight: Tensor) -> Tensor:
    _check_energy(weight)
    weight = weight.contiguous()
    out = torch.empty(weight.shape[:2], dtype=weight.dtype)
    taps = math.prod(weight.shape[2:])
    _CPU.tap_energy(
        is_double=weight.dtype is torch.float64,
        weight=weight,
        out=out,
        rows=out.numel(),
        taps=taps,
        threads=torch.get_num_threads(),
    )
    return out


def _backward_energy(ctx: Any, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return None
    (weight,) = ctx.saved_tensors
    dweight: Tensor = weight * (2 * grad).to(weight.dtype).reshape(*grad.shape, *[1] * (weight.dim() - 2))
    return dweight


def _samples_energy(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape in (("3x3", (5, 7, 3, 3)), ("1x1", (4, 3, 1, 1)), ("5 taps", (3, 18, 5))):
        yield Sample(label, (torch.randn(shape, generator=generator, dtype=torch.float64),))


OP_ENERGY = Op(
    "tap_energy(Tensor weight)",
    reference=reference.tap_energy,
    outputs={"energy": "(N, C) like weight as accumulator"},
    check=_check_energy,
    kernels={"cpu": _cpu_energy, "triton": "modulated_conv"},
    saves="weight",
    backward=_backward_energy,
    samples=_samples_energy,
)


# ---- the convolution ----


def _check_all(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor | None, up: int, down: int, resample_filter: Tensor | None
) -> None:
    _check.floating(_NAME, x=x, weight=weight, styles=styles, noise=noise)
    if x.dim() != 4:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, expected (N, I, H, W)")
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or not weight.numel():
        raise ValueError(
            f"{_NAME}: weight has shape {tuple(weight.shape)}, expected (O, I = {x.shape[1]}, height, width)"
        )
    _check.shape(_NAME, "styles", styles, tuple(x.shape[:2]), "one per sample and input channel")
    for name, factor in (("up", up), ("down", down)):
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"{_NAME}: {name}={factor!r}, expected a positive integer")
    filter_size(resample_filter, _NAME)


def _normalized(weight: Tensor, styles: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and styles divided by their largest values, which demodulation undoes, so that float16 does not overflow.

    The divisors are held fixed in the derivative, to which they contribute nothing for the same reason.
    """
    tiny = torch.finfo(torch.float32).tiny
    wide = weight.float()
    largest = wide.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny) * math.sqrt(math.prod(weight.shape[1:]))
    s = styles.float()
    return wide / largest, s / s.detach().abs().amax(1, keepdim=True).clamp_min(tiny)


def _in_half(x: Tensor) -> bool:
    """Whether the convolution will run in float16."""
    kind = x.device.type
    return x.dtype is torch.float16 or (
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) is torch.float16
    )


def _convolve(
    x: Tensor, weight: Tensor, f: Tensor | None, up: int, down: int, pads: tuple[int, int, int, int], flip_weight: bool
) -> Tensor:
    """Upsampling, convolution, downsampling, in the order that computes on the fewest positions.

    Filter and convolution commute, as neither sees a border: all padding is before the first of them.
    """
    height, width = weight.shape[2:]
    if up > 1:
        pads = upsample_padding(f, (up, up), pads)
    if down > 1:
        pads = downsample_padding(f, (down, down), pads)
    x0, x1, y0, y1 = pads
    one = height == width == 1
    correlated = weight if flip_weight or one else weight.flip(2, 3)
    if up > 1 and not (one and down == 1):
        # A transposed convolution multiplies no inserted zeros; it is a convolution, not a correlation.
        transposed = weight.flip(2, 3) if flip_weight and not one else weight
        y = F.conv_transpose2d(x, transposed.transpose(0, 1), stride=up)
        pads = (x0 - width + 1, x1 - width + up, y0 - height + 1, y1 - height + up)
        y = upfirdn2d(y, f, padding=pads, gain=up * up)
        return upfirdn2d(y, f, down=down) if down > 1 else y
    if up > 1:
        return upfirdn2d(F.conv2d(x, correlated), f, up=up, padding=pads, gain=up * up)
    if down > 1 and one:
        return F.conv2d(upfirdn2d(x, f, down=down, padding=pads), correlated)
    if down > 1:
        return F.conv2d(upfirdn2d(x, f, padding=pads), correlated, stride=down)
    if x0 == x1 and y0 == y1 and min(pads) >= 0:
        return F.conv2d(x, correlated, padding=(y0, x0))
    return F.conv2d(F.pad(x, pads), correlated)


def demodulation(weight: Tensor, styles: Tensor, eps: float) -> Tensor:
    """1 / sqrt(sum_ik (s_ni w_oik)^2 + eps), (N, O), without a weight for each sample: a product of (N, I) and (I,
    O)."""
    with torch.autocast(weight.device.type, enabled=False):
        energy: Tensor = OP_ENERGY(weight)
        coefficients: Tensor = (styles.to(energy.dtype).square() @ energy.t() + eps).rsqrt()
        return coefficients


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    noise: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: Pair = 0,
    demodulate: bool = True,
    resample_filter: Tensor | None = None,
    flip_weight: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """The convolution of StyleGAN2: each sample scales the weight's input channels by its styles, and then each output
    channel to unit norm; upsampling, downsampling and noise with it.

    The activations are scaled by the styles, go through one convolution of the library with the shared weight, and are
    scaled by the demodulation coefficients (noise added in the same pass), which is the same numbers as a grouped
    convolution with a weight for each sample, and never writes those weights. This form is taken at every size: forward
    and backward together, it was measured on CPUs at many times the grouped form's speed for small images and batches,
    and near it from 64 x 64 on, where the convolution is nearly all there is. Differentiable to any order in x, weight,
    styles and noise.

    Args:
        x: (N, I, H, W) floating point, NCHW or channels_last.
        weight: (O, I, height, width).
        styles: (N, I), what multiplies the input channels of each sample.
        noise: added to the result: (H', W'), (1, 1, H', W') or (N, 1, H', W').
        up, down: resampling factors, integers.
        padding: of the upsampled image: an integer, (x, y) or (x0, x1, y0, y1); half the kernel's size keeps the
            image's.
        demodulate: scales each output channel of each sample to unit norm (equation 3).
        resample_filter: of :func:`setup_filter`, for ``up`` and ``down``; None for one tap.
        flip_weight: True for a correlation, as ``F.conv2d``; False for a convolution.
        eps: under the root of the norm.

    Returns:
        (N, O, H', W') in x's dtype (autocast's, where that is on). In float16 weight and styles are first divided by
        their largest values, as in NVlabs' code, so that neither they nor the sums overflow.

    Raises:
        TypeError: an argument that is no floating-point tensor.
        ValueError: shapes, factors, padding or devices that do not fit, or a filter that requires a gradient.

    Source: StyleGAN2 (arXiv:1912.04958, section 2.2, equations 1 to 3).

    Example:
        >>> import torch, genfast
        >>> x, weight, styles = torch.randn(2, 8, 16, 16), torch.randn(4, 8, 3, 3), torch.randn(2, 8)
        >>> genfast.ops.modulated_conv2d(x, weight, styles, padding=1).shape
        torch.Size([2, 4, 16, 16])
    """
    _check_all(x, weight, styles, noise, up, down, resample_filter)
    pads = parse_padding(padding, _NAME)
    if demodulate and _in_half(x):
        weight, styles = _normalized(weight, styles)
    z: Tensor = OP_SCALE(x, styles, None)
    y = _convolve(z, weight.to(x.dtype), resample_filter, up, down, pads, flip_weight)
    if noise is not None:
        given = noise
        noise = noise[None, None] if noise.dim() == 2 else noise
        shapes = ((1, 1, *y.shape[2:]), (y.shape[0], 1, *y.shape[2:]))
        if tuple(noise.shape) not in shapes:
            raise ValueError(
                f"{_NAME}: noise has shape {tuple(given.shape)}, expected {tuple(y.shape[2:])}, {shapes[0]} or "
                f"{shapes[1]}"
            )
    if demodulate:
        result: Tensor = OP_SCALE(y, demodulation(weight, styles, eps), noise)
        return result
    return y if noise is None else y + noise.to(y.dtype)
