"""The base class of flow modules, and their composition."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .flow_lowering import lower

# What flows through a chain: a tensor, or two channel halves of one (see GlowStep).
State = Tensor | tuple[Tensor, Tensor]


class Rebuilt(NamedTuple):
    """What :class:`ReversibleSequential` needs of one stage, made from the stage's output alone."""

    x: State  # the input that gave the output
    leaves: tuple[Tensor, ...]  # what z and logdet are differentiable functions of
    z: State
    logdet: Tensor
    gather: Callable[[Sequence[Tensor]], State]  # from the gradients of the leaves to that of x


def tensors(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


def like(state: State, values: Sequence[Tensor]) -> State:
    """``values`` as the same kind of state."""
    return values[0] if isinstance(state, Tensor) else (values[0], values[1])


class Bijection(nn.Module):
    """An invertible module. ``forward`` goes from data to latent, ``inverse`` back; both return (value, logdet
    (N,))."""

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def stages(self, paired: bool) -> list[Any]:
        """The steps that can be rebuilt one by one; ``paired`` says whether the input is a pair of channel halves."""
        return [self]

    def rebuild(self, z: Any, context: Tensor | None = None) -> Rebuilt:
        """From an output, the input that gave it, and the output again as a differentiable function of it."""
        return rebuild(self, z, context)


def call(stage: Any, x: State, context: Tensor | None) -> tuple[Any, Tensor]:
    """A stage that is a module is called, hooks and all."""
    result: tuple[Any, Tensor] = stage(x, context) if isinstance(stage, nn.Module) else stage.forward(x, context)
    return result


def is_ours(module: nn.Module) -> bool:
    """Whether calling ``module`` is what genfast wrote: no forward of a subclass or an instance, no hooks."""
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module).__module__.startswith("genfast.") and not hooked and "forward" not in module.__dict__


def rebuild(stage: Any, z: State, context: Tensor | None, between: Callable[[], object] = lambda: None) -> Rebuilt:
    """By inverting, then running forward again; a stage that can share work between the two does better.

    ``between`` is called between the two calls, to put back what the first one moved.
    """
    with torch.no_grad():
        x, _ = stage.inverse(z, context)
    between()
    leaves = tuple(t.detach().requires_grad_() for t in tensors(x))
    with torch.enable_grad():
        again, logdet = call(stage, like(x, leaves), context)
    return Rebuilt(x, leaves, again, logdet, lambda grads: like(x, grads))


class FlowSequential(Bijection):
    """Bijections one after the other; the log-determinants are added once, at the end.

    Example:
        >>> import torch, genfast
        >>> flow = genfast.nn.FlowSequential(genfast.nn.ActNorm(4), genfast.nn.InvertibleConv1x1(4))
        >>> z, logdet = flow(torch.randn(2, 4, 8, 8))
    """

    def __init__(self, *bijections: nn.Module) -> None:
        super().__init__()
        for i, b in enumerate(bijections):
            if not callable(getattr(b, "inverse", None)):
                raise TypeError(f"{type(self).__name__}: module {i} ({type(b).__name__}) has no inverse method")
            self.add_module(str(i), b)

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, index: int) -> nn.Module:
        return list(self.children())[index]

    def add_steps(self, builder: Any) -> None:
        """Adds the steps of all to a :class:`genfast.programs.FlowBuilder`."""
        for b in self.children():
            lower(b, builder)

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return self._run(x, [(b, "forward") for b in self.children()], context)

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        return self._run(z, [(b, "inverse") for b in reversed(list(self.children()))], context)

    def stages(self, paired: bool) -> list[Any]:
        return [
            s for b in self.children() for s in (b.stages(paired) if isinstance(b, Bijection) and is_ours(b) else [b])
        ]

    def _run(self, x: Any, steps: list[tuple[nn.Module, str]], context: Tensor | None) -> tuple[Any, Tensor]:
        logdets = []
        for module, way in steps:
            x, logdet = module(x, context) if way == "forward" else module.inverse(x, context)  # type: ignore[operator]
            logdets.append(logdet)
        return x, total(logdets, x)


def total(logdets: list[Tensor], x: Any) -> Tensor:
    """The sum of log-determinants (N,) in two operations however many there are."""
    if len(logdets) == 1:
        return logdets[0]
    if not logdets:
        first: Tensor = x if isinstance(x, Tensor) else x[0]
        return first.new_zeros(first.shape[0])
    return torch.stack(logdets).sum(0)
