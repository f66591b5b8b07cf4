"""Splines: the numbers of nflows, zuko and normflows, knots and tails, NaN, narrow bins, half types, any order,
errors."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops, reference
from genfast.ops.spline import derivative_count
from tests.conftest import poisoned

D = torch.float64


def logits(shape, bins, tails="linear", dtype=D, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    counts = (bins, bins, derivative_count(bins, tails))
    return [(scale * torch.randn(*shape, n, generator=g, dtype=D)).to(dtype).requires_grad_() for n in counts]


def same(found, expected, inputs, atol=1e-11):
    """Outputs, and gradients of both outputs with respect to all inputs."""
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-11, atol=atol)
    weights = [torch.randn_like(o) for o in expected]
    grads = [torch.autograd.grad(o, inputs, weights, retain_graph=True) for o in (tuple(found), tuple(expected))]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=10 * atol)


def peer(name):
    pytest.importorskip(name.split(".")[0])
    return importlib.import_module(name)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("bins", "bound"), [(8, 1.0), (10, 3.0), (2, 2.0), (31, 5.0), (64, 0.5)])
def test_equals_nflows(bins, bound, inverse):
    nflows = peer("nflows.transforms.splines.rational_quadratic")
    x = (torch.randn(37, 3, dtype=D) * bound).requires_grad_()
    params = logits((37, 3), bins)
    options = {"min_bin_width": 2e-3, "min_bin_height": 3e-3, "min_derivative": 4e-3}
    expected = nflows.unconstrained_rational_quadratic_spline(x, *params, inverse, "linear", bound, **options)
    found = ops.rational_quadratic_spline(x, *params, bound=bound, inverse=inverse, **options)
    same(found, expected, (x, *params))
    packed = ops.rational_quadratic_spline_packed(
        x, torch.cat(params, -1), bins, bound=bound, inverse=inverse, **options
    )
    same(packed, expected, (x, *params))


@pytest.mark.parametrize("inverse", [False, True])
def test_equals_nflows_without_tails(inverse):
    nflows = peer("nflows.transforms.splines.rational_quadratic")
    low, high = (2.0, 5.0) if inverse else (-1.0, 0.5)
    domain = {"left": -1.0, "right": 0.5, "bottom": 2.0, "top": 5.0}
    if inverse:  # nflows holds the input against left and right in both directions
        domain |= {"left": 1.0, "right": 6.0}
    x = (low + (high - low) * torch.rand(41, dtype=D)).requires_grad_()
    params = logits((41,), 5, "none")
    expected = nflows.rational_quadratic_spline(x, *params, inverse, **domain)
    same(ops.rational_quadratic_spline(x, *params, tails=None, inverse=inverse, **domain), expected, (x, *params))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tensor_bound", [False, True])
@pytest.mark.parametrize("tails", ["linear", "circular"])
def test_equals_normflows(tails, tensor_bound, inverse):
    normflows = peer("normflows.utils.splines")
    bound = torch.tensor([0.7, 2.0, 3.1], dtype=D) if tensor_bound else 2.0
    x = (2 * torch.randn(23, 3, dtype=D)).requires_grad_()
    params = logits((23, 3), 6, tails)
    theirs = list(params)
    if tensor_bound and tails == "circular":  # their circular tails alone take K derivatives of a whole batch
        theirs = [params[0], params[1], params[2]]
    expected = normflows.unconstrained_rational_quadratic_spline(x, *theirs, inverse, tails, bound)
    found = ops.rational_quadratic_spline(x, *params, bound=bound, tails=tails, inverse=inverse)
    same(found, expected, (x, *params))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("bins", "bound", "slope"), [(8, 5.0, 1e-3), (2, 1.0, 1e-2), (16, 3.0, 1e-4)])
def test_equals_zuko(bins, bound, slope, shared, inverse):
    transforms = peer("zuko.transforms")
    x = (torch.randn(29, 4, dtype=D) * bound * 0.8).requires_grad_()
    params = logits((4,) if shared else (29, 4), bins, scale=4.0)
    spline = transforms.MonotonicRQSTransform(*params, bound=bound, slope=slope)
    expected = (spline.inv if inverse else spline).call_and_ladj(x)
    found = ops.rational_quadratic_spline(x, *params, convention="zuko", bound=bound, slope=slope, inverse=inverse)
    same(
        found, expected, (x, *params), atol=1e-9
    )  # bins so steep that the next number after x has another logdet, by 3e-11


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", ["linear", None])
def test_linear_equals_nflows(tails, inverse, monkeypatch):
    nflows = peer("nflows.transforms.splines.linear")
    search = (
        nflows.torchutils.searchsorted
    )  # adds 1e-6 to the last knot in place, which the last bin's slope then holds
    monkeypatch.setattr(nflows.torchutils, "searchsorted", lambda locations, x: search(locations.clone(), x))
    x = torch.rand(33, 2, dtype=D).mul_(0.999).requires_grad_()
    pdf = torch.randn(33, 2, 7, dtype=D, requires_grad=True)
    torch.set_default_dtype(D)  # the inverse's boundaries are of the default dtype
    try:
        if tails is None:
            expected = nflows.linear_spline(x, pdf, inverse)
        else:
            x = (3 * x.detach() - 1.5).mul_(2).requires_grad_()
            expected = nflows.unconstrained_linear_spline(x, pdf, inverse, tail_bound=2.0)
    finally:
        torch.set_default_dtype(torch.float32)
    found = ops.linear_spline(x, pdf, tails=tails, inverse=inverse, bound=2.0 if tails else None)
    same(found, expected, (x, pdf))


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("tails", ["linear", None])
def test_quadratic_equals_nflows(tails, inverse):
    nflows = peer("nflows.transforms.splines.quadratic")
    x = torch.rand(33, 2, dtype=D).mul_(0.999).requires_grad_()
    widths, heights, _ = logits((33, 2), 7)
    heights = torch.randn(33, 2, 6 if tails else 8, dtype=D, requires_grad=True)
    if tails is None:
        expected = nflows.quadratic_spline(x, widths, heights, inverse)
    else:
        x = (3 * x.detach() - 1.5).mul_(2).requires_grad_()
        expected = nflows.unconstrained_quadratic_spline(x, widths, heights, inverse, tail_bound=2.0)
    found = ops.quadratic_spline(x, widths, heights, tails=tails, inverse=inverse, bound=2.0 if tails else None)
    same(found, expected, (x, widths, heights), atol=1e-10)


CONVENTIONS = [("nflows", "linear"), ("nflows", "circular"), ("nflows", None), ("zuko", "linear")]


def call(x, params, convention, tails, **options):
    limits = {"left": -2.0, "right": 2.0, "bottom": -2.0, "top": 2.0} if tails is None else {"bound": 2.0}
    return ops.rational_quadratic_spline(x, *params, convention=convention, tails=tails, **limits, **options)


@pytest.mark.parametrize(("convention", "tails"), CONVENTIONS)
@settings(max_examples=25, deadline=None)
@given(bins=st.integers(2, 64), n=st.integers(1, 70), seed=st.integers(0, 1000))
def test_inverse_undoes_and_logdets_cancel(convention, tails, bins, n, seed):
    params = [p.detach() for p in logits((n,), bins, tails or "none", seed=seed)]
    x = (torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=D) - 0.5) * (3.99 if tails is None else 6)
    y, logdet = call(x, params, convention, tails, min_bin_width=1e-3, min_bin_height=1e-3)
    back, negated = call(y, params, convention, tails, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(negated, -logdet, rtol=1e-7, atol=1e-7)


def knots(params, convention, vertical=False):
    """The knots of the elements, from the reference's parts."""
    from genfast.reference import spline

    minimum = 0.0 if convention == "zuko" else 1e-3
    sizes = spline._sizes(spline._shares(params[int(vertical)], convention, 1e-3, 1.0), minimum, -2.0, 2.0)
    return spline._starts(sizes, -2.0)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("convention", "tails"), CONVENTIONS)
