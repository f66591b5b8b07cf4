"""nn.MaskedLinear."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from .. import ops
from .._derived import derived, ordinary
from ..reference import made


class MaskedLinear(made.MaskedLinear):
    """A linear layer of a masked autoencoder, through :func:`genfast.ops.masked_linear`.

    The degrees are in the state_dict beside ``weight`` and ``bias``. The weight is never masked in place: dead entries keep
    what they hold, get exactly zero gradient, and come to life where :meth:`set_degrees` says so.

    Args:
        in_degrees: (I,) integers.
        out_degrees: (O,) integers; an output sees the inputs whose degree is not above its own.
        strict: it sees only those below, as the output layer of MADE does.
        bias: whether there is one.

    ``forward(x, activation="none")`` takes x (*, I) and the name of an activation; "relu" is fused.

    Raises:
        ValueError: degrees that are no vectors of integers.

    Source: MADE (arXiv:1502.03509, section 4).

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.MaskedLinear([1, 2, 3], [1, 1, 2, 2])
        >>> layer(torch.randn(5, 3)).shape
        torch.Size([5, 4])
    """

    def _sort(self) -> None:
        # Also where the degrees are drawn anew, or a checkpoint is loaded, under inference mode: training saves these.
        with ordinary():
            super()._sort()

    @property
    def staircase(self) -> ops.Staircase:
        """The mask as :func:`genfast.ops.masked_linear` takes it."""
        return ops.Staircase(self.rows, self.columns, self.counts)

    @property
    def live(self) -> Tensor:
        """The mask, the same tensor until the degrees change."""
        buffers = self._buffers  # asked for by the module's attributes, they would take most of the call
        sorts = cast("tuple[Tensor, ...]", (buffers["rows"], buffers["columns"], buffers["counts"]))
        live = derived(self.__dict__.setdefault("_derived", {}), "live", sorts, lambda: self.mask)
        return self.mask if live is None else live

    def __getstate__(self) -> dict[str, Any]:  # a copy derives its own
        return {name: value for name, value in self.__dict__.items() if name != "_derived"}

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        fused = activation if activation == "relu" else "none"
        y = ops.masked_linear(x, self.weight, self.bias, mask=self.staircase, activation=fused)
        return y if fused == activation else made.ACTIVATIONS[activation](y)
