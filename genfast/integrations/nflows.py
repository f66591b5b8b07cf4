"""Our kernels in nflows' modules."""

from __future__ import annotations

import functools
import math
from typing import Any

from nflows import transforms as nt
from nflows.flows.base import Flow as Peer
from nflows.transforms import autoregressive, coupling, made
from torch import Tensor, nn

from .. import ops
from .._derived import derived
from ..ops.invertible_conv1x1 import MIX
from . import _autoregressive as shared
from . import _lu_layers
from . import _nflows_program as program
from . import _whole_flow as whole_flow
from ._autoregressive import logit_scale, within_unit
from ._class_swap import Swapped, covered, plain_call

TRANSFORMS = nt.Transform
CONTAINERS = (nt.CompositeTransform, nt.InverseTransform, nt.MultiscaleCompositeTransform, nt.Permutation)


def why_left(module: nn.Module) -> str:
    if isinstance(module, nt.AffineCouplingTransform):
        return "its scale sigmoid(r + 2) + 0.001 is none of ops.affine_coupling's"
    if "Cubic" in type(module).__name__:
        return "genfast has no cubic splines"
    return "genfast has no kernel for it"


# ---- masked networks ----


class MaskedLinear(shared.MaskedLinear):
    peer = made.MaskedLinear


class MaskedResidualBlock(shared.MaskedResidualBlock):
    peer = made.MaskedResidualBlock


class MaskedAffine(shared.Autoregressive):
    peer = autoregressive.MaskedAffineAutoregressiveTransform
    what = ""
    stands_for = (*shared.Autoregressive.stands_for, "_unconstrained_scale_and_shift")

    @classmethod
    def engine(cls, module: Any) -> tuple[str, dict[str, Any]]:
        return "affine:softplus", {"eps": module._epsilon, "scale_first": True}


class MaskedSpline(shared.MaskedSpline):
    peer = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform

    @classmethod
    def refuses(cls, module: Any) -> str:
        return _refused(module)


