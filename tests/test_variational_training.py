"""The trainer of autoencoders: what a step does, exact resumption, what a run leaves, and that it learns real
digits."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from genfast import checkpoints, cli, data, models, training
from genfast.models.base_autoencoder import Losses
from genfast.training import Trainer, pictures

NAMES = [name for name, model in models.NAMES.items() if issubclass(model, models.AutoencoderModel)]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def tiny(name, digits, **config):
    torch.manual_seed(0)
    return models.build(name, shape=digits.shape, levels=digits.bins, **({"hidden": 16, "latent_dim": 4} | config))


def independent_pixels(digits):
    """Held-out bits per dimension of the model in which each pixel is on its own, with the levels' frequencies in
    training."""
    counts = torch.nn.functional.one_hot(digits.train.flatten(1).long(), 17).sum(0) + 0.1
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    nats = log_p.gather(1, digits.test.flatten(1).long().T).sum(0).mean()
    return float(-nats / 64 / math.log(2))


@pytest.mark.parametrize("name", NAMES)
def test_every_model_trains_and_repeats_from_a_seed(name, digits):
    found = []
    for _ in range(2):
        trainer = Trainer(tiny(name, digits), digits, batch_size=16, seed=3)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        figures = [trainer.step() for _ in range(3)]
        after = [p.detach().clone() for p in trainer.model.parameters()]
        assert all(math.isfinite(v) for f in figures for v in f.values())
        assert sum(not torch.equal(a, b) for a, b in zip(before, after)) > len(before) / 2
        found.append((figures, after))
    assert found[0][0] == found[1][0] == trainer.history
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_players_move_by_their_own_loss_alone(digits, monkeypatch):
    """One step of plain SGD for the three players of a VAE/GAN, against the gradients written out."""
    trainer = Trainer(tiny("vaegan", digits), digits, batch_size=8)
    copied, state = copy.deepcopy(trainer.model), trainer.generator.get_state()
    for name, parameters in trainer.players.items():
        trainer.optimizers[name] = torch.optim.SGD(parameters, lr=0.1)
    trainer.step()
    trainer.generator.set_state(state)
    given = copied.losses(copied.phases[0], trainer.batch()[0], generator=trainer.generator, step=0)
    for name in ("encoder", "decoder", "critic"):
        mine = list(copied.player(name))
        grads = torch.autograd.grad(given.players[name], mine, retain_graph=True)
        for p, g, moved in zip(mine, grads, trainer.model.player(name)):
            torch.testing.assert_close(moved, p - 0.1 * g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vae", "aae", "denoising_autoencoder"])
def test_resuming_repeats_the_run_bit_by_bit(tmp_path, digits, name):
    options = {"config": {"hidden": 8, "latent_dim": 3}, "batch_size": 16}
    training.train(name, digits, tmp_path / "whole", steps=10, **options)
    training.train(name, digits, tmp_path / "parts", steps=5, **options)
    training.train(name, digits, tmp_path / "parts", steps=10, resume=True, batch_size=16)
    whole, parts = (training.latest(tmp_path / which) for which in ("whole", "parts"))
    one, other = (load_file(folder / "weights.safetensors") for folder in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)
    kept = [checkpoints.notes(folder) for folder in (whole, parts)]
    assert kept[0]["history"] == kept[1]["history"]
    with pytest.raises(FileExistsError, match="holds a run already"):
        training.train(name, digits, tmp_path / "whole", steps=5)
    with pytest.raises(ValueError, match="holds a .*, not a wae"):
        training.train("wae", digits, tmp_path / "whole", steps=20, resume=True)


def test_a_vae_learns_real_digits_and_its_bound_is_the_sum_of_its_parts(tmp_path, digits):
    """In 500 steps; seeds 0, 1, 2 gave 2.036, 2.065 and 2.047 bits per dimension, independent pixels give 2.43."""
    run = tmp_path / "run"
    written = training.train(
        "vae", digits, run, config={"hidden": 64, "latent_dim": 8, "depth": 1}, steps=500, batch_size=64, lr=3e-3
    )
    assert written == json.loads((run / "metrics.json").read_text())
    assert written["test_elbo"] == pytest.approx(written["test_reconstruction"] - written["test_kl"], abs=1e-4)
    assert written["test_bits_per_dim"] == pytest.approx(-written["test_elbo"] / 64 / math.log(2))
    assert written["test_importance_weighted_bound"] > written["test_elbo"]
    assert written["test_kl"] > 5  # the latents are used
    assert independent_pixels(digits) == pytest.approx(2.43, abs=0.01)
    assert written["test_bits_per_dim"] < 2.2
    names = sorted(p.name for p in run.iterdir())
    assert names == [
        "checkpoint-400",
        "checkpoint-500",
        "log.csv",
        "loss.png",
        "metrics.json",
        "reconstructions.png",
        "samples.png",
    ]
    with Image.open(run / "reconstructions.png") as picture:
        assert picture.size == (7 * 73, 7 * 73)
    model, metadata, _ = training.load_checkpoint(run)
    assert (metadata["model"], metadata["bins"], model.likelihood) == ("vae", "17", "discretized_logistic")
    error = (model.reconstruct(digits.test).float() - digits.test.float()).square().mean() / 256
    assert float(error) == pytest.approx(written["test_mse"], abs=2e-3)
    assert float(error) < 0.5 * float((digits.train.float() / 16).var(0).mean())


def test_a_plane_of_latents_is_drawn(tmp_path, digits):
    training.train("wae", digits, tmp_path, config={"hidden": 8, "latent_dim": 2}, steps=2)
    with Image.open(tmp_path / "latent.png") as picture:
        assert picture.width == picture.height > 100
    with pytest.raises(ValueError, match="latent_dim=4 and prior=True, expected a plane"):
        pictures.latent_grid(tiny("vae", digits))
    with pytest.raises(ValueError, match="latent_dim=2 and prior=False"):
        pictures.latent_grid(tiny("autoencoder", digits, latent_dim=2))


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_that_are_not_finite_stop_before_the_update(digits, monkeypatch, bad):
    trainer = Trainer(tiny("vae", digits), digits, batch_size=8)
    trainer.step()
    before = [p.detach().clone() for p in trainer.model.parameters()]
    real = trainer.model.losses

    def broken(*args, **kwargs):
        loss = real(*args, **kwargs).players["autoencoder"]
        loss = loss * float("nan") if bad == "loss" else loss + (loss - loss.detach()).clamp(min=0).sqrt()
        return Losses({"autoencoder": loss}, {"loss": loss})

    monkeypatch.setattr(trainer.model, "losses", broken)
    with pytest.raises(
        training.TrainingError, match=r"the autoencoder's loss (is nan|has a gradient of norm (nan|inf)) at step 2"
    ):
        trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_train_and_sample_from_the_command_line(name, tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "samples.png"
    words = [
        "train",
        name,
        "--out",
        str(run),
        "--steps",
        "2",
        "--hidden",
        "8",
        "--latent-dim",
        "3",
        "--batch-size",
        "16",
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "2 steps, on held-out images" in said
    assert ("ELBO" in said and "bits/dim" in said) == (name == "vae")
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "10"]) == 0
    with Image.open(picture) as image:
        assert image.size[0] > image.size[1]
    assert cli.main([*words, "--resume"]) == 0


def test_options_of_the_command_line_reach_the_model(tmp_path, capsys):
    words = ["--out", str(tmp_path / "a"), "--steps", "1", "--width", "4", "--network", "convolutional"]
    vae = ["--likelihood", "bernoulli", "--beta", "2", "--warmup", "5", "--free-bits", "0.1"]
    assert cli.main(["train", "vae", *words, *vae]) == 0
    config = training.load_checkpoint(tmp_path / "a")[0].config
    wanted = {
        "likelihood": "bernoulli",
        "beta": 2.0,
        "warmup": 5,
        "free_bits": 0.1,
        "network": "convolutional",
        "width": 4,
    }
    assert {k: config[k] for k in wanted} == wanted
    other = ["--out", str(tmp_path / "b"), "--steps", "1", "--penalty", "l1", "--weight", "0.5"]
    assert cli.main(["train", "sparse_autoencoder", *other]) == 0
    config = training.load_checkpoint(tmp_path / "b")[0].config
    assert (config["penalty"], config["weight"]) == ("l1", 0.5)
    capsys.readouterr()
    for words, message in (
        (["train", "vae", "--gamma", "1", "--loss", "hinge"], "vae takes no --gamma, --loss"),
        (["train", "vae", "--levels", "3"], "vae takes no --levels; the data decide them"),
        (["train", "vae", "--data", "8gaussians"], "are points"),
        (["train", "glow", "--beta", "1"], "glow takes no --beta"),
        (["train", "aae", "--loss", "relativistic", "--out", str(tmp_path / "c")], "loss='relativistic'"),
    ):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: Trainer(models.VAE((1, 4, 4), levels=17), d), r"takes \(1, 4, 4\) and the data are \(1, 8, 8\)"),
        (lambda d: Trainer(models.VAE((1, 8, 8)), d), "levels=256 and the data have 17"),
        (lambda d: Trainer(models.VAE((1, 8, 8), levels=17), d, batch_size=0), "batch_size=0"),
        (lambda d: training.train("vae", data.points("8gaussians", count=10), "nowhere"), "are points"),
        (lambda d: training.train("vae", d, "nowhere", config={"gamma": 1}), "vae takes no gamma"),
        (lambda d: training.train("vae", d, "nowhere", recipe={"lazy": 2}), "vae takes no lazy"),
    ],
)
def test_what_does_not_fit_is_named(digits, make, message):
    with pytest.raises(ValueError, match=message):
        make(digits)
