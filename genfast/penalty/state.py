"""What a critic is made of, and how all that a pass over it has changed is taken back.

A critic may be a module, or a function that calls one: a lambda, a partial, a bound method, an object with
``__call__``. What is to be remembered of it belongs to the modules in it and to its code, since the function itself is
often a new one at each call; and what a pass changes is in those modules, in Python attributes beside them, and in the
generators of random numbers.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import random
import sys
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import all_modules

INTERNAL = frozenset(vars(nn.Module()))  # attributes that every module has, other than its settings
SMALL = (
    1 << 16
)  # elements of a tensor without gradients that a forward pass may be expected to update, as power iterations do
CONTAINERS = (list, dict, set, collections.deque, collections.OrderedDict)
LIBRARIES = ("torch", "numpy", "genfast")  # whose functions hold no module of a user's


def unwrapped(critic: Any) -> Any:
    """A compiled module's original: a tape cannot look into the compiled one."""
    return getattr(critic, "_orig_mod", critic)


@dataclass
class Parts:
    """What a callable is made of: modules, other objects with attributes, generators, the code that it runs first, and
    calls into what cannot be looked into."""

    modules: list[nn.Module] = field(default_factory=list)
    objects: list[Any] = field(default_factory=list)
    generators: list[Any] = field(default_factory=list)
    codes: list[types.CodeType] = field(default_factory=list)
    opaque: list[Any] = field(default_factory=list)


def parts(critic: Any) -> Parts:
    """The modules that ``critic`` is, or calls as far as its code shows: through closures, defaults, globals and
    attributes."""
    critic = unwrapped(critic)
    if isinstance(critic, nn.Module):
        return Parts([critic])
    return _Search(critic).parts


class _Search:
    """Walks from a callable to what it refers to. Of plain objects only those attributes are followed that the code
    names."""

    def __init__(self, critic: Any) -> None:
        self.parts = Parts()
        self.names: set[str] = set()
        self.plain: list[tuple[Any, int]] = []
        self.seen: dict[int, Any] = {}  # an id says something only while its object lives
        self._visit(critic, 4)
        count = -1
        while count != len(self.names) + len(
            self.plain
        ):  # code that was reached last may name more of what was reached first
            count = len(self.names) + len(self.plain)
            for thing, depth in list(self.plain):
                self._attributes(thing, depth)

    def _visit(self, thing: Any, depth: int) -> None:
        if (
            thing is None
            or isinstance(thing, (int, float, str, bytes, Tensor, type))
            or id(thing) in self.seen
            or depth < 0
        ):
            return
        self.seen[id(thing)] = thing
        if isinstance(thing, nn.Module):
            self.parts.modules.append(unwrapped(thing))
        elif _copied_generator(thing) is not None:
            self.parts.generators.append(thing)
        elif isinstance(thing, functools.partial):
            for value in (thing.func, *thing.args, *thing.keywords.values()):
                self._visit(value, depth - 1)
        elif isinstance(thing, types.MethodType):
            self._visit(thing.__self__, depth)
            self._visit(thing.__func__, depth)
        elif isinstance(thing, types.FunctionType):
            self._function(thing, depth)
        elif isinstance(thing, (list, tuple, set, frozenset)):
            for value in list(thing)[:64]:
                self._visit(value, depth - 1)
        elif isinstance(thing, dict):
            for value in list(thing.values())[:64]:
                self._visit(value, depth - 1)
        elif isinstance(thing, types.ModuleType):
            if thing.__name__.split(".")[0] not in LIBRARIES:
                self.plain.append((thing, depth))
        elif isinstance(thing, types.BuiltinFunctionType):
            self.parts.opaque.append(thing)
        elif not isinstance(thing, types.CodeType):
            if callable(thing):
                self.parts.opaque.append(thing)
            if not isinstance(getattr(thing, "__dict__", {}), types.MappingProxyType):
                self.parts.objects.append(thing)
            self.plain.append((thing, depth))
            call = _of_class(type(thing), "__call__")
            if isinstance(call, types.FunctionType):
                self._visit(call, depth)

    def _function(self, f: types.FunctionType, depth: int) -> None:
        if (f.__module__ or "").split(".")[0] in LIBRARIES:
            return
        codes = [f.__code__]
        self.parts.codes.append(f.__code__)
        names: set[str] = set()
        while codes:
            code = codes.pop()
            names.update(code.co_names)
            codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
        self.names |= names
        for cell in f.__closure__ or ():
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                self._visit(cell.cell_contents, depth - 1)
        for value in (*(f.__defaults__ or ()), *(f.__kwdefaults__ or {}).values()):
            self._visit(value, depth - 1)
        for name in names:
            if name in f.__globals__:
                self._visit(f.__globals__[name], depth - 1)

    def _attributes(self, thing: Any, depth: int) -> None:
        held = getattr(thing, "__dict__", {})
        for name in tuple(self.names):
            if name in held:
                self._visit(held[name], depth - 1)
            elif not isinstance(thing, types.ModuleType):
                value = _of_class(type(thing), name)
                if isinstance(value, types.FunctionType):
                    self._visit(value, depth - 1)
                elif isinstance(value, property) and isinstance(value.fget, types.FunctionType):
                    self._visit(value.fget, depth - 1)
                elif isinstance(value, types.MemberDescriptorType):  # a slot
                    with contextlib.suppress(AttributeError):
                        self._visit(getattr(thing, name), depth - 1)


