"""``python -m benchmarks.tabular``: MAF and NSF on real tables beside zuko's, from the same initial values on the same batches.

zuko's weights are copied into the same flow of our layers, then both train in turns: Adam, the same order of batches, the same
number of steps. The table gives the mean log-likelihood of held-out rows, in nats (standardised by the training rows), at the
end and at the best of the evaluations on the way, and the time of a training step and of drawing 256 samples.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.__main__ import HERE, environment, slug, write
from genfast import data, models
from genfast import nn as gnn

TABLES = ("digits", "breast_cancer", "diabetes")
EVALUATIONS = 10  # on the way
TURNS = 20
SAMPLES = 256


def zuko_flow(kind: str, dim: int, transforms: int, hidden: int) -> nn.Module:
    """zuko's own, with its defaults but for the sizes."""
    import zuko

    family = {"MAF": zuko.flows.MAF, "NSF": zuko.flows.NSF}[kind]
    flow: nn.Module = family(dim, transforms=transforms, hidden_features=(hidden, hidden))
    return flow


def from_zuko(flow: Any, layers: Any = gnn, family: Any = models.Flow) -> models.Flow:
    """The same flow of our layers, or of the plain ones, with a copy of the weights.

    A hidden unit of zuko's stands for one of the outputs that see something, in turn: degrees 1 to D - 1 over and over.
    """
    dim = flow.base().event_shape[0]
    steps = []
    for theirs in flow.transform.transforms:
        linears = [m for m in theirs.hyper if isinstance(m, nn.Linear)]
        widths = [m.out_features for m in linears[:-1]]
        degrees = [1 + torch.arange(w) % max(1, dim - 1) for w in widths]
        made = layers.MADE(dim, widths, outputs=theirs.total, order=theirs.order + 1, degrees=degrees)
        for own, other in zip(made.linears, linears):
            own.load_state_dict({"weight": other.weight, "bias": other.bias}, strict=False)
            if not torch.equal(own.mask, other.mask):
                raise AssertionError("from_zuko: the masks differ")
        if theirs.total == 2:
            steps.append(layers.MaskedAutoregressive(made, normalising=False))
        else:
            bins = (theirs.total + 1) // 3
            steps.append(layers.MaskedAutoregressive(made, transform="spline", bins=bins, bound=5.0, convention="zuko"))
    result: models.Flow = family(models.DiagonalGaussian(dim, trainable=False), steps)
    return result


class Run:
    """One flow on one table."""

    def __init__(self, flow: Any, table: Any, ours: bool, lr: float, batch: int, seed: int) -> None:
        self.flow, self.table, self.ours, self.batch = flow, table, ours, batch
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=lr, fused=True)
        self.generator = torch.Generator().manual_seed(seed)
        self.times: list[float] = []
        self.curve: list[float] = []

    def log_prob(self, x: Tensor) -> Tensor:
        result: Tensor = self.flow.log_prob(x) if self.ours else self.flow().log_prob(x)
        return result

    def step(self) -> None:
        index = torch.randint(len(self.table.train), (self.batch,), generator=self.generator)
        x = self.table.train[index]
        start = time.perf_counter()
        loss = -self.log_prob(x).mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.times.append(time.perf_counter() - start)

    @torch.no_grad()
    def evaluate(self) -> None:
        self.curve.append(float(self.log_prob(self.table.test).double().mean()))

    @torch.no_grad()
    def sampling(self) -> float:
        """Median seconds of three draws."""
        times = []
        for _ in range(3):
            start = time.perf_counter()
            self.flow.sample(SAMPLES) if self.ours else self.flow().sample((SAMPLES,))
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def compare(
    name: str, kind: str, *, steps: int, transforms: int = 3, hidden: int = 64, lr: float = 1e-3, batch: int = 256,
    seed: int = 0, progress: Any = None,
) -> dict[str, Any]:  # fmt: skip
    """Both on one table; what each has reached, and how fast."""
    table = data.table(name, seed=seed)
    torch.manual_seed(seed)
    theirs = zuko_flow(kind, table.shape[0], transforms, hidden)
    ours = from_zuko(theirs)
    with torch.no_grad():
        apart = float((ours.log_prob(table.test) - theirs().log_prob(table.test)).abs().max())
    runs = {"zuko": Run(theirs, table, False, lr, batch, seed), "genfast": Run(ours, table, True, lr, batch, seed)}
    done = 0
    for part in range(TURNS):
        until = steps * (part + 1) // TURNS
        order = list(runs.values())[:: 1 if part % 2 else -1]  # neither is always first
        for run in order:
            for _ in range(until - done):
                run.step()
                if progress is not None:
                    progress.update()
        if (part + 1) % (TURNS // EVALUATIONS) == 0:
            for run in order:
                run.evaluate()
        done = until
    return {
        "table": name, "model": kind, "rows": len(table.train), "held_out": len(table.test), "features": table.shape[0],
        "steps": steps, "transforms": transforms, "hidden": hidden, "lr": lr, "batch": batch, "seed": seed,
        "initially_apart": apart,
        "runs": {
            key: {
                "final": run.curve[-1], "best": max(run.curve), "curve": run.curve, "step_s": statistics.median(run.times),
                "sample_s": run.sampling(),
            }
            for key, run in runs.items()
        },
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """A row for each table and model."""
    rows = []
    for one in results["comparisons"]:
        ours, theirs = one["runs"]["genfast"], one["runs"]["zuko"]
        rows.append([
            f"{one['table']} ({one['rows']} x {one['features']})", one["model"],
            *(f"{r[key]:.3f}" for key in ("final", "best") for r in (theirs, ours)),
            *(f"{1e3 * r['step_s']:.1f}" for r in (theirs, ours)), f"{theirs['step_s'] / ours['step_s']:.1f}x",
            *(f"{1e3 * r['sample_s']:.1f}" for r in (theirs, ours)), f"{theirs['sample_s'] / ours['sample_s']:.1f}x",
        ])  # fmt: skip
    heads = [
        "table", "model", "zuko, nats", "genfast", "zuko, best", "genfast", "zuko, ms a step", "genfast", "faster",
        f"zuko, ms for {SAMPLES} samples", "genfast", "faster",
    ]  # fmt: skip
    return tabulate(rows, headers=heads, disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tabular", description=__doc__)
    parser.add_argument("--tables", default=",".join(TABLES), help=f"with commas (default {','.join(TABLES)})")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--transforms", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64, help="units of each of the two hidden layers")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    jobs = [(name, kind) for name in a.tables.split(",") for kind in ("MAF", "NSF")]
    bar = tqdm(total=2 * a.steps * len(jobs), unit="step", disable=not sys.stderr.isatty(), desc="training")
    options = dict(steps=a.steps, transforms=a.transforms, hidden=a.hidden, lr=a.lr, batch=a.batch, seed=a.seed, progress=bar)
    results: dict[str, Any] = {"environment": environment("cpu"), "comparisons": []}
    for name, kind in jobs:
        results["comparisons"].append(compare(name, kind, **options))
    bar.close()
    name = f"tabular-{slug(results['environment']['device'])}"
    write(a.out / f"{name}.json", results)
    print(table(results))
    print(f"in {a.out / name}.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
