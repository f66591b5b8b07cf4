"""nn.BatchNormFlow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..programs import FlowBuilder, LoweringError
from .bijection import Bijection


class _Total(torch.autograd.Function):
    """The sum over ranks, whose losses are summed too: of what each rank's depends on here, every rank's part
    counts."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        total = t.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        found: Tensor = _Total.apply(grad)
        return found


class BatchNormFlow(Bijection):
    """Batch normalisation as a bijection: z = e^log_gamma (x - m) / sqrt(v + eps) + beta, logdet with it.

    In training m and v are the batch's own, with their gradient, so one sample's density depends on the others of its
    batch; in evaluation they are the running ones, and so is the inverse, which training has none of. On several ranks
    each uses the statistics of its own part of the batch, and DistributedDataParallel makes the running ones those of
    rank 0, as with torch's batch norm; or, with ``over_ranks``, all use those of the whole batch, in parts of any
    length, also none. The trainers of genfast set it.

    Args:
        features: C; inputs are (N, C, ...).
        momentum: the newest batch's share in the running statistics.
        eps: added to the variance.
        over_ranks: whether training takes the statistics over all processes of torch.distributed, which then call
            ``forward`` together. For gradients averaged over the ranks, as DistributedDataParallel does.

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

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5, over_ranks: bool = False) -> None:
        super().__init__()
        if features < 1 or not 0 <= momentum <= 1 or not eps > 0:
            raise ValueError(
                f"BatchNormFlow: features={features}, momentum={momentum} and eps={eps}, expected at least 1, 0 to 1 "
                "and more than 0"
            )
        self.features, self.momentum, self.eps, self.over_ranks = features, momentum, eps, over_ranks
        self.log_gamma = nn.Parameter(torch.zeros(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training:
            return self.running_mean, self.running_var
        if x.dim() < 2 or x.shape[1] != self.features:
            raise ValueError(f"BatchNormFlow: x has shape {tuple(x.shape)}, expected (N, {self.features}, ...)")
        wide = x if x.dtype.itemsize >= 4 else x.float()
        axes = [0, *range(2, x.dim())]
        count = float(x.shape[0] * math.prod(x.shape[2:]))
        spread = self.over_ranks and dist.is_available() and dist.is_initialized()
        if spread:
            *sums, whole = _Total.apply(torch.cat((wide.sum(axes), wide.new_tensor([count])))).split([self.features, 1])
            count = float(whole.detach())
        if count < 2:
            raise ValueError(
                f"BatchNormFlow: x has shape {tuple(x.shape)}; training needs at least 2 positions per feature"
            )
        if spread:  # in two passes, as a difference of squares would lose digits
            mean = sums[0] / count
            centred = wide - mean.view(-1, *[1] * (x.dim() - 2))
            var = _Total.apply(centred.square().sum(axes)) / count
        else:
            var, mean = torch.var_mean(wide, axes, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
            unbiased = (var.detach() * (count / (count - 1))).to(self.running_var.dtype)
            self.running_var.lerp_(unbiased, self.momentum)
        return mean, var

    def _affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """The log-scale and the bias of :func:`genfast.ops.actnorm`."""
        log_scale = self.log_gamma - 0.5 * (var + self.eps).log()
        return log_scale, self.beta - mean * log_scale.exp()

    def add_steps(self, builder: FlowBuilder) -> None:
        """Adds the affine map of the running statistics to a program."""
        if self.training:
            raise LoweringError("BatchNormFlow in training has no step of a flow program")

        def part(i: int) -> Callable[[], Tensor]:
            return lambda: self._affine(self.running_mean, self.running_var)[i]

        builder.features = builder.scale(builder.features, part(0), part(1))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.actnorm(x, *self._affine(*self._statistics(x)), log_scale=True)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            raise RuntimeError(
                "BatchNormFlow: no inverse in training, where the statistics are the batch's own; call eval()"
            )
        return ops.actnorm(z, *self._affine(self.running_mean, self.running_var), log_scale=True, inverse=True)

    def extra_repr(self) -> str:
        return f"{self.features}, momentum={self.momentum:g}, eps={self.eps:g}"