def _linear_spline(module: Any, x: Tensor, pdf: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
    tails = getattr(module, "tails", None)
    if inverse or not covered(x, pdf) or (tails is None and not within_unit(x)):
        return None
    return ops.linear_spline(x, pdf, tails=tails, bound=None if tails is None else module.tail_bound)


_LINEAR_INVERSE = "the inverse is nflows' own, whose last knot is off by 1e-6"


def _quadratic_spline(
    module: Any, x: Tensor, widths: Tensor, heights: Tensor, inverse: bool
) -> tuple[Tensor, Tensor] | None:
    if not covered(x, widths, heights) or (module.tails is None and not within_unit(x)):
        return None
    return ops.quadratic_spline(
        x,
        widths,
        heights,
        tails=module.tails,
        inverse=inverse,
        bound=None if module.tails is None else module.tail_bound,
        min_bin_width=module.min_bin_width,
        min_bin_height=module.min_bin_height,
    )


def _refused(module: Any) -> str:
    tails = getattr(module, "tails", None)
    if tails not in (None, "linear"):
        return f"nflows has no tails {tails!r}"
    if hasattr(module, "num_bins"):
        return shared.bins_refused(module.num_bins)
    logits = module.unnormalized_pdf if hasattr(module, "unnormalized_pdf") else module.unnormalized_widths
    return shared.bins_refused(logits.shape[-1])


class _MaskedOther(shared.Autoregressive):
    """Linear and quadratic splines: the network and the spline are served, the engine has neither spline."""

    what = "splines in one pass"
    stands_for = (*shared.Autoregressive.stands_for, "_elementwise")

    @classmethod
    def refuses(cls, module: Any) -> str:
        return _refused(module)

    @classmethod
    def engine(cls, module: Any) -> str:
        return "the engine does not have its spline"


class MaskedLinearSpline(_MaskedOther):
    peer = autoregressive.MaskedPiecewiseLinearAutoregressiveTransform

    @classmethod
    def engine(cls, module: Any) -> str:
        return _LINEAR_INVERSE

    def _elementwise(self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Any:
        pdf = autoregressive_params.view(inputs.shape[0], self.features, self.num_bins)
        found = _linear_spline(self, inputs, pdf, inverse)
        if found is None:
            return super()._elementwise(inputs, autoregressive_params, inverse)  # type: ignore[misc]
        return found[0], found[1].sum(1)


class MaskedQuadraticSpline(_MaskedOther):
    peer = autoregressive.MaskedPiecewiseQuadraticAutoregressiveTransform

    def _elementwise(self: Any, inputs: Tensor, autoregressive_params: Tensor, inverse: bool = False) -> Any:
        params = autoregressive_params.view(inputs.shape[0], self.features, self._output_dim_multiplier())
        widths, heights = params[..., : self.num_bins], params[..., self.num_bins :]
        found = _quadratic_spline(self, inputs, widths * logit_scale(self.autoregressive_net), heights, inverse)
        if found is None:
            return super()._elementwise(inputs, autoregressive_params, inverse)  # type: ignore[misc]
        return found[0], found[1].sum(1)


# ---- coupling ----


class AdditiveCoupling(Swapped):
    peer = coupling.AdditiveCouplingTransform
    what = "shift without its scale of one"
    stands_for = ("_coupling_transform_forward", "_coupling_transform_inverse", "_scale_and_shift")

    def _coupling_transform_forward(self: Any, inputs: Tensor, transform_params: Tensor) -> Any:
        return inputs + transform_params, inputs.new_zeros(inputs.shape[0])

    def _coupling_transform_inverse(self: Any, inputs: Tensor, transform_params: Tensor) -> Any:
        return inputs - transform_params, inputs.new_zeros(inputs.shape[0])


class _SplineCoupling(Swapped):
    what = "splines in one pass"
    stands_for = ("_piecewise_cdf",)

    @classmethod
    def refuses(cls, module: Any) -> str:
        return _refused(module)


class LinearSplineCoupling(_SplineCoupling):
    peer = coupling.PiecewiseLinearCouplingTransform

    @classmethod
    def falls_back(cls, module: Any) -> str:
        return _LINEAR_INVERSE

    def _piecewise_cdf(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> Any:
        found = _linear_spline(self, inputs, transform_params, inverse)
        return super()._piecewise_cdf(inputs, transform_params, inverse) if found is None else found  # type: ignore[misc]


class QuadraticSplineCoupling(_SplineCoupling):
    peer = coupling.PiecewiseQuadraticCouplingTransform

    def _piecewise_cdf(self: Any, inputs: Tensor, transform_params: Tensor, inverse: bool = False) -> Any:
        widths, heights = transform_params[..., : self.num_bins], transform_params[..., self.num_bins :]
        if hasattr(self.transform_net, "hidden_features"):
            root = math.sqrt(self.transform_net.hidden_features)
            widths, heights = widths / root, heights / root
        found = _quadratic_spline(self, inputs, widths, heights, inverse)
        return super()._piecewise_cdf(inputs, transform_params, inverse) if found is None else found  # type: ignore[misc]


class RationalQuadraticSplineCoupling(_SplineCoupling, shared.SplineCoupling):
    peer = coupling.PiecewiseRationalQuadraticCouplingTransform


# ---- splines with parameters of their own ----


class _SplineCDF(Swapped):
    what = "splines in one pass"
    stands_for = ("_spline",)

    @classmethod
    def refuses(cls, module: Any) -> str:
        return _refused(module)


def shared_by_batch(x: Tensor, params: Tensor) -> Tensor:
    return params.expand(x.shape[0], *params.shape)


class LinearSplineCDF(_SplineCDF):
    peer = nt.PiecewiseLinearCDF

    @classmethod
    def falls_back(cls, module: Any) -> str:
        return _LINEAR_INVERSE

    def _spline(self: Any, inputs: Tensor, inverse: bool = False) -> Any:
        found = _linear_spline(self, inputs, shared_by_batch(inputs, self.unnormalized_pdf), inverse)
        if found is None:
            return super()._spline(inputs, inverse)  # type: ignore[misc]
        return found[0], found[1].flatten(1).sum(1)


class QuadraticSplineCDF(_SplineCDF):
    peer = nt.PiecewiseQuadraticCDF

    def _spline(self: Any, inputs: Tensor, inverse: bool = False) -> Any:
        widths, heights = (shared_by_batch(inputs, p) for p in (self.unnormalized_widths, self.unnormalized_heights))
        found = _quadratic_spline(self, inputs, widths, heights, inverse)
        if found is None:
            return super()._spline(inputs, inverse)  # type: ignore[misc]
        return found[0], found[1].flatten(1).sum(1)


class RationalQuadraticSplineCDF(_SplineCDF, shared.SplineCDF):
    peer = nt.PiecewiseRationalQuadraticCDF


# ---- activation norm and linear layers ----


class ActNorm(Swapped):
    peer = nt.ActNorm
    what = "scale and shift in one pass"
    stands_for = ("forward", "inverse", "_broadcastable_scale_shift", "scale")

    def _covers(self: Any, inputs: Tensor) -> bool:
        same = inputs.dim() in (2, 4) and inputs.shape[1] == self.log_scale.shape[0]
        return same and covered(inputs, self.log_scale, self.shift)

    def forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> Any:
        if not self._covers(inputs):
            return super().forward(inputs, context)  # type: ignore[misc]
        if self.training and not self.initialized:
            self._initialize(inputs)
        return ops.actnorm(inputs, self.log_scale, self.shift, log_scale=True)

    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Any:
        if not self._covers(inputs):
            return super().inverse(inputs, context)  # type: ignore[misc]
        return ops.actnorm(inputs, self.log_scale, self.shift, log_scale=True, inverse=True)


class LULinear(_lu_layers.LULinear):
    peer = nt.LULinear


class OneByOneConvolution(_lu_layers.LULinear):
    peer = nt.OneByOneConvolution
    what = "permutation and product as one pass over the channels"
    stands_for = (*_lu_layers.LULinear.stands_for, "forward", "inverse", "_lu_forward_inverse")

    def fill(self: Any) -> None:
        self._order(), _lu_layers._indices(self)

    def _order(self: Any) -> Tensor | None:
        """Which column of L U each channel meets; None where that cannot be read."""
        permutation: Tensor = self.permutation._permutation
        return derived(self.kept(), "order", (permutation,), permutation.argsort)

    def _parts(self: Any, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]] | None:
        """The order of the channels and the places of L and U; None where a call is not covered."""
        if (self.using_cache and not self.training) or not plain_call(self.permutation) or self.permutation._dim != 1:
            return None
        if inputs.dim() != 4 or inputs.shape[1] != self.features or not covered(inputs, self.bias, self.lower_entries):
            return None
        order, indices = self._order(), _lu_layers._indices(self)
        return None if order is None or indices is None else (order, indices)

    def _logabsdet(self: Any, inputs: Tensor) -> Tensor:
        n, _, h, w = inputs.shape
        found: Tensor = (h * w) * self.logabsdet() * inputs.new_ones(n)
        return found

    def forward(self: Any, inputs: Tensor, context: Tensor | None = None) -> Any:
        parts = self._parts(inputs)
        if parts is None:
            return super().forward(inputs, context)  # type: ignore[misc]
        left, right = _lu_layers.triangles(self, parts[1])
        weight = (left @ right).index_select(1, parts[0])
        return MIX(inputs, None, weight, self.bias, self.features)[0], self._logabsdet(inputs)

    def inverse(self: Any, inputs: Tensor, context: Tensor | None = None) -> Any:
        parts = self._parts(inputs)
        if parts is None:
            return super().inverse(inputs, context)  # type: ignore[misc]
        weight = _lu_layers.weight_inverse(self, parts[1]).index_select(0, parts[0])
        return MIX(inputs, None, weight, -(weight @ self.bias), self.features)[0], -self._logabsdet(inputs)


# ---- whole flows ----


class Flow(Swapped):
    peer = Peer
    what = whole_flow.WHAT
    stands_for = ("_log_prob",)

    @classmethod
    def falls_back(cls, module: Any) -> str:
        return whole_flow.reason(*program.sizes(module), lambda builder: program.lower(module, builder))

    def _log_prob(self: Any, inputs: Tensor, context: Tensor | None) -> Any:
        embedded = self._embedding_net(context)

        def plain(x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
            noise, logabsdet = self._transform(x, context=c)
            return noise, self._distribution.log_prob(noise, context=c) + logabsdet

        fits = inputs.dim() == 2 and (embedded is None or isinstance(embedded, Tensor))
        roots = [self._transform, self._distribution]
        lowering = functools.partial(program.lower, self)
        found = whole_flow.whole_log_prob(self, roots, lowering, plain, inputs, embedded) if fits else None
        return plain(inputs, embedded)[1] if found is None else found


SWAPS: tuple[type[Swapped], ...] = (
    Flow, MaskedLinear, MaskedResidualBlock, MaskedAffine, MaskedSpline, MaskedLinearSpline,
    MaskedQuadraticSpline, AdditiveCoupling, LinearSplineCoupling, QuadraticSplineCoupling,
    RationalQuadraticSplineCoupling,
    LinearSplineCDF, QuadraticSplineCDF, RationalQuadraticSplineCDF, ActNorm, LULinear, OneByOneConvolution,
)  # fmt: skip
