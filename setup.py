"""Builds genfast._cpu always, and genfast._cuda where there is CUDA source and nvcc.

    GENFAST_CUDA=0 skips the CUDA extension, =1 makes a missing nvcc an error.
    GENFAST_CUDA_ARCHS  compute capabilities, default "80;90;100" plus PTX of the last.
    GENFAST_SANITIZE  base, v3 or v4: the CPU kernels of that level alone, under sanitizers (tests/sanitize.py).

Every kernel under csrc/cpu is compiled once per x86-64 level and picked at run time; elsewhere once.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
LEVELS = {"base": [], "v3": ["-march=x86-64-v3"], "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"]}
FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-psabi",
]

# Kernels that are written in vectors and unrolled by hand: at -O3 they would take half as long again to compile and up
# to twice the space, and be no faster. In the order in which they are compiled, the longest first.
WRITTEN_IN_VECTORS = (
    "flow_program", "autoregressive_inverse", "nade", "pixel_rnn", "affine_coupling", "spline", "masked_linear",
    "masked_conv", "bias_act", "activation", "diagonal_gaussian", "linear", "discretized_logistic_mixture", "upfirdn2d",
    "pixel_program", "minibatch_discrimination", "gated_activation", "adam",
)  # fmt: skip
UNSWITCHED = ("autoregressive_inverse",)  # whose loops test what does not change in them

# Later flags override earlier ones. With inlined checks, with those that AddressSanitizer makes as well, and optimised,
# the kernels would take three times as long to compile. _FORTIFY_SOURCE, which some Pythons set, hides calls from the
# sanitizer.
CHECKS = "undefined,float-cast-overflow"
SANITIZERS = [
    "-O0",
    "-g1",
    f"-fsanitize=address,{CHECKS}",
    "-fno-sanitize=null,vptr,pointer-overflow,object-size",
    f"-fno-sanitize-recover={CHECKS}",
    "--param=asan-instrumentation-with-call-threshold=0",
    "-fno-omit-frame-pointer",
    "-U_FORTIFY_SOURCE",
    "-D_GLIBCXX_ASSERTIONS",
    "-DGENFAST_SANITIZED",
]
SANITIZE = os.environ.get("GENFAST_SANITIZE", "")
if SANITIZE and SANITIZE not in LEVELS:
    raise SystemExit(f"genfast: GENFAST_SANITIZE={SANITIZE}, expected one of {', '.join(LEVELS)}")


def openmp() -> tuple[list[str], list[str]]:
    """Compile and link flags; Apple's clang needs libomp, which PyTorch brings at run time."""
    if sys.platform == "darwin":
        return ["-Xpreprocessor", "-fopenmp"], ["-Wl,-undefined,dynamic_lookup"]
    return ["-fopenmp"], [
        "-fopenmp",
        *([] if SANITIZE else ["-Wl,-s"]),
    ]  # -s: without the symbol table, a twelfth of the file


