"""``python -m benchmarks``: runs the suite, writes the JSON, prints the table, draws the plot."""

from __future__ import annotations

import argparse
import datetime
import io
import json
import os
import re
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tabulate import tabulate

HERE = Path(__file__).parent
CASES = HERE / "test_cases.py"


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
    replayed = any("graph_s" in p for case in results["cases"] for p in case["providers"].values())
    for case in results["cases"]:
        first = case["case"]
        for name, p in case["providers"].items():
            peak, times = p["peak_bytes"], p["times_genfast"]
            part = p.get("part")
            label = name if part is None else f"{name} ({part[0]} of {part[1]} steps, extrapolated)"
            graph = [f"{1e3 * p['graph_s']:.3f}" if "graph_s" in p else ""] * replayed
            rows.append(
                [
                    first,
                    label,
                    f"{1e3 * p['median_s']:.3f}",
                    *graph,
                    "" if times is None else f"{times:.2f}x",
                    share(p),
                    "" if peak is None else f"{peak / 2**20:.1f}",
                ]
            )
            first = ""
        for name, reason in case.get("absent", {}).items():
            rows.append([first, f"{name}: {reason}"])
            first = ""
    headers = ["case", "provider", "ms", *["graph ms"] * replayed, "time / genfast", "of the bound", "peak MiB"]
    text = tabulate(rows, headers=headers)
    overhead = [
        [o["op"], o["aten"], f"{1e6 * o['genfast_s']:.2f}", f"{1e6 * o['aten_s']:.2f}", f"{1e6 * o['over_s']:+.2f}"]
        for o in results["overhead"]
    ]
    text += "\n\n" + tabulate(overhead, headers=["op, one element, no grad", "ATen", "us", "ATen us", "over"])
    text += "".join(f"\nFAILED {f['case']}: {f['error']}" for f in results.get("failed", []))
    late = results.get("left_out", [])
    return text + (f"\nleft out, time was up: {len(late)} cases: {'; '.join(late)}" if late else "")


WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.4, "alpha": 0.8}
COLOURS = {
    "reference": "#888888",
    "compile": "#d08a2e",
    "trick": "#5a8fc4",
    "peer": "#a05195",
    "graph": "#7a5f3a",
    "floor": "#cccccc",
    "genfast": "#2a9d5c",
}


def plot(cases: list[dict[str, Any]], device: str, path: Path) -> None:
    """Bars: each provider's time as a multiple of genfast's, one group per case; what could not run is told in its
    place."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch
    from PIL import Image

    figure, axes = pyplot.subplots()
    y, ticks, kinds = 0.0, [], []
    shown = [p["times_genfast"] for case in cases for p in case["providers"].values() if p["times_genfast"] is not None]
    most = max(shown, default=1.0)
    for case in reversed(cases):
        absent = case.get("absent", {})
        for name, reason in reversed(absent.items()):
            axes.text(
                0.0,
                y,
                f"  {name}: {reason[:90]}",
                va="center",
                fontsize=7,
                color="#b03030",
                transform=axes.get_yaxis_transform(),
            )
            y += 1
        for name, p in reversed(case["providers"].items()):
            value = p["times_genfast"]
            kinds.append(name.split()[0])
            said = (
                f"{1e3 * p['median_s']:.3g} ms" if value is None else f"{value:.2f}x" if value < 30 else f"{value:.0f}x"
            )
            said += "" if "part" not in p else " (extrapolated)"
            axes.barh(y, value or 0.0, color=COLOURS.get(name.split()[0]), height=0.8)
            axes.text(value or 0.0, y, f" {name} {said}", va="center", fontsize=7, bbox=WHITE)
            y += 1
        ticks.append((y - 1, case["case"]))
        y += 0.8
    axes.set_yticks([at for at, _ in ticks], [textwrap.fill(label, 48) for _, label in ticks], fontsize=7, va="top")
    axes.axvline(1, color="black", linewidth=0.8, zorder=1.5)  # above the bars, below the text
    axes.set_xlabel(f"time relative to genfast, lower is faster ({device})", fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if most > 30:  # samplers
        axes.set_xscale("log")
        axes.set_xlim(0.2, 4 * most)
    else:
        axes.set_xlim(0, 1.3 * max(1.0, most))
    axes.set_ylim(-0.8, y)
    height = 0.2 * y + 0.9
    figure.set_size_inches(9, height)
    legend = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in kinds]
    figure.legend(handles=legend, loc="outside upper right", ncols=len(legend), fontsize=7, frameon=False)
    figure.set_layout_engine("constrained")
    temporary = path.with_name(f".{path.name}")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(48).save(temporary, format="png", optimize=True)  # a third of the bytes
    os.replace(temporary, path)


def plots(results: dict[str, Any], path: Path) -> list[Path]:
    """Draws all cases beside the JSON at ``path`` and each op's in the folder of its name; returns what was written."""
    device = results["environment"]["device"]
    known: dict[str, str] = {}
    if any("op" not in case for case in results["cases"]):  # results of old
        from benchmarks.test_cases import cases

        known = {case.name: case.op for case in cases()}
    ops: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"]:
        op = case.get("op") or known.get(case["case"], slug(case["case"].split()[0]))
        ops.setdefault(op, []).append(case)
    written = []
    if results["cases"]:
        plot(results["cases"], device, path.with_suffix(".png"))
        written.append(path.with_suffix(".png"))
    for op, chosen in ops.items():
        path.with_suffix("").mkdir(exist_ok=True)
        written.append(path.with_suffix("") / f"{op}.png")
        plot(chosen, device, written[-1])
    return written


