"""models.NADE."""

from __future__ import annotations

from .. import nn
from ..reference import vectors as plain
from .autoregressive import AutoregressiveModel


class NADE(plain.NADE, AutoregressiveModel):
    __doc__ = (
        (plain.NADE.__doc__ or "")
        + """
    Training keeps O(H) memory a sample, and ``sample`` takes one pass: see :func:`genfast.ops.nade`.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.NADE(16, hidden=8)
        >>> model.log_prob(model.sample(4)).shape
        torch.Size([4])
    """
    )

    layers = nn
