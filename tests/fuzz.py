"""Calls of every op and every public function with arguments that are not as they should be.

    python -m tests.fuzz --calls 20000 --seed 3

A call equals the same call on the reference, or both raise an error that names an argument. The arguments come from the
ops' samples and from a table of calls of the public functions; one of them is changed: its shape (zeros and primes),
strides, storage offset, dtype, layout or device, its values where they are indices, or its type. Runs in a process of
its own, which writes each call down before it is made, so that a crash has a name.
"""

from __future__ import annotations

import argparse
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import torch
from torch import Tensor

import genfast
from genfast import _registry, ops
from genfast.ops.activation import activation_chain, activation_second, apply_bits, leaky_relu_bits
from genfast.ops.linear import linear, linear_input, linear_weight
from genfast.ops.masked_linear import staircase, staircase_from_mask

# Arguments of backward ops that follow from the others, and levels, whose range is for the public function to check:
# with other numbers in their place a kernel and the reference need not agree.
DERIVED = {
    "autoregressive_inverse_backward": ("x", "z", "packed", "statics", "code", "options"),
    "contextual_similarity": ("x", "y"),
    "contextual_similarity_backward": (
        "x",
        "y",
        "prior_rows",
        "prior_columns",
        "value",
        "statistics",
        "mean",
        "winner",
        "nearest",
    ),
    "discretized_logistic_mixture_nll": ("x", "levels"),
    "discretized_logistic_mixture_nll_backward": ("x", "levels"),
    "masked_conv_backward": ("y",),
    "masked_linear_backward": ("y",),
    "row_lstm_backward": ("kept",),
    "diagonal_lstm_backward": ("kept",),
    "sample_norm_backward": ("norm",),
    "spectral_norm_backward": ("u", "v", "sigma"),
    "style_loss_backward": ("difference",),
}
DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip
ERRORS = (TypeError, ValueError, RuntimeError)
# Words by which an error may name what it means, beside the arguments' names.
WORDS = (
    "batch",
    "channels",
    "shape",
    "device",
    "dtype",
    "features",
    "group",
    "taps",
    "rows",
    "bins",
    "kernel",
    "perm",
    "code",
)


