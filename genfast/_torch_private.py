"""All that genfast uses of torch without a public name: what each symbol is for, and what runs where torch lacks it.

A missing symbol costs speed and never a wrong number. What asks whether something watches a call then answers that it
does, and the registry goes through the dispatcher or the plain reference, which need none of these. ``MISSING`` lists
what was not there.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
)  # how one watches all calls; named by PyTorch's own tutorials
from torch.utils._pytree import tree_map  # torch.func's maps over nested arguments; has no public name

__all__ = ["TorchDispatchMode", "tree_map"]

MISSING: list[str] = []


def _find(path: str, fallback: Any) -> Any:
    """The attribute of torch at ``path``, or ``fallback``."""
    owner: Any = torch
    for name in path.split("."):
        owner = getattr(owner, name, None)
        if owner is None:
            MISSING.append(path)
            return fallback
    return owner


# ---- who watches a call: read at every call of an op, so each is torch's own function and not one around it ----

# How many modes of the dispatcher (FakeTensorMode, make_fx, a user's own) are on. Without it: one, so that ops
# dispatch.
dispatch_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack", lambda: 1)

# How many modes of torch functions (a DeviceContext, a user's own) are on. Without it: one, so that ops dispatch.
function_modes: Callable[[], int] = _find("_C._len_torch_function_stack", lambda: 1)

# The trace that torch.jit.trace writes, or None. Without it: asks publicly whether there is one.
tracing_state: Callable[[], Any] = _find("_C._get_tracing_state", lambda: torch.jit.is_tracing() or None)  # type: ignore[attr-defined]

# Whether a profiler records; it sees ops that dispatch alone. Without it: yes.
profiler_enabled: Callable[[], bool] = _find("_C._autograd._profiler_enabled", lambda: True)

# The transform of torch.func (vmap, grad, jvp) inside which a call is, or None. Without it: some transform, so that ops
# run their reference, which every transform knows.
transform: Callable[[], Any] = _find("_C._functorch.peek_interpreter_stack", lambda: "unknown")

# Its ``_current_level`` is -1 outside of forward-mode differentiation. Without it: 0, so that ops run their reference.
# The module, since the number is replaced and not changed.
forward_ad: Any = torch.autograd.forward_ad
if not hasattr(forward_ad, "_current_level"):
    MISSING.append("autograd.forward_ad._current_level")
    forward_ad = SimpleNamespace(_current_level=0)

# ---- what a tensor is ----

# Whether a tensor is one inside a transform of torch.func, without numbers of its own. Without it: every tensor may be.
is_transformed: Callable[[Tensor], bool] = _find("_C._functorch.is_functorch_wrapped_tensor", lambda t: True)

# Whether a tensor stands for zeros and has no memory, as some gradients do. Without it: whether it lacks memory.
is_zero_tensor: Callable[[Tensor], bool] = _find(
    "Tensor._is_zerotensor", lambda t: bool(t.numel()) and t.device.type != "meta" and not t.data_ptr()
)

_counts = itertools.count(1 << 30)
_use_count: Callable[[int], int] = _find("_C._storage_Use_Count", lambda address: next(_counts))


def storage_uses(storage: torch.UntypedStorage) -> int:
    """How many tensors and storage objects refer to a storage's memory. Without it: many, and never the same number
    twice, so that no memory is taken for unused."""
    return _use_count(storage._cdata)


# ---- many tensors as one ----

# Contiguous copies of tensors one behind the other in a vector, and views of such a vector in the tensors' shapes, as
# DistributedDataParallel makes them. Without them: the same by public functions, at a microsecond a tensor more.
flatten: Callable[[Any], Tensor] = _find(
    "_C._nn.flatten_dense_tensors", lambda tensors: torch.cat([t.reshape(-1) for t in tensors])
)
unflatten: Callable[[Tensor, Any], Any] = _find(
    "_C._nn.unflatten_dense_tensors",
    lambda flat, tensors: tuple(
        part.view(t.shape) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)
    ),
)

# ---- autograd ----

# Sets the mode of gradients without the object of torch.set_grad_enabled, which costs more than a small layer's
# bookkeeping.
set_grad_enabled: Callable[[bool], Any] = _find("_C._set_grad_enabled", torch.set_grad_enabled)

# The hooks that pack saved tensors (activation checkpoints, offloading), or None. Without it: some, so that all are
# honoured.
saved_tensor_hooks: Callable[[bool], Any] = _find(
    "_C._autograd._top_saved_tensors_default_hooks", lambda ignore_disabled: ()
)

# Inside a backward: whether its graph is kept (retain_graph=True). Without it: yes, and what it holds is not freed
# early.
graph_is_retained: Callable[[], bool] = _find("_C._autograd._get_current_graph_task_keep_graph", lambda: True)

_is_excluded = _find("_C._dispatch_tls_is_dispatch_key_excluded", None)
_set_excluded = _find("_C._dispatch_tls_set_dispatch_key_excluded", None)
_AUTOGRAD = [_find(f"_C.DispatchKey.{key}", None) for key in ("ADInplaceOrView", "AutogradFunctionality")]


@contextlib.contextmanager
def autograd_works() -> Iterator[None]:
    """Inside an op: the dispatcher calls it with autograd shut off, so that torch.enable_grad() would do nothing.

    Without the keys autograd stays off, and an op whose reference differentiates raises that a tensor requires no
    gradient.
    """
    if None in (_is_excluded, _set_excluded, *_AUTOGRAD):
        yield
        return
    before = [_is_excluded(k) for k in _AUTOGRAD]
    for k in _AUTOGRAD:
        _set_excluded(k, False)
    try:
        yield
    finally:
        for k, b in zip(_AUTOGRAD, before):
            _set_excluded(k, b)


# ---- modes, for what is made once and used in later calls ----

_get_dispatch_mode = _find("_C._get_dispatch_mode", None)
_fake_key = _find("_C._TorchDispatchModeKey.FAKE", None)
_set_tracing_state = _find("_C._set_tracing_state", None)
_python_dispatch = _find("utils._python_dispatch", None)


def fake_tensors() -> bool:
    """Whether a FakeTensorMode is on. Without its key: whether any mode of the dispatcher is."""
    if None in (_get_dispatch_mode, _fake_key):
        return bool(dispatch_modes())
    return _get_dispatch_mode(_fake_key) is not None


@contextlib.contextmanager
def without_modes() -> Iterator[None]:
    """In this block no trace, transform of torch.func, mode or subclass of PyTorch's sees what is called; a user's own
    modes, which count or show calls, do. What of this torch lacks stays on, and callers look at what they made before
    they keep it."""
    with contextlib.ExitStack() as stack:
        state = tracing_state()
        if state is not None and _set_tracing_state is not None:
            _set_tracing_state(None)
            stack.callback(_set_tracing_state, state)
        stack.enter_context(torch._C.DisableTorchFunction())
        if transform() is not None:
            with contextlib.suppress(ImportError):
                from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

                stack.enter_context(temporarily_clear_interpreter_stack())
        if hasattr(_python_dispatch, "_disable_current_modes"):
            modes = stack.enter_context(_python_dispatch._disable_current_modes())
            for mode in reversed(modes):
                if getattr(mode, "_mode_key", None) is None:
                    _python_dispatch._push_mode(mode)
                    stack.callback(_python_dispatch._pop_mode)
        yield
