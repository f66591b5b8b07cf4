"""Autoencoders on two ranks: the steps and the held-out figures of one process, and runs that go on with another
number."""

from __future__ import annotations

import json

import pytest
import torch

from genfast import checkpoints, data, distributed, models, training
from genfast.models.base_autoencoder import Losses
from genfast.training import Trainer

BATCH = 7  # uneven parts
MODELS = {
    "autoencoder": {},
    "sparse_autoencoder": {"penalty": "l1"},
    "denoising_autoencoder": {"corruption": "salt_and_pepper"},
    "vae": {"warmup": 2},
    "vaegan": {},
    "aae": {},
}
VAES = {f"vae {likelihood}": {"likelihood": likelihood} for likelihood in ("gaussian", "bernoulli")}


def steps(label, config, count=2):
    """(figures of some steps in float64, held-out figures, weights)."""
    digits = data.load("digits")
    torch.manual_seed(distributed.rank())  # the trainer makes them equal
    model = models.build(
        label.split()[0], shape=digits.shape, levels=digits.bins, hidden=8, latent_dim=3, **config
    ).double()
    trainer = Trainer(model, digits, batch_size=BATCH, seed=3)
    figures = [trainer.step() for _ in range(count)]
    return figures, trainer.evaluate(17 if label == "vae" else 3), [p.detach() for p in model.parameters()]


def _all():
    return {label: steps(label, config) for label, config in (MODELS | VAES).items()}


def test_two_ranks_take_the_steps_of_one(ranks):
    expected = _all()
    for found in ranks.run(_all):
        for label, (figures, held_out, weights) in expected.items():
            for ours, theirs in zip(found[label][0], figures):
                assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-10), label
            assert found[label][1] == pytest.approx(held_out, rel=1e-9, abs=1e-10), label
            for a, b in zip(found[label][2], weights):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def _coupled():
    """Losses that couple a batch, of a rank's portion: every rank has the same figures and weights all the same."""
    return [steps(name, {})[::2] for name in ("wae", "sparse_autoencoder")]


def _broken():
    """A loss that is not finite on rank 1 alone."""
    digits = data.load("digits")
    trainer = Trainer(models.build("vae", shape=digits.shape, levels=digits.bins, hidden=8), digits, batch_size=8)
    real = trainer.model.losses

    def losses(*args, **options):
        loss = real(*args, **options).players["autoencoder"]
        return Losses({"autoencoder": loss * (float("nan") if distributed.rank() else 1)}, {"loss": loss})

    trainer.model.losses = losses
    try:
        trainer.step()
    except training.TrainingError as error:
        return str(error)


def test_ranks_agree_and_stop_together(ranks):
    a, b = ranks.run(_coupled)
    for ours, theirs in zip(a, b):
        assert ours[0] == theirs[0]
        assert all(torch.equal(p, q) for p, q in zip(ours[1], theirs[1]))
    for said in ranks.run(_broken):
        assert "the autoencoder's loss is nan at step 1" in said


def train(out, count, resume=False):
    digits, config = data.load("digits"), {"hidden": 8, "latent_dim": 2}
    return training.train("aae", digits, out, config=config, steps=count, batch_size=BATCH, resume=resume)


def test_a_run_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    train(tmp_path / "one", 4)
    for first, then in ((1, 2), (2, 1)):
        run = tmp_path / f"{first}{then}"
        written = train(run, 2) if first == 1 else ranks.run(train, run, 2)[0]
        written = train(run, 4, True) if then == 1 else ranks.run(train, run, 4, True)[0]
        assert json.loads((run / "metrics.json").read_text()) == written
        names = {p.name for p in run.iterdir()}
        assert names == {
            "checkpoint-2",
            "checkpoint-4",
            "log.csv",
            "loss.png",
            "metrics.json",
            "samples.png",
            "reconstructions.png",
            "latent.png",
        }
        curves = [checkpoints.notes(folder / "checkpoint-4")["history"] for folder in (tmp_path / "one", run)]
        for ours, theirs in zip(*curves):
            assert ours == pytest.approx(theirs, rel=1e-4)
        weights = [training.load_checkpoint(folder)[0].state_dict() for folder in (tmp_path / "one", run)]
        for k in weights[0]:
            torch.testing.assert_close(weights[0][k], weights[1][k], rtol=1e-3, atol=1e-5)


def _drawn():
    generator = torch.Generator().manual_seed(0)
    count = len(range(5)[distributed.portion(5)])
    with distributed.drawn_for_all(5, generator):
        found = [
            torch.rand(count, 2, generator=generator),
            torch.randn((count,), generator=generator),
            torch.empty(count, 3).uniform_(generator=generator),
            torch.randint(9, (4,), generator=generator),
            torch.zeros(count, dtype=torch.double).normal_(1, 2, generator=generator),
        ]
    return found, generator.get_state()


def test_random_rows_are_those_of_one_process(ranks):
    (first, state), (second, other) = ranks.run(_drawn)
    assert torch.equal(state, other)
    expected, _ = _drawn()
    for i, (a, b, whole) in enumerate(zip(first, second, expected)):
        assert torch.equal(whole, a if i == 3 else torch.cat((a, b)))
