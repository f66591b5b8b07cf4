"""models.NADE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from .base_vector import VectorModel


class NADE(VectorModel):
    """NADE (Larochelle and Murray 2011): each conditional from a hidden layer that the dimensions share.

    Args:
        dim: D.
        hidden: units.
        levels: of a dimension; 2 are black and white.
        activation: "sigmoid", "relu" or "tanh".
        order: the degree of each dimension, 1 to D: None, "reversed", "random" or integers.
        context_features: K of a conditional model, else 0.

    Raises:
        ValueError: arguments that do not fit, by name.

    Training keeps O(H) memory a sample, and ``sample`` takes one pass: see :func:`genfast.ops.nade`.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.NADE(16, hidden=8)
        >>> model.log_prob(model.sample(4)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 500,
        levels: int = 2,
        *,
        activation: Literal["relu", "sigmoid", "tanh"] = "sigmoid",
        order: Literal["natural", "reversed", "random"] | Sequence[int] | None = None,
        context_features: int = 0,
    ) -> None:
        super().__init__(dim, levels)
        self.network = self.layers.NADENetwork(
            dim, hidden, self.outputs, activation=activation, order=order, context=context_features
        )
        self.config = {
            "dim": dim,
            "hidden": hidden,
            "levels": levels,
            "activation": activation,
            "order": self.network.order.tolist(),
            "context_features": context_features,
        }

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        out: Tensor = self.network(x, context)
        return out

    def _draw(
        self,
        uniforms: Tensor,
        context: Tensor | None,
        given: Tensor,
        known: Tensor,
        temperature: float,
        naive: bool,
        share: Tensor,
    ) -> Tensor:
        if naive:
            return self._naive(self.network.order.argsort(), uniforms, context, given, known, temperature)
        found: Tensor = self.network.sample(
            uniforms, self.kind, context=context, given=given, known=known, temperature=temperature
        )
        return found
