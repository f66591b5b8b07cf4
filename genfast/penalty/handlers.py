"""How a function gets its handler, and what handlers share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .tape import HANDLERS, PASSED, Handler, Maybe

T = torch.Tensor


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Registers a handler for these functions."""

    def register(handler: Handler) -> Handler:
        for f in functions:
            HANDLERS[f] = handler
        return handler

    return register


def trainable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a product of ``x`` is done: autocast leaves float64 alone."""
    device = x.device.type
    if x.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def mixed_dtypes(*tensors: Any) -> bool:
    """Whether the factors of a product differ in dtype after autocast, which PyTorch refuses."""
    return len({autocast_dtype(x) for x in tensors if isinstance(x, Tensor)}) > 1


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)


def sum_of_present(a: Maybe, b: Maybe) -> Maybe:
    return b if a is None else a if b is None else a + b


def flat_ints(values: Any) -> list[Any]:
    found: list[Any] = []
    for v in values if isinstance(values, (tuple, list)) else (values,):
        found += flat_ints(v) if isinstance(v, (tuple, list)) else [v]
    return found


def functions_named(*names: str) -> list[Any]:
    """The functions and methods of these names, wherever they are."""
    return [getattr(where, n) for n in names for where in (torch, T, F) if hasattr(where, n)]


def name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", "") or str(func)
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name  # of an attribute


def named_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], defaults: Sequence[Any]
) -> list[Any]:
    """The arguments in the order of ``names``; the last ones have ``defaults``."""
    required = len(names) - len(defaults)
    found = list(args)
    for i in range(len(args), len(names)):
        found.append(kwargs[names[i]] if i < required else kwargs.get(names[i], defaults[i - required]))
    return found


PASSED.update(
    f
    for f in (
        T.size, T.dim, T.numel, T.stride, T.is_contiguous, T.is_floating_point, T.element_size, T.__len__, T.ndimension,
        T.is_complex, T.data_ptr, T.get_device, T.storage_offset, T.is_neg, T.is_conj, torch.is_floating_point,
        torch.numel,
        *(getattr(T, n).__get__ for n in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout",
        "is_cpu", "grad_fn", "is_leaf", "is_sparse", "is_mkldnn", "is_quantized", "is_nested",
                                          "names")
          if hasattr(T, n)),
    )
)  # fmt: skip
