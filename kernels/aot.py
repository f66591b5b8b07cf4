"""Compiles every Triton kernel ahead of time, without a GPU: ``python -m genfast.kernels.aot [--arch 80 90 100]``.

Prints registers, shared memory and spills of each, and fails if one does not compile, spills, or is named by no AOT list.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ._common import Aot


def modules() -> list[str]:
    """The kernel files: every module beside this one but itself and the private ones."""
    folder = Path(__file__).parent
    return [m.name for m in pkgutil.iter_modules([str(folder)]) if not m.name.startswith("_") and m.name != "aot"]


def variants(module: str) -> list[Aot]:
    loaded = importlib.import_module(f"{__package__}.{module}")
    found: list[Aot] = loaded.AOT
    launched = {
        name for name, value in vars(loaded).items() if isinstance(value, triton.JITFunction) and _is_entry(loaded, name)
    }
    missing = launched - {v.kernel.fn.__name__ for v in found}
    if missing:
        raise SystemExit(f"aot: {module} launches {', '.join(sorted(missing))}, which its AOT list does not name")
    return found


def _is_entry(module: object, name: str) -> bool:
    """Whether a kernel is launched from Python, as against called by another kernel."""
    return f"{name}[(" in Path(str(module.__file__)).read_text()  # type: ignore[attr-defined]


def compile_one(job: tuple[str, int, int]) -> tuple[str, str, str, int, int, int, int]:
    """(module, kernel, label, arch, registers, shared bytes, spilled bytes) of one variant on one architecture."""
    module, index, arch = job
    v = variants(module)[index]
    source = ASTSource(fn=v.kernel, signature=v.signature, constexprs=v.constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": v.warps})
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target\s+(sm_\w+)", compiled.asm["ptx"])
        assert target is not None
        command = [get_ptxas(arch).path, "-v", f"--gpu-name={target.group(1)}", str(ptx), "-o", f"{ptx}.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.findall(r"Used (\d+) registers", said)[-1])
    spilled = sum(int(b) for b in re.findall(r"(\d+) bytes spill stores", said))
    return module, v.kernel.fn.__name__, v.label, arch, registers, compiled.metadata.shared, spilled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], help="compute capabilities, e.g. 80 90 100")
    archs = parser.parse_args().arch
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("aot: TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
    jobs = [(m, i, arch) for m in modules() for i in range(len(variants(m))) for arch in archs]
    print(f"{'family':<20} {'kernel':<14} {'variant':<44} {'arch':<6} {'regs':>4} {'shared':>7} {'spills':>6}")
    spilling = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for module, kernel, label, arch, registers, shared, spilled in pool.map(compile_one, jobs):
            spilling += spilled > 0
            print(
                f"{module:<20} {kernel:<14} {label:<44} sm_{arch:<3} {registers:>4} {shared:>7} {spilled:>6}", flush=True
            )
    print(f"{len(jobs)} compiled, {spilling} spill")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
