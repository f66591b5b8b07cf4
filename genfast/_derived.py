"""What is made from the numbers of tensors and kept between calls: staircases of masks, places, orders, indices.

There is one rule for all of it. It is made in PyTorch's ordinary mode, whatever mode the first call comes in (inference mode,
a FakeTensorMode, export, tracing, a transform of torch.func), so that any later call can use it; it is used only while the
numbers that it was made from are the same; and where they cannot be read (fake, meta and batched tensors, and a compiler's)
there is none, and the caller goes a way that needs none.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import _C, Tensor, nn
from torch._C import (
    _functorch,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.utils._python_dispatch import _disable_current_modes, _pop_mode, _push_mode

from ._calls import all_modules

_PLAIN = (Tensor, torch.nn.Parameter)
_is_compiling = torch.compiler.is_compiling
_peek_functorch = _functorch.peek_interpreter_stack


def recorded() -> bool:
    """Whether torch.jit.trace, or a mode of the dispatcher (make_fx, FakeTensorMode), writes down what is called.

    What is taken from memory there, a packed weight for one, would be a constant of what it writes.
    """
    return _get_tracing_state() is not None or bool(_len_torch_dispatch_stack())


def readable_now(*tensors: Tensor | None) -> bool:
    """Whether this call may look at the numbers of these tensors, to check them: no compiler or tracer goes through it."""
    return not _is_compiling() and not recorded() and readable(*tensors)


# torch.equal reads a bool at a time: 50 times slower than the C library on a mask.
memcmp = ctypes.PyDLL(None).memcmp
memcmp.argtypes, memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int

T = TypeVar("T")


@contextlib.contextmanager
def ordinary() -> Iterator[None]:
    """In this block PyTorch makes ordinary tensors and reads their numbers, in whatever mode the caller is."""
    tracing = _get_tracing_state()
    if not (
        tracing is not None
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _peek_functorch() is not None
        or torch.is_inference_mode_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    ):  # as most calls are: the rest would cost them some tens of microseconds
        with torch.no_grad():
            yield
        return
    with contextlib.ExitStack() as stack:
        if tracing is not None:
            set_tracing: Callable[[object], None] = _C._set_tracing_state  # type: ignore[attr-defined]
            set_tracing(None)
            stack.callback(set_tracing, tracing)
        stack.enter_context(_C.DisableTorchFunction())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.is_autocast_enabled("cuda"):
            stack.enter_context(torch.autocast("cuda", enabled=False))
        if _peek_functorch() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        modes = stack.enter_context(_disable_current_modes())
        for mode in reversed(modes):
            if getattr(mode, "_mode_key", None) is None:  # a user's own, that counts or shows calls, is none of PyTorch's
                _push_mode(mode)
                stack.callback(_pop_mode)
        yield


def readable(*tensors: Tensor | None) -> bool:
    """Whether the numbers of these tensors can be read: none is fake, meta, batched, functional or of another subclass."""
    inside = _peek_functorch() is not None
    for t in tensors:
        if t is None:
            continue
        if type(t) not in _PLAIN or t.is_meta or (inside and _functorch.is_functorch_wrapped_tensor(t)):
            return False
    return True


def readable_module(module: nn.Module) -> bool:
    """Whether :func:`readable` holds of a module's parameters and buffers; ``module.parameters()`` would cost far more."""
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
    bytes: tuple[tuple[int, int, int], ...]  # of each source its address, that of its copy and their size; zeros elsewhere
    value: T


def derived(store: dict[Any, Any], key: Any, sources: tuple[Tensor, ...], make: Callable[[], T]) -> T | None:
    """What ``make`` makes of the numbers of ``sources``, once for each content of them; None where they cannot be read.

    Args:
        store: where it is kept, a dictionary of the module that it belongs to.
        key: of this value among those in ``store``.
        sources: the tensors that the value depends on. On the CPU their numbers are compared with copies at each call, so that
            a change through ``.data`` is seen; elsewhere PyTorch's count of changes is trusted for the same tensor.
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
    if entry is not None and _peek_functorch() is None:
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
