"""MAF, IAF, NSF and Flow: exact densities, both directions, contexts, distributions, plain twins, training, errors."""

from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch
from torch import distributions as D

from genfast import cli, models
from genfast import nn as gnn

SMALL = {"hidden": 16, "transforms": 2}
CASES = {
    "maf": ("MAF", {"dim": 5, **SMALL}),
    "maf batch": ("MAF", {"dim": 5, "norm": "batch", "order": "random", "scale": "exp", **SMALL}),
    "maf context": ("MAF", {"dim": 4, "context": 3, "residual": True, **SMALL}),
    "maf one feature": ("MAF", {"dim": 1, "context": 3, **SMALL}),
    "iaf": ("IAF", {"dim": 5, "order": "random", **SMALL}),
    "iaf context": ("IAF", {"dim": 4, "context": 3, "scale": "sigmoid", **SMALL}),
    "nsf": ("NSF", {"dim": 5, "bins": 4, **SMALL}),
    "nsf lu context": ("NSF", {"dim": 5, "bins": 4, "mixing": "lu", "context": 3, "norm": None, **SMALL}),
    "nsf permuted": ("NSF", {"dim": 4, "bins": 4, "mixing": "permutation", "convention": "zuko", **SMALL}),
    "nsf autoregressive": ("NSF", {"dim": 5, "bins": 4, "coupling": "autoregressive", "convention": "zuko", **SMALL}),
    "nsf autoregressive context": ("NSF", {"dim": 1, "bins": 4, "coupling": "autoregressive", "context": 3, **SMALL}),
    "nsf circular": ("NSF", {"dim": 4, "bins": 4, "tails": "circular", **SMALL}),
    "nsf circular autoregressive": (
        "NSF",
        {"dim": 4, "bins": 4, "tails": "circular", "coupling": "autoregressive", "mixing": "permutation", **SMALL},
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


def built(case, variant=lambda model: model, dtype=torch.float64):
    name, config = CASES[case]
    torch.manual_seed(0)
    model = variant(getattr(models, name))(**config).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    x = torch.randn(6, model.dim, generator=generator, dtype=torch.float64).to(dtype)
    context = torch.randn(6, 3, generator=generator, dtype=torch.float64).to(dtype) if config.get("context") else None
    model(x, context)  # sets the activation norms
    return model.eval(), x, context


@each_case
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-8), (torch.float32, 1e-3)])
def test_inverse_of_forward(case, dtype, near):
    model, x, context = built(case, dtype=dtype)
    z, logdet = model(x, context)
    back, minus = model.inverse(z, context)
    torch.testing.assert_close(back, x, atol=near, rtol=near)
    torch.testing.assert_close(minus, -logdet, atol=10 * near, rtol=near)


@each_case
def test_logdet_is_the_jacobians(case):
    model, x, context = built(case)
    _, logdet = model(x[:1], None if context is None else context[:1])
    jacobian = torch.autograd.functional.jacobian(
        lambda v: model(v[None], None if context is None else context[:1])[0][0], x[0]
    )
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian)[1])


@each_case
def test_samples_carry_their_density_and_repeat(case):
    model, _, context = built(case)
    generator = torch.Generator().manual_seed(5)
    x, log_prob = model.sample_and_log_prob(6, context, generator=generator)
    assert x.requires_grad
    torch.testing.assert_close(model.log_prob(x, context), log_prob)
    again = model.sample(6, context, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(again, x.detach())
    assert not again.requires_grad
    torch.testing.assert_close(model.rsample(6, context, generator=torch.Generator().manual_seed(5)), x)
    if context is not None:
        other = model.sample(6, context + 1, generator=torch.Generator().manual_seed(5))
        assert not torch.allclose(other, again)
    assert model.sample(0, None if context is None else context[:0]).shape == (0, model.dim)


@each_case
def test_the_plain_twin_starts_equal_and_gives_the_same_density_and_gradients(case):
    name, config = CASES[case]
    torch.manual_seed(3)
    first = getattr(models, name)(**config)
    torch.manual_seed(3)
    second = models.plain(getattr(models, name))(**config)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    twin, x, context = built(case, models.plain)
    model = getattr(models, name)(**config).double().eval()
    model.load_state_dict(twin.state_dict())
    expected, found = twin.log_prob(x, context), model.log_prob(x, context)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for (key, p), q in zip(model.named_parameters(), twin.parameters()):
        (f,), (e,) = (
            torch.autograd.grad(v.sum(), w, retain_graph=True, allow_unused=True)
            for v, w in ((found, p), (expected, q))
        )
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-9, msg=lambda m, key=key: f"{key}: {m}")
    drawn = [m.sample(6, context, generator=torch.Generator().manual_seed(1)) for m in (model, twin)]
    torch.testing.assert_close(*drawn)


