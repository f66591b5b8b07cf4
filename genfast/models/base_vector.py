"""What the density models of vectors have in common.

A dimension of whole numbers has ``levels`` of them: one logit where there are two (black and white), else one logit a
level (grey). The network sees x / (levels - 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._modes import evaluating
from ..reference import nade_draw
from .base_autoregressive import AutoregressiveModel


class VectorModel(AutoregressiveModel):
    """p(x) = prod p(x_d | x_<d) over whole numbers x (N, D) in [0, levels), int64 or uint8."""

    dims = 0
    network: Any

    def __init__(self, dim: int, levels: int) -> None:
        super().__init__(dim, levels, (dim,))
        self.dim = dim
        self.kind = "bernoulli" if levels == 2 else "categorical"
        self.outputs = 1 if levels == 2 else levels

    def check(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"{type(self).__name__}: x has shape {tuple(x.shape)}, expected (N, {self.dim})")
        return super().check(x)

    def scaled(self, x: Tensor) -> Tensor:
        """What the network sees: x / (levels - 1), in the dtype of the weights."""
        return x.to(next(self.parameters()).dtype) / (self.levels - 1)

    def logits(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D) of two levels, (N, D, levels) of more."""
        found: Tensor = self(x, context)
        return found[..., 0] if self.outputs == 1 else found

    def nll(self, out: Tensor, x: Tensor) -> Tensor:
        """-log p per dimension in nats, (N, D), of logits (N, D, outputs)."""
        if self.outputs == 1:
            return F.binary_cross_entropy_with_logits(out[..., 0], x.to(out.dtype), reduction="none")
        return F.cross_entropy(out.movedim(-1, 1), x.long(), reduction="none")

    def uniforms_per_pixel(self) -> int:
        return 1

    def _naive(
        self,
        features: Tensor,
        uniforms: Tensor,
        context: Tensor | None,
        given: Tensor,
        known: Tensor,
        temperature: float,
    ) -> Tensor:
        """The standard loop: one pass of the whole network for each of ``features``, in their order."""
        x = given.clone()
        for d in features.tolist():
            out = self._params(x, context)[:, d] / temperature
            x[:, d] = torch.where(known[:, d], given[:, d], nade_draw(out, uniforms[:, d], self.kind))
        return x

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Logits (N, D, outputs) of x already scaled."""
        raise NotImplementedError

    def _draw(
        self,
        uniforms: Tensor,
        context: Tensor | None,
        given: Tensor,
        known: Tensor,
        temperature: float,
        naive: bool,
        share: Tensor,
    ) -> Tensor:
        """Scaled x (N, D) from uniforms (N, D, 1); ``share`` (N,) says which order of an ensemble draws each."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits (N, D, outputs) of whole numbers x (N, D)."""
        return self._params(self.scaled(x), context)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        shape: Sequence[int] | None = None,
        *,
        method: str = "auto",
        context: Any = None,
        temperature: float = 1.0,
        prefix: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        rows: slice | None = None,
    ) -> Tensor:
        """Draws ``n`` vectors (n, D), int64, in evaluation mode.

        Args:
            method: "auto" or "cached", in one pass where the model can, or "naive", D passes; both draw the same from
                the same numbers.
            context: (n, K) of a conditional model.
            temperature: divides the logits.
            prefix: (n, k) whole numbers, the first k dimensions; or
            given, known: (n, D) whole numbers, and bool (n, D) or (D,) where they hold: these stay as they are. What is
                drawn is drawn given those known that come before it in the model's order (DeepNADE: given all that is
                known).
            uniforms: (n, D), the random numbers; from ``generator`` without.
            rows: only these of the n, from the random numbers of all: what one of several processes draws.
        """
        name = f"{type(self).__name__}.sample"
        if n < 0 or temperature <= 0:
            raise ValueError(f"{name}: n={n} and temperature={temperature}, expected n >= 0 and a positive temperature")
        if method not in ("auto", "cached", "naive"):
            raise ValueError(f"{name}: method={method!r}, expected 'auto', 'cached' or 'naive'")
        self.shape_of(shape)
        like = next(self.parameters())
        if prefix is not None:
            if given is not None or known is not None:
                raise ValueError(f"{name}: both prefix and given, expected one of them")
            if prefix.dim() != 2 or prefix.shape[0] != n or prefix.shape[1] > self.dim:
                raise ValueError(
                    f"{name}: prefix has shape {tuple(prefix.shape)}, expected ({n}, k), k at most {self.dim}"
                )
            given = F.pad(prefix, (0, self.dim - prefix.shape[1]))
            known = torch.arange(self.dim, device=prefix.device) < prefix.shape[1]
        if (given is None) != (known is None):
            raise ValueError(f"{name}: one of given and known is missing, expected both or neither")
        if given is None or known is None:
            values, mask = like.new_zeros(n, self.dim), torch.zeros(n, self.dim, dtype=torch.bool, device=like.device)
        else:
            if tuple(given.shape) != (n, self.dim) or tuple(known.shape) not in ((self.dim,), (n, self.dim)):
                raise ValueError(
                    f"{name}: given has shape {tuple(given.shape)} and known {tuple(known.shape)}, expected ({n}, "
                    f"{self.dim}) and that or ({self.dim},)"
                )
            mask = known.to(like.device).bool().expand(n, -1)
            values = self.scaled(self.check(torch.where(mask, given.to(like.device), 0)))
        if uniforms is None:
            uniforms = torch.rand(
                n, self.dim, generator=generator, device=like.device if generator is None else generator.device
            )
        elif tuple(uniforms.shape) != (n, self.dim):
            raise ValueError(f"{name}: uniforms has shape {tuple(uniforms.shape)}, expected ({n}, {self.dim})")
        share = shares(n, len(getattr(self, "orders", [0])), generator)
        if rows is not None:
            uniforms, share, values, mask = uniforms[rows], share[rows], values[rows], mask[rows]
            context = None if context is None else context[rows]
        with evaluating(self):
            x = self._draw(uniforms.to(like)[..., None], context, values, mask, temperature, method == "naive", share)
        orders: Tensor = self.orders if hasattr(self, "orders") else self.network.order[None]  # type: ignore[assignment]
        check_drawn(name, x, orders, share)
        return (x * (self.levels - 1)).round().long()


