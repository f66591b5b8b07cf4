"""What autocast does to the arguments of a product or a convolution, for ops of ours that stand in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def autocast(x: Tensor, *others: Any) -> list[Any]:
    """``x`` and ``others``, in autocast's dtype where it is on for x's device.

    float64 stays, and what is no floating tensor is left to the op's check.
    """
    tensors = [x, *others]
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which raises for meta tensors
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype is not torch.float64 else t
        for t in tensors
    ]
