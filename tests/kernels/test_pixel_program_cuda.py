"""The CUDA engine of pixel programs, compiled for the host: it must draw what the CPU's engine draws, without a GPU.

Its body (csrc/cuda/pixel_program.cuh) runs in blocks of emulated threads, through the sampler's own code for a GPU. Not
seen
here: the speed, the registers (test_aot.py tells), and what only hardware does.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from genfast import models
from genfast import nn as gnn
from genfast.sampling import LoweringError, Sampler
from genfast.sampling import sampler as sampling
from genfast.sampling.inputs import Conditions, bind
from genfast.sampling.lowering import lower
from tests.kernels import addresses

ROOT = Path(__file__).parents[2]
POINTERS = ("program", "weights", "statics", "cache", "images", "uniforms", "record", "scratch", "faults")
SIZES = ("code", "weight_floats", "image_floats", "record_size", "n")
FIELDS = [
    *((p, ctypes.c_void_p) for p in POINTERS),
    *((s, ctypes.c_int64) for s in SIZES),
    *((s, ctypes.c_int32) for s in ("first_row", "last_row", "given")),
    ("temperature", ctypes.c_float),
]


class Args(ctypes.Structure):
    """PixelProgramArgs of csrc/cuda/kernels.h."""

    _fields_ = [("stream", ctypes.c_void_p), *FIELDS]


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("pixel_program")]  # one worker builds the emulated kernel


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler (c++, g++ or clang++) on PATH to build the emulated kernel with")
    source, target = ROOT / "tests/kernels/host/pixel_program.cpp", tmp_path_factory.mktemp("host") / "pixel_program.so"
    command = [
        compiler,
        "-std=c++17",
        "-O2",
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
    loaded.pixel_program.restype = ctypes.c_bool
    loaded.pixel_program.argtypes = [ctypes.POINTER(Args), ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    return loaded


@pytest.fixture
def gpu(library, monkeypatch):
    """The GPU's path of the sampler on CPU tensors; ``team`` is (images a block, warps, lanes of a warp, order
    reversed)."""
    state = SimpleNamespace(team=(1, 1, 1, False), launches=[])

    def launch(**fields):
        args = Args(**addresses(fields))
        assert library.pixel_program(ctypes.byref(args), *state.team), "a thread waits for others that never come"
        state.launches.append((args.n, args.first_row, args.last_row))

    monkeypatch.setattr(sampling, "_CUDA", SimpleNamespace(pixel_program=launch))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0, synchronize=lambda: None))
    return state


def one_colour():
    return nn.Sequential(
        gnn.ScaleLevels(5),
        gnn.MaskedConv2d(1, 24, 7, mask_type="A"),
        nn.ReLU(),
        gnn.MaskedConv2d(24, 19, 3, activation="relu"),
        gnn.MaskedConv2d(19, 16, (2, 3), dilation=2),
        nn.Tanh(),
        nn.Conv2d(16, 5, 1),
    )


def three_colours(order):
    options = dict(data_channels=3, group_order=order)
    return nn.Sequential(
        gnn.ScaleLevels(4),
        gnn.MaskedConv2d(3, 33, 3, mask_type="A", **options),
        nn.ELU(),
        gnn.MaskedConv2d(33, 18, 3, **options),
        nn.Sigmoid(),
        gnn.MaskedConv2d(18, 12, 1, **options),
    )


class Colours(nn.Module):
    """Three colours drawn at once, of one type A layer, with what joins, moves and scales maps."""

    def __init__(self):
        super().__init__()
        self.scale, self.first = gnn.ScaleLevels(4), gnn.MaskedConv2d(3, 21, 3, mask_type="A", bias=False)
        self.move, self.elu, self.gate = gnn.Shift(1, 2), gnn.ConcatELU(), gnn.GatedActivation()
        self.wide, self.last = nn.Conv2d(42, 42, 1), nn.Conv2d(63, 12, 1)

    def forward(self, x):
        h = self.first(self.scale(x))
        both = self.elu(h)
        h = h + self.gate(self.wide(both)) * 0.5
        return self.last(torch.cat((self.move(h), both), 1))


class Gated(nn.Module):
    """Gated layers with a condition in both stacks."""

    def __init__(self):
        super().__init__()
        self.scale = gnn.ScaleLevels(4)
        self.first = gnn.GatedMaskedConv2d(1, 12, 5, mask_type="A", context_channels=3)
        self.second = gnn.GatedMaskedConv2d(12, 12, 3, context_channels=3)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x, context):
        x = self.scale(x)
        v, h, skip = self.first(x, x, context)
        _, h, more = self.second(v, h, context)
        return self.last(torch.relu(skip + more) + h)


def plusplus(colours, filters):
    return models.PixelCNNPlusPlus(colours, filters=filters, blocks=1, mixtures=3, levels=16)


def wavenet(context):
    return models.WaveNet(6, 10, 20, layers=3, stacks=1, context_channels=context)


# The network, its levels and head, the image's shape, the condition's shape.
CASES = {
    "one colour": (one_colour, 5, "categorical", (1, 7, 5), None),
    "one pixel": (one_colour, 5, "categorical", (1, 1, 1), None),
    "one column": (one_colour, 5, "categorical", (1, 9, 1), None),
    "three colours": (lambda: three_colours("interleaved"), 4, "categorical", (3, 5, 4), None),
    "three colours, blocked": (lambda: three_colours("blocked"), 4, "categorical", (3, 4, 5), None),
    "colours at once": (Colours, 4, "categorical", (3, 5, 6), None),
    "class": (Gated, 4, "categorical", (1, 6, 5), (3,)),
    "condition map": (Gated, 4, "categorical", (1, 5, 6), (3, 5, 6)),
    "mixture": (lambda: plusplus(3, 7), 16, "logistic_mixture", (3, 8, 4), None),
    "grey mixture": (lambda: plusplus(1, 5), 16, "logistic_mixture", (1, 4, 8), None),
    "sequence": (lambda: wavenet(None), 6, "categorical", (1, 23), None),
    "sequence, class": (lambda: wavenet(4), 6, "categorical", (1, 17), (4,)),
    "sequence, condition map": (lambda: wavenet(4), 6, "categorical", (1, 17), (4, 17)),
    "model": (lambda: models.GatedPixelCNN(3, 12, 2, 3, 4), 4, "categorical", (3, 4, 5), None),
}
TEAMS = {
    "one thread": (1, 1, 1, False),
    "one warp, two images": (2, 1, 4, True),
    "three warps": (1, 3, 8, False),
    "many images": (8, 2, 2, False),
    "as on a GPU": (5, 2, 32, False),
}


def drawn(gpu, case, *, n=5, temperature=1.0, prefix=0, progress=False):
    """Levels and what they were drawn from: (by the CPU's engine, by the other)."""
    build, levels, head, shape, condition = case
    torch.manual_seed(1)
    network = build().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.7)  # so that the levels are far from equally likely
    context = None if condition is None else torch.randn(n, *condition)
    sampler = Sampler(network, levels=levels, head=head)
    uniforms = torch.rand(n, sampler.uniforms_per_pixel(shape[0]), *shape[1:])
    given = torch.randint(levels, (n, shape[0], prefix, *shape[2:]))
    found = []
    for on_gpu in (False, True):
        start = torch.zeros(n, *shape, dtype=torch.int64)
        start[:, :, :prefix] = given
        full = (shape[0], shape[1], shape[2] if len(shape) == 3 else 1)
        conditions = bind("sample", network, context)
        one, dims = conditions.rows(slice(0, 1)), len(shape) - 1
        lowered = lower(network, full, levels=levels, head=head, conditions=one, panel=0 if on_gpu else None, dims=dims)
        program = lowered.program
        record = torch.full((n, program.height, program.width, program.record), float("nan"))
        if on_gpu:
            sampling._to_gpu(program, torch.device("cpu"))
            maps = lowered.statics(conditions)
            sampling._run_on_gpu(program, maps, start, uniforms, prefix, temperature, progress, record)
        else:
            sampler._run(start, uniforms, prefix, conditions, temperature, False, record)
        found.append((start, record))
    return found


