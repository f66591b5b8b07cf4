"""nn.SplineCoupling and nn.Spline: images, intervals without tails, the identity, nflows' weights, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from genfast.models.conditioners import ResidualMLP
from tests.nn.test_bijection_of_vectors import MASK, Conditioner


def test_images_go_through_spline_couplings_by_channels():
    torch.manual_seed(0)
    for options in ({}, {"mask": torch.tensor([True, False, True, False])}):
        layer = gnn.SplineCoupling(Conditioner(2, 2 * 11, images=True), bins=4, **options).double()
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        z, logdet = layer(x)
        torch.testing.assert_close(layer.inverse(z)[0], x)
        jacobian = torch.autograd.functional.jacobian(lambda v, f=layer: f(v[None])[0][0], x[0]).reshape(36, 36)
        torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian)[1])
    spline = gnn.Spline(4, bins=4).double()
    torch.nn.init.normal_(spline.params)
    torch.testing.assert_close(spline(x)[0][1, :, 2, 0], spline(x[1:, :, 2, 0])[0][0])


def test_splines_without_tails_map_their_interval_and_refuse_the_rest():
    torch.manual_seed(0)
    x = 4 * torch.rand(20, 3, dtype=torch.float64) - 2
    made = gnn.MADENetwork(3, (16,), outputs=13)
    for layer in (
        gnn.Spline(3, bins=4, tails=None, bound=2.0),
        gnn.MaskedAutoregressive(made, transform="spline", bins=4, tails=None, bound=2.0),
        gnn.SplineCoupling(Conditioner(2, 13), bins=4, tails=None, bound=2.0),
    ):
        layer = layer.double()
        for p in layer.parameters():
            torch.nn.init.normal_(p, std=0.3)
        z, logdet = layer(x)
        assert float(z.detach().abs().max()) <= 2
        back, minus = layer.inverse(z)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(minus, -logdet)
        with pytest.raises(ValueError, match="2"):
            layer(2 * x)


def test_splines_start_as_the_identity():
    x = 2 * torch.randn(50, 3)
    for convention in ("nflows", "zuko"):
        z, logdet = gnn.Spline(3, convention=convention)(x)
        torch.testing.assert_close(z, x)
        torch.testing.assert_close(logdet, torch.zeros(50), atol=1e-5, rtol=0)


def test_nflows_spline_coupling_on_its_own_weights():
    pytest.importorskip("nflows", reason="nflows is not installed")
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    torch.manual_seed(0)
    theirs = PiecewiseRationalQuadraticCouplingTransform(
        ~MASK, lambda a, b: ResidualNet(a, b, hidden_features=16), num_bins=6, tails="linear", tail_bound=3.0
    ).double()
    conditioner = ResidualMLP(3, 2 * 17, 16, 2)
    net = theirs.transform_net
    conditioner.first.load_state_dict(net.initial_layer.state_dict())
    conditioner.last.load_state_dict(net.final_layer.state_dict())
    for own, other in zip(conditioner.blocks, net.blocks):
        for a, b in zip(own.children(), other.linear_layers):
            a.load_state_dict(b.state_dict())
    ours = gnn.SplineCoupling(conditioner, mask=MASK, bins=6, bound=3.0, logit_scale=16**-0.5).double()
    conditioner.load_state_dict({k: v.double() for k, v in conditioner.state_dict().items()})
    for module in (net, conditioner):
        for p in module.parameters():
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    x = 2 * torch.randn(20, 5, dtype=torch.float64)
    for found, expected in zip((*ours(x), *ours.inverse(x)), (*theirs(x), *theirs.inverse(x))):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "spline: bins=1, expected 2 to 64", lambda: gnn.Spline(3, bins=1)),
        (ValueError, "tails='cubic', expected one of", lambda: gnn.Spline(3, tails="cubic")),
        (ValueError, "convention='x', expected one of", lambda: gnn.Spline(3, convention="x")),
        (ValueError, "bound=0, expected more than 0", lambda: gnn.Spline(3, bound=0)),
        (ValueError, "Spline: features=0", lambda: gnn.Spline(0)),
        (ValueError, r"Spline: x has shape \(2, 4\)", lambda: gnn.Spline(3)(torch.zeros(2, 4))),
        (ValueError, "called without a context", lambda: gnn.Spline(3, context=2)(torch.zeros(2, 3))),
        (ValueError, "width=4 with 4 features", lambda: gnn.SplineCoupling(nn.Identity(), width=4)(torch.zeros(2, 4))),
        (ValueError, "transform='all', expected", lambda: gnn.SplineCoupling(nn.Identity(), transform="all")),
        (ValueError, "mask has dtype torch.int64", lambda: gnn.SplineCoupling(nn.Identity(),
        mask=torch.ones(3).long())),
        (ValueError, "neither all nor none", lambda: gnn.SplineCoupling(nn.Identity(), mask=torch.ones(3) > 0)),
        (ValueError, r"x has shape \(2, 4\), expected \(N, 5",
         lambda: gnn.SplineCoupling(nn.Identity(), mask=MASK)(torch.zeros(2, 4))),
        (ValueError, r"conditioner Linear returned \(2, 5\) for an input of \(2, 2\), expected \(2, 46\)",
         lambda: gnn.SplineCoupling(nn.Linear(2, 5))(torch.zeros(2, 4))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
