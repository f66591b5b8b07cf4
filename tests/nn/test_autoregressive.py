"""nn.MaskedAutoregressive and nn.Inverse: formulas, inverses by degree and by passes, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from tests.nn.test_bijection_of_vectors import LAYERS, made


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith(("affine", "autoregressive", "iaf"))])
def test_the_degree_ordered_inverse_is_that_of_many_passes(name):
    layer, x, context = made(name)
    inner = layer.bijection if name == "iaf" else layer
    for found, expected in zip(inner.inverse(x, context), inner.inverse_plain(x, context)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        inner.network.linears[0].weight.mul_(1.5)  # a step of an optimiser is seen
    for found, expected in zip(inner.inverse(x, context), inner.inverse_plain(x, context)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_network_without_layers_is_inverted_by_passes():
    class Network(nn.Module):
        def forward(self, x):
            return torch.stack((x.cumsum(1) - x, 0.1 * (x.cumsum(1) - x)), 2)

    layer = gnn.MaskedAutoregressive(Network()).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    z, logdet = layer(x)
    back, minus = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)


@pytest.mark.parametrize("scale", ["exp", "softclamp", "sigmoid", "additive"])
@pytest.mark.parametrize("normalising", [True, False])
def test_the_affine_formulas(scale, normalising):
    """MAF, equation 4: z = (x - mu) e^-alpha; the other way round z = s x + t."""
    made = gnn.MADENetwork(3, (8,), outputs=1 if scale == "additive" else 2)
    layer = gnn.MaskedAutoregressive(made, scale=scale, normalising=normalising)
    x = torch.randn(4, 3)
    params = made(x)
    a = torch.zeros(4, 3) if scale == "additive" else params[..., 1]
    log_s = {
        "exp": a,
        "softclamp": a / (1 + a.abs() / 6.907755278982137),
        "sigmoid": torch.sigmoid(a + 2).log(),
        "additive": a,
    }[scale]
    t = params[..., 0]
    z, logdet = layer(x)
    torch.testing.assert_close(z, (x - t) * (-log_s).exp() if normalising else x * log_s.exp() + t)
    torch.testing.assert_close(logdet, (-log_s if normalising else log_s).sum(1))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "transform='cubic', expected 'affine' or 'spline'",
         lambda: gnn.MaskedAutoregressive(nn.Identity(), transform="cubic")),
        (TypeError, "transform='affine' takes no bins", lambda: gnn.MaskedAutoregressive(nn.Identity(), bins=3)),
        (ValueError, "scale='tanh', expected one of", lambda: gnn.MaskedAutoregressive(nn.Identity(), scale="tanh")),
        (ValueError, "the network has outputs=3, expected 2", lambda: gnn.MaskedAutoregressive(gnn.MADENetwork(4, (8,),
        outputs=3))),
        (ValueError, r"the network Identity returned \(2, 4\) for an input of \(2, 4\), expected \(2, 4, 2\)",
         lambda: gnn.MaskedAutoregressive(nn.Identity())(torch.zeros(2, 4))),
        (TypeError, "Inverse: ReLU has no inverse method", lambda: gnn.Inverse(nn.ReLU())),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
