"""Comparisons of the Triton flow kernels with the float64 reference, for any device.

The interpreter (tests/triton) runs them on small CPU tensors, tests/gpu on CUDA tensors.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import genfast
from genfast._registry import OPS, Op
from genfast._verify import relative_error
from tests.conftest import poisoned

FORWARD = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = list(FORWARD)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])
# float16 differs from bfloat16 in loads and stores alone, which the ops' samples go through in every dtype.
two_dtypes = pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "bfloat16"])


def outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def exact(args: tuple[Any, ...]) -> list[Any]:
    """The arguments in float64 on the CPU, with the same values."""
    moved = tree_map_only(Tensor, lambda a: a.detach().cpu(), list(args))
    exact: list[Any] = tree_map_only(Tensor, lambda a: a.double() if a.is_floating_point() else a, moved)
    return exact


def run(op: Op, args: tuple[Any, ...]) -> list[Tensor]:
    """The Triton kernel's outputs, each of the shape, dtype and strides that the compiler is told to expect."""
    with poisoned(), torch.no_grad(), genfast.backend("triton"):
        results = outputs(op(*args))
    defaults = [argument.default_value for argument in op.overload._schema.arguments[len(args) :]]
    for result, expected in zip(results, outputs(op.empty(*args, *defaults)), strict=True):
        assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
        assert result.numel() == 0 or result.stride() == expected.stride()
    return results


def compare(op: Op, args: tuple[Any, ...], allowed: float) -> list[Tensor]:
    """Runs the kernel and compares every output with the reference's in float64."""
    found = run(op, args)
    for i, (f, e) in enumerate(zip(found, outputs(op.reference(*exact(args))), strict=True)):
        error = relative_error(f, e)
        assert error <= allowed, f"{op.name}: output {i} of shape {tuple(f.shape)} is off by {error:.1e}"
    return found


def both_ways(name: str, args: tuple[Any, ...], cotangents: list[Tensor | None], dtype: torch.dtype) -> None:
    """The forward, and the backward for these cotangents (None where an output has no gradient)."""
    forward, backward = OPS[name], OPS[f"{name}_backward"]
    found = compare(forward, args, FORWARD[dtype])
    if name == "affine_coupling":
        x, *rest = args
        kept = found[0] if args[-1] else x
        saved = (kept, *rest)
    elif name == "actnorm":
        saved = args
    else:
        x, x_b, weight, _, split = args
        saved = (x, x_b, weight, split)
    compare(backward, (*cotangents, *saved), GRADIENT[dtype])


def either(*cotangents: list[Tensor | None], dtype: torch.dtype) -> tuple[list[Tensor | None], ...]:
    """All in float32; with half types the first, since which gradients are there is no matter of the type."""
    return cotangents if dtype is torch.float32 else cotangents[:1]


def normal(shape: tuple[int, ...], like: dict[str, Any]) -> Tensor:
    return torch.randn(shape, **like)


def strided(x: Tensor, form: str) -> Tensor:
    """The same values laid out otherwise."""
    if form == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    poison = math.nan if x.is_floating_point() else 99
    if form == "channel slice":
        wide = torch.cat((x.new_full(x[:, :1].shape, poison), x, x.new_full(x[:, :2].shape, poison)), 1)
        return wide[:, 1:-2]
    if form == "column slice":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), poison)
        wide[..., ::2] = x
        return wide[..., ::2]
    if form == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if form == "batch behind channels":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    assert form == "dense"
    return x


FORMS = ("dense", "channels_last", "channel slice", "column slice", "transposed", "batch behind channels")

# x's shape, C', and what the call is made of.
COUPLINGS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {
    "one element": ((1, 1, 1, 1), 1, dict(scale="exp")),
    "primes": ((3, 5, 7, 11), 2, dict(scale="sigmoid", layout="shift_scale", inverse=True)),
    "rows longer than a tile": ((2, 6, 23, 29), 3, dict(scale="softclamp", keep_output=True)),
    "rows longer than a tile, last": ((2, 5, 31, 37), 4, dict(scale="exp", last=True, inverse=True, keep_output=True)),
    "odd halves": ((2, 7, 13, 17), 3, dict(scale="tanh", alpha="one", last=True, layout="scale_shift_interleaved")),
    "every channel": ((2, 3, 20, 20), 3, dict(scale="additive", inverse=True)),
    "a channel each its alpha": ((3, 6, 9, 5), 3, dict(scale="tanh", alpha="each", keep_output=True)),
    "alpha, long rows": (
        (2, 4, 33, 35),
        2,
        dict(scale="tanh", alpha="each", inverse=True, layout="shift_scale_interleaved"),
    ),
    "alpha, inverse of samples in a tile": ((9, 4, 3, 3), 2, dict(scale="tanh", alpha="one", inverse=True)),
    "no alpha": ((3, 4, 5, 5), 2, dict(scale="tanh", inverse=True, keep_output=True)),
    "mask over positions": ((2, 3, 6, 7), 3, dict(scale="tanh", alpha="each", mask=(1, 6, 7))),
    "mask over rows": ((2, 3, 6, 7), 3, dict(scale="sigmoid", mask=(1, 6, 1), inverse=True)),
    "mask over columns": ((2, 3, 6, 7), 3, dict(scale="exp", mask=(3, 1, 7), keep_output=True)),
    "mask over everything": ((2, 40, 6, 7), 40, dict(scale="softclamp", mask=(40, 6, 7))),
    "vectors": ((7, 5), 2, dict(scale="sigmoid", last=True, layout="scale_shift_interleaved")),
    "more vectors than a tile": ((700, 2), 1, dict(scale="exp", inverse=True)),
    "vectors longer than a tile": ((3, 2100), 1050, dict(scale="softclamp", layout="shift_scale", last=True)),
    "vectors, alpha and mask": ((9, 6), 6, dict(scale="tanh", alpha="each", mask=(6,))),
    "vectors, one mask": ((9, 6), 6, dict(scale="exp", mask=(1,), keep_output=True)),
    "volumes": ((2, 4, 3, 5, 2), 2, dict(scale="sigmoid", keep_output=True)),
    "sequences": ((2, 4, 19), 2, dict(scale="exp")),
    "empty batch": ((0, 4, 3, 3), 2, dict(scale="sigmoid")),
    "no positions": ((3, 4, 0, 3), 2, dict(scale="tanh", alpha="each")),
}


