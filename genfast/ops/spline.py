"""ops.rational_quadratic_spline and its packed form, ops.linear_spline, ops.quadratic_spline: elementwise, with
logdet."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check

_NAME = "rational_quadratic_spline"
_CPU = kernels(
    "_cpu",
    spline="""
        is_double backward? inverse zuko bins tails left right bottom top min_width min_height min_derivative log_slope
        logit_scale x y? logdet? dx? grad_y? grad_y_step? grad_logdet? grad_logdet_step? parts part_count n threads
    """,
)
_HALF = (torch.bfloat16, torch.float16)
# Half types are converted: the softmax runs in float32.
_DTYPES = {**_backend.DTYPES, "cpu": (*_backend.DTYPES["cpu"], *_HALF)}
_TAILS = {"linear": 0, "none": 1, "circular": 2}
TAILS = ("linear", "circular", "none")
CONVENTIONS = ("nflows", "zuko")
MAX_BINS = 64


def _check_options(op: str, bins: int, tails: str, options: Sequence[float]) -> None:
    _check.choice(op, "tails", tails, TAILS)
    if len(options) != 9:
        raise ValueError(f"{op}: options holds {len(options)} numbers, expected 9")
    left, right, bottom, top, min_width, min_height, min_derivative, slope, scale = options
    if not 2 <= bins <= MAX_BINS:
        raise ValueError(f"{op}: {bins} bins, expected 2 to {MAX_BINS}")
    if not (left < right and abs(right - left) < math.inf):
        raise ValueError(f"{op}: left={left}, right={right}, expected left < right (bound > 0), both finite")
    if not (bottom < top and abs(top - bottom) < math.inf):
        raise ValueError(f"{op}: bottom={bottom}, top={top}, expected bottom < top (bound > 0), both finite")
    for name, minimum in (("min_bin_width", min_width), ("min_bin_height", min_height)):
        if not 0 <= minimum * bins <= 1:
            raise ValueError(
                f"{op}: {name}={minimum} for {bins} bins, expected 0 to {1 / bins}, since the bins share one"
            )
    if not min_derivative >= 0:
        raise ValueError(f"{op}: min_derivative={min_derivative}, expected at least 0")
    if not 0 < slope < 1:
        raise ValueError(f"{op}: slope={slope}, expected above 0 and below 1")
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: logit_scale={scale}, expected a positive number")


def derivative_count(bins: int, tails: str) -> int:
    """How many derivatives a spline of ``bins`` bins takes."""
    return bins + {"linear": -1, "circular": 0, "none": 1}[tails]


def _check_forward(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> None:
    _check.floating(_NAME, x=x, widths=widths, heights=heights, derivatives=derivatives)
    if not widths.dim():
        raise ValueError(f"{_NAME}: widths has no axes, expected {tuple(x.shape)} and a last axis of K bins")
    bins = widths.shape[-1]
    _check_options(_NAME, bins, tails, options)
    _check.choice(_NAME, "convention", convention, CONVENTIONS)
    _check.shape(_NAME, "widths", widths, (*x.shape, bins), "x's shape, then K bins")
    _check.shape(_NAME, "heights", heights, (*x.shape, bins), "x's shape, then K bins, as widths")
    count = derivative_count(bins, tails)
    _check.shape(
        _NAME,
        "derivatives",
        derivatives,
        (*x.shape, count),
        f"x's shape, then {count} for {bins} bins, tails={tails!r}",
    )


def _check_packed(
    x: Tensor, params: Tensor, bins: int, tails: str, convention: str, inverse: bool, options: Sequence[float]
) -> None:
    op = f"{_NAME}_packed"
    _check.floating(op, x=x, params=params)
    _check_options(op, bins, tails, options)
    _check.choice(op, "convention", convention, CONVENTIONS)
    count = 2 * bins + derivative_count(bins, tails)
    _check.shape(op, "params", params, (*x.shape, count), f"x's shape, then {count} for {bins} bins, tails={tails!r}")


def _check_linear(x: Tensor, unnormalized_pdf: Tensor, tails: str, inverse: bool, options: Sequence[float]) -> None:
    op = "linear_spline"
    _check.floating(op, x=x, unnormalized_pdf=unnormalized_pdf)
    bins = unnormalized_pdf.shape[-1] if unnormalized_pdf.dim() else 0
    _check_options(op, bins, tails, options)
    _check.choice(op, "tails", tails, ("linear", "none"))
    _check.shape(op, "unnormalized_pdf", unnormalized_pdf, (*x.shape, bins), "x's shape, then K bins")


def _check_quadratic(
    x: Tensor, widths: Tensor, heights: Tensor, tails: str, inverse: bool, options: Sequence[float]
) -> None:
    op = "quadratic_spline"
    _check.floating(op, x=x, widths=widths, heights=heights)
    bins = widths.shape[-1] if widths.dim() else 0
    _check_options(op, bins, tails, options)
    _check.choice(op, "tails", tails, ("linear", "none"))
    _check.shape(op, "widths", widths, (*x.shape, bins), "x's shape, then K bins")
    count = derivative_count(bins, tails)
    _check.shape(op, "heights", heights, (*x.shape, count), f"x's shape, then {count} for {bins} bins, tails={tails!r}")


def _rows(p: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """``p`` (*, P) and the step from row to row, copied only where its rows are not dense or not evenly apart."""
    p = p.to(dtype)
    count = p.shape[-1]
    if p.is_contiguous():
        return p, count
    if p.stride(-1) == 1 or count == 1:
        step = p.stride(-2) if p.dim() > 1 else count
        expected = step
        for size, stride in zip(reversed(p.shape[:-1]), reversed(p.stride()[:-1])):
            if size != 1 and stride != expected:
                break
            expected *= size
        else:
            return p, step
    return p.contiguous(), count


@functools.lru_cache(1024)
def _kernel(
    dtype: torch.dtype, bins: int, tails: str, convention: str, inverse: bool, options: tuple[float, ...]
) -> Any:
    """The kernel with all that describes the splines."""
    left, right, bottom, top, min_width, min_height, min_derivative, slope, scale = options
    return _CPU.spline.prepare(
        is_double=dtype is torch.float64,
        inverse=inverse,
        zuko=convention == "zuko",
        bins=bins,
        tails=_TAILS[tails],
        left=left,
        right=right,
        bottom=bottom,
        top=top,
        min_width=min_width,
        min_height=min_height,
        min_derivative=min_derivative,
        log_slope=math.log(slope),
        logit_scale=scale,
    )


def _run(
    x: Tensor, params: Sequence[Tensor], bins: int, tails: str, convention: str, inverse: bool, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    dtype = x.dtype
    wide = (x.float() if dtype in _HALF else x).contiguous()
    rows = [_rows(p, wide.dtype) for p in params]
    y, logdet = _allocator.empty_like(wide), _allocator.empty_like(wide)
    outside = wide.numel() and _kernel(wide.dtype, bins, tails, convention, inverse, tuple(options))(
        x=wide,
        y=y,
        logdet=logdet,
        parts=[(p, None, p.shape[-1], step) for p, step in rows],
        part_count=len(rows),
        n=wide.numel(),
        threads=torch.get_num_threads(),
    )
    if outside:
        low, high = options[2:4] if inverse else options[:2]
        raise ValueError(
            f"{_NAME}: x has elements outside [{low}, {high}], where a spline with "
            "tails=None is not defined; clamp x, or give tails"
        )
    return y.to(dtype), logdet


def _run_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    bins: int,
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> list[Tensor]:
    dtype = x.dtype
    wide = (x.float() if dtype in _HALF else x).contiguous()
    rows = [_rows(p, wide.dtype) for p in params]
    dx = _allocator.empty_like(wide)
    grads = [_allocator.empty_strided(tuple(p.shape), _dense(p.shape), wide.dtype) for p in params]
    gy, gy_step = _cotangent(grad_y, wide)
    gl, gl_step = _cotangent(grad_logdet, wide)
    if wide.numel():
        _kernel(wide.dtype, bins, tails, convention, inverse, tuple(options))(
            backward=True,
            x=wide,
            grad_y=gy,
            grad_y_step=gy_step,
            grad_logdet=gl,
            grad_logdet_step=gl_step,
            dx=dx,
            parts=[(p, g, p.shape[-1], step) for (p, step), g in zip(rows, grads)],
            part_count=len(rows),
            n=wide.numel(),
            threads=torch.get_num_threads(),
        )
    return [dx.to(dtype), *(g.to(p.dtype) for g, p in zip(grads, params))]


def _dense(shape: Sequence[int]) -> tuple[int, ...]:
    stride = [1]
    for size in reversed(shape[1:]):
        stride.append(stride[-1] * max(size, 1))
    return tuple(reversed(stride))


def _cotangent(grad: Tensor | None, x: Tensor) -> tuple[Tensor | None, int]:
    """A gradient and its step: 0 where it is one number for all, as that of a sum is."""
    if grad is None:
        return None, 0
    grad = grad.to(x.dtype)
    if not any(grad.stride()):
        return grad, 0
    return grad.contiguous(), 1


def _cpu(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    tails: str,
    convention: str,
    inverse: bool,
    options: Sequence[float],
) -> tuple[Tensor, Tensor]:
    _check_forward(x, widths, heights, derivatives, tails, convention, inverse, options)
    return _run(x, (widths, heights, derivatives), widths.shape[-1], tails, convention, inverse, options)


def _cpu_packed(
    x: Tensor, params: Tensor, bins: int, tails: str, convention: str, inverse: bool, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    _check_packed(x, params, bins, tails, convention, inverse, options)
    return _run(x, (params,), bins, tails, convention, inverse, options)


def _cpu_backward(
    grad_y: Tensor | None,
    grad_logdet: Tensor | None,
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *options: Any,
) -> tuple[Tensor, ...]:
    params = (widths, heights, derivatives)
    return tuple(_run_backward(grad_y, grad_logdet, x, params, widths.shape[-1], *options))


def _cpu_packed_backward(
    grad_y: Tensor | None, grad_logdet: Tensor | None, x: Tensor, params: Tensor, bins: int, *options: Any
) -> tuple[Tensor, ...]:
    return tuple(_run_backward(grad_y, grad_logdet, x, (params,), bins, *options))


_SAMPLED = (
    # label, shape of x, bins, tails, convention, options
    ("8 bins", (5, 4), 8, "linear", "nflows", [-2.0, 2.0, -2.0, 2.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0]),
    ("3 bins circular", (19, 1), 3, "circular", "nflows", [-1.5, 1.5, -1.5, 1.5, 1e-2, 2e-2, 3e-3, 1e-3, 0.5]),
    ("5 bins no tails", (3, 3), 5, "none", "nflows", [0.0, 1.0, -1.0, 2.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0]),
    ("zuko 8 bins", (4, 5), 8, "linear", "zuko", [-2.0, 2.0, -2.0, 2.0, 0.0, 0.0, 0.0, 1e-3, 1.0]),
    ("zuko 2 bins", (2, 3), 2, "linear", "zuko", [-2.0, 2.0, -2.0, 2.0, 0.0, 0.0, 0.0, 1e-2, 0.7]),
)


def _inputs(
    generator: torch.Generator, shape: tuple[int, ...], tails: str, inverse: bool, options: Sequence[float]
) -> Tensor:
    low, high = options[2:4] if inverse else options[:2]
    if tails == "none":
        return low + (high - low) * (0.02 + 0.96 * torch.rand(shape, generator=generator, dtype=torch.float64))
    return torch.randn(shape, generator=generator, dtype=torch.float64) * high * 0.8


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, bins, tails, convention, options in _SAMPLED:
        for inverse in (False, True):
            x = _inputs(generator, shape, tails, inverse, options)
            widths, heights, derivatives = (
                torch.randn(*shape, n, generator=generator, dtype=torch.float64)
                for n in (bins, bins, derivative_count(bins, tails))
            )
            label_here = f"{label}{' inverse' if inverse else ''}"
            yield Sample(label_here, (x, widths, heights, derivatives, tails, convention, inverse, options))


def _packed_samples(generator: torch.Generator) -> Iterator[Sample]:
    for sample in _samples(generator):
        x, widths, heights, derivatives, *options = sample.args
        yield Sample(sample.label, (x, torch.cat([widths, heights, derivatives], -1), widths.shape[-1], *options))


def _linear_samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, bins, tails, _, options in (_SAMPLED[0], _SAMPLED[2]):
        for inverse in (False, True):
            x = _inputs(generator, shape, tails, inverse, options)
            pdf = torch.randn(*shape, bins, generator=generator, dtype=torch.float64)
            yield Sample(f"{label}{' inverse' if inverse else ''}", (x, pdf, tails, inverse, options))


def _quadratic_samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, bins, tails, _, options in (_SAMPLED[0], _SAMPLED[2]):
        for inverse in (False, True):
            x = _inputs(generator, shape, tails, inverse, options)
            widths, heights = (
                torch.randn(*shape, n, generator=generator, dtype=torch.float64)
                for n in (bins, derivative_count(bins, tails))
            )
            yield Sample(f"{label}{' inverse' if inverse else ''}", (x, widths, heights, tails, inverse, options))


_OUTPUTS = {"y": "contiguous like x", "logdet": "contiguous like x as accumulator"}

OP = Op(
    f"{_NAME}(Tensor x, Tensor widths, Tensor heights, Tensor derivatives, str tails, str convention, bool inverse, "
    "float[] options)",
    reference=reference.rational_quadratic_spline,
    outputs=_OUTPUTS,
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": "spline"},
    dtypes=_DTYPES,
    backward=Backward(
        "grad_y, grad_logdet, x, widths, heights, derivatives, *options -> x, widths, heights, derivatives",
        outputs={name: f"contiguous like {name}" for name in ("x", "widths", "heights", "derivatives")},
        reference=reference.rational_quadratic_spline_backward,
        kernels={"cpu": _cpu_backward, "triton": "spline"},
    ),
    samples=_samples,
)

OP_PACKED = Op(
    f"{_NAME}_packed(Tensor x, Tensor params, int bins, str tails, str convention, bool inverse, float[] options)",
    reference=reference.rational_quadratic_spline_packed,
    outputs=_OUTPUTS,
    check=_check_packed,
    kernels={"cpu": _cpu_packed, "triton": "spline"},
    dtypes=_DTYPES,
    backward=Backward(
        "grad_y, grad_logdet, x, params, *options -> x, params",
        outputs={name: f"contiguous like {name}" for name in ("x", "params")},
        reference=reference.rational_quadratic_spline_packed_backward,
        kernels={"cpu": _cpu_packed_backward, "triton": "spline"},
    ),
    samples=_packed_samples,
)

OP_LINEAR = Op(
    "linear_spline(Tensor x, Tensor unnormalized_pdf, str tails, bool inverse, float[] options)",
    reference=reference.linear_spline,
    outputs=_OUTPUTS,
    check=_check_linear,
    kernels={},
    samples=_linear_samples,
)

OP_QUADRATIC = Op(
    "quadratic_spline(Tensor x, Tensor widths, Tensor heights, str tails, bool inverse, float[] options)",
    reference=reference.quadratic_spline,
    outputs=_OUTPUTS,
    check=_check_quadratic,
    kernels={},
    samples=_quadratic_samples,
)


def _broadcast(op: str, x: Tensor, params: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """x and the parameters at one shape, each parameter with its own last axis behind it."""
    if not isinstance(x, Tensor) or any(not isinstance(p, Tensor) or not p.dim() for p in params.values()):
        return x, list(params.values())  # the op's own check names what is wrong
    if all(p.shape[:-1] == x.shape for p in params.values()):
        return x, list(params.values())
    try:
        shape = torch.broadcast_shapes(x.shape, *(p.shape[:-1] for p in params.values()))
    except RuntimeError:
        return x, list(params.values())
    return x.expand(shape), [p.expand(*shape, p.shape[-1]) for p in params.values()]


def _domain(
    op: str,
    tails: str | None,
    bound: float | Tensor | None,
    default: float,
    left: float,
    right: float,
    bottom: float,
    top: float,
) -> tuple[str, list[float], Tensor | None]:
    """The op's tails, its domain and range, and a bound for each element, if given so."""
    if tails is None or tails == "none":
        if bound is not None:
            raise ValueError(f"{op}: bound is given with tails=None, expected left, right, bottom and top")
        return "none", [left, right, bottom, top], None
    if isinstance(bound, Tensor):
        return tails, [-1.0, 1.0, -1.0, 1.0], bound
    bound = float(default if bound is None else bound)
    if not 0 < bound < math.inf:  # no isfinite: of a compiler's symbolic numbers there is none
        raise ValueError(f"{op}: bound={bound}, expected a positive number")
    return tails, [-bound, bound, -bound, bound], None


