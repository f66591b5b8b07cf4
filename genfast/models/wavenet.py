"""models.WaveNet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as gnn
from ..nn.causal import check_context
from .base_autoregressive import AutoregressiveModel


class WaveNet(AutoregressiveModel):
    """WaveNet (arXiv:1609.03499): dilated gated convolutions over a sequence of mu-law levels, residuals and skips.

    Args:
        levels: of the mu-law.
        residual: channels of the residual path.
        skip: channels of the skip path.
        layers: per stack; layer i has dilation 2^i.
        stacks: repetitions.
        kernel_size: taps of a layer, all layers.
        context_channels: features of the condition (N, D) or (N, D, L), or None.
        shape: (1, L), what ``sample`` draws unless told otherwise.

    Raises:
        ValueError: arguments that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> genfast.models.WaveNet(levels=16, residual=8, skip=8, layers=3).sample(2, (1, 20)).shape
        torch.Size([2, 1, 20])
    """

    dims = 1

    def __init__(
        self,
        levels: int = 256,
        residual: int = 64,
        skip: int = 128,
        layers: int = 10,
        stacks: int = 2,
        kernel_size: int = 2,
        *,
        context_channels: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__(1, levels, shape)
        self.config = {
            "levels": levels,
            "residual": residual,
            "skip": skip,
            "layers": layers,
            "stacks": stacks,
            "kernel_size": kernel_size,
            "context_channels": context_channels,
            "shape": self.shape,
        }
        if layers < 1 or stacks < 1 or kernel_size < 2:
            raise ValueError(
                f"{type(self).__name__}: layers={layers}, stacks={stacks}, kernel_size={kernel_size}, expected at "
                "least 1, 1, 2"
            )
        conv, gate = self.layers.MaskedConv1d, self.layers.GatedActivation
        count, end = layers * stacks, (kernel_size - 1,)
        self.embed = gnn.LevelEmbedding(levels, residual)
        self.first = conv(residual, residual, kernel_size, mask_type="A", center=end)
        self.dilated = nn.ModuleList(
            conv(residual, 2 * residual, kernel_size, dilation=2 ** (i % layers), mask_type="B", center=end)
            for i in range(count)
        )
        self.gate = gate()
        features = context_channels or 0
        self.conditions = nn.ModuleList(
            gnn.ConditionBias(features, 2 * residual) for _ in range(count if features else 0)
        )
        self.residuals = nn.ModuleList(nn.Conv1d(residual, residual, 1) for _ in range(count - 1))
        self.skips = nn.ModuleList(nn.Conv1d(residual, skip, 1) for _ in range(count))
        self.hidden, self.out = nn.Conv1d(skip, skip, 1), nn.Conv1d(skip, levels, 1)

    @property
    def receptive_field(self) -> int:
        """How many samples a prediction sees."""
        c = self.config
        back = (c["kernel_size"] - 1) * (1 + c["stacks"] * (2 ** c["layers"] - 1))
        return int(back)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        check_context(type(self).__name__, context, len(self.conditions) > 0)
        h = self.first(self.embed(x))
        skips: Any = None
        for i, dilated in enumerate(self.dilated):
            z = dilated(h)
            z = self.gate(z, self.conditions[i](context)) if len(self.conditions) else self.gate(z)
            skips = self.skips[i](z) if skips is None else skips + self.skips[i](z)
            if i < len(self.residuals):
                h = h + self.residuals[i](z)
        out: Tensor = self.out(F.relu(self.hidden(F.relu(skips))))
        return out


def mu_law_encode(audio: Tensor, levels: int = 256) -> Tensor:
    """Audio in [-1, 1] to whole numbers in [0, levels) (ITU-T G.711; WaveNet, section 2.2)."""
    mu = levels - 1
    compressed = audio.sign() * torch.log1p(mu * audio.abs().clamp_max(1)) / math.log1p(mu)
    return ((compressed + 1) / 2 * mu + 0.5).floor().long()


def mu_law_decode(x: Tensor, levels: int = 256) -> Tensor:
    """The middle of each level of :func:`mu_law_encode`, in [-1, 1]."""
    mu = levels - 1
    y = 2 * x.double() / mu - 1
    return (y.sign() * ((1 + mu) ** y.abs() - 1) / mu).float()
