"""The Triton kernels of activation.py in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import genfast.kernels.activation as kernel
from genfast._registry import OPS
from genfast._verify import relative_error
from genfast.ops.activation import KINDS
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORMS, FORWARD, each_dtype


def test_activation_kinds_are_those_of_the_op():
    assert tuple(kernel.KINDS) == KINDS


@each_dtype
@pytest.mark.parametrize("shape", [(), (1,), (65, 3), (2, 3, 5, 7), (3, 6, 40, 31), (0, 4)], ids=str)
def test_activation_bits(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for slope in (0.0, 0.2):
        for t in (x, x.contiguous(memory_format=torch.channels_last)) if x.dim() == 4 else (x,):
            y, bits = cases.run(OPS["leaky_relu_bits"], (t, slope))
            expected = OPS["leaky_relu_bits"].reference(t, slope)
            assert torch.equal(bits, expected[1])
            cases.compare(OPS["leaky_relu_bits"], (t, slope), FORWARD[dtype])
            if t.numel():
                cases.compare(OPS["apply_bits"], (y, bits, slope), FORWARD[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_activation_strides(form):
    x = cases.strided(torch.randn(3, 6, 5, 7), form)
    assert torch.equal(cases.run(OPS["leaky_relu_bits"], (x, 0.1))[1], OPS["leaky_relu_bits"].reference(x, 0.1)[1])
    cases.compare(OPS["activation_chain"], (x, torch.randn(3, 6, 5, 7), "gelu"), FORWARD[torch.float32])


@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (5, 9), (3, 130), (40, 64)], ids=str)
def test_activation_bits_of_rows(shape, dtype):
    x = torch.randn(shape).to(dtype)
    bits = torch.randint(256, (shape[0], -(-shape[1] // 8)), dtype=torch.uint8)
    for slope in (0.0, 0.2):
        cases.compare(OPS["apply_bits"], (x, bits, slope), FORWARD[dtype])
    y, made = kernel.row_signs_(x.clone(), 0.2)
    assert relative_error(y, torch.where(x > 0, x, x * 0.2).double()) <= FORWARD[dtype]
    assert torch.equal(made, OPS["linear"].reference(x, torch.eye(shape[1], dtype=dtype), None, 0.2)[1])


@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_activation_slopes(kind, dtype):
    x, g, t, c = (2 * torch.randn(3, 5, 9, 31).to(dtype) for _ in range(4))
    cases.compare(OPS["activation_chain"], (x, g, kind), FORWARD[dtype])
    cases.compare(OPS["activation_second"], (x, g, t, None, kind), FORWARD[dtype])
    cases.compare(OPS["activation_second"], (x, g, t, c, kind), FORWARD[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_activation_extremes(kind):
    x = torch.tensor([-1e30, -100.0, -20.0, 20.5, 100.0, 1e30])
    one = torch.ones_like(x)
    exact = OPS["activation_chain"].reference(x.clamp(-300, 300).double(), one.double(), kind)
    assert float((cases.run(OPS["activation_chain"], (x, one, kind))[0] - exact).abs().max()) < 1e-6
    exact = OPS["activation_second"].reference(x.clamp(-300, 300).double(), *[one.double()] * 2, None, kind)
    assert float((cases.run(OPS["activation_second"], (x, one, one, None, kind))[0] - exact).abs().max()) < 1e-6
