"""nn.MaskedLinear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops, reference
from .._derived import derived, ordinary
from ..ops.masked_linear import Staircase
from ..reference.masked_linear import ACTIVATIONS


def integers(name: str, argument: str, value: Tensor | Sequence[int]) -> Tensor:
    """``value`` as int64 (n,), or an error that names the argument."""
    t = torch.as_tensor(value)
    if t.dim() != 1 or t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
        raise ValueError(f"{name}: {argument} has dtype {t.dtype} and shape {tuple(t.shape)}, expected integers (n,)")
    return t.long()


class MaskedLinear(nn.Linear):
    """A linear layer of a masked autoencoder, through :func:`genfast.ops.masked_linear`.

    The degrees are in the state_dict beside ``weight`` and ``bias``. The weight is never masked in place: dead entries
    keep what they hold, get exactly zero gradient, and come to life where :meth:`set_degrees` says so.

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

    in_degrees: Tensor
    out_degrees: Tensor
    rows: Tensor
    columns: Tensor
    counts: Tensor

    def __init__(
        self,
        in_degrees: Tensor | Sequence[int],
        out_degrees: Tensor | Sequence[int],
        *,
        strict: bool = False,
        bias: bool = True,
    ) -> None:
        degrees = [
            integers("MaskedLinear", n, d) for n, d in (("in_degrees", in_degrees), ("out_degrees", out_degrees))
        ]
        super().__init__(len(degrees[0]), len(degrees[1]), bias)
        self.strict = strict
        self.register_buffer("in_degrees", degrees[0].clone())
        self.register_buffer("out_degrees", degrees[1].clone())
        self._sort()

    def _sort(self) -> None:
        """How the degrees sort; not in the state_dict, since it follows from them."""
        # In ordinary mode also where the degrees are drawn or loaded under inference mode, since training saves these.
        with ordinary():
            sorts = reference.staircase(self.in_degrees, self.out_degrees, self.strict)
            for name, value in zip(("rows", "columns", "counts"), sorts):
                self.register_buffer(name, value, persistent=False)

    def set_degrees(self, in_degrees: Tensor | Sequence[int], out_degrees: Tensor | Sequence[int]) -> None:
        """Another mask over the same weights, none of which is touched."""
        for name, value in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
            buffer, degrees = getattr(self, name), integers("MaskedLinear", name, value)
            if degrees.shape != buffer.shape:
                raise ValueError(
                    f"MaskedLinear: {name} has shape {tuple(degrees.shape)}, expected {tuple(buffer.shape)}"
                )
            buffer.copy_(degrees)
        self._sort()

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._sort()

    @property
    def mask(self) -> Tensor:
        """Which weights are live, bool like ``weight``."""
        return reference.staircase_mask(self.rows, self.columns, self.counts)

    @property
    def staircase(self) -> Staircase:
        """The mask as :func:`genfast.ops.masked_linear` takes it."""
        return Staircase(self.rows, self.columns, self.counts)

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
        return y if fused == activation else ACTIVATIONS[activation](y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', strict=True' if self.strict else ''}"