def environment(device: str) -> dict[str, Any]:
    import torch

    import genfast

    found = genfast.info()
    name = found["gpu"]["name"] if device == "cuda" else f"{found['cpu']['processor']}, {found['cpu']['kernels']}"
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "versions": found["versions"],
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **({"gpu": found["gpu"]} if device == "cuda" else {}),
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The old results with the new cases in the place of those of the same name."""
    found = {case["case"]: case for case in new["cases"]}
    kept = [found.pop(case["case"], case) for case in old["cases"]]
    cases = sorted([*kept, *found.values()], key=lambda case: case["case"].split()[0])
    whole = old | new | {"cases": cases, "overhead": new["overhead"] or old["overhead"]}
    if "ceilings" in old:
        whole["ceilings"] = new.get("ceilings") or old["ceilings"]
    return whole


def write(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(temporary, path)


class Recorder:
    """Takes each case's result from the process that measured it, and keeps what there is in the file."""

    def __init__(self, results: dict[str, Any], keep: Callable[[dict[str, Any]], None], last_words: Path) -> None:
        self.results, self.keep, self.last_words = results, keep, last_words

    def pytest_runtest_logreport(self, report: Any) -> None:
        found = next((json.loads(value) for key, value in report.user_properties if key == "result"), {})
        name = report.nodeid.partition("[")[2].removesuffix("]") or report.nodeid
        if report.failed:
            # Of a process that has ended, where it stood, the innermost call first.
            words = self.last_words.read_text().splitlines()[:12] if self.last_words.exists() else []
            self.results["failed"].append({"case": name, "error": "\n".join([_message(report)[:2000], *words])})
        elif report.skipped:
            self.results["left_out"].append(name)
        elif report.when != "call":
            return
        elif "case" in found:
            self.results["cases"].append(found["case"] | {"date": self.results["environment"]["date"]})
        else:
            self.results |= found
        self.keep(self.results)


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(report.longrepr if crash is None else crash.message)


def failures(results: dict[str, Any]) -> int:
    """Cases that failed, and providers that did in others."""
    return len(results["failed"]) + sum(r.startswith("failed") for c in results["cases"] for r in c["absent"].values())


