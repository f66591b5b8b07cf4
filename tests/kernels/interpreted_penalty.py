"""The Triton kernels of the parts of a critic's penalty in the interpreter; ``make slow`` runs this."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.fail("run ``make slow``, which runs this file under TRITON_INTERPRET=1", pytrace=False)

from genfast._registry import OPS
from tests.kernels import flow_cases as cases
from tests.kernels.flow_cases import DTYPES, FORMS, FORWARD, GRADIENT

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
SHAPES = [(1, 1), (3, 5, 7, 11), (70, 2), (2, 2100), (2, 3, 40, 31), (2, 4, 19), (2, 3, 2, 3, 4), (0, 3, 4), (3, 2, 0)]


# ---- interpolate ----


def _check_interpolate(real, fake, grad, epsilon):
    dtype = real.dtype
    cases.compare(OPS["interpolate"], (real, fake, epsilon), FORWARD[dtype])
    for wanted in ([True, True, True], [True, False, False], [False, True, False], [False, False, True]):
        cases.compare(OPS["interpolate_backward"], (grad, real, fake, epsilon, wanted), GRADIENT[dtype])


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpolate_shapes(shape, dtype):
    _check_interpolate(*(torch.randn(shape).to(dtype) for _ in range(3)), torch.rand(shape[0]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", ["dense", "channels_last", "column slice"])
def test_interpolate_strides(form, other):
    real, fake, grad = (torch.randn(3, 4, 5, 7) for _ in range(3))
    _check_interpolate(cases.strided(real, form), cases.strided(fake, other), grad, torch.rand(6)[::2])
    _check_interpolate(real, cases.strided(fake, form), cases.strided(grad, other), torch.rand(3).bfloat16().float())


# ---- sample_norm ----


def _check_norm(x):
    for squared in (False, True):
        norm = cases.compare(OPS["sample_norm"], (x, squared), 2e-6)[0]
        assert norm.dtype == torch.float32
        back = (x, norm, torch.randn(norm.shape), squared)
        cases.compare(OPS["sample_norm_backward"], back, GRADIENT[x.dtype])


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sample_norm_shapes(shape, dtype):
    _check_norm(torch.randn(shape).to(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_sample_norm_strides(form):
    _check_norm(cases.strided(torch.randn(3, 4, 5, 7), form))


def test_sample_norm_more_tiles_than_programs(monkeypatch):
    import genfast.kernels.sample_norm as kernel

    monkeypatch.setitem(kernel.TUNABLE["forward"].now, "programs", 6)
    _check_norm(torch.randn(2, 9000))


def test_sample_norm_extremes():
    x = torch.tensor([1.0, 1e30, 1e-30, 3e38, 1e-42, 0.0])[:, None] * torch.tensor([[0.6, -0.8, 0.0]])
    norm = cases.compare(OPS["sample_norm"], (x, False), 1e-6)[0]
    assert float((norm.double() - x.double().norm(dim=1)).abs().div(x.double().norm(dim=1).clamp_min(1e-300)).max()) < 1e-3
    dx = cases.run(OPS["sample_norm_backward"], (x, norm, torch.ones(6), False))[0]
    torch.testing.assert_close(dx[:4], torch.tensor([0.6, -0.8, 0.0]).expand(4, 3))
    assert not dx[5].any()


@pytest.mark.parametrize("name", ["interpolate", "sample_norm"])
def test_64_bit_offsets_give_the_same(name, monkeypatch):
    from genfast.kernels.interpolate import Rows

    monkeypatch.setattr(Rows, "far", property(lambda self: True))
    if name == "sample_norm":
        _check_norm(torch.randn(3, 2500))
    else:
        _check_interpolate(*(torch.randn(3, 2500) for _ in range(3)), torch.rand(3))


# ---- spectral_norm ----

WEIGHTS = [
    ((1, 1), 0), ((6, 9), 0), ((6, 9), 1), ((70, 133), 0), ((5, 3, 4, 4), 0), ((6, 21, 3, 3), 1), ((3, 4, 5), 2),
    ((2, 1100), 0), ((300, 3), 0),
]  # fmt: skip


def _check_spectral(weight, dim):
    u, v = torch.randn(weight.shape[dim]), torch.randn(weight.numel() // weight.shape[dim])
    _, left, right, sigma = OPS["spectral_norm"].reference(weight.float(), u, None, 8, 1e-12, dim)
    for given in ((u, None, 1), (u, None, 3), (u, v, 1), (u, v, 2), (left, right, 0)):
        cases.compare(OPS["spectral_norm"], (weight, *given, 1e-12, dim), FORWARD[weight.dtype])
    grad = torch.randn(weight.shape).to(weight.dtype)
    for pair in ((grad, None), (None, torch.randn(())), (grad.transpose(0, 1).contiguous().transpose(0, 1), torch.randn(()))):
        cases.compare(OPS["spectral_norm_backward"], (*pair, weight, left, right, sigma, dim), GRADIENT[weight.dtype])


@each_dtype
@pytest.mark.parametrize(("shape", "dim"), WEIGHTS, ids=str)
def test_spectral_norm_shapes(shape, dim, dtype):
    _check_spectral(torch.randn(shape).to(dtype), dim)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_spectral_norm_strides(form, dim):
    _check_spectral(cases.strided(torch.randn(6, 4, 3, 5), form), dim)


def test_spectral_norm_of_zero_product_is_floored():
    w, u = torch.zeros(4, 6), torch.ones(4)
    _, left, right, sigma = cases.run(OPS["spectral_norm"], (w, u, None, 1, 1e-12, 0))
    assert not left.any()
    assert not right.any()
    assert float(sigma) == 0


# ---- minibatch_discrimination ----


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
