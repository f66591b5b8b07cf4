"""``python -m benchmarks.sass``: what the Triton kernels bound by memory became for sm_90, against the time of their
memory.

One row a launch of each case of the sweeps (tune.py), at its first real size, compiled without a GPU: widths of its
accesses, instructions by class, what its busiest unit is and how long that is busy, as a share of the time that the
bytes take. Over 100% the kernel is not bound by memory. Counts are of the machine code as it stands: both sides of a
branch, and of a kernel with a loop over tiles only that loop. Predictions, to be held against measured times; nothing
here is one.
"""

from __future__ import annotations

import argparse
import warnings
from typing import Any

from tabulate import tabulate

from benchmarks._launches import Launch, launches, read
from benchmarks.tune import Case, Job, cases, sweeps

# An H200 SXM: 132 multiprocessors of four quarters, at the clock that a busy one holds, and the copy rate once seen.
QUARTERS, CLOCK, COPY = 4 * 132, 1.7e9, 4.3e12
HEADERS = (
    "case", "kernel", "blocks", "warps", "regs", "shared", "spills", "occupancy", "loads", "stores", "moved", "issued",
    "alu",
    "special", "64-bit", "bound by", "of memory's time", "us",
)  # fmt: skip


def row(case: Case, job: Job, launch: Launch) -> list[Any]:
    """The table's row; of what depends on the bytes that a warp moves nothing where it moves none."""
    code = read(launch.sass)
    blocks, warps = 1, launch.warps
    for n in launch.grid:
        blocks *= n
    widths = (" ".join(f"{n}x{size}" for size, n in sorted(c.items(), reverse=True)) for c in (code.loads, code.stores))
    each = 32 * code.moved  # bytes of one warp, once through
    unit, cycles = max(code.busy.items(), key=lambda item: item[1])
    # The bytes of all warps over those that the work needs: beyond 1 some are masked off, or come again from a cache.
    moved = each * warps * blocks / job.bytes if job.bytes and not code.loop else 1.0
    share = moved * cycles / each * COPY / (QUARTERS * CLOCK) if each else 0.0
    unit = unit if share > 1 else "memory"
    return [
        case.name, launch.kernel, blocks, warps, launch.registers, launch.shared, launch.spilled,
        f"{launch.occupancy:.0%}",
        *widths, "loop" if code.loop else f"{moved:.2f}x", code.issued, code.counts["alu"], code.counts["special"],
        code.wide,
        unit, f"{share:.0%}", f"{1e6 * max(1.0, share) * job.bytes / COPY:.0f}" if job.bytes else "",
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--op", nargs="+", default=[], metavar="NAME", help="a kernel file, or file.choice; default: all"
    )
    parser.add_argument("--all", action="store_true", help="also the launches that are small beside the case's largest")
    a = parser.parse_args()
    try:
        found = sweeps(a.op)
    except ValueError as wrong:
        parser.error(str(wrong))
    warnings.simplefilter("ignore")
    rows = []
    for case in cases(found):
        if case.label != next(iter(label for label in case.sweep.sizes if label != "tiny")):
            continue
        jobs: list[Job] = []

        def make(device: str, case: Case = case, jobs: list[Job] = jobs) -> Any:
            jobs.append(case.make(device))
            return jobs[0].work

        made = launches(make)
        most = max(launch.grid[0] * launch.warps for launch in made)
        rows += [row(case, jobs[0], m) for m in made if a.all or 8 * m.grid[0] * m.warps >= most]
    print(tabulate(rows, headers=HEADERS, disable_numparse=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
