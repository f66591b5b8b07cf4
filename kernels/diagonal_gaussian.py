"""The diagonal Gaussian of a variational autoencoder (Kingma and Welling 1312.6114, section 2.4 and appendix B).

    z = mu + sigma noise,   KL = 1/2 sum_d (e^t - 1 - t) + (mu - nu)^2 / tau^2,   t = log sigma^2 - log tau^2
    backward  g = g_kl[n] + g_dimension[d]:  d mu = g (mu - nu) / tau^2 + g_z,  d nu = -g (mu - nu) / tau^2,
              d log sigma^2 = 1/2 (g (e^t - 1) + g_z noise sigma),  d noise = g_z sigma,
              d log tau^2 = -1/2 g ((e^t - 1) + (mu - nu)^2 / tau^2)

All (N, D) with D the whole sample. Fused: both exponentials, the sample, the KL and its sums over rows and, on request,
columns. Without a prior 16 bytes an element in float32 forward, 24 backward; about 30 and 40 FLOPs. Bound by memory
bandwidth, for latents of the usual size by the launch. e^t - 1 - t is t^2 times a polynomial where |t| < ln2 / 2, where
it would cancel. A program takes a tile of rows and columns; its sums are one partial a row and one a column, added in
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format
from ._common import Aot, cdiv, options, tiles_choice, variant
from .interpolate import Rows, rows

# Of a tile its elements and those of a thread.
TUNABLE = {way: tiles_choice() for way in ("forward", "backward")}


@triton.jit
def _excess(t):
    """e^t - 1 and e^t - 1 - t, infinite where e^t is."""
    p = t * 1.9875691500e-4 + 1.3981999507e-3
    p = p * t + 8.3334519073e-3
    p = p * t + 4.1665795894e-2
    p = p * t + 1.6666665459e-1
    p = p * t + 5.0000001201e-1
    small = tl.abs(t) < 0.34657359
    e = tl.exp(t)
    # A square that overflows would be taken times zero by neither branch: the series is chosen near zero alone.
    series = tl.where(small, p * t * t, 0.0)
    beyond = tl.where(e == float("inf"), e, e - 1 - t)
    return tl.where(small, series + t, e - 1), tl.where(small, series, beyond)


@triton.jit
def _place(N, D, tiles, FAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """This program's rows (a column), elements (a row), and which of them there are."""
    n = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i = (tl.program_id(0) % tiles) * BLOCK_D + tl.arange(0, BLOCK_D)
    if FAR:
        i = i.to(tl.int64)
    return n, i, (n < N)[:, None] & (i < D)[None, :]


