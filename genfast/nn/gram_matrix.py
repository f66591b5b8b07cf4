"""nn.GramMatrix and nn.GramLoss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops


class GramMatrix(nn.Module):
    """:func:`genfast.ops.gram_matrix` as a module: (N, C, *) to (N, C, C).

    Args:
        normalize, shift: as in the op.

    Source: Gatys et al. (arXiv:1508.06576, section 2).

    Example:
        >>> import torch, genfast
        >>> genfast.nn.GramMatrix()(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 8, 8])
    """

    def __init__(self, *, normalize: bool = True, shift: float = 0.0) -> None:
        super().__init__()
        self.normalize, self.shift = normalize, shift

    def forward(self, features: Tensor) -> Tensor:
        return ops.gram_matrix(features, normalize=self.normalize, shift=self.shift)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, shift={self.shift}"


class GramLoss(nn.Module):
    """:func:`genfast.ops.style_loss` to target Gram matrices that the module keeps as buffers; see there for weights.

    Args:
        targets: a Gram matrix (N or 1, C, C) a layer.
        weights: one a layer; None for 1 each.
        normalize, shift: as the targets were made.

    Source: Gatys et al. (arXiv:1508.06576, section 2).

    Example:
        >>> import torch, genfast
        >>> loss = genfast.nn.GramLoss.of_features([torch.ones(1, 2, 4, 4)])
        >>> loss([torch.zeros(1, 2, 8, 8)])
        tensor(0.2500)
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = True,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = len(targets)
        for i, target in enumerate(targets):
            self.register_buffer(f"target_{i}", target)
        self.weights = None if weights is None else list(weights)
        self.normalize, self.shift = normalize, shift

    @classmethod
    def of_features(
        cls,
        features: Sequence[Tensor],
        weights: Sequence[float] | None = None,
        *,
        normalize: bool = True,
        shift: float = 0.0,
    ) -> GramLoss:
        """The loss to the style of feature maps (N or 1, C, *), without a gradient to them."""
        with torch.no_grad():
            targets = [ops.gram_matrix(f, normalize=normalize, shift=shift) for f in features]
        return cls(targets, weights, normalize=normalize, shift=shift)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        targets = [self.get_buffer(f"target_{i}") for i in range(self.layers)]
        return ops.style_loss(features, targets, self.weights, normalize=self.normalize, shift=self.shift)

    def extra_repr(self) -> str:
        return f"{self.layers} layers, weights={self.weights}, normalize={self.normalize}, shift={self.shift}"
