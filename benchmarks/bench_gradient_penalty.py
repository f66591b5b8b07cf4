"""Gradient penalties with their gradients, and whole critic steps, against double backward in each of its plain
forms."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work

WEIGHT = 10.0


class Where(nn.Module):
    """Leaky ReLU by torch.where, whose double backward does not walk the first graph again with gradients of zero."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, self.slope * x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(2, (self.heads, -1)).transpose(1, 2) for p in self.qkv(x).chunk(3, 2))
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def dcgan(activation: Callable[[], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(i, o, 4, 2, 1), activation()]
    return nn.Sequential(*layers, nn.Conv2d(256, 1, 4))


def wide_dcgan(activation: Callable[[], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 64), (64, 128), (128, 256), (256, 512)):
        layers += [nn.Conv2d(i, o, 4, 2, 1), activation()]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4))


def mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for i in (2, 512, 512):
        layers += [nn.Linear(i, 512), activation()]
    return nn.Sequential(*layers, nn.Linear(512, 1))


def normalised(_: Any = None) -> nn.Module:
    """Layer norm over channels and positions, as WGAN-GP advises, and SiLU."""
    layers: list[nn.Module] = []
    for i, o, size in ((3, 64, 16), (64, 128, 8), (128, 256, 4)):
        layers += [nn.Conv2d(i, o, 4, 2, 1), nn.LayerNorm((o, size, size)), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(256, 1, 4))


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def attention(_: Any = None) -> nn.Module:
    layers = [
        nn.Linear(48, 128),
        Attention(128, 4),
        nn.LayerNorm(128),
        nn.Linear(128, 256),
        nn.GELU(),
        nn.Linear(256, 128),
    ]
    return nn.Sequential(*layers, Attention(128, 4), Pooled(), nn.Linear(128, 1))


def norms_of(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)


def eager(critic: nn.Module, at: Tensor) -> Tensor:
    """What one writes."""
    at = at.detach().requires_grad_()
    (g,) = torch.autograd.grad(critic(at).sum(), at, create_graph=True)
    return WEIGHT * (norms_of(g) - 1).square().mean()


def functional(critic: nn.Module, at: Tensor) -> Tensor:
    """The form that torch.compile takes: torch.autograd.grad does not compile to second order."""
    g = grad(lambda x: critic(x).sum())(at)
    return WEIGHT * (norms_of(g) - 1).square().mean()


def tangent(critic: nn.Module, at: Tensor) -> Tensor:
    """Forward over reverse: the gradient in the parameters is that of the tangent of f along v = dP/dg, held fixed.

    Right where the tangent is: torch.func.jvp gives wrong ones, in silence, through some normalisations.
    """
    with torch.no_grad():
        g = grad(lambda x: critic(x).sum())(at)
        norm = norms_of(g)
        value = WEIGHT * (norm - 1).square().mean()
        v = g * (2 * WEIGHT / len(g) * (1 - 1 / norm)).reshape(-1, *(1,) * (g.dim() - 1))
    along = jvp(lambda x: critic(x).sum(), (at,), (v,))[1]
    return value + along - along.detach()