def test_values_and_gradients_at_knots(convention, tails, inverse):
    """A knot maps to its knot; both bins agree on y, logdet and dy/dx there, and all gradients are finite."""
    bins = 6
    params = logits((bins,), bins, tails or "none")
    from_, to = (knots(params, convention, v).detach().diagonal() for v in (inverse, not inverse))
    x = from_.clone().requires_grad_()
    y, logdet = call(x, params, convention, tails, inverse=inverse)
    torch.testing.assert_close(y.detach(), to, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(y.sum() + logdet.sum(), (x, *params), retain_graph=True)
    assert all(bool(g.isfinite().all()) for g in grads)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(slope.log(), logdet, rtol=1e-10, atol=1e-10)
    for step in (-1e-9, 1e-9):
        inner = [p[1:] for p in params]
        near, near_logdet = call(x.detach()[1:] + step, inner, convention, tails, inverse=inverse)
        torch.testing.assert_close(near, to[1:], rtol=0, atol=1e-6)
        torch.testing.assert_close(near_logdet, logdet.detach()[1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("convention", "tails"), CONVENTIONS)
def test_the_bounds_and_beyond(convention, tails, inverse, dtype):
    x = torch.tensor([-2.0, 2.0], dtype=dtype)
    if tails is not None:
        x = torch.cat([x, torch.tensor([-2.0001, 2.0001, 1e30, float("inf"), float("-inf")], dtype=dtype)])
    x.requires_grad_()
    params = logits(x.shape, 8, tails or "none", dtype)
    y, logdet = call(x, params, convention, tails, inverse=inverse)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
    assert not logdet[2:].any()
    if tails == "linear":
        torch.testing.assert_close(logdet, torch.zeros_like(x), rtol=0, atol=1e-5)
    gx, *grads = torch.autograd.grad(y.sum() + logdet.sum(), (x, *params))
    assert bool((gx[2:] == 1).all())
    assert all(bool(g.isfinite().all()) and not g[2:].any() for g in grads)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("convention", ["nflows", "zuko"])
@pytest.mark.parametrize("where", ["x", "widths", "heights", "derivatives"])
def test_nan_comes_out_where_it_went_in(where, convention, inverse, backend):
    if backend not in {*genfast._registry.OPS["rational_quadratic_spline"].kernels, "reference"}:
        pytest.skip("no kernel")
    x = torch.linspace(-1.5, 1.5, 40).requires_grad_()
    params = logits(x.shape, 5, dtype=torch.float32)
    clean = call(x, params, convention, "linear", inverse=inverse)
    dirty = [t.detach().clone() for t in (x, *params)]
    if where == "x":
        dirty[0][17] = float("nan")
    else:
        dirty[["widths", "heights", "derivatives"].index(where) + 1][17] = float("nan")
    dirty = [t.requires_grad_() for t in dirty]
    with genfast.backend(backend):
        found = call(dirty[0], dirty[1:], convention, "linear", inverse=inverse)
        clean = call(x, params, convention, "linear", inverse=inverse)
    others = torch.arange(40) != 17
    for f, c in zip(found, clean):
        assert bool(f[17].isnan())
        assert torch.equal(f[others], c[others])
    gradients = torch.autograd.grad(sum(f.sum() for f in found), dirty)
    expected = torch.autograd.grad(sum(c.sum() for c in clean), (x, *params))
    for g, e in zip(gradients, expected):
        assert torch.equal(g[others], e[others])
    assert bool(gradients[0][17].isnan())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_near_zero_bins(dtype, inverse):
    """Logits 60 apart and no minimum: bins below the spacing of x are passed over, and all stays finite and in
    order."""
    x = torch.linspace(-2, 2, 401, dtype=dtype).requires_grad_()
    params = logits(x.shape, 8, dtype=dtype)
    with torch.no_grad():
        params[0][:, ::2] -= 60
        params[1][:, ::2] -= 60
    y, logdet = call(x, params, "nflows", "linear", inverse=inverse, min_bin_width=0.0, min_bin_height=0.0)
    grads = torch.autograd.grad(y.sum() + logdet.sum(), (x, *params))
    assert all(bool(t.isfinite().all()) for t in (y, logdet, *grads))
    assert bool((y.abs() <= 2.00001).all())
    shared = [p[:1].expand_as(p) for p in params]
    y, _ = call(x, shared, "nflows", "linear", inverse=inverse, min_bin_width=0.0, min_bin_height=0.0)
    assert bool((y.diff() >= -1e-5).all())


def test_any_order_of_derivatives():
    x = torch.tensor([-0.7, 0.2, 1.3], dtype=D, requires_grad=True)
    params = logits((3,), 4)
    for inverse in (False, True):

        def second(x, *params, inverse=inverse):
            y, logdet = ops.rational_quadratic_spline(x, *params, bound=2.0, inverse=inverse)
            first = torch.autograd.grad((y.square() + logdet).sum(), (x, *params), create_graph=True)
            return torch.autograd.grad(sum(f.sin().sum() for f in first), (x, *params), create_graph=True)

        assert torch.autograd.gradcheck(second, (x, *params), fast_mode=True, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("convention", "tails"), CONVENTIONS)
def test_half_types_compute_in_float32(convention, tails, dtype):
    x = (torch.rand(64) * 3.8 - 1.9).to(dtype).requires_grad_()
    params = logits((64,), 8, tails or "none", dtype)
    y, logdet = call(x, params, convention, tails)
    assert (y.dtype, logdet.dtype) == (dtype, torch.float32)
    wide = [t.detach().float().requires_grad_() for t in (x, *params)]
    expected, expected_logdet = call(wide[0], wide[1:], convention, tails)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(logdet, expected_logdet)
    found = torch.autograd.grad(y.float().sum() + logdet.sum(), (x, *params))
    for f, e in zip(found, torch.autograd.grad(expected.sum() + expected_logdet.sum(), wide)):
        assert f.dtype == dtype
        torch.testing.assert_close(f, e.to(dtype), rtol=2e-2, atol=1e-3)


def test_parameters_of_another_dtype_are_taken():
    x = torch.randn(6)
    params = [p.detach() for p in logits((6,), 5, dtype=torch.bfloat16)]
    found = ops.rational_quadratic_spline(x, *params, bound=2.0)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found, ops.rational_quadratic_spline(x, *(p.float() for p in params), bound=2.0))


def test_shapes_broadcast():
    x = torch.randn(5, 1, 3, dtype=D, requires_grad=True)
    params = logits((4, 3), 5)
    y, logdet = ops.rational_quadratic_spline(x, *params, bound=2.0)
    assert y.shape == logdet.shape == (5, 4, 3)
    whole = [p.expand(5, 4, 3, -1) for p in params]
    same((y, logdet), ops.rational_quadratic_spline(x.expand(5, 4, 3), *whole, bound=2.0), (x, *params))
    single = ops.rational_quadratic_spline(torch.tensor(0.3, dtype=D), *(p[0, 0] for p in params), bound=2.0)
    assert single[0].shape == ()


def test_thread_counts_and_runs_give_the_same_bits():
    x = torch.randn(40001, requires_grad=True)
    params = torch.randn(40001, 23, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            y, logdet = ops.rational_quadratic_spline_packed(x, params, 8, bound=2.0)
            results.append([y, logdet, *torch.autograd.grad(y.sum() + logdet.sum(), (x, params))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def relative(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-30))


def away_from_knots(n, params, convention, inverse):
    """Elements in the middle half of a bin drawn at random, where rounding does not choose the bin."""
    starts = knots([p.detach() for p in params], convention, vertical=inverse)
    ends = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], 2.0)], -1)
    k = torch.randint(starts.shape[1], (n, 1))
    u = 0.25 + 0.5 * torch.rand(n, 1, dtype=D)
    return (starts + u * (ends - starts)).gather(1, k)[:, 0]


