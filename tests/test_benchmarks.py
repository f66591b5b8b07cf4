"""The benchmark suite: its cases are comparisons of the same numbers, its files are whole, its table comes from
them."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

import genfast
from benchmarks import __main__ as suite
from benchmarks import (
    _ceilings,
    bench_autoregressive_inverse,
    bench_overhead,
    bench_pixelcnn,
    profiling,
    readme_table,
    test_cases,
)
from benchmarks._case import PROVIDERS, Case, measure
from benchmarks.test_cases import cases


def test_every_family_of_ops_has_a_case():
    names = " ".join(case.name for case in cases())
    for family in (
        "affine_coupling",
        "actnorm",
        "actnorm_conv1x1",
        "squeeze",
        "glow",
        "gated_activation",
        "discretized_logistic_mixture_nll",
        "discretized_logistic_mixture_sample",
        "masked_conv1d",
        "masked_conv2d",
        "row_lstm",
        "diagonal_lstm",
        "nade",
        "nade_sample",
        "pixelcnn train step",
        "sample pixelcnn",
        "sample gated_pixelcnn",
        "sample pixelcnnpp",
        "sample wavenet",
        "gradient_penalty",
        "critic_step",
        "bias_act",
        "pixel_norm",
        "minibatch_stddev",
        "upfirdn2d",
        "modulated_conv2d",
        "interpolate",
        "minibatch_discrimination",
        "sample_norm",
        "spectral_norm",
        "linear",
        "activation",
        "contextual_similarity",
        "diagonal_gaussian",
        "gram_matrix",
        "style_loss",
        "style transfer step",
        "mmd imq",
        "mmd rbf",
        "kernel_distance",
        "nearest_neighbors",
        "autoregressive_inverse",
        "MAF",
        "NSF",
        "rational_quadratic_spline",
        "masked_linear",
        "MADE",
        "accelerate zuko",
        "accelerate nflows",
        "accelerate normflows",
    ):
        assert family in names
    for case in cases():
        assert {"reference", "genfast"} <= set(case.providers)
        assert {provider.split()[0] for provider in case.providers} <= set(PROVIDERS)


def small():
    import torch

    from benchmarks import bench_actnorm

    case = bench_actnorm._case((2, 4, 4, 4), False, True)
    return Case(case.name, {k: v for k, v in case.providers.items() if k != "compile"}, case.bytes, case.flops), torch


def test_measuring_fills_the_schema_and_the_table(tmp_path):
    case, _ = small()
    found = measure(case, rounds=5, budget=1)
    assert set(found["providers"]) == {"reference", "trick", "genfast"}
    assert found["providers"]["genfast"]["times_genfast"] == 1
    assert found["providers"]["reference"]["peak_bytes"] > 0
    overhead = [{"op": "x", "aten": "y", "genfast_s": 2e-6, "aten_s": 1e-6, "over_s": 1e-6}]
    results = {"environment": suite.environment("cpu"), "quick": True, "cases": [found], "overhead": overhead}
    suite.write(tmp_path / "results" / "r.json", results)
    assert json.loads((tmp_path / "results" / "r.json").read_text()) == results
    assert [p.name for p in (tmp_path / "results").iterdir()] == ["r.json"]
    assert case.name in suite.table(results)
    found["op"] = "actnorm"
    drawn = suite.plots(results, tmp_path / "plot.json")
    assert drawn == [tmp_path / "plot.png", tmp_path / "plot" / "actnorm.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    command = [
        sys.executable,
        "-m",
        "benchmarks.readme_table",
        str(tmp_path / "results" / "r.json"),
        "--readme",
        str(readme),
    ]
    assert subprocess.run([*command, "--check"], check=False, capture_output=True).returncode == 1
    subprocess.run(command, check=True)
    assert subprocess.run([*command, "--check"], check=False).returncode == 0
    text = readme.read_text()
    assert case.name in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text


def test_a_provider_with_other_numbers_is_refused():
    case, torch = small()
    real = case.providers["genfast"]

    def wrong():
        work = real()
        return lambda: [2 * t for t in work()]

    case.providers["genfast"] = wrong
    with pytest.raises(AssertionError, match="genfast differs from the reference by"):
        measure(case, rounds=5, budget=1)
    case.providers["genfast"] = lambda: lambda: [torch.zeros(1)]
    with pytest.raises(AssertionError, match="genfast returned 1 tensors"):
        measure(case, rounds=5, budget=1)


def test_the_floor_is_timed_and_not_compared():
    case, torch = small()
    x = torch.randn(64, 64)
    floor = {"floor": lambda: lambda: x @ x}
    found = measure(Case(case.name, {**case.providers, **floor}), rounds=5, budget=1)["providers"]
    for p in found.values():
        assert p["share_of_floor"] == found["floor"]["median_s"] / p["median_s"]
        assert suite.share(p).endswith("of its library calls")


def test_a_provider_that_takes_minutes_is_called_once():
    case, torch = small()
    calls = []
    real = case.providers["reference"]

    def counted():
        work = real()

        def run():
            calls.append(1)
            return work()

        return run

    slow = Case(case.name, case.providers | {"reference": counted}, once=("reference",))
    found = measure(slow, rounds=5, budget=1)["providers"]
    assert len(calls) == 1
    assert found["reference"]["rounds"] == 1
    assert found["reference"]["peak_bytes"] is None
    assert found["reference"]["times_genfast"] > 0


def test_the_25_gaussians_run_side_by_side_on_the_same_numbers(tmp_path, capsys):
    import torch

    from benchmarks import gaussians

    threads = torch.get_num_threads()
    try:
        words = ["--minutes", "0.01", "--turn", "0.2", "--threads", "1", "--hidden", "8", "--out", str(tmp_path)]
        assert gaussians.main(words) == 0
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    (file,) = tmp_path.glob("*.json")
    results = json.loads(file.read_text())
    assert list(results["runs"]) == ["genfast", "plain PyTorch", "vanilla GAN"]
    assert results["weights_apart_after_3_iterations"] < 1e-3
    for name, one in results["runs"].items():
        assert name in said
        assert one["iterations_per_second"] > 0
        seconds = [at["seconds"] for at in one["curve"]]
        assert seconds == sorted(seconds)
        assert seconds[-1] >= 0.6
        assert all(0 <= at["covered"] <= 25 for at in one["curve"])
    assert file.with_suffix(".png").stat().st_size > 10_000
    real = gaussians.data.points("25gaussians")
    assert gaussians.nearest(real.test, real) == pytest.approx(math.sqrt(2 * math.log(2)), rel=0.02)
    falling = [{"seconds": s, "nearest": d} for s, d in enumerate((3.0, 0.9, 2.0, 0.8, 0.7, 0.6))]
    assert gaussians.reached(falling, 1.0) == 3
    assert gaussians.reached(falling, 0.5) is None


def test_new_cases_take_the_place_of_old_ones():
    old = {
        "cases": [{"case": "a x", "v": 1}, {"case": "c", "v": 1}],
        "overhead": [1],
        "environment": "old",
        "gpu_check": 3,
    }
    new = {"cases": [{"case": "c", "v": 2}, {"case": "b", "v": 2}], "overhead": [], "environment": "new"}
    found = suite.merged(old, new)
    assert [(c["case"], c["v"]) for c in found["cases"]] == [("a x", 1), ("b", 2), ("c", 2)]
    assert found["overhead"] == [1]
    assert found["environment"] == "new"
    assert found["gpu_check"] == 3  # of another program


class OnCPU(TorchFunctionMode):
    """What is asked of the device "cuda" is made on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return function(*("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **kwargs)


class FakeGPU:
    """torch.cuda's part in the timing: a clock that works move on, and graphs that remember how often they were
    replayed."""

    def __init__(self, monkeypatch):
        self.now = 0.0  # milliseconds
        self.real = False  # the clock on the wall in its place
        self.events = self.replays = 0
        fake = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
                fake.events += 1

            def record(self):
                self.at = 1e3 * time.perf_counter() if fake.real else fake.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Graph:
            def replay(self):
                fake.replays += 1
                fake.now += self.took

        class Capture:
            def __init__(self, graph):
                self.graph = graph

            def __enter__(self):
                self.begun = fake.now

            def __exit__(self, *_):
                self.graph.took = (fake.now - self.begun) / 2  # no launches

        stream = types.SimpleNamespace(wait_stream=lambda other: None)
        properties = types.SimpleNamespace(L2_cache_size=1 << 20)
        cuda = {
            "Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda s: pytest.MonkeyPatch().context(), "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": self.debug, "current_device": lambda: 0,
            "get_device_properties": lambda device: properties, "memory_allocated": lambda: 100,
            "max_memory_allocated": lambda: 175, "reset_peak_memory_stats": lambda: None,
        }  # fmt: skip
        self.mode = 0
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(_ceilings, "DEVICE", "cuda")
        for name, value in (("COPIED", 1 << 12), ("SIZES", {"cuda": 8, "cpu": 8})):
            monkeypatch.setattr(_ceilings, name, value)

    def debug(self, mode):
        self.mode = mode

    def work(self, milliseconds, value, waits=False):
        def run():
            if waits and self.mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            self.now += milliseconds
            return [value]

        return run


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(_ceilings.shutil, "which", lambda tool: f"/bin/{tool}")
    said = types.SimpleNamespace(stdout="1980, 2619, 1980, 45, 300.5\n")
    monkeypatch.setattr(_ceilings.subprocess, "run", lambda *_, **__: said)
    for name in ("copy_bandwidth", "matrix_rate"):  # without what they remember
        monkeypatch.setattr(_ceilings, name, getattr(_ceilings, name).__wrapped__)
    with OnCPU():
        yield FakeGPU(monkeypatch)


def test_a_gpu_is_timed_by_events_on_inputs_in_turn_and_by_graphs(gpu, monkeypatch):
    monkeypatch.setattr(_ceilings, "copy_bandwidth", lambda: 4e9)
    monkeypatch.setattr(_ceilings, "matrix_rate", {"bfloat16": 1e12}.__getitem__)
    made = {"reference": [], "peer": [], "genfast": []}

    def maker(name, milliseconds, waits=False):
        def make():
            used = [0]
            made[name].append(used)
            plain = gpu.work(milliseconds, torch.ones(3), waits)

            def run():
                used[0] += 1
                return plain()

            return run

        return make

    providers = {
        "reference": maker("reference", 0.3),
        "peer": maker("peer", 4.0, True),
        "genfast": maker("genfast", 0.1),
    }
    case = Case("c", providers, bytes=1 << 20, flops=1 << 20, dtype="bfloat16")
    found = measure(case, rounds=4, budget=1)
    # Four times the cache passes between two uses of a set.
    assert found["sets"] == 5
    for sets in made.values():
        assert len(sets) == 5
        used = [used for (used,) in sets]
        assert min(used) >= 4
        assert max(used) - min(used) <= 4  # the first is called for its result, its capture and its memory
    p = found["providers"]
    assert p["genfast"]["median_s"] == pytest.approx(1e-4)
    assert p["reference"]["times_genfast"] == pytest.approx(3)
    assert p["peer"]["times_genfast"] == pytest.approx(40)
    assert p["genfast"]["graph_s"] == pytest.approx(5e-5)
    assert "graph_s" not in p["peer"]  # 4 ms are no small launch
    assert p["genfast"]["peak_bytes"] == 75
    assert p["genfast"]["share_of_copy"] == pytest.approx((1 << 20) / 1e-4 / 4e9)
    assert p["genfast"]["share_of_matrix_rate"] == pytest.approx((1 << 20) / 1e-4 / 1e12)
    clocks = {
        "clocks.sm": 1980.0,
        "clocks.mem": 2619.0,
        "clocks.max.sm": 1980.0,
        "temperature.gpu": 45.0,
        "power.draw": 300.5,
    }
    assert found["clocks"] == [clocks] * 2
    results = {"environment": {"device": "fake"}, "cases": [found], "overhead": []}
    assert "graph ms" in suite.table(results)


def test_what_waits_for_the_device_is_not_made_a_graph(gpu, monkeypatch):
    monkeypatch.setattr(_ceilings, "copy_bandwidth", lambda: 1e9)
    one = torch.ones(2)
    providers = {"reference": lambda: gpu.work(0.3, one, waits=True), "genfast": lambda: gpu.work(0.1, one)}
    found = measure(Case("c", providers, bytes=4 << 20), rounds=2, budget=1)
    assert found["uncaptured"] == {"reference": "RuntimeError: called a synchronizing CUDA operation"}
    assert found["sets"] == 1
    assert gpu.mode == 0
    assert set(found["providers"]) == {"reference", "genfast"}


def test_how_many_sets_leave_a_cache_behind(gpu):
    assert [_ceilings.sets(n) for n in (0, 1, 1 << 20, 3 << 20, 4 << 20, 1 << 30)] == [1, 64, 5, 3, 1, 1]


def test_ceilings_of_a_gpu(gpu, monkeypatch):
    monkeypatch.setattr(_ceilings, "seconds", lambda work, calls=1: work() is None or 1e-3)
    found = _ceilings.measured()
    assert found["copy_bandwidth"] == pytest.approx(2 * _ceilings.COPIED / 1e-3)
    assert found["matrix_rate"] == {kind: pytest.approx(2 * 8**3 / 1e-3) for kind in ("float32", "tf32", "bfloat16")}
    assert found["l2_bytes"] == 1 << 20
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_clocks_that_cannot_be_read_are_none(gpu, monkeypatch):
    for said in ("", "[N/A], 1, 1, 1, 1"):
        monkeypatch.setattr(_ceilings.subprocess, "run", lambda *_, said=said, **__: types.SimpleNamespace(stdout=said))
        assert _ceilings.clocks() is None
    monkeypatch.setattr(_ceilings.shutil, "which", lambda tool: None)
    assert _ceilings.clocks() is None


def test_an_error_that_a_process_does_not_survive_ends_it(gpu, monkeypatch, tmp_path):
    def synchronize():
        raise RuntimeError("an illegal memory access was encountered")

    def leave(status):
        raise SystemExit(status)

    def work():
        raise ValueError("the case")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(test_cases, "LAST_WORDS", str(tmp_path / "words"))
    with pytest.raises(ValueError, match="the case"):
        test_cases._guarded(work)
    assert not (tmp_path / "words").exists()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(test_cases.os, "_exit", leave)
    with pytest.raises(SystemExit):
        test_cases._guarded(work)
    assert (tmp_path / "words").read_text().startswith("ValueError: the case\n")


def test_products_are_taken_as_a_case_says():
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32, convolution.benchmark
    for dtype, wanted in (("float32", False), ("tf32", True), ("bfloat16", False)):
        with _ceilings.products(dtype):
            assert (matmul.allow_tf32, convolution.allow_tf32, convolution.benchmark) == (wanted, wanted, True)
    assert (matmul.allow_tf32, convolution.allow_tf32, convolution.benchmark) == before


def test_the_overhead_of_launches_is_measured_on_the_gpu(gpu, monkeypatch):
    monkeypatch.setattr(bench_overhead.timeit, "repeat", lambda f, setup, number, repeat: [number * 1e-6])
    assert {o["within_limit"] for o in bench_overhead.measure()} == {True}


@pytest.mark.slow
def test_who_lacks_memory_is_named_and_the_others_are_compared():
    right, wrong = torch.ones(3), torch.full((3,), 2.0)

    def raises(error):
        def make():
            raise error

        return make

    providers = {
        "reference": raises(torch.OutOfMemoryError("CUDA out of memory")),
        "compile": raises(MemoryError()),
        "trick": lambda: lambda: [right],
        "peer": lambda: lambda: [wrong],
        "graph": raises(ValueError("no such thing")),
        "genfast": lambda: lambda: [right],
    }
    found = measure(Case("c", providers), rounds=1, budget=0)
    assert set(found["providers"]) == {"trick", "genfast"}
    assert found["absent"]["reference"] == found["absent"]["compile"] == "out of memory"
    assert "peer differs from the reference by" in found["absent"]["peer"]
    assert found["absent"]["graph"] == "failed: ValueError: no such thing"
    results = {"environment": {"device": "here"}, "cases": [found], "overhead": [], "failed": []}
    assert "reference: out of memory" in suite.table(results)
    assert suite.failures(results) == 2
    with pytest.raises(ValueError, match="no such thing"):
        measure(Case("c", {"reference": providers["trick"], "genfast": providers["graph"]}), rounds=1, budget=0)
    alone = measure(Case("c", {**providers, "genfast": providers["compile"]}), rounds=1, budget=0)
    assert alone["providers"]["trick"]["times_genfast"] is None
    assert "genfast: out of memory" in suite.table({"cases": [alone], "overhead": []})


def test_compiled_rivals_and_late_ones_are_left_out():
    providers = {name: lambda: lambda: None for name in ("reference", "compile", "compile where", "trick", "genfast")}
    assert set(measure(Case("c", providers), 1, 0, compiled=False)["providers"]) == {"reference", "trick", "genfast"}
    late = measure(Case("c", providers), 1, 0, cap=-1)
    assert set(late["providers"]) == {"reference", "genfast"}
    assert late["absent"]["trick"] == "left out: the case's time was up"


def test_a_part_stands_for_the_whole():
    def make():
        def run():
            return None

        run.part = 2, 8
        return run

    ticks = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ceilings.time, "perf_counter", lambda: float(next(ticks)))
        found = measure(Case("c", {"reference": make, "genfast": lambda: lambda: None}), rounds=1, budget=1e9)
    assert found["providers"]["reference"]["times_genfast"] == 4
    assert found["providers"]["reference"]["part"] == [2, 8]
    assert "reference (2 of 8 steps, extrapolated)" in suite.table({"cases": [found], "overhead": []})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda layers: layers(genfast.models.PixelCNN)(3, 6, 2, 3, levels=4), (3, 3, 4)),
        (lambda layers: layers(genfast.models.PixelCNNPlusPlus)(1, 4, 1, 2, levels=16), (1, 4, 4)),
        (lambda layers: layers(genfast.models.WaveNet)(8, 4, 4, 2, 1), (1, 9)),
    ],
)
def test_naive_sampling_as_a_graph_draws_what_the_engine_draws(gpu, monkeypatch, build, shape):
    monkeypatch.setattr(bench_pixelcnn, "captured", lambda works: lambda: [work() for work in works])
    monkeypatch.setattr(_ceilings, "matrix_rate", lambda dtype: 1e12)
    gpu.real = True
    case = bench_pixelcnn._gpu_sampling("x", build, 2, shape, steps=5, tf32=True)
    found = measure(case, rounds=1, budget=0)
    assert found["absent"] == {}
    assert list(found["providers"]) == ["reference", "graph", "graph tf32", "genfast"]
    assert found["providers"]["graph"]["part"] == [5, math.prod(shape[1:])]
    assert "times" in case.notes["reference"]


