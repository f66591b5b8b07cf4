"""Signals: a run that is stopped ends between two steps, with a checkpoint, and nothing is torn."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from genfast import _signals, checkpoints, cli, data, training

WORDS = ["train", "glow", "--steps", "100000", "--hidden", "4", "--flow-steps", "1", "--batch-size", "8", "--out"]


@pytest.fixture(autouse=True)
def _handlers():
    """Python's own: a shell that runs these tests in the background has them ignore Ctrl-C."""
    before = {s: signal.getsignal(s) for s in _signals.STOPPING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def send(monkeypatch, owner, name, signum, when=1, times=1):
    """Has the process sent a signal while it is in the ``when``-th call of a function."""
    real, calls = getattr(owner, name), []

    def sent(*args, **options):
        calls.append(1)
        if when <= len(calls) < when + times:
            os.kill(os.getpid(), signum)
        return real(*args, **options)

    monkeypatch.setattr(owner, name, sent)
    return calls


@pytest.mark.parametrize(("signum", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_the_step_and_saves(tmp_path, capsys, monkeypatch, signum, status):
    # In the middle of the third step, when its batch is drawn and nothing has been learnt from it.
    send(monkeypatch, training.Trainer, "batch", getattr(signal, signum), when=3)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main([*WORDS, str(tmp_path / "run")]) == status
    assert capsys.readouterr().err.splitlines() == [
        f"genfast: stopped at step 3; checkpoint kept in {tmp_path / 'run'}"
    ]
    assert [p.name for p in (tmp_path / "run").iterdir() if p.is_dir()] == ["checkpoint-3"]
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    if signum != "SIGINT":
        return
    digits = data.load("digits")
    options = {"config": {"levels": 2, "hidden": 4, "steps": 1}, "batch_size": 8}
    training.train("glow", digits, tmp_path / "run", steps=5, resume=True, batch_size=8)
    training.train("glow", digits, tmp_path / "whole", steps=5, **options)
    whole, parts = (checkpoints.load(tmp_path / name)[0].state_dict() for name in ("whole", "run"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(tmp_path, monkeypatch):
    send(monkeypatch, checkpoints, "_checksum", signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 2; checkpoint kept") as stopped:
        training.train("glow", data.load("digits"), tmp_path, config={"levels": 1, "hidden": 4, "steps": 1}, steps=2)
    assert isinstance(stopped.value, _signals.Terminated)
    assert checkpoints.load(tmp_path)[2].name == "checkpoint-2"
    assert not list(tmp_path.glob(".*"))


def test_a_second_signal_does_not_wait(tmp_path, monkeypatch):
    calls = send(monkeypatch, checkpoints, "_checksum", signal.SIGINT, times=2)
    send(monkeypatch, training.Trainer, "batch", signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        training.train(
            "glow", data.load("digits"), tmp_path / "run", config={"levels": 1, "hidden": 4, "steps": 1}, steps=9
        )
    assert len(calls) == 1
    assert not list(tmp_path.rglob("*checkpoint*"))  # and leaves no half of one


@pytest.mark.parametrize(("signum", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_before_there_is_anything_to_save_it_is_one_line(tmp_path, capsys, monkeypatch, signum, status):
    send(monkeypatch, data, "load", getattr(signal, signum))
    assert cli.main([*WORDS, str(tmp_path / "run")]) == status
    assert capsys.readouterr().err == "genfast: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_somebody_elses_handlers_stay(tmp_path, monkeypatch):
    heard = []
    signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    send(monkeypatch, training.Trainer, "batch", signal.SIGTERM)
    send(monkeypatch, training.Trainer, "_losses", signal.SIGHUP)
    metrics = training.train(
        "glow", data.load("digits"), tmp_path, config={"levels": 1, "hidden": 4, "steps": 1}, steps=2
    )
    assert heard == [signal.SIGTERM]
    assert metrics["steps"] == 2


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="when torch is loading is seen in /proc")
def test_ctrl_c_while_torch_is_loading_is_one_line():
    process = subprocess.Popen(
        [sys.executable, "-m", "genfast", "info"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while "libc10" not in Path(f"/proc/{process.pid}/maps").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "", "genfast: interrupted\n")
