"""What autoregressive and spline layers put each number through, by the ops."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..reference.autoregressive_flows import AffineMap, Mapped, SplineMap


def mapped(by: AffineMap | SplineMap, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet) of x (N, D, ...) and params (N, D, P, ...), logdet (N,)."""
    if isinstance(by, AffineMap):
        return ops.affine_coupling(
            x, params.flatten(1, 2), scale=by.scale, inverse=by.normalising != inverse,  # type: ignore[arg-type]
            layout="shift_scale_interleaved",
        )  # fmt: skip
    y, logdet = ops.rational_quadratic_spline_packed(
        x, params.movedim(2, -1), by.bins, tails=by.tails, bound=by.bound, inverse=inverse, convention=by.convention,
        min_bin_width=by.min_bin_width, min_bin_height=by.min_bin_height, min_derivative=by.min_derivative, slope=by.slope,
        logit_scale=by.logit_scale, left=-by.bound, right=by.bound, bottom=-by.bound, top=by.bound,
    )  # fmt: skip
    return y, logdet.flatten(1).sum(1)


class Fast(Mapped):
    """:class:`Mapped` by the ops."""

    def _mapped(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return mapped(self.map, x, params, inverse)
