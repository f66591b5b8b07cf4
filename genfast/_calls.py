"""What calling a module does beside its class's ``forward``: hooks, a forward of the instance's own, overridden
methods.

What reads a module's weights and settings instead of calling it asks here first.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

# What a subclass may define without a call being another one.
_HARMLESS = frozenset(
    {
        "__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__parameters__", "__orig_bases__",
        "__static_attributes__", "__firstlineno__", "__annotate__", "__annotate_func__", "__annotations_cache__",
        "__classcell__", "__abstractmethods__", "_abc_impl", "__constants__", "__repr__", "extra_repr",
        "reset_parameters", "__deepcopy__", "__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "train",
    }
)  # fmt: skip
_WEIGHT_HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)


# Found once for each class; dictionaries rather than functools.cache, of which a compiler warns.
_UNCHANGED: dict[tuple[type, type], bool] = {}
_SERVED: dict[tuple[type, tuple[type, ...]], type | None] = {}


def changes_nothing(cls: type, base: type) -> bool:
    """Whether a call of ``cls`` is one of ``base``: what lies between them defines nothing that a call could use."""
    if cls is base:
        return True
    found = _UNCHANGED.get((cls, base))
    if found is None:
        found = _UNCHANGED[cls, base] = all(
            _harmless(name, value, base)
            for between in cls.__mro__[: cls.__mro__.index(base)]
            for name, value in vars(between).items()
        )
    return found


def _harmless(name: str, value: Any, base: type) -> bool:
    if name in _HARMLESS:
        return True
    # A method under a new name is called by nothing that the base knows.
    new = isinstance(value, (FunctionType, classmethod, staticmethod)) and not hasattr(base, name)
    return new and not name.startswith("__") and name not in getattr(base, "__annotations__", {})


def _class_that_serves(cls: type, classes: tuple[type, ...]) -> type | None:
    if (cls, classes) not in _SERVED:
        base = next((c for c in cls.__mro__ if c in classes), None)
        _SERVED[cls, classes] = base if base is not None and changes_nothing(cls, base) else None
    return _SERVED[cls, classes]


def class_of(module: nn.Module) -> type:
    """The class of a module, before torch's parametrizations made one of their own for it."""
    if "parametrizations" not in module._modules:
        return type(module)
    cls: type = parametrize.type_before_parametrizations(module)
    return cls


def stands_for(module: nn.Module, classes: Collection[type]) -> type | None:
    """The one of ``classes`` whose forward a call of ``module`` runs, hooks aside; None where it runs another.

    A subclass is taken for its parent only where it defines nothing that a call could use, and an instance only where
    no attribute of its own stands in front of a method.
    """
    cls = class_of(module)
    found = _class_that_serves(cls, tuple(classes))
    if found is None or any(callable(getattr(cls, name, None)) for name in module.__dict__):
        return None
    return found


def _follows(hook: Any) -> bool:
    """Whether a pre-hook does nothing but compute one of its module's tensors from others."""
    for known in _WEIGHT_HOOKS:
        if isinstance(hook, known):
            return type(hook).__call__ is known.__call__
    return False


def hook_in_the_way(module: nn.Module, *, weights: bool = False) -> str:
    """What a call of ``module`` runs beside its forward, in words; empty where it runs nothing.

    Args:
        weights: passes over the pre-hooks of torch's old weight_norm and spectral_norm and of its pruning, which
            :func:`weights_of_calls` runs.
    """
    sources = [
        (nn.modules.module._global_forward_pre_hooks, "the forward pre-hook of all modules"),
        (module._forward_pre_hooks, "the forward pre-hook"),
        (module._forward_hooks, "the forward hook"),
        (nn.modules.module._global_forward_hooks, "the forward hook of all modules"),
    ]
    for hooks, kind in sources:
        for hook in hooks.values():
            if not (weights and hooks is module._forward_pre_hooks and _follows(hook)):
                return f"{kind} {getattr(hook, '__qualname__', type(hook).__qualname__)}"
    return ""


