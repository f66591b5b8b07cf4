"""How a module of another library gets our kernels: its class becomes a mixin of ours in front of the class it had.

Nothing is wrapped and no global of the other library is touched, so isinstance, the printed name, the state_dict,
hooks, deep copies and pickles stay what they were, and putting the old class back undoes all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .._calls import changes_nothing, class_of
from .._derived import readable, recorded

KEPT = (
    "_genfast"  # the attribute under which a swapped module keeps what is made once; no copy, pickle or restore has it
)


class Swapped:
    """Base of the mixins, and what ``isinstance`` asks to know a swapped module.

    A mixin overrides methods of ``peer`` with ones that give the same results; ``super()`` is the peer's own method,
    for calls that the kernels do not cover.

    Attributes:
        peer: the class that is served; its subclasses are too where they left ``stands_for`` alone.
        what: what our kernels do in it, for the report.
        stands_for: the peer's methods that are replaced or gone round.
    """

    peer: ClassVar[type[nn.Module]]
    what: ClassVar[str]
    stands_for: ClassVar[tuple[str, ...]]
    original: ClassVar[type[nn.Module]]  # of a made class: the one to go back to
    mixin: ClassVar[type[Swapped]]

    @classmethod
    def refuses(cls, module: Any) -> str:
        """Why this module is left as it is; empty where it is not."""
        return ""

    @classmethod
    def does(cls, module: Any) -> str:
        """What our kernels do in this module."""
        return cls.what

    @classmethod
    def falls_back(cls, module: Any) -> str:
        """Which calls of a swapped module the peer's own methods keep; empty where there are none."""
        return ""

    def kept(self) -> dict[str, Any]:
        """What this module keeps between calls."""
        found: dict[str, Any] = self.__dict__.setdefault(KEPT, {})
        return found

    def fill(self) -> None:
        """Makes what calls keep, so that a compiler that comes before the first call finds it."""

    def _apply(self: Any, fn: Any, *args: Any, **kwargs: Any) -> Any:
        # After a move to another device or dtype the buffers may be other tensors.
        super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        _refill(self)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Pickled as "the mixin over that class": the made class has a name that is another's.
        reduced: Any = super().__reduce_ex__(2)
        _, _, state, *rest = reduced
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != KEPT}
        return (_rebuild, (self.mixin, self.original), state, *rest)


def _refill(module: Swapped, _: object = None) -> None:
    """Makes anew what a module keeps; also a hook behind load_state_dict, since another checkpoint's masks may differ.

    A call would see that itself, a graph that was compiled before would not.
    """
    module.kept().clear()
    module.fill()


_MADE: dict[Any, type[nn.Module]] = {}


def swapped_class(mixin: Any, original: Any) -> type[nn.Module]:
    """``mixin`` in front of ``original``, under the name of ``original``; one class for each two."""
    found = _MADE.get((mixin, original))
    if found is not None:
        return found
    members = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "original": original,
        "mixin": mixin,
    }
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(original.__name__, (mixin, original), members)
    return _MADE.setdefault((mixin, original), made)


def _rebuild(mixin: type[Swapped], original: type[nn.Module]) -> Any:
    cls = swapped_class(mixin, original)
    return cls.__new__(cls)


def swap(module: nn.Module, mixin: type[Swapped]) -> None:
    """Gives a module the class that has our methods in front of its own."""
    module.__class__ = swapped_class(mixin, type(module))
    module.register_load_state_dict_post_hook(_refill)
    _refill(module)  # type: ignore[arg-type]


def unswap(module: nn.Module) -> None:
    """Puts back the class that a swapped module had, and drops what it kept."""
    module.__dict__.pop(KEPT, None)
    hooks = module._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _refill]:
        del hooks[key]
    module.__class__ = type(module).__dict__["original"]


def reason_to_leave(module: nn.Module, mixin: type[Swapped]) -> str:
    """Why ``module`` cannot take ``mixin``; empty where it can."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        return "its tensors are parametrized"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "it is pickled in a way of its own"
    changed = [name for name in mixin.stands_for if getattr(cls, name, None) is not getattr(mixin.peer, name)]
    changed += [name for name in mixin.stands_for if name in module.__dict__]
    if changed:
        return f"{', '.join(changed)} is not {mixin.peer.__name__}'s own"
    return mixin.refuses(module)


def covered(*tensors: Tensor | None) -> bool:
    """Whether the kernels take a call: one dtype, float32 or float64, one device, no autocast, and tensors that hold
    numbers.

    Those of an export, of a FakeTensorMode, of the meta device and of torch.func's transforms go the library's own way,
    and so does what torch.jit.trace or make_fx records, which then needs no genfast to run.
    """
    given = [t for t in tensors if t is not None]
    dtype, device = given[0].dtype, given[0].device
    if dtype not in (torch.float32, torch.float64) or device.type not in ("cpu", "cuda"):
        return False
    if torch.is_autocast_enabled(device.type):
        return False
    if not torch.compiler.is_compiling() and (recorded() or not readable(*given)):
        return False
    return all(t.dtype == dtype and t.device == device for t in given)


def plain_call(module: nn.Module) -> bool:
    """Whether calling ``module`` is its class's forward and nothing else: no hooks, no forward of its own."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def of_library(module: nn.Module) -> bool:
    """Whether a module has a class of a library that is served, or a subclass that changes nothing that a call could
    use."""
    cls = type(module).__dict__.get("original", class_of(module))
    base = next(
        (c for c in cls.__mro__ if c.__module__.partition(".")[0] in ("nflows", "normflows", "zuko", "torch")), None
    )
    return base is not None and changes_nothing(cls, base)


def by_path(model: nn.Module) -> Iterator[tuple[nn.Module, list[str]]]:
    """Every module once, with all the paths that lead to it."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    yield from paths.items()
