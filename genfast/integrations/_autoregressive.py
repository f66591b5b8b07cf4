"""What nflows and normflows share: MADE, and the transforms whose inverse passes through it once for each input."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import ops
from ..programs import Layer
from ._class_swap import Swapped, covered, of_library, plain_call
from ._masked_networks import activation_name, layer_of, masked_product, no_staircase, solve, staircase


class MaskedLinear(Swapped):
    what = "product over live weights"
    stands_for = ("forward",)

    @classmethod
    def refuses(cls, module: Any) -> str:
        return "no sorting makes its mask a staircase" if no_staircase(module) else ""

    def fill(self) -> None:
        staircase(self.kept(), self)

    def forward(self: Any, x: Tensor) -> Any:
        y = masked_product(self.kept(), self, x)
        return super().forward(x) if y is None else y  # type: ignore[misc]


class MaskedResidualBlock(Swapped):
    what = "the inner relu fused into the product before it"
    stands_for = ("forward",)

    @classmethod
    def refuses(cls, module: Any) -> str:
        if module.use_batch_norm:
            return "batch norm stands between its products"
        return "" if activation_name(module.activation) == "relu" else "its activation is not relu"

    @classmethod
    def falls_back(cls, module: Any) -> str:
        return "with a context the parts are called one by one" if hasattr(module, "context_layer") else ""

    def forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> Any:
        first, second = self.linear_layers
        y = None
        if context is None and plain_call(first) and activation_name(self.activation) == "relu":
            y = masked_product(
                first.kept() if isinstance(first, Swapped) else {}, first, self.activation(inputs), "relu"
            )
        if y is None:
            return super().forward(inputs, context)  # type: ignore[misc]
        return inputs + second(self.dropout(y))


def made_layers(made: Any, context: Tensor | None, gated: bool) -> list[Layer] | str:
    """The engine's layers of a MADE, or why there are none.

    Args:
        context: (N, K) or None.
        gated: normflows' way with it (a gate behind each block), or nflows' (added in front of an activation).
    """
    if not isinstance(getattr(made, "preprocessing", None), (type(None), torch.nn.Identity)):
        return "the network preprocesses its inputs"
    blocks = list(made.blocks)
    linear = [
        made.initial_layer,
        *(m for b in blocks for m in getattr(b, "linear_layers", None) or [b.linear]),
        made.final_layer,
    ]
    if not all(plain_call(m) for m in (made, *blocks, *linear)):
        return "hooks watch the network"
    changed = [type(m).__name__ for m in (made, *blocks, *linear) if not of_library(m)]
    if changed:
        return f"{changed[0]} overrides methods of the library's class"
    names = [activation_name(m.activation) for m in (made, *blocks) if hasattr(m, "activation")]
    if any(n is None for n in names):
        return "the engine does not have the network's activation"
    if any(getattr(b, "use_batch_norm", False) or getattr(b, "batch_norm", None) is not None for b in blocks):
        return "the network normalises over the batch"
    if any(b.dropout.p > 0 and b.dropout.training for b in blocks):
        return "dropout is active"
    layers = [layer_of(made.initial_layer)]
    if context is not None:
        added = made.context_layer(context)
        layers[0].context = added if gated else made.activation(added)
    at, pending = 1, "none"
    if not gated and not made.use_residual_blocks:
        pending = activation_name(made.activation) or ""
    for block in blocks:
        name = activation_name(block.activation) or ""
        if hasattr(block, "linear_layers"):
            first, second = block.linear_layers
            layers += [layer_of(first, source=at, before=name), layer_of(second, before=name, residual=at)]
            if context is not None:
                added = block.context_layer(context)
                if gated:
                    layers[-1].gate = torch.sigmoid(added)
                else:
                    layers[-2].context = added
            at, pending = at + 2, "none"
        else:
            if gated and context is not None:
                return "the network's blocks take no context"
            layers.append(layer_of(block.linear, source=at, before=pending))
            at, pending = at + 1, name
    layers.append(layer_of(made.final_layer, source=at, before=pending))
    return layers


class Autoregressive(Swapped):
    """Mixin for the transforms: the inverse in one sweep; each peer's class says how its elements are transformed."""

    gated = False
    stands_for: ClassVar[tuple[str, ...]] = ("forward", "inverse", "_elementwise_forward", "_elementwise_inverse")

    @classmethod
    def engine(cls, module: Any) -> tuple[str, dict[str, Any]] | str:
        """The engine's transform and options, or why it has none."""
        raise NotImplementedError

    @classmethod
    def does(cls, module: Any) -> str:
        swept = "" if cls.falls_back(module).startswith("the inverse") else "inverse in the order of degrees"
        return ", ".join(part for part in (cls.what, swept) if part) or "its parts"

    @classmethod
    def falls_back(cls, module: Any) -> str:
        way = cls.engine(module)
        reason = way if isinstance(way, str) else made_layers(module.autoregressive_net, None, cls.gated)
        if reason == "dropout is active":
            return "in training the inverse makes its passes, with dropout"
        return f"the inverse makes its passes: {reason}" if isinstance(reason, str) else ""

    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Any:
        way = self.engine(self)
        made = self.autoregressive_net
        fits = inputs.dim() == 2 and inputs.shape[1] == made.initial_layer.weight.shape[1]
        fits = fits and not torch.compiler.is_compiling() and covered(inputs, context, made.initial_layer.weight)
        if not isinstance(way, str) and fits and self.inside(inputs):
            layers = made_layers(made, context, self.gated)
            solved = None
            if not isinstance(layers, str):
                first = None if context is None else context[:1].detach()
                transform, options = way
                again = functools.partial(_again, context=first)
                solved = solve(self.kept(), layers, inputs, transform, options, self, made, again)
            if solved is not None:
                return solved
        return super().inverse(inputs, context)  # type: ignore[misc]

    def inside(self, inputs: Tensor) -> bool:
        """Whether the elementwise transform has these values in its domain."""
        return True


