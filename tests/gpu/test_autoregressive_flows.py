"""Splines, masked linear layers, NADE and what is built of them on a CUDA GPU, at real sizes against float64.

The ops' samples run in test_flow_ops, which takes every op with a Triton kernel; the degree-ordered engine has a file
too.
"""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast import nn, ops, reference
from genfast._registry import OPS
from genfast._verify import errors, relative_error
from genfast.ops.masked_linear import Staircase, staircase
from tests.triton import autoregressive_cases as cases
from tests.triton.flow_cases import DTYPES, FORWARD, GRADIENT

GPU = torch.device("cuda")
ELEMENTS, BATCH = 100_003, 4099
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=[str(d)[6:] for d in DTYPES])


def like(dtype=torch.float32):
    return dict(device=GPU, dtype=dtype)


@each_dtype
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("bins", [2, 3, 8, 10, 32, 64])
def test_splines(bins, kind, inverse, dtype):
    cases.check_spline(cases.spline((257,), bins, kind, inverse, like(dtype)))


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("bins", [8, 64])
def test_splines_at_real_sizes(bins, inverse):
    args = cases.spline((ELEMENTS,), bins, "zuko linear", inverse, like())
    cases.check_many(args)
    cases.check_packed(args)


def test_a_spline_beyond_two_to_the_31_logits():
    """Offsets that 32 bits do not hold; the last rows are what a call of them alone gives."""
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GB of free GPU memory")
    rows, bins = 12_000_000, 64
    x = torch.randn(rows, **like(torch.float16))
    params = torch.randn(rows, 3 * bins - 1, **like(torch.float16))
    assert params.numel() > 2**31
    options = dict(tails="linear", bound=3.0)
    y, logdet = ops.rational_quadratic_spline_packed(x, params, bins, **options)
    last, last_logdet = ops.rational_quadratic_spline_packed(x[-5:].clone(), params[-5:].clone(), bins, **options)
    assert torch.equal(y[-5:], last)
    assert torch.equal(logdet[-5:], last_logdet)


@each_dtype
@pytest.mark.parametrize("label", cases.LAYERS)
def test_masked_linear_layers(label, dtype):
    cases.check_layer(cases.layer(label, like(dtype)))


@each_dtype
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("inner", "outer"), [(64, 512), (512, 512), (512, 1472), (63, 509)])
def test_masked_linear_at_real_sizes(inner, outer, shuffled, dtype):
    degrees = [1 + torch.arange(size) * 64 // size for size in (inner, outer)]
    if shuffled:
        degrees = [d[torch.randperm(len(d))] for d in degrees]
    for n in (1, 256, BATCH):
        cases.check_layer(cases.made(n, *degrees, False, like(dtype), activation="relu"))


def test_masked_linear_in_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True
    degrees = 1 + torch.arange(512) // 8
    a = cases.made(512, degrees, degrees, False, like())
    y = OPS["masked_linear"](*a.values())
    exact = OPS["masked_linear"].reference(
        *(t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in a.values())
    )
    assert (
        1e-5 < relative_error(y, exact) < 1e-3
    )  # TF32 keeps 10 bits, so less would mean that the switch is not followed


def test_masked_linear_is_captured_in_a_graph():
    degrees = [torch.randint(1, 30, (size,), device=GPU) for size in (70, 90)]
    mask = staircase(*degrees)
    x, weight = torch.randn(16, 70, device=GPU), torch.randn(90, 70, device=GPU)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = ops.masked_linear(x, weight, mask=mask)
    torch.cuda.current_stream().wait_stream(side)
    for known in (mask, Staircase(*(t.clone() for t in mask))):  # asked before, and first seen in the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.masked_linear(x, weight, mask=known)
        y.zero_()
        graph.replay()
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", ["nade", "nade_sample", "autoregressive_inverse"])
def test_sequential_ops_match_the_float64_reference(name, backend):
    op = OPS[name]
    if backend not in op.kernels:
        pytest.skip(f"{name} has no {backend} kernel")
    for sample in op.samples(torch.Generator().manual_seed(0)):
        forward, backward = errors(op, sample, torch.float32, "cuda", backend)
        assert forward <= FORWARD[torch.float32], sample.label
        assert backward <= GRADIENT[torch.float32], sample.label


@pytest.mark.parametrize("transform", ["affine", "spline"])
def test_the_inverse_of_a_layer(transform):
    """Against as many plain passes as there are features, in float64, with the gradient through the samples."""
    outputs = 2 if transform == "affine" else 23
    layer = nn.MaskedAutoregressive(nn.MADENetwork(12, (48, 48), outputs=outputs), transform=transform).to(GPU)
    z = torch.randn(500, 12, device=GPU)
    weights = torch.randn(500, 12, device=GPU), torch.randn(500, device=GPU)

    def both(inverse, z, weights):
        x, logdet = inverse(z.requires_grad_())
        return x, logdet, *torch.autograd.grad([x, logdet], [z, *layer.parameters()], weights)

    found = both(layer.inverse, z.clone(), weights)
    layer.double()
    with genfast.backend("reference"):
        exact = both(layer.inverse_plain, z.double(), [w.double() for w in weights])
    for f, e in zip(found, exact, strict=True):
        assert relative_error(f, e) <= 2e-5  # every x is a function of those before it


def network_and_spline(x, made, bins):
    """What a neural spline flow's autoregressive layer does."""
    y, logdet = ops.rational_quadratic_spline_packed(x, made(x), bins, tails="linear", bound=3.0)
    return y, logdet.sum(-1)


def gradients(function, made, x, bins):
    y, logdet = function(x, made, bins)
    found = torch.autograd.grad(y.square().mean() - logdet.mean(), [x, *made.parameters()])
    return [y.detach(), logdet.detach(), *found]


@pytest.fixture
def layer():
    bins = 8
    made = nn.MADENetwork(64, (128, 128), outputs=3 * bins - 1).to(GPU)
    return made, torch.randn(1000, 64, device=GPU, requires_grad=True), bins


def test_a_layer_against_float64(layer):
    made, x, bins = layer
    found = gradients(network_and_spline, made, x, bins)
    with genfast.backend("reference"):
        exact = gradients(network_and_spline, made.double(), x.detach().double().requires_grad_(), bins)
    for f, e in zip(found, exact, strict=True):
        assert relative_error(f, e) <= 2e-5  # of three products and a spline one after the other


def test_a_layer_runs_twice_with_the_same_bits(layer):
    first, second = gradients(network_and_spline, *layer), gradients(network_and_spline, *layer)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_compiled_layer_equals_eager(layer):
    compiled = torch.compile(network_and_spline, fullgraph=True)
    for f, e in zip(gradients(compiled, *layer), gradients(network_and_spline, *layer), strict=True):
        torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-5)


def test_cuda_tensors_prefer_the_kernels():
    for name in ("rational_quadratic_spline", "rational_quadratic_spline_packed", "masked_linear", "nade"):
        assert OPS[name].preferred["cuda"][0] is OPS[name].kernels["triton"]
    mask = reference.staircase_mask(*staircase([1, 2, 3], [1, 2]))
    x, weight = torch.randn(4, 3, device=GPU), torch.randn(2, 3, device=GPU)
    y = ops.masked_linear(x, weight, mask=staircase([1, 2, 3], [1, 2]).to(GPU))
    torch.testing.assert_close(y, x @ (weight * mask.to(GPU)).t())
