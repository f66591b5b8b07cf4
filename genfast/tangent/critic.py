"""One pass over a critic: its outputs, its input gradient, and the gradients that a penalty and a loss send to it."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .tape import MoreNeeded, Tape

Critic = Callable[..., Tensor]


@dataclass
class Facts:
    """What earlier passes over a critic have shown, in one of its modes (training or not)."""

    curved: bool = False
    apart: bool | None = None  # whether every rule keeps samples apart
    channels_last: bool = True  # whether no layer wants another memory format
    coupling: str = ""  # the layer that couples samples
    unsupported: str | None = None
    differentiated_twice: bool = False  # PyTorch's double backward has been seen to work
    finite_differences: bool = False  # PyTorch's double backward has been seen to be missing
    warned: bool = False
    joined: set[Any] = field(default_factory=set)  # structures whose joined outputs have equalled the separate ones
    separate: str = ""  # why batches may not be joined
    moves: bool = False  # whether a pass draws random numbers or changes buffers
    warned_separate: bool = False


_FACTS: weakref.WeakKeyDictionary[Any, dict[bool, Facts]] = weakref.WeakKeyDictionary()


def facts(critic: Critic) -> Facts:
    """The facts known of this critic; to be updated in place."""
    try:
        known = _FACTS.setdefault(unwrapped(critic), {})
    except TypeError:  # no weak references to it
        return Facts(curved=True)
    mode = bool(getattr(critic, "training", False))
    if mode not in known:
        wanting = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm2d)  # whose kernels copy channels_last
        modules = critic.modules() if isinstance(critic, nn.Module) else ()
        known[mode] = Facts(channels_last=not any(isinstance(m, wanting) for m in modules))
    return known[mode]


def unwrapped(critic: Critic) -> Critic:
    """A compiled module's original: a tape cannot look into the compiled one."""
    return getattr(critic, "_orig_mod", critic)


def alone(critic: Critic) -> Critic:
    """The module itself, without what compiles it or spreads it over processes."""
    original = unwrapped(critic)
    return alone(original.module) if isinstance(original, nn.parallel.DistributedDataParallel) else original


def per_sample_outputs(op: str, d: Any, n: int, patches: bool = False) -> Tensor:
    """The critic's outputs, one for each of n samples or, with ``patches``, any number; or a clear error."""
    if not isinstance(d, Tensor):
        raise TypeError(
            f"{op}: critic returned a {type(d).__name__}, expected a tensor with one value per sample; give output= the index "
            "or key of that tensor, or a function that takes it out"
        )
    if d.dim() == 0 or d.shape[0] != n or d.numel() == 0 or not (patches or d.numel() == n):
        several = d.dim() > 1 and d.shape[0] == n and d.numel() > n
        advice = (
            "; give patches='sum' to take the sum of a sample's values, as autograd.grad with ones does, or patches='mean', or "
            "output= a function that leaves one value per sample" if several and not patches else ""
        )  # fmt: skip
        raise ValueError(
            f"{op}: critic returned shape {tuple(d.shape)} for a batch of {n}, expected one value per sample: ({n},), ({n}, 1) "
            f"or the like{advice}"
        )
    if not d.dtype.is_floating_point:
        raise TypeError(f"{op}: critic returned dtype {d.dtype}, expected a floating-point dtype")
    return d


