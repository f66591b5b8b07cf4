"""Rules of elementwise activations, maxima and softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tensors import memory_format
from ..ops.activation import OP_APPLY, OP_CHAIN, OP_LEAKY, OP_SECOND, apply_bits_, leaky_relu_bits_
from .arithmetic import scale
from .autograd_rule import otherwise
from .handlers import T, functions_named, handles, named_arguments
from .in_place import may_overwrite, overwritten
from .sweeps import Sweeps, add_rows
from .tape import HANDLERS, Handler, Maybe, Rule, Tape

LEAKY_RELU_BITS, APPLY_BITS = OP_LEAKY.direct, OP_APPLY.direct
ACTIVATION_CHAIN, ACTIVATION_SECOND = OP_CHAIN.direct, OP_SECOND.direct


class SignMask(Rule):
    """y = x where x > 0, else slope x: one bit an element is kept."""

    kind = "exact, sign mask"
    prefix = True

    def __init__(self, x: Tensor, slope: float, place: Tensor | None) -> None:
        self.slope, self.shape, self.format = slope, x.shape, memory_format(x)
        self.y: Maybe
        if place is not None and place.is_contiguous(memory_format=self.format):
            self.bits, self.y = leaky_relu_bits_(place, slope), place
        else:
            self.y, self.bits = LEAKY_RELU_BITS(x, slope)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis

    def _apply(self, g: Tensor, own: bool) -> Tensor:
        bits = self.bits if g.shape == self.shape else self.bits[: (g.numel() + 7) // 8]
        if g.is_contiguous(memory_format=self.format):
            return apply_bits_(g, bits, self.slope) if own else APPLY_BITS(g, bits, self.slope)
        return apply_bits_(g.contiguous(memory_format=self.format), bits, self.slope)

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._apply(g[0], sweeps.may_overwrite)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        return [self._apply(t[0], sweeps.may_overwrite) if wanted and t[0] is not None else None]


def _sign_mask(default: float, fixed: bool = False, in_place: bool = False) -> Handler:
    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "out" in kwargs:
            return otherwise(tape, func, args, kwargs)
        if fixed:
            x, inplace = named_arguments(args, kwargs, ("input", "inplace"), (in_place,))
            slope = default
        else:
            x, slope, inplace = named_arguments(
                args, kwargs, ("input", "negative_slope", "inplace"), (default, in_place)
            )
        own = bool(inplace) and may_overwrite(tape, func, x)
        value = x.data if own else x.detach()  # what is written through ``data`` counts no version
        if value.is_cpu and value.element_size() < 4:  # no kernel packs the bits of these
            rule: Rule = Masked(value > 0, slope)
            y: Any = F.leaky_relu(value, slope)
        else:
            rule = SignMask(value, slope, value if own else None)
            y, rule.y = rule.y, None
        if inplace:
            return overwritten(tape, rule, (x,), x, y)
        return tape.record(rule, (x,), y)

    return handler


for _f in (F.relu, torch.relu, T.relu):
    HANDLERS[_f] = _sign_mask(0.0, fixed=True)
for _f in (T.relu_, torch.relu_, F.relu_):
    HANDLERS[_f] = _sign_mask(0.0, fixed=True, in_place=True)
HANDLERS[F.leaky_relu] = _sign_mask(0.01)
HANDLERS[F.leaky_relu_] = _sign_mask(0.01, in_place=True)


class Gather(Rule):
    """Values at saved positions of each map: maximum pooling."""

    kind = "exact, saved positions"

    def __init__(self, x: Tensor, y: Tensor, indices: Tensor, axes: int) -> None:
        self.shape, self.to, self.indices, self.axes = x.shape, y.shape, indices.flatten(-axes), axes

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        found = b.new_zeros(self.shape).flatten(-self.axes)
        return [found.scatter_add_(-1, self.indices, b.flatten(-self.axes)).view(self.shape)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if not wanted or t[0] is None:
            return [None]
        return [t[0].flatten(-self.axes).gather(-1, self.indices).view(self.to)]


def _max_pool(n: int, with_indices: Any) -> Handler:
    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["input"]
        if kwargs.get("return_indices") or len(args) > 6 or x.dim() != n + 2:
            return otherwise(tape, func, args, kwargs)
        options = {k: v for k, v in kwargs.items() if k not in ("input", "return_indices")}
        y, indices = with_indices(x.detach(), *args[1:], **options)
        return tape.record(Gather(x, y, indices, n), (x,), y)

    return handler


for _n in (1, 2, 3):
    HANDLERS[getattr(F, f"max_pool{_n}d")] = _max_pool(_n, getattr(F, f"max_pool{_n}d_with_indices"))
    HANDLERS[getattr(F, f"adaptive_max_pool{_n}d")] = _max_pool(_n, getattr(F, f"adaptive_max_pool{_n}d_with_indices"))


@handles(torch.abs, T.abs, T.__abs__)
def _abs(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return scale(tape, args[0], args[0].detach().sign())


@handles(F.prelu, torch.prelu, T.prelu)
def _prelu(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, slope = named_arguments(args, kwargs, ("input", "weight"), ())
    if tape.slot(x) < 0 or tape.slot(slope) >= 0 or x.dim() < 2:
        return otherwise(tape, func, args, kwargs)
    with torch.enable_grad():
        factor = torch.where(x.detach() > 0, 1.0, slope.view(1, -1, *(1,) * (x.dim() - 2)))
    return scale(tape, x, factor)


@handles(F.hardtanh, F.relu6)
def _hardtanh(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is F.relu6:
        (x, inplace), low, high = named_arguments(args, kwargs, ("input", "inplace"), (False,)), 0.0, 6.0
    else:
        x, low, high, inplace = named_arguments(
            args, kwargs, ("input", "min_val", "max_val", "inplace"), (-1.0, 1.0, False)
        )
    if inplace:
        may_overwrite(tape, func, x)
    v = x.detach()
    rule, y = Masked((v > low) & (v < high)), v.clamp(low, high)
    return overwritten(tape, rule, (x,), x, y) if inplace else tape.record(rule, (x,), y)


class Masked(Rule):
    """y' = 1 under the mask, else slope."""

    kind = "exact, mask"
    prefix = True

    def __init__(self, mask: Tensor, slope: float = 0.0) -> None:
        self.mask, self.slope = mask, slope

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis

    def _apply(self, g: Tensor) -> Tensor:
        mask = self.mask[: g.shape[0]] if self.mask.dim() else self.mask
        return torch.where(mask, g, g * self.slope) if self.slope else g * mask

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._apply(g[0])]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        return [self._apply(t[0]) if wanted and t[0] is not None else None]


