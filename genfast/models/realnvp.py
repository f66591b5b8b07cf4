"""models.RealNVP."""

from __future__ import annotations

from .. import nn
from ..reference import models as plain


class RealNVP(plain.RealNVP):
    __doc__ = (
        (plain.RealNVP.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.RealNVP((1, 8, 8), hidden=8).sample(4).shape
        torch.Size([4, 1, 8, 8])
    """
    )

    layers = nn
