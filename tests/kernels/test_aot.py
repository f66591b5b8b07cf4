"""Every Triton kernel compiles for sm_90 without a GPU, and none spills; .ci/run does the same for sm_80 and sm_100 too."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "genfast.kernels.aot", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_kernel_compiles_and_none_spills():
    done = check("--arch", "90", "--every", "8")  # .ci/run compiles all
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = re.findall(r"^(\w+) +(\w+) +.* sm_(\d+) +(\d+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    kernels = {(family, kernel) for family, kernel, *_ in rows}
    assert len(rows) == int(re.findall(r"(\d+) compiled, 0 failed or spilled", done.stdout)[0])
    families = {"affine_coupling", "actnorm", "invertible_conv1x1", "squeeze", "masked_conv", "gated_activation"}
    families |= {"interpolate", "sample_norm", "spectral_norm", "minibatch_discrimination", "upfirdn2d", "modulated_conv"}
    families |= {"discretized_logistic_mixture", "activation", "bias_act", "pixel_norm", "minibatch_stddev"}
    families |= {"contextual_similarity", "diagonal_gaussian", "gram_matrix", "pairwise", "spline", "masked_linear"}
    assert {family for family, _ in kernels} >= families
    assert {arch for _, _, arch, *_ in rows} == {"90"}
    assert all(0 < int(registers) <= 255 and int(spilled) == 0 for *_, registers, _, spilled in rows)
    assert max(int(r[4]) for r in rows) <= 99 * 1024  # what consumer cards have, too


def test_the_check_refuses_the_interpreter():
    done = check(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset it" in done.stderr


UNLISTED = """
import triton
import triton.language as tl
from genfast.kernels import aot, squeeze

@triton.jit
def _helper(x):
    return x

@triton.jit
def _forgotten(x):
    tl.store(x, _helper(1))

for kernel in (_helper, _forgotten):
    kernel.fn.__module__ = squeeze.__name__
    setattr(squeeze, kernel.fn.__name__, kernel)
assert aot.unlisted("squeeze") == ["_forgotten", "_helper"], aot.unlisted("squeeze")
squeeze.AOT.append(squeeze.AOT[0]._replace(kernel=_forgotten))
assert aot.unlisted("squeeze") == []
"""


def test_the_check_finds_a_kernel_that_no_variant_names(tmp_path):
    script = tmp_path / "unlisted.py"
    script.write_text(UNLISTED)
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
