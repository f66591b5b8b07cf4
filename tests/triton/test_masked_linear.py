"""The Triton kernels of masked linear layers in Triton's interpreter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from genfast import reference
from genfast._registry import OPS
from genfast.kernels import masked_linear as kernels
from tests.triton import autoregressive_cases as cases
from tests.triton.flow_cases import DTYPES

FLOAT = dict(dtype=torch.float32)
OP = OPS["masked_linear"]


@pytest.mark.parametrize("label", cases.LAYERS)
def test_shapes(label):
    cases.check_layer(cases.layer(label, FLOAT))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("label", ["first layer", "shuffled"])
def test_half_types(label, dtype):
    found = cases.check_layer(cases.layer(label, dict(dtype=dtype)))
    assert [f.dtype for f in found] == [dtype] * 4


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("label", ["first layer", "last layer, reversed"])
def test_strides(label, activation):
    a = cases.layer(label, FLOAT) | dict(activation=activation)
    n, inner = a["x"].shape
    wide = torch.full((n, 2 * inner), math.nan)
    wide[:, ::2] = a["x"]
    outer = a["weight"].shape[0]
    cases.check_layer(a | dict(x=wide[:, ::2], weight=a["weight"].t().contiguous().t()), torch.randn(outer, n).t())
    cases.check_layer(
        a | dict(x=a["x"].t().contiguous().t()), torch.ones(()).expand(n, outer)
    )  # what y.sum() sends back


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_is_wanted(wanted):
    a = cases.layer("one input", FLOAT)
    for activation in ("none", "relu"):
        cases.check_layer(a | dict(activation=activation), wanted=wanted)


def test_tf32():
    """The layouts of the product on tensor cores; the interpreter multiplies in float32 either way."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        cases.check_layer(cases.layer("first layer", FLOAT))
    finally:
        torch.set_float32_matmul_precision(before)


def test_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(kernels, "_far", lambda *_: True)
    cases.check_layer(cases.layer("shuffled", FLOAT))


def test_a_permutation_that_changes_in_place():
    """Whether it is the identity is asked once for each of its versions."""
    order = torch.arange(5)
    assert kernels._in_order(order)
    order.copy_(torch.tensor([1, 0, 2, 3, 4]))
    assert not kernels._in_order(order)
    a = cases.layer("first layer", FLOAT)
    cases.check_layer(a)
    for name in ("rows", "columns"):
        a[name].copy_(a[name].flip(0))
        dead = ~reference.staircase_mask(a["rows"], a["columns"], a["counts"])
        cases.check_layer(a | dict(weight=torch.randn(40, 13).masked_fill(dead, math.nan)))


def test_relu_keeps_nan():
    a = cases.layer("first layer", FLOAT)
    a["x"][2, 0] = math.nan
    y = kernels.masked_linear(*a.values())
    assert bool(y[2].isnan().all())
    assert not y[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize(("n", "out"), [(1, 64), (256, 512), (2**16, 512)])
def test_a_large_batch_takes_large_tiles(n, out):
    for exact, half in ((True, False), (False, False), (False, True)):
        t = kernels._tile(exact, half, False, n, out)
        programs = -(-n // t.rows) * -(-out // t.columns)
        assert programs >= kernels.MULTIPROCESSORS or t.rows * t.columns <= 32 * 32
        assert n < 2**16 or t.rows * t.columns >= 128 * 64
