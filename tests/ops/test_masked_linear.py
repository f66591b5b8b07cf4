"""Masked linear layers: what a staircase is, that live weights alone count, and the kernel against the float64
reference."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops, reference
from genfast.ops.masked_linear import staircase, staircase_from_mask


def degrees(kind: str, size: int, most: int) -> torch.Tensor:
    if kind == "rising":
        return torch.arange(size) * most // size + 1
    if kind == "falling":
        return (torch.arange(size) * most // size + 1).flip(0)
    return torch.arange(size) % most + 1  # as nflows and zuko number hidden units


def relative(found, expected):
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))


# ---- staircases ----


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.lists(st.integers(0, 5), min_size=1, max_size=9),
    outputs=st.lists(st.integers(0, 6), min_size=1, max_size=9),
    strict=st.booleans(),
)
def test_a_staircase_is_the_comparison_of_degrees(inputs, outputs, strict):
    a, b = torch.tensor(inputs), torch.tensor(outputs)[:, None]
    expected = b > a if strict else b >= a
    found = staircase(inputs, outputs, strict)
    assert torch.equal(found.mask, expected)
    assert bool((found.counts.diff() >= 0).all())
    again = staircase_from_mask(expected)
    assert again is not None
    assert torch.equal(again.mask, expected)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 1 << 16))
def test_a_mask_is_a_staircase_where_its_live_sets_are_nested(rows, columns, seed):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.7
    sets = [{i for i in range(columns) if mask[r, i]} for r in range(rows)]
    nested = all(a <= b or b <= a for a, b in itertools.combinations(sets, 2))
    found = staircase_from_mask(mask)
    assert (found is not None) == nested
    assert found is None or torch.equal(found.mask, mask)


def test_masks_of_peers_are_staircases():
    zuko, nflows = pytest.importorskip("zuko"), pytest.importorskip("nflows.transforms.made")
    flow = zuko.flows.MAF(7, 3, transforms=2, hidden_features=(16, 12), randperm=True)
    masks = [m.mask for m in flow.modules() if isinstance(m, zuko.nn.MaskedLinear)]
    masks += [m.mask for m in nflows.MADE(7, 16, output_multiplier=2).modules() if isinstance(m, nflows.MaskedLinear)]
    assert len(masks) == 12
    for mask in masks:
        found = staircase_from_mask(mask)
        assert found is not None
        assert torch.equal(found.mask, mask.bool())


# ---- the kernel ----

SIZES = ((1, 5, 7), (1, 70, 40), (3, 40, 33), (5, 64, 64), (13, 70, 67), (64, 200, 150), (97, 17, 300), (257, 65, 129))
LONG = ((9, 1200, 90), (1100, 70, 30), (40, 600, 600))  # more terms than one visit of a tile takes, inputs or samples


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES + LONG, ids=str)
def test_all_orders_of_units_and_sizes(sizes, dtype):
    n, inputs, outputs = sizes
    kinds = ("rising", "falling", "cyclic")
    allowed = (2e-6, 1e-5) if dtype == torch.float32 else (1e-13, 1e-13)
    for before, after, relu in zip(kinds * 3, sorted(kinds * 3), (True, False) * 5):
        mask = staircase(degrees(before, inputs, 13), degrees(after, outputs, 13), strict=relu)
        leaves = [torch.randn(s, dtype=dtype, requires_grad=True) for s in ((n, inputs), (outputs, inputs), (outputs,))]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        act = "relu" if relu else "none"
        y, expected = ops.masked_linear(*leaves, mask=mask, activation=act), reference.masked_linear(*exact, *mask, act)
        g = torch.randn(n, outputs, dtype=dtype)
        with torch.no_grad():  # where rounding decides about a relu, either is right
            g = g * ((expected.abs() > 1e-4) | (expected == 0))
        assert relative(y, expected) <= allowed[0]
        found, wanted = torch.autograd.grad(y, leaves, g), torch.autograd.grad(expected, exact, g.double())
        for f, w in zip(found, wanted):
            assert relative(f, w) <= allowed[1]
        assert not found[1][~mask.mask].count_nonzero()


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 20),
    inputs=st.integers(1, 80),
    outputs=st.integers(1, 80),
    most=st.integers(1, 9),
    strict=st.booleans(),
    relu=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_any_degrees(n, inputs, outputs, most, strict, relu, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = staircase(*(torch.randint(0, most + 1, (s,), generator=generator) for s in (inputs, outputs)), strict)
    x, w, b, g = (
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in ((n, inputs), (outputs, inputs), (outputs,), (n, outputs))
    )
    arguments = (*mask, "relu" if relu else "none")
    y, expected = (
        ops.masked_linear(x, w, b, mask=mask, activation=arguments[-1]),
        reference.masked_linear(x, w, b, *arguments),
    )
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    kept = expected if relu else None
    backward = genfast._registry.OPS["masked_linear_backward"]
    for wanted in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        found = backward(g, x, w, kept, *mask, wanted)
        for f, e in zip(found, reference.masked_linear_backward(g, x, w, kept, *mask, wanted)):
            torch.testing.assert_close(f, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [2, 30])
def test_dead_weights_may_hold_anything_and_stay_as_they_are(n):
    mask = staircase(degrees("cyclic", 70, 9), degrees("rising", 90, 9), strict=True)
    x, w = torch.randn(n, 70, dtype=torch.float64), torch.randn(90, 70, dtype=torch.float64)
    expected = F.linear(x, w * mask.mask)
    w[~mask.mask] = torch.nan
    leaves = [x.requires_grad_(), w.requires_grad_()]
    y = ops.masked_linear(*leaves, mask=mask)
    torch.testing.assert_close(y, expected)
    dx, dw = torch.autograd.grad(y.square().sum(), leaves)
    assert bool(dx.isfinite().all())
    assert bool(dw.isfinite().all())
    assert not dw[~mask.mask].count_nonzero()
    assert bool(w[~mask.mask].isnan().all())


def test_all_dead_and_all_live():
    x, b = torch.randn(20, 33, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    w = torch.randn(50, 33, dtype=torch.float64)
    none, every = staircase([1] * 33, [0] * 50), staircase([1] * 33, [1] * 50)
    assert torch.equal(ops.masked_linear(x, w, b, mask=none), b.expand(20, 50))
    torch.testing.assert_close(ops.masked_linear(x, w, b, mask=every), F.linear(x, w, b))


@pytest.mark.parametrize("n", [1, 8])
def test_a_nan_goes_through_a_relu(n):
    x = torch.ones(n, 3)
    x[0, 0] = torch.nan
    y = ops.masked_linear(x, torch.ones(2, 3), mask=staircase([1, 2, 3], [3, 3]), activation="relu")
    assert bool(y[0].isnan().all())
    assert bool((y[1:] == 3).all())


def test_poisoned_outputs_are_written(monkeypatch):
    """Every element of all outputs, whatever the memory held."""
    module = ops.masked_linear.__globals__

    def poisoned(rows, columns, dtype):
        return torch.full((rows, columns), torch.nan, dtype=dtype)

    monkeypatch.setitem(module, "_empty", poisoned)
    for n, before, after in ((1, "cyclic", "falling"), (9, "falling", "cyclic"), (600, "rising", "rising")):
        mask = staircase(degrees(before, 70, 5), degrees(after, 35, 6), strict=True)
        x, w = torch.randn(n, 70, requires_grad=True), torch.randn(35, 70, requires_grad=True)
        y = ops.masked_linear(x, w, mask=mask)
        assert all(bool(t.isfinite().all()) for t in (y, *torch.autograd.grad(y.sum(), (x, w))))


def test_the_thread_count_does_not_change_the_bits():
    before = torch.get_num_threads()
    try:
        for n, kind in ((3, "rising"), (300, "cyclic"), (1300, "falling")):
            mask = staircase(degrees(kind, 130, 11), degrees("cyclic", 140, 11))
            leaves = [torch.randn(s, requires_grad=True) for s in ((n, 130), (140, 130), (140,))]
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y = ops.masked_linear(*leaves, mask=mask, activation="relu")
                results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(before)


def test_third_derivatives():
    mask = staircase([1, 2, 3], [1, 3, 2, 0])
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (4, 3), (4,)))

    def second(x, w, b):
        y = ops.masked_linear(x, w, b, mask=mask).tanh()
        first = torch.autograd.grad(y.square().sum(), (x, w), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, w, b), create_graph=True)

    assert torch.autograd.gradcheck(second, (x, w, b))


def test_any_leading_axes_and_strides():
    mask = staircase([1, 2, 3, 4], [4, 2, 3])
    x, w = torch.randn(2, 5, 4), torch.randn(4, 3).t()
    y = ops.masked_linear(x, w, mask=mask)
    assert y.shape == (2, 5, 3)
    torch.testing.assert_close(y, F.linear(x, w * mask.mask))
    torch.testing.assert_close(ops.masked_linear(x[0, 0], w, mask=mask), y[0, 0])
    torch.testing.assert_close(ops.masked_linear(x.transpose(0, 1), w, mask=mask), y.transpose(0, 1))
    assert ops.masked_linear(x[:, :0], w, mask=mask).shape == (2, 0, 3)


def test_autocast_and_half_types():
    mask = staircase(degrees("rising", 40, 9), degrees("cyclic", 50, 9))
    x, w = torch.randn(30, 40), torch.randn(50, 40)
    expected = F.linear(x, w * mask.mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.masked_linear(x, w, mask=mask)
    assert y.dtype == torch.bfloat16
    for dtype in (torch.bfloat16, torch.float16):
        assert relative(ops.masked_linear(x.to(dtype), w.to(dtype), mask=mask), expected.double()) <= 1e-2
    assert relative(y, expected.double()) <= 1e-2


def test_compiled_it_is_the_same():
    mask = staircase(degrees("rising", 20, 9), degrees("falling", 30, 9))
    leaves = [torch.randn(s, requires_grad=True) for s in ((6, 20), (30, 20), (30,))]

    def step(x, w, b):
        return ops.masked_linear(x, w, b, mask=mask, activation="relu").square().sum()

    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves)
    for f, e in zip(found, torch.autograd.grad(step(*leaves), leaves)):
        torch.testing.assert_close(f, e)


@pytest.mark.slow
@pytest.mark.skipif("GENFAST_CPU_ISA" in os.environ, reason="a level was asked for")
def test_other_instruction_sets_give_the_same(tmp_path):
    import subprocess
    import sys

    program = """
