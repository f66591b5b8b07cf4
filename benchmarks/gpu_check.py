"""``make gpu-check``: everything that only a GPU can prove, in eight minutes and in parts;
``python -m benchmarks.gpu_check``.

    build       what the machine has and lacks; genfast._cpu and genfast._cuda in place, registers and spills as nvcc
    tells verify      every op, backend and dtype over odd shapes against float64 (genfast verify --device cuda)
    tests       tests/gpu
    sanitizer   compute-sanitizer's memcheck and racecheck over small calls of every kernel
    benchmarks  python -m benchmarks --device cuda, one case of each op first
    tune        python -m benchmarks.tune; only where it is named
    table       what the Triton kernels came to in registers, one row per operation, and what remains unproven

Each part has its share of the minutes, and what an earlier one leaves; one that would run over is stopped, and says
what it left out. What is found goes to benchmarks/results/DEVICE.json, part by part, so that parts run in several calls
add up. Clocks are read and never set. Nothing is downloaded.

``--dry-run`` goes through the parts with a made-up device and no GPU, as far as each goes without one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Of the minutes. What a part does not use, the next may.
SHARES = {"build": 0.13, "verify": 0.2, "tests": 0.25, "sanitizer": 0.14, "benchmarks": 0.25, "table": 0.03}
PARTS = (*list(SHARES)[:-1], "tune", "table")
UNRUN = "not yet run on a GPU"
BATCH = 120  # tests of a process
LATE = "its time was over"
HANGS = 150.0  # seconds without a word after which a test is ended
# What is imported, what pip calls it, and what for.
PACKAGES = {
    "torch": ("torch", "everything: a build with CUDA"),
    "triton": ("triton", "the Triton kernels"),
    "numpy": ("numpy", "genfast"),
    "safetensors": ("safetensors", "genfast"),
    "PIL": ("pillow", "genfast"),
    "tqdm": ("tqdm", "genfast"),
    "pybind11": ("pybind11", "the build"),
    "setuptools": ("setuptools", "the build"),
    "pytest": ("pytest", "the tests and the benchmarks"),
    "hypothesis": ("hypothesis", "the tests"),
    "pytest_benchmark": ("pytest-benchmark", "the benchmarks"),
    "xdist": ("pytest-xdist", "the benchmarks"),
    "tabulate": ("tabulate", "the tables"),
    "matplotlib": ("matplotlib", "the plots"),
    "sklearn": ("scikit-learn", "the benchmarks on digits"),
}
SMI = ("name", "driver_version", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
MADE_UP = {
    "name": "NVIDIA H200",
    "driver_version": "580.159.04",
    "clocks.sm": "1980",
    "clocks.mem": "3201",
    "temperature.gpu": "35",
    "power.draw": "120.00",
}
PROBE = """
import importlib.metadata, importlib.util, json, platform, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "available": torch.cuda.is_available()}
found |= {"python": platform.python_version()}
found |= {"triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None}
if found["available"]:
    p = torch.cuda.get_device_properties(0)
    found |= {"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory, "l2": p.L2_cache_size,
              "multiprocessors": p.multi_processor_count}
print(json.dumps(found))
"""


# The modules of tests/gpu skip themselves where PyTorch sees no GPU; for their collection it sees one.
COLLECT = """
import pytest, sys, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["tests/gpu", "--collect-only", "-q", "-p", "no:cacheprovider", "--override-ini", "addopts="]))
"""


class Stop(Exception):
    """Nothing can be run; the message says why and what to do."""


@dataclass(frozen=True)
class Done:
    """What a command came to. ``status`` is None where it was ended for lack of time or of words."""

    status: int | None
    seconds: float
    log: Path

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def last(self, lines: int = 3) -> str:
        return " | ".join(self.text.strip().splitlines()[-lines:])[-500:]


def run(
    command: Sequence[str], log: Path, seconds: float, env: Mapping[str, str] | None = None, alive: Path | None = None
) -> Done:
    """Runs a command, all that it says into ``log``; ends it and its children after ``seconds``, or HANGS after the
    last change of ``alive``."""
    begun = time.monotonic()
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = None
            while status is None and time.monotonic() - begun < seconds:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(timeout=min(1.0, max(0.01, seconds - (time.monotonic() - begun))))
                if (
                    alive is not None
                    and time.time() - (alive.stat().st_mtime if alive.exists() else time.time()) > HANGS
                ):
                    break
        finally:
            for how in (signal.SIGTERM, signal.SIGKILL):
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, how)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=5)
    return Done(status, time.monotonic() - begun, log)


def smi() -> dict[str, str]:
    """The first GPU as nvidia-smi tells of it now; empty where it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(SMI, (value.strip() for value in said.splitlines()[0].split(",")))) if said.strip() else {}


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or where the toolkit usually is."""
    homes = [os.environ.get(v) for v in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    beside = [str(Path(home, "bin", name)) for home in homes if home]
    return next((found for found in (shutil.which(n) for n in (name, *beside)) if found), None)


def missing() -> tuple[list[str], list[str]]:
    """What the machine lacks, with how to get it: (without which nothing runs, without which a part is less)."""
    lacks = {n: p for n, p in PACKAGES.items() if importlib.util.find_spec(n) is None}
    hard = [
        f"the Python package {pip} (for {why}): {sys.executable} -m pip install {pip}" for pip, why in lacks.values()
    ]
    soft = [
        line for line, name in zip(hard, lacks) if name in ("hypothesis", "matplotlib", "sklearn", "pytest_benchmark")
    ]
    hard = [line for line in hard if line not in soft]
    if tool("nvcc") is None:
        hard.append("nvcc (for genfast._cuda): install the CUDA toolkit, and put its bin on PATH or set CUDA_HOME")
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        hard.append("a C++ compiler (for the build and for Triton): Debian: apt-get install g++")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        hard.append("Python's C headers (for the build and for Triton): Debian: apt-get install python3-dev")
    if tool("compute-sanitizer") is None:
        soft.append("compute-sanitizer (for the part sanitizer): it comes with the CUDA toolkit")
    return hard, soft


def probe(python: str = sys.executable) -> dict[str, Any]:
    """The GPU as PyTorch sees it, from a process of its own.

    Raises:
        Stop: there is none, or PyTorch does not import.
    """
    done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Stop(f"{python} does not import torch: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout)
    if not found["available"]:
        if found["cuda"] is None:
            raise Stop(
                f"this PyTorch ({found['torch']}) is built without CUDA; install one with it, and run on a GPU machine"
            )
        seen = "nvidia-smi sees one, so the driver may be too old" if smi() else "nvidia-smi sees none either"
        raise Stop(f"no CUDA GPU is visible to PyTorch {found['torch']} (CUDA {found['cuda']}); {seen}")
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of JSON in a file that may still be written, or broke off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


# ---- what is found: pure functions over the report ----


def ptxas(text: str) -> list[dict[str, Any]]:
    """Kernels of nvcc -Xptxas -v: architecture, registers, shared and stack memory, spilled bytes."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        if m := re.search(r"Compiling entry function '(\w+)' for '(sm_\w+)'", line):
            found.append({"kernel": m[1], "arch": m[2], "registers": 0, "shared": 0, "stack": 0, "spilled": 0})
        elif found and (
            m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ):
            if not found[-1]["registers"]:  # a device function's own line comes after its kernel's
                found[-1] |= {"stack": int(m[1]), "spilled": int(m[2]) + int(m[3])}
        elif found and (m := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[-1] |= {"registers": int(m[1]), "shared": int(shared[1]) if shared else 0}
    for kernel in found:
        file = re.search(r"_\d+_(\w+?)_cu_", kernel["kernel"])  # of a kernel in a namespace without a name
        kernel |= {"kernel": demangled(kernel["kernel"]), "family": file[1] if file else "?"}
    return found


def worst(kernels: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The most of each figure over a kernel's specialisations, which are many."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for k in kernels:
        one = found.setdefault((k["family"], k["kernel"]), {**k, "specialisations": 0})
        one |= {what: max(one[what], k[what]) for what in ("registers", "shared", "spilled")}
        one["specialisations"] += 1
    return list(found.values())


def demangled(name: str) -> str:
    """What a mangled C++ name's kernel is called, without its namespaces and arguments."""
    words, rest = [name], re.sub(r"^_ZN?", "", name)
    while m := re.match(r"\d+", rest):
        end = m.end() + int(m[0])
        words.append(rest[m.end() : end])
        rest = rest[end:]
    return words[-1]


def findings(text: str) -> dict[str, dict[str, Any]]:
    """By call of tests.gpu.sanitize, what compute-sanitizer said in between: its number of findings, the first of
    them."""
    found: dict[str, dict[str, Any]] = {}
    now = ""
    for line in text.splitlines():
        if line.startswith("sanitize: ") and not line.startswith(("sanitize: done", "sanitize: raised")):
            now = line.removeprefix("sanitize: ").strip()
            found[now] = {"errors": 0, "first": "", "ended": False}
        elif line.startswith("sanitize: "):
            found[now]["ended"] = True
            if line.startswith("sanitize: raised") and not found[now]["first"]:
                found[now] |= {"errors": found[now]["errors"] + 1, "first": line.removeprefix("sanitize: raised ")}
        elif (
            re.match(
                r"=+ (Invalid|Misaligned|Program hit|Error:|Warning: Race|Race|Potential|Uninit|Barrier|Unknown)", line
            )
            and now
        ):
            found[now]["errors"] += 1
            found[now]["first"] = found[now]["first"] or line.lstrip("= ")
    for at in found.values():
        if not at["ended"]:
            at |= {"errors": at["errors"] + 1, "first": at["first"] or "the call did not end"}
    return found


def outcomes(records: Iterable[Mapping[str, Any]]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Of a file's tests: (outcome by test, collected ones that were not run). One that began and did not end has
    crashed, or
    was ended with the process: for want of time, and then it has not run."""
    found: dict[str, dict[str, Any]] = {}
    collected: list[str] = []
    for r in records:
        if "collected" in r:
            collected = collected or r["collected"]
        elif "start" in r:
            found[r["start"]] = {"outcome": "crashed", "message": "the process ended in it", "seconds": 0.0}
        elif "end" in r:
            found[r["end"]] = {k: r[k] for k in ("outcome", "message", "seconds")}
        elif "stopped" in r and found:
            last = next(reversed(found))
            if found[last]["outcome"] == "crashed":
                found[last]["message"] = r["stopped"]
            if found[last]["outcome"] == "crashed" and r["stopped"] == LATE:
                del found[last]
    return found, [test for test in collected if test not in found]


def merged_rows(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]], keys: Sequence[str]) -> list[Any]:
    """The old rows with the new ones in the place of those of the same keys."""
    rows = {tuple(r[k] for k in keys): r for r in old}
    rows |= {tuple(r[k] for k in keys): r for r in new}
    return list(rows.values())


def families() -> dict[str, list[str]]:
    """The operations by the name that they have in every room: the ops of each that run on a GPU and can be
    verified."""
    from genfast._registry import OPS

    found: dict[str, list[str]] = {}
    for op in OPS.values():
        if op.samples is not None and {"cuda", "triton"} & set(op.kernels):
            found.setdefault(op.reference.__module__.rsplit(".", 1)[-1], []).append(op.name)
    return {**found, "pixel_program": []}


# What of the benchmarks and the sanitizer's calls belongs to a family of another name.
ALSO = {
    "pixel_program": ("pixelcnn",),
    "invertible_conv1x1": ("glow",),
    "discretized_logistic_mixture": ("discretized_logistic_mixture_sample",),
    "nade": ("nade_sample",),
}


def summary(report: Mapping[str, Any], of: Mapping[str, Sequence[str]]) -> tuple[list[list[str]], list[str]]:
    """(a row per family: name, verified, tests, sanitizer, resources, share of the bound, against the best other; what
    remains unproven)."""
    checks = report.get("gpu_check", {})
    rows, open_ends = [], []
    for family, ops in of.items():
        names = {family, *ops, *ALSO.get(family, ())}
        found = {
            "verify": verified(checks.get("verify", {}), ops),
            "tests": tested(checks.get("tests", {}), names),
            "sanitizer": sanitized(checks.get("sanitizer", {}), names),
            "registers": used(checks.get("resources", []), names),
        }
        cases = [c for c in report.get("cases", []) if c.get("op", c["case"].split()[0]) in names]
        best = max(cases, key=lambda c: bound_share(c)[0], default=None)
        least = min(cases, key=lambda c: advantage(c)[0], default=None)
        found["benchmarks"] = (UNRUN if best is None else bound_share(best)[1], best is not None)
        rows.append([family, *(text for text, _ in found.values()), UNRUN if least is None else advantage(least)[1]])
        lacking = [part for part, (text, proven) in found.items() if text == UNRUN and not proven]
        if lacking:
            open_ends.append(f"{family}: {', '.join(lacking)}: {UNRUN}")
        open_ends += [
            f"{family}: {part}: {text}" for part, (text, proven) in found.items() if text != UNRUN and not proven
        ]
    for part in SHARES:
        if note := checks.get("runs", {}).get(part, {}).get("left_out"):
            open_ends.append(f"{part}: left out: {note}")
    open_ends += [
        f"benchmarks: {f['case']} failed: {f['error'].splitlines()[0][:200]}" for f in report.get("failed", [])
    ]
    return rows, open_ends


def verified(found: Mapping[str, Any], ops: Sequence[str]) -> tuple[str, bool]:
    """The dtypes in which every op passes on a kernel of ours, or what does not; whether that is all."""
    if not ops:
        return "see its tests", True
    rows = [r for r in found.get("rows", []) if r["op"] in ops]
    left = sum(r["op"] in ops for r in found.get("left_out", []))
    failed = [f"{r['op']} {r['backend']} {r['dtype']}" for r in rows if not r["passed"]]
    ours = [r for r in rows if r["backend"] != "reference"]
    lacking = [op for op in ops if ours and not any(r["op"] == op for r in ours)]
    if failed:
        return "FAIL: " + ", ".join(failed), False
    if not ours:
        return UNRUN, False
    said = ", ".join(dict.fromkeys(r["dtype"] for r in ours))
    said += f"; {left} rows left out" if left else ""
    said += f"; not {', '.join(lacking)}" if lacking else ""
    return said, not left and not lacking


def tested(by_file: Mapping[str, Any], names: Iterable[str]) -> tuple[str, bool]:
    counts: Counter[str] = Counter()
    for found in by_file.values():
        for name in names:
            counts.update(found["families"].get(name, {}))
    bad = sum(n for outcome, n in counts.items() if outcome not in ("passed", "skipped"))
    if not counts["passed"] and not bad:
        return UNRUN, False
    return f"{counts['passed']} passed" + (f", {bad} FAILED" if bad else ""), not bad


def sanitized(found: Mapping[str, Any], names: Iterable[str]) -> tuple[str, bool]:
    errors: Counter[str] = Counter()
    for call in found.get("calls", []):
        if call["call"].split(", ")[0] in names:
            errors[call["tool"]] += call["errors"]
    if not errors:
        return UNRUN, False
    return ", ".join(f"{tool} {n or 'clean'}" for tool, n in errors.items()), not any(errors.values()) and len(
        errors
    ) == 2


def used(kernels: Iterable[Mapping[str, Any]], names: Iterable[str]) -> tuple[str, bool]:
    """The most registers and shared memory of the family's kernels, and what they spill."""
    found = [k for k in kernels if k["family"] in names]
    if not found:
        return UNRUN, False
    registers, shared, spilled = (max(k[what] for k in found) for what in ("registers", "shared", "spilled"))
    return f"{registers}, {shared}" + (f", SPILLS {spilled}" if spilled else ""), not spilled


def bound_share(case: Mapping[str, Any]) -> tuple[float, str]:
    """genfast's share of what bounds the case, with the case's name."""
    ours = case["providers"].get("genfast", {})
    shares = {"copy": ours.get("share_of_copy"), "matrix rate": ours.get("share_of_matrix_rate")}
    known = {k: v for k, v in shares.items() if v is not None}
    if not known:
        return 0.0, "-"
    what = max(known, key=lambda k: known[k])
    return known[what], f"{known[what]:.0%} of {what}"


def advantage(case: Mapping[str, Any]) -> tuple[float, str]:
    """How many times faster than the strongest alternative, with its name and the case's."""
    others = {
        name: p["times_genfast"]
        for name, p in case["providers"].items()
        if name.split()[0] not in ("genfast", "floor") and p["times_genfast"] is not None
    }
    if not others:
        return float("inf"), "-"
    name = min(others, key=lambda n: others[n])
    return others[name], f"{others[name]:.2f}x {name} ({case['case']})"


# ---- the parts ----


@dataclass
class Check:
    """One call of gpu_check: where things are, what there is, and what was found so far."""

    out: Path
    folder: Path
    minutes: float
    device: dict[str, Any]
    dry: bool = False
    compile: bool = False
    run: Callable[..., Done] = run
    report: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.out.exists():
            self.report = json.loads(self.out.read_text())
        self.checks: dict[str, Any] = self.report.setdefault("gpu_check", {})
        self.env = {
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            "TRITON_INTERPRET": "0",
            "GENFAST_BACKEND": "",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p),
        }

    def part(self, name: str) -> None:
        """Runs one, within its time, and keeps what it found."""
        share = 60 * self.minutes * SHARES.get(name, 1.0)
        seconds = self.left = self.left + share
        print(f"\n=== {name}: at most {seconds:.0f} s", flush=True)
        before, begun, self.notes, failures = self.clocks(), time.monotonic(), [], len(self.failed)
        left_out = getattr(self, name)(seconds) or ""
        taken = time.monotonic() - begun
        self.left = max(0.0, self.left - taken)
        if left_out:
            self.failed.append(f"{name}: left out: {left_out}")
        self.checks.setdefault("runs", {})[name] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "commit": commit(),
            "seconds": round(taken, 1),
            "left_out": left_out,
            "before": before,
            "after": self.clocks(),
            "notes": self.notes,
        }
        self.report.setdefault("environment", {"device": self.device["name"]})
        self.checks["device"] = self.device
        self.keep()
        ended = (
            "as far as it goes without a GPU" if self.dry else "not all well" if len(self.failed) > failures else "done"
        )
        print(f"{name}: {ended}, {taken:.0f} s", flush=True)

    def keep(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.out.with_name(f".{self.out.name}")
        temporary.write_text(json.dumps(self.report, indent=1) + "\n")
        os.replace(temporary, self.out)

    def clocks(self) -> dict[str, str]:
        return dict(MADE_UP) if self.dry else smi()

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"  {text}", flush=True)

    def fail(self, text: str) -> None:
        self.failed.append(text)
        self.note(f"FAILED {text}")

    def python(self, name: str, *words: str, seconds: float, alive: Path | None = None, **env: str) -> Done:
        """A module of ours, ``words[0]``, in a process of its own."""
        return self.run(
            [sys.executable, "-m", *words], self.folder / f"{name}.log", seconds, {**self.env, **env}, alive
        )

    def build(self, seconds: float) -> str:
        hard, soft = missing()
        for line in (*hard, *soft):
            self.note(f"missing: {line}")
        arch = "".join(map(str, self.device["capability"]))
        log = self.folder / "build.log"
        if self.dry and not self.compile:
            self.note(f"would build genfast._cpu and genfast._cuda for sm_{arch} in place")
        elif hard and not self.dry:
            raise Stop("the build lacks what is named above")
        elif built(arch) and log.exists() and log.stat().st_mtime > newest_source():
            self.note("genfast._cpu and genfast._cuda are up to date")
        else:
            nvcc = tool("nvcc")
            home = {"CUDA_HOME": str(Path(nvcc).resolve().parents[1])} if nvcc and "CUDA_HOME" not in os.environ else {}
            env = {"GENFAST_CUDA": "1", "GENFAST_CUDA_ARCHS": arch, "NVCC_APPEND_FLAGS": "-Xptxas -v", **home}
            command = [sys.executable, "setup.py", "build_ext", "--inplace", "-j", "2"]  # both modules at once
            done = self.run(command, log, seconds, {**self.env, **env})
            if done.status != 0:
                how = "was ended at its time" if done.status is None else "failed"
                log.rename(log.with_name("build-failed.log"))
                self.fail(f"build: it {how}: {Done(None, 0, log.with_name('build-failed.log')).last(8)}")
                return "the build" if done.status is None else ""
            self.note(f"built for sm_{arch} in {done.seconds:.0f} s")
        if log.exists():
            kernels = worst(k | {"by": "nvcc"} for k in ptxas(log.read_text(errors="replace")))
            self.checks["resources"] = [k for k in self.checks.get("resources", []) if k["by"] != "nvcc"] + kernels
            for k in kernels:
                spills = f", SPILLS {k['spilled']}" if k["spilled"] else ""
                self.note(f"{k['kernel']} {k['arch']}: {k['registers']} registers, {k['shared']} bytes shared{spills}")
        return ""

    def verify(self, seconds: float) -> str:
        if self.dry:
            return self.dry_verify(seconds)
        path = self.folder / "verify.json"
        path.unlink(missing_ok=True)
        words = ("--device", "cuda", "--json", str(path), "--minutes", f"{(seconds - 15) / 60:.2f}")
        done = self.python("verify", "genfast", "verify", *words, seconds=seconds)
        if not path.exists():
            self.fail(f"verify: it wrote nothing: {done.last()}")
            return "all" if done.status is None else ""
        found = json.loads(path.read_text())
        before = self.checks.get("verify", {"rows": [], "left_out": []})
        keys = ("op", "device", "backend", "dtype")
        rows = merged_rows(before["rows"], [r | {"seed": found["seed"]} for r in found["rows"]], keys)
        made = {tuple(r[k] for k in keys) for r in rows}
        late = [
            r for r in merged_rows(before["left_out"], found["left_out"], keys) if tuple(r[k] for k in keys) not in made
        ]
        self.checks["verify"] = {"rows": rows, "left_out": late}
        bad = [r for r in found["rows"] if not r["passed"]]
        for r in bad:
            said = r["error"] or f"{r['forward']:.1e}, {r['backward']:.1e}"
            self.fail(f"verify: {r['op']} {r['backend']} {r['dtype']}: {r['worst']}: {said}")
        self.note(f"{len(found['rows']) - len(bad)} of {len(found['rows'])} rows passed, seed {found['seed']}")
        if done.status is None and not found["left_out"]:
            return "rows, since it was ended at its time"
        return "; ".join(f"{r['op']} {r['backend']} {r['dtype']}" for r in found["left_out"])

    def dry_verify(self, seconds: float) -> str:
        done = self.python("verify", "tests.kernels.fake_cuda", seconds=seconds)
        if done.status:
            self.fail(f"verify: on fake CUDA tensors: {done.last(8)}")
        self.note(f"on fake CUDA tensors: {done.last(1)}")
        return "" if done.status is not None else "the rest, since it was ended at its time"

    def tests(self, seconds: float) -> str:
        if self.dry:
            done = self.run([sys.executable, "-c", COLLECT], self.folder / "tests.log", seconds, self.env)
            self.note(f"without a GPU: {done.last(1)}")
            if done.status:
                self.fail(f"tests: they are not collected: {done.last(8)}")
            return ""
        deadline = time.monotonic() + seconds
        done = self.run([sys.executable, "-c", COLLECT], self.folder / "tests.log", seconds, self.env)
        if done.status:
            self.fail(f"tests: they are not collected: {done.last(8)}")
            return "all" if done.status is None else ""
        sizes = Counter(line.split("::")[0] for line in done.text.splitlines() if "::" in line)
        jobs = [(ROOT / file, i, -(-size // BATCH)) for file, size in sizes.items() for i in range(-(-size // BATCH))]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) * 3 // 4)) as pool:
            parts = list(pool.map(lambda job: self.some_tests(*job, deadline), jobs))
        late = []
        for path in dict.fromkeys(job[0] for job in jobs):
            own = [found for job, found in zip(jobs, parts) if job[0] == path]
            by_test = {name: t for some, _ in own for name, t in some.items()}
            unrun = sizes[str(path.relative_to(ROOT))] - len(by_test)
            counts = Counter(t["outcome"] for t in by_test.values())
            bad = {n: t["message"] for n, t in by_test.items() if t["outcome"] not in ("passed", "skipped")}
            by_family: dict[str, Counter[str]] = {}
            for name, t in by_test.items():
                for family in named(f"{path.stem} {name}"):
                    by_family.setdefault(family, Counter())[t["outcome"]] += 1
            self.checks.setdefault("tests", {})[path.name] = {
                "counts": counts,
                "failed": bad,
                "left_out": unrun,
                "families": by_family,
                "seconds": round(sum(t["seconds"] for t in by_test.values()), 1),
            }
            self.note(f"{path.name}: {', '.join(f'{n} {o}' for o, n in counts.items()) or 'nothing ran'}")
            for name, message in bad.items():
                self.fail(f"tests: {name}: {message}")
            if unrun:
                late.append(f"{unrun} of {path.name}")
        return ", ".join(late)

    def some_tests(self, path: Path, i: int, n: int, deadline: float) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Every nth of a file's tests from the ith on, in one process after another until each has run: a spoilt GPU, a
        crash or a hang costs one test."""
        name = f"{path.stem}-{i}"
        record = self.folder / f"{name}.jsonl"
        record.unlink(missing_ok=True)
        attempt, known = 0, -1
        while True:
            by_test, unrun = outcomes(read_lines(record))
            if len(by_test) == known or (attempt and not unrun) or time.monotonic() >= deadline:
                return by_test, unrun
            known, attempt = len(by_test), attempt + 1
            words = (
                str(path),
                "-q",
                "-p",
                "benchmarks._gpu_tests",
                "-p",
                "no:cacheprovider",
                "--override-ini",
                "addopts=",
            )
            junit = f"--junitxml={self.folder / f'{name}-{attempt}.xml'}"
            record.touch()
            done = self.python(
                f"{name}-{attempt}",
                "pytest",
                *words,
                junit,
                seconds=deadline - time.monotonic(),
                alive=record,
                GENFAST_TEST_RECORD=str(record),
                GENFAST_TEST_PART=f"{i}/{n}",
                PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
            )
            if done.status is None:
                why = LATE if time.monotonic() >= deadline else f"it did not end in {HANGS:.0f} s"
                with record.open("a") as file:
                    file.write(json.dumps({"stopped": why}) + "\n")
            elif not outcomes(read_lines(record))[0]:
                self.fail(f"tests: {path.name}: none ran: {done.last(8)}")

    def sanitizer(self, seconds: float) -> str:
        if self.dry:
            done = self.python("sanitizer", "tests.gpu.sanitize", "--list", seconds=seconds)
            if done.status:
                self.fail(f"sanitizer: {done.last()}")
            self.note(f"{len(done.text.split(chr(10))) - 1} calls for memcheck, as many for racecheck")
            return ""
        program = tool("compute-sanitizer")
        if program is None:
            return "all: compute-sanitizer was not found"
        deadline, parts = time.monotonic() + seconds, max(1, min(8, (os.cpu_count() or 2) // 2))
        listed = self.python("sanitizer", "tests.gpu.sanitize", "--list", seconds=seconds)
        names = listed.text.strip().splitlines()
        if listed.status:
            self.fail(f"sanitizer: {listed.last()}")
            return "all"
        jobs = [(kind, i) for i in range(parts) for kind in ("memcheck", "racecheck")]
        with ThreadPoolExecutor(len(jobs)) as pool:
            found = list(
                pool.map(lambda job: self.sanitize(program, *job, parts, names[job[1] :: parts], deadline), jobs)
            )
        calls = [c for some, _ in found for c in some]
        late = sum(n for _, n in found)
        before = self.checks.get("sanitizer", {"calls": []})
        self.checks["sanitizer"] = {"calls": merged_rows(before["calls"], calls, ("tool", "call"))}
        for c in calls:
            if c["errors"]:
                self.fail(f"sanitizer: {c['tool']}: {c['call']}: {c['errors']}, {c['first']}")
        self.note(f"{sum(not c['errors'] for c in calls)} of {len(calls)} calls clean")
        return f"{late} calls" if late else ""

    def sanitize(
        self, program: str, kind: str, i: int, parts: int, names: Sequence[str], deadline: float
    ) -> tuple[list[dict[str, Any]], int]:
        """One share of the calls under one tool, in one process after another; (what was found, how many were left
        out)."""
        found: dict[str, dict[str, Any]] = {}
        attempt = 0
        while len(found) < len(names) and time.monotonic() < deadline:
            attempt += 1
            options = ["--tool", kind, "--print-limit", "5"] + ["--report-api-errors", "no"] * (kind == "memcheck")
            command = [program, *options, sys.executable, "-m", "tests.gpu.sanitize", "--part", f"{i}/{parts}"]
            # Without PyTorch's own blocks of memory, which hide what is beyond a tensor's end.
            env = {**self.env, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            log = self.folder / f"{kind}-{i}-{attempt}.log"
            done = self.run([*command, "--skip", str(len(found))], log, deadline - time.monotonic(), env)
            some = findings(done.text)
            if done.status is None:  # ended in the middle of the last one, which tells nothing
                some = {name: at for name, at in some.items() if at["ended"]}
            elif not some or "SUMMARY" not in done.text and not any(at["errors"] for at in some.values()):
                self.fail(f"sanitizer: {kind} did not watch: {done.last()}")  # a device that it does not support, say
                break
            found |= some
        calls = [
            {"tool": kind, "call": name, "errors": at["errors"], "first": at["first"]} for name, at in found.items()
        ]
        return calls, len(names) - len(found)

    def benchmarks(self, seconds: float) -> str:
        if self.dry:
            done = self.python("benchmarks", "benchmarks", "--device", "cuda", "--list", seconds=seconds)
            self.note(f"without a GPU: {done.last(1)}")
            if done.status:
                self.fail(f"benchmarks: they are not listed: {done.last(8)}")
            return ""
        path = self.folder / "benchmarks.json"
        path.unlink(missing_ok=True)
        words = ("--device", "cuda", "--out", str(path), "--minutes", f"{max(15.0, seconds - 45) / 60:.2f}")
        done = self.python("benchmarks", "benchmarks", *words, seconds=seconds)
        if not path.exists():
            self.fail(f"benchmarks: they wrote nothing: {done.last(8)}")
            return "all" if done.status is None else ""
        self.add(json.loads(path.read_text()))
        for f in self.report.get("failed", []):
            self.fail(f"benchmarks: {f['case']}: {f['error'].splitlines()[0]}")
        self.note(f"{len(self.report['cases'])} cases; log in {done.log}")
        return "; ".join(
            [*self.report.get("left_out", []), *["the rest, since they were ended"] * (done.status is None)]
        )

    def add(self, new: dict[str, Any]) -> None:
        """The benchmarks' results among those that there are; a case measured now has neither failed nor been left
        out."""
        from benchmarks import __main__ as suite

        old = {"cases": [], "overhead": [], **self.report}
        found = suite.merged(old, new)
        have = {case["case"] for case in found["cases"]}
        failed = merged_rows(old.get("failed", []), new.get("failed", []), ("case",))
        ours = {case["case"] for case in new["cases"]}
        late = dict.fromkeys([*old.get("left_out", []), *new.get("left_out", [])])
        self.report.clear()
        self.report |= found | {
            "failed": [f for f in failed if f["case"] not in ours],
            "left_out": [n for n in late if n not in have],
            "gpu_check": self.checks,
        }

    def tune(self, seconds: float) -> str:
        if self.dry:
            done = self.python("tune", "benchmarks.tune", "--list", seconds=seconds)
            self.note(f"{len(done.text.splitlines())} lines")
        else:
            out = self.out.with_name(f"tune-{self.out.name}")
            words = ("--out", str(out), "--minutes", f"{max(15.0, seconds - 30) / 60:.2f}")
            done = self.python("tune", "benchmarks.tune", *words, seconds=seconds)
            self.note(f"{out}; log in {done.log}")
        if done.status:
            self.fail(f"tune: {done.last(8)}")
        return "" if done.status is not None else "the rest, since it was ended at its time"

    def table(self, seconds: float) -> str:
        from tabulate import tabulate

        cache, unread = self.folder / "triton", 0
        if cache.exists():
            kernels, unread = triton_resources(cache, time.monotonic() + seconds)
            kept = [k for k in self.checks.get("resources", []) if k["by"] != "triton"]
            self.checks["resources"] = kept + kernels
        rows, open_ends = summary(self.report, families())
        headers = [
            "operation",
            "verified",
            "tests",
            "sanitizer",
            "registers, shared",
            "best of the bound",
            "least against others",
        ]
        print(
            f"\n{self.device['name']}, driver {self.clocks().get('driver_version', '?')}, torch "
            f"{self.device['torch']}\n"
        )
        print(tabulate(rows, headers=headers, maxcolwidths=[None, 36, None, None, None, None, 44]))
        commits = {r["commit"] for r in self.checks.get("runs", {}).values()}
        if len(commits) > 1:
            print(f"\nThe parts come from several commits: {', '.join(sorted(commits))}.")
        print(f"\n{len(open_ends)} things remain unproven{':' if open_ends else '.'}")
        for line in open_ends:
            print(f"  {line}")
        return f"the registers of {unread} kernels" if unread else ""


def newest_source() -> float:
    return max(p.stat().st_mtime for p in (*(ROOT / "csrc").rglob("*.*"), ROOT / "setup.py"))


def built(arch: str) -> bool:
    """Whether both modules are there, for this Python and this architecture, and newer than their sources."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    paths = [ROOT / "genfast" / f"{name}{suffix}" for name in ("_cpu", "_cuda")]
    if not all(p.exists() and p.stat().st_mtime > newest_source() for p in paths):
        return False
    ask = f"import importlib.util as u; s = u.spec_from_file_location('_cuda', {str(paths[1])!r}); "
    ask += "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.archs)"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    return arch in done.stdout.strip().split(";")


def named(test: str) -> list[str]:
    """The families and ops that a test's file, name or parameters name, the longest name first taken."""
    of = families()
    found = [f for f in of if re.search(rf"(?<![a-z0-9]){f}(?![a-z0-9])", test.replace("test_", " "))]
    found += [
        f
        for f, ops in of.items()
        if f not in found and any(re.search(rf"(?<![a-z0-9_]){op}(?![a-z0-9_])", test) for op in ops)
    ]
    if "test_sampling" in test:
        found.append("pixel_program")
    return found


def triton_resources(cache: Path, deadline: float) -> tuple[list[dict[str, Any]], int]:
    """Registers, shared and spilled bytes of the kernels in a Triton cache, which are what the parts before have
    launched; the number of those that were not read, since it was late or something else is in the file."""
    from genfast.kernels import aot

    def one(path: Path) -> dict[str, Any] | None:
        if time.monotonic() > deadline:
            return None
        about = path.with_suffix(".json")
        ir = path.with_suffix(".ttir")
        file = re.search(r'loc\("[^"]*/kernels/(\w+)\.py"', ir.read_text(errors="replace")) if ir.exists() else None
        if file is None:
            return {}  # torch.compile's
        try:
            registers, spilled = aot.resources(path)
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        metadata = json.loads(about.read_text())
        return {
            "family": file[1],
            "kernel": metadata.get("name", path.stem),
            "registers": registers,
            "shared": metadata.get("shared", 0),
            "spilled": spilled,
            "by": "triton",
        }

    paths = sorted(cache.rglob("*.cubin"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = [k for k in pool.map(one, paths) if k is not None]
    return worst(filter(None, read)), len(paths) - len(read)


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.strip() if done is not None and done.returncode == 0 else "unknown"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"got {text}, expected more than 0")
    return value


def chosen(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"got {name!r}, expected some of {','.join(PARTS)}")
    return [part for part in PARTS if part in found]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", type=chosen, default=list(SHARES), metavar="A,B,...", help="some of " + ", ".join(PARTS)
    )
    parser.add_argument("--minutes", type=positive, default=8.0, help="for all parts together (default 8)")
    parser.add_argument("--out", type=Path, help="the JSON (default benchmarks/results/DEVICE.json)")
    parser.add_argument("--dry-run", action="store_true", help="with a made-up H200, into a temporary folder")
    parser.add_argument("--compile", action="store_true", help="with --dry-run: build genfast._cuda too, for sm_90")
    a = parser.parse_args(argv)
    try:
        if a.dry_run:
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
                device = {"name": MADE_UP["name"], "capability": [9, 0], "torch": "?"}
                out = a.out or Path(folder, f"{slug(device['name'])}.json")
                return perform(Check(out, Path(folder), a.minutes, device, dry=True, compile=a.compile), a.parts)
        hard, soft = missing()
        if any("torch" in line for line in hard):
            raise Stop("\n  ".join(["missing:", *hard, *soft]))
        device = probe()
        out = a.out or ROOT / "benchmarks" / "results" / f"{slug(device['name'])}.json"
        return perform(Check(out, ROOT / "build" / "gpu-check", a.minutes, device), a.parts)
    except Stop as reason:
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1


def perform(check: Check, parts: Sequence[str]) -> int:
    """The parts one after another; the exit status."""
    print(f"{check.device['name']}{', made up: a dry run' if check.dry else ''}; {', '.join(parts)}")
    # The parts that are not run leave their share to those that are.
    shares = sum(SHARES.get(p, 1.0) for p in parts)
    check.minutes /= shares
    for name in parts:
        check.part(name)
    if check.failed:
        print(f"\n{len(check.failed)} failed or left out:")
        for line in check.failed:
            print(f"  {line}")
    if not check.dry:
        print(f"\n{check.out}; logs in {check.folder}")
    return int(bool(check.failed))


if __name__ == "__main__":
    sys.exit(main())
