"""nn.Permutation and nn.CircularShift: moves of the features that do not change the volume."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..programs import FlowBuilder
from .bijection import Bijection


class Permutation(Bijection):
    """Reorders the features (axis 1): z[:, i] = x[:, order[i]].

    Args:
        features: D; inputs are (N, D, ...).
        order: "reversed", "random" (from torch's generator), or the D indices. It is in the state_dict.

    Raises:
        ValueError: an order that is not a permutation of 0 .. D-1.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.Permutation(3, [2, 0, 1])(torch.tensor([[10.0, 11.0, 12.0]]))[0]
        tensor([[12., 10., 11.]])
    """

    order: Tensor

    def __init__(self, features: int, order: str | Sequence[int] | Tensor = "reversed") -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"Permutation: features={features}, expected at least 1")
        if isinstance(order, str):
            if order not in ("reversed", "random"):
                raise ValueError(f"Permutation: order={order!r}, expected 'reversed', 'random' or {features} indices")
            order = torch.randperm(features) if order == "random" else torch.arange(features).flip(0)
        order = torch.as_tensor(order, dtype=torch.int64).clone()
        if order.shape != (features,) or not torch.equal(order.sort()[0], torch.arange(features, device=order.device)):
            raise ValueError(f"Permutation: order={order.tolist()}, expected a permutation of 0 to {features - 1}")
        self.register_buffer("order", order)

    def add_steps(self, builder: FlowBuilder) -> None:
        """Renames the rows of the features: a permutation costs a program nothing."""
        builder.features = [builder.features[i] for i in self.order.tolist()]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(x)
        return x.index_select(1, self.order), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(z)
        return z.index_select(1, self.order.argsort()), z.new_zeros(z.shape[0])

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != len(self.order):
            raise ValueError(f"Permutation: x has shape {tuple(x.shape)}, expected (N, {len(self.order)}, ...)")

    def extra_repr(self) -> str:
        return f"{len(self.order)}"


class CircularShift(Bijection):
    """Turns each feature, a point of a circle [-bound, bound), by an angle of its own, and with it where a spline has
    its ends.

    Args:
        features: D; inputs are (N, D).
        bound: half of the circle's length.
        learn: whether the angles are parameters; they start at random.

    Source: Rezende et al. (arXiv:2002.02428, section 2.1: rotations of the circle).

    Example:
        >>> import torch, genfast
        >>> shift = genfast.nn.CircularShift(2)
        >>> bool((shift(torch.zeros(3, 2))[0].abs() <= shift.bound).all())
        True
    """

    def __init__(self, features: int, *, bound: float = torch.pi, learn: bool = True) -> None:
        super().__init__()
        if features < 1 or not bound > 0:
            raise ValueError(
                f"CircularShift: features={features} and bound={bound}, expected at least 1 and more than 0"
            )
        self.bound = bound
        angles = (2 * torch.rand(features) - 1) * bound
        self.shift: Tensor
        if learn:
            self.shift = nn.Parameter(angles)
        else:
            self.register_buffer("shift", angles)

    def _turned(self, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 2 or x.shape[1] != len(self.shift):
            raise ValueError(f"CircularShift: x has shape {tuple(x.shape)}, expected (N, {len(self.shift)})")
        return torch.remainder(x + by + self.bound, 2 * self.bound) - self.bound, x.new_zeros(x.shape[0])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turned(x, self.shift)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turned(z, -self.shift)

    def extra_repr(self) -> str:
        return f"{len(self.shift)}, bound={self.bound:g}"
