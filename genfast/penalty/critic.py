"""One pass over a critic: its outputs, its input gradient, and the gradients that a penalty and a loss send to it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._calls import all_modules
from .._torch_private import graph_is_retained
from .proof import prove
from .state import State, facts, modules, unwrapped
from .sweeps import SharedLoss, Sweeps
from .tape import MoreNeeded, PlainLayoutNeeded, Tape

Critic = Callable[..., Tensor]


def without_wrappers(critic: Critic) -> Critic:
    """The module itself, without what compiles it or spreads it over processes."""
    original = unwrapped(critic)
    return without_wrappers(original.module) if isinstance(original, nn.parallel.DistributedDataParallel) else original


def per_sample_outputs(op: str, d: Any, n: int, patches: bool = False) -> Tensor:
    """The critic's outputs, one for each of n samples or, with ``patches``, any number; or a clear error."""
    if not isinstance(d, Tensor):
        raise TypeError(
            f"{op}: critic returned a {type(d).__name__}, expected a tensor with one value per sample; give output= "
            "the index or key of that tensor, or a function that takes it out"
        )
    if d.dim() == 0 or d.shape[0] != n or d.numel() == 0 or not (patches or d.numel() == n):
        several = d.dim() > 1 and d.shape[0] == n and d.numel() > n
        advice = (
            "; give patches='sum' to take the sum of a sample's values, as autograd.grad with ones does, or "
            "patches='mean', or output= a function that leaves one value per sample"
            if several and not patches
            else ""
        )
        raise ValueError(
            f"{op}: critic returned shape {tuple(d.shape)} for a batch of {n}, expected one value per sample: ({n},), "
            f"({n}, 1) or the like{advice}"
        )
    if not d.dtype.is_floating_point:
        raise TypeError(f"{op}: critic returned dtype {d.dtype}, expected a floating-point dtype")
    return d


@contextlib.contextmanager
def _no_half_autocast(device: str) -> Iterator[None]:
    """float16 has too small a range for products of cotangents and tangents, and no one loss scale fits both."""
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
        with torch.autocast(device, enabled=False):
            yield
    else:
        yield