@contextlib.contextmanager
def restored(critic: Critic, wanted: bool = True) -> Iterator[Callable[[], None]]:
    """A function that takes back what passes have done to buffers and random numbers."""
    if not wanted:
        yield lambda: None
        return
    buffers = [(b, b.clone()) for b in critic.buffers()] if isinstance(critic, nn.Module) else []
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def restore() -> None:
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)

    yield restore


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
        again: called before the critic is run a second time, where the first shows that more must be kept.
        into: where gradients are added up, if passes share it.
        stack: names of the modules that are running, for ``explain``.
        read: takes the critic's outputs (N, ...) out of what it returned, given N.
        mean: whether S is the sum over samples of the mean of their outputs, where a sample has several, not of all outputs.

    Raises:
        Unsupported: the critic does something that cannot be followed.
        TypeError, ValueError: outputs that are not one value per sample.
    """

    def __init__(
        self, op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], *, loss: bool,
        again: Callable[[], None] = lambda: None, stack: list[str] | None = None,
        into: dict[int, tuple[Tensor, Tensor, bool]] | None = None, read: Callable[[Any, int], Tensor] | None = None,
        mean: bool = False,
    ) -> None:  # fmt: skip
        self.known = facts(critic)
        self.x = x
        self.slope: Tensor | None = None
        self.read, self.mean = read or functools.partial(per_sample_outputs, op), mean
        self.stack, self.into = stack, into
        try:
            self._record(op, critic, x, context, loss)
        except MoreNeeded:
            self.known.curved = True
            again()
            self._record(op, critic, x, context, loss)

    def _record(self, op: str, critic: Critic, x: Tensor, context: Sequence[Tensor], loss: bool) -> None:
        self.tape = tape = Tape(keep_inputs=loss or self.known.curved, stack=self.stack)
        tape.batch = x.shape[0]
        tape.channels_last = self.known.channels_last
        if self.into is not None:
            tape.gradients = self.into
        if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
            tape.memory_format = torch.channels_last
        self.device = x.device.type
        active = tape.activate(x.detach())
        original = unwrapped(critic)
        with torch.compiler.set_stance("force_eager"), _no_half_autocast(self.device), torch.enable_grad(), tape:
            d = self.read(original(active, *context), tape.batch)
        self.slot = tape.slot(d)
        self.constant: Tensor | None = None
        if self.slot < 0 and d.requires_grad:  # it depends on parameters alone
            tape._clear(d)
            self.constant = d
        self.output = d.detach()
        tape.prepare(max(self.slot, 0))
        if self.slot < 0:
            tape.live_rules = []
        if tape.curved and not tape.keep_inputs:
            raise MoreNeeded
        self.known.curved = tape.curved
        if self.known.apart is None and not tape.apart:
            self.known.coupling = next((r.couples for r in tape.live_rules if r.couples), "")
            if not self.known.coupling and tape.couples(self.output):
                self.known.coupling = "a layer of this critic"
        self.known.apart = tape.apart

    @property
    def values(self) -> Tensor:
        """(N,), or (N, ...) where a sample has several outputs; float32 or better."""
        wide = self.output.to(torch.promote_types(self.output.dtype, torch.float32))
        return wide.reshape(-1) if wide.numel() == self.tape.batch else wide

    @torch.no_grad()
    def input_gradient(self, rows: int, slope: Tensor | None = None, *, all_of_x: bool = False) -> Tensor | None:
        """d(sum of the outputs)/dx of the first ``rows`` samples; None where the outputs do not depend on x.

        slope: dloss/dD (N,) of a loss that shares the pass, in a critic that keeps samples apart.
        all_of_x: whether x wants the loss's gradient too.
        """
        self.slope = slope
        if self.slot < 0:
            return None
        tape = self.tape
        start = torch.full_like(self.output, tape.batch / self.output.numel() if self.mean else 1.0)
        tape.rows = rows
        if slope is not None:
            tape.shared = True
            start[rows:] = slope[rows:].to(start.dtype).view(start[rows:].shape)
        with torch.autocast(self.device, enabled=False):
            g = tape.chain(start, tape.batch if all_of_x else rows)
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
                self.tape.collect(self.constant, slope.to(self.output.dtype).reshape(self.output.shape))
            return None
        tape, start = self.tape, None
        if slope is not None:
            start = slope.to(self.output.dtype).reshape(self.output.shape)
        elif tape.shared and tape.rows:
            assert self.slope is not None
            own = self.slope[: tape.rows]
            if not (own.is_cpu and not bool(own.any())):
                tape.f = own
                tape.even = own.is_cpu and bool((own == own[0]).all())
        if direction is not None and not tape.per_sample and direction.shape[0] < tape.batch:
            rest = direction.new_zeros((tape.batch - direction.shape[0], *direction.shape[1:]))
            direction = torch.cat([direction, rest])
        with torch.autocast(self.device, enabled=False):
            found = tape.sweep(direction, start, to_x)
        if not (to_x and tape.shared and self.x_cotangent is not None):
            return found
        loss = self.x_cotangent.clone()
        rows = tape.rows
        if rows:
            loss[:rows] *= 0 if tape.f is None else tape.f.to(loss.dtype).view(-1, *(1,) * (loss.dim() - 1))
        if found is not None:
            loss[: found.shape[0]] += found
        return loss

    def gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """(tensor, gradient) for each parameter, or tensor made of parameters or context, that the pass multiplied or added.

        The record is dropped.
        """
        found: list[tuple[Tensor, Tensor | None]] = [(tensor, gradient) for tensor, gradient, _ in self.tape.gradients.values()]
        del self.tape
        return found


class _Attach(torch.autograd.Function):
    """A value whose gradient by each tensor is known already, besides what its own graph leads to."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.gradients, ctx.tensors = gradients, tensors
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a penalty were asked for twice: give the first backward retain_graph=True")
        last = not torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
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
            "the gradient of a penalty was differentiated again, and its second derivative is not kept; use method='autograd'"
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
    for p in critic.parameters() if isinstance(critic, nn.Module) else ():
        if p.requires_grad and id(p) not in there:
            tensors.append(p)
            gradients.append(None)
    result: Tensor = _Attach.apply(value, gradients, *tensors)
    return result
