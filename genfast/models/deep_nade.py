"""models.DeepNADE."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..reference import nade_draw
from .base_vector import VectorModel, ensemble, mean_log


class DeepNADE(VectorModel):
    """DeepNADE (arXiv:1310.1757): one network for the conditionals of every order, and an ensemble of orders (EoNADE).

    While training, ``log_prob`` is an estimate: for each sample it draws an order and how many of its dimensions are
    known, d - 1 of D, and gives D / (D - d + 1) times the log probability of those unknown, whose mean over the draws
    is the mean of log p over all orders (section 3). In evaluation mode it is exact, for ``orders`` orders that are
    averaged.

    Args:
        dim: D.
        hidden: units of each layer.
        layers: hidden layers.
        levels: of a dimension; 2 are black and white.
        orders: K of the ensemble; an evaluation takes K D passes behind the first layer.
        activation: "relu", "sigmoid" or "tanh".
        context_features: of a conditional model, else 0.

    ``sample`` conditions on any set of known dimensions, since it may take them first.

    Raises:
        ValueError: arguments that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.DeepNADE(16, hidden=8, orders=2).eval()
        >>> model.log_prob(model.sample(4)).shape
        torch.Size([4])
    """

    orders: Tensor
    rows = 1 << 22  # numbers of the first layer's output that an evaluation holds at once

    def __init__(
        self,
        dim: int,
        hidden: int = 500,
        layers: int = 2,
        levels: int = 2,
        *,
        orders: int = 1,
        activation: Literal["relu", "sigmoid", "tanh"] = "relu",
        context_features: int = 0,
    ) -> None:
        super().__init__(dim, levels)
        if layers < 1:
            raise ValueError(f"DeepNADE: layers={layers}, expected at least 1")
        self.config = {
            "dim": dim,
            "hidden": hidden,
            "layers": layers,
            "levels": levels,
            "orders": orders,
            "activation": activation,
            "context_features": context_features,
        }
        self.register_buffer("orders", ensemble(dim, orders, "DeepNADE"))
        self.network = self.layers.DeepNADENetwork(
            dim, (hidden,) * layers, self.outputs, activation=activation, context=context_features
        )

    def conditionals(self, x: Tensor, features: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits (N, D, outputs) of scaled x (N, D): that of ``features[d]`` given those before it in ``features``
        (D,)."""
        net = self.network
        a = net.first(len(x), context)
        step = max(1, self.rows // max(1, a.numel()))
        found = []
        for part in features.split(step):
            gains = net.learn(x[:, part].t(), part).cumsum(0)
            before = torch.cat([a[None], a + gains[:-1]])
            found.append(net.conditional(before, part))
            a = a + gains[-1]
        return torch.cat(found)[features.argsort()].transpose(0, 1)

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.conditionals(x, self.orders[0].argsort(), context)

    def estimate(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """An unbiased estimate of the mean of log p(x) over all orders, (N,), from torch's own random numbers."""
        self.check(x)
        ranks = torch.rand(x.shape, device=x.device).argsort(1).argsort(1)
        count = torch.randint(self.dim, (len(x), 1), device=x.device)  # d - 1
        known = ranks < count
        nll = self.nll(self.network(self.scaled(x), known, context), x)
        return -(nll * ~known).sum(1) * (self.dim / (self.dim - count[:, 0]))

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (N,): an estimate while training, else of the ensemble."""
        if self.training:
            return self.estimate(x, context)
        self.check(x)
        values = self.scaled(x)
        outs = (self.conditionals(values, order.argsort(), context) for order in self.orders)
        return mean_log([-self.nll(out, x).sum(1) for out in outs])

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
        n = len(given)
        degrees = self.orders[share.to(given.device)]
        features = (degrees + self.dim * ~known).argsort(1)  # what is known comes first
        x, seen, every = given.clone(), torch.zeros_like(known), torch.arange(n, device=given.device)
        a = self.network.first(n, context)
        for d in range(self.dim):
            f = features[:, d]
            if naive:
                out = self.network(x, seen, context)[every, f]
            else:
                out = self.network.conditional(a[:, None], f)[:, 0]
            drawn = nade_draw(out / temperature, uniforms[every, f], self.kind)
            x[every, f] = torch.where(known[every, f], given[every, f], drawn)
            seen[every, f] = True
            if not naive:
                a = a + self.network.learn(x[every, f][:, None], f)[:, 0]
        return x
