"""The CUDA engine of the degree-ordered inverse, compiled for the host: it must equal the reference, without a GPU.

Its body (csrc/cuda/autoregressive_inverse.cuh) runs in blocks of emulated threads, through the op's own code for a GPU.
Not
seen here: the speed, the registers (test_aot.py tells), and what only hardware does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genfast import reference
from genfast._registry import OPS
from genfast.ops import _autoregressive_inverse_cuda as cuda
from genfast.ops.autoregressive_inverse import TRANSFORMS
from genfast.sampling import DegreeProgram, Layer
from tests.kernels import addresses

ROOT = Path(__file__).parents[2]
POINTERS = (
    "item_list", "tables", "order", "weights", "statics", "z", "x", "logdet", "slopes", "by_value", "constant", "kept",
    "scratch",
)  # fmt: skip


class Args(ctypes.Structure):
    """DegreeOrderedArgs of csrc/cuda/kernels.h."""

    _fields_ = [
        ("stream", ctypes.c_void_p),
        *((p, ctypes.c_void_p) for p in POINTERS),
        *((s, ctypes.c_int64) for s in ("n", "rows", "units", "statics_width")),
        *((s, ctypes.c_int32) for s in ("items", "inputs", "width", "given", "transform", "bins", "tails")),
        ("inverse", ctypes.c_bool),
        ("zuko", ctypes.c_bool),
        ("options", ctypes.c_float * 9),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++ or clang++) on PATH to build the emulated kernel with")
    source, target = (
        ROOT / "tests/kernels/host/autoregressive_inverse.cpp",
        tmp_path_factory.mktemp("host") / "engine.so",
    )
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-w",
        "-shared",
        "-fPIC",
        f"-I{ROOT / 'csrc'}",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(target))
    loaded.degree_ordered.restype = ctypes.c_bool
    loaded.degree_ordered.argtypes = [ctypes.POINTER(Args), ctypes.c_bool, ctypes.c_int64, ctypes.c_int, ctypes.c_bool]
    loaded.group_of.restype = ctypes.c_int64
    loaded.group_of.argtypes = [ctypes.c_int64] * 4
    return loaded


@pytest.fixture
def gpu(library, monkeypatch):
    """The op's path for a GPU on CPU tensors; ``team`` is (samples a block, warps, order of threads reversed)."""
    state = SimpleNamespace(team=(1, 1, False), launches=0, misaligned=[])

    def run(backward, options=(), **fields):
        args = Args(**addresses(fields), options=(ctypes.c_float * 9)(*options))
        state.misaligned.append(args.weights % 16)
        assert library.degree_ordered(ctypes.byref(args), backward, *state.team), (
            "a thread waits for others that never come"
        )
        state.launches += 1

    stand_in = SimpleNamespace(
        degree_ordered=functools.partial(run, False),
        degree_ordered_backward=functools.partial(run, True),
        degree_ordered_scratch=lambda n, rows: 0,
    )
    monkeypatch.setattr(cuda, "_CUDA", stand_in)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return state


def made(inputs, hidden, width, n=0, *, activation="relu", levels=None):
    """A plain MADE with biases, and a context where ``n``."""
    degrees = torch.arange(1, inputs + 1) if levels is None else torch.tensor(levels) + 1
    before, layers = degrees, []
    for units in hidden:
        after = torch.arange(units) % int(degrees.max()) + (1 if int(degrees.max()) > 1 else 0)
        after = after.clamp(max=int(degrees.max()) - 1)
        layers.append(layer(units, len(before), after[:, None] >= before, after=activation))
        before = after
    out = degrees.repeat_interleave(width)
    layers.append(layer(len(out), len(before), out[:, None] > before))
    if n:
        layers[0].context = torch.randn(n, hidden[0])
    return layers


def layer(units, inputs, mask, **options):
    weight = torch.randn(units, inputs) * 0.9 / inputs**0.5
    return Layer(weight, torch.randn(units) * 0.5, mask, **options)


