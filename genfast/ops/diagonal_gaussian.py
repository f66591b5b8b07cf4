"""ops.diagonal_gaussian: the reparametrised sample of a diagonal Gaussian and its KL divergence from a prior, in one
pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .. import reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._rows import Rows, per_batch, rows

_NAME = "diagonal_gaussian"
_FIELDS = "is_double mean log_variance noise prior_mean prior_log_variance n d threads"
_CPU = kernels(
    "_cpu",
    diagonal_gaussian=f"{_FIELDS} kl dimension z",
    diagonal_gaussian_backward=f"""
        {_FIELDS} grad_z grad_kl grad_dimension grad_mean grad_log_variance grad_noise grad_prior_mean
        grad_prior_log_variance
    """,
)
REDUCTIONS = ("none", "mean", "sum")
GROUPS = ("dimension", "channel", "all")
_ARGUMENTS = ("mean", "log_variance", "noise", "prior_mean", "prior_log_variance")


class GaussianSample(NamedTuple):
    """z: the sample, like mean. kl: (N,) or a scalar, by ``reduction``; nats."""

    z: Tensor
    kl: Tensor


def _check_forward(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    *_: Any,
) -> None:
    given = dict(zip(_ARGUMENTS, (mean, log_variance, noise, prior_mean, prior_log_variance)))
    _check.floating(_NAME, **given)
    if mean.dim() < 2:
        raise ValueError(f"{_NAME}: mean has shape {tuple(mean.shape)}, expected (N, ...)")
    for name, tensor in given.items():
        if tensor is not None:
            _check.shape(_NAME, name, tensor, tuple(mean.shape), "that of mean")


def _check_backward(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    grad_kl: Tensor | None,
    grad_dimension: Tensor | None,
    grad_z: Tensor | None,
    wanted: Sequence[bool],
) -> None:
    _check_forward(mean, log_variance, noise, prior_mean, prior_log_variance)
    op = f"{_NAME}_backward"
    _check.shapes(
        op,
        grad_kl=(grad_kl, mean.shape[:1], "one per sample"),
        grad_z=(grad_z, mean.shape, "that of mean"),
        grad_dimension=(grad_dimension, mean.shape[1:], "one per dimension"),
    )
    _check.flags(op, "wanted", wanted, len(_ARGUMENTS))


def _in_order(mean: Tensor, others: Sequence[Tensor | None]) -> tuple[Tensor, Rows, list[tuple[Tensor, int] | None]]:
    """mean, how it lies, and for each other tensor itself in mean's order and dtype and its stride."""
    mean, r = rows(mean)
    laid: list[tuple[Tensor, int] | None] = []
    for t in others:
        if t is None:
            laid.append(None)
            continue
        t, own = rows(t if t.dtype is mean.dtype else t.to(mean.dtype), r)
        laid.append((t, own.stride))
    return mean, r, laid