class Pass:
    """A recorded pass of ``critic`` over x (N, ...).

    Args:
        loss: whether a loss will share the pass (``sweep(slope=...)``).
        start: puts the state back that the critic is in before the pass, where the caller has taken it.
        into: where gradients are added up, if passes share it.
        stack: names of the modules that are running, for ``explain``.
        read: takes the critic's outputs (N, ...) out of what it returned, given N.
        mean: whether S is the sum over samples of the mean of their outputs, where a sample has several, not of all
            outputs.
        proving: whether calls that PyTorch differentiates are first compared with double backward.

    Raises:
        Unsupported: the critic does something that cannot be followed.
        TypeError, ValueError: outputs that are not one value per sample.
    """

    def __init__(
        self,
        op: str,
        critic: Critic,
        x: Tensor,
        context: Sequence[Tensor],
        *,
        loss: bool,
        start: Callable[[], None] | None = None,
        stack: list[str] | None = None,
        into: dict[int, tuple[Tensor, Tensor, bool]] | None = None,
        proving: bool = True,
        read: Callable[[Any, int], Tensor] | None = None,
        mean: bool = False,
    ) -> None:
        self.known = facts(critic)
        self.modules = modules(critic)
        self.device = x.device.type
        self.x = x
        self.slope: Tensor | None = None
        self.read, self.mean = read or functools.partial(per_sample_outputs, op), mean
        self.stack, self.into = stack, into
        if start is None:
            start = State(critic, self.known.foreign)
        self._repeated(op, critic, x, context, loss, start)
        unproven = self._unproven(x) if proving else set()
        if unproven:
            rows = min(2, x.shape[0]) if self.sweeps.separable else x.shape[0]
            del self.sweeps
            start()
            self._prove(op, critic, x, context, rows, start)
            self.known.proven |= unproven
            start()
            self._repeated(op, critic, x, context, loss, start)

    def _prove(
        self, op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], rows: int, start: Callable[[], None]
    ) -> None:
        def record(at: Tensor, given: Sequence[Tensor]) -> Pass:
            return Pass(op, critic, at, given, loss=False, start=start, proving=False, read=self.read)

        def outputs(at: Tensor, *given: Tensor) -> Tensor:
            return self.read(original(at, *given), len(at))

        original = unwrapped(critic)
        parameters = [p for m in self.modules for p in m.parameters() if p.requires_grad]
        with torch.compiler.set_stance("force_eager"), _no_half_autocast(self.device):
            prove(outputs, x, context, rows, record, parameters, start)

    def _unproven(self, x: Tensor) -> set[Any]:
        """The calls in the record whose derivatives by PyTorch have not been compared with double backward as a
        whole."""
        names = {rule.proven for rule in self.sweeps.live_rules if rule.proven}
        if self.sweeps.tape.hooked:
            names.add("saved by hooks")
        if not names:
            return names
        kind = (x.dtype, torch.is_autocast_enabled(self.device))
        return {(name, *kind) for name in names} - self.known.proven

    def _repeated(
        self, op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], loss: bool, start: Callable[[], None]
    ) -> None:
        """Records a pass, again where the first shows that more must be kept, or another layout."""
        while True:
            try:
                return self._record(op, critic, x, context, loss)
            except MoreNeeded:
                self.known.curved = True
            except PlainLayoutNeeded:
                self.known.channels_last = False
            start()

    def _record(self, op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], loss: bool) -> None:
        tape = Tape(
            x,
            keep_inputs=loss or self.known.curved is not False,
            channels_last=self.known.channels_last,
            modules=self.modules,
            stack=self.stack,
        )
        active = tape.activate(x.detach())
        original = unwrapped(critic)
        with torch.compiler.set_stance("force_eager"), _no_half_autocast(self.device), torch.enable_grad(), tape:
            d = self.read(original(active, *context), tape.batch)
        self.slot = tape.slot(d)
        self.constant: Tensor | None = None
        if self.slot < 0 and d.requires_grad:  # it depends on parameters alone
            tape.check_constant(d)
            self.constant = d
        self.output = d.detach()
        self.sweeps = sweeps = Sweeps(tape, max(self.slot, 0), self.into)  # no rule writes to slot 0, which is x
        if sweeps.curved and not tape.keep_inputs:
            raise MoreNeeded
        self.known.curved = bool(self.known.curved) or sweeps.curved
        if self.known.separable is None and not sweeps.separable:
            self.known.coupling = next((r.couples for r in sweeps.live_rules if r.couples), "")
            if not self.known.coupling and sweeps.couples(self.output):
                self.known.coupling = "a layer of this critic"
        self.known.separable = sweeps.separable

    @property
    def values(self) -> Tensor:
        """(N,), or (N, ...) where a sample has several outputs; float32 or better."""
        wide = self.output.to(torch.promote_types(self.output.dtype, torch.float32))
        return wide.reshape(-1) if wide.numel() == self.sweeps.batch else wide

    @torch.no_grad()
    def input_gradient(self, rows: int, slope: Tensor | None = None, *, all_of_x: bool = False) -> Tensor | None:
        """d(sum of the outputs)/dx of the first ``rows`` samples; None where the outputs do not depend on x.

        slope: dloss/dD (N,) of a loss that shares the pass, in a critic that keeps samples apart.
        all_of_x: whether x wants the loss's gradient too.
        """
        self.slope = slope
        if self.slot < 0:
            return None
        sweeps = self.sweeps
        start = torch.full_like(self.output, sweeps.batch / self.output.numel() if self.mean else 1.0)
        loss = None
        if slope is not None:
            loss = SharedLoss(rows)
            start[rows:] = slope[rows:].to(start.dtype).view(start[rows:].shape)
        with torch.autocast(self.device, enabled=False):
            g = sweeps.chain(start, sweeps.batch if all_of_x else rows, loss)
        self.x_cotangent = g
        return None if g is None else g[:rows]

    @torch.no_grad()
    def sweep(self, direction: Tensor | None, slope: Tensor | None = None, *, to_x: bool = False) -> Tensor | None:
        """Collects the gradients of a penalty with dP/dg = ``direction``, and of a loss.

        slope: dloss/dD (N,), where it was not given to ``input_gradient`` (and that was called only for a penalty).

        Returns what they send to x if ``to_x``.
        """
        if self.slot < 0:
            slope = self.slope if slope is None else slope
            if slope is not None and self.constant is not None:
                self.sweeps.collect(self.constant, slope.to(self.output.dtype).reshape(self.output.shape))
            return None
        sweeps, start = self.sweeps, None
        loss = sweeps.loss
        if slope is not None:
            start = slope.to(self.output.dtype).reshape(self.output.shape)
        elif loss is not None and loss.rows:
            assert self.slope is not None
            of_rows = self.slope[: loss.rows]
            if not (of_rows.is_cpu and not bool(of_rows.any())):
                loss = SharedLoss(loss.rows, of_rows, of_rows.is_cpu and bool((of_rows == of_rows[0]).all()))
        if direction is not None and not sweeps.per_sample and direction.shape[0] < sweeps.batch:
            rest = direction.new_zeros((sweeps.batch - direction.shape[0], *direction.shape[1:]))
            direction = torch.cat([direction, rest])
        with torch.autocast(self.device, enabled=False):
            of_penalty = sweeps.sweep(direction, start, loss, to_x)
        if not to_x or loss is None or self.x_cotangent is None:
            return of_penalty
        total = self.x_cotangent.clone()
        rows = loss.rows
        if rows:
            total[:rows] *= 0 if loss.slope is None else loss.slope.to(total.dtype).view(-1, *(1,) * (total.dim() - 1))
        if of_penalty is not None:
            total[: of_penalty.shape[0]] += of_penalty
        return total

    def gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """(tensor, gradient) for each parameter, or tensor made of parameters or context, that the pass multiplied or
        added.

        The record is dropped.
        """
        gradients: list[tuple[Tensor, Tensor | None]] = [
            (x, gradient) for x, gradient, _ in self.sweeps.gradients.values()
        ]
        del self.sweeps
        return gradients