class SymmetricJacobian(Rule):
    """A smooth function whose Jacobian is symmetric, so that chain and tangent multiply by it alike: ``_times``."""

    def __init__(self) -> None:
        self.saved: tuple[Maybe, Maybe] = (None, None)

    def _times(self, g: Tensor) -> Tensor:
        raise NotImplementedError

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._times(g[0])]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        self.saved = (b[0], t[0])
        return [self._times(t[0]) if wanted and t[0] is not None else None]


class Softmax(SymmetricJacobian):
    """y = softmax(x): J = diag(y) - y y^T, symmetric; d<b, J t>/dx = J (b t - b <y, t> - t <y, b>)."""

    kind = "exact, smooth (softmax)"
    curved = True
    prefix = True

    def __init__(self, y: Tensor, dim: int) -> None:
        super().__init__()
        self.y, self.dim = y, dim
        self.per_sample = dim % y.dim() != 0

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if self.dim % y.dim() != axis else -1

    def _times(self, g: Tensor) -> Tensor:
        y = self.y[: g.shape[0]]
        return y * (g - (g * y).sum(self.dim, keepdim=True))

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        b, t = self.saved
        if b is None or t is None:
            return [None if c[0] is None else self._times(c[0])]
        b, y = b[: t.shape[0]], self.y[: t.shape[0]]
        inner = b * t - b * (y * t).sum(self.dim, keepdim=True) - t * (y * b).sum(self.dim, keepdim=True)
        if c[0] is not None and c[0].shape == inner.shape:
            return [self._times(inner + c[0])]
        return [self._times(inner) if c[0] is None else add_rows(self._times(inner), self._times(c[0]))]


