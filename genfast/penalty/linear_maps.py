"""The rules of linear maps without parameters: views, permutations, reductions, poolings, resampling and joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from .autograd_rule import otherwise
from .handlers import T, flat_ints, functions_named, handles, name_of, trainable
from .sweeps import Sweeps
from .tape import HANDLERS, Handler, Maybe, Rule, Tape, Unsupported


class Reshape(Rule):
    kind = "exact, linear"
    prefix = True

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.shape, self.to = x.shape, y.shape
        self.per_sample = x.dim() > 0 and y.dim() > 0 and x.shape[0] == y.shape[0]
        self.prefix = self.per_sample

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if x.shape[: axis + 1] == y.shape[: axis + 1] else -1

    def _as(self, g: Tensor, shape: Sequence[int]) -> Tensor:
        return g.reshape(g.shape[0], *shape[1:]) if self.prefix else g.reshape(shape)

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [self._as(g[0], self.shape)]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        return [self._as(t[0], self.to) if wanted and t[0] is not None else None]


def reshaping(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    if func is T.view and not isinstance(args[1] if len(args) > 1 else 0, torch.dtype):
        func = T.reshape  # a convolution may have left another memory format than the critic's author expects
    y = func(x.detach(), *args[1:], **kwargs)
    if not y.dtype.is_floating_point or y.dtype != x.dtype:
        raise Unsupported("a view of other dtype")
    return tape.record(Reshape(x, y), (x,), y)


_PERMUTATIONS = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t")


class Map(Rule):
    """A linear function of one active tensor; its transpose is PyTorch's own derivative."""

    kind = "exact, linear"

    def __init__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], per_sample: bool, prefix: bool
    ) -> None:
        self.func, self.args, self.kwargs = func, args[1:], kwargs
        self.per_sample, self.prefix = per_sample, prefix
        self.shape, self.dtype, self.memory = args[0].shape, args[0].dtype, args[0].stride()
        x = args[0].detach()
        with torch.enable_grad():
            self.x = x.requires_grad_()
            y = func(self.x, *self.args, **kwargs)
        self.single = isinstance(y, Tensor)
        ys = [y] if self.single else list(y)
        self.edges = [get_gradient_edge(v) for v in ys]
        self.y: Any = y.detach() if self.single else tuple(v.detach() for v in ys)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        name = name_of(self.func)
        if name in _PERMUTATIONS:  # y is a view of x
            found = [j for j in range(y.dim()) if (y.stride(j), y.shape[j]) == (x.stride(axis), x.shape[axis])]
            return found[0] if len(found) == 1 else -1
        if name in ("mean", "sum", "select"):
            dim = self.kwargs.get("dim", self.args[0] if self.args else None)
            dims = [d % x.dim() for d in flat_ints(dim)] if dim is not None else []
            if not dims or axis in dims:
                return -1
            kept = x.dim() == y.dim()
            return axis - (0 if kept else sum(d < axis for d in dims))
        if name in ("chunk", "split"):
            dim = self.kwargs.get("dim", self.args[1] if len(self.args) > 1 else 0)
            return axis if dim % x.dim() != axis else -1
        if name in ("contiguous", "clone", "to", "float", "double"):
            return axis
        if name == "__getitem__" and isinstance(self.args[0], int) and axis > 0:
            return axis - 1
        return -1

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        ys: list[Any] = self.edges
        x = self.x
        rows = next(v.shape[0] for v in g if v is not None) if self.prefix else 0
        if self.prefix and rows != self.shape[0]:
            with torch.enable_grad():
                x = torch.empty_strided((rows, *self.shape[1:]), self.memory, dtype=self.dtype, device=self.x.device)
                x = x.zero_().requires_grad_()
                y = self.func(x, *self.args, **self.kwargs)
            ys = [y] if self.single else list(y)
        pairs = [(y, v) for y, v in zip(ys, g) if v is not None]
        return list(torch.autograd.grad([y for y, _ in pairs], x, [v for _, v in pairs], retain_graph=True))

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if not wanted or t[0] is None:
            return [None] * len(self.outs)
        y = self.func(t[0], *self.args, **self.kwargs)
        return [y] if self.single else list(y)


