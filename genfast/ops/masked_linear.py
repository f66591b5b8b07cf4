"""ops.masked_linear: a linear layer whose mask is a staircase, over its live weights only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _allocator, reference
from .._derived import readable_now
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._autocast import autocast

_NAME = "masked_linear"
_FIELDS = "is_double rows columns counts x x_row weight weight_row n outputs inputs threads"
_CPU = kernels(
    "_cpu", masked_linear=f"{_FIELDS} relu bias out", masked_linear_backward=f"{_FIELDS} grad grad_row y y_row dx dw db"
)
_ACTIVATIONS = ("none", "relu")


class Staircase(NamedTuple):
    """A mask (O, I) that sorting turns into a staircase: sorted output r sees the first ``counts[r]`` sorted inputs.

    Made by :func:`staircase` or :func:`staircase_from_mask`, once for a layer; all three are int64 on one device.

    Attributes:
        rows: (O,) which output comes r-th, a permutation.
        columns: (I,) which input comes k-th, a permutation.
        counts: (O,) live inputs of the r-th output, nondecreasing, 0 to I.
    """

    rows: Tensor
    columns: Tensor
    counts: Tensor

    @property
    def mask(self) -> Tensor:
        """Which weights are live, bool (O, I)."""
        return reference.staircase_mask(*self)

    def to(self, device: torch.device | str) -> Staircase:
        """The same on another device."""
        return Staircase(*(t.to(device) for t in self))


def _degrees(name: str, argument: str, value: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(value)
    if found.dim() != 1 or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(
            f"{name}: {argument} has dtype {found.dtype} and shape {tuple(found.shape)}, expected numbers (n,)"
        )
    return found


def staircase(
    in_degrees: Tensor | Sequence[int], out_degrees: Tensor | Sequence[int], strict: bool = False
) -> Staircase:
    """The mask that is live where an output's degree is at least an input's, or above it if ``strict``.

    Args:
        in_degrees: (I,) numbers.
        out_degrees: (O,) numbers on the same device.
        strict: as of MADE's output layer.

    Returns:
        A :class:`Staircase`.

    Raises:
        ValueError: degrees that are no vectors of numbers.

    Source: MADE (arXiv:1502.03509, section 4).

    Example:
        >>> import torch
        >>> from genfast.ops.masked_linear import staircase
        >>> staircase([1, 2, 3], [1, 2], strict=True).mask.int()
        tensor([[0, 0, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    found = _degrees("staircase", "in_degrees", in_degrees), _degrees("staircase", "out_degrees", out_degrees)
    return Staircase(*reference.staircase(*found, strict))


def staircase_from_mask(mask: Tensor) -> Staircase | None:
    """The staircase that a mask (O, I) is, its zeros dead; None where no sorting makes it one.

    Example:
        >>> import torch
        >>> from genfast.ops.masked_linear import staircase_from_mask
        >>> staircase_from_mask(torch.tensor([[1, 0], [1, 1]])).counts
        tensor([1, 2])
        >>> staircase_from_mask(torch.eye(2)) is None
        True
    """
    _check.tensors("staircase_from_mask", mask=mask)
    if mask.dim() != 2:
        raise ValueError(f"staircase_from_mask: mask has shape {tuple(mask.shape)}, expected (O, I)")
    live = mask != 0
    # Where live sets are nested, an input that is seen more often stands in every set that a rarer one stands in.
    seen = live.sum(1)
    rows = seen.argsort(stable=True)
    found = Staircase(rows, live.sum(0).argsort(stable=True, descending=True), seen[rows])
    return found if torch.equal(found.mask, live) else None


def _check_integers(name: str, like: Tensor, **tensors: tuple[Any, int]) -> None:
    for argument, (t, size) in tensors.items():
        if not isinstance(t, Tensor) or t.dtype != torch.int64:
            raise TypeError(
                f"{name}: {argument} is {getattr(t, 'dtype', type(t).__name__)}, expected a torch.int64 tensor"
            )
        _check.shape(name, argument, t, (size,))
        if t.device != like.device:
            raise ValueError(f"{name}: {argument} is on {t.device} and x on {like.device}; move both to one device")


def _check_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, counts: Tensor, activation: str
) -> None:
    _check.floating(_NAME, x=x, weight=weight, bias=bias)
    for name, t in (("x", x), ("weight", weight)):
        if t.dim() != 2:
            raise ValueError(f"{_NAME}: {name} has shape {tuple(t.shape)}, expected two axes")
    out, inputs = weight.shape
    if x.shape[1] != inputs:
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}, expected (N, {inputs}) for a weight {tuple(weight.shape)}"
        )
    if bias is not None:
        _check.shape(_NAME, "bias", bias, (out,), "one per output")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is not None and other.dtype != x.dtype:
            raise TypeError(f"{_NAME}: {name} has dtype {other.dtype} and x {x.dtype}, expected one dtype")
    _check_integers(_NAME, x, rows=(rows, out), columns=(columns, inputs), counts=(counts, out))
    _check.choice(_NAME, "activation", activation, _ACTIVATIONS)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    counts: Tensor,
    wanted: Sequence[bool],
) -> None:
    _check_forward(x, weight, None, rows, columns, counts, "none")
    op, of = f"{_NAME}_backward", (x.shape[0], weight.shape[0])
    _check.shapes(op, grad=(grad, of, "that of the output"), y=(y, of, "that of the output"))
    _check.same_dtype(op, x.dtype, grad=grad, y=y)
    _check.flags(op, "wanted", wanted, 3)


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """A matrix whose rows are contiguous, copied only where it must be, and how far apart they lie."""
    row, column = t.stride()
    if column != 1 and t.shape[1] != 1:
        t = t.contiguous()
        row = t.stride(0)
    return t, row


