"""Our kernels inside models made with zuko, nflows or normflows: :func:`accelerate`, :func:`report`,
:func:`restore`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Literal, TypeVar, overload

from torch import nn

from ._class_swap import Swapped, by_path, reason_to_leave, swap, unswap

__all__ = ["Entry", "Report", "Swapped", "accelerate", "report", "restore"]

Model = TypeVar("Model", bound=nn.Module)

PEERS = ("zuko", "nflows", "normflows")


@dataclass(frozen=True)
class Entry:
    """One module of another library: where it is, what became of it, and why.

    Attributes:
        path: as ``named_modules`` gives it, all of them with commas for a shared module; "(model)" for the model
            itself.
        name: its class.
        status: "swapped", or "left" as it was.
        detail: what our kernels do, or why it was left.
        falls_back: for a swapped module, the calls that its own methods keep.
    """

    path: str
    name: str
    status: Literal["swapped", "left"]
    detail: str
    falls_back: str = ""


@dataclass(frozen=True)
class Report:
    """What became of each module of another library; ``print`` shows it as a table."""

    entries: tuple[Entry, ...]
    summary: str

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.status == "swapped")

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.status == "left")

    def __str__(self) -> str:
        rows = [
            (e.path, e.name, e.status, e.detail + (f"; {e.falls_back}" if e.falls_back else "")) for e in self.entries
        ]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in rows]
        return "\n".join([self.summary, *lines])


@overload
def accelerate(model: Model, *, report: Literal[False] = False) -> Model: ...
@overload
def accelerate(model: Model, *, report: Literal[True]) -> tuple[Model, Report]: ...
def accelerate(model: Model, *, report: bool = False) -> Model | tuple[Model, Report]:
    """Swaps our kernels, in place, into a model made with zuko, nflows or normflows, and returns it.

    The parameters stay the same objects under the same state_dict keys, and the outputs and gradients the same to
    rounding, in training and in evaluation. Calls that the kernels do not cover run the library's own method: half
    types, autocast, hooks on inner layers, transforms of torch.func, export, tracing, fake and meta tensors. A copy or
    a pickle of the model is accelerated too; loading such a pickle needs genfast. A second call changes nothing more.

    Args:
        model: any module; what is not of the three libraries in it is not touched.
        report: whether the :class:`Report` comes beside the model. Before version 0.2 it was all that came; a call
            whose result is not used does what it did.

    Returns:
        ``model`` itself, so that ``flow = genfast.accelerate(flow)`` and ``genfast.accelerate(flow)`` do the same; with
        ``report=True`` (model, report), as :func:`report` gives it at any later time.

    Raises:
        TypeError: ``model`` is not a module (zuko's distributions are not; give the flow that makes them).

    Example:
        >>> import torch, genfast
        >>> model, report = genfast.accelerate(torch.nn.Linear(2, 2), report=True)
        >>> print(report)
        nothing to swap: the model holds no module of zuko, nflows or normflows
    """
    _check("accelerate", model)
    for integration, module, _ in _served(model):
        mixin = _mixin(integration, module)
        if mixin is not None and not isinstance(module, Swapped) and not reason_to_leave(module, mixin):
            swap(module, mixin)
    return (model, _report(model)) if report else model


def report(model: nn.Module) -> Report:
    """What :func:`accelerate` did to a model, or to a part of one: which modules were swapped, which were left, and
    why.

    Args:
        model: any module, accelerated or not.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch, genfast
        >>> print(genfast.report(genfast.accelerate(torch.nn.Linear(2, 2))))
        nothing to swap: the model holds no module of zuko, nflows or normflows
    """
    _check("report", model)
    return _report(model)


def restore(model: nn.Module) -> Report:
    """Undoes :func:`accelerate`: every module gets the class back that it had.

    Args:
        model: an accelerated model, or a part of one.

    Returns:
        A report of the modules that were put back.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: a module was given another class after it was accelerated (by parametrizing it); undo that first.

    Example:
        >>> import torch, genfast
        >>> print(genfast.restore(torch.nn.Linear(2, 2)))
        0 modules restored
    """
    _check("restore", model)
    found = [
        (module, ", ".join(p or "(model)" for p in paths))
        for module, paths in by_path(model)
        if isinstance(module, Swapped)
    ]
    for module, path in found:
        if "original" not in type(module).__dict__:
            raise RuntimeError(
                f"restore: {path} was given the class {type(module).__name__!r} after it was accelerated; undo that "
                "first"
            )
    entries = []
    for module, path in found:
        unswap(module)
        entries.append(Entry(path, type(module).__name__, "left", "restored"))
    return Report(tuple(entries), f"{len(entries)} module{'s' * (len(entries) != 1)} restored")


def _served(model: nn.Module) -> Iterator[tuple[ModuleType, nn.Module, str]]:
    """The modules of the three libraries, each once, with the integration that serves it and its paths."""
    peers = {peer: _integration(peer) for peer in PEERS if any(_is_of(peer, m) for m in model.modules())}
    for module, paths in by_path(model):
        for peer, integration in peers.items():
            if _is_of(peer, module):
                yield integration, module, ", ".join(p or "(model)" for p in paths)
                break


def _mixin(integration: ModuleType, module: nn.Module) -> type[Swapped] | None:
    """Of the nearest served class in the order of inheritance, so that a subclass's own entry goes first."""
    mixins: dict[type, type[Swapped]] = {mixin.peer: mixin for mixin in integration.SWAPS}
    return next((mixins[cls] for cls in type(module).__mro__ if cls in mixins), None)


def _report(model: nn.Module) -> Report:
    entries = [entry for served in _served(model) if (entry := _entry(*served)) is not None]
    names = [peer for peer in PEERS if any(_is_of(peer, m) for m in model.modules())]
    if not names:
        return Report((), "nothing to swap: the model holds no module of zuko, nflows or normflows")
    count = sum(e.status == "swapped" for e in entries)
    return Report(tuple(entries), f"{count} of {len(entries)} modules of {', '.join(names)} run on genfast's kernels")


def _entry(integration: ModuleType, module: nn.Module, path: str) -> Entry | None:
    """What became of one module; None for containers and plain networks, which need nothing."""
    name = type(module).__name__
    if isinstance(module, Swapped):
        return Entry(path, name, "swapped", module.mixin.does(module), module.mixin.falls_back(module))
    mixin = _mixin(integration, module)
    if mixin is not None:
        return Entry(path, name, "left", reason_to_leave(module, mixin) or "not accelerated: call genfast.accelerate")
    if isinstance(module, integration.TRANSFORMS) and not isinstance(module, integration.CONTAINERS):
        return Entry(path, name, "left", integration.why_left(module))
    return None


def _integration(peer: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{peer}")


def _is_of(peer: str, module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == peer for cls in type(module).__mro__)


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}, expected a torch.nn.Module")
