"""Changed calls of every op and every public function, in a process of their own: see tests/fuzz.py."""

from __future__ import annotations

import os
import subprocess
import sys

CALLS = int(os.environ.get("GENFAST_FUZZ", "1000"))


def test_changed_calls_equal_the_reference_or_raise_what_names_an_argument(tmp_path):
    log = tmp_path / "call.txt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--calls", str(CALLS), "--seed", "1", "--log", str(log)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    last = log.read_text() if log.exists() else "none"
    assert done.returncode == 0, (
        f"status {done.returncode}, the last call {last}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    )
