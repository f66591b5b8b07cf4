"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``.

    python -m tests.sanitize --quick
    python -m tests.sanitize --no-build tests/ops/test_nade.py -k threads

Compiles csrc for one instruction set into build/sanitize/run, beside copies of the package and of the tests, so that
the ordinary installation stays as it is. Three deliberate faults show that the sanitizers are on and see the memory of
tensors. Then follow every op on every declared sample and on odd shapes and layouts, the fuzzer, and the ops' and
samplers' tests, which make batches of real sizes on several threads. Large outputs and workspaces have no slack there:
the pool is off, and csrc/cpu/workspace.h allocates what was asked for.

The first finding ends the process that it was made in, and its report is printed after it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "sanitize"
RUN = BUILD / "run"
REPORTS = BUILD / "reports"

# A finding of UndefinedBehaviorSanitizer goes to stderr whatever it is told, and would be lost with what pytest holds
# back.
PYTEST = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--capture=sys")
# Tests that would watch something else: the compiler's Python, a derivative by differences of calls already made, a
# process's time or memory.
WITHOUT = (
    "not compile and not opcheck and not gradcheck and not second_derivatives and not forward_mode and not functorch"
)
QUICK = "thread or (empty and not every_op)"

# (name, arguments of Python), with --quick and without.
QUICK_PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("every op, odd shapes and layouts", ("-m", "tests.sanitize", "--calls", "--quick")),
    ("threads and empty batches", (*PYTEST, "tests/ops", "tests/penalty", "-k", f"({QUICK}) and {WITHOUT}")),
)
PARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("every op, odd shapes and layouts", ("-m", "tests.sanitize", "--calls")),
    ("fuzzed calls", ("-m", "tests.fuzz", "--calls", "1000", "--seed", "2")),
    ("tests of the ops", (*PYTEST, "tests/ops", "tests/penalty", "tests/test_allocator.py", "-k", WITHOUT)),
    ("tests of the samplers and layers", (*PYTEST, "tests/sampling", "tests/programs", "tests/nn", "-k", WITHOUT)),
)

# A kernel that is told of more than there is; of an address that is none of a number; and one that is as it should be.
CANARY = """
import sys, torch
from genfast import _backend
cpu, _ = _backend.extension("_cpu")
assert cpu.__file__.startswith({run!r}), cpu.__file__
x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 2, 2)
sizes = dict(n={batch}, c=1, h=4, w=4, factor=2, threads=1)
flags = dict(is_double=False, space_to_depth=False, inverse={inverse}, channels_last=False)
cpu.squeeze(x=x.data_ptr() + {shift}, y=y.data_ptr(), **sizes, **flags)
print("done")
"""
CANARIES = (
    ("heap-buffer-overflow", {"batch": 3, "shift": 0, "inverse": False}),
    ("heap-buffer-overflow", {"batch": 3, "shift": 0, "inverse": True}),
    ("misaligned address", {"batch": 1, "shift": 2, "inverse": False}),
    ("", {"batch": 2, "shift": 0, "inverse": False}),
)


def level() -> str:
    """Of x86-64, the level that most processors run; the baseline where this one has no AVX2."""
    information = Path("/proc/cpuinfo")
    flags = set(information.read_text().split()) if information.exists() else set()
    return "v3" if {"avx2", "fma", "bmi2"} <= flags else "base"


def build(wanted: str) -> None:
    shutil.rmtree(RUN, ignore_errors=True)
    options = ("--disable-pip-version-check", "--quiet", "--no-deps")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(RUN), str(ROOT)],
        check=True,
        env={**os.environ, "GENFAST_SANITIZE": wanted},
    )
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "tests", RUN / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", RUN)


def environment() -> dict[str, str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        done = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        if not Path(done.stdout.strip()).is_absolute():
            raise SystemExit(
                f"sanitize: {compiler} has no {name}; Debian: apt-get install g++ (clang is not supported here)"
            )
        libraries.append(done.stdout.strip())
    common = f"log_path={REPORTS}/report"
    changed = {
        "LD_PRELOAD": ":".join(libraries),
        # Python and PyTorch never free what lives as long as the process.
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0:{common}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:{common}",
        "GENFAST_POOL_BYTES": "0",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "PYTHONPATH": str(RUN),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("GENFAST_")} | changed


def reports() -> str:
    return "\n".join(path.read_text(errors="replace") for path in sorted(REPORTS.glob("report.*")))


def python(arguments: Sequence[str], **options: object) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(REPORTS, ignore_errors=True)
    REPORTS.mkdir(parents=True)
    return subprocess.run([sys.executable, *arguments], cwd=RUN, env=environment(), check=False, text=True, **options)  # type: ignore[call-overload,no-any-return]


def look_at_the_sanitizers() -> None:
    """Ends the run where they do not see a fault, or see one where there is none."""
    for expected, fault in CANARIES:
        done = python(["-c", CANARY.format(run=str(RUN), **fault)], capture_output=True)
        said = done.stderr + reports()
        right = expected in said and done.returncode if expected else not reports() and done.stdout == "done\n"
        if not right:
            raise SystemExit(
                f"sanitize: expected {expected or 'no finding'} for {fault}, got {done.returncode}\n{said}"
            )
    print("sanitize: both sanitizers see a kernel's fault in a tensor", flush=True)


def calls(quick: bool) -> int:
    """Every op's CPU kernel, forward and backward: the samples and their odd variants in every dtype, or a part of
    each."""
    import torch

    from genfast import _registry, _verify

    failed = 0
    for op in _registry.OPS.values():
        if op.samples is None or "cpu" not in op.kernels:
            continue
        begun = time.monotonic()
        samples = list(op.samples(torch.Generator().manual_seed(0)))
        odd, dense = list(_verify.odd(op, samples)), [(sample, "dense") for sample in samples]
        chosen = [(call, dtype) for dtype in op.dtypes["cpu"] for call in dense + odd]
        if quick:
            chosen = [(call, torch.float32) for call in odd] + [(call, torch.float64) for call in dense[::4]]
        for call, dtype in chosen:
            torch.manual_seed(0)
            try:
                errors = _verify.errors(op, call[0], dtype, "cpu", "cpu", call[1])
                over, _ = _verify.excess(errors, op, call, dtype)
                problem = f"{over:.3g} times the error allowed" if not over <= 1 else ""
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                failed += 1
                print(f"sanitize: {op.name}, {call[0].label}, {dtype}: {problem}", flush=True)
        print(f"sanitize: {op.name}: {len(chosen)} calls in {time.monotonic() - begun:.1f} s", flush=True)
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every op and the tests of sizes and threads alone")
    parser.add_argument(
        "--level", choices=("base", "v3", "v4"), default=level(), help="instruction set (default: %(default)s)"
    )
    parser.add_argument("--no-build", action="store_true", help="take what build/sanitize/run has")
    parser.add_argument("--calls", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("tests", nargs="*", help="these tests alone; options of pytest after --")
    arguments = parser.parse_args()
    if arguments.calls:
        return calls(arguments.quick)
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"sanitize: {text} ({time.monotonic() - begun:.0f} s)", flush=True)

    if not arguments.no_build:
        build(arguments.level)
        say(f"built for {arguments.level}")
    look_at_the_sanitizers()
    parts = QUICK_PARTS if arguments.quick else PARTS
    if arguments.tests:
        parts = (("tests", (*PYTEST, *arguments.tests)),)
    failed = False
    for name, command in parts:
        done = python(command)
        if done.returncode or reports():
            failed = True
            print(reports(), flush=True)
        say(f"{name}: {f'status {done.returncode}' if done.returncode else 'no finding'}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
