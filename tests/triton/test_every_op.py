"""Every Triton kernel on its operation's samples in Triton's interpreter."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest

import genfast
import genfast.kernels
from genfast._verify import errors
from tests.conftest import SAMPLE_IDS, SAMPLES, poisoned
from tests.triton.flow_cases import FORWARD, GRADIENT, each_dtype

triton_samples = pytest.mark.parametrize(
    ("op", "sample"),
    [pair for pair in SAMPLES if "triton" in pair[0].kernels],
    ids=[name for name, pair in zip(SAMPLE_IDS, SAMPLES) if "triton" in pair[0].kernels],
)


def test_interpreter_took_effect():
    kernels = [
        kernel
        for m in pkgutil.iter_modules(genfast.kernels.__path__)
        if not m.name.startswith("_") and m.name != "aot"
        for kernel in (v.kernel for v in import_module(f"genfast.kernels.{m.name}").AOT)
    ]
    assert kernels
    assert {type(k).__name__ for k in kernels} == {"InterpretedFunction"}


@each_dtype
@triton_samples
def test_samples_match_the_float64_reference(op, sample, dtype):
    with poisoned():
        forward, backward = errors(op, sample, dtype, "cpu", "triton")
    assert forward <= FORWARD[dtype]
    assert backward <= GRADIENT[dtype]
