"""zuko's flows as flow programs."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import zuko
from torch import Tensor, nn
from torch.distributions import AffineTransform, Distribution
from zuko import transforms as zt

from ..programs import FlowBuilder, LoweringError
from ..programs.flow_program import Rows
from . import _whole_flow as shared

_LINEAR = (nn.Linear, zuko.nn.Linear)  # the first is zuko's masked layer too


def lower(flow: Any, univariate_of: Any, builder: FlowBuilder) -> None:
    """Adds the transforms and the base of a zuko flow to a program.

    Raises:
        LoweringError: a part that has no steps, by name.
    """
    _lower_transform(flow.transform, univariate_of, builder)
    base = flow.base
    shared.check(base)
    if not isinstance(base, zuko.lazy.UnconditionalDistribution) or base.f is not zuko.distributions.DiagNormal:
        raise LoweringError(f"the base {_name(base)} has no step of a flow program")
    loc, scale = _arguments(base, "loc", "scale")
    if any(isinstance(t, nn.Parameter) for t in (loc, scale)) or bool((scale <= 0).any()):
        raise LoweringError("the base has parameters")
    if len(loc) != len(builder.features):
        raise LoweringError(f"the base has {len(loc)} features and the transform {len(builder.features)}")
    latent = builder.features
    if bool(loc.any()) or bool((scale != 1).any()):
        builder.features = builder.scale(builder.features, scale, loc, kind="given", mode="inverse")
    builder.base("normal")
    builder.features = latent


def features_of(flow: Any) -> int | None:
    """The number of features, as the base tells; None where it does not."""
    loc = getattr(flow.base, "loc", getattr(flow.base, "_0", None))
    return len(loc) if isinstance(loc, Tensor) and loc.dim() == 1 else None


def sizes(flow: Any) -> tuple[int | None, int]:
    """The numbers of features and of contexts, as the base and the first network tell."""
    features = features_of(flow)
    for m in flow.modules() if features is not None else ():
        if isinstance(m, zuko.flows.MaskedAutoregressiveTransform):
            return features, m.hyper[0].weight.shape[1] - features
        if isinstance(m, zuko.flows.GeneralCouplingTransform):
            return features, m.hyper[0].weight.shape[1] - int(m.mask.sum())
    return features, 0


def _name(module: Any) -> str:
    return (
        f"{type(module).__name__}({getattr(module.f, '__name__', module.f)})"
        if hasattr(module, "f")
        else (type(module).__name__)
    )


def _arguments(partial: Any, *names: str) -> list[Tensor]:
    """The tensors of a zuko Partial, given by place or by name."""
    given = dict(zip(names, partial.args)) | partial.kwargs
    if set(given) != set(names) or not all(isinstance(t, Tensor) for t in given.values()):
        raise LoweringError(f"{_name(partial)} has other arguments than {', '.join(names)}")
    return [given[name] for name in names]


def _lower_transform(transform: Any, univariate_of: Any, builder: FlowBuilder) -> None:
    shared.check(transform)
    if isinstance(transform, zuko.lazy.LazyComposedTransform):
        for t in transform.transforms:
            _lower_transform(t, univariate_of, builder)
    elif isinstance(transform, zuko.flows.MaskedAutoregressiveTransform):
        params = _lower_network(transform.hyper, builder, [*builder.features, *builder.context])
        builder.features = _lower_univariate(univariate_of(transform), transform, builder, builder.features, params)
    elif isinstance(transform, zuko.flows.GeneralCouplingTransform):
        passed = transform.mask.tolist()
        seen = [row for row, p in zip(builder.features, passed) if p]
        moved = [row for row, p in zip(builder.features, passed) if not p]
        if len(passed) != len(builder.features):
            raise LoweringError(
                f"GeneralCouplingTransform has {len(passed)} features, and {len(builder.features)} come"
            )
        params = _lower_network(transform.hyper, builder, seen + builder.context)
        solved = iter(_lower_univariate(univariate_of(transform), transform, builder, moved, params))
        builder.features = [row if p else next(solved) for row, p in zip(builder.features, passed)]
    elif isinstance(transform, zuko.lazy.UnconditionalTransform):
        _lower_fixed(transform, builder)
    else:
        raise LoweringError(f"{type(transform).__name__} has no step of a flow program")


def _lower_fixed(transform: Any, builder: FlowBuilder) -> None:
    """A transform without a network: a permutation or an affine map."""
    if transform.f is zt.PermutationTransform:
        (order,) = _arguments(transform, "order")
        builder.features = [builder.features[i] for i in order.tolist()]
    elif transform.f is AffineTransform:
        loc, scale = (t.expand(len(builder.features)) for t in _arguments(transform, "loc", "scale"))
        if any(isinstance(t, nn.Parameter) for t in transform.parameters()):
            raise LoweringError(f"{_name(transform)} has parameters")
        builder.features = builder.scale(
            builder.features, scale.contiguous().clone(), loc.contiguous().clone(), kind="given"
        )
    else:
        raise LoweringError(f"{_name(transform)} has no step of a flow program")


def _lower_univariate(univariate: Any, transform: Any, builder: FlowBuilder, x: Rows, params: Rows) -> Rows:
    if univariate is None or univariate.kind == "circular":
        raise LoweringError(f"the univariate transform of {type(transform).__name__} has no step of a flow program")
    if len(params) != transform.total * len(x):
        raise LoweringError(
            f"{type(transform).__name__}: its network gives {len(params)} numbers for {len(x)} features"
        )
    if univariate.kind == "affine":
        return builder.affine(x, params[1::2], params[::2], scale="softclamp", constant=-math.log(univariate.slope))
    bound = univariate.bound
    return builder.spline(
        x,
        params,
        bins=univariate.bins,
        tails="linear",
        zuko=True,
        inverse=False,
        constants=[-bound, bound, -bound, bound, 0.0, 0.0, 0.0, univariate.slope, 1.0],
    )


def _lower_network(network: Any, builder: FlowBuilder, rows: Rows) -> Rows:
    """A sequence of (masked) linear layers, activations and residual blocks."""
    shared.check(network)
    layers = list(network)
    i = 0
    while i < len(layers):
        layer = layers[i]
        i += 1
        if isinstance(layer, zuko.nn.Residual):
            inner = _lower_network(layer, builder, rows)
            rows = builder.point("none", inner, added=rows)
        elif isinstance(layer, _LINEAR):
            name = "none"
            if i < len(layers) and not isinstance(layers[i], (*_LINEAR, nn.Sequential, nn.Dropout, nn.LayerNorm)):
                name = shared.activation(layers[i])
                i += 1
            rows = shared.dense(builder, layer, rows, activation=name)
        elif isinstance(layer, nn.Dropout):
            shared.no_dropout(layer)
        else:
            rows = shared.active(builder, shared.activation(layer), rows)
    return rows


class NormalizingFlow(zuko.distributions.NormalizingFlow):  # type: ignore[misc]
    """zuko's, whose log_prob is one call, and whose transform and base are made where they are asked for."""

    def __init__(self, module: Any, context: Tensor | None) -> None:
        Distribution.__init__(self, validate_args=False)
        self._module, self._context = module, context

    @functools.cached_property
    def _plain(self) -> Any:
        return peer_forward(self._module, self._context)

    @property
    def transform(self) -> Any:
        return self._plain.transform

    @property
    def base(self) -> Any:
        return self._plain.base

    @property
    def reinterpreted(self) -> Any:
        return self._plain.reinterpreted

    def expand(self, batch_shape: Any, new: Any = None) -> Any:
        return self._plain.expand(batch_shape, new)

    def log_prob(self, x: Tensor) -> Any:
        module: Any = self._module  # it has its own class again after restore
        found = module.whole(x, self._context) if hasattr(module, "whole") else None
        return self._plain.log_prob(x) if found is None else found


NormalizingFlow.__name__ = NormalizingFlow.__qualname__ = "NormalizingFlow"


def peer_forward(module: Any, context: Tensor | None) -> Any:
    return zuko.lazy.Flow.forward(module, context)


def rows_of(x: Tensor, c: Tensor | None, features: int) -> tuple[Tensor, Tensor | None, tuple[int, ...]] | None:
    """x and c as matrices of as many rows, and the shape that these rows had; None where they do not fit.

    An empty batch is left to zuko, which refuses it.
    """
    if not x.numel() or not x.dim() or x.shape[-1] != features or (c is not None and not c.dim()):
        return None
    if c is None:
        return x.reshape(-1, features), None, tuple(x.shape[:-1])
    try:
        lead = torch.broadcast_shapes(x.shape[:-1], c.shape[:-1])
    except RuntimeError:
        return None
    rows = x.expand(*lead, features).reshape(-1, features)
    return rows, c.expand(*lead, c.shape[-1]).reshape(-1, c.shape[-1]), tuple(lead)
