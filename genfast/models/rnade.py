"""models.RNADE."""

from __future__ import annotations

from .. import nn
from ..reference import vectors as plain


class RNADE(plain.RNADE):
    __doc__ = (
        (plain.RNADE.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> model = genfast.models.RNADE(4, hidden=8)
        >>> model.log_prob(model.sample(5)).shape
        torch.Size([5])
    """
    )

    layers = nn
