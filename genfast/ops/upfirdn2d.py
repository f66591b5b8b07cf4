"""ops.upfirdn2d and what is made of it: filter2d, upsample2d, downsample2d, setup_filter."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Op, Sample
from .._tensors import memory_format
from . import _check

_NAME = "upfirdn2d"
_CPU = kernels(
    "_cpu",
    upfirdn2d="""
        is_double separable flip channels_last x filter y gain n c h w oh ow fh fw upx upy downx downy padx0 pady0 xn
        xc xh
        threads
    """,
)

Pair = int | Sequence[int]


def _integers(value: Any, count: int) -> tuple[int, ...]:
    """A number ``count`` times, or a sequence as a tuple; empty where it is no integer or holds one that is not."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
    return numbers if all(isinstance(v, (int, torch.SymInt)) for v in numbers) else ()


def _pair(name: str, value: Pair, op: str = _NAME) -> tuple[int, int]:
    """(x, y) of a factor."""
    pair = _integers(value, 2)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{op}: {name}={value!r}, expected a positive integer or a pair (x, y) of them")
    return pair[0], pair[1]


def parse_padding(value: Pair, op: str = _NAME) -> tuple[int, int, int, int]:
    """(x0, x1, y0, y1) of a padding."""
    pads = _integers(value, 4)
    if len(pads) == 2:
        pads = (pads[0], pads[0], pads[1], pads[1])
    if len(pads) != 4:
        raise ValueError(f"{op}: padding={value!r}, expected an integer, (x, y) or (x0, x1, y0, y1)")
    return pads[0], pads[1], pads[2], pads[3]


def filter_size(filter: Tensor | None, op: str = _NAME) -> tuple[int, int]:
    """(width, height) of a filter; one tap for None."""
    if filter is None:
        return 1, 1
    if not isinstance(filter, Tensor):
        raise TypeError(
            f"{op}: filter is a {type(filter).__name__}, expected a torch.Tensor (see setup_filter) or None"
        )
    if filter.dim() not in (1, 2) or not filter.numel():
        raise ValueError(f"{op}: filter has shape {tuple(filter.shape)}, expected (height, width) or (taps,)")
    return filter.shape[-1], filter.shape[0]


