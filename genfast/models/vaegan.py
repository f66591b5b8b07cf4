"""models.VAEGAN."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import losses, ops
from .adversarial_autoencoder import check_loss
from .base_adversarial import Game
from .base_autoencoder import AutoencoderModel, Losses, Network, decoder_network, encoder_network
from .blocks import leaky_relu, mlp, stages


class FeatureCritic(nn.Module):
    """A critic whose last hidden layer is the measure of similarity; gives (features (N, F), logits (N,)).

    Features are normalised over a sample, in the place of the paper's batch normalisation, which would couple samples.
    """

    def __init__(self, network: Network, shape: Sequence[int], hidden: int, depth: int, width: int, base: int) -> None:
        super().__init__()
        if network == "perceptron":
            layers = [
                nn.Flatten(),
                *mlp([shape[0] * shape[1] * shape[2], *[hidden] * max(depth, 1)], leaky_relu),
                leaky_relu(),
            ]
            size = hidden
        else:
            channels = [shape[0], *(width << i for i in range(stages("VAEGAN", shape, base)))]
            layers = []
            for taken, given in zip(channels, channels[1:]):
                layers += [nn.Conv2d(taken, given, 4, stride=2, padding=1), leaky_relu()]
            layers.append(nn.Flatten())
            size = channels[-1] * base * base
        layers.append(
            nn.LayerNorm(size, elementwise_affine=False)
        )  # else the critic's scale decides what likeness weighs
        self.features, self.head = nn.Sequential(*layers), nn.Linear(size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features: Tensor = self.features(x)
        return features, self.head(features).flatten(0)


class VAEGAN(AutoencoderModel):
    """A VAE that measures likeness by a layer of a critic (Larsen et al., arXiv:1512.09300, algorithm 1).

    With x~ = Dec(z), z ~ q(z|x), and x_p = Dec(z_p), z_p ~ N(0, 1), from one pass for all three players:
    the encoder minimises KL + L_like, the decoder gamma L_like + its side of the game, the critic the other side, where
    L_like = 1/2 |Dis_l(x) - Dis_l(x~)|^2, minus the log-likelihood of N(Dis_l(x~), I) but for its constant. The
    critic's fakes are x~ and x_p, averaged. The decoder's side is the non-saturating one; ``loss`` "minimax" is the
    algorithm's own.

    Args:
        gamma: of L_like in the decoder's loss.
        loss: the game, a key of ``losses.CRITIC_LOSSES`` but for the relativistic ones.
        shape, latent_dim, levels, network, hidden, depth, width, base: as :class:`Autoencoder`; the critic has the
        same.

    Raises:
        ValueError: sizes that do not fit, another loss, or a negative ``gamma``.

    Example:
        >>> import torch, genfast
        >>> genfast.models.VAEGAN((1, 8, 8), levels=17, hidden=16).sample(2).shape
        torch.Size([2, 1, 8, 8])
    """

    prior = True
    betas = (0.5, 0.999)
    phases = (("encoder", "decoder", "critic"),)

    def __init__(
        self,
        shape: Sequence[int],
        *,
        latent_dim: int = 16,
        levels: int = 256,
        gamma: float = 0.1,
        loss: Game = "nonsaturating",
        network: Network = "perceptron",
        hidden: int = 256,
        depth: int = 2,
        width: int = 32,
        base: int = 4,
    ) -> None:
        super().__init__(shape, latent_dim, levels)
        check_loss("VAEGAN", loss)
        if not gamma >= 0:
            raise ValueError(f"VAEGAN: gamma={gamma}, expected at least 0")
        sizes: dict[str, Any] = {"hidden": hidden, "depth": depth, "width": width, "base": base}
        self.config = {
            "shape": self.shape,
            "latent_dim": latent_dim,
            "levels": levels,
            "gamma": gamma,
            "loss": loss,
            "network": network,
        } | sizes
        self.gamma, self.loss = gamma, loss
        self.encoder = encoder_network("VAEGAN", network, self.shape, 2 * latent_dim, **sizes)
        decoder = decoder_network("VAEGAN", network, self.shape, latent_dim, self.shape[0], **sizes)
        self.decoder = nn.Sequential(decoder, nn.Tanh())
        self.critic = FeatureCritic(network, self.shape, hidden, depth, width, base)

    def encode(self, images: Tensor) -> Tensor:
        """The posterior's mean (N, latent_dim)."""
        mean: Tensor = self.encoder(self.scaled(images)).chunk(2, 1)[0]
        return mean

    def player(self, name: str) -> Iterable[nn.Parameter]:
        """The parameters of "encoder", "decoder" or "critic"."""
        part: nn.Module = getattr(self, name)
        return part.parameters()

    def losses(self, phase: tuple[str, ...], images: Tensor, *, generator: torch.Generator | None, step: int) -> Losses:
        """The three players' losses, from one pass."""
        real = self.scaled(images)
        z, kl = ops.diagonal_gaussian(*self.encoder(real).chunk(2, 1), generator=generator, reduction="mean")
        again, drawn = self.decoder(z), self.decoder(self.latent(len(real), generator))
        features, logits = self.critic(torch.cat([real, again, drawn]))
        of_real, of_again, _ = features.chunk(3)
        like = 0.5 * (of_real.detach() - of_again).square().sum(1).mean()
        real_logits, fake_logits = logits[: len(real)], logits[len(real) :]
        fooling = losses.generator_loss(self.loss, fake_logits)
        players = {
            "encoder": kl + like,
            "decoder": self.gamma * like + fooling,
            "critic": losses.critic_loss(self.loss, real_logits, fake_logits),
        }
        return Losses(players, {"kl": kl, "likeness": like, "decoder": fooling, "critic": players["critic"]})

    @torch.no_grad()
    def figures(self, images: Tensor, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """kl of each image in nats, likeness of its reconstruction to the critic, and mse."""
        real = self.scaled(images)
        mean, log_variance = self.encoder(real).chunk(2, 1)
        (of_real, _), (of_again, _) = self.critic(real), self.critic(self.decoder(mean))
        found = {
            "kl": ops.diagonal_gaussian_kl(mean, log_variance),
            "likeness": 0.5 * (of_real - of_again).square().sum(1),
        }
        return found | super().figures(images)
