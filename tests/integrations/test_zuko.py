"""zuko's flows with our kernels: the same numbers, the same modules."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import genfast

zuko = pytest.importorskip("zuko", reason="zuko is not installed: pip install --no-deps -r requirements/peers.txt")
from zuko.bayesian import BayesianModel  # noqa: E402

from genfast.integrations import zuko as zuko_integration  # noqa: E402

from .common import CHECKS, Case, build, results, same  # noqa: E402

C = torch.linspace(-1, 1, 9 * 3).view(9, 3)


def _log_prob(m, x, c=None):
    return [m(c).log_prob(x)]


def _inverse(m, x, c=None):
    return list(m(c).transform.inv.call_and_ladj(x))


def _case(make, features, swapped, context=False, scale=1.0, ways=("log_prob", "inverse")):
    def call(function):
        return lambda m, x: function(m, x, C.to(x.dtype) if context else None)

    calls = {way: call({"log_prob": _log_prob, "inverse": _inverse}[way]) for way in ways}
    return Case(make, lambda: scale * torch.randn(9, features), calls, swapped)


F = zuko.flows
SPARSE = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1]], dtype=torch.bool)
CASES = {
    "maf": _case(lambda: F.MAF(5, hidden_features=(16, 16)), 5, 6),
    "maf context": _case(lambda: F.MAF(5, 3, hidden_features=(16, 16)), 5, 6, context=True),
    "maf residual": _case(lambda: F.MAF(5, 3, hidden_features=(16, 16, 16), residual=True), 5, 6, context=True),
    "maf elu": _case(lambda: F.MAF(5, hidden_features=(16,), activation=nn.ELU), 5, 6),
    "maf leaky": _case(lambda: F.MAF(5, hidden_features=(16,), activation=functools.partial(nn.LeakyReLU, 0.2)), 5, 6),
    "maf slope": _case(
        lambda: F.MAF(5, univariate=functools.partial(zuko.transforms.MonotonicAffineTransform, slope=0.1)), 5, 6
    ),
    "maf random order": _case(lambda: F.MAF(7, randperm=True, hidden_features=(16, 16)), 7, 6),
    "maf graph": _case(lambda: F.MAF(4, adjacency=SPARSE, hidden_features=(16,)), 4, 6),
    "maf of one feature": _case(lambda: F.MAF(1, 3), 1, 3, context=True),
    "nsf": _case(lambda: F.NSF(5, hidden_features=(16, 16)), 5, 6, scale=3.0),
    "nsf context": _case(lambda: F.NSF(5, 3, bins=4, slope=1e-2), 5, 6, context=True, scale=3.0),
    "nsf coupling": _case(lambda: F.NSF(5, passes=2), 5, 6, scale=3.0),
    "ncsf": _case(lambda: F.NCSF(3, hidden_features=(16,)), 3, 6),
    "nice": _case(lambda: F.NICE(5, 3), 5, 3, context=True),
    "nice splines": _case(
        lambda: F.NICE(5, univariate=zuko.transforms.MonotonicRQSTransform, shapes=[(8,), (8,), (7,)]), 5, 3, scale=3.0
    ),
    # Its inverse is a bisection, which has no gradients to compare to rounding.
    "naf": _case(lambda: F.NAF(3, transforms=1, signal=4, hidden_features=(8,)), 3, 1, ways=("log_prob",)),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_case(name, check):
    check(CASES[name])


@each_case
def test_sampling_with_the_same_noise(name):
    plain, fast, _ = build(CASES[name])
    c = C.double()[0] if "context" in name or name in ("maf residual", "nice", "maf of one feature") else None
    for draw in (lambda d: d.sample((4, 2)), lambda d: d.rsample((4,)), lambda d: d.rsample_and_log_prob((4,))):
        found = []
        for model in (fast, plain):
            torch.manual_seed(1)
            drawn = draw(model(c))
            found.append([drawn] if isinstance(drawn, torch.Tensor) else list(drawn))
        same(*found, 1e-7, 1e-9)


SWEPT = (
    "maf",
    "maf context",
    "maf residual",
    "maf elu",
    "maf slope",
    "maf random order",
    "maf graph",
    "nsf",
    "nsf context",
)


@pytest.mark.parametrize("name", SWEPT)
def test_sampling_does_not_call_the_network(name, monkeypatch):
    _, fast, _ = build(CASES[name])
    c = C.double()[0] if name in ("maf context", "maf residual", "nsf context") else None
    fast(c).sample((3,))  # the first time a row is put through the network, as a check
    monkeypatch.setattr(zuko_integration.MaskedMLP, "forward", None)
    monkeypatch.setattr(zuko.nn.MaskedLinear, "forward", None)
    assert fast(c).sample((3,)).shape[0] == 3


def test_batch_shapes_of_context_and_inputs():
    plain, fast, _ = build(CASES["maf context"])
    for size, condition in (((5,), (3,)), ((4, 5), (3,)), ((2, 4, 5), (4, 3))):
        x, c = torch.randn(size).double(), torch.randn(condition).double()
        for call in (lambda m, x, c=c: _log_prob(m, x, c), lambda m, x, c=c: _inverse(m, x, c)):
            same(results(fast, x, call), results(plain, x, call), 1e-7, 1e-9)


def test_second_derivatives():
    plain, fast, x = build(CASES["nsf"])
    found = []
    for model in (fast, plain):
        z = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model().log_prob(z).sum(), z, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), [z, *model.parameters()], allow_unused=True))
    same(*found, 1e-6, 1e-8)


def test_weights_edited_behind_the_counter_are_noticed():
    """``.data`` edits do not raise PyTorch's count of in-place changes, and averaging of weights is written with
    them."""
    plain, fast, x = build(CASES["maf context"])
    for edit in (
        lambda p: p.data.mul_(0.5),
        lambda p: p.detach().add_(0.1),
        lambda p: setattr(p, "data", p.data + 0.1),
    ):
        for model in (fast, plain):
            with torch.no_grad():
                _inverse(model, x, C.double())
            for p in model.parameters():
                edit(p)
        with torch.no_grad():
            same(_inverse(fast, x, C.double()), _inverse(plain, x, C.double()), 1e-7, 1e-9)


def test_hooks_on_inner_layers_still_run():
    plain, fast, x = build(CASES["maf"])
    for model in (plain, fast):
        layer = model.transform.transforms[0].hyper[0]
        layer.register_forward_hook(lambda m, args, out: 2 * out)
    for call in (_log_prob, _inverse):
        same(results(fast, x, call), results(plain, x, call), 1e-7, 1e-9)


def test_autocast_and_half_precision_run_zuko_itself():
    plain, fast, x = build(CASES["nsf"], torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fast().log_prob(x), plain().log_prob(x))
    plain, fast, x = plain.bfloat16(), fast.bfloat16(), x.bfloat16()
    with torch.no_grad():
        assert torch.equal(fast().log_prob(x), plain().log_prob(x))


def test_bayesian_models_keep_their_local_trick():
    plain, fast, x = build(CASES["maf"])
    for trick in (False, True):
        found = []
        for model in (fast, plain):
            torch.manual_seed(2)
            bayesian = BayesianModel(model, init_logvar=-3.0).double()
            with bayesian.reparameterize(local_trick=trick) as sampled:
                found.append([sampled().log_prob(x)])
        same(*found, 1e-9, 1e-9)


def test_report_names_what_is_left():
    _, report = genfast.accelerate(nn.ModuleDict({"a": F.NAF(3), "b": F.NCSF(3), "c": F.CNF(2)}), report=True)
    text = str(report)
    assert "a.transform.transforms.0 " in text
    assert any(e.name == "FFJTransform" and "no kernel" in e.detail for e in report.left)
    assert any("its passes" in e.falls_back for e in report.swapped if e.path.startswith("b."))
    assert text.startswith(f"{len(report.swapped)} of {len(report.entries)} modules of zuko")


def test_printing_a_transform():
    plain, fast, _ = build(CASES["nice"])
    c = C.double()[0]
    assert repr(fast(c)) == repr(plain(c))
    assert repr(fast(c).transform.inv) == repr(plain(c).transform.inv)
    for model in (plain, fast):
        t = model.transform.transforms[0]
        assert repr(t.meta(c, torch.zeros(3).double())) == "DependentTransform(MonotonicAffineTransform(), 1)"
