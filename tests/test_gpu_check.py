"""``make gpu-check`` without a GPU: its dry run, what it refuses, and its parts on commands that only pretend."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_check, readme_table
from benchmarks.gpu_check import Check, Done
from genfast import _registry, _verify

DEVICE = {"name": "NVIDIA H200", "capability": [9, 0], "torch": "2.11.0"}
ROW = {"device": "cuda", "forward": 1e-7, "backward": 1e-7, "excess": 0.1, "worst": "x", "samples": 3, "error": ""}


def verify_row(op, dtype="float32", passed=True, **more):
    return {"op": op, "backend": "triton", "dtype": dtype, "passed": passed, **ROW, **more}


class Pretend:
    """A runner: by the log's name, what the command writes and how it ends."""

    def __init__(self, **says):
        self.says, self.commands = says, []

    def __call__(self, command, log, seconds, env=None, alive=None):
        self.commands.append(command)
        says = self.says.get(log.stem.replace("-", "_"), {})
        log.write_text(says.get("log", ""))
        if "json" in says:
            option = "--json" if "--json" in command else "--out"
            Path(command[command.index(option) + 1]).write_text(json.dumps(says["json"]))
        return Done(says.get("status", 0), 1.0, log)


def check(tmp_path, runner, **more):
    return Check(tmp_path / "results" / "nvidia-h200.json", tmp_path / "logs", 8.0, dict(DEVICE), run=runner, **more)


def bench(name, op, **providers):
    shared = {"share_of_copy": 0.9, "share_of_matrix_rate": None, "peak_bytes": 1, "median_s": 1.0}
    return {"case": name, "op": op, "providers": {n: shared | {"times_genfast": t} for n, t in providers.items()}}


@pytest.fixture(autouse=True)
def _no_gpu_tool(monkeypatch):
    monkeypatch.setattr(gpu_check, "smi", lambda: dict(gpu_check.MADE_UP))


def test_the_dry_run_goes_through_and_marks_every_row(capsys):
    assert gpu_check.main(["--dry-run", "--parts", "build,table"]) == 0
    said = capsys.readouterr().out
    assert "a dry run" in said
    table = [line for line in said.splitlines() if line.count(gpu_check.UNRUN) >= 5]
    of = gpu_check.families()
    assert {line.split()[0] for line in table} == set(of)
    assert {"affine_coupling", "masked_conv", "pixel_rnn", "pixel_program", "gram_matrix"} <= set(of)
    assert f"{len(of)} things remain unproven" in said


def test_the_dry_run_asks_every_part_for_what_needs_no_gpu(tmp_path, capsys):
    says = {part: {"log": f"{part}\n"} for part in ("tests", "sanitizer", "benchmarks", "tune", "verify")}
    runner = Pretend(**says)
    assert gpu_check.perform(check(tmp_path, runner, dry=True), gpu_check.PARTS) == 0
    words = [" ".join(command) for command in runner.commands]
    assert any("tests.gpu.sanitize --list" in w for w in words)
    assert any("benchmarks --device cuda --list" in w for w in words)
    assert any("--collect-only" in w for w in words)
    runner.says["benchmarks"] = {"status": 1, "log": "AssertionError: no CUDA"}
    assert gpu_check.perform(check(tmp_path, runner, dry=True), ["benchmarks"]) == 1
    assert "AssertionError: no CUDA" in capsys.readouterr().out


def test_without_a_gpu_it_says_why_and_ends(capsys, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(gpu_check, "missing", lambda: ([], []))
    assert gpu_check.main([]) == 1
    said = capsys.readouterr().err
    assert "built without CUDA" in said or "no CUDA GPU is visible" in said


def test_a_missing_package_is_named_with_its_remedy(capsys, monkeypatch):
    there = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_check.importlib.util, "find_spec", lambda name: None if name in ("torch", "sklearn") else there(name)
    )
    assert gpu_check.main([]) == 1
    said = capsys.readouterr().err
    assert "the Python package torch (for everything: a build with CUDA)" in said
    assert "pip install scikit-learn" in said
    hard, soft = gpu_check.missing()
    assert not any("scikit-learn" in line for line in hard)
    assert any("scikit-learn" in line for line in soft)


