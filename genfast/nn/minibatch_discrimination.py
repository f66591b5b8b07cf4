"""nn.MinibatchDiscrimination."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops


class MinibatchDiscrimination(nn.Module):
    """Appends to each sample how near it is to the others of its batch, through
    :func:`genfast.ops.minibatch_discrimination`.

    (N, A) to (N, A + B). **Couples the samples of a batch**: with it a critic has no per-sample gradient (see the op),
    and evaluation depends on how samples are batched; over several processes each sees its own part of a batch.

    Args:
        in_features: A.
        out_features: B, kernels.
        kernel_dims: C, features of a kernel.
        include_self: counts each sample itself, as the paper does; it adds 1.

    The weight (A, B, C) starts normal with standard deviation A^-1/2, so that unit features give unit M.

    Raises:
        ValueError: sizes below 1, or an x that is not (N, A).

    Source: Salimans et al. (arXiv:1606.03498, section 3.2).

    Example:
        >>> import torch, genfast
        >>> genfast.nn.MinibatchDiscrimination(32, 10, 5)(torch.randn(4, 32)).shape
        torch.Size([4, 42])
    """

    def __init__(self, in_features: int, out_features: int, kernel_dims: int, *, include_self: bool = True) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("kernel_dims", kernel_dims)):
            if size < 1:
                raise ValueError(f"MinibatchDiscrimination: {name}={size}, expected at least 1")
        self.in_features, self.out_features, self.kernel_dims = in_features, out_features, kernel_dims
        self.include_self = include_self
        self.weight = nn.Parameter(torch.empty(in_features, out_features, kernel_dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        near = ops.minibatch_discrimination(x, self.weight, include_self=self.include_self)
        return torch.cat((x, near.to(x.dtype)), 1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.kernel_dims}, include_self={self.include_self}"
