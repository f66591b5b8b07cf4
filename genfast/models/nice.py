"""models.NICE."""

from __future__ import annotations

from .. import nn
from ..reference import models as plain


class NICE(plain.NICE):
    __doc__ = (
        (plain.NICE.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.NICE(8, hidden=16).sample(4).shape
        torch.Size([4, 8])
    """
    )

    layers = nn
