"""models.MADE."""

from __future__ import annotations

import warnings

from torch import Tensor

from .. import nn, ops
from ..programs import DegreeProgram, LoweringError, layers_of, self_check
from ..reference import vectors as plain
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
        try:
            program = self._program(context, temperature)
        except LoweringError as error:
            warnings.warn(f"MADE: a sample takes one pass for each feature. {error}", stacklevel=2)
            return super()._in_order(uniforms, context, given, known, temperature, naive)
        x: Tensor = ops.autoregressive_inverse(u, program, "bernoulli")[0]
        if self.__dict__.get("_proven") != program.code.tolist() and len(x) and self_check.can_look(x.device):
            self._prove(u[:1], x[:1], None if context is None else context[:1], temperature)
            self.__dict__["_proven"] = program.code.tolist()
        return x

    def _prove(self, u: Tensor, x: Tensor, context: Tensor | None, temperature: float) -> None:
        """Each feature of one row is drawn again from its number and what the network makes of the whole row."""
        with self_check.quietly(x.device):
            logits = self.network(x) if context is None else self.network(x, context)
        logit = (u / (1 - u)).log() * temperature
        expected = logits[..., 0] if logits.dim() == 3 else logits
        # Numbers on the border, and what is known (whose numbers are outside [0, 1]), fall on either side.
        clear = (u > 0) & (u < 1) & ((expected - logit).abs() > 1e-3 * (1 + expected.abs()))
        if bool(((x > 0) != (logit < expected))[clear].any()):
            raise self_check.SelfCheckError("MADE: samples in the order of degrees differ from what the network's passes draw")

    def _program(self, context: Tensor | None, temperature: float) -> DegreeProgram:
        """The network as a degree program, its last layer divided by the temperature."""
        layers = layers_of(self.network, context)
        if temperature != 1:
            last = layers[-1]
            last.weight = last.weight / temperature
            last.bias = None if last.bias is None else last.bias / temperature
        return DegreeProgram.build(layers)
