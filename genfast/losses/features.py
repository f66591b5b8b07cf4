"""Features of a network, by layer: what perceptual, style and contextual losses compare."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._compiler import uncompiled

Normalization: TypeAlias = "str | tuple[Sequence[float], Sequence[float]] | None"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of colours in [0, 1], for torchvision's networks
# Convolutions in each of the five blocks (Simonyan and Zisserman, arXiv:1409.1556, table 1, columns D and E).
VGG = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
_VIEWS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)  # may hand on their input itself


# Held for a pass that puts hooks or detached parameters into a network: two such passes at once would see each other's,
# and the second to end would put back what the first had put in. One lock for all networks, as networks may share
# modules.
_PASS = threading.RLock()


class _Stop(BaseException):
    """Ends a pass behind the last wanted layer; no Exception, so that a network's own handlers let it through."""


class _Changed(RuntimeError):
    """Something behind a layer has changed its output in place."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


class _Kept:
    """The wanted outputs of one pass."""

    def __init__(self, copies: set[str]) -> None:
        self.copies = copies
        self.features: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def add(self, name: str, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise TypeError(f"FeatureExtractor: layer {name!r} gives a {type(output).__name__}, expected a tensor")
        self.features[name] = output.clone() if name in self.copies else output
        if not torch.compiler.is_compiling() and not output.is_inference():
            self.versions[name] = self.features[name]._version

    def finished(self) -> dict[str, Tensor]:
        changed = [name for name, version in self.versions.items() if self.features[name]._version != version]
        if changed:
            raise _Changed(changed)
        return self.features


class _Chain(nn.Module):
    """Modules one behind the other, up to the last wanted one: no hook and no exception."""

    def __init__(self, parts: Sequence[tuple[str, nn.Module]], wanted: Sequence[str]) -> None:
        super().__init__()
        self.names = [name for name, _ in parts]
        self.parts = nn.ModuleList(module for _, module in parts)
        self.wanted = set(wanted)

    def forward(self, x: Tensor, copies: set[str]) -> dict[str, Tensor]:
        kept = _Kept(copies)
        for name, part in zip(self.names, self.parts):
            x = part(x)
            if name in self.wanted:
                kept.add(name, x)
        return kept.finished()


class _Hooked(nn.Module):
    """Any network: hooks for the time of one pass, which the last wanted layer ends."""

    def __init__(self, network: nn.Module, wanted: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.wanted = tuple(wanted)

    @uncompiled("hooks come and go, and an exception ends the pass")
    def forward(self, x: Tensor, copies: set[str]) -> dict[str, Tensor]:
        kept = _Kept(copies)
        own = threading.get_ident()  # another thread may call the network itself meanwhile

        def hook_of(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if name not in kept.features and threading.get_ident() == own:
                    kept.add(name, output)
                    if len(kept.features) == len(self.wanted):
                        raise _Stop

            return hook

        handles = [self.network.get_submodule(name).register_forward_hook(hook_of(name)) for name in self.wanted]
        try:
            self.network(x)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        missing = [name for name in self.wanted if name not in kept.features]
        if missing:
            raise ValueError(f"FeatureExtractor: layers has {missing}, which the network's forward does not reach")
        return kept.finished()


def _inplace(module: nn.Module) -> bool:
    return any(getattr(m, "inplace", False) is True for m in module.modules())


def _overwritten(parts: Sequence[tuple[str, nn.Module]]) -> bool:
    """Whether the first of these modules, or the first behind mere views, works in place."""
    for _, module in parts:
        if _inplace(module):
            return True
        if not isinstance(module, _VIEWS):
            break
    return False


def _chain(network: nn.Module, wanted: Sequence[str], prefix: str = "") -> list[tuple[str, nn.Module]] | None:
    """The modules of nested nn.Sequentials as one list that has every wanted layer, or None where it is no such
    chain."""
    if type(network).forward is not nn.Sequential.forward or network._forward_hooks or network._forward_pre_hooks:
        return None
    parts: list[tuple[str, nn.Module]] = []
    for key, child in network._modules.items():
        name = prefix + key
        if any(w.startswith(f"{name}.") for w in wanted):
            inner = None if child is None or name in wanted else _chain(child, wanted, f"{name}.")
            if inner is None:
                return None
            parts += inner
        elif child is not None:
            parts.append((name, child))
    return parts


def _affine(normalization: Normalization, value_range: tuple[float, float]) -> tuple[Tensor, Tensor] | None:
    """(scale, shift) per channel that map the images' range to [0, 1] and normalise, or None."""
    if normalization is None:
        return None
    if isinstance(normalization, str):
        if normalization != "imagenet":
            raise ValueError(
                f"FeatureExtractor: normalization={normalization!r}, expected 'imagenet', (mean, std) or None"
            )
        normalization = IMAGENET
    try:
        mean, std = (torch.as_tensor(v, dtype=torch.float64).reshape(-1) for v in normalization)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"FeatureExtractor: normalization={normalization!r}, expected (mean, std), one number per channel"
        ) from error
    if mean.shape != std.shape or not bool((std > 0).all()):
        raise ValueError(
            f"FeatureExtractor: normalization has mean {mean.tolist()} and std {std.tolist()}, expected as many of "
            "one as of the other, and every std above 0"
        )
    low, high = value_range
    return 1 / ((high - low) * std), -(low / (high - low) + mean) / std


