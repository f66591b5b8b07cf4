"""The Triton kernels of minibatch_discrimination in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import GRADIENT, each_dtype


def _check_pairs(m, grad=None, tangent=None):
    n, b, _ = m.shape
    for include_self in (True, False):
        o = cases.compare(OPS["pairwise_l1_kernel_sum"], (m, include_self), 5e-6)[0]
        assert o.dtype == torch.float32
    grad = torch.randn(n, b) if grad is None else grad
    cases.compare(OPS["pairwise_l1_kernel_sum_backward"], (m, grad), GRADIENT[m.dtype])
    tangent = torch.randn_like(m) if tangent is None else tangent
    cases.compare(OPS["pairwise_l1_kernel_sum_second_backward"], (m, grad, tangent), GRADIENT[m.dtype])


@each_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (5, 3, 4), (17, 2, 5), (40, 1, 17), (9, 2, 35), (0, 3, 2), (3, 2, 0), (4, 0, 3)], ids=str
)
def test_minibatch_discrimination_shapes(shape, dtype):
    _check_pairs(torch.randn(shape).to(dtype) / max(1, shape[2]) ** 0.5)


def test_minibatch_discrimination_strides():
    m = torch.randn(6, 5, 4)
    _check_pairs(m.transpose(0, 1).contiguous().transpose(0, 1), torch.ones(()).expand(6, 5))
    _check_pairs(torch.randn(6, 5, 8)[..., ::2], torch.randn(5, 6).T, torch.randn(4, 5, 6).permute(2, 1, 0))


def test_minibatch_discrimination_ties_have_no_slope():
    m = torch.randn(1, 3, 4).repeat(5, 1, 1)
    o = cases.run(OPS["pairwise_l1_kernel_sum"], (m, True))[0]
    assert torch.equal(o, torch.full((5, 3), 5.0))
    assert not cases.run(OPS["pairwise_l1_kernel_sum_backward"], (m, torch.ones(5, 3)))[0].any()
