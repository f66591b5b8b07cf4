"""Masked convolution on a CUDA GPU: every case of the interpreter's tests, real sizes, a capture, and twice for equal
bits."""

from __future__ import annotations

import pytest
import torch

import genfast
from tests.triton import masked_conv_cases as cases
from tests.triton.flow_cases import DTYPES

GPU = torch.device("cuda")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])


@each_dtype
@pytest.mark.parametrize("label", cases.CASES)
def test_every_case(label, dtype):
    cases.check(cases.arguments(label, dict(device=GPU, dtype=dtype)))


@each_dtype
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "out", "kernel"), [((16, 64, 28, 28), 64, 7), ((8, 128, 32, 32), 256, 3), ((4, 66, 33, 31), 132, 5)]
)
def test_real_sizes(shape, out, kernel, form, dtype):
    options = dict(mask_type="B", data_channels=1)
    x = torch.randn(shape, device=GPU).to(dtype).contiguous(memory_format=form).requires_grad_()
    w = (
        (torch.randn(out, shape[1], kernel, kernel, device=GPU) / (shape[1] * kernel**2) ** 0.5)
        .to(dtype)
        .requires_grad_()
    )
    gy = torch.randn(shape[0], out, *shape[2:], device=GPU).to(dtype)
    found = torch.autograd.grad(y := genfast.ops.masked_conv2d(x, w, **options), (x, w), gy)
    again = torch.autograd.grad(genfast.ops.masked_conv2d(x, w, **options), (x, w), gy)
    assert all(torch.equal(a, b) for a, b in zip(found, again))
    with genfast.backend("reference"):
        wide = [t.detach().double().requires_grad_() for t in (x, w)]
        expected_y = genfast.ops.masked_conv2d(*wide, **options)
        expected = torch.autograd.grad(expected_y, wide, gy.double())
    allowed = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    for f, e in zip((y, *found), (expected_y, *expected)):
        assert float((f.double() - e).norm() / e.norm()) <= allowed


def test_it_is_captured_in_a_graph():
    x, w = torch.randn(4, 16, 12, 12, device=GPU), torch.randn(16, 16, 3, 3, device=GPU)
    expected = genfast.ops.masked_conv2d(x, w, mask_type="B")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = genfast.ops.masked_conv2d(x, w, mask_type="B")
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(y, 2 * expected)
