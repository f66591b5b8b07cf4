"""Whether real, fake and interpolated samples may go through the critic as one batch, and the pass over them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .critic import Pass
from .fallback import relative_difference, rounding_error
from .settings import Call, Critic
from .state import State, facts, unwrapped


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        return torch.cat(list(tensors))


Part = tuple[Tensor, Sequence[Tensor]]  # points and their context


def _stackable(parts: Sequence[Part]) -> str:
    """Why these cannot go through the critic as one batch, or ""."""
    (first, context), *others = parts
    for x, c in others:
        if x.dtype != first.dtype or x.shape[1:] != first.shape[1:] or len(c) != len(context):
            return "real and fake differ in shape, dtype or context"
        for x_c, first_c in zip(c, context):
            if x_c.dtype != first_c.dtype or x_c.shape[1:] != first_c.shape[1:]:
                return "the contexts of real and fake differ in shape or dtype"
    if any(c.dim() == 0 or c.shape[0] != len(x) for x, cs in parts for c in cs):
        return "a context has not one row per sample"
    return ""


def joined_pass(
    call: Call,
    critic: Critic,
    parts: Sequence[Part],
    restore: Callable[[], None],
    batching: str,
    into: dict[int, tuple[Tensor, Tensor, bool]] | None,
    loss: bool = True,
) -> Pass | None:
    """A pass over all parts as one batch; None if they must go through the critic apart.

    What the record shows (a rule that mixes samples, a value that leaves its sight) forbids it. What no record shows,
    such as a number made of the batch's size, is looked for by a comparison with the parts' own outputs, once for each
    structure.
    """
    known = facts(critic)
    # A function may be a new one at each call, which would pay for a comparison each time; a module is the same one
    # again, and its first call goes the way of the later ones, so that a run that is resumed repeats the bits of one
    # that was not.
    if batching == "auto" and (known.moves or (known.separable is None and not isinstance(critic, nn.Module))):
        return None
    recorded: Pass | None = None
    unlike = _stackable(parts)
    reason = unlike or known.separate
    if not reason:
        x, context = concatenated([p for p, _ in parts]), [concatenated(c) for c in zip(*(c for _, c in parts))]

        def record() -> Pass:
            return Pass(
                call.op,
                critic,
                x,
                context,
                loss=loss,
                start=restore,
                into=into,
                read=call.read,
                mean=call.patches == "mean",
            )

        recorded = record()
        sweeps, escaped = recorded.sweeps, recorded.sweeps.tape.escaped
        output = getattr(call.output, "__code__", call.output)
        key = (
            tuple(map(type, sweeps.tape.rules)),
            output,
            call.patches,
            tuple(len(p) for p, _ in parts),
            x.shape,
            x.dtype,
            torch.is_autocast_enabled(x.device.type),
        )
        if not sweeps.joinable:
            why = f"by {escaped}, which is not recorded" if escaped else f"by {known.coupling or 'one of its layers'}"
            reason = f"its samples may meet {why}"
        elif key not in known.joined:
            recorded = None
            restore()
            reason = _compare(call, critic, parts, restore, batching)
            if not reason and (batching == "together" or not known.moves):
                known.joined.add(key)
                recorded = record()
    if reason:
        if recorded is not None:
            recorded = None
            restore()
        if not unlike:
            known.separate = reason
        if batching == "together" and not known.warned_separate:
            known.warned_separate = True
            warnings.warn(
                f"{call.op}: batching='together' is not followed for this critic: {reason}; real, fake and "
                "interpolated samples are batches of their own",
                stacklevel=5,
            )
    return recorded


class _Undropped(TorchFunctionMode):
    """Runs dropout as in evaluation, so that the batches of a random critic can be compared."""

    FUNCTIONS = frozenset(
        (
            F.dropout,
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.alpha_dropout,
            F.feature_alpha_dropout,
            F.rrelu,
            torch.dropout,
            torch.feature_dropout,
            torch.alpha_dropout,
            torch.feature_alpha_dropout,
            torch.rrelu,
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.FUNCTIONS:
            bound = {"inplace": kwargs.pop("inplace", False), **kwargs}
            if func in (F.rrelu, torch.rrelu):
                bounds = (*args[1:3], *(bound[k] for k in ("lower", "upper") if k in bound))
                slope = sum(bounds) / 2 if len(bounds) == 2 else (1 / 8 + 1 / 3) / 2
                return F.leaky_relu(args[0] if args else kwargs["input"], slope)
            return (args[0] if args else kwargs["input"]) * 1
        if func is F.scaled_dot_product_attention:
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs["dropout_p"] = 0.0
        elif func is F.multi_head_attention_forward:
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
            elif len(args) > 10:
                args = (*args[:10], 0.0, *args[11:])
        return func(*args, **kwargs)


def _compare(call: Call, critic: Critic, parts: Sequence[Part], restore: Callable[[], None], batching: str) -> str:
    """Why parts may not be joined, or "": their outputs as one batch beside those of each, from the same state."""
    known = facts(critic)
    original = unwrapped(critic)
    # Equal batches would have equal means, and hide that the critic subtracts one.
    unlike = [_unlike(i, x, context) for i, (x, context) in enumerate(parts)]

    def outputs(x: Tensor, context: Sequence[Tensor]) -> Tensor:
        with torch.compiler.set_stance("force_eager"), torch.enable_grad():
            return call.read(original(x.detach().requires_grad_(), *context), len(x)).detach()

    x, context = torch.cat([p for p, _ in unlike]), [torch.cat(c) for c in zip(*(c for _, c in unlike))]
    before = State(critic)
    outputs(x, context)
    known.moves = known.moves or before.moved()
    if known.moves and batching == "auto":
        restore()
        return ""
    results = []
    with _Undropped():
        for p, c in [(x, context), *unlike]:
            restore()
            results.append(outputs(p, c))
    restore()
    joined, separate = results[0], torch.cat(results[1:])
    off = relative_difference(separate, joined)
    if off <= rounding_error(separate):
        return ""
    return f"its outputs for one batch of all samples differ from those of separate batches by {off:.1e} of their size"


def _unlike(i: int, x: Tensor, context: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The ``i``-th part made unlike the others, by changes that a critic takes for data like any other."""
    factor = 0.5**i
    changed = [c * factor if c.is_floating_point() else c[:1].expand_as(c) if i else c for c in context]
    return x.detach() * factor, [c.detach() for c in changed]