def mapped(keeps: Callable[[Tensor, Any, tuple[Any, ...], dict[str, Any]], bool], prefix: bool = False) -> Handler:
    """A handler of a linear function of its first argument; ``keeps`` says whether axis 0 stays the batch."""

    def handler(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if tape.slot(args[0] if args else None) < 0 or any(tape.slot(a) >= 0 for a in (*args[1:], *kwargs.values())):
            return otherwise(tape, func, args, kwargs)
        per_sample = keeps(args[0], func, args[1:], kwargs)
        rule = Map(func, args, kwargs, per_sample, prefix and per_sample)
        y, rule.y = rule.y, None
        return tape.record(rule, (args[0],), y)

    return handler


def _axes_but_first(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """All axes that are named differ from 0 (and some are)."""
    named = [
        kwargs[k]
        for k in ("dim", "dims", "axis", "dim0", "dim1", "axis0", "axis1", "source", "destination")
        if k in kwargs
    ]
    axes = flat_ints([*rest, *named])
    return bool(axes) and all(isinstance(a, int) and not isinstance(a, bool) and a % max(x.dim(), 1) != 0 for a in axes)


def _last_axis(index: int) -> Callable[[Tensor, Any, tuple[Any, ...], dict[str, Any]], bool]:
    """The axis stands at ``rest[index]`` or as ``dim``."""

    def keeps(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        dim = kwargs.get("dim", rest[index] if len(rest) > index else 0)
        return isinstance(dim, int) and dim % x.dim() != 0

    return keeps


def _reduction(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    dim = kwargs.get("dim", kwargs.get("axis", rest[0] if rest else None))
    axes = flat_ints(dim) if dim is not None else []
    return bool(axes) and all(a % x.dim() != 0 for a in axes)


def _permutation(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(flat_ints([*rest, *kwargs.values()])[0] % x.dim() == 0)


def of_index(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    key = rest[0]
    if not isinstance(key, tuple) or not key:
        return False
    if all(isinstance(k, Tensor) and k.shape == x.shape[:1] and k.dtype == torch.int64 for k in key):
        return bool((key[0] == torch.arange(len(x), device=key[0].device)).all())  # one entry of each sample
    return bool((isinstance(key[0], slice) and key[0] == slice(None)) or (key[0] is Ellipsis and len(key) <= x.dim()))


def of_images(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return x.dim() >= 3


def _padding(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return len(kwargs.get("pad", rest[0] if rest else ())) // 2 < x.dim()


def _always(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return x.dim() > 0


def _never(x: Tensor, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return False


for _f in functions_named("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"):
    HANDLERS[_f] = reshaping
for _f in functions_named("permute"):
    HANDLERS[_f] = mapped(_permutation)
for _f in functions_named("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"):
    HANDLERS[_f] = mapped(_axes_but_first)
for _f in [*functions_named("t"), T.T.__get__, T.mT.__get__]:  # type: ignore[attr-defined]
    HANDLERS[_f] = mapped(_never)
for _f in functions_named("mean", "sum"):
    HANDLERS[_f] = mapped(_reduction)
for _f in functions_named("cumsum", "flip", "select", "narrow"):
    HANDLERS[_f] = mapped(_axes_but_first if "flip" in _f.__name__ else _last_axis(0))
for _f in functions_named("roll"):
    HANDLERS[_f] = mapped(_last_axis(1))
for _f in functions_named("chunk", "split", "tensor_split"):
    HANDLERS[_f] = mapped(_last_axis(1))
for _f in functions_named("unbind", "index_select", "gather"):
    HANDLERS[_f] = mapped(_last_axis(0))
for _f in functions_named(
    "expand", "expand_as", "repeat", "repeat_interleave", "tile", "broadcast_to", "diagonal", "tril", "triu", "rot90"
):
    HANDLERS[_f] = mapped(_never)
HANDLERS[T.__getitem__] = mapped(of_index)
for _f in functions_named(
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"
):
    HANDLERS[_f] = mapped(of_images, prefix=True)
for _f in functions_named(
    "interpolate", "upsample", "pixel_shuffle", "pixel_unshuffle", "unfold", "fold", "channel_shuffle"
):
    HANDLERS[_f] = mapped(of_images, prefix=True)
HANDLERS[T.unfold] = mapped(_last_axis(0))
for _f in functions_named("to", "float", "double", "half", "bfloat16", "contiguous", "clone", "type_as", "cpu", "cuda"):
    HANDLERS[_f] = mapped(_always)


@handles(F.pad, torch._C._nn.pad)
def _pad(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    value = kwargs.get("value", args[3] if len(args) > 3 else None)
    return (otherwise if value else mapped(_padding, prefix=True))(tape, func, args, kwargs)


class Join(Rule):
    """cat or stack of tensors, of which some are active."""

    kind = "exact, linear"

    def __init__(self, tape: Tape, func: Any, tensors: Sequence[Tensor], dim: int) -> None:
        self.func, self.dim = func, dim
        self.parts = [(x.shape, tape.slot(x) >= 0, x if tape.slot(x) < 0 else None) for x in tensors]
        self.like = tensors[0].detach().new_empty(0)
        self.constants = [x for _, active, x in self.parts if not active and trainable(x)]
        self.per_sample = dim != 0 and tensors[0].dim() > 0

    @property
    def collects(self) -> bool:
        return bool(self.constants)

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if x.dim() == y.dim() and self.dim != axis else -1

    def _split(self, g: Tensor) -> Sequence[Tensor]:
        stacked = self.func is torch.stack
        return list(
            g.unbind(self.dim) if stacked else g.split([shape[self.dim] for shape, _, _ in self.parts], self.dim)
        )

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        assert g[0] is not None
        return [part for part, (_, active, _) in zip(self._split(g[0]), self.parts) if active]

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        if b[0] is not None and self.constants:
            for part, (_, active, x) in zip(self._split(b[0]), self.parts):
                if not active and trainable(x):
                    assert x is not None
                    sweeps.collect_bias(x, part)
        if not wanted:
            return [None]
        directions = iter(t)
        values = [next(directions) if active else None for _, active, _ in self.parts]
        return [
            self.func(
                [self.like.new_zeros(shape) if v is None else v for v, (shape, _, _) in zip(values, self.parts)],
                self.dim,
            )
        ]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        assert c[0] is not None
        for part, (_, active, x) in zip(self._split(c[0]), self.parts):
            if not active and trainable(x):
                assert x is not None
                sweeps.collect(x, part)
        return self.pull(sweeps, c)


@handles(torch.cat, torch.concat, torch.concatenate, torch.stack)
def _join(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = args[0] if args else kwargs["tensors"]
    dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    func = torch.stack if func is torch.stack else torch.cat
    if "out" in kwargs or any(x.dtype != tensors[0].dtype or x.dim() != tensors[0].dim() for x in tensors):
        return otherwise(tape, func, args, kwargs)
    dim %= tensors[0].dim() + (func is torch.stack)
    rule = Join(tape, func, tensors, dim)
    return tape.record(rule, [x for x in tensors if tape.slot(x) >= 0], func([x.detach() for x in tensors], dim))
