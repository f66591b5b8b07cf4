"""Adversarial training on two ranks: the steps of one process, errors on all, and runs that go on with another
number."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from genfast import checkpoints, data, distributed, models, ops, training
from genfast.models import Recipe
from genfast.training import Trainer

BATCH = 7  # uneven parts
RECIPES = {
    "lazy": Recipe(loss="hinge", penalty=("r1", "wgan-gp"), weight=0.3, lazy=2, critic_steps=2, ema=0.9),
    "clipped": Recipe(loss="wasserstein", clip=0.05, critic_steps=2, optimizer="rmsprop", critic_lr=1e-3),
    "dragan": Recipe(loss="relativistic", penalty=("dragan", "ar1", "r2"), weight=0.5, betas=(0.0, 0.9)),
    "double backward": Recipe(loss="lsgan", penalty="wgan-lp", target=0.1),
}


def steps(label, count=3):
    """(losses, weights, average, samples) after some steps in float64."""
    torch.manual_seed(0)
    points = data.points("8gaussians", count=50)
    source = dataclasses.replace(points, train=points.train.double())
    model = models.GAN((2,), hidden=8).double()
    model.method = "autograd" if label == "double backward" else "auto"
    trainer = Trainer(model, source, recipe=RECIPES[label], batch_size=BATCH, seed=5)
    losses = [tuple(trainer.step().values()) for _ in range(count)]
    return losses, [p.detach() for p in model.parameters()], list(trainer.average.parameters()), trainer.sample(5)


def labelled():
    """A model with labels, of images."""
    torch.manual_seed(0)
    digits = data.load("digits")
    model = models.build("cgan", shape=digits.shape, hidden=8, classes=10)
    trainer = Trainer(model, digits, batch_size=BATCH, seed=5)
    losses = [tuple(trainer.step().values()) for _ in range(2)]
    return losses, [p.detach() for p in model.parameters()], list(trainer.average.parameters()), trainer.sample(3)


def _all():
    return {label: steps(label) for label in RECIPES} | {"labels": labelled()}


def test_two_ranks_take_the_steps_of_one(ranks):
    expected = _all()
    for found in ranks.run(_all):
        for label, (losses, *tensors) in expected.items():
            exact = {"rtol": 1e-4, "atol": 1e-6} if label == "labels" else {"rtol": 1e-9, "atol": 1e-11}
            torch.testing.assert_close(torch.tensor(found[label][0]), torch.tensor(losses), **exact, msg=label)
            for ours, theirs in zip(found[label][1:], tensors):
                for a, b in zip(ours, theirs):
                    torch.testing.assert_close(a, b, **exact)


def _with_batch_norm():
    """Networks with statistics of a batch: what every rank must agree on all the same."""
    digits = data.load("digits")
    torch.manual_seed(distributed.rank())
    model = models.SAGAN(digits.shape, width=4, base=2)
    trainer = Trainer(model, digits, batch_size=8, seed=5)
    losses = [tuple(trainer.step().values()) for _ in range(2)]
    drawn = trainer.sample(3)
    state = trainer.state()
    return losses, drawn, list(state["model"].values()) + list(state["average"].values())


def _broken():
    """A penalty that is not finite on rank 1 alone, then a gradient that is not."""
    said = []
    points = data.points("8gaussians", count=50)
    for where in ("penalty", "gradient"):
        torch.manual_seed(0)
        trainer = Trainer(models.WGANGP((2,), hidden=8), points, batch_size=8)
        trainer.step()
        before = [p.detach().clone() for p in trainer.model.parameters()]
        real = ops.critic_step

        def step(*args, where=where, real=real, **options):
            if where == "penalty" and distributed.rank() == 1:
                options["weight"] = float("nan")  # the op raises, on this rank alone
            found = real(*args, **options)
            if where == "gradient" and distributed.rank() == 1:
                found = found._replace(loss=found.loss + (found.loss - found.loss.detach()).clamp(min=0).sqrt())
            return found

        ops.critic_step = step
        try:
            trainer.step()
        except training.TrainingError as error:
            same = all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))
            said.append((str(error), same))
        finally:
            ops.critic_step = real
    return said


def test_ranks_agree_and_stop_together(ranks):
    a, b = ranks.run(_with_batch_norm)
    assert a[0] == b[0]
    assert torch.equal(a[1], b[1])
    assert all(torch.equal(x, y) for x, y in zip(a[2], b[2]))
    for said in ranks.run(_broken):
        assert "the critic's loss is nan at step 2" in said[0][0]
        assert "the critic's loss has a gradient of norm nan at step 2" in said[1][0]
        assert [same for _, same in said] == [True, True]


def train(out, steps, resume=False):
    points = data.points("25gaussians", count=100)
    recipe = None if resume else {"penalty": "r1", "weight": 0.5, "lazy": 2, "ema": 0.5}
    return training.train(
        "gan",
        points,
        out,
        config={"hidden": 8},
        recipe=recipe,
        steps=steps,
        batch_size=BATCH,
        resume=resume,
        sample_every=2,
    )


def test_a_run_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    whole = train(tmp_path / "one", 5)
    for first, then in ((1, 2), (2, 1), (2, 2)):
        run = tmp_path / f"{first}{then}"
        written = train(run, 3) if first == 1 else ranks.run(train, run, 3)[0]
        written = train(run, 5, True) if then == 1 else ranks.run(train, run, 5, True)[0]
        assert json.loads((run / "metrics.json").read_text()) == written
        assert written["steps"] == 5
        names = sorted(p.name for p in run.iterdir())
        assert names == [
            "checkpoint-3",
            "checkpoint-5",
            "log.csv",
            "loss.png",
            "metrics.json",
            "progress",
            "samples.png",
        ]
        histories = [checkpoints.notes(folder / "checkpoint-5")["history"] for folder in (tmp_path / "one", run)]
        curves = [[list(h.values()) for h in history] for history in histories]
        torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=1e-4, atol=1e-5)
        weights = [training.load_checkpoint(folder)[0].state_dict() for folder in (tmp_path / "one", run)]
        for k in weights[0]:
            torch.testing.assert_close(weights[0][k], weights[1][k], rtol=1e-4, atol=1e-5)
        assert written["critic_loss"] == pytest.approx(whole["critic_loss"], rel=1e-4)


def _too_few():
    Trainer(models.GAN((2,), hidden=8), data.points("8gaussians", count=50), batch_size=1)


def test_a_batch_has_something_for_every_rank(ranks):
    from .ranks import JobError

    with pytest.raises(JobError, match="batch_size=1 on 2 ranks"):
        ranks.run(_too_few)
