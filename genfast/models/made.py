"""models.MADE."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from .. import nn as gnn
from .. import ops
from ..programs import DegreeProgram, LoweringError, layers_of, self_check
from .base_autoregressive_flow import Activation
from .base_vector import VectorModel, ensemble, mean_log


class MADE(VectorModel):
    """MADE (arXiv:1502.03509): a masked autoencoder that gives all conditionals in one pass, for one order or an
    ensemble.

    Args:
        dim: D.
        hidden: units of each layer.
        layers: hidden layers.
        levels: of a dimension; 2 are black and white.
        orders: K; with more than one each training batch takes the next, and ``log_prob`` in evaluation mode is the log
            of the mean of their probabilities (section 4.2).
        activation: of the hidden layers, "relu" by default.
        context_features: of a conditional model, else 0.

    Raises:
        ValueError: arguments that do not fit, by name.

    Black and white samples take one pass in the order of degrees (:func:`genfast.ops.autoregressive_inverse`), grey
    ones D.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.MADE(16, hidden=32)
        >>> model.log_prob(model.sample(4)).shape
        torch.Size([4])
    """

    orders: Tensor
    turn: Tensor

    def __init__(
        self,
        dim: int,
        hidden: int = 512,
        layers: int = 2,
        levels: int = 2,
        *,
        orders: int = 1,
        activation: Activation = "relu",
        context_features: int = 0,
    ) -> None:
        super().__init__(dim, levels)
        if layers < 1:
            raise ValueError(f"MADE: layers={layers}, expected at least 1")
        self.config = {
            "dim": dim,
            "hidden": hidden,
            "layers": layers,
            "levels": levels,
            "orders": orders,
            "activation": activation,
            "context_features": context_features,
        }
        self.register_buffer("orders", ensemble(dim, orders, "MADE"))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))
        self.network = self.layers.MADENetwork(
            dim, (hidden,) * layers, outputs=self.outputs, activation=activation, context=context_features
        )

    def use(self, order: int) -> None:
        """Puts the network's masks into one of the orders."""
        if len(self.orders) == 1:
            return  # the only one that the network ever has
        if not torch.equal(self.network.order, self.orders[order]):
            self.network.resample(order=self.orders[order].cpu())

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        out: Tensor = self.network(x, context)
        return out

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (N,): of the next order while training, else of the ensemble."""
        if self.training and len(self.orders) > 1:
            self.use(int(self.turn))
            self.turn.add_(1).remainder_(len(self.orders))
            return super().log_prob(x, context)
        parts = []
        for k in range(len(self.orders)):
            self.use(k)
            parts.append(super().log_prob(x, context))
        return mean_log(parts)

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
        x = torch.empty_like(given)
        share = share.to(x.device)
        for k in range(len(self.orders)):
            rows = (share == k).nonzero()[:, 0]
            if len(rows) or not len(x):
                self.use(k)
                some = None if context is None else context[rows]
                x[rows] = self._in_order(uniforms[rows], some, given[rows], known[rows], temperature, naive)
        return x

    def _in_order(
        self, uniforms: Tensor, context: Tensor | None, given: Tensor, known: Tensor, temperature: float, naive: bool
    ) -> Tensor:
        order = self.network.order.argsort()
        if naive or self.kind != "bernoulli" or self.layers is not gnn:
            return self._naive(order, uniforms, context, given, known, temperature)
        # Below 0 any probability is above the number, and no number is above 1: what is known needs no other way.
        u = uniforms[..., 0].where(~known, 1 - 2 * given)
        try:
            program = self._program(context, temperature)
        except LoweringError as error:
            warnings.warn(f"MADE: a sample takes one pass for each feature. {error}", stacklevel=2)
            return self._naive(order, uniforms, context, given, known, temperature)
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
            raise self_check.SelfCheckError(
                "MADE: samples in the order of degrees differ from what the network's passes draw"
            )

    def _program(self, context: Tensor | None, temperature: float) -> DegreeProgram:
        """The network as a degree program, its last layer divided by the temperature."""
        layers = layers_of(self.network, context)
        if temperature != 1:
            last = layers[-1]
            last.weight = last.weight / temperature
            last.bias = None if last.bias is None else last.bias / temperature
        return DegreeProgram.build(layers)
