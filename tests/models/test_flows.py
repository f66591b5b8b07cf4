"""The flow models: exact densities, the plain twins, the peers, sampling, errors."""

from __future__ import annotations

import math

import pytest
import torch

import genfast
from genfast import models

CASES = {
    "nice": ("NICE", {"dim": 10, "hidden": 32, "depth": 2}, (10,)),
    "nice gaussian context": ("NICE", {"dim": 7, "hidden": 32, "prior": "gaussian", "context": 3}, (7,)),
    "realnvp vectors": ("RealNVP", {"shape": 6, "hidden": 32}, (6,)),
    "realnvp odd context": ("RealNVP", {"shape": 5, "hidden": 16, "context": 3}, (5,)),
    "realnvp images": ("RealNVP", {"shape": (3, 8, 8), "levels": 2, "hidden": 8, "depth": 1}, (3, 8, 8)),
    "realnvp images context": ("RealNVP", {"shape": (1, 8, 8), "hidden": 8, "depth": 1, "context": 3}, (1, 8, 8)),
    "glow": ("Glow", {"shape": (3, 8, 8), "levels": 2, "steps": 3, "hidden": 16}, (3, 8, 8)),
    "glow nchw full exp": (
        "Glow",
        {"shape": (3, 8, 8), "levels": 3, "steps": 2, "hidden": 8, "plu": False, "scale": "exp",
        "channels_last": False},
        (3, 8, 8),
    ),
    "glow reversible context": (
        "Glow", {"shape": (1, 8, 8), "levels": 2, "steps": 2, "hidden": 16, "reversible": True, "context": 3}, (1, 8,
        8),
    ),
    "glow additive": ("Glow", {"shape": (3, 4, 4), "levels": 1, "steps": 2, "hidden": 8, "scale": "additive"}, (3, 4,
    4)),
    "linear": ("LinearFlow", {"dim": 5}, (5,)),
    "linear full": ("LinearFlow", {"dim": 5, "plu": False}, (5,)),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def built(case, variant=lambda model: model, dtype=torch.float64):
    name, config, shape = CASES[case]
    torch.manual_seed(0)
    model = variant(getattr(models, name))(**config).to(dtype)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # the zero layers too, so that every coupling does something
        with torch.no_grad():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    x = (torch.rand(6, *shape, generator=generator, dtype=torch.float64) - 0.5).to(dtype)
    context = torch.randn(6, 3, generator=generator, dtype=torch.float64).to(dtype) if config.get("context") else None
    return model, x, context


@each_case
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_inverse_of_forward(case, dtype, near):
    model, x, context = built(case, dtype=dtype)
    z, logdet = model(x, context)
    assert z.shape == (6, model.dim)
    back, minus = model.inverse(z, context)
    assert float((back - x).detach().abs().max()) <= near
    torch.testing.assert_close(minus, -logdet, rtol=1e-4, atol=1e-3)
    again, _ = model(back, context)
    assert float((again - z).detach().abs().max()) <= 100 * near


@each_case
def test_logdet_is_the_jacobians(case):
    model, x, context = built(case)
    model(x, context)
    if model.dim > 64:
        x = x[:1]
    context = None if context is None else context[:1]
    _, logdet = model(x[:1], context)
    forward = plain_copy(model, case).eval() if CASES[case][1].get("reversible") else model
    jacobian = torch.autograd.functional.jacobian(
        lambda v: forward(v.reshape(1, *model.shape), context)[0].flatten(), x[0].flatten()
    )
    torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian)[1])


def plain_copy(model, case):
    name, config, _ = CASES[case]
    twin = models.plain(getattr(models, name))(**config).to(next(model.parameters()).dtype)
    twin.load_state_dict(model.state_dict())
    return twin