class FeatureExtractor(nn.Module):
    """Outputs of a network's layers in one pass, which ends at the last of them.

    The network is held and not owned: it follows ``.to()`` and the like, but it is in neither ``parameters()`` nor the
    state_dict, and ``train()`` does not reach it. Nothing in it is changed: its parameters keep their ``requires_grad``
    and get no gradients (unless ``learn``), and its hooks are gone after each call, also after one that raised.

    A plain nn.Sequential (of Sequentials, too) runs as the chain of its modules up to the last wanted one; this
    compiles into one graph. Any other network is hooked and left by an exception, and torch.compile leaves it as it is;
    where a layer runs twice in one pass, its first output counts. A layer whose output is changed in place behind it
    (as by ``nn.ReLU(inplace=True)``) is kept as a copy.

    Several threads may call one extractor, or several on one network. Passes that need hooks, or whose network has
    parameters that require gradients, wait for each other; those of a frozen nn.Sequential run at the same time. A
    thread that trains the network itself meanwhile needs a network of its own: for a pass without ``learn`` its
    parameters are replaced by detached ones.

    Args:
        network: any module, in evaluation mode: batch norm and dropout in training mode are refused unless ``learn``.
        layers: their names, as in ``network.named_modules()``, dotted where nested; a str for one layer.
        normalization: of the images, before the network: "imagenet" (what torchvision's weights expect), (mean, std)
            with one number per channel, for values in [0, 1], or None for a network that takes the images as they are.
        value_range: of the images' values, which a normalisation maps to [0, 1] first.
        learn: let gradients reach the network's parameters, as for a critic's features.

    Shape: images (N, C, ...) -> dict of each layer's output, in the order of ``layers``. Dtype and device are the
        network's;
    the normalisation keeps the images' dtype.

    Raises:
        ValueError: a name that is no layer, none or one twice, a layer that the pass does not reach, a network in
            training mode, a normalisation or images that do not fit it. TypeError: images that are no floating-point
            tensor, or a layer whose output is no tensor.

    Example:
        >>> import torch, genfast
        >>> network = genfast.losses.random_features("vgg16", width=4)
        >>> features = genfast.losses.FeatureExtractor(network, ["relu1_2", "relu3_1"], normalization=None)
        >>> {name: tuple(f.shape) for name, f in features(torch.rand(1, 3, 32, 32)).items()}
        {'relu1_2': (1, 4, 32, 32), 'relu3_1': (1, 16, 8, 8)}
    """

    def __init__(
        self,
        network: nn.Module,
        layers: str | Sequence[str],
        *,
        normalization: Normalization,
        value_range: tuple[float, float] = (0.0, 1.0),
        learn: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise TypeError(f"FeatureExtractor: network is a {type(network).__name__}, expected a torch.nn.Module")
        self.layers = (layers,) if isinstance(layers, str) else tuple(layers)
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"FeatureExtractor: layers={self.layers!r}, expected names, each of them once")
        modules = dict(network.named_modules(remove_duplicate=False))
        for name in self.layers:
            if not name or name not in modules:
                raise ValueError(
                    f"FeatureExtractor: layers has {name!r}, which network lacks; it has {', '.join(list(modules)[1:])}"
                )
        if len(value_range) != 2 or not value_range[0] < value_range[1]:
            raise ValueError(f"FeatureExtractor: value_range={value_range!r}, expected (low, high) with low < high")
        self.normalization, self.value_range, self.learn = normalization, value_range, learn
        self._affine = _affine(normalization, value_range)
        parts = _chain(network, self.layers)
        if parts is not None:
            names = [name for name, _ in parts]
            parts = parts[: 1 + max(map(names.index, self.layers))]
            runs: nn.Module = _Chain(parts, self.layers)
            self._copies = {
                name for i, (name, _) in enumerate(parts) if name in self.layers and _overwritten(parts[i + 1 :])
            }
            self._spare_input = _overwritten(parts)
        else:
            for name in self.layers:
                same = [other for other, module in modules.items() if module is modules[name]]
                if len(same) > 1:
                    raise ValueError(
                        f"FeatureExtractor: layers has {name!r}, one module under the names {same}; which run is meant?"
                    )
            runs = _Hooked(network, self.layers)
            self._spare_input = _inplace(network)  # what runs behind what is not known
            self._copies = set(self.layers) if self._spare_input else set()
        self._held = (network, runs)  # in a tuple, so that they are no submodules
        if not learn:
            for name, module in runs.named_modules():
                if module.training and isinstance(
                    module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
                ):
                    raise ValueError(
                        f"FeatureExtractor: network is in training mode, with a {type(module).__name__} at "
                        f"{name.partition('.')[2]}; call network.eval(), or pass learn=True"
                    )

    @property
    def network(self) -> nn.Module:
        """The network, which is held and not owned."""
        return self._held[0]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> FeatureExtractor:
        self.network._apply(fn)
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return f"{type(self.network).__name__}, layers={list(self.layers)}, normalization={self.normalization!r}"

    def _normalized(self, images: Tensor) -> Tensor:
        if self._affine is None:
            return images.clone() if self._spare_input else images
        channels = self._affine[0].numel()
        if images.dim() < 2 or images.shape[1] != channels:
            raise ValueError(
                f"FeatureExtractor: images have shape {tuple(images.shape)}, and normalization has {channels} "
                f"channels; expected (N, {channels}, ...)"
            )
        affine = self._affine  # another thread may replace it by that of its device
        if affine[0].device != images.device:
            self._affine = affine = (affine[0].to(images.device), affine[1].to(images.device))
        dtype = torch.promote_types(
            images.dtype, torch.float32
        )  # half images are rounded once, behind the normalisation
        scale, shift = (t.to(dtype).reshape(-1, *[1] * (images.dim() - 2)) for t in affine)
        return torch.addcmul(shift, images, scale).to(images.dtype)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The wanted outputs, by layer."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            said = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(
                f"FeatureExtractor: images are {said}, expected a floating-point tensor (uint8 images: x / 255)"
            )
        runs = self._held[1]

        def run(copies: set[str], learnt: dict[str, Tensor]) -> dict[str, Tensor]:
            arguments = (self._normalized(images), copies)
            detached = {} if self.learn else {name: p.detach() for name, p in learnt.items()}
            features: dict[str, Tensor] = functional_call(runs, detached, arguments) if detached else runs(*arguments)
            return features

        def learnt_now() -> dict[str, Tensor]:
            return {name: p for name, p in runs.named_parameters() if p.requires_grad}

        def run_in_turn(copies: set[str]) -> dict[str, Tensor]:
            if torch.compiler.is_compiling():
                return run(copies, learnt_now())
            with _PASS:
                learnt = learnt_now()
                if learnt or isinstance(runs, _Hooked):
                    return run(copies, learnt)
            return run(copies, learnt)

        copies = self._copies
        try:
            found = run_in_turn(copies)
        except _Changed as changed:  # by an operation that no module shows: seen once, and then known
            copies = copies | set(changed.names)
            self._copies = self._copies | copies
            found = run_in_turn(copies)
        return {name: found[name] for name in self.layers}


