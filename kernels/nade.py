"""The neural autoregressive distribution estimator (Larochelle and Murray 2011; Uria et al. 1306.0186), over d = 1 ..
D:

    a_1 = c;  h_d = act(rho_d a_d);  p_d = b_d + V_d h_d;  a_{d+1} = a_d + W_d x_d
    backward, from d = D and e_{D+1} = 0, g the cotangent of p:  dx_d = <W_d, e_{d+1}>,  dW_d = sum_n x_d e_{d+1},
    dV_d = sum_n g_d h_d,  z = act'(rho_d a_d) V_d^T g_d,  drho_d = sum_n <z, a_d>,  e_d = e_{d+1} + rho_d z

x (N, D), W (D, H), V (D, P, H), p (N, D, P). One launch for all D steps, where the loop of library calls takes four a
step; sampling draws within the step, so that it costs what the likelihood costs. Forward and sampling: a program takes
a few samples with all hidden units, which stay in its registers, and streams W and V, (1 + P) D H numbers. Backward: a
program takes some hidden units and walks over the samples of its group, tile by tile; a comes back as it was, swept
again over STEPS steps from a checkpoint of the tile's own first sweep, both in scratch that is the program's alone.
Each sum has one owner, and the partial sums of groups (weights) and of blocks of units (dx, drho) are added in order:
no atomics. The D steps follow one another, so this is bound by their latency, and at large N by arithmetic: (2 P + 2)
FLOPs and an activation a unit, step and sample.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Aot, cdiv, variant
from ._math import exp, tanh_of

UNITS = 4096  # hidden units whose states a program has registers for; genfast.ops asks for no more
ELEMENTS = 8192  # of a program's state, forward
ROWS, COLUMNS = 16, 32  # samples and hidden units of a tile of the backward
STEPS = 32  # from one checkpoint to the next
REGISTERS = 232  # of a thread of a sampler that draws among levels, and of the backward: more than the assembler grants
GROUPS = 16  # of samples, whose partial sums of the weights' gradients are kept
ACTIVATIONS = {"sigmoid": 0, "relu": 1, "tanh": 2}
KINDS = {"bernoulli": 1, "categorical": 2, "gaussian_mixture": 3}


@triton.jit
def _activation(z, ACT: tl.constexpr):
    if ACT == 0:
        y = 1.0 / (1.0 + exp(-tl.minimum(tl.maximum(z, -87.0), 87.0)))
    elif ACT == 1:
        y = tl.maximum(z, 0.0)
    else:
        y = tanh_of(z)
    return tl.where(z == z, y, z)


@triton.jit
def _slope(z, y, ACT: tl.constexpr):
    """act'(z), y = act(z)."""
    if ACT == 0:
        found = y * y * exp(-tl.minimum(tl.maximum(z, -87.0), 87.0))
    elif ACT == 1:
        found = tl.where(z > 0, 1.0, 0.0)
    else:
        found = 1.0 - y * y
    return found


@triton.jit
def _normal_quantile(u):
    """The inverse of the normal distribution function: sqrt(2) erfinv(2 u - 1) (Giles 2010, single precision)."""
    x = 2.0 * u - 1.0
    w = -tl.log(4.0 * u * (1.0 - u))
    a = w - 2.5
    p = 2.81022636e-08 * a + 3.43273939e-07
    p = ((p * a - 3.5233877e-06) * a - 4.39150654e-06) * a + 0.00021858087
    p = ((p * a - 0.00125372503) * a - 0.00417768164) * a + 0.246640727
    p = p * a + 1.50140941
    b = tl.sqrt(tl.maximum(w, 0.0)) - 3.0
    q = -0.000200214257 * b + 0.000100950558
    q = ((q * b + 0.00134934322) * b - 0.00367342844) * b + 0.00573950773
    q = ((q * b - 0.0076224613) * b + 0.00943887047) * b + 1.00167406
    q = q * b + 2.83297682
    return 1.4142135623730951 * x * tl.where(w < 5.0, p, q)


