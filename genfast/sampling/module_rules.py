"""What calls of modules become."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from .. import nn as gnn
from .._calls import stands_for
from .function_rules import gated_activation, glu, leaky_relu, relu, sigmoid, tanh
from .rules import module_rule, takes_levels
from .steps import Lowering, NotCausalError, Tap, Value, dense_weight, taps_of


@module_rule(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
@takes_levels
def _same(low: Lowering, module: nn.Module, x: Value) -> Value:
    if module.training and getattr(module, "p", False):
        raise low.error("drops units at random, since it stays in training mode")
    return x


@module_rule(gnn.ScaleLevels)
@takes_levels
def _scale_levels(low: Lowering, module: gnn.ScaleLevels, x: Value) -> Value:
    return low.affine(x, 2 / (module.levels - 1), -1.0)


@module_rule(gnn.LevelEmbedding)
@takes_levels
def _level_embedding(low: Lowering, module: gnn.LevelEmbedding, x: Value) -> Value:
    if not x.levels:
        raise low.error("takes the image itself")
    return low.embedded(module.weight)


@module_rule(gnn.AppendOnes)
def _append_ones(low: Lowering, module: gnn.AppendOnes, x: Value) -> Value:
    if x.scaled is None:
        raise low.error("takes the scaled image, straight from ScaleLevels")
    return low.entered(*x.scaled, ones=1)


@module_rule(gnn.Shift)
def _shift(low: Lowering, module: gnn.Shift, x: Value) -> Value:
    if low.dims == 3:
        raise low.error("moves a video, which has no pixel program")
    if low.dims == 1 and module.right:
        return low.shift(x, module.down, 0)
    return low.shift(x, module.down, module.right)


@module_rule(gnn.ConcatELU)
def _concat_elu(low: Lowering, module: gnn.ConcatELU, x: Value) -> Value:
    return low.concat_elu(x)


@module_rule(gnn.GatedActivation)
def _gated(low: Lowering, module: gnn.GatedActivation, x: Value, bias: Any = None) -> Value:
    return gated_activation(low, x, bias, module.groups)


@module_rule(nn.ReLU, nn.Tanh, nn.Sigmoid)
def _unary(low: Lowering, module: nn.Module, x: Value) -> Value:
    kind = {nn.ReLU: relu, nn.Tanh: tanh, nn.Sigmoid: sigmoid}[stands_for(module, (nn.ReLU, nn.Tanh, nn.Sigmoid))]  # type: ignore[index]
    result: Value = kind(low, x)
    return result


@module_rule(nn.ELU)
def _elu_module(low: Lowering, module: nn.ELU, x: Value) -> Value:
    if module.alpha != 1:
        raise low.error(f"is {module}, expected alpha=1")
    return low.pointwise("elu", x)


@module_rule(nn.LeakyReLU)
def _leaky_relu_module(low: Lowering, module: nn.LeakyReLU, x: Value) -> Value:
    return leaky_relu(low, x, module.negative_slope)


@module_rule(nn.GLU)
def _glu_module(low: Lowering, module: nn.GLU, x: Value) -> Value:
    return glu(low, x, module.dim)


@module_rule(gnn.MaskedConv1d, gnn.MaskedConv2d, gnn.MaskedConv3d)
def _masked(low: Lowering, module: Any, x: Value) -> Value:
    weight, live = dense_weight(module, module.mask)
    taps = taps_of(weight, live, module.center, module.dilation, low.period)
    return low.convolve(x, taps, module.out_channels, _bias(module), relu=module.activation == "relu")


@module_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _one_by_one(low: Lowering, module: Any, x: Value) -> Value:
    if set(module.kernel_size) != {1} or set(module.stride) != {1} or set(module.padding) - {0}:
        raise low.error(
            f"is {module}, which sees the future; use genfast.nn.MaskedConv{len(module.kernel_size)}d (only 1 x 1 "
            "convolutions need no mask)",
            NotCausalError,
        )
    dims = len(module.kernel_size)
    return low.convolve(
        x, taps_of(*dense_weight(module, None), (0,) * dims, (1,) * dims), module.out_channels, _bias(module)
    )


@module_rule(gnn.DownShiftedConv2d, gnn.DownRightShiftedConv2d)
def _shifted(low: Lowering, module: Any, x: Value) -> Value:
    rows, columns = module.kernel_size
    centre = columns // 2 if isinstance(module, gnn.DownShiftedConv2d) else columns - 1
    _expect(low, module, padding=(0, 0), dilation=(1, 1))
    if module.stride[0] != module.stride[1]:
        raise low.error(f"has stride={module.stride}, expected one number")
    taps = taps_of(*dense_weight(module, None), (rows - 1, centre), (1, 1))
    return low.convolve(x, taps, module.out_channels, _bias(module), stride=module.stride[0])


@module_rule(gnn.DownShiftedConvTranspose2d, gnn.DownRightShiftedConvTranspose2d)
def _shifted_transposed(low: Lowering, module: Any, x: Value) -> Value:
    vertical = isinstance(module, gnn.DownShiftedConvTranspose2d)
    edge = (module.kernel_size[1] - 1) // 2 if vertical else 0
    weight = module.weight.detach().float().cpu()  # (I, O, kh, kw)
    step = module.stride[0]
    _expect(low, module, padding=(0, 0), dilation=(1, 1), output_padding=(0, 1) if vertical else (0, 0))
    if module.stride[0] != module.stride[1] or module.groups != 1 or x.scale % step:
        raise low.error(f"has stride={module.stride}, groups={module.groups}, which has no pixel program")
    phases: dict[int, list[Tap]] = {}
    for r, c in itertools.product(range(step), repeat=2):
        part = phases.setdefault(r * step + c, [])
        for kr, kc in itertools.product(range(weight.shape[2]), range(weight.shape[3])):
            # out row = step * source row + kr, out column = step * source column + kc - edge
            if (r - kr) % step == 0 and (c + edge - kc) % step == 0:
                w = weight[:, :, kr, kc].t()
                part.append(Tap((r - kr) // step, (c + edge - kc) // step, w, torch.ones_like(w, dtype=torch.bool)))
    return low.convolve(x, [], module.out_channels, _bias(module), up=step, phases=phases)


@module_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
def _batch_norm(low: Lowering, module: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, x: Value) -> Value:
    """As it is in evaluation mode, a diagonal 1 x 1 convolution."""
    if module.running_mean is None or module.running_var is None:
        raise low.error("has no running statistics, so an image depends on the others of its batch")
    if module.training:
        raise low.error("stays in training mode, so an image depends on the others of its batch")
    scale = (module.running_var.detach() + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight.detach()
    bias = -module.running_mean * scale + (0 if module.bias is None else module.bias.detach())
    diagonal = torch.diag(scale.float().cpu())
    return low.convolve(x, [Tap(0, 0, diagonal, diagonal != 0)], module.num_features, bias.float().cpu())


def _expect(low: Lowering, module: Any, **settings: Any) -> None:
    for name, value in settings.items():
        if getattr(module, name) != value:
            raise low.error(f"has {name}={getattr(module, name)!r}, expected {value!r}")


def _bias(module: Any) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().float().cpu()
