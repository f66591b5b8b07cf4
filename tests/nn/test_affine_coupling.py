"""nn.AffineCoupling and nn.GlowStep: pairs, the parts of a step, the order of OpenAI's Glow, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from tests.nn.test_bijection import Conditioner


def test_glow_step_on_pairs_equals_tensors_and_its_parts():
    step = gnn.GlowStep(4, Conditioner(2, 4)).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    z, logdet = step(x)
    (a, b), pair_logdet = step((x[:, :2], x[:, 2:]))
    torch.testing.assert_close(torch.cat((a, b), 1), z)
    torch.testing.assert_close(pair_logdet, logdet)
    y, first = step.actnorm(x)
    y, second = step.conv(y)
    y, third = step.coupling(y)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(first + second + third, logdet)


def test_shift_first_layers_are_openai_glow_s():
    """(x + loc) s, the convolution, then (x_a + t) s: on tensors, on pairs, and back."""
    step = gnn.GlowStep(4, torch.nn.Conv2d(2, 4, 3, padding=1), shift_first=True).double()
    x = 2 + torch.randn(3, 4, 5, 6, dtype=torch.float64)
    z, logdet = step(x)
    norm = step.actnorm
    s, loc = (v.reshape(1, -1, 1, 1) for v in (norm.log_scale.exp(), norm.bias))
    torch.testing.assert_close(norm.bias.detach(), -x.mean((0, 2, 3)))
    mixed, of_conv = step.conv((x + loc) * s)
    torch.testing.assert_close(norm(x)[0], (x + loc) * s)
    r, t = step.coupling.conditioner(mixed[:, 2:]).chunk(2, 1)
    expected = torch.cat(((mixed[:, :2] + t) * torch.sigmoid(r + 2), mixed[:, 2:]), 1)
    torch.testing.assert_close(z, expected)
    of_norm = norm.log_scale.sum() * 30
    torch.testing.assert_close(logdet, of_norm + of_conv + torch.nn.functional.logsigmoid(r + 2).flatten(1).sum(1))
    torch.testing.assert_close(step.inverse(z)[0], x)
    pair, _ = step((x[:, :2], x[:, 2:]))
    torch.testing.assert_close(torch.cat(pair, 1), z)
    torch.testing.assert_close(torch.cat(step.inverse(pair)[0], 1), x)
    for a, b in zip(
        torch.autograd.grad(z.square().sum() + logdet.sum(), list(step.parameters()), allow_unused=True),
        torch.autograd.grad(
            expected.square().sum()
            + (of_norm + of_conv + torch.nn.functional.logsigmoid(r + 2).flatten(1).sum(1)).sum(),
            list(step.parameters()),
            allow_unused=True,
        ),
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert "shift_first=True" in repr(step)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "GlowStep: channels=1", lambda: gnn.GlowStep(1, nn.Identity())),
        (ValueError, "scale='x', expected one of", lambda: gnn.AffineCoupling(nn.Identity(), scale="x")),
        (ValueError, "alpha goes with", lambda: gnn.AffineCoupling(nn.Identity(), alpha=1.0)),
        (ValueError, "needs width", lambda: gnn.AffineCoupling(nn.Identity(), scale="tanh", alpha="learn")),
        (TypeError, "mask has dtype", lambda: gnn.AffineCoupling(nn.Identity(), mask=torch.ones(1, 2, 2))),
        (
            ValueError,
            r"conditioner Conv2d returned \(2, 3, 4, 4\) for an input of \(2, 2, 4, 4\), expected \(2, 4, 4, 4\)",
            lambda: gnn.AffineCoupling(nn.Conv2d(2, 3, 1))(torch.zeros(2, 4, 4, 4)),
        ),
        (
            ValueError,
            "width=9 with 4 channels",
            lambda: gnn.AffineCoupling(nn.Identity(), width=9)(torch.zeros(2, 4, 4, 4)),
        ),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
