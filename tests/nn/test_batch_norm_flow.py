"""nn.BatchNormFlow: statistics and gradients in training, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfast import nn as gnn


def test_batch_norm_uses_the_batch_in_training_and_its_gradient():
    torch.manual_seed(0)
    norm = gnn.BatchNormFlow(3).double()
    torch.nn.init.normal_(norm.log_gamma)
    torch.nn.init.normal_(norm.beta)
    x = (5 + 2 * torch.randn(32, 3, dtype=torch.float64)).requires_grad_()
    z, logdet = norm(x)
    torch.testing.assert_close(z.mean(0), norm.beta)
    torch.testing.assert_close(z.std(0, unbiased=False), norm.log_gamma.exp(), rtol=1e-4, atol=0)
    expected = (norm.log_gamma - 0.5 * (x.var(0, unbiased=False) + 1e-5).log()).sum()
    torch.testing.assert_close(logdet, expected.expand(32))
    found = torch.autograd.grad(logdet.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(32 * expected, x)[0])
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.detach().var(0))
    standard = nn.BatchNorm1d(3).double()
    standard(x.detach())
    torch.testing.assert_close(norm.running_var, standard.running_var)
    with pytest.raises(RuntimeError, match="no inverse in training"):
        norm.inverse(z)
    with pytest.raises(ValueError, match="BatchNormFlow"):
        gnn.ReversibleSequential(gnn.ActNorm(3), gnn.BatchNormFlow(3))(x.detach().float())
    for shape in ((1, 3), (0, 3)):
        with pytest.raises(ValueError, match="training needs at least 2 positions"):
            norm(torch.zeros(shape, dtype=torch.float64))
    images = gnn.BatchNormFlow(3)
    z, _ = images(7 + torch.randn(4, 3, 5, 5))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "BatchNormFlow: features=3, momentum=2", lambda: gnn.BatchNormFlow(3, momentum=2)),
        (ValueError, r"BatchNormFlow: x has shape \(2, 4\)", lambda: gnn.BatchNormFlow(3)(torch.zeros(2, 4))),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
