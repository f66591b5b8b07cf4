"""The three products of a linear layer, with a leaky relu or its signs: the gradient penalty calls them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Op, Sample
from . import _check
from .activation import OP_APPLY

_CPU = kernels(
    "_cpu",
    linear="is_double a a_row a_inner b b_inner b_column bias out bits bits_mode slope rows columns inner threads",
    leaky_relu_bits="is_double apply x y bits slope rows columns threads",
)
_NONE, _MAKE, _APPLY = range(3)  # as in kernels.h


def _check_matrix(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.dim() != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected two axes")


def _check_one_dtype(op: str, **tensors: Tensor | None) -> None:
    if len({t.dtype for t in tensors.values() if t is not None}) > 1:
        given = {name: t.dtype for name, t in tensors.items() if t is not None}
        raise TypeError(f"{op}: {', '.join(f'{n} has dtype {d}' for n, d in given.items())}; expected one dtype")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float | None) -> None:
    _check.floating("linear", x=x, weight=weight, bias=bias)
    _check_matrix("linear", x=x, weight=weight)
    _check_one_dtype("linear", x=x, weight=weight, bias=bias)
    _check.shape("linear", "weight", weight, (weight.shape[0], x.shape[1]), "as many columns as x")
    if bias is not None:
        _check.shape("linear", "bias", bias, (weight.shape[0],), "one a row of weight")


def _check_input(grad: Tensor, weight: Tensor, bits: Tensor | None, slope: float) -> None:
    _check.floating("linear_input", grad=grad, weight=weight)
    _check_matrix("linear_input", grad=grad, weight=weight)
    _check_one_dtype("linear_input", grad=grad, weight=weight)
    _check.shape("linear_input", "grad", grad, (grad.shape[0], weight.shape[0]), "a column for each row of weight")
    if bits is None:
        return
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        raise TypeError(
            f"linear_input: bits is a {getattr(bits, 'dtype', type(bits).__name__)}, expected a torch.uint8 tensor"
        )
    if bits.device != grad.device:
        raise ValueError(f"linear_input: bits is on {bits.device} and grad on {grad.device}; move both to one device")
    expected = (grad.shape[0], (weight.shape[1] + 7) // 8)
    _check.shape("linear_input", "bits", bits, expected, "one bit an element of the result, rows in whole bytes")


def _check_weight(grad: Tensor, x: Tensor) -> None:
    _check.floating("linear_weight", grad=grad, x=x)
    _check_matrix("linear_weight", grad=grad, x=x)
    _check_one_dtype("linear_weight", grad=grad, x=x)
    _check.shape("linear_weight", "grad", grad, (x.shape[0], grad.shape[1]), "as many rows as x")


def _bytes(columns: int) -> int:
    return (columns + 7) // 8


def _ours(rows: int, columns: int, inner: int, epilogue: bool, turned: bool = False) -> bool:
    """Whether gemm.h serves a product; the library does where it was as fast or faster (batches of 8 to 256, widths to
    512).

    ``turned`` where the right-hand matrix is read along its inner axis, as in x W^T.
    """
    narrow = min(columns, inner)
    if rows < 16 or narrow == 1:  # few tiles, or a product with a vector
        return False
    if narrow == inner == 2 or columns <= 6:  # where the library is far from its best, but for rows times rows
        return rows >= 64 and not (turned and columns <= 6)
    # An epilogue saves a pass, which pays for less efficient products.
    return narrow >= (32 if epilogue else 64) and rows * columns * inner >= 1 << (18 if epilogue else 21)


@functools.lru_cache(1024)
def _strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, int] | None:
    """A matrix's strides, one of them 1; None where it must be copied first."""
    row, column = stride
    if column == 1 or shape[1] == 1:
        return (row, 1) if shape[0] > 1 else (max(1, shape[1]), 1)
    if row == 1 or shape[0] == 1:
        return 1, column
    return None


def _plain(x: Tensor) -> tuple[Tensor, tuple[int, int]]:
    found = _strides(x.shape, x.stride())
    return (x.contiguous(), (max(1, x.shape[1]), 1)) if found is None else (x, found)


def _product(
    a: Tensor,
    a_strides: tuple[int, int],
    b: Tensor,
    b_strides: tuple[int, int],
    sizes: tuple[int, int, int],
    bias: Tensor | None = None,
    bits: Tensor | None = None,
    mode: int = _NONE,
    slope: float = 0.0,
) -> Tensor:
    """a (rows, inner) times b (inner, columns), and the epilogue."""
    rows, columns, inner = sizes
    out = _allocator.empty_strided((rows, columns), (columns, 1), a.dtype)
    _CPU.linear(
        is_double=a.dtype is torch.float64,
        a=a,
        a_row=a_strides[0],
        a_inner=a_strides[1],
        b=b,
        b_inner=b_strides[0],
        b_column=b_strides[1],
        bias=bias,
        out=out,
        bits=bits,
        bits_mode=mode,
        slope=slope,
        rows=rows,
        columns=columns,
        inner=inner,
        threads=torch.get_num_threads(),
    )
    return out


