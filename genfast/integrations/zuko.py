"""Our kernels in zuko's modules, and in the transforms that they make."""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import zuko
import zuko.flows.spline
from torch import Tensor, nn
from torch.distributions.transforms import Transform, _InverseTransform
from zuko import transforms as zt
from zuko.utils import broadcast, unpack

from .. import ops
from .._derived import derived, recorded
from ..programs import Layer
from . import _whole_flow as whole_flow
from . import _zuko_program as program
from ._class_swap import Swapped, covered, of_library, plain_call
from ._masked_networks import activation_name, layer_of, masked_product, no_staircase, solve, staircase

TRANSFORMS = zuko.lazy.LazyTransform
CONTAINERS = (zuko.lazy.LazyComposedTransform, zuko.lazy.LazyInverse)
_SLOPE = 1e-3  # the only one of ops.affine_coupling


def why_left(module: nn.Module) -> str:
    if isinstance(module, zuko.lazy.UnconditionalTransform):
        return "a transform without a network: nothing to gain"
    return "genfast has no kernel for it"


# ---- the univariate transforms ----


class Univariate(NamedTuple):
    """A univariate transform that our ops have."""

    kind: str  # affine, spline or circular
    bins: int = 0
    bound: float = 0.0
    slope: float = _SLOPE

    def solved_by(self) -> tuple[str, dict[str, Any]] | None:
        """The engine's transform and its options."""
        if self.kind == "affine":
            return "affine:softclamp", {"slope": self.slope}
        if self.kind == "spline":
            return "spline", {"bins": self.bins, "bound": self.bound, "slope": self.slope, "convention": "zuko"}
        return None


def univariate_of(module: Any) -> Univariate | None:
    """Which of ours ``module.univariate`` is, with what it was given; None where it is none."""
    function = module.univariate
    given: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        if function.args:
            return None
        given = {**function.keywords, **given}
        function = function.func
    slope = given.pop("slope", _SLOPE)
    shapes = [tuple(s) for s in module.shapes]
    if function is zt.MonotonicAffineTransform and not given and shapes == [(), ()]:
        return Univariate("affine", slope=slope)
    bins = shapes[0][0] if shapes and shapes[0] else 0
    if not 2 <= bins <= 64 or shapes != [(bins,), (bins,), (bins - 1,)]:
        return None
    if function is zt.MonotonicRQSTransform and set(given) <= {"bound"}:
        return Univariate("spline", bins, given.get("bound", 5.0), slope)
    if function is zuko.flows.spline.CircularRQSTransform and not given:
        return Univariate("circular", bins, math.pi, slope)
    return None


def _shifted(x: Tensor, bound: float) -> Tensor:
    return torch.remainder(x, 2 * bound) - bound


def _apply(u: Univariate, x: Tensor, phi: Tensor, inverse: bool) -> tuple[Tensor, Tensor] | None:
    """(y, ladj) with x (*, D), phi (*, D, P), ladj (*); None where the ops do not cover the call."""
    if not covered(x, phi) or (u.kind == "affine" and u.slope != _SLOPE):
        return None
    if u.kind == "affine":
        shape = torch.broadcast_shapes(x.shape, phi.shape[:-1])
        size = shape[-1]
        rows, params = x.expand(shape).reshape(-1, size), phi.expand(*shape, 2).reshape(-1, 2 * size)
        y, ladj = ops.affine_coupling(
            rows, params, scale="softclamp", layout="shift_scale_interleaved", inverse=inverse
        )
        return y.reshape(shape), ladj.reshape(shape[:-1])
    if u.kind == "circular" and not inverse:
        x = _shifted(x, u.bound)
    y, ladj = ops.rational_quadratic_spline_packed(
        x, phi, u.bins, bound=u.bound, slope=u.slope, convention="zuko", inverse=inverse
    )
    if u.kind == "circular" and inverse:
        y = _shifted(y, u.bound)
    return y, ladj.sum(-1)


