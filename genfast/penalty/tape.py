"""The record of one forward pass of a critic, and the sweeps over it that replace double backward.

With S the sum of the critic's outputs, g = dS/dx, P = phi(g) and u = dP/dg held fixed, dP/dtheta = d<u, dS/dx>/dtheta: the
gradient of a directional derivative, for which three sweeps over the recorded pass suffice (Pearlmutter 1994;
arXiv:1906.06637 counts them for piecewise-linear networks):

    chain     b: cotangents of S, from the output to x                          b_in = J^T b_out
    tangent   t: the directional derivative, from x to the output, t_0 = u      t_out = J t_in
    second    c: what a layer's curvature adds, from the output to x            c_in = J^T c_out + d<b, J(h) t>/dh

and every parameter collects d<b, J t>/dtheta (for a weight: b (x) t) and d<c, f(h)>/dtheta (c (x) h). In a piecewise-linear
critic there is no curvature, so c = 0 and neither the third sweep nor the activations h are needed. A loss with
f' = dloss/dD shares all of it: its cotangents are f' b as long as no layer couples samples, so that a weight gets
b (x) (t + f' h) in one product; where samples are coupled, c starts from f' instead.

The pass is recorded by a TorchFunctionMode: the functions that the critic calls on what depends on x ("active" tensors)
reach ``Tape.__torch_function__``, which runs them by a rule (``rules.py``). What does not depend on x, weights and how they
are made of parameters, runs under autograd as usual, and the gradients found here continue there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch_private import saved_tensor_hooks, set_grad_enabled

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
    """Saves tensors as they are, whatever a checkpoint around the call would do: its recomputation is of another function."""

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
    per_sample: whether, axis 0 of its inputs being the batch, so is that of its outputs, and it keeps the samples apart.
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
    proven = ""  # the name of a call whose derivatives are compared with PyTorch's double backward once; "" for rules of ours
    saved_versions: tuple[tuple[str, int], ...] = ()

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        """Where the batch, along ``axis`` of the input x, lies in the output y; -1 where samples meet, or it is not known."""
        return -1

    @property
    def collects(self) -> bool:
        """Whether it has parameters of its own to find gradients for."""
        return False

    def pull(self, tape: Tape, g: list[Maybe]) -> list[Maybe]:
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

    def chain(self, tape: Tape, b: list[Maybe]) -> list[Maybe]:
        """J^T b; what is needed of b later is kept."""
        return self.pull(tape, b)

    def tangent(self, tape: Tape, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        """J t if it is wanted; collects d<b, J t + f' f(h)>/dtheta."""
        raise NotImplementedError

    def second(self, tape: Tape, c: list[Maybe], wanted: bool) -> list[Maybe]:
        """J^T c + d<b, J t>/dh if it is wanted; collects d<c, f(h)>/dtheta."""
        return self.pull(tape, c) if wanted else [None] * len(self.ins)


