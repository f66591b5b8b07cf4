"""Calls of ops.flow_program for the tests and ``genfast verify``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._registry import Sample
from ..ops.flow_program import OP
from .flow_program import FlowBuilder, FlowProgram, joined


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn / shape[-1] ** 0.5 if len(shape) > 1 else drawn


def _autoregressive(generator: torch.Generator, features: int, contexts: int, width: int, spline: bool) -> FlowProgram:
    builder = FlowBuilder(features, contexts)
    bins = 4
    for reverse in (False, True):
        outputs = 3 * bins - 1 if spline else 2
        order = torch.arange(features - 1, -1, -1) if reverse else torch.arange(features)
        hidden = torch.arange(width) * features // width  # a unit sees the inputs before the one of its number
        first = torch.cat((torch.ones(width, contexts, dtype=torch.bool), order < hidden[:, None]), 1)
        h = builder.linear(
            _normal(generator, width, contexts + features),
            _normal(generator, width),
            builder.context + builder.features,
            mask=first,
            activation="tanh",
        )
        inner = builder.linear(
            _normal(generator, width, width), None, h, mask=hidden[:, None] >= hidden, activation="none", added=h
        )
        h = builder.point("silu", inner, added=h)
        params = builder.linear(
            _normal(generator, features * outputs, width),
            _normal(generator, features * outputs),
            h,
            mask=order.repeat_interleave(outputs)[:, None] >= hidden,
        )
        if spline:
            builder.features = builder.spline(
                builder.features,
                params,
                bins=bins,
                tails="linear",
                zuko=False,
                inverse=reverse,
                constants=(-3.0, 3.0, -3.0, 3.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0),
            )
        else:
            builder.features = builder.affine(
                builder.features, params[1::2], params[::2], scale="softclamp", mode="inverse", constant=-6.9
            )
    builder.base("normal")
    return builder.build()


def _coupling(generator: torch.Generator, features: int) -> FlowProgram:
    builder = FlowBuilder(features)
    half = features // 2
    builder.features = builder.scale(builder.features, _normal(generator, features), _normal(generator, features))
    for scale, mode in (
        ("exp", "scale_then_shift"),
        ("sigmoid", "shift_then_scale"),
        ("softplus", "inverse_shift_first"),
        ("additive", "inverse"),
    ):
        moved, seen = builder.features[:half], builder.features[half:]
        gate = builder.linear(_normal(generator, 7, len(seen)), None, seen, activation="sigmoid")
        h = builder.linear(_normal(generator, 7, len(seen)), _normal(generator, 7), seen, activation="elu")
        h = builder.point("gelu", h, gate=gate)
        params = builder.linear(_normal(generator, 2 * half, 7), _normal(generator, 2 * half), h)
        additive = scale == "additive"
        scaled = builder.scale(params[:half], _normal(generator, half), None, kind="given", counts=False)
        moved = builder.affine(
            moved, None if additive else scaled, params[half:], scale=scale, mode=mode, constant=1e-3
        )
        builder.features = seen + moved
    matrix = torch.eye(features, dtype=torch.float64) + _normal(generator, features, features)
    builder.features = builder.linear(matrix, None, builder.features)
    builder.constant(_normal(generator, 1))
    builder.features = builder.scale(builder.features, _normal(generator, features) / 4 + 1, None, kind="given")
    builder.base("logistic")
    return builder.build()


def samples(generator: torch.Generator) -> Iterator[Sample]:
    """Small programs that hold every step between them."""
    for label, n, features, program in (
        ("autoregressive, affine", 5, 3, _autoregressive(generator, 3, 2, 6, False)),
        ("autoregressive, spline", 37, 2, _autoregressive(generator, 2, 0, 14, True)),
        ("coupling", 4, 5, _coupling(generator, 5)),
    ):
        x = torch.randn(n, features, generator=generator, dtype=torch.float64)
        contexts = int(program.code[1])
        context = torch.randn(n, contexts, generator=generator, dtype=torch.float64) if contexts else None
        weights = joined(program.tensors())
        args = (x, context, weights, program.code, list(program.options), program.rows, program.tile, False)
        yield Sample(label, args)


OP.samples = samples
