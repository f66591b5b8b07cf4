"""models.WAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .autoencoder import Autoencoder
from .base_autoencoder import Losses, Network, squared_error


class WAE(Autoencoder):
    """The Wasserstein autoencoder with a maximum mean discrepancy (Tolstikhin et al., arXiv:1711.01558, algorithm 2).

    The encoder is deterministic. The loss is the squared error plus ``weight`` times the squared MMD, unbiased, between
    the codes of the batch and as many from N(0, 1), under the sum of inverse multiquadratic kernels of the released
    code: C / (C + |x - y|^2), C = 2 latent_dim s for s = 0.1, 0.2, 0.5, 1, 2, 5, 10; see :func:`genfast.ops.mmd`.

    Args:
        weight: of the discrepancy, the paper's lambda.
        shape, latent_dim, levels, network, hidden, depth, width, base: as :class:`Autoencoder`.

    Raises:
        ValueError: sizes that do not fit, or a negative weight.

    Example:
        >>> import torch, genfast
        >>> genfast.models.WAE((1, 8, 8), levels=17, hidden=16).sample(2).shape
        torch.Size([2, 1, 8, 8])
    """

    prior = True

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 8,
        levels: int = 256,
        weight: float = 10.0,
        network: Network = "perceptron",
        hidden: int = 256,
        depth: int = 2,
        width: int = 32,
        base: int = 4,
    ) -> None:
        sizes: dict[str, Any] = {"network": network, "hidden": hidden, "depth": depth, "width": width, "base": base}
        super().__init__(shape, latent_dim=latent_dim, levels=levels, **sizes)
        if not weight >= 0:
            raise ValueError(f"WAE: weight={weight}, expected at least 0")
        self.config |= {"weight": weight}
        self.weight = weight

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """The squared error and the discrepancy, which needs two images at least."""
        target = self.scaled(images)
        code = self.encoder(target)
        error = squared_error(self.decoder(code), target)
        discrepancy = ops.mmd(code, self.latent(len(code), generator), kernel="imq")
        loss = error + self.weight * discrepancy
        return Losses({"autoencoder": loss}, {"loss": loss, "error": error, "mmd": discrepancy})

    @torch.no_grad()
    def figures(self, images: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """mse, and mmd of these images' codes, the same for each."""
        code = self.encode(images)
        discrepancy = (
            ops.mmd(code, self.latent(len(code), generator), kernel="imq") if len(code) > 1 else code.new_zeros(())
        )
        return super().figures(images) | {"mmd": discrepancy.expand(len(code))}
