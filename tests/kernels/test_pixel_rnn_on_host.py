"""The CUDA kernels of PixelRNN, compiled for the host: what they compute is tested without a GPU, as Triton's are
interpreted.

Their threads become threads of the host, so barriers, clusters and addresses are those of the source; speed and
registers are not (nvcc tells of the latter).
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

from genfast import ops
from tests.kernels import addresses

HERE = Path(__file__).parent
SOURCE = HERE.parents[1] / "csrc" / "cuda" / "pixel_rnn.cu"
SHARED = "extern __shared__ float4 shared_rows[];"
POINTERS = ("weight", "gates", "h0", "c0", "grad_h", "grad_kept", "h", "kept", "dgates", "carry")
SIZES = ("n", "hidden", "depth", "height", "width", "taps")


class Args(ctypes.Structure):
    _fields_ = [
        ("stream", ctypes.c_void_p),
        ("diagonal", ctypes.c_bool),
        *((p, ctypes.c_void_p) for p in POINTERS),
        *((s, ctypes.c_int64) for s in SIZES),
    ]


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pixel_rnn")]  # one worker builds the emulated kernel


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("host")
    text = SOURCE.read_text()
    assert text.count(SHARED) == 1
    text = text.replace(SHARED, "#define shared_rows block_memory").replace('"kernels.h"', '"cuda/kernels.h"')
    entry = """
extern "C" int run(const genfast::cuda::PixelRnnArgs* args, int backward, int processors) {
  host_processors = processors;
  const int error = backward ? genfast::cuda::pixel_rnn_backward(*args) : genfast::cuda::pixel_rnn(*args);
  return error ? -1 : int(host_cluster);
}
"""
    (folder / "kernel.cpp").write_text(text + entry)
    include = [f"-I{HERE / 'host'}", f"-I{SOURCE.parents[1]}"]
    command = ["g++", "-std=c++20", "-O2", "-w", "-shared", "-fPIC", "-pthread", *include]
    subprocess.run([*command, str(folder / "kernel.cpp"), "-o", str(folder / "kernel.so")], check=True)
    return ctypes.CDLL(str(folder / "kernel.so"))


@pytest.fixture
def kernels(library, monkeypatch):
    """The registered CUDA kernels on CPU tensors; ``processors`` and ``clusters`` set and tell how a launch was cut."""
    state = SimpleNamespace(processors=1, clusters=[])

    def call(backward, **fields):
        state.clusters.append(library.run(ctypes.byref(Args(**addresses(fields))), backward, state.processors))

    forward, backward = functools.partial(call, 0), functools.partial(call, 1)
    monkeypatch.setattr(ops.pixel_rnn, "_CUDA", SimpleNamespace(pixel_rnn=forward, pixel_rnn_backward=backward))
    monkeypatch.setattr(ops.pixel_rnn, "_fits", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return state


# Hidden channels around a warp's 32 and a float4's 4; positions around a tile's 8 and 4; one block and clusters.
CASES = [(2, 6, 4, 9, 1), (1, 40, 5, 3, 1), (2, 33, 9, 17, 64), (3, 70, 9, 10, 16), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize(("n", "hidden", "height", "width", "processors"), CASES)
@pytest.mark.parametrize("states", [False, True], ids=["", "states"])
@pytest.mark.parametrize("name", ["row_lstm", "diagonal_lstm"])
def test_they_equal_the_reference(kernels, name, states, n, hidden, height, width, processors):
    kernels.processors = processors
    diagonal = name == "diagonal_lstm"
    taps = 2 if diagonal else 3
    gates = torch.randn(n, 4 * hidden, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(4 * hidden, hidden, taps) / (taps * hidden) ** 0.5
    shape = (hidden,) if diagonal else (hidden, width)
    h0, c0 = (torch.randn(shape) if states else None for _ in range(2))
    op, back = ops.pixel_rnn.OPS[name], ops.pixel_rnn.OPS[f"{name}_backward"]

    def compare(found, expected, allowed):
        assert found.shape == expected.shape
        assert float((found.double() - expected).norm()) <= allowed * float(expected.norm())

    exact = [None if a is None else a.double() for a in (gates, weight, h0, c0)]
    h, kept = op.kernels["cuda"](gates, weight, h0, c0, True)
    expected_h, expected_kept = op.reference(*exact, True)
    compare(h, expected_h, 2e-6)
    compare(kept, expected_kept, 2e-6)
    assert torch.equal(op.kernels["cuda"](gates, weight, h0, c0, False)[0], h)
    grad_h, grad_kept = torch.randn_like(h), torch.randn_like(kept) if states else None
    found = back.kernels["cuda"](grad_h, grad_kept, kept, weight, h0, c0)
    exact_grads = [None if a is None else a.double() for a in (grad_h, grad_kept)]
    for f, e in zip(found, back.reference(*exact_grads, expected_kept, *exact[1:])):
        compare(f, e, 1e-5)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert all(c >= 1 for c in kernels.clusters)
    assert (max(kernels.clusters) > 1) == (processors > 1)


def test_maps_too_wide_for_shared_memory_run_the_reference(kernels, monkeypatch):
    monkeypatch.setattr(ops.pixel_rnn, "_fits", lambda *_: False)
    gates, weight = torch.randn(1, 8, 3, 3), torch.randn(8, 2, 3)
    h, kept = ops.pixel_rnn.OPS["row_lstm"].kernels["cuda"](gates, weight, None, None, True)
    ops.pixel_rnn.OPS["row_lstm_backward"].kernels["cuda"](h, None, kept, weight, None, None)
    assert not kernels.clusters
