"""What the choices of the matrix-bound and sequential kernels are tried on (see tune.py)."""

from __future__ import annotations

from benchmarks.tune import Sweep

SWEEPS: list[Sweep] = []
