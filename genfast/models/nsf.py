"""models.NSF."""

from __future__ import annotations

from .. import nn
from ..reference import autoregressive_flows as plain


class NSF(plain.NSF):
    __doc__ = (
        (plain.NSF.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.NSF(6, hidden=32).sample(5).shape
        torch.Size([5, 6])
    """
    )

    layers = nn
