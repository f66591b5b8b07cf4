"""Sums of kernels over pairs of rows (MMD: Gretton et al., JMLR 13, 2012; KID: Binkowski et al., 1801.01401), nearest
rows.

    o_i = sum_j sum_s k_s(x_i, y_j),   squared distance d_ij = sum_c (x_ic - y_jc)^2
    rbf         k_s = exp(-s d_ij),  s = 1 / (2 sigma^2)
    imq         k_s = s / (s + d_ij)                        inverse multiquadratic (WAE: Tolstikhin et al., 1711.01558)
    polynomial  k_s = (s x_i.y_j + offset)^degree

Sums over j run over a few rows i at a time, so that no array of N x M x C elements is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

KERNELS = ("rbf", "imq", "polynomial")
ELEMENTS = 1 << 22  # of the largest array, if one row i does not need more


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def _rows(x: Tensor, y: Tensor) -> Iterator[slice]:
    """Slices of rows i whose differences with all rows of y are a moderate array."""
    step = max(1, ELEMENTS // max(1, y.numel()))
    return (slice(i, min(i + step, x.shape[1])) for i in range(0, x.shape[1], step))


def _others(rows: slice, like: Tensor) -> Tensor:
    """(rows, M) booleans, false where j = i."""
    i, j = torch.arange(rows.start, rows.stop, device=like.device), torch.arange(like.shape[1], device=like.device)
    return i[:, None] != j


def pairwise_kernel_sum(
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    scales: Sequence[float],
    degree: int,
    offset: float,
    exclude_diagonal: bool,
) -> Tensor:
    """o (B, N) of x (B, N, C) and y (B, M, C), x itself if None; ``exclude_diagonal`` leaves out j = i."""
    x = _wide(x)
    y = x if y is None else _wide(y)
    sums = [x.new_zeros(x.shape[0], 0)]
    for rows in _rows(x, y):
        if kernel == "polynomial":
            product = x[:, rows] @ y.mT
            k = sum((s * product + offset) ** degree for s in scales)
        else:
            d = (x[:, rows, None] - y[:, None]).square().sum(3)
            k = sum((-s * d).exp() if kernel == "rbf" else s / (s + d) for s in scales)
        assert isinstance(k, Tensor)
        sums.append((k * _others(rows, y) if exclude_diagonal else k).sum(2))
    return torch.cat(sums, 1)


def pairwise_kernel_sum_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    kernel: str,
    scales: Sequence[float],
    degree: int,
    offset: float,
    exclude_diagonal: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    """With k'_ij the derivative of sum_s k_s by d_ij, or by x_i.y_j for a polynomial:

    dx_i = sum_j g_i k'_ij 2 (x_i - y_j),  dy_j = -sum_i g_i k'_ij 2 (x_i - y_j);  polynomial: y_j, x_i for the
    differences.
    Without y both meet in dx: g_i + g_j in place of g_i. What is not needed is empty.
    """
    g, wide = _wide(grad), _wide(x)
    other = wide if y is None else _wide(y)
    dx, dy = [wide.new_zeros(x.shape[0], 0, x.shape[2])], torch.zeros_like(other)
    for rows in _rows(wide, other):
        weight = g[:, rows, None].expand(-1, -1, other.shape[1])
        if y is None:
            weight = weight + g[:, None]
        if exclude_diagonal:
            weight = weight * _others(rows, other)
        if kernel == "polynomial":
            product = wide[:, rows] @ other.mT
            slope = sum(s * degree * (s * product + offset) ** (degree - 1) for s in scales)
            dx.append((weight * slope) @ other)
            dy = dy + (weight * slope).mT @ wide[:, rows]
        else:
            difference = wide[:, rows, None] - other[:, None]
            d = difference.square().sum(3)
            slope = sum(-s * (-s * d).exp() if kernel == "rbf" else -s / (s + d).square() for s in scales)
            pull = (2 * weight * slope).unsqueeze(3) * difference
            dx.append(pull.sum(2))
            dy = dy - pull.sum(1)
    empty = x.new_zeros(0)
    keep_y = need_y and y is not None
    return torch.cat(dx, 1).to(x.dtype) if need_x else empty, dy.to(x.dtype) if keep_y else empty


def nearest_rows(x: Tensor, y: Tensor | None, k: int, exclude_self: bool) -> tuple[Tensor, Tensor]:
    """The k least d_ij of each i in ascending order and their j, (B, N, k) each; of equal ones the lowest j.

    y None: x itself; ``exclude_self`` leaves out j = i.
    """
    x = _wide(x)
    y = x if y is None else _wide(y)
    distances = [x.new_zeros(x.shape[0], 0, k)]
    indices = [torch.zeros(x.shape[0], 0, k, dtype=torch.int64, device=x.device)]
    for rows in _rows(x, y):
        d = (x[:, rows, None] - y[:, None]).square().sum(3)
        if exclude_self:
            d = d.masked_fill(~_others(rows, y), float("inf"))
        value, index = d.sort(dim=2, stable=True)
        distances.append(value[..., :k])
        indices.append(index[..., :k])
    return torch.cat(distances, 1), torch.cat(indices, 1)


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: str,
    scales: Sequence[float],
    degree: int = 3,
    offset: float = 1.0,
    unbiased: bool = True,
) -> Tensor:
    """Squared MMD of x (B, N, C) and y (B, M, C): mean k(x, x') + mean k(y, y') - 2 mean k(x, y), (B,).

    Gretton et al., equation 3; ``unbiased`` leaves out the pairs of a row with itself.
    """

    def mean(a: Tensor, b: Tensor | None) -> Tensor:
        n, alone = a.shape[1], unbiased and b is None
        pairs = n * (n - 1) if alone else n * (n if b is None else b.shape[1])
        return pairwise_kernel_sum(a, b, kernel, scales, degree, offset, alone).sum(1) / pairs

    return mean(x, None) + mean(y, None) - 2 * mean(x, y)
