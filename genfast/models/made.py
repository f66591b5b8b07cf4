"""models.MADE."""

from __future__ import annotations

from torch import Tensor

from .. import nn, ops
from ..reference import vectors as plain
from ..sampling.degree_ordered import DegreeProgram, Layer
from .autoregressive import AutoregressiveModel


class MADE(plain.MADE, AutoregressiveModel):
    __doc__ = (
        (plain.MADE.__doc__ or "")
        + """
    Black and white samples take one pass in the order of degrees (:func:`genfast.ops.autoregressive_inverse`), grey ones D.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.MADE(16, hidden=32)
        >>> model.log_prob(model.sample(4)).shape
        torch.Size([4])
    """
    )

    layers = nn

    def _in_order(
        self, uniforms: Tensor, context: Tensor | None, given: Tensor, known: Tensor, temperature: float, naive: bool
    ) -> Tensor:
        if naive or self.kind != "bernoulli":
            return super()._in_order(uniforms, context, given, known, temperature, naive)
        # Below 0 any probability is above the number, and no number is above 1: what is known needs no other way.
        u = uniforms[..., 0].where(~known, 1 - 2 * given)
        return ops.autoregressive_inverse(u, self._program(context, temperature), "bernoulli")[0]

    def _program(self, context: Tensor | None, temperature: float) -> DegreeProgram:
        """The network as a degree program, its last layer divided by the temperature."""
        linears = list(self.network.linears)
        layers = [
            Layer(layer.weight, layer.bias, layer.mask, after="none" if layer is linears[-1] else self.network.activation)
            for layer in linears
        ]
        if context is not None:
            layers[0].context = self.network.context(context)
        if temperature != 1:
            last = layers[-1]
            last.weight = last.weight / temperature
            last.bias = None if last.bias is None else last.bias / temperature
        return DegreeProgram.build(layers)