@each_case
def test_the_gradient_of_a_reverse_divergence_reaches_all_that_the_plain_twins_does(case):
    model, _, context = built(case)
    twin, _, _ = built(case, models.plain)
    twin.load_state_dict(model.state_dict())
    grads = []
    for m in (model, twin):
        x, log_prob = m.sample_and_log_prob(6, context, generator=torch.Generator().manual_seed(1))
        loss = (log_prob + 0.5 * (x - 1).square().sum(1)).mean()
        grads.append(torch.autograd.grad(loss, list(m.parameters()), allow_unused=True))
    for f, e in zip(*grads):
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-8)


@each_case
def test_config_rebuilds_the_model_and_copies_are_equal(case):
    model, x, context = built(case)
    key = next(k for k, v in models.NAMES.items() if v is type(model))
    again = models.build(key, **json.loads(json.dumps(model.config))).double().eval()
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(x, context), model.log_prob(x, context))
        drawn = (m.sample(6, context, generator=torch.Generator().manual_seed(1)) for m in (other, model))
        assert torch.equal(*drawn)


@each_case
def test_an_empty_batch_and_a_spoilt_sample(case):
    model, x, context = built(case)
    clean = model.log_prob(x, context).detach()
    assert model.log_prob(x[:0], None if context is None else context[:0]).shape == (0,)
    x[2].fill_(float("nan"))
    found = model.log_prob(x, context)
    assert bool(found[2].isnan())
    torch.testing.assert_close(found[[0, 1, 3, 4, 5]], clean[[0, 1, 3, 4, 5]])


