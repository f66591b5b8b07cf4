"""The neural autoregressive distribution estimator, as the papers write it: one step after the other over the dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .made import input_degrees

ACTIVATIONS = ("sigmoid", "relu", "tanh")
KINDS = ("bernoulli", "categorical", "gaussian_mixture")


def _act(z: Tensor, activation: str) -> Tensor:
    return {"sigmoid": torch.sigmoid, "relu": torch.relu, "tanh": torch.tanh}[activation](z)


def _slope(h: Tensor, activation: str) -> Tensor:
    """act'(z) from h = act(z)."""
    if activation == "relu":
        return (h > 0).to(h.dtype)
    return h * (1 - h) if activation == "sigmoid" else 1 - h * h


def _wide(like: Tensor, *tensors: Tensor | None) -> list[Any]:
    """All in the dtype of the first, and float32 at least."""
    dtype = like.dtype if like.element_size() >= 4 else torch.float32
    return [t if t is None else t.to(dtype) for t in (like, *tensors)]


def nade(
    x: Tensor, weight: Tensor, readout: Tensor, bias: Tensor, hidden_bias: Tensor, rescale: Tensor | None, activation: str
) -> Tensor:
    """Parameters (N, D, P) of p(x_d | x_<d): a_1 = c, h_d = act(rho_d a_d), p_d = b_d + V_d h_d, a_{d+1} = a_d + W_d x_d."""
    given, w, v, b, c, rho = _wide(x, weight, readout, bias, hidden_bias, rescale)
    a = c.expand(x.shape[0], -1)
    params = []
    for d in range(x.shape[1]):
        h = _act(a if rho is None else rho[d] * a, activation)
        params.append(b[d] + h @ v[d].t())
        a = a + given[:, d, None] * w[d]
    return torch.stack(params, 1).to(x.dtype)


