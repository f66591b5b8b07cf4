"""ops.row_lstm and ops.diagonal_lstm: the two recurrences of PixelRNN, each one call over a whole batch of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Op, Sample
from .._tensors import memory_format
from . import _check
from ._layout import Layout, laid_out

_SIZES = "n hidden height width taps"
_CPU = kernels(
    "_cpu",
    pixel_rnn=f"is_double diagonal gates weight h0 c0 out kept {_SIZES} channels_last threads",
    pixel_rnn_backward=f"""
        is_double diagonal grad_h grad_kept kept weight h0 c0 out grad_weight grad_h0 grad_c0 {_SIZES} channels_last
        threads
    """,
)
_CUDA = kernels(
    "_cuda",
    pixel_rnn=f"stream diagonal gates weight h0 c0 h kept carry depth {_SIZES}",
    pixel_rnn_backward=f"stream diagonal grad_h grad_kept kept weight c0 dgates carry depth {_SIZES}",
)
_CUDA_DTYPES = _backend.DTYPES | {"cuda": (torch.float32,)}


def _check_forward(op: str, diagonal: bool) -> Callable[..., None]:
    def check(gates: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None, *_: Any) -> None:
        _check.floating(op, gates=gates, weight=weight, h0=h0, c0=c0)
        if gates.dim() != 4 or 0 in gates.shape[1:]:
            raise ValueError(f"{op}: gates has shape {tuple(gates.shape)}, expected (N, 4h, H, W), none but N zero")
        if gates.shape[1] % 4:
            raise ValueError(f"{op}: gates has {gates.shape[1]} channels, expected 4h: o, f, i and g, h of each")
        hidden = gates.shape[1] // 4
        if weight.dim() != 3:
            raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected ({4 * hidden}, {hidden}, k)")
        taps = 2 if diagonal else weight.shape[2]
        if not diagonal and taps % 2 == 0:
            raise ValueError(f"{op}: weight has {taps} taps, expected an odd number")
        _check.shape(op, "weight", weight, (4 * hidden, hidden, taps), "(4h, h, k)")
        expected, why = ((hidden,), "(h,)") if diagonal else ((hidden, gates.shape[3]), "(h, W)")
        for name, state in (("h0", h0), ("c0", c0)):
            if state is not None:
                _check.shape(op, name, state, expected, why)

    return check


def _check_backward(op: str, diagonal: bool) -> Callable[..., None]:
    forward = _check_forward(op, diagonal)

    def check(
        grad_h: Tensor | None,
        grad_kept: Tensor | None,
        kept: Tensor,
        weight: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
    ) -> None:
        _check.floating(f"{op}_backward", kept=kept, grad_h=grad_h, grad_kept=grad_kept)
        if kept.dim() != 5 or kept.shape[3] != 5:
            raise ValueError(f"{op}_backward: kept has shape {tuple(kept.shape)}, expected (N, H, W, 5, h)")
        n, height, width, _, hidden = kept.shape
        # A view that has the gates' shape without their memory.
        forward(kept.new_empty(1, 1, 1, 1).expand(n, 4 * hidden, height, width), weight, h0, c0)
        _check.shapes(
            f"{op}_backward",
            grad_h=(grad_h, (n, hidden, height, width), "that of the states"),
            grad_kept=(grad_kept, kept.shape, "that of kept"),
        )
        _check.same_dtype(f"{op}_backward", kept.dtype, grad_kept=grad_kept)

    return check


def _fake_backward(
    grad_h: Tensor | None, grad_kept: Tensor | None, kept: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, height, width, _, hidden = kept.shape
    form = torch.contiguous_format if grad_h is None else memory_format(grad_h)
    dgates = torch.empty((n, 4 * hidden, height, width), dtype=kept.dtype, device=kept.device, memory_format=form)
    dh0, dc0 = (kept.new_empty(0 if s is None else s.shape) for s in (h0, c0))
    return dgates, kept.new_empty(weight.shape), dh0, dc0


def _dense(n: int, c: int, like: Layout, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor (N, C, H, W), dense in the order of ``like``."""
    s = like.s
    stride = (c * s, 1, c * shape[3], c) if like.walks_channels else (c * s, s, shape[3], 1)
    return _allocator.empty_strided((n, c, *shape[2:]), stride, dtype)


