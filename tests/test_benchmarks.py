"""The benchmark suite: its cases are comparisons of the same numbers, its files are whole, its table comes from them."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

from benchmarks import __main__ as suite
from benchmarks import readme_table
from benchmarks._case import Case, measure
from benchmarks.test_cases import cases


def test_every_family_of_ops_has_a_case():
    names = " ".join(case.name for case in cases())
    for family in (
        "affine_coupling", "actnorm", "actnorm_conv1x1", "squeeze", "glow", "gated_activation",
        "discretized_logistic_mixture_nll", "discretized_logistic_mixture_sample", "masked_conv1d", "masked_conv2d",
        "row_lstm", "diagonal_lstm", "nade", "nade_sample", "pixelcnn train step", "sample pixelcnn", "sample gated_pixelcnn",
        "sample pixelcnnpp", "sample wavenet", "gradient_penalty", "critic_step", "bias_act", "pixel_norm", "minibatch_stddev",
        "upfirdn2d", "modulated_conv2d", "interpolate", "minibatch_discrimination", "sample_norm", "spectral_norm", "linear",
        "activation", "contextual_similarity", "diagonal_gaussian", "gram_matrix", "style_loss", "style transfer step",
        "mmd imq", "mmd rbf", "kernel_distance", "nearest_neighbors", "autoregressive_inverse", "MAF", "NSF",
        "rational_quadratic_spline", "masked_linear", "MADE", "accelerate zuko", "accelerate nflows", "accelerate normflows",
    ):  # fmt: skip
        assert family in names
    for case in cases():
        assert {"reference", "genfast"} <= set(case.providers)


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
    suite.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    command = [sys.executable, "-m", "benchmarks.readme_table", str(tmp_path / "results" / "r.json"), "--readme", str(readme)]
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
    old = {"cases": [{"case": "a x", "v": 1}, {"case": "c", "v": 1}], "overhead": [1], "environment": "old"}
    new = {"cases": [{"case": "c", "v": 2}, {"case": "b", "v": 2}], "overhead": [], "environment": "new"}
    found = suite.merged(old, new)
    assert [(c["case"], c["v"]) for c in found["cases"]] == [("a x", 1), ("b", 2), ("c", 2)]
    assert found["overhead"] == [1]
    assert found["environment"] == "new"
