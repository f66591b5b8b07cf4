"""Our kernels in normflows' modules.

Its forward goes from latent to data, and a log-determinant that all samples share is one number.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import normflows as nf
import torch
from normflows.flows.affine import autoregressive as affine_autoregressive
from normflows.flows.affine import coupling as affine
from normflows.flows.mixing import _LULinear, _Permutation
from normflows.flows.neural_spline import autoregressive, coupling
from normflows.nets import made
from torch import Tensor, nn

from .. import ops, reference
from .._derived import derived
from ..ops.invertible_conv1x1 import MIX, PLU_WEIGHT
from . import _autoregressive as shared
from . import _lu_layers
from ._autoregressive import spline_refused
from ._class_swap import Swapped, covered

TRANSFORMS = nf.flows.Flow
CONTAINERS = (
    nf.flows.Composite,
    nf.flows.Reverse,
    nf.flows.AffineCouplingBlock,
    nf.flows.GlowBlock,
    nf.flows.LULinearPermute,
    nf.flows.Split,
    nf.flows.Merge,
    nf.flows.Squeeze,
    nf.flows.Permute,
    _Permutation,
    nf.flows.CoupledRationalQuadraticSpline,
    nf.flows.CircularCoupledRationalQuadraticSpline,
    nf.flows.AutoregressiveRationalQuadraticSpline,
    nf.flows.CircularAutoregressiveRationalQuadraticSpline,
)


def why_left(module: nn.Module) -> str:
    return "genfast has no kernel for it"


# ---- scale and shift with one value per channel ----


class AffineConst(Swapped):
    peer = affine.AffineConstFlow
    what = "scale and shift in one pass"
    stands_for = ("forward", "inverse")

    @classmethod
    def refuses(cls, module: Any) -> str:
        s, t = module.s, module.t
        if s.dim() < 2 or s.shape[0] != 1 or s.numel() != s.shape[1] or t.shape != s.shape:
            return f"its scale has shape {tuple(s.shape)}, not one value per channel"
        return ""

    def _scaled(self: Any, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        s, t = self.s, self.t
        if z.dim() != s.dim() or z.shape[1] != s.shape[1] or not covered(z, s, t):
            return None
        y, _ = ops.actnorm(z, s.flatten(), t.flatten(), log_scale=True, inverse=inverse)
        log_det = (-1 if inverse else 1) * reference.positions(z) * torch.sum(s)
        return y, log_det

    def forward(self: Any, z: Tensor) -> Any:
        found = self._scaled(z, False)
        return super().forward(z) if found is None else found  # type: ignore[misc]

    def inverse(self: Any, z: Tensor) -> Any:
        found = self._scaled(z, True)
        return super().inverse(z) if found is None else found  # type: ignore[misc]


class ActNorm(AffineConst):
    peer = nf.flows.ActNorm

    def forward(self: Any, z: Tensor) -> Any:
        done = bool(self.data_dep_init_done > 0)
        return super().forward(z) if done else super(AffineConst, self).forward(z)  # type: ignore[misc]

    def inverse(self: Any, z: Tensor) -> Any:
        done = bool(self.data_dep_init_done)
        return super().inverse(z) if done else super(AffineConst, self).inverse(z)  # type: ignore[misc]


# ---- coupling ----


class AffineCoupling(Swapped):
    peer = affine.AffineCoupling
    what = "scale, shift and log-determinant in one pass"
    stands_for = ("forward", "inverse")

    @classmethod
    def refuses(cls, module: Any) -> str:
        if not module.scale:
            return "it only adds: nothing to gain"
        if module.scale_map not in ("exp", "sigmoid_inv"):
            return f"its scale map {module.scale_map!r} is none of ops.affine_coupling's"
        return ""

    def _coupled(self: Any, z: Any, inverse: bool) -> Any:
        z1, z2 = z
        param = self.param_map(z1)
        maps: dict[str, Literal["exp", "sigmoid"]] = {"exp": "exp", "sigmoid_inv": "sigmoid"}
        scale = maps.get(self.scale_map)
        same = param.dim() == z2.dim() and param.shape[1] == 2 * z2.shape[1] and param.shape[2:] == z2.shape[2:]
        if (
            not self.scale
            or scale is None
            or z2.dim() < 2
            or not same
            or len(param) != len(z2)
            or not covered(z2, param)
        ):
            return None
        z2, log_det = ops.affine_coupling(z2, param, scale=scale, layout="shift_scale_interleaved", inverse=inverse)
        return [z1, z2], log_det

    def forward(self: Any, z: Any) -> Any:
        found = self._coupled(z, False)
        return super().forward(z) if found is None else found  # type: ignore[misc]

    def inverse(self: Any, z: Any) -> Any:
        found = self._coupled(z, True)
        return super().inverse(z) if found is None else found  # type: ignore[misc]


# ---- invertible linear layers ----


class _Mixing(Swapped):
    """W, or P L U with P a dense permutation matrix."""

    stands_for: ClassVar[tuple[str, ...]] = ("forward", "inverse", "_assemble_W")

    def fill(self: Any) -> None:
        if self.use_lu:
            self._perm()

    def _perm(self: Any) -> Tensor | None:
        """P as indices; None where it is no permutation, or cannot be read."""
        p: Tensor = self.P

        def make() -> Tensor | None:
            perm = p.argmax(1)
            return perm if torch.equal(torch.eye(len(p), dtype=p.dtype, device=p.device)[perm], p) else None

        return derived(self.kept(), "perm", (p,), make)

    def _weight(self: Any, inverse: bool) -> Tensor | None:
        """W or its inverse from the factors in one step; None where the peer's own way is to be gone."""
        perm = self._perm() if self.use_lu else None
        if perm is None:
            return None
        factors = (perm, self.L, self.U, self.sign_S, self.log_S)
        weight: Tensor = (
            reference.plu_inverse(*factors) if inverse else PLU_WEIGHT(*factors, None, None, False, 1, 1)[0]
        )
        return weight

    def _assemble_W(self: Any, inverse: bool = False) -> Any:
        weight = self._weight(inverse) if covered(self.L, self.U, self.log_S, self.sign_S, self.P) else None
        return super()._assemble_W(inverse) if weight is None else weight  # type: ignore[misc]


