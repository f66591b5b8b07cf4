"""nn.ReversibleSequential: backpropagation through a chain of bijections that stores only the chain's output.

The idea is RevNet's (Gomez et al., arXiv:1707.04585, section 3.2), for flows, whose inverses are at hand. It is a pair of
torch.library ops, so it composes with torch.compile; a module reaches them by a handle.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .._registry import LIBRARY
from .batch_norm_flow import BatchNormFlow
from .bijection import FlowSequential, State, like, tensors

_MODULES: weakref.WeakValueDictionary[int, ReversibleSequential] = weakref.WeakValueDictionary()
_HANDLES = itertools.count()
# Drifts on their way from a GPU, each with the event of its arrival.
_COMING: weakref.WeakKeyDictionary[ReversibleSequential, tuple[Tensor, Any]] = weakref.WeakKeyDictionary()
_FINGERPRINT = 1024  # elements of the input that are kept, to measure the drift of its reconstruction


class ReversibleSequential(FlowSequential):
    """Bijections one after the other, trained in memory that does not grow with their number.

    The forward keeps its output, the context and 1024 elements of the input; the backward rebuilds the input of each
    module from its output by inverting it, and recomputes what the gradient needs, one module at a time. That costs one
    more forward pass (couplings evaluate their conditioner once for both). Gradients equal those of
    :class:`FlowSequential` up to the rounding of the inverses; the drift of the rebuilt input is measured in each backward.

    Args:
        bijections: modules with ``forward`` and ``inverse`` of the flow convention, deterministic: a dropout or batch
            norm that is active in training would see other numbers when rebuilt, and is refused.
        drift_warning: relative drift of the rebuilt input above which a warning tells the measured figure; on a GPU at the
            next backward, which does not wait for it.

    Raises:
        ValueError: active dropout or batch norm inside.
        NotImplementedError: second derivatives, which would need the activations that were never kept.

    Example:
        >>> import torch, genfast
        >>> steps = [genfast.nn.GlowStep(4, torch.nn.Conv2d(2, 4, 3, padding=1)) for _ in range(8)]
        >>> z, logdet = genfast.nn.ReversibleSequential(*steps)(torch.randn(2, 4, 8, 8))
    """

    def __init__(self, *bijections: nn.Module, drift_warning: float = 1e-3) -> None:
        super().__init__(*bijections)
        self.drift_warning = drift_warning
        self._register()

    def _register(self) -> None:
        self._handle = next(_HANDLES)
        _MODULES[self._handle] = self

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copy or an unpickled module is a module of its own
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._register()

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        if self.training:
            self._check_deterministic()
            self._initialize(x, context)
        if not torch.is_grad_enabled():
            return super().forward(x, context)
        parameters = [p for p in self.parameters() if p.requires_grad]
        outputs = torch.ops.genfast.reversible(list(tensors(x)), context, parameters, self._handle)
        return like(x, outputs[:-2]), outputs[-2]

    def _check_deterministic(self) -> None:
        for name, module in self.named_modules():
            dropout = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
            norm = isinstance(module, nn.modules.batchnorm._BatchNorm | BatchNormFlow)
            if module.training and (dropout or norm):
                raise ValueError(
                    f"ReversibleSequential: {name} is a {type(module).__name__} in training mode, which would see other "
                    "numbers when the backward rebuilds its input; remove it or put it into evaluation mode"
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


def _forward(xs: list[Tensor], context: Tensor | None, parameters: list[Tensor], handle: int) -> list[Tensor]:
    module = _MODULES[handle]
    with torch.no_grad():
        z, logdet = FlowSequential.forward(module, _halves(xs), context)
    outputs = [o.clone() if any(o is x for x in xs) else o for o in tensors(z)]
    return [*outputs, logdet, _sampled(xs[0])]


def _fake(xs: list[Tensor], context: Tensor | None, parameters: list[Tensor], handle: int) -> list[Tensor]:
    half = xs[0].dtype in (torch.bfloat16, torch.float16)
    logdet = xs[0].new_empty((xs[0].shape[0],), dtype=torch.float32 if half else xs[0].dtype)
    step = max(1, xs[0].numel() // _FINGERPRINT)
    kept = min(_FINGERPRINT, -(-xs[0].numel() // step))
    return [*(torch.empty_like(x) for x in xs), logdet, xs[0].new_empty((kept,))]


def _backward_kernel(
    grads: list[Tensor], grad_logdet: Tensor, zs: list[Tensor], fingerprint: Tensor, context: Tensor | None,
    parameters: list[Tensor], handle: int,
) -> list[Tensor]:  # fmt: skip
    module = _MODULES[handle]
    state, dz = _halves(zs), list(grads)
    if context is not None:
        context = context.detach().requires_grad_(context.is_floating_point())
    extra = [*parameters, context] if context is not None and context.requires_grad else list(parameters)
    totals: list[Tensor | None] = [None] * len(extra)
    for stage in reversed(module.stages(len(zs) == 2)):
        rebuilt = stage.rebuild(state, context)
        outputs = [*tensors(rebuilt.z), rebuilt.logdet]
        pairs = [(o, g) for o, g in zip(outputs, [*dz, grad_logdet]) if o.requires_grad]
        with torch.enable_grad():
            found = torch.autograd.grad(
                [o for o, _ in pairs], [*rebuilt.leaves, *extra], [g for _, g in pairs], allow_unused=True
            )
        count = len(rebuilt.leaves)
        leaf_grads = [torch.zeros_like(t) if g is None else g for t, g in zip(rebuilt.leaves, found)]
        dz = list(tensors(rebuilt.gather(leaf_grads)))
        for i, g in enumerate(found[count:]):
            if g is not None:
                before = totals[i]
                totals[i] = g if before is None else before + g
        state = rebuilt.x
    _warn_of_drift(module, fingerprint, _sampled(tensors(state)[0]))
    result = [*dz, *(torch.zeros_like(p) if g is None else g for p, g in zip(extra, totals))]
    if len(extra) == len(parameters) and context is not None:
        result.append(torch.zeros_like(context, dtype=torch.float32))
    return [t.clone() if any(t is other for other in (*grads, *zs)) else t for t in result]


def _warn_of_drift(module: ReversibleSequential, kept: Tensor, rebuilt: Tensor) -> None:
    if not kept.numel():
        return
    measured = (rebuilt - kept).float().norm() / kept.float().norm().clamp_min(1e-30)
    if not kept.is_cuda:
        _warn_if_large(module, float(measured), kept.numel())
        return
    if torch.cuda.is_current_stream_capturing():
        return
    # Read when it has come, at a later backward: to wait for it here would stop the GPU.
    coming = _COMING.get(module)
    if coming is not None and coming[1].query():
        _warn_if_large(module, float(coming[0]), kept.numel())
        coming = None
    if coming is None:
        host, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        host.copy_(measured, non_blocking=True)
        event.record()
        _COMING[module] = host, event


def _warn_if_large(module: ReversibleSequential, drift: float, elements: int) -> None:
    if not drift <= module.drift_warning:
        warnings.warn(
            f"ReversibleSequential: the input rebuilt through {len(module)} modules differs from the true one by "
            f"{drift:.1e} (relative, over {elements} elements; the limit is {module.drift_warning:.0e}), so the "
            "gradients are off by about as much. An inverse is ill-conditioned: use smaller scales, float64, or fewer "
            "modules in one chain",
            stacklevel=2,
        )


def _backward_fake(
    grads: list[Tensor], grad_logdet: Tensor, zs: list[Tensor], fingerprint: Tensor, context: Tensor | None,
    parameters: list[Tensor], handle: int,
) -> list[Tensor]:  # fmt: skip
    result = [*(torch.empty_like(z) for z in zs), *(torch.empty_like(p) for p in parameters)]
    return result if context is None else [*result, torch.empty_like(context)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    xs, context, parameters, ctx.handle = inputs
    ctx.halves, ctx.has_context = len(xs), context is not None
    ctx.save_for_backward(*output[: len(xs)], output[-1], *parameters, *([] if context is None else [context]))


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "ReversibleSequential has no second derivatives: its activations were never kept; use FlowSequential"
        )
    saved = list(ctx.saved_tensors)
    context = saved.pop() if ctx.has_context else None
    zs, fingerprint, parameters = saved[: ctx.halves], saved[ctx.halves], saved[ctx.halves + 1 :]
    result = torch.ops.genfast.reversible_backward(
        grads[: ctx.halves], grads[ctx.halves], zs, fingerprint, context, parameters, ctx.handle
    )
    d_context = result.pop() if context is not None else None
    if context is not None and not context.is_floating_point():
        d_context = None
    return result[: ctx.halves], d_context, result[ctx.halves :], None


def _define() -> None:
    LIBRARY.define("reversible(Tensor[] xs, Tensor? context, Tensor[] parameters, int handle) -> Tensor[]")
    LIBRARY.define(
        "reversible_backward(Tensor[] grads, Tensor grad_logdet, Tensor[] zs, Tensor fingerprint, Tensor? context, "
        "Tensor[] parameters, int handle) -> Tensor[]"
    )
    for name, kernel, fake in (("reversible", _forward, _fake), ("reversible_backward", _backward_kernel, _backward_fake)):
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"genfast::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd("genfast::reversible", _backward, setup_context=_setup_context, lib=LIBRARY)


_define()
