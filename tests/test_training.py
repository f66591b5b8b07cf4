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

from genfast import data, models, training

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


@pytest.mark.parametrize("where", ["replace", "save"])
def test_a_crash_while_saving_keeps_the_last_checkpoint(tmp_path, digits, monkeypatch, where):
    run = tmp_path / "run"
    training.train("glow", digits, run, config=SMALL, steps=4)
    before = weights(run)

    def crash(*args, **kwargs):
        raise OSError("disk full")

    if where == "replace":
        monkeypatch.setattr(training.os, "replace", crash)
    else:
        monkeypatch.setattr(training.torch, "save", crash)
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
    monkeypatch.setattr(training.models, "dequantize", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(training.TrainingError, match="the loss is nan at step 5"):
        training.train("glow", broken, run, steps=8, resume=True)
    assert training.latest(run).name == "checkpoint-4"


def test_interrupting_keeps_a_checkpoint_and_exits_130(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "genfast", "train", "glow", "--out", str(out), "--steps", "100000", "--hidden", "4",
               "--flow-steps", "1"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # A shell that runs these tests in the background has them ignore the signal, and a child would inherit that.
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
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