class Smooth(SymmetricJacobian):
    """y = s(x) for each element: chain and tangent s'(x), and s'(x) c + s''(x) b t."""

    curved = True
    prefix = True

    def __init__(self, x: Tensor, kind: str) -> None:
        super().__init__()
        self.x, self.form, self.kind = x, kind, f"exact, smooth ({kind})"

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis

    def _times(self, g: Tensor) -> Tensor:
        found: Tensor = ACTIVATION_CHAIN(self.x[: g.shape[0]], g, self.form)
        return found

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        b, t = self.saved
        if not wanted or b is None or t is None:
            return self.pull(sweeps, c) if wanted and c[0] is not None else [None]
        rows = t.shape[0]
        same = c[0] is not None and c[0].shape == t.shape
        found = ACTIVATION_SECOND(self.x[:rows], b[:rows], t, c[0] if same else None, self.form)
        return [found if same or c[0] is None else add_rows(found, self._times(c[0]))]


def _smooth(kind: Callable[[dict[str, Any]], str | None], names: tuple[str, ...], defaults: tuple[Any, ...]) -> Handler:
    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > len(names) or any(k not in names for k in kwargs):
            return otherwise(tape, func, args, kwargs)
        given = dict(zip(names, named_arguments(args, kwargs, names, defaults)))
        form, place = kind(given), given["input"]
        if form is None or not place.dim() or place.dtype not in (torch.float32, torch.float64):
            return otherwise(tape, func, args, kwargs)
        if given.get("inplace"):
            may_overwrite(tape, func, place)
        x = place.detach()
        rule = Smooth(x, form)
        options = [given[n] for n in names[1:] if n != "inplace"]
        y = func(x, *options) if func is not F.gelu else F.gelu(x, approximate=given["approximate"])
        return overwritten(tape, rule, (place,), place, y) if given.get("inplace") else tape.record(rule, (place,), y)

    return handler


def _fixed(kind: str, **options: Any) -> Callable[[dict[str, Any]], str | None]:
    """``kind``, where the options are those that its kernel is for."""
    return lambda given: kind if all(given.get(k, v) == v for k, v in options.items()) else None


for _f in functions_named("tanh"):
    HANDLERS[_f] = _smooth(_fixed("tanh"), ("input",), ())
for _f in functions_named("sigmoid"):
    HANDLERS[_f] = _smooth(_fixed("sigmoid"), ("input",), ())
HANDLERS[F.silu] = _smooth(_fixed("silu"), ("input", "inplace"), (False,))
HANDLERS[F.mish] = _smooth(_fixed("mish"), ("input", "inplace"), (False,))
for _f in (F.selu, torch.selu):
    HANDLERS[_f] = _smooth(_fixed("selu"), ("input", "inplace"), (False,))
HANDLERS[F.elu] = _smooth(_fixed("elu", alpha=1.0), ("input", "alpha", "inplace"), (1.0, False))
HANDLERS[F.softplus] = _smooth(_fixed("softplus", beta=1, threshold=20), ("input", "beta", "threshold"), (1, 20))
HANDLERS[F.gelu] = _smooth(
    lambda given: {"none": "gelu", "tanh": "gelu_tanh"}.get(given["approximate"]), ("input", "approximate"), ("none",)
)


@handles(F.softmax, torch.softmax, T.softmax)
def _softmax(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs["input"]
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(dim, int) or kwargs.get("dtype") is not None or len(args) > 2 or x.dim() < 2:
        return otherwise(tape, func, args, kwargs)
    y = torch.softmax(x.detach(), dim)
    return tape.record(Softmax(y, dim), (x,), y.detach())
