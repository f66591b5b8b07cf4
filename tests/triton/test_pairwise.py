"""The Triton kernels over pairs of rows in Triton's interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch

from genfast._registry import OPS
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import GRADIENT, each_dtype

SHAPES = [(1, 1, 1, 1), (2, 5, 70, 3), (1, 130, 65, 33), (2, 64, 7, 40), (0, 3, 2, 2), (2, 0, 3, 2), (2, 3, 4, 0)]
OPTIONS = {"rbf": [0.5, 0.1], "imq": [0.8, 8.0, 30.0], "polynomial": [1.0]}


def _rows(dtype, *shape):
    return (torch.randn(shape) / max(1, shape[-1]) ** 0.5).to(dtype)


def _check(x, y, kernel, degree=3, exclude=False):
    options = (kernel, OPTIONS[kernel], degree, 1.0, exclude)
    o = cases.compare(OPS["pairwise_kernel_sum"], (x, y, *options), 2e-6)[0]
    assert o.dtype == torch.float32
    grad = torch.randn(x.shape[:2])
    for wanted in ((True, True), (True, False), (False, True)):
        cases.compare(OPS["pairwise_kernel_sum_backward"], (grad, x, y, *options, *wanted), GRADIENT[x.dtype])


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", list(OPTIONS))
def test_pairwise_sums(shape, kernel, dtype):
    b, n, m, c = shape
    x, y = _rows(dtype, b, n, c), _rows(dtype, b, m, c)
    _check(x, y, kernel)
    _check(x, None, kernel, exclude=n > 1)
    _check(x, None, kernel, degree=2)


def test_pairwise_strides():
    x, y = torch.randn(5, 2, 8).transpose(0, 1)[..., ::2], torch.randn(2, 4, 7).mT
    _check(x, y, "rbf")
    _check(x, y, "polynomial", degree=1)


def test_pairwise_panels(monkeypatch):
    """More rows than one panel of weights holds."""
    monkeypatch.setattr(importlib.import_module("genfast.kernels.pairwise"), "PANEL", 1)
    _check(_rows(torch.float32, 2, 150, 5), _rows(torch.float32, 2, 70, 5), "imq")
    _check(_rows(torch.float32, 1, 150, 5), None, "polynomial", exclude=True)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 70, 3), (1, 70, 130, 33), (0, 3, 2, 2), (2, 0, 3, 2)], ids=str)
def test_pairwise_nearest(shape, dtype):
    b, n, m, c = shape
    x, y = _rows(dtype, b, n, c), _rows(dtype, b, m, c)
    for k in {1, min(3, m)}:
        cases.compare(OPS["nearest_rows"], (x, y, k, False), 2e-6)
        if n > k:
            cases.compare(OPS["nearest_rows"], (x, None, k, True), 2e-6)


def test_pairwise_equal_rows_in_order():
    # Whole numbers with mean 0, which is subtracted: their products are exact in whichever order a BLAS sums them.
    y = torch.tensor([[0, 1, -2, 3], [4, 0, 1, -1], [-3, 2, 2, 0], [1, -4, 0, 2], [-2, 1, -1, -4]], dtype=torch.float32)
    y = y.repeat(30, 1)[None]
    distance, index = cases.run(OPS["nearest_rows"], (y[:, :5].contiguous(), y, 3, False))
    assert torch.equal(index[0], torch.arange(5)[:, None] + torch.tensor([0, 5, 10]))
    assert not distance.any()
