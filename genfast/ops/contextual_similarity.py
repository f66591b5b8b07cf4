"""ops.contextual_similarity: nearest-neighbour similarity of two sets of features, in memory that grows with their
number and not with its square."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _allocator, reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from .._tensors import accumulator
from . import _check

_NAME = "contextual_similarity"
_FIELDS = """
    is_double over_targets distance x y prior_rows prior_columns value winner statistics nearest mean work? prior_weight
    bandwidth eps b n m c prior_height prior_width threads
"""
_CPU = kernels(
    "_cpu", "indices_within", contextual_similarity=_FIELDS, contextual_similarity_backward=f"{_FIELDS} grad dx dy"
)
DISTANCES = ("cosine", "l2", "l1")
OVER = ("sources", "targets")
CENTERS = (True, False, "batch", "sample", "channel")
# A difference of that many units in the last place of what was subtracted is rounding, and has no direction.
_NOISE = 8


def _check_rows(
    x: Tensor,
    y: Tensor,
    prior_rows: Tensor | None,
    prior_columns: Tensor | None,
    prior_weight: float,
    bandwidth: float,
    eps: float,
    distance: str,
    over: str,
    keep_mean: bool,
) -> None:
    _check.floating(_NAME, x=x, y=y, prior_rows=prior_rows, prior_columns=prior_columns)
    _check.choice(_NAME, "distance", distance, DISTANCES)
    _check.choice(_NAME, "over", over, OVER)
    for name, t in (("x", x), ("y", y)):
        if t.dim() != 3:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(t.shape)}, expected (batch, positions, channels)")
    _check.shape(_NAME, "y", y, (x.shape[0], y.shape[1], x.shape[2]), "batch and channels as x's")
    if x.dtype != y.dtype:
        raise TypeError(f"{_NAME}: y has dtype {y.dtype} and x {x.dtype}, expected the same")
    if not x.shape[1] or not y.shape[1] or not x.shape[2]:
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)} and y {tuple(y.shape)}, expected at least one position and channel"
        )
    _check_numbers(bandwidth, eps, prior_weight)
    if (prior_rows is None) != (prior_columns is None):
        raise ValueError(f"{_NAME}: of prior_rows and prior_columns one is None, expected both or neither")
    if prior_rows is not None and prior_columns is not None:
        for name, t in (("prior_rows", prior_rows), ("prior_columns", prior_columns)):
            if t.dim() != 2 or t.shape[0] != x.shape[1]:
                raise ValueError(
                    f"{_NAME}: {name} has shape {tuple(t.shape)}, expected ({x.shape[1]}, size): a row for each of x"
                )
        if prior_rows.shape[1] * prior_columns.shape[1] != y.shape[1]:
            raise ValueError(
                f"{_NAME}: the prior is of {prior_rows.shape[1]} x {prior_columns.shape[1]} targets, expected "
                f"{y.shape[1]}"
            )
    if keep_mean and distance == "l1":
        raise ValueError(f"{_NAME}: keep_mean=True with distance='l1', whose gradient has no use for the mean")


def _check_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    prior_rows: Tensor | None,
    prior_columns: Tensor | None,
    prior_weight: float,
    bandwidth: float,
    eps: float,
    distance: str,
    over: str,
    value: Tensor,
    winner: Tensor,
    statistics: Tensor,
    nearest: Tensor,
    mean: Tensor,
    *_: Any,
) -> None:
    _check_rows(x, y, prior_rows, prior_columns, prior_weight, bandwidth, eps, distance, over, False)
    op, (b, n, c) = f"{_NAME}_backward", x.shape
    of = (b, y.shape[1] if over == "sources" else n)
    _check.shapes(
        op,
        grad=(grad, of, "that of value"),
        value=(value, of, f"for over={over!r}"),
        winner=(winner, of, f"for over={over!r}"),
        statistics=(statistics, (b, 3, n), "three a source"),
        nearest=(nearest, (b, n), "one a source"),
        mean=(mean, (b, n, c) if mean.dim() == 3 else (0,), "x's shape, or (0,) where it was not kept"),
    )
    _check.same_dtype(op, accumulator(x.dtype), value=value, statistics=statistics, mean=mean)


def _check_numbers(bandwidth: float, eps: float, spatial_weight: float) -> None:
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"{_NAME}: bandwidth={bandwidth}, expected a positive number")
    if not 0 < eps < math.inf:
        raise ValueError(f"{_NAME}: eps={eps}, expected a positive number: a source may lie on a target")
    if not 0 <= spatial_weight < 1:
        raise ValueError(f"{_NAME}: spatial_weight={spatial_weight}, expected 0 <= spatial_weight < 1")


def _call(
    kernel: Any,
    x: Tensor,
    y: Tensor,
    prior: tuple[Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    tensors: Sequence[Tensor],
) -> None:
    """Runs a C++ kernel, or one that has its gradients; what it works in is a tensor, so that it is counted with the
    rest."""
    prior_weight, bandwidth, eps, distance, over = options
    down, across = (None if t is None else t.to(x.dtype).contiguous() for t in prior)
    value, winner, statistics, nearest, mean = tensors
    prepared = kernel.prepare(
        is_double=x.dtype is torch.float64,
        over_targets=over == "targets",
        distance=DISTANCES.index(distance),
        x=x,
        y=y,
        prior_rows=down,
        prior_columns=across,
        value=value,
        winner=winner,
        statistics=statistics,
        nearest=nearest,
        mean=mean,
        prior_weight=prior_weight,
        bandwidth=bandwidth,
        eps=eps,
        b=x.shape[0],
        n=x.shape[1],
        m=y.shape[1],
        c=y.shape[2],
        prior_height=0 if down is None else down.shape[1],
        prior_width=0 if across is None else across.shape[1],
        threads=torch.get_num_threads(),
    )
    work = _allocator.empty_strided((prepared() // 8 + 8,), (1,), torch.float64)
    prepared(work=work.data_ptr() + -work.data_ptr() % 64)


def _cpu(
    x: Tensor,
    y: Tensor,
    prior_rows: Tensor | None,
    prior_columns: Tensor | None,
    prior_weight: float,
    bandwidth: float,
    eps: float,
    distance: str,
    over: str,
    keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check_rows(x, y, prior_rows, prior_columns, prior_weight, bandwidth, eps, distance, over, keep_mean)
    output: tuple[Tensor, ...] = OP.empty(
        x, y, prior_rows, prior_columns, prior_weight, bandwidth, eps, distance, over, keep_mean
    )
    if x.numel():
        options = (prior_weight, bandwidth, eps, distance, over)
        _call(_CPU.contextual_similarity, x.contiguous(), y.contiguous(), (prior_rows, prior_columns), options, output)
    return output[0], output[1], output[2], output[3], output[4]


def _cpu_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    prior_rows: Tensor | None,
    prior_columns: Tensor | None,
    prior_weight: float,
    bandwidth: float,
    eps: float,
    distance: str,
    over: str,
    value: Tensor,
    winner: Tensor,
    statistics: Tensor,
    nearest: Tensor,
    mean: Tensor,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    dx, dy = x.new_empty(x.shape if need_x else 0), y.new_empty(y.shape if need_y else 0)
    if x.numel() and (need_x or need_y):
        options = (prior_weight, bandwidth, eps, distance, over)
        kept = [t.contiguous() for t in (value, winner, statistics, nearest, mean)]
        of = x.shape[1] if over == "sources" else y.shape[1]
        for name, index, size in (("winner", kept[1], of), ("nearest", kept[3], y.shape[1])):
            if not _CPU.indices_within(index.data_ptr(), index.numel(), size):
                raise ValueError(f"{_NAME}_backward: {name} has values that are not from 0 to {size - 1}")
        kernel = _CPU.contextual_similarity_backward.prepare(grad=grad.to(x.dtype).contiguous(), dx=dx, dy=dy)
        _call(kernel, x.contiguous(), y.contiguous(), (prior_rows, prior_columns), options, kept)
    return dx, dy


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def rows(count: int, c: int, distance: str, batch: int = 2) -> Tensor:
        made = torch.randn(batch, count, c, generator=generator, dtype=torch.float64)
        return made / made.norm(dim=2, keepdim=True) if distance == "cosine" else made

    def prior(count: int, size: int) -> Tensor:
        return torch.randn(count, size, generator=generator, dtype=torch.float64).softmax(1)

    for distance in DISTANCES:
        for over in OVER:
            x, y = rows(9, 5, distance), rows(7, 5, distance)
            yield Sample(
                f"{distance}, over {over}", (x, y, None, None, 0.0, 0.5, 1e-2, distance, over, distance == "cosine")
            )
    for over in OVER:
        x, y = rows(11, 8, "cosine"), rows(6, 8, "cosine")
        tables = prior(11, 2), prior(11, 3)
        yield Sample(f"spatial, over {over}", (x, y, *tables, 0.3, 0.5, 1e-2, "cosine", over, False), (2, 3))
    x, y = rows(75, 6, "cosine", 1), rows(70, 6, "cosine", 1)
    yield Sample("several panels", (x, y, None, None, 0.0, 0.3, 1e-2, "cosine", "sources", True))
    yield Sample("several panels, kept", (x, y, None, None, 0.0, 0.3, 1e-2, "cosine", "sources", False))
    yield Sample("one target", (rows(4, 3, "l2"), rows(1, 3, "l2"), None, None, 0.0, 0.5, 1e-2, "l2", "sources", False))
    yield Sample(
        "one source",
        (rows(1, 3, "cosine"), rows(5, 3, "cosine"), None, None, 0.0, 0.5, 1e-2, "cosine", "sources", False),
    )


OP = Op(
    "contextual_similarity(Tensor x, Tensor y, Tensor? prior_rows, Tensor? prior_columns, float prior_weight, "
    "float bandwidth, float eps, str distance, str over, bool keep_mean)",
    reference=reference.contextual_similarity,
    outputs={
        "value": "(N, y.shape[1] if over == 'sources' else C) like x as accumulator",
        "winner": "(N, y.shape[1] if over == 'sources' else C) like x as int64",
        "statistics": "(N, 3, C) like x as accumulator",
        "nearest": "(N, C) like x as int64",
        "mean": "contiguous like x as accumulator if keep_mean",
    },
    check=_check_rows,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad, x, y, prior_rows, prior_columns, prior_weight, bandwidth, eps, distance, over, "
        "value, winner, statistics, nearest, mean, need_x, need_y -> x, y",
        outputs={"x": "contiguous like x", "y": "contiguous like y"},
        reference=reference.contextual_similarity_backward,
        check=_check_backward,
        argument_dtypes={"winner": (torch.int64,), "nearest": (torch.int64,)},
        may_be_empty=("mean",),
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def _check_maps(x: Tensor, y: Tensor, center: bool | str, distance: str, reduction: str) -> None:
    _check.tensors(_NAME, x=x, y=y)
    _check.floating(_NAME, x=x, y=y)
    for name, t in (("x", x), ("y", y)):
        if t.dim() < 3:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(t.shape)}, expected (batch, channels, *positions)")
        if t.dim() and not math.prod(t.shape[1:]):
            raise ValueError(f"{_NAME}: {name} has shape {tuple(t.shape)}, expected at least one channel and position")
    _check.shape(_NAME, "y", y, (*x.shape[:2], *y.shape[2:]), "batch and channels as x's")
    _check.choice(_NAME, "distance", distance, DISTANCES)
    _check.choice(_NAME, "reduction", reduction, ("mean", "none"))
    if center not in CENTERS:
        raise ValueError(f"{_NAME}: center={center!r}, expected one of {', '.join(map(repr, CENTERS))}")
    if center == "channel" and x.shape[2:] != y.shape[2:]:
        raise ValueError(
            f"{_NAME}: center='channel' takes from each position of x the mean of y there, and x has positions "
            f"{tuple(x.shape[2:])}, y {tuple(y.shape[2:])}"
        )


def _rows(x: Tensor, mu: Tensor | None, noise: Tensor | None, unit: bool, dtype: torch.dtype) -> Tensor:
    """x (B, C, N) less mu as rows (B, N, C); unit rows, and zero for those within ``noise`` (squared) of the mean.

    The derivative of x / |x| has no bound near zero: a row of which nothing but rounding is left has none. What is not
    finite is no rounding: it stays.
    """
    if mu is not None:
        x = x - mu
    if unit:
        squares = x.square().sum(1, keepdim=True)
        live = ~((squares <= (0 if noise is None else noise)) & squares.isfinite())
        x = torch.where(live, x / torch.where(live, squares, 1).sqrt(), 0)
    return x.mT.to(dtype).contiguous()


def _prepared(x: Tensor, y: Tensor, center: bool | str, distance: str) -> tuple[Tensor, Tensor]:
    """Feature maps as the rows that the op takes: centred, and normalised for the cosine, in float32 at the least."""
    dtype = torch.promote_types(x.dtype, y.dtype)
    kept = dtype if x.is_cuda else accumulator(dtype)  # the C++ kernels take float32 and float64
    x, y = (t.flatten(2).to(accumulator(dtype)) for t in (x, y))
    mu = noise = None
    if center:
        mu = y.mean({"sample": (2,), "channel": (1,)}.get(str(center), (0, 2)), keepdim=True)
        size = mu.square().sum(1, keepdim=True) * (x.shape[1] if center == "channel" else 1)
        noise = (size * (_NOISE * torch.finfo(x.dtype).eps) ** 2).detach()
    unit = distance == "cosine"
    return _rows(x, mu, noise, unit, kept), _rows(y, mu, noise, unit, kept)


def _grid(x: Tensor) -> tuple[int, int]:
    if x.dim() > 4:
        raise ValueError(
            f"{_NAME}: spatial_weight with x or y of shape {tuple(x.shape)}, expected one or two spatial axes"
        )
    return (1, x.shape[2]) if x.dim() == 3 else (x.shape[2], x.shape[3])


def _prior(x: Tensor, y: Tensor, bandwidth: float, eps: float, scale: float) -> tuple[Tensor, Tensor]:
    """The similarity of positions on the grids of x and y, separable: exp(-(dr^2 + dc^2) / (r_i h)) over its sum over
    targets.

    r_i is eps more than the least squared distance to a target, which is not zero where the grids differ.
    """
    squares = []
    for size, other in zip(_grid(x), _grid(y)):
        dtype = accumulator(torch.promote_types(x.dtype, y.dtype))
        here, there = (torch.arange(n, device=x.device, dtype=dtype) * (scale / n) for n in (size, other))
        squares.append((here.unsqueeze(1) - there).square())
    down, across = squares
    r = (down.amin(1).unsqueeze(1) + across.amin(1) + eps).flatten() * bandwidth
    rows = down.repeat_interleave(len(across), 0) / r.unsqueeze(1)
    columns = across.repeat(len(down), 1) / r.unsqueeze(1)
    return (-rows).softmax(1), (-columns).softmax(1)


def contextual_similarity(
    x: Tensor,
    y: Tensor,
    *,
    bandwidth: float = 0.5,
    distance: str = "cosine",
    eps: float = 1e-5,
    center: bool | str = True,
    over: str = "sources",
    spatial_weight: float = 0.0,
    spatial_bandwidth: float | None = None,
    spatial_eps: float = 1e-5,
    spatial_scale: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Contextual similarity CX of two feature maps, in [1/M, 1], without an array of N x M elements.

    With d_ij the distance of feature i of x (N of them) and j of y (M), t_ij = d_ij / (min_k d_ik + eps) and
    A_ij = exp((1 - t_ij)/h) / sum_k exp((1 - t_ik)/h), the minimum and the sum over the **targets** (y) of each source
    (x). Two conventions of the maximum are published:

    - ``over="sources"``: CX = mean_j max_i A_ij, the best source of each target (the paper, its TensorFlow code and
        most
      ports; CoCosNet's ContextualLoss).
    - ``over="targets"``: CX = mean_i max_j A_ij, the best target of each source (CoCosNet's ContextualLoss_forward, the
        one
      that it trains with; the bilateral form of S-aiueo32's port).

    Saved for the backward: the rows, and O(N + M) numbers. Rows of x that win no column have exactly zero gradient.
        Ties go to
    the lowest index, and neither threads nor runs change a bit. Where a distance is zero to rounding, nothing flows
    through it.

    Args:
        x: (B, C, *spatial) floating point features of the source (the generated image).
        y: (B, C, *spatial) features of the target; as many positions as x or not. Of another dtype than x's (a float32
            target under autocast) both are taken in the wider.
        bandwidth: h.
        distance: "cosine", 1 - cos of the centred features; "l2", the squared distance; "l1", the sum of differences.
        eps: on that scale. Codes that halve the cosine distance have half of it: 1e-5 there is 2e-5 here.
        center: True or "batch", "sample", "channel": takes from both the mean of y over batch and positions, over the
            positions of each sample, or over the channels at each position (CoCosNet's PONO); False: nothing. A feature
            that equals the mean to within rounding has distance 1 from all and no gradient.
        over: the maximum's axis, as above.
        spatial_weight: w of the bilateral form, (1 - w) A_ij + w P_ij in place of A_ij, where P is the same similarity
            of positions at squared distance; it is separable, and no array of it is made either. One or two spatial
            axes.
        spatial_bandwidth, spatial_eps, spatial_scale: of P; the bandwidth is that of the features without. Position k
        of n
            is at spatial_scale * k / n.
        reduction: "mean" over the batch, or "none".

    Returns:
        CX, a scalar or (B,); float32 for half-precision features. NaN where a feature is not finite; 0 for an empty
        batch.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: Mechrez et al. (arXiv:1803.02077, section 3.2); the bilateral form as in the code of Zhang et al.
    (arXiv:1905.05169), which weighs similarities where the paper adds distances; the paper's form is not here.

    Example:
        >>> import torch, genfast
        >>> x = torch.randn(2, 16, 8, 8)
        >>> print(f"{genfast.ops.contextual_similarity(x, x):.4f}")
        1.0000
    """
    _check_maps(x, y, center, distance, reduction)
    _check_numbers(bandwidth, eps, spatial_weight)
    prior: tuple[Tensor | None, Tensor | None] = (None, None)
    if spatial_weight:
        spatial_bandwidth = bandwidth if spatial_bandwidth is None else spatial_bandwidth
        for name, number in (("bandwidth", spatial_bandwidth), ("eps", spatial_eps), ("scale", spatial_scale)):
            if not 0 < number < math.inf:
                raise ValueError(f"{_NAME}: spatial_{name}={number}, expected a positive number")
        prior = _prior(x, y, spatial_bandwidth, spatial_eps, spatial_scale)
    rows, targets = _prepared(x, y, center, distance)
    # With the mean kept the backward makes no product: measured faster where rows of x alone need a gradient.
    keep_mean = rows.requires_grad and not targets.requires_grad and torch.is_grad_enabled()
    keep_mean = keep_mean and distance != "l1" and not spatial_weight
    value: Tensor = OP(rows, targets, *prior, spatial_weight, bandwidth, eps, distance, over, keep_mean)[0]
    found = value.mean(1)
    if reduction == "none":
        return found
    return found.mean() if len(found) else found.sum()  # the mean of nothing would be NaN