class DependentTransform(zt.DependentTransform):  # type: ignore[misc]
    """zuko's, whose univariate transform is made of ``phi`` (*, D, P) only where the ops do not serve."""

    def __init__(self, univariate: Univariate, phi: Tensor, make: Any) -> None:
        Transform.__init__(self)
        self.univariate = univariate
        self.phi = phi
        self.make = make
        self.reinterpreted = 1

    @functools.cached_property
    def base(self) -> Any:
        return self.make(self.phi)

    @property
    def inv(self) -> Any:
        return _InverseDependent(self)

    def _call(self, x: Tensor) -> Any:
        found = _apply(self.univariate, x, self.phi, False)
        return super()._call(x) if found is None else found[0]

    def _inverse(self, y: Tensor) -> Any:
        found = _apply(self.univariate, y, self.phi, True)
        return super()._inverse(y) if found is None else found[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Any:
        return self.call_and_ladj(x)[1]

    def call_and_ladj(self, x: Tensor) -> Any:
        found = _apply(self.univariate, x, self.phi, False)
        return super().call_and_ladj(x) if found is None else found


class _InverseDependent(zt.DependentTransform):  # type: ignore[misc]
    def __init__(self, forward: DependentTransform) -> None:
        Transform.__init__(self)
        self.forward = forward
        self.reinterpreted = 1

    @property
    def base(self) -> Any:
        return self.forward.base.inv

    @property
    def inv(self) -> Any:
        return self.forward

    def _call(self, y: Tensor) -> Any:
        return self.forward._inverse(y)

    def _inverse(self, x: Tensor) -> Any:
        return self.forward._call(x)

    def call_and_ladj(self, y: Tensor) -> Any:
        found = _apply(self.forward.univariate, y, self.forward.phi, True)
        return super().call_and_ladj(y) if found is None else found


_InverseDependent.__name__ = "DependentTransform"


class _Inverse(_InverseTransform):  # type: ignore[misc]
    """An inverse that gives its log-determinant without a second pass."""

    def call_and_ladj(self, y: Tensor) -> Any:
        forward: Any = self._inv
        found = forward.inverse_and_ladj(y)
        return super().call_and_ladj(y) if found is None else found  # type: ignore[misc]


_Inverse.__name__ = "Inverse"


def _inverse_of(transform: Any) -> Any:
    """What ``Transform.inv`` does, with the inverse above."""
    found = None if transform._inv is None else transform._inv()
    if found is None:
        found = _Inverse(transform)
        transform._inv = weakref.ref(found)
    return found


# ---- masked autoregressive transforms ----


class AutoregressiveTransform(zt.AutoregressiveTransform):  # type: ignore[misc]
    """zuko's, whose inverse is one sweep in the order of degrees."""

    def __init__(self, module: Any, context: Tensor | None) -> None:
        super().__init__(functools.partial(module.meta, context), module.passes)
        self.module, self.context, self.kept = module, context, module.kept()

    @property
    def inv(self) -> Any:
        return _inverse_of(self)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor] | None:
        return _solve(self.kept, self.module, self.context, y)

    def _inverse(self, y: Tensor) -> Any:
        found = self.inverse_and_ladj(y)
        return super()._inverse(y) if found is None else found[0]


class MaskedMLP(Swapped):
    peer = zuko.nn.MaskedMLP
    what = "products over live weights, relu fused"
    stands_for = ("forward",)

    @classmethod
    def refuses(cls, module: Any) -> str:
        if all(no_staircase(m) for m in module.modules() if isinstance(m, zuko.nn.MaskedLinear)):
            return "no sorting makes its masks staircases"
        return ""

    @classmethod
    def falls_back(cls, module: Any) -> str:
        linear = [m for m in module.modules() if isinstance(m, zuko.nn.MaskedLinear)]
        rest = sum(no_staircase(m) for m in linear)
        return f"{rest} of its {len(linear)} masks are no staircases, and multiply their weights" if rest else ""

    def fill(self: Any) -> None:
        for m in self.modules():
            if type(m) is zuko.nn.MaskedLinear:
                staircase(self.kept(), m)

    def forward(self: Any, x: Tensor) -> Any:
        return _run(self.kept(), self, x)


def _run(kept: dict[Any, Any], sequence: Any, x: Tensor) -> Any:
    """Calls the modules one after the other; masked layers without hooks as products over live weights."""
    children = list(sequence)
    i = 0
    while i < len(children):
        child = children[i]
        i += 1
        y = None
        if type(child) is zuko.nn.MaskedLinear and plain_call(child):
            relu = i < len(children) and type(children[i]) is nn.ReLU and plain_call(children[i])
            y = masked_product(kept, child, x, "relu" if relu else "none")
            i += relu and y is not None
        elif type(child) is zuko.nn.Residual and plain_call(child):
            y = x + _run(kept, child, x)
        x = child(x) if y is None else y
    return x


