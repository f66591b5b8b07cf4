"""The rule of what has none of its own: PyTorch differentiates that one function twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .._torch_private import tree_map
from .handlers import T, functions_named, handles, name_of, sum_of_present
from .in_place import may_overwrite, taken
from .sweeps import Sweeps
from .tape import HANDLERS, Maybe, PlainLayoutNeeded, Rule, Tape, Unsupported

# What draws a number for each element of what it is given, and where the argument stands that says whether it does.
DRAWING = {
    "alpha_dropout": 2,
    "bernoulli": -1,
    "gumbel_softmax": -1,
    "multinomial": -1,
    "normal": -1,
    "poisson": -1,
    "randint_like": -1,
    "rrelu": 3,
}


def draws_numbers(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    place = DRAWING.get(name)
    if place is None:
        return False
    return place < 0 or bool(kwargs.get("training", args[place] if len(args) > place else False))


_ELEMENTWISE = {
    "celu", "clamp", "cos", "elu", "erf", "exp", "expm1", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu",
    "log", "log1p", "logsigmoid", "mish", "pow", "relu", "relu6", "rsqrt", "selu", "sigmoid", "silu", "sin", "softplus",
    "softsign", "sqrt", "square", "tanh", "tanhshrink",
}  # fmt: skip


class Autograd(Rule):
    """Any differentiable function, its own second derivative by PyTorch."""

    kind = "exact, PyTorch's own double backward"
    curved = True
    per_sample = False

    def __init__(self, tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = "") -> None:
        self.inputs: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.locals: list[Tensor] = []
        local_inputs: dict[int, Tensor] = {}
        new_args, new_kwargs = self._local(tape, (args, kwargs), local_inputs)
        self.active = [local_inputs[id(a)] for a in self.inputs]
        with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            self.result = func(*new_args, **new_kwargs)
        found = self.result if isinstance(self.result, (tuple, list)) else (self.result,)
        self.ys = [y for y in found if isinstance(y, Tensor) and y.requires_grad]
        self.edges = [get_gradient_edge(y) for y in self.ys]  # the graph without its outputs' memory
        self.shapes = [(y.shape, y.dtype, y.device) for y in self.ys]
        self.name = name or name_of(func)
        self.proven = "" if self.name in _ELEMENTWISE else self.name
        self.kind = f"{type(self).kind} ({self.name})"
        self.pulled: list[tuple[Tensor, int]] = []
        self.cotangents: list[Tensor] = []
        self.curvature: list[Maybe] = [None] * len(self.inputs)

    def _local(self, tape: Tape, a: Any, made: dict[int, Tensor]) -> Any:
        """Arguments with an alias, that a derivative can be taken by, of each tensor that requires gradients."""
        if isinstance(a, dict):
            return {k: self._local(tape, v, made) for k, v in a.items()}
        if isinstance(a, (tuple, list)) and not isinstance(a, torch.Size):
            values = [self._local(tape, x, made) for x in a]
            return type(a)(*values) if hasattr(a, "_fields") else type(a)(values)
        if not isinstance(a, Tensor) or not a.requires_grad:
            return a
        if id(a) not in made:
            made[id(a)] = alias = a.detach().requires_grad_()
            if tape.slot(a) >= 0:
                self.inputs.append(a)
            else:
                self.leaves.append(a)
                self.locals.append(alias)
        return made[id(a)]

    @property
    def collects(self) -> bool:
        return bool(self.leaves)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if self.name in _ELEMENTWISE and len(self.inputs) == 1 and x.shape == y.shape else -1

    def _grad(
        self, outs: Sequence[Any], wrt: Sequence[Tensor], g: Sequence[Tensor], graph: bool = False
    ) -> list[Maybe]:
        if not outs or not wrt:
            return [None] * len(wrt)
        return list(torch.autograd.grad(outs, wrt, g, retain_graph=True, create_graph=graph, allow_unused=True))

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        pairs = [(y, v) for y, v in zip(self.edges, g) if v is not None]
        return self._grad([y for y, _ in pairs], self.active, [v for _, v in pairs])

    def chain(self, sweeps: Sweeps, b: list[Maybe]) -> list[Maybe]:
        with torch.enable_grad():
            self.cotangents = [
                (torch.zeros(shape, dtype=dtype, device=device) if v is None else v.detach()).requires_grad_()
                for (shape, dtype, device), v in zip(self.shapes, b)
            ]
            found = self._grad(self.edges, self.active, self.cotangents, graph=True)
        self.pulled = [(x, i) for i, x in enumerate(found) if x is not None and x.requires_grad]
        return [None if x is None else x.detach() for x in found]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        pairs = [(x, t[i]) for x, i in self.pulled if t[i] is not None]
        everything = [*self.cotangents, *self.active, *self.locals]
        try:
            found = self._grad([x for x, _ in pairs], everything, [v for _, v in pairs])  # type: ignore[misc]
        except RuntimeError as error:
            raise Unsupported(f"{self.name} has no second derivative ({error})") from error
        n, m = len(self.cotangents), len(self.active)
        self.curvature = found[n : n + m]
        for leaf, g in zip(self.leaves, found[n + m :]):
            if g is not None:
                sweeps.collect(leaf, g)
        return found[:n]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        pairs = [(y, v) for y, v in zip(self.edges, c) if v is not None]
        found = self._grad([y for y, _ in pairs], [*self.active, *self.locals], [v for _, v in pairs])
        for leaf, g in zip(self.leaves, found[len(self.active) :]):
            if g is not None:
                sweeps.collect(leaf, g)
        return [sum_of_present(a, b) for a, b in zip(found[: len(self.active)], self.curvature)]


REFUSED = {
    "__deepcopy__", "__reduce_ex__", "__set__", "__delete__", "apply_", "as_strided", "as_strided_", "backward", "grad",
    "map_", "map2_", "register_hook", "register_post_accumulate_grad_hook", "resize_", "resize_as_", "retain_grad",
    "set_", "share_memory_", "swap_tensors", "_make_dual", "make_dual",
}  # fmt: skip
IN_PLACE_OPERATORS = {
    f"__i{n}__": f"__{n}__"
    for n in (
        "add",
        "sub",
        "mul",
        "truediv",
        "div",
        "pow",
        "matmul",
        "floordiv",
        "mod",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
    )
}


def _out_of_place(func: Any, name: str) -> Any:
    """What a function that works in place computes; None for one that does not."""
    if name in IN_PLACE_OPERATORS:
        return getattr(T, IN_PLACE_OPERATORS[name], None)
    if name == "copy_":
        return lambda place, source, non_blocking=False: source.to(place.dtype).expand_as(place).clone()
    if not name.endswith("_") or name.endswith("__"):
        return None
    found = next((getattr(where, name[:-1]) for where in (T, torch, F) if hasattr(where, name[:-1])), None)
    if found is None or name[:-1] in ("bernoulli", "requires_grad"):
        raise Unsupported(f"{name} of a value that depends on x")
    return found


def otherwise(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Records any function by PyTorch's own derivatives."""
    name = name_of(func)
    if name == "requires_grad_" and (args[1] if len(args) > 1 else kwargs.get("requires_grad", True)):
        return args[0]  # it does already
    if "out" in kwargs or name in REFUSED:
        raise Unsupported(f"{name} of a value that depends on x")
    if tape.converted and draws_numbers(name, args, kwargs):
        raise PlainLayoutNeeded
    place: Any = None
    twin = _out_of_place(func, name)
    if twin is not None or kwargs.get("inplace"):
        place = args[0] if args else kwargs["input"]
        may_overwrite(tape, func, place)
        if tape.slot(place) < 0:  # what is kept of it must stay the constant that it has been
            args, kwargs = (
                (place.detach(), *args[1:]) if args else (),
                kwargs if args else kwargs | {"input": place.detach()},
            )
    if twin is not None:
        func = twin
        handler = HANDLERS.get(twin)
        if handler is not None:
            result = handler(tape, twin, args, kwargs)
            return place if result is place else taken(tape, place, result)
    elif place is not None:
        kwargs = kwargs | {"inplace": False}
    rule = Autograd(tape, func, args, kwargs, name)
    if not rule.ys:  # comparisons, shapes, indices
        if place is not None:
            raise Unsupported(f"{name} of a value that depends on x, with a result that does not")
        if not isinstance(rule.result, Tensor):
            tape.escaped = tape.escaped or name
        return rule.result
    by_id = {id(y): y.detach() for y in rule.ys}
    tape.record(rule, rule.inputs, tuple(by_id.values()))

    def outside(value: Any) -> Any:
        return by_id.get(id(value), value)

    result = tree_map(outside, rule.result)
    rule.result, rule.ys = None, []
    return result if place is None else taken(tape, place, result)


HANDLERS["otherwise"] = otherwise


def _constant(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What has no derivative: comparisons, positions."""
    return func(*args, **kwargs)  # gradients are off


for _f in functions_named(
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "less",
    "less_equal",
    "greater",
    "greater_equal",
    "not_equal",
    "isnan",
    "isinf",
    "isfinite",
    "isclose",
    "allclose",
    "equal",
    "argmax",
    "argmin",
    "argsort",
    "nonzero",
    "count_nonzero",
    "signbit",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "__eq__",
    "__ne__",
):
    HANDLERS[_f] = _constant


@handles(T.detach, T.data.__get__)  # type: ignore[attr-defined]
def _detach(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tape.escaped = tape.escaped or "detach"
    return args[0].detach()
