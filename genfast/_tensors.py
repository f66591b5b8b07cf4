"""What the registry, the ops and the kernels ask of a tensor: the order of its axes in memory, and the dtype in which
its sums are taken."""

from __future__ import annotations

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of ``dtype`` are taken and returned: float32 for half types, else ``dtype`` itself."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def memory_format(x: Tensor) -> torch.memory_format:
    """The format of an output in x's order: channels_last where ``x`` is laid out so, else contiguous."""
    if x.dim() < 3 or x.is_contiguous():
        return torch.contiguous_format
    form = CHANNELS_LAST.get(x.dim())
    if form is not None and x.stride(1) == 1 and (x.shape[1] > 1 or x.is_contiguous(memory_format=form)):
        return form
    return torch.contiguous_format
