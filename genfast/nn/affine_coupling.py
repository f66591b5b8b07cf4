"""nn.AffineCoupling and the fused nn.GlowStep."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..programs import FlowBuilder, LoweringError
from ..reference.affine_coupling import LAYOUTS, SCALES
from .actnorm import ActNorm
from .bijection import Bijection, Rebuilt, State, rebuild
from .flow_lowering import lower_network
from .invertible_conv1x1 import InvertibleConv1x1

Scale = Literal["exp", "sigmoid", "tanh", "softclamp", "additive"]
Layout = Literal["scale_shift", "shift_scale", "scale_shift_interleaved", "shift_scale_interleaved"]


class AffineCoupling(Bijection):
    """A coupling layer around any conditioner network: y_a = s(r) x_a + t with (r, t) = conditioner(x_b).

    The conditioner is called with x_b, or with (x_b, context) when a context is given, and returns (N, 2C', ...)
    (C' for ``scale="additive"``). With a channel split x_b is the C - C' channels that pass through; with a ``mask`` it
    is all of x with zeros where the mask is False, and C' = C.

    Args:
        conditioner: any module.
        scale, layout: as in :func:`genfast.ops.affine_coupling`.
        mask: boolean, broadcastable to x.shape[1:]; True passes through.
        width: C', the number of transformed channels; C // 2 without.
        transform: whether the "first" or the "last" channels are transformed.
        alpha: for ``scale="tanh"``: a float, or "learn" for one learned factor per channel (needs ``width``).
        shift_first: y_a = s(r) (x_a + t), as OpenAI's Glow, its ports and chrischute/real-nvp have it; the same
            conditioner is another function under the other convention, without an error. See
            :func:`genfast.ops.affine_coupling`.

    Raises:
        ValueError: options that do not fit, or a conditioner whose output has the wrong shape.

    Source: NICE (arXiv:1410.8516), RealNVP (arXiv:1605.08803), Glow (arXiv:1807.03039).

    Example:
        >>> import torch, genfast
        >>> coupling = genfast.nn.AffineCoupling(torch.nn.Conv2d(2, 4, 3, padding=1), scale="sigmoid")
        >>> z, logdet = coupling(torch.randn(2, 4, 8, 8))
    """

    mask: Tensor | None

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        scale: Scale = "exp",
        mask: Tensor | None = None,
        width: int | None = None,
        transform: Literal["first", "last"] = "first",
        layout: Layout = "scale_shift",
        alpha: float | Literal["learn"] | None = None,
        shift_first: bool = False,
    ) -> None:
        super().__init__()
        for name, value, allowed in (
            ("scale", scale, SCALES),
            ("layout", layout, LAYOUTS),
            ("transform", transform, ("first", "last")),
        ):
            if value not in allowed:
                raise ValueError(f"AffineCoupling: {name}={value!r}, expected one of {', '.join(map(repr, allowed))}")
        if alpha is not None and scale != "tanh":
            raise ValueError(f'AffineCoupling: alpha goes with scale="tanh", not with scale={scale!r}')
        if alpha == "learn" and width is None:
            raise ValueError('AffineCoupling: alpha="learn" needs width, the number of transformed channels')
        if mask is not None and mask.dtype != torch.bool:
            raise TypeError(f"AffineCoupling: mask has dtype {mask.dtype}, expected torch.bool (True: passed through)")
        self.conditioner = conditioner
        self.scale, self.width, self.transform, self.layout = scale, width, transform, layout
        self.shift_first = shift_first
        self.register_buffer("mask", mask)
        self.alpha: Any = alpha
        if alpha == "learn":
            del self.alpha
            self.alpha = nn.Parameter(torch.ones(width or 1))

    def _width(self, x: Tensor) -> int:
        if self.mask is not None:
            return x.shape[1]
        width = x.shape[1] // 2 if self.width is None else self.width
        if not 0 < width <= x.shape[1]:
            raise ValueError(f"AffineCoupling: width={width} with {x.shape[1]} channels, expected 1 to that many")
        return width

    def _passed(self, x: Tensor) -> Tensor:
        """The channels that pass through (a view), or x masked."""
        if self.mask is not None:
            return torch.where(self.mask, x, 0)
        width = self._width(x)
        return x[:, width:] if self.transform == "first" else x[:, : x.shape[1] - width]

    def _params(self, x: Tensor, seen: Tensor, context: Tensor | None) -> Tensor:
        return conditioned(self.conditioner, seen, context, self._width(x), self.scale)

    def _couple(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return ops.affine_coupling(
            x,
            params,
            scale=self.scale,
            mask=self.mask,
            inverse=inverse,
            alpha=self.alpha,
            layout=self.layout,
            transform=self.transform,
            shift_first=self.shift_first,
        )

    def add_steps(self, builder: FlowBuilder) -> None:
        """Adds the conditioner and the map of the moved features to a program."""
        if self.mask is not None:
            raise LoweringError("AffineCoupling with a mask has no step of a flow program")
        x, additive = builder.features, self.scale == "additive"
        width = len(x) // 2 if self.width is None else self.width
        first = self.transform == "first"
        moved, passed = (x[:width], x[width:]) if first else (x[len(x) - width :], x[: len(x) - width])
        params = lower_network(self.conditioner, builder, passed, builder.context or None)
        if len(params) != (width if additive else 2 * width):
            raise LoweringError(f"AffineCoupling: its conditioner gives {len(params)} numbers for {width} features")
        interleaved = self.layout.endswith("interleaved")
        halves = (
            (params[::2], params[1::2]) if interleaved else (params[: len(params) // 2], params[len(params) // 2 :])
        )
        a, t = halves if self.layout.startswith("scale") else halves[::-1]
        if additive:
            a, t = [], params
        if self.scale == "tanh":
            factor = self.alpha
            if not isinstance(factor, Tensor):
                factor = torch.full((width,), 1.0 if factor is None else float(factor), dtype=builder.dtype)
            if factor.shape != (width,):
                raise LoweringError("AffineCoupling: alpha is not one number for each moved feature")
            a = builder.scale(builder.point("tanh", a), factor, None, kind="given", counts=False)
        y = builder.affine(
            moved,
            None if additive else a,
            t,
            scale="exp" if self.scale == "tanh" else self.scale,
            mode="shift_then_scale" if self.shift_first else "scale_then_shift",
            constant=math.log(1000) if self.scale == "softclamp" else 0.0,
        )
        builder.features = y + passed if first else passed + y

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._couple(x, self._params(x, self._passed(x), context), False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # The conditioner sees the same channels or positions of z as it did of x.
        return self._couple(z, self._params(z, self._passed(z), context), True)

    def rebuild(self, z: Tensor, context: Tensor | None = None) -> Rebuilt:
        """The conditioner runs once: what passes through is the same on both sides."""
        seen = self._passed(z).detach().requires_grad_()
        with torch.enable_grad():
            params = self._params(z, seen, context)
        with torch.no_grad():
            x = self._couple(z, params.detach(), True)[0]
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            again, logdet = self._couple(leaf, params, False)

        def gather(grads: Any) -> Tensor:
            dx, dseen = grads
            if self.mask is not None:
                result: Tensor = dx + torch.where(self.mask, dseen, 0)
                return result
            self._passed(dx).add_(dseen)  # dx is ours alone: the coupling's backward has just made it
            return dx  # type: ignore[no-any-return]

        return Rebuilt(x, (leaf, seen), again, logdet, gather)

    def extra_repr(self) -> str:
        masked = "" if self.mask is None else f", mask={tuple(self.mask.shape)}"
        first = ", shift_first=True" if self.shift_first else ""
        return f"scale={self.scale!r}, transform={self.transform!r}, layout={self.layout!r}{first}{masked}"


def conditioned(network: nn.Module, seen: Tensor, context: Tensor | None, width: int, scale: str) -> Tensor:
    """The conditioner's output, checked: an error here names the network, one in the op could not."""
    params: Tensor = network(seen) if context is None else network(seen, context)
    channels = width if scale == "additive" else 2 * width
    expected = (seen.shape[0], channels, *seen.shape[2:])
    if params.shape != expected:
        raise ValueError(
            f"AffineCoupling: the conditioner {type(network).__name__} returned {tuple(params.shape)} for an input of "
            f"{tuple(seen.shape)}, expected {tuple(expected)}"
        )
    return params


class GlowStep(Bijection):
    """One step of Glow, fused: activation norm, invertible 1x1 convolution and split as one pass, then the coupling.

    Takes a tensor, or a pair of channel halves (C // 2 channels first), and returns the same kind: in a chain of steps
    on pairs nothing is ever split or concatenated. The parameters are those of its parts, ``actnorm``, ``conv`` and
    ``coupling``, so their state_dicts load one by one. The first C // 2 channels are transformed.

    Args:
        channels: C >= 2.
        conditioner: maps (N, C - C // 2, ...) to (N, 2 (C // 2), ...).
        plu, scale, layout: as in :class:`InvertibleConv1x1` and :class:`AffineCoupling`.
        shift_first: the norm and the coupling shift before they scale, as in OpenAI's Glow, rosinality/glow-pytorch,
            y0ast/Glow-PyTorch and chaiyujin/glow-pytorch.

    Source: Glow (arXiv:1807.03039, section 3, figure 2a).

    Example:
        >>> import torch, genfast
        >>> step = genfast.nn.GlowStep(4, torch.nn.Conv2d(2, 4, 3, padding=1))
        >>> z, logdet = step(torch.randn(2, 4, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        conditioner: nn.Module,
        *,
        plu: bool = True,
        scale: Scale = "sigmoid",
        layout: Layout = "scale_shift",
        shift_first: bool = False,
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"GlowStep: channels={channels}, expected at least 2")
        self.channels, self.width = channels, channels // 2
        self.actnorm = ActNorm(channels, shift_first=shift_first)
        self.conv = InvertibleConv1x1(channels, plu=plu)
        self.coupling = AffineCoupling(
            conditioner, scale=scale, width=self.width, layout=layout, shift_first=shift_first
        )

    def stages(self, paired: bool) -> list[Any]:
        return [_Mix(self, paired), _Couple(self, paired)]

    def forward(self, x: State, context: Tensor | None = None) -> tuple[Any, Tensor]:
        if self.actnorm._pending and self.training:
            self.actnorm.initialize(x if isinstance(x, Tensor) else torch.cat(x, 1))
        return self._run(x, context, "forward", self.stages(not isinstance(x, Tensor)))

    def inverse(self, z: State, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return self._run(z, context, "inverse", self.stages(not isinstance(z, Tensor))[::-1])

    def _run(self, x: Any, context: Tensor | None, way: str, stages: list[Any]) -> tuple[Any, Tensor]:
        x, first = getattr(stages[0], way)(x, context)
        x, second = getattr(stages[1], way)(x, context)
        return x, first + second

    def extra_repr(self) -> str:
        return f"{self.channels}"


class _Mix:
    """The first half of a GlowStep: norm, convolution and split. Leaves a pair, takes one if ``paired``."""

    def __init__(self, step: GlowStep, paired: bool) -> None:
        self.step, self.paired = step, paired

    def modules(self) -> list[nn.Module]:
        return [*self.step.actnorm.modules(), *self.step.conv.modules()]

    def forward(self, x: State, context: Tensor | None) -> tuple[Any, Tensor]:
        return self._mix(x, False, self.step.width)

    def inverse(self, z: State, context: Tensor | None) -> tuple[Any, Tensor]:
        return self._mix(z, True, self.step.width if self.paired else None)

    def _mix(self, x: State, inverse: bool, split: int | None) -> tuple[Any, Tensor]:
        norm, weight = self.step.actnorm, self.step.conv.factors()
        if not norm.shift_first:
            return ops.actnorm_conv1x1(  # type: ignore[call-overload,no-any-return]
                x, norm.log_scale, norm.bias, weight, log_scale=True, split=split, inverse=inverse
            )
        if not inverse:
            x = self._shifted(x, norm.bias)
        y, logdet = ops.actnorm_conv1x1(  # type: ignore[call-overload]
            x, norm.log_scale, torch.zeros_like(norm.bias), weight, log_scale=True, split=split, inverse=inverse
        )
        return self._shifted(y, -norm.bias) if inverse else y, logdet

    @staticmethod
    def _shifted(x: State, by: Tensor) -> State:
        """x, or both halves of it, with ``by`` added to the channels."""
        if isinstance(x, Tensor):
            return x + by.reshape(-1, *[1] * (x.dim() - 2))
        first, second = by.split([x[0].shape[1], x[1].shape[1]])
        return _Mix._shifted(x[0], first), _Mix._shifted(x[1], second)  # type: ignore[return-value]

    def rebuild(self, z: State, context: Tensor | None) -> Rebuilt:
        return rebuild(self, z, context)


class _Couple:
    """The second half: the coupling on a pair, joined at the end unless ``paired``."""

    def __init__(self, step: GlowStep, paired: bool) -> None:
        self.step, self.paired = step, paired

    def modules(self) -> list[nn.Module]:
        return list(self.step.coupling.modules())

    def forward(self, x: tuple[Tensor, Tensor], context: Tensor | None) -> tuple[Any, Tensor]:
        y_a, logdet = self._couple(x[0], self._params(x[1], context), False)
        return self._joined(y_a, x[1]), logdet

    def inverse(self, z: State, context: Tensor | None) -> tuple[Any, Tensor]:
        z_a, z_b = self._halves(z)
        x_a, logdet = self._couple(z_a, self._params(z_b, context), True)
        return (x_a, z_b), logdet

    def rebuild(self, z: State, context: Tensor | None) -> Rebuilt:
        """The conditioner runs once: the second half is the same on both sides."""
        z_a, z_b = self._halves(z)
        x_b = z_b.detach().requires_grad_()
        with torch.enable_grad():
            params = self._params(x_b, context)
        with torch.no_grad():
            x_a, _ = self._couple(z_a, params.detach(), True)
        leaf = x_a.detach().requires_grad_()
        with torch.enable_grad():
            y_a, logdet = self._couple(leaf, params, False)
            again = self._joined(y_a, x_b)
        return Rebuilt((x_a, z_b), (leaf, x_b), again, logdet, lambda grads: (grads[0], grads[1]))

    def _params(self, x_b: Tensor, context: Tensor | None) -> Tensor:
        coupling = self.step.coupling
        return conditioned(coupling.conditioner, x_b, context, self.step.width, coupling.scale)

    def _couple(self, x_a: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        coupling = self.step.coupling
        return ops.affine_coupling(
            x_a, params, scale=coupling.scale, inverse=inverse, layout=coupling.layout, shift_first=coupling.shift_first
        )

    def _joined(self, y_a: Tensor, y_b: Tensor) -> State:
        return (y_a, y_b) if self.paired else torch.cat((y_a, y_b), 1)

    def _halves(self, z: State) -> tuple[Tensor, Tensor]:
        width = self.step.width
        return (z[:, :width], z[:, width:]) if isinstance(z, Tensor) else z
