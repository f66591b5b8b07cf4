"""models.LinearFlow."""

from __future__ import annotations

from .. import nn
from ..reference import models as plain


class LinearFlow(plain.LinearFlow):
    __doc__ = (
        (plain.LinearFlow.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> genfast.models.LinearFlow(3).log_prob(torch.randn(5, 3)).shape
        torch.Size([5])
    """
    )

    layers = nn
