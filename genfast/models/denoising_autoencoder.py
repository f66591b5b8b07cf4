"""models.DenoisingAutoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .autoencoder import Autoencoder
from .base_autoencoder import Losses, Network, squared_error


class DenoisingAutoencoder(Autoencoder):
    """An autoencoder that finds the image behind a corrupted one (Vincent et al., ICML 2008; JMLR 2010, section 3.3).

    Args:
        corruption: "masking": each pixel is black with probability ``amount``; "salt_and_pepper": black or white, a
            coin each; "gaussian": noise of deviation ``amount`` on values in [-1, 1].
        amount: of the corruption.
        shape, latent_dim, levels, network, hidden, depth, width, base: as :class:`Autoencoder`.

    Raises:
        ValueError: sizes that do not fit, another corruption, or an amount that is negative or no probability.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.DenoisingAutoencoder((1, 8, 8), levels=17, hidden=16, amount=1.0)
        >>> model.corrupt(torch.zeros(1, 1, 8, 8)).unique()
        tensor([-1.])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 16,
        levels: int = 256,
        corruption: Literal["masking", "salt_and_pepper", "gaussian"] = "masking",
        amount: float = 0.25,
        network: Network = "perceptron",
        hidden: int = 256,
        depth: int = 2,
        width: int = 32,
        base: int = 4,
    ) -> None:
        sizes: dict[str, Any] = {"network": network, "hidden": hidden, "depth": depth, "width": width, "base": base}
        super().__init__(shape, latent_dim=latent_dim, levels=levels, **sizes)
        if corruption not in ("masking", "salt_and_pepper", "gaussian"):
            raise ValueError(
                f"DenoisingAutoencoder: corruption={corruption!r}, expected 'masking', 'salt_and_pepper' or 'gaussian'"
            )
        if not amount >= 0 or (corruption != "gaussian" and amount > 1):
            raise ValueError(
                f"DenoisingAutoencoder: amount={amount}, expected at least 0, and at most 1 for a probability"
            )
        self.config |= {"corruption": corruption, "amount": amount}
        self.corruption, self.amount = corruption, amount

    def corrupt(self, values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Values in [-1, 1] with the model's corruption."""
        where = values.device if generator is None else generator.device

        def draw(function: Any) -> Tensor:
            drawn: Tensor = function(values.shape, generator=generator, device=where, dtype=values.dtype)
            return drawn.to(values.device)

        if self.corruption == "gaussian":
            return values + self.amount * draw(torch.randn)
        hit = draw(torch.rand) < self.amount
        if self.corruption == "masking":
            return values.masked_fill(hit, -1)
        return torch.where(hit, 2 * (draw(torch.rand) < 0.5).to(values.dtype) - 1, values)

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """The squared error of the clean image, from the corrupted one."""
        target = self.scaled(images)
        loss = squared_error(self.decoder(self.encoder(self.corrupt(target, generator))), target)
        return Losses({"autoencoder": loss}, {"loss": loss})

    @torch.no_grad()
    def figures(self, images: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """mse from the clean image; denoised_mse from the corrupted one, and corrupted_mse of that one itself."""
        clean = self.scaled(images)
        noisy = self.corrupt(clean, generator)
        pairs = {"denoised_mse": self.decoder(self.encoder(noisy)), "corrupted_mse": noisy}
        found = {name: (values - clean).square().flatten(1).mean(1) / 4 for name, values in pairs.items()}
        return super().figures(images) | found