@each_case
def test_the_plain_twin_starts_equal_and_its_state_dict_gives_the_same_density(case):
    name, config, _ = CASES[case]
    torch.manual_seed(3)
    first = getattr(models, name)(**config)
    torch.manual_seed(3)
    second = models.plain(getattr(models, name))(**config)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    twin, x, context = built(case, models.plain)
    expected = twin.log_prob(x, context)
    model = getattr(models, name)(**config).double()
    model.load_state_dict(twin.state_dict())
    found = model.log_prob(x, context)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    for (key, p), q in zip(model.named_parameters(), twin.parameters()):
        (f,), (e,) = (
            torch.autograd.grad(v.sum(), w, retain_graph=True, allow_unused=True)
            for v, w in ((found, p), (expected, q))
        )
        assert (f is None) == (e is None), key
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-7, atol=1e-9)
    single, x32, context32 = built(case, dtype=torch.float32)
    single.load_state_dict(twin.state_dict())
    torch.testing.assert_close(single.log_prob(x32, context32).double(), expected, rtol=2e-5, atol=2e-4)


@each_case
def test_samples_repeat_and_context_and_temperature_matter(case):
    model, x, context = built(case, dtype=torch.float32)
    model(x, context)
    model.eval()

    def draw(**options):
        given = None if context is None else options.pop("context", context)
        return model.sample(6, generator=torch.Generator().manual_seed(5), context=given, **options)

    assert draw().shape == (6, *model.shape)
    assert torch.equal(draw(), draw())
    cold = draw(temperature=0.0)
    if context is None:
        torch.testing.assert_close(cold, cold[:1].expand_as(cold))
    else:
        assert not torch.allclose(draw(), draw(context=context + 1))
        assert not torch.allclose(model.log_prob(x, context), model.log_prob(x, context + 1))
    path = model.interpolate(x, x.flip(0), 5, context=context)
    torch.testing.assert_close(path[0], x, atol=1e-4, rtol=0)
    torch.testing.assert_close(path[-1], x.flip(0), atol=1e-4, rtol=0) if context is None else None
    assert model.sample(0, context=None if context is None else context[:0]).shape[0] == 0


@each_case
def test_config_rebuilds_the_model(case):
    name, config, _ = CASES[case]
    model = getattr(models, name)(**config)
    key = next(k for k, v in models.NAMES.items() if v is type(model))
    import json

    again = models.build(key, **json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config


@each_case
def test_an_empty_batch_and_a_spoilt_sample(case):
    model, x, context = built(case)
    clean = model.log_prob(x, context).detach()
    model.eval()
    x[2].fill_(float("nan"))
    found = model.log_prob(x, context)
    assert bool(found[2].isnan())
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(found[others], clean[others])
    empty = model.log_prob(x[:0], None if context is None else context[:0])
    assert empty.shape == (0,)


def test_bits_per_dim_of_a_known_density():
    """The identity with a standard normal base: bits = log2 bins + (x^2 / 2 + log(2 pi) / 2) / ln 2 per dimension."""
    model = models.RealNVP(4, couplings=2, hidden=4).eval()
    x = torch.randint(0, 256, (50, 4))
    noise = torch.empty(50, 4).uniform_(generator=torch.Generator().manual_seed(1))
    v = (x + noise) / 256 - 0.5
    expected = 8 + (0.5 * v.square() + 0.5 * math.log(2 * math.pi)).mean(1) / math.log(2)
    found = model.bits_per_dim(x, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, expected)


def moons(n, generator):
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.rand(n, generator=generator) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack((x, y), 1) - 0.25 + 0.08 * torch.randn(n, 2, generator=generator)


def test_a_trained_2d_density_integrates_to_one_and_beats_a_gaussian():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = models.RealNVP(2, couplings=8, hidden=32)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True)
    for _ in range(250):
        optimizer.zero_grad()
        (-model.log_prob(moons(256, generator)).mean()).backward()
        optimizer.step()
    model.eval()
    axis = torch.linspace(-5, 5, 801)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    with torch.no_grad():
        mass = sum(float(model.log_prob(part).double().exp().sum()) for part in grid.split(65536)) * (10 / 800) ** 2
        held_out = moons(4096, generator)
        score = float(model.log_prob(held_out).mean())
    assert abs(mass - 1) < 0.01
    gaussian = torch.distributions.MultivariateNormal(held_out.mean(0), held_out.T.cov())
    assert score > float(gaussian.log_prob(held_out).mean()) + 0.5


