"""Every Triton kernel compiles for sm_90 without a GPU, and none spills; .ci/run takes more variants, and sm_80 and
sm_100 too.

Of the CUDA C++ kernels, nvcc compiled every one for those three when the package was built; what they came to stands in
there.
"""

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
    done = check("--arch", "90", "--every", "8")  # .ci/run compiles every third
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = re.findall(r"^(\w+) +(\w+) +.* sm_(\d+) +(\d+) +(\d+) +(\d+)$", done.stdout, re.MULTILINE)
    kernels = {(family, kernel) for family, kernel, *_ in rows}
    assert len(rows) == int(re.findall(r"(\d+) compiled, 0 failed or spilled", done.stdout)[0])
    families = {"affine_coupling", "actnorm", "invertible_conv1x1", "squeeze", "masked_conv", "gated_activation"}
    families |= {
        "interpolate",
        "sample_norm",
        "spectral_norm",
        "minibatch_discrimination",
        "upfirdn2d",
        "modulated_conv",
    }
    families |= {"discretized_logistic_mixture", "activation", "bias_act", "pixel_norm", "minibatch_stddev"}
    families |= {"contextual_similarity", "diagonal_gaussian", "gram_matrix", "pairwise", "spline", "masked_linear"}
    assert {family for family, _ in kernels} >= families
    assert {arch for _, _, arch, *_ in rows} == {"90"}
    assert all(0 < int(registers) <= 255 and int(spilled) == 0 for *_, registers, _, spilled in rows)
    assert max(int(r[4]) for r in rows) <= 99 * 1024  # what consumer cards have, too


# Bytes of a thread's stack that are arrays of the kernel's own; whatever else is there is spilled registers.
ARRAYS = {"pixel_program_kernel": 544}


def test_the_cuda_kernels_as_built_spill_nothing():
    import triton

    from benchmarks.gpu_check import demangled
    from genfast import _backend

    module, reason = _backend.extension("_cuda")
    if module is None:
        pytest.skip(f"there is no CUDA module to look into: {reason}")
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", module.__file__]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, arch = [], ""
    for line, following in zip(said.splitlines(), said.splitlines()[1:]):
        if line.startswith("arch = "):
            arch = line.removeprefix("arch = sm_")
        elif m := re.match(r" Function (\w+):", line):
            registers, stack, local = map(
                int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", following)[0]
            )
            found.append((demangled(m[1]), arch, registers, stack + local))
    assert {arch for _, arch, *_ in found} >= set(module.archs.split(";"))
    assert {name for name, *_ in found} >= {
        "level_kernel",
        "pixel_program_kernel",
        "forward",
        "backward",
        "backward_prepare",
    }
    assert [k for k in found if k[3] > ARRAYS.get(k[0], 0)] == []


@pytest.mark.slow
def test_one_kernel_of_each_kind_compiles_for_amd():
    done = check("--arch", "gfx942", "--every", "1000", "--family", "actnorm", "squeeze", "gram_matrix")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert {"actnorm", "squeeze", "gram_matrix"} <= set(
        re.findall(r"^(\w+) .* gfx942 +\d+ +\d+ +0$", done.stdout, re.MULTILINE)
    )


def test_the_check_refuses_the_interpreter():
    done = check(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset it" in done.stderr


UNLISTED = """
import contextlib
import io
import sys

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

for words, message in ((["--arch", "gfx1100"], "arch='gfx1100'"), (["--family", "x"], "family 'x'")):
    sys.argv[1:] = words
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            aot.main()
    except SystemExit as end:
        assert end.code == 2 and message in said.getvalue(), said.getvalue()
    else:
        raise AssertionError(words)
"""


def test_the_check_finds_a_kernel_that_no_variant_names_and_refuses_what_it_does_not_know(tmp_path):
    script = tmp_path / "unlisted.py"
    script.write_text(UNLISTED)
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(script)], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
