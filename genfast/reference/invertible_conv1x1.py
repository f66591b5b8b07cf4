"""Invertible 1x1 convolution (Glow, 1807.03039, section 3.2): y = W x per position, logdet = S log|det W|.

W is full, or PLU: W = P L (U + diag(sign e^log_s)), L unit lower and U strictly upper triangular. Fused with the
activation normalisation before it, y = W (s x + b) is one product: (W diag s) x + W b.
"""

from __future__ import annotations

import torch
from torch import Tensor


def channel_mix(
    x: Tensor, x_b: Tensor | None, weight: Tensor, bias: Tensor | None, split: int
) -> tuple[Tensor, Tensor]:
    """y = weight x + bias over the channels of x (and x_b behind it), returned as the channels before and from
    ``split``."""
    dtype = x.dtype
    if x_b is not None:
        x = torch.cat((x, x_b), dim=1)
    if dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    y = torch.einsum("oi,ni...->no...", weight.to(x.dtype), x)
    if bias is not None:
        y = y + bias.to(x.dtype).reshape(1, -1, *([1] * (x.dim() - 2)))
    y = y.to(dtype)
    return y[:, :split].contiguous(), y[:, split:].contiguous()


def channel_mix_backward(
    grad_y: Tensor | None, grad_y_b: Tensor | None, x: Tensor, x_b: Tensor | None, weight: Tensor, split: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx = weight^T d, dweight = sum d x^T, dbias = sum d over batch and positions. Returns (dx, dx_b, dweight,
    dbias)."""
    dtype, channels = x.dtype, weight.shape[0]
    shape = list(x.shape)
    d_a = x.new_zeros([shape[0], split, *shape[2:]]) if grad_y is None else grad_y
    d_b = x.new_zeros([shape[0], channels - split, *shape[2:]]) if grad_y_b is None else grad_y_b
    d = torch.cat((d_a, d_b), dim=1)
    whole = x if x_b is None else torch.cat((x, x_b), dim=1)
    if dtype in (torch.bfloat16, torch.float16):
        d, whole = d.float(), whole.float()
    dx = torch.einsum("oi,no...->ni...", weight.to(d.dtype), d).to(dtype)
    dweight = torch.einsum("no...,ni...->oi", d, whole)
    dbias = d.sum([i for i in range(d.dim()) if i != 1])
    first = x.shape[1]
    return (
        dx[:, :first].contiguous(),
        dx[:, first:].contiguous(),
        dweight.contiguous().to(weight.dtype),
        dbias.to(weight.dtype),
    )


def plu_matrix(perm: Tensor, lower: Tensor, upper: Tensor, sign_s: Tensor, log_s: Tensor) -> Tensor:
    """W = P L (U + diag(sign e^log_s)); row i of P M is row perm[i] of M. Only the strict triangles are read."""
    eye = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
    left = torch.tril(lower, -1) + eye
    right = torch.triu(upper, 1) + torch.diag(sign_s.to(log_s.dtype) * log_s.exp())
    return (left @ right)[perm]


def plu_weight(
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
    """The folded step: (W diag s, W b, logdet (batch,)); without an activation norm (W, zeros, logdet)."""
    weight = plu_matrix(perm, lower, upper, sign_s, log_s)
    unit = log_s.sum()
    folded = torch.zeros_like(log_s) if bias is None else weight @ bias
    if scale is not None:
        weight = weight * (scale.exp() if log_scale else scale)
        unit = unit + (scale if log_scale else scale.abs().log()).sum()
    return weight, folded, (positions * unit).expand(batch).clone()


def plu_inverse(perm: Tensor, lower: Tensor, upper: Tensor, sign_s: Tensor, log_s: Tensor) -> Tensor:
    """W^-1 = (U + diag)^-1 L^-1 P^T, by triangular solves in float64."""
    eye = torch.eye(lower.shape[0], dtype=torch.float64, device=lower.device)
    left = torch.tril(lower.double(), -1) + eye
    right = torch.triu(upper.double(), 1) + torch.diag(sign_s.double() * log_s.double().exp())
    solved = torch.linalg.solve_triangular(left, eye[perm].t(), upper=False, unitriangular=True)
    result: Tensor = torch.linalg.solve_triangular(right, solved, upper=True)
    return result.to(lower.dtype)


def plu_weight_backward(
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
    """The closed form, through W = P A, A = L R: dA = P^T dW, dL = tril(dA R^T, -1), dR = L^T dA.

    Returns (dlower, dupper, dlog_s, dscale, dbias), the last two empty where there is no activation norm.
    """
    c = log_s.shape[0]
    eye = torch.eye(c, dtype=lower.dtype, device=lower.device)
    left = torch.tril(lower, -1) + eye
    s_diag = sign_s * log_s.exp()
    right = torch.triu(upper, 1) + torch.diag(s_diag)
    weight = (left @ right)[perm]
    g = log_s.new_zeros(()) if grad_logdet is None else positions * grad_logdet.sum()
    d_weight = torch.zeros_like(lower) if grad_weight is None else grad_weight
    dscale = dbias = log_s.new_zeros(0)
    if scale is not None:
        s = scale.exp() if log_scale else scale
        ds = (d_weight * weight).sum(0)
        dscale = ds * s + g if log_scale else ds + g / s
        d_weight = d_weight * s
    if bias is not None:
        d_folded = torch.zeros_like(log_s) if grad_folded is None else grad_folded
        dbias = weight.t() @ d_folded
        d_weight = d_weight + d_folded[:, None] * bias
    d_a = d_weight[perm.argsort()]
    d_left, d_right = torch.tril(d_a @ right.t(), -1), left.t() @ d_a
    return d_left, torch.triu(d_right, 1), d_right.diagonal() * s_diag + g, dscale, dbias
