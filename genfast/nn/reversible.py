"""nn.ReversibleSequential: backpropagation through a chain of bijections that stores only the chain's output.

The idea is RevNet's (Gomez et al., arXiv:1707.04585, section 3.2), for flows, whose inverses are at hand. It is a pair
of torch.library ops, so it composes with torch.compile; a module reaches them by a handle.

The backward calls each stage again, and what a call moves would move twice, or be other numbers: the power iteration of
a spectral norm, the statistics of a batch norm, random numbers. So the forward keeps, as torch.utils.checkpoint does
and for each stage, the state of the generators and of the buffers before it, which modules were in training mode, and
the autocast; the backward puts them back for the time of its calls.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._derived import recorded, same_numbers
from .._registry import LIBRARY
from .._torch_private import transform
from .batch_norm_flow import BatchNormFlow
from .bijection import Bijection, FlowSequential, Rebuilt, State, call, is_ours, like, rebuild, tensors, total

_MODULES: weakref.WeakValueDictionary[int, ReversibleSequential] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()
# Drifts on their way from a GPU, each with the event of its arrival.
_COMING: weakref.WeakKeyDictionary[ReversibleSequential, tuple[Tensor, Any]] = weakref.WeakKeyDictionary()
_FINGERPRINT = 1024  # elements of the input that are kept, to measure the drift of its reconstruction
_GENERATOR, _CUDA_GENERATOR = torch.get_rng_state().numel(), 16  # bytes of a generator's state


class ReversibleSequential(FlowSequential):
    """Bijections one after the other, trained in memory that does not grow with their number.

    The forward keeps its output, the context and 1024 elements of the input; the backward rebuilds the input of each
    module from its output by inverting it, and recomputes what the gradient needs, one module at a time. That costs one
    more forward pass (couplings evaluate their conditioner once for both). Gradients equal those of
    :class:`FlowSequential` up to the rounding of the inverses; the drift of the rebuilt input is measured in each
    backward.

    Dropout, noise from torch's default generators, batch norm and spectral norm in the conditioners are replayed: the
    backward meets the random numbers, buffers, training flags and autocast of the forward, and leaves all of them as it
    found them. Under a transform of torch.func, torch.export and torch.jit.trace it is a :class:`FlowSequential`.

    Args:
        bijections: modules with ``forward`` and ``inverse`` of the flow convention.
        drift_warning: relative drift of the rebuilt input above which a warning tells the measured figure; on a GPU at
            the next backward, which does not wait for it.

    Raises:
        ValueError: a :class:`BatchNormFlow` in training inside, which has no inverse then.
        RuntimeError: in the backward, a bijection that gives other numbers when it is called again, for example by a
            generator of its own, so that its input cannot be rebuilt.
        NotImplementedError: second derivatives, which would need the activations that were never kept.

    Example:
        >>> import torch, genfast
        >>> steps = [genfast.nn.GlowStep(4, torch.nn.Conv2d(2, 4, 3, padding=1)) for _ in range(8)]
        >>> z, logdet = genfast.nn.ReversibleSequential(*steps)(torch.randn(2, 4, 8, 8))
    """

    def __init__(self, *bijections: nn.Module, drift_warning: float = 1e-3) -> None:
        super().__init__(*bijections)
        self.drift_warning = drift_warning
        self._draws: bool | None = None  # whether a call draws from the CPU's generator; None before the first
        self._register()

    def _register(self) -> None:
        self._handle = next(_HANDLES)
        _MODULES[self._handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy or an unpickled module is a module of its own
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        if self.training:
            self._check_invertible()
            self._initialize(x, context)
        if not torch.is_grad_enabled() or _is_elsewhere():
            return super().forward(x, context)
        xs = list(tensors(x))
        parameters = [p for p in self.parameters() if p.requires_grad]
        outputs = torch.ops.genfast.reversible(
            xs, context, parameters, self._handle, _autocast(xs[0].device.type), self._draws is not False
        )
        return like(x, outputs[: len(xs)]), outputs[len(xs)]

    def _check_invertible(self) -> None:
        for name, module in self.named_modules():
            if module.training and isinstance(module, BatchNormFlow):
                raise ValueError(
                    f"ReversibleSequential: {name} is a BatchNormFlow in training mode, which has no inverse to "
                    "rebuild its input with; put it into evaluation mode, or use FlowSequential"
                )

    @torch.no_grad()
    def _initialize(self, x: Any, context: Tensor | None) -> None:
        """Lets data-dependent layers set themselves first, outside the op, which must not change its parameters."""
        if any(getattr(m, "_pending", False) for m in self.modules()):
            super().forward(x, context)


def _halves(values: list[Tensor]) -> State:
    return values[0] if len(values) == 1 else (values[0], values[1])


def _sampled(x: Tensor) -> Tensor:
    flat = x.detach().reshape(-1)
    step = max(1, flat.numel() // _FINGERPRINT)
    return flat[::step][:_FINGERPRINT].clone()


def _is_elsewhere() -> bool:
    """Whether the call is one whose derivative or graph cannot hold the pair of ops, whose handle is this process's."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return transform() is not None or recorded()


