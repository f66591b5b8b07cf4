"""The degree-ordered program as the CUDA engine takes it (csrc/cuda/autoregressive_inverse.cuh): a flat list of items.

Forward: the groups of the program in their order, and after those of a level its inputs' solution. Backward: the same
    units
on the transposed network, levels from the last to the first; a unit's cotangent is a sum over the products that read it
and over links, by which a pointwise unit or a residual reads one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._derived import ordinary
from ..reference.autoregressive_inverse import ACTIVATIONS, HEADER, PRODUCT

# LevelKind and SweepFlags of the engine.
_PRODUCT, _POINT, _SOLVE, _SWEEP, _PARAMS = range(5)
_ACCUMULATES, _FIRST_SLOPED, _SECOND_SLOPED = 1, 2, 4
_UNIT = 16  # floats to which weights are aligned
_LANES = 32  # rows that a product may read past those that it needs
_NONE = ACTIVATIONS.index("none")

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu": F.gelu,
}


@dataclass
class Layer:
    """A layer of the program, as its format names it; ``sources`` and ``residual`` are offsets in the tables."""

    kind: int
    activation: int
    source: int
    source_units: int
    first: int
    units: int
    bias: int
    context: int
    gate: int
    sources: int
    residual: int
    groups: list[tuple[int, int, int]] = field(default_factory=list, init=False)  # level, first row, rows
    base: int = field(default=-1, init=False)  # where the transposed weights begin
    stride: int = field(default=0, init=False)  # of those, (source_units, stride)

    def of(self, level: int) -> list[tuple[int, int, int]]:
        """The groups of this level."""
        return self.groups[bisect_left(self.groups, (level, 0, 0)) : bisect_left(self.groups, (level + 1, 0, 0))]

    def start(self, level: int) -> int:
        """The first row of at least this level."""
        at = bisect_left(self.groups, (level, 0, 0))
        return self.groups[at][1] if at < len(self.groups) else self.units

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        return FUNCTIONS[ACTIVATIONS[self.activation]]


def _item(
    kind: int,
    *,
    activation: int = 0,
    first: int = 0,
    rows: int = 0,
    count: int = 0,
    source: int = 0,
    out: int = 0,
    weight: int = 0,
    stride: int = 0,
    bias: int = -1,
    context: int = -1,
    gate: int = -1,
    sources: int = -1,
    residual: int = -1,
    flags: int = 0,
    level: int = 0,
) -> list[int]:
    return [
        kind, activation, first, rows, count, source, out, weight // _UNIT, stride, bias, context, gate, sources,
        residual,
        flags, level,
    ]  # fmt: skip


class LevelItems:
    """What follows from the program's ``code`` alone, on one device."""

    def __init__(self, code: Tensor, device: torch.device) -> None:
        code = code.cpu()
        numbers: list[int] = code.tolist()
        self.inputs, self.width, levels, count, groups, self.units, self.statics, self.size, self.parameters = numbers[
            :HEADER
        ]
        at = HEADER + self.inputs
        self._numbers, self._ends = numbers, numbers[at : at + levels]
        at += levels
        self.layers = [Layer(*numbers[at + 11 * i : at + 11 * i + 11]) for i in range(count)]
        at += 11 * count
        self._groups = [numbers[at + 7 * i : at + 7 * i + 7] for i in range(groups)]
        self._tables = at + 7 * groups
        for level, layer, row, rows, *_ in self._groups:
            self.layers[layer].groups.append((level, row, rows))
        for layer_ in self.layers:
            layer_.sources, layer_.residual = (
                t - self._tables if t >= 0 else -1 for t in (layer_.sources, layer_.residual)
            )
        self._device = device
        order = code[HEADER : HEADER + self.inputs]
        self.order = self._put(order.tolist())
        self.places = order.argsort().to(device)
        self.sorted = order.to(device)
        self.tables = self._put(numbers[self._tables :])
        # Parameters lie where those of the level before lay; behind what a product may read past the units.
        local = self.parameters + _LANES
        most = max(end - begin for begin, end in zip([0, *self._ends], self._ends))
        self.given = local + self.width * most
        self.rows = self.given + self.inputs
        self.items = self._forward(local)
        self._backward: tuple[Tensor, Tensor] | None = None

    def _put(self, numbers: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self._device)

    def _forward(self, local: int) -> Tensor:
        found: list[list[int]] = []
        groups = iter([*self._groups, [len(self._ends), *[0] * 6]])
        group = next(groups)
        begin = 0
        for level, end in enumerate(self._ends):
            while group[0] == level:
                _, number, row, rows, live, weight, stride = group
                layer = self.layers[number]
                last = layer is self.layers[-1]
                item = _item(
                    _PRODUCT if layer.kind == PRODUCT else _POINT,
                    activation=layer.activation,
                    first=row,
                    rows=rows,
                    count=live,
                    source=layer.source,
                    out=local + row - begin * self.width if last else layer.first + row,
                    weight=weight,
                    stride=stride,
                    bias=layer.bias,
                    context=layer.context,
                    gate=layer.gate,
                    sources=layer.sources,
                    residual=layer.residual,
                    level=level,
                )
                found.append(item)
                group = next(groups)
            found.append(_item(_SOLVE, first=begin, rows=end - begin, source=local, level=level))
            begin = end
        return self._put(found).view(-1, 16)

    def backward(self) -> tuple[Tensor, Tensor]:
        """The items of the sweep and its tables; lays out the transposed weights."""
        if self._backward is None:
            self._transpose()
            self._backward = self._sweep()
        return self._backward

    def _transpose(self) -> None:
        """``index``: of each transposed weight its place among the packed, plus 1; 0: nowhere. ``inverse``: the
        converse."""
        size = 0
        for layer in self.layers:
            if layer.kind == PRODUCT:
                layer.base, layer.stride = size, -(-layer.units // _UNIT) * _UNIT
                size += layer.source_units * layer.stride
        index = torch.zeros(size, dtype=torch.int64)
        for _, number, row, rows, live, weight, stride in self._groups:
            layer = self.layers[number]
            if layer.kind == PRODUCT and live:
                block = index[layer.base : layer.base + layer.source_units * layer.stride].view(-1, layer.stride)
                block[:live, row : row + rows] = torch.arange(live)[:, None] + torch.arange(rows) * stride + weight + 1
        inverse = torch.zeros(self.size + 1, dtype=torch.int64)
        inverse[index] = torch.arange(1, size + 1)
        self.index, self.inverse = index.to(self._device), inverse[1:].to(self._device)

    def _links(self) -> tuple[list[int], dict[int, list[tuple[int, int]]]]:
        """Tables of which unit reads each unit of an array, and by the array's first unit: (table, whether sloped)."""
        tables: list[int] = []
        links: dict[int, list[tuple[int, int]]] = {}
        arrays = [(0, self.inputs), *((layer.first, layer.units) for layer in self.layers)]
        for layer in self.layers:
            for offset, sloped in ((layer.sources, 1), (layer.residual, 0)):
                if offset < 0:
                    continue
                read = self._numbers[self._tables + offset : self._tables + offset + layer.units]
                first, units = next((f, n) for f, n in arrays if f <= read[0] < f + n)
                table = [-1] * units
                for r, unit in enumerate(read):
                    table[unit - first] = layer.first + r
                links.setdefault(first, []).append((len(tables), sloped))
                tables += table
        return tables, links

    def _sweep(self) -> tuple[Tensor, Tensor]:
        tables, links = self._links()
        last = self.layers[-1]
        found: list[list[int]] = []

        def gather(first: int, row: int, rows: int, level: int, accumulates: bool, sloped: bool) -> None:
            """Units [row, row + rows) of the array at ``first``, read by units of at least this level."""
            products = []
            for layer in self.layers:
                if layer.kind == PRODUCT and layer.source == first and layer.start(level) < layer.units:
                    start = layer.start(level) // _UNIT * _UNIT
                    weight = layer.base + row * layer.stride + start
                    products.append(
                        dict(source=layer.first + start, count=layer.units - start, stride=layer.stride, weight=weight)
                    )
            pairs = [links.get(first, [])[i : i + 2] for i in range(0, len(links.get(first, [])), 2)]
            steps = max(len(products), len(pairs))
            for i in range(steps):
                pair = pairs[i] if i < len(pairs) else []
                flags = _ACCUMULATES if i or accumulates else 0
                flags |= sum(flag for (_, by), flag in zip(pair, (_FIRST_SLOPED, _SECOND_SLOPED)) if by)
                tables_ = [table for table, _ in pair] + [-1] * (2 - len(pair))
                item = _item(
                    _SWEEP,
                    first=row,
                    rows=rows,
                    out=first + row,
                    sources=tables_[0],
                    residual=tables_[1],
                    flags=flags,
                    gate=0 if sloped and i == steps - 1 else -1,
                    level=level,
                    **(products[i] if i < len(products) else {}),
                )
                found.append(item)

        for level in reversed(range(len(self._ends))):
            begin, end = self._ends[level - 1] if level else 0, self._ends[level]
            gather(0, begin, end - begin, level + 1, True, False)
            out = self.parameters + begin * self.width
            sloped = last.kind == PRODUCT and last.activation != _NONE
            found.append(_item(_PARAMS, first=begin, rows=end - begin, out=out, gate=0 if sloped else -1, level=level))
            for layer in reversed(self.layers[:-1]):
                for _, row, rows in layer.of(level):
                    has_slope = layer.kind == PRODUCT and layer.activation != _NONE
                    gather(layer.first, row, rows, level, False, has_slope)
        return self._put(found).view(-1, 16), self._put(tables or [-1])


_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def level_items(code: Tensor, device: torch.device) -> LevelItems:
    """Made once for each program and device."""
    by_device: dict[torch.device, LevelItems] = _KNOWN.setdefault(code, {})
    if device not in by_device:
        with ordinary():
            by_device[device] = LevelItems(code, device)
    return by_device[device]
