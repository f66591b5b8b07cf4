"""Minibatch discrimination (Salimans et al., 1606.03498, section 3.2): o_ib = sum_j exp(-|M_ib - M_jb|_1).

Sums over j run over a few rows i at a time, so that no array of N x N x B x C elements is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

ELEMENTS = 1 << 22  # of the largest array, if one row i does not need more


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def _rows(m: Tensor) -> Iterator[slice]:
    """Slices of rows i whose differences with all rows are a moderate array."""
    step = max(1, ELEMENTS // max(1, m.numel()))
    return (slice(i, min(i + step, m.shape[0])) for i in range(0, m.shape[0], step))


def _kernel(difference: Tensor) -> Tensor:
    """k_ijb = exp(-sum_c |M_ibc - M_jbc|) of (rows, N, B, C) differences."""
    return (-difference.abs().sum(3)).exp()


def pairwise_l1_kernel_sum(m: Tensor, include_self: bool = True) -> Tensor:
    """o_ib = sum_j exp(-sum_c |M_ibc - M_jbc|) of m (N, B, C), (N, B), float32 for half types; j = i if
    ``include_self``."""
    m = _wide(m)
    sums = [m.new_zeros(0, m.shape[1])]
    for rows in _rows(m):
        kernel = _kernel(m[rows, None] - m)
        if not include_self:
            i, j = torch.arange(rows.start, rows.stop, device=m.device), torch.arange(m.shape[0], device=m.device)
            kernel = kernel * (i[:, None] != j)[..., None]
        sums.append(kernel.sum(1))
    return torch.cat(sums)


def pairwise_l1_kernel_sum_backward(m: Tensor, grad: Tensor) -> Tensor:
    """dM_ibc = -sum_j (g_ib + g_jb) k_ijb sign(M_ibc - M_jbc)."""
    wide, g = _wide(m), _wide(grad)
    found = [wide.new_zeros(0, *m.shape[1:])]
    for rows in _rows(wide):
        difference = wide[rows, None] - wide
        weight = (g[rows, None] + g) * _kernel(difference)
        found.append(-(weight.unsqueeze(3) * difference.sign()).sum(1))
    return torch.cat(found).to(m.dtype)


def pairwise_l1_kernel_sum_second_backward(m: Tensor, grad: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of <V, dM> by g and by M with the signs s constant, D_ijb = sum_c s_ijbc (V_ibc - V_jbc):
    dg_ib = -sum_j k_ijb D_ijb, dM_ibc = sum_j (g_ib + g_jb) k_ijb D_ijb s_ijbc."""
    wide, g, v = _wide(m), _wide(grad), _wide(tangent)
    of_grad, of_m = [wide.new_zeros(0, m.shape[1])], [wide.new_zeros(0, *m.shape[1:])]
    for rows in _rows(wide):
        difference = wide[rows, None] - wide
        sign = difference.sign()
        slope = _kernel(difference) * (sign * (v[rows, None] - v)).sum(3)
        of_grad.append(-slope.sum(1))
        of_m.append((((g[rows, None] + g) * slope).unsqueeze(3) * sign).sum(1))
    return torch.cat(of_grad).to(grad.dtype), torch.cat(of_m).to(m.dtype)


def minibatch_discrimination(x: Tensor, weight: Tensor, include_self: bool = True) -> Tensor:
    """o (N, B) of M = x T, x (N, A) and T (A, B, C)."""
    return pairwise_l1_kernel_sum(torch.einsum("na,abc->nbc", x, weight), include_self)
