"""ops.actnorm: y = s x + b per channel with its log-determinant."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._layout import Layout, describe, laid_out

_NAME = "actnorm"
_FIELDS = "is_double x scale bias y n c s channels_last log_scale inverse threads"
_CPU = kernels(
    "_cpu", actnorm=f"{_FIELDS} logdet", actnorm_backward=f"{_FIELDS} grad_y grad_logdet grad_scale grad_bias"
)


def check_channels(op: str, x: Tensor, scale: Tensor, bias: Tensor, channels: int | None = None) -> None:
    """x is (N, C, ...), scale and bias (C,); all floating point on one device."""
    _check.floating(op, x=x, scale=scale, bias=bias)
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, C, ...)")
    channels = x.shape[1] if channels is None else channels
    _check.shape(op, "scale", scale, (channels,), "one per channel")
    _check.shape(op, "bias", bias, (channels,), "one per channel")


def _check_forward(x: Tensor, scale: Tensor, bias: Tensor, *_: Any) -> None:
    check_channels(_NAME, x, scale, bias)


@functools.lru_cache(1024)
def _plan(
    xs: tuple[int, ...],
    x_stride: tuple[int, ...],
    dtype: torch.dtype,
    ss: tuple[int, ...],
    s_stride: tuple[int, ...],
    s_dtype: torch.dtype,
    bs: tuple[int, ...],
    b_stride: tuple[int, ...],
    b_dtype: torch.dtype,
    log_scale: bool,
    inverse: bool,
) -> tuple[Layout, Tensor, Any] | None:
    """x's layout, a pattern for logdet and the kernel; None where something must be checked, converted or copied
    first."""
    if (
        len(xs) < 2
        or not ss == bs == (xs[1],)
        or (xs[1] > 1 and not s_stride == b_stride == (1,))
        or not dtype == s_dtype == b_dtype
    ):
        return None
    a = describe(xs, x_stride)
    if not a.fits:
        return None
    kernel = _CPU.actnorm.prepare(
        is_double=dtype is torch.float64,
        x=a.strides,
        n=a.n,
        c=a.c,
        s=a.s,
        channels_last=a.walks_channels,
        log_scale=log_scale,
        inverse=inverse,
    )
    return a, torch.empty((), dtype=dtype).expand(a.n), kernel


def _cpu(x: Tensor, scale: Tensor, bias: Tensor, log_scale: bool, inverse: bool) -> tuple[Tensor, Tensor]:
    plan = _plan(
        x.shape,
        x.stride(),
        x.dtype,
        scale.shape,
        scale.stride(),
        scale.dtype,
        bias.shape,
        bias.stride(),
        bias.dtype,
        log_scale,
        inverse,
    )
    if plan is None:
        _check_forward(x, scale, bias)
        scale, bias = scale.to(x.dtype).contiguous(), bias.to(x.dtype).contiguous()
        return _cpu(laid_out(x)[0], scale, bias, log_scale, inverse)
    a, pattern, kernel = plan
    y, logdet = a.empty_like(x), torch.empty_like(pattern)
    kernel(x=x, scale=scale, bias=bias, y=y, logdet=logdet, threads=torch.get_num_threads())
    return y, logdet


def _cpu_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    log_scale: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype
    x, a = laid_out(x)
    dx = a.empty_like(x)
    s, b = scale.to(dtype).contiguous(), bias.to(dtype).contiguous()
    ds, db = torch.empty_like(s), torch.empty_like(b)
    grad_y, g = laid_out(torch.zeros_like(x) if grad_y is None else grad_y.to(dtype), a)
    grad_logdet = x.new_zeros(a.n) if grad_logdet is None else grad_logdet.to(dtype).contiguous()
    _CPU.actnorm_backward(
        is_double=dtype is torch.float64,
        x=a.view(x),
        grad_y=g.view(grad_y),
        grad_logdet=grad_logdet,
        scale=s,
        bias=b,
        y=dx,
        grad_scale=ds,
        grad_bias=db,
        n=a.n,
        c=a.c,
        s=a.s,
        channels_last=a.walks_channels,
        log_scale=log_scale,
        inverse=inverse,
        threads=torch.get_num_threads(),
    )
    return dx, ds.to(scale.dtype), db.to(bias.dtype)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for shape in ((3, 5, 4, 7), (6, 9)):
        x, s, b = (torch.randn(d, generator=generator, dtype=torch.float64) for d in (shape, shape[1:2], shape[1:2]))
        for inverse in (False, True):
            way = "inverse" if inverse else "forward"
            yield Sample(f"{way} {len(shape)}-D", (x, s.sign() * (s.abs() + 0.5), b, False, inverse))
            yield Sample(f"{way} {len(shape)}-D log_scale", (x, s, b, True, inverse))


OP = Op(
    "actnorm(Tensor x, Tensor scale, Tensor bias, bool log_scale, bool inverse)",
    reference=reference.actnorm,
    outputs={"y": "like x", "logdet": "(N,) like x as accumulator"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad_y, grad_logdet, x, scale, bias, *options -> x, scale, bias",
        reference=reference.actnorm_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def actnorm(
    x: Tensor, scale: Tensor, bias: Tensor, *, log_scale: bool = False, inverse: bool = False, shift_first: bool = False
) -> tuple[Tensor, Tensor]:
    """Activation normalisation: y = s x + b per channel, logdet = H W sum log|s|.

    OpenAI's Glow, rosinality/glow-pytorch, y0ast/Glow-PyTorch and chaiyujin/glow-pytorch shift first, y = s (x + b),
    with a b
    of the same shape: ``shift_first=True`` takes their parameters.

    Args:
        x: (N, C, ...) floating point.
        scale: (C,), s itself or, with ``log_scale``, log s (always positive then).
        bias: (C,).
        log_scale: how ``scale`` is to be read.
        inverse: computes x = (y - b) / s and the negated log-determinant.
        shift_first: y = s (x + b) and x = y / s - b, at one more pass over x. Where x lies far from zero this form is
            the
            one whose bias does not round: the other's b is as large as s x.

    Returns:
        (y, logdet): y like x; logdet (N,), float32 for half-precision x.

    A zero in ``scale`` gives logdet = -inf, and an inverse that is not finite.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.

    Source: Glow (arXiv:1807.03039, section 3.1).

    Example:
        >>> import torch, genfast
        >>> x = torch.randn(2, 3, 8, 8)
        >>> y, logdet = genfast.ops.actnorm(x, torch.full((3,), 2.0), torch.zeros(3))
    """
    if not shift_first:
        result: tuple[Tensor, Tensor] = OP(x, scale, bias, log_scale, inverse)
        return result
    _check_forward(x, scale, bias)
    shift = bias.to(torch.promote_types(x.dtype, bias.dtype)).reshape(-1, *[1] * (x.dim() - 2))
    none = torch.zeros_like(scale)
    if inverse:
        y, logdet = OP(x, scale, none, log_scale, True)
        return (y - shift).to(x.dtype), logdet
    y, logdet = OP((x + shift).to(x.dtype), scale, none, log_scale, False)
    return y, logdet
