"""What the gradient penalty needs of the activations between a critic's layers, in one pass each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Op, Sample
from .._tensors import memory_format
from . import _check

_CPU = kernels(
    "_cpu",
    leaky_relu_bits="is_double apply x y bits slope rows columns threads",
    activation="is_double second x grad tangent? cotangent? y size kind threads",
)
KINDS = tuple(reference.SLOPES)  # in the order of kernels.h
_NUMBER = {kind: i for i, kind in enumerate(KINDS)}


def _dense(x: Tensor) -> Tensor:
    """x, in its own order and without gaps."""
    return x if x.is_contiguous() else x.contiguous(memory_format=memory_format(x))


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x) if x.numel() * 8 < _allocator.MINIMUM else _allocator.empty_like(x)


def _bytes(x: Tensor) -> int:
    return (x.numel() + 7) // 8


def _check_leaky(x: Tensor, slope: float) -> None:
    _check.floating("leaky_relu_bits", x=x)


def _check_apply(x: Tensor, bits: Tensor, slope: float) -> None:
    _check.floating("apply_bits", x=x)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        raise TypeError(
            f"apply_bits: bits is a {getattr(bits, 'dtype', type(bits).__name__)}, expected a torch.uint8 tensor"
        )
    if bits.device != x.device:
        raise ValueError(f"apply_bits: bits is on {bits.device} and x on {x.device}; move both to one device")
    if bits.dim() == 2 and x.dim() == 2:
        _check.shape(
            "apply_bits", "bits", bits, (x.shape[0], (x.shape[1] + 7) // 8), "bits of the rows of x, in whole bytes"
        )
    else:
        _check.shape("apply_bits", "bits", bits, (_bytes(x),), "one bit an element of x, in whole bytes")


def _run_bits(x: Tensor, y: Tensor, bits: Tensor, slope: float, apply: bool) -> None:
    rows, columns = x.shape if bits.dim() == 2 else (1, x.numel())
    _CPU.leaky_relu_bits(
        is_double=x.dtype is torch.float64,
        apply=apply,
        x=x,
        y=y,
        bits=bits,
        slope=slope,
        rows=rows,
        columns=columns,
        threads=torch.get_num_threads(),
    )


def _cpu_leaky(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    if not x.dtype.is_floating_point:
        _check_leaky(x, slope)
    if not x.is_contiguous():
        x = _dense(x)
    n = x.numel()
    # not from kept memory: when a gradient penalty needs the most, this is free again
    y, bits = torch.empty_like(x), torch.empty((n + 7) // 8, dtype=torch.uint8)
    _CPU.leaky_relu_bits(
        is_double=x.dtype is torch.float64,
        apply=False,
        x=x,
        y=y,
        bits=bits,
        slope=slope,
        rows=1,
        columns=n,
        threads=torch.get_num_threads(),
    )
    return y, bits


def _cpu_apply(x: Tensor, bits: Tensor, slope: float) -> Tensor:
    _check_apply(x, bits, slope)
    x, bits = _dense(x), bits.contiguous()
    y = _empty_like(x)
    _run_bits(x, y, bits, slope, True)
    return y


def _backward_leaky(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Any, ...]:
    (bits,), (slope,) = ctx.saved_tensors, ctx.options
    return None if grad_y is None else OP_APPLY(grad_y.contiguous(memory_format=ctx.form), bits, slope), None


def _backward_apply(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
    return (*_backward_leaky(ctx, grad_y, None), None)


def _setup_leaky(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, slope = inputs
    ctx.set_materialize_grads(False)
    ctx.form, ctx.options = memory_format(x), (slope,)
    ctx.save_for_backward(output[1])


def _setup_apply(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bits, slope = inputs
    ctx.set_materialize_grads(False)
    ctx.form, ctx.options = memory_format(x), (slope,)
    ctx.save_for_backward(bits)


def _samples_leaky(generator: torch.Generator) -> Iterator[Sample]:
    for shape in ((3, 5, 4, 7), (2, 65, 3)):
        for slope in (0.2, 0.0):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield Sample(f"slope {slope} {len(shape)}-D", (x.sign() * (x.abs() + 0.1), slope))


def _samples_apply(generator: torch.Generator) -> Iterator[Sample]:
    for shape, kept, slope in (
        ((3, 5, 7), (14,), 0.2),
        ((16, 17, 3), (102,), 0.0),
        ((4, 11), (4, 2), 0.3),
        ((8, 4), (4,), 0.2),
    ):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        bits = torch.randint(256, kept, generator=generator, dtype=torch.uint8)
        yield Sample(f"{'rows' if len(kept) == 2 else 'flat'} slope {slope} {shape}", (x, bits, slope))


OP_APPLY = Op(
    "apply_bits(Tensor x, Tensor bits, float slope)",
    reference=reference.apply_bits,
    outputs={"y": "like x"},
    argument_dtypes={"bits": (torch.uint8,)},
    check=_check_apply,
    kernels={"cpu": _cpu_apply, "triton": "activation"},
    setup_context=_setup_apply,
    backward=_backward_apply,
    samples=_samples_apply,
)

OP_LEAKY = Op(
    "leaky_relu_bits(Tensor x, float slope)",
    reference=reference.leaky_relu_bits,
    outputs={"y": "like x", "bits": "((x.numel() + 7) // 8) like x as uint8"},
    check=_check_leaky,
    kernels={"cpu": _cpu_leaky, "triton": "activation"},
    setup_context=_setup_leaky,
    backward=_backward_leaky,
    samples=_samples_leaky,
)


def leaky_relu_bits(x: Tensor, slope: float = 0.0) -> tuple[Tensor, Tensor]:
    """Leaky relu that keeps the signs of its argument as one bit an element, all that its derivatives need.

    Args:
        x: any shape, floating point.
        slope: of the negative side; 0 is relu.

    Returns:
        (y, bits): y like x, in its memory format (channels_last is kept); bits uint8 (ceil(numel / 8),): bit i % 8 of
        byte i // 8 is set where element i of x, in the order in which y lies in memory, is above zero.

    Raises:
        TypeError: integer x.

    Source: Etmann (arXiv:1906.06637); the bits as in filtered_lrelu of StyleGAN3.

    Example:
        >>> import torch
        >>> from genfast.ops.activation import leaky_relu_bits
        >>> y, bits = leaky_relu_bits(torch.tensor([-1.0, 2.0, 3.0]), 0.5)
        >>> y.tolist(), bits.tolist()
        ([-0.5, 2.0, 3.0], [6])
    """
    result: tuple[Tensor, Tensor] = OP_LEAKY(x, slope)
    return result


def apply_bits(x: Tensor, bits: Tensor, slope: float = 0.0) -> Tensor:
    """x where its bit is set, slope x elsewhere: the backward and the tangent of a leaky relu.

    Args:
        x: any shape, floating point, laid out in memory as the tensor that the bits are of
            (``x.contiguous(memory_format=...)`` where it is not).
        bits: of :func:`leaky_relu_bits`, (ceil(numel / 8),), or of :func:`linear`, (N, ceil(C / 8)) for x (N, C).
        slope: what an element without its bit is multiplied by; for 0 the result is 0 whatever x holds. A number: no
            gradient flows to it.

    Raises:
        TypeError, ValueError: dtypes, devices or a number of bits that do not fit; a slope that requires a gradient.

    Example:
        >>> import torch
        >>> from genfast.ops.activation import apply_bits
        >>> apply_bits(torch.ones(3), torch.tensor([6], dtype=torch.uint8), 0.5).tolist()
        [0.5, 1.0, 1.0]
    """
    result: Tensor = OP_APPLY(x, bits, slope)
    return result


def _in_place(name: str, x: Tensor) -> bool:
    """Whether the kernel can work on x where it lies."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise RuntimeError(
            f"{name}: x requires a gradient, which an in-place call would lose; call it under torch.no_grad()"
        )
    if torch.compiler.is_compiling() or _backend.forced is not None or not x.is_cpu:
        return False
    kernel, dtypes = OP_APPLY.preferred["cpu"]
    return kernel is _cpu_apply and x.dtype in dtypes and x.is_contiguous(memory_format=memory_format(x))


