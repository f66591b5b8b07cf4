"""models.IAF."""

from __future__ import annotations

from .. import nn
from ..reference import autoregressive_flows as plain


class IAF(plain.IAF):
    __doc__ = (
        (plain.IAF.__doc__ or "")
        + """
    Example:
        >>> import torch, genfast
        >>> x, log_prob = genfast.models.IAF(6, hidden=32).sample_and_log_prob(5)
        >>> (log_prob + 0.5 * x.square().sum(1)).mean().backward()  # a step of the reverse KL to a normal density
    """
    )

    layers = nn
