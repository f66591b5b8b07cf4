"""models.DCGAN."""

from __future__ import annotations

from collections.abc import Sequence

from .base_adversarial import AdversarialModel, Recipe
from .blocks import dcgan_networks


class DCGAN(AdversarialModel):
    """Strided convolutions, batch normalisation, ReLU and LeakyReLU(0.2), tanh (Radford et al., arXiv:1511.06434,
    figure 1).

    With the paper's ``shape`` (3, 64, 64) and ``width`` 128: z of 100 -> 1024 x 4 x 4 -> 512 x 8 x 8 -> 256 x 16 x 16
    -> 128 x 32 x 32 -> 3 x 64 x 64, and the critic back down. Other sizes have as many stages as they need. Weights
    start from N(0, 0.02). With kernel_size 4, the state_dicts of both parts are those of PyTorch's DCGAN example (there
    width is 64).

    Args:
        shape: (C, side, side), side = base times a power of two. Images have values in [-1, 1].
        latent_dim: of z ~ N(0, 1).
        width: channels of the widest map but one; each halving of the side doubles them.
        base: side of the smallest map.
        kernel_size: 4, or the paper's 5.

    Raises:
        ValueError: a shape that no doubling of ``base`` reaches, or another kernel size.

    Example:
        >>> import torch, genfast
        >>> genfast.models.DCGAN((3, 32, 32), width=8).sample(2).shape
        torch.Size([2, 3, 32, 32])
    """

    recipe = Recipe(loss="nonsaturating", generator_lr=2e-4, critic_lr=2e-4, betas=(0.5, 0.999))

    def __init__(
        self,
        shape: Sequence[int] = (3, 64, 64),
        *,
        latent_dim: int = 100,
        width: int = 128,
        base: int = 4,
        kernel_size: int = 4,
    ) -> None:
        super().__init__(shape, latent_dim)
        self.config = {
            "shape": self.shape,
            "latent_dim": latent_dim,
            "width": width,
            "base": base,
            "kernel_size": kernel_size,
        }
        self.generator, self.critic = dcgan_networks(
            type(self).__name__, self.shape, latent_dim, width, base, kernel_size
        )
