"""The flow operations on a CUDA GPU: the Triton kernels at real sizes against float64, compiled, and twice for equal
bits."""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast import ops
from genfast._registry import OPS
from genfast._verify import _prepared, errors
from tests.conftest import SAMPLE_IDS, SAMPLES
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import COUPLINGS, DTYPES, FORMS, FORWARD, GRADIENT

GPU = torch.device("cuda")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])
triton_samples = pytest.mark.parametrize(
    ("op", "sample"),
    [pair for pair in SAMPLES if "triton" in pair[0].kernels],
    ids=[name for name, pair in zip(SAMPLE_IDS, SAMPLES) if "triton" in pair[0].kernels],
)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=GPU).to(dtype)


@each_dtype
@triton_samples
def test_samples_match_the_float64_reference(op, sample, dtype):
    forward, backward = errors(op, sample, dtype, "cuda", "triton")
    assert forward <= FORWARD[dtype]
    assert backward <= GRADIENT[dtype]


@each_dtype
@pytest.mark.parametrize("label", COUPLINGS)
def test_affine_coupling_shapes(label, dtype):
    cases.check_coupling(cases.coupling(label, dict(device=GPU, dtype=dtype)), dtype)


@each_dtype
@pytest.mark.parametrize("scale", ["exp", "sigmoid", "tanh", "softclamp", "additive"])
@pytest.mark.parametrize(
    "shape", [(64, 48, 16, 16), (256, 12, 32, 32), (4096, 64), (70001, 2), (70001, 2, 2, 2)], ids=str
)
def test_affine_coupling_at_real_sizes(shape, scale, dtype):
    x, width = randn(*shape, dtype=dtype), shape[1] // 2
    params = randn(shape[0], width * (1 if scale == "additive" else 2), *shape[2:], dtype=dtype)
    alpha = randn(width) if scale == "tanh" else None
    cases.check_coupling((x, params, alpha, None, scale, "scale_shift", False, False, True), dtype)
    if len(shape) == 4:
        x, params = (t.contiguous(memory_format=torch.channels_last) for t in (x, params))
        cases.check_coupling((x, params, alpha, None, scale, "shift_scale_interleaved", True, True, False), dtype)


@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_strides(form, dtype):
    x, params, *rest = cases.coupling("a channel each its alpha", dict(device=GPU, dtype=dtype))
    cases.check_coupling((cases.strided(x, form), cases.strided(params, form), *rest), dtype)
    cases.check_actnorm(cases.strided(randn(5, 12, 9, 16, dtype=dtype), form), torch.float32, False, True)
    cases.check_mix(cases.strided(randn(5, 6, 9, 16, dtype=dtype), form), None, 4, torch.float32, True)
    for order in ("pixel_unshuffle", "space_to_depth"):
        x = cases.strided(randn(5, 12, 8, 16, dtype=dtype), form)
        cases.compare(OPS["squeeze"], (x, 2, order, False), 0.0)
        cases.compare(OPS["squeeze"], (x, 2, order, True), 0.0)


@each_dtype
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("shape", [(64, 48, 16, 16), (256, 12, 32, 32), (4096, 200), (70001, 3, 2, 2)], ids=str)
def test_actnorm_at_real_sizes(shape, inverse, dtype):
    cases.check_actnorm(randn(*shape, dtype=dtype), torch.float32, True, inverse)