import sys, torch
from genfast import ops
from genfast.ops.masked_linear import staircase
torch.manual_seed(0)
found = []
for n, kind in ((2, 7), (50, 7), (50, 200)):
    mask = staircase(torch.arange(70), torch.arange(90) % kind)
    leaves = [torch.randn(s, requires_grad=True) for s in ((n, 70), (90, 70), (90,))]
    y = ops.masked_linear(*leaves, mask=mask, activation="relu")
    found += [y, *torch.autograd.grad(y.sum(), leaves)]
torch.save([f.detach() for f in found], sys.argv[1])
"""
    results = []
    for level in ("base", "v3", ""):
        path = tmp_path / f"{level or 'best'}.pt"
        environment = os.environ | {"GENFAST_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", program, str(path)], env=environment, check=True)
        results.append(torch.load(path))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert relative(a, b.double()) <= 1e-6


# ---- what does not fit ----

X, W, GOOD = torch.zeros(4, 3), torch.zeros(5, 3), staircase([1, 2, 3], [1, 1, 2, 3, 3])


def of(**changed):
    return GOOD._replace(**changed)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"x is \[1\], expected a torch.Tensor", lambda: ops.masked_linear([1], W, mask=GOOD)),
        (TypeError, "x has dtype torch.int64", lambda: ops.masked_linear(X.long(), W, mask=GOOD)),
        (ValueError, r"x has shape \(4, 2\), expected \(N, 3\)", lambda: ops.masked_linear(X[:, :2], W, mask=GOOD)),
        (ValueError, r"weight has shape \(3,\), expected two axes", lambda: ops.masked_linear(X, W[0], mask=GOOD)),
        (TypeError, "weight has dtype torch.float64 and x torch.float32", lambda: ops.masked_linear(X, W.double(),
        mask=GOOD)),
        (ValueError, r"bias has shape \(4,\), expected \(5,\)", lambda: ops.masked_linear(X, W, torch.zeros(4),
        mask=GOOD)),
        (ValueError, "activation='tanh', expected one of", lambda: ops.masked_linear(X, W, mask=GOOD,
        activation="tanh")),
        (ValueError, r"counts has shape \(4,\), expected \(5,\)",
         lambda: ops.masked_linear(X, W, mask=of(counts=GOOD.counts[:4]))),
        (TypeError, "rows is torch.int32, expected a torch.int64",
         lambda: ops.masked_linear(X, W, mask=of(rows=GOOD.rows.int()))),
        (ValueError, "columns is on meta and x on cpu",
         lambda: ops.masked_linear(X, W, mask=of(columns=GOOD.columns.to("meta")))),
        (ValueError, "are no staircase", lambda: ops.masked_linear(X, W, mask=of(rows=GOOD.rows * 0))),
        (ValueError, "are no staircase", lambda: ops.masked_linear(X, W, mask=of(columns=GOOD.columns + 1))),
        (ValueError, "are no staircase", lambda: ops.masked_linear(X, W, mask=of(counts=GOOD.counts.flip(0)))),
        (ValueError, "are no staircase", lambda: ops.masked_linear(X, W, mask=of(counts=GOOD.counts + 1))),
        (ValueError, "are no staircase", lambda: ops.masked_linear(X, W, mask=of(counts=GOOD.counts - 2))),
        (ValueError, "in_degrees has dtype torch.bool", lambda: staircase([True], [1])),
        (ValueError, r"out_degrees has dtype torch.int64 and shape \(\)", lambda: staircase([1], 2)),
        (ValueError, r"mask has shape \(3,\), expected \(O, I\)", lambda: staircase_from_mask(torch.ones(3))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
