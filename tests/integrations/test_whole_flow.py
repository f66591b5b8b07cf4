"""Flows of zuko and of nflows whose log_prob is one call, and those that are called layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import genfast
from genfast.integrations._class_swap import KEPT

zuko = pytest.importorskip("zuko", reason="zuko is not installed: pip install --no-deps -r requirements/peers.txt")
nt = pytest.importorskip("nflows.transforms", reason="nflows is not installed")
from nflows.distributions.normal import ConditionalDiagonalNormal, StandardNormal  # noqa: E402
from nflows.flows.base import Flow  # noqa: E402
from nflows.nn.nets import ResidualNet  # noqa: E402


def nflows_maf(features=5, context=None, **options):
    steps = [nt.PointwiseAffineTransform(torch.randn(features), torch.rand(features) + 0.5)]
    for _ in range(3):
        steps += [
            nt.MaskedAffineAutoregressiveTransform(features, 20, context_features=context, **options),
            nt.RandomPermutation(features),
        ]
    return Flow(nt.CompositeTransform(steps), StandardNormal((features,)), nn.Linear(3, context) if context else None)


def nflows_coupling(kind, features=5, context=None, **options):
    def network(inputs, outputs):
        return ResidualNet(inputs, outputs, 16, context_features=context, num_blocks=2, activation=torch.tanh)

    steps = []
    for i in range(3):
        steps += [kind(torch.arange(features) % 2 == i % 2, network, **options), nt.LULinear(features)]
    return Flow(nt.CompositeTransform(steps), StandardNormal((features,)))


SPLINE = {"num_bins": 6, "tails": "linear", "tail_bound": 2.5}
WHOLE = {
    "zuko MAF": lambda: zuko.flows.MAF(5, 3, hidden_features=(20, 20)),
    "zuko MAF, residual": lambda: zuko.flows.MAF(
        5, hidden_features=(24, 24), residual=True, randperm=True, activation=nn.ELU
    ),
    "zuko NSF": lambda: zuko.flows.NSF(4, 3, hidden_features=(20,)),
    "zuko NICE": lambda: zuko.flows.NICE(5, 3, hidden_features=(20,), activation=nn.SiLU),
    "zuko RealNVP": lambda: zuko.flows.RealNVP(6, hidden_features=(20,)),
    "nflows MAF": lambda: nflows_maf(use_residual_blocks=False, activation=torch.tanh),
    "nflows MAF, context": lambda: nflows_maf(context=4, use_residual_blocks=False, activation=torch.tanh),
    "nflows MAF, residual": lambda: nflows_maf(context=4, num_blocks=2),
    "nflows autoregressive splines": lambda: Flow(
        nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(4, 20, **SPLINE), StandardNormal((4,))
    ),
    "nflows NSF": lambda: nflows_coupling(nt.PiecewiseRationalQuadraticCouplingTransform, **SPLINE),
    "nflows NSF, context": lambda: nflows_coupling(nt.PiecewiseRationalQuadraticCouplingTransform, context=3, **SPLINE),
    "nflows RealNVP": lambda: nflows_coupling(nt.AffineCouplingTransform),
    "nflows NICE": lambda: nflows_coupling(nt.AdditiveCouplingTransform),
}


def pair(name):
    torch.manual_seed(0)
    plain = (WHOLE | LAYERS)[name]()
    plain.double()
    for buffer in plain.buffers():
        if buffer.dim() == 0 and buffer.is_floating_point():
            buffer.fill_(0.5 * 1.8378770664093453 * plain._distribution._shape.numel())  # float32 rounded it
    fast = genfast.accelerate(copy.deepcopy(plain))
    return plain, fast


def features_of(flow):
    if isinstance(flow, Flow):
        return flow._distribution._shape[0] if hasattr(flow._distribution, "_shape") else 4
    return flow.base().event_shape[0] if not isinstance(flow.base, nn.Sequential) else 4


def inputs(name, flow):
    context = torch.randn(17, 3, dtype=torch.float64) if name in CONTEXT else None
    return torch.randn(17, features_of(flow), dtype=torch.float64), context


CONTEXT = ("zuko MAF", "zuko NSF", "zuko NICE", "nflows MAF, context", "nflows MAF, residual", "nflows NSF, context")
LAYERS = {
    "dropout": (
        lambda: Flow(nt.MaskedAffineAutoregressiveTransform(4, 8, dropout_probability=0.3), StandardNormal((4,))),
        "dropout is active",
    ),
    "batch norm": (
        lambda: Flow(nt.MaskedAffineAutoregressiveTransform(4, 8, use_batch_norm=True), StandardNormal((4,))),
        "a network normalises over the batch",
    ),
    "another activation": (
        lambda: zuko.flows.MAF(4, hidden_features=(8,), activation=nn.Hardswish),
        "the activation Hardswish has no step",
    ),
    "cubic splines": (
        lambda: nflows_coupling(nt.PiecewiseCubicCouplingTransform, num_bins=4, tails="linear", tail_bound=2.0),
        "PiecewiseCubicCouplingTransform has no step",
    ),
}
REASONS = {name: reason for name, (_, reason) in LAYERS.items()}
LAYERS = {name: make for name, (make, _) in LAYERS.items()}


def log_prob(flow, x, context):
    return flow.log_prob(x, context) if isinstance(flow, Flow) else flow(context).log_prob(x)


def whole(flow):
    return flow.__dict__[KEPT]["whole"]


@pytest.mark.parametrize("name", WHOLE)
def test_log_prob_and_gradients_of_a_whole_flow(name):
    plain, fast = pair(name)
    x, context = inputs(name, plain)
    results = []
    for flow in (plain, fast):
        leaves = [t.clone().requires_grad_() for t in (x, context) if t is not None]
        made = log_prob(flow, leaves[0], leaves[1] if context is not None else None)
        results.append(
            [made, *torch.autograd.grad(made.square().sum(), [*leaves, *flow.parameters()], allow_unused=True)]
        )
    assert whole(fast).reason == ""
    assert genfast.report(fast).entries[0].falls_back == ""
    for a, b in zip(*results):
        if a is None or not a.any():
            assert b is None or not b.any()
        else:
            assert float((a - b).norm()) <= 1e-9 * float(a.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_what_has_no_program_runs_layer_by_layer_and_the_report_says_why(name):
    plain, fast = pair(name)
    x, context = inputs(name, plain)
    torch.manual_seed(1)
    expected = log_prob(plain, x, context)
    torch.manual_seed(1)
    torch.testing.assert_close(log_prob(fast, x, context), expected)
    assert REASONS[name] in whole(fast).reason
    assert REASONS[name] in genfast.report(fast).entries[0].falls_back
    fast.eval()
    if name == "dropout":
        torch.testing.assert_close(log_prob(fast, x, context), log_prob(plain.eval(), x, context))
        assert whole(fast).reason == ""


@pytest.mark.parametrize("name", ["zuko MAF", "nflows NSF, context"])
def test_changes_between_two_calls_are_seen(name):
    plain, fast = pair(name)
    x, context = inputs(name, plain)

    def check(reason=""):
        with torch.no_grad():
            torch.testing.assert_close(log_prob(fast, x, context), log_prob(plain, x, context), rtol=1e-9, atol=1e-9)
        assert whole(fast).reason == reason or (reason and reason in whole(fast).reason)

    check()
    for flow in (plain, fast):
        for p in flow.parameters():
            p.data.mul_(1.1)
    check()
    handles = []
    for flow in (plain, fast):
        linear = next(m for m in flow.modules() if isinstance(m, nn.Linear))
        handles.append(linear.register_forward_hook(lambda module, inputs, output: output + 0.1))
    check("hooks")
    for handle in handles:
        handle.remove()
    check()
    for flow in (plain, fast):
        linear = [m for m in flow.modules() if isinstance(m, nn.Linear)][1]
        linear.weight = nn.Parameter(linear.weight.detach() * 0.5)
    check()


def test_zukos_distribution_is_what_it_was():
    plain, fast = pair("zuko MAF")
    c = torch.randn(3, dtype=torch.float64)
    x = torch.randn(6, 2, 5, dtype=torch.float64)
    for context in (c, c.expand(2, 3), torch.randn(6, 2, 3).double()):
        a, b = plain(context), fast(context)
        torch.testing.assert_close(b.log_prob(x), a.log_prob(x))
        assert b.batch_shape == a.batch_shape
        assert b.event_shape == a.event_shape
        assert isinstance(b, zuko.distributions.NormalizingFlow)
        assert type(b).__name__ == "NormalizingFlow"
        torch.testing.assert_close(b.transform(x), a.transform(x))
    torch.manual_seed(3)
    expected, density = plain(c).rsample_and_log_prob((4,))
    torch.manual_seed(3)
    made, also = fast(c).rsample_and_log_prob((4,))
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(also, density)
    torch.testing.assert_close(fast(c).expand((2,)).log_prob(x[0]), plain(c).expand((2,)).log_prob(x[0]))
    torch.testing.assert_close(fast(c).log_prob(x[0, 0]), plain(c).log_prob(x[0, 0]))


def test_an_embedding_network_is_called_once():
    plain, fast = pair("nflows MAF, context")
    calls = []
    fast._embedding_net.register_forward_hook(lambda *_: calls.append(1))
    x, context = inputs("nflows MAF, context", plain)
    torch.testing.assert_close(log_prob(fast, x, context), log_prob(plain, x, context))
    assert len(calls) == 1


def test_training_goes_the_same_way():
    curves = []
    for flow in pair("zuko NSF"):
        torch.manual_seed(1)
        x, context = inputs("zuko NSF", flow)
        optimizer = torch.optim.Adam(flow.parameters(), 3e-3)
        losses = []
        for _ in range(50):
            optimizer.zero_grad()
            loss = -flow(context).log_prob(x).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, rtol=1e-9, atol=1e-9)


def test_a_conditional_base_runs_layer_by_layer():
    torch.manual_seed(0)
    base = ConditionalDiagonalNormal((4,), nn.Linear(3, 8))
    plain = Flow(nt.MaskedAffineAutoregressiveTransform(4, 8, context_features=3), base).double()
    fast = genfast.accelerate(copy.deepcopy(plain))
    x, context = torch.randn(7, 4).double(), torch.randn(7, 3).double()
    torch.testing.assert_close(fast.log_prob(x, context), plain.log_prob(x, context))
    assert "the base ConditionalDiagonalNormal has no step" in whole(fast).reason
