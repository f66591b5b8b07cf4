"""What a model says of its training: the losses of a phase. :class:`genfast.training.Trainer` does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """What a batch gives: the loss of each player, minimised in its parameters alone, and figures to be shown.

    A figure that is None is one that this batch does not have. ``then`` gives the losses of one more update of the same
    players on the same samples, after the one by these losses.
    """

    players: Mapping[str, Tensor]
    figures: Mapping[str, Tensor | None]
    then: Callable[[], Losses] | None = None
