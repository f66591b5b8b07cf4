"""The neural autoregressive distribution estimator, as the papers write it: one step after the other over the
dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}
KINDS = ("bernoulli", "categorical", "gaussian_mixture")


def _slope(h: Tensor, activation: str) -> Tensor:
    """act'(z) from h = act(z)."""
    if activation == "relu":
        return (h > 0).to(h.dtype)
    return h * (1 - h) if activation == "sigmoid" else 1 - h * h


def _wide(like: Tensor, *tensors: Tensor | None) -> list[Any]:
    """All in the dtype of the first, and float32 at least."""
    dtype = like.dtype if like.element_size() >= 4 else torch.float32
    return [t if t is None else t.to(dtype) for t in (like, *tensors)]


def nade(
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
) -> Tensor:
    """Parameters (N, D, P) of p(x_d | x_<d): a_1 = c, h_d = act(rho_d a_d), p_d = b_d + V_d h_d, a_{d+1} = a_d + W_d
    x_d."""
    given, w, v, b, c, rho = _wide(x, weight, readout, bias, hidden_bias, rescale)
    a = c.expand(x.shape[0], -1)
    params = []
    for d in range(x.shape[1]):
        h = ACTIVATIONS[activation](a if rho is None else rho[d] * a)
        params.append(b[d] + h @ v[d].t())
        a = a + given[:, d, None] * w[d]
    return torch.stack(params, 1).to(x.dtype)


def nade_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless ``need_x``), weight, readout, bias, hidden_bias and rescale (empty without one).

    The scan in reverse, with e the cotangent of a: e_d = e_{d+1} + rho_d act'(rho_d a_d) V_d^T g_d.
    """
    given, w, v, c, rho, g = _wide(x, weight, readout, hidden_bias, rescale, grad)
    steps = x.shape[1]
    states = [c.expand(x.shape[0], -1)]
    for d in range(steps - 1):
        states.append(states[-1] + given[:, d, None] * w[d])
    e = torch.zeros_like(states[0])
    dx, dw, dv, drho = [], [], [], []
    for d in reversed(range(steps)):
        dx.append(e @ w[d])
        dw.append(given[:, d] @ e)
        h = ACTIVATIONS[activation](states[d] if rho is None else rho[d] * states[d])
        dv.append(g[:, d].t() @ h)
        dz = (g[:, d] @ v[d]) * _slope(h, activation)
        if rho is not None:
            drho.append((dz * states[d]).sum())
        e = e + (dz if rho is None else rho[d] * dz)

    def stacked(parts: list[Tensor], axis: int = 0) -> Tensor:
        return torch.stack(parts[::-1], axis)

    return (
        stacked(dx, 1).to(x.dtype) if need_x else x.new_empty(0),
        stacked(dw).to(weight.dtype),
        stacked(dv).to(readout.dtype),
        g.sum(0).to(readout.dtype),
        (e if hidden_bias.dim() == 2 else e.sum(0)).to(hidden_bias.dtype),
        x.new_empty(0) if rescale is None else stacked(drho).to(rescale.dtype),
    )


def mixture_of_gaussians_log_prob(params: Tensor, x: Tensor) -> Tensor:
    """log sum_k pi_k N(x; mu_k, sigma_k) of x (*), with params (*, 3 K): K logits of pi, K means, K log sigma."""
    logits, mean, log_sigma = params.chunk(3, -1)
    z = (x[..., None] - mean) * (-log_sigma).exp()
    constant = 0.9189385332046727  # log(2 pi) / 2
    return torch.logsumexp(logits.log_softmax(-1) - 0.5 * z * z - log_sigma, -1) - constant


def _chosen(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The smallest index whose cumulative probability exceeds the uniform number."""
    sums = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    return (sums <= uniforms[..., None] * sums[..., -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)


def _drawable(x: Tensor, logits: Tensor) -> Tensor:
    """``x`` (*), or NaN where the logits (*, P) that it was drawn by have no sum."""
    return x.masked_fill(~logits.amax(-1).isfinite(), float("nan"))


def nade_draw(params: Tensor, uniforms: Tensor, kind: str) -> Tensor:
    """x (*) from params (*, P) and uniforms (*, 1), or (*, 2) for a mixture: its component, then its normal deviate.

    NaN where the parameters say nothing that could be drawn."""
    if kind == "bernoulli":
        chance = torch.sigmoid(params[..., 0])
        return (uniforms[..., 0] < chance).to(params.dtype).masked_fill(chance.isnan(), float("nan"))
    if kind == "categorical":
        drawn = _chosen(params, uniforms[..., 0]).to(params.dtype) / max(params.shape[-1] - 1, 1)
        return _drawable(drawn, params)
    logits, mean, log_sigma = params.chunk(3, -1)
    k = _chosen(logits, uniforms[..., 0])[..., None]
    tiny = 1e-7 if params.dtype is torch.float32 else 1e-12
    normal = torch.special.ndtri(uniforms[..., 1].clamp(tiny, 1 - tiny))
    return _drawable(mean.gather(-1, k)[..., 0] + log_sigma.gather(-1, k)[..., 0].exp() * normal, logits)


@torch.no_grad()
def nade_sample(
    uniforms: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    given: Tensor | None,
    known: Tensor | None,
    activation: str,
    kind: str,
) -> Tensor:
    """x (N, D), drawn in one pass; where ``known`` (N, D), x is ``given``."""
    u, w, v, b, c, rho, values = _wide(uniforms, weight, readout, bias, hidden_bias, rescale, given)
    a = c.expand(u.shape[0], -1)
    x = []
    for d in range(u.shape[1]):
        h = ACTIVATIONS[activation](a if rho is None else rho[d] * a)
        drawn = nade_draw(b[d] + h @ v[d].t(), u[:, d], kind)
        if values is not None and known is not None:
            drawn = torch.where(known[:, d], values[:, d], drawn)
        x.append(drawn)
        a = a + drawn[:, None] * w[d]
    return torch.stack(x, 1).to(uniforms.dtype)
