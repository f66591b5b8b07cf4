"""The adversarial trainer: what a step does, exact resumption, lazy penalties, averages, errors, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from genfast import checkpoints, data, losses, metrics, models, ops, training
from genfast.models import Recipe
from genfast.training import Trainer, pictures


@pytest.fixture(scope="module")
def points():
    return data.points("8gaussians", count=2000)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def state(trainer):
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b))


def same_weights(*folders):
    one, other = (load_file(folder / "weights.safetensors") for folder in folders)
    return one.keys() == other.keys() and equal(one.values(), [other[k] for k in one])


def live(folder):
    state = {"model": training.load_checkpoint(folder)[0].state_dict()}
    checkpoints.restore(folder, state)
    return state["model"].values()


def tiny(name, shape=(2,), **config):
    torch.manual_seed(0)
    sizes = {
        "cgan": {"hidden": 8, "classes": 10},
        "sagan": {"width": 4, "base": 2},
        "r3gan": {"width": 8, "base": 2},
        "dcgan": {"width": 4, "base": 2},
    }
    return models.build(name, shape=shape, **(sizes.get(name, {"hidden": 8}) | config))


@pytest.mark.parametrize("name", ["gan", "lsgan", "wgan", "wgan-gp", "cgan", "dcgan", "sagan", "r3gan"])
def test_every_model_trains_by_its_own_recipe_and_repeats_from_a_seed(name, points, digits):
    found = []
    for _ in range(2):
        on_images = name in ("cgan", "dcgan", "sagan", "r3gan")
        source = digits if on_images else points
        trainer = Trainer(tiny(name, source.shape), source, batch_size=16, seed=3)
        before = state(trainer)
        steps = [trainer.step() for _ in range(2)]
        moved = [not torch.equal(a, b) for a, b in zip(before, state(trainer))]
        assert sum(moved) > len(moved) / 2
        assert (steps[0]["penalty"] > 0) == bool(trainer.recipe.penalties)
        found.append((steps, state(trainer)))
    assert found[0][0] == found[1][0]
    assert equal(found[0][1], found[1][1])
    if name == "wgan":
        critic = trainer.model.critic.parameters()
        assert max(float(p.detach().abs().max()) for p in critic) <= 0.01


@pytest.mark.parametrize("loss", list(losses.CRITIC_LOSSES))
def test_the_loss_is_a_parameter(loss, points):
    trainer = Trainer(tiny("gan"), points, recipe=Recipe(loss=loss, penalty="r1", weight=1.0), batch_size=8)
    step = trainer.step()
    assert step["penalty"] > 0
    assert trainer.history == [step]


def test_a_critic_update_descends_the_loss_with_all_its_penalties(points):
    """One update by plain SGD, against the gradient written out."""
    recipe = Recipe(loss="relativistic", penalty=("r1", "r2"), weight=0.3)
    trainer = Trainer(tiny("gan"), points, recipe=recipe, batch_size=8)
    critic = copy.deepcopy(trainer.model.critic)
    trainer.optimizers["critic"] = torch.optim.SGD(trainer.model.critic.parameters(), lr=1.0)
    random = torch.Generator()
    random.set_state(trainer.generator.get_state())
    real = points.train[torch.randint(len(points.train), (8,), generator=random)]
    fake = trainer.model.generator(torch.randn(8, trainer.model.latent_dim, generator=random)).detach()
    figures = trainer.update(("critic",))
    total = 0
    for x in (real, fake):
        x.requires_grad_()
        (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
        total = total + 0.15 * g.square().sum(1).mean()
    loss = torch.nn.functional.softplus(critic(fake) - critic(real)).mean() + total
    torch.testing.assert_close(
        torch.tensor([figures["critic"], figures["penalty"]]), torch.stack([loss, total]).detach()
    )
    for p, q, g in zip(
        trainer.model.critic.parameters(),
        critic.parameters(),
        torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True),
    ):
        torch.testing.assert_close(p, q - (0 if g is None else g), rtol=1e-4, atol=1e-5)


def test_the_generator_update_leaves_the_critic_alone(points):
    trainer = Trainer(tiny("gan"), points, batch_size=8)
    next(iter(trainer.model.critic.parameters())).requires_grad_(False)  # frozen by the user
    trainer = Trainer(trainer.model, points, batch_size=8)
    critic = [p.detach().clone() for p in trainer.model.critic.parameters()]
    generator = [p.detach().clone() for p in trainer.model.generator.parameters()]
    trainer.update(("generator",))
    assert equal(critic, trainer.model.critic.parameters())
    assert not equal(generator, trainer.model.generator.parameters())
    assert [p.requires_grad for p in trainer.model.critic.parameters()] == [False] + [True] * (len(critic) - 1)


def test_lazy_penalties_have_updates_of_their_own(points, monkeypatch):
    recipe = Recipe(loss="nonsaturating", penalty="r1", weight=2.0, lazy=3, critic_lr=1e-3, betas=(0.5, 0.9))
    trainer = Trainer(tiny("gan"), points, recipe=recipe, batch_size=8)
    group = trainer.optimizers["critic"].param_groups[0]
    assert group["lr"] == pytest.approx(1e-3 * 3 / 4)
    assert group["betas"] == pytest.approx((0.5**0.75, 0.9**0.75))
    assert trainer.optimizers["generator"].param_groups[0]["betas"] == (0.5, 0.9)
    descended = []
    differentiate = trainer._differentiate

    def watched(side, loss, what, last):
        descended.append((side, what, float(loss.detach())))
        return differentiate(side, loss, what, last)

    monkeypatch.setattr(trainer, "_differentiate", watched)
    penalties = [trainer.step()["penalty"] for _ in range(6)]
    assert [i for i, p in enumerate(penalties) if p] == [2, 5]
    kinds = [(side, what) for side, what, _ in descended]
    assert kinds.count(("critic", "penalty")) == 2
    assert kinds.count(("critic", "loss")) == 6
    taken = [value for _, what, value in descended if what == "penalty"]
    assert taken == pytest.approx([3 * penalties[2], 3 * penalties[5]])  # three times as strong


def test_the_average_follows_the_generator(points):
    recipe = Recipe(ema=0.9)
    trainer = Trainer(tiny("gan"), points, recipe=recipe, batch_size=8)
    expected = [p.detach().clone() for p in trainer.model.generator.parameters()]
    for t in range(30):
        trainer.step()
        decay = min(0.9, (1 + t) / (10 + t))
        expected = [
            decay * e + (1 - decay) * p.detach() for e, p in zip(expected, trainer.model.generator.parameters())
        ]
    for a, e in zip(trainer.average.parameters(), expected):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)
    live = trainer.model.generator
    drawn = trainer.sample(4)
    assert trainer.model.generator is live
    z = torch.randn(4, trainer.model.latent_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, trainer.average(z))
    none = Trainer(tiny("gan"), points, recipe=Recipe(ema=0.0), batch_size=8)
    none.step()
    assert equal(none.average.parameters(), none.model.generator.parameters())


def test_buffers_are_copied_into_the_average(digits):
    trainer = Trainer(tiny("dcgan", digits.shape), digits, batch_size=8)
    trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(trainer.average.buffers(), trainer.model.generator.buffers()))


def test_a_run_leaves_everything_it_should(tmp_path, digits):
    run = tmp_path / "run"
    written = training.train(
        "cgan", digits, run, config={"hidden": 16}, steps=12, save_every=5, sample_every=6, batch_size=16
    )
    assert written == json.loads((run / "metrics.json").read_text())
    assert written["steps"] == 12
    assert written["recipe"]["loss"] == "nonsaturating"
    names = sorted(p.name for p in run.iterdir())
    assert names == ["checkpoint-10", "checkpoint-12", "log.csv", "loss.png", "metrics.json", "progress", "samples.png"]
    assert sorted(p.name for p in (run / "progress").iterdir()) == ["step-0000006.png", "step-0000012.png"]
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (7 * 73, 7 * 73)
    model, metadata, _ = training.load_checkpoint(run)
    assert (metadata["model"], metadata["bins"], model.classes) == ("cgan", "17", 10)
    with Image.open(run / "progress" / "step-0000012.png") as picture:
        grid = training.image_grid(model.sample(64, generator=torch.Generator().manual_seed(0)) / 2, 17)
        assert picture.tobytes() == grid.tobytes()  # what the checkpoint holds is the averaged generator


def test_points_are_drawn_over_the_data_and_scored(tmp_path, points):
    run = tmp_path / "run"
    written = training.train("wgan-gp", points, run, config={"hidden": 16}, steps=3, batch_size=32)
    assert written["modes"] == 8
    assert 0 <= written["covered"] <= 8
    assert 0 <= written["within_3"] <= written["within_4"] <= 1
    with Image.open(run / "samples.png") as picture:
        assert min(picture.size) > 400
    with pytest.raises(ValueError, match=r"samples have shape \(4, 3\)"):
        pictures.draw_points(torch.zeros(4, 3), tmp_path / "x.png")


@pytest.mark.parametrize(
    ("name", "recipe"), [("wgan-gp", {}), ("gan", {"penalty": "r1", "lazy": 4, "ema": 0.5}), ("wgan", {})]
)
def test_resuming_repeats_the_run_bit_by_bit(tmp_path, points, name, recipe):
    options = {"config": {"hidden": 8}, "recipe": recipe, "batch_size": 16, "sample_every": 0}
    training.train(name, points, tmp_path / "whole", steps=10, **options)
    training.train(name, points, tmp_path / "parts", steps=5, **options)
    training.train(name, points, tmp_path / "parts", steps=10, resume=True, batch_size=16)
    whole, parts = (training.latest(tmp_path / which) for which in ("whole", "parts"))
    assert same_weights(whole, parts)
    kept = [checkpoints.notes(path) for path in (whole, parts)]
    assert kept[0]["history"] == kept[1]["history"]
    assert kept[0]["recipe"] == kept[1]["recipe"]
    assert equal(live(whole), live(parts))
    with pytest.raises(FileExistsError, match="holds a run already"):
        training.train(name, points, tmp_path / "whole", steps=5)
    with pytest.raises(ValueError, match="not a dcgan|not a lsgan"):
        training.train("lsgan", points, tmp_path / "whole", steps=20, resume=True)
    with pytest.raises(ValueError, match="was trained with Recipe"):
        training.train(name, points, tmp_path / "whole", steps=20, resume=True, recipe={"critic_lr": 0.5})


def test_resuming_repeats_networks_with_buffers(tmp_path, digits):
    options = {"config": {"width": 4}, "batch_size": 8, "sample_every": 0}
    training.train("sagan", digits, tmp_path / "whole", steps=4, **options)
    training.train("sagan", digits, tmp_path / "parts", steps=2, **options)
    training.train("sagan", digits, tmp_path / "parts", steps=4, resume=True, **options)
    assert same_weights(*(training.latest(tmp_path / which) for which in ("whole", "parts")))


def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path, points, monkeypatch):
    run = tmp_path / "run"
    options = {"config": {"hidden": 8}, "batch_size": 16}
    training.train("gan", points, run, steps=3, **options)
    before = (run / "checkpoint-3" / "weights.safetensors").read_bytes()

    def crash(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        training.train("gan", points, run, steps=6, resume=True, **options)
    monkeypatch.undo()
    assert (run / "checkpoint-3" / "weights.safetensors").read_bytes() == before
    assert [p.name for p in run.glob("*checkpoint*")] == ["checkpoint-3"]
    assert not list(run.glob(".*"))


@pytest.mark.parametrize("where", ["critic", "generator", "gradient"])
def test_numbers_that_are_not_finite_stop_before_the_update(points, where, monkeypatch):
    trainer = Trainer(tiny("gan"), points, batch_size=8)
    trainer.step()
    if where == "critic":
        real = ops.critic_step
        monkeypatch.setattr(
            ops, "critic_step", lambda *a, **k: (s := real(*a, **k))._replace(loss=s.loss * float("nan"))
        )
        message = "the critic's loss is nan at step 2: lower the learning rate"
    elif where == "generator":
        real = losses.generator_loss
        monkeypatch.setattr(losses, "generator_loss", lambda *a: real(*a) * float("inf"))
        message = "the generator's loss is inf at step 2"
    else:  # the loss is finite and its gradient is not, as with a root at zero
        real = ops.critic_step
        monkeypatch.setattr(
            ops,
            "critic_step",
            lambda *a, **k: (s := real(*a, **k))._replace(loss=s.loss + (s.loss - s.loss.detach()).clamp(min=0).sqrt()),
        )
        message = "the critic's loss has a gradient of norm (nan|inf) at step 2"
    critic = [p.detach().clone() for p in trainer.model.critic.parameters()]
    generator = [p.detach().clone() for p in trainer.model.generator.parameters()]
    with pytest.raises(training.TrainingError, match=message):
        trainer.step()
    assert equal(generator, trainer.model.generator.parameters())
    if where != "generator":
        assert equal(critic, trainer.model.critic.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, d: Trainer(tiny("gan", (3,)), p), r"the model makes \(3,\) and the data are \(2,\)"),
        (lambda p, d: Trainer(tiny("gan"), p, batch_size=0), "batch_size=0"),
        (lambda p, d: Trainer(tiny("cgan", d.shape, classes=3), d), "classes=3, and a label is 9"),
        (lambda p, d: Trainer(tiny("cgan", (2,)), dataclasses.replace(p, train_labels=None)), "has no labels"),
        (lambda p, d: Trainer(tiny("gan"), p, parallel="fsdp"), "parallel='fsdp'"),
        (lambda p, d: training.train("nothing", d, "nowhere"), "name='nothing', expected one of"),
        (lambda p, d: training.train("nice", p, "nowhere"), "8gaussians are points"),
    ],
)
def test_what_does_not_fit_is_named(points, digits, make, message):
    with pytest.raises(ValueError, match=message):
        make(points, digits)
    assert not os.path.exists("nowhere")


@pytest.mark.slow
def test_wgan_gp_finds_the_eight_gaussians():
    """Measured after 750 steps of seeds 0, 1, 2: all modes, and 51%, 55%, 52% of samples within four standard
    deviations."""
    points = data.points("8gaussians")
    torch.manual_seed(0)
    model = models.WGANGP((2,), hidden=64)
    recipe = dataclasses.replace(model.recipe, generator_lr=1e-3, critic_lr=1e-3, ema=0.99)
    trainer = Trainer(model, points, recipe=recipe, batch_size=128)
    for _ in range(750):
        trainer.step()
    scores = metrics.mode_scores(trainer.sample(10_000), points.centres, points.std, minimum=100)
    assert scores.covered == 8
    assert scores.within_4 > 0.4


@pytest.mark.slow
def test_a_conditional_gan_draws_the_digit_that_was_asked_for(digits):
    """By the five nearest real digits, which are right for 99% of real ones. Measured after 1800 steps of seeds 0 and
    1: 96% and 99% of the drawn digits, which vary 0.71 and 0.65 times as much as real ones of their class."""
    torch.manual_seed(0)
    model = models.ConditionalGAN(digits.shape, classes=10)
    recipe = dataclasses.replace(model.recipe, generator_lr=1e-3, critic_lr=1e-3, ema=0.99)
    trainer = Trainer(model, digits, recipe=recipe)
    for _ in range(1800):
        trainer.step()
    real, labels = 2 * (digits.train.flatten(1) + 0.5) / digits.bins - 1, digits.train_labels
    drawn = trainer.sample(1000).flatten(1)
    found = labels[torch.cdist(drawn, real).topk(5, largest=False).indices].mode(1).values
    assert float((found == torch.arange(1000) % 10).float().mean()) > 0.9
    spread = [
        torch.stack([x[y == c].std(0).mean() for c in range(10)]).mean()
        for x, y in ((drawn, torch.arange(1000) % 10), (real, labels))
    ]
    assert float(spread[0] / spread[1]) > 0.5
