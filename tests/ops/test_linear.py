"""linear, linear_input, linear_weight: sizes around the tiles, strides, bits, rounding and errors."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import genfast
from genfast.ops.linear import linear, linear_input, linear_weight
from genfast.reference.linear import row_mask

DTYPES = {torch.float64: 1e-13, torch.float32: 2e-6}
# Both sides of the tiles (6 rows by up to 64 columns), of the panels and of the runs of 512 terms.
SIZES = [
    (1, 1, 1),
    (1, 600, 70),
    (5, 31, 33),
    (6, 64, 64),
    (7, 512, 63),
    (13, 513, 65),
    (48, 1025, 130),
    (50, 16, 200),
    (97, 40, 449),
    (64, 2, 512),
    (130, 130, 130),
]


def error(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def exact_linear(x, w, bias, slope):
    v = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    return v if slope is None else F.leaky_relu(v, slope)


@pytest.fixture(params=[True, False], ids=["ours", "library"], autouse=True)
def _which(request, monkeypatch):
    """Every size through both arrangements, whatever the rule says."""
    monkeypatch.setattr(sys.modules["genfast.ops.linear"], "_ours", lambda *_, **__: request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("n", "k", "m"), SIZES)
def test_the_three_products(n, k, m, dtype):
    x, w, c, g = (torch.randn(s, dtype=dtype) for s in ((n, k), (m, k), (m,), (n, m)))
    for bias in (None, c):
        for slope in (None, 0.0, 0.2):
            y, bits = linear(x, w, bias, slope)
            assert error(y, exact_linear(x, w, bias, slope)) <= DTYPES[dtype]
            if slope is None:
                assert bits.numel() == 0
            else:
                assert torch.equal(row_mask(bits, m), y > 0)
                assert bits.shape == (n, -(-m // 8))
                assert m % 8 == 0 or not (bits[:, -1] >> (m % 8)).any()  # the padding of a row is zero
    assert error(linear_input(g, w), g.double() @ w.double()) <= DTYPES[dtype]
    assert error(linear_weight(g, x), g.double().t() @ x.double()) <= DTYPES[dtype]
    kept = torch.randint(256, (n, -(-k // 8)), dtype=torch.uint8)
    plain = linear_input(g, w)
    for slope in (0.0, 0.2):
        expected = torch.where(row_mask(kept, k), plain, plain * slope)
        torch.testing.assert_close(linear_input(g, w, kept, slope), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 20),
    st.integers(0, 80),
    st.integers(0, 140),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 0.0, 0.3]),
)
def test_any_size_and_stride(n, k, m, turn_x, turn_w, slope):
    x = torch.randn(k, n).t() if turn_x else torch.randn(n, k + 3)[:, 1 : k + 1]
    w = torch.randn(k, m + 1).t()[1:] if turn_w else torch.randn(m, 2 * k)[:, ::2]
    g = torch.randn(m, n).t() if turn_w else torch.randn(2 * n, m)[::2]
    with torch.no_grad():
        y, _ = linear(x, w, None, slope)
        torch.testing.assert_close(y, exact_linear(x, w, None, slope).float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear_input(g, w), g @ w, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(linear_weight(g, x), g.t() @ x, rtol=1e-4, atol=1e-4)


def test_the_thread_count_does_not_change_the_bits():
    before = torch.get_num_threads()
    for n, k, m in ((64, 300, 1000), (300, 64, 96), (256, 1100, 520)):
        x, w, g = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m)
        results = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                y, bits = linear(x, w, None, 0.2)
                results.append([y, bits, linear_input(g, w), linear_weight(g, x)])
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(("n", "m"), [(7, 40), (40, 7), (300, 100)])
def test_no_terms_at_all(n, m):
    c = torch.randn(m)
    for x, w in ((torch.randn(n, 0), torch.randn(m, 0)), (torch.randn(0, n).t(), torch.randn(0, m).t())):
        y, bits = linear(x, w, c, 0.5)
        assert torch.equal(y, F.leaky_relu(c, 0.5).expand(n, m))
        assert torch.equal(row_mask(bits, m), y > 0)
    assert not linear_input(torch.randn(n, 0), torch.randn(0, m)).count_nonzero()
    assert not linear_weight(torch.randn(0, n), torch.randn(0, m)).count_nonzero()


def test_what_is_not_finite():
    x = torch.ones(8, 40)
    w = torch.zeros(64, 40)
    w[1], w[2], w[3, 0] = math.inf, -math.inf, math.nan
    y, bits = linear(x, w, None, 0.0)
    assert y[0, :3].tolist() == [0, math.inf, 0]
    assert y[:, 3].isnan().all()
    assert bits[0, 0] == 2
    kept = torch.zeros(8, 5, dtype=torch.uint8)
    assert not linear_input(torch.full((8, 64), math.inf), torch.ones(64, 40), kept, 0.0).count_nonzero()


def test_nothing_outside_is_written():
    from genfast import _cpu

    for n, k, m in ((13, 40, 70), (5, 513, 33)):
        x, w = torch.randn(n, k), torch.randn(m, k)
        out, bits = torch.full((n * m + 64,), 7.0), torch.full((n * -(-m // 8) + 64,), 7, dtype=torch.uint8)
        _cpu.linear(
            a=x,
            a_row=k,
            a_inner=1,
            b=w,
            b_inner=1,
            b_column=k,
            out=out[32:],
            bits=bits[32:],
            bits_mode=1,
            slope=0.5,
            rows=n,
            columns=m,
            inner=k,
            threads=2,
        )
        assert out[:32].eq(7).all()
        assert out[n * m + 32 :].eq(7).all()
        assert bits[:32].eq(7).all()
        assert bits[n * -(-m // 8) + 32 :].eq(7).all()
        torch.testing.assert_close(out[32:-32].view(n, m), F.leaky_relu(x @ w.t(), 0.5), rtol=1e-4, atol=1e-4)


def test_third_derivatives():
    x, w, c = torch.randn(3, 5).double(), torch.randn(4, 5).double(), torch.randn(4).double()
    for t in (x, w, c):
        t.requires_grad_()

    def twice(x, w, c):
        y = linear(x, w, c, 0.2)[0]
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, w), create_graph=True)

    assert torch.autograd.gradcheck(twice, (x, w, c))


def test_the_penalty_of_a_layer_equals_double_backward():
    x, w, c = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((40, 33), (64, 33), (64,)))

    def penalty(layer):
        (g,) = torch.autograd.grad(layer().square().sum(), x, create_graph=True)
        return torch.autograd.grad((g.norm(dim=1) - 1).square().mean(), (w, c, x))

    found = penalty(lambda: linear(x, w, c, 0.2)[0])
    for f, e in zip(found, penalty(lambda: F.leaky_relu(F.linear(x, w, c), 0.2))):
        torch.testing.assert_close(f, e)


def test_half_types_run_the_library():
    x, w = torch.randn(9, 40).bfloat16(), torch.randn(64, 40).bfloat16()
    y, bits = linear(x, w, None, 0.2)
    assert y.dtype == torch.bfloat16
    assert torch.equal(row_mask(bits, 64), y > 0)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["base", "v3"])
def test_lower_instruction_sets(level):
    """The same sums with narrower vectors, where a tile may be narrower than a byte of bits."""
    program = f"""
