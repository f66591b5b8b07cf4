"""The evidence lower bound: log-likelihoods of a decoder, their sum with the KL divergence, and what is reported of
it."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops import _check

Number = TypeVar("Number", float, Tensor)
LIKELIHOODS = ("bernoulli", "gaussian", "categorical", "discretized_logistic")


class ELBO(NamedTuple):
    """Means over the batch, in nats: ``elbo`` = ``reconstruction`` - ``kl`` is a lower bound of E log p(x).

    loss: -(reconstruction - beta kl), what is minimised.
    """

    loss: Tensor
    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor


def log_likelihood(
    x: Tensor,
    parameters: Tensor,
    likelihood: Literal["bernoulli", "gaussian", "categorical", "discretized_logistic"],
    *,
    levels: int = 256,
    variance: float = 1.0,
) -> Tensor:
    """log p(x | parameters) of each sample, in nats, with every constant.

    Args:
        x: (N, C, ...). "bernoulli": values in [0, 1], of which only 0 and 1 have a probability. "gaussian": any; a
            density. "categorical" and "discretized_logistic": whole numbers from 0 to levels - 1.
        parameters: "bernoulli": logits like x. "gaussian": the mean like x, of ``variance``; or (N, 2C, ...), mean and
            then log-variance. "categorical": (N, levels C, ...), channel level C + c. "discretized_logistic": (N, 3K,
            ...) for one channel or (N, 10K, ...) for three, K components; see
            :func:`genfast.ops.discretized_logistic_mixture_nll`.
        levels: of the discrete ones.
        variance: of a Gaussian that is given its mean alone.

    Returns:
        (N,).

    Raises:
        TypeError, ValueError: dtypes, shapes, a likelihood or a variance that do not fit.

    Source: Kingma and Welling (arXiv:1312.6114, appendix C); PixelCNN++ (arXiv:1701.05517, section 2.1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.log_likelihood(torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2), "bernoulli")
        tensor([-2.7726, -2.7726])
    """
    name = "log_likelihood"
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"{name}: likelihood={likelihood!r}, expected one of {', '.join(map(repr, LIKELIHOODS))}")
    _check.tensors(name, x=x, parameters=parameters)
    if not parameters.is_floating_point():
        raise TypeError(f"{name}: parameters have dtype {parameters.dtype}, expected floating point")
    if likelihood == "categorical":
        return -ops.categorical_nll(parameters, x).flatten(1).sum(1)
    if likelihood == "discretized_logistic":
        return -ops.discretized_logistic_mixture_nll(parameters, x, levels=levels).flatten(1).sum(1)
    if not x.is_floating_point():
        raise TypeError(f"{name}: x has dtype {x.dtype}, expected floating point for {likelihood!r}")
    if likelihood == "gaussian" and x.dim() > 1 and parameters.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        mean, log_variance = parameters.chunk(2, 1)
        squares = (x - mean).square() * (-log_variance).exp() + log_variance
        return -0.5 * (squares + math.log(2 * math.pi)).flatten(1).sum(1)
    if parameters.shape != x.shape or x.dim() < 2:
        raise ValueError(
            f"{name}: parameters have shape {tuple(parameters.shape)} and x {tuple(x.shape)}, expected equal shapes "
            "(N, C, ...)"
        )
    if likelihood == "bernoulli":
        return (
            -F.binary_cross_entropy_with_logits(parameters, x.to(parameters.dtype), reduction="none").flatten(1).sum(1)
        )
    if not variance > 0:
        raise ValueError(f"{name}: variance={variance}, expected a positive number")
    return -0.5 * ((x - parameters).square() / variance + math.log(2 * math.pi * variance)).flatten(1).sum(1)


def elbo(log_likelihood: Tensor, kl: Tensor, *, beta: float = 1.0) -> ELBO:
    """The evidence lower bound and the loss of a beta-VAE: E log p(x|z) - beta KL, means over the batch.

    Args:
        log_likelihood: (N,), in nats; see :func:`log_likelihood`.
        kl: (N,), or its mean, a scalar, as ``ops.diagonal_gaussian`` gives it; with free bits the floors are part of
            it.
        beta: 1 for the bound itself; more for a beta-VAE, less while the KL is annealed.

    Returns:
        :class:`ELBO`.

    Raises:
        ValueError: shapes that do not fit, or a negative ``beta``.

    Source: Kingma and Welling (arXiv:1312.6114, equation 10); beta: Higgins et al. (ICLR 2017, equation 4).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.elbo(torch.tensor([-3.0, -5.0]), torch.tensor([1.0, 1.0])).elbo
        tensor(-5.)
    """
    _check.tensors("elbo", kl=kl)
    _check.floating("elbo", log_likelihood=log_likelihood, kl=kl)
    if log_likelihood.dim() != 1 or kl.shape not in ((), log_likelihood.shape):
        raise ValueError(
            f"elbo: log_likelihood has shape {tuple(log_likelihood.shape)} and kl {tuple(kl.shape)}, expected (N,), "
            "and (N,) or a scalar"
        )
    if not beta >= 0:
        raise ValueError(f"elbo: beta={beta}, expected at least 0")
    reconstruction, kl = log_likelihood.mean(), kl.mean()
    return ELBO(beta * kl - reconstruction, reconstruction - kl, reconstruction, kl)


def importance_weighted_bound(log_weights: Tensor) -> Tensor:
    """E log (1/K) sum_k w_k with w_k = p(x, z_k) / q(z_k | x): the bound of an IWAE, mean over the batch, in nats.

    It is never below the ELBO and grows with K towards log p(x) (Burda et al., arXiv:1509.00519, equation 8).

    Args:
        log_weights: (K, N).

    Raises:
        ValueError: another shape, or no weights.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.importance_weighted_bound(torch.tensor([[0.0], [0.0]]))
        tensor(0.)
    """
    _check.floating("importance_weighted_bound", log_weights=log_weights)
    if log_weights.dim() != 2 or not log_weights.numel():
        raise ValueError(
            f"importance_weighted_bound: log_weights has shape {tuple(log_weights.shape)}, expected (K, N)"
        )
    return (log_weights.logsumexp(0) - math.log(log_weights.shape[0])).mean()


def bits_per_dim(nats: Number, dim: int) -> Number:
    """-nats / (dim ln 2): a log-likelihood, or a bound of it, of ``dim`` numbers in bits for each.

    Example:
        >>> import genfast
        >>> round(genfast.losses.bits_per_dim(-64 * 0.6931471805599453, 64), 4)
        1.0
    """
    if dim < 1:
        raise ValueError(f"bits_per_dim: dim={dim}, expected at least 1")
    return -nats / (dim * math.log(2))


def kl_to_bernoulli(activations: Tensor, rho: float) -> Tensor:
    """sum_j KL(Bernoulli(rho) || Bernoulli(mean activation of unit j over the batch)): the penalty of a sparse
    autoencoder.

    Args:
        activations: (N, D) in [0, 1], of sigmoid units; over several processes of this rank.
        rho: the wanted mean activation, in (0, 1).

    Raises:
        ValueError: another shape or rho.

    Source: Ng, Sparse autoencoder (CS294A lecture notes, 2011, section 3).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.kl_to_bernoulli(torch.full((4, 2), 0.5), 0.5)
        tensor(0.)
    """
    _check.floating("kl_to_bernoulli", activations=activations)
    if activations.dim() != 2 or not 0 < rho < 1:
        raise ValueError(
            f"kl_to_bernoulli: activations have shape {tuple(activations.shape)} and rho={rho}, expected (N, D) and a "
            "number between 0 and 1"
        )
    tiny = torch.finfo(torch.float32).eps  # a unit that is never on has a large penalty and not an infinite one
    mean = activations.mean(0).clamp(tiny, 1 - tiny)
    return (rho * (math.log(rho) - mean.log()) + (1 - rho) * (math.log(1 - rho) - (1 - mean).log())).sum()
