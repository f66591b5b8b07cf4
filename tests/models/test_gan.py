"""The adversarial models: shapes of the papers, configs, conditioning, samples, and the parts that papers are exact
about."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import genfast
from genfast import models, ops
from genfast.models import sagan, wgan_gp

CASES = {
    "gan points": ("gan", {"shape": (2,), "hidden": 16}),
    "gan images": ("gan", {"shape": (1, 8, 8), "hidden": 16, "depth": 1}),
    "dcgan": ("dcgan", {"shape": (3, 32, 32), "width": 8}),
    "dcgan digits, 5 x 5": ("dcgan", {"shape": (1, 8, 8), "width": 8, "base": 2, "kernel_size": 5}),
    "lsgan points": ("lsgan", {"shape": (2,), "hidden": 16}),
    "lsgan images": ("lsgan", {"shape": (1, 8, 8), "width": 8}),
    "wgan points": ("wgan", {"shape": (2,), "hidden": 16}),
    "wgan images": ("wgan", {"shape": (1, 16, 16), "width": 4}),
    "wgan-gp points": ("wgan-gp", {"shape": (2,), "hidden": 16}),
    "wgan-gp images": ("wgan-gp", {"shape": (3, 32, 32), "width": 8}),
    "wgan-gp digits, layer norm": ("wgan-gp", {"shape": (1, 8, 8), "width": 8, "critic_norm": "layer"}),
    "cgan": ("cgan", {"shape": (1, 8, 8), "classes": 10, "hidden": 16}),
    "cgan projection, points": ("cgan", {"shape": (2,), "classes": 3, "hidden": 16, "conditioning": "projection"}),
    "sagan": ("sagan", {"shape": (3, 16, 16), "width": 4}),
    "sagan classes": ("sagan", {"shape": (1, 8, 8), "width": 4, "base": 2, "classes": 10}),
    "r3gan": ("r3gan", {"shape": (3, 16, 16), "width": 16}),
    "r3gan digits": ("r3gan", {"shape": (1, 8, 8), "width": 8, "blocks": 2, "base": 2}),
}
each_case = pytest.mark.parametrize("case", CASES)


def built(case):
    name, config = CASES[case]
    torch.manual_seed(0)
    model = models.build(name, **config)
    labels = None if model.classes is None else torch.arange(6) % model.classes
    return model, torch.rand(6, *model.shape) * 2 - 1, () if labels is None else (labels,)


@each_case
def test_generator_and_critic_fit_each_other(case):
    model, x, context = built(case)
    drawn = model.generator(model.latent(6), *context)
    assert drawn.shape == x.shape
    assert model.critic(x, *context).shape == (6,)
    model.critic(drawn, *context).sum().backward()
    still = [k for k, p in model.named_parameters() if p.grad is None]
    assert still == []
    if len(model.shape) == 3 and "r3gan" not in case:  # which has no tanh
        assert float(drawn.detach().abs().max()) <= 1


@each_case
def test_config_rebuilds_the_model(case):
    model, x, context = built(case)
    twin = models.build(CASES[case][0], **model.config)
    twin.load_state_dict(model.state_dict())
    assert twin.config == model.config
    assert twin.recipe == model.recipe
    assert torch.equal(twin.eval().critic(x, *context), model.eval().critic(x, *context))
    z = model.latent(6)
    assert torch.equal(twin.generator(z, *context), model.generator(z, *context))


@each_case
def test_samples_repeat_from_a_seed_and_leave_the_mode(case):
    model, *_ = built(case)
    model.train()
    first = model.sample(5, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, model.sample(5, generator=torch.Generator().manual_seed(1)))
    assert not first.requires_grad
    assert model.generator.training
    assert model.sample(0).shape == (0, *model.shape)


@each_case
def test_the_critic_takes_its_own_recipe_and_every_sample_for_itself(case):
    model, x, context = built(case)
    model.critic.eval()  # batch norm is what couples samples
    whole = model.critic(x, *context)
    parts = torch.cat([model.critic(x[i : i + 1], *(c[i : i + 1] for c in context)) for i in range(6)])
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    model.train()
    recipe = model.recipe
    for kind in recipe.penalties or (None,):
        step = ops.critic_step(
            model.critic,
            x,
            x.flip(0),
            loss=recipe.loss,
            penalty=kind,
            weight=recipe.weight,
            context=context or None,
            generator=torch.Generator().manual_seed(0),
        )
        assert bool(torch.isfinite(step.loss))


def test_dcgan_has_the_papers_shapes_and_loads_the_well_known_example():
    model = models.DCGAN()
    shapes, x = [], torch.zeros(2, 100)
    for module in (model.generator.unflatten, *model.generator.main):
        x = module(x)
        if isinstance(module, nn.ConvTranspose2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(1024, 4, 4), (512, 8, 8), (256, 16, 16), (128, 32, 32), (3, 64, 64)]
    shapes = []
    for module in model.critic.main:
        x = module(x)
        if isinstance(module, nn.Conv2d):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(128, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (1, 1, 1)]
    f = 8  # the generator of pytorch/examples, dcgan/main.py, with its names
    example = nn.Module()
    example.main = nn.Sequential(
        nn.ConvTranspose2d(100, f * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(f * 8),
        nn.ReLU(True),
        nn.ConvTranspose2d(f * 8, f * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(f * 4),
        nn.ReLU(True),
        nn.ConvTranspose2d(f * 4, f * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(f * 2),
        nn.ReLU(True),
        nn.ConvTranspose2d(f * 2, f, 4, 2, 1, bias=False),
        nn.BatchNorm2d(f),
        nn.ReLU(True),
        nn.ConvTranspose2d(f, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    ours = models.DCGAN(width=f)
    ours.generator.load_state_dict(example.state_dict())
    z = torch.randn(2, 100)
    assert torch.equal(ours.generator(z), example.main(z[:, :, None, None]))
    small = [m for m in ours.critic.main if isinstance(m, nn.BatchNorm2d)]
    assert len(small) == 3  # none on the critic's input layer


def test_wgan_gp_points_are_gan_toy():
    model = models.WGANGP((2,))
    for network, out in ((model.generator, 2), (model.critic, 1)):
        sizes = [tuple(m.weight.shape) for m in network if isinstance(m, nn.Linear)]
        assert sizes == [(512, 2), (512, 512), (512, 512), (out, 512)]
        kinds = [type(m) for m in network if not isinstance(m, (nn.Linear, nn.Flatten))]
        assert kinds == [nn.ReLU] * 3
    recipe = model.recipe
    assert (recipe.weight, recipe.critic_steps, recipe.critic_lr, recipe.betas) == (0.1, 5, 1e-4, (0.5, 0.9))
    recipe = models.WGANGP((1, 8, 8), width=4).recipe
    assert (recipe.weight, recipe.critic_steps, recipe.critic_lr, recipe.betas) == (10.0, 5, 2e-4, (0.0, 0.9))
    assert (recipe.loss, recipe.penalties) == ("wasserstein", ("wgan-gp",))


def test_the_residual_critic_has_no_batch_norm_and_its_generator_has():
    model = models.WGANGP((3, 32, 32), width=8)
    assert not any(isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)) for m in model.critic.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.generator.modules())
    normed = models.WGANGP((3, 32, 32), width=8, critic_norm="layer")
    assert sum(isinstance(m, nn.GroupNorm) for m in normed.critic.modules()) == 7
    sides = []
    x = torch.zeros(1, 3, 32, 32)
    for module in model.critic:
        x = module(x)
        if isinstance(module, wgan_gp.ResidualBlock):
            sides.append(x.shape[2])
    assert sides == [16, 8, 8, 8]


def test_attention_starts_as_the_identity_and_is_the_released_one():
    layer = sagan.SelfAttention2d(16)
    x = torch.randn(2, 16, 6, 4)
    assert torch.equal(layer(x), x)
    with torch.no_grad():
        layer.gamma.fill_(0.7)
    layer.eval()
    assert [tuple(m.weight.shape[:2]) for m in (layer.theta, layer.phi, layer.g, layer.o)] == [
        (2, 16),
        (2, 16),
        (8, 16),
        (16, 8),
    ]
    expected = x.clone()  # written out, position by position
    theta, phi, g = layer.theta(x), F.max_pool2d(layer.phi(x), 2), F.max_pool2d(layer.g(x), 2)
    for n in range(2):
        for i in range(6):
            for j in range(4):
                scores = torch.stack([theta[n, :, i, j] @ phi[n, :, a, b] for a in range(3) for b in range(2)])
                values = torch.stack([g[n, :, a, b] for a in range(3) for b in range(2)])
                seen = torch.softmax(scores, 0) @ values
                expected[n, :, i, j] += 0.7 * (layer.o.weight[:, :, 0, 0] @ seen)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    model = models.SAGAN((3, 16, 16), width=4)
    assert (model.recipe.loss, model.recipe.generator_lr, model.recipe.critic_lr) == ("hinge", 1e-4, 4e-4)


def test_every_layer_of_sagan_has_spectral_norm():
    model = models.SAGAN((3, 16, 16), width=4, classes=3)
    for name, module in model.named_modules():
        weighted = isinstance(module, (nn.Linear, nn.Conv2d)) or (name == "critic.embedding")
        assert nn.utils.parametrize.is_parametrized(module, "weight") == weighted, name
    for _ in range(30):  # the power iteration settles
        model.critic(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]))
    weight = model.critic.eval().logit.weight
    assert float(torch.linalg.matrix_norm(weight.detach(), 2)) == pytest.approx(1, abs=1e-3)


def test_sagan_labels_change_the_outcome_of_both():
    model = models.SAGAN((1, 8, 8), width=4, base=2, classes=2)
    with torch.no_grad():
        for block in model.generator.blocks:
            block.norm1.affine.weight.normal_()
    z = model.latent(1).expand(2, -1)
    model.eval()
    a, b = model.generator(z, torch.tensor([0, 1]))
    assert not torch.allclose(a, b)
    assert model.critic(a.expand(2, 1, 8, 8), torch.tensor([0, 1])).unique().numel() == 2


def test_r3gan_halving_is_the_bilinear_filter():
    x = torch.randn(2, 3, 8, 8)
    one = torch.tensor([1.0, 3, 3, 1]) / 8
    kernel = (one[:, None] * one).expand(3, 1, 4, 4)
    halve = models.r3gan.Halve()
    torch.testing.assert_close(halve(x), F.conv2d(x, kernel, stride=2, padding=1, groups=3))
    model = models.R3GAN((3, 16, 16), width=16)
    allowed = (nn.Conv2d, nn.Linear, nn.LeakyReLU, nn.AvgPool2d, nn.Flatten, nn.Sequential, models.r3gan.GroupedBlock)
    assert all(isinstance(m, allowed) for m in model.critic.modules())  # piecewise linear
    assert model.recipe.penalties == ("r1r2",)
    grouped = [m for m in model.critic.modules() if isinstance(m, nn.Conv2d) and 1 < m.groups < m.in_channels]
    assert [m.groups for m in grouped] == [2, 2, 2]
    for block in model.critic.modules():  # residual branches start at zero
        if isinstance(block, models.r3gan.GroupedBlock):
            assert torch.equal(block(torch.ones(1, 16, 4, 4)), torch.ones(1, 16, 4, 4))


def test_conditional_samples_take_labels():
    model = models.ConditionalGAN((1, 8, 8), classes=3, hidden=8)
    seed = torch.Generator().manual_seed(0)
    in_turn = model.sample(4, generator=seed)
    again = model.sample(4, generator=seed.manual_seed(0), context=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(in_turn, again)
    for context, message in (
        (torch.tensor([0, 1]), r"context has shape \(2,\)"),
        (torch.zeros(4), "expected int64"),
        (torch.tensor([0, 1, 2, 3]), r"outside \[0, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(4, context=context)
    with pytest.raises(ValueError, match="has no classes"):
        models.GAN((2,)).sample(4, context=torch.zeros(4).long())


def test_projection_is_the_inner_product():
    model = models.ConditionalGAN((2,), classes=3, hidden=8, conditioning="projection")
    x, labels = torch.randn(4, 2), torch.tensor([0, 1, 2, 1])
    features = model.critic.main(x)
    by_hand = model.critic.logit(features)[:, 0] + torch.einsum(
        "nd,nd->n", model.critic.embedding.weight[labels], features
    )
    torch.testing.assert_close(model.critic(x, labels), by_hand)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.DCGAN((3, 30, 30)), r"shape=\(3, 30, 30\), expected a side of 4 \(base\) times 2, 4, 8"),
        (lambda: models.DCGAN((3, 32, 16)), "expected square images"),
        (lambda: models.DCGAN((2,)), "expected square images"),
        (lambda: models.DCGAN((3, 4, 4)), "expected a side of 4"),
        (lambda: models.DCGAN((3, 32, 32), kernel_size=3), "kernel_size=3, expected 4"),
        (lambda: models.GAN((2, 2)), r"shape=\(2, 2\), expected \(D,\) for points"),
        (lambda: models.GAN((2,), latent_dim=0), "latent_dim=0"),
        (lambda: models.WGANGP((2,), critic_norm="batch"), "critic_norm='batch'"),
        (lambda: models.ConditionalGAN((2,), classes=0), "classes=0"),
        (lambda: models.ConditionalGAN((2,), classes=2, conditioning="film"), "conditioning='film'"),
        (lambda: models.SAGAN((1, 2, 2), base=1), "expected a side of at least 4"),
        (lambda: models.R3GAN((1, 8, 8), width=9), "width \\* expansion = 18 is not a multiple of group_size=16"),
        (lambda: models.R3GAN((1, 8, 8), blocks=0), "blocks=0"),
        (lambda: models.Recipe(loss="wgan"), "loss='wgan', expected one of"),
        (lambda: models.Recipe(optimizer="sgd"), "optimizer='sgd'"),
        (lambda: models.Recipe(critic_steps=0), "critic_steps=0"),
        (lambda: models.Recipe(critic_lr=0.0), "critic_lr=0.0"),
        (lambda: models.Recipe(ema=1.0), "ema=1.0"),
        (lambda: models.GAN((2,)).sample(-1), "n=-1"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_recipes_are_values():
    recipe = models.WGAN((2,), hidden=4).recipe
    assert (recipe.loss, recipe.clip, recipe.optimizer, recipe.critic_steps) == ("wasserstein", 0.01, "rmsprop", 5)
    assert dataclasses.replace(recipe, clip=None).penalties == ()
    assert genfast.models.LSGAN((2,), hidden=4).recipe.loss == "lsgan"
