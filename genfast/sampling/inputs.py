"""What a network takes: how whole numbers enter it, and its conditions, of any names.

A sampler and the checks call other people's networks. Here a condition is bound to the arguments of the network's
forward, and it is found out whether a network takes the levels 0 ... L - 1 as they are or floats, which someone must
then have scaled.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._modes import evaluating
from .._torch_private import TorchDispatchMode

INPUTS = ("integers", "unit", "signed")
Network = Callable[..., Any]
Input = str | Callable[[Tensor], Tensor] | None
Context = Tensor | Sequence[Any] | Mapping[str, Any] | None


# ---- networks ----


def _layers(network: Any) -> list[Any]:
    """The network, what it wraps, what that wraps, and so on."""
    layers = [network]
    while True:
        outer = layers[-1]
        if isinstance(outer, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            layers.append(outer.module)
        elif isinstance(outer, nn.Module) and isinstance(getattr(outer, "_orig_mod", None), nn.Module):
            layers.append(outer._orig_mod)
        else:
            return layers


def unwrapped(network: Any) -> Any:
    """The network inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``, which compute the
    same."""
    return _layers(network)[-1]


def wrappers(network: Any) -> list[nn.Module]:
    """What :func:`unwrapped` takes off."""
    return _layers(network)[:-1]


def modules_of(network: Any) -> list[nn.Module]:
    """The modules that a network is or, of a method or a ``functools.partial``, is made from; none of another
    function."""
    if isinstance(network, nn.Module):
        return [network]
    if isinstance(network, functools.partial):
        return [m for part in (network.func, *network.args, *network.keywords.values()) for m in modules_of(part)]
    owner = getattr(network, "__self__", None)
    return [owner] if isinstance(owner, nn.Module) else []


@contextlib.contextmanager
def buffers_as_they_were(*networks: nn.Module) -> Iterator[None]:
    """Puts back buffers that a forward pass has written into."""
    before = [(b, b.detach().clone()) for network in networks for b in network.buffers()]
    try:
        yield
    finally:
        for buffer, values in before:
            if not torch.equal(buffer, values):
                with torch.no_grad():
                    buffer.copy_(values)


@contextlib.contextmanager
def probing(network: Any, device: torch.device) -> Iterator[None]:
    """For a call that only asks: in evaluation mode, without gradients, random numbers and buffers as they were
    afterwards."""
    modules = modules_of(network)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), evaluating(*modules), buffers_as_they_were(*modules):
        yield


def name_of(network: Any) -> str:
    inner = unwrapped(network)
    return (
        type(inner).__name__ if isinstance(inner, nn.Module) else str(getattr(inner, "__name__", type(inner).__name__))
    )


def dtype_of(network: Any) -> torch.dtype:
    """The floating-point type in which a network computes: that of its first parameter that has one."""
    tensors = (p for m in modules_of(network) for p in (*m.parameters(), *m.buffers()))
    return next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())


# ---- conditions ----


class Unknown:
    """A condition whose values come later."""


@dataclass(frozen=True)
class Conditions:
    """What a network is called with besides the image."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()  # of ``args``, where the network names them

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)

    def call(self, network: Network, x: Tensor) -> Any:
        return network(x, *self.args, **self.kwargs)

    def items(self) -> list[tuple[str, Any]]:
        """Every condition with its name."""
        return [*zip(self.names, self.args), *self.kwargs.items()]

    def tensors(self) -> list[Tensor]:
        """Those that have rows."""
        return [t for _, value in self.items() for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.dim()]

    def structure(self) -> tuple[tuple[str, str], ...]:
        """Names, and what is no tensor: what a program is made for."""
        return tuple((k, "" if isinstance(v, (Tensor, Unknown)) else repr(v)) for k, v in self.items())

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditions:
        """With ``function`` of every tensor that has rows."""

        def mapped(value: Any) -> Any:
            return pytree.tree_map_only(Tensor, lambda t: function(t) if t.dim() else t, value)

        return Conditions(tuple(map(mapped, self.args)), {k: mapped(v) for k, v in self.kwargs.items()}, self.names)

    def rows(self, rows: slice) -> Conditions:
        return self.map(lambda t: t[rows])

    def expanded(self, n: int) -> Conditions:
        """For ``n`` images, of a condition with one row."""
        return self.map(lambda t: t.expand(n, *t.shape[1:]) if len(t) == 1 else t)

    def check_rows(self, name: str, n: int) -> None:
        """Raises unless every tensor has ``n`` rows."""
        for label, value in self.items():
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) != n:
                    raise ValueError(f"{name}: {_said(label)} has {len(leaf)} rows, expected n={n}")


