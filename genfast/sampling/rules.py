"""How a call of the graph finds its rule, and what every rule may rely on."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx

from .. import nn as gnn
from .._calls import class_of, stands_for
from .steps import Lowering, Value


@dataclass(frozen=True)
class Rule:
    """How calls of one function, method or class are lowered."""

    lower: Callable[..., Any]
    reads: frozenset[str]  # arguments that it takes account of; every other one must have its default
    signature: inspect.Signature | None = None  # None: that of the class's forward
    in_place: bool = False


FUNCTION_RULES: dict[Any, Rule] = {}
MODULE_RULES: dict[type, Rule] = {}
_TAKING_LEVELS: set[Callable[..., Any]] = set()
_TAKING_PADDING: set[Callable[..., Any]] = set()
REFUSED_MODULES = (gnn.RowLSTM, gnn.DiagonalBiLSTM)  # so that they are named as a whole
_Lower = TypeVar("_Lower", bound=Callable[..., Any])


def function_rule(
    signature: Callable[..., Any], *targets: Any, in_place: Sequence[Any] = ()
) -> Callable[[_Lower], _Lower]:
    """Registers a rule for functions, operators and (as strings) methods of tensors, all of this signature."""

    def register(rule: _Lower) -> _Lower:
        reads = frozenset(inspect.signature(rule).parameters) - {"low"}
        for writes, several in ((False, targets), (True, in_place)):
            for target in several:
                FUNCTION_RULES[target] = Rule(rule, reads, inspect.signature(signature), writes)
        return rule

    return register


def module_rule(*classes: type) -> Callable[[_Lower], _Lower]:
    """Registers a rule for modules of these classes; it is given the module and, by the names of forward, the
    arguments."""

    def register(rule: _Lower) -> _Lower:
        reads = frozenset(inspect.signature(rule).parameters) - {"low", "module", "x"}
        for cls in classes:
            MODULE_RULES[cls] = Rule(rule, reads)
        return rule

    return register


def takes_levels(rule: _Lower) -> _Lower:
    """Marks a rule that takes the image as whole numbers; others are given it as floats."""
    _TAKING_LEVELS.add(rule)
    return rule


def takes_padding(rule: _Lower) -> _Lower:
    """Marks a rule that takes a map with a margin of zeros, which a later slice takes off."""
    _TAKING_PADDING.add(rule)
    return rule


def _bound(low: Lowering, rule: Rule, signature: inspect.Signature, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The arguments by name; an error where one is given that the rule does not read."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise low.error(f"is called with arguments that have no pixel program ({error})") from error
    first = next(iter(signature.parameters))  # what it is applied to
    for name, value in bound.arguments.items():
        default = signature.parameters[name].default
        same = value is default or (type(value) is type(default) and value == default)
        if name not in rule.reads and name not in ("inplace", first) and not same:
            shown = "a feature map" if isinstance(value, Value) else repr(value)
            raise low.error(f"is called with {name}={shown}, which has no pixel program")
    return bound.arguments


def lower_call(low: Lowering, node: fx.Node, args: list[Any], kwargs: dict[str, Any], dynamic: set[fx.Node]) -> Any:
    """Lowers one call; what it writes into in place has the new value under all its names."""
    module = None
    if node.op == "call_module":
        module = low.graph.get_submodule(str(node.target))
        cls = stands_for(module, MODULE_RULES)
        if cls is None:
            kind = class_of(module)
            raise low.error(f"a {kind.__module__}.{kind.__qualname__} has no pixel program")
        rule, signature = MODULE_RULES[cls], _forward_signature(cls)
        given = _bound(low, rule, signature, args, kwargs)
        first = next(iter(signature.parameters))
        operand = given.pop(first)
        given["x"], in_place = operand, bool(getattr(module, "inplace", False))
        given = {k: v for k, v in given.items() if k == "x" or k in rule.reads} | {"module": module}
    else:
        name = getattr(node.target, "__name__", node.target)
        if node.target not in FUNCTION_RULES:
            raise low.error(f"calls {name}, which has no pixel program")
        rule = FUNCTION_RULES[node.target]
        assert rule.signature is not None
        given = _bound(low, rule, rule.signature, args, kwargs)
        operand = given[next(iter(rule.signature.parameters))]
        in_place = rule.in_place or bool(given.get("inplace", False))
        given = {k: v for k, v in given.items() if k in rule.reads}
    if isinstance(operand, Value) and operand.levels and in_place:
        raise low.error("writes in place into the images that the network is given")
    if rule.lower not in _TAKING_LEVELS:
        if module is not None and any(isinstance(v, Value) and v.levels for v in given.values()):
            raise low.error("takes floats, and is given whole numbers; say by Sampler(input=...) which floats they are")
        entered = functools.cache(lambda: low.entered(1.0, 0.0))
        given = {k: entered() if isinstance(v, Value) and v.levels else v for k, v in given.items()}
    if rule.lower not in _TAKING_PADDING:
        for value in _flat(given.values()):
            if isinstance(value, Value) and any(value.margin):
                raise low.error(
                    "takes a padded map, which has a pixel program only where a slice makes it as large as it was"
                )
    result = rule.lower(low, **given)
    if in_place:
        written = next(iter(node.all_input_nodes), None)
        if written not in dynamic or not isinstance(operand, Value):
            raise low.error("writes in place into a tensor that does not depend on the image")
        low.overwrite(operand, result)
    return result


@functools.cache
def _forward_signature(cls: Any) -> inspect.Signature:
    signature = inspect.signature(cls.forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def feature_map(low: Lowering, x: Any) -> Value:
    if not isinstance(x, Value):
        raise low.error(f"takes {x!r}, expected a feature map")
    return x
