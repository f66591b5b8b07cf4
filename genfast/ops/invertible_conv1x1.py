"""ops.invertible_conv1x1 and the fused step ops.actnorm_conv1x1: y = W (s x + b) per position, one pass."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from .. import _backend, reference
from .._derived import readable_now
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._layout import Layout, describe, laid_out
from .actnorm import check_channels

_MIX = "is_double x x_b first n c s channels_last threads"
_PLU = "log_scale perm lower upper sign_s log_s scale bias c batch positions"
_PLU_BACKWARD = f"{_PLU} grad_weight grad_folded grad_logdet grad_lower grad_upper grad_log_s grad_scale grad_bias"
_CPU = kernels(
    "_cpu",
    channel_mix=f"{_MIX} split weight bias transposed y y_b",
    channel_mix_weight_grad=f"{_MIX} split grad grad_b grad_weight grad_bias",
    plu_weight=f"is_double {_PLU} weight folded logdet",
    plu_weight_backward=f"is_double {_PLU_BACKWARD}",
)
_CUDA = kernels(
    "_cuda",
    plu_weight=f"stream {_PLU} weight folded logdet",
    plu_weight_backward=f"stream {_PLU_BACKWARD} workspace inverse_perm",
)
_CUDA_DTYPES = _backend.DTYPES | {"cuda": (torch.float32,)}


class PLU(NamedTuple):
    """W = P L (U + diag(sign e^log_s)), Glow's equation 10; only the strict triangles are read.

    perm (C,) int64: row i of P M is row perm[i] of M. lower, upper (C, C). sign_s, log_s (C,).
    """

    perm: Tensor
    lower: Tensor
    upper: Tensor
    sign_s: Tensor
    log_s: Tensor


# ---- channel_mix: the product over positions ----


def _check_mix(x: Tensor, x_b: Tensor | None, weight: Tensor, bias: Tensor | None, split: int) -> None:
    op = "invertible_conv1x1"
    _check.floating(op, x=x, x_b=x_b, weight=weight, bias=bias)
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, C, ...)")
    channels = x.shape[1]
    if x_b is not None:
        if x_b.dim() != x.dim() or x_b.shape[0] != x.shape[0] or x_b.shape[2:] != x.shape[2:]:
            raise ValueError(
                f"{op}: the second half of x has shape {tuple(x_b.shape)}, the first {tuple(x.shape)}; expected the "
                "same batch and positions"
            )
        if x_b.dtype != x.dtype:
            raise TypeError(f"{op}: the halves of x have dtypes {x.dtype} and {x_b.dtype}, expected one")
        channels += x_b.shape[1]
    _check.shape(op, "weight", weight, (channels, channels), "square in the channels of x")
    if bias is not None:
        _check.shape(op, "bias", bias, (channels,), "one per channel")
    if not 0 < split <= channels:
        raise ValueError(f"{op}: split={split}, expected 1 to {channels}")


def _check_mix_backward(
    grad_y: Tensor | None, grad_y_b: Tensor | None, x: Tensor, x_b: Tensor | None, weight: Tensor, split: int
) -> None:
    _check_mix(x, x_b, weight, None, split)
    first, second = ((x.shape[0], count, *x.shape[2:]) for count in (split, weight.shape[0] - split))
    _check.shapes(
        "channel_mix_backward",
        grad_y=(grad_y, first, "that of the first half of the output"),
        grad_y_b=(grad_y_b, second, "that of the second half of the output"),
    )


def _like(x: Tensor, a: Layout, channels: int) -> Tensor:
    """An uninitialised tensor of x's batch and positions and so many channels, in the order of ``a``."""
    if channels == a.c:
        return a.empty_like(x)
    shape = (a.n, channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, memory_format=a.form)


@functools.lru_cache(1024)
def _mix_plan(
    xs: tuple[int, ...],
    x_stride: tuple[int, ...],
    dtype: torch.dtype,
    ws: tuple[int, ...],
    w_stride: tuple[int, ...],
    w_dtype: torch.dtype,
    split: int,
) -> tuple[Layout, Tensor, Any] | None:
    """For the plainest call, one tensor in, one out, no bias: x's layout, an empty half and the kernel. Else None."""
    if len(xs) < 2 or xs[1] != split or ws != (split, split) or w_stride != (split, 1) or w_dtype != dtype:
        return None
    a = describe(xs, x_stride)
    if not a.fits:
        return None
    kernel = _CPU.channel_mix.prepare(
        is_double=dtype is torch.float64,
        x=a.strides,
        first=split,
        x_b=None,
        transposed=False,
        bias=None,
        y_b=None,
        n=a.n,
        c=split,
        s=a.s,
        split=split,
        channels_last=a.walks_channels,
    )
    return a, torch.empty((xs[0], 0, *xs[2:]), dtype=dtype), kernel


