"""nn.BatchNormFlow."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .. import ops
from .bijection import Bijection


class BatchNormFlow(Bijection):
    """Batch normalisation as a bijection: z = e^log_gamma (x - m) / sqrt(v + eps) + beta, logdet with it.

    In training m and v are the batch's own, with their gradient, so one sample's density depends on the others of its batch;
    in evaluation they are the running ones, and so is the inverse, which training has none of. On several ranks each uses the
    statistics of its own part of the batch; DistributedDataParallel keeps the running ones equal, those of rank 0, as it does
    those of torch's batch norm.

    Args:
        features: C; inputs are (N, C, ...).
        momentum: the newest batch's share in the running statistics.
        eps: added to the variance.

    Raises:
        ValueError: a training batch with fewer than two positions per feature.
        RuntimeError: ``inverse`` in training.

    Source: RealNVP (arXiv:1605.08803, section 3.7), MAF (arXiv:1705.07057, section 3.4 and appendix A).

    Example:
        >>> import torch, genfast
        >>> z, logdet = genfast.nn.BatchNormFlow(3)(torch.randn(8, 3))
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        if features < 1 or not 0 <= momentum <= 1 or not eps > 0:
            raise ValueError(
                f"BatchNormFlow: features={features}, momentum={momentum} and eps={eps}, expected at least 1, 0 to 1 and "
                "more than 0"
            )
        self.features, self.momentum, self.eps = features, momentum, eps
        self.log_gamma = nn.Parameter(torch.zeros(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean, self.running_var
        if x.dim() < 2 or x.shape[1] != self.features:
            raise ValueError(f"BatchNormFlow: x has shape {tuple(x.shape)}, expected (N, {self.features}, ...)")
        count = x.shape[0] * math.prod(x.shape[2:])
        if count < 2:
            raise ValueError(f"BatchNormFlow: x has shape {tuple(x.shape)}; training needs at least 2 positions per feature")
        wide = x if x.dtype.itemsize >= 4 else x.float()
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            unbiased = (var.detach() * (count / (count - 1))).to(self.running_var.dtype)
            self.running_var.lerp_(unbiased, self.momentum)
        return mean, var

    def _affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The log-scale and the bias of :func:`genfast.ops.actnorm`."""
        log_scale = self.log_gamma - 0.5 * (var + self.eps).log()
        return log_scale, self.beta - mean * log_scale.exp()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.actnorm(x, *self._affine(*self._statistics(x)), log_scale=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            raise RuntimeError("BatchNormFlow: no inverse in training, where the statistics are the batch's own; call eval()")
        return ops.actnorm(z, *self._affine(self.running_mean, self.running_var), log_scale=True, inverse=True)

    def extra_repr(self) -> str:
        return f"{self.features}, momentum={self.momentum:g}, eps={self.eps:g}"
