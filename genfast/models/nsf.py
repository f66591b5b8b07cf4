"""models.NSF."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.distributions import Uniform

from ..nn.univariate import SplineMap
from .base_autoregressive_flow import Activation, AutoregressiveFlow, Hidden, widths
from .base_flow import DiagonalGaussian
from .conditioners import ResidualMLP
from .flow import FixedBase


class NSF(AutoregressiveFlow):
    """Neural spline flow: each feature goes through a rational-quadratic spline (arXiv:1906.04032).

    Args:
        dim: D; data are (N, D).
        coupling: "coupling": one half moves by a function of the other, in turn, with a residual conditioner;
            "autoregressive": each moves by a function of those before it.
        transforms: how many.
        bins: of the splines.
        bound: the splines act in [-bound, bound].
        tails: "linear", or "circular": data are angles in [-bound, bound), the base is uniform, and a learned turn
            stands before each transform (arXiv:2002.02428).
        convention: of the splines' parameters, as in :func:`genfast.ops.rational_quadratic_spline`.
        hidden: units per layer of the conditioners, or widths of a MADE.
        depth: hidden layers of a MADE, or residual blocks.
        context: size of a conditioning vector; 0 for none.
        mixing: before each transform: "lu" (:class:`genfast.nn.LULinear` after a random permutation, the paper's
            section 3.3), "permutation" (random), or None: couplings then move the halves in turn, and orders alternate.
        order: "alternating" or "random", of the autoregressive ones.
        norm: before each transform: "act", "batch" or None; None too for circular tails.
        residual: whether the autoregressive networks are.
        activation: of the conditioners' hidden layers.

    Example:
        >>> import torch, genfast
        >>> genfast.models.NSF(6, hidden=32).sample(5).shape
        torch.Size([5, 6])
    """

    def __init__(
        self,
        dim: int,
        *,
        coupling: Literal["coupling", "autoregressive"] = "coupling",
        transforms: int = 5,
        bins: int = 8,
        bound: float | None = None,
        tails: Literal["linear", "circular"] = "linear",
        convention: Literal["nflows", "zuko"] = "nflows",
        hidden: Hidden = 128,
        depth: int = 2,
        context: int = 0,
        mixing: Literal["lu", "permutation"] | None = None,
        order: Literal["alternating", "random"] = "alternating",
        norm: Literal["act", "batch"] | None = "act",
        residual: bool = False,
        activation: Activation = "relu",
    ) -> None:
        if not widths(hidden, depth):
            raise ValueError(f"NSF: hidden={hidden} and depth={depth}, expected at least one layer")
        if coupling not in ("coupling", "autoregressive"):
            raise ValueError(f"NSF: coupling={coupling!r}, expected 'coupling' or 'autoregressive'")
        if tails not in ("linear", "circular"):
            raise ValueError(f"NSF: tails={tails!r}, expected 'linear' or 'circular'")
        if coupling == "coupling" and (dim < 2 or not isinstance(hidden, int)):
            raise ValueError(f"NSF: dim={dim} and hidden={hidden} with couplings, expected at least 2 and one width")
        if mixing not in ("lu", "permutation", None) or (mixing == "lu" and tails == "circular"):
            raise ValueError(f"NSF: mixing={mixing!r}, expected 'lu' (for linear tails), 'permutation' or None")
        self.check_options(dim, transforms, order, norm)
        circular = tails == "circular"
        bound = (math.pi if circular else 5.0) if bound is None else float(bound)
        norm = None if circular else norm
        config = dict(
            dim=dim,
            coupling=coupling,
            transforms=transforms,
            bins=bins,
            bound=bound,
            tails=tails,
            convention=convention,
            hidden=hidden,
            depth=depth,
            context=context,
            mixing=mixing,
            order=order,
            norm=norm,
            residual=residual,
            activation=activation,
        )
        # So that wide conditioners do not start with narrow bins (the paper's code); zuko clips the logits in its
        # stead.
        scale = widths(hidden, depth)[-1] ** -0.5 if convention == "nflows" else 1.0
        options = dict(bins=bins, bound=bound, tails=tails, convention=convention, logit_scale=scale)
        spline = SplineMap(**options)  # type: ignore[arg-type]
        steps: list[nn.Module] = []
        for i in range(transforms):
            steps += [self.layers.CircularShift(dim, bound=bound)] if circular else self.norms(dim, norm)
            if mixing is not None:
                mix = self.layers.LULinear if mixing == "lu" else self.layers.Permutation
                steps.append(mix(dim, order="random"))
            if coupling == "autoregressive":
                network = self.made(dim, i, order, hidden, depth, spline.outputs, context, residual, activation)
                steps.append(self.layers.MaskedAutoregressive(network, transform="spline", **options))
                continue
            transform, width = ("first", dim // 2) if i % 2 == 0 else ("last", dim - dim // 2)
            assert isinstance(hidden, int)
            conditioner = ResidualMLP(
                dim - width, width * spline.outputs, hidden, depth, context, bound if circular else 0.0
            )
            with torch.no_grad():
                conditioner.last.bias.copy_(spline.identity().repeat(width))
            steps.append(self.layers.SplineCoupling(conditioner, width=width, transform=transform, **options))
        base: nn.Module
        if circular:
            edge = bound * (1 + 1e-5) * torch.ones(dim)  # rounding may leave a point on the edge
            base = FixedBase(Uniform(-edge, edge))  # type: ignore[no-untyped-call]
        else:
            base = DiagonalGaussian(dim, trainable=False)
        super().__init__(dim, base, steps, config)
