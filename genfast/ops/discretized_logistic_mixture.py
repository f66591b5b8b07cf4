"""ops.discretized_logistic_mixture_nll and _sample: the output layer of PixelCNN++, each in one pass over its
parameters."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from .. import _backend, reference
from .._derived import readable_now
from .._native import kernels
from .._registry import Backward, Op, Sample
from . import _check
from ._layout import describe, laid_out

_FAMILY = "discretized_logistic_mixture"
_NLL, _SAMPLE = f"{_FAMILY}_nll", f"{_FAMILY}_sample"
_FIELDS = "is_double params n s mixtures channels levels threads"
_CPU = kernels(
    "_cpu",
    logistic_mixture_nll=f"{_FIELDS} x x_bytes x_signed nll channels_last stream",
    logistic_mixture_nll_backward=f"{_FIELDS} x x_bytes x_signed grad grad_params channels_last stream",
    logistic_mixture_sample=f"{_FIELDS} uniforms samples temperature",
)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_STREAM = 1 << 22  # bytes from which outputs are written past the caches
_MOST_LEVELS = 1 << 16


def _mixtures(op: str, params_shape: tuple[int, ...], channels: int, levels: int) -> int:
    """K, or an error."""
    if channels not in (1, 3):
        raise ValueError(f"{op}: got {channels} channels, expected 1 or 3")
    if not 2 <= levels <= _MOST_LEVELS:
        raise ValueError(f"{op}: levels={levels}, expected 2 to {_MOST_LEVELS}")
    each = 10 if channels == 3 else 3
    if len(params_shape) < 2 or not params_shape[1] or params_shape[1] % each:
        raise ValueError(
            f"{op}: params has shape {tuple(params_shape)}, expected (N, {each}K, ...) for {channels} "
            f"channel{'s' if channels > 1 else ''}: K logits, and of each channel K means"
            f"{', K log-scales and K coefficients' if channels == 3 else ' and K log-scales'}"
        )
    return params_shape[1] // each


def integers(op: str, x: Tensor, params_name: str, params: Tensor) -> None:
    """x holds integers and lies on the same device as params."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x is a {type(x).__name__}, expected a torch.Tensor")
    if x.dtype not in _INTEGERS:
        raise TypeError(
            f"{op}: x has dtype {x.dtype}, expected integer levels ({', '.join(str(d)[6:] for d in _INTEGERS)})"
        )
    if x.device != params.device:
        raise ValueError(f"{op}: x is on {x.device} and {params_name} on {params.device}; move both to one device")


def within(op: str, x: Tensor, levels: int) -> None:
    """All values of x are levels. One pass over x, which no compiled graph and no functorch transform makes.

    A GPU asserts it when it gets there, as it does for PyTorch's own indices: to raise here would wait for it.
    """
    if not readable_now(x):
        return
    info = torch.iinfo(x.dtype)
    if (info.min >= 0 and info.max < levels) or not x.numel():
        return
    if x.is_cuda:
        torch._assert_async(((x >= 0) & (x < levels)).all(), f"{op}: x has values that are not in 0 to levels - 1")
        return
    low, high = (int(t) for t in torch.aminmax(x))
    if low < 0 or high >= levels:
        raise ValueError(f"{op}: x has values from {low} to {high}, expected 0 to levels - 1 = {levels - 1}")


def _check_shapes(ps: tuple[int, ...], xs: tuple[int, ...], levels: int) -> int:
    if len(xs) < 2 or len(xs) != len(ps) or xs[0] != ps[0] or xs[2:] != ps[2:]:
        raise ValueError(
            f"{_NLL}: x has shape {tuple(xs)} and params {tuple(ps)}; expected x (N, 1 or 3, ...) with the batch and "
            "positions of params"
        )
    return _mixtures(_NLL, ps, xs[1], levels)


def _check_forward(params: Tensor, x: Tensor, levels: int) -> None:
    _check.floating(_NLL, params=params)
    integers(_NLL, x, "params", params)
    _check_shapes(params.shape, x.shape, levels)


@functools.lru_cache(1024)
def _plan(
    ps: tuple[int, ...],
    p_stride: tuple[int, ...],
    dtype: torch.dtype,
    xs: tuple[int, ...],
    x_stride: tuple[int, ...],
    x_dtype: torch.dtype,
    levels: int,
) -> tuple[Any, Any] | None:
    """The two kernels, prepared; None where something must be copied or refused first."""
    if x_dtype not in _INTEGERS or not dtype.is_floating_point:
        return None
    mixtures = _check_shapes(ps, xs, levels)
    a, b = describe(ps, p_stride), describe(xs, x_stride)
    if not a.fits or not b.fits:
        return None
    fields = {
        "is_double": dtype is torch.float64,
        "params": a.strides,
        "x": b.strides,
        "x_bytes": x_dtype.itemsize,
        "x_signed": x_dtype is not torch.uint8,
        "n": a.n,
        "s": a.s,
        "mixtures": mixtures,
        "channels": xs[1],
        "levels": levels,
        "channels_last": a.walks_channels,
        "stream": a.n * a.c * a.s * dtype.itemsize >= _STREAM,
    }
    return _CPU.logistic_mixture_nll.prepare(**fields), _CPU.logistic_mixture_nll_backward.prepare(**fields)


