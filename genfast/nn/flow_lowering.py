"""How a model's flow becomes one :class:`genfast.programs.FlowProgram`, and when that program may run in its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import changes_nothing, class_of, stands_for
from .._contents import ModuleContents
from .._derived import ordinary
from .._registry import nothing_watches
from ..programs import FlowBuilder, FlowProgram, LoweringError
from ..programs.flow_program import Rows
from ..programs.self_check import SelfCheckError, beyond_rounding
from .univariate import AffineMap, SplineMap, spline_options

# The modules that a program has as activations, and with which settings.
ACTIVATIONS: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    nn.Identity: ("none", {}),
    nn.ReLU: ("relu", {}),
    nn.LeakyReLU: ("leaky_relu", {"negative_slope": 0.01}),
    nn.ELU: ("elu", {"alpha": 1.0}),
    nn.Tanh: ("tanh", {}),
    nn.Sigmoid: ("sigmoid", {}),
    nn.Softplus: ("softplus", {"beta": 1.0, "threshold": 20.0}),
    nn.SiLU: ("silu", {}),
    nn.GELU: ("gelu", {"approximate": "none"}),
}

_DTYPES = (torch.float32, torch.float64)


def lower(module: nn.Module, builder: FlowBuilder) -> None:
    """Adds the steps of a bijection, from data to latent, to a program.

    Raises:
        LoweringError: it has none, by name.
    """
    _method(module)(builder)


def lower_network(network: nn.Module, builder: FlowBuilder, sources: Rows, context: Rows | None) -> Rows:
    """The rows of what a conditioner makes of ``sources`` and of a context: one of ours, or linear layers and
    activations.

    Raises:
        LoweringError: it holds something else, by name.
    """
    if class_of(network) is not type(network):
        raise LoweringError(f"{class_of(network).__name__} has parametrized weights")
    if hasattr(type(network), "add_steps"):
        rows: Rows = _method(network)(builder, sources, context)
        return rows
    if context is not None:
        raise LoweringError(f"{type(network).__name__} takes a context in a way that is not known")
    if stands_for(network, (nn.Sequential,)):
        layers = list(network.children())
        while layers:
            layer = layers.pop(0)
            following = _activation(layers[0]) if layers else None
            if stands_for(layer, (nn.Linear,)) and following is not None:
                sources = builder.linear(layer.weight, layer.bias, sources, activation=following)  # type: ignore[arg-type]
                layers.pop(0)
            else:
                sources = lower_network(layer, builder, sources, None)
        return sources
    if stands_for(network, (nn.Linear,)):
        return builder.linear(network.weight, network.bias, sources)  # type: ignore[arg-type]
    if stands_for(network, (nn.Dropout,)) and (network.p == 0 or not network.training):
        return sources
    activation = _activation(network)
    if activation is None:
        raise LoweringError(f"{type(network).__name__} has no step of a flow program")
    return sources if activation == "none" else builder.point(activation, sources)


def lower_map(by: AffineMap | SplineMap, builder: FlowBuilder, x: Rows, params: Rows) -> Rows:
    """The rows of the map of each of ``x`` by its parameters, which lie one behind the other."""
    if isinstance(by, AffineMap):
        additive = by.scale == "additive"
        return builder.affine(
            x,
            None if additive else params[1::2],
            params if additive else params[::2],
            scale=by.scale,
            mode="inverse" if by.normalising else "scale_then_shift",
            constant=math.log(1000) if by.scale == "softclamp" else 0.0,
        )
    o = spline_options(by)
    zuko = by.convention == "zuko"
    minimums = [0.0] * 3 if zuko else [by.min_bin_width, by.min_bin_height, by.min_derivative]
    return builder.spline(
        x,
        params,
        bins=by.bins,
        tails="none" if by.tails is None else by.tails,
        zuko=zuko,
        inverse=False,
        constants=[o["left"], o["right"], o["bottom"], o["top"], *minimums, by.slope, by.logit_scale],
    )


def _activation(module: nn.Module) -> str | None:
    cls = stands_for(module, tuple(ACTIVATIONS))
    if cls is None:
        return None
    name, settings = ACTIVATIONS[cls]
    return name if all(getattr(module, k) == v for k, v in settings.items()) else None


def _method(module: nn.Module) -> Callable[..., Any]:
    """``module.add_steps``, if a call of the module is what that says."""
    cls = class_of(module)
    owner = next((c for c in cls.__mro__ if "add_steps" in vars(c)), None)
    if owner is None:
        raise LoweringError(f"{cls.__name__} has no step of a flow program")
    if cls is not type(module):
        raise LoweringError(f"{cls.__name__} has parametrized weights")
    if not changes_nothing(cls, owner):
        raise LoweringError(f"{cls.__qualname__} overrides methods of {owner.__qualname__}, but not add_steps()")
    method: Callable[..., Any] = module.add_steps  # type: ignore[assignment]
    return method


class WholeFlow:
    """A flow as one program, prepared at its first call and again when its modules change.

    ``reason`` says why there is none. The program proves itself against the plain way on the first batch of each
    structure.

    Args:
        unchanged: names of settings whose objects nobody changes in place, though they could be.
    """

    def __init__(self, unchanged: frozenset[str] = frozenset()) -> None:
        self._unchanged = unchanged
        self.program: FlowProgram | None = None
        self.reason = "it was not called yet"
        self._contents: list[ModuleContents] = []
        self._contexts = -1

    def __deepcopy__(self, memo: Any) -> WholeFlow:  # a copy lowers its own modules
        return WholeFlow(self._unchanged)

    def __reduce__(self) -> Any:
        return WholeFlow, (self._unchanged,)

    def __call__(
        self,
        roots: list[nn.Module],
        lowering: Callable[[FlowBuilder], None],
        plain: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        x: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        """(z, total) of the program, or None where the plain way must serve.

        Args:
            roots: the modules that the flow is made of.
            lowering: adds all of its steps to a builder.
            plain: the same by calling the modules.
        """
        tensors = (x,) if context is None else (x, context)
        if any(t.dim() != 2 or not t.is_cpu or t.dtype not in _DTYPES or t.dtype is not x.dtype for t in tensors):
            self.reason = "its data are no float32 or float64 vectors on the CPU"
            return None
        if not nothing_watches() or (context is not None and len(context) != len(x)):
            self.reason = "a compiler, a transform or a mode watches the call"
            return None
        contexts = 0 if context is None else context.shape[1]
        same = len(self._contents) == len(roots) and all(c.same(m) for c, m in zip(self._contents, roots))
        if not same or contexts != self._contexts:
            self._prepare(roots, lowering, plain, x, context)
        if self.program is None or self.program.inputs != x.shape[1]:
            return None
        if any(w.dtype is not x.dtype for w in self.program.weights if isinstance(w, Tensor)):
            self.reason = "its weights have another dtype than the data"
            return None
        self.reason = ""
        return self.program(x, context)

    def _prepare(
        self,
        roots: list[nn.Module],
        lowering: Callable[[FlowBuilder], None],
        plain: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        x: Tensor,
        context: Tensor | None,
    ) -> None:
        self.program, self.reason = None, ""
        self._contexts = 0 if context is None else context.shape[1]
        self._contents = [ModuleContents(m, self._unchanged) for m in roots]
        changing = next((m for m, c in zip(roots, self._contents) if not c.comparable), None)
        if changing is not None:
            self.reason = (
                f"{type(changing).__name__} has hooks, a forward of its own or settings that may change in place"
            )
            return
        try:
            with ordinary():
                builder = FlowBuilder(x.shape[1], self._contexts, x.dtype)
                lowering(builder)
                program = builder.build()
        except LoweringError as error:
            self.reason = str(error)
            return
        if any(w.dtype is not x.dtype for w in program.weights if isinstance(w, Tensor)):
            self.reason, self._contents = "its weights have another dtype than the data", []
            return
        self._prove(program, roots, plain, x[:8].detach(), None if context is None else context[:8].detach())
        self.program, self.reason = program, ""

    def _prove(
        self,
        program: FlowProgram,
        roots: list[nn.Module],
        plain: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
        x: Tensor,
        context: Tensor | None,
    ) -> None:
        with torch.no_grad():
            for made, expected in zip(program(x, context), plain(x, context)):
                error = beyond_rounding(made, expected, lambda: None)
                if error is not None:
                    raise SelfCheckError(
                        f"{type(roots[0]).__name__}: its flow program differs from what its layers say by {error:.2g} "
                        "of the largest value"
                    )
