"""ops.affine_coupling: y_a = s(r) x_a + t with its log-determinant, in one pass each way."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from .._tensors import accumulator
from ..reference.affine_coupling import LAYOUTS, SCALES
from . import _check
from ._layout import Layout, aligned, describe, laid_out

_NAME = "affine_coupling"
_FIELDS = """
    is_double x params y alpha mask n c s width r_offset t_offset step scale last inverse channels_last shift_first
    threads
"""
_CPU = kernels(
    "_cpu",
    affine_coupling=f"{_FIELDS} logdet",
    affine_coupling_backward=f"{_FIELDS} grad_y params_out grad_logdet grad_alpha keep_output",
)
_SCALE_CODE = {name: code for code, name in enumerate(SCALES)}


@functools.cache
def _offsets(layout: str, width: int) -> tuple[int, int, int]:
    """Channel of r_0, channel of t_0, and the step between channels, in ``params``."""
    step = 2 if layout.endswith("interleaved") else 1
    second = 1 if step == 2 else width
    return (0, second, step) if layout.startswith("scale") else (second, 0, step)


def _check_shapes(xs: tuple[int, ...], ps: tuple[int, ...], scale: str, layout: str) -> int:
    """C', or an error."""
    _check.choice(_NAME, "scale", scale, SCALES)
    _check.choice(_NAME, "layout", layout, LAYOUTS)
    if len(xs) < 2:
        raise ValueError(f"{_NAME}: x has shape {tuple(xs)}, expected (N, C, ...)")
    per_channel = 1 if scale == "additive" else 2
    width = ps[1] // per_channel if len(ps) > 1 else 0
    if len(ps) != len(xs) or ps[0] != xs[0] or ps[2:] != xs[2:] or ps[1] % per_channel or not 0 < width <= xs[1]:
        form = f"(N, {'' if per_channel == 1 else 2}C', ...)"
        raise ValueError(
            f"{_NAME}: params has shape {tuple(ps)} and x {tuple(xs)}; expected params {form} with x's batch and "
            f"positions and 1 <= C' <= {xs[1]}"
        )
    return width


def _check_forward(
    x: Tensor, params: Tensor, alpha: Tensor | None, mask: Tensor | None, scale: str, layout: str, *_: Any
) -> None:
    _check.floating(_NAME, x=x, params=params, alpha=alpha)
    width = _check_shapes(x.shape, params.shape, scale, layout)
    _check_options(x, width, alpha, mask, scale)


def _check_options(x: Tensor, width: int, alpha: Tensor | None, mask: Tensor | None, scale: str) -> None:
    if alpha is not None:
        _check.floating(_NAME, x=x, alpha=alpha)
        if scale != "tanh":
            raise ValueError(f'{_NAME}: alpha goes with scale="tanh", not with scale={scale!r}')
        if alpha.dim() != 1 or alpha.shape[0] not in (1, width):
            raise ValueError(f"{_NAME}: alpha has shape {tuple(alpha.shape)}, expected (1,) or ({width},)")
    if mask is not None:
        _check_mask(mask, x, width)