def nade_backward(
    grad: Tensor, x: Tensor, weight: Tensor, readout: Tensor, hidden_bias: Tensor, rescale: Tensor | None, activation: str,
    need_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (empty unless ``need_x``), weight, readout, bias, hidden_bias and rescale (empty without one).

    The scan in reverse, with e the cotangent of a: e_d = e_{d+1} + rho_d act'(rho_d a_d) V_d^T g_d.
    """
    given, w, v, c, rho, g = _wide(x, weight, readout, hidden_bias, rescale, grad)
    steps = x.shape[1]
    states = [c.expand(x.shape[0], -1)]
    for d in range(steps - 1):
        states.append(states[-1] + given[:, d, None] * w[d])
    e = torch.zeros_like(states[0])
    dx, dw, dv, drho = [], [], [], []
    for d in reversed(range(steps)):
        dx.append(e @ w[d])
        dw.append(given[:, d] @ e)
        h = _act(states[d] if rho is None else rho[d] * states[d], activation)
        dv.append(g[:, d].t() @ h)
        dz = (g[:, d] @ v[d]) * _slope(h, activation)
        if rho is not None:
            drho.append((dz * states[d]).sum())
        e = e + (dz if rho is None else rho[d] * dz)

    def stacked(parts: list[Tensor], axis: int = 0) -> Tensor:
        return torch.stack(parts[::-1], axis)

    return (
        stacked(dx, 1).to(x.dtype) if need_x else x.new_empty(0),
        stacked(dw).to(weight.dtype),
        stacked(dv).to(readout.dtype),
        g.sum(0).to(readout.dtype),
        (e if hidden_bias.dim() == 2 else e.sum(0)).to(hidden_bias.dtype),
        x.new_empty(0) if rescale is None else stacked(drho).to(rescale.dtype),
    )


def mixture_of_gaussians_log_prob(params: Tensor, x: Tensor) -> Tensor:
    """log sum_k pi_k N(x; mu_k, sigma_k) of x (*), with params (*, 3 K): K logits of pi, K means, K log sigma."""
    logits, mean, log_sigma = params.chunk(3, -1)
    z = (x[..., None] - mean) * (-log_sigma).exp()
    constant = 0.9189385332046727  # log(2 pi) / 2
    return torch.logsumexp(logits.log_softmax(-1) - 0.5 * z * z - log_sigma, -1) - constant


def _chosen(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The smallest index whose cumulative probability exceeds the uniform number."""
    sums = (logits - logits.amax(-1, keepdim=True)).exp().cumsum(-1)
    return (sums <= uniforms[..., None] * sums[..., -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)


def _drawable(x: Tensor, logits: Tensor) -> Tensor:
    """``x`` (*), or NaN where the logits (*, P) that it was drawn by have no sum."""
    return x.masked_fill(~logits.amax(-1).isfinite(), float("nan"))


def nade_draw(params: Tensor, uniforms: Tensor, kind: str) -> Tensor:
    """x (*) from params (*, P) and uniforms (*, 1), or (*, 2) for a mixture: its component, then its normal deviate.

    NaN where the parameters say nothing that could be drawn."""
    if kind == "bernoulli":
        chance = torch.sigmoid(params[..., 0])
        return (uniforms[..., 0] < chance).to(params.dtype).masked_fill(chance.isnan(), float("nan"))
    if kind == "categorical":
        drawn = _chosen(params, uniforms[..., 0]).to(params.dtype) / max(params.shape[-1] - 1, 1)
        return _drawable(drawn, params)
    logits, mean, log_sigma = params.chunk(3, -1)
    k = _chosen(logits, uniforms[..., 0])[..., None]
    tiny = 1e-7 if params.dtype is torch.float32 else 1e-12
    normal = torch.special.ndtri(uniforms[..., 1].clamp(tiny, 1 - tiny))
    return _drawable(mean.gather(-1, k)[..., 0] + log_sigma.gather(-1, k)[..., 0].exp() * normal, logits)


@torch.no_grad()
def nade_sample(
    uniforms: Tensor, weight: Tensor, readout: Tensor, bias: Tensor, hidden_bias: Tensor, rescale: Tensor | None,
    given: Tensor | None, known: Tensor | None, activation: str, kind: str,
) -> Tensor:  # fmt: skip
    """x (N, D), drawn in one pass; where ``known`` (N, D), x is ``given``."""
    u, w, v, b, c, rho, values = _wide(uniforms, weight, readout, bias, hidden_bias, rescale, given)
    a = c.expand(u.shape[0], -1)
    x = []
    for d in range(u.shape[1]):
        h = _act(a if rho is None else rho[d] * a, activation)
        drawn = nade_draw(b[d] + h @ v[d].t(), u[:, d], kind)
        if values is not None and known is not None:
            drawn = torch.where(known[:, d], values[:, d], drawn)
        x.append(drawn)
        a = a + drawn[:, None] * w[d]
    return torch.stack(x, 1).to(uniforms.dtype)


# ---- modules ----


class NADE(nn.Module):
    """The conditionals of a NADE as a layer; the steps follow ``order``, and whatever goes in or out does not."""

    order: Tensor

    def __init__(
        self, features: int, hidden: int = 500, outputs: int = 1, *, activation: str = "sigmoid", rescale: bool = False,
        order: str | Tensor | Sequence[int] | None = None, context: int = 0, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, least in (
            ("features", features, 1), ("hidden", hidden, 1), ("outputs", outputs, 1), ("context", context, 0),
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"NADE: {name}={value!r}, expected a whole number of at least {least}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"NADE: activation={activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
        self.features, self.hidden, self.outputs, self.activation = features, hidden, outputs, activation
        self.context_features = context
        degrees = input_degrees(features, order, generator)  # type: ignore[arg-type]
        if len(set(degrees.tolist())) != features:
            raise ValueError(f"NADE: order={degrees.tolist()}, expected each of 1 to {features} once")
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
        return nade(x, self.weight, self.readout, self.bias, hidden_bias, self.rescale, self.activation)

    def _samples_of(
        self, uniforms: Tensor, readout: Tensor, bias: Tensor, hidden_bias: Tensor, given: Tensor | None, known: Tensor | None,
        kind: str,
    ) -> Tensor:  # fmt: skip
        """By the standard loop: the conditionals of all dimensions, D times."""
        x = uniforms.new_zeros(uniforms.shape[:2]) if given is None else given.clone()
        for d in range(self.features):
            params = nade(x, self.weight, readout, bias, hidden_bias, self.rescale, self.activation)
            drawn = nade_draw(params[:, d], uniforms[:, d], kind)
            x[:, d] = drawn if given is None or known is None else torch.where(known[:, d], given[:, d], drawn)
        return x

    def _hidden_bias(self, n: int, context: Tensor | None) -> Tensor:
        if (context is not None) != (self.context is not None):
            said = "with" if context is not None else "without"
            raise ValueError(f"NADE: made with context={self.context_features}, called {said} one")
        if context is None or self.context is None:
            return self.hidden_bias
        if tuple(context.shape) != (n, self.context_features):
            raise ValueError(f"NADE: context has shape {tuple(context.shape)}, expected {(n, self.context_features)}")
        added: Tensor = self.context(context)
        return self.hidden_bias + added

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D, outputs) of x (N, D) and context (N, K)."""
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"NADE: x has shape {tuple(x.shape)}, expected (N, {self.features})")
        hidden_bias = self._hidden_bias(x.shape[0], context)
        if self._natural:
            return self._parameters_of(x, hidden_bias)
        return self._parameters_of(x[:, self._feature], hidden_bias)[:, self._step]

    @torch.no_grad()
    def sample(
        self, uniforms: Tensor, kind: str = "bernoulli", *, context: Tensor | None = None, given: Tensor | None = None,
        known: Tensor | None = None, temperature: float = 1.0,
    ) -> Tensor:  # fmt: skip
        """x (N, D) from uniforms (N, D, 1), or 2 of a mixture; see :func:`genfast.ops.nade_sample`.

        ``temperature`` divides logits, and multiplies the deviations of a mixture.
        """
        if temperature <= 0:
            raise ValueError(f"NADE.sample: temperature={temperature}, expected a positive number")
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
        return self._samples_of(uniforms[:, self._feature], readout, bias, hidden_bias, given, known, kind)[:, self._step]

    def extra_repr(self) -> str:
        return f"{self.features}, {self.hidden}, outputs={self.outputs}, activation={self.activation!r}"


class DeepNADE(nn.Module):
    """One network for every order: from x m and m, m the mask of what is known, to the parameters of all that is not."""

    def __init__(
        self, features: int, hidden: Sequence[int] = (500, 500), outputs: int = 1, *, activation: str = "relu", context: int = 0
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        for name, value, least in (
            ("features", features, 1), ("outputs", outputs, 1), ("context", context, 0), *(("hidden", h, 1) for h in hidden),
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"DeepNADE: {name}={value!r}, expected a whole number of at least {least}")
        if not hidden:
            raise ValueError("DeepNADE: hidden=(), expected at least one layer")
        if activation not in ACTIVATIONS:
            raise ValueError(f"DeepNADE: activation={activation!r}, expected one of {', '.join(map(repr, ACTIVATIONS))}")
        self.features, self.hidden, self.outputs, self.activation = features, hidden, outputs, activation
        self.context_features = context
        sizes = [2 * features + context, *hidden, features * outputs]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def _rest(self, a: Tensor) -> Tensor:
        """The last hidden layer from the first one's pre-activation."""
        h = _act(a, self.activation)
        for layer in list(self.linears)[1:-1]:
            h = _act(layer(h), self.activation)
        return h

    def forward(self, x: Tensor, mask: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D, outputs) of x (N, D), mask (N, D) and context (N, K): what x holds where ``mask`` is 0 has no part."""
        if x.dim() != 2 or x.shape[1] != self.features or mask.shape != x.shape:
            wanted = f"(N, {self.features})"
            raise ValueError(f"DeepNADE: x has shape {tuple(x.shape)} and mask {tuple(mask.shape)}, expected {wanted} of both")
        m = mask.to(x.dtype)
        parts = [torch.where(mask.bool(), x, 0), m, *self._context(x.shape[0], context)]
        first, last = self.linears[0], self.linears[-1]
        out: Tensor = last(self._rest(first(torch.cat(parts, 1)))).unflatten(1, (self.features, self.outputs))
        return out

    def _context(self, n: int, context: Tensor | None) -> list[Tensor]:
        if (context is not None) != bool(self.context_features):
            said = "with" if context is not None else "without"
            raise ValueError(f"DeepNADE: made with context={self.context_features}, called {said} one")
        if context is None:
            return []
        if tuple(context.shape) != (n, self.context_features):
            raise ValueError(f"DeepNADE: context has shape {tuple(context.shape)}, expected {(n, self.context_features)}")
        return [context]

    def first(self, n: int, context: Tensor | None = None) -> Tensor:
        """The first layer's pre-activation (N, H) where nothing is known yet."""
        layer = self.linears[0]
        bias: Tensor = layer.bias  # type: ignore[assignment]
        found = self._context(n, context)
        weight: Tensor = layer.weight  # type: ignore[assignment]
        return F.linear(found[0], weight[:, 2 * self.features :], bias) if found else bias.expand(n, -1)

    def learn(self, x: Tensor, feature: Tensor) -> Tensor:
        """What the first pre-activation gains (F, M, H) when each feature (F,), whose values are x (F, M), becomes known."""
        columns: Tensor = self.linears[0].weight.t()  # type: ignore[operator]
        return x[..., None] * columns[feature][:, None] + columns[feature + self.features][:, None]

    def conditional(self, a: Tensor, feature: Tensor) -> Tensor:
        """Parameters (F, M, outputs) of each feature (F,), given the first pre-activation a (F, M, H)."""
        last = self.linears[-1]
        rows: Tensor = last.weight.unflatten(0, (self.features, self.outputs))  # type: ignore[operator]
        bias: Tensor = last.bias.unflatten(0, (self.features, self.outputs))  # type: ignore[operator]
        return self._rest(a) @ rows[feature].transpose(1, 2) + bias[feature][:, None]
