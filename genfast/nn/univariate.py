"""The maps that autoregressive and spline layers put each number through, given its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops

AFFINE_SCALES = ("exp", "softclamp", "sigmoid", "additive")
TAILS = ("linear", "circular", None)
CONVENTIONS = ("nflows", "zuko")


@dataclass(frozen=True)
class AffineMap:
    """z = (x - t) / s(a), or z = s(a) x + t without ``normalising``; parameters (t, a), t alone for "additive"."""

    scale: str = "softclamp"
    normalising: bool = True

    def __post_init__(self) -> None:
        if self.scale not in AFFINE_SCALES:
            raise ValueError(f"affine: scale={self.scale!r}, expected one of {', '.join(map(repr, AFFINE_SCALES))}")

    @property
    def outputs(self) -> int:
        return 1 if self.scale == "additive" else 2


@dataclass(frozen=True)
class SplineMap:
    """A rational-quadratic spline on [-bound, bound]; parameters [``bins`` widths, ``bins`` heights, derivatives]."""

    bins: int = 8
    tails: str | None = "linear"
    bound: float = 5.0
    convention: str = "nflows"
    min_bin_width: float = 1e-3
    min_bin_height: float = 1e-3
    min_derivative: float = 1e-3
    slope: float = 1e-3
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= 64:
            raise ValueError(f"spline: bins={self.bins}, expected 2 to 64")
        if self.tails not in TAILS:
            raise ValueError(f"spline: tails={self.tails!r}, expected one of {', '.join(map(repr, TAILS))}")
        if self.convention not in CONVENTIONS:
            raise ValueError(
                f"spline: convention={self.convention!r}, expected one of {', '.join(map(repr, CONVENTIONS))}"
            )
        if not self.bound > 0:
            raise ValueError(f"spline: bound={self.bound}, expected more than 0")

    @property
    def outputs(self) -> int:
        return 3 * self.bins + {"linear": -1, "circular": 0, None: 1}[self.tails]

    def identity(self) -> Tensor:
        """The parameters (P,) with which the spline is the identity."""
        params = torch.zeros(self.outputs)
        if self.convention == "nflows":
            params[2 * self.bins :] = math.log(math.expm1(1 - self.min_derivative))
        return params


def univariate(kind: str, options: dict[str, Any]) -> AffineMap | SplineMap:
    """The map that ``transform`` and its options name."""
    kinds: dict[str, type[AffineMap] | type[SplineMap]] = {"affine": AffineMap, "spline": SplineMap}
    if kind not in kinds:
        raise ValueError(f"transform={kind!r}, expected 'affine' or 'spline'")
    unknown = [name for name in options if name not in kinds[kind].__dataclass_fields__]
    if unknown:
        raise TypeError(f"transform={kind!r} takes no {', '.join(unknown)}")
    return kinds[kind](**options)


def spline_options(by: SplineMap) -> dict[str, Any]:
    """As the ops take them."""
    return dict(
        tails=by.tails,
        bound=None if by.tails is None else by.bound,
        convention=by.convention,
        left=-by.bound,
        right=by.bound,
        bottom=-by.bound,
        top=by.bound,
        min_bin_width=by.min_bin_width,
        min_bin_height=by.min_bin_height,
        min_derivative=by.min_derivative,
        slope=by.slope,
        logit_scale=by.logit_scale,
    )


def mapped(by: AffineMap | SplineMap, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet) of x (N, D, ...) and params (N, D, P, ...), logdet (N,)."""
    if isinstance(by, AffineMap):
        return ops.affine_coupling(
            x,
            params.flatten(1, 2),
            scale=by.scale,  # type: ignore[arg-type]
            inverse=by.normalising != inverse,
            layout="shift_scale_interleaved",
        )
    packed = params.movedim(2, -1)
    y, logdet = ops.rational_quadratic_spline_packed(x, packed, by.bins, inverse=inverse, **spline_options(by))
    return y, logdet.flatten(1).sum(1)


class Mapped(nn.Module):
    """A layer that puts numbers through ``self.map``."""

    map: AffineMap | SplineMap

    def _mapped(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return mapped(self.map, x, params, inverse)
