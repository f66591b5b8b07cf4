"""ops.autoregressive_inverse: the slow direction of an autoregressive flow, for about one pass of its network."""

from __future__ import annotations

import math
import weakref
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Op
from .._tensors import accumulator
from . import _autoregressive_inverse_cuda as _cuda
from . import _check
from .spline import CONVENTIONS, derivative_count
from .spline import _check_options as check_spline
from .spline import _domain as spline_domain

if TYPE_CHECKING:
    from ..programs import DegreeProgram

_NAME = "autoregressive_inverse"
_CUDA_DTYPES = _backend.DTYPES | {"cuda": (torch.float32,)}
_FIELDS = "is_double code packed statics z transform options option_count n threads"
_CPU = kernels(
    "_cpu",
    "degree_program_error",
    autoregressive_inverse=f"{_FIELDS} x logdet units stride",
    autoregressive_inverse_sweep=f"{_FIELDS} units deltas stride grad_x grad_logdet grad_z",
    autoregressive_inverse_weights="is_double code units deltas stride grad_packed n threads",
)
SCALES = ("exp", "softclamp", "sigmoid2", "softplus", "additive")
TRANSFORMS = (*(f"affine:{scale}" for scale in SCALES), "bernoulli", "spline")
TAILS = ("linear", "none", "circular")
_OPTIONS = {"bernoulli": (0, "none"), "spline": (13, "flip, bins, tails, zuko and the spline's nine")}


def _width(transform: str, options: Sequence[float]) -> int:
    """P, the parameters of an input."""
    if transform == "spline":
        return 2 * int(options[1]) + derivative_count(int(options[1]), TAILS[int(options[2])])
    return 1 if transform in ("affine:additive", "bernoulli") else 2


_headers: dict[int, tuple[weakref.ref[Tensor], list[int]]] = {}


def _header(code: Tensor) -> list[int]:
    """The first numbers of a program, which no one changes; kept, since reading a tensor takes as long as a small
    kernel."""
    kept = _headers.get(id(code))
    if kept is not None and kept[0]() is code:
        return kept[1]
    numbers: list[int] = code[: reference.PROGRAM_HEADER].tolist()
    if len(_headers) > 256:
        _headers.clear()
    _headers[id(code)] = weakref.ref(code), numbers
    return numbers


def _check_forward(
    z: Tensor, packed: Tensor, statics: Tensor | None, code: Tensor, transform: str, options: Sequence[float]
) -> None:
    _check.floating(_NAME, z=z, packed=packed, statics=statics)
    _check.choice(_NAME, "transform", transform, TRANSFORMS)
    if code.dtype != torch.int64 or code.dim() != 1 or len(code) < reference.PROGRAM_HEADER:
        raise ValueError(
            f"{_NAME}: code is {code.dtype} of shape {tuple(code.shape)}, expected a DegreeProgram's int64 vector"
        )
    if code.is_meta or type(code) is not Tensor:  # under a tracer numbers are not to be had
        return
    inputs, width, *_, columns, size, _ = _header(code)
    if z.dim() != 2 or z.shape[1] != inputs:
        raise ValueError(f"{_NAME}: z has shape {tuple(z.shape)}, expected (N, {inputs}): the program's inputs")
    count, names = _OPTIONS.get(transform, (3, "flip, scale_first, constant"))
    if len(options) != count:
        raise ValueError(f"{_NAME}: options has {len(options)} numbers, expected {count}: {names}")
    if transform == "spline":
        check_spline(_NAME, int(options[1]), TAILS[int(options[2])], options[4:])
    wanted = _width(transform, options)
    if width != wanted:
        raise ValueError(
            f"{_NAME}: the network gives {width} parameters an input, expected {wanted} for transform={transform!r}"
        )
    _check.shape(_NAME, "packed", packed, (size,), "the program's weights")
    if columns and statics is None:
        raise ValueError(f"{_NAME}: statics is None, expected ({len(z)}, {columns}): the program has contexts or gates")
    if statics is not None:
        _check.shape(_NAME, "contexts and gates, side by side", statics, (len(z), columns), "one row for each of z")


