"""The layers of :mod:`genfast.nn` in plain PyTorch, as one would write them eagerly, with equal names and state_dicts.

A model made of these (:func:`genfast.models.plain`) is what the same model made of genfast.nn is tested and timed
against. What calls no op of ours is the same class here as there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as layers
from .. import reference
from ..reference.masked_linear import ACTIVATIONS
from .autoregressive import Inverse as Inverse
from .linear_flows import Householder as Householder
from .nade import DeepNADENetwork as DeepNADENetwork
from .permutation import CircularShift as CircularShift
from .permutation import Permutation as Permutation
from .univariate import AffineMap, Mapped, SplineMap

# ---- flows ----


class ActNorm(nn.Module):
    initialized: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def _initialize(self, x: Tensor) -> None:
        with torch.no_grad():
            values = x.transpose(0, 1).flatten(1).double()
            deviation = values.std(1, unbiased=False).clamp_min(self.eps)
            self.log_scale.copy_(-deviation.log())
            self.bias.copy_(-values.mean(1) / deviation)
            self.initialized.fill_(True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialized:
            self._initialize(x)
        s, b = (v.reshape(1, -1, *([1] * (x.dim() - 2))) for v in (self.log_scale, self.bias))
        return x * s.exp() + b, (self.log_scale.sum() * math.prod(x.shape[2:])).expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, b = (v.reshape(1, -1, *([1] * (z.dim() - 2))) for v in (self.log_scale, self.bias))
        return (z - b) * (-s).exp(), (-self.log_scale.sum() * math.prod(z.shape[2:])).expand(z.shape[0])


def _triangles(layer: Any) -> tuple[Tensor, Tensor]:
    """L, and U with its diagonal, of a layer that holds P L (U + diag(s))."""
    eye = torch.eye(len(layer.perm), dtype=layer.log_s.dtype, device=layer.log_s.device)
    return layer.lower.tril(-1) + eye, layer.upper.triu(1) + torch.diag(layer.sign_s * layer.log_s.exp())


class InvertibleConv1x1(layers.InvertibleConv1x1):
    def _matrix(self) -> tuple[Tensor, Tensor]:
        if not self.plu:
            return self.weight, torch.linalg.slogdet(self.weight)[1]
        lower, upper = _triangles(self)
        return (lower @ upper)[self.perm], self.log_s.sum()

    def _apply_matrix(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dim() == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight[:, :, None, None])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, log_det = self._matrix()
        return self._apply_matrix(x, weight), (log_det * math.prod(x.shape[2:])).expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, log_det = self._matrix()
        inverse = torch.linalg.inv(weight.double()).to(weight.dtype)
        return self._apply_matrix(z, inverse), (-log_det * math.prod(z.shape[2:])).expand(z.shape[0])


class Squeeze(nn.Module):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), z.new_zeros(z.shape[0])


class AffineCoupling(nn.Module):
    mask: Tensor | None

    def __init__(
        self,
        conditioner: nn.Module,
        *,
        scale: str = "exp",
        mask: Tensor | None = None,
        width: int | None = None,
        transform: str = "first",
        alpha: str | None = None,
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.scale, self.width, self.transform = scale, width, transform
        self.register_buffer("mask", mask)
        self.alpha = nn.Parameter(torch.ones(width or 1)) if alpha == "learn" else None

    def _parameters_of(self, seen: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """log s and t."""
        params: Tensor = self.conditioner(seen) if context is None else self.conditioner(seen, context)
        if self.scale == "additive":
            return torch.zeros_like(params), params
        r, t = params.chunk(2, 1)
        if self.scale == "sigmoid":
            return F.logsigmoid(r + 2), t
        if self.scale == "tanh":
            r = torch.tanh(r)
            return (r if self.alpha is None else r * self.alpha.reshape(1, -1, *([1] * (r.dim() - 2)))), t
        if self.scale == "softclamp":
            return r / (1 + r.abs() / math.log(1000)), t
        return r, t

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.mask is not None:
            log_s, t = self._parameters_of(torch.where(self.mask, x, 0), context)
            log_s, t = log_s * ~self.mask, t * ~self.mask
            y = (x - t) * torch.exp(-log_s) if inverse else x * torch.exp(log_s) + t
        else:
            width = x.shape[1] // 2 if self.width is None else self.width
            first = self.transform == "first"
            sizes = (width, x.shape[1] - width) if first else (x.shape[1] - width, width)
            halves = x.split(sizes, 1)
            x_a, x_b = halves if first else halves[::-1]
            log_s, t = self._parameters_of(x_b, context)
            y_a = (x_a - t) * torch.exp(-log_s) if inverse else x_a * torch.exp(log_s) + t
            y = torch.cat((y_a, x_b) if first else (x_b, y_a), 1)
        total = log_s.flatten(1).sum(1)
        return y, -total if inverse else total

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)


class FlowSequential(nn.Module):
    def __init__(self, *bijections: nn.Module) -> None:
        super().__init__()
        for i, b in enumerate(bijections):
            self.add_module(str(i), b)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for module in self.children():
            x, logdet = module(x, context)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for module in reversed(list(self.children())):
            z, logdet = module.inverse(z, context)  # type: ignore[operator]
            total = total + logdet
        return z, total


class GlowStep(nn.Module):
    def __init__(self, channels: int, conditioner: nn.Module, *, plu: bool = True, scale: str = "sigmoid") -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels, plu=plu)
        self.coupling = AffineCoupling(conditioner, scale=scale, width=channels // 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, a = self.actnorm(x)
        x, b = self.conv(x)
        x, c = self.coupling(x, context)
        return x, a + b + c

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, c = self.coupling.inverse(z, context)
        z, b = self.conv.inverse(z)
        z, a = self.actnorm.inverse(z)
        return z, a + b + c


ReversibleSequential = FlowSequential


class LULinear(layers.LULinear):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = _triangles(self)
        return F.linear(x, (lower @ upper)[self.perm], self.bias), self.log_s.sum().expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = _triangles(self)
        y = (z if self.bias is None else z - self.bias)[:, self.perm.argsort()].T
        y = torch.linalg.solve_triangular(lower, y, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, y, upper=True).T, -self.log_s.sum().expand(z.shape[0])


class BatchNormFlow(nn.Module):
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, features: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.log_gamma = nn.Parameter(torch.zeros(features))
        self.beta = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean, var = x.mean(0), x.var(0, correction=0)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(x.var(0), self.momentum)
        logdet = (self.log_gamma - 0.5 * (var + self.eps).log()).sum().expand(x.shape[0])
        return self.log_gamma.exp() * (x - mean) / (var + self.eps).sqrt() + self.beta, logdet

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training:
            raise RuntimeError(
                "BatchNormFlow: no inverse in training, where the statistics are the batch's own; call eval()"
            )
        deviation = (self.running_var + self.eps).sqrt()
        x = (z - self.beta) * (-self.log_gamma).exp() * deviation + self.running_mean
        return x, (deviation.log() - self.log_gamma).sum().expand(z.shape[0])


# ---- autoregressive and spline flows ----


def _affine(by: AffineMap, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet) of x (N, D, ...) and params (N, D, P, ...), logdet (N,)."""
    t = params.select(2, 0)
    if by.scale == "additive":
        log_s = torch.zeros_like(t)
    else:
        a = params.select(2, 1)
        if by.scale == "softclamp":
            log_s = a / (1 + a.abs() / math.log(1000))
        else:
            log_s = F.logsigmoid(a + 2) if by.scale == "sigmoid" else a
    total = log_s.flatten(1).sum(1)
    if by.normalising != inverse:
        return (x - t) * torch.exp(-log_s), -total
    return x * torch.exp(log_s) + t, total


