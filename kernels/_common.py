"""What the kernels share: a tensor seen as (N, C, S) with strides, tiles over it, and ahead-of-time variants."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tensors import memory_format

TILE = 1024  # elements of a tile: 8 a thread in 4 warps, two vector loads of each operand in float32


@dataclass
class Choice:
    """What a launcher may choose freely, as data: the values it uses now, and what ``python -m benchmarks.tune`` tries.

    A kernel file's TUNABLE names its choices; results must not depend on them beyond rounding.
    """

    now: dict[str, int]
    candidates: list[dict[str, int]]
    narrow: dict[str, int] = field(default_factory=dict)  # what data of two bytes does otherwise

    def __getitem__(self, name: str) -> int:
        return self.now[name]

    def of(self, size: int) -> dict[str, int]:
        """The values for data of ``size`` bytes an element."""
        return self.now | self.narrow if size < 4 else self.now

    @contextlib.contextmanager
    def trying(self, candidate: Mapping[str, int]) -> Iterator[None]:
        """The launcher uses ``candidate`` within, whatever the data."""
        before = self.now, self.narrow
        self.now, self.narrow = {**self.now, **candidate}, {**self.narrow, **candidate}
        try:
            yield
        finally:
            self.now, self.narrow = before


def by_rule(*candidates: dict[str, int]) -> Choice:
    """Of a tile that a rule of the file chooses by the sizes: nothing else now, or in its place a candidate's
    fields."""
    return Choice({}, list(candidates))


def every(**values: Iterable[int]) -> list[dict[str, int]]:
    """Candidates: each combination of the named values."""
    return [dict(zip(values, combination)) for combination in itertools.product(*values.values())]


def tiles_choice(narrow: Mapping[str, int] | None = None, **more: Iterable[int]) -> Choice:
    """Of a program that takes a tile at a time: the elements of the tile and those of a thread, and ``more``, present
    value first."""
    values = {"tile": (1024, 512, 2048, 4096), "each": (8, 4, 16)} | {k: tuple(v) for k, v in more.items()}
    return Choice({k: v[0] for k, v in values.items()}, every(**values), dict(narrow or {}))


class View(NamedTuple):
    """A tensor as (N, C, S): S is the product of its spatial axes, strides are in elements."""

    data: Tensor
    n: int
    c: int
    s: int
    n_stride: int
    c_stride: int
    s_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.n_stride, self.c_stride, self.s_stride

    @property
    def walks_channels(self) -> bool:
        """Whether neighbouring threads should walk along channels."""
        return self.s == 1 or self.c_stride < self.s_stride

    @property
    def flat(self) -> bool:
        """Whether channels and positions are one axis."""
        return self.c == 1 or self.c_stride == self.s * self.s_stride

    @property
    def far(self) -> bool:
        """Whether an offset inside a sample needs 64 bits."""
        return self.c * self.c_stride + self.s * self.s_stride >= 2**31

    def grouped(self, g: int) -> View:
        """A flat view with g channels as one, and so fewer and longer rows."""
        return self._replace(c=self.c // g, s=self.s * g, c_stride=self.c_stride * g)

    def transposed(self) -> View:
        """A flat view as one sample: all of a sample as channels, the batch as positions."""
        return View(
            self.data, 1, self.c * self.s, self.n, 0, self.s_stride if self.s > 1 else self.c_stride, self.n_stride
        )


def view(x: Tensor) -> View:
    """``x`` as it lies; copied only where its spatial axes are not one axis with one step."""
    s = step = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:])):
        if size == 1:
            continue
        if s == 1:
            step = stride
        elif stride != s * step:
            return view(x.contiguous())
        s *= size
    return View(x, x.shape[0], x.shape[1], s, x.stride(0), x.stride(1), step)


def output(x: Tensor, channels: int | None = None) -> Tensor:
    """An uninitialised tensor like ``x``, dense in its memory format, with another number of channels if given."""
    shape = (x.shape[0], x.shape[1] if channels is None else channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def check_samples(op: str, n: int) -> None:
    """For grids with an axis of samples, of which CUDA takes 65535 in a second axis."""
    if n > 65535:
        raise ValueError(f"{op}: a batch of {n} samples, expected at most 65535 on a GPU; split the batch")


def tile(v: View, size: int = TILE) -> tuple[int, int]:
    """Channels and positions of a tile of at most ``size`` elements, longest along the axis that is contiguous."""
    c, s = triton.next_power_of_2(v.c), triton.next_power_of_2(v.s)
    if v.walks_channels:
        c = min(c, size)
        return c, min(s, size // c)
    s = min(s, size)
    return min(c, size // s), s


def options(elements: int, far: bool, scattered: bool = False, each: int = 8) -> dict[str, int]:
    """Launch options of a tile: ``each`` elements a thread.

    64-bit addresses, and ``scattered`` loads, need more registers than the assembler grants of itself, which would
    spill.
    """
    registers = 168 if far else 128 if scattered else 0
    return {"num_warps": max(1, elements // (32 * each))} | ({"maxnreg": registers} if registers else {})


MULTIPROCESSORS = 132  # of an H100 or H200


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether tiles may take what an H100 or H200 has of shared memory and registers; so too where there is no GPU to
    ask."""
    if device.type == "cpu" or not torch.cuda.is_available():
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@functools.lru_cache(1024)
def parts(programs: int, at_once: int, most: int, joining: float = 0.0) -> int:
    """Into how many parts (at most ``most``) to split the sum of each of ``programs``, of which ``at_once`` run
    together.

    The fewest whose time is within 6% of the least: the rounds of programs, each as long as its part, and where there
    are several ``joining`` longer (as a share of the whole sum), for what is written and read again.
    """
    most = max(1, min(most, cdiv(4 * at_once, max(1, programs))))
    times = [cdiv(programs * n, at_once) * (1 / n + (joining if n > 1 else 0.0)) for n in range(1, most + 1)]
    return next(n for n, time in enumerate(times, 1) if time <= 1.06 * min(times))


