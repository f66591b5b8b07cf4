"""The degree-ordered inverse on a CUDA GPU: against float64 at real sizes, in every group size, twice for equal
bits."""

from __future__ import annotations

import time

import pytest
import torch

import genfast
from genfast import ops, reference
from genfast._registry import OPS
from genfast.sampling import DegreeProgram
from tests.kernels.test_autoregressive_inverse_cuda import AFFINE, CASES, close, double, made, program_of

GPU = torch.device("cuda")
OP, OP_BACKWARD = OPS["autoregressive_inverse"], OPS["autoregressive_inverse_backward"]


def on_gpu(t):
    return None if t is None else t.detach().to(GPU)


def compare(program, transform, options, z, backward=True):
    packed, statics, code = program.packed(), program.statics(torch.float32), program.code
    exact = [z.double(), packed.double(), double(statics)]
    expected_x, expected_logdet = reference.autoregressive_inverse(*exact, code, transform, options)
    gpu = [on_gpu(z), on_gpu(packed), on_gpu(statics)]
    with genfast.backend("cuda"):
        x, logdet = OP(*gpu, code, transform, options)
    close(x.cpu(), expected_x, 2e-6)
    close(logdet.cpu(), expected_logdet, 2e-6)
    if not backward:
        return
    grads = torch.randn_like(z), torch.randn(len(z))
    with genfast.backend("cuda"):
        found = OP_BACKWARD(*map(on_gpu, grads), gpu[0], x, *gpu[1:], code, transform, options, True)
    expected = reference.autoregressive_inverse_backward(
        *map(double, grads), exact[0], expected_x, *exact[1:], code, transform, options, True
    )
    for f, e in zip(found, expected):
        close(f.cpu(), e, 1e-5)


@pytest.mark.parametrize("label", CASES)
def test_it_equals_the_reference(label):
    compare(*program_of(label)[:4])


# Every group size that a device of 80 to 160 multiprocessors chooses, the last group not full.
@pytest.mark.parametrize("n", [1, 131, 250, 500, 1000, 2001, 4099])
def test_real_sizes(n):
    torch.manual_seed(0)
    program = DegreeProgram.build(made(20, (256, 200), 2))
    compare(program, "affine:softplus", AFFINE, torch.randn(n, 20))


def test_a_maf_of_64_inputs():
    torch.manual_seed(0)
    program = DegreeProgram.build(made(64, (512, 512), 2))
    compare(program, "affine:softplus", AFFINE, torch.randn(64, 64))


def test_units_that_no_shared_memory_holds():
    torch.manual_seed(0)
    program = DegreeProgram.build(made(3, (70_000,), 2))
    compare(program, "affine:softplus", AFFINE, torch.randn(5, 3))


def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    program = DegreeProgram.build(made(16, (300, 300), 2))
    z, packed = torch.randn(700, 16, device=GPU), program.packed().detach().to(GPU)
    results = []
    for _ in range(2):
        a, w = z.clone().requires_grad_(), packed.clone().requires_grad_()
        with genfast.backend("cuda"):
            x, logdet = OP(a, w, None, program.code, "affine:softplus", AFFINE)
            results.append([x, logdet, *torch.autograd.grad(x.square().sum() + logdet.sum(), (a, w))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_public_function_and_half_precision():
    torch.manual_seed(0)
    program = DegreeProgram.build(made(7, (30,), 2))
    z = torch.randn(9, 7)
    expected, expected_logdet = ops.autoregressive_inverse(z, program)
    layers = program.layers
    for layer in layers:
        layer.weight, layer.bias = layer.weight.to(GPU), layer.bias.to(GPU)
    program = program.update(layers)
    x, logdet = ops.autoregressive_inverse(z.to(GPU), program)
    torch.testing.assert_close(x.cpu(), expected.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logdet.cpu(), expected_logdet.detach(), rtol=1e-4, atol=1e-5)
    half = ops.autoregressive_inverse(z.to(GPU, torch.bfloat16), program)[0]
    assert half.dtype is torch.bfloat16
    assert float((half.cpu().float() - expected).norm()) <= 3e-2 * float(expected.norm())


def test_it_is_faster_than_the_passes_of_a_plain_inverse():
    torch.manual_seed(0)
    layers = made(64, (512, 512), 2)
    program = DegreeProgram.build(layers)
    z, packed = torch.randn(256, 64, device=GPU), program.packed().detach().to(GPU)
    weights = [layer.weight.detach().to(GPU) for layer in layers]

    def passes():
        for _ in range(64):
            h = z
            for w in weights:
                h = torch.relu(h @ w.t())

    def seconds(function):
        times = []
        for _ in range(6):
            torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds(lambda: OP(z, packed, None, program.code, "affine:softplus", AFFINE)) < seconds(passes)
