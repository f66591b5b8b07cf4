"""The flow models in plain PyTorch, as one would write them eagerly: the yardstick of :mod:`genfast.models`.

Each model takes its layers from the class attribute ``layers``. Here those are the plain modules below; genfast.models puts
genfast.nn in their place and inherits the rest, so the two have the same parameters under the same names, draw the same
initial values from the same seed, and load each other's state_dict.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)


# ---- what every flow model has ----


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


class DensityModel(nn.Module):
    """A density of real data (N, *shape); images in [-0.5, 0.5], as :func:`dequantize` makes them. ``config`` rebuilds it."""

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
                f"{name}: x has dtype {x.dtype}, expected floating point; genfast.models.dequantize makes it from 8-bit data"
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

    layers: Any
    base: Any

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data (N, *shape) to (z (N, D), logdet (N,))."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent (N, D) to (x (N, *shape), logdet (N,))."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (N,)."""
        z, logdet = self(x, context)
        density: Tensor = self.base.log_prob(z) + logdet
        return density

    @torch.no_grad()
    def sample(
        self, n: int, *, temperature: float = 1.0, generator: torch.Generator | None = None, context: Tensor | None = None,
        rows: slice | None = None,
    ) -> Tensor:  # fmt: skip
        """n samples (n, *shape); ``temperature`` multiplies the base distribution's deviation.

        With ``rows`` only those of the n, from the random numbers of all: what one of several processes draws.
        """
        if n < 0 or temperature < 0:
            raise ValueError(f"{type(self).__name__}.sample: n={n} and temperature={temperature}, expected at least 0")
        where = self.base.loc
        u = torch.empty((n, self.dim), dtype=torch.float64, device=where.device if generator is None else generator.device)
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


# ---- conditioner networks, shared with genfast.models ----


class MLP(nn.Module):
    """Linear layers with ReLU between; the last starts at zero, so a flow starts at the identity."""

    def __init__(self, inputs: int, outputs: int, hidden: int, depth: int, context: int = 0) -> None:
        super().__init__()
        sizes = [inputs, *[hidden] * depth, outputs]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.linears[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.linears[-1].bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        *hidden, last = self.linears
        for i, linear in enumerate(hidden):
            x = linear(x)
            if i == 0:
                x = _add_context(x, self.context, context)
            x = F.relu(x, inplace=True)
        result: Tensor = last(x)
        return result


class ConvNet(nn.Module):
    """Glow's conditioner: 3x3, ReLU, 1x1, ReLU, 3x3 that starts at zero (Glow, section 4)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, context: int = 0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, hidden, 1)
        self.conv3 = nn.Conv2d(hidden, outputs, 3, padding=1)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.conv3.weight)
        nn.init.zeros_(self.conv3.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = F.relu(_add_context(self.conv1(x), self.context, context), inplace=True)
        result: Tensor = self.conv3(F.relu(self.conv2(x), inplace=True))
        return result


class ResNet(nn.Module):
    """RealNVP's conditioner: a convolution, residual blocks, and a convolution that starts at zero (RealNVP, section 3.2)."""

    def __init__(self, inputs: int, outputs: int, hidden: int, blocks: int, context: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, hidden, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList((nn.Conv2d(hidden, hidden, 3, padding=1), nn.Conv2d(hidden, hidden, 3, padding=1)))
            for _ in range(blocks)
        )
        self.last = nn.Conv2d(hidden, outputs, 3, padding=1)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = _add_context(self.first(x), self.context, context)
        for block in self.blocks:
            first, second = block.children()
            x = x + second(F.relu(first(F.relu(x)), inplace=True))
        result: Tensor = self.last(F.relu(x))
        return result


def _add_context(x: Tensor, projection: nn.Linear | None, context: Tensor | None) -> Tensor:
    if (projection is None) != (context is None):
        had, needs = ("no context", "one") if context is None else ("a context", "none: build the model with context=K")
        raise ValueError(f"conditioner: called with {had}, expected {needs}")
    if projection is None:
        return x
    added: Tensor = projection(context)
    return x + added.reshape(*added.shape, *([1] * (x.dim() - 2)))


# ---- plain layers, with the signatures and the state_dicts of genfast.nn ----


class ActNorm(nn.Module):
    initialized: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))

    def _initialize(self, x: Tensor) -> None:
        with torch.no_grad():
            values = x.transpose(0, 1).flatten(1).double()
            deviation = values.std(1, unbiased=False).clamp_min(self.eps)
            self.log_scale.copy_(-deviation.log())
            self.bias.copy_(-values.mean(1) / deviation)
            self.initialized.fill_(True)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.training and not self.initialized:
            self._initialize(x)
        s, b = (v.reshape(1, -1, *([1] * (x.dim() - 2))) for v in (self.log_scale, self.bias))
        return x * s.exp() + b, (self.log_scale.sum() * math.prod(x.shape[2:])).expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, b = (v.reshape(1, -1, *([1] * (z.dim() - 2))) for v in (self.log_scale, self.bias))
        return (z - b) * (-s).exp(), (-self.log_scale.sum() * math.prod(z.shape[2:])).expand(z.shape[0])