@triton.jit
def _forward(
    mean,
    log_variance,
    noise,
    prior_mean,
    prior_log_variance,
    z,
    partial,
    columns,
    mn,
    vn,
    en,
    pn,
    qn,
    N,
    D,
    tiles,
    NOISE: tl.constexpr,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_VARIANCE: tl.constexpr,
    COLUMNS: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n, i, there = _place(N, D, tiles, FAR, BLOCK_N, BLOCK_D)
    at, element = n[:, None], i[None, :]
    m = tl.load(mean + at * mn + element, mask=there, other=0).to(tl.float32)
    v = tl.load(log_variance + at * vn + element, mask=there, other=0).to(tl.float32)
    if NOISE:
        e = tl.load(noise + at * en + element, mask=there, other=0).to(tl.float32)
        tl.store(z + at * D + element, (m + tl.exp(0.5 * v) * e).to(z.dtype.element_ty), mask=there)
    if PRIOR_MEAN:
        m -= tl.load(prior_mean + at * pn + element, mask=there, other=0).to(tl.float32)
    square = m * m
    if PRIOR_VARIANCE:
        q = tl.load(prior_log_variance + at * qn + element, mask=there, other=0).to(tl.float32)
        v -= q
        square *= tl.exp(-q)
    _, kl = _excess(v)
    kl = 0.5 * (kl + square)  # zero beyond the edges
    tl.store(partial + n * tiles + tl.program_id(0) % tiles, tl.sum(kl, axis=1), mask=n < N)
    if COLUMNS:
        block = (tl.program_id(0) // tiles).to(tl.int64)
        tl.store(columns + block * D + i, tl.sum(kl, axis=0), mask=i < D)


@triton.jit
def _backward(
    mean,
    log_variance,
    noise,
    prior_mean,
    prior_log_variance,
    grad_kl,
    grad_dimension,
    grad_z,
    dmean,
    dlog_variance,
    dnoise,
    dprior_mean,
    dprior_log_variance,
    mn,
    vn,
    en,
    pn,
    qn,
    zn,
    N,
    D,
    tiles,
    PRIOR_MEAN: tl.constexpr,
    PRIOR_VARIANCE: tl.constexpr,
    KL: tl.constexpr,
    DIMENSION: tl.constexpr,
    SAMPLE: tl.constexpr,
    WANTED: tl.constexpr,
    FAR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """WANTED: one bit for each of the five gradients, mean's lowest."""
    n, i, there = _place(N, D, tiles, FAR, BLOCK_N, BLOCK_D)
    at, element = n[:, None], i[None, :]
    v = tl.load(log_variance + at * vn + element, mask=there, other=0).to(tl.float32)
    by_mean = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    by_t = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    square = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    if KL or DIMENSION:
        g = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        if KL:
            g += tl.load(grad_kl + n, mask=n < N, other=0).to(tl.float32)[:, None]
        if DIMENSION:
            g += tl.load(grad_dimension + i, mask=i < D, other=0).to(tl.float32)[None, :]
        delta = tl.load(mean + at * mn + element, mask=there, other=0).to(tl.float32)
        t = v
        if PRIOR_MEAN:
            delta -= tl.load(prior_mean + at * pn + element, mask=there, other=0).to(tl.float32)
        by_mean = g * delta
        if PRIOR_VARIANCE:
            q = tl.load(prior_log_variance + at * qn + element, mask=there, other=0).to(tl.float32)
            t = v - q
            by_mean *= tl.exp(-q)
        square = by_mean * delta
        minus_one, _ = _excess(t)
        by_t = g * minus_one
    if WANTED & 8:
        tl.store(dprior_mean + at * D + element, (-by_mean).to(dprior_mean.dtype.element_ty), mask=there)
    if WANTED & 16:
        found = (-0.5 * (by_t + square)).to(dprior_log_variance.dtype.element_ty)
        tl.store(dprior_log_variance + at * D + element, found, mask=there)
    pull = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    if SAMPLE:
        gz = tl.load(grad_z + at * zn + element, mask=there, other=0).to(tl.float32)
        e = tl.load(noise + at * en + element, mask=there, other=0).to(tl.float32)
        pull = gz * tl.exp(0.5 * v)
        by_mean += gz
        by_t += pull * e
    if WANTED & 1:
        tl.store(dmean + at * D + element, by_mean.to(dmean.dtype.element_ty), mask=there)
    if WANTED & 2:
        tl.store(dlog_variance + at * D + element, (0.5 * by_t).to(dlog_variance.dtype.element_ty), mask=there)
    if WANTED & 4:
        tl.store(dnoise + at * D + element, pull.to(dnoise.dtype.element_ty), mask=there)


def _tile(n: int, size: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most ``elements``."""
    columns = min(elements, triton.next_power_of_2(size))
    return min(elements // columns, triton.next_power_of_2(n)), columns


def _options(elements: int, far: bool, each: int = 8) -> dict[str, int]:
    """Of a launch: with 64-bit addresses of up to eleven tensors it takes more registers than elsewhere."""
    return options(elements, far, each=each) | ({"maxnreg": 232} if far else {})


def _laid(form: torch.memory_format, *given: Tensor | None) -> tuple[list[Any], list[int]]:
    """Each tensor's data in the order ``form`` and its stride; 0 where there is none."""
    found: list[Rows | None] = [None if t is None else rows(t, form) for t in given]
    return [None if r is None else r.data for r in found], [0 if r is None else r.stride for r in found]


def diagonal_gaussian(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    per_dimension: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kl, by_dimension, z) of genfast::diagonal_gaussian."""
    form = memory_format(mean)
    z = mean.new_empty(0) if noise is None else torch.empty_like(mean, memory_format=form)
    zeros: dict[str, Any] = dict(dtype=torch.float32, device=mean.device)
    if not mean.numel():
        return torch.zeros(mean.shape[0], **zeros), torch.zeros(mean.shape[1:] if per_dimension else 0, **zeros), z
    n, size = mean.shape[0], mean[0].numel()
    data, strides = _laid(form, mean, log_variance, noise, prior_mean, prior_log_variance)
    choice = TUNABLE["forward"].of(mean.element_size())
    block_n, block_d = _tile(n, size, choice["tile"])
    tiles, blocks = cdiv(size, block_d), cdiv(n, block_n)
    partial = torch.empty((n, tiles), **zeros)
    columns = torch.empty((blocks, *mean.shape[1:]) if per_dimension else 0, **zeros)
    if per_dimension and columns.dim() > 2:
        columns = torch.empty_like(columns, memory_format=form)
    far = size >= 2**31 - 2**16  # no tile is as large
    _forward[(blocks * tiles,)](
        *(mean if t is None else t for t in data),
        z,
        partial,
        columns,
        *strides,
        n,
        size,
        tiles,
        NOISE=noise is not None,
        PRIOR_MEAN=prior_mean is not None,
        PRIOR_VARIANCE=prior_log_variance is not None,
        COLUMNS=per_dimension,
        FAR=far,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        **_options(block_n * block_d, far, choice["each"]),
    )
    return partial.sum(1), columns.sum(0).contiguous() if per_dimension else columns, z


def diagonal_gaussian_backward(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    grad_kl: Tensor | None,
    grad_dimension: Tensor | None,
    grad_z: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of genfast::diagonal_gaussian_backward, empty where not wanted."""
    form = memory_format(mean)
    given = (mean, log_variance, noise, prior_mean, prior_log_variance)
    found = [
        torch.empty_like(mean, dtype=t.dtype, memory_format=form) if t is not None and w else mean.new_empty(0)
        for t, w in zip(given, wanted)
    ]
    if mean.numel():
        n, size = mean.shape[0], mean[0].numel()
        data, strides = _laid(form, *given, grad_z)
        if grad_dimension is not None:
            own = form if mean.dim() > 2 else torch.contiguous_format
            grad_dimension = grad_dimension.unsqueeze(0).contiguous(memory_format=own)
        choice = TUNABLE["backward"].of(mean.element_size())
        block_n, block_d = _tile(n, size, choice["tile"])
        tiles = cdiv(size, block_d)
        far = size >= 2**31 - 2**16
        pointers = [mean if t is None else t for t in data]
        _backward[(cdiv(n, block_n) * tiles,)](
            *pointers[:5],
            mean if grad_kl is None else grad_kl.contiguous(),
            mean if grad_dimension is None else grad_dimension,
            pointers[5],
            *found,
            *strides,
            n,
            size,
            tiles,
            PRIOR_MEAN=prior_mean is not None,
            PRIOR_VARIANCE=prior_log_variance is not None,
            KL=grad_kl is not None,
            DIMENSION=grad_dimension is not None,
            SAMPLE=grad_z is not None and noise is not None,
            WANTED=sum(1 << k for k, (t, w) in enumerate(zip(given, wanted)) if t is not None and w),
            FAR=far,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
            **_options(block_n * block_d, far, choice["each"]),
        )
    return found[0], found[1], found[2], found[3], found[4]


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        width = int(kind[2:]) // 8
        own = ("mean", "log_variance", "noise", "prior_mean", "prior_log_variance")
        types = dict.fromkeys((*own, *(f"d{name}" for name in own), "z", "grad_z"), f"*{kind}")
        types |= dict.fromkeys(("partial", "columns", "grad_kl", "grad_dimension"), "*fp32")

        def add(
            label: str,
            kernel: Any,
            ones: tuple[str, ...] | None,
            types: dict[str, str] = types,
            width: int = width,
            **constants: Any,
        ) -> None:
            named = {name: types[name] for name in kernel.arg_names if name in types}
            choice = TUNABLE[kernel.fn.__name__[1:]].of(width)
            size, far = choice["tile"], constants["FAR"]
            constants |= dict(BLOCK_N=1, BLOCK_D=size) if far else dict(BLOCK_N=size // 32, BLOCK_D=32)
            found.append(variant(label, kernel, named, constants, ones, **_options(size, far, choice["each"])))

        for far in (False, True):
            label = f"{' far' if far else ''} {kind}"
            base: dict[str, Any] = dict(FAR=far)
            ones = None if far else ("tiles",)
            whole: dict[str, Any] = dict(PRIOR_MEAN=True, PRIOR_VARIANCE=True)
            none: dict[str, Any] = dict(PRIOR_MEAN=False, PRIOR_VARIANCE=False)
            add(f"standard prior{label}", _forward, ones, NOISE=True, COLUMNS=False, **none, **base)
            add(f"prior, per dimension{label}", _forward, ones, NOISE=True, COLUMNS=True, **whole, **base)
            add(
                f"standard prior{label}",
                _backward,
                ones,
                KL=True,
                DIMENSION=False,
                SAMPLE=True,
                WANTED=3,
                **none,
                **base,
            )
            add(
                f"all gradients{label}",
                _backward,
                ones,
                KL=True,
                DIMENSION=True,
                SAMPLE=True,
                WANTED=31,
                **whole,
                **base,
            )
    return found


AOT = _variants()
