"""Autoregressive and spline flows in plain PyTorch, as one would write them eagerly: the yardstick of :mod:`genfast.models`.

The modules have the signatures, the parameters and the state_dicts of those of genfast.nn under the same names; the models take
their layers from the class attribute ``layers``, as those of :mod:`genfast.reference.models` do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Uniform

from .flow import FixedBase, Flow
from .householder import householder
from .made import MADE
from .models import PLAIN, DiagonalGaussian, _add_context
from .spline import rational_quadratic_spline

AFFINE_SCALES = ("exp", "softclamp", "sigmoid", "additive")
TAILS = ("linear", "circular", None)
CONVENTIONS = ("nflows", "zuko")

# ---- what one number goes through, given its parameters ----


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

    def __call__(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """(y, logdet) of x (N, D, ...) and params (N, D, P, ...), logdet (N,)."""
        t = params.select(2, 0)
        if self.scale == "additive":
            log_s = torch.zeros_like(t)
        else:
            a = params.select(2, 1)
            if self.scale == "softclamp":
                log_s = a / (1 + a.abs() / math.log(1000))
            else:
                log_s = F.logsigmoid(a + 2) if self.scale == "sigmoid" else a
        total = log_s.flatten(1).sum(1)
        if self.normalising != inverse:
            return (x - t) * torch.exp(-log_s), -total
        return x * torch.exp(log_s) + t, total


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
            raise ValueError(f"spline: convention={self.convention!r}, expected one of {', '.join(map(repr, CONVENTIONS))}")
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

    def __call__(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """(y, logdet) of x (N, D, ...) and params (N, D, P, ...), logdet (N,)."""
        k, b = self.bins, self.bound
        options = (
            -b, b, -b, b, self.min_bin_width, self.min_bin_height, self.min_derivative, self.slope, self.logit_scale,
        )  # fmt: skip
        parts = params.movedim(2, -1).split((k, k, self.outputs - 2 * k), -1)
        y, logdet = rational_quadratic_spline(x, *parts, self.tails or "none", self.convention, inverse, options)
        return y, logdet.flatten(1).sum(1)


def univariate(kind: str, options: dict[str, Any]) -> AffineMap | SplineMap:
    """The map that ``transform`` and its options name."""
    kinds: dict[str, type[AffineMap] | type[SplineMap]] = {"affine": AffineMap, "spline": SplineMap}
    if kind not in kinds:
        raise ValueError(f"transform={kind!r}, expected 'affine' or 'spline'")
    unknown = [name for name in options if name not in kinds[kind].__dataclass_fields__]
    if unknown:
        raise TypeError(f"transform={kind!r} takes no {', '.join(unknown)}")
    return kinds[kind](**options)


# ---- plain layers ----


class Mapped(nn.Module):
    """A layer that puts numbers through ``self.map``."""

    map: AffineMap | SplineMap

    def _mapped(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.map(x, params, inverse)


class MaskedAutoregressive(Mapped):
    def __init__(self, network: nn.Module, *, transform: str = "affine", **options: Any) -> None:
        super().__init__()
        self.network = network
        self.map = univariate(transform, options)
        outputs = getattr(network, "outputs", self.map.outputs)
        if outputs != self.map.outputs:
            raise ValueError(
                f"MaskedAutoregressive: the network has outputs={outputs}, expected {self.map.outputs} for {self.map}"
            )

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        params: Tensor = self.network(x) if context is None else self.network(x, context)
        if params.shape != (*x.shape, self.map.outputs):
            raise ValueError(
                f"MaskedAutoregressive: the network {type(self.network).__name__} returned {tuple(params.shape)} for an input "
                f"of {tuple(x.shape)}, expected {(*x.shape, self.map.outputs)}"
            )
        return params

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(x, self._params(x, context), False)

    def inverse_plain(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass of the whole network per feature: after pass k, the first k of the order are right."""
        x = torch.zeros_like(z)
        logdet = z.new_zeros(z.shape[0])
        for _ in range(z.shape[1]):
            x, logdet = self._mapped(z, self._params(x, context), True)
        return x, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse_plain(z, context)


