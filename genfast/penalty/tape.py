"""The record of one forward pass of a critic, over which ``sweeps.py`` finds what double backward would.

The pass is recorded by a TorchFunctionMode: the functions that the critic calls on what depends on x ("active" tensors)
reach ``Tape.__torch_function__``, which looks up their handlers in ``HANDLERS``; each runs its function and records a
``Rule``. What does not depend on x, weights and how they are made of parameters, runs under autograd as usual, and the
gradients found here continue there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_private import saved_tensor_hooks, set_grad_enabled

if TYPE_CHECKING:
    from .sweeps import Sweeps

Maybe = Tensor | None
_SERIAL = itertools.count()
Handler = Callable[["Tape", Any, tuple[Any, ...], dict[str, Any]], Any]


class Unsupported(Exception):
    """The critic does what no rule can follow; the message says what."""


class MoreNeeded(Exception):
    """A layer with curvature appeared in a pass that had kept no activations, since earlier passes had none."""


class PlainLayoutNeeded(Exception):
    """Random numbers were to be drawn in the memory order of a tensor that another order of channels has changed."""


class _Untouched(torch.autograd.graph.saved_tensors_hooks):
    """Saves tensors as they are, whatever a checkpoint around the call would do: its recomputation is of another
    function."""

    def __init__(self) -> None:
        super().__init__(_same, _same)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def version(tensor: Tensor) -> int:
    """How often the memory of ``tensor`` has been written to in place; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


class Rule:
    """One recorded function. ``ins`` and ``outs`` are the slots of its active inputs and outputs.

    kind: what ``genfast.explain`` calls it.
    couples: what it is, if it is known to mix the samples of a batch.
    curved: whether its Jacobian depends on its active inputs.
    per_sample: whether, axis 0 of its inputs being the batch, so is that of its outputs, and it keeps the samples
        apart.
    prefix: whether its methods also take the first rows of the batch alone.
    fresh: whether what its methods return is in memory of its own.
    """

    kind = ""
    couples = ""
    curved = False
    per_sample = True
    prefix = False
    fresh = False
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    module = ""
    called = ""
    # the name of a call whose derivatives are compared with PyTorch's double backward once; "" for rules of ours
    proven = ""
    saved_versions: tuple[tuple[str, int], ...] = ()

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        """Where the batch, along ``axis`` of the input x, lies in the output y; -1 where samples meet, or it is not
        known."""
        return -1

    @property
    def collects(self) -> bool:
        """Whether it has parameters of its own to find gradients for."""
        return False

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        """J^T g."""
        raise NotImplementedError

    def release(self) -> None:
        """Lets go of what its sweeps have used."""

    def watch(self) -> None:
        """Notes the versions of all tensors that the rule keeps."""
        self.saved_versions = tuple((name, version(x)) for name, x in vars(self).items() if isinstance(x, Tensor))

    def check(self) -> None:
        """Makes sure that none has been written to since: PyTorch's own backward refuses that too."""
        for name, before in self.saved_versions:
            x = getattr(self, name, None)
            if isinstance(x, Tensor) and version(x) != before:
                raise Unsupported(
                    f"a tensor {tuple(x.shape)} that {self.called or self.kind} needs was changed in place after use"
                )

    def chain(self, sweeps: Sweeps, b: list[Maybe]) -> list[Maybe]:
        """J^T b; what is needed of b later is kept."""
        return self.pull(sweeps, b)

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        """J t if it is wanted; collects d<b, J t + f' f(h)>/dtheta."""
        raise NotImplementedError

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        """J^T c + d<b, J t>/dh if it is wanted; collects d<c, f(h)>/dtheta."""
        return self.pull(sweeps, c) if wanted else [None] * len(self.ins)


