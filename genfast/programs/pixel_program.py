"""A pixel program: the flat list of steps that csrc/{cpu,cuda}/pixel_program.* run, and the memory that they run on.

Values are ordered by when they are known at pixel (i, j): ``S`` before anything is sampled, ``R`` (rows) when row i
begins, ``P`` (pixel) before the pixel is sampled, ``Q`` after it, ``F`` (following) when row i is complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

KINDS = (
    "conv", "copy", "add", "relu", "elu", "tanh", "sigmoid", "scale", "gate", "linear_gate", "concat_elu", "static",
    "embed",
    "input", "categorical", "mixture",
)  # fmt: skip
LANES = 16  # channels are padded to the widest vector


def padded(channels: int) -> int:
    """Room for ``channels`` in whole vectors."""
    return -(-channels // LANES) * LANES


@dataclass
class Buffer:
    """A feature map: a ring of rows of (column, channel), with zero columns left and right."""

    name: str
    channels: int  # as they lie, padding included
    scale: int = 1  # one column or row here is ``scale`` of the image's
    rows: int = 1
    left: int = 0
    right: int = 0
    offset: int = 0

    def floats(self, width: int) -> int:
        return self.rows * (self.left + width // self.scale + self.right) * self.channels


@dataclass
class Step:
    """One step, in the order of csrc/cpu/pixel_program.cpp's Step."""

    kind: str
    scale: int = 1
    out: int = -1
    out_offset: int = 0
    count: int = 0
    a: int = -1
    a_offset: int = 0
    b: int = -1
    b_offset: int = 0
    weight: int = -1
    bias: int = -1
    taps: list[tuple[int, int, int, int]] = field(default_factory=list)  # row, column, first channel, channels
    stride: int = 1
    up: int = 1
    relu: bool = False
    arg0: int = 0
    arg1: int = 0
    barrier: bool = False
    phase: int = 0

    def numbers(self, first: int) -> list[int]:
        return [
            KINDS.index(self.kind), self.scale, self.out, self.out_offset, self.count, self.a, self.a_offset, self.b,
            self.b_offset, self.weight, self.bias, first, len(self.taps), self.stride, self.up, int(self.relu),
            self.arg0,
            self.arg1, int(self.barrier), self.phase,
        ]  # fmt: skip

    def describe(self, buffers: Sequence[Buffer]) -> str:
        """A line such as ``h2[0:64] = conv(h1, 4 taps, 256 in) + p2``."""
        out = "" if self.out < 0 else f"{buffers[self.out].name}[{self.out_offset}:{self.out_offset + self.count}] = "
        args = [] if self.a < 0 else [buffers[self.a].name]
        if self.kind == "conv":
            args.append(f"{len(self.taps)} taps, {sum(t[3] for t in self.taps)} products a channel")
            tail = "" if self.b < 0 else f" + {buffers[self.b].name}"
            return (
                f"{out}{'relu ' if self.relu else ''}conv({', '.join(args)}){' + bias' if self.bias >= 0 else ''}{tail}"
            )
        if self.b >= 0:
            args.append(buffers[self.b].name)
        if self.kind in ("input", "embed", "categorical"):
            args.append(f"colour {self.arg0}")
        if self.kind == "copy" and (self.arg0 or self.arg1):
            args.append(f"shifted {self.arg0} down, {self.arg1} right")
        return f"{out}{self.kind}({', '.join(args)})"


@dataclass
class Program:
    """A lowered network, ready to run."""

    channels: int
    height: int  # rows of the image; of a video all rows of all frames
    width: int
    levels: int
    uniforms: int  # random numbers a pixel
    record: int  # what a pixel is drawn from: logits or mixture parameters, all colours
    buffers: list[Buffer]
    begin: list[Step]
    pixel: list[Step]
    end: list[Step]
    weights: Tensor  # float32, everything that the steps multiply by
    statics: list[str]  # names of the values that are computed once for an image, in the order of their steps
    frames: int = 1
    gap: int = 0  # rows of zeros behind each frame, which its neighbours' taps see as outside

    def __post_init__(self) -> None:
        offset = 0
        for b in self.buffers:
            b.offset = offset
            offset += padded(b.floats(self.width))  # aligned, since the GPU reads four floats at a time
        self.image_floats = offset
        self._barriers()
        steps = [*self.begin, *self.pixel, *self.end]
        first, taps, numbers = 0, [], []
        for s in steps:
            numbers += s.numbers(first)
            taps += [n for t in s.taps for n in t]
            first += len(s.taps)
        header = [
            len(self.buffers),
            len(self.begin),
            len(self.pixel),
            len(self.end),
            self.height,
            self.width,
            self.channels,
            self.image_floats,
            self.uniforms,
            self.levels,
        ]
        layout = [
            n
            for b in self.buffers
            for n in (b.offset, b.rows, b.left + self.width // b.scale + b.right, b.left, b.channels, b.scale)
        ]
        self.code = torch.tensor([*header, *layout, *numbers, *taps], dtype=torch.int64)

    def _barriers(self) -> None:
        """Marks the steps before which threads that share a row, or on a GPU a pixel, must wait for one another."""
        for steps in (self.begin, self.pixel, self.end):
            written: set[int] = set()  # since the last barrier; -1 stands for the image, and where no buffer is read
            for s in steps:
                s.barrier = bool(written & {s.a, s.b})
                written = {s.out} if s.barrier else written | {s.out}

    @property
    def active(self) -> int:
        """Rows of a frame."""
        return self.height // self.frames

    @property
    def period(self) -> int:
        """Rows from a frame to the next."""
        return self.active + self.gap

    @property
    def multiplications(self) -> int:
        """Of one image, in the products."""
        total = 0
        for s in (*self.begin, *self.pixel, *self.end):
            points = (self.height // s.scale) * (self.width // s.scale) // (s.up * s.up)
            total += points * s.count * sum(t[3] for t in s.taps)
        return total

    def __str__(self) -> str:
        lines = [
            f"pixel program for {self.channels} x {self.height} x {self.width}, {self.levels} levels: "
            f"{self.image_floats * 4 / 2**10:.0f} KiB of feature maps an image, "
            f"{self.weights.numel() * 4 / 2**20:.2f} MiB of "
            f"weights, {self.multiplications / 1e6:.1f} million products an image"
        ]
        for title, steps in (("row begins", self.begin), ("pixel", self.pixel), ("row ends", self.end)):
            lines.append(f"{title}:")
            lines += [f"  {s.describe(self.buffers)}{f'  (1/{s.scale})' if s.scale > 1 else ''}" for s in steps]
        return "\n".join(lines)
