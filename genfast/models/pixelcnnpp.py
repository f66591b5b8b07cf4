"""models.PixelCNNPlusPlus."""

from __future__ import annotations

from ..reference import autoregressive as plain
from .autoregressive import AutoregressiveModel


class PixelCNNPlusPlus(AutoregressiveModel, plain.PixelCNNPlusPlus):
    __doc__ = (
        (plain.PixelCNNPlusPlus.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.PixelCNNPlusPlus(filters=8, blocks=1, mixtures=2).sample(2, (3, 8, 8)).shape
        torch.Size([2, 3, 8, 8])
    """
    )
