"""Cached sampling on a CUDA GPU: the images of the naive loop, of the CPU's engine, twice for equal bits, at real
sizes."""

from __future__ import annotations

import time

import pytest
import torch

from genfast import models
from genfast.sampling import Sampler, sample_equivalence
from tests.kernels.test_pixel_program_cuda import CASES

GPU = torch.device("cuda")


def built(case, n):
    """(network on the CPU, its sampler's options, shape, context)."""
    build, levels, head, shape, condition = case
    torch.manual_seed(1)
    network = build().eval()
    return network, dict(levels=levels, head=head), shape, None if condition is None else torch.randn(n, *condition)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_draws_what_the_naive_loop_draws(case):
    network, options, shape, context = built(case, 5)
    on_gpu = None if context is None else context.to(GPU)
    found = sample_equivalence(network.to(GPU), shape, n=5, context=on_gpu, **options)
    assert found.error < 1e-5
    assert found.different == 0


# Fewer images than multiprocessors, as many, and so many that up to eight share a block, the last block not full.
@pytest.mark.parametrize("n", [1, 20, 132, 1000])
@pytest.mark.parametrize("label", ["three colours", "class", "mixture", "sequence"])
def test_it_draws_what_the_cpu_draws(label, n):
    network, options, shape, context = built(CASES[label], n)
    sampler = Sampler(network, **options)
    uniforms = torch.rand(n, sampler.uniforms_per_pixel(shape[0]), *shape[1:])
    prefix = torch.randint(options["levels"], (n, shape[0], 2, *shape[2:]))
    expected = sampler.sample(n, shape, context=context, uniforms=uniforms, prefix=prefix, temperature=0.8)
    network.to(GPU)
    on_gpu = None if context is None else context.to(GPU)
    found = [
        sampler.sample(n, shape, context=on_gpu, uniforms=uniforms, prefix=prefix, temperature=0.8, progress=p)
        for p in (False, True)
    ]
    assert found[0].device.type == "cuda"
    assert torch.equal(found[0], found[1])
    # The two engines add in different orders, so that a draw on the border between two levels may fall on either.
    same = (found[0].cpu() == expected).flatten(1).all(1)
    assert float(same.double().mean()) >= 0.99


def clusters():
    """Weights enough for clusters of blocks to share an image."""
    torch.manual_seed(1)
    return models.GatedPixelCNN(1, 64, 4, 5, 16).to(GPU)


@pytest.mark.parametrize("n", [1, 12, 30, 60, 300])
def test_clusters(n):
    model = clusters()
    images = torch.randint(16, (n, 1, 14, 14), device=GPU)
    with torch.no_grad():
        expected = model(images)
    found = model.sampler.teacher_forced(images)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    uniforms = torch.rand(n, 1, 14, 14)
    twice = [model.sample(n, (1, 14, 14), uniforms=uniforms) for _ in range(2)]
    assert torch.equal(*twice)


def test_weights_and_streams_are_followed():
    model = clusters()
    before = model.sample(2, (1, 8, 8), uniforms=torch.full((2, 1, 8, 8), 0.5))
    with torch.no_grad():
        model.out.bias[3] += 50
    with torch.cuda.stream(torch.cuda.Stream()):
        after = model.sample(2, (1, 8, 8), uniforms=torch.full((2, 1, 8, 8), 0.5))
    torch.cuda.synchronize()
    assert not torch.equal(before, after)
    assert bool((after == 3).all())


def test_it_is_much_faster_than_the_naive_loop():
    model, seconds = models.GatedPixelCNN(1, 64, 8, 5, 256).to(GPU).eval(), {}
    for method in ("cached", "naive"):
        model.sample(16, (1, 6, 6), method=method)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.sample(16, (1, 28, 28), method=method)
        torch.cuda.synchronize()
        seconds[method] = time.perf_counter() - start
    print({k: round(v, 3) for k, v in seconds.items()})
    assert seconds["cached"] * 5 < seconds["naive"]