import sys, torch
from genfast import ops, _cpu
from tests.ops import test_linear as tests
if not _cpu.isa().startswith({"baseline" if level == "base" else "x86-64-v3"!r}):
    raise SystemExit(5)
torch.manual_seed(0)
sys.modules["genfast.ops.linear"]._ours = lambda *_, **__: True
for dtype in tests.DTYPES:
    for size in tests.SIZES:
        tests.test_the_three_products(*size, dtype)
tests.test_the_thread_count_does_not_change_the_bits()
"""
    environment = os.environ | {"GENFAST_CPU_ISA": level, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == 5:
        pytest.skip(f"this processor does not run {level}")
    assert done.returncode == 0, done.stderr[-3000:]


def test_errors_name_the_argument():
    x, w, c = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    with pytest.raises(ValueError, match=r"linear: weight has shape \(5, 3\), expected \(5, 4\)"):
        linear(x, w[:, :3])
    with pytest.raises(ValueError, match=r"linear: bias has shape \(4,\), expected \(5,\)"):
        linear(x, w, c[:4])
    with pytest.raises(ValueError, match=r"linear: x has shape \(4,\), expected two axes"):
        linear(x[0], w)
    with pytest.raises(
        TypeError, match="linear: x has dtype torch.float32, weight has dtype torch.float64; expected one dtype"
    ):
        linear(x, w.double())
    with pytest.raises(TypeError, match="linear: x has dtype torch.int64, expected a floating-point"):
        linear(x.long(), w)
    g = torch.randn(3, 5)
    with pytest.raises(ValueError, match=r"linear_input: grad has shape \(3, 4\), expected \(3, 5\)"):
        linear_input(g[:, :4], w)
    with pytest.raises(TypeError, match="linear_input: bits is a torch.int64, expected a torch.uint8"):
        linear_input(g, w, torch.zeros(3, 1).long())
    with pytest.raises(ValueError, match=r"linear_input: bits has shape \(3, 2\), expected \(3, 1\)"):
        linear_input(g, w, torch.zeros(3, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"linear_weight: grad has shape \(2, 5\), expected \(3, 5\)"):
        linear_weight(g[:2], x)
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match="not bfloat16"):
        linear(x.bfloat16(), w.bfloat16())
