"""nn.PixelNorm."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class PixelNorm(nn.Module):
    """Feature vectors of unit mean square, through :func:`genfast.ops.pixel_norm`.

    Args:
        dim: the axis of the features.
        eps: added to the mean square.

    Raises:
        ValueError: in ``forward``, what the op raises.

    Example:
        >>> import torch, genfast
        >>> y = genfast.nn.PixelNorm()(torch.randn(2, 16, 8, 8))
    """

    def __init__(self, *, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.pixel_norm(x, dim=self.dim, eps=self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps}"
