"""Up- and downsampling with StyleGAN2's filter [1, 3, 3, 1], forward and backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients

TAPS = (1, 3, 3, 1)


def eager(x: Tensor, f: Tensor, up: int, down: int) -> Tensor:
    """Zeros inserted, padding, a depthwise convolution, every down-th element: what NVlabs' own reference does."""
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), (0, up - 1, 0, 0, 0, up - 1)).reshape(n, c, h * up, w * up)
    x = F.pad(x, (2, 1, 2, 1) if down == 1 else (1, 1, 1, 1))
    return F.conv2d(x, (f * up * up).expand(c, 1, 4, 4), groups=c)[:, :, ::down, ::down]


def trick(x: Tensor, f: Tensor, up: int, down: int) -> Tensor:
    """A depthwise convolution, transposed or strided, so that zeros and dropped elements are not computed."""
    c = x.shape[1]
    weight = (f * up * up).repeat(c, 1, 1, 1)
    if up == 2:
        return F.conv_transpose2d(x, weight, stride=2, padding=1, groups=c)
    if down == 2:
        return F.conv2d(x, weight, stride=2, padding=1, groups=c)
    return F.conv2d(F.pad(x, (2, 1, 2, 1)), weight, groups=c)


def ours(x: Tensor, f: Tensor, up: int, down: int) -> Tensor:
    if up == 2:
        return genfast.ops.upsample2d(x, f)
    return genfast.ops.downsample2d(x, f) if down == 2 else genfast.ops.filter2d(x, f)


def _case(shape: tuple[int, ...], up: int, down: int, channels_last: bool, quick: bool) -> Case:
    form = torch.channels_last if channels_last else torch.contiguous_format
    n, c, h, w = shape
    out = (n, c, h * up // down, w * up // down)

    def work(function: Work) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        x = torch.randn(shape, device=device).contiguous(memory_format=form).requires_grad_()
        gy = torch.randn(out, device=device).contiguous(memory_format=form)
        f = genfast.ops.setup_filter(TAPS, device)
        return lambda: gradients((function(x, f, up, down),), (x,), (gy,))

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "genfast": lambda: work(ours),
    }
    kind = "up" if up > 1 else "down" if down > 1 else "filter"
    name = f"upfirdn2d {kind} {shape}{' channels_last' if channels_last else ''}"
    # float32: x read and y written, then grad y read and grad x written.
    elements = n * c * h * w + out[0] * out[1] * out[2] * out[3]
    return Case(name, providers, bytes=4 * 2 * elements, quick=quick)


CASES = [
    _case((16, 128, 32, 32), 2, 1, False, True),
    _case((16, 128, 32, 32), 1, 2, False, False),
    _case((16, 128, 32, 32), 1, 2, True, False),
    _case((4, 64, 128, 128), 2, 1, False, False),
    _case((4, 64, 128, 128), 1, 2, False, False),
    _case((8, 3, 256, 256), 1, 1, False, False),
]
