"""Gram matrices, forward and backward; the style loss of five VGG19 layers to cached targets; and the plain product
beneath."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, gradients
from genfast.ops.linear import linear_input

LAYERS = ((64, 256), (128, 128), (256, 64), (512, 32), (512, 16))  # relu1_1 to relu5_1 of VGG19 at 256 x 256
BLOCK = 128


def eager(x: Tensor) -> Tensor:
    """pytorch/examples, fast_neural_style/neural_style/utils.py."""
    n, c, h, w = x.shape
    f = x.view(n, c, h * w)
    return f.bmm(f.transpose(1, 2)) / (c * h * w)


def trick(x: Tensor) -> Tensor:
    """The library's products of the blocks at and below the diagonal, mirrored."""
    n, c = x.shape[:2]
    f = x.flatten(2)
    g = x.new_empty(n, c, c)
    for i in range(0, c, BLOCK):
        stop = min(c, i + BLOCK)
        below = torch.bmm(f[:, i:stop], f[:, :stop].mT)
        g[:, i:stop, :stop] = below
        g[:, :i, i:stop] = below[:, :, :i].mT
    return g.mul_(1 / x[0].numel())


def cublas(x: Tensor) -> Tensor:
    """One call of the library, which scales too."""
    f = x.flatten(2)
    n, c, _ = f.shape
    return torch.baddbmm(f.new_empty(()).expand(n, c, c), f, f.mT, beta=0, alpha=1 / f[0].numel())


def _forward(shape: tuple[int, int, int, int], quick: bool, *, dtype: str = "float32", priority: int = 1) -> Case:
    n, c, h, w = shape
    kind = _ceilings.DTYPES[dtype]

    def work(function: Callable[[Tensor], Tensor]) -> Work:
        torch.manual_seed(0)
        x = torch.randn(shape, device=_ceilings.DEVICE).to(kind)
        return lambda: [function(x)]

    providers = {
        "reference": lambda: work(eager),
        "compile": lambda: work(torch.compile(eager, dynamic=False)),
        "trick": lambda: work(trick),
        "trick one call": lambda: work(cublas),
        "genfast": lambda: work(genfast.ops.gram_matrix),
    }
    if c <= BLOCK:
        del providers["trick"]  # one block is the whole product
    moved = kind.itemsize * n * c * h * w + max(kind.itemsize, 4) * n * c * c  # half types give a float32 matrix
    name = f"gram_matrix {shape}{'' if dtype == 'float32' else f' {dtype}'}"
    # The symmetric half is all that must be multiplied.
    return Case(
        name, providers, bytes=moved, flops=n * c * (c + 1) * h * w, quick=quick, dtype=dtype, priority=priority
    )


def eager_loss(xs: list[Tensor], targets: list[Tensor]) -> Tensor:
    return torch.stack([F.mse_loss(eager(x).to(a.dtype), a) for x, a in zip(xs, targets)]).sum()


def _style(batch: int, quick: bool, *, dtype: str = "float32", priority: int = 1) -> Case:
    kind = _ceilings.DTYPES[dtype]

    def work(function: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Work:
        torch.manual_seed(0)
        device = _ceilings.DEVICE
        xs = [torch.randn(batch, c, s, s, device=device).to(kind).requires_grad_() for c, s in LAYERS]
        targets = [eager(0.9 * torch.randn(1, c, s, s, device=device)).expand(batch, c, c) for c, s in LAYERS]
        one = torch.ones((), device=_ceilings.DEVICE)
        return lambda: gradients((function(xs, targets),), xs, (one,))

    providers = {
        "reference": lambda: work(eager_loss),
        "compile": lambda: work(torch.compile(eager_loss, dynamic=False)),
        "genfast": lambda: work(genfast.ops.style_loss),
    }
    moved = sum(3 * kind.itemsize * batch * c * s * s for c, s in LAYERS)
    flops = sum(3 * batch * c * c * s * s for c, s in LAYERS)
    name = f"style_loss VGG19 256 x 256 batch {batch}{'' if dtype == 'float32' else f' {dtype}'}"
    return Case(name, providers, bytes=moved, flops=flops, quick=quick, dtype=dtype, priority=priority)


def _plain(size: int) -> Case:
    """The product of two matrices, ours beside torch's and numpy's, as a share of the measured multiply-add rate."""

    def work(function: Callable[[Tensor, Tensor], Tensor]) -> Work:
        torch.manual_seed(0)
        a, b = torch.randn(2, size, size).unbind()
        return lambda: [function(a, b)]

    def numpy(a: Tensor, b: Tensor) -> Tensor:
        return torch.from_numpy(a.numpy() @ b.numpy())

    providers = {
        "reference": lambda: work(torch.mm),
        "peer": lambda: work(numpy),
        "genfast": lambda: work(linear_input),
    }
    return Case(
        f"linear plain product {size} x {size} x {size}",
        providers,
        flops=2 * size**3,
        quick=False,
        notes={"peer": "numpy"},
        pause=0.2,
    )


CASES = [
    _forward((4, 512, 64, 64), True),
    _forward((1, 64, 256, 256), False),
    _forward((1, 256, 64, 64), False),
    _style(1, True),
    _style(4, False),
    *([_plain(2048)] if _ceilings.DEVICE == "cpu" else []),
]

if _ceilings.DEVICE == "cuda":
    CASES += [
        _forward((n, c, 64, 64), False, dtype="bfloat16", priority=0) for n, c in ((16, 512), (8, 1024), (4, 2048))
    ]
    CASES += [_forward((16, 512, 64, 64), False, dtype="tf32", priority=0)]
    CASES += [_style(16, False, dtype=dtype, priority=0) for dtype in ("tf32", "bfloat16")]
