"""How an operation is registered: a declaration, and its functions.

Every op, forward or backward, is one :class:`Op`: a schema, a plain PyTorch ``reference`` with the same arguments,
``check`` (raises before anything runs), ``fake`` (shapes only), ``kernels`` by backend (each checks its arguments itself,
so that it can do so from a cached plan), and its derivative. An op without a ``backward`` of its own is differentiated
through its reference, to any order, so nothing ever returns a missing or a wrong derivative. An op that takes lists of
tensors needs a ``backward`` of its own, and always dispatches.

``torch.library.Library`` rather than ``@custom_op``, whose call costs tens of microseconds. The dispatcher and
``register_autograd`` still cost 5 and 60 microseconds a call, so a plain eager call that nothing watches (no compiler,
no functorch transform, no dispatch or function mode, no tensor subclass, no profiler) goes straight to the kernel, under an
``autograd.Function`` made of the same two functions that ``register_autograd`` was given. Everything else dispatches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import (  # type: ignore[attr-defined]
    _functorch,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
    is_grad_enabled,
)
from torch._C._autograd import _profiler_enabled

from . import _backend

LIBRARY = torch.library.Library("genfast", "DEF")
_peek_functorch = _functorch.peek_interpreter_stack
_is_compiling = torch.compiler.is_compiling
_PLAIN = (Tensor, torch.nn.Parameter)

_AUTOGRAD = [torch._C.DispatchKey.ADInplaceOrView, torch._C.DispatchKey.AutogradFunctionality]

OPS: dict[str, Op] = {}


@contextlib.contextmanager
def autograd_works() -> Iterator[None]:
    """Inside an op: the dispatcher calls it with autograd shut off, so that torch.enable_grad() would do nothing."""
    get, put = torch._C._dispatch_tls_is_dispatch_key_excluded, torch._C._dispatch_tls_set_dispatch_key_excluded
    before = [get(k) for k in _AUTOGRAD]
    for k in _AUTOGRAD:
        put(k, False)
    try:
        yield
    finally:
        for k, b in zip(_AUTOGRAD, before):
            put(k, b)


@dataclass(frozen=True)
class Sample:
    """One call for ``genfast verify`` and the tests: a label and the op's arguments.

    Floating tensors among ``args`` are differentiated unless their position is in ``constant``.
    """

    label: str
    args: tuple[Any, ...]
    constant: tuple[int, ...] = ()


@dataclass
class Op:
    """A registered operation; call it with the schema's arguments, all positional."""

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    kernels: dict[str, Callable[..., Any]]
    check: Callable[..., None] | None = None
    setup_context: Callable[..., None] | None = None
    backward: Callable[..., Any] | None = None
    samples: Callable[[torch.Generator], Iterable[Sample]] | None = None
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=lambda: dict(_backend.DTYPES))

    def __post_init__(self) -> None:
        self.name = self.schema.split("(", 1)[0]
        if self.name in OPS:
            raise ValueError(f"declare: {self.name!r} is declared twice")
        LIBRARY.define(self.schema)
        self.overload = getattr(torch.ops.genfast, self.name).default
        arguments = self.overload._schema.arguments
        self.tensor_positions = tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
        # The first tensor that is always given decides which dtype is asked of a kernel.
        self.number_positions = tuple(i for i, a in enumerate(arguments) if "float" in str(a.type))
        self.decides = next(i for i in self.tensor_positions if "Optional" not in str(arguments[i].type))
        self.checked_reference = self._checked(self.reference)
        self.preferred = {device: self._preferred(device) for device in ("cpu", "cuda")}
        for device in self.preferred:
            LIBRARY.impl(self.name, self._entry(device), device.upper())
        LIBRARY.impl(self.name, self.checked_reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"genfast::{self.name}", self._checked(self.fake), lib=LIBRARY)
        backward, setup_context = self.backward, self.setup_context
        if backward is None:
            backward, setup_context = self._reference_backward, _save_everything
        torch.library.register_autograd(f"genfast::{self.name}", backward, setup_context=setup_context, lib=LIBRARY)
        self.function = _function(self, setup_context, backward)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        for i in self.number_positions:
            if type(args[i]) is not float:
                self._no_gradient(i, args[i])
        if _is_compiling():
            return self.overload(*args)
        if forward_ad._current_level >= 0 or _peek_functorch() is not None:
            # A torch.library op has no tangent rule, where PyTorch would return zeros in silence, and none for functorch.
            return self.checked_reference(*args)
        if _len_torch_dispatch_stack() or _len_torch_function_stack() or _get_tracing_state() or _profiler_enabled():
            return self.overload(*args)
        device = ""
        requires_grad = False
        for i in self.tensor_positions:
            a = args[i]
            if a is None:
                continue
            if type(a) not in _PLAIN or a.is_neg():
                if not isinstance(a, Tensor) and self.check is not None:
                    self.check(*args)  # names the argument, as the dispatcher's own error would not
                return self.overload(*args)
            here = "cpu" if a.is_cpu else "cuda" if a.is_cuda else "other"
            if device and here != device:
                return self.overload(*args)
            device = here
            requires_grad = requires_grad or a.requires_grad
        if device not in self.preferred:
            return self.overload(*args)
        if requires_grad and is_grad_enabled():
            return self.function.apply(*args)
        kernel, dtypes = self.preferred[device]
        if _backend.forced is None and args[self.decides].dtype in dtypes:
            return kernel(*args)  # as _run does, but a call's cost sooner
        return self._run(device, args)

    def _no_gradient(self, position: int, value: Any) -> None:
        """Raises where a number is a tensor, or a list holds one, that requires a gradient: it would be lost in silence."""
        for v in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(v, Tensor) and v.requires_grad:
                raise TypeError(
                    f"{self.name}: {self.overload._schema.arguments[position].name} is a tensor that requires a gradient, "
                    "expected a number: no gradient flows to it; detach it"
                )

    def direct(self, *args: Any) -> Any:
        """The op without its derivative, for callers that differentiate by hand and let nothing watch."""
        first = args[self.decides]
        if first.is_cpu or first.is_cuda:
            return self._run("cpu" if first.is_cpu else "cuda", args)
        return self.checked_reference(*args)

    def _run(self, device_type: str, args: tuple[Any, ...]) -> Any:
        if _backend.forced is None:
            kernel, dtypes = self.preferred[device_type]
            first = args[self.decides]
            if isinstance(first, (list, tuple)):
                first = first[0]
            if first is not None and first.dtype in dtypes:
                return kernel(*args)
        return self._select(device_type, args)(*args)

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        check = self.check

        def checked(*args: Any) -> Any:
            if check is not None:
                check(*args)
            return function(*args)

        return checked

    def _preferred(self, device_type: str) -> tuple[Callable[..., Any], tuple[torch.dtype, ...]]:
        for name in _backend.PREFERENCE[device_type]:
            if name in self.kernels and not _backend.unusable(name, device_type):
                return self.kernels[name], self.dtypes[name]
        return self.checked_reference, self.dtypes["reference"]

    def _entry(self, device_type: str) -> Callable[..., Any]:
        def entry(*args: Any) -> Any:
            if forward_ad._current_level >= 0:
                raise NotImplementedError(
                    f"genfast::{self.name} has no forward-mode rule; call it through genfast.ops, "
                    "which differentiates the reference in forward mode"
                )
            with autograd_works():
                return self._run(device_type, args)

        return entry

    def _select(self, device_type: str, args: tuple[Any, ...]) -> Callable[..., Any]:
        if _backend.forced is not None:
            reason = self.refusal(_backend.forced, device_type, args)
            if reason:
                shapes = [tuple(t.shape) for t in _tensors(args)]
                dtype = next((t.dtype for t in _tensors(args)), None)
                raise _backend.BackendError(
                    f"genfast::{self.name}: backend {_backend.forced!r} cannot serve {dtype} tensors "
                    f"of shapes {shapes} on {device_type}: {reason}"
                )
            return self.kernels.get(_backend.forced, self.checked_reference)
        for name in _backend.PREFERENCE[device_type]:
            if not self.refusal(name, device_type, args):
                return self.kernels.get(name, self.checked_reference)
        return self.checked_reference

    def refusal(self, backend: str, device_type: str, args: tuple[Any, ...] = ()) -> str:
        """Why ``backend`` cannot serve a call with ``args``; empty when it can."""
        if backend != "reference" and backend not in self.kernels:
            return "the op has no kernel for it"
        for tensor in _tensors(args):
            if tensor.dtype.is_floating_point and tensor.dtype not in self.dtypes[backend]:
                return f"its kernel takes {_names(self.dtypes[backend])}, not {_names([tensor.dtype])}"
        return _backend.unusable(backend, device_type)

    def _reference_backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if kept else value for kept, value in ctx.arguments]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        result: list[Any] = [None] * len(args)
        with torch.enable_grad():
            # Aliases: one saved tensor may be a function of another, and each gradient must hold the others fixed.
            args = [a.view_as(a) if isinstance(a, Tensor) else a for a in args]
            outputs = self.reference(*args)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            pairs = [(o, g) for o, g in zip(outputs, grads) if o.requires_grad and g is not None]
        if pairs:
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                [args[i] for i in wanted],
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            for i, g in zip(wanted, found):
                result[i] = g
        return tuple(result)


def _function(op: Op, setup_context: Callable[..., None] | None, backward: Callable[..., Any]) -> Any:
    """The derivative for calls that skip the dispatcher: what ``register_autograd`` makes, without its bookkeeping."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = op._run("cpu" if args[op.decides].is_cpu else "cuda", args)
        if setup_context is not None:
            setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{op.name}_function", (torch.autograd.Function,), members)


def _save_everything(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.arguments = [(True, None) if isinstance(a, Tensor) else (False, a) for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    """All of them, those in lists too."""
    return [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