def _again(module: Any, x: Tensor, z: Tensor, dtype: torch.dtype, *, context: Tensor | None) -> tuple[Tensor, Tensor]:
    params = module.autoregressive_net(x, None if context is None else context.to(dtype))
    found: tuple[Tensor, Tensor] = module._elementwise_inverse(z, params)
    return found


def within_unit(x: Tensor) -> bool:
    return x.numel() > 0 and not bool((x.amin() < 0) | (x.amax() > 1))


def spline_refused(module: Any) -> str:
    """Why our spline ops do not take a module's bins or tails."""
    if isinstance(module.tails, (list, tuple)):
        return "its tails differ from feature to feature"
    if module.tails not in (None, "linear", "circular"):
        return f"it has unknown tails {module.tails!r}"
    return bins_refused(module.num_bins if hasattr(module, "num_bins") else module.unnormalized_widths.shape[-1])


def bins_refused(bins: int) -> str:
    return "" if 2 <= bins <= 64 else f"it has {bins} bins, and the ops take 2 to 64"


def spline_options(module: Any) -> dict[str, Any]:
    """What a module with rational-quadratic splines says about them, in our op's words."""
    found: dict[str, Any] = {
        "tails": module.tails,
        "min_bin_width": module.min_bin_width,
        "min_bin_height": module.min_bin_height,
        "min_derivative": module.min_derivative,
    }
    if module.tails is not None:
        found["bound"] = module.tail_bound
    return found


def engine_spline(module: Any) -> tuple[str, dict[str, Any]]:
    """The engine's transform and options for a module with rational-quadratic splines."""
    scale = logit_scale(module.autoregressive_net)
    return "spline", {"bins": module.num_bins, "logit_scale": scale, **spline_options(module)}


def logit_scale(network: Any) -> float:
    """The peers divide widths and heights by the root of the network's width, where it tells."""
    width = getattr(network, "hidden_features", None) or getattr(network, "hidden_channels", None)
    return 1.0 if width is None else 1 / math.sqrt(width)


def warn_unscaled(network: Any) -> None:
    """The peers' own warning of a coupling's network that does not tell its width."""
    if not hasattr(network, "hidden_features") and not hasattr(network, "hidden_channels"):
        warnings.warn("Inputs to the softmax are not scaled down: initialization might be bad.", stacklevel=3)


def packed_spline(module: Any, x: Tensor, params: Tensor, scale: float, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """(y, logdet) elementwise; None where the op does not cover the call, and what is outside a bounded domain."""
    if not covered(x, params) or (module.tails is None and not within_unit(x)):
        return None
    return ops.rational_quadratic_spline_packed(
        x, params, module.num_bins, inverse=inverse, logit_scale=scale, **spline_options(module)
    )


def unconditional_spline(module: Any, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """A spline whose parameters all samples share, with logdet (N,); None where the op does not cover the call."""
    params = [module.unnormalized_widths, module.unnormalized_heights, module.unnormalized_derivatives]
    if not covered(x, *params) or (module.tails is None and not within_unit(x)):
        return None
    params = [p.expand(x.shape[0], *p.shape) for p in params]
    y, logdet = ops.rational_quadratic_spline(x, *params, inverse=inverse, **spline_options(module))
    return y, logdet.flatten(1).sum(1)


class MaskedSpline(Autoregressive):
    what = "splines in one pass"
    stands_for = (*Autoregressive.stands_for, "_elementwise")

    @classmethod
    def engine(cls, module: Any) -> tuple[str, dict[str, Any]] | str:
        return engine_spline(module)

    def inside(self: Any, inputs: Tensor) -> bool:
        return self.tails is not None or within_unit(inputs)

    def _elementwise(self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Any:
        params = autoregressive_params.view(*inputs.shape[:2], self._output_dim_multiplier())
        found = packed_spline(self, inputs, params, logit_scale(self.autoregressive_net), inverse)
        if found is None:
            return super()._elementwise(inputs, autoregressive_params, inverse)  # type: ignore[misc]
        return found[0], found[1].sum(1)


class SplineCoupling(Swapped):
    what = "splines in one pass"
    stands_for = ("_piecewise_cdf",)

    def _piecewise_cdf(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> Any:
        found = packed_spline(self, inputs, transform_params, logit_scale(self.transform_net), inverse)
        if found is None:
            return super()._piecewise_cdf(inputs, transform_params, inverse)  # type: ignore[misc]
        warn_unscaled(self.transform_net)
        return found


class SplineCDF(Swapped):
    what = "splines in one pass"
    stands_for = ("_spline",)

    def _spline(self: Any, inputs: Tensor, inverse: bool = False) -> Any:
        found = unconditional_spline(self, inputs, inverse)
        return super()._spline(inputs, inverse) if found is None else found  # type: ignore[misc]
