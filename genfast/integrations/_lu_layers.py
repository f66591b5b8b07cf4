"""What the LU layers of nflows and normflows share: W = L U from packed entries, L unit lower triangular."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .._derived import derived
from ._class_swap import Swapped, covered


def _indices(module: Any) -> tuple[Tensor, Tensor] | None:
    """Where L's and U's entries and diagonals lie in a matrix, on the module's device; None under a compiler before
    that."""
    device = module.lower_entries.device

    def make() -> tuple[Tensor, Tensor]:
        size = module.features
        both = torch.arange(size) * (size + 1)
        lower, upper = (
            torch.cat((torch.as_tensor(rows) * size + torch.as_tensor(columns), both)).to(device)
            for rows, columns in (module.lower_indices, module.upper_indices)
        )
        return lower, upper

    return derived(module.kept(), ("indices", device.type, device.index), (), make)


def triangles(module: Any, indices: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """L and U; one scatter each, where the peers convert index arrays and write three times."""
    diagonal = module.upper_diag
    lower, upper = module.lower_entries, module.upper_entries
    size = module.features
    empty = lower.new_zeros(size * size)
    left = empty.scatter(0, indices[0], torch.cat((lower, torch.ones_like(diagonal)))).view(size, size)
    right = empty.scatter(0, indices[1], torch.cat((upper, diagonal))).view(size, size)
    return left, right


def weight_inverse(module: Any, indices: tuple[Tensor, Tensor]) -> Tensor:
    """(L U)^-1, by triangular solves in float64."""
    left, right = (t.double() for t in triangles(module, indices))
    eye = torch.eye(module.features, dtype=torch.float64, device=left.device)
    half = torch.linalg.solve_triangular(left, eye, upper=False, unitriangular=True)
    result: Tensor = torch.linalg.solve_triangular(right, half, upper=True)
    return result.to(module.bias.dtype)


class LULinear(Swapped):
    """One product by L U for batches, where the peers make one by U and one by L."""

    what = "one product by L U"
    stands_for: ClassVar[tuple[str, ...]] = ("forward_no_cache", "inverse_no_cache", "_create_lower_upper")

    def fill(self) -> None:
        _indices(self)

    def _covers(self: Any, inputs: Tensor) -> bool:
        return inputs.dim() == 2 and inputs.shape[1] == self.features and covered(inputs, self.bias, self.lower_entries)

    def forward_no_cache(self: Any, inputs: Tensor) -> Any:
        indices = _indices(self) if self._covers(inputs) else None
        if indices is None:
            return super().forward_no_cache(inputs)  # type: ignore[misc]
        left, right = triangles(self, indices)
        if inputs.shape[0] < self.features:
            outputs = F.linear(F.linear(inputs, right), left, self.bias)
        else:
            outputs = F.linear(inputs, left @ right, self.bias)
        return outputs, self.logabsdet() * inputs.new_ones(inputs.shape[0])

    def inverse_no_cache(self: Any, inputs: Tensor) -> Any:
        indices = _indices(self) if self._covers(inputs) else None
        if indices is None:
            return super().inverse_no_cache(inputs)  # type: ignore[misc]
        left, right = triangles(self, indices)
        half = torch.linalg.solve_triangular(left, (inputs - self.bias).t(), upper=False, unitriangular=True)
        outputs = torch.linalg.solve_triangular(right, half, upper=True).t()
        return outputs, -self.logabsdet() * inputs.new_ones(inputs.shape[0])
