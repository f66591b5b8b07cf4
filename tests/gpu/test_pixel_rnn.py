"""The recurrences of PixelRNN on a CUDA GPU: against float64 at real sizes, compiled, and twice for equal bits."""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast import nn as gnn
from genfast import ops
from genfast._registry import OPS, Sample
from genfast._verify import errors
from tests.conftest import SAMPLE_IDS, SAMPLES

NAMES = ("row_lstm", "diagonal_lstm")
each_name = pytest.mark.parametrize("name", NAMES)
samples = pytest.mark.parametrize(
    ("op", "sample"),
    [pair for pair in SAMPLES if pair[0].name in NAMES],
    ids=[name for name, pair in zip(SAMPLE_IDS, SAMPLES) if pair[0].name in NAMES],
)


@samples
def test_samples_match_the_float64_reference(op, sample):
    forward, backward = errors(op, sample, torch.float32, "cuda", "cuda")
    assert forward <= 2e-6
    assert backward <= 1e-5


# From one block a sample to clusters of eight, and a map that takes more than the 48 KiB that every block may have.
@each_name
@pytest.mark.parametrize(
    "shape", [(1, 64, 28, 28), (16, 64, 28, 28), (200, 16, 9, 31), (2, 128, 64, 64), (3, 33, 1, 17)], ids=str
)
def test_real_sizes(name, shape):
    n, hidden, height, width = shape
    taps = 3 if name == "row_lstm" else 2
    gates = torch.randn(n, 4 * hidden, height, width, dtype=torch.float64)
    weight = torch.randn(4 * hidden, hidden, taps, dtype=torch.float64) / (taps * hidden) ** 0.5
    forward, backward = errors(OPS[name], Sample("", (gates, weight, None, None, True)), torch.float32, "cuda", "cuda")
    assert forward <= 2e-6
    assert backward <= 1e-5


@each_name
def test_two_runs_give_the_same_bits(name):
    taps = 3 if name == "row_lstm" else 2
    gates = torch.randn(5, 256, 28, 28, device="cuda", requires_grad=True)
    weight = (torch.randn(256, 64, taps, device="cuda") / 14).requires_grad_()
    results = []
    for _ in range(2):
        with genfast.backend("cuda"):
            h = getattr(ops, name)(gates, weight)
            results.append([h, *torch.autograd.grad(h.square().sum(), (gates, weight))])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_layers_compile_and_equal_the_cpu():
    for layer in (gnn.RowLSTM(6, 9, data_channels=3), gnn.DiagonalBiLSTM(6, 9, data_channels=3)):
        x = torch.randn(2, 6, 7, 5)
        expected = layer(x)
        layer = layer.cuda()
        torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_a_refused_launch_is_named_and_forgotten():
    """More shared memory than a block may have; the next launch does not report it again."""
    kernels = pytest.importorskip("genfast._cuda")
    with pytest.raises(RuntimeError, match=r"genfast::row_lstm: CUDA said: "):
        kernels.pixel_rnn(gates=None, n=1, hidden=64, depth=64, height=1, width=10**5, taps=3)
    gates, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 2, 3)
    with genfast.backend("cuda"):
        h = ops.row_lstm(gates.cuda(), weight.cuda())
    torch.testing.assert_close(h.cpu(), ops.row_lstm(gates, weight), rtol=1e-4, atol=1e-5)
