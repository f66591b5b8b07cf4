"""nn.SplineCoupling and nn.Spline."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..programs import FlowBuilder, LoweringError
from .bijection import Bijection
from .flow_lowering import lower_map, lower_network
from .univariate import Mapped, SplineMap, univariate


class SplineCoupling(Mapped, Bijection):
    """A coupling layer of rational-quadratic splines: x_a goes through splines whose parameters are conditioner(x_b).

    The conditioner is called with x_b, or with (x_b, context) when a context is given, and returns (N, C' P, ...) for
    the C'
    features of x_a, feature by feature: K bin widths, K heights, the derivatives. P = 3K - 1 with linear tails, 3K
        circular,
    3K + 1 with tails=None. Inputs are vectors (N, C) or images (N, C, H, W), split by channels.

    Args:
        conditioner: any module.
        mask: bool (C,), True passes through (x_b); without, the split is by ``width``.
        width: C', the number of moved features; C // 2 without.
        transform: whether the "first" or the "last" C' features move.
        bins: K, 2 to 64.
        tails: beyond [-bound, bound]: "linear" and "circular" pass x unchanged (circular: both ends share a
            derivative), None allows nothing there.
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

    passed: Tensor | None
    moved: Tensor | None

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        mask: Tensor | None = None,
        width: int | None = None,
        transform: Literal["first", "last"] = "first",
        **options: Any,
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.width, self.transform = width, transform
        self.map = univariate("spline", options)
        if transform not in ("first", "last"):
            raise ValueError(f"SplineCoupling: transform={transform!r}, expected 'first' or 'last'")
        if mask is not None and (mask.dtype != torch.bool or mask.dim() != 1 or not 0 < int(mask.sum()) < len(mask)):
            raise ValueError(
                f"SplineCoupling: mask has dtype {mask.dtype} and shape {tuple(mask.shape)}, expected torch.bool (D,), "
                "True for features that pass through, neither all nor none"
            )
        self.register_buffer("passed", None if mask is None else mask.nonzero().flatten())
        self.register_buffer("moved", None if mask is None else (~mask).nonzero().flatten())

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the spline moves, and what passes through."""
        if self.passed is not None and self.moved is not None:
            if x.shape[1] != len(self.passed) + len(self.moved):
                raise ValueError(
                    f"SplineCoupling: x has shape {tuple(x.shape)}, expected (N, "
                    f"{len(self.passed) + len(self.moved)}, ...)"
                )
            return x.index_select(1, self.moved), x.index_select(1, self.passed)
        width = x.shape[1] // 2 if self.width is None else self.width
        if not 0 < width < x.shape[1]:
            raise ValueError(
                f"SplineCoupling: width={width} with {x.shape[1]} features, expected 1 to {x.shape[1] - 1}"
            )
        if self.transform == "first":
            return x[:, :width], x[:, width:]
        return x[:, x.shape[1] - width :], x[:, : x.shape[1] - width]

    def _joined(self, x: Tensor, y_a: Tensor, x_b: Tensor) -> Tensor:
        if self.moved is not None:
            return x.index_copy(1, self.moved, y_a)
        return torch.cat((y_a, x_b) if self.transform == "first" else (x_b, y_a), 1)

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        x_a, x_b = self._parts(x)
        params: Tensor = self.conditioner(x_b) if context is None else self.conditioner(x_b, context)
        expected = (x.shape[0], x_a.shape[1] * self.map.outputs, *x.shape[2:])
        if params.shape != expected:
            raise ValueError(
                f"SplineCoupling: the conditioner {type(self.conditioner).__name__} returned {tuple(params.shape)} "
                f"for an input of {tuple(x_b.shape)}, expected {expected}: {self.map.outputs} for each of "
                f"{x_a.shape[1]}"
            )
        y_a, logdet = self._mapped(x_a, params.unflatten(1, (x_a.shape[1], self.map.outputs)), inverse)
        return self._joined(x, y_a, x_b), logdet

    def add_steps(self, builder: FlowBuilder) -> None:
        """Adds the conditioner and the splines of the moved features to a program."""
        x = builder.features
        if self.passed is not None and self.moved is not None:
            moved, passed = self.moved.tolist(), self.passed.tolist()
        else:
            width = len(x) // 2 if self.width is None else self.width
            start = 0 if self.transform == "first" else len(x) - width
            moved = list(range(start, start + width))
            passed = [i for i in range(len(x)) if i not in moved]
        params = lower_network(self.conditioner, builder, [x[i] for i in passed], builder.context or None)
        if len(params) != len(moved) * self.map.outputs:
            raise LoweringError(
                f"SplineCoupling: its conditioner gives {len(params)} numbers for {len(moved)} features"
            )
        y = lower_map(self.map, builder, [x[i] for i in moved], params)
        features = list(x)
        for i, row in zip(moved, y):
            features[i] = row
        builder.features = features

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)

    def extra_repr(self) -> str:
        how = f"mask of {len(self.passed)} passed" if self.passed is not None else f"transform={self.transform!r}"
        return f"{how}, {self.map}"


class Spline(Mapped, Bijection):
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

    def __init__(self, features: int, *, context: int = 0, **options: Any) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"Spline: features={features}, expected at least 1")
        self.map = univariate("spline", options)
        assert isinstance(self.map, SplineMap)
        self.params = nn.Parameter(self.map.identity().repeat(features, 1))
        self.context = nn.Linear(context, features * self.map.outputs, bias=False) if context else None

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        features, outputs = self.params.shape
        if x.dim() < 2 or x.shape[1] != features:
            raise ValueError(f"Spline: x has shape {tuple(x.shape)}, expected (N, {features}, ...)")
        params = self.params.expand(x.shape[0], features, outputs)
        if self.context is not None:
            if context is None:
                raise ValueError("Spline: called without a context, expected one")
            params = params + self.context(context).unflatten(1, (features, outputs))
        if x.dim() > 2:
            params = params.reshape(*params.shape, *[1] * (x.dim() - 2)).expand(*params.shape, *x.shape[2:])
        return self._mapped(x, params, inverse)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)

    def extra_repr(self) -> str:
        return f"{self.params.shape[0]}, {self.map}"
