"""Compiles every Triton kernel ahead of time, without a GPU:
``python -m genfast.kernels.aot [--arch 80 90 100 gfx942]``.

Each kernel file lists its variants in ``AOT``. Prints registers a thread, shared memory and spilled bytes of each, as
they stand in the binary, and exits with 1 if one does not compile, spills, computes in float64, or is in no file's
list. A kernel here has no arrays of its own, so whatever stack a thread has is spilled registers.

gfx942 is AMD's, with 512 vector registers and 64 KB of shared memory; a limit on registers is NVIDIA's alone, and a
spill there is listed and no failure, since nothing there has been tuned.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._common import Aot


class Report(NamedTuple):
    """What one compile came to; ``error`` is empty where it succeeded."""

    family: str
    kernel: str
    label: str
    arch: str
    registers: int = 0
    shared: int = 0
    spilled: int = 0
    error: str = ""


def families() -> list[str]:
    """The kernel files: every module beside this one but itself and the private ones."""
    folder = Path(__file__).parent
    return [m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_") and m.name != "aot"]


def variants(family: str) -> list[Aot]:
    found: list[Aot] = importlib.import_module(f"{__package__}.{family}").AOT
    return found


def unlisted(family: str) -> list[str]:
    """The family's ``@triton.jit`` functions that no variant compiles, neither as a kernel nor as part of one."""
    module = importlib.import_module(f"{__package__}.{family}")
    own = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    own = {name: value for name, value in own.items() if value.fn.__module__ == module.__name__}
    pending = [v.kernel for v in variants(family)]
    reached = set()
    while pending:
        name = pending.pop().fn.__name__
        if name not in reached:
            reached.add(name)
            called = set(own[name].fn.__code__.co_names) & set(own)
            pending += [own[c] for c in called]
    return sorted(set(own) - reached)


def target(arch: str) -> GPUTarget:
    """NVIDIA's by its compute capability (90), AMD's by its name (gfx942).

    Raises ValueError for anything else.
    """
    if arch.isdecimal():
        return GPUTarget("cuda", int(arch), 32)
    if re.fullmatch(r"gfx9\w+", arch):  # the later ones have waves of 32
        return GPUTarget("hip", arch, 64)
    raise ValueError(f"arch={arch!r}, expected a compute capability (90) or one of AMD's gfx9 (gfx942)")


def amd(arch: str) -> bool:
    return target(arch).backend == "hip"


def resources(cubin: str | os.PathLike[str]) -> tuple[int, int]:
    """Registers a thread and spilled bytes of the kernel in a file.

    Raises ValueError where the tool does not tell them.
    """
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    if found is None:
        raise ValueError(f"cuobjdump tells no registers: {said[-200:]!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _amd_resources(assembly: str) -> tuple[int, int]:
    """Vector registers a thread, those for products among them, and spilled bytes."""

    def told(name: str) -> int:
        return max(map(int, re.findall(rf"\.{name}:\s+(\d+)", assembly)), default=0)

    return told("vgpr_count"), told("private_segment_fixed_size")


def compile_one(job: tuple[str, int, str]) -> Report:
    """Compiles variant number ``job[1]`` of a family for one architecture."""
    family, index, arch = job
    v = variants(family)[index]
    report = Report(family, v.kernel.fn.__name__, v.label, arch)
    positions = v.kernel.arg_names
    attrs = {(positions.index(name),): [["tt.divisibility", 16]] for name in v.aligned}
    source = ASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants, attrs=attrs)
    warnings.simplefilter("ignore")
    try:
        options = {name: value for name, value in v.options.items() if not (amd(arch) and name == "maxnreg")}
        compiled = triton.compile(source, target=target(arch), options=options)
        # Files that mean to name tl.float64; in others a constant that float32 does not hold makes it so unseen.
        if "f64" in compiled.asm["ttir"] and "tl.float64" not in inspect.getsource(sys.modules[v.kernel.fn.__module__]):
            return report._replace(error="computes in float64")
        if amd(arch):
            registers, spilled = _amd_resources(compiled.asm["amdgcn"])
            if compiled.metadata.shared > 65536:
                return report._replace(error=f"needs {compiled.metadata.shared} bytes of shared memory, of 65536")
        else:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
                binary.write(compiled.asm["cubin"])
                binary.flush()
                registers, spilled = resources(binary.name)
    except Exception as error:
        return report._replace(error=f"{type(error).__name__}: {error}".replace("\n", " | ")[:300])
    return report._replace(registers=registers, shared=compiled.metadata.shared, spilled=spilled)


def thinned(family: str, every: int) -> list[int]:
    """The numbers of every ``every``-th variant of each kernel of a family, beginning with its first."""
    seen: dict[str, int] = {}
    kept = []
    for i, v in enumerate(variants(family)):
        name = v.kernel.fn.__name__
        if seen.setdefault(name, 0) % every == 0:
            kept.append(i)
        seen[name] += 1
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m genfast.kernels.aot", description=__doc__)
    parser.add_argument(
        "--arch", nargs="+", default=["80", "90", "100"], help="compute capabilities, e.g. 80 90 100, or AMD's gfx942"
    )
    parser.add_argument("--family", nargs="+", default=families(), metavar="NAME", help="only these kernel files")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="of a kernel's variants only the first of every N"
    )
    arguments = parser.parse_args()
    archs = arguments.arch
    for arch in archs:
        try:
            target(arch)
        except ValueError as error:
            parser.error(str(error))
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("aot: TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it", file=sys.stderr)
        return 1
    for family in arguments.family:
        if family not in families():
            parser.error(f"family {family!r}, expected one of {', '.join(families())}")
    missing = [f"{family}.{name}" for family in arguments.family for name in unlisted(family)]
    jobs = [
        (family, i, arch) for family in arguments.family for i in thinned(family, arguments.every) for arch in archs
    ]
    print(f"{'family':<18} {'kernel':<13} {'variant':<38} {'arch':<7} {'registers':>9} {'shared':>7} {'spilled':>7}")
    failed = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for r in pool.map(compile_one, jobs, chunksize=4):
            failed += bool(r.error or (r.spilled and not amd(r.arch)))
            found = r.error or f"{r.registers:>9} {r.shared:>7} {r.spilled:>7}{'  SPILLS' if r.spilled else ''}"
            where = r.arch if amd(r.arch) else f"sm_{r.arch}"
            print(f"{r.family:<18} {r.kernel:<13} {r.label:<38} {where:<7} {found}", flush=True)
    print(f"{len(jobs)} compiled, {failed} failed or spilled")
    for name in missing:
        print(f"{name}: a @triton.jit function that no AOT variant compiles")
    return 1 if failed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
