"""What density models of real data have in common, and flows among them: bases, likelihood, samples."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import nn as gnn
from .._calls import changes_nothing
from ..nn.flow_lowering import WholeFlow
from ..programs import FlowBuilder, LoweringError

LOG_2PI = math.log(2 * math.pi)


def dequantize(x: Tensor, bins: int = 256, *, generator: torch.Generator | None = None) -> Tensor:
    """Uniform dequantisation: whole numbers in [0, bins) to (x + u) / bins - 0.5, u ~ U[0, 1), in [-0.5, 0.5)."""
    x = x if x.is_floating_point() else x.float()
    noise = torch.empty(x.shape, dtype=x.dtype, device=x.device if generator is None else generator.device)
    return (x + noise.uniform_(generator=generator).to(x.device)) / bins - 0.5


class DiagonalGaussian(nn.Module):
    """N(loc, e^(2 log_scale)) over (N, D)."""

    def __init__(self, dim: int, trainable: bool = True) -> None:
        super().__init__()
        for name in ("loc", "log_scale"):
            if trainable:
                self.register_parameter(name, nn.Parameter(torch.zeros(dim)))
            else:
                self.register_buffer(name, torch.zeros(dim))

    loc: Tensor
    log_scale: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        normal = (z - self.loc) * (-self.log_scale).exp()
        return -0.5 * normal.square().sum(1) - self.log_scale.sum() - 0.5 * LOG_2PI * z.shape[1]

    def scaled(self, u: Tensor, temperature: float) -> Tensor:
        """A sample from uniform numbers ``u`` in (0, 1)."""
        return self.loc + temperature * self.log_scale.exp() * math.sqrt(2) * torch.erfinv(2 * u - 1)


class Logistic(nn.Module):
    """The standard logistic distribution (NICE, section 3.4)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(dim))

    loc: Tensor

    def log_prob(self, z: Tensor) -> Tensor:
        return -(F.softplus(z) + F.softplus(-z)).sum(1)

    def scaled(self, u: Tensor, temperature: float) -> Tensor:
        return self.loc + temperature * torch.logit(u)


def lowers_base(base: Any) -> bool:
    """Whether :func:`lower_base` knows this density."""
    return type(base) in (DiagonalGaussian, Logistic)


def lower_base(base: DiagonalGaussian | Logistic, builder: FlowBuilder) -> None:
    """Adds the base's log density to a program, whose outputs stay the latents."""
    latent = builder.features
    if isinstance(base, DiagonalGaussian):
        fixed = not isinstance(base.loc, nn.Parameter) and not bool(base.loc.any()) and not bool(base.log_scale.any())
        if not fixed:
            builder.features = builder.scale(builder.features, base.log_scale, base.loc, mode="inverse")
    builder.base("normal" if isinstance(base, DiagonalGaussian) else "logistic")
    builder.features = latent


class DensityModel(nn.Module):
    """A density of real data (N, *shape); images in [-0.5, 0.5], as :func:`dequantize` makes them. ``config`` rebuilds
    it."""

    config: dict[str, Any]

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.dim = math.prod(shape)

    def check(self, x: Tensor) -> Tensor:
        """``x``, or an error that says what was expected of it."""
        name = type(self).__name__
        if not x.is_floating_point():
            raise TypeError(
                f"{name}: x has dtype {x.dtype}, expected floating point; genfast.models.dequantize makes it from "
                "8-bit data"
            )
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (N, {', '.join(map(str, self.shape))})")
        return x

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (N,)."""
        raise NotImplementedError

    def bits_per_dim(
        self, x: Tensor, *, bins: int = 256, context: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Bits per dimension (N,) of whole numbers x in [0, bins), dequantised with uniform noise: an upper bound."""
        log_prob = self.log_prob(dequantize(x, bins, generator=generator), context)
        return (math.log(bins) - log_prob / self.dim) / math.log(2)