def _cpu_mix(x: Tensor, x_b: Tensor | None, weight: Tensor, bias: Tensor | None, split: int) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    plan = second = None
    if x_b is None and bias is None:
        plan = _mix_plan(x.shape, x.stride(), dtype, weight.shape, weight.stride(), weight.dtype, split)
    if plan is not None:
        a, none, kernel = plan
        y = a.empty_like(x)
        kernel(x=x, weight=weight, y=y, threads=torch.get_num_threads())
        return y, torch.empty_like(none)
    _check_mix(x, x_b, weight, bias, split)
    x, a = laid_out(x)
    weight = weight.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    if x_b is not None:
        x_b, b = laid_out(x_b, a)
        second = b.view(x_b)
    channels = weight.shape[0]
    y, y_b = _like(x, a, split), _like(x, a, channels - split)
    _CPU.channel_mix(
        is_double=dtype is torch.float64,
        x=a.view(x),
        first=a.c,
        x_b=second,
        weight=weight,
        transposed=False,
        bias=bias,
        y=y,
        y_b=y_b,
        n=a.n,
        c=channels,
        s=a.s,
        split=split,
        channels_last=a.walks_channels,
        threads=torch.get_num_threads(),
    )
    return y, y_b


def _cpu_mix_backward(
    grad_y: Tensor | None, grad_y_b: Tensor | None, x: Tensor, x_b: Tensor | None, weight: Tensor, split: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, channels = x.dtype, weight.shape[0]
    x, a = laid_out(x)
    dx, dx_b = a.empty_like(x), _like(x, a, channels - a.c)
    w = weight.to(dtype).contiguous()
    dweight, dbias = torch.empty_like(w), w.new_empty(channels)
    second = grad_second = None
    if x_b is not None:
        x_b, b = laid_out(x_b, a)
        second = b.view(x_b)
    grad_y, g = laid_out(_like(x, a, split).zero_() if grad_y is None else grad_y.to(dtype), a)
    if split < channels:
        grad_y_b = _like(x, a, channels - split).zero_() if grad_y_b is None else grad_y_b.to(dtype)
        grad_y_b, h = laid_out(grad_y_b, a)
        grad_second = h.view(grad_y_b)
    threads = torch.get_num_threads()
    _CPU.channel_mix(
        is_double=dtype is torch.float64,
        x=g.view(grad_y),
        first=split,
        x_b=grad_second,
        weight=w,
        transposed=True,
        bias=None,
        y=dx,
        y_b=dx_b,
        n=a.n,
        c=channels,
        s=a.s,
        split=a.c,
        channels_last=a.walks_channels,
        threads=threads,
    )
    _CPU.channel_mix_weight_grad(
        is_double=dtype is torch.float64,
        grad=g.view(grad_y),
        split=split,
        grad_b=grad_second,
        x=a.view(x),
        first=a.c,
        x_b=second,
        grad_weight=dweight,
        grad_bias=dbias,
        n=a.n,
        c=channels,
        s=a.s,
        channels_last=a.walks_channels,
        threads=threads,
    )
    return dx, dx_b, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _mix_backward(ctx: Any, grad_y: Tensor | None, grad_y_b: Tensor | None) -> tuple[Any, ...]:
    (x, x_b, weight), (split,) = ctx.saved_tensors, ctx.options
    if grad_y is None and grad_y_b is None:
        return (None,) * 5
    # Where nothing is split off, the second half is empty, and an empty argument would run the reference.
    halves = (None if g is None or not g.shape[1] else g for g in (grad_y, grad_y_b))
    dx, dx_b, dweight, dbias = MIX_BACKWARD(*halves, x, x_b, weight, split)
    return dx, None if x_b is None else dx_b, dweight, dbias if ctx.needs_input_grad[3] else None, None


def _mix_samples(generator: torch.Generator) -> Iterator[Sample]:
    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    yield Sample("12 channels", (rand(3, 12, 5, 7), None, rand(12, 12), None, 12))
    yield Sample("fused bias and split", (rand(3, 5, 5, 7), rand(3, 6, 5, 7), rand(11, 11), rand(11), 4))
    yield Sample("48 channels, vectors", (rand(9, 48), None, rand(48, 48), rand(48), 24))


MIX_BACKWARD = Op(
    "channel_mix_backward(Tensor? grad_y, Tensor? grad_y_b, Tensor x, Tensor? x_b, Tensor weight, int split)",
    reference=reference.channel_mix_backward,
    outputs={
        "x": "like x",
        "x_b": "(N, weight.shape[0] - C, ...) like x",
        "weight": "contiguous like weight",
        "bias": "(N,) like weight",
    },
    check=_check_mix_backward,
    check_before_kernels=True,
    kernels={"cpu": _cpu_mix_backward, "triton": "invertible_conv1x1"},
)

MIX = Op(
    "channel_mix(Tensor x, Tensor? x_b, Tensor weight, Tensor? bias, int split)",
    reference=reference.channel_mix,
    outputs={"y": "(N, split, ...) like x", "y_b": "(N, weight.shape[0] - split, ...) like x"},
    check=_check_mix,
    kernels={"cpu": _cpu_mix, "triton": "invertible_conv1x1"},
    saves="x, x_b, weight",
    backward=_mix_backward,
    samples=_mix_samples,
)


# ---- plu_weight: the C x C matrix, its folded activation norm and the log-determinant ----


def _check_plu(
    perm: Tensor,
    lower: Tensor,
    upper: Tensor,
    sign_s: Tensor,
    log_s: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    *options: Any,
) -> None:
    op = "invertible_conv1x1"
    for name, t in (("perm", perm), ("lower", lower), ("upper", upper), ("sign_s", sign_s), ("log_s", log_s)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, expected a torch.Tensor")
    if perm.device != log_s.device:
        raise ValueError(f"{op}: perm is on {perm.device} and log_s on {log_s.device}; move both to one device")
    if options and options[1] < 0:
        raise ValueError(f"{op}: batch={options[1]}, expected at least 0")
    _check.floating(op, lower=lower, upper=upper, sign_s=sign_s, log_s=log_s, scale=scale, bias=bias)
    c = log_s.shape[0] if log_s.dim() == 1 else 0
    if not c:
        raise ValueError(f"{op}: log_s has shape {tuple(log_s.shape)}, expected (C,) with C >= 1")
    for name, matrix in (("lower", lower), ("upper", upper)):
        _check.shape(op, name, matrix, (c, c))
    for name, vector in (("perm", perm), ("sign_s", sign_s), ("scale", scale), ("bias", bias)):
        if vector is not None:
            _check.shape(op, name, vector, (c,))
    if perm.dtype != torch.int64:
        raise TypeError(f"{op}: perm has dtype {perm.dtype}, expected torch.int64")
    if any(t is not None and t.dtype != log_s.dtype for t in (lower, upper, sign_s, scale, bias)):
        raise TypeError(
            f"{op}: lower, upper, sign_s, log_s, scale and bias need one dtype, that of log_s ({log_s.dtype})"
        )


def _check_plu_backward(
    grad_weight: Tensor | None, grad_folded: Tensor | None, grad_logdet: Tensor | None, *arguments: Any
) -> None:
    _check_plu(*arguments)
    op, log_s, batch = "plu_weight_backward", arguments[4], arguments[8]
    c = log_s.shape[0]
    _check.shapes(
        op,
        grad_weight=(grad_weight, (c, c), "that of the weight"),
        grad_folded=(grad_folded, (c,), "one per channel"),
        grad_logdet=(grad_logdet, (batch,), "one per sample"),
    )
    _check.same_dtype(op, log_s.dtype, grad_weight=grad_weight, grad_folded=grad_folded, grad_logdet=grad_logdet)


def _reference_plu(perm: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check.permutation("invertible_conv1x1", "perm", perm)
    return reference.plu_weight(perm, *rest)


def _reference_plu_backward(*args: Any) -> tuple[Tensor, ...]:
    _check.permutation("invertible_conv1x1", "perm", args[3])
    return reference.plu_weight_backward(*args)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t if t is None else t.contiguous() for t in tensors]


def _cpu_plu(
    perm: Tensor,
    lower: Tensor,
    upper: Tensor,
    sign_s: Tensor,
    log_s: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    log_scale: bool,
    batch: int,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_plu(perm, lower, upper, sign_s, log_s, scale, bias, log_scale, batch, positions)
    weight, folded, logdet = PLU_WEIGHT.empty(
        perm, lower, upper, sign_s, log_s, scale, bias, log_scale, batch, positions
    )
    p, low, up, sign, log, s, b = _contiguous(perm, lower, upper, sign_s, log_s, scale, bias)
    _CPU.plu_weight(
        is_double=log_s.dtype is torch.float64,
        perm=p,
        lower=low,
        upper=up,
        sign_s=sign,
        log_s=log,
        scale=s,
        bias=b,
        weight=weight,
        folded=folded,
        logdet=logdet,
        c=log_s.shape[0],
        log_scale=log_scale,
        batch=batch,
        positions=positions,
    )
    return weight, folded, logdet


def _cpu_plu_backward(
    grad_weight: Tensor | None,
    grad_folded: Tensor | None,
    grad_logdet: Tensor | None,
    perm: Tensor,
    lower: Tensor,
    upper: Tensor,
    sign_s: Tensor,
    log_s: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    log_scale: bool,
    batch: int,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = PLU_WEIGHT.backward_op.empty(
        grad_weight,
        grad_folded,
        grad_logdet,
        perm,
        lower,
        upper,
        sign_s,
        log_s,
        scale,
        bias,
        log_scale,
        batch,
        positions,
    )
    p, low, up, sign, log, s, b = _contiguous(perm, lower, upper, sign_s, log_s, scale, bias)
    dw, df, dl = _contiguous(grad_weight, grad_folded, grad_logdet)
    _CPU.plu_weight_backward(
        is_double=log_s.dtype is torch.float64,
        perm=p,
        lower=low,
        upper=up,
        sign_s=sign,
        log_s=log,
        scale=s,
        bias=b,
        grad_weight=dw,
        grad_folded=df,
        grad_logdet=dl,
        grad_lower=outputs[0],
        grad_upper=outputs[1],
        grad_log_s=outputs[2],
        grad_scale=outputs[3],
        grad_bias=outputs[4],
        c=log_s.shape[0],
        log_scale=log_scale,
        batch=batch,
        positions=positions,
    )
    return outputs


def _cuda_plu(
    perm: Tensor,
    lower: Tensor,
    upper: Tensor,
    sign_s: Tensor,
    log_s: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    log_scale: bool,
    batch: int,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_plu(perm, lower, upper, sign_s, log_s, scale, bias)
    weight, folded, logdet = PLU_WEIGHT.empty(
        perm, lower, upper, sign_s, log_s, scale, bias, log_scale, batch, positions
    )
    p, low, up, sign, log, s, b = _contiguous(perm, lower, upper, sign_s, log_s, scale, bias)
    with torch.cuda.device(log_s.device):
        _CUDA.plu_weight(
            stream=torch.cuda.current_stream().cuda_stream,
            perm=p,
            lower=low,
            upper=up,
            sign_s=sign,
            log_s=log,
            scale=s,
            bias=b,
            weight=weight,
            folded=folded,
            logdet=logdet,
            c=log_s.shape[0],
            log_scale=log_scale,
            batch=batch,
            positions=positions,
        )
    return weight, folded, logdet


def _cuda_plu_backward(
    grad_weight: Tensor | None,
    grad_folded: Tensor | None,
    grad_logdet: Tensor | None,
    perm: Tensor,
    lower: Tensor,
    upper: Tensor,
    sign_s: Tensor,
    log_s: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    log_scale: bool,
    batch: int,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = PLU_WEIGHT.backward_op.empty(
        grad_weight,
        grad_folded,
        grad_logdet,
        perm,
        lower,
        upper,
        sign_s,
        log_s,
        scale,
        bias,
        log_scale,
        batch,
        positions,
    )
    p, low, up, sign, log, s, b = _contiguous(perm, lower, upper, sign_s, log_s, scale, bias)
    dw, df, dl = _contiguous(grad_weight, grad_folded, grad_logdet)
    workspace, inverse_perm = torch.empty_like(outputs[0]), torch.empty_like(perm)
    with torch.cuda.device(log_s.device):
        _CUDA.plu_weight_backward(
            stream=torch.cuda.current_stream().cuda_stream,
            workspace=workspace,
            inverse_perm=inverse_perm,
            perm=p,
            lower=low,
            upper=up,
            sign_s=sign,
            log_s=log,
            scale=s,
            bias=b,
            grad_weight=dw,
            grad_folded=df,
            grad_logdet=dl,
            grad_lower=outputs[0],
            grad_upper=outputs[1],
            grad_log_s=outputs[2],
            grad_scale=outputs[3],
            grad_bias=outputs[4],
            c=log_s.shape[0],
            log_scale=log_scale,
            batch=batch,
            positions=positions,
        )
    return outputs


def _plu_samples(generator: torch.Generator) -> Iterator[Sample]:
    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for c in (1, 7, 24):
        perm = torch.randperm(c, generator=generator)
        factors = (perm, rand(c, c), rand(c, c), rand(c).sign(), 0.3 * rand(c))
        yield Sample(f"{c} channels", (*factors, None, None, False, 5, 12), constant=(3,))
        yield Sample(f"{c} channels, actnorm", (*factors, rand(c), rand(c), True, 5, 12), constant=(3,))
        yield Sample(f"{c} channels, actnorm scale", (*factors, rand(c) + 3, rand(c), False, 5, 12), constant=(3,))


PLU_WEIGHT = Op(
    "plu_weight(Tensor perm, Tensor lower, Tensor upper, Tensor sign_s, Tensor log_s, Tensor? scale, Tensor? bias, "
    "bool log_scale, SymInt batch, SymInt positions)",
    reference=_reference_plu,
    # Contiguous, whatever ``lower`` is.
    outputs={"weight": "contiguous like lower", "folded": "contiguous like log_s", "logdet": "(batch,) like log_s"},
    argument_dtypes={"perm": (torch.int64,)},
    check=_check_plu,
    kernels={"cpu": _cpu_plu, "cuda": _cuda_plu},
    dtypes=_CUDA_DTYPES,
    backward=Backward(
        "grad_weight, grad_folded, grad_logdet, perm, lower, upper, sign_s, log_s, scale, bias, *options -> "
        "lower, upper, log_s, scale, bias",
        outputs={name: f"contiguous like {name}" for name in ("lower", "upper", "log_s", "scale", "bias")},
        reference=_reference_plu_backward,
        check=_check_plu_backward,
        kernels={"cpu": _cpu_plu_backward, "cuda": _cuda_plu_backward},
    ),
    samples=_plu_samples,
)


# ---- the functional API ----


def _determinant(op: str, weight: Tensor) -> Tensor:
    _check.floating(op, weight=weight)
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (C, C)")
    wide = weight if weight.element_size() >= 4 else weight.float()
    result: Tensor = torch.linalg.slogdet(wide)[1]
    return result


def _inverted(op: str, weight: Tensor | PLU) -> Tensor:
    """W^-1 from its triangular factors, solved in float64: C is small, the positions are many."""
    if isinstance(weight, PLU):
        _check_plu(*weight, None, None)
        _check.permutation(op, "perm", weight.perm)
        return reference.plu_inverse(*weight)
    inverse, info = torch.linalg.inv_ex(weight.double())
    if weight.is_cpu and readable_now(info) and int(info):
        raise ValueError(
            f"{op}: weight is singular (pivot {int(info)} of its LU factorisation is zero), so it has no inverse"
        )
    result: Tensor = inverse.to(weight.dtype)
    return result


def invertible_conv1x1(
    x: Tensor, weight: Tensor | PLU, bias: Tensor | None = None, *, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Invertible 1x1 convolution: y = W x + b at every position, logdet = H W log|det W|.

    Args:
        x: (N, C, ...) floating point; NCHW, channels_last or vectors (N, C).
        weight: W (C, C), or its :class:`PLU` factors, whose log-determinant is a sum of C numbers.
        bias: b (C,), or None for 0.
        inverse: computes x = W^-1 (y - b), by triangular solves in float64, and the negated logdet.

    Returns:
        (y, logdet): y like x; logdet (N,), float32 for half-precision x.

    A singular full weight gives logdet = -inf.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit; a singular weight with
            ``inverse`` (on the CPU; on a GPU the result is not finite, to avoid a synchronisation).

    Source: Glow (arXiv:1807.03039, section 3.2).

    Example:
        >>> import torch, genfast
        >>> x, w = torch.randn(2, 3, 8, 8), torch.linalg.qr(torch.randn(3, 3))[0]
        >>> y, logdet = genfast.ops.invertible_conv1x1(x, w)
    """
    y, logdet = _mixed("invertible_conv1x1", x, None, None, None, weight, False, None, inverse, bias)
    assert isinstance(y, Tensor)
    return y, logdet


@overload
def actnorm_conv1x1(
    x: Tensor | tuple[Tensor, Tensor],
    scale: Tensor,
    bias: Tensor,
    weight: Tensor | PLU,
    *,
    log_scale: bool = False,
    split: None = None,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]: ...
@overload
def actnorm_conv1x1(
    x: Tensor | tuple[Tensor, Tensor],
    scale: Tensor,
    bias: Tensor,
    weight: Tensor | PLU,
    *,
    log_scale: bool = False,
    split: int,
    inverse: bool = False,
) -> tuple[tuple[Tensor, Tensor], Tensor]: ...
def actnorm_conv1x1(
    x: Tensor | tuple[Tensor, Tensor],
    scale: Tensor,
    bias: Tensor,
    weight: Tensor | PLU,
    *,
    log_scale: bool = False,
    split: int | None = None,
    inverse: bool = False,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """Activation norm, invertible 1x1 convolution and channel split as one pass: y = W (s x + b).

    The norm is folded into the C x C weight, so the data is read once and written once, already in
    the two contiguous halves that a coupling layer wants; a pair may come in as well, so that a
    chain of steps never concatenates.

    Args:
        x: (N, C, ...), or a pair of channel halves (N, C1, ...), (N, C - C1, ...).
        scale, bias, log_scale: as in :func:`actnorm`.
        weight: as in :func:`invertible_conv1x1`.
        split: channels of the first half of the result; None returns one tensor.
        inverse: computes x = (W^-1 y - b) / s and the negated log-determinant.

    Returns:
        (y, logdet), y a pair when ``split`` is given; logdet (N,).

    Raises:
        TypeError, ValueError: as its two parts.

    Source: Glow (arXiv:1807.03039, sections 3.1 and 3.2).

    Example:
        >>> import torch, genfast
        >>> x, w = torch.randn(2, 4, 8, 8), torch.linalg.qr(torch.randn(4, 4))[0]
        >>> (a, b), logdet = genfast.ops.actnorm_conv1x1(x, torch.ones(4), torch.zeros(4), w, split=2)
    """
    first, second = (x, None) if isinstance(x, Tensor) else x
    return _mixed("actnorm_conv1x1", first, second, scale, bias, weight, log_scale, split, inverse)


def _mixed(
    op: str,
    x: Tensor,
    x_b: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | PLU,
    log_scale: bool,
    split: int | None,
    inverse: bool,
    after: Tensor | None = None,
) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor]:
    """``bias`` stands before the matrix, with the scale; ``after`` behind it."""
    _check.floating(op, x=x, x_b=x_b, bias=after)
    if x.dim() < 2:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, C, ...)")
    channels = x.shape[1] + (0 if x_b is None else x_b.shape[1])
    batch, positions = x.shape[0], reference.positions(x)
    if scale is not None and bias is not None:
        check_channels(op, x, scale, bias, channels)
    if isinstance(weight, PLU):
        folded, shift, logdet = PLU_WEIGHT(*weight, scale, bias, log_scale, batch, positions)
        offset = shift if bias is not None else None
        if inverse:
            logdet = -logdet
    else:
        unit = _determinant(op, weight)
        folded, offset = weight, None
        if scale is not None and bias is not None:
            unit = unit + (scale if log_scale else scale.abs().log()).sum()
            folded = weight * (scale.exp() if log_scale else scale)
            offset = weight @ bias
        logdet = (unit * (-positions if inverse else positions)).expand(batch)
    if inverse:  # x = W^-1 y / s - b / s, again one product
        folded, offset = _inverted(op, weight), None
        if scale is not None and bias is not None:
            s = scale.exp() if log_scale else scale
            folded, offset = folded / s[:, None], -bias / s
    if after is not None:
        _check.shape(op, "bias", after, (channels,), "one per channel")
        moved = -(folded @ after) if inverse else after
        offset = moved if offset is None else offset + moved
    y, y_b = MIX(x, x_b, folded, offset, channels if split is None else split)
    return (y if split is None else (y, y_b)), logdet
