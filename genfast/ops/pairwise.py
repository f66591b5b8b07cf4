"""ops.mmd, ops.kernel_distance, ops.nearest_neighbors and the sums over pairs of rows beneath, without an array over
pairs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from .._tensors import accumulator
from ..reference.pairwise import KERNELS
from . import _check

_SUM = "pairwise_kernel_sum"
_NEAREST = "nearest_rows"
_FAMILY = "pairwise"
_CPU = kernels(
    "_cpu",
    pairwise="""
        is_double exclude_diagonal mode kernel x y x_grad y_grad out index scales count degree k offset b n m c threads
    """,
)
_DTYPES = {
    **_backend.DTYPES,
    "cpu": _backend.DTYPES["reference"],
}  # half types are converted: the copy is of rows, not pairs
_MEDIAN_ROWS = 1024  # at most so many rows decide a median distance
_AT_ONCE = 1 << 25  # elements of the subsets that kernel_distance gathers at once
WAE_FACTORS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


def _pair(op: str, x: Tensor, y: Tensor | None) -> None:
    _check.floating(op, x=x, y=y)
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (B, N, C)")
    if y is not None:
        if y.dim() != 3 or y.shape[0] != x.shape[0] or y.shape[2] != x.shape[2]:
            raise ValueError(f"{op}: y has shape {tuple(y.shape)}, expected ({x.shape[0]}, M, {x.shape[2]}) as x has")
        if y.dtype != x.dtype:
            raise TypeError(f"{op}: y has dtype {y.dtype} and x {x.dtype}, expected the same")


def _check_sum(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    scales: Sequence[float],
    degree: int,
    offset: float,
    exclude_diagonal: bool,
) -> None:
    _pair(_SUM, x, y)
    _check.choice(_SUM, "kernel", kernel, KERNELS)
    if not scales or not all(s > 0 for s in scales):
        raise ValueError(f"{_SUM}: scales={list(scales)}, expected at least one, all positive")
    if kernel == "polynomial" and degree < 1:
        raise ValueError(f"{_SUM}: degree={degree}, expected at least 1")
    if exclude_diagonal and y is not None:
        raise ValueError(f"{_SUM}: exclude_diagonal leaves out pairs of a row with itself, expected y=None")


def _check_nearest(x: Tensor, y: Tensor | None, k: int, exclude_self: bool) -> None:
    _pair(_NEAREST, x, y)
    if exclude_self and y is not None:
        raise ValueError(f"{_NEAREST}: exclude_self leaves out a row itself, expected y=None")
    rows = x.shape[1] - exclude_self if y is None else y.shape[1]
    if k < 1 or (k > rows and x.shape[1] > 0):
        raise ValueError(f"{_NEAREST}: k={k}, expected 1 to {max(rows, 0)}, the number of rows to choose from")


def _call(
    mode: int,
    x: Tensor,
    y: Tensor | None,
    options: tuple[Any, ...],
    out: Tensor,
    x_grad: Tensor | None = None,
    y_grad: Tensor | None = None,
    index: Tensor | None = None,
    k: int = 0,
) -> None:
    """x, y, grads dense in one of float32 and float64."""
    kernel, scales, degree, offset, exclude = options
    b, n, c = x.shape
    m = n if y is None else y.shape[1]
    if not out.numel():
        return
    if not m:
        out.zero_()
        return
    if not c:  # one feature of zeros has the same products and distances
        x, y, c = x.new_zeros(b, n, 1), None if y is None else y.new_zeros(b, m, 1), 1
    doubles = array("d", scales)
    _CPU.pairwise(
        is_double=x.dtype is torch.float64,
        exclude_diagonal=exclude,
        mode=mode,
        kernel=KERNELS.index(kernel),
        x=x,
        y=y,
        x_grad=x_grad,
        y_grad=y_grad,
        out=out,
        index=index,
        scales=doubles.buffer_info()[0],
        count=len(doubles),
        degree=degree,
        offset=offset,
        k=k,
        b=b,
        n=n,
        m=m,
        c=c,
        threads=torch.get_num_threads(),
    )


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype).contiguous()


def _cpu_sum(x: Tensor, y: Tensor | None, *options: Any) -> Tensor:
    _check_sum(x, y, *options)
    dtype = accumulator(x.dtype)
    out = x.new_empty(x.shape[:2], dtype=dtype)
    _call(0, _dense(x, dtype), None if y is None else _dense(y, dtype), options, out)
    return out


def _cpu_sum_backward(grad: Tensor, x: Tensor, y: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    *options, need_x, need_y = rest
    dtype = accumulator(x.dtype)
    g, rows, others = _dense(grad, dtype), _dense(x, dtype), None if y is None else _dense(y, dtype)
    dx = dy = x.new_empty(0)
    if need_x:
        dx = torch.empty_like(rows)
        _call(1, rows, others, tuple(options), dx, g, g if others is None else None)
    if need_y and others is not None:  # the same sum with the sides exchanged
        dy = torch.empty_like(others)
        _call(1, others, rows, tuple(options), dy, None, g)
    return dx.to(x.dtype), dy.to(x.dtype)


def _cpu_nearest(x: Tensor, y: Tensor | None, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    _check_nearest(x, y, k, exclude_self)
    dtype = accumulator(x.dtype)
    distance, index = OP_NEAREST.empty(x, y, k, exclude_self)
    rows = _dense(x, dtype)
    _call(
        2, rows, None if y is None else _dense(y, dtype), ("rbf", [], 1, 0.0, exclude_self), distance, index=index, k=k
    )
    return distance, index


def _nearest_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
    """d_ik = |x_i - y_j|^2, j held: a gather and a sum over the rows that chose j."""
    if grad is None:
        return None, None, None, None
    x, y, index = ctx.saved_tensors
    wide = x if x.element_size() >= 4 else x.float()
    other = wide if y is None else (y if y.element_size() >= 4 else y.float())
    pull = 2 * grad.unsqueeze(3) * (wide.unsqueeze(2) - _gather(other, index))
    dx = pull.sum(2)
    back = -_scatter(pull, index, other.shape[1])
    if y is None:
        return (dx + back).to(x.dtype), None, None, None
    return dx.to(x.dtype), back.to(y.dtype) if ctx.needs_input_grad[1] else None, None, None


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """(B, M, C) and (B, N, k) to (B, N, k, C)."""
    flat = index.flatten(1).unsqueeze(2).expand(-1, -1, rows.shape[2])
    return rows.gather(1, flat).view(*index.shape, rows.shape[2])


def _scatter(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """The sums of (B, N, k, C) by index, (B, rows, C), in one order on any device."""
    b, c = values.shape[0], values.shape[3]
    out = values.new_zeros(b, rows, c)
    if values.is_cuda:  # sorts by index, where scatter_add adds atomically
        batch = torch.arange(b, device=values.device)[:, None]
        return out.index_put((batch, index.flatten(1)), values.flatten(1, 2), accumulate=True)
    return out.scatter_add(1, index.flatten(1).unsqueeze(2).expand(-1, -1, c), values.flatten(1, 2))


def _sum_samples(generator: torch.Generator) -> Iterator[Sample]:
    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    yield Sample("rbf, two bandwidths", (rows(2, 5, 3), rows(2, 7, 3), "rbf", [0.5, 0.1], 1, 0.0, False))
    yield Sample("rbf, itself, many features", (rows(1, 67, 33), None, "rbf", [0.02], 1, 0.0, False))
    yield Sample("imq, many features", (rows(2, 9, 40), rows(2, 70, 40), "imq", [8.0, 80.0, 300.0], 1, 0.0, False))
    yield Sample("imq, others alone", (rows(2, 9, 4), None, "imq", [0.8, 8.0], 1, 0.0, True))
    yield Sample("polynomial", (rows(2, 8, 5), rows(2, 6, 5), "polynomial", [0.2], 3, 1.0, False))
    yield Sample("polynomial, others alone", (rows(1, 67, 20), None, "polynomial", [0.05], 3, 1.0, True))
    yield Sample("polynomial, itself", (rows(2, 4, 3), None, "polynomial", [0.5], 2, 0.5, False))


def _nearest_samples(generator: torch.Generator) -> Iterator[Sample]:
    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    yield Sample("one", (rows(2, 9, 3), rows(2, 70, 3), 1, False))
    yield Sample("three, many features", (rows(1, 8, 24), rows(1, 67, 24), 3, False))
    yield Sample("others", (rows(2, 9, 4), None, 2, True))


OP = Op(
    f"{_SUM}(Tensor x, Tensor? y, str kernel, float[] scales, int degree, float offset, bool exclude_diagonal)",
    reference=reference.pairwise_kernel_sum,
    outputs={"sums": "(N, C) like x as accumulator"},
    check=_check_sum,
    kernels={"cpu": _cpu_sum, "triton": _FAMILY},
    dtypes=_DTYPES,
    backward=Backward(
        "grad, x, y, *options, need_x, need_y -> x, y",
        outputs={"x": "contiguous like x", "y": "contiguous like y"},
        reference=reference.pairwise_kernel_sum_backward,
        kernels={"cpu": _cpu_sum_backward, "triton": _FAMILY},
    ),
    samples=_sum_samples,
)

OP_NEAREST = Op(
    f"{_NEAREST}(Tensor x, Tensor? y, int k, bool exclude_self)",
    reference=reference.nearest_rows,
    outputs={"distance": "(N, C, k) like x as accumulator", "index": "(N, C, k) like x as int64"},
    check=_check_nearest,
    kernels={"cpu": _cpu_nearest, "triton": _FAMILY},
    dtypes=_DTYPES,
    saves="x, y, index",
    backward=_nearest_backward,
    samples=_nearest_samples,
)


def _one_dtype(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both in the wider dtype: under autocast one of them may be a float32 tensor that was kept."""
    if y is None or y.dtype is x.dtype:
        return x, y
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def pairwise_kernel_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kernel: str,
    scales: Sequence[float],
    degree: int = 3,
    offset: float = 1.0,
    exclude_diagonal: bool = False,
) -> Tensor:
    """Row sums of a kernel matrix that is never made: o_i = sum_j sum_s k_s(x_i, y_j).

    ``"rbf"`` exp(-s d^2), ``"imq"`` s / (s + d^2), ``"polynomial"`` (s x.y + offset)^degree, d the Euclidean distance.
    Memory grows with N + M, forward and backward; higher derivatives go through the reference, which keeps the pairs.
    Distances come from products of rows of which the common mean was taken (up to 16 features: from differences): what
    matters is the spread of all rows, not how far they lie from zero.

    Args:
        x: (B, N, C) floating point.
        y: (B, M, C), of another dtype than x's taken with it in the wider; None: x itself, at half the work.
        kernel: "rbf", "imq" or "polynomial".
        scales: s, positive; kernels of several add up.
        degree, offset: of the polynomial.
        exclude_diagonal: leaves out j = i, without y only.

    Returns:
        (B, N), float32 for half-precision x.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: Gretton et al. (JMLR 13, 2012), the sums of equation 3.

    Example:
        >>> import torch, genfast
        >>> genfast.ops.pairwise_kernel_sum(torch.zeros(1, 3, 2), kernel="rbf", scales=[0.5])
        tensor([[3., 3., 3.]])
    """
    _check.floating(_SUM, x=x, y=y)
    if not isinstance(scales, Iterable):
        raise TypeError(f"{_SUM}: scales={scales!r}, expected a sequence of numbers")
    _check.number(_SUM, scales=list(scales), offset=offset)
    x, y = _one_dtype(x, y)
    result: Tensor = OP(x, y, kernel, [float(s) for s in scales], degree, offset, exclude_diagonal)
    return result