class Tape(TorchFunctionMode):
    """One pass over a critic, recorded by entering it as a context.

    keep_inputs: keep what weights multiply; needed if a loss shares the pass or a layer has curvature.
    """

    def __init__(self, *, keep_inputs: bool, stack: list[str] | None = None) -> None:
        super().__init__()
        self.keep_inputs = keep_inputs
        self.serial = next(_SERIAL)  # what active tensors are marked with: the tape itself would make a cycle of references
        self.owns = False  # whether the rule that runs may overwrite what it is given
        self.stack = stack  # names of the modules that are running
        self.calling = ""
        self.rules: list[Rule] = []
        self.slots = 0
        self.versions: list[int] = []  # of each slot's memory, as its function left it
        self.hooked = False  # whether the critic saves its tensors by hooks, as in a checkpoint
        self.checked = False  # whether what the rules keep was compared with its versions
        self.converted = False  # whether a convolution has changed the memory format of what it was given
        self.modules: Sequence[torch.nn.Module] = ()  # whose buffers a critic may not write active values to
        self.axes = [0]  # where the batch lies in each slot; -1 where samples have met, or it is not known
        self.b: list[Maybe] = []
        self.rows = 0  # the first ones of the batch have a penalty; in the others b is of the loss, where it shares the pass
        self.f: Maybe = None  # dloss/dD (rows,), for rows that have both
        self.shared = False  # whether a loss shares the pass
        self.even = False  # whether f is one number, so that f h is a plain multiple
        self.batch = 0
        self.memory_format = torch.contiguous_format  # that x came in
        self.channels_last = True  # whether convolutions on a CPU may work in channels_last
        self.gradients: dict[int, tuple[Tensor, Tensor, bool]] = {}  # by id of the tensor: (tensor, gradient, if it is fresh)
        self.escaped = ""  # a call that took values which depend on x out of the tape's sight
        self._cleared: dict[int, Tensor] = {}  # constants looked at; an id says something only while its tensor lives

    # ---- recording ----

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
                            f"a tensor {tuple(a.shape)} that depends on x was changed in place by a call that PyTorch shows to "
                            "no function mode, or through its data"
                        )
                elif a.requires_grad and a.grad_fn is not None and id(a) not in self._cleared:
                    self._clear(a)
            elif isinstance(a, (tuple, list)):
                found = self._involved(a, {}) or found
            elif isinstance(a, dict):
                found = self._involved(a.values(), {}) or found
        return found

    def _clear(self, tensor: Tensor) -> None:
        """Makes sure that a tensor taken for a constant was not made of active ones behind the tape's back."""
        seen, queue = set(), [tensor.grad_fn]
        while queue:
            node = queue.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if self.slot(getattr(node, "variable", None)) >= 0:
                raise Unsupported(
                    f"a call that PyTorch shows to no function mode ({tensor.grad_fn.name() if tensor.grad_fn else 'unknown'}: "
                    "an autograd.Function or a compiled or scripted part)"
                )
            queue += [n for n, _ in node.next_functions]
        self._cleared[id(tensor)] = tensor

    # ---- sweeps ----

    def collect(self, parameter: Tensor, gradient: Tensor, fresh: bool = False) -> None:
        """Adds to the gradient of a tensor that does not depend on x; ``fresh``: no one else has its memory."""
        if gradient.dtype != parameter.dtype:
            gradient, fresh = gradient.to(parameter.dtype), True
        found = self.gradients.get(id(parameter))
        if found is None:
            self.gradients[id(parameter)] = (parameter, gradient, fresh)
        elif found[2]:
            found[1].add_(gradient)
        else:
            self.gradients[id(parameter)] = (parameter, found[1] + gradient, True)

    def products(self, b: Tensor, t: Maybe, h: Maybe) -> Iterator[tuple[int, Tensor, Tensor]]:
        """What a weight's gradient is the sum of products of: b with t + f' h, and a loss's own b with h.

        Each as (the first of its rows in the batch, b, factor).
        """
        if not self.shared:
            if t is not None:
                yield 0, b[: t.shape[0]] if self.per_sample else b, t
            return
        assert h is not None
        rows = self.rows
        if rows:
            z = None if t is None else t[:rows]
            if self.f is not None:
                first = h[:rows]
                if self.even:
                    alpha = float(self.f[0])
                    z = first * alpha if z is None else torch.add(z, first, alpha=alpha)
                else:
                    scaled = first * self.f.to(h.dtype).view(-1, *(1,) * (h.dim() - 1))
                    z = scaled if z is None else scaled.add_(z)
            if z is not None:
                yield 0, b[:rows], z
        if rows < self.batch:
            yield rows, b[rows:], h[rows:]

    def collect_rows(self, parameter: Tensor, gradient: Tensor, start: int) -> None:
        """Adds ``gradient``, of some rows of the batch from ``start`` on, summed to what ``parameter`` has of them."""
        shape = parameter.shape
        if not gradient.dim() or parameter.dim() < gradient.dim() or shape[0] != self.batch or gradient.shape[0] == self.batch:
            self.collect(parameter, gradient.sum_to_size(shape))
            return
        full = torch.zeros_like(parameter, dtype=gradient.dtype)
        full[start : start + gradient.shape[0]] = gradient.sum_to_size((gradient.shape[0], *shape[1:]))
        self.collect(parameter, full)

    def collect_bias(self, bias: Tensor, b: Tensor, shape: tuple[int, ...] | None = None, alpha: float = 1) -> None:
        """What a loss that shares the pass sends to a term of shape ``shape`` (the bias's own if None)."""
        if not self.shared:
            return
        to = bias.shape if shape is None else tuple(bias.numel() if s == -1 else s for s in shape)
        whole = len(to) == b.dim() and to[0] == b.shape[0] and b.shape[0] == self.batch  # one term a sample
        parts = []
        if self.f is not None and self.even:
            parts.append((b[: self.rows] if whole else b[: self.rows].sum_to_size(to)) * float(self.f[0]))
        elif self.f is not None:
            parts.append(b[: self.rows] * self.f.to(b.dtype).view(-1, *(1,) * (b.dim() - 1)))
        elif whole and self.rows:
            parts.append(torch.zeros_like(b[: self.rows]))
        if self.rows < self.batch:
            parts.append(b[self.rows :])
        if whole:
            found = torch.cat(parts).sum_to_size(to)
        else:
            sums = [p.sum_to_size(to) for p in parts]
            found = sums[0] + sums[1] if len(sums) > 1 else sums[0] if sums else b
        if parts:
            self.collect(bias, found.reshape(bias.shape) * alpha if alpha != 1 else found.reshape(bias.shape))

    def prepare(self, output: int) -> None:
        """What each sweep must reach, from the recorded rules alone."""
        self.output = output
        live = [False] * self.slots
        live[output] = True
        self.live_rules: list[Rule] = []
        for rule in reversed(self.rules):
            if any(live[s] for s in rule.outs):
                self.live_rules.append(rule)
                for s in rule.ins:
                    live[s] = True
        self.live_rules.reverse()
        below = [False] * self.slots  # whether anything at or below the slot's producer collects
        above = [False] * self.slots  # whether anything that reads the slot needs its tangent
        for rule in self.live_rules:
            here = rule.collects or rule.curved or any(below[s] for s in rule.ins)
            for s in rule.outs:
                below[s] = here
        for rule in reversed(self.live_rules):
            here = rule.collects or rule.curved or any(above[s] for s in rule.outs)
            for s in rule.ins:
                above[s] = above[s] or here
        self.below, self.above = below, above
        self.curved = any(r.curved for r in self.live_rules)
        self.per_sample = all(r.per_sample for r in self.live_rules)
        self.apart = all(self.axes[s] >= 0 for r in self.live_rules for s in r.outs)
        # a rule that is not live may have made a mask or a number of all samples
        self.joinable = self.apart and not self.escaped and all(self.axes[s] >= 0 for r in self.rules for s in r.outs)

    def check(self) -> None:
        """Makes sure that all that the sweeps read is as the pass has left it."""
        if not self.checked:
            for rule in self.live_rules:
                rule.check()
        self.checked = True

    def chain(self, start: Tensor, rows: int) -> Maybe:
        """b everywhere from dS/d(output) = ``start``; returns b at x, for its first ``rows`` samples at least."""
        self.check()
        self.b = [None] * self.slots
        self.b[self.output] = start
        owned: set[int] = set()
        for rule in reversed(self.live_rules):
            b = [self.b[s] for s in rule.outs]
            self.owns = rule.outs[0] in owned
            alone = self.shared and not self.rows  # a loss without a penalty: nothing is wanted of b later
            if alone or not (rule.collects or rule.curved):
                for s in rule.outs:
                    self.b[s] = None
            if all(x is None for x in b):
                continue
            if alone and rule.collects:
                rule.tangent(self, b, [None] * len(rule.ins), False)
            if not any(self.below[s] for s in rule.ins):
                if not rows:
                    continue
                few = rule.prefix and self.per_sample
                b = [x if x is None else x[:rows] for x in b] if few else [self._full(x) for x in b]
            for s, g in zip(rule.ins, rule.pull(self, b) if alone else rule.chain(self, b)):
                _accumulate(self.b, s, g, owned, rule.fresh)
            if alone:
                rule.release()
        found, self.b[0] = self.b[0], None
        return found

    @torch.no_grad()
    def couples(self, output: Tensor) -> bool:
        """Whether the first sample's output depends on other samples, here."""
        start = torch.zeros_like(output)
        start.view(-1)[0] = 1
        g: list[Maybe] = [None] * self.slots
        g[self.output] = start
        for rule in reversed(self.live_rules):
            outs = [g[s] for s in rule.outs]
            if any(x is not None for x in outs):
                self.owns = False
                for s, value in zip(rule.ins, rule.pull(self, outs)):
                    _accumulate(g, s, value, set(), False)
        return g[0] is not None and bool((g[0][1:] != 0).any())

    def tangents(self, direction: Maybe, last: bool) -> None:
        """t from t = ``direction`` at x (of its first rows, or None), collecting d<b, J t>/dtheta.

        last: no second sweep follows.
        """
        t: list[Maybe] = [None] * self.slots
        t[0] = direction
        fresh: set[int] = set()
        for rule in self.live_rules:
            ins = [t[s] for s in rule.ins]
            self.owns = rule.ins[0] in fresh and self._readers[rule.ins[0]] == 1
            for s in rule.ins:
                if self._last[s] is rule:
                    t[s] = None
            if all(x is None for x in ins) and not (self.shared and rule.collects):
                continue
            wanted = any(self.above[s] for s in rule.outs) and any(x is not None for x in ins)
            if not wanted and not rule.collects and not rule.curved:
                continue
            b = [self.b[s] for s in rule.outs]
            if not rule.prefix:
                ins = [self._full(x) for x in ins]
            for s, value in zip(rule.outs, rule.tangent(self, b, ins, wanted)):
                t[s] = value
                if rule.fresh:
                    fresh.add(s)
            if not rule.curved:
                for s in rule.outs:
                    self.b[s] = None
            if last:
                rule.release()

    def seconds(self, start: Maybe, to_x: bool) -> Maybe:
        """c from c = ``start`` at the output (or None), collecting d<c, f(h)>/dtheta; returns c at x if ``to_x``."""
        c: list[Maybe] = [None] * self.slots
        c[self.output] = start
        owned: set[int] = set()
        for rule in reversed(self.live_rules):
            outs = [c[s] for s in rule.outs]
            self.owns = rule.outs[0] in owned
            for s in rule.outs:
                c[s] = None
            if all(x is None for x in outs) and not rule.curved:
                continue
            wanted = to_x or any(self.below[s] for s in rule.ins)
            if not wanted and not rule.collects:
                continue
            if not rule.prefix:
                outs = [self._full(x) for x in outs]
            for s, g in zip(rule.ins, rule.second(self, outs, wanted)):
                _accumulate(c, s, g, owned, rule.fresh)
            rule.release()
        return c[0]

    def sweep(self, direction: Maybe, start: Maybe, to_x: bool) -> Maybe:
        """Tangents along ``direction`` and then the second sweep from ``start``; returns c at x."""
        self.check()
        if direction is not None or (self.shared and self.rows):
            self._last: dict[int, Rule] = {s: rule for rule in self.live_rules for s in rule.ins}
            self._readers = Counter(s for rule in self.live_rules for s in rule.ins)
            self.tangents(direction, last=start is None and not self.curved)
        if start is None and not self.curved:
            return None
        return self.seconds(start, to_x)

    def _full(self, x: Maybe) -> Maybe:
        """The rows beyond a prefix of the batch as zeros."""
        if x is None or not self.per_sample or x.shape[0] == self.batch:
            return x
        full = x.new_zeros((self.batch, *x.shape[1:]))
        full[: x.shape[0]] = x
        return full


def _accumulate(slots: list[Maybe], s: int, value: Maybe, owned: set[int], fresh: bool) -> None:
    """Adds to a slot; ``owned`` keeps the slots whose memory is no one else's."""
    if value is None:
        return
    there = slots[s]
    if there is None:
        slots[s] = value
        if fresh:
            owned.add(s)
        return
    slots[s] = add_rows(there, value)
    owned.add(s)


def add_rows(a: Tensor, b: Tensor) -> Tensor:
    """a + b, where one may hold the first rows of the batch alone."""
    if a.shape == b.shape:
        return a + b
    long, short = (a, b) if a.shape[0] > b.shape[0] else (b, a)
    long = long.clone()
    long[: short.shape[0]] += short
    return long


HANDLERS: dict[Any, Handler] = {}
PASSED: set[Any] = set()
