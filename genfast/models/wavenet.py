"""models.WaveNet."""

from __future__ import annotations

from ..reference import autoregressive as plain
from .autoregressive import AutoregressiveModel


class WaveNet(AutoregressiveModel, plain.WaveNet):
    __doc__ = (
        (plain.WaveNet.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.WaveNet(levels=16, residual=8, skip=8, layers=3).sample(2, (1, 20)).shape
        torch.Size([2, 1, 20])
    """
    )
