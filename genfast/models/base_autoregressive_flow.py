"""What the autoregressive flows have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from .flow import Flow

Hidden = int | Sequence[int]
Activation = Literal["elu", "gelu", "leaky_relu", "none", "relu", "sigmoid", "silu", "softplus", "tanh"]


def widths(hidden: Hidden, depth: int) -> list[int]:
    return [hidden] * depth if isinstance(hidden, int) else [int(h) for h in hidden]


class AutoregressiveFlow(Flow):
    """What MAF, IAF and NSF have in common: the norms between the transforms, and the orders."""

    def __init__(self, dim: int, base: nn.Module, steps: Sequence[nn.Module], config: dict[str, Any]) -> None:
        super().__init__(base, steps, shape=(dim,))
        self.config = config

    @classmethod
    def check_options(cls, dim: int, transforms: int, order: str, norm: str | None) -> None:
        if dim < 1 or transforms < 1:
            raise ValueError(f"{cls.__name__}: dim={dim} and transforms={transforms}, expected at least 1")
        if order not in ("alternating", "random"):
            raise ValueError(f"{cls.__name__}: order={order!r}, expected 'alternating' or 'random'")
        if norm not in ("act", "batch", None):
            raise ValueError(f"{cls.__name__}: norm={norm!r}, expected 'act', 'batch' or None")

    @classmethod
    def norms(cls, dim: int, norm: str | None) -> list[nn.Module]:
        if norm is None:
            return []
        return [cls.layers.ActNorm(dim) if norm == "act" else cls.layers.BatchNormFlow(dim)]

    @classmethod
    def made(
        cls,
        dim: int,
        i: int,
        order: str,
        hidden: Hidden,
        depth: int,
        outputs: int,
        context: int,
        residual: bool,
        activation: Activation,
    ) -> nn.Module:
        """The network of transform i; orders alternate between first to last and last to first, or are random."""
        places = "random" if order == "random" else "natural" if i % 2 == 0 else "reversed"
        made: nn.Module = cls.layers.MADENetwork(
            dim,
            widths(hidden, depth),
            outputs=outputs,
            context=context,
            order=places,
            residual=residual,
            activation=activation,
        )
        return made
