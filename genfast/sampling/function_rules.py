"""What calls of functions, operators and methods of tensors become."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from types import NoneType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .rules import feature_map, function_rule, takes_levels, takes_padding
from .steps import Lowering, Value, dense_weight, taps_of


@function_rule(lambda input, *, out=None: None, torch.relu, "relu", in_place=[torch.relu_, "relu_"])
@function_rule(lambda input, inplace=False: None, F.relu)
def relu(low: Lowering, input: Value) -> Value:
    return low.pointwise("relu", feature_map(low, input))


@function_rule(lambda input, *, out=None: None, torch.tanh, F.tanh, "tanh", in_place=[torch.tanh_, "tanh_"])
def tanh(low: Lowering, input: Value) -> Value:
    return low.pointwise("tanh", feature_map(low, input))


@function_rule(
    lambda input, *, out=None: None, torch.sigmoid, F.sigmoid, "sigmoid", in_place=[torch.sigmoid_, "sigmoid_"]
)
def sigmoid(low: Lowering, input: Value) -> Value:
    x = low.spread(feature_map(low, input))
    y = low.pointwise("sigmoid", x)
    y.logistic_of = x
    return y


@function_rule(lambda input, alpha=1.0, inplace=False: None, F.elu, in_place=[F.elu_])
def _elu(low: Lowering, input: Value) -> Value:
    return low.pointwise("elu", feature_map(low, input))


@function_rule(lambda input, negative_slope=0.01, inplace=False: None, F.leaky_relu, in_place=[F.leaky_relu_])
def leaky_relu(low: Lowering, input: Value, negative_slope: float = 0.01) -> Value:
    x = low.spread(feature_map(low, input))
    if not isinstance(negative_slope, (int, float)):
        raise low.error(f"takes negative_slope={negative_slope!r}, expected a number")
    # relu(x) - slope relu(-x), of which one is zero, so that nothing is lost to rounding.
    below = low.pointwise("relu", low.affine(x, -1.0, 0.0))
    return low.pointwise("add", low.pointwise("relu", x), low.affine(below, -float(negative_slope), 0.0))


@function_rule(
    lambda input, p=0.5, training=True, inplace=False: None, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d
)
def _dropout(low: Lowering, input: Value, p: float = 0.5, training: bool = True) -> Value:
    if training and p:
        raise low.error("drops units at random, since it is called with training=True")
    return feature_map(low, input)


@function_rule(lambda input, other: None, operator.add, in_place=[operator.iadd])
@function_rule(lambda input, other, *, alpha=1, out=None: None, torch.add, "add", in_place=["add_"])
@takes_levels
def _add(low: Lowering, input: Any, other: Any, alpha: Any = 1) -> Value:
    if not isinstance(alpha, (int, float)):
        raise low.error(f"takes alpha={alpha!r}, expected a number")
    if isinstance(input, (int, float)) and alpha == 1:
        input, other = other, input
    x = feature_map(low, input)
    if isinstance(other, (int, float)):
        return low.affine(x, 1.0, alpha * other)
    y = feature_map(low, other)
    return low.pointwise("add", x, y if alpha == 1 else low.affine(y, alpha, 0.0))


@function_rule(lambda input, other: None, operator.sub, in_place=[operator.isub])
@function_rule(lambda input, other, *, alpha=1, out=None: None, torch.sub, torch.subtract, "sub", in_place=["sub_"])
@takes_levels
def _sub(low: Lowering, input: Any, other: Any, alpha: Any = 1) -> Value:
    if not isinstance(alpha, (int, float)):
        raise low.error(f"takes alpha={alpha!r}, expected a number")
    if isinstance(input, (int, float)):
        return low.affine(feature_map(low, other), -float(alpha), input)
    return _add(low, input, other, -alpha)


@function_rule(lambda input: None, operator.neg, "neg", torch.neg, torch.negative, in_place=["neg_"])
@takes_levels
def _neg(low: Lowering, input: Value) -> Value:
    return low.affine(feature_map(low, input), -1.0, 0.0)


@function_rule(lambda input, other: None, operator.mul, in_place=[operator.imul])
@function_rule(lambda input, other, *, out=None: None, torch.mul, torch.multiply, "mul", in_place=["mul_"])
@takes_levels
def _mul(low: Lowering, input: Any, other: Any) -> Value:
    if isinstance(input, (int, float)):
        input, other = other, input
    x = feature_map(low, input)
    if isinstance(other, (int, float)):
        return low.affine(x, float(other), 0.0)
    y = feature_map(low, other)
    if y.logistic_of is None:
        x, y = y, x
    if y.logistic_of is None:
        raise low.error("multiplies two maps neither of which is a sigmoid, which has no pixel program")
    return low.pointwise("linear_gate", x, y.logistic_of)


@function_rule(lambda input, other: None, operator.truediv, in_place=[operator.itruediv])
@function_rule(
    lambda input, other, *, rounding_mode=None, out=None: None, torch.div, torch.divide, "div", in_place=["div_"]
)
@function_rule(lambda input, other, *, out=None: None, torch.true_divide, "true_divide", in_place=["true_divide_"])
@takes_levels
def _div(low: Lowering, input: Any, other: Any) -> Value:
    if not isinstance(other, (int, float)):
        raise low.error("divides by a map, which has no pixel program")
    return low.affine(feature_map(low, input), 1 / other, 0.0)


@function_rule(lambda tensors, dim=0, *, out=None: None, torch.cat, torch.concat)
def _cat(low: Lowering, tensors: Any, dim: int = 0) -> Value:
    if low.axis(dim) != 1:
        raise low.error(f"joins along axis {dim}, expected the channels (1)")
    return low.concatenate([feature_map(low, t) for t in tensors])


@function_rule(lambda input, dim=-1: None, F.glu)
def glu(low: Lowering, input: Value, dim: int = -1) -> Value:
    if low.axis(dim) != 1:
        raise low.error("takes glu along another axis than the channels (1)")
    return low.gate(feature_map(low, input), "linear_gate", 1)


@function_rule(lambda x, bias=None, *, groups=1: None, ops.gated_activation)
def gated_activation(low: Lowering, x: Value, bias: Any = None, groups: int = 1) -> Value:
    return low.gate(x if bias is None else low.pointwise("add", x, feature_map(low, bias)), "gate", groups)


@function_rule(
    lambda input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: None, F.conv1d, F.conv2d, F.conv3d
)
def _convolution(
    low: Lowering,
    input: Value,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    """As a subclass's forward calls it, with a weight of the network's own."""
    single = isinstance(weight, Tensor) and set(weight.shape[2:]) == {1} and weight.dim() == low.rank()
    plain = all(set(v if isinstance(v, (tuple, list)) else (v,)) == {of} for v, of in ((stride, 1), (padding, 0)))
    if not single or not plain or not isinstance(bias, (Tensor, NoneType)):
        raise low.error(f"calls {('', 'conv1d', 'conv2d', 'conv3d')[low.dims]} with a kernel that is not 1 x 1")
    dense, live = dense_weight(SimpleNamespace(weight=weight, groups=groups), None)
    taps = taps_of(dense, live, (0,) * low.dims, (1,) * low.dims)
    return low.convolve(
        feature_map(low, input), taps, len(weight), None if bias is None else bias.detach().float().cpu()
    )


@function_rule(lambda input, chunks, dim=0: None, torch.chunk, "chunk")
def _chunk(low: Lowering, input: Value, chunks: int, dim: int = 0) -> tuple[Value, ...]:
    return _split(low, input, -(-feature_map(low, input).channels // chunks), dim)


@function_rule(lambda tensor, split_size_or_sections, dim=0: None, torch.split)
@function_rule(lambda tensor, split_size, dim=0: None, "split")
def _split(
    low: Lowering, tensor: Value, split_size: Any = None, dim: int = 0, split_size_or_sections: Any = None
) -> tuple[Value, ...]:
    x, size = feature_map(low, tensor), split_size if split_size is not None else split_size_or_sections
    if low.axis(dim) != 1:
        raise low.error(f"splits along axis {dim}, expected the channels (1)")
    if isinstance(size, int):
        sizes = [min(size, x.channels - first) for first in range(0, x.channels, size)]
    else:
        sizes = [int(s) for s in size]
    parts = tuple(low.part(x, sum(sizes[:i]), s) for i, s in enumerate(sizes))
    low.views += [x, *parts]
    return parts


@function_rule(lambda input, index: None, operator.getitem)
@takes_levels
@takes_padding
def _slice(low: Lowering, input: Any, index: Any) -> Any:
    if isinstance(input, (list, tuple)) and isinstance(index, (int, slice)):
        return input[index]
    x, indices = feature_map(low, input), index if isinstance(index, tuple) else (index,)
    if sum(i is Ellipsis for i in indices) == 1:
        at = indices.index(Ellipsis)
        indices = (*indices[:at], *[slice(None)] * (low.rank() - len(indices) + 1), *indices[at + 1 :])
    if not all(isinstance(i, slice) for i in indices) or len(indices) > low.rank() or indices[0] != slice(None):
        raise low.error(f"takes [{index!r}] of a map, which has no pixel program")
    if x.levels:
        raise low.error("takes a part of the image, which has no pixel program")
    if all(i == slice(None) for i in indices):
        return x
    y = x
    if len(indices) > 1 and indices[1] != slice(None):
        first, stop, step = indices[1].indices(x.channels)
        if step != 1 or stop <= first or any(x.margin):
            raise low.error(f"takes channels [{indices[1]}] of {x.channels}, which has no pixel program")
        y = low.part(x, first, stop - first)
    if any(i != slice(None) for i in indices[2:]):
        y = _cropped(low, y, indices[2:])
    low.views += [x, y]
    return y


def _cropped(low: Lowering, x: Value, indices: Sequence[slice]) -> Value:
    if low.dims == 3:
        raise low.error("takes a part of the frames, which has no pixel program")
    left, right, above, below = x.margin
    margins = [[above, below], [left, right]]
    for axis, (index, size) in enumerate(zip(indices, low.shape[1:])):
        rows = size // x.scale + sum(margins[axis])
        first, stop, step = index.indices(rows)
        if step != 1 or stop <= first:
            raise low.error(f"takes [{index}] of {rows} rows or columns, which has no pixel program")
        margins[axis][0] -= first
        margins[axis][1] -= rows - stop
    return _within(low, x, (*margins[1], *margins[0]))


def _within(low: Lowering, x: Value, margin: Any) -> Value:
    """``x`` with this margin: moved, where that makes it as large as it was."""
    left, right, above, below = margin
    if left + right or above + below:
        return replace(x, margin=margin, logistic_of=None, scaled=None)
    return low.shift(replace(x, margin=(0, 0, 0, 0)), above, left)


@function_rule(lambda input, pad, mode="constant", value=None: None, F.pad)
@takes_padding
def _pad(low: Lowering, input: Value, pad: Sequence[int], value: Any = None) -> Value:
    x = feature_map(low, input)
    if low.dims == 3 or len(pad) not in (2, 4) or len(pad) // 2 > low.dims or value not in (None, 0):
        raise low.error(f"pads by {tuple(pad)} with {value!r}, which has no pixel program")
    more = (0, 0, *pad) if low.dims == 1 else (*pad, 0, 0)[:4]
    if any(old < 0 < new for old, new in zip(x.margin, more)):
        raise low.error("pads where it has cut off, which has no pixel program")
    return _within(low, x, tuple(old + new for old, new in zip(x.margin, more)))


@function_rule(lambda input: None, "detach")
@takes_levels
def _detach(low: Lowering, input: Value) -> Value:
    return feature_map(low, input)


@function_rule(lambda input, *, memory_format=None: None, "clone", torch.clone)
def _clone(low: Lowering, input: Value, memory_format: Any = None) -> Value:
    return replace(feature_map(low, input))


@function_rule(lambda input, memory_format=None: None, "contiguous")
def _contiguous(low: Lowering, input: Value, memory_format: Any = None) -> Value:
    return _perhaps_a_copy(low, feature_map(low, input))


@function_rule(lambda input, memory_format=None: None, "float")
@function_rule(lambda input, dtype: None, "to", "type")
@takes_levels
def _float(low: Lowering, input: Value, dtype: Any = torch.float32) -> Value:
    x = feature_map(low, input)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or (not x.levels and dtype.itemsize < 4):
        raise low.error(f"converts to {dtype}, which has no pixel program")
    return low.entered(1.0, 0.0) if x.levels else _perhaps_a_copy(low, x)


def _perhaps_a_copy(low: Lowering, x: Value) -> Value:
    """The same numbers, in a tensor of which nobody knows whether it is the same."""
    y = replace(x)
    low.views += [x, y]
    return y