def residual(inputs, units, width, n=0):
    """nflows' residual MADE: activations before the products, a gate of the context, sums of blocks; and a skip from
    x."""
    degrees = torch.arange(1, inputs + 1)
    hidden = torch.arange(units) % max(inputs - 1, 1) + (1 if inputs > 1 else 0)
    same = hidden[:, None] >= hidden
    out = degrees.repeat_interleave(width)
    return [
        layer(units, inputs, hidden[:, None] >= degrees),
        layer(units, units, same, before="elu"),
        layer(units, units, same, before="tanh", residual=1, gate=torch.rand(n, units) if n else None),
        layer(
            units, units, same, before="silu", after="gelu", residual=1, context=torch.randn(n, units) if n else None
        ),
        layer(len(out), units, out[:, None] > hidden, source=3, before="softplus", residual=None),
        layer(len(out), inputs, out[:, None] > degrees, source=0, residual=5),
    ]


AFFINE = [0.0, 0.0, 1e-3]
NINE = [-2.0, 2.0, -2.0, 2.0, 1e-3, 1e-3, 1e-3, 1e-3, 1.0]
SAMPLES = list(OPS["autoregressive_inverse"].samples(torch.Generator().manual_seed(0)))
# Layers (given N), the transformation and its options, N, samples a block, warps.
CASES = {
    "one input": (lambda n: made(1, (5,), 2), "affine:exp", AFFINE, 1, 1, 1),
    "7 inputs": (lambda n: made(7, (19, 33), 2), "affine:softplus", [0.0, 1.0, 1e-3], 5, 4, 2),
    "pairs": (lambda n: made(7, (40,), 2, n), "affine:sigmoid2", [1.0, 0.0, 1e-3], 5, 2, 2),
    "33 samples": (lambda n: made(7, (21, 20), 2), "affine:softclamp", [0.0, 0.0, -6.9], 33, 32, 2),
    "shared rows": (lambda n: made(3, (150, 3), 2, activation="tanh"), "affine:exp", AFFINE, 17, 16, 4),
    "additive": (lambda n: made(5, (24,), 1, activation="sigmoid"), "affine:additive", AFFINE, 9, 8, 3),
    "coupling": (lambda n: made(6, (50, 30), 2, levels=[1, 0, 1, 1, 0, 0]), "affine:exp", AFFINE, 5, 4, 3),
    "residual": (lambda n: residual(7, 20, 2), "affine:sigmoid2", AFFINE, 5, 8, 2),
    "residual, context": (lambda n: residual(5, 18, 2, n), "affine:softclamp", [1.0, 1.0, -6.9], 3, 2, 3),
    "linear": (lambda n: made(9, (), 2), "affine:exp", AFFINE, 2, 1, 1),
    "spline": (lambda n: made(4, (20,), 23), "spline", [0.0, 8.0, 0.0, 0.0, *NINE], 7, 4, 2),
    "spline, the other way": (
        lambda n: made(3, (9,), 13),
        "spline",
        [1.0, 4.0, 1.0, 0.0, -9.0, 9.0, *NINE[2:]],
        3,
        1,
        2,
    ),
    "zuko's circular spline": (lambda n: made(3, (9,), 9, n), "spline", [0.0, 3.0, 2.0, 1.0, *NINE], 5, 2, 1),
}


def program_of(label):
    build, transform, options, n, group, warps = CASES[label]
    torch.manual_seed(3)
    program = DegreeProgram.build(build(n))
    return program, transform, options, torch.randn(n, program.inputs), (group, warps)


def close(found, expected, allowed):
    assert found.shape == expected.shape
    assert not found.isnan().any()
    expected = expected.detach()
    assert float((found.double() - expected).norm()) <= allowed * float(expected.norm()) + 1e-30


def double(t):
    return None if t is None else t.double()


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True], ids=["", "threads reversed"])
@pytest.mark.parametrize("label", CASES)
def test_it_equals_the_reference(gpu, label, reverse):
    """Forward and backward. Whatever runs between two barriers may run in any order: else one is missing."""
    program, transform, options, z, team = program_of(label)
    gpu.team = (*team, reverse)
    packed, statics, code = program.packed(), program.statics(torch.float32), program.code
    x, logdet = cuda.forward(z, packed, statics, code, transform, options)
    exact = [z.double(), packed.double(), double(statics)]
    expected_x, expected_logdet = reference.autoregressive_inverse(*exact, code, transform, options)
    close(x, expected_x, 2e-6)
    close(logdet, expected_logdet, 2e-6)
    grad_x, grad_logdet = torch.randn_like(x), torch.randn_like(logdet)
    found = cuda.backward(grad_x, grad_logdet, z, x, packed, statics, code, transform, options, True)
    expected = reference.autoregressive_inverse_backward(
        grad_x.double(), grad_logdet.double(), exact[0], expected_x, *exact[1:], code, transform, options, True
    )
    for f, e in zip(found, expected):
        close(f, e, 1e-5)
    assert gpu.launches == 2


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES, ids=[s.label for s in SAMPLES])
def test_the_samples_of_the_op(gpu, sample):
    gpu.team = (4, 2, False)
    z, packed, statics, *rest = sample.args
    exact = [None if t is None else t.float().double() for t in (z, packed, statics)]
    x, logdet = cuda.forward(*(None if t is None else t.float() for t in exact), *rest)
    expected_x, expected_logdet = reference.autoregressive_inverse(*exact, *rest)
    close(x, expected_x, 2e-6)
    close(logdet, expected_logdet, 2e-6)