def _within(x: Tensor, bound: Tensor | None, convention: str, call: Any) -> tuple[Tensor, Tensor]:
    """``call`` on [-1, 1] in place of [-bound, bound]; where x is outside it is left as it is."""
    if bound is None:
        found: tuple[Tensor, Tensor] = call(x)
        return found
    bound = bound.to(x.dtype)
    y, logdet = call(x / bound)
    outside = (x <= -bound) | (x > bound) if convention == "zuko" else (x < -bound) | (x > bound)
    return torch.where(outside, x, y * bound), logdet


def rational_quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    derivatives: Tensor,
    *,
    tails: str | None = "linear",
    bound: float | Tensor | None = None,
    inverse: bool = False,
    convention: str = "nflows",
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    slope: float = 1e-3,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A monotonic rational-quadratic spline of K bins, each element with its own parameters, and its log-derivative.

    Softmax, sums, search, evaluation and log-derivative run in one pass over the parameters; the backward recomputes
    them.

    Args:
        x: any shape (*), floating point.
        widths, heights: (*, K), 2 <= K <= 64, logits of the bins' sizes. Shapes before the last axis broadcast with x.
        derivatives: (*, K - 1) with linear tails, (*, K) circular (the last knot's is the first's), (*, K + 1)
            tails=None; logits of the derivatives at the knots.
        tails: "linear" or "circular": the identity outside [-bound, bound], with end derivatives 1, or equal ones.
            None: no outside; the domain is [left, right], and an x beyond it a ValueError on the CPU, NaN elsewhere.
        bound: a positive number, or a tensor that broadcasts to x, of positive ones; default 1, for "zuko" 5.
        inverse: from y to x, and the negated log-derivative.
        convention: "nflows" (sizes are a softmax with minimums, derivatives min + softplus; a knot belongs to the bin
            on its right) or "zuko" (softly clipped logits, derivatives exp; a knot belongs to the bin on its left, x =
            -bound is outside). The two differ at a knot only in the derivative of logdet.
        left, right, bottom, top: the domain and the range where tails is None.
        min_bin_width, min_bin_height, min_derivative: nflows' minimums, the first two as shares of the whole.
        slope: zuko's least slope.
        logit_scale: multiplies widths and heights (nflows divides them by sqrt(hidden features)).

    Returns:
        (y, logdet), both of x's shape: logdet = log |dy/dx| elementwise, as nflows and torch.distributions give it (sum
        it over a sample for the log-determinant), float32 for half-precision x. A NaN in x or in the parameters it
        meets gives NaN there and nowhere else.

    Raises:
        TypeError, ValueError: dtypes, shapes, counts or options that do not fit, by name.

    Source: Durkan et al., Neural Spline Flows (arXiv:1906.04032, section 3.1).

    Example:
        >>> import torch, genfast
        >>> w, h, d = torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.randn(4, 2, 7)
        >>> y, logdet = genfast.ops.rational_quadratic_spline(torch.randn(4, 2), w, h, d, bound=3.0)
    """
    where, domain, scale = _domain(_NAME, tails, bound, 5.0 if convention == "zuko" else 1.0, left, right, bottom, top)
    minimums = [0.0, 0.0, 0.0] if convention == "zuko" else [min_bin_width, min_bin_height, min_derivative]
    options = [*domain, *minimums, slope, logit_scale]
    x, (widths, heights, derivatives) = _broadcast(
        _NAME, x, {"widths": widths, "heights": heights, "derivatives": derivatives}
    )
    return _within(
        x, scale, convention, lambda u: OP(u, widths, heights, derivatives, where, convention, inverse, options)
    )


def rational_quadratic_spline_packed(
    x: Tensor,
    params: Tensor,
    bins: int,
    *,
    tails: str | None = "linear",
    bound: float | Tensor | None = None,
    inverse: bool = False,
    convention: str = "nflows",
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    slope: float = 1e-3,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """:func:`rational_quadratic_spline` of a conditioner's output as it is: no slices, whose gradients cost a copy
    each.

    Args:
        x: any shape (*).
        params: (*, P): K widths, K heights, then the derivatives; P = 3K - 1 (linear tails), 3K (circular), 3K + 1
            (None).
        bins: K.
        tails, bound, ...: as there.

    Returns:
        (y, logdet), both of x's shape.

    Raises:
        TypeError, ValueError: dtypes, shapes, counts or options that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> y, logdet = genfast.ops.rational_quadratic_spline_packed(torch.randn(4, 2), torch.randn(4, 2, 23), 8)
    """
    op = f"{_NAME}_packed"
    where, domain, scale = _domain(op, tails, bound, 5.0 if convention == "zuko" else 1.0, left, right, bottom, top)
    minimums = [0.0, 0.0, 0.0] if convention == "zuko" else [min_bin_width, min_bin_height, min_derivative]
    options = [*domain, *minimums, slope, logit_scale]
    x, (params,) = _broadcast(op, x, {"params": params})
    return _within(x, scale, convention, lambda u: OP_PACKED(u, params, bins, where, convention, inverse, options))


def linear_spline(
    x: Tensor,
    unnormalized_pdf: Tensor,
    *,
    tails: str | None = "linear",
    bound: float | None = None,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """A piecewise-linear spline of K bins of equal width, as nflows': the integral of softmax(unnormalized_pdf).

    Args:
        x: any shape (*), floating point.
        unnormalized_pdf: (*, K), 2 <= K <= 64; the axes before the last broadcast with x.
        tails: "linear" (the identity outside [-bound, bound]) or None (domain [left, right]).
        bound: a positive number, default 1.
        inverse: from y to x.
        left, right, bottom, top: the domain and the range where tails is None. logdet counts their ratio, which nflows
            forgets.

    Returns:
        (y, logdet), both of x's shape; logdet jumps at the knots.

    Raises:
        TypeError, ValueError: dtypes, shapes or options that do not fit, by name.

    Source: Mueller et al., Neural Importance Sampling (arXiv:1808.03856, section 4.1).

    Example:
        >>> import torch, genfast
        >>> y, logdet = genfast.ops.linear_spline(torch.rand(4, 2), torch.randn(4, 2, 8), tails=None)
    """
    where, domain, _ = _domain("linear_spline", tails, bound, 1.0, left, right, bottom, top)
    x, (unnormalized_pdf,) = _broadcast("linear_spline", x, {"unnormalized_pdf": unnormalized_pdf})
    result: tuple[Tensor, Tensor] = OP_LINEAR(x, unnormalized_pdf, where, inverse, [*domain, 0.0, 0.0, 0.0, 1e-3, 1.0])
    return result


def quadratic_spline(
    x: Tensor,
    widths: Tensor,
    heights: Tensor,
    *,
    tails: str | None = "linear",
    bound: float | None = None,
    inverse: bool = False,
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """A piecewise-quadratic spline of K bins, as nflows': the integral of a density that is linear in each bin.

    With linear tails nflows sets the density at the ends near one, but not to one, so the derivative jumps there; its
    numbers are kept.

    Args:
        x: any shape (*), floating point.
        widths: (*, K) logits, 2 <= K <= 64; the axes before the last broadcast with x.
        heights: (*, K - 1) with linear tails, (*, K + 1) tails=None: logits of the density at the knots.
        tails: "linear" (the identity outside [-bound, bound]) or None (domain [left, right]).
        bound: a positive number, default 1.
        inverse: from y to x.
        left, right, bottom, top: the domain and the range where tails is None. logdet counts their ratio, which nflows
            forgets.
        min_bin_width: the least share of a bin.
        min_bin_height: the least density.

    Returns:
        (y, logdet), both of x's shape.

    Raises:
        TypeError, ValueError: dtypes, shapes, counts or options that do not fit, by name.

    Source: Mueller et al., Neural Importance Sampling (arXiv:1808.03856, section 4.2).

    Example:
        >>> import torch, genfast
        >>> x, widths, heights = torch.rand(4, 2), torch.randn(4, 2, 8), torch.randn(4, 2, 9)
        >>> y, logdet = genfast.ops.quadratic_spline(x, widths, heights, tails=None)
    """
    where, domain, _ = _domain("quadratic_spline", tails, bound, 1.0, left, right, bottom, top)
    x, (widths, heights) = _broadcast("quadratic_spline", x, {"widths": widths, "heights": heights})
    result: tuple[Tensor, Tensor] = OP_QUADRATIC(
        x, widths, heights, where, inverse, [*domain, min_bin_width, min_bin_height, 0.0, 1e-3, 1.0]
    )
    return result
