"""Degree-ordered inverse: a masked network lowered so that each of its units is computed once, when its inputs are
known.

Every unit has a level. An input of level l is solved in round l; a unit of level l needs inputs of levels below l only,
so it is computed once, at the beginning of round l. Units that no parameter of an input needs are left out.

The program is two tensors. In ``code`` (int64) units have numbers: the D inputs first, sorted by level, then the units
of each layer, from a multiple of 16 on (some numbers are no unit's), sorted by level within the layer; those of the
last layer by
the input that they are parameters of: input j of the sorted order has the P units ``parameters + j P + p``.

    header      D, P, L levels, M layers, G groups, U numbers, S columns of statics, W elements of packed,
    ``parameters``
    order       D: which input of the caller stands at each place of the sorted order
    ends        L: how many inputs have a level of at most l
    layers      M x 11: kind, activation, first unit of the source, units of the source, first unit, units, then -1
        where there
                is none: bias (offset in packed), context and gate (first column of statics), sources and residual
                    (offsets in
                code of tables of ``units`` unit numbers)
    groups      G x 7: level, layer, first row (in the layer), rows, count, weight (offset in packed), stride
    tables      as the layers say

    kind 0, product:  v[r] = act(sum over k < count of packed[weight + (r - row) stride + k] v[source + k]
                                 + packed[bias + r] + statics[context + r]) + v[residual[r]]
                      act is one whose derivative follows from its value: none, relu, leaky_relu (0.01), elu, tanh,
                      sigmoid, softplus; there is a residual only with none, and no gate
    kind 1, point:    v[r] = act(v[sources[r]]) statics[gate + r] + v[residual[r]], any act: also silu, gelu; count is 0

``packed`` is flat: for each group of a product its rows one behind the other, ``stride`` elements apart, zero where the
mask is zero and from ``count`` to ``stride``, which is a multiple of 16 (offsets too); then the biases. ``statics`` is
(N, S): what does not depend on x.

Groups stand in the order of execution: by level, within it by layer. Round l: the groups of level l, one after the
    other
(rows of a group do not depend on each other; a group may read what the one before it wrote), then inputs ends[l - 1] to
ends[l] are solved from z and their parameters. Some rounds may have no group of a layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import called_plainly, changes_nothing, class_of, hook_in_the_way, weights_of_calls
from .._contents import Contents
from .._derived import ordinary, recorded
from .._torch_private import transform
from ..ops.autoregressive_inverse import gather_once
from ..reference.autoregressive_inverse import ACTIVATIONS, HEADER, POINT, PRODUCT
from .errors import LoweringError

ALIGNED = 16  # elements: rows of weights begin at whole vectors
_FROM_VALUE = ACTIVATIONS[: ACTIVATIONS.index("softplus") + 1]


@dataclass
class Layer:
    """One layer of a masked network: h = after((weight * mask) before(source) + bias + context) * gate + residual.

    Args:
        weight: (out, in); what the mask hides may hold anything.
        bias: (out,).
        mask: (out, in) of what is live, bool or 0 and 1; without, all of it.
        source: whose output it takes: -1 the layer before (of the first: x), 0 is x, k the k-th layer.
        before, after: activations, names of ``reference.autoregressive_inverse.ACTIVATIONS``.
        residual: index, as for ``source``, of an output of the same width that is added at the end.
        context: (N, out), added before ``after``: what depends on a condition and not on x.
        gate: (N, out), multiplies before the residual is added.
    """

    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    source: int = -1
    before: str = "none"
    after: str = "none"
    residual: int | None = None
    context: Tensor | None = None
    gate: Tensor | None = None


def layers_of(network: Any, context: Tensor | None = None) -> list[Layer]:
    """``network.layers(context)`` with the weights that a call would use.

    Raises:
        LoweringError: a call of the network does more than its ``layers`` can say: a module has hooks or a forward of
            its own, or a subclass changed the forward and not ``layers``.
    """
    name, plain = type(network).__name__, called_plainly(network)
    for path, module in () if plain else network.named_modules():
        hook = hook_in_the_way(module, weights=bool(path)) or (
            "a forward of its own" if "forward" in module.__dict__ else ""
        )
        if hook:
            raise LoweringError(f"{name}: {path or 'it'} has {hook}, which its layers() do not show")
    cls = class_of(network)
    owner = next((c for c in cls.__mro__ if "layers" in vars(c)), cls)
    if not changes_nothing(cls, owner):
        raise LoweringError(f"{name}: {cls.__qualname__} overrides methods of {owner.__qualname__}, but not layers()")
    with contextlib.nullcontext() if plain else weights_of_calls(network):
        layers: list[Layer] = network.layers(context)
    return layers


@dataclass
class _Value:
    """The units of one array: the inputs, a product, or what is pointwise made of it."""

    units: int
    reach: Tensor  # (units, D): which inputs a unit depends on
    kind: int = PRODUCT
    activation: str = "none"
    layer: int = -1  # whose weights, context or gate
    source: int = 0
    residual: int | None = None
    mask: Tensor | None = None
    context: bool = False
    gate: bool = False
    needed: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    kept: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # units in their sorted order
    levels: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # of those
    first: int = 0


@dataclass
class _Mask:
    """A mask as it was given, and what it held."""

    given: Tensor | None
    version: int
    contents: Contents
    live: Tensor | None  # bool, on the CPU


@dataclass
class _Structure:
    """What follows from masks and shapes alone."""

    code: Tensor
    inputs: int
    width: int
    order: Tensor
    levels: int
    units: int
    packed: int
    index: Tensor  # of each packed element: where it lies among all weights and biases, plus 1; 0: nowhere
    inverse: Tensor
    statics: int
    static_index: Tensor
    static_inverse: Tensor
    multiplications: int
    signature: list[tuple[object, ...]]
    masks: list[_Mask]
    given: tuple[int, ...] | None
    devices: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The four indices there: moved once, unless a tracer would keep tensors of its own."""
        if device in self.devices:
            return self.devices[device]
        moved = tuple(i.to(device) for i in (self.index, self.inverse, self.static_index, self.static_inverse))
        if not torch.compiler.is_compiling() and all(type(i) is Tensor for i in moved):
            self.devices[device] = moved
        return moved


