"""Every launcher on fake CUDA tensors, with no GPU; and that the harness sees what it is for."""

from __future__ import annotations

import contextlib
import functools
import gc
import re
from importlib import import_module

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU is visible, on which tests/gpu runs the same calls for real", allow_module_level=True)

import genfast
from tests.kernels import fake_cuda
from tests.kernels.capture_cases import CASES

wrapper = import_module("genfast.ops.invertible_conv1x1")


@pytest.fixture
def gpu():
    with fake_cuda.FakeCuda() as found:
        found.settled = True
        yield found


def said(gpu):
    return [problem.what for problem in gpu.problems]


@pytest.mark.slow
def test_every_op_is_launched_as_a_gpu_takes_it():
    with fake_cuda.FakeCuda() as gpu:
        fake_cuda.check_ops(gpu)
    assert not gpu.problems, "\n".join(map(str, gpu.problems))
    launched = {launch.kernel.fn.__module__.rsplit(".", 1)[-1] for launch in gpu.launches}
    assert launched == set(import_module("genfast.kernels.aot").families())
    engines = {
        "plu_weight",
        "plu_weight_backward",
        "degree_ordered",
        "degree_ordered_backward",
        "pixel_rnn",
        "pixel_rnn_backward",
    }
    assert set(gpu.engines) >= engines or wrapper._CUDA is None


@pytest.mark.slow
def test_layers_steps_and_samplers_are_launched_as_a_gpu_takes_them():
    with fake_cuda.FakeCuda() as gpu:
        fake_cuda.check_cases(gpu)
    assert not gpu.problems, "\n".join(map(str, gpu.problems))


# ---- the tests for a GPU, as far as they go without one ----

ON_A_GPU = [
    "actnorm, ",
    "autoregressive_inverse, ",
    "row_lstm, ",
    "masked_linear, ",
    "ActNorm",
    "PixelCNN sampling, class",
]


@pytest.mark.slow
@pytest.mark.parametrize("start", ON_A_GPU)
def test_the_tests_of_capture_run(start, monkeypatch):
    """All but what they compare: numbers there are none."""
    from tests.gpu import test_capture as tests

    label = next(label for label in tests.CALLS if label.startswith(start))
    monkeypatch.setattr(tests, "close", lambda found, expected: None)
    functions = [getattr(tests, name) for name in dir(tests) if name.startswith("test_")]
    assert len(functions) == 4
    with fake_cuda.FakeCuda() as gpu:
        for function in functions:
            function(label)
    assert not gpu.problems, "\n".join(map(str, gpu.problems))
    assert gpu.launches or gpu.engines


def test_the_tests_of_capture_see_a_copy_from_the_host(monkeypatch):
    from tests.gpu import test_capture as tests
    from tests.kernels.capture_cases import Case

    case = Case(lambda x: [x * torch.tensor([2.0], device="cuda")], [torch.zeros(3)], [])
    monkeypatch.setitem(tests.CALLS, "copies", (None, lambda device: case._replace(inputs=[case.inputs[0].to(device)])))
    monkeypatch.setattr(tests, "close", lambda found, expected: None)
    with fake_cuda.FakeCuda() as gpu:
        tests.test_a_replay_is_what_eager_gives("copies")
        tests.test_the_current_stream_is_used_and_nothing_waits("copies")
    assert [problem.what for problem in gpu.problems] == ["copies host to device in each call"]


def test_the_cuda_sources_take_no_memory_and_wait_for_nothing():
    sources = {p.name: p.read_text() for p in (fake_cuda.ROOT / "csrc" / "cuda").iterdir()}
    assert len(sources) >= 6
    for name, text in sources.items():
        forbidden = re.findall(
            r"cuda(?:Malloc|Free|HostAlloc|Memcpy|Memset|\w*Synchronize|StreamCreate|EventCreate)\w*|cudaStream_t\(0",
            text,
        )
        assert not forbidden, (name, forbidden)
        for launch in re.findall(r"<<<(.*?)>>>", text):
            assert launch.count(",") >= 3, (name, launch)  # grid, block, shared memory, stream
        assert text.count("cudaLaunchKernelEx(") == text.count("config.stream = "), name


# ---- sizes that no test can hold ----


