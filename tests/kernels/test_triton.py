"""The Triton kernels in Triton's interpreter, without a GPU.

The interpreter is chosen when triton is first imported, and then nothing in that process can be compiled by it; torch.compile
imports triton as it likes. So each family runs tests/kernels/interpreted.py in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]


FAMILIES = ["affine_coupling", "actnorm", "channel_mix", "squeeze", "gated_activation", "discretized", "masked_conv", "family"]


PENALTY = ["interpolate", "sample_norm", "spectral_norm", "minibatch_discrimination", "64_bit"]

# Triton 3.6's interpreter makes scalars of arrays of one element, which NumPy 2.4 refuses; 3.9's does not.
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9) and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"

RUNS = [
    *((f, "interpreted") for f in FAMILIES),
    ("activation_chain or activation_second or leaky or apply_bits or (linear and not masked_linear)", "interpreted"),
    ("masked_conv", "interpreted_masked_conv"),
    ("activation", "interpreted_activation"),
    *((f, "interpreted_gan") for f in ("bias_act", "pixel_norm", "minibatch_stddev")),
    ("", "interpreted_upfirdn2d"),
    *((f, "interpreted_features") for f in ("gram", "contextual")),
    ("gram or style or contextual", "interpreted"),
    *((f, "interpreted_penalty") for f in PENALTY),
    ("", "interpreted_diagonal_gaussian"),
    ("pairwise", "interpreted_pairwise"),
    ("", "interpreted_spline"),
    ("", "interpreted_tune"),
    ("", "interpreted_masked_linear"),
    ("", "interpreted_nade"),
    ("nade", "interpreted"),
]


def _run(family: str, file: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", family, f"tests/kernels/{file}.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "GENFAST_INTERPRET_HALF": "1"}
    environment.pop("GENFAST_BACKEND", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(OLD, reason=f"the interpreter of triton {triton.__version__} needs numpy below 2.4")
@pytest.mark.parametrize("run", RUNS, ids=[f"{family}-{file}" for family, file in RUNS])
def test_interpreted(run):
    done = _run(*run)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
