"""nn.ActNorm: its first batch, constant channels, data far from zero, errors."""

from __future__ import annotations

import copy

import pytest
import torch

from genfast import nn as gnn


def test_actnorm_starts_from_the_first_batch_once():
    norm = gnn.ActNorm(3)
    x = 5 + 3 * torch.randn(64, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(norm.eval()(x)[0], x)  # evaluation does not start it
        z, _ = norm.train()(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), unbiased=False), torch.ones(3))
    before = copy.deepcopy(norm.state_dict())
    norm(x + 100)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), norm.state_dict().values()))
    loaded = gnn.ActNorm(3)
    loaded.load_state_dict(before)
    loaded(x + 100)
    assert torch.equal(loaded.bias, norm.bias)


def test_actnorm_of_a_constant_channel_stays_finite():
    norm = gnn.ActNorm(2)
    z, logdet = norm(torch.ones(4, 2, 3, 3))
    assert bool(z.isfinite().all())
    assert bool(logdet.isfinite().all())
    with pytest.raises(ValueError, match="first training batch must not be empty"):
        gnn.ActNorm(2)(torch.zeros(0, 2, 3, 3))


@pytest.mark.parametrize("shape", [(16, 3, 8, 8), (512, 3)])
def test_actnorm_far_from_zero_is_that_of_its_parameters(shape):
    """s x and b nearly cancel there: what rounding took from s counts x times."""
    x = 1000 + torch.randn(shape)
    for form in [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]:
        x = x.contiguous(memory_format=form)
        for first in (False, True):
            norm = gnn.ActNorm(3, shift_first=first)
            z, logdet = norm(x)
            exact = copy.deepcopy(norm).double()
            assert float((z - exact(x.double())[0]).abs().max()) < 3e-6
            if first:
                assert float(z.transpose(0, 1).flatten(1).mean(1).abs().max()) < 1e-4
            torch.testing.assert_close(norm.inverse(z)[0], x, rtol=1e-6, atol=0)
            torch.testing.assert_close(norm.inverse(z)[1], -logdet)


@pytest.mark.parametrize(("error", "message", "call"), [(ValueError, "ActNorm: channels=0", lambda: gnn.ActNorm(0))])
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
