"""``python -m benchmarks.contextual``: the contextual loss of 65536 features of 256 channels, forward and backward.

The usual form keeps five arrays of N x M there, 86 GB (17 GB each). Here time and peak memory are measured, and some
rows and columns, and the gradient of some rows, are compared with the same in float64, each from its definition.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor

from benchmarks.__main__ import HERE, environment, slug, write
from genfast import ops
from genfast._peak_memory import peak_bytes
from genfast.ops.contextual_similarity import OP

BANDWIDTH, EPS = 0.5, 1e-5


def row(x: Tensor, y: Tensor) -> Tensor:
    """A_i of one unit row x (C,) against all of y (M, C), by the definition."""
    d = (1 - y @ x).clamp_min(0)
    return torch.softmax((1 - d / (d.min() + EPS)) / BANDWIDTH, 0)


def run(side: int, channels: int, checked: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, channels, side, side, generator=generator) for _ in range(2))
    x.requires_grad_()
    found: list[Tensor] = []

    def work() -> None:
        similarity = ops.contextual_similarity(x, y, bandwidth=BANDWIDTH, eps=EPS)
        found[:] = [similarity.detach(), *torch.autograd.grad(-similarity.log(), x)]

    start = time.perf_counter()
    similarity = ops.contextual_similarity(x.detach(), y, bandwidth=BANDWIDTH, eps=EPS)
    forward = time.perf_counter() - start
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    peak = peak_bytes(work)
    assert torch.equal(similarity, found[0])

    mean = y.mean((0, 2, 3), keepdim=True)
    rows, targets = (F.normalize(t.detach() - mean, dim=1).flatten(2)[0].T.contiguous() for t in (x, y))
    value, winner = (
        t[0] for t in OP(rows[None], targets[None], None, None, 0.0, BANDWIDTH, EPS, "cosine", "sources", False)[:2]
    )
    wide, count = targets.double(), len(targets)
    columns = torch.randint(count, (checked,), generator=generator)
    sources = winner[columns]
    worst = {"value": 0.0, "gradient": 0.0}
    beaten = 0.0
    cx = value.double().mean()
    centred = (x.detach() - mean).double().flatten(2)[0].T
    for i, j in zip(sources.tolist(), columns.tolist()):
        leaf = centred[i].clone().requires_grad_()
        a = row(leaf / leaf.norm(), wide)
        # The loss as a function of this row: only the columns that it wins depend on it.
        (expected,) = torch.autograd.grad(-(a * (winner == i)).sum() / (count * cx), leaf)
        a = a.detach()
        worst["value"] = max(worst["value"], float((a[j] - value[j]).abs() / a[j]))
        beaten = max(beaten, float((a / value.double()).max()))
        gradient = found[1].flatten(2)[0, :, i].double()
        worst["gradient"] = max(worst["gradient"], float((gradient - expected).norm() / expected.norm()))
    return {
        "environment": environment("cpu"),
        "features": count,
        "channels": channels,
        "similarity": float(similarity),
        "forward_s": forward,
        "forward_backward_s": seconds,
        "peak_bytes": peak,
        "eager_array_bytes": 4 * count * count,
        "rows_checked": checked,
        "worst_relative_error": worst,
        "largest_a_over_its_maximum": beaten,
        "flops_forward": 2 * count * count * channels,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.contextual", description=__doc__)
    parser.add_argument("--side", type=int, default=256, help="of the feature maps (default 256: 65536 features)")
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--checked", type=int, default=64, help="rows compared with float64 (default 64)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    results = run(a.side, a.channels, a.checked)
    path = a.out / f"contextual-{slug(results['environment']['device'])}.json"
    write(path, results)
    worst = results["worst_relative_error"]
    print(
        tabulate(
            [
                ["features", results["features"]],
                ["forward", f"{results['forward_s']:.2f} s"],
                ["forward and backward", f"{results['forward_backward_s']:.2f} s"],
                ["forward's product", f"{1e-9 * results['flops_forward'] / results['forward_s']:.0f} GFLOP/s"],
                ["peak memory beyond the features", f"{results['peak_bytes'] / 2**20:.0f} MiB"],
                ["one array of N x M", f"{results['eager_array_bytes'] / 2**20:.0f} MiB"],
                [f"worst of {a.checked} values against float64", f"{worst['value']:.1e}"],
                [f"worst of {a.checked} rows' gradients", f"{worst['gradient']:.1e}"],
                ["largest of their entries over the maximum found", f"{results['largest_a_over_its_maximum']:.7f}"],
            ]
        )
    )
    print(f"in {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
