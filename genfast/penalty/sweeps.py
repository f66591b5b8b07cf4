"""The sweeps over a recorded pass that replace double backward.

With S the sum of the critic's outputs, g = dS/dx, P = phi(g) and u = dP/dg held fixed, dP/dtheta = d<u, dS/dx>/dtheta:
the gradient of a directional derivative, for which three sweeps over the recorded pass suffice (Pearlmutter 1994;
arXiv:1906.06637 counts them for piecewise-linear networks):

    chain     b: cotangents of S, from the output to x                          b_in = J^T b_out
    tangent   t: the directional derivative, from x to the output, t_0 = u      t_out = J t_in
    second    c: what a layer's curvature adds, from the output to x            c_in = J^T c_out + d<b, J(h) t>/dh

and every parameter collects d<b, J t>/dtheta (for a weight: b (x) t) and d<c, f(h)>/dtheta (c (x) h). In a
piecewise-linear critic there is no curvature, so c = 0 and neither the third sweep nor the activations h are needed. A
loss with f' = dloss/dD shares all of it: its cotangents are f' b as long as no layer couples samples, so that a weight
gets b (x) (t + f' h) in one product; where samples are coupled, c starts from f' instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .tape import Maybe, Rule, Tape


@dataclass(frozen=True)
class SharedLoss:
    """A loss that shares the pass with a penalty.

    rows: the first ones of the batch have a penalty; in the others b is of the loss.
    slope: dloss/dD (rows,), for rows that have both; None before it is needed, and where it is zero.
    uniform: whether slope is one number, so that slope h is a plain multiple.
    """

    rows: int
    slope: Maybe = None
    uniform: bool = False


class Sweeps:
    """What each sweep must reach to find the gradients of ``output``, a slot of the tape, and the sweeps themselves.

    They run in one order: ``chain``, then ``sweep``. ``gradients`` is where the results are added up.
    """

    def __init__(
        self, tape: Tape, output: int, gradients: dict[int, tuple[Tensor, Tensor, bool]] | None = None
    ) -> None:
        self.tape, self.output, self.batch, self.slots = tape, output, tape.batch, tape.slots
        # by id of the tensor: (tensor, gradient, whether no one else has its memory)
        self.gradients: dict[int, tuple[Tensor, Tensor, bool]] = {} if gradients is None else gradients
        self.cotangents: list[Maybe] = []  # b in each slot
        self.loss: SharedLoss | None = None
        self.may_overwrite = False  # whether the rule that runs may overwrite what it is given
        self.checked = False  # whether what the rules keep was compared with its versions
        live = [False] * self.slots
        live[output] = True
        self.live_rules: list[Rule] = []
        for rule in reversed(tape.rules):
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
        self.separable = all(tape.axes[s] >= 0 for r in self.live_rules for s in r.outs)
        # a rule that is not live may have made a mask or a number of all samples
        self.joinable = (
            self.separable and not tape.escaped and all(tape.axes[s] >= 0 for r in tape.rules for s in r.outs)
        )

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
        loss = self.loss
        if loss is None:
            if t is not None:
                yield 0, b[: t.shape[0]] if self.per_sample else b, t
            return
        assert h is not None
        rows = loss.rows
        if rows:
            z = None if t is None else t[:rows]
            if loss.slope is not None:
                first = h[:rows]
                if loss.uniform:
                    alpha = float(loss.slope[0])
                    z = first * alpha if z is None else torch.add(z, first, alpha=alpha)
                else:
                    scaled = first * loss.slope.to(h.dtype).view(-1, *(1,) * (h.dim() - 1))
                    z = scaled if z is None else scaled.add_(z)
            if z is not None:
                yield 0, b[:rows], z
        if rows < self.batch:
            yield rows, b[rows:], h[rows:]

    def collect_rows(self, parameter: Tensor, gradient: Tensor, start: int) -> None:
        """Adds ``gradient``, of some rows of the batch from ``start`` on, summed to what ``parameter`` has of them."""
        shape = parameter.shape
        if (
            not gradient.dim()
            or parameter.dim() < gradient.dim()
            or shape[0] != self.batch
            or gradient.shape[0] == self.batch
        ):
            self.collect(parameter, gradient.sum_to_size(shape))
            return
        full = torch.zeros_like(parameter, dtype=gradient.dtype)
        full[start : start + gradient.shape[0]] = gradient.sum_to_size((gradient.shape[0], *shape[1:]))
        self.collect(parameter, full)

    def collect_bias(self, bias: Tensor, b: Tensor, shape: tuple[int, ...] | None = None, alpha: float = 1) -> None:
        """What a loss that shares the pass sends to a term of shape ``shape`` (the bias's own if None)."""
        loss = self.loss
        if loss is None:
            return
        to = bias.shape if shape is None else tuple(bias.numel() if s == -1 else s for s in shape)
        whole = len(to) == b.dim() and to[0] == b.shape[0] and b.shape[0] == self.batch  # one term a sample
        parts = []
        if loss.slope is not None and loss.uniform:
            parts.append((b[: loss.rows] if whole else b[: loss.rows].sum_to_size(to)) * float(loss.slope[0]))
        elif loss.slope is not None:
            parts.append(b[: loss.rows] * loss.slope.to(b.dtype).view(-1, *(1,) * (b.dim() - 1)))
        elif whole and loss.rows:
            parts.append(torch.zeros_like(b[: loss.rows]))
        if loss.rows < self.batch:
            parts.append(b[loss.rows :])
        if whole:
            found = torch.cat(parts).sum_to_size(to)
        else:
            sums = [p.sum_to_size(to) for p in parts]
            found = sums[0] + sums[1] if len(sums) > 1 else sums[0] if sums else b
        if parts:
            self.collect(bias, found.reshape(bias.shape) * alpha if alpha != 1 else found.reshape(bias.shape))

    def check(self) -> None:
        """Makes sure that all that the sweeps read is as the pass has left it."""
        if not self.checked:
            for rule in self.live_rules:
                rule.check()
        self.checked = True

    def chain(self, start: Tensor, rows: int, loss: SharedLoss | None) -> Maybe:
        """b everywhere from dS/d(output) = ``start``; returns b at x, for its first ``rows`` samples at least."""
        self.check()
        self.loss = loss
        only_loss = loss is not None and not loss.rows  # then nothing is wanted of b later
        self.cotangents = [None] * self.slots
        self.cotangents[self.output] = start
        owned: set[int] = set()
        for rule in reversed(self.live_rules):
            b = [self.cotangents[s] for s in rule.outs]
            self.may_overwrite = rule.outs[0] in owned
            if only_loss or not (rule.collects or rule.curved):
                for s in rule.outs:
                    self.cotangents[s] = None
            if all(x is None for x in b):
                continue
            if only_loss and rule.collects:
                rule.tangent(self, b, [None] * len(rule.ins), False)
            if not any(self.below[s] for s in rule.ins):
                if not rows:
                    continue
                few = rule.prefix and self.per_sample
                b = [x if x is None else x[:rows] for x in b] if few else [self._full(x) for x in b]
            for s, g in zip(rule.ins, rule.pull(self, b) if only_loss else rule.chain(self, b)):
                _accumulate(self.cotangents, s, g, owned, rule.fresh)
            if only_loss:
                rule.release()
        found, self.cotangents[0] = self.cotangents[0], None
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
                self.may_overwrite = False
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
            self.may_overwrite = rule.ins[0] in fresh and self._readers[rule.ins[0]] == 1
            for s in rule.ins:
                if self._last[s] is rule:
                    t[s] = None
            if all(x is None for x in ins) and not (self.loss is not None and rule.collects):
                continue
            wanted = any(self.above[s] for s in rule.outs) and any(x is not None for x in ins)
            if not wanted and not rule.collects and not rule.curved:
                continue
            b = [self.cotangents[s] for s in rule.outs]
            if not rule.prefix:
                ins = [self._full(x) for x in ins]
            for s, value in zip(rule.outs, rule.tangent(self, b, ins, wanted)):
                t[s] = value
                if rule.fresh:
                    fresh.add(s)
            if not rule.curved:
                for s in rule.outs:
                    self.cotangents[s] = None
            if last:
                rule.release()

    def seconds(self, start: Maybe, to_x: bool) -> Maybe:
        """c from c = ``start`` at the output (or None), collecting d<c, f(h)>/dtheta; returns c at x if ``to_x``."""
        c: list[Maybe] = [None] * self.slots
        c[self.output] = start
        owned: set[int] = set()
        for rule in reversed(self.live_rules):
            outs = [c[s] for s in rule.outs]
            self.may_overwrite = rule.outs[0] in owned
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

    def sweep(self, direction: Maybe, start: Maybe, loss: SharedLoss | None, to_x: bool) -> Maybe:
        """Tangents along ``direction`` and then the second sweep from ``start``; returns c at x."""
        self.check()
        self.loss = loss
        if direction is not None or (loss is not None and loss.rows):
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