def wae_scales(features: int, prior_scale: float = 1.0) -> tuple[float, ...]:
    """The inverse multiquadratic's C of the Wasserstein autoencoder: {.1, .2, .5, 1, 2, 5, 10} * 2 features
    prior_scale^2.

    Source: Tolstikhin et al. (arXiv:1711.01558), in their code (wae.py) for a normal prior.

    Example:
        >>> from genfast.ops.pairwise import wae_scales
        >>> wae_scales(8)[3]
        16.0
    """
    return tuple(f * 2 * features * prior_scale**2 for f in WAE_FACTORS)


def _batched(op: str, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None, bool]:
    """x and y with a batch axis, and whether it was added."""
    _check.floating(op, x=x, y=y)
    if x.dim() not in (2, 3):
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, C) or (B, N, C)")
    if y is not None:
        wanted = (*x.shape[:-2], -1, x.shape[-1])
        if y.dim() != x.dim() or y.shape[-1] != x.shape[-1] or y.shape[:-2] != x.shape[:-2]:
            shape = ", ".join("M" if s < 0 else str(s) for s in wanted)
            raise ValueError(f"{op}: y has shape {tuple(y.shape)}, expected ({shape}) as x has {tuple(x.shape)}")
    x, y = _one_dtype(x, y)
    if x.dim() == 3:
        return x, y, False
    return x.unsqueeze(0), None if y is None else y.unsqueeze(0), True