# ---- exact small cases ----


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("MAF", {"norm": None}),
        ("IAF", {}),
        ("NSF", {"norm": None}),
        ("NSF", {"coupling": "autoregressive", "norm": None}),
        ("NSF", {"mixing": "lu", "norm": None}),
        ("NSF", {"tails": "circular"}),
        ("MAF", {"norm": None, "context": 2}),
    ],
)
def test_a_density_on_the_plane_integrates_to_one(name, config):
    torch.manual_seed(1)
    model = getattr(models, name)(2, hidden=16, transforms=2, **config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    circular = config.get("tails") == "circular"
    side, points = (math.pi, 300) if circular else (8.0, 400)
    axis = (torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 * side - side
    grid = torch.cartesian_prod(axis, axis)
    context = torch.tensor([0.5, -1.0], dtype=torch.float64) if "context" in config else None
    with torch.no_grad():
        mass = (
            sum(float(model.log_prob(part, context).exp().sum()) for part in grid.split(1 << 16))
            * (2 * side / points) ** 2
        )
    assert abs(mass - 1) < 2e-3


def test_maf_is_the_product_of_its_conditionals():
    torch.manual_seed(0)
    model = models.MAF(4, transforms=1, hidden=16, norm=None, scale="exp").double()
    x = torch.randn(5, 4, dtype=torch.float64)
    mu, alpha = model.flow[0].network(x).unbind(2)
    expected = D.Normal(mu, alpha.exp()).log_prob(x).sum(1)
    torch.testing.assert_close(model.log_prob(x), expected)


# ---- the distribution ----


def test_a_flow_is_a_torch_distribution(monkeypatch):
    monkeypatch.setattr(D.Distribution, "_validate_args", True)  # importing zuko turns it off for all
    model, _, context = built("maf context", dtype=torch.float32)
    d = model.distribution(context)
    assert (d.batch_shape, d.event_shape, d.has_rsample) == ((6,), (4,), True)
    x = d.rsample((3, 2))
    assert x.shape == (3, 2, 6, 4)
    assert x.requires_grad
    assert not d.sample((2,)).requires_grad
    torch.testing.assert_close(d.log_prob(x)[1, 0], model.log_prob(x[1, 0], context))
    y, log_prob = d.rsample_and_log_prob((2,))
    torch.testing.assert_close(d.log_prob(y), log_prob, rtol=1e-4, atol=1e-4)
    wide = d.expand((2, 6))
    assert wide.batch_shape == (2, 6)
    assert wide.sample((5,)).shape == (5, 2, 6, 4)
    torch.testing.assert_close(wide.log_prob(x[0]), d.log_prob(x[0]))
    torch.testing.assert_close(
        d.log_prob(x[0, 0, 0]), model.log_prob(x[0, 0, :1].expand(6, -1), context)
    )  # one x, 6 contexts
    one = model.distribution(context[0])
    assert one.batch_shape == ()
    assert one.sample().shape == (4,)
    assert one.expand((7,)).log_prob(one.sample((7,))).shape == (7,)
    squashed = D.TransformedDistribution(d, [D.SigmoidTransform()])
    u = squashed.rsample((3,))
    x = torch.logit(u)
    expected = d.log_prob(x) - (u * (1 - u)).log().sum(-1)
    torch.testing.assert_close(squashed.log_prob(u), expected, rtol=1e-3, atol=1e-3)
    assert D.Independent(d, 1).log_prob(d.sample()).shape == ()
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.full((6, 4), math.nan))
    assert "batch_shape=(6,), event_shape=(4,)" in repr(d)


def test_contexts_of_samples():
    model, _, context = built("maf context", dtype=torch.float32)
    assert model.sample(6, context).shape == (6, 4)
    assert model.sample(9, context[0]).shape == (9, 4)
    assert model.sample((9,), context).shape == (9, 6, 4)
    assert model.sample((2, 3), context[0]).shape == (2, 3, 4)
    assert model.sample((), context).shape == (6, 4)
    assert model.sample_and_log_prob((2,), context)[1].shape == (2, 6)
    x = model.sample(6, context)
    torch.testing.assert_close(model.log_prob(x, context[0]), model.log_prob(x, context[:1].expand(6, -1)))
    with pytest.raises(ValueError, match=r"context has shape \(6, 3\), expected \(5, K\).*distribution\(context\)"):
        model.sample(5, context)
    with pytest.raises(ValueError, match="context"):
        model.sample(5)


def gaussian_flow():
    torch.manual_seed(0)
    flow = models.Flow(D.Normal(torch.zeros(3), torch.ones(3)), [gnn.LULinear(3), gnn.Householder(3)]).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.2 * torch.randn_like(p))
        mean = flow.inverse(torch.zeros(1, 3, dtype=torch.float64))[0][0]
        basis = flow.inverse(torch.eye(3, dtype=torch.float64))[0] - mean
    return flow, D.MultivariateNormal(mean, basis.T @ basis)


def test_divergences_by_sampling_are_those_in_closed_form():
    flow, same = gaussian_flow()
    other = D.MultivariateNormal(torch.ones(3).double(), torch.eye(3).double())
    x = same.sample((4,))
    torch.testing.assert_close(flow.log_prob(x), same.log_prob(x))
    d = flow.distribution(kl_samples=40_000)
    for found, expected in (
        (D.kl_divergence(d, other), D.kl_divergence(same, other)),
        (D.kl_divergence(other, d), D.kl_divergence(other, same)),
    ):
        assert abs(float(found.detach() - expected)) < 0.05 * float(expected)
        assert found.requires_grad
    assert float(D.kl_divergence(d, d).detach().abs()) < 1e-10
    context = torch.randn(5, 3, dtype=torch.float64)
    model = built("maf context")[0]
    assert D.kl_divergence(
        model.distribution(context), D.Independent(D.Normal(torch.zeros(4).double(), 1.0), 1)
    ).shape == (5,)


