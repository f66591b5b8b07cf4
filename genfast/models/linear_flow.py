"""models.LinearFlow."""

from __future__ import annotations

from torch import Tensor

from .base_flow import DiagonalGaussian, FlowModel


class LinearFlow(FlowModel):
    """z = W (s x + b) on vectors, W in PLU form: a Gaussian with full covariance, fitted by gradient.

    Args:
        dim: D; data are (N, D).
        plu: PLU or one full matrix.

    Example:
        >>> import torch, genfast
        >>> genfast.models.LinearFlow(3).log_prob(torch.randn(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, dim: int, *, plu: bool = True) -> None:
        super().__init__((dim,))
        self.config = dict(dim=dim, plu=plu)
        self.flow = self.layers.FlowSequential(self.layers.ActNorm(dim), self.layers.InvertibleConv1x1(dim, plu=plu))
        self.base = DiagonalGaussian(dim, trainable=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.flow(self.check(x))
        return result

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.flow.inverse(z)
        return result
