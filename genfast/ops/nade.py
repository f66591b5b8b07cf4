"""ops.nade and ops.nade_sample: a neural autoregressive distribution estimator in O(D H) time and O(H) memory a
sample."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check

_NAME = "nade"
_CPU = kernels(
    "_cpu",
    nade="""
        is_double activation x weight readout hidden_bias own_hidden_bias rescale n d p h threads kind? bias? uniforms?
        known?
        out? grad? grad_x? grad_weight? grad_readout? grad_bias? grad_hidden_bias? grad_rescale?
    """,
)
ACTIVATIONS = ("sigmoid", "relu", "tanh")
KINDS = ("bernoulli", "categorical", "gaussian_mixture")


def _check_weights(
    op: str,
    rows: int,
    dims: int,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor | None,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
) -> None:
    if weight.dim() != 2 or weight.shape[0] != dims or not weight.shape[1]:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}, expected ({dims}, H), a row for each dimension of x"
        )
    hidden = weight.shape[1]
    if readout.dim() != 3 or not readout.shape[1]:
        raise ValueError(f"{op}: readout has shape {tuple(readout.shape)}, expected ({dims}, P, {hidden})")
    _check.shape(op, "readout", readout, (dims, readout.shape[1], hidden), "(D, P, H)")
    if bias is not None:
        _check.shape(op, "bias", bias, (dims, readout.shape[1]), "(D, P)")
    if tuple(hidden_bias.shape) not in ((hidden,), (rows, hidden)):
        raise ValueError(
            f"{op}: hidden_bias has shape {tuple(hidden_bias.shape)}, expected {(hidden,)} or {(rows, hidden)}"
        )
    if rescale is not None:
        _check.shape(op, "rescale", rescale, (dims,), "one per dimension")
    _check.choice(op, "activation", activation, ACTIVATIONS)


def _check_forward(
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
) -> None:
    _check.floating(_NAME, x=x, weight=weight, readout=readout, bias=bias, hidden_bias=hidden_bias, rescale=rescale)
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"{_NAME}: x has shape {tuple(x.shape)}, expected (N, D)")
    _check_weights(_NAME, x.shape[0], x.shape[1], weight, readout, bias, hidden_bias, rescale, activation)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
    need_x: bool,
) -> None:
    op = f"{_NAME}_backward"
    _check.floating(op, grad=grad, x=x, weight=weight, readout=readout, hidden_bias=hidden_bias, rescale=rescale)
    if x.dim() != 2 or not x.shape[1]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (N, D)")
    _check_weights(op, x.shape[0], x.shape[1], weight, readout, None, hidden_bias, rescale, activation)
    _check.shapes(op, grad=(grad, (*x.shape, readout.shape[1]), "(N, D, P)"))


def _check_sample(
    uniforms: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    given: Tensor | None,
    known: Tensor | None,
    activation: str,
    kind: str,
) -> None:
    op = "nade_sample"
    _check.floating(
        op,
        uniforms=uniforms,
        weight=weight,
        readout=readout,
        bias=bias,
        hidden_bias=hidden_bias,
        rescale=rescale,
        given=given,
    )
    _check.choice(op, "kind", kind, KINDS)
    count = 2 if kind == "gaussian_mixture" else 1
    if uniforms.dim() != 3 or uniforms.shape[2] != count or not uniforms.shape[1]:
        raise ValueError(
            f"{op}: uniforms has shape {tuple(uniforms.shape)}, expected (N, D, {count}) for kind={kind!r}"
        )
    _check_weights(op, uniforms.shape[0], uniforms.shape[1], weight, readout, bias, hidden_bias, rescale, activation)
    size = readout.shape[1]
    if (
        (kind == "bernoulli" and size != 1)
        or (kind == "gaussian_mixture" and size % 3)
        or (kind == "categorical" and size < 2)
    ):
        wanted = {"bernoulli": "1", "categorical": "at least 2 levels", "gaussian_mixture": "a multiple of 3"}[kind]
        raise ValueError(f"{op}: readout has {size} parameters a dimension, expected {wanted} for kind={kind!r}")
    if (given is None) != (known is None):
        raise ValueError(
            f"{op}: {'known' if given is None else 'given'} is there alone, expected both of given and known"
        )
    if given is not None and known is not None:
        _check.shape(op, "given", given, tuple(uniforms.shape[:2]), "(N, D)")
        _check.shape(op, "known", known, tuple(uniforms.shape[:2]), "(N, D)")
        if known.dtype is not torch.bool:
            raise TypeError(f"{op}: known has dtype {known.dtype}, expected torch.bool")
        if known.device != uniforms.device:
            raise ValueError(
                f"{op}: known is on {known.device} and uniforms on {uniforms.device}; move both to one device"
            )


# A program of the Triton kernels holds all hidden units of its samples in registers.
_UNITS = 4096
_TRITON = _backend.triton_kernel(_NAME, _NAME, _check_forward)
_TRITON_SAMPLE = _backend.triton_kernel(_NAME, f"{_NAME}_sample", _check_sample)


def _triton(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    found: Tensor = _TRITON(x, weight, *rest) if weight.shape[1] <= _UNITS else OP.checked_reference(x, weight, *rest)
    return found


def _triton_sample(uniforms: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    few = weight.shape[1] <= _UNITS
    found: Tensor = (_TRITON_SAMPLE if few else OP_SAMPLE.checked_reference)(uniforms, weight, *rest)
    return found


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def weights(d: int, p: int, h: int) -> tuple[Tensor, ...]:
        return rand(d, h), rand(d, p, h, scale=h**-0.5), rand(d, p), rand(h)

    binary = (rand(5, 7) > 0).double()
    yield Sample("binary", (binary, *weights(7, 1, 19), None, "sigmoid"))
    yield Sample("real, rescaled", (rand(3, 5), *weights(5, 6, 33), rand(5, scale=0.3) + 0.7, "tanh"))
    w, v, b, _ = weights(6, 1, 5)
    yield Sample("a hidden bias a sample", (rand(4, 6), w, v, b, rand(4, 5), None, "relu"))
    yield Sample("longer than a block", (rand(2, 37), *weights(37, 2, 3), None, "sigmoid"))


def _dense(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [t if t is None else t.to(dtype).contiguous() for t in tensors]


def _cpu(
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
) -> Tensor:
    _check_forward(x, weight, readout, bias, hidden_bias, rescale, activation)
    (n, d), (_, p, h), dtype = x.shape, readout.shape, x.dtype
    x, weight, readout, bias, hidden_bias, rescale = _dense(dtype, x, weight, readout, bias, hidden_bias, rescale)
    out = _allocator.empty_strided((n, d, p), (d * p, p, 1), dtype)
    _CPU.nade(
        is_double=dtype is torch.float64,
        activation=ACTIVATIONS.index(activation),
        x=x,
        weight=weight,
        readout=readout,
        bias=bias,
        hidden_bias=hidden_bias,
        own_hidden_bias=hidden_bias.dim() == 2,
        rescale=rescale,
        out=out,
        n=n,
        d=d,
        p=p,
        h=h,
        threads=torch.get_num_threads(),
    )
    return out


def _cpu_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
    need_x: bool,
) -> tuple[Tensor, ...]:
    (n, d), (_, p, h), dtype = x.shape, readout.shape, x.dtype
    if not n:  # no sample, and no address by which the kernel knows a backward
        return tuple(
            t.zero_() for t in OP.backward_op.empty(grad, x, weight, readout, hidden_bias, rescale, activation, need_x)
        )
    w, v, c, rho = _dense(dtype, weight, readout, hidden_bias, rescale)
    g, steps = grad.to(dtype).transpose(0, 1).contiguous(), x.t().contiguous()
    dx = torch.empty_like(steps) if need_x else None
    dw, dv, db, dc = torch.empty_like(w), torch.empty_like(v), v.new_empty((d, p)), torch.empty_like(c)
    drho = None if rho is None else torch.empty_like(rho)
    _CPU.nade(
        is_double=dtype is torch.float64,
        activation=ACTIVATIONS.index(activation),
        grad=g,
        x=steps,
        weight=w,
        readout=v,
        hidden_bias=c,
        own_hidden_bias=c.dim() == 2,
        rescale=rho,
        grad_x=dx,
        grad_weight=dw,
        grad_readout=dv,
        grad_bias=db,
        grad_hidden_bias=dc,
        grad_rescale=drho,
        n=n,
        d=d,
        p=p,
        h=h,
        threads=torch.get_num_threads(),
    )
    return (
        x.new_empty(0) if dx is None else dx.t().contiguous(),
        dw.to(weight.dtype),
        dv.to(readout.dtype),
        db.to(readout.dtype),
        dc.to(hidden_bias.dtype),
        x.new_empty(0) if rescale is None or drho is None else drho.to(rescale.dtype),
    )


def _cpu_sample(
    uniforms: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    given: Tensor | None,
    known: Tensor | None,
    activation: str,
    kind: str,
) -> Tensor:
    _check_sample(uniforms, weight, readout, bias, hidden_bias, rescale, given, known, activation, kind)
    (n, d, _), (_, p, h), dtype = uniforms.shape, readout.shape, uniforms.dtype
    u, w, v, b, c, rho, values = _dense(dtype, uniforms, weight, readout, bias, hidden_bias, rescale, given)
    mask = None if known is None else known.contiguous()
    out = uniforms.new_empty((n, d))
    _CPU.nade(
        is_double=dtype is torch.float64,
        activation=ACTIVATIONS.index(activation),
        kind=1 + KINDS.index(kind),
        x=values,
        uniforms=u,
        known=mask,
        weight=w,
        readout=v,
        bias=b,
        hidden_bias=c,
        own_hidden_bias=c.dim() == 2,
        rescale=rho,
        out=out,
        n=n,
        d=d,
        p=p,
        h=h,
        threads=torch.get_num_threads(),
    )
    return out


OP = Op(
    "nade(Tensor x, Tensor weight, Tensor readout, Tensor bias, Tensor hidden_bias, Tensor? rescale, str activation)",
    reference=reference.nade,
    outputs={"p": "(N, C, readout.shape[1]) like x"},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _triton},
    backward=Backward(
        "grad, x, weight, readout, hidden_bias, rescale, activation, need_x -> x, weight, readout, bias, hidden_bias, "
        "rescale",
        outputs={
            "x": "contiguous like x",
            "weight": "contiguous like weight",
            "readout": "contiguous like readout",
            "bias": "(N, C) like readout",
            "hidden_bias": "contiguous like hidden_bias",
        },
        reference=reference.nade_backward,
        check=_check_backward,
        kernels={"cpu": _cpu_backward, "triton": _NAME},
    ),
    samples=_samples,
)

OP_SAMPLE = Op(
    "nade_sample(Tensor uniforms, Tensor weight, Tensor readout, Tensor bias, Tensor hidden_bias, Tensor? rescale, "
    "Tensor? given, Tensor? known, str activation, str kind)",
    reference=reference.nade_sample,
    outputs={"x": "(N, C) like uniforms"},
    argument_dtypes={"known": (torch.bool,)},
    check=_check_sample,
    kernels={"cpu": _cpu_sample, "triton": _triton_sample},
)


def nade(
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    *,
    rescale: Tensor | None = None,
    activation: str = "sigmoid",
) -> Tensor:
    """The conditionals of a NADE: a_1 = c; h_d = act(rho_d a_d); p_d = b_d + V_d h_d; a_{d+1} = a_d + W_d x_d.

    One pass of O(D H) a sample, and O(H) memory: no array of N x D x H is made, neither forward nor backward.

    Args:
        x: (N, D) floating point: binary, grey levels in [0, 1], or real.
        weight: W, (D, H).
        readout: V, (D, P, H), and ``bias`` b, (D, P): P parameters of each p(x_d | x_<d), such as one logit.
        hidden_bias: c, (H,), or (N, H): one for each sample, by which a condition enters.
        rescale: rho, (D,), as RNADE has it, or None for ones.
        activation: "sigmoid", "relu" or "tanh".

    Returns:
        (N, D, P): logits, not probabilities, in x's dtype; output d depends on x_<d alone.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: Larochelle, Murray 2011 (NADE, PMLR 15, section 3); Uria, Murray, Larochelle 2013 (arXiv:1306.0186, equation
        5).

    Example:
        >>> import torch, genfast
        >>> x, w, v = torch.ones(2, 8), torch.randn(8, 16), torch.randn(8, 1, 16)
        >>> logits = genfast.ops.nade(x, w, v, torch.zeros(8, 1), torch.zeros(16))
    """
    result: Tensor = OP(x, weight, readout, bias, hidden_bias, rescale, activation)
    return result


@torch.no_grad()
def nade_sample(
    uniforms: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    *,
    rescale: Tensor | None = None,
    activation: str = "sigmoid",
    kind: str = "bernoulli",
    given: Tensor | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """Samples of a NADE in one pass over its D dimensions, where a loop over :func:`nade` takes D passes.

    Args:
        uniforms: (N, D, U) in [0, 1): U = 1, and 2 for a mixture: which component, then its normal deviate.
        weight, readout, bias, hidden_bias, rescale, activation: as :func:`nade` takes them.
        kind: "bernoulli": P = 1, x_d = 1 where u < sigmoid(p_d). "categorical": P levels, x_d = level / (P - 1), the
            smallest level whose cumulative probability exceeds u. "gaussian_mixture": P = 3 K: K logits, K means, K log
            deviations; the normal deviate is the inverse distribution function of the second number.
        given, known: (N, D) values, and bool (N, D) where they hold: what is known stays, the rest is drawn in its
            order, each dimension knowing those before it.

    Returns:
        x (N, D), in the dtype of ``uniforms``; it has no derivative. NaN where the parameters say nothing that could be
        drawn.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: as :func:`nade`.

    Example:
        >>> import torch, genfast
        >>> w, v, b, c = torch.randn(8, 16), torch.randn(8, 1, 16), torch.zeros(8, 1), torch.zeros(16)
        >>> x = genfast.ops.nade_sample(torch.rand(4, 8, 1), w, v, b, c)
    """
    result: Tensor = OP_SAMPLE(uniforms, weight, readout, bias, hidden_bias, rescale, given, known, activation, kind)
    return result
