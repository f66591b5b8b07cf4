"""The masked convolution's Triton kernels in the interpreter; tests/kernels/test_triton.py runs this in a process of its own."""

from __future__ import annotations

import math
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.fail("run tests/kernels/test_triton.py, which starts this file under TRITON_INTERPRET=1", pytrace=False)

from genfast.kernels import masked_conv as kernels
from tests.kernels import masked_conv_cases as cases
from tests.kernels.flow_cases import DTYPES, FORMS, strided

FLOAT = dict(dtype=torch.float32)


@pytest.mark.parametrize("label", cases.CASES)
def test_masked_conv_shapes(label):
    cases.check(cases.arguments(label, FLOAT))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("label", ["first layer", "primes", "groups", "volume", "1x1", "empty batch"])
def test_masked_conv_half_types(label, dtype):
    cases.check(cases.arguments(label, dict(dtype=dtype)))
