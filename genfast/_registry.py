"""How an operation is registered: a declaration, and its functions.

An op is one :class:`Op`: a schema, a plain PyTorch ``reference`` with the same arguments, ``check`` (raises before
anything runs), what its ``outputs`` look like, ``kernels`` by backend and its derivative. The derivative is a
:class:`Backward`, an op too, of which the schema, what is saved, the check and the outputs follow from one line and the
forward's declaration (:mod:`genfast._declaration`); a function is written only where an op differs. An op without a
``backward`` is differentiated through its reference, to any order, so nothing ever returns a missing or a wrong
derivative. An op that takes lists of tensors needs a ``backward`` of its own, and always dispatches.

``torch.library.Library`` rather than ``@custom_op``, whose call costs tens of microseconds. The dispatcher and
``register_autograd`` still cost 5 and 60 microseconds a call, so a plain eager call that nothing watches (no compiler,
no functorch transform, no dispatch or function mode, no tensor subclass, no profiler) goes straight to the kernel,
under an ``autograd.Function`` made of the same two functions that ``register_autograd`` was given. Everything else
dispatches.

No path to a kernel goes round :func:`_guard`: a kernel takes addresses, so every tensor argument must be dense, have
memory of its own, lie on the device of the others and have a dtype that the declaration names for it. What is not so
runs the plain way, or is refused by :meth:`Op.admit` with an error that names the argument.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from . import _backend
from ._declaration import Output, Schema, allocate, check_shape, function, gradients, output, save_for_backward
from ._torch_private import (
    autograd_works,
    dispatch_modes,
    forward_ad,
    function_modes,
    is_zero_tensor,
    profiler_enabled,
    tracing_state,
    transform,
)

LIBRARY = torch.library.Library("genfast", "DEF")
_is_compiling = torch.compiler.is_compiling
_PLAIN = (Tensor, torch.nn.Parameter)

OPS: dict[str, Op] = {}

_FLOATS = _backend.DTYPES["reference"]
# The letter of an argument's type, as csrc/guard.cpp reads it.
_KINDS = {
    "Tensor": "T",
    "Optional[Tensor]": "t",
    "List[Tensor]": "V",
    "int": "i",
    "SymInt": "i",
    "float": "f",
    "Optional[float]": "g",
    "bool": "b",
    "str": "s",
    "List[int]": "I",
    "List[SymInt]": "I",
    "List[float]": "F",
    "List[bool]": "B",
}
_EXPECTED = {"i": "an int", "f": "a number", "g": "a number or None", "b": "a bool", "s": "a str"}
_REFUSED, _ON_CPU, _ON_CUDA, _REQUIRES_GRAD, _OTHER_DTYPE, _EMPTY = 0, 1, 2, 4, 8, 16  # as in csrc/guard.cpp
_PLAIN_WAY = _OTHER_DTYPE | _EMPTY
_KEPT_CHECKS = 4096


@dataclass(frozen=True)
class Signature:
    """What the guard looks for: the arguments' kinds, and by device the dtypes that the preferred kernel takes of
    each."""

    kinds: str
    cpu: list[tuple[torch.dtype, ...]]
    cuda: list[tuple[torch.dtype, ...]]


def _scalar_is(kind: str, a: Any) -> bool:
    if kind == "i":
        return type(a) is int
    if kind in "fg":
        return type(a) in (float, int) or (kind == "g" and a is None)
    return type(a) is (bool if kind == "b" else str)


def _guard_in_python(signature: Signature, args: tuple[Any, ...]) -> int:
    """Whether a kernel may see ``args``: 0 where not, else the device, whether a gradient is asked for, whether a dtype
    is none of the kernel's and whether a tensor is empty. What csrc/guard.cpp does, for installations without the
    extension."""
    device = flags = 0
    for kind, cpu, cuda, a in zip(signature.kinds, signature.cpu, signature.cuda, args, strict=True):
        if kind not in "TtE":
            items = (a,) if kind.islower() else a if isinstance(a, (list, tuple)) else (Ellipsis,)
            if kind == "V" or not all(_scalar_is(kind.lower(), item) for item in items):
                return _REFUSED
            continue
        if a is None and kind == "t":
            continue
        if type(a) not in _PLAIN or a.is_nested or a.layout is not torch.strided or a.is_neg() or is_zero_tensor(a):
            return _REFUSED
        here = _ON_CPU if a.is_cpu else _ON_CUDA if a.is_cuda else _REFUSED
        if not here or device not in (0, here):
            return _REFUSED
        device = here
        flags |= (_REQUIRES_GRAD if a.requires_grad else 0) | (
            0 if a.dtype in (cpu if here == _ON_CPU else cuda) else _OTHER_DTYPE
        )
        if kind != "E" and not a.numel():
            flags |= _EMPTY
    return device | flags


_guard: Callable[[Any, tuple[Any, ...]], int] = _guard_in_python
_signature: Callable[[str, Any, Any], Any] = Signature
_CPU: Any = _backend.extension("_cpu")[0]
if _CPU is not None:
    _CPU.guard_types(Tensor, torch.nn.Parameter, torch.strided)
    _guard, _signature = _CPU.guard, _CPU.signature


def nothing_watches() -> bool:
    """Whether a call may skip the dispatcher: no compiler, transform, mode, trace or profiler is there to see it."""
    return not (
        _is_compiling()
        or forward_ad._current_level >= 0
        or transform() is not None
        or dispatch_modes()
        or function_modes()
        or tracing_state()
        or profiler_enabled()
    )


def check_number(op: str, name: str, value: Any) -> None:
    """Raises where ``value``, which is to be a number or a list of them, is or holds a tensor that requires a
    gradient."""
    for v in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(v, Tensor) and v.requires_grad:
            raise TypeError(
                f"{op}: {name} is a tensor that requires a gradient, expected a number: no gradient flows to it; "
                "detach it"
            )


@dataclass(frozen=True)
class Sample:
    """One call for ``genfast verify`` and the tests: a label and the op's arguments.

    Floating tensors among ``args`` are differentiated unless their position is in ``constant``.
    """

    label: str
    args: tuple[Any, ...]
    constant: tuple[int, ...] = ()


@dataclass
class Backward:
    """The op that computes the gradients of another, and how it is called.

    ``signature`` names its arguments and the forward's arguments whose gradients it returns, in order:
    ``"grad_y, x, bias, *options -> x, bias"``. An argument is

    - ``grad_OUTPUT``, the gradient of an output; ``grad`` that of the first. Outputs whose gradient is not named have
        none.
      Where there are several, each may be None;
    - an argument or an output of the forward, which is saved; ``*options`` are all arguments that are no tensors;
    - a name in ``saved``, for what is computed of those when the forward is done
        (``{"kept": "y if keep_output else x"}``);
    - ``wanted``, a flag for each gradient returned that says whether it is asked for, or ``need_x``, that of x alone.

    The gradient of x looks like x unless ``outputs`` says otherwise; one that is not asked for, or of an argument that
    is None, is an empty vector. ``check`` is the forward's, and that gradients and saved outputs have the outputs'
    shapes, unless it is given. Dtypes are the forward's. ``name`` is the forward's with ``_backward``.
    """

    signature: str
    reference: Callable[..., Any]
    kernels: dict[str, str | Callable[..., Any]]
    saved: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    check: Callable[..., None] | None = None
    fake: Callable[..., Any] | None = None
    saves: str | None = None
    backward: Callable[..., Any] | Backward | None = None
    argument_dtypes: dict[str, tuple[torch.dtype, ...] | None] = field(default_factory=dict)
    check_before_kernels: bool = True
    may_be_empty: tuple[str, ...] = ()
    name: str | None = None


@dataclass
class Op:
    """A registered operation; call it with the schema's arguments, all positional."""

    # "name(Tensor x, float eps)". What it returns follows from ``outputs``, without which it ends with "-> (Tensor,
    # Tensor)".
    schema: str
    reference: Callable[..., Any]
    # By backend: a function, or the file of genfast.kernels that holds one of the op's name. Each checks its arguments
    # itself, so that it can do so from a cached plan, unless ``check_before_kernels`` is set.
    kernels: dict[str, Any]
    check: Callable[..., None]
    # By name what each output looks like (see _declaration.py), or ``fake``, a function that says so.
    outputs: dict[str, str] | None = None
    fake: Callable[..., Any] | None = None
    # The derivative: an op, or a function of ctx and the outputs' gradients. Such a function finds the arguments and
    # outputs that ``saves`` names among ctx.saved_tensors and the other arguments in ctx.options, unless
    # ``setup_context`` is given.
    backward: Callable[..., Any] | Backward | None = None
    saves: str | None = None
    setup_context: Callable[..., None] | None = None
    samples: Callable[[torch.Generator], Iterable[Sample]] | None = None
    dtypes: dict[str, tuple[torch.dtype, ...]] = field(default_factory=lambda: dict(_backend.DTYPES))
    # Of the tensor arguments that are not floating point, by name: the dtypes that the reference and every kernel take.
    # None
    # for any: then a kernel takes those of ``dtypes``, and the reference all.
    argument_dtypes: dict[str, tuple[torch.dtype, ...] | None] = field(default_factory=dict)
    # The check looks at shapes, dtypes and options alone, and is made here before every kernel, once for each of them.
    check_before_kernels: bool = False
    # Tensor arguments of which an empty one says that something was not kept, where any other says that there is
    # nothing to
    # do: then the reference runs, since no kernel is made for sizes of zero.
    may_be_empty: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.name = self.schema.split("(", 1)[0]
        if self.name in OPS:
            raise ValueError(f"declare: {self.name!r} is declared twice")
        self._declare_outputs()
        LIBRARY.define(self.schema)
        self.overload = getattr(torch.ops.genfast, self.name).default
        arguments = self.overload._schema.arguments
        self.argument_names = tuple(a.name for a in arguments)
        # The dispatcher leaves out an argument that has its default.
        self.defaults = tuple(a.default_value for a in arguments if a.has_default_value())
        self.kinds = "".join("E" if a.name in self.may_be_empty else _KINDS[str(a.type)] for a in arguments)
        self.tensor_positions = tuple(i for i, kind in enumerate(self.kinds) if kind in "TtEV")
        self.number_positions = tuple(i for i, kind in enumerate(self.kinds) if kind in "fgF")
        unknown = {*self.argument_dtypes, *self.may_be_empty} - {self.argument_names[i] for i in self.tensor_positions}
        if unknown:
            raise ValueError(f"declare: {self.name!r} has no tensor argument {', '.join(sorted(unknown))}")
        # The first floating-point tensor that is always there and no gradient decides which dtype is asked of a kernel,
        # which converts the others to that one.
        given = [i for i in self.tensor_positions if self.kinds[i] != "t"]
        floats = [i for i in given if self.argument_names[i] not in self.argument_dtypes] or given
        self.decides = next((i for i in floats if not self.argument_names[i].startswith("grad")), floats[0])
        self._passed: set[Any] = set()
        for backend, kernel in self.kernels.items():
            if isinstance(kernel, str):
                check = None if self.check_before_kernels else self.check
                self.kernels[backend] = _backend.triton_kernel(kernel, self.name, check)
        if self.check_before_kernels:
            self.kernels = {name: self._checks_once(kernel) for name, kernel in self.kernels.items()}
        self.checked_reference = self._checked(self.reference)
        self.preferred = {device: self._preferred(device) for device in ("cpu", "cuda")}
        self.signature = _signature(self.kinds, *(self._taken(device) for device in ("cpu", "cuda")))
        for device in self.preferred:
            LIBRARY.impl(self.name, self._entry(device), device.upper())
        LIBRARY.impl(self.name, self.checked_reference, "CompositeExplicitAutograd")
        for key in (
            "NestedTensorCPU",
            "NestedTensorCUDA",
        ):  # which the one above leaves out: refused by name like the rest
            LIBRARY.impl(self.name, self.checked_reference, key)
        torch.library.register_fake(f"genfast::{self.name}", self._checked(self.empty), lib=LIBRARY)
        setup_context, backward = self._derivative()
        torch.library.register_autograd(f"genfast::{self.name}", backward, setup_context=setup_context, lib=LIBRARY)
        self.function = _function(self, setup_context, backward)
        OPS[self.name] = self

    def _declare_outputs(self) -> None:
        """The schema's return, the fake implementation and the outputs' shapes, of what ``outputs`` says."""
        self.arguments = Schema(self.schema)
        self.described: dict[str, Output] = {}
        if self.outputs is None:
            if self.fake is None:
                raise ValueError(f"declare: {self.name!r} has neither outputs nor fake, expected one of them")
            self.empty = self.fake
            return
        # Of optional arguments the gradients may be missing; the empty vector in their place has the dtype and the
        # device of
        # an argument that is always there: not of one that holds integers, nor, where another will do, of a gradient,
        # which may have the accumulator's dtype.
        required = [t for t in self.arguments.tensors if t not in self.arguments.optional]
        floating = [t for t in required if t not in self.argument_dtypes] or required
        present = next((t for t in floating if not t.startswith("grad")), floating[0])
        self.described = {
            name: output(name, text, present if name in self.arguments.optional else None)
            for name, text in self.outputs.items()
        }
        names, described = tuple(self.arguments.arguments), tuple(self.described.values())
        tensors = ", ".join("Tensor" for _ in described)
        self.schema = f"{self.schema} -> {tensors if len(described) == 1 else f'({tensors})'}"
        self.empty = self.fake or allocate(self.name, names, described)  # uninitialised outputs for a call's arguments
        self.output_shapes = function(
            f"{self.name}_shapes", names, [f"return ({''.join(f'{o.shape}, ' for o in described)})"]
        )

    def _derivative(self) -> tuple[Callable[..., None] | None, Callable[..., Any]]:
        """``setup_context`` and ``backward`` as torch.library takes them."""
        if self.backward is None:
            return _save_everything, self._reference_backward
        if isinstance(self.backward, Backward):
            return self._declare_backward(self.backward)
        if self.setup_context is None:
            saves = {name: name for name in _names_in(self.saves or "")}
            names = tuple(self.outputs or ())
            self.setup_context = save_for_backward(self.name, self.arguments, names, saves, self.arguments.options, ())
        return self.setup_context, self.backward

    def _declare_backward(self, declared: Backward) -> tuple[Callable[..., None], Callable[..., Any]]:
        """Registers the backward op and returns the two functions that call it."""
        schema, outputs = self.arguments, tuple(self.outputs or ())
        arguments, returned = (_names_in(side) for side in declared.signature.split("->"))
        arguments = tuple(a for name in arguments for a in (schema.options if name == "*options" else (name,)))
        grads = {
            i: grad
            for i, name in enumerate(outputs)
            for grad in arguments
            if grad == f"grad_{name}" or (grad == "grad" and i == 0 and grad not in schema.arguments)
        }
        saved = {a: declared.saved.get(a, a) for a in arguments if a in (*declared.saved, *schema.tensors, *outputs)}
        options = tuple(a for a in arguments if a in schema.options)
        types = {grad: f"Tensor{'?' if len(grads) > 1 else ''} {grad}" for grad in grads.values()}
        types |= {a: f"Tensor{'?' if 'None' in text else ''} {a}" for a, text in saved.items()} | schema.arguments
        types |= {"wanted": "bool[] wanted"} | {f"need_{name}": f"bool need_{name}" for name in returned}
        unknown = [a for a in arguments if a not in types] + [a for a in returned if a not in schema.tensors]
        if unknown or not grads:
            raise ValueError(f"declare: the backward of {self.name!r} names {', '.join(unknown) or 'no gradient'}")
        results = {}
        for i, name in enumerate(returned):
            text = declared.outputs.get(name, f"like {name}")
            conditions = (
                [f"wanted[{i}]"] if "wanted" in arguments else [f"need_{name}"] if f"need_{name}" in arguments else []
            )
            if name in schema.optional and name in arguments:
                conditions.append(f"{name} is not None")
            results[name] = f"{text} if {' and '.join(conditions)}" if conditions and " if " not in text else text
        name = declared.name or f"{self.name}_backward"
        inherited = {a: dtypes for a, dtypes in self.argument_dtypes.items() if a in arguments}
        self.backward_op = Op(
            f"{name}({', '.join(types[a] for a in arguments)})",
            declared.reference,
            declared.kernels,
            declared.check or self._backward_check(name, arguments, grads, tuple(declared.saved)),
            outputs=results,
            fake=declared.fake,
            backward=declared.backward,
            saves=declared.saves,
            dtypes=self.dtypes,
            argument_dtypes=inherited | declared.argument_dtypes,
            check_before_kernels=declared.check_before_kernels,
            may_be_empty=declared.may_be_empty,
        )
        constant = [outputs[i] for i in range(len(outputs)) if i not in grads]
        return (
            save_for_backward(self.name, schema, outputs, saved, options, constant),
            gradients(
                self.name,
                schema,
                tuple(self.described.values()),
                grads,
                tuple(saved),
                options,
                arguments,
                returned,
                self.backward_op,
            ),
        )

    def _backward_check(
        self, op: str, arguments: tuple[str, ...], grads: dict[int, str], computed: tuple[str, ...]
    ) -> Callable[..., None]:
        """The forward's check of its arguments among ``arguments``, and of the shapes of gradients and saved outputs.

        What is ``computed`` stands for the tensors of the forward that are missing, in order.
        """
        forward = self.arguments
        missing = [n for n in forward.arguments if n not in arguments and n not in forward.optional]
        stands_for = dict(zip(missing, computed))
        if len(missing) > len(stands_for):
            raise ValueError(
                f"declare: the backward of {self.name!r} lacks {', '.join(missing)}, and so needs its own check"
            )
        places = [arguments.index(p) if (p := stands_for.get(n, n)) in arguments else None for n in forward.arguments]
        names = list(self.described)
        checked = [
            (i, name, arguments.index(name), output)
            for i, output in enumerate(self.described.values())
            for name in (grads.get(i), names[i])
            if name in arguments and name not in computed
        ]

        def check(*args: Any) -> None:
            forward_arguments = [None if place is None else args[place] for place in places]
            self.check(*forward_arguments)
            shapes = self.output_shapes(*forward_arguments)
            for i, name, place, described in checked:
                if args[place] is not None:
                    check_shape(op, name, args[place], shapes[i], described.description)

        return check

    def _completed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``args`` with the defaults of those that are left out at the end."""
        missing = len(self.kinds) - len(args)
        return (*args, *self.defaults[-missing:]) if 0 < missing <= len(self.defaults) else args

    def __call__(self, *args: Any) -> Any:
        if len(args) != len(self.kinds):
            args = self._completed(args)
        if _is_compiling():
            self._no_lost_gradient(args)
            return self.overload(*args)
        if forward_ad._current_level >= 0 or transform() is not None:
            # A torch.library op has no tangent rule, where PyTorch would return zeros in silence, and none for
            # functorch.
            self._no_lost_gradient(args)
            return self.checked_reference(*args)
        if dispatch_modes() or function_modes() or tracing_state() or profiler_enabled():
            self._no_lost_gradient(args)
            return self.overload(*args)
        answer = _guard(self.signature, args)
        if not answer:
            # The dispatcher materialises views that are negated or zero, and knows subclasses; the rest is refused by
            # name.
            return self.overload(*self._admit_types(args))
        if answer & _REQUIRES_GRAD and is_grad_enabled():
            return self.function.apply(*args)
        device = "cpu" if answer & _ON_CPU else "cuda"
        if answer & _PLAIN_WAY or _backend.forced is not None:
            return self._select(device, args)(*args)
        return self.preferred[device][0](*args)  # as _run does, but a call's cost sooner

    def _no_lost_gradient(self, args: tuple[Any, ...]) -> None:
        """Raises where a number is a tensor that requires a gradient, which would be lost in silence."""
        for i in self.number_positions:
            if type(args[i]) is not float:
                check_number(self.name, self.argument_names[i], args[i])

    def direct(self, *args: Any) -> Any:
        """The op without its derivative, for callers that differentiate by hand and let nothing watch."""
        first = args[self.decides]
        if first.is_cpu or first.is_cuda:
            return self._run("cpu" if first.is_cpu else "cuda", args)
        return self.checked_reference(*args)

    def _run(self, device_type: str, args: tuple[Any, ...]) -> Any:
        args = self._completed(args)
        answer = _guard(self.signature, args)
        if not answer:
            args = tuple(_materialised(a) for a in self.admit(args))
        elif not answer & _PLAIN_WAY and _backend.forced is None:
            return self.preferred[device_type][0](*args)
        return self._select(device_type, args)(*args)

    def admit(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """``args`` with numbers as Python's own, or an error that names the argument which the op does not take.

        Raises:
            TypeError: an argument of another type, a tensor that is not dense, or of a dtype that is not declared.
            ValueError: tensors on several devices, and whatever the op's own check finds.
        """
        args = self._admit_types(args)
        self.check(*args)
        first, first_name = None, ""
        for name, t in self._named_tensors(args):
            allowed = self.argument_dtypes.get(name, _FLOATS)
            if allowed is not None and t.dtype not in allowed:
                kind = "a floating-point dtype" if allowed is _FLOATS else f"{_names(allowed)}"
                raise TypeError(f"{self.name}: {name} has dtype {t.dtype}, expected {kind}")
            if first is None:
                first, first_name = t, name
            elif t.device != first.device:
                raise ValueError(
                    f"{self.name}: {name} is on {t.device} and {first_name} on {first.device}; move both to one device"
                )
        return args

    def _admit_types(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) != len(self.kinds):
            raise TypeError(f"{self.name}: got {len(args)} arguments, expected {', '.join(self.argument_names)}")
        admitted = []
        for name, kind, a in zip(self.argument_names, self.kinds, args):
            if kind in "TtE":
                if a is not None or kind != "t":
                    self._admit_tensor(name, a)
                admitted.append(a)
            elif kind.islower():
                admitted.append(self._admit_number(name, kind, a))
            elif not isinstance(a, (list, tuple)):
                raise TypeError(f"{self.name}: {name} is {_described(a)}, expected a list")
            elif kind == "V":
                for t in a:
                    self._admit_tensor(name, t)
                admitted.append(list(a))
            else:
                admitted.append([self._admit_number(name, kind.lower(), item) for item in a])
        return tuple(admitted)

    def _admit_tensor(self, name: str, a: Any) -> None:
        if not isinstance(a, Tensor):
            raise TypeError(f"{self.name}: {name} is {_described(a)}, expected a torch.Tensor")
        if a.is_nested or a.layout is not torch.strided or a.is_quantized:
            what = "nested" if a.is_nested else "quantised" if a.is_quantized else f"of layout {a.layout}"
            raise TypeError(f"{self.name}: {name} is a tensor that is {what}, expected a dense one (torch.strided)")

    def _admit_number(self, name: str, kind: str, a: Any) -> Any:
        if _scalar_is(kind, a) or isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return a
        check_number(self.name, name, a)
        try:
            if kind == "i" and not isinstance(a, Tensor):
                return operator.index(a)
            if (
                kind in "fg"
                and not isinstance(a, (str, bytes))
                and (not isinstance(a, Tensor) or (a.dim() == 0 and not a.is_meta))
            ):
                return float(a)
            if kind == "b" and not isinstance(a, Tensor) and operator.index(a) in (0, 1):
                return bool(a)
        except (TypeError, ValueError):
            # NumPy's bool is the one flag that is no index.
            if kind == "b" and type(a).__module__ == "numpy" and type(a).__name__ in ("bool_", "bool"):
                return bool(a)
        raise TypeError(f"{self.name}: {name} is {_described(a)}, expected {_EXPECTED[kind]}")

    def _named_tensors(self, args: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
        for i in self.tensor_positions:
            for t in args[i] if isinstance(args[i], (list, tuple)) else (args[i],):
                if t is not None:
                    yield self.argument_names[i], t

    def _is_empty(self, args: tuple[Any, ...]) -> bool:
        return any(not t.numel() for name, t in self._named_tensors(args) if name not in self.may_be_empty)

    def _taken(self, device_type: str) -> list[tuple[torch.dtype, ...]]:
        """Of each argument the dtypes that the preferred kernel takes."""
        taken: list[tuple[torch.dtype, ...]] = []
        for i, name in enumerate(self.argument_names):
            declared = self.argument_dtypes.get(name, _FLOATS)
            taken.append(self.preferred[device_type][1] if i == self.decides or declared is None else declared)
        return taken

    def _checks_once(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        check, passed = self.check, self._passed

        def checking(*args: Any) -> Any:
            key = tuple(
                [
                    (a.shape, a.dtype) if isinstance(a, Tensor) else tuple(a) if isinstance(a, (list, tuple)) else a
                    for a in args
                ]
            )
            if key not in passed:
                check(*args)
                if len(passed) >= _KEPT_CHECKS:
                    passed.clear()
                passed.add(key)
            return kernel(*args)

        return checking

    def _checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            return function(*self.admit(self._completed(args)))

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
                self.admit(args)  # what no backend takes is named first
                shapes = [tuple(t.shape) for t in _tensors(args)]
                dtype = next((t.dtype for t in _tensors(args)), None)
                raise _backend.BackendError(
                    f"genfast::{self.name}: backend {_backend.forced!r} cannot serve {dtype} tensors "
                    f"of shapes {shapes} on {device_type}: {reason}"
                )
            return self.checked_reference if self._is_empty(args) else self._kernel(_backend.forced)
        if self._is_empty(args):
            return self.checked_reference
        for name in _backend.PREFERENCE[device_type]:
            if not self.refusal(name, device_type, args):
                return self._kernel(name)
        return self.checked_reference

    def _kernel(self, backend: str) -> Callable[..., Any]:
        kernel: Callable[..., Any] = self.kernels.get(backend, self.checked_reference)
        return kernel

    def refusal(self, backend: str, device_type: str, args: tuple[Any, ...] = ()) -> str:
        """Why ``backend`` cannot serve a call with ``args``; empty when it can."""
        if backend != "reference" and backend not in self.kernels:
            return "the op has no kernel for it"
        for name, tensor in self._named_tensors(args) if args else ():
            taken = self.argument_dtypes.get(name, self.dtypes[backend])
            if taken is None:
                taken = self.dtypes[backend]
                if backend == "reference":
                    continue
            if tensor.dtype not in taken:
                of = "" if taken is self.dtypes[backend] else f" for {name}"
                return f"its kernel takes {_names(taken)}{of}, not {_names([tensor.dtype])}"
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


def _names_in(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _save_everything(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.arguments = [(True, None) if isinstance(a, Tensor) else (False, a) for a in inputs]
    ctx.save_for_backward(*(a for a in inputs if isinstance(a, Tensor)))


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    """All of them, those in lists too."""
    return [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, Tensor)]


def _described(a: Any) -> str:
    if a is None or isinstance(a, (bool, int, float, str)):
        return repr(a)
    if isinstance(a, Tensor):
        return f"a tensor of shape {tuple(a.shape)}"
    return f"a {type(a).__name__}"


def _materialised(a: Any) -> Any:
    """A tensor that has its numbers in memory as they are: neither a view that is read with its sign changed, nor one
    of zeros that has no memory."""
    if not isinstance(a, Tensor):
        return a
    if is_zero_tensor(a):
        return torch.zeros(a.shape, dtype=a.dtype, device=a.device)
    return a.resolve_neg()


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
