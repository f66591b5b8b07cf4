"""What is added to an adversarial loss: classes, codes, cycles, features, history."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import _check
from ..reference import adversarial as plain
from .adversarial import critic_loss, generator_loss


def _classes(name: str, argument: str, logits: Tensor, labels_argument: str, labels: Tensor) -> Tensor:
    """Cross-entropy of class logits (N, K) and labels (N,), both checked."""
    _check.tensors(name, **{argument: logits, labels_argument: labels})
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"{name}: {argument} has shape {tuple(logits.shape)} and dtype {logits.dtype}, expected class logits (N, K)"
        )
    if labels.dtype != torch.int64 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"{name}: {labels_argument} has shape {tuple(labels.shape)} and dtype {labels.dtype}, expected int64 "
            f"({logits.shape[0]},)"
        )
    return F.cross_entropy(logits, labels)


def _check_sequences(name: str, **named: Sequence[Tensor]) -> None:
    """All are sequences of tensors."""
    for argument, tensors in named.items():
        if not isinstance(tensors, Sequence) or isinstance(tensors, str):
            raise TypeError(
                f"{name}: {argument} is a {type(tensors).__name__}, expected a torch.Tensor or a sequence of them"
            )
        _check.tensors(name, **{f"{argument}[{i}]": t for i, t in enumerate(tensors)})


def acgan_critic(
    real: Tensor,
    fake: Tensor,
    real_classes: Tensor,
    real_labels: Tensor,
    fake_classes: Tensor | None = None,
    fake_labels: Tensor | None = None,
    *,
    loss: str = "minimax",
    real_scale: float = 1.0,
    fake_scale: float = 1.0,
) -> Tensor:
    """The critic of AC-GAN: adversarial loss + cross-entropy of its class logits, L_S + L_C (Odena et al.,
    arXiv:1610.09585).

    Args:
        real, fake: logits D(x), D(G(z, c)), (N,) or (N, 1).
        real_classes, fake_classes: class logits (N, K). Without ``fake_classes`` the critic learns the classes of real
            images only, as in the code of WGAN-GP (arXiv:1704.00028).
        real_labels, fake_labels: int64 (N,).
        loss: a key of ``CRITIC_LOSSES``.
        real_scale, fake_scale: of the two cross-entropies.

    Raises:
        ValueError: shapes that do not fit, or an unknown ``loss``.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.acgan_critic(torch.zeros(2), torch.zeros(2), torch.zeros(2, 3), torch.tensor([0, 2]))
        tensor(2.4849)
    """
    name = "acgan_critic"
    total = critic_loss(loss, real, fake)
    total = total + real_scale * _classes(name, "real_classes", real_classes, "real_labels", real_labels)
    if (fake_classes is None) != (fake_labels is None):
        raise ValueError("acgan_critic: fake_classes and fake_labels go together, and only one was given")
    if fake_classes is not None and fake_labels is not None:
        total = total + fake_scale * _classes(name, "fake_classes", fake_classes, "fake_labels", fake_labels)
    return total


def acgan_generator(
    fake: Tensor,
    fake_classes: Tensor,
    fake_labels: Tensor,
    *,
    real: Tensor | None = None,
    loss: str = "nonsaturating",
    scale: float = 1.0,
) -> Tensor:
    """The generator of AC-GAN: adversarial loss + cross-entropy of the class that was asked for (arXiv:1610.09585,
    section 3).

    ``fake`` (N,) or (N, 1), ``fake_classes`` (N, K), ``fake_labels`` int64 (N,); ``real`` logits for the relativistic
    losses. The code of WGAN-GP (arXiv:1704.00028) has ``scale`` 0.1.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.acgan_generator(torch.zeros(2), torch.zeros(2, 3), torch.tensor([0, 2]), loss="wasserstein")
        tensor(1.0986)
    """
    entropy = _classes("acgan_generator", "fake_classes", fake_classes, "fake_labels", fake_labels)
    return generator_loss(loss, fake, real) + scale * entropy


def infogan(
    logits: Tensor | Sequence[Tensor] = (),
    codes: Tensor | Sequence[Tensor] = (),
    mean: Tensor | None = None,
    log_std: Tensor | None = None,
    values: Tensor | None = None,
    *,
    categorical: float = 1.0,
    continuous: float = 1.0,
) -> Tensor:
    """-E log Q(c | x): minus the bound on the mutual information, but for the constant H(c) (InfoGAN, arXiv:1606.03657,
    eq. 5).

    Both players minimise it. Section 6 has one head of Q per code: a softmax for each categorical code, and a diagonal
    Gaussian for the continuous ones.

    Args:
        logits, codes: of the categorical codes, (N, K) and int64 (N,); several as two sequences.
        mean, log_std, values: of the continuous codes, (N, D) each.
        categorical, continuous: weights of the two parts.

    Raises:
        ValueError: no code at all, or shapes that do not fit.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.infogan(torch.zeros(4, 10), torch.arange(4))
        tensor(2.3026)
    """
    logits = (logits,) if isinstance(logits, Tensor) else logits
    codes = (codes,) if isinstance(codes, Tensor) else codes
    _check_sequences("infogan", logits=logits, codes=codes)
    if len(logits) != len(codes):
        raise ValueError(
            f"infogan: {len(logits)} logits and {len(codes)} codes, expected as many of one as of the other"
        )
    parts = [categorical * _classes("infogan", "logits", one, "codes", code) for one, code in zip(logits, codes)]
    gaussians = {"mean": mean, "log_std": log_std, "values": values}
    present = {name: t for name, t in gaussians.items() if t is not None}
    _check.tensors("infogan", **present)
    gaussian = list(present.values())
    if gaussian:
        if len(gaussian) < 3 or len({t.shape for t in gaussian}) > 1 or gaussian[0].dim() != 2:
            said = [None if t is None else tuple(t.shape) for t in gaussians.values()]
            raise ValueError(f"infogan: mean, log_std and values have shapes {said}, expected (N, D) all three")
        parts.append(continuous * plain.gaussian_nll(*gaussian))
    if not parts:
        raise ValueError("infogan: no codes were given, expected logits and codes, or mean, log_std and values")
    return torch.stack(parts).sum()


def _l1(name: str, pairs: Sequence[tuple[str, Tensor, Tensor]], weight: float) -> Tensor:
    for argument, ours, wanted in pairs:
        if ours.shape != wanted.shape:
            raise ValueError(
                f"{name}: {argument} has shape {tuple(ours.shape)}, expected that of its original, "
                f"{tuple(wanted.shape)}"
            )
    return weight * torch.stack([(ours - wanted).abs().mean() for _, ours, wanted in pairs]).sum()


def cycle_consistency(x: Tensor, x_again: Tensor, y: Tensor, y_again: Tensor, *, weight: float = 10.0) -> Tensor:
    """weight (E |F(G(x)) - x|_1 + E |G(F(y)) - y|_1), mean over elements (CycleGAN, arXiv:1703.10593, eq. 2; weight
    section 4).

    x_again = F(G(x)), y_again = G(F(y)): the images that went there and back, of the same shapes.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.cycle_consistency(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(10.)
    """
    _check.tensors("cycle_consistency", x=x, x_again=x_again, y=y, y_again=y_again)
    return _l1("cycle_consistency", (("x_again", x_again, x), ("y_again", y_again, y)), weight)


def identity_mapping(x: Tensor, x_mapped: Tensor, y: Tensor, y_mapped: Tensor, *, weight: float = 5.0) -> Tensor:
    """weight (E |F(x) - x|_1 + E |G(y) - y|_1), mean over elements (CycleGAN, arXiv:1703.10593, section 5.2: half of
    10).

    x_mapped = F(x), y_mapped = G(y): an image that is in the target domain already is to stay.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.identity_mapping(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(5.)
    """
    _check.tensors("identity_mapping", x=x, x_mapped=x_mapped, y=y, y_mapped=y_mapped)
    return _l1("identity_mapping", (("x_mapped", x_mapped, x), ("y_mapped", y_mapped, y)), weight)


def feature_matching(real: Tensor | Sequence[Tensor], fake: Tensor | Sequence[Tensor]) -> Tensor:
    """||E f(x) - E f(G(z))||^2 of features of the critic (Salimans et al., arXiv:1606.03498, section 3.1), summed over
    layers.

    real, fake: features (N, ...) of one or of several layers; batches may differ in size. ``real`` is usually detached.

    Raises:
        ValueError: other layers, or features of other shapes, in ``real`` than in ``fake``.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.feature_matching(torch.zeros(3, 2), torch.ones(5, 2))
        tensor(2.)
    """
    real = (real,) if isinstance(real, Tensor) else real
    fake = (fake,) if isinstance(fake, Tensor) else fake
    _check_sequences("feature_matching", real=real, fake=fake)
    shapes = [[tuple(t.shape[1:]) for t in part] for part in (real, fake)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(
            f"feature_matching: features of shapes {shapes[0]} in real and {shapes[1]} in fake, expected the same"
        )
    return plain.feature_matching(real, fake)


class HistoricalAveraging(nn.Module):
    """||theta - (1/t) sum_i theta_i||^2, theta_1 the initial parameters (Salimans et al., arXiv:1606.03498, section
    3.3).

    Holds the running mean, so its memory does not grow with t. Call it for the penalty, add the penalty to the loss,
    and call :meth:`update` after the optimiser's step. The state_dict holds the mean and t. It keeps ``module`` without
    owning
    it: the parameters appear in neither ``parameters()`` nor the state_dict.

    Example:
        >>> import torch, genfast
        >>> history = genfast.losses.HistoricalAveraging(torch.nn.Linear(2, 1))
        >>> history().item()
        0.0
    """

    count: Tensor

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._watched = (module,)  # in a tuple, so that it is no submodule
        self.register_buffer("count", torch.ones((), dtype=torch.int64))
        for i, parameter in enumerate(module.parameters()):
            self.register_buffer(f"mean_{i}", parameter.detach().clone())

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        parameters: list[Tensor] = list(self._watched[0].parameters())
        return parameters, [self.get_buffer(f"mean_{i}") for i in range(len(parameters))]

    def forward(self) -> Tensor:
        """The penalty, a scalar that is differentiable in the parameters."""
        return plain.historical_average(*self._pairs())

    @torch.no_grad()
    def update(self) -> None:
        """Takes the present parameters into the mean."""
        parameters, means = self._pairs()
        self.count += 1
        torch._foreach_lerp_(means, parameters, 1 / int(self.count))
