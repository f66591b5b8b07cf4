"""The diagonal Gaussian q(z|x) of a variational autoencoder (Kingma and Welling, 1312.6114, section 2.4 and appendix
B).

z = mu + sigma * noise, and against a prior N(nu, tau^2), with t = log sigma^2 - log tau^2:
KL(q || p) = 1/2 sum_d [ (e^t - 1 - t) + (mu - nu)^2 / tau^2 ], in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.element_size() >= 4 else x.float()


def diagonal_gaussian(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None = None,
    prior_mean: Tensor | None = None,
    prior_log_variance: Tensor | None = None,
    per_dimension: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(KL of each sample (N,), KL of each dimension summed over the batch, z); all arguments (N, ...), without a prior
    N(0, 1).

    The second is empty unless ``per_dimension``, z without ``noise``. KLs of half types are float32.
    """
    m, log_v = _wide(mean), _wide(log_variance)
    delta = m if prior_mean is None else m - prior_mean.to(m.dtype)
    t, precision = log_v, torch.ones((), dtype=m.dtype, device=m.device)
    if prior_log_variance is not None:
        t, precision = log_v - prior_log_variance.to(m.dtype), (-prior_log_variance.to(m.dtype)).exp()
    each = 0.5 * (t.expm1() - t + delta.square() * precision)
    by_dimension = each.sum(0) if per_dimension else each.new_empty(0)
    z = mean.new_empty(0) if noise is None else (m + (0.5 * log_v).exp() * noise.to(m.dtype)).to(mean.dtype)
    return each.flatten(1).sum(1), by_dimension, z


def diagonal_gaussian_backward(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    grad_kl: Tensor | None,
    grad_dimension: Tensor | None,
    grad_z: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five tensors, empty where not ``wanted``. An element's KL has gradient g = g_kl[n] +
    g_dimension[d]:

    d mu = g (mu - nu) / tau^2 + g_z                      d nu = -g (mu - nu) / tau^2
    d log sigma^2 = 1/2 [g (e^t - 1) + g_z noise sigma]   d log tau^2 = -1/2 g [(e^t - 1) + (mu - nu)^2 / tau^2]
    d noise = g_z sigma
    """
    m, log_v = _wide(mean), _wide(log_variance)
    zero = torch.zeros((), dtype=m.dtype, device=m.device)
    g = zero
    if grad_kl is not None:
        g = g + grad_kl.to(m.dtype).reshape(-1, *(1,) * (m.dim() - 1))
    if grad_dimension is not None:
        g = g + grad_dimension.to(m.dtype)
    delta = m if prior_mean is None else m - prior_mean.to(m.dtype)
    t, precision = log_v, zero + 1
    if prior_log_variance is not None:
        t, precision = log_v - prior_log_variance.to(m.dtype), (-prior_log_variance.to(m.dtype)).exp()
    by_t = zero if grad_kl is None and grad_dimension is None else g * t.expm1()
    pull, g_z, sigma = g * delta * precision, zero, zero
    by_sigma = zero
    if grad_z is not None and noise is not None:
        g_z, sigma = grad_z.to(m.dtype), (0.5 * log_v).exp()
        by_sigma = g_z * noise.to(m.dtype) * sigma
    found = (pull + g_z, 0.5 * (by_t + by_sigma), g_z * sigma, -pull, -0.5 * (by_t + pull * delta))
    given = (mean, log_variance, noise, prior_mean, prior_log_variance)
    return tuple(  # type: ignore[return-value]
        mean.new_empty(0) if like is None or not want else f.expand(m.shape).clone().to(like.dtype)
        for f, like, want in zip(found, given, wanted)
    )
