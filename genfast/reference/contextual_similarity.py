"""Contextual similarity (Mechrez et al., 1803.02077, section 3.2) of rows x_i and y_j:

d_ij = distance, r_i = min_k d_ik + eps, t_ij = d_ij / r_i, A_ij = exp((1 - t_ij)/h) / sum_k exp((1 - t_ik)/h),
and with a spatial term (Zhang et al., 1905.05169, as their code has it) S_ij = (1 - w) A_ij + w P_ij; then the maximum
of S over the sources i of each target j, or over the targets j of each source i.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def contextual_distance(x: Tensor, y: Tensor, distance: str) -> Tensor:
    """d_ij of x (B, N, C) and y (B, M, C): (B, N, M). relu: below zero is rounding, and through a zero nothing flows.

    "cosine" takes unit rows (or zero rows): 1 - x_i.y_j; "l2" is |x_i - y_j|^2, "l1" the sum of |x_ic - y_jc|.
    """
    if distance == "l1":
        return (x.unsqueeze(2) - y.unsqueeze(1)).abs().sum(3)
    product = x @ y.mT
    if distance == "cosine":
        return (1 - product).relu()
    return (x.square().sum(2).unsqueeze(2) + y.square().sum(2).unsqueeze(1) - 2 * product).relu()


def contextual_similarity(
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
    """The maxima (B, M), or (B, N) over targets, and their indices; m_i, sum_j exp(-t'_ij/h) but for the nearest, which
    adds 1, and sum_j A_ij t'_ij as (B, 3, N), with t'_ij = t_ij - m_i / r_i; the index a of m_i (B, N); sum_j A_ij (y_j
    - y_a) (B, N, C) if ``keep_mean``. Ties go to the lowest index. The prior is P_ij = prior_rows[i, r]
        prior_columns[i, c] for
    target j = (r, c). Only the maxima have a derivative.

    A does not see what is added to a row of t. Relative to the nearest target nothing cancels where x_i lies on it,
    which 1 / (h r_i) would magnify."""
    rows, targets = _wide(x), _wide(y)
    d = contextual_distance(rows, targets, distance)
    nearest = d.argmin(2)
    at = nearest.unsqueeze(2)
    least = d.gather(2, at)
    t = (d - least) / (least + eps)
    logits = -t / bandwidth
    similarity = a = logits.softmax(2)
    if prior_rows is not None and prior_columns is not None:
        prior = (_wide(prior_rows).unsqueeze(2) * _wide(prior_columns).unsqueeze(1)).flatten(1)
        similarity = (1 - prior_weight) * a + prior_weight * prior.to(a.dtype)
    axis = 1 if over == "sources" else 2
    winner = similarity.argmax(axis)
    value = similarity.gather(axis, winner.unsqueeze(axis)).squeeze(axis)
    with torch.no_grad():
        rest = logits.exp().scatter(2, at, 0).sum(2)
        statistics = torch.stack((least.squeeze(2), rest, (a * t).sum(2)), 1)
        mean = value.new_empty(0)
        if keep_mean:
            others = a.scatter(2, at, 0)
            mean = others @ targets - others.sum(2, keepdim=True) * targets.take_along_dim(at, 1)
    return value, winner, statistics, nearest, mean


def contextual_similarity_backward(
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
    """The gradients of <grad, value> by x and by y, empty where not needed, from the indices alone: what else the
    forward kept is a function of x and y, which a second derivative must see. With g the gradient at the winners, zero
    elsewhere: dl = A (g - sum_j A g), dt = -dl / h, dd = dt / r, and -sum_j dt t / r at the nearest. dt sums to zero
        over a row: at the
    nearest it is minus the sum of the others, and t is taken relative to it."""
    axis = 1 if over == "sources" else 2
    rows, targets, g = _wide(x), _wide(y), _wide(grad)
    at = nearest.unsqueeze(2)
    d = contextual_distance(rows, targets, distance)
    least = d.gather(2, at)
    r = least + eps
    t = (d - least) / r
    a = (-t / bandwidth).softmax(2)
    share = 1 - prior_weight if prior_rows is not None else 1.0
    weight = torch.zeros_like(a).scatter(axis, winner.unsqueeze(axis), (share * g.to(a.dtype)).unsqueeze(axis))
    of_t = (-a * (weight - (a * weight).sum(2, keepdim=True)) / bandwidth).scatter(2, at, 0)
    of_t = of_t.scatter(2, at, -of_t.sum(2, keepdim=True))
    of_d = of_t / r
    of_d = of_d.scatter_add(2, at, -(of_t * t).sum(2, keepdim=True) / r)
    if distance == "l1":
        sign = (rows.unsqueeze(2) - targets.unsqueeze(1)).sign() * of_d.unsqueeze(3)
        dx, dy = sign.sum(2), -sign.sum(1)
    else:
        of_d = of_d * (d > 0)
        dx, dy = -(of_d @ targets), -(of_d.mT @ rows)
        if distance == "l2":
            dx = 2 * (of_d.sum(2).unsqueeze(2) * rows + dx)
            dy = 2 * (of_d.sum(1).unsqueeze(2) * targets + dy)
    return dx.to(x.dtype) if need_x else x.new_empty(0), dy.to(y.dtype) if need_y else y.new_empty(0)