def accepts(compiler: list[str], flags: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "flags.cpp")
        source.write_text("int main() { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def sources(folder: str, suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def optimisation(kernel: str) -> list[str]:
    if SANITIZE or kernel not in WRITTEN_IN_VECTORS:
        return []
    return ["-O2", "-funswitch-loops"] if kernel in UNSWITCHED else ["-O2"]


def compile_order(source: str) -> int:
    kernel = Path(source).stem
    return WRITTEN_IN_VECTORS.index(kernel) if kernel in WRITTEN_IN_VECTORS else len(WRITTEN_IN_VECTORS)


class BuildExt(build_ext):
    def finalize_options(self) -> None:
        super().finalize_options()
        # One folder for every way to build, so that a wheel takes the objects that an installation made.
        # What is sanitized never lies where an ordinary build would take it for its own.
        base = Path("build", "sanitize") if SANITIZE else Path("build")
        self.build_temp = str(base / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}")

    def run(self) -> None:
        super().run()
        link = ROOT / "genfast" / "kernels"
        if self.inplace and not getattr(self, "editable_mode", False) and not link.exists():
            link.symlink_to(
                Path("..", "kernels"), target_is_directory=True
            )  # what an installation makes of package_dir

    def build_extension(self, ext: Pybind11Extension) -> None:
        if ext.name == "genfast._cuda":
            self.build_cuda(ext)
            return
        self.compile_cpu(ext)
        super().build_extension(ext)

    def compile_cpu(self, ext: Pybind11Extension) -> None:
        compiler = list(getattr(self.compiler, "compiler_cxx", None) or self.compiler.compiler_so)
        x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "darwin"
        levels = [name for name in LEVELS if name == "base" or (x86 and accepts(compiler, LEVELS[name]))]
        compile_flags, link_flags = openmp()
        flags = [*FLAGS, *compile_flags]
        if SANITIZE:
            # One level, under the name that a build without levels calls.
            flags += [*LEVELS[SANITIZE], *SANITIZERS]
            link_flags = [*link_flags, f"-fsanitize=address,{CHECKS}"]
            levels = ["base"]
        elif len(levels) == len(LEVELS):
            flags.append("-DGENFAST_X86_LEVELS")
        else:
            levels = ["base"]
        # What takes longest begins, so that no compiler is left with it when the others have ended: the bindings, of no
        # level, then the kernels in compile_order.
        jobs = [(source, [*ext.extra_compile_args, *flags], "bindings") for source in ext.sources]
        jobs += [
            (source, [*flags, *optimisation(Path(source).stem), *LEVELS[level], f"-DGENFAST_ISA={level}"], level)
            for source in sorted(sources("cpu", ".cpp"), key=compile_order)
            for level in levels
        ]

        made_by = hashlib.sha256(repr((compiler, flags, LEVELS, sys.version)).encode()).hexdigest()[:8]
        shared = max(
            Path(p).stat().st_mtime for p in (*ext.depends, "setup.py") if not p.endswith((".cpp", ".cu", ".cuh"))
        )

        def build(job: tuple[str, list[str], str]) -> list[str]:
            source, extra, level = job
            folder = str(Path(self.build_temp, f"{level}-{made_by}"))
            objects: list[str] = self.compiler.object_filenames([source], output_dir=folder)
            changed = max(shared, Path(source).stat().st_mtime)
            if all(Path(o).exists() and Path(o).stat().st_mtime > changed for o in objects):
                return objects
            include = ext.include_dirs if level == "bindings" else None
            return self.compiler.compile(
                [source], output_dir=folder, include_dirs=include, extra_postargs=extra, depends=ext.depends
            )

        print(f"genfast: compiling {len(jobs)} objects for {', '.join(levels)}", flush=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [o for objects in pool.map(build, jobs) for o in objects]
        ext.sources = []  # all that is left to do is to link
        ext.extra_link_args += link_flags

    def build_cuda(self, ext: Pybind11Extension) -> None:
        """All by nvcc, which knows where its headers and its runtime are."""
        nvcc = find_nvcc()
        assert nvcc is not None
        archs = os.environ.get("GENFAST_CUDA_ARCHS", "80;90;100").replace(",", ";").split(";")
        generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        generate.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        include = [f"-I{path}" for path in (*ext.include_dirs, *self.include_dirs)]
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *include]
        flags.append(f'-DGENFAST_CUDA_ARCHS="{";".join(archs)}"')

        def build(source: str) -> str:
            target = Path(self.build_temp, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.run_nvcc([nvcc, *flags, *generate, "-c", source, "-o", str(target)])
            return str(target)

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(build, [*sources("cuda", ".cu"), *ext.sources]))
            output = Path(self.get_ext_fullpath(ext.name))
            output.parent.mkdir(parents=True, exist_ok=True)
            # The runtime is static, so that a wheel built here serves users who have the driver and no toolkit.
            self.run_nvcc([nvcc, "-shared", "-cudart", "static", *objects, "-o", str(output)])
        except subprocess.CalledProcessError as error:
            raise CompileError(f"nvcc failed: {error}") from error

    @staticmethod
    def run_nvcc(command: list[str]) -> None:
        """What it says comes in one piece, since several run at once."""
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"genfast: {' '.join(command)}\n{done.stdout}", end="", flush=True)
        done.check_returncode()


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and Path(home, "bin", "nvcc").exists():
        return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def extensions() -> list[Pybind11Extension]:
    depends = [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc").rglob("*.*"))]
    found = [
        Pybind11Extension(
            "genfast._cpu",
            ["csrc/bind_cpu.cpp", "csrc/guard.cpp", "csrc/contents.cpp"],
            include_dirs=["csrc"],
            depends=depends,
        )
    ]
    wanted = "0" if SANITIZE else os.environ.get("GENFAST_CUDA", "auto")
    if wanted != "0" and (ROOT / "csrc" / "bind_cuda.cpp").exists():
        if find_nvcc() is not None:
            cuda = Pybind11Extension("genfast._cuda", ["csrc/bind_cuda.cpp"], include_dirs=["csrc"], depends=depends)
            cuda.optional = wanted != "1"  # a toolkit that does not work must not cost a user the CPU kernels
            found.append(cuda)
        elif wanted == "1":
            raise SystemExit("genfast: GENFAST_CUDA=1, but nvcc was not found; set CUDA_HOME or put nvcc on PATH")
        else:
            print("genfast: nvcc was not found, so the CUDA kernels are left out", flush=True)
    return found


options = {"build": {"build_base": str(Path("build", "sanitize"))}} if SANITIZE else {}
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt}, options=options)
