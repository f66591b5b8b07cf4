"""What is made from the numbers of tensors and kept between calls: staircases of masks, places, orders, indices.

There is one rule for all of it. It is made in PyTorch's ordinary mode, whatever mode the first call comes in (inference
mode, a FakeTensorMode, export, tracing, a transform of torch.func), so that any later call can use it; it is used only
while the numbers that it was made from are the same; and where they cannot be read (fake, meta and batched tensors, and
a compiler's) there is none, and the caller goes a way that needs none.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ._calls import all_modules
from ._torch_private import dispatch_modes, function_modes, is_transformed, tracing_state, transform, without_modes

_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling


def recorded() -> bool:
    """Whether torch.jit.trace, or a mode of the dispatcher (make_fx, FakeTensorMode), writes down what is called.

    What is taken from memory there, a packed weight for one, would be a constant of what it writes.
    """
    return tracing_state() is not None or bool(dispatch_modes())


def readable_now(*tensors: Tensor | None) -> bool:
    """Whether this call may look at the numbers of these tensors, to check them: no compiler or tracer goes through
    it."""
    return not _is_compiling() and not recorded() and readable(*tensors)


# torch.equal reads a bool at a time: 50 times slower than the C library on a mask.
memcmp = ctypes.PyDLL(None).memcmp
memcmp.argtypes, memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int

T = TypeVar("T")


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """In this block PyTorch makes ordinary tensors and reads their numbers, in whatever mode the caller is."""
    if not (
        recorded()
        or function_modes()
        or transform() is not None
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    ):  # as most calls are: the rest would cost them some tens of microseconds
        with torch.no_grad():
            yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.is_autocast_enabled("cuda"):
            stack.enter_context(torch.autocast("cuda", enabled=False))
        yield


def readable(*tensors: Tensor | None) -> bool:
    """Whether the numbers of these tensors can be read: none is fake, meta, batched, functional or of another
    subclass."""
    inside = transform() is not None
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.is_meta or (inside and is_transformed(t)):
            return False
    return True


def readable_module(module: nn.Module) -> bool:
    """Whether :func:`readable` holds of a module's parameters and buffers; ``module.parameters()`` would cost far
    more."""
    return all(readable(*m._parameters.values(), *m._buffers.values()) for m in all_modules([module]))


def _version(tensor: Tensor) -> int:
    """Counts the changes in place; -1 for inference tensors, which count none."""
    return -1 if tensor.is_inference() else tensor._version


def same_numbers(tensor: Tensor, copy: Tensor) -> bool:
    """Whether two tensors of the CPU agree bit by bit, in dtype and in shape; ``copy`` is a clone, so dense."""
    if tensor.dtype != copy.dtype or tensor.shape != copy.shape:
        return False
    if tensor.stride() == copy.stride() and not tensor.is_neg() and not tensor.is_conj():
        return not memcmp(tensor.data_ptr(), copy.data_ptr(), tensor.nbytes)
    return torch.equal(tensor, copy)


def _same(tensor: Tensor, source: Tensor, version: int, copy: Tensor) -> bool:
    if tensor.device != copy.device:
        return False
    if tensor.is_cpu:
        return same_numbers(tensor, copy)
    if tensor is source and version == _version(tensor) != -1:
        return True  # to compare numbers would wait for the device
    return tensor.dtype == copy.dtype and torch.equal(tensor, copy)


class _Entry(NamedTuple, Generic[T]):
    """One value, and what it was made from."""

    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    copies: tuple[Tensor, ...]
    bytes: tuple[
        tuple[int, int, int], ...
    ]  # of each source its address, that of its copy and their size; zeros elsewhere
    value: T


def derived(store: dict[Any, Any], key: Any, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T | None:
    """What ``make`` makes of the numbers of ``sources``, once for each content of them; None where they cannot be read.

    Args:
        store: where it is kept, a dictionary of the module that it belongs to.
        key: of this value among those in ``store``.
        sources: the tensors that the value depends on. On the CPU their numbers are compared with copies at each call,
            so that a change through ``.data`` is seen; elsewhere PyTorch's count of changes is trusted for the same
            tensor.
        make: called in ordinary mode, without arguments.

    Under a compiler nothing is made: there is a value where one was made before for these very tensors.
    """
    entry: _Entry[T] | None = store.get(key)
    if _is_compiling():
        if entry is None:
            return None
        for source, own in zip(sources, entry.sources):
            if source is not own:
                return None
        return entry.value
    if entry is not None and transform() is None:
        # The usual call in two microseconds: the same tensors, compared byte by byte with the copies.
        for source, own, (address, copy, size) in zip(sources, entry.sources, entry.bytes):
            if source is not own or not size or source.data_ptr() != address or memcmp(address, copy, size):
                break
        else:
            return entry.value
    if not readable(*sources):
        return None
    with ordinary():
        if entry is not None and all(map(_same, sources, entry.sources, entry.versions, entry.copies)):
            return entry.value
        value = make()
        copies = tuple(t.detach().clone() for t in sources)
        if not _is_ordinary(value):
            return None
        versions = tuple(map(_version, sources))
        spans = tuple(
            (0, 0, 0) if not t.is_cpu or t.stride() != c.stride() else (t.data_ptr(), c.data_ptr(), t.nbytes)
            for t, c in zip(sources, copies)
        )
        store[key] = _Entry(sources, versions, copies, spans, value)
    return value


def _is_ordinary(value: Any) -> bool:
    """Whether any call may use it: of a module on the meta device, nothing is."""
    tensors = [t for t in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(t, Tensor)]
    return all(readable(t) and not t.is_inference() for t in tensors)
