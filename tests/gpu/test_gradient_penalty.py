"""The gradient penalty and the critic step on a CUDA GPU: every critic of the catalogue against double backward in
float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfast import ops, reference
from tests.penalty.critics import CRITICS

GPU = torch.device("cuda")


def on_gpu(name, dtype):
    critic, real, fake, context = CRITICS[name].make(dtype)
    if not isinstance(critic, nn.Module):
        pytest.skip("a function holds its parameters where they cannot be moved")
    return critic.to(GPU), real.to(GPU), fake.to(GPU), tuple(c.to(GPU) for c in context)


def close(found, expected, tolerance):
    size = sum(float(e.double().square().sum()) for e in expected if e is not None) ** 0.5
    for f, e in zip(found, expected):
        f, e = (torch.zeros(()) if x is None else x.double().cpu() for x in (f, e))
        assert float((f - e).norm()) <= tolerance * (float(e.norm()) + 0.05 * size)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [n for n, c in CRITICS.items() if not c.random])
def test_equals_double_backward(name, dtype):
    critic, real, fake, context = on_gpu(name, dtype)
    parameters = [p for p in critic.parameters() if p.requires_grad]
    value = ops.gradient_penalty(critic, real, kind="r1", context=context)
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    critic, real, fake, context = on_gpu(name, torch.float64)
    parameters = [p for p in critic.parameters() if p.requires_grad]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact, _ = reference.gradient_penalty(critic, real, "r1", 10.0, 1.0, context)
    expected = torch.autograd.grad(exact, parameters, allow_unused=True)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    close([value.detach()], [exact.detach()], tolerance)
    close(found, expected, tolerance)


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r1r2"])
@pytest.mark.parametrize("name", ["dcgan", "mlp_leaky_relu", "layer_norm", "projection"])
def test_one_batch_equals_batches_apart(name, penalty):
    critic, real, fake, context = on_gpu(name, torch.float64)
    parameters = list(critic.parameters())
    found = []
    for batching in ("together", "apart"):
        step = ops.critic_step(
            critic,
            real,
            fake,
            penalty=penalty,
            context=context,
            batching=batching,
            generator=torch.Generator().manual_seed(0),
        )
        found.append([step.loss.detach(), *torch.autograd.grad(step.loss, parameters, allow_unused=True)])
    close(*found, 1e-10)