def _other(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def public_calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """A call of each public function and of those that our own modules call: name, function, arguments that fit."""
    g = torch.Generator().manual_seed(0)

    def r(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    image, vectors = r(4, 6, 6, 4), r(4, 6)
    bits = torch.randint(256, (72,), generator=g, dtype=torch.uint8)
    levels = torch.randint(256, (4, 3, 6, 4), generator=g)
    plu = ops.PLU(torch.randperm(6, generator=g), r(6, 6), r(6, 6), r(6).sign(), r(6))
    stairs = staircase([1, 2, 3, 4, 5, 6], [1, 2, 3, 4])
    nade = (r(6, 5), r(6, 1, 5), r(6, 1), r(5))
    rows = (r(7, 5), r(8, 5))
    table: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "activation_chain": [((image, image, "tanh"), {})],
        "activation_second": [((image, image, image, None, "tanh"), {})],
        "actnorm": [((image, r(6), r(6)), {})],
        "actnorm_conv1x1": [((image, r(6), r(6), r(6, 6)), {}), ((image, r(6), r(6), plu), {})],
        "affine_coupling": [((image, r(4, 6, 6, 4)), {}), ((vectors, r(4, 6)), {"scale": "tanh", "alpha": r(3)})],
        "apply_bits": [((image, bits, 0.2), {})],
        "leaky_relu_bits": [((image, 0.2), {})],
        "bias_act": [((image, r(6)), {"act": "lrelu", "clamp": 0.7})],
        "categorical_nll": [((r(4, 256, 3, 6, 4), levels), {})],
        "contextual_similarity": [((r(2, 4, 3, 3), r(2, 4, 3, 3)), {})],
        "diagonal_gaussian": [((vectors, vectors, vectors), {})],
        "diagonal_gaussian_kl": [((vectors, vectors), {"free_bits": 0.1, "reduction": "mean"})],
        "diagonal_lstm": [((r(2, 8, 3, 3), r(8, 2, 2)), {"h0": r(2)})],
        "row_lstm": [((r(2, 8, 3, 3), r(8, 2, 3)), {"c0": r(2, 3)})],
        "discretized_logistic_mixture_nll": [((r(4, 20, 6, 4), levels), {})],
        "downsample2d": [((image, ops.setup_filter([1, 3, 3, 1])), {})],
        "upsample2d": [((image, ops.setup_filter([1, 3, 3, 1])), {})],
        "filter2d": [((image, ops.setup_filter([1, 2, 1])), {})],
        "upfirdn2d": [((image, ops.setup_filter([1, 2, 1])), {"up": 2, "padding": (1, 1)})],
        "gated_activation": [((image, r(6)), {})],
        "gram_matrix": [((image,), {})],
        "style_loss": [((image, r(4, 6, 6)), {}), (([image, image], [image, image]), {"targets_are": "features"})],
        "interpolate": [((image, image), {"epsilon": torch.rand(4, generator=g)})],
        "invertible_conv1x1": [((image, r(6, 6), r(6)), {}), ((image, plu), {}), ((vectors, plu), {"inverse": True})],
        "kernel_distance": [(rows, {})],
        "linear": [((r(5, 3), r(4, 3), r(4)), {})],
        "linear_input": [((r(5, 4), r(4, 3)), {})],
        "linear_weight": [((r(5, 4), r(5, 3)), {})],
        "linear_spline": [((torch.rand(4, 2, generator=g), r(4, 2, 5)), {"tails": None})],
        "quadratic_spline": [((r(4, 2), r(4, 2, 5), r(4, 2, 4)), {})],
        "rational_quadratic_spline": [((r(4, 2), r(4, 2, 5), r(4, 2, 5), r(4, 2, 4)), {})],
        "rational_quadratic_spline_packed": [((r(4, 2), r(4, 2, 14), 5), {})],
        "masked_conv1d": [((r(2, 3, 9), r(6, 3, 3)), {"mask_type": "B"})],
        "masked_conv2d": [((image, r(3, 6, 3, 3), r(3)), {"mask_type": "A", "data_channels": 3, "dilation": 2})],
        "masked_conv3d": [((r(1, 2, 3, 3, 3), r(2, 2, 3, 3, 3)), {"mask_type": "B"})],
        "masked_linear": [((r(3, 6), r(4, 6), r(4)), {"mask": stairs, "activation": "relu"})],
        "minibatch_discrimination": [((vectors, r(6, 3, 2)), {})],
        "pairwise_l1_kernel_sum": [((r(4, 3, 2),), {})],
        "minibatch_stddev": [((image,), {"group_size": 2, "features": 2})],
        "mmd": [(rows, {}), (rows, {"kernel": "imq"})],
        "modulated_conv2d": [((image, r(5, 6, 3, 3), r(4, 6)), {})],
        "nade": [((vectors, *nade), {})],
        "nearest_neighbors": [(rows, {"k": 2})],
        "pairwise_kernel_sum": [((r(2, 4, 3), r(2, 5, 3)), {"kernel": "rbf", "scales": [0.5]})],
        "pixel_norm": [((image,), {})],
        "sample_norm": [((image,), {})],
        "spectral_norm": [((r(4, 6), r(4)), {})],
        "squeeze": [((image,), {})],
        "unsqueeze": [((r(2, 8, 3, 3),), {"order": "space_to_depth"})],
        "staircase_from_mask": [((torch.ones(3, 4).tril(),), {})],
    }
    # What the penalty and the engines call is no part of genfast.ops, but is changed in the same ways.
    internal = (
        activation_chain,
        activation_second,
        apply_bits,
        leaky_relu_bits,
        linear,
        linear_input,
        linear_weight,
        staircase_from_mask,
    )
    functions = {function.__name__: function for function in internal}
    for name, calls in table.items():
        for args, kwargs in calls:
            yield name, functions.get(name) or getattr(ops, name), args, kwargs


def declared_calls() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    """The samples of every op, and the calls of backward ops that differentiating them makes."""
    recorded: list[tuple[str, tuple[Any, ...]]] = []
    call = _registry.Op.__call__

    def recording(self: _registry.Op, *args: Any) -> Any:
        recorded.append((self.name, tuple(a.detach() if isinstance(a, Tensor) else a for a in args)))
        return call(self, *args)

    _registry.Op.__call__ = recording  # type: ignore[method-assign]
    try:
        for op in list(_registry.OPS.values()):
            for sample in list(op.samples(torch.Generator().manual_seed(0)))[:4] if op.samples is not None else ():
                args = [
                    a.float().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
                    for a in sample.args
                ]
                out = op(*args)
                out = [o for o in ((out,) if isinstance(out, Tensor) else out) if o.requires_grad]
                out = out[:1] if op.name == "contextual_similarity" else out
                leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
                if out and leaves:
                    sums = [o.square().sum() for o in out if o.numel()]
                    twice = op.name in ("bias_act", "pairwise_l1_kernel_sum")
                    grads = torch.autograd.grad(sums, leaves, allow_unused=True, create_graph=twice)
                    again = [g.square().sum() for g in grads if g is not None and g.requires_grad]
                    if twice and again:
                        torch.autograd.grad(again, leaves, allow_unused=True)
    finally:
        _registry.Op.__call__ = call  # type: ignore[method-assign]
    counts: dict[str, int] = {}
    for name, args in recorded:
        counts[name] = counts.get(name, 0) + 1
        if counts[name] <= 4:
            yield f"torch.ops.genfast.{name}", getattr(torch.ops.genfast, name), args, {}


def changed_tensor(t: Tensor, draw: random.Random) -> tuple[str, Any]:
    """Another argument in the place of a tensor, and what it is."""
    kind = draw.choice(
        (
            "dtype",
            "shape",
            "axes",
            "strided",
            "transposed",
            "expanded",
            "offset",
            "neg",
            "zero",
            "sparse",
            "meta",
            "values",
            "list",
            "numpy",
            "none",
            "number",
            "quantised",
        )
    )
    shape = list(t.shape)
    if kind == "dtype":
        dtype = draw.choice(DTYPES)
        return f"dtype {dtype}", t.to(dtype)
    if kind == "shape" and shape:
        axis = draw.randrange(len(shape))
        shape[axis] = draw.choice((0, 1, 2, 3, 7, shape[axis] + 1, max(0, shape[axis] - 1)))
        return f"shape {shape}", torch.ones(shape, dtype=t.dtype)
    if kind == "axes":
        shape = draw.choice(([], [0], shape[:-1], [*shape, 1], [1, *shape], [0, *shape[1:]]))
        return f"shape {shape}", torch.ones(shape, dtype=t.dtype)
    if kind == "strided":
        big = torch.full([2 * s + 1 for s in shape], 99, dtype=t.dtype)
        view = big[tuple(slice(1, None, 2) for _ in shape)]
        view.copy_(t)
        return "strided", view
    if kind == "transposed" and len(shape) > 1:
        i, j = draw.sample(range(len(shape)), 2)
        return f"transposed {i} {j}", t.transpose(i, j).contiguous().transpose(i, j)
    if kind == "expanded" and shape and shape[0]:
        return "expanded", t[:1].expand(t.shape)
    if kind == "offset":
        flat = torch.empty(t.numel() + 3, dtype=t.dtype)[3:]
        flat.copy_(t.flatten())
        return "offset", flat.view(t.shape)
    if kind == "neg" and t.is_floating_point():
        return "negated view", torch._neg_view(t)
    if kind == "zero":
        return "zero tensor", torch._efficientzerotensor(shape, dtype=t.dtype)
    if kind == "sparse":
        return "sparse", t.to_sparse()
    if kind == "meta":
        return "meta", t.to("meta")
    if kind == "values" and t.dtype in (torch.int64, torch.int32) and t.numel():
        other = t.clone()
        other.view(-1)[draw.randrange(t.numel())] = draw.choice((-1, 1 << 30, t.numel(), 0))
        return "values", other
    if kind == "quantised" and t.dtype is torch.float32:
        return "quantised", torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)
    if kind == "list":
        return "list", t.tolist()
    if kind == "numpy":
        return "numpy", t.numpy() if t.dtype is not torch.bfloat16 else np.zeros(shape)
    if kind == "none":
        return "None", None
    return "number", draw.choice((0, 1.5, "x", True))


