"""Our kernels in normflows' modules. Its forward goes from latent to data; a log-determinant shared by all samples is one number."""

from __future__ import annotations

from typing import Any

import normflows as nf
import torch
from normflows.flows import mixing
from normflows.flows.affine import coupling as affine
from torch import Tensor, nn

from .. import ops, reference
from ..ops.invertible_conv1x1 import MIX, PLU_WEIGHT
from . import _linear
from ._swap import Swapped, covered, version

TRANSFORMS = nf.flows.Flow
CONTAINERS = (
    nf.flows.Composite, nf.flows.Reverse, nf.flows.AffineCouplingBlock, nf.flows.GlowBlock, nf.flows.Split, nf.flows.Merge,
    nf.flows.Squeeze, nf.flows.LULinearPermute, nf.flows.CoupledRationalQuadraticSpline,
    nf.flows.CircularCoupledRationalQuadraticSpline, nf.flows.AutoregressiveRationalQuadraticSpline,
    nf.flows.CircularAutoregressiveRationalQuadraticSpline,
)  # fmt: skip


def why_left(module: nn.Module) -> str:
    return "genfast has no kernel for it"


# ---- scale and shift with one value per channel ----


class AffineConst(Swapped):
    peer = affine.AffineConstFlow
    what = "scale and shift in one pass"
    stands_for = ("forward", "inverse")

    @classmethod
    def refuses(cls, module: Any) -> str:
        s = module.s
        if s.dim() < 2 or s.shape[0] != 1 or s[0, :, ...].numel() != s.shape[1]:
            return f"its scale has shape {tuple(s.shape)}, not one value per channel"
        return ""

    def _scaled(self: Any, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
        s, t = self.s, self.t
        if z.dim() != s.dim() or z.shape[1] != s.shape[1] or not covered(z, s, t):
            return None
        y, _ = ops.actnorm(z, *_scale_and_bias(s, t, inverse), log_scale=True, inverse=False)
        log_det = reference.positions(z) * torch.sum(s)
        return y, -log_det if inverse else log_det

    def forward(self: Any, z: Tensor) -> Any:
        found = self._scaled(z, False)
        return super().forward(z) if found is None else found  # type: ignore[misc]

    def inverse(self: Any, z: Tensor) -> Any:
        found = self._scaled(z, True)
        return super().inverse(z) if found is None else found  # type: ignore[misc]