def leaky_relu_bits_(x: Tensor, slope: float = 0.0) -> Tensor:
    """:func:`leaky_relu_bits` that overwrites x with y and returns the bits alone.

    For use where nothing is differentiated: autograd does not see it.

    Raises:
        TypeError: integer x.
        RuntimeError: x requires a gradient, outside of ``torch.no_grad()``.

    Example:
        >>> import torch
        >>> from genfast.ops.activation import leaky_relu_bits_
        >>> x = torch.tensor([-1.0, 2.0, 3.0])
        >>> leaky_relu_bits_(x, 0.5).tolist(), x.tolist()
        ([6], [-0.5, 2.0, 3.0])
    """
    _check_leaky(x, slope)
    _check.number("leaky_relu_bits_", slope=slope)
    if _in_place("leaky_relu_bits_", x):
        bits = torch.empty(_bytes(x), dtype=torch.uint8)
        _run_bits(x, x, bits, slope, False)
        return bits
    y, bits = leaky_relu_bits(x, slope)
    x.copy_(y)
    return bits


def apply_bits_(x: Tensor, bits: Tensor, slope: float = 0.0) -> Tensor:
    """:func:`apply_bits` that overwrites x, and returns it.

    For use where nothing is differentiated: autograd does not see it.

    Raises:
        TypeError, ValueError: as :func:`apply_bits`.
        RuntimeError: x requires a gradient, outside of ``torch.no_grad()``.

    Example:
        >>> import torch
        >>> from genfast.ops.activation import apply_bits_
        >>> apply_bits_(torch.ones(3), torch.tensor([6], dtype=torch.uint8), 0.5).tolist()
        [0.5, 1.0, 1.0]
    """
    _check_apply(x, bits, slope)
    _check.number("apply_bits_", slope=slope)
    if _in_place("apply_bits_", x):
        _run_bits(x, x, bits.contiguous(), slope, True)
        return x
    return x.copy_(apply_bits(x, bits, slope))


