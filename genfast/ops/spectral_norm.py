"""ops.spectral_norm: power iterations, the largest singular value and the scaled weight in one op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Op, Sample
from .._spectral_axes import dense, from_memory, to_memory
from . import _check

_NAME = "spectral_norm"
_CPU = kernels(
    "_cpu",
    spectral_norm="is_double from_v weight u v sigma out a h b iterations eps threads",
    spectral_norm_backward="is_double weight grad u v sigma out grad_sigma a h b threads",
)


def _check_forward(weight: Tensor, u: Tensor, v: Tensor | None, iterations: int, eps: float, dim: int) -> None:
    _check.floating(_NAME, weight=weight, u=u, v=v)
    if weight.dim() < 2 or not weight.numel():
        raise ValueError(
            f"{_NAME}: weight has shape {tuple(weight.shape)}, expected two axes or more, none of them empty"
        )
    if not 0 <= dim < weight.dim():
        raise ValueError(f"{_NAME}: dim={dim}, expected an axis of the weight of shape {tuple(weight.shape)}")
    _check.shape(_NAME, "u", u, (weight.shape[dim],), f"one per index of axis {dim} of the weight")
    if v is not None:
        _check.shape(_NAME, "v", v, (weight.numel() // weight.shape[dim],), f"one per index of the axes but {dim}")
    if iterations < 0 or (v is None and not iterations):
        least = "at least 1, or 0 with v" if v is None else "at least 0"
        raise ValueError(f"{_NAME}: iterations={iterations}, expected {least}")
    if not eps > 0:
        raise ValueError(f"{_NAME}: eps={eps}, expected a positive number")


def _check_backward(
    grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int
) -> None:
    _check_forward(weight, u, v, 0, 1.0, dim)
    _check.shapes(
        f"{_NAME}_backward",
        grad=(grad, weight.shape, "that of weight"),
        grad_sigma=(grad_sigma, (), "a scalar"),
        sigma=(sigma, (), "a scalar"),
    )


def _fake(
    weight: Tensor, u: Tensor, v: Tensor | None, iterations: int, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = weight.dtype if weight.element_size() >= 4 else torch.float32
    columns = weight.numel() // weight.shape[dim]
    return torch.empty_like(weight), u.new_empty(u.shape), u.new_empty(columns), weight.new_empty((), dtype=wide)


def _fake_backward(grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weight)


def _cpu(
    weight: Tensor, u: Tensor, v: Tensor | None, iterations: int, eps: float, dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_forward(weight, u, v, iterations, eps, dim)
    dtype, given = weight.dtype, u.dtype
    weight, a = dense(weight, dim)
    left = u.to(dtype, copy=True).contiguous()
    right = weight.new_empty(a.a * a.b) if v is None else to_memory(v.to(dtype, copy=True), a).contiguous()
    out, sigma = _allocator.empty_like(weight), weight.new_empty(())
    _CPU.spectral_norm(
        is_double=dtype is torch.float64,
        from_v=v is not None,
        weight=weight,
        u=left,
        v=right,
        sigma=sigma,
        out=out,
        iterations=iterations,
        eps=eps,
        a=a.a,
        h=a.h,
        b=a.b,
        threads=torch.get_num_threads(),
    )
    return out, left.to(given), from_memory(right, a).to(given), sigma


def _cpu_backward(
    grad: Tensor | None, grad_sigma: Tensor | None, weight: Tensor, u: Tensor, v: Tensor, sigma: Tensor, dim: int
) -> Tensor:
    dtype = weight.dtype
    weight, a = dense(weight, dim)
    out = _allocator.empty_like(weight)
    if grad is None:
        grad = torch.zeros_like(weight)
    elif grad.dtype is not dtype or grad.stride() != weight.stride():
        grad = torch.empty_like(weight).copy_(grad)
    u, v, sigma = u.to(dtype).contiguous(), to_memory(v.to(dtype), a).contiguous(), sigma.to(dtype)
    grad_sigma = None if grad_sigma is None else grad_sigma.to(dtype)
    _CPU.spectral_norm_backward(
        is_double=dtype is torch.float64,
        grad=grad,
        grad_sigma=grad_sigma,
        weight=weight,
        u=u,
        v=v,
        sigma=sigma,
        out=out,
        a=a.a,
        h=a.h,
        b=a.b,
        threads=torch.get_num_threads(),
    )
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, u, v, sigma = output
    ctx.dim = inputs[5]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], u, v, sigma)


def _backward(
    ctx: Any, grad: Tensor | None, _u: Tensor | None, _v: Tensor | None, grad_sigma: Tensor | None
) -> tuple[Any, ...]:
    if grad is None and grad_sigma is None:
        return (None,) * 6
    weight, u, v, sigma = ctx.saved_tensors
    # u and v are constants by definition; sigma is not, and carries the higher derivatives.
    return _OP_BACKWARD(grad, grad_sigma, weight, u.detach(), v.detach(), sigma, ctx.dim), *(None,) * 5


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    # Without iterations, where u and v do not move with the weight: with them a difference quotient is no derivative.
    for label, shape, dim in (
        ("linear", (6, 9), 0),
        ("linear, dim 1", (6, 9), 1),
        ("convolution", (5, 3, 2, 4), 0),
        ("transposed convolution", (4, 5, 3, 3), 1),
        ("sequences, dim 2", (3, 4, 5), 2),
    ):
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        u, _, v = torch.linalg.svd(weight.movedim(dim, 0).flatten(1), full_matrices=False)
        u, v = (w + 0.1 * torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in (u[:, 0], v[0]))
        yield Sample(label, (weight, u / u.norm(), v / v.norm(), 0, 1e-12, dim), constant=(1, 2))


_OP_BACKWARD = Op(
    "spectral_norm_backward(Tensor? grad, Tensor? grad_sigma, Tensor weight, Tensor u, Tensor v, Tensor sigma, int "
    "dim) -> Tensor",
    reference=reference.spectral_norm_backward,
    check=_check_backward,
    check_before_kernels=True,
    fake=_fake_backward,
    kernels={"cpu": _cpu_backward, "triton": _backend.triton_kernel(_NAME, f"{_NAME}_backward")},
)

OP = Op(
    "spectral_norm(Tensor weight, Tensor u, Tensor? v, int iterations, float eps, int dim) -> (Tensor, Tensor, "
    "Tensor, Tensor)",
    reference=reference.spectral_norm,
    check=_check_forward,
    fake=_fake,
    kernels={"cpu": _cpu, "triton": _backend.triton_kernel(_NAME, _NAME, _check_forward)},
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
)


def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor | None = None, *, iterations: int = 1, eps: float = 1e-12, dim: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weight over its largest singular value, which power iterations estimate: W / sigma, sigma = u^T W v.

    W is the weight as a matrix: axis ``dim`` first, the others flattened. An iteration sets v = W^T u / max(|W^T u|,
        eps),
    then u = W v / max(|W v|, eps). With ``v`` given it sets u first and then v, which is what
    torch.nn.utils.parametrizations.spectral_norm does. u and v count as constants in every derivative.

    Args:
        weight: floating point, two axes or more.
        u: (weight.shape[dim],), the last estimate of the left singular vector; not changed.
        v: (weight.numel() / weight.shape[dim],) or None.
        iterations: power iterations; 0 takes u and v as they are and needs ``v``.
        eps: the least norm by which a vector is divided.
        dim: the axis of outputs: 0, or 1 for transposed convolutions; may be negative.

    Returns:
        (weight / sigma, u, v, sigma): the weight in its dtype and strides; the new u and v, in u's dtype and without
        gradient; sigma a scalar, float32 for half-precision weights. Differentiable in the weight to any order.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: SN-GAN (arXiv:1802.05957, algorithm 1).

    Example:
        >>> import torch, genfast
        >>> w, u = torch.randn(8, 3, 3, 3), torch.randn(8)
        >>> normed, u, v, sigma = genfast.ops.spectral_norm(w, u, iterations=3)
    """
    if isinstance(weight, Tensor) and dim < 0:
        dim += weight.dim()
    normed, left, right, sigma = OP(weight, u, v, iterations, eps, dim)
    return normed, left.detach(), right.detach(), sigma