def test_batches_beyond_an_axis_of_the_grid_are_refused(gpu):
    x = torch.empty(65536, 4, 8, device="cuda")
    for call in (lambda: genfast.ops.gram_matrix(x), lambda: genfast.ops.contextual_similarity(x, x)):
        with pytest.raises(ValueError, match="a batch of 65536 samples, expected at most 65535 on a GPU"):
            call()
    genfast.ops.gram_matrix(x[1:])
    assert not gpu.problems


def wide_calls():
    """More than 2^31 elements: as many samples, as one sample, and channels_last."""
    empty = functools.partial(torch.empty, dtype=torch.float16, device="cuda")
    for shape in ((70000, 4, 128, 128), (1, 4, 40000, 20000)):
        for form in (torch.contiguous_format, torch.channels_last):
            x = empty(shape, memory_format=form)
            yield lambda x=x: genfast.ops.actnorm(x, empty(4), empty(4))
            yield lambda x=x: genfast.ops.affine_coupling(x, x, scale="sigmoid")
            yield lambda x=x: genfast.ops.bias_act(x, empty(4), act="lrelu")
            yield lambda x=x: genfast.ops.gated_activation(x)
            yield lambda x=x: genfast.ops.pixel_norm(x)
            yield lambda x=x: genfast.ops.squeeze(x)
            yield lambda x=x: genfast.ops.masked_conv2d(x, empty(4, 4, 3, 3), mask_type="B")
            yield lambda x=x: genfast.ops.invertible_conv1x1(x, empty(4, 4).float())
            yield lambda x=x: genfast.ops.upsample2d(x, torch.ones(4, device="cuda"))
    yield lambda: genfast.ops.rational_quadratic_spline_packed(empty(2**26), empty(2**26, 35), 12, bound=3.0)
    yield lambda: genfast.ops.gram_matrix(empty(2, 512, 2048, 2048))


def test_grids_of_tensors_beyond_two_to_the_31_elements(gpu):
    """That a grid holds them; that their offsets do is what the kernels' tests of 64-bit offsets are about."""
    for call in wide_calls():
        call()
    assert not gpu.problems, "\n".join(map(str, gpu.problems))
    assert len(gpu.launches) > 30


# ---- what the harness sees ----


def test_it_sees_what_waits(gpu):
    x = torch.zeros(3, device="cuda")
    for wait in (lambda: x.sum().item(), lambda: x.cpu(), lambda: x.nonzero(), lambda: bool((x > 0).any()), x.tolist):
        gpu.problems.clear()
        with contextlib.suppress(Exception):  # what depends on values has none to go by
            wait()
        assert said(gpu)[0].startswith("waits for the device"), wait
    gpu.problems.clear()
    torch.cuda.synchronize()
    assert said(gpu) == ["waits for the device: torch.cuda.synchronize"]


def test_it_sees_copies_from_the_host_in_a_call_made_again(gpu):
    for copy in (
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: torch.zeros(2).cuda(),
        lambda: torch.zeros(2, device="cuda").copy_(torch.ones(2)),
        lambda: torch.zeros(2, device="cuda")[torch.tensor([0])],
    ):
        gpu.problems.clear()
        copy()
        assert len(gpu.problems) == 1
        assert said(gpu)[0].startswith("copies host to device")
    gpu.problems.clear()
    gpu.settled = False
    torch.tensor([1.0, 2.0], device="cuda")
    torch.full((1,), 2.0, device="cuda")
    assert not gpu.problems


def test_it_keeps_the_values_of_tables(gpu):
    order = torch.tensor([2, 0, 1]).cuda()
    gpu.problems.clear()
    assert order.argsort()[:2].tolist() == [1, 2]
    assert said(gpu) == ["waits for the device: tolist"]


def test_it_sees_another_device(gpu):
    """The launcher below ``_backend.triton_kernel``, which is what makes the tensors' GPU current."""
    from genfast.kernels import actnorm

    x, vector = torch.zeros(2, 3, 4, device="cuda:1"), torch.ones(3, device="cuda:1")
    actnorm.actnorm(x, vector, vector, False, False)
    assert "actnorm._forward is launched on cuda:0, x is on cuda:1" in said(gpu)
    gpu.problems.clear()
    y, logdet = genfast.ops.actnorm(x, vector, vector)
    assert not gpu.problems
    assert y.device == logdet.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0


