"""Writes the README's table of results from the JSON: ``python -m benchmarks.readme_table [RESULTS.json] [--check]``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.__main__ import share

HERE = Path(__file__).parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def rows(results: dict[str, Any]) -> str:
    """One line per case: how many times faster than each provider, share of the copy bandwidth, memory against eager."""
    lines = []
    for case in results["cases"]:
        p = case["providers"]

        def ratio(name: str, p: dict[str, Any] = p) -> str:
            found = [p[n]["times_genfast"] for n in p if n.split()[0] == name]  # the best of several arrangements
            return (f"{min(found):.2f}x" if min(found) < 30 else f"{min(found):.0f}x") if found else "-"

        peak = p["reference"]["peak_bytes"]
        memory = "-" if peak is None else f"{p['genfast']['peak_bytes'] / max(1, peak):.2f}x"
        lines.append([
            case["case"], *(ratio(n) for n in ("reference", "compile", "trick", "peer")), share(p["genfast"]) or "-", memory,
        ])  # fmt: skip
        if "genfast reversible" in p:
            slower = p["genfast reversible"]["times_genfast"]
            part = p["genfast reversible"]["peak_bytes"] / max(1, p["reference"]["peak_bytes"])
            against = [p[n]["times_genfast"] / slower if n in p else None for n in ("reference", "compile", "trick", "peer")]
            lines.append([
                "&nbsp;&nbsp;reversible", *("-" if a is None else f"{a:.2f}x" for a in against), "-", f"{part:.2f}x",
            ])  # fmt: skip
    headers = [
        "case, forward and backward unless it samples",
        "eager",
        "torch.compile",
        "library calls",
        "peer",
        "of the bound",
        "memory / eager",
    ]
    text = tabulate(lines, headers=headers, tablefmt="github", colalign=("left", *["right"] * 6))
    e = results["environment"]
    over = ", ".join(f"{o['op']} {1e6 * o['over_s']:+.1f}" for o in results["overhead"])
    return (
        f"Times faster than each; a case's contenders in one run, in turn, on {e['device']}, {e['threads']} threads, float32, "
        f"torch {e['versions']['torch']} ({e['date'][:10]}). Below 1 the other is faster.\n\n{text}\n\n"
        f"Overhead of a call on one element, without a gradient, over an ATen op of like arity, in microseconds: {over}."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = ("-quick", "-part", "gaussians")
    found = sorted(p for p in (HERE / "results").glob("*.json") if not any(kind in p.name for kind in kinds))
    parser.add_argument("results", type=Path, nargs="?", default=found[0] if found else None)
    parser.add_argument("--readme", type=Path, default=HERE.parent / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is not up to date")
    a = parser.parse_args()
    if a.results is None:
        parser.error("there are no results yet; run python -m benchmarks first")
    text = a.readme.read_text()
    if BEGIN not in text or END not in text:
        parser.error(f"{a.readme} has no {BEGIN} and {END}")
    head, rest = text.split(BEGIN, 1)
    made = f"{head}{BEGIN}\n{rows(json.loads(a.results.read_text()))}\n{END}{rest.split(END, 1)[1]}"
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