class Tape(TorchFunctionMode):
    """One pass over a critic, recorded by entering it as a context.

    Args:
        x: (N, ...), the batch.
        keep_inputs: keep what weights multiply; needed if a loss shares the pass or a layer has curvature.
        channels_last: whether convolutions on a CPU may work in channels_last.
        modules: whose buffers a critic may not write active values to.
        stack: names of the modules that are running, for ``explain``.
    """

    def __init__(
        self,
        x: Tensor,
        *,
        keep_inputs: bool,
        channels_last: bool,
        modules: Sequence[torch.nn.Module],
        stack: list[str] | None,
    ) -> None:
        super().__init__()
        self.batch = x.shape[0]
        in_channels_last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        self.memory_format = torch.channels_last if in_channels_last else torch.contiguous_format  # that x came in
        self.keep_inputs, self.channels_last, self.modules, self.stack = keep_inputs, channels_last, modules, stack
        self.serial = next(
            _SERIAL
        )  # what active tensors are marked with: the tape itself would make a cycle of references
        self.calling = ""
        self.rules: list[Rule] = []
        self.slots = 0
        self.versions: list[int] = []  # of each slot's memory, as its function left it
        self.axes = [0]  # where the batch lies in each slot; -1 where samples have met, or it is not known
        self.hooked = False  # whether the critic saves its tensors by hooks, as in a checkpoint
        self.converted = False  # whether a convolution has changed the memory format of what it was given
        self.escaped = ""  # a call that took values which depend on x out of the tape's sight
        self._cleared: dict[int, Tensor] = {}  # constants looked at; an id says something only while its tensor lives

    def activate(self, tensor: Tensor) -> Tensor:
        """Marks ``tensor`` as depending on x. It requires a gradient, so that what passes by unseen can be noticed."""
        if not tensor.dtype.is_floating_point:
            raise Unsupported(f"a value of dtype {tensor.dtype}")
        tensor.requires_grad_()
        tensor._genfast_slot = (self.serial, self.slots)  # type: ignore[attr-defined]
        self.versions.append(version(tensor))
        self.slots += 1
        return tensor

    def move(self, place: Tensor, slot: int) -> None:
        """Lets ``place``, whose memory now holds the value of ``slot``, stand for it."""
        place._genfast_slot = (self.serial, slot)  # type: ignore[attr-defined]
        self.versions[slot] = version(place)

    def slot(self, value: Any) -> int:
        """The slot of an active tensor, or -1."""
        found = getattr(value, "_genfast_slot", None)
        return found[1] if found is not None and found[0] == self.serial else -1

    def record(self, rule: Rule, inputs: Sequence[Tensor], outputs: Any) -> Any:
        """Appends the rule; ``outputs`` is a tensor or a sequence of tensors, which become active."""
        rule.ins = tuple(self.slot(x) for x in inputs)
        many = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        first = self.slots
        axes = {self.axes[s] for s in rule.ins}
        axis = axes.pop() if len(axes) == 1 else -1
        if axis or not rule.per_sample:
            rule.per_sample = False
            if axis >= 0:
                axis = rule.follow(axis, inputs[0], many[0])
        for o in many:
            self.activate(o)
            self.axes.append(axis)
        rule.outs = tuple(range(first, self.slots))
        if rule.curved and not self.keep_inputs:
            raise MoreNeeded
        rule.called = self.calling
        if self.stack is not None:
            rule.module = self.stack[-1] if self.stack else ""
        rule.watch()
        self.rules.append(rule)
        return outputs

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PASSED:
            return func(*args, **kwargs)
        if "out" in kwargs and kwargs["out"] is None:
            kwargs = {k: v for k, v in kwargs.items() if k != "out"}
        if saved_tensor_hooks(False) is None:
            return self._call(func, args, kwargs)
        self.hooked = True
        with _Untouched():
            return self._call(func, args, kwargs)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._involved(args, kwargs):
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():  # the critic cut the gradient here itself
            self.escaped = self.escaped or getattr(func, "__name__", str(func))
            return func(*args, **kwargs)
        handler = HANDLERS.get(func, HANDLERS["otherwise"])
        self.calling = getattr(func, "__name__", "") or str(func)
        set_grad_enabled(False)
        try:
            return handler(self, func, args, kwargs)
        finally:
            set_grad_enabled(True)

    def _involved(self, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
        found = False
        for a in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(a, Tensor):
                slot = self.slot(a)
                if slot >= 0:
                    found = True
                    if version(a) != self.versions[slot] or a.grad_fn is not None:
                        raise Unsupported(
                            f"a tensor {tuple(a.shape)} that depends on x was changed in place by a call that PyTorch "
                            "shows to no function mode, or through its data"
                        )
                elif a.requires_grad and a.grad_fn is not None and id(a) not in self._cleared:
                    self.check_constant(a)
            elif isinstance(a, (tuple, list)):
                found = self._involved(a, {}) or found
            elif isinstance(a, dict):
                found = self._involved(a.values(), {}) or found
        return found

    def check_constant(self, tensor: Tensor) -> None:
        """Makes sure that a tensor taken for a constant was not made of active ones behind the tape's back."""
        seen, queue = set(), [tensor.grad_fn]
        while queue:
            node = queue.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if self.slot(getattr(node, "variable", None)) >= 0:
                raise Unsupported(
                    "a call that PyTorch shows to no function mode "
                    f"({tensor.grad_fn.name() if tensor.grad_fn else 'unknown'}: "
                    "an autograd.Function or a compiled or scripted part)"
                )
            queue += [n for n, _ in node.next_functions]
        self._cleared[id(tensor)] = tensor


HANDLERS: dict[Any, Handler] = {}
PASSED: set[Any] = set()
