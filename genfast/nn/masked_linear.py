"""nn.MaskedLinear."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from .._contents import Contents
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

    @property
    def staircase(self) -> ops.Staircase:
        """The mask as :func:`genfast.ops.masked_linear` takes it."""
        return ops.Staircase(self.rows, self.columns, self.counts)

    @property
    def live(self) -> Tensor:
        """The mask, the same tensor until the degrees change."""
        sorts = (self.rows, self.columns, self.counts)
        kept: tuple[tuple[Tensor, ...], Contents | None, Tensor] | None = self.__dict__.get("_live")
        same = kept is not None and all(a is b for a, b in zip(kept[0], sorts))
        if kept is None or not (same if kept[1] is None or torch.compiler.is_compiling() else kept[1].same(sorts)):
            contents = Contents(sorts) if all(type(t) is Tensor and t.is_cpu for t in sorts) else None  # a GPU would wait
            kept = self.__dict__["_live"] = sorts, contents, self.mask
        return kept[2]

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        fused = activation if activation == "relu" else "none"
        y = ops.masked_linear(x, self.weight, self.bias, mask=self.staircase, activation=fused)
        return y if fused == activation else made.ACTIVATIONS[activation](y)
