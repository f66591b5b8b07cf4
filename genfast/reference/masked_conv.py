"""Masked convolution (PixelRNN, 1601.06759, section 3.4): causal in raster order, with an order of colours at the
centre."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def colour_group(channels: int, data_channels: int, group_order: str) -> Tensor:
    """The colour of each channel: c mod data_channels (interleaved), or contiguous blocks (blocked)."""
    c = torch.arange(channels)
    return c % data_channels if group_order == "interleaved" else c * data_channels // channels


def conv_mask(
    weight_shape: Sequence[int],
    center: Sequence[int],
    mask_type: str,
    data_channels: int,
    group_order: str,
    groups: int,
) -> Tensor:
    """Which weights are live, bool (O, C / groups, *kernel): taps before ``center`` in raster order, and the centre
    where the input's colour comes before the output's ("A"), or not after it ("B")."""
    out, per = weight_shape[0], weight_shape[1]
    mask = torch.zeros(tuple(weight_shape), dtype=torch.bool)
    every: tuple[Any, ...] = (slice(None), slice(None))
    for tap in itertools.product(*(range(k) for k in weight_shape[2:])):
        mask[every + tap] = tap < tuple(center)
    source = torch.arange(per) + (torch.arange(out) // max(1, out // groups) * per)[:, None]
    before = colour_group(per * groups, data_channels, group_order)[source]
    own = colour_group(out, data_channels, group_order)[:, None]
    mask[every + tuple(center)] = before < own if mask_type == "A" else before <= own
    return mask


def _padding(kernel: Sequence[int], center: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """What F.pad takes so that the centre tap lies on the output's position and the output has the input's size."""
    pairs = [(c * d, (k - 1 - c) * d) for k, c, d in zip(kernel, center, dilation)]
    return [p for pair in reversed(pairs) for p in pair]


def masked_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: Sequence[int],
    groups: int,
    center: Sequence[int],
    activation: str,
) -> Tensor:
    """activation(conv(x, where(mask, weight, 0)) + bias), of x's spatial size, zero outside x."""
    mask = conv_mask(weight.shape, center, mask_type, data_channels, group_order, groups).to(weight.device)
    live = torch.where(mask, weight, weight.new_zeros(())).to(x.dtype)
    if 0 in x.shape[2:]:  # the library takes no image that is smaller than the kernel, however it is padded
        return (x.sum() * live.sum()).expand(x.shape[0], weight.shape[0], *x.shape[2:]).clone()
    wide = F.pad(x, _padding(weight.shape[2:], center, dilation))
    b = None if bias is None else bias.to(x.dtype)
    y = _CONV[x.dim() - 2](wide, live, b, dilation=tuple(dilation), groups=groups)
    return y.relu() if activation == "relu" else y


def masked_conv_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    mask_type: str,
    data_channels: int,
    group_order: str,
    dilation: Sequence[int],
    groups: int,
    center: Sequence[int],
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias); empty where not wanted. ``y`` is the output, which says where a ReLU was open."""
    d = (grad_y * (y > 0).to(grad_y.dtype) if activation == "relu" else grad_y).to(x.dtype)
    mask = conv_mask(weight.shape, center, mask_type, data_channels, group_order, groups).to(weight.device)
    if 0 in x.shape[2:]:
        every = torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(weight.shape[0])
        return tuple(t if want else t.new_empty(0) for t, want in zip(every, wanted))  # type: ignore[return-value]
    live = torch.where(mask, weight, weight.new_zeros(())).to(x.dtype)
    pads = _padding(weight.shape[2:], center, dilation)
    dims = x.dim() - 2
    found = torch.ops.aten.convolution_backward(
        d,
        F.pad(x, pads),
        live,
        None,
        [1] * dims,
        [0] * dims,
        list(dilation),
        False,
        [0] * dims,
        groups,
        [wanted[0], wanted[1], False],
    )
    dx, dw, db = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if wanted[0]:
        dx = F.pad(found[0], [-p for p in pads])
    if wanted[1]:
        dw = torch.where(mask, found[1], found[1].new_zeros(())).to(weight.dtype)
    if wanted[2]:
        wide = d if d.element_size() >= 4 else d.float()
        db = wide.sum([0, *range(2, d.dim())]).to(weight.dtype)
    return dx, dw, db