class InvertibleAffine(_Mixing):
    peer = nf.flows.InvertibleAffine
    what = "weight from its factors in one step"
    stands_for = ("_assemble_W",)

    @classmethod
    def refuses(cls, module: Any) -> str:
        return "" if module.use_lu else "a product by a full matrix: the library's own"


class Invertible1x1Conv(_Mixing):
    peer = nf.flows.Invertible1x1Conv
    what = "weight from its factors in one step, product in one pass over the channels"

    def _mixed(self: Any, z: Tensor, forward: bool) -> tuple[Tensor, Tensor] | None:
        if z.dim() != 4 or z.shape[1] != self.num_channels or not covered(z, *self.parameters()):
            return None
        if self.use_lu:
            weight, unit = self._assemble_W(inverse=forward), torch.sum(self.log_S)
        else:
            weight, unit = self.W, torch.linalg.slogdet(self.W)[1]
            weight = torch.linalg.inv(weight.double()).to(weight.dtype) if forward else weight
        y = MIX(z, None, weight, None, self.num_channels)[0]
        return y, (-unit if forward else unit) * (z.shape[2] * z.shape[3])

    def forward(self: Any, z: Tensor) -> Any:
        found = self._mixed(z, True)
        return super().forward(z) if found is None else found  # type: ignore[misc]

    def inverse(self: Any, z: Tensor) -> Any:
        found = self._mixed(z, False)
        return super().inverse(z) if found is None else found  # type: ignore[misc]


class LULinear(_lu_layers.LULinear):
    peer = _LULinear


# ---- masked networks and splines ----


class MaskedLinear(shared.MaskedLinear):
    peer = made.MaskedLinear


class MaskedResidualBlock(shared.MaskedResidualBlock):
    peer = made.MaskedResidualBlock


class MaskedAffine(shared.Autoregressive):
    peer = affine_autoregressive.MaskedAffineAutoregressive
    what = ""
    gated = True
    stands_for = (*shared.Autoregressive.stands_for, "_unconstrained_scale_and_shift")

    @classmethod
    def engine(cls, module: Any) -> tuple[str, dict[str, Any]]:
        return "affine:sigmoid2", {"eps": 1e-3, "scale_first": True}


class MaskedSpline(shared.MaskedSpline):
    peer = autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive
    gated = True

    @classmethod
    def refuses(cls, module: Any) -> str:
        return spline_refused(module)

    @classmethod
    def engine(cls, module: Any) -> tuple[str, dict[str, Any]] | str:
        if isinstance(module.tail_bound, Tensor):
            return "its bounds differ from feature to feature"
        return super().engine(module)


class SplineCoupling(shared.SplineCoupling):
    peer = coupling.PiecewiseRationalQuadraticCoupling

    @classmethod
    def refuses(cls, module: Any) -> str:
        return spline_refused(module)


class SplineCDF(shared.SplineCDF):
    peer = coupling.PiecewiseRationalQuadraticCDF

    @classmethod
    def refuses(cls, module: Any) -> str:
        return spline_refused(module)


SWAPS: tuple[type[Swapped], ...] = (
    AffineConst,
    ActNorm,
    AffineCoupling,
    InvertibleAffine,
    Invertible1x1Conv,
    LULinear,
    MaskedLinear,
    MaskedResidualBlock,
    MaskedAffine,
    MaskedSpline,
    SplineCoupling,
    SplineCDF,
)
