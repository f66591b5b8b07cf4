"""Our kernels inside models made with zuko, nflows or normflows: :func:`accelerate`, :func:`restore`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

from torch import nn

from ._swap import Swapped, by_path, reason_to_leave, swap, unswap

__all__ = ["Entry", "Report", "Swapped", "accelerate", "restore"]

PEERS = ("zuko", "nflows", "normflows")


@dataclass(frozen=True)
class Entry:
    """One module of another library: where it is, what became of it, and why.

    Attributes:
        path: as ``named_modules`` gives it, all of them with commas for a shared module; "(model)" for the model itself.
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
    """What :func:`accelerate` or :func:`restore` did; ``print`` shows it as a table."""

    entries: tuple[Entry, ...]
    summary: str

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.status == "swapped")

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.status == "left")

    def __str__(self) -> str:
        rows = [(e.path, e.name, e.status, e.detail + (f"; {e.falls_back}" if e.falls_back else "")) for e in self.entries]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[3]]) for row in rows]
        return "\n".join([self.summary, *lines])


def accelerate(model: nn.Module) -> Report:
    """Swaps our kernels, in place, into a model made with zuko, nflows or normflows.

    The parameters stay the same objects under the same state_dict keys, and the outputs and gradients the same to rounding,
    in training and in evaluation. Calls that the kernels do not cover (half types, autocast, hooks on inner layers) run the
    library's own method. A copy or a pickle of the model is accelerated too; loading such a pickle needs genfast. A second
    call changes nothing more.

    Args:
        model: any module; what is not of the three libraries in it is not touched.

    Returns:
        A report with an entry for each module that computes a transform: what was swapped, what was left and why.

    Raises:
        TypeError: ``model`` is not a module (zuko's distributions are not; give the flow that makes them).

    Example:
        >>> import torch, genfast
        >>> print(genfast.accelerate(torch.nn.Linear(2, 2)))
        nothing to swap: the model holds no module of zuko, nflows or normflows
    """
    _check("accelerate", model)
    entries = []
    known = {peer: _integration(peer) for peer in PEERS if any(_is_of(peer, m) for m in model.modules())}
    for module, paths in by_path(model):
        for peer, integration in known.items():
            if _is_of(peer, module):
                entry = _accelerate_one(integration, module, ", ".join(p or "(model)" for p in paths))
                entries += [entry] if entry else []
                break
    if not known:
        return Report((), "nothing to swap: the model holds no module of zuko, nflows or normflows")
    count = sum(e.status == "swapped" for e in entries)
    summary = f"{count} of {len(entries)} modules of {', '.join(known)} run on genfast's kernels"
    return Report(tuple(entries), summary)


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
        (module, ", ".join(p or "(model)" for p in paths)) for module, paths in by_path(model) if isinstance(module, Swapped)
    ]
    for module, path in found:
        if "original" not in type(module).__dict__:
            raise RuntimeError(
                f"restore: {path} was given the class {type(module).__name__!r} after it was accelerated; undo that first"
            )
    entries = []
    for module, path in found:
        unswap(module)
        entries.append(Entry(path, type(module).__name__, "left", "restored"))
    return Report(tuple(entries), f"{len(entries)} module{'s' * (len(entries) != 1)} restored")


def _accelerate_one(integration: ModuleType, module: nn.Module, path: str) -> Entry | None:
    """Swaps one module where that can be; None for containers and plain networks, which need nothing."""
    name = type(module).__name__
    if not isinstance(module, Swapped):
        # The nearest served class in the order of inheritance, so that a subclass's own entry goes first.
        mixins = {mixin.peer: mixin for mixin in integration.SWAPS}
        mixin = next((mixins[cls] for cls in type(module).__mro__ if cls in mixins), None)
        if mixin is None:
            if isinstance(module, integration.TRANSFORMS) and not isinstance(module, integration.CONTAINERS):
                return Entry(path, name, "left", integration.why_left(module))
            return None
        reason = reason_to_leave(module, mixin)
        if reason:
            return Entry(path, name, "left", reason)
        swap(module, mixin)
    assert isinstance(module, Swapped)
    return Entry(path, name, "swapped", module.mixin.does(module), module.mixin.falls_back(module))


def _integration(peer: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{peer}")


def _is_of(peer: str, module: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == peer for cls in type(module).__mro__)


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}, expected a torch.nn.Module")