# ---- smooth activations ----


def _check_smooth(op: str, x: Tensor, kind: str, **others: Tensor | None) -> None:
    _check.floating(op, x=x, **others)
    _check.choice(op, "kind", kind, KINDS)
    for name, t in others.items():
        if t is not None:
            _check.shape(op, name, t, tuple(x.shape), "the shape of x")


def _check_chain(x: Tensor, grad: Tensor, kind: str) -> None:
    _check_smooth("activation_chain", x, kind, grad=grad)


def _check_second(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor | None, kind: str) -> None:
    _check_smooth("activation_second", x, kind, grad=grad, tangent=tangent, cotangent=cotangent)


def _aligned(x: Tensor, other: Tensor) -> Tensor:
    """``other`` in the dtype and the order of a dense x."""
    if other.dtype is x.dtype and other.stride() == x.stride():
        return other
    return other.to(x.dtype).contiguous(memory_format=memory_format(x))


def _cpu_chain(x: Tensor, grad: Tensor, kind: str) -> Tensor:
    _check_chain(x, grad, kind)
    x = _dense(x)
    grad, y = _aligned(x, grad), _empty_like(x)
    _CPU.activation(
        is_double=x.dtype is torch.float64,
        second=False,
        x=x,
        grad=grad,
        y=y,
        size=x.numel(),
        kind=_NUMBER[kind],
        threads=torch.get_num_threads(),
    )
    return y


def _cpu_second(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor | None, kind: str) -> Tensor:
    _check_second(x, grad, tangent, cotangent, kind)
    x = _dense(x)
    grad, tangent, y = _aligned(x, grad), _aligned(x, tangent), _empty_like(x)
    cotangent = None if cotangent is None else _aligned(x, cotangent)
    _CPU.activation(
        is_double=x.dtype is torch.float64,
        second=True,
        x=x,
        grad=grad,
        tangent=tangent,
        cotangent=cotangent,
        y=y,
        size=x.numel(),
        kind=_NUMBER[kind],
        threads=torch.get_num_threads(),
    )
    return y


