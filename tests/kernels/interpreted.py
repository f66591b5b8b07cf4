"""The Triton kernels in the interpreter, on CPU tensors; ``make slow`` runs this in processes of their own.

TRITON_INTERPRET=1 must be set before anything imports triton, and nothing else may be compiled in that process.
"""

from __future__ import annotations

import math
import os
import pkgutil
from importlib import import_module

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.fail("run ``make slow``, which runs this file under TRITON_INTERPRET=1", pytrace=False)

import genfast
import genfast.kernels
from genfast._registry import OPS
from genfast._verify import errors
from tests.conftest import SAMPLE_IDS, SAMPLES
from tests.kernels import flow_cases as cases
from tests.kernels.flow_cases import COUPLINGS, DTYPES, FORMS, FORWARD, GRADIENT

NAMES = [str(d)[6:] for d in DTYPES]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
# float16 differs from bfloat16 in loads and stores alone, which the ops' samples go through in every dtype.
two_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
triton_samples = pytest.mark.parametrize(
    ("op", "sample"),
    [pair for pair in SAMPLES if "triton" in pair[0].kernels],
    ids=[name for name, pair in zip(SAMPLE_IDS, SAMPLES) if "triton" in pair[0].kernels],
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet():
    """NumPy, which the interpreter is, warns of the infinities that some of these tests are about."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_family_interpreter_took_effect():
    kernels = [
        kernel
        for m in pkgutil.iter_modules(genfast.kernels.__path__)
        if not m.name.startswith("_") and m.name != "aot"
        for kernel in (v.kernel for v in import_module(f"genfast.kernels.{m.name}").AOT)
    ]
    assert kernels
    assert {type(k).__name__ for k in kernels} == {"InterpretedFunction"}


@each_dtype
@triton_samples
def test_samples_match_the_float64_reference(op, sample, dtype):
    with cases.poisoned():
        forward, backward = errors(op, sample, dtype, "cpu", "triton")
    assert forward <= FORWARD[dtype]
    assert backward <= GRADIENT[dtype]


# ---- affine_coupling ----


@two_dtypes
@pytest.mark.parametrize("label", COUPLINGS)
def test_affine_coupling_shapes(label, dtype):
    cases.check_coupling(cases.coupling(label, dict(device=CPU, dtype=dtype)), dtype)


PAIRS = sorted({(form, other) for form in FORMS for other in (form, "dense")} | {("dense", form) for form in FORMS})


@pytest.mark.parametrize(("form", "params_form"), PAIRS)
def test_affine_coupling_strides(form, params_form):
    for label in ("a channel each its alpha", "primes"):
        x, params, *rest = cases.coupling(label, dict(device=CPU, dtype=torch.float32))
        cases.check_coupling((cases.strided(x, form), cases.strided(params, params_form), *rest), torch.float32)


@pytest.mark.parametrize("form", ["dense", "channels_last", "channel slice"])
def test_affine_coupling_mask_strides(form):
    x, params, alpha, mask, *rest = cases.coupling("mask over everything", dict(device=CPU, dtype=torch.float32))
    mask = mask.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    cases.check_coupling((cases.strided(x, form), params, alpha, mask, *rest), torch.float32)


def test_affine_coupling_expanded_gradient():
    x, params, *rest = cases.coupling("primes", dict(device=CPU, dtype=torch.float32))
    grad = torch.ones(()).expand(x.shape)  # what y.sum() sends back
    cases.both_ways("affine_coupling", (x, params, *rest), [grad, None], torch.float32)


@pytest.mark.parametrize("label", ["a channel each its alpha", "odd halves", "vectors, alpha and mask"])
@pytest.mark.parametrize(("dtype", "other"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_affine_coupling_mixed_dtypes(label, dtype, other):
    x, params, *rest = cases.coupling(label, dict(device=CPU, dtype=dtype), alpha_dtype=other)
    cases.check_coupling((x, params.to(other), *rest), torch.bfloat16 if dtype is torch.bfloat16 else torch.float16)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("keep", ["input", "output"])
def test_affine_coupling_masked_parameters_never_leak(inverse, keep):
    x, params = torch.randn(2, 3, 4, 6), torch.randn(2, 6, 4, 6)
    board = (torch.arange(4)[:, None] + torch.arange(6)) % 2 == 0
    expected = genfast.ops.affine_coupling(x, params, scale="exp", mask=board[None], inverse=inverse)
    params[:, :, board] = math.nan
    x.requires_grad_()
    params.requires_grad_()
    with cases.poisoned(), genfast.backend("triton"):
        y, logdet = genfast.ops.affine_coupling(x, params, scale="exp", mask=board[None], inverse=inverse, keep=keep)
        (y.square().sum() + logdet.sum()).backward()
    torch.testing.assert_close((y, logdet), expected)
    assert torch.equal(y[:, :, board], x[:, :, board])
    assert bool(x.grad.isfinite().all())
    assert torch.equal(params.grad[:, :, board], torch.zeros(2, 6, 12))
    assert bool((params.grad[:, :, ~board] != 0).all())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("scale", ["exp", "sigmoid", "tanh", "softclamp"])
def test_affine_coupling_extremes_element_by_element(scale, inverse):
    """Every element by itself, not the norm over all: the tails of each scale map are as exact as its middle."""
    bound = {"exp": 80.0, "sigmoid": 80.0, "tanh": 40.0, "softclamp": 1e30}[scale]
    r = torch.cat([s * torch.logspace(-12, math.log10(bound), 300) for s in (1.0, -1.0)])
    x, t = torch.ones(600, 1), torch.zeros(600, 1)
    args = (x, torch.stack((r, t[:, 0]), 1), None, None, scale, "scale_shift", False, inverse, False)
    y, logdet = cases.run(OPS["affine_coupling"], args)
    exact_y, exact_logdet = OPS["affine_coupling"].reference(*cases.exact(args))
    assert float(((y - exact_y) / exact_y).abs().max()) < 2e-6
    # log sigmoid(r + 2) meets r + 2 rounded to float32, an absolute error where r cancels the 2.
    assert float(((logdet - exact_logdet) / exact_logdet).abs().max()) < 2e-6
    grads = (torch.zeros(600, 1), torch.ones(600))
    dparams = cases.run(OPS["affine_coupling_backward"], (*grads, *args))[1][:, 0]
    exact_dr = OPS["affine_coupling_backward"].reference(*cases.exact((*grads, *args)))[1][:, 0]
    tiny = exact_dr.abs() < 1e-30  # float32's own end, which the tail of sech^2 passes
    if scale == "tanh":  # the reference forms 1 - tanh^2, which cancels in float64 as well
        exact_dr = (-1 if inverse else 1) / torch.cosh(r.double()) ** 2
    assert float(((dparams - exact_dr) / exact_dr)[~tiny].abs().max()) < 4e-6


def test_affine_coupling_infinite_and_nan_parameters_stay_in_their_sample():
    params = torch.zeros(4, 4, 2, 2)
    params[1, 0], params[2, 1, 0, 0], params[3, 0, 0, 0] = math.inf, math.nan, 100.0
    with genfast.backend("triton"):
        y, logdet = genfast.ops.affine_coupling(torch.ones(4, 4, 2, 2), params)
    assert bool(y[0].isfinite().all())
    assert logdet[0] == 0
    assert logdet[1] == math.inf
    assert logdet[2].isnan()
    assert logdet[3] == 100.0
    assert bool(y[1, 0].isinf().all())
    assert y[3, 0, 0, 0] == math.inf
    assert bool(y[:, 2:].eq(1).all())


# ---- actnorm ----


def test_actnorm_more_channels_than_a_tile():
    cases.check_actnorm(torch.randn(3, 1100), torch.float32, True, True)


@two_dtypes
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("log_scale", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 5, 7, 11), (2, 130, 3, 3), (3, 3, 40, 31), (600, 3), (2, 3, 4, 5, 2)], ids=str
)
def test_actnorm_shapes(shape, log_scale, inverse, dtype):
    cases.check_actnorm(torch.randn(shape).to(dtype), dtype, log_scale, inverse)


@pytest.mark.parametrize("form", FORMS)
def test_actnorm_strides(form):
    for inverse in (False, True):
        x = cases.strided(torch.randn(3, 6, 5, 7), form)
        cases.check_actnorm(x, torch.float32, False, inverse)
        cases.check_actnorm(x.bfloat16(), torch.float32, True, inverse)


def test_actnorm_more_tiles_than_rows(monkeypatch):
    import genfast.kernels.actnorm as kernel

    monkeypatch.setitem(kernel.TUNABLE["backward"].now, "rows", 3)
    cases.check_actnorm(torch.randn(7, 4, 9, 9), torch.float32, False, True)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (0, 3), (2, 3, 0, 4)], ids=str)
def test_actnorm_empty(shape):
    cases.check_actnorm(torch.randn(shape), torch.float32, True, False)


def test_actnorm_zero_scale_is_minus_infinity():
    with genfast.backend("triton"):
        y, logdet = genfast.ops.actnorm(torch.ones(2, 2, 3), torch.tensor([1.0, 0.0]), torch.ones(2))
    assert bool(logdet.eq(-math.inf).all())
    assert bool(y.isfinite().all())


# ---- channel_mix ----


@pytest.mark.parametrize("channels", [65, 100])
def test_channel_mix_several_blocks(channels):
    x, x_b = torch.randn(1, 40, 3, 2), torch.randn(1, channels - 40, 3, 2)
    cases.check_mix(x, x_b, 70 if channels > 70 else 30, torch.float32, True)


@two_dtypes
@pytest.mark.parametrize("channels", [1, 3, 12, 17, 33])
def test_channel_mix_channels(channels, dtype):
    x, split = torch.randn(2, channels, 5, 3).to(dtype), max(1, channels // 2)
    cases.check_mix(x, None, channels, dtype, False)
    cases.check_mix(x, None, split, torch.float32, True)
    if channels > 1:
        cases.check_mix(x[:, :split], x[:, split:], channels - split, dtype, True)


@two_dtypes
@pytest.mark.parametrize("form", FORMS)
def test_channel_mix_strides(form, dtype):
    x, x_b = (cases.strided(torch.randn(3, c, 5, 7).to(dtype), form) for c in (6, 5))
    cases.check_mix(x, x_b, 4, torch.float32, True)
    cases.check_mix(x, None, 6, dtype, False)


@pytest.mark.parametrize("shape", [(300, 6), (1, 6), (2, 6, 13), (2, 6, 3, 2, 3), (0, 6, 2, 2), (0, 6)], ids=str)
def test_channel_mix_shapes(shape):
    cases.check_mix(torch.randn(shape), None, 4, torch.float32, True)


@pytest.mark.parametrize("form", ["dense", "channels_last", "vectors"])
@each_dtype
def test_channel_mix_library_arrangement(form, dtype, monkeypatch):
    import genfast.kernels.invertible_conv1x1 as kernel

    monkeypatch.setitem(kernel.LIBRARY_ABOVE, dtype, 8)
    monkeypatch.setattr(kernel, "_launch_mix", None)  # so that the kernel is not what answers
    shape = (9,) if form == "vectors" else (9, 4, 3)
    x, x_b = torch.randn(2, *shape).to(dtype), torch.randn(2, 3, *shape[1:]).to(dtype)
    if form == "channels_last":
        x, x_b = cases.strided(x, form), cases.strided(x_b, form)
    cases.check_mix(x, None, 9, dtype, False)
    cases.check_mix(x, x_b, 5, dtype, True)


@pytest.mark.parametrize("dtype", [torch.float16], ids=["float16"])
def test_channel_mix_keeps_every_bit_of_a_float32_weight(dtype):
    fine = 2.0**-14
    weight = torch.tensor([[1.0 + fine, 1.0], [1.0, 1.0 - fine]])  # float16 holds neither 1 + 2^-14 nor 1 - 2^-14
    x = torch.tensor([[1.0, -1.0]], dtype=dtype)
    y, _ = cases.run(OPS["channel_mix"], (x, None, weight, None, 2))
    assert y.tolist() == [[fine, fine]]


def test_channel_mix_follows_the_tf32_switch():
    import genfast.kernels.invertible_conv1x1 as kernel

    x, before = torch.zeros(1), torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert kernel.precision(x) == "tf32"
        assert kernel.precision(x.half()) == "ieee"
        torch.backends.cuda.matmul.allow_tf32 = False
        assert kernel.precision(x) == "ieee"
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


# ---- squeeze ----


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


# ---- gated_activation ----


@two_dtypes
@pytest.mark.parametrize("kind", ["none", "all", "sample", "spatial"])
@pytest.mark.parametrize(
    "shape", [(1, 6, 1, 1), (3, 30, 7, 11), (2, 132, 3, 3), (3, 6, 40, 31), (600, 6), (2, 6, 4, 5, 2), (2, 6, 0, 4)], ids=str
)
def test_gated_activation_shapes(shape, kind, dtype):
    bias = {"none": None, "all": shape[1:2], "sample": shape[:2], "spatial": shape}[kind]
    bias = None if bias is None else torch.randn(bias).to(dtype)
    for groups in (1, 3):
        cases.check_gated(torch.randn(shape).to(dtype), bias, groups, dtype)


@pytest.mark.parametrize("form", FORMS)
def test_gated_activation_strides(form):
    x = cases.strided(torch.randn(3, 12, 5, 7), form)
    for bias in (None, torch.randn(12, 2)[:, 0], torch.randn(12, 3).T, torch.randn(3, 12, 5, 7), cases.strided(x, form)):
        cases.check_gated(x, bias, 3, torch.float32)


def test_gated_activation_more_tiles_than_rows(monkeypatch):
    import genfast.kernels.gated_activation as kernel

    monkeypatch.setitem(kernel.TUNABLE["backward"].now, "rows", 3)
    for bias in (torch.randn(8), torch.randn(7, 8)):
        cases.check_gated(torch.randn(7, 8, 40, 40), bias, 1, torch.float32)


def test_gated_activation_extremes():
    v = torch.tensor([0.0, 1e-30, 1e-8, 1e-3, 0.6, 5.0, 20.0, 80.0, 300.0, math.inf])
    v = torch.cat((v, -v))
    x = torch.cartesian_prod(v, v)
    y = cases.run(OPS["gated_activation"], (x, None, 1))[0]
    exact = x[:, :1].double().tanh() * x[:, 1:].double().sigmoid()
    ordinary = exact.abs() > 1e-37
    assert float(((y - exact) / exact)[ordinary].abs().max()) < 1e-6
    dx = cases.run(OPS["gated_activation_backward"], (torch.ones_like(y), x, None, 1))[0]
    assert bool(dx.isfinite().all())


# ---- discretized_logistic_mixture ----


def _mixture(shape, channels, k, levels, dtype=torch.float32):
    n, *positions = shape
    params = torch.randn((n, (10 if channels == 3 else 3) * k, *positions)).to(dtype)
    x = torch.randint(levels, (n, channels, *positions))
    x.view(-1)[::5], x.view(-1)[1::5] = 0, levels - 1
    return params, x


@pytest.mark.parametrize(("channels", "levels", "k"), [(1, 2, 3), (3, 256, 10), (3, 65536, 1)])
@pytest.mark.parametrize("shape", [(1, 1), (600,), (2, 7, 11), (3, 37), (2, 2, 3, 5), (2, 0, 3)], ids=str)
def test_discretized_shapes(shape, channels, levels, k):
    cases.check_mixture(*_mixture(shape, channels, k, levels), levels, torch.float32)


@each_dtype
def test_discretized_dtypes(dtype):
    cases.check_mixture(*_mixture((2, 3, 7), 3, 10, 256, dtype), 256, dtype)


def test_discretized_more_components_than_a_tile():
    cases.check_mixture(*_mixture((2, 3), 3, 300, 256), 256, torch.float32)


@pytest.mark.parametrize("form", FORMS)
def test_discretized_strides(form):
    params, x = _mixture((3, 5, 7), 3, 4, 100)
    for levels in (x, cases.strided(x, form), x.to(torch.uint8), x.to(torch.int16)):
        cases.check_mixture(cases.strided(params, form), levels, 100, torch.float32)


def test_discretized_extremes_are_finite_and_exact():
    log_s = torch.tensor([-9.0, -7.0, -4.0, 0.0, 5.0, 40.0])
    mean = torch.tensor([-200.0, -1.0, -0.3, 0.0, 1.0, 60.0])
    params = torch.cartesian_prod(torch.zeros(1), mean, log_s)
    for level in (0, 1, 100, 255):
        x = torch.full((len(params), 1), level)
        args = (params, x, 256)
        nll = cases.run(OPS["discretized_logistic_mixture_nll"], args)[0]
        exact = OPS["discretized_logistic_mixture_nll"].reference(*cases.exact(args))
        torch.testing.assert_close(nll.double(), exact, rtol=1e-6, atol=2e-6)
        back = (params, x, torch.ones(len(params)), 256)
        found = cases.run(OPS["discretized_logistic_mixture_nll_backward"], back)[0]
        exact = OPS["discretized_logistic_mixture_nll_backward"].reference(*cases.exact(back))
        torch.testing.assert_close(found.double(), exact, rtol=3e-5, atol=1e-5)


def test_discretized_component_of_probability_zero():
    params, x = _mixture((4,), 3, 3, 256)
    params[:, 1] = -math.inf
    cases.check_mixture(params, x, 256, torch.float32)


def _same_levels(params, uniforms, channels, temperature):
    op, args = OPS["discretized_logistic_mixture_sample"], (params, uniforms, channels, 256, temperature)
    assert torch.equal(cases.run(op, args)[0], op.reference(*args))


@each_dtype
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_discretized_samples_equal_the_reference(temperature, dtype):
    for channels, k, shape in ((3, 10, (2, 5, 7)), (1, 3, (40,)), (3, 1, (2, 3)), (1, 5, (0, 3))):
        params, _ = _mixture(shape, channels, k, 256, dtype)
        uniforms = torch.rand(shape[0], 1 + channels, *shape[1:])
        uniforms.view(-1)[:3] = torch.tensor([0.0, 1.0, 0.5])[: uniforms.numel()]
        for form in ("dense", "channels_last"):
            p = cases.strided(params, form) if params.dim() == 4 else params
            _same_levels(p, uniforms, channels, temperature)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2, 4, 6, 8])
def test_discretized_samples_of_parameters_that_are_not_finite_are_no_levels(place, value):
    params, uniforms = torch.zeros(5, 20), torch.rand(5, 4)
    params[2, place : place + 2] = value  # of both components
    _same_levels(params, uniforms, 3, 1.0)
    op = OPS["discretized_logistic_mixture_sample"]
    bad = place != 6 or math.isnan(value)  # an infinite coefficient is one, through tanh
    assert (cases.run(op, (params, uniforms, 3, 256, 1.0))[0] < 0).any(1).tolist() == [False, False, bad, False, False]


def test_discretized_samples_round_ties_to_even():
    params = torch.zeros(4, 3)
    params[:, 1] = torch.tensor([0.0, 2 / 255, -2 / 255, 4 / 255])
    _same_levels(params, torch.full((4, 2), 0.5), 1, 1.0)


# ---- all ----


@pytest.mark.parametrize(
    "name",
    [
        "affine_coupling",
        "affine_coupling_backward",
        "actnorm",
        "actnorm_backward",
        "channel_mix_backward",
        "gated_activation",
        "discretized",
    ],
)
def test_family_64_bit_offsets_give_the_same(name, monkeypatch):
    """The branch that data beyond 2^31 elements takes, on little data."""
    from genfast.kernels._common import View

    monkeypatch.setattr(View, "far", property(lambda self: True))
    if name.startswith("affine"):
        args = cases.coupling("alpha, long rows", dict(device=CPU, dtype=torch.float32))
        cases.check_coupling(args, torch.float32)
    elif name.startswith("actnorm"):
        cases.check_actnorm(torch.randn(3, 5, 9, 8), torch.float32, True, True)
    elif name.startswith("discretized"):
        cases.check_mixture(*_mixture((3, 5, 4), 3, 5, 256), 256, torch.float32)
    elif name.startswith("gated"):
        cases.check_gated(torch.randn(3, 6, 9, 8), torch.randn(3, 6), 3, torch.float32)
    else:
        cases.check_mix(torch.randn(3, 5, 9, 8), torch.randn(3, 4, 9, 8), 3, torch.float32, True)
