"""``python -m tests.peers [zuko nflows normflows]``: downloads the released sources, runs their suites twice, compares.

A test that fails with ``genfast.accelerate`` and not without is an error, unless tests/peers/exceptions.txt names it
and says why. So is a suite in which hardly anything was swapped, and an exception that is none any more.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "peers"
SETTINGS = BUILD / "pytest.ini"  # so that neither the peers' settings nor ours apply


@dataclass(frozen=True)
class Suite:
    """A peer's released source, where its tests lie in it, and how many modules are to be swapped at the least."""

    name: str
    version: str
    tests: str
    swapped: int
    needs: tuple[str, ...] = ()

    @property
    def source(self) -> Path:
        return unpacked(self.name, self.version)


SUITES = (
    Suite("zuko", "1.6.0", "tests", 90),
    Suite("nflows", "0.14", "tests", 500, needs=("torchtestcase==2018.2",)),
    Suite("normflows", "1.7.3", "normflows", 4000),
)


def unpacked(name: str, version: str) -> Path:
    return BUILD / f"{name}-{version}"


def fetch(requirement: str) -> Path:
    """The unpacked source distribution, downloaded where it is not there yet."""
    name, version = requirement.split("==")
    folder = unpacked(name, version)
    if not folder.is_dir():
        archives = BUILD / "archives"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*command, "--no-binary", name, "--dest", archives, requirement], check=True)
        with tarfile.open(next(archives.glob(f"{name}-{version}.tar.gz"))) as archive:
            archive.extractall(BUILD, filter="data")
    return folder


def run(suite: Suite, accelerated: bool) -> dict[str, Any]:
    """One run of a suite in a process of its own; returns what the plugin wrote."""
    result = BUILD / f"{suite.name}-{'accelerated' if accelerated else 'plain'}.json"
    result.unlink(missing_ok=True)
    path = [HERE, *(unpacked(*need.split("==")) for need in suite.needs)]
    environment = os.environ | {
        "GENFAST_PEER": suite.name,
        "GENFAST_ACCELERATE": str(int(accelerated)),
        "GENFAST_RESULT": str(result),
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "MPLBACKEND": "agg",
        "OMP_NUM_THREADS": "1",  # the models are tiny
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        str(SETTINGS),
        "-p",
        "plugin",
        "-p",
        "no:cacheprovider",
        "-q",
        suite.tests,
    ]
    log = result.with_suffix(".log")
    with log.open("w") as file:
        subprocess.run(command, cwd=suite.source, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if not result.is_file():
        raise SystemExit(f"peers: {suite.name}'s suite did not run:\n{log.read_text()[-4000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def exceptions() -> dict[str, str]:
    """Lines ``peer node-id: reason``."""
    lines = [line for line in (HERE / "exceptions.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.rsplit(": ", 1) for line in lines)  # a node-id has colons of its own


def compare(suite: Suite, excused: dict[str, str]) -> list[str]:
    """Runs a suite both ways and prints what came of it; returns what is wrong."""
    start = time.perf_counter()
    for requirement in (f"{suite.name}=={suite.version}", *suite.needs):
        fetch(requirement)
    SETTINGS.write_text("[pytest]\npython_files = test_*.py *_test.py\n")
    with ThreadPoolExecutor(2) as pool:  # each run takes one core
        plain, ours = pool.map(lambda accelerated: run(suite, accelerated), (False, True))
    count = sum(ours["swapped"].values())
    print(
        f"{suite.name} {suite.version}: {len(plain['passed'])} tests pass plain, {len(ours['passed'])} accelerated; "
        f"{count} modules swapped; {time.perf_counter() - start:.0f} s"
    )
    for name, n in sorted(ours["swapped"].items()):
        print(f"  {n:5} {name}")
    for name in plain["failed"]:
        if name in ours["failed"]:
            print(f"  fails plain too: {name}")
    wrong = (
        []
        if count >= suite.swapped
        else [f"{suite.name}: {count} modules were swapped, expected {suite.swapped} or more"]
    )
    for name in ours["failed"]:
        if name not in plain["failed"]:
            key = f"{suite.name} {name}"
            print(f"  fails accelerated only: {name}: {excused.get(key, 'NOT EXCUSED')}\n    {ours['failed'][name]}")
            wrong += [] if key in excused else [key]
    for key in excused:
        if key.split()[0] == suite.name and key.split()[1] not in ours["failed"]:
            wrong.append(f"{key}: excused in exceptions.txt, but it does not fail")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    names = [suite.name for suite in SUITES]
    parser.add_argument("peers", nargs="*", help=f"which of {', '.join(names)}; all without")
    chosen = parser.parse_args().peers or names
    if unknown := set(chosen) - set(names):
        parser.error(f"no such peer: {', '.join(sorted(unknown))}")
    BUILD.mkdir(parents=True, exist_ok=True)
    excused = exceptions()
    wrong = [line for suite in SUITES if suite.name in chosen for line in compare(suite, excused)]
    for line in wrong:
        print(f"peers: {line}")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