def of_rows(context: Context, rows: slice, n: int) -> Context:
    """Of every tensor of a condition that has ``n`` rows these rows."""
    part: Context = pytree.tree_map_only(Tensor, lambda t: t[rows] if t.dim() and len(t) == n else t, context)
    return part


def _said(label: str) -> str:
    return "context" if label in ("context", "") else f"context {label!r}"


def _parameters(network: Any) -> list[inspect.Parameter] | None:
    """The arguments of a network behind the image, or None where Python does not know them."""
    inner = unwrapped(network)
    try:
        every = list(inspect.signature(inner.forward if isinstance(inner, nn.Module) else inner).parameters.values())
    except (TypeError, ValueError):
        return None
    if every and every[0].kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD):
        return every[1:]
    return every


def _is_condition(p: inspect.Parameter) -> bool:
    """An argument that a network must have, or that may be left out; one with a number by default is an option."""
    return p.default is inspect.Parameter.empty or p.default is None


def bind(name: str, network: Any, context: Context) -> Conditions:
    """The condition as arguments of the network.

    Args:
        context: a tensor for the network's one condition; a sequence for several, in their order; or a dict by their
            names.

    Raises:
        ValueError: a condition that the network needs and that is missing, or one that it does not take, by name.
    """
    parameters = _parameters(network)
    if parameters is None:  # an extension's function, say
        if isinstance(context, Mapping):
            return Conditions(kwargs=dict(context))
        every = () if context is None else tuple(context) if _several(context) else (context,)
        return Conditions(every, names=tuple(f"{i}" for i in range(len(every))))
    kinds = inspect.Parameter
    named = [p for p in parameters if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    many = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    open_ = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    required = [p.name for p in named if p.default is kinds.empty]
    conditions = [p for p in named if _is_condition(p)]
    surplus: list[Any] = []
    values: dict[str, Any] = {}
    if isinstance(context, Mapping):
        values = {str(k): v for k, v in context.items()}
        unknown = [k for k in values if k not in {p.name for p in named}]
        if unknown and not open_:
            takes = ", ".join(repr(p.name) for p in named) or "no condition"
            raise ValueError(f"{name}: context has {', '.join(map(repr, unknown))}, the network takes {takes}")
    elif context is not None and _several(context):
        each = list(context)
        # What stands in the signature with a number by default is an option, which a sequence of conditions passes
        # over.
        slots = [p.name for p in conditions]
        values, surplus = dict(zip(slots, each)), each[len(slots) :]
        if surplus and not many:
            takes = ", ".join(map(repr, slots)) or "none"
            raise ValueError(f"{name}: context has {len(each)} conditions, the network takes {len(slots)}: {takes}")
    elif context is not None:
        usual = (
            [p for p in conditions if p.name == "context"]
            or [p for p in conditions if p.name in required]
            or conditions
        )
        if usual:
            values = {usual[0].name: context}
        elif many:
            surplus = [context]
        elif open_:
            raise ValueError(f"{name}: the network takes conditions by name alone; give context={{name: values}}")
        else:
            raise ValueError(f"{name}: context was given, but the network takes none")
    missing = [n for n in required if n not in values]
    if missing:
        raise ValueError(f"{name}: the network needs {', '.join(map(repr, missing))}, which context does not give")
    # By position where that is the only way, and whatever stands before it; by name otherwise.
    by_position = [
        p for p in named if p.kind is kinds.POSITIONAL_ONLY or (surplus and p.kind is kinds.POSITIONAL_OR_KEYWORD)
    ]
    used = [p for p in by_position if p.name in values]
    args, names = [], []
    for p in by_position[: by_position.index(used[-1]) + 1] if used else by_position if surplus else []:
        args.append(values.pop(p.name) if p.name in values else p.default)
        names.append(p.name)
    args += surplus
    names += [f"{i}" for i in range(len(names), len(args))]
    return Conditions(tuple(args), values, tuple(names))


def _several(context: Any) -> bool:
    return isinstance(context, Sequence) and not isinstance(context, (str, bytes))


# ---- how whole numbers enter ----


def check_input(name: str, value: Any) -> None:
    if value is not None and not callable(value) and value not in INPUTS:
        raise ValueError(f"{name}: input={value!r}, expected one of {', '.join(map(repr, INPUTS))}, a function or None")


def feed(images: Tensor, value: Input, levels: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers as the network takes them."""
    if value is None or value == "integers":
        return images
    if callable(value):
        return value(images)
    wide = images.to(dtype if dtype.itemsize >= 4 else torch.float32)
    scaled = wide / (levels - 1) if value == "unit" else 2 * wide / (levels - 1) - 1
    return scaled.to(dtype)


_ARITHMETIC = {f"aten::{name}" for name in ("add", "sub", "rsub", "mul", "div", "neg", "true_divide")}
_MOVES = {
    f"aten::{name}" for name in (
        "view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice",
        "select",
        "clone", "alias", "detach", "contiguous", "split", "split_with_sizes", "chunk", "unbind", "cat", "stack", "pad",
        "constant_pad_nd", "unfold", "movedim",
    )
}  # fmt: skip


class _Entering(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows an image of whole numbers into a network, until they have become floats.

    By an explicit conversion, an embedding or a comparison, the network takes whole numbers. Arithmetic with floats
    converts too, and may be meant for floats; it is taken for a scale of whole numbers if it brings them into [-1, 1]
    on the way.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.whole, self.floats = {id(image): image}, dict[int, Tensor]()
        self.found: str | None = None
        self.smooth = True  # nothing but conversions and arithmetic, which a gradient passes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        whole = any(id(a) in self.whole for a in operands)
        if not whole and not any(id(a) in self.floats for a in operands):
            return out
        name = func._schema.name
        plain = name in _ARITHMETIC or name in _MOVES or name == "aten::_to_copy"
        for result in (r for r in pytree.tree_leaves(out) if isinstance(r, Tensor)):
            if not result.is_floating_point():
                self.whole[id(result)] = result
                self.smooth = self.smooth and plain
            elif name == "aten::_to_copy" and whole:
                self.found = self.found or "integers"
            elif whole and not plain:
                self.found, self.smooth = self.found or "integers", False
            elif self.found is None and not plain:
                self.found = "floats"
            elif self.found is None:
                self.floats[id(result)] = result
                if name in _ARITHMETIC and result.numel() and float(result.detach().abs().amax()) <= 1.001:
                    self.found = "integers"
        return out


@dataclass(frozen=True)
class Entrance:
    """How whole numbers enter a network, and whether its output can be differentiated by them as floats."""

    input: Input
    smooth: bool
    channels: int  # of the output


def entrance(
    name: str,
    network: Any,
    conditions: Conditions,
    shape: Sequence[int],
    levels: int,
    value: Input,
    device: torch.device,
    n: int = 1,
) -> Entrance:
    """Calls the network once with ``n`` images of ``shape``; see :class:`_Entering`. Modules are in evaluation mode.

    Raises:
        ValueError: the network takes floats, and ``value`` is None; or it takes no such image.
    """
    inner, dtype = unwrapped(network), dtype_of(network)
    image = torch.randint(levels, (n, *shape), generator=torch.Generator().manual_seed(0))
    image.view(-1)[0] = levels - 1  # an interval that is tested must be filled
    image = image.to(device)
    one = conditions.rows(slice(0, n))

    def called(how: Input) -> Tensor:
        try:
            return answered(how)
        except Exception as error:  # a network may refuse what it is given in any way
            raise _refusal(name, inner, shape, conditions, error) from error

    def answered(how: Input) -> Tensor:
        out = one.call(inner, feed(image, how, levels, dtype))
        if not isinstance(out, Tensor) or out.dim() != image.dim() or len(out) != n or out.shape[2:] != image.shape[2:]:
            what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise ValueError(f"{name}: the network gives {what}, expected ({n}, ..., {', '.join(map(str, shape[1:]))})")
        return out

    if value is not None and value != "integers":
        return Entrance(value, False, called(value).shape[1])
    follower = _Entering(image)
    try:
        with follower:
            out = called("integers")
    except (ValueError, TypeError, NotImplementedError):
        if value is not None:
            raise
        called("unit")
        follower.found = "floats"
    if value is None and follower.found == "floats":
        raise ValueError(
            f"{name}: {name_of(network)} takes floats; say by input= which floats the levels 0 to {levels - 1} are: "
            f"'unit' (x / {levels - 1}), 'signed' (2 x / {levels - 1} - 1), 'integers' (as they are) or a function of "
            "them"
        )
    return Entrance("integers", follower.smooth, out.shape[1])


def _refusal(name: str, network: Any, shape: Sequence[int], conditions: Conditions, error: Exception) -> Exception:
    """The network's error with what was asked of it."""
    said, kind = str(error), type(error) if type(error) in (TypeError, NotImplementedError) else ValueError
    if not said.startswith(f"{name}: "):
        given = " with this context" if conditions else ""
        said = f"{name}: {name_of(network)} takes no images of {tuple(shape)}{given}: {said or type(error).__name__}"
    return kind(said)


def own_input(network: Any) -> Input:
    """Whole numbers, of our models, which say so; None of a network that has to be asked, as one made from them has."""
    inner = unwrapped(network)
    return getattr(type(inner), "input", None) if type(inner).__module__.startswith("genfast.models.") else None


def entry(
    name: str, value: Input, shape: Sequence[int], levels: int, device: torch.device
) -> tuple[float, float] | Tensor | None:
    """How the cached engine makes floats of levels: as :func:`genfast.sampling.lowering.lower` takes it.

    Raises:
        ValueError: a function that is not of each pixel alone.
    """
    if value is None or value == "integers":
        return None
    if value == "unit":
        return 1 / (levels - 1), 0.0
    if value == "signed":
        return 2 / (levels - 1), -1.0
    assert callable(value)
    colours, spatial = shape[0], tuple(shape[1:])
    every = (
        torch.arange(levels, device=device)
        .view(levels, *(1,) * len(shape))
        .expand(levels, *shape[:1], *(1,) * len(spatial))
    )
    images = torch.randint(levels, (2, *shape), generator=torch.Generator().manual_seed(0)).to(device)
    try:
        table, seen = value(every.clone()).float(), value(images.clone()).float()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{name}: input is a function that fails on whole numbers {tuple(every.shape)}: {error}"
        ) from error
    features = table.shape[1] if table.dim() > 1 else 0
    fits = table.shape == (levels, features, *every.shape[2:]) and seen.shape == (2, features, *spatial)
    if fits and colours in (1, features):
        table = table.flatten(1)
        looked_up = table[images[:, 0]].movedim(-1, 1) if colours == 1 else _by_colour(table, images)
        if torch.allclose(looked_up, seen, rtol=1e-6, atol=0, equal_nan=True):
            return table.cpu()
    raise ValueError(f"{name}: input is a function that is not of each pixel alone, which has no pixel program")


def _by_colour(table: Tensor, images: Tensor) -> Tensor:
    return torch.stack([table[images[:, c], c] for c in range(images.shape[1])], 1)