def test_a_flow_is_sampled_as_a_graph(gpu, monkeypatch):
    monkeypatch.setattr(bench_autoregressive_inverse, "captured", lambda works: lambda: [work() for work in works])
    monkeypatch.setattr(_ceilings, "matrix_rate", lambda dtype: 1e12)
    gpu.real = True
    case = bench_autoregressive_inverse._sampling(4, 1, (8,), 3, quick=False)
    found = measure(case, rounds=1, budget=0)
    assert {"reference", "trick", "graph", "genfast"} <= set(found["providers"])
    assert set(found["absent"]) <= {"peer"}


def test_the_cases_of_a_gpu_are_made_without_one(monkeypatch):
    monkeypatch.setattr(_ceilings, "DEVICE", "cuda")
    here = Path(suite.__file__).parent
    found = {
        p.stem.removeprefix("bench_"): runpy.run_path(str(p)).get("CASES", []) for p in sorted(here.glob("bench_*.py"))
    }
    first = {(op, case.dtype) for op, cases in found.items() for case in cases if case.priority == 0}
    for op in ("affine_coupling", "spline"):
        assert {(op, "float32"), (op, "bfloat16")} <= first
    for op in ("masked_conv", "masked_linear", "gradient_penalty", "gram_matrix"):
        assert {(op, "tf32"), (op, "bfloat16")} <= first
    names = [case.name for cases in found.values() for case in cases]
    assert len(set(names)) == len(names)
    for wanted in ("(1, 512, 256, 256)", "1024 of 1x28x28", "(4, 2048, 64, 64)", "5 x 512-512, 1024 of 64"):
        assert any(wanted in name for name in names)


