"""nflows' flows as flow programs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from nflows import transforms as nt
from nflows.distributions import normal
from nflows.nn import nets
from nflows.transforms import autoregressive, coupling, made
from torch import Tensor

from ..ops.spline import derivative_count
from ..programs import FlowBuilder, LoweringError
from ..programs.flow_program import Rows
from . import _lu_layers
from . import _whole_flow as shared
from ._autoregressive import logit_scale, spline_options


def lower(flow: Any, builder: FlowBuilder) -> None:
    """Adds the transform and the base of an nflows flow to a program.

    Raises:
        LoweringError: a part that has no steps, by name.
    """
    _lower_transform(flow._transform, builder)
    base = flow._distribution
    shared.check(base)
    if not isinstance(base, normal.StandardNormal) or tuple(base._shape) != (len(builder.features),):
        raise LoweringError(f"the base {type(base).__name__} has no step of a flow program")
    builder.base("normal")


def sizes(flow: Any) -> tuple[int | None, int]:
    """The numbers of features and of contexts, as the base and the first network tell."""
    shape: Any = getattr(flow._distribution, "_shape", ())
    contexts = 0
    for m in flow._transform.modules():
        if isinstance(m, made.MADE) and hasattr(m, "context_layer"):
            contexts = m.context_layer.in_features
        if isinstance(m, nets.ResidualNet):
            contexts = m.context_features or 0
    return (shape[0] if len(shape) == 1 else None), contexts


def _lower_transform(transform: Any, builder: FlowBuilder) -> None:
    shared.check(transform)
    x = builder.features
    if isinstance(transform, nt.CompositeTransform):
        for t in transform._transforms:
            _lower_transform(t, builder)
    elif isinstance(transform, nt.Permutation):
        if transform._dim != 1 or len(transform._permutation) != len(x):
            raise LoweringError("Permutation is not one of these features")
        builder.features = [x[i] for i in transform._permutation.tolist()]
    elif isinstance(transform, nt.PointwiseAffineTransform):
        shift, scale = (t.expand(len(x)).contiguous().clone() for t in (transform._shift, transform._scale))
        builder.features = builder.scale(x, scale, shift, kind="given")
    elif isinstance(transform, nt.LULinear):
        _lower_lu(transform, builder)
    elif isinstance(transform, autoregressive.MaskedAffineAutoregressiveTransform):
        params = _lower_made(transform.autoregressive_net, builder)
        builder.features = builder.affine(x, params[::2], params[1::2], scale="softplus", constant=transform._epsilon)
    elif isinstance(transform, autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform):
        params = _lower_made(transform.autoregressive_net, builder)
        builder.features = _lower_spline(transform, transform.autoregressive_net, builder, x, params)
    elif isinstance(transform, coupling.CouplingTransform):
        _lower_coupling(transform, builder)
    else:
        raise LoweringError(f"{type(transform).__name__} has no step of a flow program")


def _lower_spline(transform: Any, network: Any, builder: FlowBuilder, x: Rows, params: Rows) -> Rows:
    o = spline_options(transform)
    tails = "none" if o["tails"] is None else o["tails"]
    if tails != "linear":
        raise LoweringError(f"{type(transform).__name__} has tails={o['tails']!r}, expected 'linear'")
    width = 2 * transform.num_bins + derivative_count(transform.num_bins, tails)
    if len(params) != width * len(x) or not 2 <= transform.num_bins <= 64:
        raise LoweringError(
            f"{type(transform).__name__}: its network gives {len(params)} numbers for {len(x)} features"
        )
    bound = float(o["bound"])
    return builder.spline(
        x,
        params,
        bins=transform.num_bins,
        tails=tails,
        zuko=False,
        inverse=False,
        constants=[-bound, bound, -bound, bound, o["min_bin_width"], o["min_bin_height"], o["min_derivative"], 1e-3,
                   logit_scale(network)],
    )  # fmt: skip


def _lower_coupling(transform: Any, builder: FlowBuilder) -> None:
    x = builder.features
    if transform.unconditional_transform is not None or transform.features != len(x):
        raise LoweringError(f"{type(transform).__name__} has an unconditional transform, or other features")
    seen, moved = transform.identity_features.tolist(), transform.transform_features.tolist()
    params = _lower_residual_net(transform.transform_net, builder, [x[i] for i in seen])
    rows = [x[i] for i in moved]
    if isinstance(transform, nt.PiecewiseRationalQuadraticCouplingTransform):
        solved = _lower_spline(transform, transform.transform_net, builder, rows, params)
    elif isinstance(transform, nt.AdditiveCouplingTransform):
        solved = builder.affine(rows, None, params)
    elif isinstance(transform, nt.AffineCouplingTransform) and len(params) == 2 * len(rows):
        a, t = params[len(rows) :], params[: len(rows)]
        solved = builder.affine(rows, a, t, scale="sigmoid", constant=1e-3)
    else:
        raise LoweringError(f"{type(transform).__name__} has no step of a flow program")
    features = list(x)
    for i, row in zip(moved, solved):
        features[i] = row
    builder.features = features


def _lower_residual_net(network: Any, builder: FlowBuilder, sources: Rows) -> Rows:
    shared.check(network)
    if not isinstance(network, nets.ResidualNet):
        raise LoweringError(f"the network {type(network).__name__} has no step of a flow program")
    if (network.context_features is None) != (not builder.context):
        raise LoweringError("a network is called with another context than it was made for")
    h = shared.dense(builder, network.initial_layer, sources + builder.context)
    for block in network.blocks:
        shared.check(block)
        if block.use_batch_norm:
            raise LoweringError("a network normalises over the batch")
        shared.no_dropout(block.dropout)
        name = shared.activation(block.activation)
        first, second = block.linear_layers
        inner = shared.dense(builder, first, shared.active(builder, name, h), activation=name)
        if builder.context:
            gate = shared.dense(builder, block.context_layer, builder.context, activation="sigmoid")
            h = builder.point("none", shared.dense(builder, second, inner), gate=gate, added=h)
        else:
            h = shared.dense(builder, second, inner, added=h)
    return shared.dense(builder, network.final_layer, h)


def _lower_made(network: Any, builder: FlowBuilder) -> Rows:
    shared.check(network)
    if hasattr(network, "context_layer") != bool(builder.context):
        raise LoweringError("a network is called with another context than it was made for")
    if not isinstance(network, made.MADE):
        raise LoweringError(f"the network {type(network).__name__} has no step of a flow program")
    name = shared.activation(network.activation)
    outer = "none" if network.use_residual_blocks else name
    added = None
    if builder.context:
        added = shared.active(builder, name, shared.dense(builder, network.context_layer, builder.context))
    h = shared.dense(builder, network.initial_layer, builder.features, added=added, activation=outer)
    for block in network.blocks:
        shared.check(block)
        if getattr(block, "use_batch_norm", False) or getattr(block, "batch_norm", None) is not None:
            raise LoweringError("a network normalises over the batch")
        shared.no_dropout(block.dropout)
        inside = shared.activation(block.activation)
        if not network.use_residual_blocks:
            h = shared.dense(builder, block.linear, h, activation=inside)
            continue
        first, second = block.linear_layers
        extra = shared.dense(builder, block.context_layer, builder.context) if builder.context else None
        inner = shared.dense(builder, first, shared.active(builder, inside, h), added=extra, activation=inside)
        h = shared.dense(builder, second, inner, added=h)
    return shared.dense(builder, network.final_layer, h)


def _lower_lu(transform: Any, builder: FlowBuilder) -> None:
    if transform.using_cache and not transform.training:
        raise LoweringError("LULinear uses its cache")
    indices = _lu_layers._indices(transform)
    if indices is None or transform.features != len(builder.features):
        raise LoweringError("LULinear has no triangles that can be read")

    def triangle(i: int) -> Tensor:
        found: Tensor = _lu_layers.triangles(transform, indices)[i]
        return found

    size = transform.features
    x = builder.linear(functools.partial(triangle, 1), None, builder.features, units=size)
    builder.features = builder.linear(functools.partial(triangle, 0), transform.bias, x, units=size)
    builder.constant(lambda: torch.as_tensor(transform.logabsdet()).reshape(1))