@pytest.mark.parametrize("words", [["--parts", "verify,nothing"], ["--minutes", "0"], ["--minutes", "many"]])
def test_bad_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(words)
    assert words[0] in capsys.readouterr().err


def test_parts_of_separate_calls_add_up(tmp_path, capsys):
    left = {"op": "squeeze", "device": "cuda", "backend": "triton", "dtype": "float32"}
    found = {"seed": 1, "rows": [verify_row("actnorm"), verify_row("squeeze", "bfloat16")], "left_out": [left]}
    one = check(tmp_path, Pretend(verify={"json": found, "status": 1}))
    assert gpu_check.perform(one, ["verify"]) == 1
    assert "squeeze triton float32" in capsys.readouterr().out
    report = json.loads(one.out.read_text())
    assert report["gpu_check"]["verify"]["left_out"] == [left]
    assert report["gpu_check"]["runs"]["verify"]["before"]["clocks.sm"] == "1980"

    suite = {
        "environment": {"device": "NVIDIA H200"},
        "quick": False,
        "overhead": [],
        "failed": [{"case": "b", "error": "boom"}],
        "cases": [bench("actnorm (1, 2)", "actnorm", reference=4.0, trick=2.5, genfast=1.0)],
        "left_out": ["c"],
    }
    found = {"seed": 2, "rows": [verify_row("squeeze")], "left_out": []}
    two = check(tmp_path, Pretend(verify={"json": found}, benchmarks={"json": suite}))
    assert gpu_check.perform(two, ["verify", "benchmarks", "table"]) == 1
    said = capsys.readouterr().out
    assert "2.50x trick (actnorm (1, 2))" in said
    assert "90% of copy" in said
    assert "benchmarks: b failed: boom" in said
    report = json.loads(two.out.read_text())
    assert report["gpu_check"]["verify"]["left_out"] == []
    assert [(r["op"], r["dtype"]) for r in report["gpu_check"]["verify"]["rows"]] == [
        ("actnorm", "float32"),
        ("squeeze", "bfloat16"),
        ("squeeze", "float32"),
    ]
    assert [c["case"] for c in report["cases"]] == ["actnorm (1, 2)"]
    assert set(report["gpu_check"]["runs"]) == {"verify", "benchmarks", "table"}
    later = suite | {"cases": [bench("b", "b", reference=2.0, genfast=1.0)], "failed": [], "left_out": []}
    assert (
        gpu_check.perform(check(tmp_path, Pretend(benchmarks={"json": later})), ["benchmarks"]) == 1
    )  # c is still missing
    report = json.loads(two.out.read_text())
    assert report["failed"] == []
    assert report["left_out"] == ["c"]
    assert {c["case"] for c in report["cases"]} == {"actnorm (1, 2)", "b"}
    assert [p.name for p in two.out.parent.iterdir()] == ["nvidia-h200.json"]


def test_a_part_that_is_ended_or_wrong_is_told(tmp_path, capsys):
    bad = verify_row(
        "actnorm", passed=False, error="RuntimeError: CUDA error: an illegal memory access was encountered"
    )
    runner = Pretend(
        verify={"json": {"seed": 1, "rows": [bad], "left_out": []}, "status": None}, benchmarks={"status": None}
    )
    one = check(tmp_path, runner)
    assert gpu_check.perform(one, ["verify", "benchmarks", "table"]) == 1
    said = capsys.readouterr().out
    assert "actnorm triton float32: x: RuntimeError: CUDA error: an illegal memory access" in said
    assert "verify: left out: rows, since it was ended at its time" in said
    assert "benchmarks: left out: all" in said
    assert "actnorm: verify: FAIL: actnorm triton float32" in said


