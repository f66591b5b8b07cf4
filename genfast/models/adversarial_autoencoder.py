"""models.AdversarialAutoencoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses
from ..reference.adversarial import RELATIVISTIC
from .autoencoder import Autoencoder
from .base_adversarial import Game
from .base_autoencoder import Losses, Network, squared_error
from .blocks import leaky_relu, mlp


def check_loss(name: str, loss: str) -> None:
    """The key of a loss that needs no pairs."""
    known = [k for k in losses.CRITIC_LOSSES if k not in RELATIVISTIC]
    if loss not in known:
        raise ValueError(f"{name}: loss={loss!r}, expected one of {', '.join(map(repr, known))}")


class AdversarialAutoencoder(Autoencoder):
    """An autoencoder whose codes a critic cannot tell from N(0, 1) (Makhzani et al., arXiv:1511.05644, section 2).

    The encoder is deterministic. A step has the paper's two phases: encoder and decoder reduce the squared error, then
    the critic learns to tell the prior from the codes and the encoder, as its generator, to fool it; an optimiser each.

    Args:
        loss: the game, a key of ``losses.CRITIC_LOSSES`` but for the relativistic ones.
        critic_hidden: units of the critic's two hidden layers.
        weight: of the encoder's adversarial loss.
        shape, latent_dim, levels, network, hidden, depth, width, base: as :class:`Autoencoder`.

    Raises:
        ValueError: sizes that do not fit, or another loss.

    Example:
        >>> import torch, genfast
        >>> genfast.models.AdversarialAutoencoder((1, 8, 8), levels=17, hidden=16).sample(2).shape
        torch.Size([2, 1, 8, 8])
    """

    prior = True
    betas = (0.5, 0.999)
    phases = (("autoencoder",), ("critic",), ("encoder",))

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 8,
        levels: int = 256,
        loss: Game = "nonsaturating",
        critic_hidden: int = 256,
        weight: float = 1.0,
        network: Network = "perceptron",
        hidden: int = 256,
        depth: int = 2,
        width: int = 32,
        base: int = 4,
    ) -> None:
        sizes: dict[str, Any] = {"network": network, "hidden": hidden, "depth": depth, "width": width, "base": base}
        super().__init__(shape, latent_dim=latent_dim, levels=levels, **sizes)
        check_loss("AdversarialAutoencoder", loss)
        self.config |= {"loss": loss, "critic_hidden": critic_hidden, "weight": weight}
        self.loss, self.weight = loss, weight
        self.critic = nn.Sequential(*mlp([latent_dim, critic_hidden, critic_hidden, 1], leaky_relu), nn.Flatten(0))

    def player(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters of "autoencoder", "critic" or "encoder"."""
        if name == "autoencoder":
            return [*self.encoder.parameters(), *self.decoder.parameters()]
        return (self.critic if name == "critic" else self.encoder).parameters()

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """The squared error; the critic's loss on codes; the encoder's."""
        values = self.scaled(images)
        code = self.encoder(values)
        if phase == ("autoencoder",):
            error = squared_error(self.decoder(code), values)
            return Losses({"autoencoder": error}, {"error": error})
        if phase == ("critic",):
            real = self.critic(self.latent(len(images), generator))
            loss = losses.critic_loss(self.loss, real, self.critic(code.detach()))
        else:
            loss = self.weight * losses.generator_loss(self.loss, self.critic(code))
        return Losses({phase[0]: loss}, {phase[0]: loss})
