"""models.PixelCNN."""

from __future__ import annotations

from ..reference import autoregressive as plain
from .autoregressive import AutoregressiveModel


class PixelCNN(AutoregressiveModel, plain.PixelCNN):
    __doc__ = (
        (plain.PixelCNN.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.PixelCNN(channels=8, layers=2, levels=4).sample(2, (1, 5, 6)).shape
        torch.Size([2, 1, 5, 6])
    """
    )
