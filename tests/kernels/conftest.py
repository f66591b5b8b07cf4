"""What the interpreter of one Triton release does otherwise than a GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest


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