@each_dtype
@pytest.mark.parametrize("channels", [1, 12, 24, 48, 96, 128, 129, 256, 300])
def test_channel_mix_at_real_sizes(channels, dtype):
    first = (channels + 1) // 2
    x, x_b = randn(32, first, 16, 16, dtype=dtype), randn(32, channels - first, 16, 16, dtype=dtype)
    cases.check_mix(x, x_b if channels > 1 else None, max(1, channels // 3), torch.float32, True)
    cases.check_mix(randn(5000, channels, dtype=dtype), None, channels, dtype, False)


@each_dtype
@pytest.mark.parametrize("kind", ["none", "all", "sample", "spatial"])
@pytest.mark.parametrize("shape", [(64, 128, 28, 28), (8, 128, 16000), (4096, 96), (70001, 6, 2, 2)], ids=str)
def test_gated_activation_at_real_sizes(shape, kind, dtype):
    bias = {"none": None, "all": shape[1:2], "sample": shape[:2], "spatial": shape}[kind]
    bias = None if bias is None else randn(*bias, dtype=dtype)
    cases.check_gated(randn(*shape, dtype=dtype), bias, 3 if shape[1] % 6 == 0 else 1, dtype)
    if len(shape) == 4:
        x = randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        cases.check_gated(x, bias, 1, dtype)


@each_dtype
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("channels", "k"), [(3, 10), (1, 10), (3, 5)])
def test_discretized_logistic_mixture_at_real_sizes(channels, k, last, dtype):
    params = randn(16, (10 if channels == 3 else 3) * k, 32, 32, dtype=dtype)
    params = params.contiguous(memory_format=torch.channels_last) if last else params
    x = torch.randint(256, (16, channels, 32, 32), device=GPU, dtype=torch.uint8)
    cases.check_mixture(params, x, 256, dtype)
    args = (params, torch.rand(16, 1 + channels, 32, 32, device=GPU), channels, 256, 0.9)
    op = OPS["discretized_logistic_mixture_sample"]
    assert (
        int((cases.run(op, args)[0].cpu() != op.reference(*(a.cpu() if hasattr(a, "cpu") else a for a in args))).sum())
        <= 1
    )


def test_channel_mix_in_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    x, weight = randn(32, 48, 16, 16), torch.linalg.qr(randn(48, 48))[0]
    y, _ = cases.run(OPS["channel_mix"], (x, None, weight, None, 48))
    exact = OPS["channel_mix"].reference(x.double(), None, weight.double(), None, 48)[0]
    error = float((y - exact).norm() / exact.norm())
    assert 1e-5 < error < 1e-3  # TF32 keeps 10 bits, so less would mean that the switch is not followed


def test_beyond_two_to_the_31_elements():
    """Offsets that 32 bits do not hold; about 26 GB of float16."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free GPU memory")
    n, c, size = 3, 2, 19200  # 2.2e9 elements
    x = torch.ones(n, c, size, size, device=GPU, dtype=torch.float16)
    x[-1, -1, -1, -1] = 3
    y, logdet = ops.affine_coupling(x, torch.ones_like(x), scale="sigmoid")
    assert float(y[-1, -1, -1, -1]) == 3
    assert float(y[-1, 0, -1, -1]) == pytest.approx(1 + 0.9526, rel=1e-3)
    assert logdet.tolist() == pytest.approx([size * size * -0.048587352] * n, rel=1e-5)
    del y
    y, _ = ops.actnorm(x, torch.full((c,), 2.0, device=GPU), torch.zeros(c, device=GPU))
    assert float(y[-1, -1, -1, -1]) == 6
    del y
    y = ops.squeeze(x)
    assert float(y[-1, -1, -1, -1]) == 3
    assert int((y == 3).sum()) == 1


def step(x, params, alpha, scale, bias, weight):
    """Every flow operation in one function."""
    (a, b), first = ops.actnorm_conv1x1(x, scale, bias, weight, split=x.shape[1] // 2)
    y, second = ops.affine_coupling(torch.cat((a, b), 1), params, scale="tanh", alpha=alpha)
    y, third = ops.actnorm(ops.squeeze(y), torch.cat((scale,) * 4), torch.cat((bias,) * 4))
    return y, first + second + third


def arguments(dtype=torch.float32):
    tensors = (
        randn(16, 12, 16, 16, dtype=dtype),
        randn(16, 12, 16, 16, dtype=dtype),
        randn(6),
        randn(12).abs() + 0.5,
        randn(12),
        randn(12, 12),
    )
    return [t.requires_grad_() for t in tensors]


def gradients(function, tensors):
    y, logdet = function(*tensors)
    loss = y.float().square().mean() + logdet.mean()
    return [y.detach(), logdet.detach(), *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    tensors = arguments(dtype)
    first, second = gradients(step, tensors), gradients(step, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_compiled_equals_eager():
    tensors = arguments()
    compiled = torch.compile(step, fullgraph=True)
    for found, expected in zip(gradients(compiled, tensors), gradients(step, tensors), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@triton_samples
def test_opcheck(op, sample):
    torch.library.opcheck(op.overload, tuple(_prepared(sample, torch.float32, "cuda")))


def test_cuda_tensors_prefer_the_kernels():
    for name in ("affine_coupling", "actnorm", "channel_mix", "squeeze"):
        assert OPS[name].preferred["cuda"][0] is OPS[name].kernels["triton"]
    x, params = randn(2, 4, 8, 8), randn(2, 4, 8, 8)
    with genfast.backend("reference"):
        expected = ops.affine_coupling(x, params)
    torch.testing.assert_close(ops.affine_coupling(x, params), expected)


@pytest.mark.parametrize(
    "draw",
    [
        lambda g, **on: ops.interpolate(torch.zeros(9, 2, **on), torch.ones(9, 2, **on), generator=g),
        lambda g, **on: ops.discretized_logistic_mixture_sample(torch.zeros(3, 100, 4, **on), generator=g),
    ],
    ids=["interpolate", "discretized_logistic_mixture_sample"],
)
def test_a_generator_of_the_cpu_draws_the_same_for_the_gpu(draw):
    expected, found = (draw(torch.Generator().manual_seed(3), device=where) for where in ("cpu", "cuda"))
    assert found.is_cuda
    torch.testing.assert_close(found.cpu(), expected)