def test_what_a_part_leaves_goes_to_the_next(tmp_path, monkeypatch):
    given = {}
    one = check(tmp_path, Pretend())
    for name in ("verify", "tests"):
        monkeypatch.setattr(one, name, lambda seconds, name=name: given.setdefault(name, seconds) and "")
    gpu_check.perform(one, ["verify", "tests"])
    shares = gpu_check.SHARES
    assert given["verify"] == pytest.approx(480 * shares["verify"] / (shares["verify"] + shares["tests"]))
    assert given["tests"] == pytest.approx(480, abs=1)


def test_a_command_and_its_children_end_in_time(tmp_path):
    script = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    begun = time.monotonic()
    done = gpu_check.run([sys.executable, "-c", script], tmp_path / "log", 1.5)
    assert done.status is None
    assert time.monotonic() - begun < 20
    assert done.last() == "begun"
    assert gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log", 60).status == 3


TESTS = """
import os
import pytest
from benchmarks import _gpu_tests

def test_passes(): pass
def test_skips(): pytest.skip("not here")
def test_crashes(): os._exit(7)
def test_spoils():
    _gpu_tests.spoilt = lambda: True
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_after(): assert not _gpu_tests.spoilt()
"""


def test_a_crash_and_a_spoilt_gpu_cost_one_test_each(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    one = check(tmp_path, gpu_check.run)
    by_test, unrun = one.some_tests(path, 0, 1, time.monotonic() + 120)
    assert {n.split("::")[1]: t["outcome"] for n, t in by_test.items()} == {
        "test_passes": "passed",
        "test_skips": "skipped",
        "test_crashes": "crashed",
        "test_spoils": "failed",
        "test_after": "passed",
    }
    assert not unrun
    assert len(list((tmp_path / "logs").glob("test_some-0-*.log"))) == 3


def test_a_test_that_was_not_given_its_time_has_not_run():
    records = [
        {"collected": ["a", "b", "c"]},
        {"start": "a"},
        {"end": "a", "outcome": "passed", "message": "", "seconds": 1.0},
    ]
    late, unrun = gpu_check.outcomes([*records, {"start": "b"}, {"stopped": gpu_check.LATE}])
    assert (list(late), unrun) == (["a"], ["b", "c"])
    hung, unrun = gpu_check.outcomes([*records, {"start": "b"}, {"stopped": "it did not end"}])
    assert hung["b"] == {"outcome": "crashed", "message": "it did not end", "seconds": 0.0}
    assert unrun == ["c"]


README = """x
<!-- results:begin -->
<!-- results:end -->
| operation | reference | CPU kernel | GPU kernel | module |
|---|---|---|---|---|
| `ops.actnorm` | `reference/actnorm.py` | C++ | Triton, not yet run on a GPU | `nn.ActNorm` |
| `ops.squeeze` | `reference/squeeze.py` | C++ | Triton, not yet run on a GPU | - |
| `sampling.Sampler` | `sampling/naive.py` | C++ | CUDA C++, not yet run on a GPU | - |
"""


def test_the_readme_shows_of_a_gpu_what_is_verified_there(tmp_path, monkeypatch):
    environment = {"device": "a CPU", "threads": 2, "versions": {"torch": "2"}, "date": "2026-01-01"}
    cases = [bench(f"{op} (1, 2)", op, reference=4.0, genfast=1.0) for op in ("actnorm", "squeeze")]
    cpu = {"environment": environment, "quick": False, "overhead": [], "cases": cases}
    checks = {
        "device": DEVICE,
        "verify": {"rows": [verify_row("actnorm"), verify_row("squeeze", passed=False)], "left_out": []},
    }
    larger = bench("actnorm 256 MB", "actnorm", reference=3.0, trick=2.0, genfast=1.0)
    gpu = {
        **cpu,
        "cases": [*cases, larger, bench("squeeze 1 GB", "squeeze", reference=3.0, genfast=1.0)],
        "gpu_check": checks,
    }
    (tmp_path / "cpu.json").write_text(json.dumps(cpu))
    (tmp_path / "README.md").write_text(README)
    words = ["readme_table", str(tmp_path / "cpu.json"), "--readme", str(tmp_path / "README.md")]
    monkeypatch.setattr(sys, "argv", words)
    assert readme_table.main() == 0
    without = (tmp_path / "README.md").read_text()
    assert without.count(gpu_check.UNRUN) == 5
    (tmp_path / "a-gpu.json").write_text(json.dumps(gpu))  # sorted before the CPU's, whose table it must not become
    monkeypatch.setattr(sys, "argv", [*words, "--check"])
    assert readme_table.main() == 1
    monkeypatch.setattr(sys, "argv", words)
    assert readme_table.main() == 0
    said = (tmp_path / "README.md").read_text().splitlines()
    (row,) = (line for line in said if "actnorm (1, 2)" in line)
    assert "4.00x, 90% of copy |" in row
    assert any(line.startswith("| actnorm 256 MB") and "3.00x reference, 2.00x trick" in line for line in said)
    assert not any("squeeze 1 GB" in line for line in said)
    assert "| `ops.actnorm` | `reference/actnorm.py` | C++ | Triton, verified on NVIDIA H200 | `nn.ActNorm` |" in said
    assert sum(gpu_check.UNRUN in line for line in said) == 3
    (tmp_path / "a-gpu.json").unlink()
    assert readme_table.main() == 0
    assert (tmp_path / "README.md").read_text() == without


SANITIZED = """========= COMPUTE-SANITIZER
sanitize: actnorm, triton, 4-D, dense
sanitize: done
sanitize: squeeze, triton, by 2, dense
========= Invalid __global__ read of size 4 bytes
=========     at _move+0x120
=========     Address 0x7f is out of bounds
=========
========= Program hit cudaErrorLaunchFailure (error 719)
sanitize: raised RuntimeError: CUDA error: unspecified launch failure
sanitize: nade, triton, one, dense
========= ERROR SUMMARY: 2 errors
"""


def test_findings_belong_to_the_call_they_are_in():
    found = gpu_check.findings(SANITIZED)
    assert found["actnorm, triton, 4-D, dense"]["errors"] == 0
    assert found["squeeze, triton, by 2, dense"]["errors"] == 2
    assert found["squeeze, triton, by 2, dense"]["first"].startswith("Invalid __global__ read")
    assert found["nade, triton, one, dense"]["first"] == "the call did not end"


def test_the_sanitizer_goes_on_after_a_call_that_ends_its_process(tmp_path, monkeypatch, capsys):
    names = [
        "actnorm, triton, 4-D, dense",
        "squeeze, triton, by 2, dense",
        "nade, triton, one, dense",
        "bias_act, triton, x, dense",
    ]
    monkeypatch.setattr(gpu_check, "tool", lambda name: name)
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 2)
    last = f"sanitize: {names[3]}\nsanitize: done\n========= ERROR SUMMARY: 0 errors\n"
    says = {
        f"{kind}_0_{i + 1}": {"log": log, "status": i}
        for kind in ("memcheck",)
        for i, log in enumerate((SANITIZED, last))
    }
    whole = "".join(f"sanitize: {name}\nsanitize: done\n" for name in names)
    runner = Pretend(
        sanitizer={"log": "\n".join(names)}, racecheck_0_1={"log": f"{whole}========= RACECHECK SUMMARY: 0"}, **says
    )
    one = check(tmp_path, runner)
    assert gpu_check.perform(one, ["sanitizer"]) == 1
    assert [c[c.index("--skip") + 1] for c in runner.commands if "memcheck" in c] == ["0", "3"]
    calls = {(c["tool"], c["call"]): c["errors"] for c in one.checks["sanitizer"]["calls"]}
    assert len(calls) == 8
    assert [calls["memcheck", name] for name in names] == [0, 2, 1, 0]
    assert sum(n for (tool, _), n in calls.items() if tool == "racecheck") == 0
    assert "sanitizer: memcheck: squeeze, triton, by 2, dense: 2, Invalid __global__ read" in capsys.readouterr().out
    assert gpu_check.sanitized(one.checks["sanitizer"], {"actnorm"}) == ("memcheck clean, racecheck clean", True)
    assert gpu_check.sanitized(one.checks["sanitizer"], {"squeeze"})[1] is False
    runner.says["racecheck_0_1"] = {"log": whole + "Device not supported"}
    assert gpu_check.perform(one, ["sanitizer"]) == 1
    assert "racecheck did not watch" in capsys.readouterr().out


