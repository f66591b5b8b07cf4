"""Squeezing (RealNVP, 1605.08803, section 3.6): f x f blocks of positions become channels.

Two channel orders are found in the field. "space_to_depth" (RealNVP and TensorFlow): channel (i f + j) C + c;
"pixel_unshuffle" (PyTorch, normflows): channel c f^2 + i f + j.
"""

from __future__ import annotations

from torch import Tensor

ORDERS = ("pixel_unshuffle", "space_to_depth")


def squeeze(x: Tensor, factor: int, order: str, inverse: bool) -> Tensor:
    """(N, C, H, W) to (N, f^2 C, H/f, W/f), or back with ``inverse``."""
    n, c, h, w = x.shape
    f = factor
    if not inverse:
        blocks = x.reshape(n, c, h // f, f, w // f, f)
        axes = (0, 1, 3, 5, 2, 4) if order == "pixel_unshuffle" else (0, 3, 5, 1, 2, 4)
        return blocks.permute(axes).reshape(n, c * f * f, h // f, w // f)
    c //= f * f
    if order == "pixel_unshuffle":
        return x.reshape(n, c, f, f, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c, h * f, w * f)
    return x.reshape(n, f, f, c, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c, h * f, w * f)