def test_one_gradient_alone(gpu):
    program, transform, options, z, team = program_of("residual, context")
    gpu.team = (*team, False)
    args = (program.packed(), program.statics(torch.float32), program.code, transform, options)
    x, logdet = cuda.forward(z, *args)
    for grad_x, grad_logdet in ((torch.randn_like(x), None), (None, torch.randn_like(logdet))):
        found = cuda.backward(grad_x, grad_logdet, z, x, *args, False)
        exact = [None if g is None else g.double() for g in (grad_x, grad_logdet)]
        expected = reference.autoregressive_inverse_backward(
            *exact, z.double(), x.double(), args[0].double(), args[1].double(), *args[2:], False
        )
        close(found[0], expected[0], 1e-5)
        close(found[2], expected[2], 1e-5)
        assert found[1].numel() == 0


def test_bernoulli(gpu):
    gpu.team = (4, 2, False)
    torch.manual_seed(0)
    program, z = DegreeProgram.build(made(7, (20,), 1)), torch.rand(6, 7)
    x, logdet = cuda.forward(z, program.packed(), None, program.code, "bernoulli", [])
    assert torch.equal(x, reference.autoregressive_inverse(z, program.packed(), None, program.code, "bernoulli", [])[0])
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert not logdet.any()


def test_a_nan_stays_with_its_sample_and_what_follows(gpu):
    gpu.team = (4, 2, False)
    torch.manual_seed(0)
    program, z = DegreeProgram.build(made(7, (20,), 2)), torch.randn(3, 7)
    z[1, 4] = float("nan")
    x = cuda.forward(z, program.packed(), None, program.code, "affine:exp", AFFINE)[0]
    assert torch.equal(x.isnan(), torch.tensor([[i == 1 and j >= 4 for j in range(7)] for i in range(3)]))


def test_weights_that_are_a_slice_are_loaded_as_vectors(gpu):
    """A GPU loads four floats from a multiple of 16 bytes, or fails; the emulation says where they lie."""
    gpu.team = (4, 2, False)
    torch.manual_seed(0)
    program, z = DegreeProgram.build(made(7, (20,), 2)), torch.randn(3, 7)
    packed = program.packed()
    off = torch.cat([packed.new_zeros(1), packed])[1:]
    assert off.data_ptr() % 16
    found, expected = (cuda.forward(z, p, None, program.code, "affine:exp", AFFINE) for p in (off, packed))
    assert gpu.misaligned == [0, 0]
    assert all(map(torch.equal, found, expected))


def test_no_samples(gpu):
    program = DegreeProgram.build(made(3, (4,), 2))
    x, logdet = cuda.forward(torch.empty(0, 3), program.packed(), None, program.code, "affine:exp", AFFINE)
    assert (x.shape, logdet.shape) == ((0, 3), (0,))
    dz, dpacked, _ = cuda.backward(None, logdet, x, x, program.packed(), None, program.code, "affine:exp", AFFINE, True)
    assert dz.shape == (0, 3)
    assert not dpacked.any()
    assert not gpu.launches


def test_every_transform_is_known():
    assert set(cuda._TRANSFORMS) == set(TRANSFORMS)


# Multiprocessors and bytes as an H100 has them: few samples spread, many fill shared memory, some fit nowhere.
@pytest.mark.parametrize(
    ("n", "rows", "group"),
    [(1, 1200, 1), (132, 1200, 1), (256, 1200, 2), (10**6, 1200, 32), (10**6, 9000, 4), (5, 60000, 0)],
)
def test_samples_of_a_block(library, n, rows, group):
    assert library.group_of(n, rows, 132, 232448) == group
