"""Tests in Triton's interpreter: which of them the suite runs, and what one release does otherwise than a GPU."""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of each test's cases the first and about every eighth where GENFAST_INTERPRET_SOME=1, as ``make slow`` sets it.

    All of them: TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted*.py
    """
    if os.environ.get("GENFAST_INTERPRET_SOME") != "1":
        return
    kept, left, seen = [], [], set()
    for item in items:
        name = item.path, getattr(item, "originalname", item.name)
        (left if name in seen and zlib.crc32(item.name.encode()) % 8 else kept).append(item)
        seen.add(name)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def _one_rounding(monkeypatch):
    """Triton 3.6's interpreter rounds the product of a fused multiply-add too, which no GPU does."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data  # of float32 numbers
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