def test_the_linear_flow_fits_a_full_covariance():
    torch.manual_seed(0)
    mix = torch.randn(4, 4)
    data = torch.randn(4096, 4) @ mix.T + torch.randn(4)
    model = models.LinearFlow(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2, fused=True)
    for step in range(400):
        for group in optimizer.param_groups:
            group["lr"] = 2e-2 * (1 - step / 400)
        optimizer.zero_grad()
        loss = -model.log_prob(data).mean()
        loss.backward()
        optimizer.step()
    best = torch.distributions.MultivariateNormal(data.mean(0), data.T.cov(correction=0)).log_prob(data).mean()
    assert abs(float(-loss.detach() - best)) < 2e-3


@pytest.mark.slow
def test_glow_learns_the_digits():
    torch.manual_seed(0)
    digits = genfast.data.load("digits")
    model = models.Glow(digits.shape, levels=2, steps=6, hidden=48)
    from genfast.training import Trainer

    trainer = Trainer(model, digits, batch_size=64, lr=2e-3)
    for _ in range(300):
        trainer.step()
    # A Gaussian with full covariance, fitted in closed form, reaches this on the same held-out digits.
    train, test = (
        models.dequantize(x, 17, generator=torch.Generator().manual_seed(1)).flatten(1)
        for x in (digits.train, digits.test)
    )
    gaussian = torch.distributions.MultivariateNormal(train.mean(0), train.T.cov() + 1e-4 * torch.eye(64))
    baseline = (math.log(17) - float(gaussian.log_prob(test).mean()) / 64) / math.log(2)
    assert trainer.evaluate()["bits_per_dim"] < baseline