# ---- networks ----


def _vgg(name: str, function: str, *, channels: int = 3, width: int = 64, pool: str = "max") -> nn.Sequential:
    if name not in VGG:
        raise ValueError(f"{function}: name={name!r}, expected one of {', '.join(map(repr, VGG))}")
    if pool not in ("avg", "max"):
        raise ValueError(f"{function}: pool={pool!r}, expected 'avg' or 'max'")
    if width < 1 or channels < 1:
        raise ValueError(f"{function}: width={width} and channels={channels}, expected at least 1")
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    with torch.device("meta"):  # the weights come later, and the global generator stays as it is
        for block, convolutions in enumerate(VGG[name], 1):
            for i in range(1, convolutions + 1):
                outputs = width * min(2 ** (block - 1), 8)
                modules[f"conv{block}_{i}"] = nn.Conv2d(channels, outputs, 3, padding=1)
                modules[f"relu{block}_{i}"] = nn.ReLU(inplace=True)
                channels = outputs
            modules[f"pool{block}"] = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
    return nn.Sequential(modules).to_empty(device="cpu").eval().requires_grad_(False)


def _read(weights: str | Path) -> Mapping[str, Tensor]:
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"vgg_features: weights={str(weights)!r}, expected 'imagenet' or a file, and there is none"
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: Mapping[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return found


def _imagenet(name: str) -> Mapping[str, Tensor]:
    advice = f"pass weights=FILE, a state_dict of torchvision's {name}, or use random_features"
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"vgg_features: weights='imagenet' needs torchvision, which is not installed; {advice}"
        ) from error
    try:
        found: Mapping[str, Tensor] = get_model_weights(name).IMAGENET1K_V1.get_state_dict(
            progress=False, check_hash=True
        )
    except OSError as error:
        raise OSError(f"vgg_features: torchvision's weights of {name} could not be had ({error}); {advice}") from error
    return found