def both_dtypes(n, bins, convention, tails, inverse, run):
    """Outputs and gradients of ``run`` on float32 numbers, and of the reference on the same numbers in float64."""
    params = logits((n,), bins, tails or "none", torch.float32)
    x = away_from_knots(n, [p.double() for p in params], convention, inverse).float().requires_grad_()
    weights = [torch.randn(n), torch.randn(n)]
    results = []
    for dtype, function in ((torch.float32, run), (D, call)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (x, *params)]
        with genfast.backend("reference" if dtype is D else genfast._backend.forced):
            found = function(inputs[0], inputs[1:], convention, tails, inverse=inverse)
            results.append([*found, *torch.autograd.grad(found, inputs, [v.to(dtype) for v in weights])])
    return results


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("convention", "tails"), CONVENTIONS)
@pytest.mark.parametrize(
    ("bins", "n"), [(2, 1), (3, 15), (5, 17), (7, 33), (8, 16), (9, 64), (10, 100), (16, 47), (64, 31)]
)
def test_every_element_is_written(bins, n, convention, tails, inverse, packed):
    """With outputs that are NaN until then, in both dtypes; how exact float32 is, the next test asks."""

    def run(x, params, convention, tails, inverse):
        if not packed:
            return call(x, params, convention, tails, inverse=inverse)
        limits = {"left": -2.0, "right": 2.0, "bottom": -2.0, "top": 2.0} if tails is None else {"bound": 2.0}
        options = {"convention": convention, "tails": tails, "inverse": inverse, **limits}
        return ops.rational_quadratic_spline_packed(x, torch.cat(params, -1), bins, **options)

    with poisoned():
        found, expected = both_dtypes(n, bins, convention, tails, inverse, run)
    for f, e in zip(found, expected):
        assert bool(f.isfinite().all())
        assert relative(f, e) <= 1e-3


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("convention", "tails"), CONVENTIONS)
@pytest.mark.parametrize("bins", [2, 8, 13, 16, 17, 64])
def test_float32_accuracy(bins, convention, tails, inverse):
    """A narrow bin magnifies the rounding of its start and of x in any program, logdet's derivatives most. So ours is
    held to 2e-6 and 1e-5, or where plain PyTorch in float32 is further off, to what it makes of the same numbers."""
    with genfast.backend("reference"):
        plain, again = both_dtypes(4096, bins, convention, tails, inverse, call)
    torch.manual_seed(0)
    found, expected = both_dtypes(4096, bins, convention, tails, inverse, call)
    assert torch.equal(again[0], expected[0])
    for i, (f, e, p) in enumerate(zip(found, expected, plain)):
        assert relative(f, e) <= max(2e-6 if i < 2 else 1e-5, 3 * relative(p, e))