def test_it_sees_bad_addresses_streams_and_counts(gpu):
    module = wrapper._CUDA
    if module is None:
        pytest.skip("genfast._cuda is not built")
    stream = torch.cuda.current_stream().cuda_stream
    names = ("perm", "lower", "upper", "sign_s", "log_s", "scale", "bias", "weight", "folded", "logdet")
    tensors = {name: torch.zeros(4, device="cuda") for name in names}
    addresses = {name: t.data_ptr() for name, t in tensors.items()}
    good = {"stream": stream, **addresses, "c": 2, "log_scale": True, "batch": 1, "positions": 1}
    module.plu_weight(**good)
    assert not gpu.problems
    module.plu_weight(**good | {"stream": stream + 64})
    module.plu_weight(**{name: value for name, value in good.items() if name != "positions"})
    module.plu_weight(**good | {"perm": addresses["logdet"] + 4096})
    module.plu_weight(**good | {"positions": 1.5})
    del tensors["sign_s"]
    gc.collect()
    module.plu_weight(**good)
    assert [what.removeprefix("_cuda.plu_weight").lstrip(": ") for what in said(gpu)] == [
        "is launched on another stream than the current one",
        "fields ['positions'] are missing or not its own",
        "is handed an address that is of no tensor",
        "positions is float, expected int",
        "is handed the address of a tensor that is gone",
    ]


def test_it_sees_grids_that_cuda_does_not_take(gpu):
    from genfast.kernels import squeeze

    kernel, x = squeeze._move, torch.zeros(16, device="cuda")
    arguments = [x if name in ("x", "y") else 1 for name in kernel.arg_names]
    constants = {p.name: arguments.pop() for p in reversed(kernel.params) if p.is_constexpr}
    for grid in ((2**31,), (1, 65536), (0,)):
        gpu.problems.clear()
        kernel[grid](*arguments, **constants)
        assert len(gpu.problems) == 1, grid
        assert "grid" in said(gpu)[0]


def test_all_is_as_it_was_afterwards():
    before = torch.cuda.is_available(), torch.cuda.current_stream, torch.autograd._engine_run_backward, wrapper._CUDA
    with fake_cuda.FakeCuda():
        genfast.ops.pixel_norm(torch.zeros(2, 3, device="cuda"))
    assert (
        torch.cuda.is_available(),
        torch.cuda.current_stream,
        torch.autograd._engine_run_backward,
        wrapper._CUDA,
    ) == before
    x = torch.randn(2, 3, requires_grad=True)
    genfast.ops.pixel_norm(x).sum().backward()
    assert x.grad is not None


def test_its_reverse_mode_is_pytorchs():
    """The same gradients as PyTorch's engine gives, on host tensors: sums over paths, broadcasts, unused and double."""
    x, w = (
        torch.randn(4, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    )
    unused = torch.zeros(1, requires_grad=True)

    def both(create_graph):
        y, logdet = genfast.ops.actnorm(x, w, w.square())
        loss = (y * w + y.exp().sum(0)).sum() + logdet.sum()
        return [loss, y], [x, w, unused], create_graph

    for create_graph in (False, True):
        outputs, inputs, _ = both(create_graph)
        seeds = [torch.ones((), dtype=torch.float64), torch.full_like(outputs[1], 0.3)]
        expected = torch.autograd.grad(outputs, inputs, seeds, create_graph=create_graph, allow_unused=True)
        outputs, inputs, _ = both(create_graph)
        found = fake_cuda._run_backward(outputs, seeds, True, create_graph, inputs, allow_unused=True)
        assert found[2] is None
        torch.testing.assert_close(found[:2], expected[:2])
        assert found[0].requires_grad == create_graph


def test_the_cases_name_every_layer():
    named = {name.split(",")[0] for name in CASES}
    without = {
        "AppendOnes",
        "Bijection",
        "ConcatELU",
        "ConditionBias",
        "DownRightShiftedConv2d",
        "DownShiftedConv2d",
        "Shift",
    }
    without |= {
        "DownRightShiftedConvTranspose2d",
        "DownShiftedConvTranspose2d",
        "LevelEmbedding",
        "ScaleLevels",
    }  # in models
    without |= {"CriticStep", "GradientPenalty"}  # critic_step
    assert set(genfast.nn.__all__) - without <= named