class Inverse(nn.Module):
    def __init__(self, bijection: nn.Module) -> None:
        super().__init__()
        self.bijection: Any = bijection

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        result: tuple[Any, Tensor] = self.bijection.inverse(x, context)
        return result

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        result: tuple[Any, Tensor] = self.bijection(z, context)
        return result


class SplineCoupling(Mapped):
    passed: Tensor | None
    moved: Tensor | None

    def __init__(
        self, conditioner: nn.Module, *, mask: Tensor | None = None, width: int | None = None,
        transform: Literal["first", "last"] = "first", **options: Any,
    ) -> None:  # fmt: skip
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
                    f"SplineCoupling: x has shape {tuple(x.shape)}, expected (N, {len(self.passed) + len(self.moved)}, ...)"
                )
            return x.index_select(1, self.moved), x.index_select(1, self.passed)
        width = x.shape[1] // 2 if self.width is None else self.width
        if not 0 < width < x.shape[1]:
            raise ValueError(f"SplineCoupling: width={width} with {x.shape[1]} features, expected 1 to {x.shape[1] - 1}")
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
                f"SplineCoupling: the conditioner {type(self.conditioner).__name__} returned {tuple(params.shape)} for an "
                f"input of {tuple(x_b.shape)}, expected {expected}: {self.map.outputs} for each of {x_a.shape[1]}"
            )
        y_a, logdet = self._mapped(x_a, params.unflatten(1, (x_a.shape[1], self.map.outputs)), inverse)
        return self._joined(x, y_a, x_b), logdet

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)


class Spline(Mapped):
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


class Permutation(nn.Module):
    order: Tensor

    def __init__(self, features: int, order: str | Sequence[int] | Tensor = "reversed") -> None:
        super().__init__()
        if isinstance(order, str):
            order = torch.randperm(features) if order == "random" else torch.arange(features).flip(0)
        self.register_buffer("order", torch.as_tensor(order, dtype=torch.int64).clone())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z[:, self.order.argsort()], z.new_zeros(z.shape[0])


class CircularShift(nn.Module):
    def __init__(self, features: int, *, bound: float = torch.pi) -> None:
        super().__init__()
        self.bound = bound
        self.shift = nn.Parameter((2 * torch.rand(features) - 1) * bound)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.remainder(x + self.shift + self.bound, 2 * self.bound) - self.bound, x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return torch.remainder(z - self.shift + self.bound, 2 * self.bound) - self.bound, z.new_zeros(z.shape[0])


class LULinear(nn.Module):
    perm: Tensor
    sign_s: Tensor

    def __init__(self, features: int, *, bias: bool = True, order: str | Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_s = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        self.register_buffer("perm", torch.arange(features) if order is None else Permutation(features, order).order)
        self.register_buffer("sign_s", torch.ones(features))

    def _triangles(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(self.perm), dtype=self.log_s.dtype, device=self.log_s.device)
        return self.lower.tril(-1) + eye, self.upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp())

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._triangles()
        return F.linear(x, (lower @ upper)[self.perm], self.bias), self.log_s.sum().expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._triangles()
        y = (z if self.bias is None else z - self.bias)[:, self.perm.argsort()].T
        y = torch.linalg.solve_triangular(lower, y, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, y, upper=True).T, -self.log_s.sum().expand(z.shape[0])


