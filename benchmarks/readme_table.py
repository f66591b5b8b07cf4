"""Writes the README's table of results from the JSON: ``python -m benchmarks.readme_table [RESULTS.json] [--check]``.

What a GPU has shown comes from the results of ``make gpu-check`` in the same folder: a case's figures and an
operation's mark stand there once its ops are verified on that GPU, and until then 'not yet run on a GPU'.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.__main__ import share
from benchmarks.gpu_check import UNRUN, families, tested, verified

HERE = Path(__file__).parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def proven(results: dict[str, Any], family: str) -> bool:
    """Whether the family's ops are verified on the GPU of these results; all ops, for what is made of several."""
    checks, of = results["gpu_check"], families()
    if family == "pixel_program":
        return tested(checks.get("tests", {}), ["pixel_program"])[1]
    chosen = of[family] if family in of else [op for ops in of.values() for op in ops]
    return verified(checks.get("verify", {}), chosen)[1]


def on_gpu(case: str, gpus: list[dict[str, Any]]) -> str:
    """The case's figures on the first GPU that has it and on which it is verified."""
    for results in gpus:
        for found in results.get("cases", []):
            p = found["providers"]
            if found["case"] == case and "genfast" in p and proven(results, family(found)):
                against = p.get("reference", {}).get("times_genfast")
                return (
                    ", ".join(filter(None, ("" if against is None else f"{against:.2f}x", share(p["genfast"])))) or "-"
                )
    return UNRUN


def family(case: dict[str, Any]) -> str:
    op: str = case.get("op") or case["case"].split()[0]
    return {"pixelcnn": "pixel_program"}.get(op, op)


def marked(text: str, gpus: list[dict[str, Any]]) -> str:
    """The README with the marks of its table of operations, which names each one's reference file, as the GPUs have
    it."""
    lines, now = [], ""
    for line in text.splitlines(keepends=True):
        cells = line.split("|")
        if len(cells) > 4 and (f", {UNRUN}" in cells[4] or ", verified on " in cells[4]):
            file = re.search(r"`reference/(\w+)\.py`", cells[2])
            now = file[1] if file else now
            name = "pixel_program" if "`sampling.Sampler`" in cells[1] else now
            on = [results["gpu_check"]["device"]["name"] for results in gpus if proven(results, name)]
            mark = f"verified on {' and '.join(on)}" if on else UNRUN
            cells[4] = re.sub(rf", ({UNRUN}|verified on [^|]*\S)", f", {mark}", cells[4])
            line = "|".join(cells)
        lines.append(line)
    return "".join(lines)


def rows(results: dict[str, Any], gpus: list[dict[str, Any]]) -> str:
    """One line per case: how many times faster than each provider, share of the copy bandwidth, memory against eager,
    and how many times faster than eager on a GPU, with its share there."""
    lines = []
    for case in results["cases"]:
        p = case["providers"]

        def ratio(name: str, p: dict[str, Any] = p) -> str:
            found = [p[n]["times_genfast"] for n in p if n.split()[0] == name]  # the best of several arrangements
            return (f"{min(found):.2f}x" if min(found) < 30 else f"{min(found):.0f}x") if found else "-"

        peak = p["reference"]["peak_bytes"]
        memory = "-" if peak is None else f"{p['genfast']['peak_bytes'] / max(1, peak):.2f}x"
        lines.append(
            [
                case["case"],
                *(ratio(n) for n in ("reference", "compile", "trick", "peer")),
                share(p["genfast"]) or "-",
                memory,
                on_gpu(case["case"], gpus),
            ]
        )
        if "genfast reversible" in p:
            slower = p["genfast reversible"]["times_genfast"]
            part = p["genfast reversible"]["peak_bytes"] / max(1, p["reference"]["peak_bytes"])
            against = [
                p[n]["times_genfast"] / slower if n in p else None for n in ("reference", "compile", "trick", "peer")
            ]
            lines.append(
                [
                    "&nbsp;&nbsp;reversible",
                    *("-" if a is None else f"{a:.2f}x" for a in against),
                    "-",
                    f"{part:.2f}x",
                    "",
                ]
            )
    headers = [
        "case, forward and backward unless it samples",
        "eager",
        "torch.compile",
        "library calls",
        "peer",
        "of the bound",
        "memory / eager",
        "on a GPU",
    ]
    text = tabulate(lines, headers=headers, tablefmt="github", colalign=("left", *["right"] * 7))
    e = results["environment"]
    over = ", ".join(f"{o['op']} {1e6 * o['over_s']:+.1f}" for o in results["overhead"])
    return (
        f"Times faster than each; a case's contenders in one run, in turn, on {e['device']}, {e['threads']} threads, "
        "float32, "
        f"torch {e['versions']['torch']} ({e['date'][:10]}). Below 1 the other is faster.\n\n"
        f"{text}\n\n{gpu_rows(results, gpus)}"
        "Overhead of a call on one element, without a gradient, over an ATen op of like arity, in microseconds: "
        f"{over}."
    )


def gpu_rows(results: dict[str, Any], gpus: list[dict[str, Any]]) -> str:
    """A table for each GPU of the verified cases that the CPU has not; empty where there are none."""
    here, text = {case["case"] for case in results["cases"]}, ""
    for gpu in gpus:
        lines = []
        for case in gpu.get("cases", []):
            p = case["providers"]
            if case["case"] in here or "genfast" not in p or not proven(gpu, family(case)):
                continue
            names = dict.fromkeys(name.split()[0] for name in p if name.split()[0] not in ("genfast", "floor"))
            times = {
                n: [q["times_genfast"] for m, q in p.items() if m.split()[0] == n and q["times_genfast"]] for n in names
            }
            said = ", ".join(f"{min(values):.2f}x {name}" for name, values in times.items() if values)
            lines.append([case["case"], said, share(p["genfast"]) or "-", f"{1e3 * p['genfast']['median_s']:.3f}"])
        if lines:
            headers = [f"on {gpu['gpu_check']['device']['name']}", "times faster than", "of the bound", "ms"]
            text += (
                tabulate(lines, headers=headers, tablefmt="github", colalign=("left", "left", "right", "right"))
                + "\n\n"
            )
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", help="of a CPU (default: the first in benchmarks/results)")
    parser.add_argument("--gpus", type=Path, nargs="*", help="of GPUs, by make gpu-check (default: all beside RESULTS)")
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is not up to date")
    a = parser.parse_args()
    folder = HERE / "results" if a.results is None else a.results.parent
    kinds = ("-quick", "-part")
    found = {p: json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if not any(k in p.name for k in kinds)}
    suites = [p for p, results in found.items() if "cases" in results and "gpu_check" not in results]
    if a.results is None:
        if not suites:
            parser.error("there are no results yet; run python -m benchmarks first")
        a.results = suites[0]
    gpus = [results for results in found.values() if "gpu_check" in results]
    if a.gpus is not None:
        gpus = [json.loads(path.read_text()) for path in a.gpus]
    text = a.readme.read_text()
    if BEGIN not in text or END not in text:
        parser.error(f"{a.readme} has no {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    made = f"{head}{BEGIN}\n{rows(json.loads(a.results.read_text()), gpus)}\n{END}{rest.split(END, 1)[1]}"
    made = marked(made, gpus)
    if a.check:
        if made != text:
            print(f"{a.readme} does not show {a.results}; run python -m benchmarks.readme_table", file=sys.stderr)
        return int(made != text)
    temporary = a.readme.with_name(f".{a.readme.name}")
    temporary.write_text(made)
    os.replace(temporary, a.readme)
    return 0


if __name__ == "__main__":
    sys.exit(main())
