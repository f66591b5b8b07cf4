"""Tests of the Triton kernels on CPU tensors, in Triton's interpreter: TRITON_INTERPRET=1 python -m pytest
tests/triton.

The interpreter is chosen when triton is first imported, and then that process can compile nothing, so that an ordinary
run skips this folder. ``make slow`` runs it with GENFAST_INTERPRET_SOME=1, which takes some of each test's cases.
"""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class SkippedModule(pytest.Module):
    """A module of this folder in an ordinary run, which does not import it."""

    def collect(self) -> list[pytest.Item]:
        pytest.skip("run by TRITON_INTERPRET=1 python -m pytest tests/triton")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if INTERPRETED else SkippedModule.from_parent(parent, path=module_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where GENFAST_INTERPRET_SOME=1, selects the first and about every eighth of each test's cases."""
    if os.environ.get("GENFAST_INTERPRET_SOME") != "1":
        return
    selected, deselected, seen = [], [], set()
    for item in items:
        test = item.path, getattr(item, "originalname", item.name)
        (deselected if test in seen and zlib.crc32(item.name.encode()) % 8 else selected).append(item)
        seen.add(test)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)


@pytest.fixture(autouse=True)
def _round_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a fused multiply-add round once, as GPUs do: Triton 3.6's interpreter rounds its product too."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data  # of float32 numbers
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


@pytest.fixture(autouse=True)
def _ignore_numpy_warnings() -> Iterator[None]:
    """NumPy, which the interpreter computes with, warns of overflows, infinities and NaN that some tests are about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def tf32() -> Iterator[None]:
    """Chooses the tiles for TF32; the interpreter's products are exact in any precision."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
