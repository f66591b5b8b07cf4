"""models.MAF."""

from __future__ import annotations

from .. import nn
from ..reference import autoregressive_flows as plain


class MAF(plain.MAF):
    __doc__ = (
        (plain.MAF.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> model = genfast.models.MAF(6, hidden=32, context=2)
        >>> x = model.sample(5, torch.randn(5, 2))
        >>> model.distribution(torch.zeros(2)).log_prob(x).shape
        torch.Size([5])
    """
    )

    layers = nn