def test_rows_of_a_larger_tensor_are_read_where_they_lie():
    big = torch.randn(50, 2, 40)
    x = torch.randn(50, 2)
    params = big[..., 3:26]
    expected = ops.rational_quadratic_spline_packed(x, params.clone(), 8, bound=2.0)
    torch.testing.assert_close(ops.rational_quadratic_spline_packed(x, params, 8, bound=2.0), expected, rtol=0, atol=0)
    parts = [big[..., 3:11], big[..., 11:19], big[..., 19:26]]
    torch.testing.assert_close(ops.rational_quadratic_spline(x, *parts, bound=2.0), expected, rtol=0, atol=0)
    turned = [p.transpose(0, 1) for p in parts]
    found = ops.rational_quadratic_spline(x.t(), *turned, bound=2.0)
    torch.testing.assert_close(tuple(f.t() for f in found), expected, rtol=0, atol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_large_outputs_hold_what_small_ones_do(packed):
    """Outputs from 8 MiB on are written past the caches."""
    n = 90_003
    x, params = torch.randn(n, requires_grad=True), torch.randn(n, 23, requires_grad=True)

    def both(x, params):
        if packed:
            y, logdet = ops.rational_quadratic_spline_packed(x, params, 8, bound=2.0)
        else:
            y, logdet = ops.rational_quadratic_spline(x, *params.split((8, 8, 7), -1), bound=2.0)
        return [y, logdet, *torch.autograd.grad((y * x.detach()).sum() + logdet.sum(), (x, params))]

    with poisoned():
        whole = both(x, params)
    for begin in (0, 45_000, 89_990):
        part = slice(begin, begin + 1000)
        some = both(x.detach()[part].requires_grad_(), params.detach()[part].requires_grad_())
        assert all(torch.equal(w[part], s) for w, s in zip(whole, some))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", "v3"])
def test_lower_instruction_sets(level):
    program = f"""
import torch
from genfast import _cpu
from tests.ops import test_spline as tests
if not _cpu.isa().startswith({"baseline" if level == "base" else "x86-64-v3"!r}):
    raise SystemExit(5)
torch.manual_seed(0)
for convention, tails in tests.CONVENTIONS:
    for inverse in (False, True):
        for bins, n in ((3, 7), (5, 17), (8, 33), (64, 9)):
            for packed in (False, True):
                tests.test_every_element_is_written(bins, n, convention, tails, inverse, packed)
            tests.test_values_and_gradients_at_knots(convention, tails, inverse)
"""
    environment = os.environ | {"GENFAST_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == 5:
        pytest.skip(f"this processor does not run {level}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_output_alone_has_gradients():
    x = torch.randn(9, dtype=D, requires_grad=True)
    params = logits((9,), 5)
    y, logdet = ops.rational_quadratic_spline(x, *params, bound=2.0)
    both_ = torch.autograd.grad(y.sum() + 0 * logdet.sum(), (x, *params), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), (x, *params), retain_graph=True), both_)
    both_ = torch.autograd.grad(0 * y.sum() + logdet.sum(), (x, *params), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logdet.sum(), (x, *params)), both_)


