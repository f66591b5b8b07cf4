"""ops.bias_act: y = clamp(gain f(x + b)), in one pass each way and to any order."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from ..reference.affine_coupling import per_channel
from ..reference.bias_act import ACTIVATIONS, PIECEWISE_LINEAR
from . import _check
from ._channels import along, axis
from ._layout import Layout, describe, laid_out

_NAME = "bias_act"
_FIELDS = "is_double x bias y n c s act alpha gain clamp channels_last threads"
_CPU = kernels(
    "_cpu",
    bias_act=_FIELDS,
    bias_act_backward=f"{_FIELDS} grad grad_bias",
    bias_act_second=f"{_FIELDS} grad grad_dx grad_bias",
)
_CODES = {act: code for code, act in enumerate(ACTIVATIONS)}  # as in kernels.h


class _Plan(NamedTuple):
    layout: Layout
    forward: Any  # the kernels, prepared
    backward: Any
    second: Any


def _check_arguments(xs: tuple[int, ...], bs: tuple[int, ...] | None, act: str, clamp: float | None) -> None:
    _check.choice(_NAME, "act", act, ACTIVATIONS)
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"{_NAME}: clamp={clamp}, expected a number that is not negative, or None")
    if len(xs) < 2:
        raise ValueError(f"{_NAME}: x has shape {tuple(xs)}, expected (N, C, ...)")
    if bs is not None and tuple(bs) != tuple(xs[1:2]):
        raise ValueError(f"{_NAME}: bias has shape {tuple(bs)}, expected {(xs[1],)}, one for each channel of x")


def _check_forward(x: Tensor, bias: Tensor | None, act: str, alpha: float, gain: float, clamp: float | None) -> None:
    _check.floating(_NAME, x=x, bias=bias)
    _check_arguments(x.shape, None if bias is None else bias.shape, act, clamp)


def _check_second(grad_dx: Tensor, grad_y: Tensor, x: Tensor, bias: Tensor | None, *options: Any) -> None:
    _check_forward(x, bias, *options)
    _check.shapes(f"{_NAME}_second", grad_dx=(grad_dx, x.shape, "that of x"), grad_y=(grad_y, x.shape, "that of x"))


@functools.lru_cache(1024)
def _plan(
    xs: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    bs: tuple[int, ...] | None,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> _Plan:
    """What a call needs but its tensors. Raises for arguments that do not fit."""
    _check_arguments(xs, bs, act, clamp)
    a = describe(xs, stride)
    fields = {
        "is_double": dtype is torch.float64,
        "x": a.strides,
        "n": a.n,
        "c": a.c,
        "s": a.s,
        "act": _CODES[act],
        "alpha": alpha,
        "gain": gain,
        "clamp": -1.0 if clamp is None else clamp,
        "channels_last": a.walks_channels,
    }
    return _Plan(a, *(k.prepare(**fields) for k in (_CPU.bias_act, _CPU.bias_act_backward, _CPU.bias_act_second)))


def _prepared(x: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor | None, _Plan]:
    """x and bias as the kernel takes them, and the plan."""
    if bias is not None or not x.dtype.is_floating_point:
        _check.floating(_NAME, x=x, bias=bias)
    plan = _plan(x.shape, x.stride(), x.dtype, None if bias is None else bias.shape, *options)
    if not plan.layout.fits:
        return _prepared(laid_out(x)[0], bias, *options)
    return x, None if bias is None else bias.to(x.dtype).contiguous(), plan


def _cpu(x: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    x, bias, plan = _prepared(x, bias, *options)
    y = plan.layout.empty_like(x)
    plan.forward(x=x, bias=bias, y=y, threads=torch.get_num_threads())
    return y


def _derivative(
    grad_y: Tensor, grad_dx: Tensor | None, x: Tensor, given: Tensor | None, options: Any
) -> tuple[Tensor, Tensor]:
    x, bias, plan = _prepared(x, given, *options)
    out = plan.layout.empty_like(x)
    sums = x.new_empty(0) if bias is None else torch.empty_like(bias)
    threads = torch.get_num_threads()
    grad_y, g = laid_out(grad_y.to(x.dtype), plan.layout)
    if grad_dx is None:
        plan.backward(x=x, bias=bias, grad=g.view(grad_y), y=out, grad_bias=sums, threads=threads)
    else:
        grad_dx, d = laid_out(grad_dx.to(x.dtype), plan.layout)
        plan.second(
            x=x, bias=bias, grad=g.view(grad_y), grad_dx=d.view(grad_dx), y=out, grad_bias=sums, threads=threads
        )
    return out, sums if given is None else sums.to(given.dtype)


def _cpu_backward(grad_y: Tensor, x: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    return _derivative(grad_y, None, x, bias, options)


def _cpu_second(
    grad_dx: Tensor, grad_y: Tensor, x: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    return _derivative(grad_y, grad_dx, x, bias, options)


def _backward_of_backward(ctx: Any, grad_dx: Tensor | None, grad_dbias: Tensor | None) -> tuple[Any, ...]:
    """dx is linear in grad_y, with the same slope both ways; dbias, its sum, spreads what it is given."""
    (grad_y, x, bias), options = ctx.saved_tensors, ctx.options
    total = grad_dx
    if grad_dbias is not None and bias is not None:
        spread = per_channel(grad_dbias, x).to(x.dtype)
        total = spread.expand(x.shape) if total is None else total + spread
    if total is None:
        return (None,) * 7
    again = OP.backward_op(total, x, bias, *options)[0] if ctx.needs_input_grad[0] else None
    if options[0] in PIECEWISE_LINEAR:
        # No gradient rather than zeros, which would be convolved all the way down; but a parameter is told that it has
        # none.
        return again, None, None if bias is None else torch.zeros_like(bias), *(None,) * 4
    gx, gbias = _OP_SECOND(total, grad_y, x, bias, *options)
    return again, gx, None if bias is None else gbias, *(None,) * 4


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for act, (alpha, gain) in ACTIVATIONS.items():
        x, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 5, 4, 7), (5,)))
        yield Sample(act, (x, bias, act, alpha, gain, None))
    for label, shape, act, gain, clamp in (
        ("clamp", (2, 6, 9), "lrelu", -1.5, 0.7),
        ("vectors clamp", (6, 5), "swish", 2.0, 0.5),
        ("rows clamp", (2, 3, 10, 9), "elu", 1.0, 0.6),
        ("no bias", (3, 5, 4, 7), "softplus", 1.5, 1.2),
    ):
        x, bias = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[1:2]))
        yield Sample(label, (x, None if label == "no bias" else bias, act, 0.3, gain, clamp))


OP = Op(
    "bias_act(Tensor x, Tensor? bias, str act, float alpha, float gain, float? clamp)",
    reference=reference.bias_act,
    outputs={"y": "like x"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad_y, x, bias, *options -> x, bias",
        reference=reference.bias_act_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
        saves="grad_y, x, bias",
        backward=_backward_of_backward,
    ),
    samples=_samples,
)

_OP_SECOND = Op(
    "bias_act_second(Tensor grad_dx, Tensor grad_y, Tensor x, Tensor? bias, str act, float alpha, float gain, float? "
    "clamp)",
    reference=reference.bias_act_second,
    outputs={"x": "like x", "bias": "like bias if bias is not None"},
    check=_check_second,
    check_before_kernels=True,
    kernels={"cpu": _cpu_second, "triton": _NAME},
)


def bias_act(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> Tensor:
    """Bias, activation, gain and clamp of the StyleGAN networks: y = clamp(gain f(x + b), -c, c).

    Differentiable to any order. The first and the second derivative are one pass over memory each, and take x, not y,
    so that they hold for any ``alpha`` and ``gain``; where f is linear in pieces (linear, relu, lrelu) the second
    derivative gives x no gradient rather than zeros, which spares a gradient penalty the convolutions of those zeros.

    Args:
        x: floating point, of any shape; (N, C, ...) with the default ``dim``, contiguous or channels_last.
        bias: (C,), one for each position along ``dim``, or None.
        dim: the axis of the channels; ignored without a bias.
        act: "linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus" or "swish".
        alpha: slope of "lrelu" left of zero, 0.2 by default; the others have no parameter and ignore it.
        gain: factor of f; by default sqrt(2) for "relu", "lrelu" and "swish", and 1 for the others.
        clamp: c >= 0, or None for none.

    Returns:
        y in x's shape, dtype and memory format; x itself where there is nothing to do.

    Raises:
        TypeError: x or bias that is not a floating-point tensor.
        ValueError: an unknown ``act``, a negative ``clamp``, a ``dim`` that x lacks, a bias or devices that do not fit.

    Source: StyleGAN2 (arXiv:1912.04958), torch_utils/ops/bias_act.py of NVlabs' stylegan2-ada-pytorch and stylegan3.

    Example:
        >>> import torch, genfast
        >>> x, bias = torch.randn(2, 64, 8, 8), torch.zeros(64)
        >>> y = genfast.ops.bias_act(x, bias, act="lrelu", clamp=256.0)
    """
    _check.floating(_NAME, x=x, bias=bias)
    _check.choice(_NAME, "act", act, ACTIVATIONS)
    default_alpha, default_gain = ACTIVATIONS[act]
    alpha = default_alpha if alpha is None else float(alpha)
    gain = default_gain if gain is None else float(gain)
    clamp = None if clamp is None else float(clamp)
    if bias is None:
        if act == "linear" and gain == 1 and clamp is None:
            return x
        dim = 1 if x.dim() > 1 else 0
        if not x.dim():
            return bias_act(x.reshape(1), act=act, alpha=alpha, gain=gain, clamp=clamp).reshape(())
    else:
        dim = axis(_NAME, x, dim)
        _check.shape(_NAME, "bias", bias, (x.shape[dim],), f"one for each position along axis {dim} of x")
    if dim == 1:
        result: Tensor = OP(x, bias, act, alpha, gain, clamp)
        return result
    return along(x, dim, lambda t: OP(t, bias, act, alpha, gain, clamp))