def _signs(y: Tensor, bits: Tensor, slope: float, apply: bool) -> None:
    """Leaky relu of y (N, M) in place, or its signs applied."""
    _CPU.leaky_relu_bits(
        is_double=y.dtype is torch.float64,
        apply=apply,
        x=y,
        y=y,
        bits=bits,
        slope=slope,
        rows=y.shape[0],
        columns=y.shape[1],
        threads=torch.get_num_threads(),
    )


def _cpu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float | None) -> tuple[Tensor, Tensor]:
    _check_linear(x, weight, bias, slope)
    (n, k), m = x.shape, weight.shape[0]
    bits = torch.empty((0,) if slope is None else (n, _bytes(m)), dtype=torch.uint8)
    (x, (row, column)), (weight, (w_row, w_column)) = _plain(x), _plain(weight)
    bias = None if bias is None else bias.contiguous()
    if not _ours(n, m, k, slope is not None, turned=True):
        y = F.linear(x, weight, bias)
        if slope is not None:
            _signs(y, bits, slope, False)
        return y, bits
    mode = _NONE if slope is None else _MAKE
    return _product(x, (row, column), weight, (w_column, w_row), (n, m, k), bias, bits, mode, slope or 0.0), bits


def _cpu_input(grad: Tensor, weight: Tensor, bits: Tensor | None, slope: float) -> Tensor:
    _check_input(grad, weight, bits, slope)
    (n, m), k = grad.shape, weight.shape[1]
    bits = None if bits is None else bits.contiguous()
    (grad, strides), (weight, w_strides) = _plain(grad), _plain(weight)
    if not _ours(n, k, m, bits is not None):
        y = grad @ weight
        if bits is not None:
            _signs(y, bits, slope, True)
        return y
    return _product(grad, strides, weight, w_strides, (n, k, m), None, bits, _NONE if bits is None else _APPLY, slope)


def _cpu_weight(grad: Tensor, x: Tensor) -> Tensor:
    _check_weight(grad, x)
    (n, m), k = grad.shape, x.shape[1]
    (grad, (row, column)), (x, strides) = _plain(grad), _plain(x)
    if not _ours(m, k, n, False):
        return grad.t() @ x
    return _product(grad, (column, row), x, strides, (m, k, n))


# On CUDA the library multiplies; the signs take a pass of their own (kernels/activation.py).


def _library_linear(x: Tensor, weight: Tensor, bias: Tensor | None, slope: float | None) -> tuple[Tensor, Tensor]:
    _check_linear(x, weight, bias, slope)
    y = F.linear(x, weight, bias)
    if slope is None:
        return y, torch.empty(0, dtype=torch.uint8, device=x.device)
    result: tuple[Tensor, Tensor] = _row_signs(y, slope)
    return result


def _library_input(grad: Tensor, weight: Tensor, bits: Tensor | None, slope: float) -> Tensor:
    _check_input(grad, weight, bits, slope)
    y = grad @ weight
    return y if bits is None else _apply_rows(y, bits, slope)


def _library_weight(grad: Tensor, x: Tensor) -> Tensor:
    _check_weight(grad, x)
    return grad.t() @ x


_row_signs = _backend.triton_kernel("activation", "row_signs_")
_apply_rows = _backend.triton_kernel("activation", "apply_bits")


# ---- derivatives: the three are one another's ----


def _backward_linear(ctx: Any, grad_y: Tensor | None, _: Any) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 4
    (x, weight, bits), (slope,) = ctx.saved_tensors, ctx.options
    grad_y = grad_y if slope is None else OP_APPLY(grad_y, bits, slope)
    dx = OP_INPUT(grad_y, weight, None, 0.0) if ctx.needs_input_grad[0] else None
    dweight = OP_WEIGHT(grad_y, x) if ctx.needs_input_grad[1] else None
    return dx, dweight, grad_y.sum(0) if ctx.needs_input_grad[2] else None, None


def _backward_input(ctx: Any, grad_y: Tensor | None) -> tuple[Any, ...]:
    if grad_y is None:
        return (None,) * 4
    (grad, weight, bits), (slope,) = ctx.saved_tensors, ctx.options
    grad_y = grad_y if bits is None else OP_APPLY(grad_y, bits, slope)
    dgrad = OP(grad_y, weight, None, None)[0] if ctx.needs_input_grad[0] else None
    return dgrad, OP_WEIGHT(grad, grad_y) if ctx.needs_input_grad[1] else None, None, None


def _backward_weight(ctx: Any, grad_w: Tensor | None) -> tuple[Any, ...]:
    if grad_w is None:
        return None, None
    grad, x = ctx.saved_tensors
    dgrad = OP(x, grad_w, None, None)[0] if ctx.needs_input_grad[0] else None
    return dgrad, OP_INPUT(grad, grad_w, None, 0.0) if ctx.needs_input_grad[1] else None


_SIZES = (
    (7, 5, 3),
    (64, 3, 70),
    (67, 33, 129),
)  # N, K, M: the library's, and gemm.h's with whole and with broken tiles