def _check_backward(
    grad_x: Tensor | None,
    grad_logdet: Tensor | None,
    z: Tensor,
    x: Tensor,
    packed: Tensor,
    statics: Tensor | None,
    code: Tensor,
    transform: str,
    options: Sequence[float],
    weights: bool,
) -> None:
    _check_forward(z, packed, statics, code, transform, options)
    _check.shapes(
        f"{_NAME}_backward",
        grad_x=(grad_x, z.shape, "that of z"),
        x=(x, z.shape, "that of z"),
        grad_logdet=(grad_logdet, z.shape[:1], "one per sample"),
    )


def _check_code(code: Tensor, z: Tensor, packed: Tensor, statics: Tensor | None) -> None:
    """The numbers of a program are indices for the kernels. Looked at anew at each call: they take a small part of its
    time."""
    columns = 0 if statics is None else statics.shape[1]
    error: str = _CPU.degree_program_error(code.data_ptr(), len(code), z.shape[1], len(packed), columns)
    if error:
        raise ValueError(f"{_NAME}: code is no DegreeProgram's: {error}")


def _cpu(
    z: Tensor, packed: Tensor, statics: Tensor | None, code: Tensor, transform: str, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    _check_forward(z, packed, statics, code, transform, options)
    z, packed, statics, code = z.contiguous(), packed.to(z.dtype).contiguous(), _like(statics, z), code.contiguous()
    _check_code(code, z, packed, statics)
    x, logdet = torch.empty_like(z), z.new_empty(len(z))
    if len(z):
        numbers = array("d", options)
        _CPU.autoregressive_inverse(
            is_double=z.dtype is torch.float64,
            code=code,
            packed=packed,
            statics=statics,
            z=z,
            x=x,
            logdet=logdet,
            units=None,
            stride=0,
            transform=TRANSFORMS.index(transform),
            options=numbers.buffer_info()[0],
            option_count=len(numbers),
            n=len(z),
            threads=torch.get_num_threads(),
        )
    return x, logdet


def _cpu_backward(
    grad_x: Tensor | None,
    grad_logdet: Tensor | None,
    z: Tensor,
    x: Tensor,
    packed: Tensor,
    statics: Tensor | None,
    code: Tensor,
    transform: str,
    options: Sequence[float],
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(grad_x, grad_logdet, z, x, packed, statics, code, transform, options, weights)
    n, double = len(z), z.dtype is torch.float64
    statics, grad_x, grad_logdet = (_like(t, z) for t in (statics, grad_x, grad_logdet))
    packed, x = packed.to(z.dtype).contiguous(), x.to(z.dtype).contiguous()
    z, code = z.contiguous(), code.contiguous()
    _check_code(code, z, packed, statics)
    dz = torch.empty_like(z)
    dpacked = packed.new_empty(packed.shape if weights else 0)
    dstatics = z.new_empty(0 if statics is None else statics.shape)
    if not n:
        return dz, dpacked.zero_(), dstatics
    stride = _stride(n)
    units, deltas = (_allocator.empty_strided((_header(code)[5], stride), (stride, 1), z.dtype) for _ in range(2))
    threads, kind = torch.get_num_threads(), TRANSFORMS.index(transform)
    numbers = array("d", options)
    address, count = numbers.buffer_info()
    _CPU.autoregressive_inverse(
        is_double=double,
        code=code,
        packed=packed,
        statics=statics,
        z=None,
        x=x,
        logdet=None,
        units=units,
        stride=stride,
        transform=kind,
        options=address,
        option_count=count,
        n=n,
        threads=threads,
    )
    _CPU.autoregressive_inverse_sweep(
        is_double=double,
        code=code,
        packed=packed,
        statics=statics,
        z=z,
        units=units,
        deltas=deltas,
        stride=stride,
        grad_x=grad_x,
        grad_logdet=grad_logdet,
        grad_z=dz,
        transform=kind,
        options=address,
        option_count=count,
        n=n,
        threads=threads,
    )
    if weights:
        _CPU.autoregressive_inverse_weights(
            is_double=double,
            code=code,
            units=units,
            deltas=deltas,
            stride=stride,
            grad_packed=dpacked,
            n=n,
            threads=threads,
        )
    if statics is not None:
        _static_gradients(code.tolist(), units[:, :n], deltas[:, :n], dstatics)
    return dz, dpacked, dstatics


def _cuda_forward(
    z: Tensor, packed: Tensor, statics: Tensor | None, code: Tensor, transform: str, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    _check_forward(z, packed, statics, code, transform, options)
    return _cuda.forward(z, packed, statics, code, transform, options)


def _like(t: Tensor | None, z: Tensor) -> Tensor | None:
    return None if t is None else t.to(z.dtype).contiguous()


def _stride(n: int) -> int:
    """Whole vectors, an odd number of 16: rows a power of two apart would fall on the same places of the cache."""
    return ((n + 15) // 16 | 1) * 16


def _static_gradients(code: list[int], units: Tensor, deltas: Tensor, out: Tensor) -> None:
    """A context's gradient is its product's cotangent; a gate's is the point's, times what it multiplied."""
    inputs, _, levels, layers = code[:4]
    at = reference.PROGRAM_HEADER + inputs + levels
    for i in range(layers):
        _, activation, _, _, first, count, _, context, gate, sources, _ = code[at + 11 * i : at + 11 * i + 11]
        if context >= 0:
            out[:, context : context + count] = deltas[first : first + count].t()
        if gate >= 0:
            argument = units[code[sources : sources + count]]
            out[:, gate : gate + count] = (
                deltas[first : first + count] * reference.program_activation(activation, argument)
            ).t()


def _backward(ctx: Any, grad_x: Tensor | None, grad_logdet: Tensor | None) -> tuple[Any, ...]:
    (z, x, packed, statics, code), (transform, options) = ctx.saved_tensors, ctx.options
    if grad_x is None and grad_logdet is None:
        return (None,) * 6
    if transform == "bernoulli":  # constant wherever it is differentiable, so a weight's gradient is zero, not missing
        return None, torch.zeros_like(packed) if ctx.needs_input_grad[1] else None, None, None, None, None
    dz, dpacked, dstatics = OP_BACKWARD(
        grad_x, grad_logdet, z, x, packed, statics, code, transform, options, ctx.needs_input_grad[1]
    )
    return dz, dpacked if ctx.needs_input_grad[1] else None, None if statics is None else dstatics, None, None, None


def _gather_reference(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return torch.cat([x.new_zeros((*x.shape[:-1], 1)), x], -1).index_select(-1, index)


def _check_gather(x: Tensor, index: Tensor, inverse: Tensor) -> None:
    _check.floating("gather_once", x=x)
    for name, t in (("index", index), ("inverse", inverse)):
        if t.dim() != 1:
            raise ValueError(f"gather_once: {name} has shape {tuple(t.shape)}, expected a vector")
    if not x.dim():
        raise ValueError("gather_once: x has shape (), expected at least one axis")
    if len(inverse) != x.shape[-1]:
        raise ValueError(f"gather_once: x has shape {tuple(x.shape)}, expected a last axis of {len(inverse)}")


def _backward_gather(ctx: Any, grad: Tensor | None) -> tuple[Any, ...]:
    index, inverse = ctx.saved_tensors
    return None if grad is None else gather_once(grad, inverse, index), None, None


OP_BACKWARD = Op(
    f"{_NAME}_backward(Tensor? grad_x, Tensor? grad_logdet, Tensor z, Tensor x, Tensor packed, Tensor? statics, "
    "Tensor code, str transform, float[] options, bool weights)",
    reference=reference.autoregressive_inverse_backward,
    outputs={
        "z": "contiguous like z",
        "packed": "contiguous like packed if weights",
        "statics": "contiguous like statics if statics is not None",
    },
    check=_check_backward,
    argument_dtypes={"code": (torch.int64,)},
    kernels={"cpu": _cpu_backward, "cuda": _cuda.backward},
    dtypes=_CUDA_DTYPES,
)

OP = Op(
    f"{_NAME}(Tensor z, Tensor packed, Tensor? statics, Tensor code, str transform, float[] options)",
    reference=reference.autoregressive_inverse,
    outputs={"x": "contiguous like z", "logdet": "(N,) like z as accumulator"},
    argument_dtypes={"code": (torch.int64,)},
    check=_check_forward,
    kernels={"cpu": _cpu, "cuda": _cuda_forward},
    dtypes=_CUDA_DTYPES,
    saves="z, x, packed, statics, code",
    backward=_backward,
)

# y[..., i] = x[..., index[i] - 1], zero where index[i] is 0. No element is taken twice, so the derivative is the same
# gather with the inverse places, where that of index_select adds element by element (40 times slower on the weights of
# a MADE).
gather_once = Op(
    "gather_once(Tensor x, Tensor index, Tensor inverse)",
    reference=_gather_reference,
    argument_dtypes={"index": (torch.int32, torch.int64), "inverse": (torch.int32, torch.int64)},
    check=_check_gather,
    outputs={"y": "(*x.shape[:-1], index.shape[0]) like x"},
    kernels={},
    saves="index, inverse",
    backward=_backward_gather,
)


def autoregressive_inverse(
    z: Tensor,
    program: DegreeProgram,
    transform: str = "affine:exp",
    *,
    flip: bool = False,
    scale_first: bool = False,
    eps: float = 1e-3,
    slope: float = 1e-3,
    bins: int = 8,
    tails: str | None = "linear",
    bound: float | None = None,
    convention: str = "nflows",
    left: float = 0.0,
    right: float = 1.0,
    bottom: float = 0.0,
    top: float = 1.0,
    min_bin_width: float = 1e-3,
    min_bin_height: float = 1e-3,
    min_derivative: float = 1e-3,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Inverts an autoregressive transformation: solves z_i = f(x_i; theta_i(x)) for x, one level of inputs after the
    other.

    theta (N, D, P) is what the program's network makes of x, where theta_i depends on inputs of lower levels only, so
    that each unit of the network is computed once, as soon as what it depends on is solved: one pass in place of D.

    Differentiable in z, in the network's weights and in its contexts and gates, to any order; the backward is a sweep
    through the levels in reverse, in which again each unit is visited once.

    Args:
        z: (N, D) floating point; half types are computed in float32.
        program: the network, a :class:`genfast.sampling.DegreeProgram`, with this batch's contexts and gates.
        transform: "affine:exp" s = exp(a); "affine:softclamp" log s = a / (1 + |a / log slope|), zuko's;
            "affine:sigmoid2" s = sigmoid(a + 2) + eps, normflows'; "affine:softplus" s = softplus(a) + eps, nflows';
            "affine:additive" s = 1, theta the shift alone. "bernoulli": x_i = 1 where z_i, a uniform number, is below
            sigmoid(theta_i), else 0; not differentiable, its logdet 0.
            "spline": z_i = :func:`genfast.ops.rational_quadratic_spline_packed` of x_i, theta_i its parameters.
        flip: x = s z + t, the other way round; else z = s x + t, x = (z - t) / s. So for the spline.
        scale_first: theta_i is (a, t); else (t, a).
        eps: added to the scales "sigmoid2" and "softplus".
        slope: of "softclamp" and of zuko's splines.
        bins, ...: the spline's, as there; bound is a number.

    Returns:
        x (N, D) like z, and logdet (N,) = log |det dx/dz|, float32 for half types.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: Papamakarios, Pavlakou, Murray 2017 (arXiv:1705.07057, section 3); the order of levels: genfast's.

    Example:
        >>> import torch, genfast
        >>> mask = torch.ones(3, 3).tril(-1).repeat_interleave(2, 0)
        >>> program = genfast.sampling.DegreeProgram.build([genfast.sampling.Layer(torch.randn(6, 3), mask=mask)])
        >>> x, logdet = genfast.ops.autoregressive_inverse(torch.randn(5, 3), program)
    """
    _check.floating(_NAME, z=z)
    options: list[float] = []
    if transform == "spline":
        _check.choice(_NAME, "convention", convention, CONVENTIONS)
        where, domain, _ = spline_domain(
            _NAME, tails, bound, 5.0 if convention == "zuko" else 1.0, left, right, bottom, top
        )
        _check.choice(_NAME, "tails", where, TAILS)
        zuko = convention == "zuko"
        minimums = [0.0, 0.0, 0.0] if zuko else [min_bin_width, min_bin_height, min_derivative]
        options = [float(flip), bins, TAILS.index(where), float(zuko), *domain, *minimums, slope, logit_scale]
    elif transform != "bernoulli":
        constant = math.log(slope) if transform == "affine:softclamp" else eps
        options = [float(flip), float(scale_first), constant]
    wide = accumulator(z.dtype)
    x, logdet = OP(z.to(wide), program.packed(wide), program.statics(wide), program.code, transform, options)
    return x.to(z.dtype), logdet