@triton.jit
def _choose(logits, cols, K, u):
    """The smallest of the first K columns whose cumulative probability exceeds u."""
    live = cols[None, :] < K
    top = tl.max(tl.where(live, logits, float("-inf")), axis=1)
    weights = tl.where(live, exp(logits - top[:, None]), 0.0)
    threshold = u * tl.sum(weights, axis=1)
    reached = u * 0.0
    level = u * 0.0
    for k in range(K - 1):  # a scan along the axis would need memory of its own
        reached += tl.sum(tl.where(cols[None, :] == k, weights, 0.0), axis=1)
        level += tl.where(reached <= threshold, 1.0, 0.0)
    return tl.where(threshold == threshold, level, threshold)  # NaN where the logits have no sum


@triton.jit
def _column(params, cols, k):
    return tl.sum(tl.where(cols[None, :] == k[:, None], params, 0.0), axis=1)


@triton.jit
def _scan(
    x,
    known,
    uniforms,
    weight,
    readout,
    bias,
    hidden,
    rescale,
    out,
    N,
    D,
    P,
    H,
    hidden_row,
    ACT: tl.constexpr,
    RESCALED: tl.constexpr,
    KIND: tl.constexpr,
    GIVEN: tl.constexpr,
    WIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """KIND 0: parameters of given x. Else samples; SIZE columns hold the P parameters of a step."""
    n = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    k = tl.arange(0, WIDE)
    cols = tl.arange(0, SIZE)
    rows, units = n < N, k < H
    far = tl.program_id(0).to(tl.int64) * 0
    a = tl.load(hidden + n[:, None] * hidden_row + k[None, :], mask=rows[:, None] & units[None, :], other=0).to(
        tl.float32
    )
    for d in range(D):
        z = a
        if RESCALED:
            z = a * tl.load(rescale + d).to(tl.float32)
        h = tl.where(units[None, :], _activation(z, ACT), 0.0)
        params = tl.zeros((SAMPLES, SIZE), dtype=tl.float32)
        for p in range(P):
            at = (far + d) * P + p
            v = tl.load(readout + at * H + k, mask=units, other=0).to(tl.float32)
            found = tl.sum(h * v[None, :], axis=1) + tl.load(bias + at).to(tl.float32)
            if KIND == 0:
                tl.store(out + (n * D + d) * P + p, found.to(out.dtype.element_ty), mask=rows)
            else:
                params = tl.where(cols[None, :] == p, found[:, None], params)
        place = n * D + d
        if KIND == 0:
            value = tl.load(x + place, mask=rows, other=0).to(tl.float32)
        else:
            PER: tl.constexpr = 2 if KIND == 3 else 1
            u = tl.load(uniforms + place * PER, mask=rows, other=0).to(tl.float32)
            if KIND == 1:
                chance = _activation(tl.sum(params, axis=1), 0)
                value = tl.where(chance == chance, tl.where(u < chance, 1.0, 0.0), chance)
            elif KIND == 2:
                value = _choose(params, cols, P, u) / (P - 1)
            else:
                K = P // 3
                level = _choose(params, cols, K, u)
                which = level.to(tl.int32)
                second = tl.load(uniforms + place * PER + 1, mask=rows, other=0.5).to(tl.float32)
                second = tl.minimum(tl.maximum(second, 1e-7), 1.0 - 1e-7)
                value = _column(params, cols, K + which)
                value += exp(_column(params, cols, 2 * K + which)) * _normal_quantile(second)
                value = tl.where(level == level, value, level)
            if GIVEN:
                stays = tl.load(known + place, mask=rows, other=0) != 0
                value = tl.where(stays, tl.load(x + place, mask=rows, other=0).to(tl.float32), value)
            tl.store(out + place, value.to(out.dtype.element_ty), mask=rows)
        w = tl.load(weight + (far + d) * H + k, mask=units, other=0).to(tl.float32)
        a += value[:, None] * w[None, :]


@triton.jit
def _sweep(
    x, weight, kept, a, n, k, rows, units, first, last, every, N, D, H, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Steps first to last from a; a_d of every `every`-th of them goes to kept."""
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    far = tl.program_id(0).to(tl.int64) * 0
    for d in range(first, last):
        if (d - first) % every == 0:
            tl.store(kept + (d - first) // every * (ROWS * COLUMNS) + inner, a)
        value = tl.load(x + n * D + d, mask=rows, other=0).to(tl.float32)
        w = tl.load(weight + (far + d) * H + k, mask=units, other=0).to(tl.float32)
        a += value[:, None] * w[None, :]


@triton.jit
def _backward(
    grad,
    x,
    weight,
    readout,
    hidden,
    rescale,
    scratch,
    dx,
    dw,
    dv,
    dc,
    drho,
    N,
    D,
    P,
    H,
    hidden_row,
    runs,
    tiles,
    groups,
    ACT: tl.constexpr,
    RESCALED: tl.constexpr,
    TO_X: tl.constexpr,
    OWN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """COLUMNS hidden units of the samples of one group; dw, dv and dc are (groups, ...), dx and drho (blocks, ...)."""
    block, group = (tl.program_id(0) // groups).to(tl.int64), (tl.program_id(0) % groups).to(tl.int64)
    k = block * COLUMNS + tl.arange(0, COLUMNS)
    units = k < H
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tile_size: tl.constexpr = ROWS * COLUMNS
    states = scratch + tl.program_id(0).to(tl.int64) * (runs + STEPS) * tile_size
    checks = states + STEPS * tile_size
    for tile in range(group, tiles, groups):
        n = tile * ROWS + tl.arange(0, ROWS)
        rows = n < N
        a = tl.load(hidden + n[:, None] * hidden_row + k[None, :], mask=rows[:, None] & units[None, :], other=0).to(
            tl.float32
        )
        _sweep(x, weight, checks, a, n, k, rows, units, 0, D, STEPS, N, D, H, ROWS, COLUMNS)
        tl.debug_barrier()
        e = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for back in range(D):
            d = D - 1 - back
            start = d // STEPS * STEPS
            if (back == 0) | (d == start + STEPS - 1):
                tl.debug_barrier()
                begin = tl.load(checks + d // STEPS * tile_size + inner)
                _sweep(x, weight, states, begin, n, k, rows, units, start, d + 1, 1, N, D, H, ROWS, COLUMNS)
                tl.debug_barrier()
            at = block * 0 + d
            value = tl.load(x + n * D + d, mask=rows, other=0).to(tl.float32)
            w = tl.load(weight + at * H + k, mask=units, other=0).to(tl.float32)
            if TO_X:
                tl.store(dx + (block * N + n) * D + d, tl.sum(e * w[None, :], axis=1), mask=rows)
            own = dw + (group * D + at) * H + k
            tl.store(own, tl.load(own, mask=units, other=0) + tl.sum(e * value[:, None], axis=0), mask=units)
            a = tl.load(states + (d - start) * tile_size + inner)
            rho = 1.0
            if RESCALED:
                rho = tl.load(rescale + d).to(tl.float32)
            z = a * rho
            h = tl.where(rows[:, None] & units[None, :], _activation(z, ACT), 0.0)
            turn = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
            for p in range(P):
                g = tl.load(grad + (n * D + d) * P + p, mask=rows, other=0).to(tl.float32)
                row = at * P + p
                v = tl.load(readout + row * H + k, mask=units, other=0).to(tl.float32)
                turn += g[:, None] * v[None, :]
                own = dv + (group * D * P + row) * H + k
                tl.store(own, tl.load(own, mask=units, other=0) + tl.sum(h * g[:, None], axis=0), mask=units)
            turn = tl.where(rows[:, None] & units[None, :], turn * _slope(z, h, ACT), 0.0)
            if RESCALED:
                own = drho + (block * groups + group) * D + d
                tl.store(own, tl.load(own) + tl.sum(tl.sum(turn * a, axis=1), axis=0))
            e += rho * turn
        if OWN:
            tl.store(dc + n[:, None] * H + k[None, :], e, mask=rows[:, None] & units[None, :])
        else:
            own = dc + group * H + k
            tl.store(own, tl.load(own, mask=units, other=0) + tl.sum(e, axis=0), mask=units)


def _launch(hidden: int, size: int) -> tuple[int, int, dict[str, int]]:
    """Width of a state, samples of a program, launch options; ``size`` parameters of a step are kept beside the
    state."""
    wide = max(16, triton.next_power_of_2(hidden))
    samples = max(1, min(16, ELEMENTS // wide // (1 if size == 1 else 2)))
    warps = max(1, min(8, wide * samples // (1024 if size == 1 else 512)))
    return wide, samples, {"num_warps": warps} | ({} if size == 1 else {"maxnreg": REGISTERS})


def _run(
    x: Tensor | None,
    known: Tensor | None,
    uniforms: Tensor | None,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
    kind: int,
    out: Tensor,
) -> None:
    n, d, p, h = *out.shape[:2], *readout.shape[1:]
    size = triton.next_power_of_2(p) if kind else 1
    wide, samples, options = _launch(h, size)
    dense = [
        t if t is None else t.contiguous() for t in (x, known, uniforms, weight, readout, bias, hidden_bias, rescale)
    ]
    values, mask, u, w, v, b, c, rho = (out if t is None else t for t in dense)
    if n:
        _scan[(cdiv(n, samples),)](
            values,
            mask,
            u,
            w,
            v,
            b,
            c,
            rho,
            out,
            n,
            d,
            p,
            h,
            h if hidden_bias.dim() == 2 else 0,
            ACT=ACTIVATIONS[activation],
            RESCALED=rescale is not None,
            KIND=kind,
            GIVEN=known is not None,
            WIDE=wide,
            SAMPLES=samples,
            SIZE=size,
            **options,
        )


def nade(
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    bias: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
) -> Tensor:
    """Parameters of genfast::nade."""
    out = torch.empty((*x.shape, readout.shape[1]), dtype=x.dtype, device=x.device)
    _run(x, None, None, weight, readout, bias, hidden_bias, rescale, activation, 0, out)
    return out


def nade_sample(
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
    """x of genfast::nade_sample."""
    out = torch.empty(uniforms.shape[:2], dtype=uniforms.dtype, device=uniforms.device)
    mask = None if known is None else known.to(torch.uint8)
    _run(given, mask, uniforms, weight, readout, bias, hidden_bias, rescale, activation, KINDS[kind], out)
    return out


def nade_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    readout: Tensor,
    hidden_bias: Tensor,
    rescale: Tensor | None,
    activation: str,
    need_x: bool,
) -> tuple[Tensor, ...]:
    """Gradients of genfast::nade_backward."""
    (n, d), p, h = x.shape, *readout.shape[1:]
    own = hidden_bias.dim() == 2
    blocks, tiles = cdiv(h, COLUMNS), cdiv(n, ROWS)
    groups, runs = max(1, min(GROUPS, tiles)), cdiv(d, STEPS)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=x.device)

    dw, dv, dc = zeros(groups, d, h), zeros(groups, d, p, h), zeros(n if own else groups, h)
    dx = zeros(blocks, n, d) if need_x else dw
    drho = dw if rescale is None else zeros(blocks * groups, d)
    g, values, w, v, c = (t.contiguous() for t in (grad, x, weight, readout, hidden_bias))
    if n:
        scratch = torch.empty(blocks * groups * (runs + STEPS) * ROWS * COLUMNS, dtype=torch.float32, device=x.device)
        _backward[(blocks * groups,)](
            g,
            values,
            w,
            v,
            c,
            w if rescale is None else rescale.contiguous(),
            scratch,
            dx,
            dw,
            dv,
            dc,
            drho,
            n,
            d,
            p,
            h,
            h if own else 0,
            runs,
            tiles,
            groups,
            ACT=ACTIVATIONS[activation],
            RESCALED=rescale is not None,
            TO_X=need_x,
            OWN=own,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            STEPS=STEPS,
            num_warps=2,
            maxnreg=REGISTERS,
        )
    return (
        dx.sum(0).to(x.dtype) if need_x else x.new_empty(0),
        dw.sum(0).to(weight.dtype),
        dv.sum(0).to(readout.dtype),
        g.sum(0, dtype=torch.float32).to(readout.dtype),
        (dc if own else dc.sum(0)).to(hidden_bias.dtype),
        x.new_empty(0) if rescale is None else drho.sum(0).to(rescale.dtype),
    )


def _add(
    found: list[Aot],
    kind: str,
    label: str,
    kernel: Any,
    ones: tuple[str, ...] | None,
    launch: dict[str, int],
    constants: dict[str, Any],
) -> None:
    types = dict.fromkeys(
        ("x", "uniforms", "weight", "readout", "bias", "hidden", "rescale", "grad", "out"), f"*{kind}"
    )
    types |= {"known": "*u8"} | dict.fromkeys(("scratch", "dx", "dw", "dv", "dc", "drho"), "*fp32")
    own = {name: types[name] for name in kernel.arg_names if name in types}
    sizes = "64-bit sizes" if ones is None else "P = 1" if ones else "P"
    found.append(variant(f"{label}, {sizes} {kind}", kernel, own, constants, ones, **launch))


def _add_scan(
    found: list[Aot],
    kind: str,
    hidden: int,
    act: int,
    ones: tuple[str, ...] | None,
    number: int = 0,
    given: bool = False,
    size: int = 1,
) -> None:
    wide, samples, launch = _launch(hidden, size)
    constants = {
        "ACT": act,
        "RESCALED": act == 1,
        "KIND": number,
        "GIVEN": given,
        "WIDE": wide,
        "SAMPLES": samples,
        "SIZE": size,
    }
    label = f"{hidden} units, act {act}, kind {number}{', some known' if given else ''}"
    _add(found, kind, label, _scan, ones, launch, constants)


def _add_backward(found: list[Aot], kind: str, act: int, to_x: bool, own: bool, ones: tuple[str, ...] | None) -> None:
    constants = {
        "ACT": act,
        "RESCALED": act == 1,
        "TO_X": to_x,
        "OWN": own,
        "ROWS": ROWS,
        "COLUMNS": COLUMNS,
        "STEPS": STEPS,
    }
    _add(found, kind, f"act {act}", _backward, ones, {"num_warps": 2, "maxnreg": REGISTERS}, constants)


def _variants() -> list[Aot]:
    found: list[Aot] = []
    for kind in ("fp32", "bf16", "fp16"):
        _add_scan(found, kind, 500, 0, ())
        _add_scan(found, kind, 500, 1, (), 3, True, 32)
        _add_backward(found, kind, 1, True, False, ())
    for hidden, ones in ((128, ("P",)), (500, ("P",)), (500, None), (UNITS, ()), (UNITS, None)):
        _add_scan(found, "fp32", hidden, 0, ones)
    for act in (1, 2):
        _add_scan(found, "fp32", 500, act, ())
    for given in (False, True):
        _add_scan(found, "fp32", 500, 0, ("P",), 1, given)
    for hidden, size in ((500, 16), (UNITS, 256)):
        _add_scan(found, "fp32", hidden, 0, (), 2, True, size)
    for act, to_x, own, sizes in ((0, False, False, ("P",)), (2, True, True, ()), (1, True, True, None)):
        _add_backward(found, "fp32", act, to_x, own, sizes)
    return found


AOT = _variants()