@pytest.mark.parametrize("team", TEAMS.values(), ids=TEAMS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_draws_what_the_cpu_draws(gpu, case, team):
    gpu.team = team
    (images, record), (same_images, same_record) = drawn(gpu, case)
    assert torch.equal(same_images, images)
    assert images.unique().numel() > 2 or images.numel() < 20
    torch.testing.assert_close(same_record, record, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("label", ["one colour", "three colours", "class"])
def test_a_whole_block(gpu, label):
    gpu.team = (1, 8, 32, True)
    (images, record), (same_images, same_record) = drawn(gpu, CASES[label], n=1)
    assert torch.equal(same_images, images)
    torch.testing.assert_close(same_record, record, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "team"),
    [
        *((case, (1, 3, 8)) for case in CASES.values()),
        (CASES["three colours"], (3, 2, 32)),
        (CASES["mixture"], (3, 2, 32)),
    ],
    ids=[*CASES, "three colours, full warps", "mixture, full warps"],
)
def test_the_order_of_threads_does_not_matter(gpu, case, team):
    """Whatever runs between two barriers may run in any order: else one is missing."""
    found = []
    for backwards in (False, True):
        gpu.team = (*team, backwards)
        found += drawn(gpu, case, n=3)[1]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("label", ["one colour", "three colours", "mixture", "sequence"])
def test_temperature_and_prefix(gpu, label, temperature):
    gpu.team = (2, 2, 4, False)
    (images, record), (same_images, same_record) = drawn(gpu, CASES[label], temperature=temperature, prefix=3)
    assert torch.equal(same_images, images)
    torch.testing.assert_close(same_record, record, rtol=1e-5, atol=1e-5)


def test_rows_and_waves(gpu, monkeypatch):
    """A long sequence is launched in parts, with progress; images that do not fit come in waves, each its own
    condition."""
    gpu.team = (2, 1, 4, False)
    build, levels, head, _, condition = CASES["sequence, class"]
    one = Conditions(kwargs={"context": torch.zeros(1, 4)})
    program = lower(build(), (1, 150, 1), levels=levels, conditions=one, panel=0, dims=1).program
    monkeypatch.setattr(sampling, "GPU_WAVE", 2 * 4 * program.image_floats)
    (images, _), (same_images, _) = drawn(gpu, (build, levels, head, (1, 150), condition), n=3, progress=True)
    assert torch.equal(same_images, images)
    assert {n for n, _, _ in gpu.launches} == {1, 2}
    assert [last for _, _, last in gpu.launches] == [*range(2, 151, 2)] * 2


def test_no_images(gpu):
    assert drawn(gpu, CASES["one colour"], n=0)[1][0].shape == (0, 1, 7, 5)
    assert not gpu.launches


def test_programs_beyond_32_bits_are_refused():
    program = lower(one_colour(), (1, 4, 4), levels=5, panel=0).program
    program.image_floats = 2**31
    with pytest.raises(LoweringError, match="2147483648 weights or values"):
        sampling._to_gpu(program, torch.device("cpu"))


def test_the_extension_is_missed_by_name(monkeypatch):
    monkeypatch.setattr(sampling, "_CUDA", None)
    program = lower(one_colour(), (1, 4, 4), levels=5, panel=0).program
    images = torch.zeros(1, 1, 4, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="genfast::pixel_program"):
        sampling._run_on_gpu(program, [], images, torch.zeros(1, 1, 4, 4), 0, 1.0, False, None)


@pytest.mark.parametrize("label", ["one colour", "three colours", "mixture"])
def test_what_cannot_be_drawn_is_asserted(gpu, label):
    """Where the CPU's engine raises; a GPU prints the place, and an assertion fails, since nothing waits for it."""
    gpu.team = (2, 2, 4, False)
    build, levels, head, shape, condition = CASES[label]

    def faulty():
        network = build()
        last = [m for m in network.modules() if isinstance(m, nn.Conv2d | gnn.MaskedConv2d)][-1]
        with torch.no_grad():
            last.bias[-1] = float("nan")  # of a level, or a coefficient of a component that need not be drawn
        return network

    case = (faulty, levels, head, shape, condition)
    with pytest.raises(FloatingPointError, match=r"image 0.* at position \(0, 0\)"):
        drawn(gpu, case)
    network = faulty().eval()
    full = (shape[0], shape[1], shape[2])
    program = lower(network, full, levels=levels, head=head, panel=0).program
    sampling._to_gpu(program, torch.device("cpu"))
    images, uniforms = torch.zeros(3, *shape, dtype=torch.int64), torch.rand(3, program.uniforms, *shape[1:])
    with pytest.raises(RuntimeError, match="logits or mixture parameters are not finite"):
        sampling._run_on_gpu(program, [], images, uniforms, 0, 1.0, False, None)
    sampling._run_on_gpu(program, [], images, uniforms, shape[1], 1.0, False, None)  # nothing is drawn
    assert 0 <= int(images.min()) <= int(images.max()) < levels