class _Attach(torch.autograd.Function):
    """A value whose gradient by each tensor is known already, besides what its own graph leads to."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.tensors = gradients, tensors
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "the gradients of a penalty were asked for twice: give the first backward retain_graph=True"
            )
        last = not graph_is_retained()
        one = grad.is_cpu and float(grad.detach()) == 1
        found: list[Tensor] = []
        for g, tensor in zip(ctx.gradients, ctx.tensors):
            if g is None:
                found.append(torch.zeros_like(tensor))
            else:
                found.append(g if last and one else g * grad.to(g.dtype))  # given away, where nothing is to be scaled
        if torch.is_grad_enabled():
            found = once(found, ctx.tensors)
        if last:
            ctx.gradients = ctx.tensors = None
        return (grad if ctx.needs_input_grad[0] else None, None, *found)


class _Once(torch.autograd.Function):
    """Gradients that raise where they are differentiated, instead of passing for constants."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        raise NotImplementedError(
            "the gradient of a penalty was differentiated again, and its second derivative is not kept; use "
            "method='autograd'"
        )


def once(gradients: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """``gradients`` by ``tensors``, which raise where they are differentiated again."""
    return list(_Once.apply(len(gradients), *gradients, *tensors))


def attach(value: Tensor, found: Sequence[tuple[Tensor, Tensor | None]], critic: Critic) -> Tensor:
    """``value`` with these gradients. Every parameter of the critic takes part, if with a gradient of zero, so that a
    DistributedDataParallel reducer waits for none in vain."""
    tensors = [t for t, _ in found]
    gradients = [g for _, g in found]
    there = {id(t) for t in tensors}
    for m in all_modules([critic]) if isinstance(critic, nn.Module) else ():
        for p in m._parameters.values():
            if p is not None and p.requires_grad and id(p) not in there:
                there.add(id(p))
                tensors.append(p)
                gradients.append(None)
    result: Tensor = _Attach.apply(value, gradients, *tensors)
    return result