class InvertibleConv1x1(nn.Module):
    perm: Tensor
    sign_s: Tensor

    def __init__(self, channels: int, *, plu: bool = True) -> None:
        super().__init__()
        self.plu = plu
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        if not plu:
            self.weight = nn.Parameter(rotation)
            return
        p, lower, upper = torch.linalg.lu(rotation)
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_s = nn.Parameter(upper.diagonal().abs().log())
        self.register_buffer("perm", p.argmax(1))
        self.register_buffer("sign_s", upper.diagonal().sign())

    def _matrix(self) -> tuple[Tensor, Tensor]:
        if not self.plu:
            return self.weight, torch.linalg.slogdet(self.weight)[1]
        eye = torch.eye(len(self.perm), dtype=self.log_s.dtype, device=self.log_s.device)
        lower = self.lower.tril(-1) + eye
        upper = self.upper.triu(1) + torch.diag(self.sign_s * self.log_s.exp())
        return (lower @ upper)[self.perm], self.log_s.sum()

    def _apply_matrix(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.dim() == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight[:, :, None, None])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, log_det = self._matrix()
        return self._apply_matrix(x, weight), (log_det * math.prod(x.shape[2:])).expand(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weight, log_det = self._matrix()
        inverse = torch.linalg.inv(weight.double()).to(weight.dtype)
        return self._apply_matrix(z, inverse), (-log_det * math.prod(z.shape[2:])).expand(z.shape[0])


class Squeeze(nn.Module):
    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), z.new_zeros(z.shape[0])


