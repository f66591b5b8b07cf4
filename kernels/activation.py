"""Pointwise activations between the layers of a critic, and what a gradient penalty needs of them (DESIGN section 8).

    leaky relu   y = x where x > 0, s x elsewhere, and the signs as one bit an element; applied, y = x where the bit is
    set,
                 s x elsewhere
    smooth s     chain = grad s'(x);   second = cotangent s'(x) + grad tangent s''(x)

Dense tensors in one order. One pass each: in float32 8.125 bytes an element for the leaky relu, 12 for the chain, 16 to
20 for
the second, and at most some 40 FLOPs: all bound by memory bandwidth. Eight elements make a byte, so a program takes
    BLOCK bytes
by eight elements; bits of rows are padded to whole bytes (BYTES a row), bits of a whole tensor are those of one row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format
from ._common import Aot, Choice, cdiv, every, options, tiles_choice, variant
from ._math import inverse, tanh

# Elements of a program and of a thread. Leaky relu: its bits are an eighth as many bytes.
TUNABLE = {
    "leaky": Choice(dict(tile=2048, each=16), every(tile=(1024, 2048, 4096, 8192), each=(8, 16, 32))),
    "smooth": tiles_choice(),
}
KINDS = {
    k: i for i, k in enumerate(("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "softplus", "elu", "selu", "mish"))
}


@triton.jit
def _leaky(x, y, bits, slope, columns, row_bytes, total, APPLY: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.arange(0, 8)[None, :]
    row = byte // row_bytes
    column = (byte % row_bytes)[:, None] * 8 + place
    inside = (byte < total)[:, None] & (column < columns)
    at = row[:, None] * columns + column
    v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    if APPLY:
        kept = tl.load(bits + byte, mask=byte < total, other=0).to(tl.int32)
        on = ((kept[:, None] >> place) & 1) != 0
    else:
        on = v > 0
        made = tl.sum(on.to(tl.int32) << place, axis=1)
        tl.store(bits + byte, made.to(tl.uint8), mask=byte < total)
    if RELU:  # 0 even of infinity; a NaN, which has no sign, stays one where the sign is x's own
        rest = tl.zeros_like(v) if APPLY else tl.where(v == v, 0.0, v)
    else:
        rest = v * slope
    tl.store(y + at, tl.where(on, v, rest).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gated(x, q, q1, q2):
    """s = x sigmoid(q(x))."""
    e = tl.exp(-tl.abs(q))
    big = inverse(1.0 + e)
    p = tl.where(q < 0, e * big, big)
    rest = tl.where(q < 0, big, e * big)
    slope = p * rest
    return p + x * slope * q1, slope * (2 * q1 + x * (q2 + q1 * q1 * (rest - p)))


@triton.jit
def _normal(x):
    """The normal distribution function, whose lower tail 0.5 + 0.5 erf(x / sqrt 2) would cancel away below -1.

    There half of e^(-z^2) times a polynomial in u = 1 / (1 + 0.4 z), z = -x / sqrt 2, as in csrc/cpu/vec.h.
    """
    z = tl.where(x < 0, -0.7071067811865476 * x, 0.0)
    u = 1.0 / (1.0 + 0.4 * z)
    p = -0.0298686284891798 * u + 0.14384106928340988
    p = p * u - 0.24304173183552104
    p = p * u + 0.14680324567174768
    p = p * u - 0.053793166327015024
    p = p * u + 0.087120641642657829
    p = p * u + 0.11809512301367547
    p = p * u + 0.17189057191666254
    p = p * u + 0.20760072039703961
    p = p * u + 0.22567631692737903
    p = p * u + 0.22567583145616354
    tail = tl.where(z < 14.0, 0.5 * p * u * tl.exp(-z * z), 0.0)
    return tl.where(x < -1.0, tail, 0.5 + 0.5 * tl.erf(x * 0.7071067811865476))


@triton.jit
def _slopes(x, KIND: tl.constexpr):
    """s'(x) and s''(x)."""
    if KIND == 0:  # silu
        first, second = _gated(x, x, tl.full(x.shape, 1.0, tl.float32), tl.zeros_like(x))
    elif KIND == 1:  # gelu
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        first = _normal(x) + x * density
        second = tl.where(density == 0, 0.0, (2 - x * x) * density)  # where x^2 may be infinite
    elif KIND == 2:  # gelu_tanh, flat beyond 30
        z = tl.where(x > 30, 30.0, tl.where(x < -30, -30.0, x))
        k2 = 1.5957691216057308
        first, second = _gated(z, k2 * z * (1 + 0.044715 * z * z), k2 * (1 + 0.134145 * z * z), k2 * 0.26829 * z)
    elif KIND == 3:  # tanh, from e^-2|x|
        e = tl.exp(-2 * tl.abs(x))
        r = inverse(1.0 + e)
        first = 4 * e * r * r
        second = first * (-2 * tanh(x, e))
    elif KIND == 4 or KIND == 5:  # sigmoid, softplus
        e = tl.exp(-tl.abs(x))
        big = inverse(1.0 + e)
        p = tl.where(x < 0, e * big, big)
        rest = tl.where(x < 0, big, e * big)
        if KIND == 4:
            first = p * rest
            second = first * (rest - p)
        else:
            first = tl.where(x > 20, 1.0, p)
            second = tl.where(x > 20, 0.0, p * rest)
    elif KIND == 6 or KIND == 7:  # elu, selu
        e = tl.exp(tl.where(x > 0, 0.0, x))
        if KIND == 7:
            first = tl.where(x > 0, 1.0507009873554805, 1.7580993408473768 * e)
            second = tl.where(x > 0, 0.0, 1.7580993408473768 * e)
        else:
            first = tl.where(x > 0, 1.0, e)
            second = tl.where(x > 0, 0.0, e)
    else:  # mish = x w, w = tanh(softplus(x)) = n / (n + 2), n = e (e + 2), e = e^x; w' = (1 - w^2) p
        z = tl.where(x > 20, 20.0, tl.where(x < -100, -100.0, x))
        e = tl.exp(z)
        n = e * (e + 2)
        r = inverse(n + 2)
        w = n * r
        rest = inverse(1.0 + e)
        p = e * rest
        slope = 2 * r * (1 + w) * p
        first = w + z * slope
        second = slope * (2 + z * (rest - 2 * w * p))
    return first, second


