"""models.DeepNADE."""

from __future__ import annotations

from .. import nn
from ..reference import vectors as plain
from .autoregressive import AutoregressiveModel


class DeepNADE(plain.DeepNADE, AutoregressiveModel):
    __doc__ = (
        (plain.DeepNADE.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> model = genfast.models.DeepNADE(16, hidden=8, orders=2).eval()
        >>> model.log_prob(model.sample(4)).shape
        torch.Size([4])
    """
    )

    layers = nn
