"""The autoencoders: shapes, configs, what each loss is, which parameters each player has, samples, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence

import genfast
from genfast import losses, models
from genfast.models import AutoencoderModel

NAMES = [name for name, model in models.NAMES.items() if issubclass(model, AutoencoderModel)]
CASES = {
    **{name: (name, {"shape": (1, 8, 8), "levels": 17, "hidden": 16}) for name in NAMES},
    **{f"{name} convolutional": (name, {"shape": (3, 8, 8), "levels": 5, "network": "convolutional", "width": 4,
    "base": 2})
       for name in NAMES},
    **{f"vae {likelihood}": ("vae", {"shape": (1, 8, 8), "levels": 17, "hidden": 16, "likelihood": likelihood})
       for likelihood in losses.LIKELIHOODS},
    "vae colours, categorical": ("vae", {"shape": (3, 4, 4), "levels": 4, "hidden": 8, "likelihood": "categorical"}),
    "sparse l1": ("sparse_autoencoder", {"shape": (1, 8, 8), "levels": 17, "hidden": 8, "penalty": "l1"}),
    "denoising pepper": ("denoising_autoencoder", {"shape": (1, 8, 8), "levels": 17, "hidden": 8,
                                                   "corruption": "salt_and_pepper"}),
    "denoising gaussian": ("denoising_autoencoder", {"shape": (1, 8, 8), "levels": 17, "hidden": 8,
    "corruption": "gaussian"}),
    "aae wasserstein": ("aae", {"shape": (1, 8, 8), "levels": 17, "hidden": 8, "loss": "wasserstein"}),
}  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES)


def built(case):
    name, config = CASES[case]
    torch.manual_seed(0)
    model = models.build(name, **config)
    return model, torch.randint(0, model.levels, (6, *model.shape), dtype=torch.uint8)


@each_case
def test_codes_images_samples_and_config(case):
    model, images = built(case)
    code = model.encode(images)
    assert code.shape == (6, model.latent_dim)
    assert model.decode(code).shape == images.shape
    generator = torch.Generator().manual_seed(3)
    model.fit(images)
    for found in (model.reconstruct(images), model.sample(6, generator=generator, temperature=0.5)):
        assert found.shape == images.shape
        assert found.dtype == torch.int64
        assert 0 <= int(found.min()) <= int(found.max()) < model.levels
    again = type(model)(**model.config)
    again.load_state_dict(model.state_dict())
    first, second = (m.sample(3, generator=torch.Generator().manual_seed(1)) for m in (model, again))
    assert torch.equal(first, second)
    assert model.sample(0).shape == (0, *model.shape)
    assert {f.shape for f in model.figures(images, generator=generator).values()} == {(6,)}


@each_case
def test_each_player_has_a_loss_in_its_parameters(case):
    model, images = built(case)
    trained = set()
    for phase in model.phases:
        given = model.losses(phase, images, generator=torch.Generator().manual_seed(0), step=0)
        assert tuple(given.players) == phase
        for player in phase:
            parameters = list(model.player(player))
            trained |= {id(p) for p in parameters}
            grads = torch.autograd.grad(given.players[player], parameters, retain_graph=True, allow_unused=True)
            assert all(g is not None and g.isfinite().all() for g in grads)
            assert sum(bool(g.count_nonzero()) for g in grads) > len(grads) / 2
    assert trained == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("likelihood", losses.LIKELIHOODS)
def test_the_bound_of_a_vae_written_out(likelihood):
    """Reconstruction and KL by torch.distributions, on the same noise."""
    model, images = built(f"vae {likelihood}")
    model = model.double()
    generator, again = (torch.Generator().manual_seed(5) for _ in range(2))
    bound = model.elbo(images, generator=generator)
    seen, target, constant = model._observed(images, again)
    mean, log_variance = model.posterior(seen)
    noise = torch.randn(mean.shape, generator=again, dtype=torch.float64)
    z = mean + (0.5 * log_variance).exp() * noise
    kl = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(bound.kl, kl)
    parameters = model.decoder(z)
    if likelihood == "categorical":
        expected = Categorical(logits=parameters.movedim(1, -1)).log_prob(target[:, 0]).flatten(1).sum(1)
    elif likelihood == "gaussian":
        m, v = parameters.chunk(2, 1)
        density = Normal(m, (0.5 * v).exp()).log_prob(target).flatten(1).sum(1)
        expected = density - 64 * math.log(17 / 2)  # 17 bins over [-1, 1]
        torch.testing.assert_close(((target + 1) * 17 / 2).floor().long(), images.long())
    else:
        expected = losses.log_likelihood(target, parameters, likelihood, levels=17)
    torch.testing.assert_close(bound.reconstruction, expected.mean())
    torch.testing.assert_close(bound.elbo, expected.mean() - kl)
    figures = model.figures(images, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(figures["elbo"].mean(), bound.elbo)
    torch.testing.assert_close(figures["elbo"], figures["reconstruction"] - figures["kl"])


def test_the_weight_of_the_kl_warms_up_and_free_bits_are_for_training_alone():
    model = models.VAE((1, 8, 8), levels=17, hidden=8, beta=4.0, warmup=10, free_bits=0.5)
    images = torch.randint(0, 17, (5, 1, 8, 8))
    for step, beta in ((0, 0.0), (5, 2.0), (10, 4.0), (99, 4.0)):
        figures = model.losses(("autoencoder",), images, generator=torch.Generator().manual_seed(0), step=step).figures
        torch.testing.assert_close(figures["loss"], beta * figures["kl"] - figures["reconstruction"])
        assert figures["kl"].item() >= 0.5 * model.latent_dim
    assert model.elbo(images).kl.item() < 0.5 * model.latent_dim


def test_more_importance_samples_give_a_tighter_bound():
    model, images = built("vae")
    one, many = (
        model.importance_weighted_bound(images, k, generator=torch.Generator().manual_seed(0)) for k in (1, 200)
    )
    assert float(many) > float(one)


def test_bernoulli_images_are_drawn_from_the_grey_values():
    model = models.VAE((1, 2, 2), levels=5, hidden=4, likelihood="bernoulli")
    grey = torch.arange(4).reshape(1, 1, 2, 2).expand(4000, -1, -1, -1)
    seen, target, _ = model._observed(grey, torch.Generator().manual_seed(0))
    assert torch.equal(seen, 4 * target.long())
    torch.testing.assert_close(target.mean(0).flatten(), torch.arange(4) / 4, atol=0.03, rtol=0)


def test_the_mean_of_colours_follows_those_before():
    model = models.VAE((3, 2, 2), levels=256, hidden=4, latent_dim=2, mixtures=1)
    z = torch.randn(3, 2)
    with torch.no_grad():
        parameters, found = model.decoder(z), model.decode(z)
    red = parameters[:, 1].clamp(-1, 1)
    green = (parameters[:, 4] + parameters[:, 3].tanh() * red).clamp(-1, 1)
    torch.testing.assert_close(found[:, 0], red)
    torch.testing.assert_close(found[:, 1], green)


@pytest.mark.parametrize(
    ("corruption", "amount", "values"), [("masking", 0.3, {-1.0, 0.25}), ("salt_and_pepper", 0.3, {-1.0, 1.0, 0.25})]
)
def test_corruption_hits_the_share_it_is_told(corruption, amount, values):
    model = models.DenoisingAutoencoder((1, 8, 8), levels=17, hidden=4, corruption=corruption, amount=amount)
    clean = torch.full((500, 1, 8, 8), 0.25)
    found = model.corrupt(clean, torch.Generator().manual_seed(0))
    assert set(found.unique().tolist()) == values
    assert float((found != clean).float().mean()) == pytest.approx(0.3, abs=0.01)
    assert torch.equal(found, model.corrupt(clean, torch.Generator().manual_seed(0)))


def test_codes_are_sampled_from_a_gaussian_of_their_mean_and_covariance():
    model, images = built("autoencoder")
    model.fit(images)
    codes = model.encode(images)
    drawn = model.latent(50_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), codes.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.T.cov(), codes.T.cov(correction=0), atol=0.02, rtol=0)
    unseen = models.VAE((1, 8, 8), levels=17, hidden=4)
    assert not unseen.state_dict().keys() & {"code_mean", "code_factor"}


def test_the_critic_of_a_vaegan_measures_likeness():
    model, images = built("vaegan")
    again = model.losses(model.phases[0], images, generator=torch.Generator().manual_seed(0), step=0)
    features, logits = model.critic(model.scaled(images))
    assert features.shape == (6, 16)
    assert logits.shape == (6,)
    torch.testing.assert_close(features.square().mean(1), torch.ones(6), atol=1e-2, rtol=0)
    parts = {k: float(v.detach()) for k, v in again.figures.items()}
    assert float(again.players["encoder"].detach()) == pytest.approx(parts["kl"] + parts["likeness"], rel=1e-5)
    assert float(again.players["decoder"].detach()) == pytest.approx(
        0.1 * parts["likeness"] + parts["decoder"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: models.VAE((8, 8)), ValueError, r"VAE: shape=\(8, 8\), expected \(C, H, W\)"),
        (lambda: models.VAE((1, 8, 8), latent_dim=0), ValueError, "latent_dim=0"),
        (lambda: models.VAE((1, 8, 8), levels=1), ValueError, "levels=1"),
        (
            lambda: models.VAE((1, 8, 8), likelihood="poisson"),
            ValueError,
            "likelihood='poisson', expected one of 'bernoulli'",
        ),
        (lambda: models.VAE((2, 8, 8)), ValueError, "2 channels, expected at least 1 and 1 or 3 channels"),
        (lambda: models.VAE((1, 8, 8), beta=-1.0), ValueError, "beta=-1.0"),
        (lambda: models.VAE((1, 8, 8), network="graph"), ValueError, "network='graph', expected 'perceptron'"),
        (lambda: models.Autoencoder((1, 9, 9), network="convolutional"), ValueError, r"expected a side of 4 \(base\)"),
        (lambda: models.SparseAutoencoder((1, 8, 8), penalty="l0"), ValueError, "penalty='l0'"),
        (lambda: models.SparseAutoencoder((1, 8, 8), rho=1.0), ValueError, "rho=1.0"),
        (lambda: models.DenoisingAutoencoder((1, 8, 8), corruption="blur"), ValueError, "corruption='blur'"),
        (lambda: models.DenoisingAutoencoder((1, 8, 8), amount=1.5), ValueError, "amount=1.5"),
        (lambda: models.WAE((1, 8, 8), weight=-1.0), ValueError, "weight=-1.0"),
        (lambda: models.AdversarialAutoencoder((1, 8, 8), loss="relativistic"), ValueError, "loss='relativistic'"),
        (lambda: models.VAEGAN((1, 8, 8), gamma=-1.0), ValueError, "gamma=-1.0"),
        (
            lambda: models.Autoencoder((1, 8, 8)).encode(torch.rand(1, 1, 8, 8)),
            TypeError,
            "images have dtype torch.float32",
        ),
        (
            lambda: models.Autoencoder((1, 8, 8)).encode(torch.zeros(1, 1, 8, 9).long()),
            ValueError,
            r"shape \(1, 1, 8, 9\)",
        ),
        (lambda: models.Autoencoder((1, 8, 8)).sample(-1), ValueError, "n=-1"),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_every_name_is_exported():
    for name in NAMES:
        assert models.NAMES[name].__name__ in genfast.models.__all__


@pytest.mark.parametrize("name", NAMES)
def test_samples_that_are_not_numbers_are_refused(name):
    model = models.NAMES[name](shape=(1, 4, 4), levels=5, hidden=4)
    with torch.no_grad():
        list(model.decoder.parameters())[-1].fill_(math.nan)
    with pytest.raises(FloatingPointError, match=rf"{type(model).__name__}: .* not numbers \(NaN\), first in image 0"):
        model.reconstruct(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    assert model.levels_of(torch.tensor([math.inf, -math.inf])).tolist() == [4, 0]
