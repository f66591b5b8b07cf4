"""nn.NADENetwork and nn.DeepNADENetwork: the layers of the neural autoregressive distribution estimators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..reference.nade import ACTIVATIONS
from .made import check_whole_numbers, input_degrees


class NADENetwork(nn.Module):
    """The conditionals of a NADE, through :func:`genfast.ops.nade`: parameters of p(x_d | those before d) for each d.

    Args:
        features: D.
        hidden: H units, shared by all steps.
        outputs: P parameters of a conditional: 1 logit, a logit a level, or 3 K of a mixture of Gaussians.
        activation: "sigmoid", "relu" or "tanh".
        rescale: whether step d multiplies the hidden layer's input by a number rho_d, as RNADE does; it begins at
            d^(-1/2).
        order: the degree of each input, 1 to D, each once: None or "natural", "reversed", "random" or integers.
        context: K features of a condition, 0 for none; ``Linear(K, H, bias=False)`` adds to the hidden bias.
        generator: of a random order.

    ``forward(x, context=None)`` maps (N, D) and (N, K) to (N, D, P). ``sample(uniforms, kind)`` draws in one pass;
    ``given`` and ``known`` hold what is to stay. The weights' rows are in the order of the steps: ``order.argsort()``
    names their features.

    Raises:
        ValueError: arguments that do not fit, by name.

    Source: Larochelle, Murray 2011 (PMLR 15); Uria, Murray, Larochelle 2013 (arXiv:1306.0186).

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.NADENetwork(8, 32)
        >>> logits, x = layer(torch.ones(2, 8)), layer.sample(torch.rand(5, 8, 1))
    """

    order: Tensor

    def __init__(
        self,
        features: int,
        hidden: int = 500,
        outputs: int = 1,
        *,
        activation: str = "sigmoid",
        rescale: bool = False,
        order: str | Tensor | Sequence[int] | None = None,
        context: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_whole_numbers(
            "NADENetwork",
            ("features", features, 1),
            ("hidden", hidden, 1),
            ("outputs", outputs, 1),
            ("context", context, 0),
        )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"NADENetwork: activation={activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}"
            )
        self.features, self.hidden, self.outputs, self.activation = features, hidden, outputs, activation
        self.context_features = context
        degrees = input_degrees("NADENetwork", features, order, generator)  # type: ignore[arg-type]
        if len(set(degrees.tolist())) != features:
            raise ValueError(f"NADENetwork: order={degrees.tolist()}, expected each of 1 to {features} once")
        self.register_buffer("order", degrees)
        self._sort()
        self.weight = nn.Parameter(torch.empty(features, hidden))
        self.readout = nn.Parameter(torch.empty(features, outputs, hidden))
        self.bias = nn.Parameter(torch.zeros(features, outputs))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden))
        # At step d, a is a sum of d terms.
        self.rescale = nn.Parameter(1 / torch.arange(1, features + 1, dtype=torch.float32).sqrt()) if rescale else None
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.normal_(self.weight, std=features**-0.5)
        nn.init.uniform_(self.readout, -(hidden**-0.5), hidden**-0.5)

    def _sort(self) -> None:
        """Feature of each step, and step of each feature; they follow from the order."""
        self.register_buffer("_feature", self.order.argsort(), persistent=False)
        self.register_buffer("_step", self.order - 1, persistent=False)
        self._natural = bool((self.order == torch.arange(1, self.features + 1, device=self.order.device)).all())

    _feature: Tensor
    _step: Tensor

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._sort()

    def _parameters_of(self, x: Tensor, hidden_bias: Tensor) -> Tensor:
        return ops.nade(
            x, self.weight, self.readout, self.bias, hidden_bias, rescale=self.rescale, activation=self.activation
        )

    def _samples_of(
        self,
        uniforms: Tensor,
        readout: Tensor,
        bias: Tensor,
        hidden_bias: Tensor,
        given: Tensor | None,
        known: Tensor | None,
        kind: str,
    ) -> Tensor:
        return ops.nade_sample(
            uniforms,
            self.weight,
            readout,
            bias,
            hidden_bias,
            rescale=self.rescale,
            activation=self.activation,
            kind=kind,
            given=given,
            known=known,
        )

    def _hidden_bias(self, n: int, context: Tensor | None) -> Tensor:
        if (context is not None) != (self.context is not None):
            said = "with" if context is not None else "without"
            raise ValueError(f"NADENetwork: made with context={self.context_features}, called {said} one")
        if context is None or self.context is None:
            return self.hidden_bias
        if tuple(context.shape) != (n, self.context_features):
            raise ValueError(
                f"NADENetwork: context has shape {tuple(context.shape)}, expected {(n, self.context_features)}"
            )
        added: Tensor = self.context(context)
        return self.hidden_bias + added

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D, outputs) of x (N, D) and context (N, K)."""
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"NADENetwork: x has shape {tuple(x.shape)}, expected (N, {self.features})")
        hidden_bias = self._hidden_bias(x.shape[0], context)
        if self._natural:
            return self._parameters_of(x, hidden_bias)
        return self._parameters_of(x[:, self._feature], hidden_bias)[:, self._step]

    @torch.no_grad()
    def sample(
        self,
        uniforms: Tensor,
        kind: str = "bernoulli",
        *,
        context: Tensor | None = None,
        given: Tensor | None = None,
        known: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """x (N, D) from uniforms (N, D, 1), or 2 of a mixture; see :func:`genfast.ops.nade_sample`.

        ``temperature`` divides logits, and multiplies the deviations of a mixture.
        """
        if temperature <= 0:
            raise ValueError(f"NADENetwork.sample: temperature={temperature}, expected a positive number")
        readout: Tensor = self.readout
        bias: Tensor = self.bias
        if kind == "gaussian_mixture":
            third = self.outputs // 3
            cold = torch.zeros_like(bias)
            cold[:, 2 * third :] = math.log(temperature)
            bias = bias + cold
        elif temperature != 1:
            readout, bias = readout / temperature, bias / temperature
        hidden_bias = self._hidden_bias(uniforms.shape[0], context)
        if self._natural:
            return self._samples_of(uniforms, readout, bias, hidden_bias, given, known, kind)
        given, known = (t if t is None else t[:, self._feature] for t in (given, known))
        return self._samples_of(uniforms[:, self._feature], readout, bias, hidden_bias, given, known, kind)[
            :, self._step
        ]

    def extra_repr(self) -> str:
        return f"{self.features}, {self.hidden}, outputs={self.outputs}, activation={self.activation!r}"


class DeepNADENetwork(nn.Module):
    """One network for every order (DeepNADE): from [x m, m], m the mask of what is known, to parameters of all the
    rest.

    Args:
        features: D.
        hidden: widths of the hidden layers.
        outputs: P parameters of a conditional.
        activation: "sigmoid", "relu" or "tanh".
        context: K features of a condition, 0 for none.

    ``forward(x, mask, context=None)`` gives (N, D, P). For one feature after the other, ``first``, ``learn`` and
    ``conditional`` keep the first layer's pre-activation, to which a step adds one feature. The products are the
    library's.

    Raises:
        ValueError: arguments that do not fit, by name.

    Source: Uria, Murray, Larochelle 2014 (arXiv:1310.1757, section 3).

    Example:
        >>> import torch, genfast
        >>> net = genfast.nn.DeepNADENetwork(8, (32, 32))
        >>> logits = net(torch.ones(2, 8), torch.arange(8).expand(2, 8) < 3)
    """

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (500, 500),
        outputs: int = 1,
        *,
        activation: str = "relu",
        context: int = 0,
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        widths = [("hidden", h, 1) for h in hidden]
        check_whole_numbers(
            "DeepNADENetwork", ("features", features, 1), ("outputs", outputs, 1), ("context", context, 0), *widths
        )
        if not hidden:
            raise ValueError("DeepNADENetwork: hidden=(), expected at least one layer")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"DeepNADENetwork: activation={activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}"
            )
        self.features, self.hidden, self.outputs, self.activation = features, hidden, outputs, activation
        self.context_features = context
        sizes = [2 * features + context, *hidden, features * outputs]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def _rest(self, a: Tensor) -> Tensor:
        """The last hidden layer from the first one's pre-activation."""
        h = ACTIVATIONS[self.activation](a)
        for layer in list(self.linears)[1:-1]:
            h = ACTIVATIONS[self.activation](layer(h))
        return h

    def forward(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D, outputs) of x (N, D), mask (N, D) and context (N, K): what x holds where ``mask`` is 0 has no part."""
        if x.dim() != 2 or x.shape[1] != self.features or mask.shape != x.shape:
            wanted = f"(N, {self.features})"
            raise ValueError(
                f"DeepNADENetwork: x has shape {tuple(x.shape)} and mask {tuple(mask.shape)}, expected {wanted} of both"
            )
        m = mask.to(x.dtype)
        parts = [torch.where(mask.bool(), x, 0), m, *self._context(x.shape[0], context)]
        first, last = self.linears[0], self.linears[-1]
        out: Tensor = last(self._rest(first(torch.cat(parts, 1)))).unflatten(1, (self.features, self.outputs))
        return out

    def _context(self, n: int, context: Tensor | None) -> list[Tensor]:
        if (context is not None) != bool(self.context_features):
            said = "with" if context is not None else "without"
            raise ValueError(f"DeepNADENetwork: made with context={self.context_features}, called {said} one")
        if context is None:
            return []
        if tuple(context.shape) != (n, self.context_features):
            raise ValueError(
                f"DeepNADENetwork: context has shape {tuple(context.shape)}, expected {(n, self.context_features)}"
            )
        return [context]

    def first(self, n: int, context: Tensor | None = None) -> Tensor:
        """The first layer's pre-activation (N, H) where nothing is known yet."""
        layer = self.linears[0]
        bias: Tensor = layer.bias  # type: ignore[assignment]
        found = self._context(n, context)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return F.linear(found[0], weight[:, 2 * self.features :], bias) if found else bias.expand(n, -1)

    def learn(self, x: Tensor, feature: Tensor) -> Tensor:
        """What the first pre-activation gains (F, M, H) when each feature (F,), whose values are x (F, M), becomes
        known."""
        columns: Tensor = self.linears[0].weight.t()  # type: ignore[operator]
        return x[..., None] * columns[feature][:, None] + columns[feature + self.features][:, None]

    def conditional(self, a: Tensor, feature: Tensor) -> Tensor:
        """Parameters (F, M, outputs) of each feature (F,), given the first pre-activation a (F, M, H)."""
        last = self.linears[-1]
        rows: Tensor = last.weight.unflatten(0, (self.features, self.outputs))  # type: ignore[operator]
        bias: Tensor = last.bias.unflatten(0, (self.features, self.outputs))  # type: ignore[operator]
        return self._rest(a) @ rows[feature].transpose(1, 2) + bias[feature][:, None]
