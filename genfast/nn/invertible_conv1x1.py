"""nn.InvertibleConv1x1."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .bijection import Bijection


class InvertibleConv1x1(Bijection):
    """Invertible 1x1 convolution, started from a random rotation (Glow, section 3.2).

    Args:
        channels: C; inputs are (N, C, ...), vectors included.
        plu: parametrise W = P L (U + diag(sign e^log_s)): parameters ``lower``, ``upper`` (C, C; only the strict
            triangles are read) and ``log_s`` (C,), buffers ``perm`` (C,) and ``sign_s`` (C,), so that W stays
            invertible and the log-determinant is a sum. False keeps one full ``weight`` (C, C).

    Example:
        >>> import torch, genfast
        >>> z, logdet = genfast.nn.InvertibleConv1x1(12)(torch.randn(2, 12, 8, 8))
    """

    perm: Tensor
    sign_s: Tensor

    def __init__(self, channels: int, *, plu: bool = True) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"InvertibleConv1x1: channels={channels}, expected at least 1")
        self.channels = channels
        self.plu = plu
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        if not plu:
            self.weight = nn.Parameter(rotation)
            return
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(diagonal.abs().log())
        self.register_buffer("perm", p.argmax(1))
        self.register_buffer("sign_s", diagonal.sign())

    def factors(self) -> Tensor | ops.PLU:
        """What :func:`genfast.ops.invertible_conv1x1` takes as ``weight``."""
        return ops.PLU(self.perm, self.lower, self.upper, self.sign_s, self.log_s) if self.plu else self.weight

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.invertible_conv1x1(x, self.factors())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.invertible_conv1x1(z, self.factors(), inverse=True)

    def extra_repr(self) -> str:
        return f"{self.channels}, plu={self.plu}"