def _reduced(op: str, value: Tensor, alone: bool, reduction: str) -> Tensor:
    _check.choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if alone:
        return value[0]
    if reduction == "none":
        return value
    return value.mean() if reduction == "mean" and len(value) else value.sum()  # 0 for an empty batch


def _squared_mmd(x: Tensor, y: Tensor, unbiased: bool, options: tuple[Any, ...]) -> Tensor:
    """(B,); the sums of sums in float64, since the terms nearly cancel."""

    def mean(a: Tensor, b: Tensor | None) -> Tensor:
        n, alone = a.shape[1], unbiased and b is None
        pairs = n * (n - 1) if alone else n * (n if b is None else b.shape[1])
        total: Tensor = OP(a, b, *options, alone).sum(1, dtype=torch.float64)
        return total / pairs

    return (mean(x, None) + mean(y, None) - 2 * mean(x, y)).to(accumulator(x.dtype))


def _enough(op: str, x: Tensor, y: Tensor, unbiased: bool) -> None:
    least = 2 if unbiased else 1
    for name, t in (("x", x), ("y", y)):
        if t.shape[1] < least:
            estimate = "an unbiased estimate" if unbiased else "an estimate"
            raise ValueError(f"{op}: {name} has {t.shape[1]} rows, expected at least {least} for {estimate}")