def _backward_chain(ctx: Any, cotangent: Tensor | None) -> tuple[Any, ...]:
    if cotangent is None:
        return None, None, None
    (x, grad), (kind,) = ctx.saved_tensors, ctx.options
    dx = OP_SECOND(x, grad, cotangent, None, kind) if ctx.needs_input_grad[0] else None
    dgrad = OP_CHAIN(x, cotangent, kind).to(grad.dtype) if ctx.needs_input_grad[1] else None
    return dx, dgrad, None


def _samples_chain(generator: torch.Generator) -> Iterator[Sample]:
    for i, kind in enumerate(KINDS):
        shape = ((3, 5, 4, 7), (6, 37))[i % 2]
        x, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        yield Sample(kind, (2 * x, grad, kind))


def _samples_second(generator: torch.Generator) -> Iterator[Sample]:
    for i, kind in enumerate(KINDS):
        shape = ((6, 37), (3, 5, 4, 7))[i % 2]
        x, grad, tangent, given = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4))
        cotangent = given if i % 3 else None
        yield Sample(
            f"{kind}{'' if cotangent is None else ' with a cotangent'}", (2 * x, grad, tangent, cotangent, kind)
        )


OP_SECOND = Op(
    "activation_second(Tensor x, Tensor grad, Tensor tangent, Tensor? cotangent, str kind)",
    reference=reference.activation_second,
    outputs={"y": "like x"},
    check=_check_second,
    kernels={"cpu": _cpu_second, "triton": "activation"},
    samples=_samples_second,
)

OP_CHAIN = Op(
    "activation_chain(Tensor x, Tensor grad, str kind)",
    reference=reference.activation_chain,
    outputs={"y": "like x"},
    check=_check_chain,
    kernels={"cpu": _cpu_chain, "triton": "activation"},
    saves="x, grad",
    backward=_backward_chain,
    samples=_samples_chain,
)


def activation_chain(x: Tensor, grad: Tensor, kind: str) -> Tensor:
    """grad s'(x), s a smooth activation: its backward, and with a tangent as ``grad`` its tangent.

    Args:
        x: the activation's argument, any shape, floating point.
        grad: of x's shape; cast to x's dtype.
        kind: "silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus" (beta 1, linear above 20), "elu" (alpha 1),
            "selu" or "mish".

    Returns:
        Like x, in its memory format.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or a kind that do not fit.

    Source: DESIGN section 8, gradient penalty, smooth layers.

    Example:
        >>> import torch
        >>> from genfast.ops.activation import activation_chain
        >>> activation_chain(torch.zeros(2), torch.ones(2), "tanh").tolist()
        [1.0, 1.0]
    """
    result: Tensor = OP_CHAIN(x, grad, kind)
    return result


def activation_second(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor | None, kind: str) -> Tensor:
    """cotangent s'(x) + grad tangent s''(x), s a smooth activation: the backward of both its passes in one.

    Args:
        x: the activation's argument, any shape, floating point.
        grad: what reached s(x) in the backward pass, of x's shape.
        tangent: what reached x in the tangent pass, of x's shape.
        cotangent: what reaches s(x) in the second backward pass, of x's shape; None for zero.
        kind: as in :func:`activation_chain`.

    Returns:
        Like x, in its memory format.

    Raises:
        TypeError, ValueError: dtypes, devices, shapes or a kind that do not fit.

    Source: DESIGN section 8, gradient penalty, smooth layers.

    Example:
        >>> import torch
        >>> from genfast.ops.activation import activation_second
        >>> one = torch.ones(2)
        >>> activation_second(torch.zeros(2), one, one, None, "silu").tolist()
        [0.5, 0.5]
    """
    result: Tensor = OP_SECOND(x, grad, tangent, cotangent, kind)
    return result
