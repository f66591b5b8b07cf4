"""Public names that changed: a module still answers to the old ones for one version, with a warning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any


def renamed(module: str, name: str, names: Mapping[str, str]) -> Any:
    """Returns the attribute of ``module`` that was called ``name``, for the module's ``__getattr__``.

    Args:
        module: the module's ``__name__``.
        name: what was asked for.
        names: the new names by the old ones.

    Raises:
        AttributeError: ``name`` is no old name.
    """
    if name not in names:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = names[name]
    warnings.warn(
        f"{module}.{name} is now {module}.{new}; the old name goes with the next version",
        DeprecationWarning,
        stacklevel=3,  # the line that asked the module
    )
    return getattr(sys.modules[module], new)