def _of_class(kind: type, name: str) -> Any:
    for c in kind.__mro__:
        if name in c.__dict__:
            return c.__dict__[name]
    return None


def modules(critic: Any) -> list[nn.Module]:
    """The modules of :func:`parts`."""
    return parts(critic).modules


# ---- random numbers ----


def _copied_generator(thing: Any) -> functools.partial[Any] | None:
    """What puts a generator back to where it is now; None for what is no generator."""
    if isinstance(thing, torch.Generator):
        return functools.partial(thing.set_state, thing.get_state())
    if isinstance(thing, random.Random):
        return functools.partial(thing.setstate, thing.getstate())
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(thing, numpy.random.RandomState):
        return functools.partial(thing.set_state, thing.get_state(legacy=False))
    if numpy is not None and isinstance(thing, numpy.random.Generator):
        return functools.partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
    return None


def _foreign_states() -> tuple[Any, Any]:
    """Of Python's and NumPy's global generators."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()


def _same_foreign(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    if a[0] != b[0] or (a[1] is None) != (b[1] is None):
        return False
    return a[1] is None or (a[1][2:] == b[1][2:] and bool((a[1][1] == b[1][1]).all()))


def _now(put_back: Any) -> tuple[Any, ...]:
    """The arguments that what puts a generator back would have if it were made now."""
    if put_back.func is setattr:
        thing, name, _ = put_back.args
        return thing, name, getattr(thing, name)
    again: Any = _copied_generator(put_back.func.__self__)
    args: tuple[Any, ...] = again.args
    return args


def _equal(a: Any, b: Any) -> bool:
    """Whether two values of attributes are the same, as far as can be said."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(torch.equal(a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple, collections.deque)):
        return len(a) == len(b) and all(map(_equal, a, b))
    try:
        return bool(a == b) if not hasattr(a, "__array__") else a.shape == b.shape and bool((a == b).all())
    except Exception:
        return False


# ---- undoing ----


class State:
    """What a forward pass may change, as it is now: buffers, parameters without gradients, attributes, generators.

    foreign: whether Python's and NumPy's generators too, whose states are large.
    """

    def __init__(self, critic: Any, foreign: bool = True) -> None:
        found = parts(critic)
        self.tensors: list[tuple[Tensor, Tensor]] = []
        self.bindings: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.containers: list[tuple[Any, Any]] = []
        self.generators: list[Any] = [g for g in map(_copied_generator, found.generators) if g is not None]
        for m in all_modules(found.modules):
            for b in m._buffers.values():
                if b is not None:
                    self._keep(b)
            for p in m._parameters.values():
                if p is not None and not p.requires_grad and p.numel() <= SMALL:
                    self._keep(p)
            if m._buffers:
                self.bindings.append((m._buffers, m._buffers.copy()))
            if m._parameters:
                self.bindings.append((m._parameters, m._parameters.copy()))
            self._attributes(m.__dict__)
        for thing in found.objects:
            held = getattr(thing, "__dict__", None)
            if isinstance(held, dict):
                self._attributes(held)
        self.random = torch.default_generator.get_state()
        self.devices: list[tuple[int, Tensor]] = []
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            here = {torch.cuda.current_device()}
            here |= {
                p.device.index
                for m in found.modules
                for p in (next(m.parameters(), None),)
                if p is not None and p.is_cuda
            }
            self.devices = [(i, torch.cuda.get_rng_state(i)) for i in here if i is not None]
        self.foreign = _foreign_states() if foreign else None

    def _keep(self, tensor: Tensor) -> None:
        if not nn.parameter.is_lazy(tensor):  # type: ignore[no-untyped-call]
            self.tensors.append((tensor, tensor.detach().clone()))

    def _attributes(self, held: dict[str, Any]) -> None:
        self.bindings.append((held, held.copy()))
        for name in held.keys() - INTERNAL:
            value = held[name]
            kind = type(value)
            if kind in PLAIN:
                continue
            if isinstance(value, Tensor):
                if not value.requires_grad and value.numel() <= SMALL:
                    self._keep(value)
            elif kind in CONTAINERS and len(value) <= 256:  # a longer one is a log or data, not a layer's
                self.containers.append((value, value.copy()))
                for inner in value.values() if isinstance(value, dict) else value:
                    if isinstance(inner, Tensor) and not inner.requires_grad and inner.numel() <= SMALL:
                        self._keep(inner)
            else:
                generator = _copied_generator(value)
                if generator is not None:
                    self.generators.append(generator)

    def moved(self) -> bool:
        """Whether what it holds has changed since: not tensors with a graph, which a critic may keep of any pass."""
        for held, before in self.bindings:
            for name in {**before, **held}:
                value, old = held.get(name), before.get(name)
                if (
                    value is not old
                    and not (isinstance(value, Tensor) and value.requires_grad)
                    and not _equal(value, old)
                ):
                    return True
        if any(not _equal(value, before) for value, before in self.containers):
            return True
        if any(tensor.shape != before.shape or not torch.equal(tensor, before) for tensor, before in self.tensors):
            return True
        if not torch.equal(torch.default_generator.get_state(), self.random):
            return True
        if any(not torch.equal(torch.cuda.get_rng_state(i), state) for i, state in self.devices):
            return True
        if any(not _equal(put_back.args, _now(put_back)) for put_back in self.generators):
            return True
        return self.foreign is not None and not _same_foreign(self.foreign, _foreign_states())

    def __call__(self) -> None:
        """Puts everything back."""
        for held, before in self.bindings:
            for name in [n for n in held if n not in before]:
                del held[name]
            for name, value in before.items():
                if held.get(name) is not value:
                    held[name] = value
        for value, before in self.containers:
            if isinstance(value, (list, collections.deque)):
                value.clear()
                value.extend(before)
            else:
                value.clear()
                value.update(before)
        with torch.no_grad():
            for tensor, content in self.tensors:
                if tensor.is_inference():
                    with torch.inference_mode():
                        tensor.copy_(content)
                elif tensor.shape != content.shape:
                    tensor.data = content.clone()
                # ``data`` has a version counter of its own: what a graph has saved is valid again with its contents
                else:
                    tensor.data.copy_(content)
        torch.default_generator.set_state(self.random)
        for i, state in self.devices:
            torch.cuda.set_rng_state(state, i)
        for put_back in self.generators:
            put_back()
        if self.foreign is not None:
            random.setstate(self.foreign[0])
            if self.foreign[1] is not None:
                sys.modules["numpy"].random.set_state(self.foreign[1])


