"""The Triton kernels of squeeze in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast._registry import OPS
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("order", ["pixel_unshuffle", "space_to_depth"])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_squeeze_moves_every_element(factor, order, form):
    op, f = OPS["squeeze"], factor
    for shape in ((2, 3, 3 * f, 5 * f), (1, 1, f, f), (0, 2, f, f)):
        x = cases.strided(torch.randn(shape), form)
        y = cases.compare(op, (x, factor, order, False), 0.0)[0]
        assert torch.equal(cases.compare(op, (cases.strided(y, form), factor, order, True), 0.0)[0], x)
    whole = torch.arange(16 * f * f).reshape(1, 4, 2 * f, 2 * f)
    for kind in (torch.int64, torch.uint8):
        expected = op.reference(whole.to(kind), factor, order, False)
        with genfast.backend("triton"):
            assert torch.equal(op(whole.to(kind), factor, order, False), expected)


def test_squeeze_rows_longer_than_a_tile():
    x = torch.randn(1, 2, 2, 1100).bfloat16()
    y = cases.compare(OPS["squeeze"], (x, 2, "pixel_unshuffle", False), 0.0)[0]
    assert torch.equal(cases.compare(OPS["squeeze"], (y, 2, "pixel_unshuffle", True), 0.0)[0], x)