SUITE = """
import json, os, time
from pathlib import Path
import pytest

def case(name):
    providers = {"genfast": {"median_s": 1.0, "times_genfast": 1.0, "peak_bytes": None, "share_of_copy": None,
                             "share_of_matrix_rate": None}}
    return json.dumps({"case": {"case": name, "op": "x", "providers": providers, "absent": {}, "notes": {}}})

def test_ceilings(record_property):
    record_property("result", json.dumps({"ceilings": {"copy_bandwidth": 1.0}}))

@pytest.mark.parametrize("name", ["good", "bad", "crashes", "late", "last"])
def test_case(name, record_property):
    if name == "bad":
        raise AssertionError("bad: genfast differs from the reference")
    if name == "crashes":
        Path(os.environ["GENFAST_BENCH_LAST_WORDS"]).write_text("where it stood")
        os._exit(1)
    if name == "late":
        pytest.skip("time is up")
    record_property("result", case(name))
"""


def test_a_case_that_fails_or_takes_its_process_with_it_leaves_the_others(tmp_path):
    file = tmp_path / "test_suite.py"
    file.write_text(SUITE)
    code = (
        "import sys, pathlib; from benchmarks import __main__ as s; s.CASES = pathlib.Path(sys.argv.pop(1)); "
        "sys.exit(s.main())"
    )
    out = tmp_path / "results" / "here.json"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file), "--out", str(out), "--minutes", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert sorted(c["case"] for c in results["cases"]) == ["good", "last"]
    assert results["ceilings"] == {"copy_bandwidth": 1.0}
    assert results["left_out"] == ["late"]
    failed = {f["case"]: f["error"] for f in results["failed"]}
    assert set(failed) == {"bad", "crashes"}
    assert "differs" in failed["bad"]
    assert failed["crashes"].endswith("\nwhere it stood")
    for said in ("FAILED bad", "FAILED crashes", "left out, time was up: 1 cases: late"):
        assert said in done.stdout
    assert (tmp_path / "results" / "here" / "x.png").exists()
    assert sorted(p.name for p in out.parent.iterdir()) == ["here", "here.json", "here.png"]


