"""What the autoregressive models add to their plain twins: kernels in their likelihood, and cached sampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import nn, ops
from ..reference import autoregressive as plain
from ..sampling import inputs
from ..sampling.sampler import Sampler


class AutoregressiveModel(plain.AutoregressiveModel):
    """p(x) = prod p(x_i | x_<i) over integer images (N, C, H, W) or sequences (N, C, L), with a cached sampler."""

    layers = nn
    _sampler: Sampler | None = None

    def nll(self, out: Tensor, x: Tensor) -> Tensor:
        if self.head == "categorical":
            return ops.categorical_nll(out, x)
        return ops.discretized_logistic_mixture_nll(out, x, levels=self.levels)

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
        self, n: int, shape: Sequence[int] | None = None, *, method: str = "auto", context: inputs.Context = None,
        temperature: float = 1.0, prefix: Tensor | None = None, uniforms: Tensor | None = None,
        generator: torch.Generator | None = None, progress: bool = False, rows: slice | None = None,
    ) -> Tensor:  # fmt: skip
        """Draws ``n`` images (n, C, H, W), or sequences (n, C, L), int64; see :meth:`genfast.sampling.Sampler.sample`.

        With ``rows`` only those of the n, from the random numbers of all: what one of several processes draws.
        """
        shape = self.shape_of(shape)
        if rows is not None and n >= 0:
            if uniforms is None:
                device = self.sampler._device() if generator is None else generator.device
                size = (n, self.uniforms_per_pixel(), *shape[1:])
                uniforms = torch.rand(size, generator=generator, device=device, dtype=torch.float32)
            uniforms, prefix = plain.of_rows(rows, n, uniforms, prefix)
            context = inputs.of_rows(context, rows, n)
            n = len(range(n)[rows])
        return self.sampler.sample(
            n, shape, method=method, context=context, temperature=temperature, prefix=prefix,
            uniforms=uniforms, generator=generator, progress=progress,
        )  # fmt: skip