@triton.jit
def _smooth(
    x,
    grad,
    tangent,
    cotangent,
    y,
    size,
    KIND: tl.constexpr,
    SECOND: tl.constexpr,
    COTANGENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    first, second = _slopes(tl.load(x + at, mask=inside, other=0).to(tl.float32), KIND)
    g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
    if SECOND:
        out = g * tl.load(tangent + at, mask=inside, other=0).to(tl.float32) * second
        if COTANGENT:
            out += tl.load(cotangent + at, mask=inside, other=0).to(tl.float32) * first
    else:
        out = g * first
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


def _dense(x: Tensor, like: Tensor | None = None) -> Tensor:
    return x.contiguous(memory_format=memory_format(x if like is None else like))


def _launch(x: Tensor, y: Tensor, bits: Tensor, slope: float, apply: bool) -> None:
    rows, columns = (x.shape[0], x.shape[1]) if bits.dim() == 2 else (1, x.numel())
    row_bytes = cdiv(columns, 8)
    total = rows * row_bytes
    if total:
        choice = TUNABLE["leaky"].of(x.element_size())
        elements, each = choice["tile"], choice["each"]
        _leaky[(cdiv(total, elements // 8),)](
            x,
            y,
            bits,
            slope,
            columns,
            row_bytes,
            total,
            APPLY=apply,
            RELU=slope == 0,
            BLOCK=elements // 8,
            **options(elements, False, each=each),
        )


def leaky_relu_bits(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """(y, bits) of genfast::leaky_relu_bits."""
    x = _dense(x)
    y, bits = torch.empty_like(x), torch.empty(cdiv(x.numel(), 8), dtype=torch.uint8, device=x.device)
    _launch(x, y, bits, slope, False)
    return y, bits


def row_signs_(x: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """Leaky relu of a fresh x (N, M), in place where it is dense, and the bits of its rows."""
    x = x.contiguous()
    bits = torch.empty((x.shape[0], cdiv(x.shape[1], 8)), dtype=torch.uint8, device=x.device)
    _launch(x, x, bits, slope, False)
    return x, bits


def apply_bits(x: Tensor, bits: Tensor, slope: float) -> Tensor:
    """y of genfast::apply_bits."""
    x = _dense(x)
    y = torch.empty_like(x)
    _launch(x, y, bits.contiguous(), slope, True)
    return y


def _run(x: Tensor, grad: Tensor, tangent: Tensor | None, cotangent: Tensor | None, kind: str) -> Tensor:
    x = _dense(x)
    y = torch.empty_like(x)
    others = [x if t is None else _dense(t.to(x.dtype), x) for t in (tangent, cotangent)]
    if x.numel():
        choice = TUNABLE["smooth"].of(x.element_size())
        elements, each = choice["tile"], choice["each"]
        _smooth[(cdiv(x.numel(), elements),)](
            x,
            _dense(grad.to(x.dtype), x),
            *others,
            y,
            x.numel(),
            KIND=KINDS[kind],
            SECOND=tangent is not None,
            COTANGENT=cotangent is not None,
            BLOCK=elements,
            **options(elements, False, each=each),
        )
    return y


def activation_chain(x: Tensor, grad: Tensor, kind: str) -> Tensor:
    """y of genfast::activation_chain."""
    return _run(x, grad, None, None, kind)


def activation_second(x: Tensor, grad: Tensor, tangent: Tensor, cotangent: Tensor | None, kind: str) -> Tensor:
    """y of genfast::activation_second."""
    return _run(x, grad, tangent, cotangent, kind)


def _variants() -> list[Aot]:
    found = []
    for kind in ("fp32", "bf16", "fp16"):
        names = ("x", "y", "grad", "tangent", "cotangent")
        pointers = dict.fromkeys(names, f"*{kind}") | {"bits": "*u8", "slope": "fp32"}

        def add(label: str, kernel: Any, pointers: Any = pointers, **constants: Any) -> None:
            types = {name: pointers[name] for name in kernel.arg_names if name in pointers}
            choice = TUNABLE["leaky" if kernel is _leaky else "smooth"]
            block = choice["tile"] // (8 if kernel is _leaky else 1)
            launch = options(choice["tile"], False, each=choice["each"])
            found.append(variant(f"{label} {kind}", kernel, types, constants | {"BLOCK": block}, (), **launch))  # noqa: B023

        for apply in (False, True):
            for relu in (False, True):
                add(f"{'apply ' if apply else ''}{'relu' if relu else 'leaky'}", _leaky, APPLY=apply, RELU=relu)
        for name, number in KINDS.items():
            add(f"{name} chain", _smooth, KIND=number, SECOND=False, COTANGENT=False)
            if kind == "fp32":
                add(f"{name} second", _smooth, KIND=number, SECOND=True, COTANGENT=True)
    return found


AOT = _variants()
