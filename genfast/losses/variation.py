"""Total variation of images."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("anisotropic", "isotropic", "squared")


def total_variation(x: Tensor, *, kind: str = "anisotropic", reduction: str = "mean") -> Tensor:
    """Total variation (Rudin, Osher and Fatemi, 1992, equation 2.2a), of images of any number of dimensions.

    d_k x are the differences to the next element along each spatial axis k, zero at the last one. In plain PyTorch:
    beside the pass through a network that it goes with, its few passes over the image take no time that a kernel could
    save.

    Args:
        x: (N, C, ...), floating point, at least one spatial axis; half types are summed in float32.
        kind: "anisotropic": sum_k |d_k x|. "isotropic": sqrt(sum_k (d_k x)^2) at each element, with gradient 0 where
            all differences are. "squared": sum_k (d_k x)^2 (Mahendran and Vedaldi, arXiv:1412.0035, section 3, beta =
            2).
        reduction: "mean" over all elements of x (0 where there are none), "sum" over them, or "none": (N,), summed over
            each sample.

    Raises:
        TypeError: x is not floating point. ValueError: too few axes, or another ``kind`` or ``reduction``.

    Example:
        >>> import torch, genfast
        >>> genfast.losses.total_variation(torch.tensor([[[0.0, 1.0, 3.0]]]), reduction="sum")
        tensor(3.)
    """
    if kind not in KINDS:
        raise ValueError(f"total_variation: kind={kind!r}, expected one of {', '.join(map(repr, KINDS))}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"total_variation: reduction={reduction!r}, expected 'mean', 'sum' or 'none'")
    if not isinstance(x, Tensor) or not x.is_floating_point():
        said = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"total_variation: x is {said}, expected a floating-point tensor")
    if x.dim() < 3:
        raise ValueError(f"total_variation: x has shape {tuple(x.shape)}, expected (N, C, ...) with spatial axes")
    elements = x[0].numel() if len(x) else 0
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    steps = [x.diff(dim=k) for k in range(2, x.dim())]
    if kind == "isotropic":
        squares = torch.zeros_like(x)
        for k, d in enumerate(steps, 2):  # not to be written in place: d.square() is kept for the gradient
            squares = squares + torch.nn.functional.pad(d.square(), [0, 0] * (x.dim() - 1 - k) + [0, 1])
        flat = squares == 0
        each = squares.masked_fill(flat, 1).sqrt().masked_fill(flat, 0).flatten(1).sum(1)
    else:
        each = torch.stack([(d.abs() if kind == "anisotropic" else d.square()).flatten(1).sum(1) for d in steps]).sum(0)
    if reduction == "none":
        return each
    return each.mean() / max(1, elements) if reduction == "mean" and len(x) else each.sum()
