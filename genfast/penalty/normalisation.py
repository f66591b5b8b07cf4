"""The rule of every normalisation: layer, group, instance, root mean square, and batch norm.

x_hat = (x - mean) r over groups of n values, r = (mean (x - mean)^2 + eps)^(-1/2); then gain and bias as factors and
terms. With P g = g - mean g - x_hat mean(x_hat g) (root mean square norm: without mean g), the Jacobian is J = r P,
symmetric, and

    d<b, J t>/dx = -(r / n) ( <b, J t> x_hat + <x_hat, t> J b + <x_hat, b> J t ).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import add, scale
from .autograd_rule import otherwise
from .handlers import handles, named_arguments
from .sweeps import Sweeps, add_rows
from .tape import Maybe, Rule, Tape


class Normalise(Rule):
    """x_hat of x; ``shape`` is the view in which the axes ``dims`` are a group."""

    curved = True

    def __init__(
        self,
        name: str,
        x_hat: Tensor,
        r: Tensor,
        shape: Sequence[int],
        dims: tuple[int, ...],
        centred: bool,
        per_sample: bool,
    ) -> None:
        self.kind = f"exact, smooth ({name})"
        self.shape, self.dims, self.centred, self.per_sample = x_hat.shape, dims, centred, per_sample
        self.x_hat = x_hat.reshape(shape)
        self.r = r.reshape([1 if i in dims else s for i, s in enumerate(shape)]).to(x_hat.dtype)
        self.n = max(1, self.x_hat.numel() // max(1, self.r.numel()))
        self.rows = shape[0] if dims == (1,) else 0
        self.saved: tuple[Maybe, Maybe, Maybe] = (None, None, None)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if x.shape[: axis + 1].numel() <= self.rows else -1  # a layer's axes come last

    def _mean(self, a: Tensor) -> Tensor:
        return a.mean(self.dims, keepdim=True)

    def _mean_product(self, a: Tensor, b: Tensor) -> Tensor:
        """mean (a b) over the groups, without the product in memory where a group is a row."""
        if self.dims != (1,):
            return self._mean(a * b)
        return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).squeeze(2).mul_(1 / self.n)

    def _times(self, g: Tensor) -> Tensor:
        """J g, in the view."""
        if self.dims == (1,) and self.centred:  # the library's kernel, told that x_hat is normalised already
            zero, one = torch.zeros_like(self.r), torch.ones_like(self.r)
            mask = [True, False, False]
            found: Tensor = torch.ops.aten.native_layer_norm_backward(
                g, self.x_hat, [self.n], zero, one, None, None, mask
            )[0]
            return found.mul_(self.r)
        found = torch.addcmul(g, self.x_hat, self._mean_product(g, self.x_hat), value=-1)
        if self.centred:
            found -= self._mean(g)
        return found.mul_(self.r)

    def _view(self, g: Tensor) -> Tensor:
        return g.reshape(self.x_hat.shape)

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._times(self._view(g[0])).reshape(self.shape)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if t[0] is None:
            return [None]
        direction = self._view(t[0])
        jt = self._times(direction)
        self.saved = (b[0], direction, jt)
        return [jt.reshape(self.shape) if wanted else None]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        b, t, jt = self.saved
        if not wanted:
            return [None]
        through = None if c[0] is None else self.pull(sweeps, c)[0]
        if b is None or t is None or jt is None:
            return [through]
        b = self._view(b)
        bent = self.x_hat * (self._mean_product(b, jt) * -self.r)
        bent.addcmul_(self._times(b), self._mean_product(self.x_hat, t) * -self.r)
        bent.addcmul_(jt, self._mean_product(self.x_hat, b) * -self.r)
        bent = bent.reshape(self.shape)
        return [bent if through is None else add_rows(bent, through)]


def _affine(tape: Tape, y: Tensor, weight: Maybe, bias: Maybe) -> Any:
    """weight y + bias, already shaped to broadcast."""
    if weight is not None:
        y = scale(tape, y, weight)
    if bias is not None:
        rule, inputs, out = add(y, bias, 1, None, 1, tape)
        y = tape.record(rule, inputs, out)
    return y


def per_channel(x: Tensor, p: Maybe) -> Maybe:
    if p is None:
        return None
    with torch.enable_grad():
        return p.view(1, -1, *(1,) * (x.dim() - 2))


def _wide(x: Tensor) -> Tensor:
    """Half types are normalised in float32."""
    return x.detach().float() if x.element_size() < 4 else x.detach()


def _unsupported(tape: Tape, *constants: Any) -> bool:
    return any(tape.slot(p) >= 0 for p in constants)


@handles(F.layer_norm, torch.layer_norm)
def _layer_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "normalized_shape", "weight", "bias", "eps")
    x, shape, weight, bias, eps = named_arguments(args[:5], kwargs, names, (None, None, 1e-5))
    if _unsupported(tape, weight, bias) or x.element_size() < 4 or not x.numel():
        return otherwise(tape, func, args, kwargs)
    x_hat, _, r = torch.native_layer_norm(x.detach(), shape, None, None, eps)
    rows = x.shape[: x.dim() - len(shape)].numel()
    rule = Normalise("layer norm", x_hat, r, (rows, -1), (1,), True, x.dim() > len(shape))
    return _affine(tape, tape.record(rule, (x,), x_hat.detach()), weight, bias)


@handles(F.group_norm, torch.group_norm)
def _group_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "num_groups", "weight", "bias", "eps")
    x, groups, weight, bias, eps = named_arguments(args[:5], kwargs, names, (None, None, 1e-5))
    if _unsupported(tape, weight, bias) or x.element_size() < 4 or not x.numel():
        return otherwise(tape, func, args, kwargs)
    return _affine(tape, _groups(tape, "group norm", x, groups, eps), per_channel(x, weight), per_channel(x, bias))


def _groups(tape: Tape, name: str, x: Tensor, groups: int, eps: float) -> Any:
    n, c = x.shape[:2]
    v = x.detach().contiguous()
    x_hat, _, r = torch.native_group_norm(v, None, None, n, c, v.numel() // (n * c), groups, eps)
    rule = Normalise(name, x_hat, r, (n * groups, -1), (1,), True, True)
    return tape.record(rule, (x,), x_hat.detach())


@handles(F.instance_norm, torch.instance_norm)
def _instance_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    x, mean, var, weight, bias, batch, momentum, eps = named_arguments(
        args[:8], kwargs, names, (None, None, None, None, True, 0.1, 1e-5)
    )
    if _unsupported(tape, weight, bias) or x.element_size() < 4 or not x.numel():
        return otherwise(tape, func, args, kwargs)
    if not batch:
        return _frozen(tape, x, mean, var, weight, bias, eps)
    if mean is not None:  # the running statistics move as they do in F.instance_norm
        F.instance_norm(x.detach(), mean, var, None, None, True, momentum, eps)
    y = _groups(tape, "instance norm", x, x.shape[1], eps)
    return _affine(tape, y, per_channel(x, weight), per_channel(x, bias))


@handles(F.rms_norm, torch.rms_norm)
def _rms_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape, weight, eps = named_arguments(args, kwargs, ("input", "normalized_shape", "weight", "eps"), (None, None))
    if _unsupported(tape, weight) or x.element_size() < 4 or not x.numel():
        return otherwise(tape, func, args, kwargs)
    v = x.detach().flatten(x.dim() - len(shape))
    r = (v.square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()
    x_hat = (v * r).view(x.shape)
    rows = x.shape[: x.dim() - len(shape)].numel()
    rule = Normalise("root mean square norm", x_hat, r, (rows, -1), (1,), False, x.dim() > len(shape))
    return _affine(tape, tape.record(rule, (x,), x_hat.detach()), weight, None)


@handles(F.batch_norm, torch.batch_norm)
def _batch_norm(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    x, mean, var, weight, bias, training, momentum, eps = named_arguments(
        args[:8], kwargs, names, (None, None, False, 0.1, 1e-5) if func is F.batch_norm else (None, False, 0.1, 1e-5)
    )
    if _unsupported(tape, weight, bias) or x.element_size() < 4 or not x.numel():
        return otherwise(tape, func, args, kwargs)
    if not training:
        return _frozen(tape, x, mean, var, weight, bias, eps)
    x_hat, _, r = torch.native_batch_norm(x.detach(), None, None, mean, var, True, momentum, eps)
    dims = (0, *range(2, x.dim()))
    rule = Normalise("batch norm", x_hat, r, x_hat.shape, dims, True, False)
    rule.couples = "batch norm in training"
    y = tape.record(rule, (x,), x_hat.detach())
    return _affine(tape, y, per_channel(x, weight), per_channel(x, bias))


def _frozen(tape: Tape, x: Tensor, mean: Tensor, var: Tensor, weight: Maybe, bias: Maybe, eps: float) -> Any:
    """A norm of fixed statistics: a factor and a term."""
    with torch.enable_grad():
        gain = (var + eps).rsqrt()
        gain = gain if weight is None else gain * weight
        shift = -mean * gain if bias is None else bias - mean * gain
    return _affine(tape, x, per_channel(x, gain), per_channel(x, shift))
