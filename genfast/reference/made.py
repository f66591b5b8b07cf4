"""MADE (arXiv:1502.03509) in plain PyTorch: the yardstick of :mod:`genfast.nn`, with the same state_dict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masked_linear import masked_linear, staircase, staircase_mask

Order = Literal["natural", "reversed", "random"]
Degrees = Literal["even", "random"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": F.elu, "gelu": F.gelu, "leaky_relu": F.leaky_relu, "none": lambda x: x, "relu": F.relu, "sigmoid": torch.sigmoid,
    "silu": F.silu, "softplus": F.softplus, "tanh": torch.tanh,
}  # fmt: skip


def _integers(name: str, argument: str, value: Tensor | Sequence[int]) -> Tensor:
    found = torch.as_tensor(value)
    if found.dim() != 1 or found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ValueError(f"{name}: {argument} has dtype {found.dtype} and shape {tuple(found.shape)}, expected integers (n,)")
    return found.long()


class MaskedLinear(nn.Linear):
    """A linear layer that is live where an output's degree is at least (``strict``: above) an input's."""

    in_degrees: Tensor
    out_degrees: Tensor
    rows: Tensor
    columns: Tensor
    counts: Tensor

    def __init__(
        self,
        in_degrees: Tensor | Sequence[int],
        out_degrees: Tensor | Sequence[int],
        *,
        strict: bool = False,
        bias: bool = True,
    ) -> None:
        found = [_integers("MaskedLinear", n, d) for n, d in (("in_degrees", in_degrees), ("out_degrees", out_degrees))]
        super().__init__(len(found[0]), len(found[1]), bias)
        self.strict = strict
        self.register_buffer("in_degrees", found[0].clone())
        self.register_buffer("out_degrees", found[1].clone())
        self._sort()

    def _sort(self) -> None:
        """How the degrees sort; not in the state_dict, since it follows from them."""
        for name, value in zip(("rows", "columns", "counts"), staircase(self.in_degrees, self.out_degrees, self.strict)):
            self.register_buffer(name, value, persistent=False)

    def set_degrees(self, in_degrees: Tensor | Sequence[int], out_degrees: Tensor | Sequence[int]) -> None:
        """Another mask over the same weights, none of which is touched."""
        for name, value in (("in_degrees", in_degrees), ("out_degrees", out_degrees)):
            own, found = getattr(self, name), _integers("MaskedLinear", name, value)
            if found.shape != own.shape:
                raise ValueError(f"MaskedLinear: {name} has shape {tuple(found.shape)}, expected {tuple(own.shape)}")
            own.copy_(found)
        self._sort()

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._sort()

    @property
    def mask(self) -> Tensor:
        """Which weights are live, bool like ``weight``."""
        return staircase_mask(self.rows, self.columns, self.counts)

    def forward(self, x: Tensor, activation: str = "none") -> Tensor:
        y = masked_linear(x, self.weight, self.bias, self.rows, self.columns, self.counts, "none")
        return ACTIVATIONS[activation](y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}{', strict=True' if self.strict else ''}"


def input_degrees(features: int, order: Order | Tensor | Sequence[int] | None, generator: torch.Generator | None) -> Tensor:
    """The degree of each input, 1 to D: its place in the order."""
    if order is None or (isinstance(order, str) and order == "natural"):
        return torch.arange(1, features + 1)
    if isinstance(order, str):
        if order == "reversed":
            return torch.arange(features, 0, -1)
        if order == "random":
            return torch.randperm(features, generator=generator, device=_device(generator)).cpu() + 1
        raise ValueError(f"MADE: order={order!r}, expected None, 'natural', 'reversed', 'random' or {features} degrees")
    found = _integers("MADE", "order", order).cpu()
    if len(found) != features or not bool(((found >= 1) & (found <= features)).all()):
        raise ValueError(f"MADE: order={found.tolist()}, expected {features} degrees from 1 to {features}")
    return found


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
        found = _integers("MADE", "degrees", degrees).cpu()
        if len(found) != width or not bool(((found >= 0) & (found <= high)).all()):
            raise ValueError(f"MADE: degrees={found.tolist()}, expected {width} degrees from 0 to {high} for this layer")
        return found
    if degrees == "even":
        return low + torch.arange(width) * (high - low + 1) // max(1, width)
    if degrees == "random":
        drawn = torch.randint(low, high + 1, (width,), generator=generator, device=_device(generator)).cpu()
        if not low:
            drawn[drawn.argmin()] = 0  # a unit that no input reaches carries the context to the first output
        return drawn.sort().values if ordered else drawn
    raise ValueError(f"MADE: degrees={degrees!r}, expected 'even', 'random' or a sequence of degrees per hidden layer")


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


class MADE(nn.Module):
    """A masked autoencoder: output i is a function of the inputs of lower degree, and of the context.

    The degrees are the paper's (section 4): hidden ones lie in [1, D - 1], or in [0, D - 1] with a context, where units of
    degree 0 see the context alone; an output is joined to hidden units of degree strictly below its own.
    """

    linear: type[MaskedLinear] = MaskedLinear

    def __init__(
        self, features: int, hidden: Sequence[int] = (512, 512), *, outputs: int = 1, context: int = 0,
        order: Order | Tensor | Sequence[int] | None = None, degrees: Degrees | Sequence[Tensor | Sequence[int]] = "even",
        residual: bool = False, activation: str = "relu", generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = tuple(hidden)
        for name, value, least in (
            ("features", features, 1), ("outputs", outputs, 1), ("context", context, 0), *(("hidden", h, 1) for h in hidden),
        ):  # fmt: skip
            if not isinstance(value, int) or value < least:
                raise ValueError(f"MADE: {name}={value!r}, expected a whole number of at least {least}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"MADE: activation={activation!r}, expected one of {', '.join(map(repr, sorted(ACTIVATIONS)))}")
        if residual and len(set(hidden)) != 1:
            raise ValueError(f"MADE: hidden={hidden} with residual=True, expected one or more layers of equal width")
        self.features, self.hidden, self.outputs, self.context_features = features, hidden, outputs, context
        self.residual, self.activation = residual, activation
        sizes = self._units(input_degrees(features, order, generator), self._hidden(degrees, generator, True))
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
            raise ValueError(f"MADE: degrees has {len(degrees)} layers, expected one for each of hidden={self.hidden}")
        found: list[Tensor] = []
        for i, width in enumerate(self.hidden):
            if self.residual and found and isinstance(degrees, str):  # what is added must have seen the same
                found.append(found[0])
                continue
            found.append(
                hidden_degrees(width, low, high, degrees if isinstance(degrees, str) else degrees[i], generator, ordered)
            )
            low = int(found[-1].min())
        if self.residual and any(not torch.equal(f, found[0]) for f in found):
            raise ValueError("MADE: degrees of the layers differ with residual=True, expected the same in each")
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
        self, *, order: Order | Tensor | Sequence[int] | None = None,
        degrees: Degrees | Sequence[Tensor | Sequence[int]] | None = None, generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        """Another order or other hidden degrees over the same weights (section 4.2 and 4.3); None keeps what there is."""
        linears = self._masked()
        inputs = self.order.cpu() if order is None else input_degrees(self.features, order, generator)
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
                f"{name}: made with context={self.context_features}, called {'with' if context is not None else 'without'} one"
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

    def extra_repr(self) -> str:
        text = f"{self.features}, {self.hidden}, outputs={self.outputs}, activation={self.activation!r}"
        text += f", context={self.context_features}" if self.context_features else ""
        return text + (", residual=True" if self.residual else "")
