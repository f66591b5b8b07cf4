"""Discretised mixture of logistics (PixelCNN++, 1701.05517, equations 1 to 3): how likely each level of a pixel is.

P(x | pi, mu, s) = sum_k pi_k prod_c [sigma((x_c + 1/(L-1) - mu_kc) / s_kc) - sigma((x_c - 1/(L-1) - mu_kc) / s_kc)],
where x = 2 v / (L-1) - 1 for the levels v = 0 ... L-1, the bins of 0 and L-1 are open to their side, and the means
depend on the
colours before: mu_G += a x_R, mu_B += b x_R + c x_G.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixture(NamedTuple):
    """The parameters of K logistics for C colours; C is axis 1 where there is one."""

    logits: Tensor  # (N, K, ...)
    means: Tensor  # (N, C, K, ...), before the other colours are added
    raw_log_scales: Tensor  # (N, C, K, ...)
    raw_coeffs: Tensor | None  # (N, 3, K, ...): R to G, R to B, G to B

    @property
    def log_scales(self) -> Tensor:
        return self.raw_log_scales.clamp(min=-7)

    def means_given(self, x: Tensor) -> Tensor:
        """The means of all colours (N, C, K, ...) when those before are x (N, C, ...), in [-1, 1]."""
        if self.raw_coeffs is None:
            return self.means
        a, b, c = self.raw_coeffs.tanh().unbind(1)
        red, green = x[:, 0, None], x[:, 1, None]
        mean_r, mean_g, mean_b = self.means.unbind(1)
        return torch.stack((mean_r, mean_g + a * red, mean_b + b * red + c * green), 1)


def mixture(params: Tensor, channels: int) -> Mixture:
    """Splits (N, P, ...): [K logits | for each colour K means, K log-scales, K coefficients], without these for one
    colour."""
    each = 3 if channels == 3 else 2
    k = params.shape[1] // (1 + each * channels)
    blocks = params[:, k:].unflatten(1, (channels, each, k))
    return Mixture(params[:, :k], blocks[:, :, 0], blocks[:, :, 1], blocks[:, :, 2] if channels == 3 else None)


def _wide(t: Tensor) -> Tensor:
    return t if t.element_size() >= 4 else t.float()


def _scaled(x: Tensor, levels: int, like: Tensor) -> Tensor:
    return x.to(like.dtype) * 2 / (levels - 1) - 1


def discretized_logistic_mixture_nll(params: Tensor, x: Tensor, levels: int) -> Tensor:
    """-log P in nats, (N, ...), for integer x (N, C, ...): log(sigma(a) - sigma(b)) = log sigma(a) + log sigma(-b)
    + log(1 - e^(b-a)), of which no term cancels."""
    m = mixture(_wide(params), x.shape[1])
    v, half = _scaled(x, levels, m.logits), 1 / (levels - 1)
    centered, inv_s = v[:, :, None] - m.means_given(v), (-m.log_scales).exp()
    above, below = F.logsigmoid((centered + half) * inv_s), F.logsigmoid(-(centered - half) * inv_s)
    inside = above + below + (-(-2 * half * inv_s).expm1()).log()
    log_p = torch.where((x == 0)[:, :, None], above, torch.where((x == levels - 1)[:, :, None], below, inside))
    return -(m.logits.log_softmax(1) + log_p.sum(1)).logsumexp(1)


def discretized_logistic_mixture_nll_backward(params: Tensor, x: Tensor, grad: Tensor, levels: int) -> Tensor:
    """The gradient of params. With r_k = P(k | x): d logits = g (pi - r); for a colour of component k, where log p
    depends on a, b and t = a - b, d a = sigma(-a), d b = -sigma(b), d t = e^-t / (1 - e^-t) (an open bin lacks one
    edge, and t)."""
    m = mixture(_wide(params), x.shape[1])
    v, half = _scaled(x, levels, m.logits), 1 / (levels - 1)
    centered, inv_s = v[:, :, None] - m.means_given(v), (-m.log_scales).exp()
    a, b, t = (centered + half) * inv_s, (centered - half) * inv_s, 2 * half * inv_s
    first, last = (x == 0)[:, :, None], (x == levels - 1)[:, :, None]
    above, below = F.logsigmoid(a), F.logsigmoid(-b)
    log_p = torch.where(first, above, torch.where(last, below, above + below + (-(-t).expm1()).log()))
    responsibility = (m.logits.log_softmax(1) + log_p.sum(1)).softmax(1)
    g = grad.to(m.logits.dtype)[:, None]
    by_a, by_b = (-a).sigmoid().masked_fill(last, 0), -b.sigmoid().masked_fill(first, 0)
    by_log_s = -(a * by_a + b * by_b + (t * (-t).exp() / -(-t).expm1()).masked_fill(first | last, 0))
    weight = (-g * responsibility)[:, None]
    d_mean = -weight * inv_s * (by_a + by_b)
    blocks = [d_mean, weight * by_log_s * (m.raw_log_scales >= -7)]
    if m.raw_coeffs is not None:
        red, green = v[:, 0, None], v[:, 1, None]
        d_coeffs = torch.stack((d_mean[:, 1] * red, d_mean[:, 2] * red, d_mean[:, 2] * green), 1)
        blocks.append(d_coeffs * (1 - m.raw_coeffs.tanh() ** 2))
    d_logits = g * (m.logits.softmax(1) - responsibility)
    return torch.cat((d_logits, torch.stack(blocks, 2).flatten(1, 3)), 1).to(params.dtype)


def pixelcnnpp_nll(params: Tensor, x: Tensor, levels: int) -> Tensor:
    """The same as the published code computes it: where a bin has a probability below 1e-5, the density in its
    middle."""
    m = mixture(_wide(params), x.shape[1])
    v, half = _scaled(x, levels, m.logits), 1 / (levels - 1)
    centered, log_s = v[:, :, None] - m.means_given(v), m.log_scales
    inv_s = (-log_s).exp()
    plus, minus, mid = inv_s * (centered + half), inv_s * (centered - half), inv_s * centered
    delta = plus.sigmoid() - minus.sigmoid()
    log_pdf_mid = mid - log_s - 2 * F.softplus(mid)
    inner = torch.where(delta > 1e-5, delta.clamp(min=1e-12).log(), log_pdf_mid - torch.tensor((levels - 1) / 2).log())
    x = x[:, :, None]
    log_p = torch.where(x == 0, plus - F.softplus(plus), torch.where(x == levels - 1, -F.softplus(minus), inner))
    return -(m.logits.log_softmax(1) + log_p.sum(1)).logsumexp(1)


def discretized_logistic_mixture_sample(
    params: Tensor, uniforms: Tensor, channels: int, levels: int, temperature: float
) -> Tensor:
    """Levels (N, C, ...). uniforms (N, 1 + C, ...): the first picks the component by the inverse of its cumulative
    probability, the others are mapped through the logistic's inverse, x = mu + s T log(u / (1 - u)).

    -1 where the logits have no sum (NaN, plus infinity, minus infinity throughout) or the component drawn is not
    finite."""
    m = mixture(params.double(), channels)
    u = uniforms.float().double()
    cumulative = (m.logits / temperature).softmax(1).cumsum(1)
    k = (cumulative <= u[:, :1]).sum(1, keepdim=True).clamp(max=m.logits.shape[1] - 1)
    v, levels_found = torch.zeros_like(u[:, 1:]), []
    fine = m.logits.amax(1).isfinite()
    for c in range(channels):
        mean, scale = (t[:, c].gather(1, k)[:, 0] for t in (m.means_given(v), m.log_scales.exp()))
        value = mean + scale * temperature * u[:, 1 + c].clamp(1e-5, 1 - 1e-5).logit()
        fine = fine & value.isfinite()
        level = ((value.clamp(-1, 1) + 1) * (levels - 1) / 2).round()
        v = torch.cat((v[:, :c], (level * 2 / (levels - 1) - 1)[:, None], v[:, c + 1 :]), 1)
        levels_found.append(torch.where(fine, level, -1).long())
    return torch.stack(levels_found, 1)