def _layers(hyper: Any, features: int, context: Tensor | None, lead: tuple[int, ...] = ()) -> list[Layer] | None:
    """The engine's layers, for a batch of shape ``lead``; None where the network holds something else."""
    layers: list[Layer] = []

    def add(sequence: Any, at: int) -> int | None:
        """From output ``at``; returns the last output's number."""
        pending = "none"
        for child in sequence:
            if type(child) is zuko.nn.MaskedLinear and plain_call(child):
                layer = layer_of(child, source=at, before=pending)
                if at == 0:
                    mask = child.mask
                    layer.weight, layer.mask = child.weight[:, :features], mask[:, :features]
                    if context is not None:
                        added = F.linear(context, mask[:, features:] * child.weight[:, features:])
                        layer.context = added.expand(*lead, -1).reshape(-1, added.shape[-1])
                layers.append(layer)
                at, pending = len(layers), "none"
            elif type(child) is zuko.nn.Residual and plain_call(child) and pending == "none" and at:
                start = at
                end = add(child, at)
                if end is None or end == start:
                    return None
                layers[-1].residual = start
                at = end
            else:
                name = activation_name(child)
                if name is None or pending != "none" or not at:
                    return None
                pending = name
        return at if pending == "none" else None

    return layers if plain_call(hyper) and of_library(hyper) and add(hyper, 0) else None


class _Conditioned(Swapped):
    """A transform of univariate ones whose parameters a network gives.

    A distribution that was made before :func:`restore` goes on with these methods on a module that has its own class
    again, so they call functions and the peer's class by name, and no method of a mixin.
    """

    def meta(self: Any, c: Tensor | None, x: Tensor) -> Any:
        univariate = univariate_of(self)
        if univariate is None:
            peer = zuko.flows.MaskedAutoregressiveTransform
            if isinstance(self, zuko.flows.GeneralCouplingTransform):
                peer = zuko.flows.GeneralCouplingTransform
            return peer.meta(self, c, x)
        return _conditioned(self, univariate, c, x)


class MaskedAutoregressive(_Conditioned):
    peer = zuko.flows.MaskedAutoregressiveTransform
    what = "transform and log-determinant in one pass"
    stands_for = ("forward", "meta")

    @classmethod
    def does(cls, module: Any) -> str:
        return cls.what if cls.falls_back(module) else f"{cls.what}, inverse in the order of degrees"

    @classmethod
    def refuses(cls, module: Any) -> str:
        if univariate_of(module) is None:
            return "its univariate transform has no kernel (its network is served by itself)"
        return ""

    @classmethod
    def falls_back(cls, module: Any) -> str:
        univariate = univariate_of(module)
        if univariate is None or univariate.solved_by() is None:
            return "the inverse makes its passes: the engine does not have its univariate transform"
        if _layers(module.hyper, _features(module), None) is None:
            return "the inverse makes its passes: the engine does not have a layer of its network"
        return ""

    def forward(self: Any, c: Tensor | None = None) -> Any:
        return AutoregressiveTransform(self, c)