class AffineCoupling(nn.Module):
    mask: Tensor | None

    def __init__(
        self, conditioner: nn.Module, *, scale: str = "exp", mask: Tensor | None = None, width: int | None = None,
        transform: str = "first", alpha: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conditioner = conditioner
        self.scale, self.width, self.transform = scale, width, transform
        self.register_buffer("mask", mask)
        self.alpha = nn.Parameter(torch.ones(width or 1)) if alpha == "learn" else None

    def _parameters_of(self, seen: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """log s and t."""
        params: Tensor = self.conditioner(seen) if context is None else self.conditioner(seen, context)
        if self.scale == "additive":
            return torch.zeros_like(params), params
        r, t = params.chunk(2, 1)
        if self.scale == "sigmoid":
            return F.logsigmoid(r + 2), t
        if self.scale == "tanh":
            r = torch.tanh(r)
            return (r if self.alpha is None else r * self.alpha.reshape(1, -1, *([1] * (r.dim() - 2)))), t
        if self.scale == "softclamp":
            return r / (1 + r.abs() / math.log(1000)), t
        return r, t

    def _run(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        if self.mask is not None:
            log_s, t = self._parameters_of(torch.where(self.mask, x, 0), context)
            log_s, t = log_s * ~self.mask, t * ~self.mask
            y = (x - t) * torch.exp(-log_s) if inverse else x * torch.exp(log_s) + t
        else:
            width = x.shape[1] // 2 if self.width is None else self.width
            first = self.transform == "first"
            sizes = (width, x.shape[1] - width) if first else (x.shape[1] - width, width)
            halves = x.split(sizes, 1)
            x_a, x_b = halves if first else halves[::-1]
            log_s, t = self._parameters_of(x_b, context)
            y_a = (x_a - t) * torch.exp(-log_s) if inverse else x_a * torch.exp(log_s) + t
            y = torch.cat((y_a, x_b) if first else (x_b, y_a), 1)
        total = log_s.flatten(1).sum(1)
        return y, -total if inverse else total

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(x, context, False)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(z, context, True)


class FlowSequential(nn.Module):
    def __init__(self, *bijections: nn.Module) -> None:
        super().__init__()
        for i, b in enumerate(bijections):
            self.add_module(str(i), b)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for module in self.children():
            x, logdet = module(x, context)
            total = total + logdet
        return x, total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = z.new_zeros(z.shape[0])
        for module in reversed(list(self.children())):
            z, logdet = module.inverse(z, context)  # type: ignore[operator]
            total = total + logdet
        return z, total


class GlowStep(nn.Module):
    def __init__(self, channels: int, conditioner: nn.Module, *, plu: bool = True, scale: str = "sigmoid") -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.conv = InvertibleConv1x1(channels, plu=plu)
        self.coupling = AffineCoupling(conditioner, scale=scale, width=channels // 2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, a = self.actnorm(x)
        x, b = self.conv(x)
        x, c = self.coupling(x, context)
        return x, a + b + c

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, c = self.coupling.inverse(z, context)
        z, b = self.conv.inverse(z)
        z, a = self.actnorm.inverse(z)
        return z, a + b + c


PLAIN = SimpleNamespace(
    ActNorm=ActNorm, AffineCoupling=AffineCoupling, FlowSequential=FlowSequential, GlowStep=GlowStep,
    InvertibleConv1x1=InvertibleConv1x1, ReversibleSequential=FlowSequential, Squeeze=Squeeze,
)  # fmt: skip


# ---- the models ----


class NICE(FlowModel):
    """Additive couplings on vectors and a diagonal scaling (arXiv:1410.8516).

    Args:
        dim: D; data are (N, D).
        hidden, depth: of the conditioner, an MLP.
        couplings: how many, transforming the two halves in turn.
        prior: "logistic" (the paper's) or "gaussian".
        context: size of a conditioning vector; 0 for none.
    """

    layers: Any = PLAIN

    def __init__(
        self, dim: int, *, hidden: int = 1000, depth: int = 5, couplings: int = 4,
        prior: Literal["logistic", "gaussian"] = "logistic", context: int = 0,
    ) -> None:  # fmt: skip
        super().__init__((dim,))
        if dim < 2:
            raise ValueError(f"NICE: dim={dim}, expected at least 2")
        if prior not in ("logistic", "gaussian"):
            raise ValueError(f"NICE: prior={prior!r}, expected 'logistic' or 'gaussian'")
        self.config = dict(dim=dim, hidden=hidden, depth=depth, couplings=couplings, prior=prior, context=context)
        steps = []
        for i in range(couplings):
            transform, width = ("first", dim // 2) if i % 2 == 0 else ("last", dim - dim // 2)
            network = MLP(dim - width, width, hidden, depth, context)
            steps.append(self.layers.AffineCoupling(network, scale="additive", width=width, transform=transform))
        self.flow = self.layers.FlowSequential(*steps)
        self.log_scale = nn.Parameter(torch.zeros(dim))
        self.base = Logistic(dim) if prior == "logistic" else DiagonalGaussian(dim, trainable=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h, logdet = self.flow(self.check(x), context)
        return h * self.log_scale.exp(), logdet + self.log_scale.sum()

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, logdet = self.flow.inverse(z * (-self.log_scale).exp(), context)
        return x, logdet - self.log_scale.sum()


class RealNVP(FlowModel):
    """Affine couplings with a learned tanh scale (arXiv:1605.08803), on vectors or on images.

    Vectors: couplings that transform the two halves in turn, activation norms between. Images: per level three
    checkerboard couplings, squeeze, three channel couplings, and half of the channels factored out; four checkerboard
    couplings at the end (section 3.6). Activation norm stands in for the paper's batch norm, so that a sample's density
    does not depend on its batch.

    Args:
        shape: D, or (C, H, W) with H and W multiples of 2^levels.
        couplings: on vectors, how many.
        levels: on images, how often half of the channels are factored out.
        hidden, depth: of the conditioner: an MLP, or a residual network with ``depth`` blocks.
        context: size of a conditioning vector; 0 for none.
    """

    layers: Any = PLAIN

    def __init__(
        self, shape: int | tuple[int, ...], *, couplings: int = 8, levels: int = 1, hidden: int = 64, depth: int = 2,
        context: int = 0,
    ) -> None:  # fmt: skip
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        super().__init__(shape)
        if len(shape) not in (1, 3) or (len(shape) == 1 and shape[0] < 2):
            raise ValueError(f"RealNVP: shape={shape}, expected (D,) with D >= 2, or (C, H, W)")
        self.config = dict(shape=list(shape), couplings=couplings, levels=levels, hidden=hidden, depth=depth, context=context)
        self._hidden, self._depth, self._context = hidden, depth, context
        self.stages = nn.ModuleList()
        if len(shape) == 1:
            self.stages.append(self._vectors(shape[0], couplings))
        else:
            channels, height, width = shape
            if levels < 0 or height % 2**levels or width % 2**levels:
                raise ValueError(f"RealNVP: shape={shape} with levels={levels}, expected H and W multiples of 2^levels")
            for _ in range(levels):
                checkers = self._checkerboards(channels, height, width, 3)
                channels, height, width = 4 * channels, height // 2, width // 2
                self.stages.append(
                    self.layers.FlowSequential(*checkers, self.layers.Squeeze(), *self._channelwise(channels, 3))
                )
                channels //= 2
            self.stages.append(self.layers.FlowSequential(*self._checkerboards(channels, height, width, 4)))
        self.base = DiagonalGaussian(self.dim, trainable=False)

    def _vectors(self, dim: int, couplings: int) -> nn.Module:
        steps = []
        for i in range(couplings):
            transform, width = ("first", dim // 2) if i % 2 == 0 else ("last", dim - dim // 2)
            network = MLP(dim - width, 2 * width, self._hidden, self._depth, self._context)
            steps.append(self.layers.ActNorm(dim))
            steps.append(self.layers.AffineCoupling(network, scale="tanh", alpha="learn", width=width, transform=transform))
        flow: nn.Module = self.layers.FlowSequential(*steps)
        return flow

    def _checkerboards(self, channels: int, height: int, width: int, count: int) -> list[nn.Module]:
        board = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
        steps = []
        for i in range(count):
            network = ResNet(channels, 2 * channels, self._hidden, self._depth, self._context)
            mask = (board if i % 2 == 0 else ~board)[None].clone()  # its own memory: checkpoints refuse shared tensors
            steps.append(self.layers.ActNorm(channels))
            steps.append(self.layers.AffineCoupling(network, scale="tanh", alpha="learn", width=channels, mask=mask))
        return steps

    def _channelwise(self, channels: int, count: int) -> list[nn.Module]:
        steps = []
        for i in range(count):
            width = channels // 2
            network = ResNet(channels - width, 2 * width, self._hidden, self._depth, self._context)
            steps.append(self.layers.ActNorm(channels))
            steps.append(
                self.layers.AffineCoupling(
                    network, scale="tanh", alpha="learn", width=width, transform="first" if i % 2 == 0 else "last"
                )
            )
        return steps

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, parts, logdets = self.check(x), [], []
        for i, stage in enumerate(self.stages):
            x, logdet = stage(x, context)
            logdets.append(logdet)
            if i < len(self.stages) - 1:
                x, out = x.chunk(2, 1)
                parts.append(out.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), torch.stack(logdets).sum(0)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = _latent_parts(z, self.shape, len(self.stages) - 1)
        x, logdets = parts.pop(), []
        for stage in reversed(self.stages):
            x, logdet = stage.inverse(x, context)  # type: ignore[operator]
            logdets.append(logdet)
            if parts:
                x = torch.cat((x, parts.pop()), 1)
        return x, torch.stack(logdets).sum(0)


def _latent_parts(z: Tensor, shape: tuple[int, ...], levels: int) -> list[Tensor]:
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


class Glow(FlowModel):
    """Glow (arXiv:1807.03039): per level squeeze, K steps of (activation norm, 1x1 convolution, coupling), split.

    Args:
        shape: (C, H, W), H and W multiples of 2^levels.
        levels, steps, hidden: L, K and the width of the conditioners.
        plu: PLU parametrisation of the 1x1 convolutions.
        scale: the couplings' scale map.
        context: size of a conditioning vector; 0 for none.
        reversible: trains in memory that does not grow with ``steps`` (genfast.nn.ReversibleSequential).
        channels_last: computes in channels_last, where CPU convolutions are faster; the numbers are the same.
    """

    layers: Any = PLAIN

    def __init__(
        self, shape: tuple[int, ...] = (3, 32, 32), *, levels: int = 3, steps: int = 8, hidden: int = 64, plu: bool = True,
        scale: str = "sigmoid", context: int = 0, reversible: bool = False, channels_last: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(tuple(shape))
        if len(self.shape) != 3 or levels < 1 or self.shape[1] % 2**levels or self.shape[2] % 2**levels:
            raise ValueError(
                f"Glow: shape={self.shape} with levels={levels}, expected (C, H, W) with H and W multiples of 2^levels"
            )
        self.config = dict(
            shape=list(self.shape), levels=levels, steps=steps, hidden=hidden, plu=plu, scale=scale, context=context,
            reversible=reversible, channels_last=channels_last,
        )  # fmt: skip
        self.squeeze = self.layers.Squeeze()
        self.levels = nn.ModuleList()
        chain = self.layers.ReversibleSequential if reversible else self.layers.FlowSequential
        channels, outputs = self.shape[0], 1 if scale == "additive" else 2
        for _ in range(levels):
            channels *= 4
            half = channels // 2
            nets = [ConvNet(channels - half, outputs * half, hidden, context) for _ in range(steps)]
            self.levels.append(chain(*(self.layers.GlowStep(channels, net, plu=plu, scale=scale) for net in nets)))
            channels = half
        self.base = DiagonalGaussian(self.dim)
        if channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _ordered(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if self.config["channels_last"] else x

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, parts, logdets = self._ordered(self.check(x)), [], []
        for i, level in enumerate(self.levels):
            x, logdet = level(self.squeeze(x)[0], context)
            logdets.append(logdet)
            if i < len(self.levels) - 1:
                x, out = x.chunk(2, 1)
                parts.append(out.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), torch.stack(logdets).sum(0)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        *parts, x = self._parts(z)
        logdets = []
        for i, level in enumerate(reversed(self.levels)):
            if i:
                x = torch.cat((x, parts.pop()), 1)
            x, logdet = level.inverse(self._ordered(x), context)  # type: ignore[operator]
            x = self.squeeze.inverse(x)[0]
            logdets.append(logdet)
        return x, torch.stack(logdets).sum(0)

    def _parts(self, z: Tensor) -> list[Tensor]:
        """The factored-out tensors level by level, and the last level's whole."""
        parts = _latent_parts(z, self.shape, len(self.levels))
        return [*parts[:-2], torch.cat(parts[-2:], 1)]


class LinearFlow(FlowModel):
    """z = W (s x + b) on vectors, W in PLU form: a Gaussian with full covariance, fitted by gradient.

    Args:
        dim: D; data are (N, D).
        plu: PLU or one full matrix.
    """

    layers: Any = PLAIN

    def __init__(self, dim: int, *, plu: bool = True) -> None:
        super().__init__((dim,))
        self.config = dict(dim=dim, plu=plu)
        self.flow = self.layers.FlowSequential(self.layers.ActNorm(dim), self.layers.InvertibleConv1x1(dim, plu=plu))
        self.base = DiagonalGaussian(dim, trainable=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.flow(self.check(x))
        return result

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.flow.inverse(z)
        return result