class FlowModel(DensityModel):
    """A flow with its base density. ``forward`` gives a flat latent (N, D) whatever the shape of the data."""

    layers: Any = gnn  # genfast.nn, or its plain twins: see :func:`genfast.models.plain`
    base: Any

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (N, *shape) to (z (N, D), logdet (N,))."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (N, D) to (x (N, *shape), logdet (N,))."""
        raise NotImplementedError

    def add_steps(self, builder: FlowBuilder) -> None:
        """Adds the steps from data to latent to a program.

        Raises:
            LoweringError: the flow, or a layer of it, has none.
        """
        raise LoweringError(f"{type(self).__name__} has no flow program")

    def program_modules(self) -> list[nn.Module]:
        """The modules that :meth:`add_steps` reads."""
        flow: nn.Module = self.flow  # type: ignore[assignment]
        return [flow]

    def flow_program(self, x: Tensor, context: Tensor | None = None) -> str:
        """Why ``log_prob(x, context)`` runs layer by layer; empty where the whole flow runs as one program."""
        return "" if self._whole(self.check(x), context) is not None else self._whole_flow.reason

    def _whole(self, x: Tensor, context: Tensor | None) -> Tensor | None:
        """log p(x) of one program, or None where the layers are called one by one."""
        if torch.compiler.is_compiling():
            return None
        whole = self._whole_flow
        owner = next(c for c in type(self).__mro__ if "add_steps" in vars(c))
        if owner is FlowModel or self.layers is not gnn:
            whole.reason = f"{type(self).__name__} has no flow program"
            return None
        changed = not changes_nothing(type(self), owner) and type(self) is not owner
        if changed and not type(self).__module__.startswith(f"{__package__}."):
            whole.reason = f"{type(self).__qualname__} overrides methods of {owner.__qualname__}, but not add_steps()"
            return None
        if self._forward_hooks or self._forward_pre_hooks or "forward" in self.__dict__:
            whole.reason = f"{type(self).__name__} has hooks or a forward of its own"
            return None
        known = lowers_base(self.base)
        modules = self.program_modules() + ([self.base] if known else [])
        found = whole(modules, self._lower_with_base, self._by_layers, x, context)
        if found is None:
            return None
        z, total = found
        return total if known else self._base_density(z) + total

    @functools.cached_property
    def _whole_flow(self) -> WholeFlow:
        return WholeFlow()

    def _lower_with_base(self, builder: FlowBuilder) -> None:
        self.add_steps(builder)
        if lowers_base(self.base):
            lower_base(self.base, builder)

    def _by_layers(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z, logdet = self.forward(x, context)
        return z, logdet + self._base_density(z) if lowers_base(self.base) else logdet

    def _base_density(self, z: Tensor) -> Tensor:
        density: Tensor = self.base.log_prob(z)
        return density

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (N,)."""
        whole = self._whole(self.check(x), context)
        if whole is not None:
            return whole
        z, logdet = self(x, context)
        density: Tensor = self._base_density(z) + logdet
        return density

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        context: Tensor | None = None,
        rows: slice | None = None,
    ) -> Tensor:
        """n samples (n, *shape); ``temperature`` multiplies the base distribution's deviation.

        With ``rows`` only those of the n, from the random numbers of all: what one of several processes draws.
        """
        if n < 0 or temperature < 0:
            raise ValueError(f"{type(self).__name__}.sample: n={n} and temperature={temperature}, expected at least 0")
        where = self.base.loc
        u = torch.empty(
            (n, self.dim), dtype=torch.float64, device=where.device if generator is None else generator.device
        )
        u.uniform_(generator=generator).clamp_(1e-12, 1 - 1e-12)
        if rows is not None:
            u, context = u[rows], None if context is None else context[rows]
        x: Tensor = self.inverse(self.base.scaled(u.to(where.device), temperature).to(where.dtype), context)[0]
        return x

    @torch.no_grad()
    def interpolate(
        self, x_from: Tensor, x_to: Tensor, steps: int, *, spherical: bool = False, context: Tensor | None = None
    ) -> Tensor:
        """``steps`` data points (steps, N, *shape) on the latent path between two batches, ends included."""
        if steps < 2:
            raise ValueError(f"{type(self).__name__}.interpolate: steps={steps}, expected at least 2")
        a, b = self(x_from, context)[0], self(x_to, context)[0]
        t = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).reshape(-1, 1, 1)
        if spherical:
            cosine = F.cosine_similarity(a, b, dim=1).clamp(-1 + 1e-6, 1 - 1e-6)
            angle = cosine.acos().reshape(1, -1, 1)
            path = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
        else:
            path = (1 - t) * a + t * b
        return torch.stack([self.inverse(z, context)[0] for z in path])


def latent_parts(z: Tensor, shape: tuple[int, ...], levels: int) -> list[Tensor]:
    """The flat latent as the tensors that were factored out, and the last level's."""
    if len(shape) == 1:
        return [z]
    (channels, height, width), shapes = shape, []
    for _ in range(levels):
        channels, height, width = 2 * channels, height // 2, width // 2
        shapes.append((channels, height, width))
    shapes.append((channels, height, width))
    flat = z.split([math.prod(s) for s in shapes], 1)
    return [part.reshape(-1, *s) for part, s in zip(flat, shapes)]