def _solve(kept: dict[Any, Any], module: Any, c: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor] | None:
    """(x, ladj) through the engine; None where it does not cover the call."""
    univariate = univariate_of(module)
    way = None if univariate is None else univariate.solved_by()
    features = _features(module)
    if (
        way is None
        or torch.compiler.is_compiling()
        or not covered(y, c, module.hyper[0].weight)
        or y.dim() == 0
        or y.shape[-1] != features
    ):
        return None
    lead = y.shape[:-1] if c is None else torch.broadcast_shapes(y.shape[:-1], c.shape[:-1])
    layers = _layers(module.hyper, features, c, lead)
    if layers is None:
        return None
    context = None if c is None else c.expand(*lead, c.shape[-1]).reshape(-1, c.shape[-1])[:1].detach()

    def again(m: Any, x: Tensor, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        by = zuko.flows.MaskedAutoregressiveTransform.meta(m, None if context is None else context.to(dtype), x)
        solved: tuple[Tensor, Tensor] = by.inv.call_and_ladj(z)
        return solved

    rows = y.expand(*lead, features).reshape(-1, features)
    found = solve(kept, layers, rows, *way, module, module.hyper, again)
    return None if found is None else (found[0].reshape(*lead, features), found[1].reshape(lead))


def _features(module: Any) -> int:
    features: int = module.hyper.out_features // module.total
    return features


def _conditioned(module: Any, univariate: Univariate, c: Tensor | None, x: Tensor) -> DependentTransform:
    """zuko's ``meta``, with the parameters left in one piece."""
    if c is not None:
        x = torch.cat(broadcast(x, c, ignore=1), dim=-1)
    return _dependent(module, univariate, module.hyper(x))


def _dependent(module: Any, univariate: Univariate, phi: Tensor) -> DependentTransform:
    make, shapes = module.univariate, module.shapes
    return DependentTransform(univariate, phi.unflatten(-1, (-1, module.total)), lambda p: make(*unpack(p, shapes)))


# ---- coupling and elementwise transforms ----


class CouplingTransform(zt.CouplingTransform):  # type: ignore[misc]
    """zuko's, with the two halves' places found once."""

    def __init__(self, module: Any, context: Tensor | None, places: tuple[Tensor, Tensor, Tensor]) -> None:
        Transform.__init__(self)
        self.meta = functools.partial(module.meta, context)
        self.idx_a, self.idx_b, self.back = places

    @property
    def inv(self) -> Any:
        return _inverse_of(self)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not x.dim() or x.shape[-1] != len(self.back):
            # zuko's own lets columns go that no index names, and leaves them unwritten in what it returns.
            raise ValueError(
                f"GeneralCouplingTransform: x has shape {tuple(x.shape)}, expected a last axis of {len(self.back)} "
                "features"
            )
        return x.index_select(-1, self.idx_a), x.index_select(-1, self.idx_b)

    def merge(self, x_a: Tensor, x_b: Tensor, shape: Any) -> Any:
        if x_a.shape[:-1] != x_b.shape[:-1] or x_a.dtype != x_b.dtype:
            return super().merge(x_a, x_b, shape)
        return torch.cat((x_a, x_b), -1).index_select(-1, self.back)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y_a, y_b = self.split(y)
        x_b, ladj = self.meta(y_a).inv.call_and_ladj(y_b)
        return self.merge(y_a, x_b, y.shape), ladj


class GeneralCoupling(_Conditioned):
    peer = zuko.flows.GeneralCouplingTransform
    what = "transform and log-determinant in one pass"
    stands_for = ("forward", "meta")

    @classmethod
    def refuses(cls, module: Any) -> str:
        return "its univariate transform has no kernel" if univariate_of(module) is None else ""

    def fill(self: Any) -> None:
        self.places()

    def forward(self: Any, c: Tensor | None = None) -> Any:
        places = self.places()
        return super().forward(c) if places is None else CouplingTransform(self, c, places)  # type: ignore[misc]

    def places(self: Any) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the features lie that pass, those that move, and each in both side by side; None where it cannot be
        read."""
        mask: Tensor = self.mask

        def make() -> tuple[Tensor, Tensor, Tensor]:
            a, b = mask.nonzero().squeeze(-1), (~mask).nonzero().squeeze(-1)
            return a, b, torch.cat((a, b)).argsort()

        return derived(self.kept(), "places", (mask,), make)


class ElementWise(Swapped):
    peer = zuko.flows.ElementWiseTransform
    what = "transform and log-determinant in one pass"
    stands_for = ("forward",)

    @classmethod
    def refuses(cls, module: Any) -> str:
        if univariate_of(module) is None:
            return "its univariate transform has no kernel"
        return "" if hasattr(module, "hyper") else "a transform without a network: nothing to gain"

    def forward(self: Any, c: Tensor | None = None) -> Any:
        univariate = univariate_of(self)
        if c is None or univariate is None:
            return super().forward(c)  # type: ignore[misc]
        return _dependent(self, univariate, self.hyper(c))


# ---- whole flows ----


class Flow(Swapped):
    peer = zuko.lazy.Flow
    what = whole_flow.WHAT
    stands_for = ("forward",)

    @classmethod
    def falls_back(cls, module: Any) -> str:
        return whole_flow.reason(*program.sizes(module), lambda builder: program.lower(module, univariate_of, builder))

    def forward(self: Any, c: Tensor | None = None) -> Any:
        if torch.compiler.is_compiling() or recorded():
            return super().forward(c)  # type: ignore[misc]
        return program.NormalizingFlow(self, c)

    def whole(self: Any, x: Tensor, c: Tensor | None) -> Tensor | None:
        """log p(x | c) of one program, or None where the transforms must be called one by one."""
        features = program.features_of(self)
        rows = None if features is None else program.rows_of(x, c, features)
        if rows is None:
            return None

        def plain(x: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
            by = program.peer_forward(self, c)
            z, ladj = by.transform.call_and_ladj(x)
            return z, by.base.log_prob(z) + ladj

        lowering = functools.partial(program.lower, self, univariate_of)
        found = whole_flow.whole_log_prob(self, [self], lowering, plain, *rows[:2])
        return None if found is None else found.reshape(rows[2])


SWAPS: tuple[type[Swapped], ...] = (Flow, MaskedMLP, MaskedAutoregressive, GeneralCoupling, ElementWise)
