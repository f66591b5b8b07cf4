"""models.Flow."""

from __future__ import annotations

from .. import nn
from ..reference import flow as plain


class Flow(plain.Flow):
    __doc__ = (
        (plain.Flow.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> base = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        >>> flow = genfast.models.Flow(base, [genfast.nn.LULinear(3), genfast.nn.ActNorm(3)])
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """
    )

    layers = nn