def _samples_linear(generator: torch.Generator) -> Iterator[Sample]:
    for n, k, m in _SIZES:
        for bias, slope in ((True, 0.2), (False, 0.0), (True, None)):
            x, w, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((n, k), (m, k), (m,)))
            yield Sample(f"{n}x{k}x{m} slope {slope}{' bias' if bias else ''}", (x, w, c if bias else None, slope))


def _samples_input(generator: torch.Generator) -> Iterator[Sample]:
    for n, m, k in _SIZES:
        for slope in (None, 0.2, 0.0):
            b, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((n, m), (m, k)))
            bits = None if slope is None else torch.randint(256, (n, _bytes(k)), generator=generator, dtype=torch.uint8)
            yield Sample(f"{n}x{m}x{k} slope {slope}", (b, w, bits, slope or 0.0))


def _samples_weight(generator: torch.Generator) -> Iterator[Sample]:
    for n, m, k in ((7, 5, 3), (3, 70, 13), (129, 133, 133)):
        b, t = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((n, m), (n, k)))
        yield Sample(f"{n}x{m}x{k}", (b, t))


OP = Op(
    "linear(Tensor x, Tensor weight, Tensor? bias, float? slope)",
    reference=reference.linear,
    outputs={
        "y": "(N, weight.shape[0]) like x",
        "bits": "(N, (weight.shape[0] + 7) // 8) like x as uint8 if slope is not None",
    },
    check=_check_linear,
    kernels={"cpu": _cpu_linear, "triton": _library_linear},
    saves="x, weight, bits",
    backward=_backward_linear,
    samples=_samples_linear,
)

OP_INPUT = Op(
    "linear_input(Tensor grad, Tensor weight, Tensor? bits, float slope)",
    reference=reference.linear_input,
    outputs={"y": "(N, weight.shape[1]) like grad"},
    argument_dtypes={"bits": (torch.uint8,)},
    check=_check_input,
    kernels={"cpu": _cpu_input, "triton": _library_input},
    saves="grad, weight, bits",
    backward=_backward_input,
    samples=_samples_input,
)

OP_WEIGHT = Op(
    "linear_weight(Tensor grad, Tensor x)",
    reference=reference.linear_weight,
    outputs={"weight": "(grad.shape[1], x.shape[1]) like grad"},
    check=_check_weight,
    kernels={"cpu": _cpu_weight, "triton": _library_weight},
    saves="grad, x",
    backward=_backward_weight,
    samples=_samples_weight,
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, slope: float | None = None) -> tuple[Tensor, Tensor]:
    """A linear layer and its leaky relu: v = x W^T + bias, y = v where v > 0 and slope v elsewhere, with the signs as
    bits.

    On the CPU float32 and float64 go through a packed product whose epilogue is the activation; small and narrow
    products, half types and CUDA go through the library, which was measured as fast or faster there, and a pass for the
    activation.

    Args:
        x: (N, K) floating point, any strides.
        weight: (M, K) of x's dtype.
        bias: (M,) or None.
        slope: of the negative side, 0 for relu; None for no activation.

    Returns:
        (y, bits): y (N, M); bits uint8 (N, ceil(M / 8)), where bit i % 8 of byte i // 8 of a row is set for v > 0;
        empty without a slope.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.

    Source: DESIGN section 8, gradient penalty; Etmann (arXiv:1906.06637).

    Example:
        >>> import torch
        >>> from genfast.ops.linear import linear
        >>> y, bits = linear(torch.randn(4, 8), torch.randn(16, 8), torch.zeros(16), slope=0.2)
        >>> y.shape, bits.shape
        (torch.Size([4, 16]), torch.Size([4, 2]))
    """
    result: tuple[Tensor, Tensor] = OP(x, weight, bias, slope)
    return result


def linear_input(grad: Tensor, weight: Tensor, bits: Tensor | None = None, slope: float = 0.0) -> Tensor:
    """The gradient of a linear layer to its input, grad W, times the slopes of the leaky relu that made the input.

    Args:
        grad: (N, M) floating point, any strides.
        weight: (M, K) of grad's dtype.
        bits: uint8 (N, ceil(K / 8)), of :func:`linear` of the layer before, or None.
        slope: what an element without its bit is multiplied by.

    Returns:
        (N, K).

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.

    Source: DESIGN section 8, gradient penalty.

    Example:
        >>> import torch
        >>> from genfast.ops.linear import linear_input
        >>> linear_input(torch.randn(4, 16), torch.randn(16, 8)).shape
        torch.Size([4, 8])
    """
    result: Tensor = OP_INPUT(grad, weight, bits, slope)
    return result


def linear_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a linear layer to its weight, grad^T x.

    Args:
        grad: (N, M) floating point, any strides.
        x: (N, K) of grad's dtype.

    Returns:
        (M, K).

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.

    Source: DESIGN section 8, gradient penalty.

    Example:
        >>> import torch
        >>> from genfast.ops.linear import linear_weight
        >>> linear_weight(torch.randn(4, 16), torch.randn(4, 8)).shape
        torch.Size([16, 8])
    """
    result: Tensor = OP_WEIGHT(grad, x)
    return result
