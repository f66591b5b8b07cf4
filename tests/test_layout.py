"""Tests mirror the package by name: the tests of genfast/ops/NAME.py are in tests/ops/test_NAME.py, and so on."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "genfast/ops": "tests/ops",
    "genfast/nn": "tests/nn",
    "genfast/losses": "tests/losses",
    "kernels": "tests/triton",
}
# A module that calls one operation and holds at most its parameters is tested with that operation.
TESTED_WITH_THEIR_OPERATION = (
    "bias_act",
    "contextual_similarity",
    "gram_matrix",
    "masked_linear",
    "minibatch_discrimination",
    "minibatch_stddev",
    "modulated_conv",
    "nade",
    "pixel_norm",
    "spectral_norm",
    "upfirdn2d",
)
EXCEPTIONS = {f"genfast/nn/{name}.py": f"tests/ops/test_{name}.py" for name in TESTED_WITH_THEIR_OPERATION} | {
    "genfast/nn/gradient_penalty.py": "tests/penalty/test_gradient_penalty.py",  # It calls genfast.penalty.
    "genfast/nn/plain.py": "tests/nn/test_bijection_of_vectors.py",  # Each plain twin is tested beside its layer.
    "genfast/nn/univariate.py": "tests/nn/test_autoregressive.py",  # It holds the maps of its layers and the splines'.
    "kernels/aot.py": "tests/kernels/test_aot.py",  # It compiles, which no process of the interpreter can do.
}
MODULES = [
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if not path.name.startswith("_")
]


def mirrored(module: str) -> str:
    folder, _, name = module.rpartition("/")
    return f"{FOLDERS[folder]}/test_{name}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_its_tests_by_name(module):
    assert (ROOT / EXCEPTIONS.get(module, mirrored(module))).is_file()


def test_every_exception_is_needed():
    assert set(EXCEPTIONS) <= set(MODULES)
    assert not [module for module in EXCEPTIONS if (ROOT / mirrored(module)).is_file()]
