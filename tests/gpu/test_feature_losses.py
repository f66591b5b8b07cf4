"""Gram matrices, contextual similarity, pairwise sums and the diagonal Gaussian on a CUDA GPU, at real sizes against
float64.

The ops' samples run in test_flow_ops, which takes every op with a Triton kernel.
"""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast import ops, reference
from tests.triton.flow_cases import FORWARD, GRADIENT

GPU = torch.device("cuda")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=GPU).to(dtype)


def error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradients(function, *tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


def check(function, dtype, *tensors):
    """The same function of the same numbers in float64 on the reference."""
    value, grads = gradients(function, *tensors)
    with genfast.backend("reference"):
        exact, expected = gradients(function, *(t.double() for t in tensors))
    assert error(value, exact) <= FORWARD[dtype]
    for g, e in zip(grads, expected):
        assert error(g, e) <= GRADIENT[dtype]


@each_dtype
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape", [(4, 64, 256, 256), (4, 128, 128, 128), (4, 256, 64, 64), (4, 512, 32, 32), (1, 511, 7, 9)], ids=str
)
def test_gram_matrix(shape, last, dtype):
    x = randn(*shape, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = randn(shape[0], shape[1], shape[1])
    check(lambda f: (ops.gram_matrix(f) * weight.to(torch.promote_types(f.dtype, torch.float32))).sum(), dtype, x)
    g = ops.gram_matrix(x)
    assert torch.equal(g, g.mT)
    assert torch.equal(g, ops.gram_matrix(x))


def test_style_loss_of_five_layers():
    layers = [randn(2, c, s, s) for c, s in ((64, 256), (128, 128), (256, 64), (512, 32), (512, 16))]
    targets = [reference.gram_matrix(0.9 * f[:1].double(), 1 / f[0].numel(), 0.0) for f in layers]
    check(lambda *fs: ops.style_loss(fs, [t.to(fs[0].dtype) for t in targets]), torch.float32, *layers)


@each_dtype
@pytest.mark.parametrize("over", ["sources", "targets"])
@pytest.mark.parametrize(
    "sizes",
    [((1, 256, 32, 32), (1, 256, 32, 32)), ((2, 64, 31, 33), (2, 64, 40, 25)), ((1, 512, 16, 16),) * 2],
    ids=str,
)
def test_contextual_similarity(sizes, over, dtype):
    x, y = (randn(*s, dtype=dtype) for s in sizes)
    with torch.no_grad():
        found = ops.contextual_similarity(x, y, over=over)
        with genfast.backend("reference"):
            exact = ops.contextual_similarity(x.double(), y.double(), over=over)
    assert error(found, exact) <= FORWARD[dtype]
    if dtype == torch.float32:
        check(lambda a, b: -ops.contextual_similarity(a, b, over=over).log(), dtype, x, y)


def test_contextual_similarity_writes_no_pairs():
    x, y = randn(1, 256, 128, 128).requires_grad_(), randn(1, 256, 128, 128)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(ops.contextual_similarity(x, y), x)
    assert torch.cuda.max_memory_allocated() - before < 16384 * 16384 * 4 // 4


@pytest.mark.parametrize("kernel", ["rbf", "imq", "polynomial"])
@pytest.mark.parametrize("shape", [(1024, 8), (2048, 256), (997, 65)], ids=str)
def test_mmd(shape, kernel):
    check(
        lambda x, y: ops.mmd(x, y, kernel=kernel, bandwidths=[1.0, 4.0] if kernel != "polynomial" else None),
        torch.float32,
        randn(*shape),
        1.0 + randn(*shape),
    )


def test_nearest_neighbors():
    x, y = randn(3000, 64), randn(5000, 64)
    distances, index = ops.nearest_neighbors(x, y, k=3)
    expected = torch.cdist(x.double(), y.double()).topk(3, largest=False)
    assert torch.equal(index, expected.indices)
    assert error(distances, expected.values) <= FORWARD[torch.float32]


@each_dtype
@pytest.mark.parametrize("shape", [(256, 64), (64, 16, 32, 32)], ids=str)
def test_diagonal_gaussian(shape, dtype):
    tensors = [randn(*shape, dtype=dtype) for _ in range(3)]
    check(
        lambda m, v, e: (lambda z, kl: kl.sum() + z.square().sum().to(kl.dtype))(*ops.diagonal_gaussian(m, v, e)),
        dtype,
        *tensors,
    )
