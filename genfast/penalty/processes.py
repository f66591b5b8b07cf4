"""Critics that are spread over processes: one forward pass of DistributedDataParallel, and none that is sharded in
parts."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._compiler import uncompiled
from .settings import Critic
from .state import unwrapped


class _OneForward(nn.Module):
    """Stands for the module in a DistributedDataParallel during one step, so that the step is one forward pass to it.

    Then its reducer sees which parameters the result depends on, not what single passes over the critic show of it.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        # under the names that they have there
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules

    def forward(self, *points: Tensor) -> Any:
        return self.run(*points)


def as_one_forward(op: str, critic: Critic, run: Callable[..., Any], *points: Tensor) -> Any:
    """``run(module, *points)`` with the plain module of a critic, as one forward pass of the wrapper that it may be
    in."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return run(critic, *points)
    check_sharded(op, critic)
    wrapper = unwrapped(critic)
    if not isinstance(wrapper, nn.parallel.DistributedDataParallel):
        return run(critic, *points)
    if wrapper.mixed_precision is not None:
        raise ValueError(
            f"{op}: critic is a DistributedDataParallel with mixed_precision, expected one without; use torch.autocast"
        )
    module = wrapper.module
    wrapper.module = _OneForward(module, functools.partial(run, module))
    try:
        return wrapper(*points)
    finally:
        wrapper.module = module


as_one_forward_uncompiled = uncompiled("its DistributedDataParallel looks for unused parameters")(as_one_forward)
norms_uncompiled = uncompiled(
    "gradient_penalty: return_norms=True, whose norms carry a gradient; 'detached' compiles as one graph"
)(as_one_forward)
patches_uncompiled = uncompiled("critic_step: the number of patches is not known before the call")(as_one_forward)


def traceable(critic: Critic) -> bool:
    """Whether torch.compile may take the step for one op, which hides from a reducer what its result depends on."""
    if not isinstance(critic, nn.parallel.DistributedDataParallel):
        return True
    return not (critic.find_unused_parameters or critic.static_graph)


def check_sharded(op: str, critic: Critic) -> None:
    """Raises where a critic, or a part of it, gathers its weights in hooks that no penalty can pass through."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(critic, nn.Module):
        return
    for name, part in critic.named_modules():
        if isinstance(part, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            which = f"its part {name!r} is" if name else "it is"
            raise ValueError(
                f"{op}: critic gathers weights on its own, since {which} sharded (fully_shard); leave the critic "
                f"whole, call {op} in the forward of a module that holds it, and shard that: fully_shard(objective)"
            )
