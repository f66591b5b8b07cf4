"""How an operation is registered: a declaration, and its functions.

Every op, forward or backward, is one :class:`Op`: a schema, a plain PyTorch ``reference`` with the
same arguments, ``check`` (raises before any kernel runs), ``fake`` (shapes only), ``kernels`` by
backend, and its derivative. An op without a ``backward`` of its own is differentiated through its
reference, to any order, so nothing ever returns a missing or a wrong derivative.

``torch.library.Library`` rather than ``@custom_op``, whose call costs tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import (  # type: ignore[attr-defined]
    _any_requires_grad,
    _AutoDispatchBelowAutograd,
    _functorch,
    is_grad_enabled,
)

from . import _backend

_LIBRARY = torch.library.Library("genfast", "DEF")
_peek_functorch = _functorch.peek_interpreter_stack

OPS: dict[str, Op] = {}


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
        _LIBRARY.define(self.schema)
        self.overload = getattr(torch.ops.genfast, self.name).default
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(self.name, self._entry(key.lower()), key)
        _LIBRARY.impl(self.name, self._below(self.reference), "CompositeExplicitAutograd")
        torch.library.register_fake(f"genfast::{self.name}", self._below(self.fake), lib=_LIBRARY)
        backward, setup_context = self.backward, self.setup_context
        if backward is None:
            backward, setup_context = self._reference_backward, _save_everything
        torch.library.register_autograd(
            f"genfast::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY
        )
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if forward_ad._current_level >= 0:
            # A torch.library op has no tangent rule, and PyTorch would return zeros in silence.
            if self.check is not None:
                self.check(*args)
            return self.reference(*args)
        if (is_grad_enabled() and _any_requires_grad(*args)) or _peek_functorch() is not None:
            return self.overload(*args)
        with _AutoDispatchBelowAutograd():  # skips the Python autograd kernel: 4 us a call
            return self.overload(*args)

    def _below(self, function: Callable[..., Any]) -> Callable[..., Any]:
        check = self.check

        def checked(*args: Any) -> Any:
            if check is not None:
                check(*args)
            return function(*args)

        return checked

    def _entry(self, device_type: str) -> Callable[..., Any]:
        check = self.check or (lambda *args: None)
        preferred = [
            name
            for name in _backend.PREFERENCE[device_type]
            if name == "reference"
            or (name in self.kernels and not _backend.unusable(name, device_type))
        ]
        first = preferred[0]
        kernel = self.kernels.get(first, self.reference)
        dtypes = self.dtypes[first]

        def entry(*args: Any) -> Any:
            check(*args)
            if forward_ad._current_level >= 0:
                raise NotImplementedError(
                    f"genfast::{self.name} has no forward-mode rule; call it through genfast.ops, "
                    "which differentiates the reference in forward mode"
                )
            if _backend.forced is None:
                for tensor in args:  # the first tensor decides
                    if isinstance(tensor, Tensor):
                        if tensor.dtype in dtypes:
                            return kernel(*args)
                        break
            return self._select(device_type, args)(*args)

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
            return self.kernels.get(_backend.forced, self.reference)
        for name in _backend.PREFERENCE[device_type]:
            if not self.refusal(name, device_type, args):
                return self.kernels.get(name, self.reference)
        return self.reference

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


def _save_everything(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.arguments = [(True, None) if isinstance(a, Tensor) else (False, a) for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor)]


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