def _cpu(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    per_dimension: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_forward(mean, log_variance, noise, prior_mean, prior_log_variance)
    mean, r, laid = _in_order(mean, (log_variance, noise, prior_mean, prior_log_variance))
    kl = mean.new_empty(r.n)
    by_dimension = mean.new_empty((1, *mean.shape[1:]) if per_dimension else 0)
    if per_dimension and mean.dim() > 2:
        by_dimension = torch.empty_like(by_dimension, memory_format=r.layout.form)
    z = mean.new_empty(0) if noise is None else r.layout.empty_like(mean)
    _CPU.diagonal_gaussian(
        is_double=mean.dtype is torch.float64,
        mean=(mean, r.stride),
        log_variance=laid[0],
        noise=laid[1],
        prior_mean=laid[2],
        prior_log_variance=laid[3],
        kl=kl,
        dimension=by_dimension if per_dimension else None,
        z=None if noise is None else z,
        n=r.n,
        d=r.size,
        threads=torch.get_num_threads(),
    )
    if not mean.numel():
        kl.zero_()
        by_dimension.zero_()
    return kl, by_dimension.squeeze(0).contiguous() if per_dimension else by_dimension, z


def _cpu_backward(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    grad_kl: Tensor | None,
    grad_dimension: Tensor | None,
    grad_z: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (mean, log_variance, noise, prior_mean, prior_log_variance)
    mean, r, laid = _in_order(mean, (log_variance, noise, prior_mean, prior_log_variance, grad_z))
    if grad_kl is not None:
        grad_kl = per_batch(grad_kl, mean.dtype)
    if grad_dimension is not None:
        form = r.layout.form if mean.dim() > 2 else torch.contiguous_format
        grad_dimension = grad_dimension.to(mean.dtype).unsqueeze(0).contiguous(memory_format=form)
    found = [r.layout.empty_like(mean) if t is not None and w else mean.new_empty(0) for t, w in zip(given, wanted)]
    outputs = [f if t is not None and w else None for f, t, w in zip(found, given, wanted)]
    _CPU.diagonal_gaussian_backward(
        is_double=mean.dtype is torch.float64,
        mean=(mean, r.stride),
        log_variance=laid[0],
        noise=laid[1],
        prior_mean=laid[2],
        prior_log_variance=laid[3],
        grad_z=laid[4],
        grad_kl=grad_kl,
        grad_dimension=grad_dimension,
        grad_mean=outputs[0],
        grad_log_variance=outputs[1],
        grad_noise=outputs[2],
        grad_prior_mean=outputs[3],
        grad_prior_log_variance=outputs[4],
        n=r.n,
        d=r.size,
        threads=torch.get_num_threads(),
    )
    dm, dv, dn, dpm, dpv = (f if t is None else f.to(t.dtype) for f, t in zip(found, given))
    return dm, dv, dn, dpm, dpv


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape in (("vectors", (6, 9)), ("images", (3, 5, 4, 7)), ("sequences", (2, 3, 11))):
        m, v, e, pm, pv = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5))
        yield Sample(label, (m, v, e, None, None, False))
        if label != "sequences":
            yield Sample(f"{label}, prior, per dimension", (m, v, e, pm, pv, True))
    yield Sample("without noise", (m, v, None, None, None, True))


OP = Op(
    "diagonal_gaussian(Tensor mean, Tensor log_variance, Tensor? noise, Tensor? prior_mean, Tensor? "
    "prior_log_variance, bool per_dimension)",
    reference=reference.diagonal_gaussian,
    outputs={
        "kl": "(N,) like mean as accumulator",
        "dimension": "(*mean.shape[1:]) like mean as accumulator if per_dimension",
        "z": "like mean if noise is not None",
    },
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _NAME},
    backward=Backward(
        "mean, log_variance, noise, prior_mean, prior_log_variance, grad_kl, grad_dimension, grad_z, wanted -> "
        "mean, log_variance, noise, prior_mean, prior_log_variance",
        outputs={name: f"like {name} in the order of mean" for name in _ARGUMENTS},
        reference=reference.diagonal_gaussian_backward,
        check=_check_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)


def _rows_of(t: Any) -> Any:
    return t.unsqueeze(1) if isinstance(t, Tensor) and t.dim() == 1 else t


def _like(name: str, t: Tensor | None, mean: Tensor) -> Tensor | None:
    """A prior's parameter spread over the batch."""
    if t is None or not isinstance(t, Tensor) or not isinstance(mean, Tensor) or t.shape == mean.shape:
        return t
    try:
        return t.expand(mean.shape)
    except RuntimeError:
        raise ValueError(
            f"{_NAME}: {name} has shape {tuple(t.shape)}, expected one that broadcasts to that of mean, "
            f"{tuple(mean.shape)}"
        ) from None


def _reduced(kl: Tensor, by_dimension: Tensor, n: int, free_bits: float, groups: str, reduction: str) -> Tensor:
    if not free_bits:
        return kl if reduction == "none" else kl.mean() if reduction == "mean" else kl.sum()
    mean = by_dimension / max(n, 1)
    if groups == "all":
        mean = mean.sum()
    elif groups == "channel" and mean.dim() > 1:
        mean = mean.flatten(1).sum(1)
    floored = torch.where(mean <= free_bits, free_bits, mean).sum()  # so that NaN stays NaN
    return floored if reduction == "mean" else n * floored