class DegreeProgram:
    """A masked network, lowered for :func:`genfast.ops.autoregressive_inverse`.

    :meth:`build` lowers a list of layers; :meth:`update` takes the same network with other weights, contexts and gates,
    and lowers it anew only where a mask or a shape has changed. Weights are packed at a call; on the CPU, with no
    gradient asked for, they stay packed as long as a comparison finds the contents that they had, however they may be
    written.

    Example:
        >>> import torch, genfast
        >>> mask = torch.ones(4, 4).tril(-1).repeat_interleave(2, 0)  # x_i's shift and scale see x_j, j < i
        >>> program = genfast.sampling.DegreeProgram.build([genfast.sampling.Layer(torch.randn(8, 4), mask=mask)])
        >>> program.levels
        4
    """

    def __init__(self, layers: Sequence[Layer], structure: _Structure) -> None:
        self.layers = list(layers)
        self._structure = structure
        self._packed: list[tuple[Contents, Tensor]] = []  # shared with what update returns

    @classmethod
    def build(cls, layers: Sequence[Layer], levels: Sequence[int] | Tensor | None = None) -> DegreeProgram:
        """Lowers a network whose last layer gives (N, D * P), the P parameters of input i at [i P, (i + 1) P).

        Args:
            layers: in an order in which each comes after what it takes.
            levels: (D,), in which round each input is solved, from 0; without, each as early as the masks let it.

        Raises:
            TypeError, ValueError: shapes that do not fit, or names and indices that are none.
            LoweringError: an input needs itself, or one of its own or a later level.
        """
        given = None if levels is None else tuple(int(i) for i in levels)
        with ordinary():
            return cls(layers, _lower(list(layers), given))

    def update(self, layers: Sequence[Layer]) -> DegreeProgram:
        """The program of the same network with the tensors of ``layers``."""
        s = self._structure
        same = len(layers) == len(self.layers) and [_signature(layer) for layer in layers] == s.signature
        if not same or not all(_same_mask(layer.mask, kept) for layer, kept in zip(layers, s.masks)):
            return type(self).build(layers, s.given)
        new = type(self)(layers, s)
        new._packed = self._packed
        return new

    @property
    def inputs(self) -> int:
        """D."""
        return self._structure.inputs

    @property
    def width(self) -> int:
        """P, parameters of an input."""
        return self._structure.width

    @property
    def levels(self) -> int:
        """Rounds in which the inputs are solved."""
        return self._structure.levels

    @property
    def order(self) -> Tensor:
        """(D,): the inputs, sorted by level."""
        return self._structure.order

    @property
    def code(self) -> Tensor:
        """The program's numbers, int64 on the CPU."""
        return self._structure.code

    @property
    def multiplications(self) -> int:
        """Of one sample, in the products: what is live and needed."""
        return self._structure.multiplications

    def parameters(self) -> list[Tensor]:
        """The weights and biases."""
        return [t for layer in self.layers for t in (layer.weight, layer.bias) if t is not None]

    def packed(self, dtype: torch.dtype | None = None) -> Tensor:
        """The flat weights in the order that ``code`` names; a function of the weights where a gradient is asked
        for."""
        tensors = self.parameters()
        dtype = tensors[0].dtype if dtype is None else dtype
        watched = torch.compiler.is_compiling() or recorded() or transform() is not None
        if (
            watched
            or any(t.is_inference() for t in tensors)
            or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
        ):
            return self._pack(tensors, dtype)
        if any(type(t) not in (Tensor, nn.Parameter) or not t.is_cpu for t in tensors):
            return self._pack(tensors, dtype)  # on a GPU a comparison would wait, and packing does not
        for contents, packed in self._packed:
            if packed.dtype == dtype and contents.same(tensors):
                return packed
        with ordinary():
            packed = self._pack(tensors, dtype)
        self._packed[:] = [(Contents(tensors), packed)]
        return packed

    def _pack(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        s = self._structure
        for i, (layer, (weight, bias, *_)) in enumerate(zip(self.layers, s.signature), 1):
            for name, t, shape in (("weight", layer.weight, weight), ("bias", layer.bias, bias)):
                if t is not None and t.shape != shape:  # a write through ``data`` may change it
                    raise ValueError(
                        f"DegreeProgram: {name} of layer {i} has shape {tuple(t.shape)}, expected {shape}, which was "
                        "lowered"
                    )
        flat = torch.cat([t.to(dtype).flatten() for t in tensors])
        packed: Tensor = gather_once(flat, *s.on(flat.device)[:2])
        return packed

    def statics(self, dtype: torch.dtype) -> Tensor | None:
        """(N, S): contexts and gates in the order that ``code`` names; None where there are none."""
        given = [t.to(dtype) for layer in self.layers for t in (layer.context, layer.gate) if t is not None]
        if not given:
            return None
        s = self._structure
        flat = torch.cat(given, 1)
        found: Tensor = gather_once(flat, *s.on(flat.device)[2:])
        return found

    def __str__(self) -> str:
        s = self._structure
        return (
            f"degree-ordered program: {s.inputs} inputs of {s.width} parameters in {s.levels} levels, "
            f"{s.units - s.inputs} units, {s.multiplications} products a sample"
        )


def _signature(layer: Layer) -> tuple[object, ...]:
    return (
        tuple(layer.weight.shape),
        None if layer.bias is None else tuple(layer.bias.shape),
        layer.mask is None,
        layer.source,
        layer.before,
        layer.after,
        layer.residual,
        layer.context is None,
        layer.gate is None,
    )


def _same_mask(mask: Tensor | None, kept: _Mask) -> bool:
    if mask is None or kept.live is None:
        return mask is None and kept.live is None
    if torch.compiler.is_compiling():
        same = mask is kept.given
    elif mask.is_cpu:
        same = kept.contents.same([mask])
    else:  # looking at the contents would wait, so PyTorch's count of changes must do
        same = mask is kept.given and kept.version == _version(mask) != -1
    return same or _reads_as(mask, kept)


def _reads_as(mask: Tensor, kept: _Mask) -> bool:
    return kept.live is not None and mask.shape == kept.live.shape and torch.equal(mask.bool().cpu(), kept.live)


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version


def _check(layers: list[Layer]) -> None:
    name = "DegreeProgram"
    if not layers:
        raise ValueError(f"{name}: layers is empty, expected at least one")
    for i, layer in enumerate(layers, 1):
        w = layer.weight
        if not isinstance(w, Tensor) or not w.dtype.is_floating_point:
            kind = w.dtype if isinstance(w, Tensor) else type(w).__name__
            raise TypeError(f"{name}: weight of layer {i} is {kind}, expected a floating-point tensor")
        if w.dim() != 2:
            raise ValueError(f"{name}: weight of layer {i} has shape {tuple(w.shape)}, expected (out, in)")
        if layer.bias is not None and tuple(layer.bias.shape) != (w.shape[0],):
            raise ValueError(f"{name}: bias of layer {i} has shape {tuple(layer.bias.shape)}, expected ({w.shape[0]},)")
        if layer.mask is not None and layer.mask.shape != w.shape:
            raise ValueError(
                f"{name}: mask of layer {i} has shape {tuple(layer.mask.shape)}, expected {tuple(w.shape)}"
            )
        for place in ("before", "after"):
            if getattr(layer, place) not in ACTIVATIONS:
                names = ", ".join(map(repr, ACTIVATIONS))
                raise ValueError(f"{name}: {place}={getattr(layer, place)!r} of layer {i}, expected one of {names}")
        for place in ("source", "residual"):
            at = getattr(layer, place)
            if at is not None and not (0 <= at < i or (place == "source" and at == -1)):
                raise ValueError(f"{name}: {place}={at} of layer {i}, expected an index from 0 (x) to {i - 1}")
        for place in ("context", "gate"):
            t = getattr(layer, place)
            if t is not None and (t.dim() != 2 or t.shape[1] != w.shape[0]):
                raise ValueError(f"{name}: {place} of layer {i} has shape {tuple(t.shape)}, expected (N, {w.shape[0]})")
    inputs, out = layers[0].weight.shape[1], layers[-1].weight.shape[0]
    if not inputs or not out or out % inputs:
        raise ValueError(
            f"{name}: the last layer gives {out} numbers for {inputs} inputs, expected P >= 1 for each of D >= 1 inputs"
        )


def _values(layers: list[Layer]) -> list[_Value]:
    """The arrays of the program, in order, with what their units depend on; the first is x, the last the parameters."""
    inputs = layers[0].weight.shape[1]
    values = [_Value(inputs, torch.eye(inputs, dtype=torch.bool))]
    outputs = [0]  # of x and of each layer: which value
    activated: dict[tuple[int, str], int] = {}

    def append(value: _Value) -> int:
        values.append(value)
        return len(values) - 1

    for i, layer in enumerate(layers):
        source = outputs[layer.source]
        if layer.before != "none":
            if (source, layer.before) not in activated:
                point = _Value(values[source].units, values[source].reach, POINT, layer.before, source=source)
                activated[source, layer.before] = append(point)
            source = activated[source, layer.before]
        before = values[source]
        if layer.weight.shape[1] != before.units:
            raise ValueError(
                f"DegreeProgram: weight of layer {i + 1} has shape {tuple(layer.weight.shape)}, expected (out, "
                f"{before.units})"
            )
        mask = (
            torch.ones(layer.weight.shape, dtype=torch.bool) if layer.mask is None else layer.mask.detach().bool().cpu()
        )
        reach = mask.float() @ before.reach.float() > 0
        residual = None if layer.residual is None else outputs[layer.residual]
        after = layer.after
        # A derivative that does not follow from the value, and what changes the value behind the activation, take a
        # step.
        split = layer.gate is not None or after not in _FROM_VALUE or (residual is not None and after != "none")
        out = len(mask)
        product = _Value(out, reach, PRODUCT, "none" if split else after, i, source, None if split else residual, mask)
        product.context = layer.context is not None
        if residual is not None:
            if values[residual].units != out:
                raise ValueError(
                    f"DegreeProgram: layer {i + 1} gives {out} numbers, its residual {values[residual].units}; "
                    "expected as many"
                )
            if not split:
                product.reach = reach | values[residual].reach
        made = append(product)
        if split:
            both = reach if residual is None else reach | values[residual].reach
            made = append(_Value(out, both, POINT, after, i, made, residual, gate=layer.gate is not None))
        outputs.append(made)
    if outputs[-1] == 0 or values[-1].units % inputs:
        raise AssertionError("the last layer was checked")
    return values


def _input_levels(depends: Tensor, given: tuple[int, ...] | None) -> Tensor:
    """(D,): the round of each input, from which others it depends on, (D, D)."""
    inputs = len(depends)
    own = depends.diagonal().nonzero().flatten().tolist()
    if own:
        raise LoweringError(
            f"DegreeProgram: the parameters of input {own[0]} depend on that input itself, through the masks"
        )
    if given is not None:
        levels = torch.tensor(given, dtype=torch.int64)
        if len(given) != inputs or min(given) < 0 or sorted(set(given)) != list(range(max(given) + 1)):
            raise ValueError(
                f"DegreeProgram: levels={given}, expected {inputs} numbers that take all values from 0 to L - 1"
            )
        wrong = (depends & (levels[:, None] <= levels)).nonzero().tolist()
        if wrong:
            i, j = wrong[0]
            raise LoweringError(
                f"DegreeProgram: input {i} of level {given[i]} depends on input {j} of level {given[j]}, expected a "
                "lower one"
            )
        return levels
    levels = torch.full((inputs,), -1, dtype=torch.int64)
    needed_by, waiting = depends.t().contiguous(), depends.sum(1)  # how many inputs each still waits for
    for level in range(inputs):
        free = ((levels < 0) & (waiting == 0)).nonzero().flatten()
        if not len(free):
            break
        levels[free] = level
        waiting -= needed_by[free].sum(0)
    if bool((levels < 0).any()):
        cycle = (levels < 0).nonzero().flatten().tolist()
        raise LoweringError(
            f"DegreeProgram: inputs {cycle[:8]} depend on one another in a circle, so none can be solved first"
        )
    return levels


def _sort(values: list[_Value], levels: Tensor, width: int) -> None:
    """Leaves out units that nothing needs, and sorts the others by level."""
    for value in values:
        value.needed = torch.zeros(value.units, dtype=torch.bool)
    values[-1].needed[:] = True
    for value in reversed(values[1:]):
        source = values[value.source]
        if value.kind == POINT:
            source.needed |= value.needed
        else:
            assert value.mask is not None
            source.needed |= value.mask[value.needed].any(0)
        if value.residual is not None:
            values[value.residual].needed |= value.needed
    values[0].needed[:] = True
    first = 0
    for value in values:
        ready = ((levels + 1) * value.reach).amax(1)
        if value is values[0]:
            ready = levels
        kept = value.needed.nonzero().flatten()
        value.kept = kept[ready[kept].argsort(stable=True)]
        value.levels = ready[value.kept]
        value.first = first
        first += -(-len(kept) // ALIGNED) * ALIGNED
    last, order = values[-1], values[0].kept
    last.kept = (order[:, None] * width + torch.arange(width)).flatten()
    last.levels = values[0].levels.repeat_interleave(width)


def _places(value: _Value) -> Tensor:
    """Of each unit, where it stands in the sorted order."""
    places = torch.full((value.units,), -1, dtype=torch.int64)
    places[value.kept] = torch.arange(len(value.kept))
    return places


def _lower(layers: list[Layer], given: tuple[int, ...] | None) -> _Structure:
    _check(layers)
    values = _values(layers)
    inputs, width = values[0].units, values[-1].units // values[0].units
    depends = values[-1].reach.unflatten(0, (inputs, width)).any(1)
    levels = _input_levels(depends, given)
    _sort(values, levels, width)
    count = int(levels.max()) + 1
    order = values[0].kept
    ends = torch.bincount(values[0].levels, minlength=count).cumsum(0)

    steps = [v for v in values[1:] if len(v.kept)]
    number = {id(v): i for i, v in enumerate(steps)}
    # Where each layer's weight and bias, and each context and gate, begin among all of them.
    weight_at, bias_at, static_at, at, wide = {}, {}, {}, 0, 0
    for i, layer in enumerate(layers):
        weight_at[i] = at
        at += layer.weight.numel()
        if layer.bias is not None:
            bias_at[i] = at
            at += layer.bias.numel()
        for name in ("context", "gate"):
            if getattr(layer, name) is not None:
                static_at[i, name] = wide
                wide += layer.weight.shape[0]

    groups: list[list[int]] = []
    index: list[Tensor] = []
    packed = multiplications = 0
    for level in range(count):
        for value in steps:
            rows = (value.levels == level).nonzero().flatten()
            if not len(rows):
                continue
            live = stride = offset = 0
            if value.kind == PRODUCT:
                assert value.mask is not None
                source = values[value.source]
                mask = value.mask[value.kept[rows]][:, source.kept]
                used = mask.any(0).nonzero()
                live = int(used.max()) + 1 if len(used) else 0
                stride = -(-live // ALIGNED) * ALIGNED
                offset = packed
                block = torch.zeros(len(rows), stride, dtype=torch.int64)
                where = value.kept[rows][:, None] * source.units + source.kept[:live] + weight_at[value.layer] + 1
                block[:, :live] = where * mask[:, :live]
                index.append(block.flatten())
                packed += block.numel()
                multiplications += len(rows) * live
            groups.append([level, number[id(value)], int(rows[0]), len(rows), live, offset, stride])

    static_index: list[Tensor] = []
    columns = 0
    fields: list[list[int]] = []
    tables: list[list[list[int]]] = []
    for value in steps:
        source = values[value.source]
        bias = context = gate = -1
        if value.kind == PRODUCT and value.layer in bias_at:
            bias = packed
            room = -(-len(value.kept) // ALIGNED) * ALIGNED
            where = torch.zeros(room, dtype=torch.int64)
            where[: len(value.kept)] = value.kept + bias_at[value.layer] + 1
            index.append(where)
            packed += room
        if value.context:
            context, columns = columns, columns + len(value.kept)
            static_index.append(value.kept + static_at[value.layer, "context"] + 1)
        if value.gate:
            gate, columns = columns, columns + len(value.kept)
            static_index.append(value.kept + static_at[value.layer, "gate"] + 1)
        fields.append(
            [
                value.kind,
                ACTIVATIONS.index(value.activation),
                source.first,
                len(source.kept),
                value.first,
                len(value.kept),
                bias,
                context,
                gate,
            ]
        )
        tables.append(
            [
                (_places(source)[value.kept] + source.first).tolist() if value.kind == POINT else [],
                []
                if value.residual is None
                else (_places(values[value.residual])[value.kept] + values[value.residual].first).tolist(),
            ]
        )
    last = values[-1]
    units = -(-(last.first + len(last.kept)) // ALIGNED) * ALIGNED
    header = [inputs, width, count, len(steps), len(groups), units, columns, packed, last.first]
    assert len(header) == HEADER
    at = HEADER + inputs + count + 11 * len(steps) + 7 * len(groups)
    tail: list[int] = []
    for field_, pair in zip(fields, tables):
        for table in pair:
            field_.append(at + len(tail) if table else -1)
            tail += table
    code = [
        *header,
        *order.tolist(),
        *ends.tolist(),
        *(n for f in fields for n in f),
        *(n for g in groups for n in g),
        *tail,
    ]
    gathered, inverse = _gather(
        index, sum(layer.weight.numel() + (0 if layer.bias is None else len(layer.bias)) for layer in layers)
    )
    static_gathered, static_inverse = _gather(static_index, wide)
    return _Structure(
        code=torch.tensor(code, dtype=torch.int64),
        inputs=inputs,
        width=width,
        order=order,
        levels=count,
        units=units,
        packed=packed,
        index=gathered,
        inverse=inverse,
        statics=columns,
        static_index=static_gathered,
        static_inverse=static_inverse,
        multiplications=multiplications,
        signature=[_signature(layer) for layer in layers],
        masks=[_kept_mask(layer.mask) for layer in layers],
        given=given,
    )


def _kept_mask(mask: Tensor | None) -> _Mask:
    if mask is None:
        return _Mask(None, 0, Contents([]), None)
    return _Mask(mask, _version(mask), Contents([mask]), mask.detach().bool().to("cpu", copy=True))


def _gather(index: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Places, each used once, and the places' inverse."""
    places = torch.cat(index) if index else torch.empty(0, dtype=torch.int64)
    kind = torch.int32 if max(size, len(places)) < 2**31 - 1 else torch.int64
    inverse = torch.zeros(size + 1, dtype=kind)
    inverse[places] = torch.arange(1, len(places) + 1, dtype=kind)
    return places.to(kind), inverse[1:]
