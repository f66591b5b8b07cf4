"""Whether weights are still those that were packed.

PyTorch counts changes in place, but not those of fused optimisers (``Adam(fused=True)``), nor edits through ``.data``, writes
of another library and replays of CUDA graphs. Steps of any optimiser are counted here; the others go unseen.
"""

from __future__ import annotations

import functools

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._compiler import uncompiled

_steps = 0


@uncompiled("it counts in Python")
def _count(*_: object) -> None:
    global _steps
    _steps += 1


@functools.cache
def _watch() -> None:
    register_optimizer_step_post_hook(_count)


def steps() -> int:
    """Steps of all optimisers of this process since this was first asked."""
    _watch()
    return _steps


def mark(tensor: Tensor) -> tuple[int, int]:
    """What changes with a tensor's numbers, but for steps of fused optimisers."""
    return tensor._version, tensor.data_ptr()
