"""The graph of a network, by torch.fx: what is called, and what is written into in place."""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import Tensor, fx, nn

from .. import ops
from .._calls import class_of, hook_in_the_way, stands_for
from ..programs.errors import LoweringError
from .inputs import Conditions, Unknown
from .rules import MODULE_RULES, REFUSED_MODULES


class _Root(nn.Module):
    """Calls the network as anyone would, so that a forward of its own and its hooks are met by the tracer."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        return self.network(x, *args, **kwargs)


class _Proxy(fx.Proxy):
    """A proxy that sees ``h += y`` and the like, which fx takes for ``h = h + y``, though every name of h sees the
    sum."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise LoweringError(f"{self.node.name}: sets .{name} of a tensor, which has no pixel program")
        super().__setattr__(name, value)


def _in_place(function: Any) -> Any:
    def call(self: fx.Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return call


_IN_PLACE_OPERATORS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod, operator.ipow,
    operator.iand, operator.ior, operator.ixor, operator.imatmul, operator.ilshift, operator.irshift,
)  # fmt: skip


for _operator in _IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_operator.__name__.strip('_')}__", _in_place(_operator))


class _Tracer(fx.Tracer):
    def __init__(self, conditions: Conditions) -> None:
        super().__init__(autowrap_modules=(ops,))
        self.conditions = conditions
        self.image: fx.Node | None = None
        self.dynamic: set[fx.Node] = set()

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The image and every condition that is a tensor become placeholders; what else the network is called with is
        fixed."""

        def entered(label: str, value: Any) -> Any:
            if value is None or isinstance(value, (bool, int, float, str)):
                return value
            if isinstance(value, (Tensor, Unknown)):
                return self.create_proxy("placeholder", f"condition_{label}", (), {})
            raise LoweringError(f"the condition {label!r} is a {type(value).__name__}, expected a tensor")

        image = self.create_proxy("placeholder", "image", (), {})
        c = self.conditions
        args = [entered(k, v) for k, v in zip(c.names, c.args)]
        keywords = {k: entered(k, v) for k, v in c.kwargs.items()}
        return functools.partial(root_fn, **keywords), [self.root, image, *args]

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node: fx.Node = super().create_node(kind, target, *args, **kwargs)
        if self.image is None and kind == "placeholder":
            self.image = node
        if node is self.image or any(n in self.dynamic for n in node.all_input_nodes):
            self.dynamic.add(node)
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given: list[fx.Node] = []
        fx.node.map_aggregate((args, kwargs), lambda a: given.append(a.node) if isinstance(a, fx.Proxy) else None)
        path = self.path_of_module(m)
        if given and not any(n in self.dynamic for n in given):  # of the condition: called by PyTorch, whatever it is
            return self.create_proxy("call_module", path, args, kwargs)
        leaf = self.is_leaf_module(m, path)
        hook = hook_in_the_way(m, weights=leaf)
        if hook:
            raise LoweringError(
                f"{shown_path(path)} ({class_of(m).__name__}): has {hook}, which no pixel program runs; remove it, or "
                "sample with method='naive'"
            )
        return super().call_module(m, m._call_impl, args, kwargs)  # past a compiled form of the call

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # Our containers are traced through, and so is a forward of one's own; torch's parts are refused by name.
        if stands_for(m, (*MODULE_RULES, *REFUSED_MODULES)) is not None:
            return True
        cls = class_of(m)
        library = cls.__module__.startswith(("torch.nn.modules.", "torch.ao.nn."))
        return (
            library
            and stands_for(m, (cls,)) is not None
            and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        )


def shown_path(path: str) -> str:
    """A module's name inside the network that the caller gave."""
    return path.removeprefix("network").removeprefix(".") or "the network"


def trace(network: nn.Module, conditions: Conditions) -> fx.GraphModule:
    """The call of ``network`` with an image and ``conditions`` as a graph of modules that this file knows, under
    "network.".

    Raises:
        LoweringError: its Python code depends on values, or takes other arguments, or a module is called with hooks.
    """
    root = _Root(network)
    try:
        graph = _Tracer(conditions).trace(root)
    except LoweringError:
        raise
    except Exception as error:  # whatever a network's own code says of a tensor that has no numbers
        raise LoweringError(f"{class_of(network).__name__}: its forward cannot be traced: {error}") from error
    return fx.GraphModule(root, graph)


def where(graph: fx.GraphModule, node: fx.Node) -> str:
    """How an error names a node: by its module, or by its own name and the module that calls it."""
    if node.op == "call_module":
        path, module = shown_path(str(node.target)), graph.get_submodule(str(node.target))
        name, ours = class_of(module).__name__, stands_for(module, (*MODULE_RULES, *REFUSED_MODULES)) is not None
        return path if ours and not name.startswith("BatchNorm") else f"{path} ({name})"
    inside = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    path = shown_path(str(inside[-1])) if inside else "the network"
    return node.name if path == "the network" else f"{node.name} in {path}"
