"""models.SparseAutoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..losses import kl_to_bernoulli
from .autoencoder import Autoencoder
from .base_autoencoder import Losses, Network, squared_error


class SparseAutoencoder(Autoencoder):
    """An autoencoder whose code has few active units, and may have more units than the image has pixels.

    "kl": sigmoid units, whose mean activations over the batch are pulled to ``rho`` by sum_j KL(rho || rho_j) (Ng,
    CS294A lecture notes, section 3). "l1": ReLU units with the penalty sum_j |h_j|, mean over the batch.

    Args:
        penalty: "kl" or "l1".
        weight: of the penalty beside the squared error; the notes' beta.
        rho: the wanted mean activation of "kl".
        latent_dim, shape, levels, network, hidden, depth, width, base: as :class:`Autoencoder`.

    Raises:
        ValueError: sizes that do not fit, another penalty, a negative weight or a ``rho`` outside (0, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.models.SparseAutoencoder((1, 8, 8), levels=17, hidden=16).sample(2).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 128,
        levels: int = 256,
        penalty: Literal["kl", "l1"] = "kl",
        weight: float = 0.1,
        rho: float = 0.05,
        network: Network = "perceptron",
        hidden: int = 256,
        depth: int = 1,
        width: int = 32,
        base: int = 4,
    ) -> None:
        sizes: dict[str, Any] = {"network": network, "hidden": hidden, "depth": depth, "width": width, "base": base}
        super().__init__(shape, latent_dim=latent_dim, levels=levels, **sizes)
        if penalty not in ("kl", "l1"):
            raise ValueError(f"SparseAutoencoder: penalty={penalty!r}, expected 'kl' or 'l1'")
        if not weight >= 0 or not 0 < rho < 1:
            raise ValueError(
                f"SparseAutoencoder: weight={weight} and rho={rho}, expected at least 0 and a number between 0 and 1"
            )
        self.config |= {"penalty": penalty, "weight": weight, "rho": rho}
        self.penalty, self.weight, self.rho = penalty, weight, rho

    def _activations(self, values: Tensor) -> Tensor:
        code: Tensor = self.encoder(values)
        return code.sigmoid() if self.penalty == "kl" else code.relu()

    def encode(self, images: Tensor) -> Tensor:
        """The activations (N, latent_dim)."""
        return self._activations(self.scaled(images))

    def latent(self, n: int, generator: torch.Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Codes from the fitted Gaussian, clipped to what the units can be."""
        code = super().latent(n, generator, temperature).clamp(min=0)
        return code.clamp(max=1) if self.penalty == "kl" else code

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """The squared error and the penalty."""
        target = self.scaled(images)
        code = self._activations(target)
        error = squared_error(self.decoder(code), target)
        penalty = kl_to_bernoulli(code, self.rho) if self.penalty == "kl" else code.abs().sum(1).mean()
        loss = error + self.weight * penalty
        return Losses(
            {"autoencoder": loss}, {"loss": loss, "error": error, "penalty": penalty, "activation": code.mean()}
        )

    @torch.no_grad()
    def figures(self, images: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """mse, and the mean activation of a code's units."""
        return super().figures(images) | {"activation": self.encode(images).mean(1)}
