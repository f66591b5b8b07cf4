"""What ``import genfast`` brings along, and what it says where the kernels are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import genfast

ROOT = Path(genfast.__file__).parents[1]
BUILT = genfast.has_kernels("cpu")


# An installation in editable mode would find its kernels for a copy of the package, too.
NOT_EDITABLE = (
    "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
)


def python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("GENFAST_", "TRITON_INTERPRET"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(folder)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def source_folder(tmp_path_factory):
    """A copy of the package without its kernels, as in a clone where nothing was built."""
    clone = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "kernels")
    shutil.copytree(ROOT / "genfast", clone / "genfast", ignore=ignored)
    shutil.copytree(ROOT / "benchmarks", clone / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (clone / "csrc").mkdir()
    (clone / "csrc" / "bind_cpu.cpp").touch()
    return clone


def test_import_leaves_the_compiler_out():
    code = "import sys, genfast; print([m for m in sys.modules if m.startswith(('torch._dynamo', 'torch._inductor'))])"
    done = python(code, ROOT, **({"PYTHONWARNINGS": "error"} if BUILT else {}))
    assert done.stdout.strip() == "[]", done.stderr
    assert done.stderr == ""


def test_a_clone_that_shadows_the_installation_says_so_once(source_folder):
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import genfast
    import genfast.nn
ours = [w for w in caught if w.category.__name__ == "MissingKernelsWarning"]
assert len(ours) == 1, caught
assert not genfast.has_kernels("cpu")
print(ours[0].message)
"""
    done = python(NOT_EDITABLE + code, source_folder)
    assert done.returncode == 0, done.stderr
    for words in ("shadows an installed genfast", "run from another folder", "pip install -e .", str(source_folder)):
        assert words in done.stdout


def test_the_reference_by_request_is_no_reason_to_warn(source_folder):
    done = python(NOT_EDITABLE + "import genfast", source_folder, PYTHONWARNINGS="error", GENFAST_BACKEND="reference")
    assert done.returncode == 0, done.stderr


def test_benchmarks_refuse_to_measure_the_reference(source_folder):
    code = (
        "import runpy, sys; sys.argv[1:] = ['--quick', '-k', 'squeeze']; runpy.run_module('benchmarks', "
        "run_name='__main__')"
    )
    done = python(NOT_EDITABLE + code, source_folder)
    assert done.returncode == 2, done.stdout
    assert "shadows an installed genfast" in done.stderr
    assert "--allow-missing-kernels" in done.stderr
    assert not (source_folder / "benchmarks" / "results").exists()


def test_has_kernels_knows_devices():
    assert genfast.has_kernels(torch.device("cpu")) == BUILT
    assert not genfast.has_kernels("meta")
    with pytest.raises(RuntimeError, match="nonsense"):
        genfast.has_kernels("nonsense")
