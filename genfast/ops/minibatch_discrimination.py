"""ops.minibatch_discrimination and its pairwise part, in memory that grows with N and not with N^2."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check

_NAME = "pairwise_l1_kernel_sum"
_FAMILY = "minibatch_discrimination"
_CPU = kernels("_cpu", pairwise_l1="is_double include_self m grad tangent out grad_m n b c threads")


def _check_forward(m: Tensor, include_self: bool) -> None:
    _check.floating(_NAME, m=m)
    if m.dim() != 3:
        raise ValueError(f"{_NAME}: m has shape {tuple(m.shape)}, expected (N, B, C)")


def _check_backward(m: Tensor, grad: Tensor) -> None:
    _check_forward(m, True)
    _check.shapes(f"{_NAME}_backward", grad=(grad, m.shape[:2], "one per sample and kernel"))


def _call(
    m: Tensor, include_self: bool, grad: Tensor | None, tangent: Tensor | None, out: Tensor, grad_m: Tensor
) -> None:
    n, b, c = m.shape
    if not m.numel():  # no differences: every kernel is 1
        grad_m.zero_()
        out.fill_(float(n - (not include_self)) if grad is None else 0.0)
        return
    _CPU.pairwise_l1(
        is_double=m.dtype is torch.float64,
        include_self=include_self,
        m=m,
        grad=grad,
        tangent=tangent,
        out=out,
        grad_m=grad_m,
        n=n,
        b=b,
        c=c,
        threads=torch.get_num_threads(),
    )


def _cpu(m: Tensor, include_self: bool) -> Tensor:
    _check_forward(m, include_self)
    out = m.new_empty(m.shape[:2])
    _call(m.contiguous(), include_self, None, None, out, m.new_empty(0))
    return out


def _cpu_backward(m: Tensor, grad: Tensor) -> Tensor:
    dm = torch.empty_like(m, memory_format=torch.contiguous_format)
    _call(m.contiguous(), True, grad.to(m.dtype).contiguous(), None, m.new_empty(0), dm)
    return dm


def _cpu_second(m: Tensor, grad: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    g = grad.to(m.dtype).contiguous()
    dg, dm = torch.empty_like(g), torch.empty_like(m, memory_format=torch.contiguous_format)
    _call(m.contiguous(), True, g, tangent.to(m.dtype).contiguous(), dg, dm)
    return dg.to(grad.dtype), dm


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape in (("pairs", (5, 3, 4)), ("more kernels than lanes", (3, 18, 2)), ("one feature", (6, 2, 1))):
        for include_self in (True, False):
            m = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield Sample(f"{label}{'' if include_self else ', others alone'}", (m, include_self))


OP = Op(
    "pairwise_l1_kernel_sum(Tensor m, bool include_self)",
    reference=reference.pairwise_l1_kernel_sum,
    outputs={"sums": "(N, C) like m as accumulator"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _FAMILY},
    backward=Backward(
        "m, grad -> m",
        outputs={"m": "contiguous like m"},
        reference=reference.pairwise_l1_kernel_sum_backward,
        check=_check_backward,
        kernels={"cpu": _cpu_backward, "triton": _FAMILY},
        backward=Backward(
            "m, grad, grad_m -> grad, m",
            name="pairwise_l1_kernel_sum_second_backward",
            outputs={"grad": "contiguous like grad", "m": "contiguous like m"},
            reference=reference.pairwise_l1_kernel_sum_second_backward,
            kernels={"cpu": _cpu_second, "triton": _FAMILY},
        ),
    ),
    samples=_samples,
)


def pairwise_l1_kernel_sum(m: Tensor, *, include_self: bool = True) -> Tensor:
    """How alike the samples of a batch are: o_ib = sum_j exp(-sum_c |m_ibc - m_jbc|).

    Forward, backward and second backward keep memory in proportion to N: no array over pairs is made. The derivative of
    |.| at zero is zero, and its second derivative zero everywhere. A third derivative is taken through the reference,
    which keeps the pairs.

    Args:
        m: (N, B, C) floating point: B kernels of C features.
        include_self: counts j = i, which adds 1.

    Returns:
        (N, B), float32 for half-precision m. **Couples the samples of a batch**: each output depends on all of them.

    Raises:
        TypeError, ValueError: integers, or an m that is not (N, B, C).

    Source: Salimans et al. (arXiv:1606.03498, section 3.2).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.pairwise_l1_kernel_sum(torch.zeros(3, 2, 5))[0]
        tensor([3., 3.])
    """
    result: Tensor = OP(m, include_self)
    return result


def minibatch_discrimination(x: Tensor, weight: Tensor, *, include_self: bool = True) -> Tensor:
    """Minibatch discrimination: o_ib = sum_j exp(-|M_ib - M_jb|_1) with M = x T, for a critic to see a batch's variety.

    The product is the library's; the sum over pairs is :func:`pairwise_l1_kernel_sum`, whose memory grows with N and
    which a gradient penalty may differentiate (the backward of torch.cdist has no derivative).

    **Couples the samples of a batch**: a critic with this layer has no per-sample gradient, and a penalty on the norm
        of
    its input gradient is not what the penalty's paper means.

    Args:
        x: (N, A) floating point features.
        weight: T, (A, B, C), in x's dtype.
        include_self: counts j = i, as the paper does; it adds 1.

    Returns:
        (N, B), to be concatenated to x; float32 for half-precision x.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: Salimans et al. (arXiv:1606.03498, section 3.2).

    Example:
        >>> import torch, genfast
        >>> o = genfast.ops.minibatch_discrimination(torch.randn(16, 32), torch.randn(32, 10, 5))
    """
    _check.floating(_FAMILY, x=x, weight=weight)
    if x.dim() != 2:
        raise ValueError(f"{_FAMILY}: x has shape {tuple(x.shape)}, expected (N, A); flatten what the critic gives")
    if weight.dim() != 3 or weight.shape[0] != x.shape[1]:
        raise ValueError(
            f"{_FAMILY}: weight has shape {tuple(weight.shape)}, expected ({x.shape[1]}, B, C): A as x's last axis"
        )
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{_FAMILY}: weight has dtype {weight.dtype} and x {x.dtype}, expected the same")
    m = (x @ weight.flatten(1)).unflatten(1, weight.shape[1:])
    return pairwise_l1_kernel_sum(m, include_self=include_self)
