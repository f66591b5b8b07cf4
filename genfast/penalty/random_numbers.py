"""The handlers of functions that draw random numbers, or make the constants that are filled with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arithmetic import scale
from .autograd_rule import otherwise
from .handlers import handles, named_arguments
from .in_place import may_overwrite, taken
from .tape import PlainLayoutNeeded, Tape


def _plain_like(tape: Tape, x: Tensor, function: Callable[..., Tensor], **options: Any) -> Tensor:
    """``function(x)`` in the memory order that x has in plain code, in which random numbers are drawn.

    Only convolutions work in another order here, and four axes show whether that is so.
    """
    if not tape.converted or options.get("memory_format") not in (None, torch.preserve_format):
        return function(x, **options)
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        raise PlainLayoutNeeded
    return function(x, **(options | {"memory_format": tape.memory_format}))


@handles(
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    torch.dropout,
    torch.feature_dropout,
    torch.dropout_,
    torch.feature_dropout_,
)
def _dropout(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in (torch.dropout, torch.feature_dropout, torch.dropout_, torch.feature_dropout_):
        x, p, training = named_arguments(args, kwargs, ("input", "p", "train"), ())
        inplace = func in (torch.dropout_, torch.feature_dropout_)
        draw = torch.dropout if func in (torch.dropout, torch.dropout_) else torch.feature_dropout
    else:
        x, p, training, inplace = named_arguments(
            args, kwargs, ("input", "p", "training", "inplace"), (0.5, True, False)
        )
        draw = func
    if not training or p == 0:
        return x
    of_elements = draw in (F.dropout, torch.dropout)  # one draw an element, in their order in memory, or one a channel
    ones = _plain_like(tape, x.detach(), torch.ones_like) if of_elements else torch.ones_like(x)
    mask = draw(ones, p, True)  # the same draws as on x itself
    if not inplace:
        return scale(tape, x, mask)
    may_overwrite(tape, func, x)
    return taken(tape, x, scale(tape, x, mask))


@handles(torch.rand_like, torch.randn_like, torch.empty_like, torch.zeros_like, torch.ones_like)
def _like(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Constants of the shape of x. Those without numbers may be filled with random ones next."""
    x = args[0] if args else kwargs["input"]
    if len(args) > 1 or kwargs.get("requires_grad"):
        return otherwise(tape, func, args, kwargs)
    options = {k: v for k, v in kwargs.items() if k != "input"}
    try:
        return _plain_like(tape, x.detach(), func, **options)
    except PlainLayoutNeeded:
        if func in (torch.rand_like, torch.randn_like):
            raise
        return func(x.detach(), **options)
