"""Runs that torchrun starts, stopped by hand and by accident: all processes end, and what they leave is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genfast import checkpoints, data, training

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
MINUTE = 60  # far more than any of this takes


def launch(*words):
    # A shell that runs these tests in the background has them ignore the signal, and a child would inherit that.
    return subprocess.Popen(
        [*LAUNCH, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def goes_on(folder, steps):
    """One process takes up the run in a folder, and leaves nothing else behind."""
    written = training.train("glow", data.load("digits"), folder, steps=steps, batch_size=4, resume=True)
    assert written["steps"] == steps
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_interrupting_all_keeps_one_whole_checkpoint(tmp_path):
    words = ["-m", "genfast", "train", "glow", "--hidden", "4", "--flow-steps", "1", "--batch-size", "4"]
    process = launch(*words, "--out", tmp_path / "run", "--steps", 100_000)
    deadline = time.monotonic() + 2 * MINUTE
    while not list(tmp_path.glob("run/checkpoint-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(
        process.pid, signal.SIGINT
    )  # as a terminal does: torchrun hears it, and tells the processes, which hear it too
    _, errors = process.communicate(timeout=MINUTE)
    assert process.returncode != 0
    assert errors.count("checkpoint kept in") == 1
    step = checkpoints.notes(checkpoints.latest(tmp_path / "run"))["step"]
    assert f"stopped at step {step}" in errors
    goes_on(tmp_path / "run", step + 2)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_and_tears_nothing(tmp_path):
    process = launch(Path(__file__).with_name("dies.py"), tmp_path / "run")
    _, errors = process.communicate(timeout=2 * MINUTE)
    assert process.returncode != 0, errors
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    goes_on(tmp_path / "run", 4)
