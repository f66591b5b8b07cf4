"""What the LU layers of nflows and normflows share: W = L U from packed entries, L unit lower triangular."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ._swap import Swapped, covered


def triangles(module: Any) -> tuple[Tensor, Tensor]:
    """L and U; one scatter each, where the peers convert index arrays and write three times."""
    diagonal = module.upper_diag
    lower, upper = module.lower_entries, module.upper_entries
    size = module.features
    indices = module.kept().get("indices")
    if indices is None or indices[0].device != lower.device:
        rows, columns = torch.as_tensor(module.lower_indices[0]), torch.as_tensor(module.lower_indices[1])
        rows_u, columns_u = torch.as_tensor(module.upper_indices[0]), torch.as_tensor(module.upper_indices[1])
        both = torch.arange(size) * (size + 1)
        indices = [torch.cat((r * size + c, both)).to(lower.device) for r, c in ((rows, columns), (rows_u, columns_u))]
        module.kept()["indices"] = indices
    empty = lower.new_zeros(size * size)
    left = empty.scatter(0, indices[0], torch.cat((lower, torch.ones_like(diagonal)))).view(size, size)
    right = empty.scatter(0, indices[1], torch.cat((upper, diagonal))).view(size, size)
    return left, right


def weight_inverse(module: Any) -> Tensor:
    """(L U)^-1, by triangular solves in float64."""
    left, right = (t.double() for t in triangles(module))
    eye = torch.eye(module.features, dtype=torch.float64, device=left.device)
    half = torch.linalg.solve_triangular(left, eye, upper=False, unitriangular=True)
    result: Tensor = torch.linalg.solve_triangular(right, half, upper=True)
    return result.to(module.bias.dtype)


class LULinear(Swapped):
    """One product by L U for batches, where the peers make one by U and one by L."""

    what = "one product by L U"
    stands_for: ClassVar[tuple[str, ...]] = ("forward_no_cache", "inverse_no_cache", "_create_lower_upper")

    def forward_no_cache(self: Any, inputs: Tensor) -> Any:
        if inputs.dim() != 2 or not covered(inputs, self.bias, self.lower_entries):
            return super().forward_no_cache(inputs)  # type: ignore[misc]
        left, right = triangles(self)
        if inputs.shape[0] < self.features:
            outputs = F.linear(F.linear(inputs, right), left, self.bias)
        else:
            outputs = F.linear(inputs, left @ right, self.bias)
        return outputs, self.logabsdet() * inputs.new_ones(inputs.shape[0])

    def inverse_no_cache(self: Any, inputs: Tensor) -> Any:
        if inputs.dim() != 2 or not covered(inputs, self.bias, self.lower_entries):
            return super().inverse_no_cache(inputs)  # type: ignore[misc]
        left, right = triangles(self)
        half = torch.linalg.solve_triangular(left, (inputs - self.bias).t(), upper=False, unitriangular=True)
        outputs = torch.linalg.solve_triangular(right, half, upper=True).t()
        return outputs, -self.logabsdet() * inputs.new_ones(inputs.shape[0])