def test_a_profile_names_the_costs_and_keeps_the_trace(tmp_path, capsys):
    assert profiling.run("squeeze", "cpu", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "genfast::squeeze" in said
    (trace,) = (tmp_path / "out").iterdir()
    assert trace.name == "profile-squeeze-cpu.json"
    assert any(e.get("name", "").startswith("genfast::") for e in json.loads(trace.read_text())["traceEvents"])
    rows = profiling.costs(profiling.profiled(small()[0]), "cpu")
    names = {name for name, *_ in rows}
    # The forward too, which torch.library runs under another name.
    assert {"genfast::actnorm", "genfast::actnorm_backward"} <= names
    assert "GeneratedBackwardFor_genfast_actnorm_default" not in names
    assert {count for name, _, _, count in rows if name.startswith("genfast::")} == {profiling.CALLS}
    assert [seconds for _, seconds, _, _ in rows] == sorted((seconds for _, seconds, _, _ in rows), reverse=True)
    assert sum(share for _, _, share, _ in rows) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"--profile 'nope': expected an op, .*affine_coupling.*upfirdn2d"):
        profiling.chosen(cases(), "nope")
    assert profiling.chosen(cases(), "sample_norm (256, 2)").name == "sample_norm (256, 2)"


def test_the_kernels_of_a_gpu_are_ranked():
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(key, kind, microseconds, count):
        return types.SimpleNamespace(key=key, device_type=kind, self_device_time_total=microseconds, count=count)

    events = [event("aten::mm", cpu, 90.0, 2), event("small", cuda, 10.0, 4), event("gemm", cuda, 30.0, 2)]
    found = profiling.costs(types.SimpleNamespace(key_averages=lambda: events), "cuda")
    assert found == [("gemm", pytest.approx(3e-5), 0.75, 2), ("small", pytest.approx(1e-5), 0.25, 4)]