STEP = "_ZN7genfast4cuda46_GLOBAL__N__15eac8a0_10_pixel_step_cu_5195523f10pixel_stepEPKf"
PTXAS = f"""ptxas info    : Compiling entry function '{STEP}' for 'sm_90'
ptxas info    : Function properties for {STEP}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 2048 bytes smem, 500 bytes cmem[0]
ptxas info    : Compiling entry function '_Z4scanIfEvPT_' for 'sm_90'
ptxas info    : Function properties for _Z4scanIfEvPT_
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_nvcc_is_read():
    first, second = gpu_check.ptxas(PTXAS)
    kernel = {
        "kernel": "pixel_step",
        "family": "pixel_step",
        "arch": "sm_90",
        "registers": 64,
        "shared": 2048,
        "stack": 0,
    }
    assert first == kernel | {"spilled": 0}
    kernel = {"kernel": "scan", "family": "?", "arch": "sm_90", "registers": 255, "shared": 0, "stack": 16}
    assert second == kernel | {"spilled": 20}
    (one,) = gpu_check.worst([first, {**first, "registers": 99, "shared": 1}])
    assert (one["registers"], one["shared"], one["specialisations"]) == (99, 2048, 2)


def test_what_triton_launched_is_read_from_its_cache(tmp_path, monkeypatch):
    aot = pytest.importorskip("genfast.kernels.aot")
    for i, registers in enumerate((40, 60, 0)):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "_forward.cubin").write_text(str(registers))
        (folder / "_forward.json").write_text(json.dumps({"name": "_forward", "shared": 16 * i}))
        (folder / "_forward.ttir").write_text('#loc = loc("/a/b/kernels/actnorm.py":10:0)\nmodule {}')

    def resources(path):
        if path.read_text() == "0":
            raise ValueError("no registers")
        return int(path.read_text()), 0

    monkeypatch.setattr(aot, "resources", resources)
    (kernel,), unread = gpu_check.triton_resources(tmp_path, time.monotonic() + 60)
    expected = {"family": "actnorm", "kernel": "_forward", "registers": 60, "shared": 16, "spilled": 0}
    assert kernel == expected | {"by": "triton", "specialisations": 2}
    assert unread == 1
    assert gpu_check.triton_resources(tmp_path, time.monotonic() - 1) == ([], 3)


CHILD = """
import json, os, sys, time
for line in sys.stdin:
    task = json.loads(line)["task"]
    if task["op"] == "crash":
        print("Segmentation fault", file=sys.stderr)
        os._exit(11)
    if task["op"] == "hang":
        time.sleep(60)
    error = "CUDA error: an illegal memory access" if task["op"] == "spoil" else ""
    row = {**task, "forward": 0.0, "backward": 0.0, "excess": 0.0, "worst": str(os.getpid()), "error": error}
    print(json.dumps(row), flush=True)