def all_modules(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """As ``nn.Module.modules`` of all of them, each once, without its names, which would cost a call far more."""
    found: dict[int, nn.Module] = {}
    queue = list(roots)
    while queue:
        m = queue.pop()
        if id(m) not in found:
            found[id(m)] = m
            if m._modules:
                queue += [c for c in m._modules.values() if c is not None]
    return list(found.values())


def called_plainly(network: nn.Module) -> bool:
    """Whether no module of a network has hooks or a forward of its own; quick, for what asks at every call."""
    module = nn.modules.module
    if module._global_forward_hooks or module._global_forward_pre_hooks:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in all_modules([network]))


@contextlib.contextmanager
def weights_of_calls(*networks: nn.Module) -> Iterator[None]:
    """Inside, modules under torch's old weight_norm and spectral_norm or its pruning hold the weights that a call would
    use.

    These write ``weight`` when the module is called, so between calls it holds what an earlier call left, or what was
    there before a state_dict was loaded. Afterwards each module holds again what it held.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for network in networks:
            for module in network.modules():
                for hook in module._forward_pre_hooks.values():
                    if not _follows(hook):
                        continue
                    name: str = getattr(hook, "_tensor_name" if isinstance(hook, prune.BasePruningMethod) else "name")
                    before.append((module, name, module.__dict__.get(name)))
                    hook(module, ())
        yield
    finally:
        for module, name, value in reversed(before):
            if isinstance(value, Tensor) and name in module.__dict__:
                module.__dict__[name] = value


# A module has a dozen containers, most of them empty, and these are its commonest settings: looked up before anything
# is asked.
_SCALARS = frozenset({type(None), bool, int, float, str, torch.dtype})
_CONTAINERS = frozenset({dict, OrderedDict, set, list, tuple})


def _frozen(value: Any, tensors: list[Tensor], depth: int) -> Any:
    """Something that equals itself as long as ``value`` does; tensors in it are put into ``tensors``."""
    kind = type(value)
    if kind in _SCALARS:
        return kind, value
    if kind in _CONTAINERS and not value:
        return kind
    if isinstance(value, Tensor):
        tensors.append(value)
        return Tensor
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    if depth and isinstance(value, dict):
        return dict, tuple((_Same(k), _frozen(v, tensors, depth - 1)) for k, v in value.items())
    if depth and isinstance(value, (list, tuple)):
        return type(value), tuple(_frozen(v, tensors, depth - 1) for v in value)
    if depth and isinstance(value, (set, frozenset)):
        return type(value), frozenset(_Same(v) for v in value)
    plain = isinstance(getattr(value, "__dict__", None), dict) and not callable(value)
    if (
        depth
        and plain
        and not isinstance(value, nn.Module)
        and not type(value).__module__.startswith(("torch", "genfast"))
    ):
        return _Same(value), tuple((k, _frozen(v, tensors, depth - 1)) for k, v in vars(value).items())
    return _Same(value)


class _Same:
    """Equals another of the very same object, which it keeps alive."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


_NOT_STRUCTURE = frozenset({"training", "_sampler"})
Structure = list[tuple[str, Any]]


def state(network: nn.Module) -> tuple[Structure, list[Tensor]]:
    """(structure, tensors): what a call of ``network`` depends on, as far as Python shows it.

    The structure (types, settings, hooks, submodules and shapes) compares equal as long as it is unchanged, modes
    aside. The
    tensors are all that hang on the modules: parameters, buffers and plain attributes.
    """
    tensors: list[Tensor] = []
    of_all = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
    structure: Structure = [("hooks of all modules", _frozen(dict(hooks), tensors, 1)) for hooks in of_all]
    for module in network.modules():
        structure.append(("type", _Same(type(module))))
        for name, value in module.__dict__.items():
            if name not in _NOT_STRUCTURE:
                structure.append((name, _frozen(value, tensors, 3)))
    structure.append(("tensors", (list, [(t.shape, t.dtype, t.device) for t in tensors])))
    return structure, tensors


def without_numbers(structure: Structure) -> Structure:
    """The structure without settings that are numbers, some of which count calls."""
    return [s for s in structure if not (isinstance(s[1], tuple) and s[1][0] in (int, float))]
