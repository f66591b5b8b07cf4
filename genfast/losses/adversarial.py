"""Both sides of the adversarial games; the formulas are in genfast.reference.adversarial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import _check
from ..reference import adversarial as plain


def _logits(name: str, *, paired: bool = False, **given: Tensor) -> None:
    """Every tensor holds one floating logit per sample, (N,) or (N, 1); ``paired`` ones have one shape."""
    _check.tensors(name, **given)
    for argument, x in given.items():
        if not x.is_floating_point():
            raise TypeError(f"{name}: {argument} has dtype {x.dtype}, expected floating-point logits")
        if x.dim() == 0 or x.numel() == 0 or x.numel() != x.shape[0]:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(x.shape)}, expected one logit per sample, (N,) or (N, 1)"
            )
    shapes = {argument: tuple(x.shape) for argument, x in given.items()}
    if paired and len(set(shapes.values())) > 1:  # (N, 1) - (N,) would broadcast to every pair
        said = " and ".join(f"{argument} {shape}" for argument, shape in shapes.items())
        raise ValueError(f"{name}: {said} are compared one by one, expected equal shapes")


def _known(name: str, loss: str) -> None:
    if loss not in plain.CRITIC_LOSSES:
        raise ValueError(f"{name}: loss={loss!r}, expected one of {', '.join(map(repr, plain.CRITIC_LOSSES))}")


def critic_loss(loss: str, real: Tensor, fake: Tensor) -> Tensor:
    """The critic's side of the game ``loss``, a key of ``CRITIC_LOSSES``, for a loss that is a parameter.

    Args:
        loss: "minimax", "nonsaturating", "lsgan", "hinge", "wasserstein", "relativistic" or "relativistic-average".
        real, fake: logits D(x) and D(G(z)), (N,) or (N, 1), floating point.

    Raises:
        ValueError: unknown ``loss``, or logits of another shape. TypeError: logits that are no floating-point numbers.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.critic_loss("hinge", torch.tensor([0.5]), torch.tensor([-2.0]))
        tensor(0.5000)
    """
    _known("critic_loss", loss)
    _logits("critic_loss", paired=loss == "relativistic", real=real, fake=fake)
    return plain.CRITIC_LOSSES[loss](real, fake)


def generator_loss(loss: str, fake: Tensor, real: Tensor | None = None) -> Tensor:
    """The generator's side of the game ``loss``, a key of ``GENERATOR_LOSSES``; the relativistic ones need ``real``
    too.

    Args:
        loss: as for :func:`critic_loss`.
        fake, real: logits D(G(z)) and D(x), (N,) or (N, 1), floating point.

    Raises:
        ValueError: unknown ``loss``, logits of another shape, or a relativistic loss without ``real``.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.generator_loss("wasserstein", torch.tensor([1.0, 3.0]))
        tensor(-2.)
    """
    _known("generator_loss", loss)
    if loss not in plain.RELATIVISTIC:
        _logits("generator_loss", fake=fake)
        return plain.GENERATOR_LOSSES[loss](fake)
    if real is None:
        raise ValueError(f"generator_loss: {loss!r} compares fake with real logits, and real is None")
    _logits("generator_loss", paired=loss == "relativistic", fake=fake, real=real)
    return plain.GENERATOR_LOSSES[loss](fake, real)


def minimax_critic(real: Tensor, fake: Tensor) -> Tensor:
    """-E log D(x) - E log(1 - D(G(z))), D = sigmoid of the logits (Goodfellow et al., arXiv:1406.2661, eq. 1).

    real, fake: logits (N,) or (N, 1). Written with softplus, so that no logit overflows or loses its gradient.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.minimax_critic(torch.zeros(2), torch.zeros(2))
        tensor(1.3863)
    """
    return critic_loss("minimax", real, fake)


def minimax_generator(fake: Tensor) -> Tensor:
    """E log(1 - D(G(z))) (Goodfellow et al., arXiv:1406.2661, eq. 1), which saturates where the critic wins.

    fake: logits (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.minimax_generator(torch.zeros(2))
        tensor(-0.6931)
    """
    return generator_loss("minimax", fake)


def nonsaturating_critic(real: Tensor, fake: Tensor) -> Tensor:
    """The same as :func:`minimax_critic`: the non-saturating game differs in the generator's side only.

    real, fake: logits (N,) or (N, 1). Source: Goodfellow et al., arXiv:1406.2661, section 3.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.nonsaturating_critic(torch.tensor([-100.0]), torch.tensor([100.0]))
        tensor(200.)
    """
    return critic_loss("nonsaturating", real, fake)


def nonsaturating_generator(fake: Tensor) -> Tensor:
    """-E log D(G(z)) (Goodfellow et al., arXiv:1406.2661, section 3). fake: logits (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.nonsaturating_generator(torch.tensor([-200.0]))
        tensor(200.)
    """
    return generator_loss("nonsaturating", fake)


def lsgan_critic(real: Tensor, fake: Tensor, a: float = 0.0, b: float = 1.0) -> Tensor:
    """E (D(x) - b)^2 / 2 + E (D(G(z)) - a)^2 / 2 (Mao et al., arXiv:1611.04076, eq. 2; eq. 9 with a = 0, b = 1).

    real, fake: outputs of the critic (N,) or (N, 1). a = -1, b = 1, c = 0 gives the Pearson chi-squared form (eq. 8).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.lsgan_critic(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor(2.)
    """
    _logits("lsgan_critic", real=real, fake=fake)
    return plain.least_squares_critic(real, fake, a, b)


def lsgan_generator(fake: Tensor, c: float = 1.0) -> Tensor:
    """E (D(G(z)) - c)^2 / 2 (Mao et al., arXiv:1611.04076, eq. 2). fake: outputs of the critic (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.lsgan_generator(torch.tensor([3.0]))
        tensor(2.)
    """
    _logits("lsgan_generator", fake=fake)
    return plain.least_squares_generator(fake, c=c)


def hinge_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E max(0, 1 - D(x)) + E max(0, 1 + D(G(z))) (Lim and Ye, arXiv:1705.02894; Miyato et al., arXiv:1802.05957, eq.
    16).

    real, fake: logits (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.hinge_critic(torch.tensor([2.0, 0.0]), torch.tensor([0.0, -2.0]))
        tensor(1.)
    """
    return critic_loss("hinge", real, fake)


def hinge_generator(fake: Tensor) -> Tensor:
    """-E D(G(z)) (Miyato et al., arXiv:1802.05957, eq. 17). fake: logits (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.hinge_generator(torch.tensor([2.0, 4.0]))
        tensor(-3.)
    """
    return generator_loss("hinge", fake)


def wasserstein_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E D(G(z)) - E D(x) (Arjovsky et al., arXiv:1701.07875, algorithm 1).

    It is a distance only for a critic that is held Lipschitz: by :func:`clip_weights_`, or by ``ops.gradient_penalty``.
    real, fake: outputs of the critic (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.wasserstein_critic(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor(-2.)
    """
    return critic_loss("wasserstein", real, fake)


def wasserstein_generator(fake: Tensor) -> Tensor:
    """-E D(G(z)) (Arjovsky et al., arXiv:1701.07875, algorithm 1). fake: outputs of the critic (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.wasserstein_generator(torch.tensor([1.0]))
        tensor(-1.)
    """
    return generator_loss("wasserstein", fake)


def relativistic_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(D(G(z)) - D(x)) over pairs (Jolicoeur-Martineau, arXiv:1807.00734; R3GAN, arXiv:2501.05441, eq. 2).

    real, fake: logits of one shape, (N,) or (N, 1); sample i is compared with sample i.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.relativistic_critic(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """
    return critic_loss("relativistic", real, fake)


def relativistic_generator(fake: Tensor, real: Tensor) -> Tensor:
    """E softplus(D(x) - D(G(z))) over pairs (Jolicoeur-Martineau, arXiv:1807.00734; R3GAN, arXiv:2501.05441, eq. 2).

    fake, real: logits of one shape, (N,) or (N, 1).

    Example:
        >>> import torch, genfast
        >>> genfast.losses.relativistic_generator(torch.tensor([0.0]), torch.tensor([50.0]))
        tensor(50.)
    """
    return generator_loss("relativistic", fake, real)


def relativistic_average_critic(real: Tensor, fake: Tensor) -> Tensor:
    """E softplus(E D(G(z)) - D(x)) + E softplus(D(G(z)) - E D(x)) (Jolicoeur-Martineau, arXiv:1807.00734, section 4).

    real, fake: logits (N,) or (N, 1); each is compared with the mean of the others' batch, of its own rank over several
    processes.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.relativistic_average_critic(torch.zeros(3), torch.zeros(2))
        tensor(1.3863)
    """
    return critic_loss("relativistic-average", real, fake)


def relativistic_average_generator(fake: Tensor, real: Tensor) -> Tensor:
    """E softplus(E D(x) - D(G(z))) + E softplus(D(x) - E D(G(z))) (Jolicoeur-Martineau, arXiv:1807.00734, section 4).

    fake, real: logits (N,) or (N, 1); over several processes the means are those of this rank's.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.relativistic_average_generator(torch.zeros(3), torch.zeros(2))
        tensor(1.3863)
    """
    return generator_loss("relativistic-average", fake, real)


@torch.no_grad()
def clip_weights_(module: nn.Module, bound: float = 0.01) -> nn.Module:
    """Clamps every parameter to [-bound, bound] in place (Arjovsky et al., arXiv:1701.07875, algorithm 1).

    Raises:
        ValueError: ``bound`` is not positive.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.clip_weights_(torch.nn.Linear(1, 1)).weight.abs() <= 0.01
        tensor([[True]])
    """
    if not bound > 0:
        raise ValueError(f"clip_weights_: bound={bound}, expected a positive number")
    parameters: list[Tensor] = list(module.parameters())
    if parameters:
        torch._foreach_clamp_min_(parameters, -bound)
        torch._foreach_clamp_max_(parameters, bound)
    return module