"""


def test_a_kernel_that_crashes_hangs_or_spoils_costs_its_row_alone(monkeypatch):
    monkeypatch.setattr(_verify, "CHILD", [sys.executable, "-c", CHILD])
    monkeypatch.setattr(_verify, "PATIENCE", 1.5)
    tasks = [_verify.Task(op, "cuda", "triton", "float32") for op in ("a", "spoil", "b", "crash", "c", "hang", "d")]
    rows = {r.op: r for r in _verify.in_children(tasks, 0, True, 1, time.monotonic() + 60)}
    assert [op for op, r in rows.items() if r.passed] == ["a", "b", "c", "d"]
    assert "illegal memory access" in rows["spoil"].error
    assert rows["crash"].error == "the process ended with 11: Segmentation fault"
    assert rows["hang"].error == "no answer in 2 s"
    assert len({rows[op].worst for op in "abcd"}) == 4
    assert list(_verify.in_children(tasks, 0, True, 2, time.monotonic() - 1)) == []


def test_odd_shapes_find_a_kernel_that_takes_all_for_dense(monkeypatch):
    import torch

    op = _registry.OPS["actnorm"]

    def dense(x, *rest):
        return op.reference(x.as_strided(x.shape, torch.empty(x.shape).stride()), *rest)

    monkeypatch.setitem(op.kernels, "cpu", dense)
    task = _verify.Task("actnorm", "cpu", "cpu", "float32")
    assert _verify.row(task, 0, False).passed
    found = _verify.row(task, 0, True)
    assert not found.passed
    assert found.worst.endswith(("strided", "channels_last"))

    def broken(*args):
        raise RuntimeError("launch failed\nand more")

    monkeypatch.setitem(op.kernels, "cpu", broken)
    found = _verify.row(task, 0, False)
    assert not found.passed
    assert found.error == "RuntimeError: launch failed"


def test_where_plain_pytorch_loses_much_a_kernel_may_lose_a_little_more(monkeypatch):
    import torch

    op, call = _registry.OPS["actnorm"], (None, "dense")
    plain = [(0.0, 0.0)]
    monkeypatch.setattr(_verify, "errors", lambda *args: plain[0])

    def excess(*found):
        return _verify.excess(found, op, call, torch.float32)

    assert excess(2e-6, 1e-5) == (pytest.approx(1), "")
    assert excess(4e-6, 0.0) == (pytest.approx(2), "")
    plain[0] = (1e-6, 0.0)
    assert excess(8e-6, 0.0) == (pytest.approx(0.5), "conditioned")
    assert excess(0.0, 1e-3) == (pytest.approx(100), "")
    plain[0] = (0.0, 0.5)
    assert excess(0.0, 0.6) == (0.0, "untold")
    assert excess(0.0, float("inf"))[0] == float("inf")  # a value that is not finite is told everywhere


def test_a_row_says_what_its_verdict_rests_on(monkeypatch):
    task = _verify.Task("actnorm", "cpu", "reference", "float32")
    monkeypatch.setattr(_verify, "excess", lambda *args: (0.0, "untold"))
    found = _verify.row(task, 0, False)
    assert not found.passed
    assert found.error == "plain PyTorch loses all on every call"
    assert found.remark == f" ({found.samples} of {found.samples} tell nothing)"
    kinds = iter(["conditioned"] + [""] * 999)
    monkeypatch.setattr(_verify, "excess", lambda *args: (0.5, next(kinds)))
    found = _verify.row(task, 0, False)
    assert found.passed
    assert found.remark == f" (1 of {found.samples} calls held to plain PyTorch's loss)"


def test_every_op_has_odd_shapes():
    import torch

    for op in _registry.OPS.values():
        if op.samples is not None and op.name not in ("plu_weight", "style_loss_layers"):  # a square, and lists
            kinds = {
                s.label.split(", ")[-1] for s, _ in _verify.odd(op, list(op.samples(torch.Generator().manual_seed(0))))
            }
            assert {"strided", "batch of 1"} <= kinds, op.name
            assert kinds & {"empty batch", "batch of 37"}, op.name


def test_verify_in_children_keeps_its_rows_and_names_what_it_left_out(tmp_path, capsys):
    path = tmp_path / "rows.json"
    options = dict(device="cpu", dtype="float32", seed=1, odd_shapes=True, json_path=path)
    assert _verify.run(["squeeze"], jobs=1, **options) == 0
    found = json.loads(path.read_text())
    assert found["seed"] == 1
    assert {(r["op"], r["backend"]) for r in found["rows"]} >= {("squeeze", "cpu"), ("squeeze", "reference")}
    assert all(r["passed"] and r["samples"] > 6 for r in found["rows"])
    assert _verify.run(["squeeze"], minutes=1e-9, **options) == 1
    assert json.loads(path.read_text())["left_out"]
    assert "left out: the 1e-09 minutes were over" in capsys.readouterr().out
    with pytest.raises(ValueError, match="jobs=0, expected more than 0"):
        _verify.run(jobs=0)
