"""models.NICE."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..nn.flow_lowering import lower
from ..programs import FlowBuilder
from .base_flow import DiagonalGaussian, FlowModel, Logistic
from .conditioners import MLP


class NICE(FlowModel):
    """Additive couplings on vectors and a diagonal scaling (arXiv:1410.8516).

    Args:
        dim: D; data are (N, D).
        hidden: units per hidden layer of the conditioner, an MLP.
        depth: its hidden layers.
        couplings: how many, transforming the two halves in turn.
        prior: "logistic" (the paper's) or "gaussian".
        context: size of a conditioning vector; 0 for none.

    Example:
        >>> import torch, genfast
        >>> genfast.models.NICE(8, hidden=16).sample(4).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int = 1000,
        depth: int = 5,
        couplings: int = 4,
        prior: Literal["logistic", "gaussian"] = "logistic",
        context: int = 0,
    ) -> None:
        super().__init__((dim,))
        if dim < 2:
            raise ValueError(f"NICE: dim={dim}, expected at least 2")
        if prior not in ("logistic", "gaussian"):
            raise ValueError(f"NICE: prior={prior!r}, expected 'logistic' or 'gaussian'")
        self.config = dict(dim=dim, hidden=hidden, depth=depth, couplings=couplings, prior=prior, context=context)
        steps = []
        for i in range(couplings):
            transform, width = ("first", dim // 2) if i % 2 == 0 else ("last", dim - dim // 2)
            network = MLP(dim - width, width, hidden, depth, context)
            steps.append(self.layers.AffineCoupling(network, scale="additive", width=width, transform=transform))
        self.flow = self.layers.FlowSequential(*steps)
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.base = Logistic(dim) if prior == "logistic" else DiagonalGaussian(dim, trainable=False)

    def add_steps(self, builder: FlowBuilder) -> None:
        lower(self.flow, builder)
        builder.features = builder.scale(builder.features, self.log_scale, None)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, logdet = self.flow(self.check(x), context)
        return h * self.log_scale.exp(), logdet + self.log_scale.sum()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.flow.inverse(z * (-self.log_scale).exp(), context)
        return x, logdet - self.log_scale.sum()
