"""``python -m benchmarks.tabular``: MAF and NSF on real tables beside zuko's, from the same initial values on the same
batches.

zuko's weights are copied into the same flow of our layers, then both train in turns: Adam, the same order of batches,
the same number of steps. The table gives the mean log-likelihood of held-out rows, in nats (standardised by the
training rows), at the end and at the best of the evaluations on the way, the time of a training step and of drawing 256
samples, and how far the last
gradient is from the same in float64: steep splines amplify rounding, so in float32 the two runs of an NSF part after
    some
hundred steps, to either side, which several seeds show; with ``--dtype float64`` they part later, having been equal to
1e-10.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
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
        made = layers.MADENetwork(dim, widths, outputs=theirs.total, order=theirs.order + 1, degrees=degrees)
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

    def gradient_error(self) -> float:
        """Of the parameters' gradient on the first rows, against float64."""
        found = []
        for dtype in (torch.float64, torch.float32):
            flow = copy.deepcopy(self.flow).to(dtype)
            x = self.table.train[: self.batch].to(dtype)
            loss = (flow.log_prob(x) if self.ours else flow().log_prob(x)).mean()
            grads = torch.autograd.grad(loss, [p for p in flow.parameters() if p.requires_grad])
            found.append(torch.cat([g.double().flatten() for g in grads]))
        return float((found[1] - found[0]).norm() / found[0].norm())

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
    name: str,
    kind: str,
    *,
    steps: int,
    transforms: int = 3,
    hidden: int = 64,
    lr: float = 1e-3,
    batch: int = 256,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: Any = None,
) -> dict[str, Any]:
    """Both on one table; what each has reached, and how fast."""
    table = data.table(name, seed=seed)
    table = dataclasses.replace(table, train=table.train.to(dtype), test=table.test.to(dtype))
    torch.manual_seed(seed)
    theirs = zuko_flow(kind, table.shape[0], transforms, hidden)
    ours = from_zuko(theirs).to(dtype)
    theirs = theirs.to(dtype)
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
        "dtype": str(dtype).removeprefix("torch."), "initially_apart": apart,
        "runs": {
            key: {
                "final": run.curve[-1], "best": max(run.curve), "curve": run.curve,
                "step_s": statistics.median(run.times),
                "sample_s": run.sampling(), "gradient_error": run.gradient_error(),
            }
            for key, run in runs.items()
        },
    }  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """A row for each table and model: means over the seeds, and of ours less zuko's."""
    jobs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in results["comparisons"]:
        jobs.setdefault((one["table"], one["model"]), []).append(one)
    rows = []
    for (name, kind), found in jobs.items():
        ours, theirs = ([one["runs"][who] for one in found] for who in ("genfast", "zuko"))
        apart = [a["final"] - b["final"] for a, b in zip(ours, theirs)]
        spread = f" +- {statistics.stdev(apart) / len(apart) ** 0.5:.3f}" if len(apart) > 1 else ""
        final, best, step, sample, error = (
            [statistics.mean(run[key] for run in who) for who in (theirs, ours)]
            for key in ("final", "best", "step_s", "sample_s", "gradient_error")
        )
        rows.append(
            [
                f"{name} ({found[0]['rows']} x {found[0]['features']})",
                kind,
                *(f"{v:.3f}" for v in final),
                f"{statistics.mean(apart):+.3f}{spread}",
                *(f"{v:.3f}" for v in best),
                *(f"{v:.0e}" for v in error),
                *(f"{1e3 * v:.1f}" for v in step),
                f"{step[0] / step[1]:.1f}x",
                *(f"{1e3 * v:.1f}" for v in sample),
                f"{sample[0] / sample[1]:.1f}x",
            ]
        )
    heads = [
        "table", "model", "zuko,\nnats", "genfast", "difference", "zuko,\nbest", "genfast", "zuko,\ngradient\nerror",
        "genfast",
        "zuko,\nms a step", "genfast", "faster", f"zuko,\nms for {SAMPLES}\nsamples", "genfast", "faster",
    ]  # fmt: skip
    return tabulate(rows, headers=heads, disable_numparse=True)


def main(argv: list[str] | None = None) -> int:
    from tqdm import tqdm

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tabular", description=__doc__)
    parser.add_argument("--tables", default=",".join(TABLES), help=f"with commas (default {','.join(TABLES)})")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--transforms", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=64, help="units of each of the two hidden layers")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    jobs = [(name, kind) for name in a.tables.split(",") for kind in ("MAF", "NSF")]
    bar = tqdm(total=2 * a.steps * a.seeds * len(jobs), unit="step", disable=not sys.stderr.isatty(), desc="training")
    options = dict(
        steps=a.steps,
        transforms=a.transforms,
        hidden=a.hidden,
        lr=a.lr,
        batch=a.batch,
        dtype=getattr(torch, a.dtype),
        progress=bar,
    )
    results: dict[str, Any] = {"environment": environment("cpu"), "comparisons": []}
    for name, kind in jobs:
        results["comparisons"] += [compare(name, kind, seed=seed, **options) for seed in range(a.seeds)]
    bar.close()
    name = f"tabular{'' if a.dtype == 'float32' else '-float64'}-{slug(results['environment']['device'])}"
    write(a.out / f"{name}.json", results)
    print(table(results))
    print(f"in {a.out / name}.json")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
