"""ops.interpolate: points between real and generated samples, one random weight a sample."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._layout import describe, layout
from ._rows import per_batch, rows

_NAME = "interpolate"
_CPU = kernels(
    "_cpu",
    interpolate_backward="""
        is_double real fake grad epsilon grad_real grad_fake grad_epsilon n d real_stride fake_stride grad_stride
        threads
    """,
)


def _check_pair(real: Tensor, fake: Tensor) -> None:
    for name, t in (("real", real), ("fake", fake)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{_NAME}: {name} is a {type(t).__name__}, expected a torch.Tensor")
    _check.floating(_NAME, real=real, fake=fake)
    if real.dim() < 1 or real.shape != fake.shape:
        raise ValueError(
            f"{_NAME}: real has shape {tuple(real.shape)} and fake {tuple(fake.shape)}, expected the same shape (N, "
            "...); cut the larger batch to the smaller one's size"
        )


def _check_forward(real: Tensor, fake: Tensor, epsilon: Tensor) -> None:
    _check_pair(real, fake)
    _check.floating(_NAME, real=real, epsilon=epsilon)
    if real.dim() < 2:
        raise ValueError(f"{_NAME}: real has shape {tuple(real.shape)}, expected (N, ...) with two axes or more")
    _check.shape(_NAME, "epsilon", epsilon, (real.shape[0],), "one per sample")


@functools.lru_cache(1024)
def _plan(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    dtype: torch.dtype,
    fakes: tuple[int, ...],
    fake_stride: tuple[int, ...],
    fake_dtype: torch.dtype,
    es: tuple[int, ...],
    e_dtype: torch.dtype,
) -> tuple[tuple[int, ...], bool] | None:
    """epsilon's shape beside the samples, and whether lerp's own output will do; None where something must be
    checked."""
    if (
        len(shape) < 2
        or shape != fakes
        or es != shape[:1]
        or not (dtype == fake_dtype == e_dtype and dtype.is_floating_point)
    ):
        return None
    return (shape[0], *(1,) * (len(shape) - 1)), stride == fake_stride and describe(shape, stride).small


def _cpu(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    plan = _plan(
        real.shape, real.stride(), real.dtype, fake.shape, fake.stride(), fake.dtype, epsilon.shape, epsilon.dtype
    )
    if plan is None:
        _check_forward(real, fake, epsilon)
        return _cpu(real, fake.to(real.dtype), epsilon.to(real.dtype))
    column, own = plan
    if own:
        return torch.lerp(fake, real, epsilon.reshape(column))
    y = layout(real).empty_like(real)
    return torch.lerp(fake, real, epsilon.reshape(column), out=y)


def _cpu_backward(
    grad: Tensor, real: Tensor, fake: Tensor, epsilon: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    fake_dtype = fake.dtype
    real, r = rows(real)
    fake, f = rows(fake.to(real.dtype), r)
    grad, g = rows(grad.to(real.dtype), r)
    e = per_batch(epsilon, real.dtype)
    found = (
        r.layout.empty_like(real) if wanted[0] else real.new_empty(0),
        r.layout.empty_like(real) if wanted[1] else real.new_empty(0),
        torch.empty_like(e) if wanted[2] else e.new_empty(0),
    )
    grad_real, grad_fake, grad_epsilon = (t if w else None for t, w in zip(found, wanted))
    _CPU.interpolate_backward(
        is_double=real.dtype is torch.float64,
        grad=grad,
        grad_stride=g.stride,
        real=real,
        real_stride=r.stride,
        fake=fake,
        fake_stride=f.stride,
        epsilon=e,
        grad_real=grad_real,
        grad_fake=grad_fake,
        grad_epsilon=grad_epsilon,
        n=r.n,
        d=r.size,
        threads=torch.get_num_threads(),
    )
    return found[0], found[1].to(fake_dtype), found[2].to(epsilon.dtype)


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape in (("images", (3, 5, 4, 7)), ("vectors", (6, 9)), ("sequences", (2, 3, 11))):
        real, fake = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        yield Sample(label, (real, fake, torch.rand(shape[0], generator=generator, dtype=torch.float64)))


OP = Op(
    "interpolate(Tensor real, Tensor fake, Tensor epsilon)",
    reference=reference.interpolate,
    outputs={"y": "like real"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "grad, real, fake, epsilon, wanted -> real, fake, epsilon",
        outputs={"fake": "like fake in the order of real"},
        reference=reference.interpolate_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def interpolate(
    real: Tensor, fake: Tensor, *, epsilon: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Points between real and generated samples: y_n = e_n real_n + (1 - e_n) fake_n, one e_n for a whole sample.

    Args:
        real: (N, ...) floating point.
        fake: of real's shape and device; computed in real's dtype.
        epsilon: (N,); None draws it uniformly from [0, 1), in float32 (float64 for float64 samples).
        generator: what draws it, on real's device; None for PyTorch's own.

    Returns:
        Like real, in its dtype and memory format; differentiable in real, fake and epsilon to any order.

    Raises:
        TypeError: integer tensors.
        ValueError: shapes, devices or an epsilon that do not fit; a generator for an epsilon that is given.

    Inside torch.compile draw epsilon outside where a generator is to be used: the compiler takes no generators.

    On the CPU the forward is torch.lerp, which is one pass too, into memory that is used again.

    Source: WGAN-GP (arXiv:1704.00028, algorithm 1, line 6).

    Example:
        >>> import torch, genfast
        >>> real, fake = torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
        >>> between = genfast.ops.interpolate(real, fake)
    """
    if epsilon is None:
        _check_pair(real, fake)
        dtype = real.dtype if real.element_size() >= 4 else torch.float32
        where = real.device if generator is None else generator.device
        epsilon = torch.rand(real.shape[0], generator=generator, dtype=dtype, device=where).to(real.device)
    elif generator is not None:
        raise ValueError(f"{_NAME}: both epsilon and generator are given, expected one of them")
    if isinstance(real, Tensor) and real.dim() == 1 and isinstance(fake, Tensor) and fake.dim() == 1:
        vector: Tensor = OP(real.unsqueeze(1), fake.unsqueeze(1), epsilon)
        return vector.squeeze(1)
    result: Tensor = OP(real, fake, epsilon)
    return result
