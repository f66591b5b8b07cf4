"""nn.SplineCoupling and nn.Spline."""

from __future__ import annotations

from ..reference import autoregressive_flows as plain
from .bijection import Bijection
from .univariate import Fast


class SplineCoupling(Fast, plain.SplineCoupling, Bijection):
    """A coupling layer of rational-quadratic splines: x_a goes through splines whose parameters are conditioner(x_b).

    The conditioner is called with x_b, or with (x_b, context) when a context is given, and returns (N, C' P, ...) for the C'
    features of x_a, feature by feature: K bin widths, K heights, the derivatives. P = 3K - 1 with linear tails, 3K circular,
    3K + 1 with tails=None. Inputs are vectors (N, C) or images (N, C, H, W), split by channels.

    Args:
        conditioner: any module.
        mask: bool (C,), True passes through (x_b); without, the split is by ``width``.
        width: C', the number of moved features; C // 2 without.
        transform: whether the "first" or the "last" C' features move.
        bins: K, 2 to 64.
        tails: beyond [-bound, bound]: "linear" and "circular" pass x unchanged (circular: both ends share a derivative), None
            allows nothing there.
        bound: half of the splines' interval.
        convention: how logits become bins: "nflows" or "zuko"; see :func:`genfast.ops.rational_quadratic_spline`.
        min_bin_width, min_bin_height, min_derivative, slope, logit_scale: of that op.

    Raises:
        TypeError, ValueError: options that do not fit, or a conditioner whose output has the wrong shape.

    Source: Neural Spline Flows (arXiv:1906.04032, section 3).

    Example:
        >>> import torch, genfast
        >>> coupling = genfast.nn.SplineCoupling(torch.nn.Linear(3, 3 * 23), bins=8)
        >>> z, logdet = coupling(torch.randn(2, 6))
    """

    def extra_repr(self) -> str:
        how = f"mask of {len(self.passed)} passed" if self.passed is not None else f"transform={self.transform!r}"
        return f"{how}, {self.map}"


class Spline(Fast, plain.Spline, Bijection):
    """A learned rational-quadratic spline for each feature, the same for all samples unless there is a context.

    Starts as the identity. With a context (N, K), a linear map of it is added to the parameters.

    Args:
        features: D; inputs are (N, D, ...).
        context: K, or 0 for none.
        bins, tails, bound, convention, min_bin_width, min_bin_height, min_derivative, slope, logit_scale: as in
            :class:`SplineCoupling`.

    Source: Neural Spline Flows (arXiv:1906.04032, section 3.1).

    Example:
        >>> import torch, genfast
        >>> z, logdet = genfast.nn.Spline(4, bins=16)(torch.randn(2, 4))
    """

    def extra_repr(self) -> str:
        return f"{self.params.shape[0]}, {self.map}"
