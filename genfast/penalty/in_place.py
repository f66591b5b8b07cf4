"""Functions that write to what they are given: whether they may, and how the result takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._torch_private import storage_uses
from .handlers import name_of
from .tape import Rule, Tape, Unsupported


def _readers(x: Tensor) -> int:
    """How many tensors other than ``x`` read its memory."""
    # one for the tensor and one for the storage object that asks
    return storage_uses(x.untyped_storage()) - 2


def overwritten(tape: Tape, rule: Rule, inputs: Sequence[Tensor], place: Tensor, y: Tensor) -> Tensor:
    """Records a rule whose output takes the place of ``place``."""
    tape.record(rule, inputs, y)
    return taken(tape, place, y)


def taken(tape: Tape, place: Tensor, y: Tensor) -> Tensor:
    """``place`` with the active ``y`` in its place."""
    slot = tape.slot(y)
    if slot < 0 or y.shape != place.shape or y.dtype != place.dtype:
        raise Unsupported(f"{tape.calling} in place, whose result does not depend on x or has another shape or dtype")
    if y.data_ptr() != place.data_ptr():
        place.data = y.detach()
    if tape.slot(place) < 0:
        place.requires_grad_()
    tape.move(place, slot)
    return place


def may_overwrite(tape: Tape, func: Any, place: Any) -> bool:
    """Whether the memory of ``place`` may be overwritten: nothing else reads it.

    Where only rules do, which keep what their sweeps need, the result takes its place in memory of its own (False).
    A constant becomes active, as it does in PyTorch.
    """
    if not isinstance(place, Tensor):
        raise Unsupported(f"{name_of(func)} in place on a {type(place).__name__}")
    readers = _readers(place)
    slot = tape.slot(place)
    if slot < 0:
        parts = (part for m in tape.modules for part in m.modules())
        lasting = any(place is x for part in parts for x in (*part.buffers(False), *vars(part).values()))
        if readers or place.requires_grad or lasting or not place.dtype.is_floating_point:
            raise Unsupported(f"{name_of(func)} of a value that depends on x into a tensor that does not")
        return False
    if not readers:
        return True
    ours = {id(x): x for x in (place._base,) if x is not None}  # handlers make views of aliases that no one else sees
    if readers == len(ours):
        return True
    for rule in tape.rules:
        for value in vars(rule).values():
            for x in value if isinstance(value, list) else (value,):
                if isinstance(x, Tensor) and x is not place:
                    ours[id(x)] = x
                    if x._base is not None:
                        ours[id(x._base)] = x._base
    pointer = place.untyped_storage().data_ptr()
    if readers > sum(x.untyped_storage().data_ptr() == pointer for x in ours.values()):
        raise Unsupported(f"{name_of(func)} in place on memory that another tensor reads")
    return False