PLAIN = frozenset({int, float, bool, str, type(None), tuple, torch.Size, torch.dtype, torch.device, types.FunctionType})


# ---- what is remembered ----


@dataclass
class Facts:
    """What earlier passes over a critic have shown, in one of its modes (training or not)."""

    curved: bool | None = (
        None  # whether a layer has curvature; None before the first pass, which then keeps what that needs
    )
    separable: bool | None = None  # whether every rule keeps the samples of a batch separate
    channels_last: bool = True  # whether no layer wants another memory format
    coupling: str = ""  # the layer that couples samples
    unsupported: str | None = None
    differentiated_twice: bool = False  # PyTorch's double backward has been seen to work
    warned: bool = False
    foreign: bool = True  # whether a pass may draw from Python's or NumPy's generators
    proven: set[Any] = field(default_factory=set)  # calls whose derivatives have been compared with double backward
    finite_differences: bool = False  # PyTorch's double backward has been seen to be missing
    joined: set[Any] = field(default_factory=set)  # structures whose joined outputs have equalled the separate ones
    separate: str = ""  # why batches may not be joined
    moves: bool = False  # whether a pass draws random numbers or changes the critic's state
    warned_separate: bool = False


_FACTS: weakref.WeakKeyDictionary[Any, dict[Any, Facts]] = weakref.WeakKeyDictionary()


def facts(critic: Any) -> Facts:
    """The facts known of this critic; to be updated in place.

    They belong to the modules in it and to its code, so that a new lambda around the same module finds them again.
    """
    original = unwrapped(critic)
    anchor: Any = original
    key: Any = bool(getattr(critic, "training", False))
    if isinstance(original, nn.Module):
        held = [original]
    else:
        found = parts(critic)
        held = found.modules
        things: list[Any] = [*held, *found.codes]
        if not things:
            return Facts(channels_last=False)
        anchor = things[0]
        opaque = () if held else tuple(map(_reference, found.opaque))  # all that tells such functions apart
        key = (tuple(m.training for m in held), tuple(map(weakref.ref, held)), tuple(found.codes), opaque)
    per_mode = _FACTS.setdefault(anchor, {})
    if key not in per_mode:
        wanting = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)  # whose kernels copy channels_last
        per_mode[key] = Facts(channels_last=not any(isinstance(m, wanting) for root in held for m in root.modules()))
    return per_mode[key]


def _reference(thing: Any) -> Any:
    try:
        return weakref.ref(thing)
    except TypeError:
        return id(thing)


@contextlib.contextmanager
def restored(critic: Any) -> Iterator[State]:
    """What takes back, when it is called, all that passes have done to a critic's state and to random numbers."""
    known = facts(critic)
    state = State(critic, known.foreign)
    yield state
    if state.foreign is not None:
        known.foreign = not _same_foreign(state.foreign, _foreign_states())
