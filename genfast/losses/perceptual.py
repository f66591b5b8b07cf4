"""Losses on the features of a network: perceptual, style and contextual, alone or together in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as gnn
from .. import ops
from .features import FeatureExtractor, Normalization

DISTANCES = ("mse", "l1", "lpips")


def _wide(x: Tensor) -> Tensor:
    """Half types in float32, where squares and sums of features overflow or lose digits."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _reduction(name: str, reduction: str) -> None:
    if reduction not in ("mean", "none"):
        raise ValueError(f"{name}: reduction={reduction!r}, expected 'mean' or 'none'")


class _FeatureLoss(nn.Module):
    """A sum over layers of weight * (features of x against what is kept of y's)."""

    def __init__(
        self,
        network: nn.Module,
        layers: str | Sequence[str],
        weights: float | Sequence[float] | None,
        normalization: Normalization,
        value_range: tuple[float, float],
    ) -> None:
        super().__init__()
        self.features = FeatureExtractor(network, layers, normalization=normalization, value_range=value_range)
        count = len(self.features.layers)
        if weights is None or isinstance(weights, (int, float)):
            weights = (1.0 if weights is None else weights,) * count
        self.weights = tuple(float(w) for w in weights)
        if len(self.weights) != count:
            raise ValueError(f"{self._name}: {len(self.weights)} weights for {count} layers, expected one per layer")
        self._target: list[Tensor] | None = None

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _prepare(self, features: Tensor) -> Tensor:
        """What is compared with, from the features of one layer."""
        raise NotImplementedError

    def _compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def _targets(self, features: Mapping[str, Tensor]) -> list[Tensor]:
        return [self._prepare(features[name]) for name in self.features.layers]

    @torch.no_grad()
    def set_target(self, y: Tensor) -> None:
        """Keeps what later calls without ``y`` compare with, so that its pass through the network is made once.

        Kept on the device of ``y`` (moved with the first call on another), and not in the state_dict.
        """
        self._target = self._targets(self.features(y))

    def _against(self, features: Mapping[str, Tensor], targets: list[Tensor] | None) -> Tensor:
        if targets is None:
            if self._target is None:
                raise ValueError(f"{self._name}: y is None and no target is set; pass y, or call set_target(y) first")
            device, targets = features[self.features.layers[0]].device, self._target
            if targets[0].device != device:
                self._target = targets = [t.to(device) for t in targets]
        found = [features[name] for name in self.features.layers]
        for name, f, t in zip(self.features.layers, found, targets):
            if t.shape[0] not in (1, f.shape[0]):
                raise ValueError(
                    f"{self._name}: y has a batch of {t.shape[0]} and x of {f.shape[0]} at {name}, expected as many, "
                    "or 1"
                )
        return self._compare(found, targets)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The loss of images ``x`` against ``y``, or against the target that is set."""
        if y is None:
            return self._against(self.features(x), None)
        with torch.no_grad():
            targets = self._targets(self.features(y))
        return self._against(self.features(x), targets)


class PerceptualLoss(_FeatureLoss):
    """Distance of features: sum over layers of w_l d(phi_l(x), phi_l(y)) (Johnson et al., arXiv:1603.08155, equation
    2).

    The network runs to the last wanted layer and no further. No gradient reaches ``y`` or the network.

    Args:
        network, normalization, value_range: as of :class:`FeatureExtractor`.
        layers: names of the network's layers; relu2_2 or relu3_3 of VGG-16 in the paper.
        weights: one per layer, one for all, or None for 1.
        distance: "mse" (mean of squares; piq's ContentLoss sums over channels), "l1" (mean of absolute values), or
            "lpips": features are divided by their norm over channels, sqrt(|f|^2 + eps), and the squares summed over
            channels and averaged over positions (Zhang et al., arXiv:1801.03924, equation 1, without learnt channel
            weights). eps stands inside the root, so that zero features have a finite gradient, as torchmetrics has it;
            the lpips package adds 1e-10 outside.
        eps: of "lpips".
        reduction: "mean" over the batch, or "none": one value per sample.

    Shape: x (N, C, H, W), y (N or 1, C, H, W), floating point, of one size -> a scalar, or (N,). Half features are
        compared
    in float32. An empty batch has loss 0.

    Raises:
        ValueError: names, weights, shapes or options that do not fit, or neither ``y`` nor a target.

    Example:
        >>> import torch, genfast
        >>> loss = genfast.losses.PerceptualLoss(genfast.losses.random_features(width=4), "relu2_2", normalization=None)
        >>> loss(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
        tensor(0.)
    """

    def __init__(
        self,
        network: nn.Module,
        layers: str | Sequence[str],
        weights: float | Sequence[float] | None = None,
        *,
        normalization: Normalization,
        value_range: tuple[float, float] = (0.0, 1.0),
        distance: str = "mse",
        eps: float = 1e-8,
        reduction: str = "mean",
    ) -> None:
        if distance not in DISTANCES:
            raise ValueError(
                f"PerceptualLoss: distance={distance!r}, expected one of {', '.join(map(repr, DISTANCES))}"
            )
        _reduction("PerceptualLoss", reduction)
        if not eps > 0:
            raise ValueError(f"PerceptualLoss: eps={eps}, expected above 0")
        super().__init__(network, layers, weights, normalization, value_range)
        self.distance, self.eps, self.reduction = distance, eps, reduction

    def _prepare(self, features: Tensor) -> Tensor:
        f = _wide(features)
        return f * torch.rsqrt(f.square().sum(1, keepdim=True) + self.eps) if self.distance == "lpips" else f

    def _compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        total = None
        for name, weight, x, t in zip(self.features.layers, self.weights, features, targets):
            if x.shape[1:] != t.shape[1:]:
                raise ValueError(
                    f"PerceptualLoss: features at {name} have shape {tuple(x.shape)} for x and {tuple(t.shape)} for y; "
                    "expected images of one size"
                )
            d = self._prepare(x) - t
            each = (d.abs() if self.distance == "l1" else d.square()).flatten(1).mean(1)
            each = each * (weight * x.shape[1] if self.distance == "lpips" else weight)  # over channels a sum
            total = each if total is None else total + each
        assert total is not None
        if self.reduction == "none":
            return total
        return total.mean() if len(total) else total.sum()  # an empty batch has loss 0


class StyleLoss(_FeatureLoss):
    """Distance of Gram matrices: sum over layers of w_l mean((G_l(x) - G_l(y))^2) (Gatys et al., arXiv:1508.06576,
    equation 4).

    On :func:`genfast.ops.style_loss`, so half features cannot overflow. G is divided by C*H*W with ``normalize``
    (Johnson et al., arXiv:1603.08155, equation 3); without, it is the sum over positions, as in piq. The paper's factor
    1/(4 C^2 M^2) is 1/(4 M^2) of the mean without ``normalize``. The target's Grams, C*C numbers a layer, are kept by
    :meth:`set_target`; one target serves images of any size and number. No gradient reaches ``y`` or the network.

    Args:
        network, normalization, value_range: as of :class:`FeatureExtractor`.
        layers: names of the network's layers; relu1_1, relu2_1, relu3_1, relu4_1, relu5_1 of VGG-19 in the paper.
        weights: one per layer, one for all, or None for 1.
        normalize, shift: as of :func:`genfast.ops.gram_matrix`.
        reduction: "mean" over the batch, or "none": one value per sample.

    Shape: x (N, C, H, W), y (N or 1, C, H', W') -> a scalar, or (N,); float32 for half images.

    Raises:
        ValueError: names, weights or shapes that do not fit, or neither ``y`` nor a target.

    Example:
        >>> import torch, genfast
        >>> features = genfast.losses.random_features(width=4)
        >>> loss = genfast.losses.StyleLoss(features, ["relu1_1", "relu2_1"], normalization=None)
        >>> loss.set_target(torch.zeros(1, 3, 20, 20))
        >>> loss(torch.zeros(2, 3, 16, 16))
        tensor(0.)
    """

    def __init__(
        self,
        network: nn.Module,
        layers: str | Sequence[str],
        weights: float | Sequence[float] | None = None,
        *,
        normalization: Normalization,
        value_range: tuple[float, float] = (0.0, 1.0),
        normalize: bool = True,
        shift: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        _reduction("StyleLoss", reduction)
        super().__init__(network, layers, weights, normalization, value_range)
        self.normalize, self.shift, self.reduction = normalize, shift, reduction

    def _prepare(self, features: Tensor) -> Tensor:
        return ops.gram_matrix(features, normalize=self.normalize, shift=self.shift)

    def _compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        options = {"normalize": self.normalize, "shift": self.shift, "reduction": self.reduction}
        return ops.style_loss(features, targets, self.weights, **options)  # type: ignore[arg-type]


class ContextualLoss(_FeatureLoss):
    """Contextual loss of features: sum over layers of w_l (-log CX(phi_l(x), phi_l(y))) (Mechrez et al.,
    arXiv:1803.02077).

    It compares sets of features, so x and y may be of different sizes and need not be aligned. On
    :class:`genfast.nn.ContextualSimilarityLoss`, in memory that does not grow with the product of the numbers of
    positions. No gradient reaches ``y`` or the network.

    Args:
        network, normalization, value_range: as of :class:`FeatureExtractor`.
        layers: names of the network's layers; conv3_2 and conv4_2 of VGG-19 for style in the paper.
        weights: one per layer, one for all, or None for 1.
        preset, options: of :class:`genfast.nn.ContextualSimilarityLoss`, such as ``bandwidth``.

    Shape: x (N, C, H, W), y (N, C, H', W') or (1, C, H', W') -> a scalar.

    Raises:
        ValueError: names, weights, shapes or options that do not fit, or neither ``y`` nor a target.

    Example:
        >>> import torch, genfast
        >>> loss = genfast.losses.ContextualLoss(genfast.losses.random_features(width=4), "relu3_2", normalization=None)
        >>> x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> bool(loss(x, x) < loss(x, x.flip(2) ** 2))
        True
    """

    def __init__(
        self,
        network: nn.Module,
        layers: str | Sequence[str],
        weights: float | Sequence[float] | None = None,
        *,
        normalization: Normalization,
        value_range: tuple[float, float] = (0.0, 1.0),
        preset: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, layers, weights, normalization, value_range)
        self.contextual = gnn.ContextualSimilarityLoss(preset, **options)

    def _prepare(self, features: Tensor) -> Tensor:
        return features

    def _compare(self, features: list[Tensor], targets: list[Tensor]) -> Tensor:
        total = None
        for weight, x, t in zip(self.weights, features, targets):
            one: Tensor = weight * self.contextual(x, t.expand(x.shape[0], *t.shape[1:]))
            total = one if total is None else total + one
        assert total is not None
        return total


class FeatureLosses(nn.Module):
    """Several losses on one network in one pass of it: sum over names of weight * loss.

    Args:
        weights: by name; 1 where none is given.
        losses: by name: :class:`PerceptualLoss`, :class:`StyleLoss` or :class:`ContextualLoss` on the same network,
            with the same normalisation and range of values.

    Shape: as of the losses -> a scalar.

    Raises:
        ValueError: no loss, losses that differ in network or normalisation, a weight or target of a name that is no
            loss, or a missing target.

    Example:
        >>> import torch, genfast
        >>> from genfast import losses
        >>> network = losses.random_features(width=4)
        >>> both = losses.FeatureLosses(
        ...     content=losses.PerceptualLoss(network, "relu4_2", normalization=None),
        ...     style=losses.StyleLoss(network, ["relu1_1", "relu2_1"], normalization=None), weights={"style": 100.0})
        >>> both.set_target(content=torch.zeros(1, 3, 32, 32), style=torch.zeros(1, 3, 20, 20))
        >>> both(torch.zeros(1, 3, 32, 32))
        tensor(0.)
    """

    def __init__(self, *, weights: Mapping[str, float] | None = None, **losses: _FeatureLoss) -> None:
        super().__init__()
        if not losses:
            raise ValueError("FeatureLosses: no losses were given, expected some by name, as style=StyleLoss(...)")
        for name, loss in losses.items():
            if not isinstance(loss, _FeatureLoss):
                raise TypeError(
                    f"FeatureLosses: {name} is a {type(loss).__name__}, expected a loss on features of this package"
                )
        first_name, first = next(iter(losses.items()))
        for name, loss in losses.items():
            for what in ("network", "normalization", "value_range"):
                ours, its = getattr(first.features, what), getattr(loss.features, what)
                if ours is not its if what == "network" else ours != its:
                    raise ValueError(
                        f"FeatureLosses: {name} and {first_name} differ in {what}, expected one pass to serve both"
                    )
        self._known("weights", weights or {}, losses)
        self.losses = losses  # no submodules: there is one network, and it is in self.features
        self.weights = {name: float((weights or {}).get(name, 1.0)) for name in losses}
        layers = dict.fromkeys(layer for loss in losses.values() for layer in loss.features.layers)
        self.features = FeatureExtractor(
            first.features.network,
            tuple(layers),
            normalization=first.features.normalization,
            value_range=first.features.value_range,
        )

    @staticmethod
    def _known(argument: str, given: Mapping[str, Any], losses: Any) -> None:
        unknown = [name for name in given if name not in losses]
        if unknown:
            raise ValueError(f"FeatureLosses: {argument} names {unknown}, expected some of {list(losses)}")

    @torch.no_grad()
    def _targets(self, targets: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """What each loss compares with; images that several losses share go through the network once."""
        self._known("targets", targets, self.losses)
        found: dict[str, list[Tensor]] = {}
        for name, image in targets.items():
            if name not in found:
                features = self.features(image)
                for other, same in targets.items():
                    if same is image:
                        found[other] = self.losses[other]._targets(features)
        return found

    def set_target(self, **targets: Tensor) -> None:
        """Keeps targets by the losses' names, as of :meth:`StyleLoss.set_target`; those of other losses stay."""
        for name, kept in self._targets(targets).items():
            self.losses[name]._target = kept

    def terms(self, x: Tensor, **targets: Tensor) -> dict[str, Tensor]:
        """Each loss by name, without its weight."""
        kept = self._targets(targets)
        features = self.features(x)
        return {name: loss._against(features, kept.get(name)) for name, loss in self.losses.items()}

    def forward(self, x: Tensor, **targets: Tensor) -> Tensor:
        """The weighted sum, of ``x`` against images by the losses' names, or against the targets that are set."""
        terms = self.terms(x, **targets)
        for name, value in terms.items():
            if value.dim():
                raise ValueError(
                    f"FeatureLosses: {name} has reduction 'none', which terms() returns; expected a scalar to add up"
                )
        return torch.stack([self.weights[name] * value for name, value in terms.items()]).sum()
