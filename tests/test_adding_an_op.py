"""docs/adding-an-op.md: its example is built in a copy of the package and tested there as every op is."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adding-an-op.md"
BLOCKS = re.findall(r"^```python (file|append)=(\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The package and the tests with the example's files among them."""
    tree = tmp_path_factory.mktemp("recipe")
    for folder in ("genfast", "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    for kind, name, text in BLOCKS:
        path = tree / name
        assert path.exists() == (kind == "append"), name
        path.write_text((path.read_text() if path.exists() else "") + text)
    return tree


def run(tree, *command):
    found = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
        check=False,
    )
    assert not found.returncode, found.stdout
    return found.stdout


def test_at_most_five_places():
    """A room, or a file of it and its line among the room's exports, is a place; a kernel is the fifth."""
    rooms = {Path(name).parent for _, name, _ in BLOCKS}
    assert rooms == {Path("genfast/reference"), Path("genfast/ops"), Path("genfast/nn"), Path("tests/ops")}


def test_the_declaration_is_short():
    (text,) = (text for _, name, text in BLOCKS if name == "genfast/ops/scaled_silu.py")
    declaration = re.search(r"^OP = Op\(\n.*?^\)$", text, re.M | re.S).group()
    assert len(declaration.splitlines()) <= 15


def test_verify_takes_the_new_op(tree):
    assert "scaled_silu" in run(tree, "genfast", "verify", "--op", "scaled_silu")


def test_the_new_op_passes_what_every_op_passes(tree):
    tests = ("tests/ops/test_every_op.py", "tests/ops/test_scaled_silu.py")
    run(tree, "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider", *tests, "-k", "scaled_silu")
