"""models.RNADE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .. import nn as gnn
from ..reference import mixture_of_gaussians_log_prob
from .base_flow import DensityModel
from .base_vector import check_drawn


class RNADE(DensityModel):
    """RNADE (arXiv:1306.0186): a density of real vectors whose conditionals are mixtures of Gaussians.

    Args:
        dim: D.
        hidden: units.
        components: of each mixture.
        activation: "relu" (the paper's better one), "sigmoid" or "tanh".
        rescale: whether each step scales the hidden layer's input by a number rho_d of its own, which is learned.
        scale_gradients: whether the means' gradients are multiplied by the deviations (section 4), which keeps narrow
            components from taking steps that are large beside them.
        order: the degree of each dimension, 1 to D: None, "reversed", "random" or integers.
        context_features: K of a conditional model, else 0.

    Raises:
        ValueError: arguments that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.RNADE(4, hidden=8)
        >>> model.log_prob(model.sample(5)).shape
        torch.Size([5])
    """

    layers: Any = gnn  # genfast.nn, or its plain twins: see :func:`genfast.models.plain`

    def __init__(
        self,
        dim: int,
        hidden: int = 100,
        components: int = 10,
        *,
        activation: Literal["relu", "sigmoid", "tanh"] = "relu",
        rescale: bool = True,
        scale_gradients: bool = False,
        order: Literal["natural", "reversed", "random"] | Sequence[int] | None = None,
        context_features: int = 0,
    ) -> None:
        super().__init__((dim,))
        if components < 1:
            raise ValueError(f"RNADE: components={components}, expected at least 1")
        self.network = self.layers.NADENetwork(
            dim, hidden, 3 * components, activation=activation, rescale=rescale, order=order, context=context_features
        )
        self.components, self.scale_gradients = components, scale_gradients
        with torch.no_grad():  # components that differ from the start, of the width of standardised data
            self.network.bias[:, components : 2 * components] = (
                torch.linspace(-1, 1, components) if components > 1 else 0
            )
        self.config = {
            "dim": dim,
            "hidden": hidden,
            "components": components,
            "activation": activation,
            "rescale": rescale,
            "scale_gradients": scale_gradients,
            "order": self.network.order.tolist(),
            "context_features": context_features,
        }

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D, 3 components): logits, means and log deviations of p(x_d | x_<d)."""
        out: Tensor = self.network(x, context)
        return out

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        params = self(self.check(x), context)
        if self.scale_gradients and torch.is_grad_enabled():
            logits, mean, log_sigma = params.chunk(3, -1)
            sigma = log_sigma.detach().exp()
            params = torch.cat([logits, mean * sigma + (mean - mean * sigma).detach(), log_sigma], -1)
        return mixture_of_gaussians_log_prob(params, x).sum(1)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        context: Tensor | None = None,
        uniforms: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """n samples (n, D).

        Args:
            temperature: multiplies the components' deviations.
            generator: of the random numbers, unless they are given: ``uniforms`` (n, D, 2).
            context: (n, K) of a conditional model.
            given, known: (n, D) values, and bool (n, D) or (D,) where they hold; the rest is drawn given those known
                that come before it in the model's order.
            rows: only these of the n, from the random numbers of all: what one of several processes draws.
        """
        if n < 0 or temperature <= 0:
            raise ValueError(
                f"RNADE.sample: n={n} and temperature={temperature}, expected n >= 0 and a positive temperature"
            )
        like = next(self.parameters())
        if uniforms is None:
            where = like.device if generator is None else generator.device
            uniforms = torch.rand(n, self.dim, 2, generator=generator, device=where)
        elif tuple(uniforms.shape) != (n, self.dim, 2):
            raise ValueError(f"RNADE.sample: uniforms has shape {tuple(uniforms.shape)}, expected ({n}, {self.dim}, 2)")
        mask = None if known is None else known.to(like.device).bool().expand(n, self.dim)
        if rows is not None:
            uniforms = uniforms[rows]
            context, given, mask = (None if t is None else t[rows] for t in (context, given, mask))
        found: Tensor = self.network.sample(
            uniforms.to(like), "gaussian_mixture", context=context, given=given, known=mask, temperature=temperature
        )
        check_drawn("RNADE.sample", found, self.network.order[None], torch.zeros(len(found), dtype=torch.int64))
        return found
