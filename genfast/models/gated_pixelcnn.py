"""models.GatedPixelCNN."""

from __future__ import annotations

from ..reference import autoregressive as plain
from .autoregressive import AutoregressiveModel


class GatedPixelCNN(AutoregressiveModel, plain.GatedPixelCNN):
    __doc__ = (
        (plain.GatedPixelCNN.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.GatedPixelCNN(channels=8, layers=2, levels=4).sample(2, (1, 5, 6)).shape
        torch.Size([2, 1, 5, 6])
    """
    )
