"""Training: repeatable, resumable, and nothing torn by a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from genfast import checkpoints, data, models, training
from genfast.training import pictures, runs

SMALL = {"levels": 2, "steps": 1, "hidden": 4}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def weights(folder):
    return training.load_checkpoint(folder)[0].state_dict()


def test_a_run_leaves_everything_it_should(tmp_path, digits):
    metrics = training.train("glow", digits, tmp_path / "run", config=SMALL, steps=12, save_every=5)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 12
    assert 2 < metrics["test_bits_per_dim"] < 6
    assert metrics["steps_per_second"] > 0
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [
        "checkpoint-10",
        "checkpoint-12",
        "log.csv",
        "loss.png",
        "metrics.json",
        "samples.png",
    ]  # the last two are kept
    with Image.open(tmp_path / "run" / "samples.png") as picture:
        assert picture.size == (7 * 73, 7 * 73)
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.width > 500
    model, metadata, folder = training.load_checkpoint(tmp_path / "run")
    assert (metadata["model"], metadata["bins"], folder.name) == ("glow", "17", "checkpoint-12")
    assert model.config["levels"] == 2


def test_resuming_repeats_the_run_bit_by_bit(tmp_path, digits):
    training.train("glow", digits, tmp_path / "whole", config=SMALL, steps=20)
    training.train("glow", digits, tmp_path / "parts", config=SMALL, steps=10)
    training.train("glow", digits, tmp_path / "parts", steps=20, resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    with pytest.raises(FileExistsError, match="holds a run already"):
        training.train("glow", digits, tmp_path / "whole", steps=5)
    with pytest.raises(ValueError, match="holds a glow, not a nice"):
        training.train("nice", digits, tmp_path / "whole", steps=30, resume=True)


@pytest.mark.parametrize("name", ["nice", "realnvp", "linear_flow"])
def test_every_model_trains_on_images(tmp_path, digits, name):
    config = {"nice": {"hidden": 16}, "realnvp": {"hidden": 4, "depth": 1}, "linear_flow": {}}[name]
    metrics = training.train(name, digits, tmp_path / "run", config=config, steps=3)
    assert metrics["steps"] == 3
    assert (tmp_path / "run" / "samples.png").exists()


def test_a_run_logs_every_step_once(tmp_path, digits, capsys, monkeypatch):
    monkeypatch.setattr(runs, "SPEAK", 0.0)  # a line for each step in the place of one for half a minute
    options = {"config": SMALL, "batch_size": 8}
    training.train("glow", digits, tmp_path / "run", steps=3, **options)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert said[1].startswith("glow on digits: step 2 of 3, bits_per_dim ")
    assert said[1].endswith(" steps/s")
    log = tmp_path / "run" / "log.csv"
    with log.open("a") as file:
        file.write("4,9.9,1.5\n5,9.")  # of steps that no checkpoint has, the last one torn
    monkeypatch.setattr(runs, "SPEAK", 30.0)
    metrics = training.train("glow", digits, tmp_path / "run", steps=6, resume=True, batch_size=8)
    assert capsys.readouterr().err == ""
    rows = [line.split(",") for line in log.read_text().splitlines()]
    assert rows[0] == ["step", "seconds", "bits_per_dim"]
    assert [int(row[0]) for row in rows[1:]] == [1, 2, 3, 4, 5, 6]
    seconds = [float(row[1]) for row in rows[1:]]
    assert seconds == sorted(seconds)
    assert sum(float(row[2]) for row in rows[1:]) / 6 == pytest.approx(metrics["train_bits_per_dim"])


def test_a_picture_that_fails_does_not_end_a_run(tmp_path, digits, capsys, monkeypatch):
    def fail(*args, **kwargs):
        assert (tmp_path / "run" / "metrics.json").exists()  # which comes first, as the weights do
        assert checkpoints.steps(tmp_path / "run") == [2]
        raise RuntimeError("no\nfont")

    monkeypatch.setattr(pictures, "plot_losses", fail)
    monkeypatch.setattr(pictures, "image_grid", fail)
    assert training.train("glow", digits, tmp_path / "run", config=SMALL, steps=2, batch_size=8)["steps"] == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"genfast: {tmp_path / 'run' / name} was not drawn: no font" for name in ("loss.png", "samples.png")
    ]


@pytest.mark.parametrize(("steps", "minutes"), [(0, None), (-5, None), (None, 0.0), (None, float("nan"))])
def test_a_run_has_a_length(tmp_path, digits, steps, minutes):
    with pytest.raises(ValueError, match="steps=.*, expected at least 1|minutes=.*, expected a positive number"):
        training.train("glow", digits, tmp_path / "run", steps=steps, minutes=minutes)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("where", ["replace", "save"])
def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path, digits, monkeypatch, where):
    run = tmp_path / "run"
    training.train("glow", digits, run, config=SMALL, steps=4)
    before = weights(run)

    def crash(*args, **kwargs):
        raise OSError("disk full")

    if where == "replace":
        monkeypatch.setattr(os, "replace", crash)
    else:
        monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        training.train("glow", digits, run, steps=8, resume=True)
    monkeypatch.undo()
    after = weights(run)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert [p.name for p in run.glob("*checkpoint*")] == ["checkpoint-4"]
    assert not list(run.glob(".*"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, digits, monkeypatch):
    run = tmp_path / "run"
    training.train("glow", digits, run, config=SMALL, steps=4)
    broken = data.Dataset("digits", digits.train, digits.test, digits.bins)
    real = models.dequantize
    monkeypatch.setattr(models, "dequantize", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(training.TrainingError, match="the loss is nan at step 5.*; checkpoint-4 is kept in"):
        training.train("glow", broken, run, steps=8, resume=True)
    assert training.latest(run).name == "checkpoint-4"
    with pytest.raises(training.TrainingError, match="the loss is nan at step 1.*; there is no checkpoint from before"):
        training.train("glow", broken, tmp_path / "other", config=SMALL, steps=8)
    assert not list(tmp_path.glob("other/checkpoint-*"))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(tmp_path, digits):
    trainer = training.Trainer(models.Glow(digits.shape, **SMALL), digits, batch_size=8)
    trainer.step()
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
    with pytest.raises(training.TrainingError, match="gradient of norm (nan|inf) at step 2"):
        trainer.step()
    assert all(torch.equal(v, before[k]) for k, v in trainer.model.state_dict().items())


def test_a_run_that_is_worse_than_guessing_is_no_result(tmp_path, digits):
    """With losses that are finite: what a run of 4.9e9 bits/dim had."""
    options = {"config": {"channels": 8, "layers": 1}, "steps": 12, "batch_size": 8, "lr": 1e6}
    said = r"diverged: .* bits/dim after {} steps, 4\.\d+ at its first step: lower the learning rate; {}"
    with pytest.raises(training.TrainingError, match=said.format(12, "there is no checkpoint from before")):
        training.train("pixelcnn", digits, tmp_path / "run", **options)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["log.csv"]
    with pytest.raises(training.TrainingError, match=said.format(2, "checkpoint-1 is kept in")):
        training.train("pixelcnn", digits, tmp_path / "other", save_every=1, **options)
    model, _, checkpoint = checkpoints.load(tmp_path / "other")  # not pushed out by worse ones
    assert checkpoint.name == "checkpoint-1"
    # After one step it is only what the held-out images cost that shows it; the run has its metrics.
    with pytest.raises(training.TrainingError, match=r"bits/dim on held-out images, 4\.\d+ at its first step.*; see"):
        training.train("pixelcnn", digits, tmp_path / "one", **(options | {"steps": 1}))
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["test_bits_per_dim"] > 1000


def test_interrupting_keeps_a_checkpoint_and_exits_130(tmp_path):
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "genfast",
        "train",
        "glow",
        "--out",
        str(out),
        "--steps",
        "100000",
        "--hidden",
        "4",
        "--flow-steps",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # A shell that runs these tests in the background has them ignore the signal, and a child would inherit that.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(out.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "checkpoint kept in" in errors
    assert "Traceback" not in errors
    step = int(training.latest(out).name.removeprefix("checkpoint-"))
    assert f"stopped at step {step}" in errors


def test_shapes_that_do_not_fit_are_named(digits):
    with pytest.raises(ValueError, match=r"the model takes \(3, 8, 8\) and the data are \(1, 8, 8\)"):
        training.Trainer(models.Glow((3, 8, 8), levels=1, steps=1), digits)
    with pytest.raises(ValueError, match="batch_size=0"):
        training.Trainer(models.Glow((1, 8, 8), levels=1, steps=1), digits, batch_size=0)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        training.load_checkpoint("nowhere")


def test_what_is_frozen_by_eval_stays_frozen(digits):
    """A backbone or a batch norm that its owner has put into evaluation mode alone, through steps and evaluations."""
    model = models.PixelCNNPlusPlus(1, 4, 1, 1, digits.bins, dropout=0.5, shape=digits.shape)
    model.encode_v[0].eval()
    modes = [m.training for m in model.modules()]
    trainer = training.Trainer(model, digits, batch_size=2)
    for act in (trainer.step, lambda: trainer.evaluate(2), trainer.step):
        act()
        assert [m.training for m in model.modules()] == modes
    model.eval()
    trainer.step()
    assert all(m.training for m in model.modules())
