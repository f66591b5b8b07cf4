"""nn.MADE."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from .._calls import class_of, stands_for
from ..programs import Layer, LoweringError
from ..reference import made
from .masked_linear import MaskedLinear


class MADE(made.MADE):
    """A masked autoencoder (MADE): output i is a function of the inputs that come before i in the order, and of a context.

    Args:
        features: D.
        hidden: widths of the hidden layers, any, also below D.
        outputs: numbers per feature.
        context: K features of a context, 0 for none. It enters the first layer, ``Linear(K, hidden[0], bias=False)``, and
            reaches every output: with a context some hidden units have degree 0, which no input reaches.
        order: the degree of each input, 1 to D: None or "natural", "reversed", "random", or integers. Inputs of equal degree
            do not see one another.
        degrees: of hidden units: "even" (spread over 1 to D - 1), "random" (drawn as the paper draws them, then sorted within
            a layer, which only names the units), or integers for each layer.
        residual: pre-activation blocks of two layers, one for each of ``hidden``, whose widths are equal (nflows' variant).
        activation: "relu" (fused), "elu", "gelu", "leaky_relu", "none", "sigmoid", "silu", "softplus" or "tanh".
        generator: of the draws.

    ``forward(x, context=None)`` maps (N, D) and (N, K) to (N, D, outputs). With D = 1 an output depends on the context alone.
    ``resample(order=..., degrees=..., generator=...)`` draws another order or other hidden degrees over the same weights, for
    order-agnostic and connectivity-agnostic training; no weight is touched, so what one mask kills the next may use.

    Raises:
        ValueError: arguments that do not fit, by name.

    Source: MADE (arXiv:1502.03509, section 4).

    Example:
        >>> import torch, genfast
        >>> made = genfast.nn.MADE(6, (32, 32), outputs=2, order="reversed")
        >>> made(torch.randn(4, 6)).shape
        torch.Size([4, 6, 2])
    """

    linear = MaskedLinear

    def layers(self, context: Tensor | None = None) -> list[Layer]:
        """The network as :class:`genfast.sampling.DegreeProgram` takes it, at a context (N, K).

        Raises:
            LoweringError: a layer is no :class:`MaskedLinear`, so that its weight does not say what a call of it gives.
        """
        if (context is None) != (self.context is None):
            called = "with" if self.context is None else "without"
            raise ValueError(f"MADE: made with context={self.context_features}, called {called} one")
        linears = [cast("MaskedLinear", linear) for linear in self.linears]
        for i, linear in enumerate(linears):
            if type(linear) is not MaskedLinear and stands_for(linear, (MaskedLinear,)) is None:
                kind = class_of(linear)
                raise LoweringError(f"MADE: linears.{i} is a {kind.__module__}.{kind.__qualname__}, expected a MaskedLinear")
        last, inner = len(linears) - 1, "none" if self.residual else self.activation
        found = []
        for i, linear in enumerate(linears):
            before = after = "none"
            residual = None
            if 0 < i < last and self.residual:
                before, after = (self.activation, self.activation) if i % 2 else ("none", "none")
                residual = None if i % 2 else i - 1
            elif i < last:
                after = inner
            added = self.context(context) if self.context is not None and i == 0 else None
            found.append(
                Layer(linear.weight, linear.bias, linear.live, before=before, after=after, residual=residual, context=added)
            )
        return found