def test_normflows_glow_on_its_own_weights():
    nf = pytest.importorskip("normflows", reason="normflows is not installed")
    torch.manual_seed(0)
    channels = 12
    blocks = [nf.flows.GlowBlock(channels, 16, split_mode="channel", scale=True, init_zeros=False) for _ in range(3)]
    x = torch.randn(4, channels, 8, 8)
    ours = []
    for block in blocks:
        coupling, conv, norm = block.flows
        network = coupling.flows[1].param_map
        # Theirs runs from latent to data: its inverse is our forward. Its split keeps the first half, moves the second.
        step = genfast.nn.FlowSequential(
            genfast.nn.ActNorm(channels),
            genfast.nn.InvertibleConv1x1(channels),
            genfast.nn.AffineCoupling(
                network, scale="sigmoid", transform="last", layout="shift_scale_interleaved", width=channels // 2
            ),
        )
        ours.append((step, conv, norm))
    # Data to latent goes through theirs backwards: norm, conv, coupling of the last block first.
    z, log_det = x, torch.zeros(4)
    flow = genfast.nn.FlowSequential(*(step for step, _, _ in reversed(ours)))
    for block in reversed(blocks):
        z, part = block.inverse(z)  # sets the activation norms on the way
        log_det = log_det + part
    for step, conv, norm in ours:
        with torch.no_grad():
            step[0].log_scale.copy_(-norm.s.flatten())
            step[0].bias.copy_((-norm.t * torch.exp(-norm.s)).flatten())
            step[0].initialized.fill_(True)
            step[0]._look()
            step[1].perm.copy_(conv.P.argmax(1))
            step[1].sign_s.copy_(conv.sign_S)
            for mine, theirs in ((step[1].lower, conv.L), (step[1].upper, conv.U), (step[1].log_s, conv.log_S)):
                mine.copy_(theirs)
    with torch.no_grad():
        expected_z, expected = x, torch.zeros(4)
        for block in reversed(blocks):
            expected_z, part = block.inverse(expected_z)
            expected = expected + part
        # normflows' "sigmoid" maps data to latent by z = (x - t) * sigmoid(r + 2), ours by s x + t.
        found_z, found = x, torch.zeros(4)
        for step, _, _ in reversed(ours):
            y, a = step[0](found_z)
            y, b = step[1](y)
            y_b, y_a = y.chunk(2, 1)
            params = step[2].conditioner(y_b)
            shift = params[:, 0::2]
            moved, c = genfast.ops.affine_coupling(
                y_a - shift,
                torch.stack((torch.zeros_like(shift), params[:, 1::2]), 2).flatten(1, 2),
                scale="sigmoid",
                layout="shift_scale_interleaved",
            )
            found_z = torch.cat((y_b, moved), 1)
            found = found + a + b + c
    torch.testing.assert_close(found_z, expected_z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    assert len(flow) == 3


def test_normflows_realnvp_on_its_own_weights():
    """Its affine coupling with the exponential map is ours with interleaved parameters: same density."""
    nf = pytest.importorskip("normflows", reason="normflows is not installed")
    torch.manual_seed(0)
    flows, ours = [], []
    for _ in range(4):
        network = nf.nets.MLP([1, 32, 2], init_zeros=False)
        flows += [nf.flows.AffineCouplingBlock(network, scale_map="exp"), nf.flows.Permute(2, mode="swap")]
        ours.append(network)
    peer = nf.NormalizingFlow(nf.distributions.DiagGaussian(2, trainable=False), flows)
    x = torch.randn(64, 2)
    z, total = x, torch.zeros(64)
    for network in reversed(ours):
        z = z.flip(1)
        z, logdet = genfast.nn.AffineCoupling(
            network, scale="exp", transform="last", layout="shift_scale_interleaved", width=1
        ).inverse(z)
        total = total + logdet
    found = total - 0.5 * z.square().sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(found, peer.log_prob(x), rtol=1e-5, atol=1e-5)


def test_nflows_on_its_own_weights():
    transforms = pytest.importorskip("nflows.transforms", reason="nflows is not installed")
    torch.manual_seed(0)

    class Net(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.layer = torch.nn.Linear(inputs, outputs)

        def forward(self, x, context=None):
            return self.layer(x)

    mask = torch.tensor([1, 1, 1, 0, 0, 0])  # 1: transformed
    peers = [transforms.AdditiveCouplingTransform(mask, Net), transforms.ActNorm(6)]
    x = torch.randn(32, 6)
    z, total = x, torch.zeros(32)
    for peer in peers:
        z, part = peer(z)
        total = total + part
    norm = genfast.nn.ActNorm(6)
    with torch.no_grad():
        norm.log_scale.copy_(peers[1].log_scale)
        norm.bias.copy_(peers[1].shift)
    norm.eval()
    coupling = genfast.nn.AffineCoupling(peers[0].transform_net, scale="additive", width=3, transform="first")
    found, first = coupling(x)
    found, second = norm(found)
    torch.testing.assert_close(found, z)
    torch.testing.assert_close(first + second, total)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "Glow: x has dtype torch.int64.*dequantize",
         lambda: models.Glow((1, 4, 4), levels=1, steps=1).log_prob(torch.zeros(2, 1, 4, 4).long())),
        (ValueError, r"NICE: x has shape \(2, 3\), expected \(N, 4\)",
         lambda: models.NICE(4, hidden=4).log_prob(torch.zeros(2, 3))),
        (ValueError, "multiples of 2.levels", lambda: models.Glow((3, 12, 12), levels=3)),
        (ValueError, "multiples of 2.levels", lambda: models.RealNVP((3, 6, 6), levels=2)),
        (ValueError, r"RealNVP: shape=\(1,\)", lambda: models.RealNVP(1)),
        (ValueError, "NICE: dim=1", lambda: models.NICE(1)),
        (ValueError, "prior='cauchy'", lambda: models.NICE(4, prior="cauchy")),
        (ValueError, "models.build: name='gaan'", lambda: models.build("gaan")),
        (ValueError, "n=-1", lambda: models.LinearFlow(3).sample(-1)),
        (ValueError, "steps=1", lambda: models.LinearFlow(3).interpolate(torch.zeros(1, 3), torch.zeros(1, 3), 1)),
        (ValueError, "called with no context, expected one",
         lambda: models.NICE(4, hidden=4, context=2).log_prob(torch.zeros(2, 4))),
        (ValueError, "called with a context, expected none",
         lambda: models.NICE(4, hidden=4).log_prob(torch.zeros(2, 4), torch.zeros(2, 2))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