def _median_distance(x: Tensor, y: Tensor) -> Tensor:
    """(B, 1, 1): of at most _MEDIAN_ROWS rows of both, evenly spaced; 1 where half of the rows are equal."""
    with torch.no_grad():
        rows = torch.cat((x, y), 1)
        step = -(-rows.shape[1] // _MEDIAN_ROWS)
        rows = rows[:, ::step].to(accumulator(x.dtype))
        i, j = torch.triu_indices(rows.shape[1], rows.shape[1], 1, device=x.device)
        median = torch.cdist(rows, rows)[:, i, j].median(1).values
        return torch.where(median == 0, 1.0, median)[:, None, None]  # NaN stays


def mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: str = "rbf",
    bandwidths: str | float | Sequence[float] | None = None,
    unbiased: bool = True,
    degree: int = 3,
    gamma: float | None = None,
    offset: float = 1.0,
    prior_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """The squared maximum mean discrepancy of two sets of rows, differentiable in both, without a matrix over pairs.

    mean k(x, x') + mean k(y, y') - 2 mean k(x, y), k summed over the bandwidths.

    Args:
        x, y: (N, C) and (M, C), or (B, N, C) and (B, M, C): a batch of pairs of sets. Of two dtypes both are taken in
            the wider.
        kernel: "rbf" exp(-d^2 / (2 sigma^2)), "imq" s / (s + d^2), "polynomial" (gamma x.y + offset)^degree.
        bandwidths: sigma of "rbf", s of "imq", one or several. None: for "rbf" the ``"median"``, for "imq"
            {.1, .2, .5, 1, 2, 5, 10} * 2 C prior_scale^2, so that ``mmd(z, prior, kernel="imq")`` is the WAE's penalty
            (without its weight). "median": sigma the median distance (s its square) between at most 1024 rows
            of x and y together, evenly spaced, held constant; numbers beside it are not taken.
        unbiased: leaves out the pairs of a row with itself, whereby the value may be negative (Gretton's equation 3).
        degree, gamma, offset: of the polynomial; gamma is 1 / C if None.
        prior_scale: the standard deviation of the prior, for the default of "imq".
        reduction: of a batch: "mean", "sum", "none" for (B,).

    Returns:
        A scalar, or (B,); float32 for half-precision rows. The mean of an empty batch is 0.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name; fewer than two rows, where unbiased.

    Source: Gretton et al. (JMLR 13, 2012), lemma 6; WAE: Tolstikhin et al. (arXiv:1711.01558), algorithm 2.

    Example:
        >>> import torch, genfast
        >>> z, prior = torch.randn(64, 8), torch.randn(64, 8)
        >>> genfast.ops.mmd(z, prior, kernel="imq").shape
        torch.Size([])
    """
    name = "mmd"
    _check.tensors(name, x=x, y=y)
    _check.choice(name, "kernel", kernel, KERNELS)
    _check.number(name, bandwidths=bandwidths, gamma=gamma, offset=offset, prior_scale=prior_scale)
    x, other, alone = _batched(name, x, y)
    assert other is not None
    _enough(name, x, other, unbiased)
    if kernel == "polynomial":
        if bandwidths is not None:
            raise ValueError(
                f"{name}: bandwidths={bandwidths!r}, expected None: a polynomial has gamma, offset and degree"
            )
        scales = [1.0 / max(1, x.shape[2]) if gamma is None else float(gamma)]
    elif bandwidths == "median" or (bandwidths is None and kernel == "rbf"):
        median = _median_distance(x, other).to(x.dtype)
        x, other = x / median, other / median
        scales = [0.5 if kernel == "rbf" else 1.0]
    elif isinstance(bandwidths, str):
        raise ValueError(f"{name}: bandwidths={bandwidths!r}, expected 'median', a number or numbers")
    else:
        given = wae_scales(x.shape[2], prior_scale) if bandwidths is None else bandwidths
        numbers = [float(given)] if isinstance(given, (int, float)) else [float(b) for b in given]
        if not numbers or not all(b > 0 for b in numbers):
            raise ValueError(f"{name}: bandwidths={numbers}, expected at least one, all positive")
        scales = [0.5 / b**2 for b in numbers] if kernel == "rbf" else numbers
    value = _squared_mmd(x, other, unbiased, (kernel, scales, degree, offset))
    return _reduced(name, value, alone, reduction)


def kernel_distance(
    x: Tensor,
    y: Tensor,
    *,
    degree: int = 3,
    gamma: float | None = None,
    offset: float = 1.0,
    subsets: int | None = None,
    subset_size: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The kernel distance (KID) of two sets of features: the unbiased squared MMD under (x.y / C + 1)^3,
    differentiable.

    Args:
        x, y: (N, C) and (M, C) features, or (B, N, C) and (B, M, C), which are B subsets already drawn.
        degree, gamma, offset: of the kernel; gamma is 1 / C if None.
        subsets: draws so many subsets of ``subset_size`` rows of x and of y, each without repetition, and gives the
            distance of each, whose mean and standard deviation papers report. None: all rows at once, which has the
            least variance.
        generator: for the draws.

    Returns:
        A scalar; (subsets,) or (B,) where there are several.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name; a subset_size above the number of rows.

    Source: Binkowski et al. (arXiv:1801.01401, section 4). Equals torchmetrics' and torch-fidelity's on the same
        subsets.

    Example:
        >>> import torch, genfast
        >>> x, y = torch.randn(200, 32), torch.randn(300, 32)
        >>> genfast.ops.kernel_distance(x, y, subsets=5, subset_size=100).shape
        torch.Size([5])
    """
    name = "kernel_distance"
    _check.tensors(name, x=x, y=y)
    _check.number(name, gamma=gamma, offset=offset)
    a, b, alone = _batched(name, x, y)
    assert b is not None
    options = ("polynomial", [1.0 / max(1, x.shape[-1]) if gamma is None else float(gamma)], degree, offset)
    if subsets is None:
        _enough(name, a, b, True)
        value = _squared_mmd(a, b, True, options)
        return value[0] if alone else value
    if not alone:
        raise ValueError(f"{name}: subsets={subsets} of x of shape {tuple(x.shape)}, expected (N, C) to draw from")
    if subsets < 1:
        raise ValueError(f"{name}: subsets={subsets}, expected at least 1")
    if not 2 <= subset_size <= min(x.shape[0], y.shape[0]):
        rows = min(x.shape[0], y.shape[0])
        raise ValueError(f"{name}: subset_size={subset_size}, expected 2 to {rows}, the rows of the smaller set")
    where = "cpu" if generator is None else generator.device
    chosen = []
    for _ in range(subsets):
        drawn = [
            torch.randperm(t.shape[0], generator=generator, device=where)[:subset_size].to(x.device) for t in (x, y)
        ]
        chosen.append(torch.stack(drawn))
    index = torch.stack(chosen, 1)
    step = max(1, _AT_ONCE // max(1, subset_size * x.shape[1]))
    values = [_squared_mmd(x[i], y[j], True, options) for i, j in zip(index[0].split(step), index[1].split(step))]
    return torch.cat(values)


def nearest_neighbors(
    x: Tensor, y: Tensor | None = None, *, k: int = 1, exclude_self: bool = False, squared: bool = False
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of y for each row of x: Euclidean distances, ascending, and indices; no array over pairs.

    Found by products of rows of which the common mean was taken, hence within rounding of the nearest; the distances
    themselves come from differences. Of equal rows the one of lowest index. Differentiable, the choice held constant;
    the slope of the distance to an equal row is zero.

    Args:
        x: (N, C) or (B, N, C) floating point.
        y: (M, C) or (B, M, C), of another dtype than x's taken with it in the wider; None: x itself.
        k: how many.
        exclude_self: a row is not its own neighbour, without y only.
        squared: gives squared distances.

    Returns:
        Distances and int64 indices, (N, k) or (B, N, k); distances are float32 for half-precision x.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name; fewer than k rows.

    Example:
        >>> import torch, genfast
        >>> x, y = torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [7.0], [5.0]])
        >>> distance, index = genfast.ops.nearest_neighbors(x, y)
        >>> index[:, 0]
        tensor([0, 2])
    """
    a, b, alone = _batched("nearest_neighbors", x, y)
    distance, index = OP_NEAREST(a, b, k, exclude_self)
    if not squared:
        apart = distance > 0
        distance = torch.where(apart, torch.where(apart, distance, 1.0).sqrt(), 0.0 * distance)
    return (distance[0], index[0]) if alone else (distance, index)
