"""nn.spectral_norm: spectral normalisation as a parametrisation."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import ops

M = TypeVar("M", bound=nn.Module)


class _SpectralNorm(nn.Module):
    """weight to weight / sigma; the buffers _u and _v are those of torch's parametrisation."""

    def __init__(self, weight: Tensor, iterations: int, eps: float, dim: int) -> None:
        super().__init__()
        self.iterations, self.eps, self.dim = iterations, eps, dim
        if weight.dim() > 1:
            h = weight.shape[dim]
            u = weight.detach().new_empty(h).normal_()
            v = weight.detach().new_empty(weight.numel() // h).normal_()
            with torch.no_grad():
                _, u, v, _ = ops.spectral_norm(weight.detach(), u, v, iterations=15, eps=eps, dim=dim)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    _u: Tensor
    _v: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        iterations = self.iterations if self.training else 0
        normed, u, v, _ = ops.spectral_norm(weight, self._u, self._v, iterations=iterations, eps=self.eps, dim=self.dim)
        if iterations:
            with torch.no_grad():
                self._u.copy_(u)
                self._v.copy_(v)
        return normed

    def right_inverse(self, value: Tensor) -> Tensor:
        return value


def spectral_norm(
    module: M, name: str = "weight", *, n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> M:
    """Spectral normalisation of a module's weight: each forward sees weight / sigma (SN-GAN, arXiv:1802.05957,
    algorithm 1).

    The same numbers and state_dict as torch.nn.utils.parametrizations.spectral_norm
    (``parametrizations.<name>.original``, ``.0._u``, ``.0._v``), so checkpoints load either way. u and v move in
    training mode alone, at every access of the weight (use torch.nn.utils.parametrize.cached where it is accessed more
    than once a step). They are a function of the weights and of where they began, so equal on all ranks of which
    DistributedDataParallel makes both equal. ``module`` is changed in place and returned.

    Args:
        module: anything with a parameter ``name``.
        n_power_iterations: per forward in training mode.
        eps: the least norm by which u and v are divided.
        dim: the axis of outputs; None for 0, or 1 in transposed convolutions.

    Raises:
        ValueError: no such parameter, no iterations, or an axis that it does not have.

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.spectral_norm(torch.nn.Conv2d(3, 8, 3))
        >>> y = layer(torch.randn(2, 3, 8, 8))
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"spectral_norm: {type(module).__name__} has no parameter {name!r}")
    if n_power_iterations < 1:
        raise ValueError(f"spectral_norm: n_power_iterations={n_power_iterations}, expected at least 1")
    if dim is None:
        dim = int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))
    if not -weight.dim() <= dim < weight.dim():
        raise ValueError(f"spectral_norm: dim={dim}, expected an axis of the weight of shape {tuple(weight.shape)}")
    parametrize.register_parametrization(
        module, name, _SpectralNorm(weight, n_power_iterations, eps, dim % weight.dim())
    )
    return module