def check_drawn(name: str, x: Tensor, orders: Tensor, share: Tensor) -> None:
    """Raises where a sample has NaN, which its parameters were; on a GPU, which is not waited for, an assertion does.

    ``orders`` (K, D) are degrees, and ``share`` (N,) says which of them drew each: what depends on the first NaN is NaN
    too.
    """
    if x.is_cuda:
        torch._assert_async((x == x).all(), f"{name}: the network's parameters of a dimension are not finite")
    elif bool(x.isnan().any()):
        sample = int(x.isnan().any(1).nonzero()[0])
        degrees = orders[int(share[sample])].to(x.device)
        dimension = int(degrees.masked_fill(~x[sample].isnan(), x.shape[1] + 1).argmin())
        raise FloatingPointError(
            f"{name}: the network's parameters of dimension {dimension} of sample {sample} are not finite (a NaN, an "
            "infinity, or every level forbidden by a logit of -inf)"
        )


def ensemble(dim: int, orders: int, name: str) -> Tensor:
    """Degrees (K, D): the natural order, then random ones."""
    if orders < 1:
        raise ValueError(f"{name}: orders={orders}, expected at least 1")
    return torch.stack([torch.arange(1, dim + 1), *(torch.randperm(dim) + 1 for _ in range(orders - 1))])


def mean_log(parts: Sequence[Tensor]) -> Tensor:
    """log of the mean of the probabilities."""
    return torch.logsumexp(torch.stack(tuple(parts)), 0) - math.log(len(parts))


def shares(n: int, orders: int, generator: torch.Generator | None) -> Tensor:
    """Which order draws each sample of a mixture of all."""
    if orders == 1:
        return torch.zeros(n, dtype=torch.int64)
    return torch.randint(
        orders, (n,), generator=generator, device=None if generator is None else generator.device
    ).cpu()