@triton.jit
def place(s_tiles, tiles, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, FAR: tl.constexpr):
    """The sample, tile number, channels (a column) and positions (a row) of this program."""
    pid = tl.program_id(0)
    n = (pid // tiles).to(tl.int64)
    k = pid % tiles
    c = (k // s_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = (k % s_tiles) * BLOCK_S + tl.arange(0, BLOCK_S)
    if FAR:
        c = c.to(tl.int64)
        s = s.to(tl.int64)
    return n, k, c[:, None], s[None, :]


def precision(x: Tensor) -> str:
    """How products of x's type are taken: float32 follows torch.backends.cuda.matmul.allow_tf32."""
    return "tf32" if x.dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def wide(x: Tensor) -> bool:
    """The interpreter, which is NumPy, has no product of bfloat16; float32 gives the same numbers."""
    return x.device.type == "cpu" and x.dtype is torch.bfloat16


class Aot(NamedTuple):
    """One ahead-of-time compile: a kernel, its argument types and its constants (see aot.py)."""

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...]


def tile_options(warps: int, stages: int, registers: int = 0) -> dict[str, int]:
    """Launch options of a product's tile; ``registers`` a thread where the assembler's own choice spills."""
    return {"num_warps": warps, "num_stages": stages} | ({"maxnreg": registers} if registers else {})


def variant(
    label: str,
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    ones: Iterable[str] | None = None,
    **launch: int,
) -> Aot:
    """A compile of ``kernel`` with options ``launch``: pointers as ``types`` says, sizes and strides as for dense
    tensors.

    That is, as the launcher specialises them: 32-bit multiples of 16, and 1 where ``ones`` says. ``ones=None`` is the
        other
    extreme: 64 bits about which nothing is known.
    """
    pointers = tuple(name for name in kernel.arg_names if types.get(name, "").startswith("*"))
    sizes = [name for name in kernel.arg_names if name not in types and name not in constants]
    if ones is None:
        signature = dict(types) | dict.fromkeys(sizes, "i64")
        return Aot(label, kernel, _ordered(kernel, signature, constants), dict(constants), launch, pointers)
    constants = {**constants, **{name: 1 for name in ones if name in sizes}}
    signature = dict(types) | dict.fromkeys(sizes, "i32")
    aligned = (*pointers, *(name for name in sizes if name not in constants))
    return Aot(label, kernel, _ordered(kernel, signature, constants), dict(constants), launch, aligned)


def tiled_variant(
    choices: Mapping[str, Choice],
    kind: str,
    types: Mapping[str, str],
    label: str,
    kernel: Any,
    ones: Iterable[str] | None,
    **constants: Any,
) -> Aot:
    """A variant of a kernel that takes a tile of ``kind`` at a time, as the choice of its name has it now."""
    choice = choices[kernel.fn.__name__[1:]].of(int(kind[2:]) // 8)
    own = {name: types[name] for name in kernel.arg_names if name in types}
    launch = options(choice["tile"], constants["FAR"], each=choice["each"])
    return variant(f"{label} {kind}", kernel, own, constants | {"BLOCK": choice["tile"]}, ones, **launch)


def _ordered(kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, str]:
    return {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
