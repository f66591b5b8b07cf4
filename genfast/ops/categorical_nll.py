"""ops.categorical_nll: the softmax over levels that ends a PixelCNN, on whichever library call reads its layout in
place."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .._tensors import memory_format
from . import _check
from .discretized_logistic_mixture import integers, within

_NAME = "categorical_nll"
LAYOUTS = ("interleaved", "blocked")


def categorical_nll(logits: Tensor, x: Tensor, *, layout: Literal["interleaved", "blocked"] = "interleaved") -> Tensor:
    """Negative log-likelihood of levels under a softmax for each channel and position, in nats.

    Args:
        logits: (N, levels C, ...) floating point. "interleaved": channel level C + c, so (N, levels, C, ...), as masked
            convolutions with interleaved colour groups emit them; "blocked": channel c levels + level, (N, C, levels,
            ...).
        x: (N, C, ...) integers from 0 to levels - 1.
        layout: "interleaved" or "blocked".

    Returns:
        (N, C, ...), float32 for half-precision logits.

    Raises:
        TypeError: logits that are not floating point, x that is not of integers.
        ValueError: shapes, devices or a layout that do not fit, and values of x outside the levels (not under
            torch.compile).

    Source: PixelRNN (arXiv:1601.06759, section 3.3), Gated PixelCNN (arXiv:1606.05328, section 2).

    Example:
        >>> import torch, genfast
        >>> logits, x = torch.randn(2, 3 * 16, 8, 8), torch.randint(16, (2, 3, 8, 8))
        >>> nll = genfast.ops.categorical_nll(logits, x)
    """
    _check.choice(_NAME, "layout", layout, LAYOUTS)
    _check.floating(_NAME, logits=logits)
    integers(_NAME, x, "logits", logits)
    ls, xs = tuple(logits.shape), tuple(x.shape)
    if (
        len(xs) < 2
        or len(ls) != len(xs)
        or ls[0] != xs[0]
        or ls[2:] != xs[2:]
        or not xs[1]
        or not ls[1]
        or ls[1] % xs[1]
    ):
        raise ValueError(
            f"{_NAME}: x has shape {xs} and logits {ls}; expected logits (N, levels C, ...) with the batch and "
            "positions of x (N, C, ...) and a multiple of its channels"
        )
    levels = ls[1] // xs[1]
    within(_NAME, x, levels)
    logits, target = logits.to(torch.promote_types(logits.dtype, torch.float32)), x.long()
    if layout == "interleaved":
        return F.cross_entropy(logits.unflatten(1, (levels, xs[1])), target, reduction="none")
    if memory_format(logits) != torch.contiguous_format:  # a colour's levels lie side by side
        rows = logits.movedim(1, -1).reshape(-1, levels), target.movedim(1, -1).reshape(-1)
        return F.cross_entropy(*rows, reduction="none").view(xs[0], *xs[2:], xs[1]).movedim(-1, 1)
    merged = logits.reshape(xs[0] * xs[1], levels, *xs[2:])
    return F.cross_entropy(merged, target.reshape(xs[0] * xs[1], *xs[2:]), reduction="none").view(xs)