@pytest.mark.parametrize("inverse", [False, True])
def test_an_element_outside_a_domain_without_tails_is_an_error(inverse):
    x = torch.rand(40)
    params = [p.detach() for p in logits((40,), 8, "none", torch.float32)]
    ops.rational_quadratic_spline(x, *params, tails=None, inverse=inverse)
    x[33] = 1.001
    with pytest.raises(ValueError, match=r"x has elements outside \[0.0, 1.0\], where a spline with tails=None"):
        ops.rational_quadratic_spline(x, *params, tails=None, inverse=inverse)


w, h, d = torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(3, 7)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((w[:, :1], h[:, :1], d[:, :0]), {}, ValueError, r"1 bins, expected 2 to 64"),
        ((torch.zeros(3, 65), torch.zeros(3, 65), torch.zeros(3, 64)), {}, ValueError, r"65 bins, expected 2 to 64"),
        ((w, h[:, :7], d), {}, ValueError, r"heights has shape \(3, 7\), expected \(3, 8\)"),
        (
            (w, h, w),
            {},
            ValueError,
            r"derivatives has shape \(3, 8\), expected \(3, 7\) .*7 for 8 bins, tails='linear'",
        ),
        ((w, h, d), {"tails": "circular"}, ValueError, r"expected \(3, 8\) .*8 for 8 bins, tails='circular'"),
        ((w, h, d), {"tails": None}, ValueError, r"expected \(3, 9\) .*9 for 8 bins, tails='none'"),
        ((w, h, d), {"tails": "flat"}, ValueError, r"tails='flat', expected one of"),
        ((w, h, d), {"convention": "pyro"}, ValueError, r"convention='pyro', expected one of 'nflows', 'zuko'"),
        ((w, h, d), {"bound": 0.0}, ValueError, r"bound=0.0, expected a positive number"),
        ((w, h, d), {"bound": -1.0}, ValueError, r"bound=-1.0, expected a positive number"),
        ((w, h, d), {"tails": None, "bound": 1.0}, ValueError, r"bound is given with tails=None"),
        ((w, h, d), {"min_bin_width": 0.2}, ValueError, r"min_bin_width=0.2 for 8 bins, expected 0 to 0.125"),
        ((w, h, d), {"min_bin_height": 0.2}, ValueError, r"min_bin_height=0.2 for 8 bins, expected 0 to 0.125"),
        ((w, h, d), {"min_derivative": -1.0}, ValueError, r"min_derivative=-1.0, expected at least 0"),
        ((w, h, d), {"slope": 2.0, "convention": "zuko"}, ValueError, r"slope=2.0, expected above 0 and below 1"),
        ((w, h, d), {"logit_scale": 0.0}, ValueError, r"logit_scale=0.0, expected a positive number"),
        ((w.int(), h, d), {}, TypeError, r"widths has dtype torch.int32, expected a floating-point"),
        (([0.0], h, d), {}, TypeError, r"widths is a list, expected a torch.Tensor"),
        ((w[:2], h, d), {}, ValueError, r"widths has shape \(2, 8\), expected \(3, 8\)"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.rational_quadratic_spline(torch.zeros(3), *arguments, **options)


def test_errors_of_the_others():
    x = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"params has shape \(3, 24\), expected \(3, 23\) .*23 for 8 bins, tails='linear'"
    ):
        ops.rational_quadratic_spline_packed(x, torch.zeros(3, 24), 8)
    with pytest.raises(ValueError, match=r"linear_spline: tails='circular', expected one of 'linear', 'none'"):
        ops.linear_spline(x, w, tails="circular")
    with pytest.raises(ValueError, match=r"quadratic_spline: heights has shape \(3, 9\), expected \(3, 7\)"):
        ops.quadratic_spline(x, w, torch.zeros(3, 9))


def test_reference_gives_nan_outside_a_domain_without_tails():
    x = torch.tensor([-0.1, 0.5, 1.1])
    y, logdet = reference.rational_quadratic_spline(
        x, w, h, torch.zeros(3, 9), "none", "nflows", False, [0.0, 1.0, 0.0, 1.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0]
    )
    assert y.isnan().tolist() == logdet.isnan().tolist() == [True, False, True]