def _planned(params: Tensor, x: Tensor, levels: int) -> tuple[Tensor, Tensor, tuple[Any, Any]]:
    plan = _plan(params.shape, params.stride(), params.dtype, x.shape, x.stride(), x.dtype, levels)
    if plan is not None:
        return params, x, plan
    _check_forward(params, x, levels)
    return _planned(laid_out(params)[0], laid_out(x)[0], levels)


def _cpu(params: Tensor, x: Tensor, levels: int) -> Tensor:
    params, x, (kernel, _) = _planned(params, x, levels)
    out = params.new_empty((params.shape[0], *params.shape[2:]))
    kernel(params=params, x=x, nll=out, threads=torch.get_num_threads())
    return out


def _cpu_backward(params: Tensor, x: Tensor, grad: Tensor, levels: int) -> Tensor:
    params, x, (_, kernel) = _planned(params, x, levels)
    out = describe(params.shape, params.stride()).empty_like(params)
    grad = grad.to(params.dtype).contiguous()
    kernel(params=params, x=x, grad=grad, grad_params=out, threads=torch.get_num_threads())
    return out


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, channels, k, levels in (
        ("3 channels", (3, 4, 7), 3, 5, 256),
        ("1 channel", (2, 5, 4), 1, 3, 16),
        ("2 levels", (2, 17), 1, 2, 2),
        ("vectors", (6,), 3, 2, 65536),
    ):
        n, *positions = shape
        params = torch.randn(
            (n, (10 if channels == 3 else 3) * k, *positions), generator=generator, dtype=torch.float64
        )
        x = torch.randint(levels, (n, channels, *positions), generator=generator)
        x.view(-1)[::5], x.view(-1)[1::5] = 0, levels - 1
        yield Sample(label, (params, x, levels))


OP = Op(
    f"{_NLL}(Tensor params, Tensor x, int levels)",
    reference=reference.discretized_logistic_mixture_nll,
    outputs={"nll": "(N, ...) like params as accumulator"},
    argument_dtypes={"x": _INTEGERS},
    check=_check_forward,
    kernels={"cpu": _cpu, "triton": _FAMILY},
    backward=Backward(
        "params, x, grad, levels -> params",
        reference=reference.discretized_logistic_mixture_nll_backward,
        kernels={"cpu": _cpu_backward, "triton": _FAMILY},
    ),
    samples=_samples,
)


def discretized_logistic_mixture_nll(
    params: Tensor, x: Tensor, *, levels: int = 256, parity: Literal["pixelcnn++"] | None = None
) -> Tensor:
    """Negative log-likelihood of pixels under a discretised mixture of logistics, in nats a position.

    With x scaled to [-1, 1], each channel of each component has the probability that its logistic puts on the bin of
    half-width 1 / (levels - 1) around x; the bins of the first and the last level are open. Forward and backward are
    one pass each, and only ``params`` and ``x`` are kept.

    Args:
        params: (N, 10K, ...) for 3 channels: K mixture logits, then for red, green and blue each K means, K log-scales
            and K coefficients; (N, 3K, ...) for 1 channel: K logits, K means, K log-scales. Log-scales are clamped at
            -7. The coefficients, through tanh, add red to the mean of green, red to that of blue, and green to that of
            blue.
        x: (N, 3 or 1, ...) levels from 0 to ``levels`` - 1, of any integer dtype (uint8 needs no look at its values).
        levels: 2 to 65536.
        parity: "pixelcnn++" computes as the published code does, which replaces a bin of probability below 1e-5 by the
            density in its middle; in plain PyTorch.

    Returns:
        (N, ...), float32 for half-precision params.

    Raises:
        TypeError: params that are not floating point, x that is not of integers.
        ValueError: shapes, devices or levels that do not fit, and values of x outside the levels (not under
            torch.compile).
        genfast.BackendError: ``parity`` while a backend other than the reference is forced.

    Source: PixelCNN++ (arXiv:1701.05517, sections 2.1 and 2.2).

    Example:
        >>> import torch, genfast
        >>> params, x = torch.randn(2, 100, 8, 8), torch.randint(256, (2, 3, 8, 8))
        >>> nll = genfast.ops.discretized_logistic_mixture_nll(params, x)
    """
    if isinstance(x, Tensor) and x.dtype in _INTEGERS:
        within(_NLL, x, levels)
    if parity is None:
        result: Tensor = OP(params, x, levels)
        return result
    _check.choice(_NLL, "parity", parity, ("pixelcnn++",))
    _check_forward(params, x, levels)
    if _backend.forced not in (None, "reference"):
        raise _backend.BackendError(f"{_NLL}: backend {_backend.forced!r} has no kernel for parity={parity!r}")
    return reference.pixelcnnpp_nll(params, x, levels)


