"""``python -m benchmarks``: runs the suite, writes the JSON, prints the table, draws the plot."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).parent


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def share(p: dict[str, Any]) -> str:
    """Of what the machine can do, as measured in the same run: the case's library calls, or whichever of copying and
    multiplying bounds it."""
    copy, matrix, floor = p["share_of_copy"], p["share_of_matrix_rate"], p.get("share_of_floor")
    if floor is not None:
        return f"{floor:.0%} of its library calls"
    if matrix is not None and (copy is None or matrix >= copy):
        return f"{matrix:.0%} of matrix rate"
    return "" if copy is None else f"{copy:.0%} of copy"


def table(results: dict[str, Any]) -> str:
    """One row per case and provider: how many times genfast's time, the share of the ceilings, and the memory."""
    rows = []
    for case in results["cases"]:
        for name, p in case["providers"].items():
            peak = p["peak_bytes"]
            rows.append([
                case["case"] if name == next(iter(case["providers"])) else "", name, f"{1e3 * p['median_s']:.3f}",
                f"{p['times_genfast']:.2f}x", share(p), "" if peak is None else f"{peak / 2**20:.1f}",
            ])  # fmt: skip
    text = tabulate(rows, headers=["case", "provider", "ms", "time / genfast", "of the bound", "peak MiB"])
    overhead = [
        [o["op"], o["aten"], f"{1e6 * o['genfast_s']:.2f}", f"{1e6 * o['aten_s']:.2f}", f"{1e6 * o['over_s']:+.2f}"]
        for o in results["overhead"]
    ]
    return f"{text}\n\n" + tabulate(overhead, headers=["op, one element, no grad", "ATen", "us", "ATen us", "over"])


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars: each provider's time as a multiple of genfast's, one group per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {
        "reference": "#888888",
        "compile": "#d08a2e",
        "trick": "#5a8fc4",
        "peer": "#a05195",
        "floor": "#cccccc",
        "genfast": "#2a9d5c",
    }
    bars = []
    for case in reversed(results["cases"]):
        bars.append(None)
        bars.extend((case["case"], name, p["times_genfast"]) for name, p in reversed(case["providers"].items()))
    figure, axes = pyplot.subplots(figsize=(10, 0.24 * len(bars) + 1.2), layout="constrained")
    for y, bar in enumerate(bars):
        if bar is None:
            continue
        _, name, value = bar
        axes.barh(y, value, color=colours.get(name.split()[0]), height=0.8)
        axes.text(value, y, f" {name} {value:.2f}x", va="center", fontsize=7)
    ends = [y for y, bar in enumerate(bars) if bar is None][1:] + [len(bars)]
    axes.set_yticks([e - 1 for e in ends], [bars[e - 1][0] for e in ends], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"time relative to genfast, lower is faster ({results['environment']['device']})")
    if max(bar[2] for bar in bars if bar) > 30:  # samplers
        axes.set_xscale("log")
        axes.set_xlim(0.2, 3 * max(bar[2] for bar in bars if bar))
    else:
        axes.set_xlim(0, 1.15 * max(bar[2] for bar in bars if bar))
    axes.margins(y=0.01)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)
    pyplot.close(figure)


def environment(device: str) -> dict[str, Any]:
    import torch

    import genfast

    found = genfast.info()
    name = found["gpu"]["name"] if device == "cuda" else f"{found['cpu']['processor']}, {found['cpu']['kernels']}"
    return {
        "device": name, "threads": torch.get_num_threads(), "versions": found["versions"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results with the new cases in the place of those of the same name."""
    found = {case["case"]: case for case in new["cases"]}
    kept = [found.pop(case["case"], case) for case in old["cases"]]
    cases = sorted([*kept, *found.values()], key=lambda case: case["case"].split()[0])
    return new | {"cases": cases, "overhead": new["overhead"] or old["overhead"]}


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: under two minutes on two cores")
    parser.add_argument("-k", dest="filter", help="only the cases whose name matches this pytest expression")
    parser.add_argument("--update", action="store_true", help="with -k: put these cases into the device's results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the JSON and the plot")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw.json")
        command = [
            sys.executable, "-m", "pytest", str(HERE / "test_cases.py"), "-p", "no:cacheprovider", "-q", "--override-ini",
            "addopts=", "--benchmark-columns=min,median,rounds", f"--benchmark-json={raw}", "-v",
        ]  # fmt: skip
        if a.filter:
            command += ["-k", a.filter]
        if a.list:
            command += ["--collect-only"]
        settings = {"GENFAST_BENCH_QUICK": str(int(a.quick)), "GENFAST_BENCH_DEVICE": a.device}
        status = subprocess.run(command, env=os.environ | settings, check=False, cwd=HERE.parent).returncode
        if status or a.list:
            return status
        recorded = [b["extra_info"] for b in json.loads(raw.read_text())["benchmarks"]]
    results = {
        "environment": environment(a.device),
        "quick": a.quick,
        "cases": [r for r in recorded if "case" in r],
        "overhead": next((r["overhead"] for r in recorded if "overhead" in r), []),
    }
    for case in results["cases"]:
        case["date"] = results["environment"]["date"]
    name = slug(results["environment"]["device"]) + ("-quick" if a.quick else "")
    if a.filter and a.update and (a.out / f"{name}.json").exists():
        results = merged(json.loads((a.out / f"{name}.json").read_text()), results)
    elif a.filter:
        name += "-part"
    write(a.out / f"{name}.json", results)
    print("\n" + table(results))
    if results["cases"]:
        plot(results, a.out / f"{name}.png")
    print(f"\n{a.out / name}.json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
