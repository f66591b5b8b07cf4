"""The Triton kernels of the splines in Triton's interpreter."""

from __future__ import annotations

import math

import pytest
import torch

import genfast
from genfast._registry import OPS
from genfast._verify import relative_error
from genfast.kernels import spline as kernels
from tests.triton import autoregressive_cases as cases
from tests.triton.flow_cases import DTYPES, FORWARD, run

FLOAT = dict(dtype=torch.float32)
OP = OPS["rational_quadratic_spline"]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("bins", [2, 3, 8, 64])
def test_bins_tails_conventions(bins, kind, inverse):
    cases.check_spline(cases.spline((7,), bins, kind, inverse, FLOAT))


@pytest.mark.parametrize("kind", cases.KINDS)
def test_packed_parameters(kind):
    cases.check_packed(cases.spline((3, 23), 3, kind, True, FLOAT))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_half_types(dtype, inverse):
    found = cases.check_spline(cases.spline((3, 23), 8, "zuko linear", inverse, dict(dtype=dtype)))
    assert [f.dtype for f in found] == [dtype, torch.float32] + [dtype] * 4


@pytest.mark.parametrize("shape", [(), (1,), (64,), (2, 3, 11), (0, 4)], ids=str)
def test_shapes(shape):
    cases.check_spline(cases.spline(shape, 5, "nflows linear", False, FLOAT))


@pytest.mark.parametrize("form", ["rows apart", "rows and elements apart", "not in a row", "one row for all"])
def test_strides(form):
    x, *logits, tails, convention, inverse, options = cases.spline((7, 5), 6, "nflows circular", False, FLOAT)

    def laid_out(t):
        wide = t.new_full((*t.shape[:-1], t.shape[-1] + 5), math.nan)
        wide[..., 2 : 2 + t.shape[-1]] = t
        if form == "rows apart":
            return wide[..., 2 : 2 + t.shape[-1]]
        if form == "rows and elements apart":
            return torch.stack((wide, wide), 1)[:, 1, :, 2 : 2 + t.shape[-1]]
        if form == "not in a row":
            return t.movedim(-1, 0).contiguous().movedim(0, -1)
        return t[:1, :1].expand(t.shape)

    x = torch.stack((x, x * math.nan), -1)[..., 0]
    args = [x, *map(laid_out, logits), tails, convention, inverse, options]
    cases.check_spline(args, (torch.ones(()).expand(x.shape), torch.randn(5, 7).t()))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("which", [0, 1])
def test_one_gradient_alone(which, inverse):
    args = cases.spline((3, 23), 8, "nflows linear", inverse, FLOAT)
    grad = torch.randn(3, 23)
    cases.check_spline(args, (None, grad) if which else (grad, None))


def test_parameters_of_another_type():
    x, *rest = cases.spline((3, 11), 8, "nflows linear", False, FLOAT)
    found = run(OP, (x.bfloat16(), *rest))
    exact = OP.reference(x.bfloat16().double(), *(r.double() if isinstance(r, torch.Tensor) else r for r in rest))
    assert relative_error(found[0], exact[0]) <= FORWARD[torch.bfloat16]
    assert relative_error(found[1], exact[1]) <= FORWARD[torch.float32]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_bounds_and_beyond(kind, inverse):
    """At the bounds, beside them, far out, infinite and NaN, with a gradient; neighbours are untouched."""
    args = cases.spline((16,), 4, kind, inverse, FLOAT)
    low, high = args[-1][2:4] if inverse else args[-1][:2]
    at = torch.tensor([low, high])
    beside = torch.nextafter(torch.cat((at, at)), torch.tensor([-math.inf, math.inf, math.inf, -math.inf]))
    args[0][:10] = torch.cat((at, beside, torch.tensor([-1e30, 1e30, -math.inf, math.inf])))
    args[0][10] = math.nan
    found = run(OP, tuple(args))
    exact = OP.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    for f, e in zip(found, exact):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=2e-6, equal_nan=True)
    grads = torch.randn(16), torch.randn(16)
    found = run(OPS["rational_quadratic_spline_backward"], (*grads, *args))
    exact = OPS["rational_quadratic_spline_backward"].reference(
        *(a.double() if isinstance(a, torch.Tensor) else a for a in (*grads, *args))
    )
    for f, e in zip(found, exact):
        torch.testing.assert_close(f.double(), e, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_knot_belongs_where_the_reference_says(kind, inverse):
    """Equal bins, whose knots are exact: the values there are, and the gradient is that of the bin on the right
    side."""
    _, *logits, tails, convention, _, options = cases.spline((3,), 4, kind, inverse, FLOAT)
    logits[:2] = [torch.zeros(3, 4), torch.zeros(3, 4)]
    options = [-2.0, 2.0, -2.0, 2.0, 0.0, 0.0, *options[6:]]
    args = (torch.tensor([-1.0, 0.0, 1.0]), *logits, tails, convention, inverse, options)
    grads = torch.randn(3), torch.randn(3)
    found = run(OPS["rational_quadratic_spline_backward"], (*grads, *args))
    exact = OPS["rational_quadratic_spline_backward"].reference(
        *(a.double() if isinstance(a, torch.Tensor) else a for a in (*grads, *args))
    )
    for f, e in zip(found, exact):
        torch.testing.assert_close(f.double(), e, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_parameter_that_is_nan(where):
    args = cases.spline((9,), 4, "nflows none", False, FLOAT)
    before = run(OP, tuple(args))
    args[1 + where][4] = math.nan
    after = run(OP, tuple(args))
    rest = torch.arange(9) != 4
    for b, a in zip(before, after):
        assert bool(a[4].isnan())
        assert torch.equal(a[rest], b[rest])


@pytest.mark.parametrize("kind", ["nflows linear", "zuko linear"])
def test_a_narrow_bin(kind):
    """Places in a narrow bin far from where knots are summed from: plain float32 is off by ten times as much."""
    _, widths, heights, derivatives, *rest, options = cases.spline((64,), 16, kind, False, FLOAT)
    options[4] = 0.0
    widths = 0.1 * widths
    widths[:, 12] = -4.0
    shares = genfast.reference.spline._shares(widths.double(), rest[1], options[7], options[8])
    start, size = -2 + 4 * shares[:, :12].sum(1), 4 * shares[:, 12]
    x = (start + size * torch.linspace(0.05, 0.95, 64).double()).float()
    args = [x, widths, heights, derivatives, *rest, options]
    exact = OP.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    for f, p, e in zip(run(OP, tuple(args)), OP.reference(*args), exact):
        assert 4 * relative_error(f, e) <= relative_error(p, e)


def test_64_bit_offsets(monkeypatch):
    constants = kernels._constants
    monkeypatch.setattr(kernels, "_constants", lambda *a: constants(*a) | dict(FAR=True))
    cases.check_spline(cases.spline((70,), 8, "nflows linear", False, FLOAT))
    cases.check_spline(cases.spline((20,), 64, "zuko linear", True, FLOAT))
