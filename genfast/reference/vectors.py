"""Density models of vectors in plain PyTorch: the yardstick of NADE, RNADE, DeepNADE and MADE in :mod:`genfast.models`.

Those of whole numbers are :class:`VectorModel`: a dimension has ``levels`` of them, one logit where there are two (black and
white), else one logit a level (grey). The network sees x / (levels - 1). The layers come from the class attribute ``layers``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autoregressive import AutoregressiveModel
from .made import MADE as MADENetwork
from .models import DensityModel
from .modes import evaluating
from .nade import NADE as NADELayer
from .nade import DeepNADE as DeepNADENetwork
from .nade import mixture_of_gaussians_log_prob, nade_draw

LAYERS = SimpleNamespace(NADE=NADELayer, DeepNADE=DeepNADENetwork, MADE=MADENetwork)


class VectorModel(AutoregressiveModel):
    """p(x) = prod p(x_d | x_<d) over whole numbers x (N, D) in [0, levels), int64 or uint8."""

    layers: Any = LAYERS
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
        self, features: Tensor, uniforms: Tensor, context: Tensor | None, given: Tensor, known: Tensor, temperature: float
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
        self, uniforms: Tensor, context: Tensor | None, given: Tensor, known: Tensor, temperature: float, naive: bool,
        share: Tensor,
    ) -> Tensor:  # fmt: skip
        """Scaled x (N, D) from uniforms (N, D, 1); ``share`` (N,) says which order of an ensemble draws each."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits (N, D, outputs) of whole numbers x (N, D)."""
        return self._params(self.scaled(x), context)

    @torch.no_grad()
    def sample(
        self, n: int, shape: Sequence[int] | None = None, *, method: str = "auto", context: Tensor | None = None,
        temperature: float = 1.0, prefix: Tensor | None = None, given: Tensor | None = None, known: Tensor | None = None,
        uniforms: Tensor | None = None, generator: torch.Generator | None = None, progress: bool = False,
        rows: slice | None = None,
    ) -> Tensor:  # fmt: skip
        """Draws ``n`` vectors (n, D), int64, in evaluation mode.

        Args:
            method: "auto" or "cached", in one pass where the model can, or "naive", D passes; both draw the same from the same
                numbers.
            context: (n, K) of a conditional model.
            temperature: divides the logits.
            prefix: (n, k) whole numbers, the first k dimensions; or
            given, known: (n, D) whole numbers, and bool (n, D) or (D,) where they hold: these stay as they are. What is drawn
                is drawn given those known that come before it in the model's order (DeepNADE: given all that is known).
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
                raise ValueError(f"{name}: prefix has shape {tuple(prefix.shape)}, expected ({n}, k), k at most {self.dim}")
            given = F.pad(prefix, (0, self.dim - prefix.shape[1]))
            known = torch.arange(self.dim, device=prefix.device) < prefix.shape[1]
        if (given is None) != (known is None):
            raise ValueError(f"{name}: one of given and known is missing, expected both or neither")
        if given is None or known is None:
            values, mask = like.new_zeros(n, self.dim), torch.zeros(n, self.dim, dtype=torch.bool, device=like.device)
        else:
            if tuple(given.shape) != (n, self.dim) or tuple(known.shape) not in ((self.dim,), (n, self.dim)):
                raise ValueError(
                    f"{name}: given has shape {tuple(given.shape)} and known {tuple(known.shape)}, expected ({n}, {self.dim}) "
                    f"and that or ({self.dim},)"
                )
            mask = known.to(like.device).bool().expand(n, -1)
            values = self.scaled(self.check(torch.where(mask, given.to(like.device), 0)))
        if uniforms is None:
            uniforms = torch.rand(
                n, self.dim, generator=generator, device=like.device if generator is None else generator.device
            )
        elif tuple(uniforms.shape) != (n, self.dim):
            raise ValueError(f"{name}: uniforms has shape {tuple(uniforms.shape)}, expected ({n}, {self.dim})")
        share = _shares(n, len(getattr(self, "orders", [0])), generator)
        if rows is not None:
            uniforms, share, values, mask = uniforms[rows], share[rows], values[rows], mask[rows]
            context = None if context is None else context[rows]
        with evaluating(self):
            x = self._draw(uniforms.to(like)[..., None], context, values, mask, temperature, method == "naive", share)
        orders: Tensor = self.orders if hasattr(self, "orders") else self.network.order[None]  # type: ignore[assignment]
        _check_drawn(name, x, orders, share)
        return (x * (self.levels - 1)).round().long()


class NADE(VectorModel):
    """NADE (Larochelle and Murray 2011): each conditional from a hidden layer that the dimensions share.

    Args:
        dim: D.
        hidden: units.
        levels: of a dimension; 2 are black and white.
        activation: "sigmoid", "relu" or "tanh".
        order: the degree of each dimension, 1 to D: None, "reversed", "random" or integers.
        context_features: K of a conditional model, else 0.

    Raises:
        ValueError: arguments that do not fit, by name.
    """

    def __init__(
        self, dim: int, hidden: int = 500, levels: int = 2, *, activation: str = "sigmoid",
        order: str | Sequence[int] | None = None, context_features: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(dim, levels)
        self.network = self.layers.NADE(dim, hidden, self.outputs, activation=activation, order=order, context=context_features)
        self.config = {
            "dim": dim, "hidden": hidden, "levels": levels, "activation": activation, "order": self.network.order.tolist(),
            "context_features": context_features,
        }  # fmt: skip

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        out: Tensor = self.network(x, context)
        return out

    def _draw(
        self, uniforms: Tensor, context: Tensor | None, given: Tensor, known: Tensor, temperature: float, naive: bool,
        share: Tensor,
    ) -> Tensor:  # fmt: skip
        if naive:
            return self._naive(self.network.order.argsort(), uniforms, context, given, known, temperature)
        found: Tensor = self.network.sample(
            uniforms, self.kind, context=context, given=given, known=known, temperature=temperature
        )
        return found


def _check_drawn(name: str, x: Tensor, orders: Tensor, share: Tensor) -> None:
    """Raises where a sample has NaN, which its parameters were; on a GPU, which is not waited for, an assertion does.

    ``orders`` (K, D) are degrees, and ``share`` (N,) says which of them drew each: what depends on the first NaN is NaN too.
    """
    if x.is_cuda:
        torch._assert_async((x == x).all(), f"{name}: the network's parameters of a dimension are not finite")
    elif bool(x.isnan().any()):
        sample = int(x.isnan().any(1).nonzero()[0])
        degrees = orders[int(share[sample])].to(x.device)
        dimension = int(degrees.masked_fill(~x[sample].isnan(), x.shape[1] + 1).argmin())
        raise FloatingPointError(
            f"{name}: the network's parameters of dimension {dimension} of sample {sample} are not finite (a NaN, an infinity, "
            "or every level forbidden by a logit of -inf)"
        )


def _ensemble(dim: int, orders: int, name: str) -> Tensor:
    """Degrees (K, D): the natural order, then random ones."""
    if orders < 1:
        raise ValueError(f"{name}: orders={orders}, expected at least 1")
    return torch.stack([torch.arange(1, dim + 1), *(torch.randperm(dim) + 1 for _ in range(orders - 1))])


def _mean_log(parts: Sequence[Tensor]) -> Tensor:
    """log of the mean of the probabilities."""
    return torch.logsumexp(torch.stack(tuple(parts)), 0) - math.log(len(parts))


def _shares(n: int, orders: int, generator: torch.Generator | None) -> Tensor:
    """Which order draws each sample of a mixture of all."""
    if orders == 1:
        return torch.zeros(n, dtype=torch.int64)
    return torch.randint(orders, (n,), generator=generator, device=None if generator is None else generator.device).cpu()


class MADE(VectorModel):
    """MADE (arXiv:1502.03509): a masked autoencoder that gives all conditionals in one pass, for one order or an ensemble.

    Args:
        dim: D.
        hidden: units of each layer.
        layers: hidden layers.
        levels: of a dimension; 2 are black and white.
        orders: K; with more than one each training batch takes the next, and ``log_prob`` in evaluation mode is the log of
            the mean of their probabilities (section 4.2).
        activation: of the hidden layers, "relu" by default.
        context_features: of a conditional model, else 0.

    Raises:
        ValueError: arguments that do not fit, by name.
    """

    orders: Tensor
    turn: Tensor

    def __init__(
        self, dim: int, hidden: int = 512, layers: int = 2, levels: int = 2, *, orders: int = 1, activation: str = "relu",
        context_features: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(dim, levels)
        if layers < 1:
            raise ValueError(f"MADE: layers={layers}, expected at least 1")
        self.config = {
            "dim": dim, "hidden": hidden, "layers": layers, "levels": levels, "orders": orders, "activation": activation,
            "context_features": context_features,
        }  # fmt: skip
        self.register_buffer("orders", _ensemble(dim, orders, "MADE"))
        self.register_buffer("turn", torch.zeros((), dtype=torch.int64))
        self.network = self.layers.MADE(
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
        return _mean_log(parts)

    def _draw(
        self, uniforms: Tensor, context: Tensor | None, given: Tensor, known: Tensor, temperature: float, naive: bool,
        share: Tensor,
    ) -> Tensor:  # fmt: skip
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
        return self._naive(self.network.order.argsort(), uniforms, context, given, known, temperature)


class DeepNADE(VectorModel):
    """DeepNADE (arXiv:1310.1757): one network for the conditionals of every order, and an ensemble of orders (EoNADE).

    While training, ``log_prob`` is an estimate: for each sample it draws an order and how many of its dimensions are known,
    d - 1 of D, and gives D / (D - d + 1) times the log probability of those unknown, whose mean over the draws is the mean of
    log p over all orders (section 3). In evaluation mode it is exact, for ``orders`` orders that are averaged.

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
    """

    orders: Tensor
    rows = 1 << 22  # numbers of the first layer's output that an evaluation holds at once

    def __init__(
        self, dim: int, hidden: int = 500, layers: int = 2, levels: int = 2, *, orders: int = 1, activation: str = "relu",
        context_features: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(dim, levels)
        if layers < 1:
            raise ValueError(f"DeepNADE: layers={layers}, expected at least 1")
        self.config = {
            "dim": dim, "hidden": hidden, "layers": layers, "levels": levels, "orders": orders, "activation": activation,
            "context_features": context_features,
        }  # fmt: skip
        self.register_buffer("orders", _ensemble(dim, orders, "DeepNADE"))
        self.network = self.layers.DeepNADE(
            dim, (hidden,) * layers, self.outputs, activation=activation, context=context_features
        )

    def conditionals(self, x: Tensor, features: Tensor, context: Tensor | None = None) -> Tensor:
        """Logits (N, D, outputs) of scaled x (N, D): that of ``features[d]`` given those before it in ``features`` (D,)."""
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
        return _mean_log([-self.nll(out, x).sum(1) for out in outs])

    def _draw(
        self, uniforms: Tensor, context: Tensor | None, given: Tensor, known: Tensor, temperature: float, naive: bool,
        share: Tensor,
    ) -> Tensor:  # fmt: skip
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
    """

    layers: Any = LAYERS

    def __init__(
        self, dim: int, hidden: int = 100, components: int = 10, *, activation: str = "relu", rescale: bool = True,
        scale_gradients: bool = False, order: str | Sequence[int] | None = None, context_features: int = 0,
    ) -> None:  # fmt: skip
        super().__init__((dim,))
        if components < 1:
            raise ValueError(f"RNADE: components={components}, expected at least 1")
        self.network = self.layers.NADE(
            dim, hidden, 3 * components, activation=activation, rescale=rescale, order=order, context=context_features
        )
        self.components, self.scale_gradients = components, scale_gradients
        with torch.no_grad():  # components that differ from the start, of the width of standardised data
            self.network.bias[:, components : 2 * components] = torch.linspace(-1, 1, components) if components > 1 else 0
        self.config = {
            "dim": dim, "hidden": hidden, "components": components, "activation": activation, "rescale": rescale,
            "scale_gradients": scale_gradients, "order": self.network.order.tolist(), "context_features": context_features,
        }  # fmt: skip

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
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, context: Tensor | None = None,
        uniforms: Tensor | None = None, given: Tensor | None = None, known: Tensor | None = None, rows: slice | None = None,
    ) -> Tensor:  # fmt: skip
        """n samples (n, D).

        Args:
            temperature: multiplies the components' deviations.
            generator: of the random numbers, unless they are given: ``uniforms`` (n, D, 2).
            context: (n, K) of a conditional model.
            given, known: (n, D) values, and bool (n, D) or (D,) where they hold; the rest is drawn given those known that come
                before it in the model's order.
            rows: only these of the n, from the random numbers of all: what one of several processes draws.
        """
        if n < 0 or temperature <= 0:
            raise ValueError(f"RNADE.sample: n={n} and temperature={temperature}, expected n >= 0 and a positive temperature")
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
        _check_drawn("RNADE.sample", found, self.network.order[None], torch.zeros(len(found), dtype=torch.int64))
        return found
