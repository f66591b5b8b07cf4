"""The benchmark suite: its cases are comparisons of the same numbers, its files are whole, its table comes from them."""

from __future__ import annotations

import json
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
        "row_lstm", "diagonal_lstm", "pixelcnn train step", "sample pixelcnn", "sample gated_pixelcnn",
        "sample pixelcnnpp", "sample wavenet", "linear", "leaky_relu_bits", "activation_second",
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