def wgan_eager(critic: nn.Module, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    return critic(fake).mean() - critic(real).mean() + eager(critic, _between(real, fake, epsilon))


def wgan_functional(critic: nn.Module, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    return critic(fake).mean() - critic(real).mean() + functional(critic, _between(real, fake, epsilon))


def r1_eager(critic: nn.Module, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    real = real.detach().requires_grad_()
    r = critic(real)
    (g,) = torch.autograd.grad(r.sum(), real, create_graph=True)
    return F.softplus(-r).mean() + F.softplus(critic(fake)).mean() + WEIGHT / 2 * g.square().flatten(1).sum(1).mean()


def r1_functional(critic: nn.Module, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        r = critic(x)
        return r.sum(), r

    g, r = grad(total, has_aux=True)(real)
    return F.softplus(-r).mean() + F.softplus(critic(fake)).mean() + WEIGHT / 2 * g.square().flatten(1).sum(1).mean()


def wgan_ours(critic: nn.Module, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    loss: Tensor = genfast.ops.critic_step(critic, real, fake, weight=WEIGHT, epsilon=epsilon).loss
    return loss


def r1_ours(critic: nn.Module, real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    loss: Tensor = genfast.ops.critic_step(critic, real, fake, loss="minimax", penalty="r1", weight=WEIGHT).loss
    return loss


def _between(real: Tensor, fake: Tensor, epsilon: Tensor) -> Tensor:
    e = epsilon.view(-1, *(1,) * (real.dim() - 1))
    return e * real + (1 - e) * fake


def _data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    real, fake = torch.randn(2, *shape, device=_ceilings.DEVICE)
    return real, fake, torch.rand(shape[0], device=_ceilings.DEVICE)


def _critic(build: Callable[[Any], nn.Module], activation: Any) -> nn.Module:
    torch.manual_seed(0)
    return build(activation).to(_ceilings.DEVICE)


def _units(critic: nn.Module, x: Tensor) -> Work:
    """The library calls that the penalty of a piecewise-linear critic cannot do without: for each product forward,
    gradient to its input, tangent forward (not for the last) and gradient to its weight."""
    calls: list[Callable[[], Any]] = []
    layers = [m for m in critic if isinstance(m, (nn.Conv2d, nn.Linear))]  # type: ignore[attr-defined]
    with torch.no_grad():
        for m in critic:  # type: ignore[attr-defined]
            y = m(x)
            if isinstance(m, nn.Conv2d):
                options = (m.stride, m.padding, m.dilation, False, [0, 0], 1)
                backward = functools.partial(
                    torch.ops.aten.convolution_backward, torch.randn_like(y), x, m.weight, None, *options
                )
                convolve = functools.partial(torch.ops.aten.convolution, x, m.weight)
                calls += [
                    functools.partial(convolve, m.bias, *options),
                    functools.partial(backward, [True, False, False]),
                ]
                calls.append(functools.partial(backward, [False, True, False]))
                calls += [functools.partial(convolve, None, *options)] * (m is not layers[-1])
            elif isinstance(m, nn.Linear):
                b = torch.randn_like(y)
                calls += [functools.partial(F.linear, x, m.weight, m.bias), functools.partial(torch.mm, b, m.weight)]
                calls.append(functools.partial(torch.mm, b.t(), x))
                calls += [functools.partial(F.linear, x, m.weight)] * (m is not layers[-1])
            x = y

    @torch.no_grad()
    def run() -> None:
        for call in calls:
            call()

    return run


def _penalty(
    name: str,
    build: Callable[[Any], nn.Module],
    shape: tuple[int, ...],
    activation: Any = None,
    where: Any = None,
    *,
    floor: bool = False,
    compiled: bool = True,
    forward: bool = False,
    quick: bool = False,
    notes: dict[str, str] | None = None,
    dtype: str = "float32",
    priority: int = 1,
) -> Case:
    """The value and the gradient of every parameter; in bfloat16 by autocast."""

    def work(function: Callable[[nn.Module, Tensor], Tensor], activation: Any, math: bool = True) -> Work:
        critic, (real, fake, epsilon) = _critic(build, activation), _data(shape)
        at, parameters = _between(real, fake, epsilon), list(critic.parameters())

        def run() -> list[Tensor | None]:
            with sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext():
                with torch.autocast(_ceilings.DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
                    value = function(critic, at)
                found = torch.autograd.grad(value, parameters, allow_unused=True)
            return [value, *(None if p.dim() == 1 else g for p, g in zip(parameters, found))]

        return run

    def ours(critic: nn.Module, at: Tensor) -> Tensor:
        value: Tensor = genfast.ops.gradient_penalty(critic, at, at, weight=WEIGHT)  # between equal ends
        return value

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: work(eager, activation)}
    if compiled:
        providers["compile"] = lambda: work(torch.compile(functional, dynamic=False), activation)
        if where is not None:
            providers["compile where"] = lambda: work(torch.compile(functional, dynamic=False), where)
    if forward:
        providers["compile jvp"] = lambda: work(torch.compile(tangent, dynamic=False), activation)
    if where is not None:
        providers["trick"] = lambda: work(eager, where)
    if forward:
        providers["trick jvp"] = lambda: work(tangent, activation)
    if floor:
        providers["floor"] = lambda: _units(_critic(build, activation), _data(shape)[0])
    providers["genfast"] = lambda: work(ours, activation, math=False)
    label = f"gradient_penalty {name}{'' if dtype == 'float32' else f', {dtype}'}"
    return Case(label, providers, quick=quick, notes=notes or {}, dtype=dtype, priority=priority)


def _step(
    name: str,
    build: Callable[[Any], nn.Module],
    shape: tuple[int, ...],
    activation: Any,
    where: Any,
    *,
    r1: bool,
    compiled: bool = True,
    quick: bool = False,
) -> Case:
    """The critic's whole step: real, fake, penalty, backward, Adam."""
    plain, functions, own = (r1_eager, r1_functional, r1_ours) if r1 else (wgan_eager, wgan_functional, wgan_ours)

    def work(function: Callable[..., Tensor], activation: Any) -> Work:
        critic, data = _critic(build, activation), _data(shape)
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9), fused=True)

        def run() -> list[Tensor]:
            optimizer.zero_grad()
            loss = function(critic, *data)
            loss.backward()
            optimizer.step()
            return [loss.detach()]

        run.gradient_bytes = sum(p.nbytes for p in critic.parameters())  # type: ignore[attr-defined]
        return run

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: work(plain, activation)}
    if compiled:
        providers["compile"] = lambda: work(torch.compile(functions, dynamic=False), activation)
        providers["compile where"] = lambda: work(torch.compile(functions, dynamic=False), where)
    providers["trick"] = lambda: work(plain, where)
    providers["genfast"] = lambda: work(own, activation)
    if compiled:
        providers["genfast compiled"] = lambda: work(torch.compile(own, dynamic=False), activation)
    kind = "r1" if r1 else "wgan-gp"
    return Case(f"critic_step {kind}, {name}", providers, quick=quick)


LEAKY, LEAKY_WHERE = functools.partial(nn.LeakyReLU, 0.2), functools.partial(Where, 0.2)
RELU_WHERE = functools.partial(Where, 0.0)
DCGAN, MLP = (dcgan, (32, 3, 32, 32), LEAKY, LEAKY_WHERE), (mlp, (256, 2), nn.ReLU, RELU_WHERE)
MATH = {"reference": "attention in PyTorch's plain form: its fused one has no double backward"}

CASES = [
    _penalty("dcgan 3-64-128-256-1, 32x3x32x32", *DCGAN, floor=True, compiled=False, quick=True),
    _penalty("mlp 2-512-512-512-1, batch 256", *MLP, floor=True, compiled=False, quick=True),
    _penalty("dcgan 3-64-128-256-1, 32x3x32x32, and compiled", *DCGAN, floor=True, forward=True),
    _penalty("mlp 2-512-512-512-1, batch 256, and compiled", *MLP, floor=True),
    _penalty("convolutions, layer norm, silu, 16x3x32x32", normalised, (16, 3, 32, 32)),
    _penalty("attention 4 heads of 32, 256 tokens, batch 8", attention, (8, 256, 48), notes=MATH),
    _step("dcgan 3-64-128-256-1, 32x3x32x32", *DCGAN, r1=False),
    _step("mlp 2-512-512-512-1, batch 256", *MLP, r1=False),
    _step("dcgan 3-64-128-256-1, 32x3x32x32", *DCGAN, r1=True),
]

if _ceilings.DEVICE == "cuda":
    WIDE = (wide_dcgan, (64, 3, 64, 64), LEAKY, LEAKY_WHERE)
    CASES += [
        _penalty("dcgan 3-64-128-256-512-1, 64x3x64x64", *WIDE, forward=True, dtype=dtype, priority=0)
        for dtype in ("bfloat16", "tf32")
    ]