def changed_number(value: Any, draw: random.Random) -> tuple[str, Any]:
    other = draw.choice(
        (None, -1, 0, 1, 2, 7, 0.5, float("nan"), "x", True, torch.tensor(1), np.float32(0.5), [1], (0, 0))
    )
    return f"{value!r:.40} -> {other!r:.40}", other


def changed(value: Any, draw: random.Random) -> tuple[str, Any]:
    if isinstance(value, Tensor):
        return changed_tensor(value, draw)
    if isinstance(value, (list, tuple)) and value and draw.random() < 0.7:
        place = draw.randrange(len(value))
        what, item = changed(value[place], draw)
        items = [item if i == place else v for i, v in enumerate(value)]
        fields = hasattr(value, "_fields")
        return f"[{place}] {what}", type(value)(*items) if fields else type(value)(items)
    return changed_number(value, draw)


def outcome(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            out = function(*args, **kwargs)
    except MemoryError:
        raise
    except Exception as error:
        return error
    return [o.detach() for o in torch.utils._pytree.tree_leaves(out) if isinstance(o, Tensor)]


def names_of(function: Callable[..., Any]) -> set[str]:
    if isinstance(function, torch._ops.OpOverloadPacket):
        return {a.name for a in function.default._schema.arguments}
    names = set(inspect.signature(function).parameters)
    return names | {n for op in _registry.OPS.values() for n in op.argument_names} | set(ops.PLU._fields)


def complaint(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], numbers: bool = True) -> str:
    """What is wrong with a call; empty where nothing is. ``numbers``: whether those of both must agree."""
    out = outcome(function, args, kwargs)
    with genfast.backend("reference"):
        expected = outcome(function, args, kwargs)
    for which, result in (("", out), ("the reference's ", expected)):
        if not isinstance(result, Exception):
            continue
        text = str(result)
        if "incompatible function arguments" in text or not isinstance(result, ERRORS):
            return f"{which}{type(result).__name__}: {text[:300]}"
        if not any(name in text for name in (*names_of(function), *WORDS)):
            return f"{which}error names no argument: {type(result).__name__}: {text[:300]}"
    if not numbers:
        return ""
    if isinstance(out, Exception) or isinstance(expected, Exception):
        if isinstance(out, Exception) != isinstance(expected, Exception):
            return f"the kernel gave {_short(out)}, the reference {_short(expected)}"
        return ""
    for a, b in zip(out, expected, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
            return f"the kernel gave {_short([a])}, the reference {_short([b])}"
        if a.device.type == "meta" or not a.numel():
            continue
        if a.is_floating_point():
            rtol = {torch.float64: 1e-5, torch.float32: 2e-3}.get(a.dtype, 5e-2)
            scale = float(b.double().nan_to_num(0, 0, 0).abs().amax()) + 1e-3
            if not torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol * scale + 1e-5, equal_nan=True):
                return f"numbers differ by {float((a.double() - b.double()).nan_to_num(0).abs().amax())} of {scale}"
        elif not a.dtype.is_floating_point and a.dtype not in (torch.uint8,) and not torch.equal(a, b):
            return "integers differ"
    return ""


