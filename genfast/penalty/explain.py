"""genfast.explain: which rule each part of a critic gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .critic import Critic, Pass, per_sample_outputs, without_wrappers
from .state import restored
from .sweeps import Sweeps
from .tape import Unsupported


def explain(critic: Critic, example: Tensor | None = None, context: Tensor | Sequence[Tensor] | None = None) -> str:
    """Prints the rule by which ``ops.gradient_penalty`` follows each call of the critic, and returns the text.

    Args:
        critic: as in the op. It is run once; its buffers are put back.
        example: (N, ...) of which only shape and dtype matter; by default a small one is tried that fits the first
            layer.
        context: what the critic takes besides.

    "exact, ...": a rule of ours, first-order work; "exact, PyTorch's own double backward": that one function is
    differentiated twice by PyTorch; otherwise the reason why the whole critic is.

    Raises:
        ValueError: no example given, and none found that the critic takes.

    Example:
        >>> import torch, genfast
        >>> critic = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))
        >>> print(genfast.explain(critic).splitlines()[0])  # doctest: +ELLIPSIS
        module ...
    """
    given = () if context is None else (context,) if isinstance(context, Tensor) else tuple(context)
    original = without_wrappers(critic)
    tried: list[Tensor] = [example] if example is not None else _guesses(original)
    recorded: Pass | None = None
    for x in tried:
        try:
            with restored(original) as restore:
                recorded = _named_pass(original, x, given, restore)
                text = _table(recorded.sweeps)
                recorded.sweep(recorded.input_gradient(len(x)))  # a missing second derivative shows only now
                restore()
            break
        except Exception as error:
            reason = str(error)
            if not isinstance(error, Unsupported):
                if example is None:
                    last = error
                    continue
                with restored(original) as restore:  # an error of the critic's own is told as it is
                    per_sample_outputs("explain", original(x, *given), len(x))
                    restore()
                reason = f"{type(error).__name__}: {error}"
            text = f"double backward of the whole critic, or finite differences where that is missing: {reason}"
            print(text)
            return text
    if recorded is None:
        reason = f": {last}" if tried else ""
        raise ValueError(f"explain: no example fits this critic{reason}; give one, such as torch.randn(2, 3, 64, 64)")
    print(text)
    return text


def _guesses(critic: Any) -> list[Tensor]:
    """Inputs that may fit the first layer with a width."""
    for layer in critic.modules() if isinstance(critic, nn.Module) else ():
        weight = getattr(layer, "weight", None)
        dtype = weight.dtype if isinstance(weight, Tensor) else torch.float32
        device = weight.device if isinstance(weight, Tensor) else None
        if isinstance(layer, nn.Linear):
            return [torch.randn(4, layer.in_features, dtype=dtype, device=device)]
        for n, kinds in ((1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)):
            if isinstance(layer, kinds):
                sizes = (32, 64, 28, 16, 8, 128, 256) if n < 3 else (16, 8, 32)
                return [torch.randn(4, layer.in_channels, *(s,) * n, dtype=dtype, device=device) for s in sizes]
    return []


def _named_pass(critic: Critic, x: Tensor, context: Sequence[Tensor], restore: Callable[[], None]) -> Pass:
    stack: list[str] = []
    hooks = []

    def leave(*_: Any) -> None:
        stack.pop()

    for name, module in critic.named_modules() if isinstance(critic, nn.Module) else ():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))  # type: ignore[misc]
        hooks.append(module.register_forward_hook(leave, always_call=True))
    try:
        return Pass("explain", critic, x, context, loss=True, start=restore, stack=stack)
    finally:
        for h in hooks:
            h.remove()


def _table(sweeps: Sweeps) -> str:
    rows = [("module", "call", "rule")]
    rows += [
        (r.module or "(critic)", r.called, r.kind + (f"; couples samples: {r.couples}" if r.couples else ""))
        for r in sweeps.tape.rules
    ]
    widths = [max(len(r[i]) for r in rows) for i in range(2)]
    lines = ["  ".join((r[0].ljust(widths[0]), r[1].ljust(widths[1]), r[2])) for r in rows]
    if sweeps.curved:
        work = "six units of work a layer (forward, chain, tangent, second sweep, weight gradients)"
    else:
        work = "piecewise linear: four units of work a layer, where double backward does six"
    apart = "samples are kept apart" if sweeps.separable else "samples are coupled, or not known to be kept apart"
    return "\n".join([*lines, f"{work}; {apart}"])
