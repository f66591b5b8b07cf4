"""The Triton launches that a call makes, compiled for a GPU that need not be there.

The call gets tensors of the meta device, of any size, so its launcher chooses as it would on a GPU; each launch then
becomes a compile with the arguments that Triton itself would specialise on.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

Work = Callable[[], Any]


@dataclass(frozen=True)
class Launch:
    """One launch, as compiled: its grid, its constants and options, and what the binary takes of a multiprocessor."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, Any]
    warps: int
    registers: int
    shared: int
    spilled: int
    sass: str

    @property
    def blocks(self) -> int:
        """Blocks that a multiprocessor of compute capability 9.0 holds at once."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(32, 64 // self.warps, 65536 // registers, 227 * 1024 // (self.shared + 1024))

    @property
    def occupancy(self) -> float:
        return self.blocks * self.warps / 64


class _Absent:
    """Stands for Triton's driver where there is none: names the architecture to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return -self.arch  # Triton's caches of compiled kernels go by device: never mixed with a real one's

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling(arch: int, found: list[Launch]) -> Iterator[None]:
    run = JITFunction.run
    driver = triton.runtime.driver
    before = driver._active  # None until a first launch asks; asking here would fail where there is no GPU

    def compile_only(self: JITFunction[Any], *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        mocks = [MockTensor(x.dtype) if isinstance(x, torch.Tensor) else x for x in given]
        compiled = run(self, *mocks, grid=grid, warmup=True, **options)
        found.append(_launch(self, compiled, tuple(grid), options))
        return compiled

    driver.set_active(_Absent(arch))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = run
        driver._active = before


def _launch(kernel: Any, compiled: Any, grid: tuple[int, ...], options: dict[str, Any]) -> Launch:
    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(compiled.asm["cubin"])
        binary.flush()

        def said(*command: str) -> str:
            return subprocess.run([*command, binary.name], capture_output=True, text=True, check=True).stdout

        usage = said(tools.cuobjdump.path, "--dump-resource-usage")
        sass = said(tools.nvdisasm.path, "-c")
    registers, stack, local = map(int, re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)[0])
    name = f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"
    constants = {k: v for k, v in options.items() if k in kernel.arg_names}
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    return Launch(name, grid, constants, warps, registers, shared, stack + local, sass)


def launches(make: Callable[[str], Work], arch: int = 90) -> list[Launch]:
    """What the work that ``make`` returns for the device "meta" launches, in order.

    Raises RuntimeError under Triton's interpreter, which compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("launches: TRITON_INTERPRET=1 is set, so there is nothing to compile; unset it")
    found: list[Launch] = []
    work = make("meta")
    with _compiling(arch, found):
        work()
    return found


# ---- reading SASS ----

# Cycles of a multiprocessor's quarter that a warp's instruction takes in its unit on an H100 or H200: 32 lanes over the
# unit's width, from the table of throughputs in NVIDIA's CUDA programming guide, compute capability 9.0. The first
# cache moves 128 bytes a cycle for all four quarters, so an access takes as many cycles as a thread moves bytes, and no
# fewer than four.
CYCLES = {"fma": 1, "imad": 2, "alu": 2, "special": 8, "double": 2}
_CLASSES = (
    ("double", r"D(FMA|ADD|MUL|SETP|MNMX)"),
    ("special", r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV"),
    ("device", r"LDG|STG|LDGSTS|ATOMG?|RED"),
    ("shared", r"LDS|STS|SHFL|LDSM|STSM|REDUX|ATOMS"),
    ("local", r"LDL|STL"),
    ("matrix", r"HMMA|HGMMA|IMMA|QGMMA"),
    ("fma", r"F(FMA|ADD|MUL)|H(FMA2|ADD2|MUL2)"),
    ("imad", r"IMAD"),
    (
        "other",
        r"BRA|EXIT|BAR|BSYNC|BSSY|CALL|RET|NOP|DEPBAR|LDGDEPBAR|WARPSYNC|U[A-Z].*|R2UR|S2U?R|CS2R|VOTEU?|LDC|PLOP3",
    ),
)
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^\.(L_x_\d+):")


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, static: of the loop that moves most of the bytes, or of all where none does."""

    loop: bool
    counts: Counter[str]  # by class
    loads: Counter[int]  # of device memory, by bytes a thread
    stores: Counter[int]
    wide: int  # instructions of 64-bit address arithmetic

    @property
    def issued(self) -> int:
        return sum(self.counts.values())

    @property
    def moved(self) -> int:
        """Bytes that a thread loads and stores, from wherever they come."""
        return sum(size * n for counter in (self.loads, self.stores) for size, n in counter.items())

    @property
    def busy(self) -> dict[str, int]:
        """Cycles of a quarter multiprocessor for one warp, by unit."""
        c = self.counts
        memory = sum(max(4, size) * n for counter in (self.loads, self.stores) for size, n in counter.items())
        return {
            "issue": self.issued,
            "fma": c["fma"] + 2 * c["imad"],
            "alu": 2 * c["alu"],
            "special": 8 * c["special"],
            "double": 2 * c["double"],
            "memory": memory + 4 * c["shared"],
        }


def read(sass: str) -> Code:
    """Classes of a kernel's instructions, from nvdisasm's listing."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif match := _LINE.search(line):
            lines.append((match[1], match[2]))
    ends = [i for i, (name, _) in enumerate(lines) if name.startswith("EXIT")]
    whole = _count(lines[: ends[-1] + 1 if ends else None], False)  # what comes after the last exit is padding
    best = whole
    for i, (name, rest) in enumerate(lines):
        target = re.search(r"L_x_\d+", rest) if name.startswith("BRA") else None
        if target and labels.get(target[0], i + 1) <= i:
            inside = _count(lines[labels[target[0]] : i + 1], True)
            if 2 * inside.moved >= whole.moved and (not best.loop or inside.moved > best.moved):
                best = inside
    return best


def _count(lines: list[tuple[str, str]], loop: bool) -> Code:
    code = Code(loop, Counter(), Counter(), Counter(), 0)
    wide = 0
    for name, _ in lines:
        base, *parts = name.split(".")
        code.counts[next((c for c, pattern in _CLASSES if re.fullmatch(pattern, base)), "alu")] += 1
        width = next((size for part, size in _WIDTHS.items() if part in parts), 4)
        code.loads[width] += base in ("LDG", "LDGSTS")
        code.stores[width] += base == "STG"
        wide += "WIDE" in parts or (base in ("LEA", "IADD3") and bool({"X", "HI"} & set(parts)))
    return Code(loop, code.counts, +code.loads, +code.stores, wide)
