"""The Triton kernels in Triton's interpreter, without a GPU.

The interpreter is chosen when triton is first imported, and then nothing in that process can be compiled by it; torch.compile
imports triton as it likes. So each family runs tests/kernels/interpreted.py in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


FAMILIES = ["affine_coupling", "actnorm", "channel_mix", "squeeze", "gated_activation", "discretized", "masked_conv", "family"]


@pytest.mark.parametrize(
    ("family", "file"), [*((f, "interpreted") for f in FAMILIES), ("masked_conv", "interpreted_masked_conv")]
)
def test_interpreted(family, file):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", family, f"tests/kernels/{file}.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("GENFAST_BACKEND", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