class Householder(nn.Module):
    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(features if reflections is None else reflections, features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.linear(x, householder(self.vectors)), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z @ householder(self.vectors), z.new_zeros(z.shape[0])


class BatchNormFlow(nn.Module):
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.log_gamma = nn.Parameter(torch.zeros(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(0), self.momentum)
        logdet = (self.log_gamma - 0.5 * (var + self.eps).log()).sum().expand(x.shape[0])
        return self.log_gamma.exp() * (x - mean) / (var + self.eps).sqrt() + self.beta, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            raise RuntimeError("BatchNormFlow: no inverse in training, where the statistics are the batch's own; call eval()")
        deviation = (self.running_var + self.eps).sqrt()
        x = (z - self.beta) * (-self.log_gamma).exp() * deviation + self.running_mean
        return x, (deviation.log() - self.log_gamma).sum().expand(z.shape[0])


AUTOREGRESSIVE = SimpleNamespace(
    **vars(PLAIN), BatchNormFlow=BatchNormFlow, CircularShift=CircularShift, Householder=Householder, Inverse=Inverse,
    LULinear=LULinear, MADE=MADE, MaskedAutoregressive=MaskedAutoregressive, Permutation=Permutation, Spline=Spline,
    SplineCoupling=SplineCoupling,
)  # fmt: skip


# ---- a conditioner, shared with genfast.models ----


class ResidualMLP(nn.Module):
    """A residual perceptron: linear, blocks h + W2 relu(W1 relu(h)), linear (NSF, appendix B.1). The last starts at zero.

    ``period`` p > 0 makes it a function of cos and sin of pi x / p, so that x and x + 2p are one point.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int, context: int = 0, period: float = 0.0) -> None:
        super().__init__()
        self.period = period
        self.first = nn.Linear(2 * inputs if period else inputs, hidden)
        self.blocks = nn.ModuleList(
            nn.ModuleList((nn.Linear(hidden, hidden), nn.Linear(hidden, hidden))) for _ in range(blocks)
        )
        self.last = nn.Linear(hidden, outputs)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.period:
            angle = x * (math.pi / self.period)
            x = torch.cat((angle.cos(), angle.sin()), 1)
        h = _add_context(self.first(x), self.context, context)
        for block in self.blocks:
            before, after = block.children()
            h = h + after(F.relu(before(F.relu(h)), inplace=True))
        result: Tensor = self.last(h)
        return result


# ---- the models ----

Hidden = int | Sequence[int]


def _widths(hidden: Hidden, depth: int) -> list[int]:
    return [hidden] * depth if isinstance(hidden, int) else [int(h) for h in hidden]


class _Autoregressive(Flow):
    """What the three have in common: the norms between the transforms, and the orders."""

    layers: Any = AUTOREGRESSIVE

    def __init__(self, dim: int, base: nn.Module, steps: Sequence[nn.Module], config: dict[str, Any]) -> None:
        super().__init__(base, steps, shape=(dim,))
        self.config = config

    @classmethod
    def _checked(cls, dim: int, transforms: int, order: str, norm: str | None) -> None:
        if dim < 1 or transforms < 1:
            raise ValueError(f"{cls.__name__}: dim={dim} and transforms={transforms}, expected at least 1")
        if order not in ("alternating", "random"):
            raise ValueError(f"{cls.__name__}: order={order!r}, expected 'alternating' or 'random'")
        if norm not in ("act", "batch", None):
            raise ValueError(f"{cls.__name__}: norm={norm!r}, expected 'act', 'batch' or None")

    @classmethod
    def _norms(cls, dim: int, norm: str | None) -> list[nn.Module]:
        if norm is None:
            return []
        return [cls.layers.ActNorm(dim) if norm == "act" else cls.layers.BatchNormFlow(dim)]

    @classmethod
    def _made(
        cls,
        dim: int,
        i: int,
        order: str,
        hidden: Hidden,
        depth: int,
        outputs: int,
        context: int,
        residual: bool,
        activation: str,
    ) -> nn.Module:
        """The network of transform i; orders alternate between first to last and last to first, or are random."""
        places = "random" if order == "random" else "natural" if i % 2 == 0 else "reversed"
        made: nn.Module = cls.layers.MADE(
            dim,
            _widths(hidden, depth),
            outputs=outputs,
            context=context,
            order=places,
            residual=residual,
            activation=activation,
        )
        return made


class MAF(_Autoregressive):
    """Masked autoregressive flow: z_i = (x_i - mu_i) e^-alpha_i, mu and alpha functions of the x before i (arXiv:1705.07057).

    log_prob is one parallel pass; a sample costs about as much, since each hidden unit is computed once, in degree order.

    Args:
        dim: D; data are (N, D).
        transforms: how many; their orders alternate between first to last and last to first.
        hidden, depth: widths of the masked networks: ``depth`` layers of ``hidden`` units, or a list of widths.
        context: size of a conditioning vector; 0 for none.
        order: "alternating" or "random".
        norm: before each transform: "act" (:class:`genfast.nn.ActNorm`), "batch" (:class:`genfast.nn.BatchNormFlow`, the
            paper's, section 3.4) or None.
        scale: "softclamp" (alpha stays within log 1000), "exp" (the paper's: alpha as it is), "sigmoid" or "additive".
        residual, activation: of :class:`genfast.nn.MADE`.
    """

    def __init__(
        self, dim: int, *, transforms: int = 5, hidden: Hidden = 256, depth: int = 2, context: int = 0,
        order: str = "alternating", norm: str | None = "act", scale: str = "softclamp", residual: bool = False,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        config = dict(
            dim=dim, transforms=transforms, hidden=hidden, depth=depth, context=context, order=order, norm=norm, scale=scale,
            residual=residual, activation=activation,
        )  # fmt: skip
        self._checked(dim, transforms, order, norm)
        steps = []
        outputs = AffineMap(scale).outputs
        for i in range(transforms):
            steps += self._norms(dim, norm)
            network = self._made(dim, i, order, hidden, depth, outputs, context, residual, activation)
            steps.append(self.layers.MaskedAutoregressive(network, transform="affine", scale=scale))
        super().__init__(dim, DiagonalGaussian(dim, trainable=False), steps, config)


class IAF(_Autoregressive):
    """Inverse autoregressive flow: x_i = s_i z_i + m_i, (s_i, m_i) a function of the z before i (arXiv:1606.04934).

    A sample and its log_prob are one parallel pass (``sample_and_log_prob``, for variational inference); log_prob of given data
    goes through the degree-ordered inverse. Both have gradients.

    Args:
        dim, transforms, hidden, depth, context, order, residual, activation: as in :class:`MAF`.
        norm: None, as reverse-KL training has no data to start "act" from; "act" for training on data.
        scale: s = e^alpha with "softclamp" or "exp"; "sigmoid": s = sigmoid(alpha + 2), a gate as the paper's
            (algorithm 1), open at the start.
    """

    def __init__(
        self, dim: int, *, transforms: int = 5, hidden: Hidden = 256, depth: int = 2, context: int = 0,
        order: str = "alternating", norm: str | None = None, scale: str = "softclamp", residual: bool = False,
        activation: str = "relu",
    ) -> None:  # fmt: skip
        config = dict(
            dim=dim, transforms=transforms, hidden=hidden, depth=depth, context=context, order=order, norm=norm, scale=scale,
            residual=residual, activation=activation,
        )  # fmt: skip
        self._checked(dim, transforms, order, norm)
        if norm == "batch":
            raise ValueError("IAF: norm='batch' has no inverse in training, which sampling is; expected 'act' or None")
        steps = []
        outputs = AffineMap(scale).outputs
        for i in range(transforms):
            steps += self._norms(dim, norm)
            network = self._made(dim, i, order, hidden, depth, outputs, context, residual, activation)
            inner = self.layers.MaskedAutoregressive(network, transform="affine", scale=scale, normalising=False)
            steps.append(self.layers.Inverse(inner))
        super().__init__(dim, DiagonalGaussian(dim, trainable=False), steps, config)


class NSF(_Autoregressive):
    """Neural spline flow: each feature goes through a rational-quadratic spline (arXiv:1906.04032).

    Args:
        dim: D; data are (N, D).
        coupling: "coupling": one half moves by a function of the other, in turn, with a residual conditioner; "autoregressive":
            each moves by a function of those before it.
        transforms: how many.
        bins, bound, tails, convention: of the splines. tails="circular": data are angles in [-bound, bound), the base is
            uniform, and a learned turn stands before each transform (arXiv:2002.02428).
        hidden, depth: of the conditioners: widths of a MADE, or ``depth`` residual blocks of ``hidden`` units.
        context: size of a conditioning vector; 0 for none.
        mixing: before each transform: "lu" (:class:`genfast.nn.LULinear` after a random permutation, the paper's section
            3.3), "permutation" (random), or None: couplings then move the halves in turn, and orders alternate.
        order: "alternating" or "random", of the autoregressive ones.
        norm: before each transform: "act", "batch" or None; None too for circular tails.
        residual: whether the autoregressive networks are.
    """

    def __init__(
        self, dim: int, *, coupling: Literal["coupling", "autoregressive"] = "coupling", transforms: int = 5, bins: int = 8,
        bound: float | None = None, tails: Literal["linear", "circular"] = "linear", convention: str = "nflows",
        hidden: Hidden = 128, depth: int = 2, context: int = 0, mixing: str | None = None, order: str = "alternating",
        norm: str | None = "act", residual: bool = False, activation: str = "relu",
    ) -> None:  # fmt: skip
        if not _widths(hidden, depth):
            raise ValueError(f"NSF: hidden={hidden} and depth={depth}, expected at least one layer")
        if coupling not in ("coupling", "autoregressive"):
            raise ValueError(f"NSF: coupling={coupling!r}, expected 'coupling' or 'autoregressive'")
        if tails not in ("linear", "circular"):
            raise ValueError(f"NSF: tails={tails!r}, expected 'linear' or 'circular'")
        if coupling == "coupling" and (dim < 2 or not isinstance(hidden, int)):
            raise ValueError(f"NSF: dim={dim} and hidden={hidden} with couplings, expected at least 2 and one width")
        if mixing not in ("lu", "permutation", None) or (mixing == "lu" and tails == "circular"):
            raise ValueError(f"NSF: mixing={mixing!r}, expected 'lu' (for linear tails), 'permutation' or None")
        self._checked(dim, transforms, order, norm)
        circular = tails == "circular"
        bound = (math.pi if circular else 5.0) if bound is None else float(bound)
        norm = None if circular else norm
        config = dict(
            dim=dim, coupling=coupling, transforms=transforms, bins=bins, bound=bound, tails=tails, convention=convention,
            hidden=hidden, depth=depth, context=context, mixing=mixing, order=order, norm=norm, residual=residual,
            activation=activation,
        )  # fmt: skip
        # So that wide conditioners do not start with narrow bins (the paper's code); zuko clips the logits in its stead.
        scale = _widths(hidden, depth)[-1] ** -0.5 if convention == "nflows" else 1.0
        options = dict(bins=bins, bound=bound, tails=tails, convention=convention, logit_scale=scale)
        spline = SplineMap(**options)  # type: ignore[arg-type]
        steps: list[nn.Module] = []
        for i in range(transforms):
            steps += [self.layers.CircularShift(dim, bound=bound)] if circular else self._norms(dim, norm)
            if mixing is not None:
                mix = self.layers.LULinear if mixing == "lu" else self.layers.Permutation
                steps.append(mix(dim, order="random"))
            if coupling == "autoregressive":
                network = self._made(dim, i, order, hidden, depth, spline.outputs, context, residual, activation)
                steps.append(self.layers.MaskedAutoregressive(network, transform="spline", **options))
                continue
            transform, width = ("first", dim // 2) if i % 2 == 0 else ("last", dim - dim // 2)
            assert isinstance(hidden, int)
            conditioner = ResidualMLP(dim - width, width * spline.outputs, hidden, depth, context, bound if circular else 0.0)
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
