"""nn.LULinear and nn.Householder: the product of reflections, errors."""

from __future__ import annotations

import pytest
import torch

from genfast import nn as gnn
from genfast import reference


def test_householder_is_the_product_of_reflections():
    torch.manual_seed(0)
    vectors = torch.randn(6, 4, dtype=torch.float64)
    expected = torch.eye(4, dtype=torch.float64)
    for v in vectors:
        expected = expected - 2 * torch.outer(v, v @ expected) / v.dot(v)
    torch.testing.assert_close(reference.householder(vectors), expected)
    for scale in (1e-200, 1e200):  # squares would under- or overflow
        torch.testing.assert_close(reference.householder(vectors * scale), expected)
    vectors[2] = 0
    vectors.requires_grad_()
    q = reference.householder(vectors)
    (gradient,) = torch.autograd.grad(q.sin().sum(), vectors)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64))
    assert torch.autograd.gradcheck(reference.householder, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    wide = reference.householder(torch.randn(64, 64))
    assert float((wide @ wide.T - torch.eye(64)).abs().max()) < 2e-6


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "LULinear: features=0", lambda: gnn.LULinear(0)),
        (ValueError, "Householder: features=3 and reflections=0", lambda: gnn.Householder(3, 0)),
        (ValueError, r"Householder: x has shape \(2, 4\)", lambda: gnn.Householder(3)(torch.zeros(2, 4))),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