def run(a: argparse.Namespace) -> int:
    import pytest

    words = [
        str(CASES),
        "-p",
        "no:cacheprovider",
        "-p",
        "xdist.plugin",
        "--override-ini",
        "addopts=",
        "--rootdir",
        str(HERE.parent),
    ]
    words += ["-k", a.filter] if a.filter else []
    os.environ |= {
        "GENFAST_BENCH_QUICK": str(int(a.quick)),
        "GENFAST_BENCH_DEVICE": a.device,
        "GENFAST_BENCH_COMPILE": str(int(not (a.quick or a.no_compile))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # whatever else is installed
    }
    if a.list:
        return int(pytest.main([*words, "--collect-only", "-q"]))
    cap = (90.0 if a.device == "cuda" else 1200.0) if a.cap is None else a.cap
    os.environ["GENFAST_BENCH_CAP"] = str(cap)
    if a.minutes is not None:
        os.environ["GENFAST_BENCH_UNTIL"] = str(time.time() + 60 * a.minutes)
    results: dict[str, Any] = {
        "environment": environment(a.device),
        "quick": a.quick,
        "cases": [],
        "overhead": [],
        "failed": [],
        "left_out": [],
    }
    if a.out.suffix == ".json":
        path = a.out
    else:
        path = a.out / f"{slug(results['environment']['device'])}{'-quick' if a.quick else ''}.json"
    if a.filter and not a.update and a.out.suffix != ".json":
        path = path.with_name(f"{path.stem}-part.json")
    old = json.loads(path.read_text()) if path.exists() else {}

    def kept(results: dict[str, Any]) -> dict[str, Any]:
        ordered = results | {"cases": sorted(results["cases"], key=lambda case: case["op"])}
        if a.filter and a.update and old:
            return merged(old, ordered)
        return {key: old[key] for key in ("gpu_check",) if key in old} | ordered  # what make gpu-check found stays

    with tempfile.TemporaryDirectory() as folder:
        last_words = Path(folder, "last-words.txt")
        os.environ["GENFAST_BENCH_LAST_WORDS"] = str(last_words)
        recorder = Recorder(results, lambda found: write(path, kept(found)), last_words)
        # One process beside this one measures, and another takes over from it if it ends: by a crash, a hang or a
        # sticky error.
        isolated = ["-n", "1", "--maxschedchunk", "1", "--max-worker-restart", "100", "-v"]
        status = int(pytest.main([*words, *isolated], plugins=[recorder]))
    if status not in (0, 1):  # nothing was collected, or it was interrupted
        return status
    whole = kept(results)
    print("\n" + table(whole))
    drawn = plots(whole, path)
    print(f"\n{path}{f', {drawn[0]} and {path.with_suffix(str())}/' if drawn else ''}")
    return int(failures(results) > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="fewer cases and rounds, without torch.compile: under two minutes on two cores",
    )
    parser.add_argument("-k", dest="filter", help="only the cases whose name matches this pytest expression")
    parser.add_argument("--update", action="store_true", help="with -k: put these cases into the device's results")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--out",
        type=Path,
        default=HERE / "results",
        help="folder for the JSON, named after the device, or a file .json; the plots go beside it",
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no case later; the most important come first")
    parser.add_argument("--cap", type=float, metavar="S", help="seconds that a case may take (1200, on a GPU 90)")
    parser.add_argument("--no-compile", action="store_true", help="leave the providers of torch.compile out")
    parser.add_argument("--list", action="store_true", help="print the cases and end; needs no such device")
    parser.add_argument(
        "--plot-only", type=Path, metavar="RESULTS.json", help="draw the plots of these results and end"
    )
    parser.add_argument(
        "--profile",
        metavar="OP",
        help="write a Chrome trace of genfast's work in a case, given by its op or its own name",
    )
    parser.add_argument(
        "--allow-missing-kernels",
        action="store_true",
        help="measure even where genfast's kernels are missing: its references",
    )
    a = parser.parse_args()
    if a.plot_only is not None:
        if not a.plot_only.is_file():
            parser.error(f"--plot-only {a.plot_only}: there is no such file; expected the JSON of an earlier run")
        for path in plots(json.loads(a.plot_only.read_text()), a.plot_only):
            print(path)
        return 0
    if a.device == "cuda" and not a.list:
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda, but no CUDA GPU is visible to PyTorch")
    if not a.list and not a.allow_missing_kernels:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error below says the same
            from genfast._backend import has_kernels, missing_kernels

        if not has_kernels(a.device):
            why = (
                missing_kernels()
                if a.device == "cpu"
                else "no CUDA or Triton kernels can run here; genfast info says why"
            )
            parser.error(f"{why}. --allow-missing-kernels measures the references all the same")
    if a.profile is not None:
        os.environ["GENFAST_BENCH_DEVICE"] = a.device  # read where the cases are made
        from benchmarks import profiling

        try:
            return profiling.run(a.profile, a.device, Path("out"))
        except ValueError as error:
            parser.error(str(error))
    return run(a)


if __name__ == "__main__":
    sys.exit(main())