def _call(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None,
    prior_mean: Tensor | None,
    prior_log_variance: Tensor | None,
    free_bits: float,
    groups: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    _check.choice(_NAME, "reduction", reduction, REDUCTIONS)
    _check.choice(_NAME, "groups", groups, GROUPS)
    if not free_bits >= 0:
        raise ValueError(f"{_NAME}: free_bits={free_bits}, expected at least 0, in nats")
    if free_bits and reduction == "none":
        raise ValueError(
            f"{_NAME}: free_bits={free_bits} with reduction='none', expected 'mean' or 'sum': "
            "the floor is under the mean over the batch, so no sample has a value of its own"
        )
    priors = (_like(name, t, mean) for name, t in zip(_ARGUMENTS[3:], (prior_mean, prior_log_variance)))
    args = [_rows_of(t) for t in (mean, log_variance, noise, *priors)]
    kl, by_dimension, z = OP(*args, bool(free_bits))
    return z.reshape(mean.shape) if noise is not None and mean.dim() == 1 else z, _reduced(
        kl, by_dimension, kl.shape[0], free_bits, groups, reduction
    )


def diagonal_gaussian(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor | None = None,
    *,
    prior_mean: Tensor | None = None,
    prior_log_variance: Tensor | None = None,
    free_bits: float = 0.0,
    groups: Literal["dimension", "channel", "all"] = "dimension",
    reduction: Literal["none", "mean", "sum"] = "none",
    generator: torch.Generator | None = None,
) -> GaussianSample:
    """Samples q(z|x) = N(mean, e^log_variance) by z = mean + e^(log_variance / 2) noise, and its KL(q || p), in one
    pass.

    One pass forward and one backward, whichever of z, the KLs and both have a gradient. The kernels' KL is right near
    the prior too, where e^v - 1 - v cancels in the usual formula, and never negative. No sum depends on the number of
    threads.

    Args:
        mean, log_variance: (N, ...) floating point, such as the two halves of an encoder's output, which need not be
            copied.
        noise: like mean, from N(0, 1); None draws it with ``generator``.
        prior_mean, prior_log_variance: of the prior p, shapes that broadcast to mean's; None for 0, so p is N(0, 1)
            without.
        free_bits: the floor lambda, in nats, of sum_g max(lambda, E_batch KL_g) (Kingma et al., arXiv:1606.04934,
            appendix C.8: the mean over the batch first, then the maximum). A group at or below its floor has no
            gradient of the KL.
        groups: what a floor is for: "dimension", "channel" (axis 1, summed over the others, as in that paper), or
            "all".
        reduction: of the KLs over the batch: "none" (N,), "mean" or "sum"; "none" does not go with free bits.
        generator: of the noise.

    Returns:
        :class:`GaussianSample`: z in mean's dtype, and kl in nats, float32 for half types; differentiable to any
        order.

    Raises:
        TypeError: tensors that are not floating point.
        ValueError: shapes or devices that do not fit, another reduction or group, a negative floor, a generator for a
            noise that is given.

    Source: Kingma and Welling (arXiv:1312.6114, section 2.4 and appendix B).

    Example:
        >>> import torch, genfast
        >>> z, kl = genfast.ops.diagonal_gaussian(torch.ones(2, 3), torch.zeros(2, 3))
        >>> kl
        tensor([1.5000, 1.5000])
    """
    if noise is None:
        _check.floating(_NAME, mean=mean)
        where = mean.device if generator is None else generator.device
        noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=where).to(mean.device)
    elif generator is not None:
        raise ValueError(f"{_NAME}: both noise and generator are given, expected one of them")
    return GaussianSample(
        *_call(mean, log_variance, noise, prior_mean, prior_log_variance, free_bits, groups, reduction)
    )


def diagonal_gaussian_kl(
    mean: Tensor,
    log_variance: Tensor,
    *,
    prior_mean: Tensor | None = None,
    prior_log_variance: Tensor | None = None,
    free_bits: float = 0.0,
    groups: Literal["dimension", "channel", "all"] = "dimension",
    reduction: Literal["none", "mean", "sum"] = "none",
) -> Tensor:
    """KL(N(mean, e^log_variance) || N(prior_mean, e^prior_log_variance)) of each sample, in nats; the prior is N(0, 1)
    without.

    :func:`diagonal_gaussian` without its sample; the arguments and errors are those.

    Returns:
        (N,), or a scalar for ``reduction`` "mean" or "sum".

    Source: Kingma and Welling (arXiv:1312.6114, appendix B).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.diagonal_gaussian_kl(torch.ones(2, 3), torch.zeros(2, 3), free_bits=1.0, reduction="mean")
        tensor(3.)
    """
    return _call(mean, log_variance, None, prior_mean, prior_log_variance, free_bits, groups, reduction)[1]
