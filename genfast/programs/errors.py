"""Why a network has no flat program."""

from __future__ import annotations


class LoweringError(NotImplementedError):
    """A network has no flat program; names the part that stands in the way."""