def _sizes(
    xs: Sequence[int], fs: Sequence[int], up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> tuple[int, int, int, int]:
    width = (xs[3] * up[0] + padding[0] + padding[1] - fs[-1]) // down[0] + 1
    height = (xs[2] * up[1] + padding[2] + padding[3] - fs[0]) // down[1] + 1
    return xs[0], xs[1], height, width


def _check_forward(
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> None:
    _check.floating(_NAME, x=x, filter=filter)
    if x.dim() != 4 or not x.shape[2] or not x.shape[3]:
        raise ValueError(
            f"{_NAME}: x has shape {tuple(x.shape)}, expected (N, C, H, W) with at least one row and column"
        )
    fw, fh = filter_size(filter)
    if len(up) != 2 or min(up) < 1:
        raise ValueError(f"{_NAME}: up={tuple(up)}, expected positive (x, y)")
    if len(down) != 2 or min(down) < 1:
        raise ValueError(f"{_NAME}: down={tuple(down)}, expected positive (x, y)")
    if len(padding) != 4:
        raise ValueError(f"{_NAME}: padding={tuple(padding)}, expected (x0, x1, y0, y1)")
    width, height = x.shape[3] * up[0] + padding[0] + padding[1], x.shape[2] * up[1] + padding[2] + padding[3]
    if width < fw or height < fh:
        raise ValueError(
            f"{_NAME}: the upsampled and padded x has {height}x{width} positions, fewer than the filter's {fh}x{fw} "
            "taps; expected more padding or a larger x"
        )


def _reference(x: Tensor, *args: Any) -> Tensor:
    return reference.upfirdn2d(x, *args).contiguous(memory_format=memory_format(x))


def _fake(
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    shape = _sizes(x.shape, filter.shape, up, down, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


class _Plan(NamedTuple):
    """All that a call needs but its pointers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    kernel: Any


@functools.lru_cache(1024)
def _plan(
    xs: tuple[int, ...],
    stride: tuple[int, ...],
    double: bool,
    last: bool,
    fs: tuple[int, ...],
    up: tuple[int, ...],
    down: tuple[int, ...],
    padding: tuple[int, ...],
    flip_filter: bool,
) -> _Plan | None:
    """None where a row of x is not contiguous."""
    n, c, h, w = xs
    if n * c and ((stride[1] != 1 or (w > 1 and stride[3] != c)) if last else (w > 1 and stride[3] != 1)):
        return None
    shape = _sizes(xs, fs, up, down, padding)
    oh, ow = shape[2:]
    strides = (c * oh * ow, 1, ow * c, c) if last else (c * oh * ow, oh * ow, ow, 1)
    kernel = _CPU.upfirdn2d.prepare(
        is_double=double,
        separable=len(fs) == 1,
        flip=flip_filter,
        channels_last=last,
        n=n,
        c=c,
        h=h,
        w=w,
        oh=oh,
        ow=ow,
        fh=fs[0],
        fw=fs[-1],
        upx=up[0],
        upy=up[1],
        downx=down[0],
        downy=down[1],
        padx0=padding[0],
        pady0=padding[2],
        xn=stride[0],
        xc=stride[1],
        xh=stride[2],
    )
    return _Plan(shape, strides, kernel)


def _cpu(
    x: Tensor,
    filter: Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> Tensor:
    _check_forward(x, filter, up, down, padding, flip_filter, gain)
    form = memory_format(x)
    plan = _plan(
        x.shape,
        x.stride(),
        x.dtype is torch.float64,
        form is torch.channels_last,
        filter.shape,
        tuple(up),
        tuple(down),
        tuple(padding),
        flip_filter,
    )
    if plan is None:
        return _cpu(x.contiguous(memory_format=form), filter, up, down, padding, flip_filter, gain)
    y = _allocator.empty_strided(plan.shape, plan.stride, x.dtype)
    filter = filter.to(x.dtype).contiguous()
    if y.numel():
        plan.kernel(x=x, filter=filter, y=y, gain=gain, threads=torch.get_num_threads())
    return y


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, filter, *ctx.options = inputs
    ctx.sizes = x.shape[2:], output.shape[2:]
    ctx.save_for_backward(filter)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The transpose: factors exchanged, the filter reversed, and the padding that gives x's size back."""
    (filter,), (up, down, padding, flip_filter, gain) = ctx.saved_tensors, ctx.options
    (h, w), (oh, ow) = ctx.sizes
    padx0, _, pady0, _ = padding
    back = [
        filter.shape[-1] - padx0 - 1,
        w * up[0] - ow * down[0] + padx0 - up[0] + 1,
        filter.shape[0] - pady0 - 1,
        h * up[1] - oh * down[1] + pady0 - up[1] + 1,
    ]
    return OP(grad, filter, down, up, back, not flip_filter, gain), None, None, None, None, None, None


def _samples(generator: torch.Generator) -> Iterator[Sample]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    for label, xs, fs, up, down, padding, flip in (
        ("filter", (2, 3, 6, 7), (4, 4), (1, 1), (1, 1), (2, 1, 2, 1), False),
        ("up by 2", (2, 3, 6, 5), (4,), (2, 2), (1, 1), (2, 1, 2, 1), False),
        ("down by 2, flipped", (2, 3, 9, 8), (3, 4), (1, 1), (2, 2), (1, 1, 1, 1), True),
        ("up by (3, 1), down by (2, 3), cropped", (2, 2, 7, 5), (5, 2), (3, 1), (2, 3), (-1, 2, 1, -2), False),
    ):
        yield Sample(label, (draw(*xs), draw(*fs), up, down, padding, flip, 1.5), constant=(1,))


OP = Op(
    "upfirdn2d(Tensor x, Tensor filter, int[] up, int[] down, SymInt[] padding, bool flip_filter, float gain) -> "
    "Tensor",
    reference=_reference,
    check=_check_forward,
    fake=_fake,
    kernels={"cpu": _cpu, "triton": _backend.triton_kernel(_NAME, _NAME, _check_forward)},
    setup_context=_setup_context,
    backward=_backward,
    samples=_samples,
)


def upfirdn2d(
    x: Tensor,
    filter: Tensor | None,
    *,
    up: Pair = 1,
    down: Pair = 1,
    padding: Pair = 0,
    flip_filter: bool = False,
    gain: float = 1.0,
) -> Tensor:
    """Upsamples with zeros, pads or crops, filters and downsamples each channel: the resampling of StyleGAN2 and 3.

    In order: ``up - 1`` zeros after each element; ``padding`` zeros around (negative: that many are cut off); a
        convolution
    with ``filter`` wherever it fits whole; every ``down``-th element of the result. Only products with elements of x
    are taken. Differentiable to any order in x: the gradient is upfirdn2d itself, with up and down exchanged. The
    filter takes no gradient.

    Args:
        x: (N, C, H, W) floating point, NCHW or channels_last; the memory format is kept.
        filter: (height, width), or (taps,) for the same taps along both axes, of any floating dtype; None for one tap
            of 1.
        up, down: integers or pairs (x, y).
        padding: of the upsampled image: an integer, (x, y) or (x0, x1, y0, y1).
        flip_filter: False for a convolution, True for a correlation.
        gain: multiplies the result.

    Returns:
        (N, C, (H up + y0 + y1 - height) // down + 1, (W up + x0 + x1 - width) // down + 1), in x's dtype.

    Raises:
        TypeError: x or filter is no floating-point tensor.
        ValueError: shapes, factors, padding or devices that do not fit; a filter that requires a gradient.

    Source: Karras et al., StyleGAN2 (arXiv:1912.04958, appendix B) and StyleGAN3 (arXiv:2106.12423), whose
    ``torch_utils.ops.upfirdn2d`` has these arguments.

    Example:
        >>> import torch, genfast
        >>> f = genfast.ops.setup_filter([1, 3, 3, 1])
        >>> genfast.ops.upfirdn2d(torch.randn(2, 3, 8, 8), f, up=2, padding=(2, 1, 2, 1), gain=4).shape
        torch.Size([2, 3, 16, 16])
    """
    if filter is None:
        filter = torch.ones((1, 1), dtype=torch.float32, device=x.device)
    filter_size(filter)
    if filter.requires_grad:
        raise ValueError(f"{_NAME}: filter requires a gradient, which is not computed; pass filter.detach()")
    result: Tensor = OP(
        x, filter, _pair("up", up), _pair("down", down), parse_padding(padding), flip_filter, float(gain)
    )
    return result


def setup_filter(
    taps: Any,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1.0,
    separable: bool | None = None,
) -> Tensor:
    """A float32 filter for :func:`upfirdn2d` from taps.

    Args:
        taps: (height, width), (taps,), a number, or None (one tap of 1): a list, array or tensor.
        device: of the result.
        normalize: divides by the sum, so that a constant image keeps its value.
        flip_filter: reverses the filter.
        gain: of the filter as a whole, along both axes together.
        separable: keeps (taps,) as one axis; without it, filters of eight taps and more are kept so.

    Returns:
        (height, width), or (taps,).

    Raises:
        ValueError: more than two axes, no taps, a separable filter with two axes, or taps that sum to zero when
            normalised.

    Example:
        >>> import genfast
        >>> genfast.ops.setup_filter([1, 1])
        tensor([[0.2500, 0.2500],
                [0.2500, 0.2500]])
    """
    f = torch.as_tensor(1.0 if taps is None else taps, dtype=torch.float32)
    if f.dim() > 2 or not f.numel():
        raise ValueError(
            f"setup_filter: taps have shape {tuple(f.shape)}, expected (height, width), (taps,) or a number"
        )
    f = f.reshape(1) if f.dim() == 0 else f
    if separable is None:
        separable = f.dim() == 1 and f.numel() >= 8
    if separable and f.dim() != 1:
        raise ValueError(f"setup_filter: taps have shape {tuple(f.shape)}, expected (taps,) with separable=True")
    if f.dim() == 1 and not separable:
        f = f[:, None] * f[None, :]
    if normalize:
        total = f.sum()
        if not float(total):
            raise ValueError(
                "setup_filter: the taps sum to zero, so they cannot be normalised; expected normalize=False"
            )
        f = f / total
    if flip_filter:
        f = f.flip(tuple(range(f.dim())))
    scale: float = float(gain) ** (f.dim() / 2)  # a filter along both axes takes its root each time
    return (f * scale).to(device)


def filter2d(
    x: Tensor, filter: Tensor | None, *, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """Filters each channel; with ``padding=0`` the result has x's size. Arguments and errors as :func:`upfirdn2d`.

    Example:
        >>> import torch, genfast
        >>> genfast.ops.filter2d(torch.randn(2, 3, 8, 8), genfast.ops.setup_filter([1, 3, 3, 1])).shape
        torch.Size([2, 3, 8, 8])
    """
    (fw, fh), p = filter_size(filter, "filter2d"), parse_padding(padding, "filter2d")
    pads = (p[0] + fw // 2, p[1] + (fw - 1) // 2, p[2] + fh // 2, p[3] + (fh - 1) // 2)
    return upfirdn2d(x, filter, padding=pads, flip_filter=flip_filter, gain=gain)


def upsample_padding(filter: Tensor | None, up: tuple[int, int], padding: tuple[int, ...]) -> tuple[int, int, int, int]:
    """``padding`` of the output, to which is added what makes the output ``up`` times as large."""
    (fw, fh), (ux, uy), p = filter_size(filter), up, padding
    return p[0] + (fw + ux - 1) // 2, p[1] + (fw - ux) // 2, p[2] + (fh + uy - 1) // 2, p[3] + (fh - uy) // 2


def downsample_padding(
    filter: Tensor | None, down: tuple[int, int], padding: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """``padding`` of the input, to which is added what makes the output 1 / ``down`` as large."""
    (fw, fh), (dx, dy), p = filter_size(filter), down, padding
    return p[0] + (fw - dx + 1) // 2, p[1] + (fw - dx) // 2, p[2] + (fh - dy + 1) // 2, p[3] + (fh - dy) // 2


def upsample2d(
    x: Tensor, filter: Tensor | None, *, up: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """Upsamples each channel, keeping its magnitude; with ``padding=0`` to ``up`` times x's size. See
    :func:`upfirdn2d`.

    Example:
        >>> import torch, genfast
        >>> genfast.ops.upsample2d(torch.randn(2, 3, 8, 8), genfast.ops.setup_filter([1, 3, 3, 1])).shape
        torch.Size([2, 3, 16, 16])
    """
    filter_size(filter, "upsample2d")
    factors = _pair("up", up, "upsample2d")
    pads = upsample_padding(filter, factors, parse_padding(padding, "upsample2d"))
    return upfirdn2d(x, filter, up=factors, padding=pads, flip_filter=flip_filter, gain=gain * factors[0] * factors[1])


def downsample2d(
    x: Tensor, filter: Tensor | None, *, down: Pair = 2, padding: Pair = 0, flip_filter: bool = False, gain: float = 1.0
) -> Tensor:
    """Downsamples each channel; with ``padding=0`` to 1 / ``down`` of x's size. See :func:`upfirdn2d`.

    Example:
        >>> import torch, genfast
        >>> genfast.ops.downsample2d(torch.randn(2, 3, 8, 8), genfast.ops.setup_filter([1, 3, 3, 1])).shape
        torch.Size([2, 3, 4, 4])
    """
    filter_size(filter, "downsample2d")
    factors = _pair("down", down, "downsample2d")
    pads = downsample_padding(filter, factors, parse_padding(padding, "downsample2d"))
    return upfirdn2d(x, filter, down=factors, padding=pads, flip_filter=flip_filter, gain=gain)
