"""The rooms of the package import one way, also inside functions; what serves annotations alone does not count."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import genfast

PACKAGE = Path(genfast.__file__).parent
# From the top, where everything may be imported; otherwise rooms of one line do not know of each other. Private modules
# at the top level that stand in no line are the base: every room may import them, and they import one another alone.
ROOMS = (
    ("__init__", "__main__", "_info", "_verify", "cli"),
    ("training",),
    ("models",),
    ("sampling", "losses", "integrations"),
    ("nn",),
    ("penalty", "programs"),  # nn.GradientPenalty and nn.MADENetwork are modules over these
    ("ops",),
    ("reference", "kernels", "_cpu", "_cuda"),
)
# Each with its reason; new ones are not to be added.
EXCEPTIONS = {
    ("ops", "penalty"): "genfast.ops names gradient_penalty and critic_step, and looks them up at the first use"
}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of genfast that a file imports, with the line."""
    inside = ("genfast", *path.relative_to(PACKAGE).parts[:-1])
    tree = ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    typing_only = {id(n) for block in blocks for part in block.body for n in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = inside[: len(inside) - node.level + 1] if node.level else ()
            module = ".".join((*start, *((node.module,) if node.module else ())))
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def edges() -> Iterator[tuple[str, str, str]]:
    """(room, room that it imports, where)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] == "genfast" and len(parts) > 1 and parts[1] != room:
                yield room, parts[1], f"{path.relative_to(PACKAGE)}:{line}"


def test_imports_point_one_way():
    level = {room: i for i, rooms in enumerate(ROOMS) for room in rooms}
    base = {path.stem for path in PACKAGE.glob("_*.py")} - level.keys()
    unused = set(EXCEPTIONS)
    for room, imported, where in edges():
        unused.discard((room, imported))
        if room in ROOMS[0] or (room, imported) in EXCEPTIONS or imported in base:
            continue
        assert room not in base, f"{where} imports {imported}, and the base imports no room"
        assert level.get(imported, 0) > level[room], f"{where} imports {imported}, which stands above it or beside it"
    assert not unused, "exceptions that nothing needs any more"