def _check_sample(params: Tensor, uniforms: Tensor, channels: int, levels: int, temperature: float) -> None:
    _check.floating(_SAMPLE, params=params, uniforms=uniforms)
    _mixtures(_SAMPLE, params.shape, channels, levels)
    _check.shape(
        _SAMPLE, "uniforms", uniforms, (params.shape[0], 1 + channels, *params.shape[2:]), "(N, 1 + channels, ...)"
    )
    if not temperature > 0:
        raise ValueError(f"{_SAMPLE}: temperature={temperature}, expected more than 0")


def _cpu_sample(params: Tensor, uniforms: Tensor, channels: int, levels: int, temperature: float) -> Tensor:
    _check_sample(params, uniforms, channels, levels, temperature)
    params, a = laid_out(params)
    out = params.new_empty((params.shape[0], channels, *params.shape[2:]), dtype=torch.int64)
    uniforms = uniforms.float().contiguous()
    fault = _CPU.logistic_mixture_sample(
        is_double=params.dtype is torch.float64,
        params=a.view(params),
        uniforms=uniforms,
        samples=out,
        temperature=temperature,
        n=a.n,
        s=a.s,
        mixtures=_mixtures(_SAMPLE, params.shape, channels, levels),
        channels=channels,
        levels=levels,
        threads=torch.get_num_threads(),
    )
    if fault >= 0:
        raise _not_finite(out)
    return out


def _reference_sample(params: Tensor, uniforms: Tensor, channels: int, levels: int, temperature: float) -> Tensor:
    samples = reference.discretized_logistic_mixture_sample(params, uniforms, channels, levels, temperature)
    if samples.is_cpu and readable_now(samples) and samples.numel() and int(samples.min()) < 0:
        raise _not_finite(samples)
    return samples


def _not_finite(samples: Tensor) -> FloatingPointError:
    n, channel, *position = (samples < 0).nonzero()[0].tolist()
    return FloatingPointError(
        f"{_SAMPLE}: params are not finite where channel {channel} of sample {n} is drawn, at position "
        f"{tuple(position)}"
    )


OP_SAMPLE = Op(
    f"{_SAMPLE}(Tensor params, Tensor uniforms, int channels, int levels, float temperature)",
    reference=_reference_sample,
    outputs={"samples": "(N, channels, ...) contiguous like params as int64"},
    check=_check_sample,
    kernels={"cpu": _cpu_sample, "triton": _FAMILY},
)


def discretized_logistic_mixture_sample(
    params: Tensor,
    uniforms: Tensor | None = None,
    *,
    channels: int = 3,
    levels: int = 256,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draws pixels from a discretised mixture of logistics.

    A component is drawn for each position, then its channels in order, each from its logistic, clipped to [-1, 1] and
    rounded to the nearest level before the next channel's mean depends on it.

    Args:
        params: (N, 10K, ...) for 3 channels, (N, 3K, ...) for 1; see :func:`discretized_logistic_mixture_nll`.
        uniforms: (N, 1 + channels, ...) in (0, 1): the first picks the component, in order of components, each other
            one a channel, clipped to [1e-5, 1 - 1e-5]. Read as float32. Drawn with ``generator`` where not given.
        channels: 3 or 1.
        levels: 2 to 65536.
        temperature: divides the logits and multiplies the scales; more than 0.
        generator: for drawing ``uniforms``.

    Returns:
        (N, channels, ...) levels, int64, without a gradient. The same uniforms give the same levels on every backend.

    Raises:
        TypeError: params or uniforms that are not floating point.
        ValueError: shapes, devices, levels or a temperature that do not fit.
        FloatingPointError: names the first position whose logits or drawn component are not finite (a logit of -inf
            only forbids its component). On a GPU an assertion there; under a functorch transform, and in a compiled
            graph on a GPU, the level is -1.

    Source: PixelCNN++ (arXiv:1701.05517, section 2.1) and the sampler of its published code.

    Example:
        >>> import torch, genfast
        >>> params = torch.randn(2, 100, 8, 8)
        >>> levels = genfast.ops.discretized_logistic_mixture_sample(params)
    """
    if uniforms is None:
        _check.floating(_SAMPLE, params=params)
        _mixtures(_SAMPLE, params.shape, channels, levels)
        shape = (params.shape[0], 1 + channels, *params.shape[2:])
        where = params.device if generator is None else generator.device
        uniforms = torch.rand(shape, generator=generator, device=where).to(params.device)
    result: Tensor = OP_SAMPLE(params.detach(), uniforms.detach(), channels, levels, float(temperature))
    if result.is_cuda and readable_now(result):
        torch._assert_async(
            (result >= 0).all(), f"{_SAMPLE}: params are not finite where a component is drawn from them"
        )
    return result