def vgg_features(
    name: str = "vgg19", weights: str | Path | Mapping[str, Tensor] = "imagenet", *, pool: str = "max"
) -> nn.Sequential:
    """The convolutions of VGG-16 or VGG-19, with layers by their usual names: conv1_1, relu1_1, ..., pool5.

    The network expects images with ``normalization="imagenet"``. It is in evaluation mode and its parameters are
    frozen.
    Source: Simonyan and Zisserman, arXiv:1409.1556; for styles with average pooling, Gatys et al., arXiv:1508.06576.

    Args:
        name: "vgg16" or "vgg19".
        weights: "imagenet": torchvision's, downloaded or from its cache. A file (.pth, .pt or .safetensors) or a
            mapping with torchvision's names ("features.0.weight"; the classifier is ignored) or with those of this
            network.
        pool: "max" as trained, or "avg".

    Raises:
        ImportError: "imagenet" without torchvision. OSError: weights that cannot be had.
        ValueError: another ``name`` or ``pool``, or weights that do not fit.

    Example:
        >>> import genfast
        >>> network = genfast.losses.random_features("vgg16", seed=1)
        >>> same = genfast.losses.vgg_features("vgg16", network.state_dict())
        >>> bool((same.conv5_3.weight == network.conv5_3.weight).all())
        True
    """
    network = _vgg(name, "vgg_features", pool=pool)
    if isinstance(weights, Mapping):
        given = weights
    else:
        given = _imagenet(name) if weights == "imagenet" else _read(weights)
    names = {str(i): module for i, module in enumerate(network._modules)}  # the order is torchvision's
    state = {}
    for key, value in given.items():
        layer, _, kind = key.removeprefix("features.").rpartition(".")
        state[f"{names.get(layer, layer)}.{kind}"] = value
    wanted = network.state_dict()
    wrong = [key for key, value in wanted.items() if key not in state or state[key].shape != value.shape]
    if wrong:
        raise ValueError(f"vgg_features: weights do not fit {name}: missing or of another shape: {', '.join(wrong)}")
    network.load_state_dict({key: state[key] for key in wanted})
    return network


def random_features(
    name: str = "vgg19", *, seed: int = 0, channels: int = 3, width: int = 64, pool: str = "avg", init: str = "he"
) -> nn.Sequential:
    """A VGG-like network with random weights, the same for the same seed, for use without downloads.

    Its layers have the names of :func:`vgg_features`. Random filters keep textures and layout well enough to transfer a
    style (He et al., arXiv:1606.04801). It takes images as they are, centred on 0 best:
    ``normalization=((0.5,) * 3, (0.25,) * 3)``.

    Args:
        name: "vgg16" or "vgg19", for the numbers of convolutions.
        seed: of the weights.
        channels: of the images.
        width: channels of the first block; the others have 2, 4, 8 and 8 times as many.
        pool: "avg" (smoother gradients; Gatys et al., arXiv:1508.06576, section Methods) or "max".
        init: "he" (normal, arXiv:1502.01852, equation 10) or "orthogonal" (arXiv:1312.6120), both with gain sqrt(2), no
            bias.

    Raises:
        ValueError: a value outside these.

    Example:
        >>> import genfast
        >>> network = genfast.losses.random_features("vgg19", width=8)
        >>> list(network._modules)[:5], network.conv5_1.weight.shape
        (['conv1_1', 'relu1_1', 'conv1_2', 'relu1_2', 'pool1'], torch.Size([64, 64, 3, 3]))
    """
    if init not in ("he", "orthogonal"):
        raise ValueError(f"random_features: init={init!r}, expected 'he' or 'orthogonal'")
    network = _vgg(name, "random_features", channels=channels, width=width, pool=pool)
    generator = torch.Generator().manual_seed(seed)
    for module in network:
        if isinstance(module, nn.Conv2d):
            if init == "he":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            else:
                nn.init.orthogonal_(module.weight, 2**0.5, generator=generator)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    return network