def _order(x: Tensor) -> tuple[Tensor, Layout]:
    """x and its layout, which walks the channels where an output is to (one position lies in both orders)."""
    form = memory_format(x)
    x, a = laid_out(x)
    return x, a._replace(walks_channels=form is not torch.contiguous_format)


def _states(diagonal: bool, height: int, dtype: torch.dtype, *states: Tensor | None) -> list[Tensor | None]:
    """h0 and c0 as (P, h), P the positions of a step."""
    if diagonal:
        return [s if s is None else s.to(dtype).expand(height, -1).contiguous() for s in states]
    return [s if s is None else s.to(dtype).t().contiguous() for s in states]


def _cpu(name: str, diagonal: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    check = _check_forward(name, diagonal)

    def run(
        gates: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None, save_for_backward: bool
    ) -> tuple[Tensor, Tensor]:
        check(gates, weight, h0, c0)
        dtype = gates.dtype
        gates, a = _order(gates)
        n, channels, height, width = gates.shape
        hidden = channels // 4
        weight = weight.to(dtype).contiguous()
        h0, c0 = _states(diagonal, height, dtype, h0, c0)
        h = _dense(n, hidden, a, gates.shape, dtype)
        sizes = (n, height, width, 5, hidden)
        strides = (height * width * 5 * hidden, width * 5 * hidden, 5 * hidden, hidden, 1)
        kept = _allocator.empty_strided(sizes, strides, dtype) if save_for_backward else gates.new_empty(0)
        if n:
            _CPU.pixel_rnn(
                is_double=dtype is torch.float64,
                diagonal=diagonal,
                gates=a.view(gates),
                weight=weight,
                h0=h0,
                c0=c0,
                out=h,
                kept=kept if save_for_backward else None,
                n=n,
                hidden=hidden,
                height=height,
                width=width,
                taps=weight.shape[2],
                channels_last=a.walks_channels,
                threads=torch.get_num_threads(),
            )
        return h, kept

    return run


def _cpu_backward(diagonal: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    def run(
        grad_h: Tensor | None,
        grad_kept: Tensor | None,
        kept: Tensor,
        weight: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = kept.dtype
        n, height, width, _, hidden = kept.shape
        grad_h = kept.new_zeros((n, hidden, height, width)) if grad_h is None else grad_h.to(dtype)
        grad_h, a = _order(grad_h)
        kept, weight = kept.contiguous(), weight.to(dtype).contiguous()
        grad_kept = None if grad_kept is None else grad_kept.contiguous()
        h0, c0 = _states(diagonal, height, dtype, h0, c0)
        positions = height if diagonal else width
        dgates = _dense(n, 4 * hidden, a, grad_h.shape, dtype)
        dweight = torch.zeros_like(weight)
        dh0, dc0 = (kept.new_zeros((positions, hidden) if s is not None else 0) for s in (h0, c0))
        if n:
            _CPU.pixel_rnn_backward(
                is_double=dtype is torch.float64,
                diagonal=diagonal,
                grad_h=a.view(grad_h),
                grad_kept=grad_kept,
                kept=kept,
                weight=weight,
                h0=h0,
                c0=c0,
                out=dgates,
                grad_weight=dweight,
                grad_h0=None if h0 is None else dh0,
                grad_c0=None if c0 is None else dc0,
                n=n,
                hidden=hidden,
                height=height,
                width=width,
                taps=weight.shape[2],
                channels_last=a.walks_channels,
                threads=torch.get_num_threads(),
            )
        if diagonal:
            dh0, dc0 = (d if s is None else d.sum(0) for d, s in ((dh0, h0), (dc0, c0)))
        else:
            dh0, dc0 = (d if s is None else d.t().contiguous() for d, s in ((dh0, h0), (dc0, c0)))
        return dgates, dweight, dh0, dc0

    return run


def _fits(device: torch.device, positions: int, taps: int, row: int) -> bool:
    """Whether the rows of ``row`` floats that a step reads lie in a block's shared memory."""
    properties: Any = torch.cuda.get_device_properties(device)
    limit: int = properties.shared_memory_per_block_optin
    return 4 * (positions + taps - 1) * row <= limit


def _cuda(name: str, diagonal: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    check = _check_forward(name, diagonal)
    fallback: Callable[..., tuple[Tensor, Tensor]] = getattr(reference, name)

    def run(
        gates: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None, save_for_backward: bool
    ) -> tuple[Tensor, Tensor]:
        check(gates, weight, h0, c0)
        n, channels, height, width = gates.shape
        hidden, taps = channels // 4, weight.shape[2]
        depth = (hidden + 3) // 4 * 4
        positions = height if diagonal else width
        if not _fits(gates.device, positions, taps, depth):
            return fallback(gates, weight, h0, c0, save_for_backward)
        sites = gates.permute(0, 2, 3, 1).contiguous()
        packed = weight.to(gates.dtype).reshape(4, hidden, hidden, taps).permute(3, 2, 1, 0)
        packed = F.pad(packed, (0, 0, 0, 0, 0, depth - hidden)).contiguous()
        h0, c0 = _states(diagonal, height, gates.dtype, h0, c0)
        h, carry = gates.new_empty(n, height, width, hidden), gates.new_empty(n, positions, hidden)
        kept = gates.new_empty((n, height, width, 5, hidden) if save_for_backward else 0)
        if n:
            with torch.cuda.device(gates.device):
                _CUDA.pixel_rnn(
                    stream=torch.cuda.current_stream().cuda_stream,
                    diagonal=diagonal,
                    gates=sites,
                    weight=packed,
                    h0=h0,
                    c0=c0,
                    h=h,
                    kept=kept if save_for_backward else None,
                    carry=carry,
                    n=n,
                    hidden=hidden,
                    depth=depth,
                    height=height,
                    width=width,
                    taps=taps,
                )
        return h.permute(0, 3, 1, 2).contiguous(memory_format=memory_format(gates)), kept

    return run


def _cuda_backward(name: str, diagonal: bool) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    fallback: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = getattr(reference, f"{name}_backward")

    def run(
        grad_h: Tensor | None,
        grad_kept: Tensor | None,
        kept: Tensor,
        weight: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, height, width, _, hidden = kept.shape
        taps = weight.shape[2]
        positions = height if diagonal else width
        if not _fits(kept.device, positions, taps, 4 * hidden):
            return fallback(grad_h, grad_kept, kept, weight, h0, c0)
        form = torch.contiguous_format if grad_h is None else memory_format(grad_h)
        sites = (
            kept.new_zeros(n, height, width, hidden) if grad_h is None else grad_h.to(kept.dtype).permute(0, 2, 3, 1)
        )
        sites, kept, weight = sites.contiguous(), kept.contiguous(), weight.to(kept.dtype)
        grad_kept = None if grad_kept is None else grad_kept.contiguous()
        packed = weight.permute(2, 0, 1).flip(0).contiguous()
        first_c = _states(diagonal, height, kept.dtype, c0)[0]
        dgates, carry = kept.new_empty(n, height, width, 4 * hidden), kept.new_zeros(n, positions, hidden)
        if n:
            with torch.cuda.device(kept.device):
                _CUDA.pixel_rnn_backward(
                    stream=torch.cuda.current_stream().cuda_stream,
                    diagonal=diagonal,
                    grad_h=sites,
                    grad_kept=grad_kept,
                    kept=kept,
                    weight=packed,
                    c0=first_c,
                    dgates=dgates,
                    carry=carry,
                    n=n,
                    hidden=hidden,
                    depth=hidden,
                    height=height,
                    width=width,
                    taps=taps,
                )
        rows = dgates.reshape(-1, 4 * hidden).t()
        windows = _windows(kept[..., 0, :] * kept[..., 4, :].tanh(), h0, taps, diagonal)
        dweight = torch.stack([rows @ window.reshape(-1, hidden) for window in windows], 2)
        dh0, dc0 = kept.new_empty(0), kept.new_empty(0)
        if h0 is not None and diagonal:
            dh0 = dgates[:, :, 0].sum((0, 1)) @ weight[..., 1]
        elif h0 is not None:
            dh0 = F.conv_transpose1d(dgates[:, 0].sum(0).t()[None], weight, padding=taps // 2)[0]
        if c0 is not None:
            dc0 = carry.sum((0, 1)) if diagonal else carry.sum(0).t().contiguous()
        return dgates.permute(0, 3, 1, 2).contiguous(memory_format=form), dweight, dh0, dc0

    return run


def _windows(h: Tensor, h0: Tensor | None, taps: int, diagonal: bool) -> list[Tensor]:
    """For each tap the states (N, H, W, h) that it saw, given those at every position."""
    n, height, width, hidden = h.shape
    if diagonal:
        left = h.new_zeros(hidden) if h0 is None else h0.to(h.dtype)
        above = F.pad(h[:, :-1], (0, 0, 0, 0, 1, 0))
        return [above, torch.cat([left.expand(n, height, 1, hidden), h[:, :, :-1]], 2)]
    first = h.new_zeros(width, hidden) if h0 is None else h0.to(h.dtype).t()
    before = torch.cat([first.expand(n, 1, width, hidden), h[:, :-1]], 1)
    before = F.pad(before, (0, 0, taps // 2, taps // 2))
    return [before[:, :, j : j + width] for j in range(taps)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gates, weight, h0, c0, ctx.has_states = inputs
    ctx.set_materialize_grads(False)
    ctx.dtype = gates.dtype
    ctx.save_for_backward(output[1] if ctx.has_states else gates, weight, h0, c0)


def _backward(name: str) -> Callable[..., tuple[Any, ...]]:
    def run(ctx: Any, grad_h: Tensor | None, grad_kept: Tensor | None) -> tuple[Any, ...]:
        kept, weight, h0, c0 = ctx.saved_tensors
        if grad_h is None and grad_kept is None:
            return (None,) * 5
        if not ctx.has_states:  # the states were not asked for, so the scan is run again, with them
            kept, grad_kept = OPS[name](kept, weight, h0, c0, True)[1], None
        dgates, dweight, dh0, dc0 = OPS[f"{name}_backward"](grad_h, grad_kept, kept, weight, h0, c0)
        dh0, dc0 = (None if s is None else d.to(s.dtype) for d, s in ((dh0, h0), (dc0, c0)))
        return dgates.to(ctx.dtype), dweight.to(weight.dtype), dh0, dc0, None

    return run


def _samples(diagonal: bool) -> Callable[[torch.Generator], Iterator[Sample]]:
    def samples(generator: torch.Generator) -> Iterator[Sample]:
        def rand(*shape: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

        taps = 2 if diagonal else 3
        state = (5,) if diagonal else (5, 4)
        yield Sample(
            "given states", (rand(3, 20, 5, 4), rand(20, 5, taps, scale=0.4), rand(*state), rand(*state), True)
        )
        yield Sample("17 hidden", (rand(2, 68, 3, 7), rand(68, 17, taps, scale=0.2), None, None, True))
        taps = 2 if diagonal else 5
        yield Sample("nothing kept", (rand(2, 8, 7, 3), rand(8, 2, taps, scale=0.4), None, None, False))

    return samples


def _declare(name: str, diagonal: bool) -> dict[str, Op]:
    backward = Op(
        f"{name}_backward(Tensor? grad_h, Tensor? grad_kept, Tensor kept, Tensor weight, Tensor? h0, Tensor? c0) "
        "-> (Tensor, Tensor, Tensor, Tensor)",
        reference=getattr(reference, f"{name}_backward"),
        check=_check_backward(name, diagonal),
        check_before_kernels=True,
        fake=_fake_backward,
        kernels={"cpu": _cpu_backward(diagonal), "cuda": _cuda_backward(name, diagonal)},
        dtypes=_CUDA_DTYPES,
    )
    forward = Op(
        f"{name}(Tensor gates, Tensor weight, Tensor? h0, Tensor? c0, bool save_for_backward)",
        reference=getattr(reference, name),
        outputs={
            "h": "(N, C // 4, ...) like gates",
            "kept": "(N, gates.shape[2], gates.shape[3], 5, C // 4) like gates as accumulator if save_for_backward",
        },
        check=_check_forward(name, diagonal),
        kernels={"cpu": _cpu(name, diagonal), "cuda": _cuda(name, diagonal)},
        dtypes=_CUDA_DTYPES,
        setup_context=_setup_context,
        backward=_backward(name),
        samples=_samples(diagonal),
    )
    return {name: forward, f"{name}_backward": backward}


OPS = _declare("row_lstm", False) | _declare("diagonal_lstm", True)


def _run(name: str, gates: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None) -> Tensor:
    # The gates and cells are written down only where a derivative will ask for them.
    derived = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (gates, weight, h0, c0)
    )
    h: Tensor = OPS[name](gates, weight, h0, c0, derived)[0]
    return h


def row_lstm(gates: Tensor, weight: Tensor, *, h0: Tensor | None = None, c0: Tensor | None = None) -> Tensor:
    """Row LSTM: a convolutional LSTM over the rows of an image, from the top.

    [o, f, i, g] = act(K * h_{r-1} + gates_r), c_r = f c_{r-1} + i g, h_r = o tanh(c_r), where * is a convolution along
    the row with zeros beyond its ends; tanh for g, sigmoid for o, f and i.

    Args:
        gates: (N, 4h, H, W) floating point, the input-to-state part with its bias; channels o, f, i, g, h of each.
        weight: (4h, h, k), k odd: K.
        h0, c0: (h, W), the state above the first row; zeros without.

    Returns:
        (N, h, H, W) like gates.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.

    Source: van den Oord, Kalchbrenner, Kavukcuoglu 2016 (arXiv:1601.06759, section 3.1, equation 3).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.row_lstm(torch.randn(2, 32, 5, 7), torch.randn(32, 8, 3)).shape
        torch.Size([2, 8, 5, 7])
    """
    return _run("row_lstm", gates, weight, h0, c0)


def diagonal_lstm(gates: Tensor, weight: Tensor, *, h0: Tensor | None = None, c0: Tensor | None = None) -> Tensor:
    """Diagonal LSTM: position (r, c) continues from its neighbours above and to the left.

    [o, f, i, g] = act(K_0 h(r-1, c) + K_1 h(r, c-1) + gates(r, c)), c(r, c) = f c(r, c-1) + i g, h(r, c) = o tanh(c(r,
    c)); tanh for g, sigmoid for o, f and i. Above the first row, h is zero.

    Args:
        gates: (N, 4h, H, W) floating point, the input-to-state part with its bias; channels o, f, i, g, h of each.
        weight: (4h, h, 2): K_0 and K_1.
        h0, c0: (h,), the state to the left of each row; zeros without.

    Returns:
        (N, h, H, W) like gates.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit.

    Source: van den Oord, Kalchbrenner, Kavukcuoglu 2016 (arXiv:1601.06759, section 3.2).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.diagonal_lstm(torch.randn(2, 32, 5, 7), torch.randn(32, 8, 2)).shape
        torch.Size([2, 8, 5, 7])
    """
    return _run("diagonal_lstm", gates, weight, h0, c0)
