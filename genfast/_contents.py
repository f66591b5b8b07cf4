"""Whether tensors still hold what they held when something was made of them.

PyTorch counts changes in place, but not those that go through ``.data`` (moving averages of weights do), that fused
optimisers make, that another library writes into shared memory, or that the replay of a CUDA graph repeats. Contents
alone tell.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from operator import is_
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import _backend
from ._calls import all_modules, called_plainly
from ._compiler import uncompiled
from ._derived import memcmp, ordinary, readable

_PLAIN = (Tensor, Parameter)
_CPU: Any = _backend.extension("_cpu")[0]


class Contents:
    """Copies of tensors, which nothing else can reach, to compare them with later; one read of each for a comparison.

    Example:
        >>> import torch
        >>> from genfast._contents import Contents
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> contents = Contents([weight])
        >>> contents.same([weight])
        True
        >>> _ = weight.data.mul_(2)
        >>> contents.same([weight])
        False
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        with ordinary():
            self.copies = tuple(t.detach().clone() for t in tensors)
        # A clone of a tensor with holes has other strides, so that equal strides mean that there are none.
        self._plain = tuple(
            (c.dtype, c.shape, c.stride(), c.data_ptr(), c.nbytes)
            if type(c) is Tensor and c.is_cpu and c.layout is torch.strided and not t.is_neg() and not t.is_conj()
            else None
            for t, c in zip(tensors, self.copies)
        )

    def same(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` have the dtypes, devices, shapes and elements that were copied.

        For tensors on a GPU this waits; :meth:`unchanged` does not.
        """
        if len(tensors) != len(self.copies):
            return False
        for t, copy, plain in zip(tensors, self.copies, self._plain):
            if plain is not None and type(t) in _PLAIN and t.is_cpu:
                dtype, shape, stride, address, nbytes = plain
                if t.dtype is dtype and t.shape == shape and t.stride() == stride:
                    if memcmp(t.data_ptr(), address, nbytes):
                        return False
                    continue
            with torch.no_grad():
                if not (_alike(t, copy) and torch.equal(t, copy)):
                    return False
        return True

    def unchanged(self, tensors: Sequence[Tensor]) -> Tensor:
        """The answer of :meth:`same` as a tensor on the device of the first one, of which nothing has waited."""
        device = tensors[0].device
        if len(tensors) != len(self.copies) or not all(map(_alike, tensors, self.copies)):
            return torch.zeros((), dtype=torch.bool, device=device)
        flags: list[Tensor] = []
        with torch.no_grad():
            for dtype, on in {(t.dtype, t.device): None for t in tensors}:
                which = [i for i, t in enumerate(tensors) if (t.dtype, t.device) == (dtype, on)]
                both = [torch.cat([s[i].flatten() for i in which]) for s in (tensors, self.copies)]
                flags.append((both[0] == both[1]).all().to(device, non_blocking=True))
        return torch.stack(flags).all()


# Settings that cannot change without being replaced.
_IMMUTABLE = frozenset(
    {type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size, FunctionType, BuiltinFunctionType}
)
# ``_derived`` follows from buffers and is compared with them; the others are programs, which look at the modules anew.
_PREPARED = frozenset({"_derived", "_program", "_lowered", "_proven"})
_INTERNAL = frozenset(vars(nn.Module())) | _PREPARED


class ModuleContents:
    """What a module and those in it hold, parameters' numbers aside, to be compared in one walk at a later call.

    The walk covers types, settings, hooks, submodules, the identity of parameters, and the numbers of buffers.
    Parameters' numbers are left to whoever packs them. A module with a setting that may change in place is never the
    same again, but for the names in ``unchanged``, whose objects nobody changes so.
    """

    def __init__(self, module: nn.Module, unchanged: frozenset[str] = frozenset()) -> None:
        self.modules = all_modules([module])
        self.settings = [(type(m), *m.__dict__.values()) for m in self.modules]
        self.children = [tuple(m._modules.values()) for m in self.modules]
        self.parameters = [tuple(m._parameters.values()) for m in self.modules]
        buffers = [b for m in self.modules for b in m._buffers.values() if b is not None]
        self.comparable = called_plainly(module) and all(
            name in _INTERNAL or name in unchanged or _immutable(value)
            for m in self.modules
            for name, value in m.__dict__.items()
        )
        self.comparable &= readable(*buffers, *(p for parameters in self.parameters for p in parameters))
        self.contents = Contents(buffers if self.comparable else [])
        self._records = self._of_the_extension(buffers) if self.comparable else None

    def _of_the_extension(self, buffers: list[Tensor]) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
        """What csrc/contents.cpp compares, where the extension is there and the buffers lie in memory as they are."""
        if _CPU is None or any(
            type(b) is not Tensor or not b.is_cpu or not b.is_contiguous() or b.is_neg() or b.is_inference()
            for b in buffers
        ):
            return None
        modules = tuple(
            (m, settings[0], settings[1:], children, parameters, tuple(m._buffers.values()))
            for m, settings, children, parameters in zip(self.modules, self.settings, self.children, self.parameters)
        )
        copies = self.contents.copies
        return modules, tuple(
            (b, b._version, b.data_ptr(), b.nbytes, c.data_ptr()) for b, c in zip(buffers, copies) if b.nbytes
        )

    def same(self, module: nn.Module) -> bool:
        """Whether ``module`` is the one that was looked at, and all of it is as it was."""
        calls = nn.modules.module
        if (
            module is not self.modules[0]
            or not self.comparable
            or calls._global_forward_hooks
            or calls._global_forward_pre_hooks
        ):
            return False
        if self._records is not None and _CPU.same_modules(*self._records):
            return True
        buffers: list[Tensor] = []
        for m, settings, children, parameters in zip(self.modules, self.settings, self.children, self.parameters):
            held = m.__dict__
            if held["_forward_hooks"] or held["_forward_pre_hooks"]:
                return False
            values = (type(m), *held.values())
            if len(values) != len(settings) or not all(map(is_, values, settings)):
                return False
            if not _identical(held["_modules"], children) or not _identical(held["_parameters"], parameters):
                return False
            buffers += [b for b in held["_buffers"].values() if b is not None]
        return self.contents.same(buffers)


def _immutable(value: Any) -> bool:
    if type(value) in _IMMUTABLE or isinstance(value, type):
        return True
    parameters = getattr(type(value), "__dataclass_params__", None)
    if parameters is not None and parameters.frozen:
        return all(map(_immutable, vars(value).values()))
    return isinstance(value, tuple) and all(map(_immutable, value))


def _identical(held: dict[str, Any], values: tuple[Any, ...]) -> bool:
    return len(held) == len(values) and all(map(is_, held.values(), values))


def _alike(t: Tensor, copy: Tensor) -> bool:
    return t.dtype == copy.dtype and t.device == copy.device and t.shape == copy.shape


_steps = 0


@uncompiled("it counts in Python")
def _count(*_: object) -> None:
    global _steps
    _steps += 1


@functools.cache
def _watch() -> None:
    register_optimizer_step_post_hook(_count)


def marks(tensors: Iterable[Tensor]) -> tuple[object, ...]:
    """What changes with most changes of tensors on a GPU, found without waiting for it: PyTorch's counts, the storages,
    and the steps of all optimisers of this process, since fused ones are not counted."""
    _watch()
    return (_steps, *((0 if t.is_inference() else t._version, t.data_ptr()) for t in tensors))