def _spline(by: SplineMap, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """(y, logdet) of x (N, D, ...) and params (N, D, P, ...), logdet (N,)."""
    k, b = by.bins, by.bound
    options = (-b, b, -b, b, by.min_bin_width, by.min_bin_height, by.min_derivative, by.slope, by.logit_scale)
    widths, heights, derivatives = params.movedim(2, -1).split((k, k, by.outputs - 2 * k), -1)
    y, logdet = reference.rational_quadratic_spline(
        x, widths, heights, derivatives, by.tails or "none", by.convention, inverse, options
    )
    return y, logdet.flatten(1).sum(1)


class _Mapped(Mapped):
    def _mapped(self, x: Tensor, params: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return (_affine if isinstance(self.map, AffineMap) else _spline)(self.map, x, params, inverse)  # type: ignore[arg-type]


class MaskedAutoregressive(_Mapped, layers.MaskedAutoregressive):
    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.inverse_plain(z, context)


class SplineCoupling(_Mapped, layers.SplineCoupling):
    pass


class Spline(_Mapped, layers.Spline):
    pass


# ---- vectors ----


class MaskedLinear(layers.MaskedLinear):
    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        y = reference.masked_linear(x, self.weight, self.bias, self.rows, self.columns, self.counts, "none")
        return ACTIVATIONS[activation](y)


class MADENetwork(layers.MADENetwork):
    linear = MaskedLinear


class NADENetwork(layers.NADENetwork):
    def _parameters_of(self, x: Tensor, hidden_bias: Tensor) -> Tensor:
        return reference.nade(x, self.weight, self.readout, self.bias, hidden_bias, self.rescale, self.activation)

    def _samples_of(
        self,
        uniforms: Tensor,
        readout: Tensor,
        bias: Tensor,
        hidden_bias: Tensor,
        given: Tensor | None,
        known: Tensor | None,
        kind: str,
    ) -> Tensor:
        """By the standard loop: the conditionals of all dimensions, D times."""
        x = uniforms.new_zeros(uniforms.shape[:2]) if given is None else given.clone()
        for d in range(self.features):
            params = reference.nade(x, self.weight, readout, bias, hidden_bias, self.rescale, self.activation)
            drawn = reference.nade_draw(params[:, d], uniforms[:, d], kind)
            x[:, d] = drawn if given is None or known is None else torch.where(known[:, d], given[:, d], drawn)
        return x


# ---- masked convolutions ----


class _MaskedConv(nn.modules.conv._ConvNd):
    """The usual masked convolution: the library's, on the weight times a mask."""

    dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        *,
        dilation: int = 1,
        bias: bool = True,
        mask_type: str = "B",
        data_channels: int = 1,
        group_order: str = "interleaved",
        center: Sequence[int] | None = None,
        activation: str | None = None,
    ) -> None:
        kernel = (kernel_size,) * self.dims if isinstance(kernel_size, int) else tuple(kernel_size)
        at = tuple(k // 2 for k in kernel) if center is None else tuple(center)
        none = (0,) * self.dims
        ones = (1,) * self.dims
        super().__init__(
            in_channels, out_channels, kernel, ones, none, (dilation,) * self.dims, False, none, 1, bias, "zeros"
        )
        mask = reference.conv_mask(self.weight.shape, at, mask_type, data_channels, group_order, 1)
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)
        self.pads = [p for k, c in zip(reversed(kernel), reversed(at)) for p in (c * dilation, (k - 1 - c) * dilation)]
        self.activation = activation
        with torch.no_grad():
            self.weight.mul_(self.mask)

    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.dims - 1]
        weight = self.weight * self.mask
        if self.pads[::2] == self.pads[1::2]:
            y = conv(x, weight, self.bias, padding=tuple(reversed(self.pads[::2])), dilation=self.dilation)
        else:
            y = conv(F.pad(x, self.pads), weight, self.bias, dilation=self.dilation)
        return F.relu(y) if self.activation == "relu" else y


class MaskedConv1d(_MaskedConv):
    dims = 1


class MaskedConv2d(_MaskedConv):
    dims = 2


class GatedActivation(layers.GatedActivation):
    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None:
            x = x + bias.reshape(*bias.shape, *(1,) * (x.dim() - max(bias.dim(), 2)))
        f, g = x.unflatten(1, (self.groups, 2, -1)).unbind(2)
        return (torch.tanh(f) * torch.sigmoid(g)).flatten(1, 2)


class GatedMaskedConv2d(layers.GatedMaskedConv2d):
    def _parts(self) -> tuple[Any, Any]:
        return MaskedConv2d, GatedActivation


# ---- recurrences ----


class RowLSTM(layers.RowLSTM):
    convolution = MaskedConv2d

    def _scan(self, gates: Tensor, weight: Tensor) -> Tensor:
        h: Tensor = reference.row_lstm(gates, weight, save_for_backward=False)[0]
        return h


class DiagonalBiLSTM(layers.DiagonalBiLSTM):
    convolution = MaskedConv2d

    def _scan(self, gates: Tensor, weight: Tensor) -> Tensor:
        h: Tensor = reference.diagonal_lstm(gates, weight, save_for_backward=False)[0]
        return h
