"""What the autoregressive models of images and sequences have in common: their likelihood and their sampler."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as gnn
from .. import ops, reference
from .._derived import readable_now
from ..sampling import inputs
from ..sampling.sampler import Sampler


def of_rows(rows: slice, n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of tensors with ``n`` rows these rows; what is None or has one row for all stays."""
    return tuple(t if t is None or len(t) != n else t[rows] for t in tensors)


class AutoregressiveModel(nn.Module):
    """p(x) = prod p(x_i | x_<i) over integer images (N, C, H, W) or sequences (N, C, L), with a cached sampler.

    ``config`` rebuilds the model.
    """

    layers: Any = gnn  # genfast.nn, or its plain twins: see :func:`genfast.models.plain`
    input = "integers"  # what the sampler gives to ``forward``
    head = "categorical"
    dims = 2
    config: dict[str, Any]
    _sampler: Sampler | None = None

    def __init__(self, in_channels: int, levels: int, shape: Sequence[int] | None) -> None:
        super().__init__()
        name = type(self).__name__
        if in_channels < 1:
            raise ValueError(f"{name}: in_channels={in_channels}, expected at least 1")
        if levels < 2:
            raise ValueError(f"{name}: levels={levels}, expected at least 2")
        if shape is not None and (len(shape) != self.dims + 1 or shape[0] != in_channels):
            raise ValueError(
                f"{name}: shape={tuple(shape)}, expected ({in_channels}, {'H, W' if self.dims == 2 else 'L'})"
            )
        self.in_channels, self.levels = in_channels, levels
        self.shape = None if shape is None else tuple(shape)

    def width(self, channels: int | None, usual: int, per_colour: int = 1) -> int:
        """Hidden channels: ``usual`` or the next number above it that the colours divide, or those given if they do."""
        per = per_colour * self.in_channels
        found = -(-usual // per) * per if channels is None else channels
        if found < 1 or found % per:
            twice = "twice " if per_colour == 2 else ""
            name, colours = type(self).__name__, self.in_channels
            raise ValueError(f"{name}: channels={channels}, expected a multiple of {per}, {twice}in_channels={colours}")
        return found

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, levels * C, ...) logits, level by level, or (N, P, ...) mixture parameters."""
        raise NotImplementedError

    def check(self, x: Tensor) -> Tensor:
        """``x``, or an error that says what was expected of it."""
        name = type(self).__name__
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name}: x has dtype {x.dtype}, expected whole numbers in [0, {self.levels})")
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            wanted = f"(N, {self.in_channels}, {'H, W' if self.dims == 2 else 'L'})"
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected {wanted}")
        # Of a GPU's tensor only the loss asks, which need not wait for the answer.
        if not x.is_cuda and x.numel() and readable_now(x) and (int(x.min()) < 0 or int(x.max()) >= self.levels):
            raise ValueError(
                f"{name}: x holds values from {int(x.min())} to {int(x.max())}, expected 0 to {self.levels - 1}"
            )
        return x

    def logits(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, levels, C, ...) of a categorical head.

        Raises:
            TypeError: the model's head is a mixture.
        """
        if self.head != "categorical":
            raise TypeError(f"{type(self).__name__}: a mixture has no logits per level")
        found: Tensor = self(x, context).unflatten(1, (self.levels, self.in_channels))
        return found

    def nll(self, out: Tensor, x: Tensor) -> Tensor:
        """-log p per position in nats, (N, C, ...) or, of a mixture, (N, ...)."""
        if self.layers is not gnn:
            if self.head == "categorical":
                logits: Tensor = out.unflatten(1, (self.levels, self.in_channels))
                return F.cross_entropy(logits, x.long(), reduction="none")
            return reference.discretized_logistic_mixture_nll(out, x.long(), self.levels)
        if self.head == "categorical":
            return ops.categorical_nll(out, x)
        return ops.discretized_logistic_mixture_nll(out, x, levels=self.levels)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (N,), of whole numbers x (N, C, ...)."""
        nll = self.nll(self(self.check(x), context), x)
        return -nll.flatten(1).sum(1)

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """-log2 p(x) per dimension, (N,)."""
        return -self.log_prob(x, context) / (math.prod(x.shape[1:]) * math.log(2))

    def uniforms_per_pixel(self) -> int:
        """Random numbers that a pixel takes."""
        return self.in_channels if self.head == "categorical" else 1 + self.in_channels

    @property
    def sampler(self) -> Sampler:
        """The sampler of this model; ``print(model.sampler.prepare(shape))`` shows its pixel program."""
        if self._sampler is None:
            object.__setattr__(self, "_sampler", Sampler(self, levels=self.levels, head=self.head))
        assert self._sampler is not None
        return self._sampler

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_sampler"}  # it refers to this very module

    @torch.no_grad()
    def sample(
        self,
        n: int,
        shape: Sequence[int] | None = None,
        *,
        method: str = "auto",
        context: inputs.Context = None,
        temperature: float = 1.0,
        prefix: Tensor | None = None,
        uniforms: Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: bool = False,
        rows: slice | None = None,
    ) -> Tensor:
        """Draws ``n`` images (n, C, H, W), or sequences (n, C, L), int64; see :meth:`genfast.sampling.Sampler.sample`.

        With ``rows`` only those of the n, from the random numbers of all: what one of several processes draws.
        """
        shape = self.shape_of(shape)
        if self.layers is not gnn and method == "auto":
            method = "naive"
        if rows is not None and n >= 0:
            if uniforms is None:
                device = self.sampler._device() if generator is None else generator.device
                size = (n, self.uniforms_per_pixel(), *shape[1:])
                uniforms = torch.rand(size, generator=generator, device=device, dtype=torch.float32)
            uniforms, prefix = of_rows(rows, n, uniforms, prefix)
            context = inputs.of_rows(context, rows, n)
            n = len(range(n)[rows])
        return self.sampler.sample(
            n,
            shape,
            method=method,
            context=context,
            temperature=temperature,
            prefix=prefix,
            uniforms=uniforms,
            generator=generator,
            progress=progress,
        )

    def shape_of(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        """``shape``, or the model's own."""
        if shape is None and self.shape is None:
            raise ValueError(
                f"{type(self).__name__}.sample: shape=None, expected (C, H, W): the model was built without one"
            )
        found = tuple(shape) if shape is not None else self.shape
        assert found is not None
        if len(found) != self.dims + 1 or found[0] != self.in_channels or min(found) < 1:
            wanted = f"({self.in_channels}, {'H, W' if self.dims == 2 else 'L'})"
            raise ValueError(f"{type(self).__name__}.sample: shape={found}, expected {wanted}")
        return found