def coupling(label: str, like: dict[str, Any], alpha_dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """The arguments of the coupling of that label."""
    shape, width, options = COUPLINGS[label]
    options = dict(alpha=None, mask=None, layout="scale_shift", last=False, inverse=False, keep_output=False) | options
    per = 1 if options["scale"] == "additive" else 2
    alpha, mask = options["alpha"], options["mask"]
    if alpha is not None:
        alpha = normal((1 if alpha == "one" else width,), like | {"dtype": alpha_dtype or like["dtype"]})
    if mask is not None:
        mask = torch.rand(mask, device=like["device"]) < 0.5
    params = normal((shape[0], per * width, *shape[2:]), like)
    return (
        normal(shape, like),
        params,
        alpha,
        mask,
        options["scale"],
        options["layout"],
        options["last"],
        options["inverse"],
        options["keep_output"],
    )


def check_coupling(args: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Forward and backward with both cotangents, and with either alone."""
    x = args[0]
    grad_y, grad_logdet = torch.randn_like(x), torch.randn(x.shape[0], device=x.device)
    for cotangents in either(
        [grad_y, grad_logdet], [grad_y, None], [None, grad_logdet[:1].expand(x.shape[0])], dtype=dtype
    ):
        both_ways("affine_coupling", args, cotangents, dtype)


def check_actnorm(x: Tensor, params_dtype: torch.dtype, log_scale: bool, inverse: bool) -> None:
    like = dict(device=x.device, dtype=params_dtype)
    scale, bias = normal((x.shape[1],), like), normal((x.shape[1],), like)
    if not log_scale:
        scale = scale.sign() * (scale.abs() + 0.5)
    args = (x, scale, bias, log_scale, inverse)
    grad_y, grad_logdet = torch.randn_like(x), torch.randn(x.shape[0], device=x.device)
    for cotangents in either([grad_y, grad_logdet], [grad_y, None], [None, grad_logdet], dtype=x.dtype):
        both_ways("actnorm", args, cotangents, x.dtype)


def check_mix(x: Tensor, x_b: Tensor | None, split: int, weight_dtype: torch.dtype, bias: bool) -> None:
    channels = x.shape[1] + (0 if x_b is None else x_b.shape[1])
    like = dict(device=x.device, dtype=weight_dtype)
    weight = normal((channels, channels), like) / channels**0.5
    args = (x, x_b, weight, normal((channels,), like) if bias else None, split)
    grad_y = torch.randn((x.shape[0], split, *x.shape[2:]), device=x.device).to(x.dtype)
    grad_y_b = torch.randn((x.shape[0], channels - split, *x.shape[2:]), device=x.device).to(x.dtype)
    if x_b is not None and x.dim() == 4 and not x.is_contiguous():
        grad_y = grad_y.contiguous(memory_format=torch.channels_last)
    for cotangents in either([grad_y, grad_y_b], [grad_y, None], [None, grad_y_b], dtype=x.dtype):
        cotangents = [
            None if c is None or not c.shape[1] else c for c in cotangents
        ]  # as the op's own backward calls it
        both_ways("channel_mix", args, cotangents, x.dtype)


def check_gated(x: Tensor, bias: Tensor | None, groups: int, dtype: torch.dtype) -> None:
    y = compare(OPS["gated_activation"], (x, bias, groups), FORWARD[dtype])[0]
    for grad in (torch.randn_like(y), torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape)):
        compare(OPS["gated_activation_backward"], (grad, x, bias, groups), GRADIENT[dtype])


def check_mixture(params: Tensor, x: Tensor, levels: int, dtype: torch.dtype) -> None:
    nll = compare(OPS["discretized_logistic_mixture_nll"], (params, x, levels), FORWARD[dtype])[0]
    for grad in (torch.randn_like(nll), torch.ones((), device=nll.device).expand(nll.shape)):
        compare(OPS["discretized_logistic_mixture_nll_backward"], (params, x, grad, levels), GRADIENT[dtype])