def test_a_large_trace_is_packed(tmp_path, monkeypatch):
    import gzip

    monkeypatch.setattr(profiling, "LARGE", 10)
    trace = types.SimpleNamespace(export_chrome_trace=lambda path: Path(path).write_text('{"traceEvents": []}'))
    found = profiling.write(trace, tmp_path / "t.json")
    assert found == tmp_path / "t.json.gz"
    assert json.loads(gzip.decompress(found.read_bytes())) == {"traceEvents": []}
    assert list(tmp_path.iterdir()) == [found]


def test_plots_are_drawn_again_from_a_file(tmp_path, capsys, monkeypatch):
    provider = {"times_genfast": 1.0, "median_s": 1e-3}
    cases = [
        {
            "case": "actnorm (64, 48, 16, 16)",
            "providers": {"reference": {"times_genfast": 40.0, "median_s": 1.0}, "genfast": provider},
        },
        {"case": "new thing", "providers": {"genfast": provider}, "absent": {"reference": "out of memory"}},
    ]
    (tmp_path / "r.json").write_text(json.dumps({"environment": {"device": "here"}, "cases": cases}))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--plot-only", str(tmp_path / "r.json")])
    assert suite.main() == 0
    drawn = ["r.png", "r/actnorm.png", "r/new.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in drawn]
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--plot-only", str(tmp_path / "no.json")])
    with pytest.raises(SystemExit):
        suite.main()
    assert "there is no such file" in capsys.readouterr().err


def test_the_table_of_small_flows_leaves_out_what_is_not_installed():
    from benchmarks import small_flows

    times = {"default Adam": 4.0, "fused Adam": 3.0, "genfast's Adam": 2.0, "log_prob": 1.0}
    of = {"zuko": times, "zuko accelerated": {k: v / 2 for k, v in times.items()}, "genfast": times}
    (row,) = small_flows.rows({"a flow": of})
    assert row == ["a flow", "2.00", "2.00x", "1.50x", "-", "2.00x", "4.00x", "1.00x", "-"]
    (row,) = small_flows.rows({"a flow": of | {"flowjax": {"default Adam": 5.0, "log_prob": 0.5}}})
    assert row[4] == "2.50x"
    assert row[8] == "0.50x"