def _autocast(device_type: str) -> str:
    """The dtype of autocast, "" where it is off."""
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return ""
    return "bfloat16" if torch.get_autocast_dtype(device_type) == torch.bfloat16 else "float16"


def _casting(device_type: str, dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast without its cache, which would hold casts made without gradients."""
    if not dtype:
        return torch.autocast(device_type, enabled=False) if _autocast(device_type) else contextlib.nullcontext()
    return torch.autocast(device_type, getattr(torch, dtype), cache_enabled=False)


# ---- what a call moves ----


def _buffers(stage: Any) -> list[Tensor]:
    """The buffers that calling a stage may move: all but those of our own bijections, which only say what they are."""
    found: dict[int, Tensor] = {}
    for module in stage.modules():
        if not (isinstance(module, Bijection) and type(module).__module__.startswith("genfast.")):
            found |= {id(b): b for b in module.buffers(recurse=False)}
    return list(found.values())


class _Moved(NamedTuple):
    """The state before one stage."""

    buffers: list[Tensor]
    generator: Tensor
    cuda_generator: Tensor | None
    device: torch.device


@contextlib.contextmanager
def _replayed(stage: Any, before: _Moved) -> Iterator[None]:
    """The stage's buffers and the generators as they were before its call; what they are now comes back at the end."""
    buffers = _buffers(stage)
    now = [b.clone() for b in buffers]
    cuda = before.cuda_generator is not None
    with torch.random.fork_rng([before.device] if cuda else []):
        _set_generators(before)
        _set_buffers(buffers, before.buffers)
        try:
            yield
        finally:
            _set_buffers(buffers, now)


@torch.no_grad()
def _set_buffers(buffers: list[Tensor], values: list[Tensor]) -> None:
    for b, value in zip(buffers, values):
        # Only what differs is written: another graph may have saved a buffer, and checks that nobody wrote to it.
        if not b.is_cpu or not same_numbers(b, value):
            b.copy_(value)


def _set_generators(before: _Moved) -> None:
    torch.set_rng_state(before.generator.clone())  # a row of many: PyTorch crashes on a state with a storage offset
    if before.cuda_generator is not None:
        torch.cuda.set_rng_state(before.cuda_generator.clone(), before.device)


@contextlib.contextmanager
def _training_of(module: nn.Module, flags: Tensor) -> Iterator[None]:
    """Every submodule in training or in evaluation mode as ``flags`` say."""
    modules = list(module.modules())
    now = [m.training for m in modules]
    try:
        for m, flag in zip(modules, flags.tolist()):
            m.training = bool(flag)
        yield
    finally:
        for m, flag in zip(modules, now):
            m.training = flag


# ---- the ops ----


def _forward(
    xs: list[Tensor], context: Tensor | None, parameters: list[Tensor], handle: int, autocast: str, draws: bool
) -> list[Tensor]:
    """z, logdet, the fingerprint, then what :func:`_moved_of` reads: flags, generators, buffers stage by stage.

    A generator's state of 5 kB comes for each stage, or once where no stage ``draws``.
    """
    module, stages = _MODULES[handle], _MODULES[handle].stages(len(xs) == 2)
    first = torch.get_rng_state()
    result = _run(module, stages, xs, context, autocast, draws)
    moved = not torch.equal(first, torch.get_rng_state())
    if moved and not draws:  # the first time after calls that drew nothing: once more, from the beginning
        befores = _moved_of(stages, result[len(xs) + 3 :], xs[0].device)
        for stage, before in zip(reversed(stages), reversed(befores)):
            _set_buffers(_buffers(stage), before.buffers)
        _set_generators(befores[0])
        result = _run(module, stages, xs, context, autocast, True)
    if moved or module._draws is None:
        module._draws = moved
    return result


def _run(
    module: ReversibleSequential,
    stages: list[Any],
    xs: list[Tensor],
    context: Tensor | None,
    autocast: str,
    draws: bool,
) -> list[Tensor]:
    device = xs[0].device
    cuda = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    state, logdets = _halves(xs), []
    generators, cuda_generators, buffers = [], [], []
    with torch.no_grad(), _casting(device.type, autocast):
        for i, stage in enumerate(stages):
            if draws or not i:
                generators.append(torch.get_rng_state())
            if device.type == "cuda":
                cuda_generators.append(
                    torch.cuda.get_rng_state(device) if cuda else torch.zeros(_CUDA_GENERATOR, dtype=torch.uint8)
                )
            buffers += [b.clone() for b in _buffers(stage)]
            state, logdet = call(stage, state, context)
            logdets.append(logdet)
        logdet = total(logdets, state)
    outputs = [o.clone() if any(o is x for x in xs) else o for o in tensors(state)]
    flags = torch.tensor([m.training for m in module.modules()], dtype=torch.uint8)
    states = [_stacked(s, n) for s, n in ((generators, _GENERATOR), (cuda_generators, _CUDA_GENERATOR))]
    return [*outputs, logdet, _sampled(xs[0]), flags, *states, *buffers]


def _stacked(states: list[Tensor], size: int) -> Tensor:
    return torch.stack(states) if states else torch.empty((0, size), dtype=torch.uint8)


def _fake(
    xs: list[Tensor], context: Tensor | None, parameters: list[Tensor], handle: int, autocast: str, draws: bool
) -> list[Tensor]:
    module = _MODULES[handle]
    half = xs[0].dtype in (torch.bfloat16, torch.float16)
    logdet = xs[0].new_empty((xs[0].shape[0],), dtype=torch.float32 if half else xs[0].dtype)
    step = max(1, xs[0].numel() // _FINGERPRINT)
    sampled = min(_FINGERPRINT, -(-xs[0].numel() // step))
    stages = module.stages(len(xs) == 2)
    cuda = len(stages) if xs[0].device.type == "cuda" else 0
    rows = len(stages) if draws else min(1, len(stages))
    shapes = ((len(list(module.modules())),), (rows, _GENERATOR), (cuda, _CUDA_GENERATOR))
    moved = [torch.empty(shape, dtype=torch.uint8, device="cpu") for shape in shapes]
    buffers = [torch.empty(b.shape, dtype=b.dtype, device=b.device) for stage in stages for b in _buffers(stage)]
    return [*(torch.empty_like(x) for x in xs), logdet, xs[0].new_empty((sampled,)), *moved, *buffers]


def _moved_of(stages: list[Any], moved: list[Tensor], device: torch.device) -> list[_Moved]:
    """The state before each stage, from what the forward gave."""
    generators, cuda_generators, *buffers = moved
    rest = iter(buffers)
    states = list(generators.unbind())
    states = states if len(states) == len(stages) else states * len(stages)
    cuda: list[Tensor | None] = [*cuda_generators.unbind()] or [None] * len(stages)
    if (
        cuda_generators.numel() and not cuda_generators.any()
    ):  # a graph was being captured, whose generators replay themselves
        cuda = [None] * len(stages)
    return [
        _Moved([next(rest) for _ in _buffers(stage)], generator, cuda_generator, device)
        for stage, generator, cuda_generator in zip(stages, states, cuda)
    ]


def _backward_kernel(
    grads: list[Tensor],
    grad_logdet: Tensor,
    zs: list[Tensor],
    fingerprint: Tensor,
    moved: list[Tensor],
    context: Tensor | None,
    parameters: list[Tensor],
    handle: int,
    autocast: str,
) -> list[Tensor]:
    module, device = _MODULES[handle], zs[0].device
    state, dz = _halves(zs), list(grads)
    if context is not None:
        context = context.detach().requires_grad_(context.is_floating_point())
    extra = [*parameters, context] if context is not None and context.requires_grad else list(parameters)
    totals: list[Tensor | None] = [None] * len(extra)
    flags, *rest = moved
    stages = module.stages(len(zs) == 2)
    with _training_of(module, flags), _casting(device.type, autocast):
        befores = _moved_of(stages, rest, device)
        for stage, before in zip(reversed(stages), reversed(befores)):
            with _replayed(stage, before):
                rebuilt = _rebuilt(stage, before, state, context)
                outputs = [*tensors(rebuilt.z), rebuilt.logdet]
                pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, [*dz, grad_logdet]) if o.requires_grad]
                with torch.enable_grad():
                    found = torch.autograd.grad(
                        [o for o, _ in pairs], [*rebuilt.leaves, *extra], [g for _, g in pairs], allow_unused=True
                    )
            count = len(rebuilt.leaves)
            leaf_grads = [torch.zeros_like(t) if g is None else g for t, g in zip(rebuilt.leaves, found)]
            dz = list(tensors(rebuilt.gather(leaf_grads)))
            for i, g in enumerate(found[count:]):
                if g is not None:
                    sofar = totals[i]
                    totals[i] = g if sofar is None else sofar + g
            state = rebuilt.x
        sampled = _sampled(tensors(state)[0])
        _warn_of_drift(module, fingerprint, sampled, lambda: _changing(module, stages, befores, state, context))
    result = [*dz, *(torch.zeros_like(p) if g is None else g for p, g in zip(extra, totals))]
    if len(extra) == len(parameters) and context is not None:
        result.append(torch.zeros_like(context, dtype=torch.float32))
    return [t.clone() if any(t is other for other in (*grads, *zs)) else t for t in result]


def _rebuilt(stage: Any, before: _Moved, state: State, context: Tensor | None) -> Rebuilt:
    """The stage's input from its output; between its two calls, if it needs two, the state is put back."""
    own = getattr(type(stage), "rebuild", Bijection.rebuild) is not Bijection.rebuild
    if own and (not isinstance(stage, nn.Module) or is_ours(stage)):
        result: Rebuilt = stage.rebuild(state, context)
        return result

    def between() -> None:
        _set_generators(before)
        _set_buffers(_buffers(stage), before.buffers)

    return rebuild(stage, state, context, between)


@torch.no_grad()
def _changing(
    module: ReversibleSequential, stages: list[Any], befores: list[_Moved], x: State, context: Tensor | None
) -> str:
    """The first stage that gives other numbers when it is called again from the same state; empty where there is
    none."""
    for i, (stage, before) in enumerate(zip(stages, befores)):
        twice = []
        for _ in range(2):
            with _replayed(stage, before):
                twice.append(call(stage, x, context)[0])
        for one, other in zip(tensors(twice[0]), tensors(twice[1])):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-5, equal_nan=True):
                owner = getattr(stage, "step", stage)
                path = next((name for name, m in module.named_modules() if m is owner), str(i))
                return f"{path} ({type(owner).__name__})"
        x = twice[0]
    return ""


def _warn_of_drift(module: ReversibleSequential, before: Tensor, rebuilt: Tensor, changing: Callable[[], str]) -> None:
    if not before.numel():
        return
    measured = (rebuilt - before).float().norm() / before.float().norm().clamp_min(1e-30)
    if not before.is_cuda:
        _warn_if_large(module, float(measured), before.numel(), changing)
        return
    if torch.cuda.is_current_stream_capturing():
        return
    # Read when it has come, at a later backward: to wait for it here would stop the GPU.
    coming = _COMING.get(module)
    if coming is not None and coming[1].query():
        _warn_if_large(module, float(coming[0]), before.numel(), changing)
        coming = None
    if coming is None:
        host, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        host.copy_(measured, non_blocking=True)
        event.record()
        _COMING[module] = host, event


def _warn_if_large(module: ReversibleSequential, drift: float, elements: int, changing: Callable[[], str]) -> None:
    if drift <= module.drift_warning:
        return
    measured = (
        f"the input rebuilt through {len(module)} modules differs from the true one by {drift:.1e} (relative, over "
        f"{elements} elements; the limit is {module.drift_warning:.0e})"
    )
    name = changing()
    if name:
        raise RuntimeError(
            f"ReversibleSequential: {name} gives other numbers when the backward calls it again: {measured}. Its "
            "state is not in buffers and torch's default generators, which are replayed; use FlowSequential"
        )
    warnings.warn(
        f"ReversibleSequential: {measured}, so the gradients are off by about as much. Every module gives the same "
        "numbers again, so an inverse is ill-conditioned: use smaller scales, float64, or fewer modules in one chain",
        stacklevel=2,
    )


def _backward_fake(
    grads: list[Tensor],
    grad_logdet: Tensor,
    zs: list[Tensor],
    fingerprint: Tensor,
    moved: list[Tensor],
    context: Tensor | None,
    parameters: list[Tensor],
    handle: int,
    autocast: str,
) -> list[Tensor]:
    result = [*(torch.empty_like(z) for z in zs), *(torch.empty_like(p) for p in parameters)]
    return result if context is None else [*result, torch.empty_like(context)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, context, parameters, ctx.handle, ctx.autocast, _ = inputs
    ctx.set_materialize_grads(False)  # of the state that comes beside
    ctx.halves, ctx.has_context, ctx.parameters = len(xs), context is not None, len(parameters)
    ctx.save_for_backward(*output, *parameters, *([] if context is None else [context]))


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "ReversibleSequential has no second derivatives: its activations were never kept; use FlowSequential"
        )
    saved = list(ctx.saved_tensors)
    context = saved.pop() if ctx.has_context else None
    split = len(saved) - ctx.parameters
    parameters, saved = saved[split:], saved[:split]
    zs, logdet, fingerprint, moved = (
        saved[: ctx.halves],
        saved[ctx.halves],
        saved[ctx.halves + 1],
        saved[ctx.halves + 2 :],
    )
    given = [torch.zeros_like(t) if g is None else g for t, g in zip([*zs, logdet], grads)]
    result = torch.ops.genfast.reversible_backward(
        given[:-1], given[-1], zs, fingerprint, moved, context, parameters, ctx.handle, ctx.autocast
    )
    d_context = result.pop() if context is not None else None
    if context is not None and not context.is_floating_point():
        d_context = None
    return result[: ctx.halves], d_context, result[ctx.halves :], None, None, None


def _define() -> None:
    LIBRARY.define(
        "reversible(Tensor[] xs, Tensor? context, Tensor[] parameters, int handle, str autocast, bool draws) -> "
        "Tensor[]"
    )
    LIBRARY.define(
        "reversible_backward(Tensor[] grads, Tensor grad_logdet, Tensor[] zs, Tensor fingerprint, Tensor[] moved, "
        "Tensor? context, Tensor[] parameters, int handle, str autocast) -> Tensor[]"
    )
    for name, kernel, fake in (
        ("reversible", _forward, _fake),
        ("reversible_backward", _backward_kernel, _backward_fake),
    ):
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"genfast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd("genfast::reversible", _backward, setup_context=_setup_context, lib=LIBRARY)


_define()
