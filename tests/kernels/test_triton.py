"""A family of Triton kernels in Triton's interpreter, without a GPU; ``make slow`` runs all families.

The interpreter is chosen when triton is first imported, and then nothing in that process can be compiled by it;
torch.compile imports triton as it likes. So tests/triton runs in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
FILES = ("tests/triton/test_every_op.py", "tests/triton/test_squeeze.py")


def test_interpreted():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "squeeze", *FILES]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "GENFAST_INTERPRET_SOME": "1"}
    environment.pop("GENFAST_BACKEND", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
