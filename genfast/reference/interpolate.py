"""Points between real and generated samples (WGAN-GP, 1704.00028, algorithm 1): y_n = e_n real_n + (1 - e_n) fake_n."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def _per_sample(e: Tensor, like: Tensor) -> Tensor:
    return e.to(like.dtype).reshape(-1, *(1,) * (like.dim() - 1))


def interpolate(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    """real, fake (N, ...), epsilon (N,); in the dtype of ``real``."""
    wide = real if real.element_size() >= 4 else real.float()
    e = _per_sample(epsilon, wide)
    return (e * wide + (1 - e) * fake.to(wide.dtype)).to(real.dtype)


def interpolate_backward(
    grad: Tensor, real: Tensor, fake: Tensor, epsilon: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """e g, (1 - e) g and sum g (real - fake) per sample; empty where not ``wanted``."""
    wide = real if real.element_size() >= 4 else real.float()
    e, g = _per_sample(epsilon, wide), grad.to(wide.dtype)
    return (
        (e * g).to(real.dtype) if wanted[0] else real.new_zeros(0),
        ((1 - e) * g).to(fake.dtype) if wanted[1] else fake.new_zeros(0),
        (g * (wide - fake.to(wide.dtype))).flatten(1).sum(1).to(epsilon.dtype) if wanted[2] else epsilon.new_zeros(0),
    )