def _check_mask(mask: Tensor, x: Tensor, width: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{_NAME}: mask has dtype {mask.dtype}, expected torch.bool (True: passed through)")
    if mask.device != x.device:
        raise ValueError(f"{_NAME}: mask is on {mask.device} and x on {x.device}; move both to one device")
    if width != x.shape[1]:
        raise ValueError(
            f"{_NAME}: with a mask params transforms every channel: expected C'={x.shape[1]}, got C'={width}"
        )
    if mask.dim() != x.dim() - 1 or any(m not in (1, s) for m, s in zip(mask.shape, x.shape[1:])):
        raise ValueError(
            f"{_NAME}: mask has shape {tuple(mask.shape)}, expected one that broadcasts to {tuple(x.shape[1:])} "
            "(x without its batch axis)"
        )


def _mask_bytes(mask: Tensor, x: Tensor, form: Layout) -> Tensor:
    """The mask over (C, S) in x's own order, one byte each."""
    full = mask.expand(x.shape[1:])
    return full.movedim(0, -1).contiguous() if form.walks_channels else full.contiguous()


class _Plan(NamedTuple):
    """All that a call needs but its pointers; cached, since a training run asks the same again and again."""

    small: bool  # torch.empty_like gives the output
    layout: Layout
    logdet: Tensor  # of the right shape and dtype, for empty_like
    width: int
    kernel: Any


@functools.lru_cache(1024)
def _plan(
    xs: tuple[int, ...],
    x_stride: tuple[int, ...],
    dtype: torch.dtype,
    ps: tuple[int, ...],
    p_stride: tuple[int, ...],
    p_dtype: torch.dtype,
    scale: str,
    layout: str,
    last: bool,
    inverse: bool,
    shift_first: bool,
) -> _Plan | None:
    """None where a copy must be made first. Raises for shapes and options that do not fit."""
    width = _check_shapes(xs, ps, scale, layout)
    a = describe(xs, x_stride)
    b = aligned(describe(ps, p_stride), a)
    if not a.fits or b is None or p_dtype is not dtype:
        return None
    r_offset, t_offset, step = _offsets(layout, width)
    kernel = _CPU.affine_coupling.prepare(
        is_double=dtype is torch.float64,
        x=a.strides,
        params=b.strides,
        n=a.n,
        c=a.c,
        s=a.s,
        width=width,
        r_offset=r_offset,
        t_offset=t_offset,
        step=step,
        scale=_SCALE_CODE[scale],
        last=last,
        inverse=inverse,
        channels_last=a.walks_channels,
        shift_first=shift_first,
    )
    return _Plan(a.small, a, torch.empty((), dtype=dtype).expand(a.n), width, kernel)


def _cpu(
    x: Tensor,
    params: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    scale: str,
    layout: str,
    last: bool,
    inverse: bool,
    keep_output: bool,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    plan = _plan(
        x.shape,
        x.stride(),
        dtype,
        params.shape,
        params.stride(),
        params.dtype,
        scale,
        layout,
        last,
        inverse,
        shift_first,
    )
    if plan is None:
        _check.floating(_NAME, x=x, params=params)
        x, a = laid_out(x)
        params = laid_out(params.to(dtype), a)[0]
        return _cpu(x, params, alpha, mask, scale, layout, last, inverse, keep_output, shift_first)
    small, form, pattern, width, kernel = plan
    if alpha is not None or mask is not None:
        _check_options(x, width, alpha, mask, scale)
        alpha = None if alpha is None else alpha.to(dtype).expand(width).contiguous()
        mask = None if mask is None else _mask_bytes(mask, x, form)
    y = torch.empty_like(x) if small else form.empty_like(x)
    logdet = torch.empty_like(pattern)
    kernel(x=x, params=params, y=y, logdet=logdet, alpha=alpha, mask=mask, threads=torch.get_num_threads())
    return y, logdet


def _cpu_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    kept: Tensor,
    params: Tensor,
    alpha: Tensor | None,
    mask: Tensor | None,
    scale: str,
    layout: str,
    last: bool,
    inverse: bool,
    keep_output: bool,
    shift_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, given = kept.dtype, params
    kept, a = laid_out(kept)
    dx = a.empty_like(kept)
    grad_y = torch.zeros_like(kept) if grad_y is None else grad_y.to(dtype)
    grad_logdet = kept.new_zeros(a.n) if grad_logdet is None else grad_logdet.to(dtype).contiguous()
    params, b = laid_out(params.to(dtype), a)
    dparams = b.empty_like(params)
    grad_y, g = laid_out(grad_y, a)
    width = b.c if scale == "additive" else b.c // 2
    full = None if alpha is None else alpha.to(dtype).expand(width).contiguous()
    partial = None if alpha is None else kept.new_empty((a.n, width))  # reduced below, in a fixed order
    if mask is not None:
        mask = _mask_bytes(mask, kept, a)
    r_offset, t_offset, step = _offsets(layout, width)
    _CPU.affine_coupling_backward(
        is_double=dtype is torch.float64,
        x=a.view(kept),
        grad_y=g.view(grad_y),
        grad_logdet=grad_logdet,
        params=b.view(params),
        y=dx,
        params_out=dparams,
        alpha=full,
        grad_alpha=partial,
        mask=mask,
        n=a.n,
        c=a.c,
        s=a.s,
        width=width,
        r_offset=r_offset,
        t_offset=t_offset,
        step=step,
        scale=_SCALE_CODE[scale],
        last=last,
        inverse=inverse,
        keep_output=keep_output,
        channels_last=a.walks_channels,
        shift_first=shift_first,
        threads=torch.get_num_threads(),
    )
    if alpha is None or partial is None:
        return dx, dparams.to(given.dtype), kept.new_empty(0)
    total = partial.sum(0)
    dalpha = total if alpha.shape[0] == width else total.sum().reshape(1)
    return dx, dparams.to(given.dtype), dalpha.to(alpha.dtype)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for scale in SCALES:
        k = 1 if scale == "additive" else 2
        alpha = rand(3) if scale == "tanh" else None
        for inverse in (False, True):
            for output in (False, True):
                label = f"{scale}{' inverse' if inverse else ''} saves {'output' if output else 'input'}"
                args = (
                    rand(3, 6, 5, 7),
                    rand(3, 3 * k, 5, 7),
                    alpha,
                    None,
                    scale,
                    "scale_shift",
                    False,
                    inverse,
                    output,
                )
                yield Sample(label, args)
    for scale in ("sigmoid", "tanh"):
        alpha = rand(3) if scale == "tanh" else None
        for inverse in (False, True):
            for output in (False, True):
                label = f"{scale} shift first{' inverse' if inverse else ''} saves {'output' if output else 'input'}"
                first = (
                    rand(3, 6, 5, 7),
                    rand(3, 6, 5, 7),
                    alpha,
                    None,
                    scale,
                    "scale_shift",
                    False,
                    inverse,
                    output,
                    True,
                )
                yield Sample(label, first)
    board = (torch.arange(5)[:, None] + torch.arange(7)) % 2 == 0
    yield Sample(
        "exp checkerboard",
        (rand(3, 4, 5, 7), rand(3, 8, 5, 7), None, board[None], "exp", LAYOUTS[2], False, False, False),
    )
    yield Sample("sigmoid vectors", (rand(9, 5), rand(9, 4), None, None, "sigmoid", LAYOUTS[3], True, False, True))


OP = Op(
    "affine_coupling(Tensor x, Tensor params, Tensor? alpha, Tensor? mask, str scale, str layout, bool last, "
    "bool inverse, bool keep_output, bool shift_first=False)",
    reference=reference.affine_coupling,
    outputs={"y": "like x", "logdet": "(N,) like x as accumulator"},
    argument_dtypes={"mask": (torch.bool,)},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad_y, grad_logdet, kept, params, alpha, mask, *options -> x, params, alpha",
        saved={"kept": "y if keep_output else x"},
        outputs={"x": "like kept", "params": "like params in the order of kept"},
        reference=reference.affine_coupling_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def affine_coupling(
    x: Tensor,
    params: Tensor,
    *,
    scale: Literal["exp", "sigmoid", "tanh", "softclamp", "additive"] = "exp",
    mask: Tensor | None = None,
    inverse: bool = False,
    alpha: Tensor | float | None = None,
    layout: Literal["scale_shift", "shift_scale", "scale_shift_interleaved", "shift_scale_interleaved"] = "scale_shift",
    transform: Literal["first", "last"] = "first",
    save_for_backward: Literal["input", "output"] = "input",
    shift_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """Affine coupling with its log-determinant: y_a = s(r) x_a + t, y_b = x_b, in one pass.

    Published codes scale first, as here and in the papers, or shift first, y_a = s(r) (x_a + t). Both take the same
    tensors and give the same logdet, so weights of the one run under the other without an error and are another
    function: pass ``shift_first=True`` for those of OpenAI's Glow, rosinality/glow-pytorch, y0ast/Glow-PyTorch,
        chaiyujin/glow-pytorch and
    chrischute/real-nvp (``scale="tanh"``, whose inverse is y / s - t).

    Args:
        x: (N, C, ...) floating point; NCHW, channels_last or vectors (N, C).
        params: (N, 2C', ...) as the conditioner network emits them, or (N, C', ...) for
            ``scale="additive"``; C' <= C channels are transformed, and C' = C with a mask.
        scale: the scale map s(r): "exp" e^r (RealNVP), "sigmoid" sigmoid(r + 2) (Glow), "tanh"
            e^(alpha tanh r), "softclamp" log s = r / (1 + |r| / log 1000), "additive" s = 1 (NICE).
        mask: boolean, broadcastable to x.shape[1:]; True is passed through unchanged (RealNVP's b),
            and the parameters there are ignored whatever they hold.
        inverse: computes x_a = (y_a - t) / s and the negated log-determinant.
        alpha: for "tanh" only: a float, or a tensor (1,) or (C',), which may be learned.
        layout: where r ("scale") and t ("shift") stand among the channels of ``params``.
        transform: whether the "first" or the "last" C' channels are x_a.
        save_for_backward: what the backward recomputes from. "input" costs no memory when the conditioner keeps
            x anyway (a view of it), "output" when the next layer keeps y. Nothing else is saved
            but ``params``.
        shift_first: y_a = s (x_a + t) and x_a = y_a / s - t. On a GPU plain PyTorch computes it.

    Returns:
        (y, logdet): y like x; logdet (N,), sum of log s, in float32 for half-precision x.

    A non-finite parameter at a transformed position gives a non-finite y and logdet for that sample
    alone; e^r that overflows gives infinity, as in eager PyTorch.

    Raises:
        TypeError: integer x or params, or a mask that is not boolean.
        ValueError: shapes, devices or options that do not fit; the message names the argument.

    Source: NICE (arXiv:1410.8516, section 3.2), RealNVP (arXiv:1605.08803, equations 6 to 9), Glow
    (arXiv:1807.03039, table 1).

    Example:
        >>> import torch, genfast
        >>> x, params = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
        >>> y, logdet = genfast.ops.affine_coupling(x, params, scale="sigmoid")
    """
    last, keep_output = transform != "first", save_for_backward != "input"
    if last:
        _check.choice(_NAME, "transform", transform, ("first", "last"))
    if keep_output:
        _check.choice(_NAME, "save_for_backward", save_for_backward, ("input", "output"))
    if alpha is not None and not isinstance(alpha, Tensor):
        alpha = torch.full((1,), float(alpha), dtype=accumulator(x.dtype), device=x.device)  # no copy from the host
    result: tuple[Tensor, Tensor] = OP(
        x, params, alpha, mask, scale, layout, last, inverse, keep_output, bool(shift_first)
    )
    return result
