"""ops.flow_program: a whole flow, its log-determinant and its base density, as one call."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _allocator, _backend
from .._native import kernels
from .._registry import Op
from ..reference import flow_program as reference
from . import _check

_NAME = "flow_program"
_FIELDS = "is_double code options x context weights values scratch n tile threads"
_CPU = kernels(
    "_cpu",
    "flow_program_error",
    flow_program_scratch="is_double code tile threads backward again",
    flow_program=f"{_FIELDS} z total",
    flow_program_backward=f"{_FIELDS} grad_z grad_total grad_x grad_context grad_weights",
)
_FLOATS = {"cpu": (torch.float32, torch.float64)}
TILES = (32, 64, 128)  # samples that go through the program together: whole vectors of every instruction set
# Multiply-adds of a call below which one thread is sooner than two.
_SERIAL = 1 << 21

_sizes: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], int]] = {}
_checked: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...]]] = {}


def _header(code: Tensor) -> tuple[int, ...]:
    """(inputs, contexts, rows, weights, multiply-adds of a sample), read once of each program, which no one changes."""
    entry = _checked.get(id(code))
    if entry is not None and entry[0]() is code:
        return entry[1]
    numbers = code[: reference.HEADER].tolist()
    if len(_checked) > 256:
        _checked.clear()
    header = (*numbers[:4], numbers[6])
    _checked[id(code)] = weakref.ref(code), header
    return header


def _check_forward(
    x: Tensor,
    context: Tensor | None,
    weights: Tensor,
    code: Tensor,
    options: Sequence[float],
    rows: int,
    tile: int,
    keep: bool = False,
) -> None:
    _check.floating(_NAME, x=x, context=context, weights=weights)
    if code.dtype != torch.int64 or code.dim() != 1 or len(code) < reference.HEADER:
        raise ValueError(
            f"{_NAME}: code is {code.dtype} of shape {tuple(code.shape)}, expected a FlowProgram's int64 vector"
        )
    if tile not in TILES:
        raise ValueError(f"{_NAME}: tile={tile}, expected one of {', '.join(map(str, TILES))}")
    for name, t in (("context", context), ("weights", weights)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {t.dtype}, expected that of x, {x.dtype}")
    if code.is_meta or type(code) is not Tensor:  # a tracer's tensor has no numbers to read
        return
    inputs, contexts, values, size, _ = _header(code)
    if x.dim() != 2 or x.shape[1] != inputs:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, expected (N, {inputs}): the program's inputs")
    if rows != values:
        raise ValueError(f"{_NAME}: rows={rows}, expected {values}: those of the program")
    if contexts and context is None:
        raise ValueError(f"{_NAME}: context is None, expected ({len(x)}, {contexts}): the program has a context")
    if context is not None:
        _check.shape(_NAME, "context", context, (len(x), contexts), "one row for each of x")
    _check.shape(_NAME, "weights", weights, (size,), "the program's weights")


def _check_code(code: Tensor, options: Sequence[float]) -> None:
    """Raises where a number of the program would lead a kernel outside of its memory."""
    error: str = _CPU.flow_program_error(code.data_ptr(), len(code), len(options))
    if error:
        raise ValueError(f"{_NAME}: code is no FlowProgram's: {error}")


def _scratch(x: Tensor, code: Tensor, tile: int, threads: int, backward: bool, again: bool) -> Tensor:
    """The memory that a call works in, asked for once for each program and way to call it."""
    key = (id(code), x.dtype, tile, threads, backward, again)
    entry = _sizes.get(key)
    if entry is None or entry[0]() is not code:
        if len(_sizes) > 1024:
            _sizes.clear()
        size: int = _CPU.flow_program_scratch(
            is_double=x.dtype is torch.float64, code=code, tile=tile, threads=threads, backward=backward, again=again
        )
        entry = _sizes[key] = weakref.ref(code), size
    return _allocator.empty_strided((entry[1],), (1,), x.dtype)


def _threads(n: int, multiplications: int) -> int:
    return torch.get_num_threads() if n * multiplications >= _SERIAL else 1


def _cpu(
    x: Tensor,
    context: Tensor | None,
    weights: Tensor,
    code: Tensor,
    options: Sequence[float],
    rows: int,
    tile: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_forward(x, context, weights, code, options, rows, tile)
    x, weights, code = x.contiguous(), weights.contiguous(), code.contiguous()
    context = None if context is None else context.contiguous()
    n = len(x)
    z, total = torch.empty_like(x), x.new_empty(n)
    size = -(-n // tile) * (rows + 1) * tile if keep else 0
    values = _allocator.empty_strided((size,), (1,), x.dtype) if size else x.new_empty(0)
    if n:
        _check_code(code, options)
        numbers, threads = array("d", options), _threads(n, _header(code)[4])
        _CPU.flow_program(
            is_double=x.dtype is torch.float64,
            code=code,
            options=numbers.buffer_info()[0],
            x=x,
            context=context,
            weights=weights,
            z=z,
            total=total,
            values=values if size else None,
            scratch=_scratch(x, code, tile, threads, False, not size),
            n=n,
            tile=tile,
            threads=threads,
        )
    return z, total, values


def _cpu_backward(
    grad_z: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor,
    values: Tensor,
    code: Tensor,
    options: Sequence[float],
    rows: int,
    tile: int,
    need_x: bool,
    need_context: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, empty = len(x), x.new_empty(0)
    x, weights, code = x.contiguous(), weights.contiguous(), code.contiguous()
    context = None if context is None else context.contiguous()
    dx = torch.empty_like(x) if need_x else empty
    dcontext = torch.empty_like(context) if context is not None and need_context else empty
    dweights = torch.empty_like(weights)
    if not n:
        return dx, dcontext, dweights.zero_()
    _check_code(code, options)
    grad_z, grad_total = (None if g is None else g.to(x.dtype).contiguous() for g in (grad_z, grad_total))
    numbers, threads = array("d", options), _threads(n, 3 * _header(code)[4])
    _CPU.flow_program_backward(
        is_double=x.dtype is torch.float64,
        code=code,
        options=numbers.buffer_info()[0],
        x=x,
        context=context,
        weights=weights,
        values=values if len(values) else None,
        grad_z=grad_z,
        grad_total=grad_total,
        grad_x=dx if need_x else None,
        grad_context=dcontext if context is not None and need_context else None,
        grad_weights=dweights,
        scratch=_scratch(x, code, tile, threads, True, not len(values)),
        n=n,
        tile=tile,
        threads=threads,
    )
    return dx, dcontext, dweights


def _check_backward(
    grad_z: Tensor | None,
    grad_total: Tensor | None,
    x: Tensor,
    context: Tensor | None,
    weights: Tensor,
    values: Tensor,
    code: Tensor,
    options: Sequence[float],
    rows: int,
    tile: int,
    need_x: bool,
    need_context: bool,
) -> None:
    _check_forward(x, context, weights, code, options, rows, tile)
    _check.shapes(
        f"{_NAME}_backward",
        grad_z=(grad_z, x.shape, "that of x"),
        grad_total=(grad_total, x.shape[:1], "one per sample"),
    )
    size = -(-len(x) // tile) * (rows + 1) * tile
    if len(values):
        _check.shape(f"{_NAME}_backward", "values", values, (size,), "what the forward wrote, or nothing")
    if values.dtype != x.dtype:
        raise TypeError(f"{_NAME}_backward: values has dtype {values.dtype}, expected that of x, {x.dtype}")


_ARGUMENTS = "Tensor x, Tensor? context, Tensor weights"
OP_BACKWARD = Op(
    f"{_NAME}_backward(Tensor? grad_z, Tensor? grad_total, {_ARGUMENTS}, Tensor values, Tensor code, float[] options, "
    "int rows, int tile, bool need_x, bool need_context)",
    reference=reference.flow_program_backward,
    outputs={
        "x": "contiguous like x if need_x",
        "context": "contiguous like context if context is not None and need_context",
        "weights": "contiguous like weights",
    },
    check=_check_backward,
    argument_dtypes={"code": (torch.int64,)},
    kernels={"cpu": _cpu_backward},
    check_before_kernels=True,
    dtypes=_backend.DTYPES | _FLOATS,
    may_be_empty=("values",),
)


def _backward(
    ctx: Any, grad_z: Tensor | None, grad_total: Tensor | None, grad_values: Tensor | None
) -> tuple[Any, ...]:
    (x, context, weights, values, code), (options, rows, tile, _) = ctx.saved_tensors, ctx.options
    if grad_z is None and grad_total is None:
        return (None,) * 8
    need_x, need_context = ctx.needs_input_grad[0], context is not None and ctx.needs_input_grad[1]
    dx, dcontext, dweights = OP_BACKWARD(
        grad_z, grad_total, x, context, weights, values, code, options, rows, tile, need_x, need_context
    )
    return (dx if need_x else None, dcontext if need_context else None, dweights, *(None,) * 5)


OP = Op(
    f"{_NAME}({_ARGUMENTS}, Tensor code, float[] options, int rows, int tile, bool keep)",
    reference=reference.flow_program,
    outputs={
        "z": "contiguous like x",
        "total": "(N,) like x as accumulator",
        "values": "((x.shape[0] + tile - 1) // tile * (rows + 1) * tile) like x if keep",
    },
    argument_dtypes={"code": (torch.int64,)},
    check=_check_forward,
    kernels={"cpu": _cpu},
    dtypes=_backend.DTYPES | _FLOATS,
    saves="x, context, weights, values, code",
    backward=_backward,
)