@pytest.mark.parametrize(
    "base",
    [
        D.Normal(torch.zeros(3), torch.ones(3)),
        D.Independent(D.Laplace(torch.zeros(3), torch.ones(3)), 1),
        D.MultivariateNormal(torch.zeros(3), torch.eye(3)),
        D.StudentT(3.0 * torch.ones(3)),
        models.DiagonalGaussian(3),
    ],
    ids=lambda b: type(b).__name__,
)
def test_bases(base):
    torch.manual_seed(0)
    flow = models.Flow(base, [gnn.LULinear(3), gnn.Permutation(3)])
    x, log_prob = flow.sample_and_log_prob(8)
    torch.testing.assert_close(flow.log_prob(x), log_prob)
    generator = torch.Generator().manual_seed(0)
    first = flow.sample(4, generator=generator)
    assert not torch.equal(first, flow.sample(4, generator=generator))
    assert torch.equal(first, flow.sample(4, generator=torch.Generator().manual_seed(0)))
    cold = flow.sample(4, temperature=0.0)
    torch.testing.assert_close(cold, cold[:1].expand_as(cold))
    wide = copy.deepcopy(flow).double()
    assert wide.sample(2).dtype == torch.float64
    assert wide.log_prob(x.double()).dtype == torch.float64
    assert flow.sample(2).dtype == torch.float32


def test_a_module_as_base_and_images():
    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shape = (2,)
            self.means = torch.nn.Parameter(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]))

        def density(self):
            return D.MixtureSameFamily(D.Categorical(torch.ones(2)), D.Independent(D.Normal(self.means, 1.0), 1))

        def log_prob(self, z):
            return self.density().log_prob(z)

        def sample(self, n):
            return self.density().sample((n,))

    flow = models.Flow(Mixture(), gnn.ActNorm(2)).eval()
    assert not flow.distribution().has_rsample
    x, log_prob = flow.sample_and_log_prob(5)
    assert not x.requires_grad
    torch.testing.assert_close(flow.log_prob(x), log_prob)
    with pytest.raises(NotImplementedError, match="no gradient"):
        flow.rsample(3)
    with pytest.raises(ValueError, match="no mean to scale about"):
        flow.sample(3, temperature=0.5)
    assert len(list(flow.parameters())) == 3
    images = models.Flow(D.Normal(torch.zeros(4, 3, 3), 1.0), [gnn.ActNorm(4), gnn.InvertibleConv1x1(4)]).eval()
    x = images.sample(2)
    assert x.shape == (2, 4, 3, 3)
    assert images.log_prob(x).shape == (2,)
    assert images.distribution().event_shape == (4, 3, 3)
    flat = models.Flow(models.DiagonalGaussian(36), gnn.ActNorm(4), shape=(4, 3, 3)).eval()
    assert flat.sample((2, 3)).shape == (2, 3, 4, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "base is a str", lambda: models.Flow("normal", [])),
        (TypeError, "base Identity has no log_prob and no sample", lambda: models.Flow(torch.nn.Identity(), [])),
        (TypeError, "has no inverse method", lambda: models.Flow(models.DiagonalGaussian(3), [torch.nn.ReLU()])),
        (
            ValueError,
            r"event shape \(3,\), which does not fit shape=\(4,\)",
            lambda: models.Flow(D.Normal(torch.zeros(3), 1.0), [], shape=(4,)),
        ),
        (ValueError, "n=-1, expected at least 0", lambda: models.MAF(3, hidden=8).sample(-1)),
        (ValueError, "temperature=-1", lambda: models.MAF(3, hidden=8).sample(1, temperature=-1)),
        (
            ValueError,
            r"MAF: x has shape \(2, 4\), expected \(N, 3\)",
            lambda: models.MAF(3, hidden=8).log_prob(torch.zeros(2, 4)),
        ),
        (TypeError, "x has dtype torch.int64", lambda: models.MAF(3, hidden=8).log_prob(torch.zeros(2, 3).long())),
        (ValueError, "MAF: dim=0 and transforms=5", lambda: models.MAF(0)),
        (ValueError, "order='up', expected", lambda: models.MAF(3, order="up")),
        (ValueError, "norm='layer', expected", lambda: models.MAF(3, norm="layer")),
        (ValueError, "scale='tanh', expected", lambda: models.MAF(3, scale="tanh")),
        (ValueError, "no inverse in training", lambda: models.IAF(3, norm="batch")),
        (ValueError, "NSF: dim=1 and", lambda: models.NSF(1)),
        (ValueError, "coupling='both', expected", lambda: models.NSF(3, coupling="both")),
        (ValueError, "tails='cubic', expected", lambda: models.NSF(3, tails="cubic")),
        (ValueError, "mixing='qr', expected", lambda: models.NSF(3, mixing="qr")),
        (ValueError, "mixing='lu', expected", lambda: models.NSF(3, mixing="lu", tails="circular")),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


