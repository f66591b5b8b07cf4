"""The kernels of genfast._cpu and genfast._cuda, each with the fields of its argument struct that a module's calls
fill."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from . import _backend


def kernels(extension: str, *functions: str, **fields: str) -> Any:
    """What a module calls of an extension, or None where that is not built.

    A name that no struct has fails here, at import. A call must fill exactly the fields that are named here, and each
    by its
    name: what ``prepare`` fills counts, a record without its address does not.

    Args:
        extension: "_cpu" or "_cuda".
        functions: functions that are no kernels.
        fields: for each kernel the names of its fields, with spaces between.
    """
    module = _backend.extension(extension)[0]
    if module is None:
        return None
    called = {name: getattr(module, name) for name in functions}
    called |= {name: getattr(module, name).declare(*names.split()) for name, names in fields.items()}
    return SimpleNamespace(**called)
