"""nn.BiasAct."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops


class BiasAct(nn.Module):
    """A bias of each channel and the activation after it: clamp(gain f(x + b)), through :func:`genfast.ops.bias_act`.

    Args:
        channels: C, the length of the bias; None for no bias.
        act, alpha, gain, clamp, dim: as of :func:`genfast.ops.bias_act`.

    Raises:
        ValueError: fewer than one channel; in ``forward`` what the op raises.

    Example:
        >>> import torch, genfast
        >>> y = genfast.nn.BiasAct(16, act="lrelu", clamp=256.0)(torch.randn(2, 16, 8, 8))
    """

    def __init__(
        self,
        channels: int | None,
        *,
        act: str = "linear",
        alpha: float | None = None,
        gain: float | None = None,
        clamp: float | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__()
        if channels is not None and channels < 1:
            raise ValueError(f"BiasAct: channels={channels}, expected at least 1, or None for no bias")
        self.act, self.alpha, self.gain, self.clamp, self.dim = act, alpha, gain, clamp, dim
        self.register_parameter("bias", None if channels is None else nn.Parameter(torch.zeros(channels)))
        ops.bias_act(
            torch.zeros(1, channels or 1), act=act, alpha=alpha, gain=gain, clamp=clamp
        )  # says now what is wrong

    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        return ops.bias_act(
            x, self.bias, dim=self.dim, act=self.act, alpha=self.alpha, gain=self.gain, clamp=self.clamp
        )

    def extra_repr(self) -> str:
        given = {"act": self.act, "alpha": self.alpha, "gain": self.gain, "clamp": self.clamp}
        channels = None if self.bias is None else len(self.bias)
        return ", ".join([str(channels), *(f"{k}={v}" for k, v in given.items() if v is not None)])