# ---- training ----


def moons(n, generator):
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack((x, y), 1) - 0.25 + 0.08 * torch.randn(n, 2, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("MAF", {}), ("NSF", {}), ("NSF", {"coupling": "autoregressive"})])
def test_trained_flows_beat_a_gaussian(name, options):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = getattr(models, name)(2, hidden=32, transforms=4, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3, fused=True)
    for _ in range(150):
        optimizer.zero_grad()
        (-model.log_prob(moons(128, generator)).mean()).backward()
        optimizer.step()
    held_out = moons(2048, generator)
    with torch.no_grad():
        score = float(model.eval().log_prob(held_out).mean())
    gaussian = torch.distributions.MultivariateNormal(held_out.mean(0), held_out.T.cov())
    assert score > float(gaussian.log_prob(held_out).mean()) + 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["IAF", "MAF"])
def test_a_reverse_divergence_finds_a_correlated_density(name):
    """IAF's own direction is parallel; MAF's goes through the degree-ordered inverse and its backward."""
    torch.manual_seed(0)
    covariance = torch.tensor([[1.0, 0.8, 0.0], [0.8, 1.0, 0.3], [0.0, 0.3, 0.5]])
    target = D.MultivariateNormal(torch.tensor([1.0, -1.0, 0.5]), covariance)
    model = getattr(models, name)(3, hidden=24, transforms=2, norm=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    for _ in range(250):
        optimizer.zero_grad()
        x, log_prob = model.sample_and_log_prob(128)
        (log_prob - target.log_prob(x)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        x, log_prob = model.sample_and_log_prob(4096)
        assert float((log_prob - target.log_prob(x)).mean()) < 0.05
        assert float((x.T.cov() - covariance).abs().max()) < 0.12


@pytest.mark.parametrize(
    "name", [["maf"], ["iaf"], ["nsf"], ["nsf", "--coupling", "autoregressive", "--bins", "4"]], ids=lambda n: n[-1]
)
def test_the_command_trains_and_samples(name, tmp_path, capsys):
    out = tmp_path / "run"
    options = ["--data", "digits", "--steps", "5", "--hidden", "32", "--transforms", "2", "--out", str(out)]
    command = ["train", *name, *options]
    assert cli.main(command) == 0
    assert "bits/dim on held-out images" in capsys.readouterr().out
    assert (out / "samples.png").exists()
    picture = tmp_path / "samples.png"
    assert cli.main(["sample", "--checkpoint", str(out), "-n", "4", "--out", str(picture)]) == 0
    assert picture.exists()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["maf context", "nsf lu context", "iaf"])
def test_log_prob_compiles_without_a_break(case):
    model, x, context = built(case, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model.log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), model.log_prob(x, context), rtol=1e-4, atol=1e-4)