def _empty(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised, dense."""
    if rows * columns * 8 < _allocator.MINIMUM:
        return torch.empty((rows, columns), dtype=dtype)
    return _allocator.empty_strided((rows, columns), (columns, 1), dtype)


def _no_staircase(counts: Tensor) -> ValueError:
    return ValueError(
        f"{_NAME}: rows, columns and counts {tuple(counts.shape)} are no staircase: expected two permutations and "
        "nondecreasing counts of 0 to I, as the staircase of an nn.MaskedLinear holds them"
    )


def _check_values(rows: Tensor, columns: Tensor, counts: Tensor) -> None:
    """For the reference: the kernels look at the numbers themselves."""
    _check.permutation(_NAME, "rows", rows)
    _check.permutation(_NAME, "columns", columns)
    if not counts.is_cpu or not readable_now(counts) or not len(counts):
        return
    if int(counts[0]) < 0 or int(counts[-1]) > len(columns) or bool((counts.diff() < 0).any()):
        raise _no_staircase(counts)


def _reference(*args: Any) -> Tensor:
    _check_values(*args[3:6])
    return reference.masked_linear(*args)


def _reference_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check_values(*args[4:7])
    return reference.masked_linear_backward(*args)


_CHECKED: set[Any] = set()  # calls that passed, by everything that the check looks at


def _cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, columns: Tensor, counts: Tensor, activation: str
) -> Tensor:
    dtype = x.dtype
    key = (
        x.shape,
        dtype,
        weight.shape,
        weight.dtype,
        None if bias is None else (bias.shape, bias.dtype),
        rows.shape,
        rows.dtype,
        columns.shape,
        columns.dtype,
        counts.shape,
        counts.dtype,
        activation,
    )
    if key not in _CHECKED:
        _check_forward(x, weight, bias, rows, columns, counts, activation)
        if len(_CHECKED) >= 4096:
            _CHECKED.clear()
        _CHECKED.add(key)
    (x, x_row), (weight, weight_row) = _rows(x), _rows(weight)
    bias = None if bias is None else bias.contiguous()
    rows, columns, counts = rows.contiguous(), columns.contiguous(), counts.contiguous()
    n, (outputs, inputs) = x.shape[0], weight.shape
    y = _empty(n, outputs, dtype)
    if not _CPU.masked_linear(
        is_double=dtype is torch.float64,
        relu=activation == "relu",
        rows=rows,
        columns=columns,
        counts=counts,
        x=x,
        x_row=x_row,
        weight=weight,
        weight_row=weight_row,
        bias=bias,
        out=y,
        n=n,
        outputs=outputs,
        inputs=inputs,
        threads=torch.get_num_threads(),
    ):
        raise _no_staircase(counts)
    return y


def _cpu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    y: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    counts: Tensor,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n, (outputs, inputs), dtype = x.shape[0], weight.shape, x.dtype
    dx = _empty(n, inputs, dtype) if wanted[0] else x.new_empty(0)
    dw = _empty(outputs, inputs, dtype) if wanted[1] else x.new_empty(0)
    db = x.new_empty(outputs if wanted[2] else 0)
    if not n * outputs * inputs:
        return dx.zero_(), dw.zero_(), grad.sum(0) if wanted[2] else db
    (grad, grad_row), (x, x_row), (weight, weight_row) = _rows(grad), _rows(x), _rows(weight)
    y, y_row = (None, 0) if y is None else _rows(y)
    rows, columns, counts = rows.contiguous(), columns.contiguous(), counts.contiguous()
    if not _CPU.masked_linear_backward(
        is_double=dtype is torch.float64,
        rows=rows,
        columns=columns,
        counts=counts,
        grad=grad,
        grad_row=grad_row,
        x=x,
        x_row=x_row,
        weight=weight,
        weight_row=weight_row,
        y=y,
        y_row=y_row,
        dx=dx if wanted[0] else None,
        dw=dw if wanted[1] else None,
        db=db if wanted[2] else None,
        n=n,
        outputs=outputs,
        inputs=inputs,
        threads=torch.get_num_threads(),
    ):
        raise _no_staircase(counts)
    return dx, dw, db


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def made(label: str, n: int, degrees: Tensor, out: Tensor, strict: bool, bias: bool, activation: str) -> Sample:
        shapes = ((n, len(degrees)), (len(out), len(degrees)), (len(out),))
        x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        return Sample(label, (x, w, b if bias else None, *reference.staircase(degrees, out, strict), activation))

    def drawn(size: int, low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (size,), generator=generator)

    yield made("first layer, relu", 5, torch.arange(1, 6), drawn(9, 1, 4).sort().values, False, True, "relu")
    yield made("outputs reversed", 7, drawn(9, 1, 4), torch.arange(5, 0, -1).repeat_interleave(3), True, True, "none")
    yield made("one input", 3, torch.ones(1), torch.tensor([0, 1, 1]), False, False, "none")
    yield made("whole and broken tiles", 19, torch.arange(1, 90), drawn(77, 1, 88).sort().values, False, True, "relu")
    yield made("shuffled", 14, drawn(70, 1, 30), drawn(83, 0, 31), True, False, "relu")
    yield made("one sample", 1, torch.arange(40, 0, -1), drawn(37, 1, 40), False, True, "none")


_INTEGERS: dict[str, tuple[torch.dtype, ...] | None] = dict.fromkeys(Staircase._fields, (torch.int64,))

OP = Op(
    "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor rows, Tensor columns, Tensor counts, str activation)",
    reference=_reference,
    outputs={"y": "(N, weight.shape[0]) like x"},
    argument_dtypes=_INTEGERS,
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad, x, weight, y, rows, columns, counts, wanted -> x, weight, bias",
        saved={"y": "y if activation == 'relu' else None"},
        outputs={"x": "contiguous like x", "weight": "contiguous like weight", "bias": "(weight.shape[0],) like x"},
        reference=_reference_backward,
        check=_check_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def masked_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, mask: Staircase, activation: str = "none"
) -> Tensor:
    """A linear layer of a masked autoencoder, y = act(x (W o M)^T + b), over the live weights only.

    On the CPU float32 and float64 go through products that end where a panel of outputs ends its terms, so that half of
    a square layer's FLOPs are done and no masked weight is made; up to four samples are dot products with the weight as
    it lies. Outputs whose degrees neither rise nor fall are spread over their places, which the sorted units of
    nn.MADENetwork need not be. A call of very few operations (layers of some 32 units, or 64 with batches below 64)
    costs up to 5 us more than the library's two, which a form that called them would pay too. Half types on the CPU run
    the reference.

    Args:
        x: (*, I) floating point, any strides.
        weight: (O, I) in x's dtype and in the user's own order. It is never changed; dead weights do not reach the
            output whatever they hold, and their gradient is exactly zero.
        bias: (O,) or None.
        mask: the ``staircase`` of a :class:`genfast.nn.MaskedLinear`, on x's device.
        activation: "none" or "relu", fused.

    Returns:
        (*, O).

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: MADE (arXiv:1502.03509, section 4).

    Example:
        >>> import torch, genfast
        >>> mask = genfast.nn.MaskedLinear([1, 2, 3], [1, 1, 2, 2]).staircase
        >>> genfast.ops.masked_linear(torch.randn(5, 3), torch.randn(4, 3), mask=mask, activation="relu").shape
        torch.Size([5, 4])
    """
    if not isinstance(x, Tensor) or not x.dim():
        raise TypeError(f"{_NAME}: x is {x!r}, expected a torch.Tensor (*, I)")
    x, weight, bias = autocast(x, weight, bias)
    if x.dim() == 2:
        result: Tensor = OP(x, weight, bias, *mask, activation)
        return result
    y: Tensor = OP(x.reshape(-1, x.shape[-1]), weight, bias, *mask, activation)
    return y.view(*x.shape[:-1], y.shape[-1])
