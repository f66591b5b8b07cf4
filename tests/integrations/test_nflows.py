"""nflows' transforms with our kernels: the same numbers, the same modules."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import genfast

pytest.importorskip("nflows", reason="nflows is not installed: pip install --no-deps -r requirements/peers.txt")
from nflows import distributions, flows  # noqa: E402
from nflows import transforms as nt  # noqa: E402
from nflows.nn.nets import ConvResidualNet, ResidualNet  # noqa: E402
from nflows.transforms.base import InputOutsideDomain  # noqa: E402

from .common import CHECKS, Case, build, results, same  # noqa: E402

C = torch.linspace(-1, 1, 9 * 3).view(9, 3)
MASK = [1, 0, 1, 0, 1]
pytestmark = pytest.mark.filterwarnings("ignore:torch.triangular_solve", "ignore:Inputs to the softmax")


def _net(i, o):
    return ResidualNet(i, o, hidden_features=16)


def _image_net(i, o):
    return ConvResidualNet(i, o, hidden_channels=8)


def _case(make, swapped, x=lambda: 1.5 * torch.randn(9, 5), context=False, ways=("forward", "inverse"), prime=None):
    def call(way):
        return lambda m, x: list(getattr(m, way)(x, C.to(x.dtype) if context else None))

    return Case(make, x, {way: call(way) for way in ways}, swapped, prime=prime)


def _unit():
    return torch.rand(9, 5)


def _image():
    return torch.randn(3, 5, 4, 2)


MAF, RQ = nt.MaskedAffineAutoregressiveTransform, nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
# nflows' linear splines take their knots k / K in float32 even for float64: with 8 bins those are exact.
CASES = {
    "maf": _case(lambda: MAF(5, 16), 9),
    "maf context": _case(lambda: MAF(5, 16, 3, activation=torch.tanh), 7, context=True),
    "maf feedforward": _case(lambda: MAF(5, 16, use_residual_blocks=False, random_mask=True), 5),
    "maf feedforward context": _case(
        lambda: MAF(5, 16, 3, use_residual_blocks=False, activation=F.elu), 5, context=True
    ),
    "maf gelu": _case(lambda: MAF(5, 16, activation=F.gelu), 7),
    "maf of one feature": _case(lambda: MAF(1, 4), 9, x=lambda: torch.randn(9, 1)),
    "rq": _case(lambda: RQ(5, 16, tails="linear", tail_bound=2.0), 9),
    "rq context": _case(lambda: RQ(5, 16, 3, tails="linear", num_bins=4), 9, context=True),
    "rq bounded": _case(lambda: RQ(5, 16), 9, x=_unit),
    "linear": _case(lambda: nt.MaskedPiecewiseLinearAutoregressiveTransform(8, 5, 16), 9, x=_unit),
    "quadratic": _case(lambda: nt.MaskedPiecewiseQuadraticAutoregressiveTransform(5, 16, tails="linear"), 9),
    "additive coupling": _case(lambda: nt.AdditiveCouplingTransform(MASK, _net), 1),
    "linear coupling": _case(lambda: nt.PiecewiseLinearCouplingTransform(MASK, _net, 8, tails="linear"), 1),
    "quadratic coupling": _case(lambda: nt.PiecewiseQuadraticCouplingTransform(MASK, _net, tails="linear"), 1),
    "quadratic coupling bounded": _case(lambda: nt.PiecewiseQuadraticCouplingTransform(MASK, _net), 1, x=_unit),
    "rq coupling": _case(
        lambda: nt.PiecewiseRationalQuadraticCouplingTransform(
            MASK, _net, tails="linear", tail_bound=2.0, apply_unconditional_transform=True
        ),
        2,
    ),
    "rq coupling bounded": _case(lambda: nt.PiecewiseRationalQuadraticCouplingTransform(MASK, _net), 1, x=_unit),
    "rq coupling images": _case(
        lambda: nt.PiecewiseRationalQuadraticCouplingTransform(MASK, _image_net, tails="linear"), 1, x=_image
    ),
    "linear cdf": _case(lambda: nt.PiecewiseLinearCDF([5], 8, tails="linear"), 1),
    "quadratic cdf": _case(lambda: nt.PiecewiseQuadraticCDF([5]), 1, x=_unit),
    "rq cdf": _case(lambda: nt.PiecewiseRationalQuadraticCDF([5], tails="linear"), 1),
    "actnorm": _case(lambda: nt.ActNorm(5), 1, prime=lambda m, x: m(x)),
    "actnorm images": _case(lambda: nt.ActNorm(5), 1, x=_image, prime=lambda m, x: m(x)),
    "lu": _case(lambda: nt.LULinear(5, identity_init=False), 1),
    "lu of few samples": _case(lambda: nt.LULinear(5, identity_init=False), 1, x=lambda: torch.randn(2, 5)),
    "lu cached": _case(lambda: nt.LULinear(5, using_cache=True, identity_init=False), 1, ways=("forward",)),
    "conv": _case(lambda: nt.OneByOneConvolution(5, identity_init=False), 1, x=_image),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_case(name, check):
    check(CASES[name])


def _flow():
    steps = []
    for _ in range(2):
        steps += [nt.ActNorm(5), nt.RandomPermutation(5), RQ(5, 16, tails="linear"), nt.LULinear(5), MAF(5, 16)]
    return flows.Flow(nt.CompositeTransform(steps), distributions.StandardNormal([5]))


def test_a_flow_trains_and_samples_alike():
    plain, fast, x = build(Case(_flow, lambda: torch.randn(9, 5), {}, 2 * 20))
    same(results(fast, x, lambda m, x: [m.log_prob(x)]), results(plain, x, lambda m, x: [m.log_prob(x)]), 1e-7, 1e-9)
    found = []
    for model in (fast, plain):
        torch.manual_seed(1)
        model.float().eval()  # the base draws in float32
        with torch.no_grad():
            found.append([model.sample(6)])
    same(*found, 1e-4, 1e-5)


SWEPT = [
    "maf",
    "maf context",
    "maf feedforward",
    "maf feedforward context",
    "maf gelu",
    "rq",
    "rq context",
    "rq bounded",
]


@pytest.mark.parametrize("name", SWEPT)
def test_the_inverse_does_not_call_the_network(name, monkeypatch):
    _, fast, x = build(CASES[name])
    CASES[name].calls["inverse"](fast, x)  # the first time a row is put through the network, as a check
    monkeypatch.setattr(nt.made.MADE, "forward", None)
    assert CASES[name].calls["inverse"](fast, x)[0].shape == x.shape


def test_actnorm_is_set_from_its_first_batch():
    found = []
    for accelerated in (True, False):
        torch.manual_seed(0)
        model = nt.ActNorm(5)
        if accelerated:
            genfast.accelerate(model)
        y, logdet = model(3 * torch.randn(50, 5) + 1)
        assert bool(model.initialized)
        found.append([y, logdet, model.log_scale, model.shift])
    same(*found, 1e-6, 1e-6)


def test_outside_a_bounded_domain_is_nflows_own_error():
    for make in (lambda: RQ(5, 16), lambda: nt.PiecewiseQuadraticCDF([5]), lambda: nt.PiecewiseLinearCDF([5])):
        model = make()
        genfast.accelerate(model)
        for way in (model.forward, model.inverse):
            with pytest.raises(InputOutsideDomain):
                way(torch.full((2, 5), 1.5))


def test_dropout_and_batch_norm_keep_the_peers_passes():
    for options in ({"dropout_probability": 0.5}, {"use_batch_norm": True}):
        torch.manual_seed(0)
        plain = MAF(5, 16, **options)
        fast = nt.MaskedAffineAutoregressiveTransform(5, 16, **options)
        fast.load_state_dict(plain.state_dict())
        report = genfast.report(genfast.accelerate(fast))
        assert "passes" in report.swapped[0].falls_back
        x = torch.randn(9, 5)
        for training in (True, False):
            plain.train(training), fast.train(training)
            found = []
            for model in (fast, plain):
                torch.manual_seed(3)
                found.append([*model(x), *model.inverse(x)])
            same(*found, 1e-4, 1e-5)


def test_what_is_left_and_why():
    class Twice(nt.ActNorm):
        def forward(self, inputs, context=None):
            y, logdet = super().forward(inputs, context)
            return 2 * y, logdet

    model = nt.CompositeTransform(
        [
            nt.AffineCouplingTransform(MASK, _net),
            nt.PiecewiseCubicCDF([5], 10),
            Twice(5),
            nt.BatchNorm(5),
            nt.PiecewiseRationalQuadraticCDF([5], num_bins=1, tails="linear"),
        ]
    )
    torch.nn.utils.parametrizations.weight_norm(linear := nt.LULinear(5), "bias", dim=None)
    model._transforms.append(linear)
    report = genfast.report(genfast.accelerate(model))
    reasons = [e.detail for e in report.left]
    assert not report.swapped
    assert "scale" in reasons[0]
    assert "cubic" in reasons[1]
    assert reasons[2] == "forward is not ActNorm's own"
    assert "no kernel" in reasons[3]
    assert "1 bins" in reasons[4]
    assert "parametrized" in reasons[5]


def test_a_subclass_that_leaves_the_methods_alone_is_served():
    class Named(nt.ActNorm):
        def name(self):
            return "mine"

    model = Named(5)
    assert genfast.report(genfast.accelerate(model)).swapped[0].name == "Named"
    assert isinstance(model, Named)
    assert model.name() == "mine"
    genfast.restore(model)
    assert type(model) is Named


def test_a_module_that_is_held_twice_is_one_entry():
    act = nt.ActNorm(5)
    model = nt.CompositeTransform([act, nt.LULinear(5), act])
    report = genfast.report(genfast.accelerate(model))
    assert [e.path for e in report.swapped] == ["_transforms.0, _transforms.2", "_transforms.1"]
    assert model._transforms[0] is act is model._transforms[2]
    assert len(genfast.restore(model).entries) == 2


def test_a_model_with_nothing_of_theirs():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    report = genfast.report(genfast.accelerate(model))
    assert str(report) == "nothing to swap: the model holds no module of zuko, nflows or normflows"
    assert report.entries == genfast.restore(model).entries == ()
    for function in (genfast.accelerate, genfast.restore):
        with pytest.raises(TypeError, match="model is a int, expected a torch.nn.Module"):
            function(3)


def test_a_class_given_after_acceleration_is_not_undone_in_silence():
    model = nt.ActNorm(5)
    genfast.accelerate(model)
    torch.nn.utils.parametrize.register_parametrization(model, "shift", nn.Identity())
    with pytest.raises(RuntimeError, match="was given the class 'ParametrizedActNorm'"):
        genfast.restore(model)


def test_the_unscaled_warning_is_kept():
    model = nt.PiecewiseRationalQuadraticCouplingTransform(MASK, lambda i, o: _Plain(i, o), tails="linear")
    genfast.accelerate(model)
    with pytest.warns(UserWarning, match="not scaled down"):
        model(torch.randn(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scaled = nt.PiecewiseRationalQuadraticCouplingTransform(MASK, _net, tails="linear")
        genfast.accelerate(scaled)
        scaled(torch.randn(3, 5))


class _Plain(nn.Linear):
    def forward(self, x, context=None):
        return super().forward(x)
