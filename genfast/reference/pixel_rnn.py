"""The recurrences of PixelRNN (1601.06759, sections 3.1 and 3.2): a convolutional LSTM along rows or along diagonals.

Both are one scan. At step t over positions p, with K (4h, h, k) the state-to-state convolution over positions:
[o, f, i, g] = act(K * h_{t-1} + gates_t), c_t = f c_{t-1} + i g, h_t = o tanh(c_t); tanh for g, sigmoid for o, f, i.
Row LSTM: t is the row, p the column. Diagonal LSTM: the rows are skewed so that t = row + column, and p is the row.
``kept`` (N, H, W, 5, h) holds o, f, i, g and c: all that the derivative needs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def row_lstm(
    gates: Tensor, weight: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, save_for_backward: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns (h, kept); kept is empty without ``save_for_backward``.

    gates (N, 4h, H, W), weight (4h, h, k), h0 and c0 (h, W).
    """
    pads = (weight.shape[2] // 2, weight.shape[2] // 2)
    h, kept = _scan(_wide(gates).transpose(2, 3), weight, pads, h0, c0, None)
    return _dense(gates, h.transpose(2, 3)).to(gates.dtype), _packed(
        [k.transpose(2, 3) for k in kept], save_for_backward
    )


def diagonal_lstm(
    gates: Tensor, weight: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, save_for_backward: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns (h, kept); kept is empty without ``save_for_backward``.

    gates (N, 4h, H, W), weight (4h, h, 2), h0 and c0 (h,).
    """
    height, width = gates.shape[2:]
    h0, c0 = _along_rows(h0, height), _along_rows(c0, height)
    h, kept = _scan(skew(_wide(gates)), weight, (1, 0), h0, c0, _begun(height, width, gates.device))
    return _dense(gates, unskew(h, width)).to(gates.dtype), _packed([unskew(k, width) for k in kept], save_for_backward)


def skew(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, H, H + W - 1): row r shifted to the right by r, zeros around."""
    n, c, height, width = x.shape
    steps = width + height - 1
    return F.pad(x, (0, height)).flatten(2)[:, :, : height * steps].reshape(n, c, height, steps)


def unskew(x: Tensor, width: int) -> Tensor:
    """The inverse of :func:`skew`."""
    n, c, height, _ = x.shape
    return F.pad(x.flatten(2), (0, height)).reshape(n, c, height, width + height)[..., :width]


def row_lstm_backward(
    grad_h: Tensor | None, grad_kept: Tensor | None, kept: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dgates, dweight, dh0, dc0) in the dtype of ``kept``; the last two are empty where h0 and c0 are None."""
    pads = (weight.shape[2] // 2, weight.shape[2] // 2)
    states, grads = ([a.transpose(2, 3) for a in part] for part in _unpacked(grad_h, grad_kept, kept))
    dgates, dweight, dh0, dc0 = _scan_backward(grads, states, weight, pads, h0, c0, None)
    return _dense(grad_h, dgates.transpose(2, 3)), dweight, _or_empty(dh0, h0), _or_empty(dc0, c0)


def diagonal_lstm_backward(
    grad_h: Tensor | None, grad_kept: Tensor | None, kept: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns (dgates, dweight, dh0, dc0) in the dtype of ``kept``; the last two are empty where h0 and c0 are None."""
    height, width = kept.shape[1:3]
    states, grads = ([skew(a) for a in part] for part in _unpacked(grad_h, grad_kept, kept))
    begun = _begun(height, width, kept.device)
    first, second = _along_rows(h0, height), _along_rows(c0, height)
    dgates, dweight, dh0, dc0 = _scan_backward(grads, states, weight, (1, 0), first, second, begun)
    return _dense(grad_h, unskew(dgates, width)), dweight, _or_empty(dh0.sum(1), h0), _or_empty(dc0.sum(1), c0)


def _scan(
    gates: Tensor, weight: Tensor, pads: tuple[int, int], h0: Tensor | None, c0: Tensor | None, begun: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """gates (N, 4h, P, T), h0 and c0 (h, P); a position that step t has not begun keeps its h0 and c0."""
    n, hidden, positions = gates.shape[0], weight.shape[1], gates.shape[2]
    weight = weight.to(gates.dtype)
    first_h, first_c = (_initial(s, gates, n, hidden, positions) for s in (h0, c0))
    h, c = first_h, first_c
    every: list[tuple[Tensor, ...]] = []
    for t, now in enumerate(gates.unbind(3)):
        o, f, i, g = (now + F.conv1d(F.pad(h, pads), weight)).chunk(4, 1)
        o, f, i, g = o.sigmoid(), f.sigmoid(), i.sigmoid(), g.tanh()
        c = f * c + i * g
        h = o * c.tanh()
        every.append((h, o, f, i, g, c))
        if begun is not None and not (h0 is None and c0 is None):
            h, c = torch.where(begun[t], h, first_h), torch.where(begun[t], c, first_c)
    h, *kept = (torch.stack(part, -1) for part in zip(*every))
    return h, kept


def _scan_backward(
    grads: list[Tensor],
    states: list[Tensor],
    weight: Tensor,
    pads: tuple[int, int],
    h0: Tensor | None,
    c0: Tensor | None,
    begun: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The closed form, backwards in t: da is the gradient of the gates before their activation."""
    o, f, i, g, c = states
    n, hidden, positions, steps = o.shape
    weight = weight.to(o.dtype)
    first_h, first_c = (_initial(s, o, n, hidden, positions) for s in (h0, c0))
    dh = dc = dh0 = dc0 = o.new_zeros(n, hidden, positions)
    dweight = torch.zeros_like(weight)
    every = []
    for t in reversed(range(steps)):
        before_h, before_c = first_h, first_c
        if t:
            before_h, before_c = o[..., t - 1] * c[..., t - 1].tanh(), c[..., t - 1]
            if begun is not None:
                before_h = torch.where(begun[t - 1], before_h, first_h)
                before_c = torch.where(begun[t - 1], before_c, first_c)
        gate_o, gate_f, gate_i, gate_g = (x[..., t] for x in (o, f, i, g))
        gh, go, gf, gi, gg, gc = (x[..., t] for x in grads)
        tanh_c = c[..., t].tanh()
        dh = dh + gh
        dc = dc + gc + dh * gate_o * (1 - tanh_c**2)
        da = torch.cat(
            [
                (go + dh * tanh_c) * gate_o * (1 - gate_o),
                (gf + dc * before_c) * gate_f * (1 - gate_f),
                (gi + dc * gate_g) * gate_i * (1 - gate_i),
                (gg + dc * gate_i) * (1 - gate_g**2),
            ],
            1,
        )
        if begun is not None:
            da = torch.where(begun[t], da, 0)
        every.append(da)
        window = F.pad(before_h, pads).unfold(2, weight.shape[2], 1)
        dweight = dweight + torch.einsum("nap,nhpk->ahk", da, window)
        dh, dc = F.conv_transpose1d(da, weight)[..., pads[0] : pads[0] + positions], dc * gate_f
        if t and begun is None:
            continue
        unbegun = ~begun[t - 1] if t and begun is not None else torch.ones(positions, dtype=torch.bool, device=o.device)
        dh0, dc0 = dh0 + torch.where(unbegun, dh, 0), dc0 + torch.where(unbegun, dc, 0)
        dh, dc = torch.where(unbegun, 0, dh), torch.where(unbegun, 0, dc)
    return torch.stack(every[::-1], -1), dweight, dh0.sum(0), dc0.sum(0)


def _wide(x: Tensor) -> Tensor:
    return x if x.element_size() >= 4 else x.float()


def _dense(like: Tensor | None, x: Tensor) -> Tensor:
    """x, dense in the memory format of an input."""
    last = like is not None and like.stride(1) == 1 and like.shape[1] > 1 and not like.is_contiguous()
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _begun(height: int, width: int, device: torch.device) -> Tensor:
    """(T, P): whether step t has reached row p."""
    return torch.arange(height + width - 1, device=device)[:, None] >= torch.arange(height, device=device)


def _along_rows(state: Tensor | None, height: int) -> Tensor | None:
    return None if state is None else state[:, None].expand(-1, height)


def _initial(state: Tensor | None, like: Tensor, n: int, hidden: int, positions: int) -> Tensor:
    return like.new_zeros(n, hidden, positions) if state is None else state.to(like.dtype).expand(n, -1, -1)


def _packed(kept: list[Tensor], save_for_backward: bool) -> Tensor:
    return torch.stack(kept, 1).permute(0, 3, 4, 1, 2).contiguous() if save_for_backward else kept[0].new_empty(0)


def _unpacked(grad_h: Tensor | None, grad_kept: Tensor | None, kept: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """(N, h, H, W) each: o, f, i, g, c and the gradients of h, o, f, i, g, c."""
    states = [kept[..., q, :].permute(0, 3, 1, 2) for q in range(5)]
    zero = torch.zeros_like(states[0])
    first = zero if grad_h is None else grad_h.to(kept.dtype)
    rest = [zero] * 5 if grad_kept is None else [grad_kept[..., q, :].permute(0, 3, 1, 2) for q in range(5)]
    return states, [first, *rest]


def _or_empty(grad: Tensor, state: Tensor | None) -> Tensor:
    return grad.new_empty(0) if state is None else grad