def _short(result: Any) -> str:
    if isinstance(result, Exception):
        return f"{type(result).__name__}: {str(result)[:160]}"
    return ", ".join(f"{o.dtype} {tuple(o.shape)} on {o.device}" for o in result)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="part of a function's name")
    parser.add_argument("--log", type=Path, help="where the current call is written down")
    a = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    table = [call for call in (*public_calls(), *declared_calls()) if a.only in call[0]]
    wrong: dict[str, str] = {}

    @hypothesis.seed(a.seed)
    @hypothesis.settings(
        max_examples=a.calls,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.integers(0, len(table) - 1), st.integers(0, 2**62))
    def call(which: int, seed: int) -> None:
        draw = random.Random(seed)
        name, function, args, kwargs = table[which]
        place = draw.randrange(len(args) + len(kwargs))
        args, kwargs = list(args), dict(kwargs)
        if place < len(args):
            what, args[place] = changed(args[place], draw)
            label = f"{name}: argument {place} {what}"
        else:
            key = list(kwargs)[place - len(args)]
            what, kwargs[key] = changed(kwargs[key], draw)
            label = f"{name}: {key} {what}"
        if a.log is not None:
            a.log.write_text(label)
        derived = DERIVED.get(name.rpartition(".")[2], ()) if name.startswith("torch.ops") else ()
        numbers = not derived or function.default._schema.arguments[place].name not in derived
        problem = complaint(function, tuple(args), kwargs, numbers)
        if problem:
            wrong.setdefault(label, problem)

    call()
    for label, problem in wrong.items():
        print(f"{label}\n    {problem}")
    print(f"{a.calls} calls of {len({c[0] for c in table})} functions, {len(wrong)} of them wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
