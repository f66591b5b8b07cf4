"""nn.MADENetwork."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from .._calls import class_of, stands_for
from ..programs import FlowBuilder, Layer, LoweringError
from ..programs.flow_program import Rows
from ..reference.masked_linear import ACTIVATIONS
from .masked_linear import MaskedLinear, integers

Order = Literal["natural", "reversed", "random"]
Degrees = Literal["even", "random"]


def check_whole_numbers(owner: str, *limits: tuple[str, object, int]) -> None:
    """Raises where a value of ``limits``, (name, value, least), is no whole number or below its least."""
    for name, value, least in limits:
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{owner}: {name}={value!r}, expected a whole number of at least {least}")


def input_degrees(
    owner: str, features: int, order: Order | Tensor | Sequence[int] | None, generator: torch.Generator | None
) -> Tensor:
    """The degree of each input, 1 to D: its place in the order."""
    if order is None or (isinstance(order, str) and order == "natural"):
        return torch.arange(1, features + 1)
    if isinstance(order, str):
        if order == "reversed":
            return torch.arange(features, 0, -1)
        if order == "random":
            return torch.randperm(features, generator=generator, device=_device(generator)).cpu() + 1
        raise ValueError(
            f"{owner}: order={order!r}, expected None, 'natural', 'reversed', 'random' or {features} degrees"
        )
    degrees = integers(owner, "order", order).cpu()
    if len(degrees) != features or not bool(((degrees >= 1) & (degrees <= features)).all()):
        raise ValueError(f"{owner}: order={degrees.tolist()}, expected {features} degrees from 1 to {features}")
    return degrees


def hidden_degrees(
    width: int,
    low: int,
    high: int,
    degrees: Degrees | Tensor | Sequence[int],
    generator: torch.Generator | None,
    ordered: bool = True,
) -> Tensor:
    """The degrees of a hidden layer within [low, high], drawn or spread evenly; ``ordered`` sorts what is drawn."""
    if not isinstance(degrees, str):
        found = integers("MADENetwork", "degrees", degrees).cpu()
        if len(found) != width or not bool(((found >= 0) & (found <= high)).all()):
            raise ValueError(
                f"MADENetwork: degrees={found.tolist()}, expected {width} degrees from 0 to {high} for this layer"
            )
        return found
    if degrees == "even":
        return low + torch.arange(width) * (high - low + 1) // max(1, width)
    if degrees == "random":
        drawn = torch.randint(low, high + 1, (width,), generator=generator, device=_device(generator)).cpu()
        if not low:
            drawn[drawn.argmin()] = 0  # a unit that no input reaches carries the context to the first output
        return drawn.sort().values if ordered else drawn
    raise ValueError(
        f"MADENetwork: degrees={degrees!r}, expected 'even', 'random' or a sequence of degrees per hidden layer"
    )


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


class MADENetwork(nn.Module):
    """A masked autoencoder (MADE): output i is a function of the inputs that come before i in the order, and of a
    context.

    Args:
        features: D.
        hidden: widths of the hidden layers, any, also below D.
        outputs: numbers per feature.
        context: K features of a context, 0 for none. It enters the first layer, ``Linear(K, hidden[0], bias=False)``,
            and
            reaches every output: with a context some hidden units have degree 0, which no input reaches.
        order: the degree of each input, 1 to D: None or "natural", "reversed", "random", or integers. Inputs of equal
            degree do not see one another.
        degrees: of hidden units: "even" (spread over 1 to D - 1), "random" (drawn as the paper draws them, then sorted
            within a layer, which only names the units), or integers for each layer.
        residual: pre-activation blocks of two layers, one for each of ``hidden``, whose widths are equal (nflows'
            variant).
        activation: "relu" (fused), "elu", "gelu", "leaky_relu", "none", "sigmoid", "silu", "softplus" or "tanh".
        generator: of the draws.

    ``forward(x, context=None)`` maps (N, D) and (N, K) to (N, D, outputs). With D = 1 an output depends on the context
    alone. ``resample(order=..., degrees=..., generator=...)`` draws another order or other hidden degrees over the same
    weights, for order-agnostic and connectivity-agnostic training; no weight is touched, so what one mask kills the
    next may use.

    Raises:
        ValueError: arguments that do not fit, by name.

    Source: MADE (arXiv:1502.03509, section 4).

    Example:
        >>> import torch, genfast
        >>> made = genfast.nn.MADENetwork(6, (32, 32), outputs=2, order="reversed")
        >>> made(torch.randn(4, 6)).shape
        torch.Size([4, 6, 2])
    """

    linear: type[MaskedLinear] = MaskedLinear

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (512, 512),
        *,
        outputs: int = 1,
        context: int = 0,
        order: Order | Tensor | Sequence[int] | None = None,
        degrees: Degrees | Sequence[Tensor | Sequence[int]] = "even",
        residual: bool = False,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        hidden = tuple(hidden)
        widths = [("hidden", h, 1) for h in hidden]
        check_whole_numbers(
            "MADENetwork", ("features", features, 1), ("outputs", outputs, 1), ("context", context, 0), *widths
        )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"MADENetwork: activation={activation!r}, expected one of {', '.join(map(repr, sorted(ACTIVATIONS)))}"
            )
        if residual and len(set(hidden)) != 1:
            raise ValueError(
                f"MADENetwork: hidden={hidden} with residual=True, expected one or more layers of equal width"
            )
        self.features, self.hidden, self.outputs, self.context_features = features, hidden, outputs, context
        self.residual, self.activation = residual, activation
        sizes = self._units(
            input_degrees("MADENetwork", features, order, generator), self._hidden(degrees, generator, True)
        )
        last = len(sizes) - 2
        self.linears = nn.ModuleList(
            self.linear(before, after, strict=i == last) for i, (before, after) in enumerate(zip(sizes, sizes[1:]))
        )
        self.context = nn.Linear(context, len(sizes[1]), bias=False) if context else None
        if residual:
            for layer in list(self._masked())[2:-1:2]:  # each block starts near the identity, as nflows' do
                nn.init.uniform_(layer.weight, -1e-3, 1e-3)
                nn.init.uniform_(layer.bias, -1e-3, 1e-3)

    def _masked(self) -> Sequence[MaskedLinear]:
        return cast("Sequence[MaskedLinear]", self.linears)

    def _hidden(
        self, degrees: Degrees | Sequence[Tensor | Sequence[int]], generator: torch.Generator | None, ordered: bool
    ) -> list[Tensor]:
        """The degrees of each hidden layer: those of a layer are not below the least of the layer before."""
        high = self.features - 1
        low = 0 if self.context_features or not high else 1
        if not isinstance(degrees, str) and len(degrees) != len(self.hidden):
            raise ValueError(
                f"MADENetwork: degrees has {len(degrees)} layers, expected one for each of hidden={self.hidden}"
            )
        found: list[Tensor] = []
        for i, width in enumerate(self.hidden):
            if self.residual and found and isinstance(degrees, str):  # what is added must have seen the same
                found.append(found[0])
                continue
            found.append(
                hidden_degrees(
                    width, low, high, degrees if isinstance(degrees, str) else degrees[i], generator, ordered
                )
            )
            low = int(found[-1].min())
        if self.residual and any(not torch.equal(f, found[0]) for f in found):
            raise ValueError("MADENetwork: degrees of the layers differ with residual=True, expected the same in each")
        return found

    def _units(self, order: Tensor, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The degrees of all layers of units, from the inputs to the outputs."""
        inner = [hidden[0], *(h for h in hidden for _ in range(2))] if self.residual else list(hidden)
        return [order, *inner, order.repeat_interleave(self.outputs)]

    @property
    def order(self) -> Tensor:
        """The degree of each input, (D,)."""
        return self._masked()[0].in_degrees

    def resample(
        self,
        *,
        order: Order | Tensor | Sequence[int] | None = None,
        degrees: Degrees | Sequence[Tensor | Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Another order or other hidden degrees over the same weights (section 4.2 and 4.3); None keeps what there
        is."""
        linears = self._masked()
        inputs = self.order.cpu() if order is None else input_degrees("MADENetwork", self.features, order, generator)
        if degrees is None:
            step = 2 if self.residual else 1
            hidden = [layer.out_degrees.cpu() for layer in linears[: len(linears) - 1 : step]]
            hidden = hidden[:1] * len(self.hidden) if self.residual else hidden
        else:
            hidden = self._hidden(degrees, generator, False)
        sizes = self._units(inputs, hidden)
        for layer, before, after in zip(linears, sizes, sizes[1:]):
            layer.set_degrees(before, after)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, D, outputs) of x (N, D) and context (N, K)."""
        name = type(self).__name__
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (N, {self.features})")
        if (context is not None) != (self.context is not None):
            raise ValueError(
                f"{name}: made with context={self.context_features}, called "
                f"{'with' if context is not None else 'without'} one"
            )
        if context is not None and tuple(context.shape) != (x.shape[0], self.context_features):
            raise ValueError(
                f"{name}: context has shape {tuple(context.shape)}, expected {(x.shape[0], self.context_features)}"
            )
        layers = list(self._masked())
        first, middle, last = layers[0], layers[1:-1], layers[-1] if len(layers) > 1 else None
        inner = self.activation if last is not None and not self.residual else "none"
        if context is None or self.context is None:
            h = first(x, inner)
        else:
            h = ACTIVATIONS[inner](first(x) + self.context(context))
        if self.residual:
            for before, after in zip(middle[::2], middle[1::2]):
                h = h + after(before(ACTIVATIONS[self.activation](h), self.activation))
        else:
            for layer in middle:
                h = layer(h, self.activation)
        if last is not None:
            h = last(h)
        y: Tensor = h.unflatten(1, (self.features, self.outputs))
        return y

    def add_steps(self, builder: FlowBuilder, sources: Rows, context: Rows | None) -> Rows:
        """The rows of the outputs, those of a feature one behind the other: the forward's steps in a program."""
        linears = [cast("MaskedLinear", linear) for linear in self.linears]
        if (context is None) != (self.context is None):
            raise LoweringError(f"{type(self).__name__} is called with another context than it was made for")
        for m in (*linears, *(() if self.context is None else (self.context,))):
            if type(m) not in (MaskedLinear, nn.Linear):
                raise LoweringError(f"{type(self).__name__}: {class_of(m).__name__} in the place of a MaskedLinear")
        added = None
        if self.context is not None and context is not None:
            added = builder.linear(self.context.weight, self.context.bias, context)
        last = len(linears) - 1
        h = sources
        for i, linear in enumerate(linears):
            inner = self.activation if 0 < last != i and not self.residual else "none"
            residual = None
            if self.residual and 0 < i < last:
                if i % 2:
                    before, h, inner = h, builder.point(self.activation, h), self.activation
                else:
                    residual = before
            h = builder.linear(
                linear.weight, linear.bias, h, mask=linear.live, activation=inner, added=added if i == 0 else residual
            )
        return h

    def layers(self, context: Tensor | None = None) -> list[Layer]:
        """The network as :class:`genfast.sampling.DegreeProgram` takes it, at a context (N, K).

        Raises:
            LoweringError: a layer is no :class:`MaskedLinear`, so that its weight does not say what a call of it gives.
        """
        if (context is None) != (self.context is None):
            called = "with" if self.context is None else "without"
            raise ValueError(f"MADENetwork: made with context={self.context_features}, called {called} one")
        linears = [cast("MaskedLinear", linear) for linear in self.linears]
        for i, linear in enumerate(linears):
            if type(linear) is not MaskedLinear and stands_for(linear, (MaskedLinear,)) is None:
                kind = class_of(linear)
                raise LoweringError(
                    f"MADENetwork: linears.{i} is a {kind.__module__}.{kind.__qualname__}, expected a MaskedLinear"
                )
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
                Layer(
                    linear.weight,
                    linear.bias,
                    linear.live,
                    before=before,
                    after=after,
                    residual=residual,
                    context=added,
                )
            )
        return found

    def extra_repr(self) -> str:
        text = f"{self.features}, {self.hidden}, outputs={self.outputs}, activation={self.activation!r}"
        text += f", context={self.context_features}" if self.context_features else ""
        return text + (", residual=True" if self.residual else "")
