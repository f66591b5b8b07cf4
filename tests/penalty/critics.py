"""A catalogue of critics in plain torch: every layer that a critic is built of, and the published critics rebuilt.

``CRITICS[name].make(dtype)`` gives (critic, real, fake, context); the numbers are the same in every dtype up to
rounding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import genfast

Made = tuple[Callable[..., Tensor], Tensor, Tensor, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Critic:
    """One entry.

    couples: its samples see one another. random: it draws random numbers. advances: a forward pass changes its buffers.
    piecewise: it is linear between kinks. plain: a function and not a module.
    """

    name: str
    make: Callable[..., Made]
    couples: bool = False
    random: bool = False
    advances: bool = False
    piecewise: bool = False
    plain: bool = False


CRITICS: dict[str, Critic] = {}


def modules(critic: Callable[..., Tensor]) -> list[nn.Module]:
    """The critic, or the modules that a function closes over."""
    if isinstance(critic, nn.Module):
        return [critic]
    return [m for m in inspect.getclosurevars(critic).nonlocals.values() if isinstance(m, nn.Module)]


def named_parameters(critic: Callable[..., Tensor]) -> dict[str, nn.Parameter]:
    return {f"{i}.{name}": p for i, m in enumerate(modules(critic)) for name, p in m.named_parameters()}


def parameters(critic: Callable[..., Tensor]) -> list[nn.Parameter]:
    return list(named_parameters(critic).values())


def buffers(critic: Callable[..., Tensor]) -> list[Tensor]:
    return [b for m in modules(critic) for b in m.buffers()]


def critic(**marks: bool) -> Callable[[Callable[[], Any]], Callable[..., Made]]:
    """Registers what builds (critic, shape of the data) or (critic, shape of the data, context)."""

    def register(build: Callable[[], Any]) -> Callable[..., Made]:
        def make(dtype: torch.dtype = torch.float32) -> Made:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                made, shape, *context = build()
                with torch.no_grad():
                    for p in parameters(made):  # ones and zeros would hide a gain or a bias that is left out
                        if p.numel() > 1 and bool((p == p.flatten()[0]).all()):
                            p.add_(0.2 * torch.randn_like(p))
                real, fake = torch.randn(shape), 0.7 * torch.randn(shape) + 0.3
            for m in modules(made):
                m.to(dtype)
            given = tuple(c.to(dtype) if c.is_floating_point() else c for c in (context[0] if context else ()))
            return made, real.to(dtype), fake.to(dtype), given

        name = build.__name__
        CRITICS[name] = Critic(name, make, **marks)
        return make

    return register


class Applied(nn.Module):
    """A critic from its layers and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = function

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.function(self, x, *context)


class Function(nn.Module):
    """A function of the input as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1))


def mlp(*activations: nn.Module, inside: Callable[[], list[nn.Module]] = list, width: int = 12) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(5, width), *inside(), activations[0]]
    for activation in activations[1:]:
        layers += [nn.Linear(width, width), *inside(), activation]
    return nn.Sequential(*layers, nn.Linear(width, 1))


def convolutional(
    activation: Callable[[], nn.Module], normalised: Callable[[int], nn.Module] | None = None
) -> nn.Sequential:
    """3x8x8: two strided convolutions, with a normalisation of the channels and an activation after each, and a full
    one."""
    layers: list[nn.Module] = []
    for i, o in ((3, 6), (6, 8)):
        layers += [nn.Conv2d(i, o, 4, 2, 1), *([] if normalised is None else [normalised(o)]), activation()]
    return nn.Sequential(*layers, nn.Conv2d(8, 1, 2))


IMAGES = (3, 3, 8, 8)
VECTORS = (4, 5)


# Piecewise linear: products, convolutions, kinks, pooling, resampling, reshaping.


@critic(piecewise=True)
def linear():
    return nn.Linear(5, 1), VECTORS


@critic(piecewise=True)
def mlp_relu():
    return mlp(nn.ReLU(), nn.ReLU(), nn.ReLU()), VECTORS


@critic(piecewise=True)
def mlp_leaky_relu():
    return mlp(nn.LeakyReLU(0.2), nn.LeakyReLU(0.1, inplace=True)), VECTORS


@critic(piecewise=True)
def mlp_without_biases_flat_output():
    layers = nn.Sequential(nn.Linear(5, 9, bias=False), nn.ReLU(), nn.Linear(9, 1, bias=False))
    return Applied(lambda m, x: m.layers(x)[:, 0], layers=layers), VECTORS


@critic(piecewise=True)
def kinks():
    """The other activations of straight pieces."""
    return mlp(nn.ReLU6(), nn.Hardtanh(-0.5, 0.7), nn.RReLU(0.2, 0.2).eval(), nn.Threshold(0.1, -0.2)), VECTORS


@critic(piecewise=True)
def dcgan():
    """Output (N, 1, 1, 1)."""
    return convolutional(lambda: nn.LeakyReLU(0.2)), IMAGES


@critic(piecewise=True)
def dcgan_in_place():
    return convolutional(lambda: nn.LeakyReLU(0.2, inplace=True)), IMAGES


@critic(piecewise=True)
def pooling():
    layers = [
        nn.Conv2d(3, 6, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, padding="same"),
        nn.LeakyReLU(0.2),
    ]
    layers += [nn.AvgPool2d(3, 2, 1), nn.Conv2d(6, 8, 3, 1, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 1)), (3, 3, 9, 9)


@critic(piecewise=True)
def adaptive_max_pooling():
    layers = [nn.Conv2d(3, 6, 3), nn.LeakyReLU(0.2), nn.AdaptiveMaxPool2d(2), nn.Flatten(), nn.Linear(24, 1)]
    return nn.Sequential(*layers), (3, 3, 7, 7)


@critic(piecewise=True)
def convolution_options():
    """Stride, dilation, groups, padding by reflection, one-sided padding."""
    layers = [
        nn.ReflectionPad2d(1),
        nn.Conv2d(4, 8, 3, (2, 1), groups=2),
        nn.LeakyReLU(0.2),
        nn.ZeroPad2d((1, 0, 2, 1)),
    ]
    layers += [
        nn.Conv2d(8, 8, 3, dilation=2, groups=8, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.ReplicationPad2d(1),
    ]
    layers += [nn.Conv2d(4, 4, 3, 1, 1, padding_mode="circular"), nn.LeakyReLU(0.1), head(4)]
    return nn.Sequential(*layers), (3, 4, 8, 9)


@critic(piecewise=True)
def conv1d():
    layers = [nn.Conv1d(2, 6, 5, 2, 2), nn.LeakyReLU(0.2), nn.AvgPool1d(2), nn.Conv1d(6, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool1d(2), nn.Flatten(), nn.Linear(32, 1)), (3, 2, 32)


@critic(piecewise=True)
def conv3d():
    layers = [nn.Conv3d(2, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv3d(4, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4, 1)]
    return nn.Sequential(*layers), (3, 2, 4, 4, 4)


@critic(piecewise=True)
def upsampling():
    layers = [
        nn.Conv2d(3, 6, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(6, 6, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, 2),
    ]
    layers += [nn.Upsample(scale_factor=2, mode="nearest"), nn.LeakyReLU(0.2), nn.Conv2d(6, 6, 3, 2)]
    layers += [
        nn.ReLU(),
        nn.Upsample(size=(5, 4), mode="bilinear", align_corners=False),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        head(8),
    ]
    return nn.Sequential(*layers), IMAGES


@critic(piecewise=True)
def transposed_conv1d():
    layers = [
        nn.ConvTranspose1d(2, 6, 3, 2, output_padding=1, groups=2),
        nn.LeakyReLU(0.2),
        nn.Conv1d(6, 4, 3, 2),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 8, 1)), (3, 2, 8)


@critic(piecewise=True)
def autoencoding():
    """The energy of EBGAN in the L1 norm (arXiv:1609.03126): how far a decoder's picture is from its input."""
    layers = [nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2), nn.ConvTranspose2d(6, 3, 4, 2, 1)]
    return Applied(lambda m, x: (m.layers(x) - x).abs().flatten(1).mean(1), layers=nn.Sequential(*layers)), IMAGES


@critic(piecewise=True)
def residual_in_place():
    layers = {
        "a": nn.Conv2d(3, 6, 3, 1, 1),
        "b": nn.Conv2d(6, 6, 3, 1, 1),
        "c": nn.Conv2d(6, 6, 3, 1, 1),
        "out": head(6),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        r = m.b(F.relu(h))
        r += h
        r = F.relu_(r)
        return m.out(F.relu(r + 0.5 * m.c(r), inplace=True))

    return Applied(forward, **layers), (3, 3, 6, 6)


@critic(piecewise=True)
def dense_connections():
    """Features joined by concatenation, split again, and a skip from the input."""
    layers = {"a": nn.Conv2d(3, 4, 3, 1, 1), "b": nn.Conv2d(7, 6, 3, 1, 1), "out": nn.Linear(3 * 36 + 3, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.cat((x, F.leaky_relu(m.a(x), 0.2)), 1)
        f, g = m.b(h).chunk(2, 1)
        h = F.relu(f) - F.leaky_relu(g, 0.1)
        return m.out(torch.cat((h.flatten(1), x.mean((2, 3))), 1)).squeeze(1)

    return Applied(forward, **layers), (3, 3, 6, 6)


@critic(piecewise=True)
def pixel_shuffling():
    layers = [
        nn.PixelUnshuffle(2),
        nn.Conv2d(12, 8, 3, 1, 1),
        nn.LeakyReLU(0.2),
        nn.PixelShuffle(2),
        nn.Conv2d(2, 6, 3, 2),
        nn.ReLU(),
    ]
    return nn.Sequential(*layers, head(6)), IMAGES


@critic(piecewise=True)
def where_activation():
    def leaky(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    layers = [
        nn.Conv2d(3, 6, 4, 2, 1),
        Function(leaky),
        nn.Conv2d(6, 8, 4, 2, 1),
        Function(leaky),
        nn.Flatten(),
        nn.Linear(32, 1),
    ]
    return nn.Sequential(*layers), IMAGES


@critic(piecewise=True)
def maximum_activation():
    def leaky(x: Tensor) -> Tensor:
        return torch.maximum(x, 0.2 * x) + 0.1 * x.clamp(min=-0.3, max=0.5) - 0.1 * x.abs()

    return mlp(Function(leaky), Function(leaky)), VECTORS


@critic(piecewise=True)
def prelu():
    return nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.PReLU(6), nn.Conv2d(6, 8, 3), nn.PReLU(), head(8)), IMAGES


@critic(piecewise=True)
def layers_of_genfast():
    """What a StyleGAN-like critic is built of here."""
    layers = {"a": nn.Conv2d(3, 6, 3, padding=1, bias=False), "b": nn.Conv2d(6, 6, 3, padding=1), "c": nn.Linear(6, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = genfast.ops.bias_act(m.a(x), m.b.bias, act="lrelu")
        h = genfast.ops.downsample2d(h, genfast.ops.setup_filter([1, 3, 3, 1]).to(h.dtype))
        return m.c(genfast.ops.bias_act(m.b(h), act="relu", gain=1.0).mean((2, 3)))

    return Applied(forward, **layers), IMAGES


@critic(piecewise=True)
def maxout():
    """arXiv:1302.4389, the activation of the first GAN's discriminator."""
    layers = {"a": nn.Linear(5, 24), "b": nn.Linear(8, 12), "c": nn.Linear(4, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x).view(-1, 8, 3).amax(2)
        return m.c(m.b(h).view(-1, 4, 3).max(dim=2).values)

    return Applied(forward, **layers), VECTORS


@critic(piecewise=True, plain=True)
def functional():
    """A function, whose parameters are in its closure."""
    w = nn.ParameterList([torch.randn(9, 5) / 2, torch.randn(9), torch.randn(9, 9) / 3, torch.randn(9) / 3])

    def f(x: Tensor) -> Tensor:
        h = F.leaky_relu(F.linear(x, w[0], w[1]), 0.2)
        return torch.relu(h @ w[2].t()) @ w[3]

    return f, VECTORS


@critic(piecewise=True)
def einsum():
    layers = {
        "w": nn.Parameter(torch.randn(2, 5, 6) / 2),
        "v": nn.Parameter(torch.randn(2, 6, 3) / 2),
        "u": nn.Parameter(torch.randn(2, 3)),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.leaky_relu(torch.einsum("nd,gde->nge", x, m.w), 0.2)
        h = torch.relu(torch.einsum("nge,gef->ngf", h, m.v))
        return torch.einsum("ngf,gf->n", h, m.u)

    return Applied(forward, **layers), VECTORS


@critic(piecewise=True)
def matrix_products():
    """matmul, bmm, addmm, baddbmm, transposes and permutations."""
    layers = {
        "w": nn.Parameter(torch.randn(4, 6)),
        "b": nn.Parameter(torch.randn(6)),
        "v": nn.Parameter(torch.randn(6, 3) / 2),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.leaky_relu(x.transpose(1, 2) @ m.w + m.b, 0.2)
        h = torch.bmm(h, m.v.expand(len(h), -1, -1)).permute(0, 2, 1)
        h = torch.baddbmm(h, h, torch.ones(5, 5, dtype=x.dtype).expand(len(h), 5, 5), beta=0.5, alpha=0.3).relu()
        return torch.addmm(h.new_zeros(1), h.reshape(len(h), -1), m.v.t().reshape(-1)[:15].unsqueeze(1) * 0.4)

    return Applied(forward, **layers), (3, 4, 5)


@critic(piecewise=True)
def tied_weight():
    """One weight in two places, once transposed, and one module called twice."""
    layers = {"w": nn.Parameter(torch.randn(7, 5) / 2), "square": nn.Linear(5, 5), "out": nn.Linear(5, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.leaky_relu(F.linear(m.square(x), m.w), 0.2)
        h = F.leaky_relu(F.linear(h, m.w.t()), 0.2)
        return m.out(F.relu(m.square(h)))

    return Applied(forward, **layers), VECTORS


@critic(piecewise=True)
def unused_parameter():
    return Applied(lambda m, x: m.used(x), used=mlp(nn.ReLU()), left=nn.Linear(3, 3)), VECTORS


@critic(piecewise=True)
def frozen_layer():
    layers = mlp(nn.LeakyReLU(0.2), nn.LeakyReLU(0.2))
    layers[0].requires_grad_(False)
    return layers, VECTORS


@critic(piecewise=True)
def dead_units():
    """The gradient of two samples is zero: both units of their layer are dead."""
    layers = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layers(torch.cat((x[:2, :2] - 100, x[2:, :2] + 100)))

    made = Applied(forward, layers=layers)
    with torch.no_grad():
        layers[0].weight.abs_()
    return made, VECTORS


@critic(piecewise=True)
def indexing():
    layers = {"a": nn.Linear(6, 8), "b": nn.Linear(4, 4), "c": nn.Linear(4, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.leaky_relu(m.a(x[:, :, ::2].flatten(1)), 0.2)
        h = h[:, torch.tensor([3, 0, 5, 3])] + h.narrow(1, 2, 4) - h.flip(1)[:, :4] + h.roll(1, 1)[..., 4:]
        h = torch.stack((h, m.b(h)), 2).unbind(2)[1].index_select(1, torch.tensor([2, 1, 1, 0]))
        return m.c(F.relu(h))

    return Applied(forward, **layers), (4, 2, 6)


@critic(piecewise=True)
def arithmetic():
    """Scaling, shifting, means, sums and products with what does not depend on the input."""
    layers = {
        "a": nn.Linear(5, 8),
        "gain": nn.Parameter(torch.rand(8) + 0.5),
        "shift": nn.Parameter(torch.randn(8)),
        "c": nn.Linear(8, 1),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        h = (2 * x - 1) / 3
        h = F.leaky_relu(m.a(h), 0.2).mul(m.gain).add(m.shift, alpha=0.5)
        h = torch.addcmul(h, h, m.gain.exp(), value=0.1) - h.mean(1, keepdim=True) + h.sum(1, keepdim=True) / 9
        return m.c(torch.lerp(h, -h.relu(), 0.3).neg()).sum(1)

    return Applied(forward, **layers), VECTORS


# Weights that are functions of parameters.


@critic(piecewise=True, advances=True)
def spectral_norm():
    sn = parametrizations.spectral_norm
    layers = [
        sn(nn.Conv2d(3, 6, 4, 2, 1)),
        nn.LeakyReLU(0.1),
        sn(nn.Conv2d(6, 8, 3, 1, 1)),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, sn(nn.Linear(8 * 16, 1))), IMAGES


@critic(piecewise=True)
def spectral_norm_frozen():
    sn = parametrizations.spectral_norm
    return nn.Sequential(sn(nn.Linear(5, 9)), nn.LeakyReLU(0.1), sn(nn.Linear(9, 1))).eval(), VECTORS


@critic(piecewise=True, advances=True)
def spectral_norm_by_hooks():
    """The older torch.nn.utils.spectral_norm, which most published critics use."""
    sn = nn.utils.spectral_norm
    return nn.Sequential(sn(nn.Conv2d(3, 6, 4, 2, 1)), nn.LeakyReLU(0.1), nn.Flatten(), sn(nn.Linear(96, 1))), IMAGES


@critic(piecewise=True)
def weight_norm():
    wn = parametrizations.weight_norm
    return nn.Sequential(wn(nn.Conv2d(3, 6, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(), wn(nn.Linear(96, 1))), IMAGES


class Equalised(nn.Module):
    """The equalised learning rate of Progressive GANs (arXiv:1710.10196, section 4.1): w / sqrt(fan in), at run
    time."""

    def __init__(self, i: int, o: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(o, i, kernel, kernel)), nn.Parameter(torch.zeros(o))
        self.gain, self.stride = 1 / math.sqrt(i * kernel**2), stride

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.gain, self.bias, self.stride, self.weight.shape[-1] // 2)


def stddev(x: Tensor, group: int) -> Tensor:
    """Minibatch standard deviation (arXiv:1710.10196, section 3, with the groups of StyleGAN)."""
    n, c, h, w = x.shape
    y = x.reshape(group, -1, 1, c, h, w)
    y = ((y - y.mean(0)).square().mean(0) + 1e-8).sqrt().mean((2, 3, 4))
    return torch.cat((x, y.reshape(-1, 1, 1, 1).repeat(group, 1, h, w)), 1)


def blurred(x: Tensor, down: int = 1) -> Tensor:
    """The filter [1, 2, 1] in both axes, reflected at the edges."""
    f = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
    f = (f[:, None] * f).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), f, stride=down, groups=x.shape[1])


@critic(couples=True)
def stylegan2():
    """StyleGAN2's residual discriminator with its minibatch deviation (arXiv:1912.04958, section 4.1)."""
    layers = {
        "rgb": Equalised(3, 6),
        "a": Equalised(6, 6, 3),
        "b": Equalised(6, 8, 3, 2),
        "skip": Equalised(6, 8, 1, 2),
    }
    layers |= {"last": Equalised(9, 8, 3), "out": Equalised(8 * 16, 1)}

    def act(x: Tensor) -> Tensor:
        return F.leaky_relu(x, 0.2) * math.sqrt(2)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = act(m.rgb(x))
        y = act(m.b(blurred(act(m.a(x)))))
        x = (y + m.skip(blurred(x))) * math.sqrt(0.5)
        x = act(m.last(stddev(x, 2)))
        return m.out(x.reshape(len(x), -1, 1, 1)).reshape(-1)

    return Applied(forward, **layers), (4, 3, 8, 8)


# Smooth activations.


@critic()
def smooth_activations():
    return mlp(nn.SiLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.Mish()), VECTORS


@critic()
def saturating_activations():
    return mlp(nn.Tanh(), nn.Softplus(), nn.Softplus(beta=2.0, threshold=5.0), nn.Sigmoid()), VECTORS


@critic()
def exponential_activations():
    return mlp(nn.ELU(), nn.SELU(), nn.CELU(0.7), nn.ELU(0.4)), VECTORS


@critic()
def more_activations():
    return mlp(nn.Softsign(), nn.Hardswish(), nn.LogSigmoid(), Function(torch.sin)), VECTORS


@critic()
def silu_convolutional():
    return convolutional(nn.SiLU), IMAGES


@critic()
def gated():
    """A product of two functions of the input, and the gated linear unit."""
    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(5, 8), "c": nn.Linear(4, 1)}
    return Applied(lambda m, x: m.c(F.glu(m.a(x) * torch.tanh(m.b(x)), 1)), **layers), VECTORS


@critic()
def quadratic():
    """x^T A x / 2."""
    w = {"a": nn.Parameter(torch.randn(5, 5))}
    return Applied(lambda m, x: 0.5 * ((x @ m.a) * x).sum(1), **w), VECTORS


@critic()
def powers():
    layers = {"a": nn.Linear(5, 6), "c": nn.Linear(6, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        h = (
            (h.square() + 1).sqrt()
            + (1 + h.pow(2)).log() / (2 + torch.cos(h))
            + torch.exp(-h.abs())
            - torch.rsqrt(1 + h**2)
        )
        return m.c(h) + torch.linalg.vector_norm(h, dim=1, keepdim=True) / (
            1 + h.norm(dim=1, keepdim=True).reciprocal()
        )

    return Applied(forward, **layers), VECTORS


# Normalisation.


@critic(piecewise=True)
def batch_norm_frozen():
    made = convolutional(lambda: nn.LeakyReLU(0.2), nn.BatchNorm2d)
    for m in made:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return made.eval(), IMAGES


@critic(couples=True, advances=True)
def batch_norm():
    return convolutional(lambda: nn.LeakyReLU(0.2), nn.BatchNorm2d), (5, 3, 8, 8)


@critic(couples=True, advances=True)
def batch_norm_of_vectors():
    return mlp(nn.ReLU(), nn.LeakyReLU(0.2), inside=lambda: [nn.BatchNorm1d(12, affine=False)]), (6, 5)


@critic()
def layer_norm():
    return mlp(nn.LeakyReLU(0.2), nn.SiLU(), inside=lambda: [nn.LayerNorm(12)]), VECTORS


@critic()
def layer_norm_of_images():
    """Over channels and positions at once, as WGAN-GP has it, with and without a learned affine map."""
    layers = [nn.Conv2d(3, 6, 4, 2, 1), nn.LayerNorm((6, 4, 4)), nn.LeakyReLU(0.2), nn.Conv2d(6, 8, 4, 2, 1)]
    return nn.Sequential(
        *layers, nn.LayerNorm((8, 2, 2), elementwise_affine=False), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 2)
    ), IMAGES


@critic()
def group_norm():
    return convolutional(nn.SiLU, lambda c: nn.GroupNorm(2, c)), IMAGES


@critic()
def instance_norm():
    return convolutional(lambda: nn.LeakyReLU(0.2), lambda c: nn.InstanceNorm2d(c, affine=True)), IMAGES


@critic()
def instance_norm_plain():
    return convolutional(nn.ReLU, nn.InstanceNorm2d), IMAGES


@critic()
def rms_norm():
    return mlp(nn.GELU(), nn.LeakyReLU(0.2), inside=lambda: [nn.RMSNorm(12, eps=1e-6)]), VECTORS


@critic()
def rms_norm_of_images():
    """Over the positions, which are 4x4 and then 2x2, without a gain."""
    return convolutional(nn.SiLU, lambda c: nn.RMSNorm((4, 4) if c == 6 else (2, 2), 1e-5, False)), IMAGES


@critic()
def local_response():
    """F.local_response_norm, and features of unit length."""
    layers = {"a": nn.Conv2d(3, 6, 3, 2), "b": nn.Linear(54, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.local_response_norm(F.leaky_relu(m.a(x), 0.2), 3)
        return m.b(F.normalize(h.flatten(1), dim=1))

    return Applied(forward, **layers), IMAGES


@critic()
def pixel_norm():
    layers = {"a": nn.Conv2d(3, 6, 3, 2), "out": head(6)}
    return Applied(
        lambda m, x: m.out((h := F.leaky_relu(m.a(x), 0.2)) * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-8)),
        **layers,
    ), IMAGES


@critic(random=True, piecewise=True)
def dropout():
    return nn.Sequential(
        nn.Linear(5, 32),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.4),
        nn.Linear(32, 16),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(16, 1),
    ), VECTORS


@critic(random=True, piecewise=True)
def dropout_of_channels():
    return nn.Sequential(nn.Conv2d(3, 12, 4, 2, 1), nn.LeakyReLU(0.2), nn.Dropout2d(0.5), nn.Conv2d(12, 1, 4)), IMAGES


@critic(random=True, piecewise=True)
def random_leak():
    return mlp(nn.RReLU(), nn.LeakyReLU(0.2)), VECTORS


# Attention, and what sees other samples.


@critic()
def attention_by_products():
    layers = {"qkv": nn.Linear(6, 24), "out": nn.Linear(8, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).split(8, 2)
        return m.out((torch.softmax(q @ k.transpose(1, 2) / math.sqrt(8), -1) @ v).mean(1))

    return Applied(forward, **layers), (3, 7, 6)


@critic()
def attention_fused():
    """F.scaled_dot_product_attention with heads; a causal one after it, with a scale of its own."""
    layers = {"qkv": nn.Linear(6, 24), "again": nn.Linear(8, 24), "out": nn.Linear(8, 1)}

    def heads(t: Tensor) -> list[Tensor]:
        return [p.unflatten(2, (2, 4)).transpose(1, 2) for p in t.chunk(3, 2)]

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.scaled_dot_product_attention(*heads(m.qkv(x))).transpose(1, 2).flatten(2)
        h = (
            F.scaled_dot_product_attention(*heads(F.gelu(m.again(h))), is_causal=True, scale=0.7)
            .transpose(1, 2)
            .flatten(2)
        )
        return m.out(h.mean(1))

    return Applied(forward, **layers), (3, 7, 6)


@critic()
def attention_fused_with_mask():
    layers = {"qkv": nn.Linear(6, 24), "bias": nn.Parameter(torch.randn(7, 7)), "out": nn.Linear(8, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (p.unsqueeze(1).contiguous() for p in m.qkv(x).chunk(3, 2))
        return m.out(F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias).squeeze(1).amax(1))

    return Applied(forward, **layers), (3, 7, 6)


@critic()
def multihead_attention():
    layers = {"embed": nn.Linear(6, 8), "attend": nn.MultiheadAttention(8, 2, batch_first=True), "out": nn.Linear(8, 1)}
    return Applied(lambda m, x: m.out(m.attend(*[m.embed(x)] * 3, need_weights=False)[0][:, 0]), **layers), (3, 7, 6)


@critic()
def multihead_attention_with_weights():
    layers = {"attend": nn.MultiheadAttention(6, 3), "out": nn.Linear(6, 1)}
    return Applied(lambda m, x: m.out(m.attend(*[x.transpose(0, 1)] * 3)[0].mean(0)), **layers), (3, 7, 6)


@critic()
def transformer():
    """A pre-norm encoder with a learned position and class token, as in ViT critics."""
    block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
    layers = {
        "patch": nn.Conv2d(3, 8, 4, 4),
        "token": nn.Parameter(torch.randn(1, 1, 8)),
        "place": nn.Parameter(torch.randn(1, 5, 8)),
    }
    layers |= {"block": block, "norm": nn.LayerNorm(8), "out": nn.Linear(8, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat((m.token.expand(len(h), -1, -1), h), 1) + m.place
        return m.out(m.norm(m.block(h))[:, 0])

    return Applied(forward, **layers), IMAGES


@critic(advances=True)
def sagan():
    """Self-attention as SAGAN's authors released it (arXiv:1805.08318): pooled keys and values, a gain, spectral
    norm."""
    sn = parametrizations.spectral_norm
    layers = {
        "a": sn(nn.Conv2d(3, 8, 3, 1, 1)),
        "theta": sn(nn.Conv2d(8, 2, 1, bias=False)),
        "phi": sn(nn.Conv2d(8, 2, 1, bias=False)),
    }
    layers |= {
        "g": sn(nn.Conv2d(8, 4, 1, bias=False)),
        "o": sn(nn.Conv2d(4, 8, 1, bias=False)),
        "gamma": nn.Parameter(torch.tensor(0.6)),
    }
    layers |= {"b": sn(nn.Conv2d(8, 8, 4, 2, 1)), "out": sn(nn.Linear(8, 1))}

    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.leaky_relu(m.a(x), 0.1)
        n, c, h, w = x.shape
        theta = m.theta(x).view(n, c // 4, h * w)
        phi = F.max_pool2d(m.phi(x), 2).view(n, c // 4, h * w // 4)
        g = F.max_pool2d(m.g(x), 2).view(n, c // 2, h * w // 4)
        beta = F.softmax(torch.bmm(theta.transpose(1, 2), phi), -1)
        x = x + m.gamma * m.o(torch.bmm(g, beta.transpose(1, 2)).view(n, c // 2, h, w))
        return m.out(F.relu(m.b(x)).sum((2, 3)))

    return Applied(forward, **layers), (3, 3, 6, 6)


@critic(couples=True)
def minibatch_deviation():
    layers = [
        nn.Conv2d(3, 6, 4, 2, 1),
        nn.LeakyReLU(0.2),
        Function(lambda x: stddev(x, 2)),
        nn.Conv2d(7, 8, 3),
        nn.LeakyReLU(0.2),
    ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 1)), (4, 3, 8, 8)


@critic(couples=True)
def minibatch_discrimination():
    """arXiv:1606.03498, section 3.2, by broadcasting."""
    layers = {"a": nn.Linear(5, 8), "t": nn.Parameter(torch.randn(8, 6) / 3), "out": nn.Linear(11, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        f = F.leaky_relu(m.a(x), 0.2)
        p = (f @ m.t).view(-1, 3, 2)
        return m.out(torch.cat((f, torch.exp(-(p - p.unsqueeze(1)).abs().sum(3)).sum(1)), 1))

    return Applied(forward, **layers), VECTORS


@critic(couples=True)
def attention_over_samples():
    layers = {"a": nn.Linear(5, 8), "out": nn.Linear(8, 1)}
    return Applied(lambda m, x: m.out(torch.softmax((h := m.a(x)) @ h.t() / 3, 1) @ h), **layers), VECTORS


# Layers that few critics have.


@critic()
def unusual_functions():
    layers = {"a": nn.Conv2d(3, 4, 3, 1, 1), "b": nn.Linear(18, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        h = F.leaky_relu(m.a(x), 0.2)
        spectrum = torch.fft.rfft2(h).abs().mean((2, 3))
        where = torch.linspace(-0.9, 0.9, 4, dtype=x.dtype)
        grid = torch.stack(torch.meshgrid(where, where, indexing="xy"), 2).expand(len(x), 4, 4, 2)
        sampled = F.grid_sample(h, grid, align_corners=False).logsumexp((2, 3))
        patches = F.unfold(h, 3, stride=3).cumsum(2).mean(2)[:, ::9]
        best = h.flatten(2).topk(2, dim=2).values.flatten(1)[:, :2] + h.flatten(2).sort(2).values[:, :2, 5].cumprod(1)
        return m.b(torch.cat((spectrum, sampled, patches, best, torch.atan2(spectrum, 1 + sampled.square())), 1))

    return Applied(forward, **layers), (3, 3, 6, 6)


@critic(piecewise=True)
def checkpointed():
    layers = {"a": mlp(nn.LeakyReLU(0.2), nn.LeakyReLU(0.2))}
    return Applied(lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False), **layers), VECTORS


# Conditions.


@critic(piecewise=True)
def projection():
    """cGANs with a projection discriminator (arXiv:1802.05637, eq. 4)."""
    layers = {
        "features": mlp(nn.LeakyReLU(0.2), nn.LeakyReLU(0.2))[:-1],
        "out": nn.Linear(12, 1),
        "embed": nn.Embedding(4, 12),
    }

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        h = m.features(x)
        return m.out(h) + (m.embed(y) * h).sum(1, keepdim=True)

    return Applied(forward, **layers), VECTORS, (torch.tensor([3, 0, 3, 1]),)


@critic(piecewise=True)
def conditioned_by_concatenation():
    """cGAN (arXiv:1411.1784) on a context of real numbers, and a mask of the features."""
    layers = {"a": nn.Linear(8, 12), "b": nn.Linear(12, 1), "mask": nn.Linear(3, 12)}

    def forward(m: Any, x: Tensor, c: Tensor, weight: Tensor) -> Tensor:
        return m.b(F.leaky_relu(m.a(torch.cat((x, c), 1)), 0.2) * m.mask(c)) * weight

    return Applied(forward, **layers), VECTORS, (torch.randn(4, 3), torch.rand(4, 1) + 0.5)


@critic()
def modulated_by_context():
    """A gain and a shift per channel from the context (FiLM), and cross-attention to its tokens."""
    layers = {"a": nn.Conv2d(3, 6, 4, 2, 1), "film": nn.Linear(5, 12), "q": nn.Linear(6, 5), "out": nn.Linear(6, 1)}

    def forward(m: Any, x: Tensor, c: Tensor) -> Tensor:
        gain, shift = m.film(c.mean(1)).view(-1, 12, 1, 1).chunk(2, 1)
        h = F.silu(m.a(x) * (1 + gain) + shift).flatten(2).transpose(1, 2)
        h = h + F.pad(F.scaled_dot_product_attention(m.q(h), c, c), (0, 1))
        return m.out(h.mean(1))

    return Applied(forward, **layers), IMAGES, (torch.randn(3, 4, 5),)


# Published critics, at small widths.


class Scaled(nn.Module):
    """The residual block of WGAN-GP's critics: mean pooling as a mean of four strided slices."""

    def __init__(
        self, i: int, o: int, first: bool = False, down: bool = True, norm: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.first, self.down = first, down
        self.a, self.b = nn.Conv2d(i, o, 3, 1, 1), nn.Conv2d(o, o, 3, 1, 1)
        self.skip = nn.Conv2d(i, o, 1) if i != o or down else nn.Identity()
        self.n0 = nn.LayerNorm((i, *norm)) if norm else nn.Identity()
        self.n1 = nn.LayerNorm((o, *norm)) if norm else nn.Identity()

    def pool(self, x: Tensor) -> Tensor:
        if not self.down:
            return x
        return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.first else F.relu(self.n0(x))
        skip = self.skip(self.pool(x)) if self.first else self.pool(self.skip(x))
        return skip + self.pool(self.b(F.relu(self.n1(self.a(h)))))


@critic(piecewise=True)
def published_wgan_gp_toy():
    """igul222/improved_wgan_training, gan_toy.py: ReLU MLP on points of the plane (width 512 there)."""
    layers: list[nn.Module] = []
    for i in (2, 24, 24):
        layers += [nn.Linear(i, 24), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.Linear(24, 1)), (8, 2)


@critic(piecewise=True)
def published_wgan_gp_resnet():
    """igul222/improved_wgan_training, gan_cifar_resnet.py: pre-activation ResNet without normalisation
    (arXiv:1704.00028)."""
    blocks = nn.Sequential(Scaled(3, 8, first=True), Scaled(8, 8), Scaled(8, 8, down=False), Scaled(8, 8, down=False))
    return Applied(lambda m, x: m.out(F.relu(m.blocks(x)).mean((2, 3))).view(-1), blocks=blocks, out=nn.Linear(8, 1)), (
        2,
        3,
        8,
        8,
    )


@critic()
def published_wgan_gp_resnet_normalised():
    """igul222/improved_wgan_training, gan_64x64.py, GoodDiscriminator: the same with layer normalisation."""
    blocks = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), Scaled(6, 8, norm=(8, 8)), Scaled(8, 8, norm=(4, 4)))
    return Applied(lambda m, x: m.out(m.blocks(x).reshape(-1, 32)).reshape(-1), blocks=blocks, out=nn.Linear(32, 1)), (
        2,
        3,
        8,
        8,
    )


@critic(piecewise=True)
def published_caogang_cifar10():
    """caogang/wgan-gp, gan_cifar10.py: three strided convolutions, a slope of 0.01, a linear layer."""
    layers: list[nn.Module] = []
    for i, o in ((3, 6), (6, 8), (8, 10)):
        layers += [nn.Conv2d(i, o, 3, 2, 1), nn.LeakyReLU()]
    return Applied(
        lambda m, x: m.out(m.main(x).view(-1, 10)), main=nn.Sequential(*layers), out=nn.Linear(10, 1)
    ), IMAGES


@critic()
def published_emilien_dupont():
    """EmilienDupont/wgan-gp, models.py: four strided convolutions, a sigmoid on the features and one on the output."""
    layers: list[nn.Module] = []
    for i, o in ((1, 4), (4, 8), (8, 10)):
        layers += [nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(0.2)]
    features, out = (
        nn.Sequential(*layers, nn.Conv2d(10, 16, 4, 2, 1), nn.Sigmoid()),
        nn.Sequential(nn.Linear(16, 1), nn.Sigmoid()),
    )
    return Applied(lambda m, x: m.out(m.features(x).view(x.size()[0], -1)), features=features, out=out), (3, 1, 16, 16)


@critic(piecewise=True)
def published_pytorch_gan():
    """eriklindernoren/PyTorch-GAN, wgan_gp.py: an MLP of the flattened image, LeakyReLU in place."""
    layers = [
        nn.Linear(49, 24),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Linear(24, 12),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Linear(12, 1),
    ]
    return Applied(lambda m, x: m.model(x.view(x.shape[0], -1)), model=nn.Sequential(*layers)), (4, 1, 7, 7)


class Spectral(nn.Module):
    """The residual block of SNGAN: the first one, or pre-activation."""

    def __init__(self, i: int, o: int, first: bool = False, down: bool = True) -> None:
        super().__init__()
        sn = parametrizations.spectral_norm
        self.first, self.down = first, down
        self.a, self.b = sn(nn.Conv2d(i, o, 3, 1, 1)), sn(nn.Conv2d(o, o, 3, 1, 1))
        self.skip = sn(nn.Conv2d(i, o, 1)) if i != o or down else None
        self.act = nn.ReLU(True)

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            return F.avg_pool2d(self.b(self.act(self.a(x))), 2) + self.skip(F.avg_pool2d(x, 2))
        h = self.b(self.act(self.a(self.act(x.clone()))))
        s = x if self.skip is None else self.skip(x)
        return F.avg_pool2d(h, 2) + F.avg_pool2d(s, 2) if self.down else h + s


@critic(piecewise=True, advances=True)
def published_mimicry_projection():
    """kwotsin/mimicry and PyTorch-StudioGAN: SNGAN's ResNet, summed over positions, with a projection of the class."""
    sn = parametrizations.spectral_norm
    blocks = nn.Sequential(Spectral(3, 6, first=True), Spectral(6, 8), Spectral(8, 8, down=False))
    layers = {"blocks": blocks, "out": sn(nn.Linear(8, 1)), "embed": sn(nn.Embedding(4, 8)), "act": nn.ReLU(True)}

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        h = torch.sum(m.act(m.blocks(x)), dim=(2, 3))
        return m.out(h) + torch.sum(m.embed(y) * h, dim=1, keepdim=True)

    return Applied(forward, **layers), IMAGES, (torch.tensor([2, 0, 2]),)


class Stable(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(i, min(i, o), 3, 1, 1), nn.Conv2d(min(i, o), o, 3, 1, 1)
        self.skip = nn.Conv2d(i, o, 1, bias=False) if i != o else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(F.leaky_relu(self.a(F.leaky_relu(x, 2e-1)), 2e-1))
        return (x if self.skip is None else self.skip(x)) + 0.1 * h


@critic(piecewise=True)
def published_gan_stability():
    """LMescheder/GAN_stability, models/resnet.py (R1's own): one logit per class, the label's taken by indexing."""
    blocks = nn.Sequential(Stable(6, 6), nn.AvgPool2d(3, stride=2, padding=1), Stable(6, 8))
    layers = {"image": nn.Conv2d(3, 6, 3, padding=1), "blocks": blocks, "fc": nn.Linear(8 * 16, 5)}

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        out = m.blocks(m.image(x)).view(x.size(0), 8 * 16)
        return m.fc(F.leaky_relu(out, 2e-1))[torch.arange(out.size(0)), y]

    return Applied(forward, **layers), IMAGES, (torch.tensor([4, 0, 1]),)


class Modern(nn.Module):
    """R3GAN's block: 1x1, grouped 3x3, 1x1; bias with the activation, gains at run time, no normalisation."""

    def __init__(self, c: int, groups: int) -> None:
        super().__init__()
        shapes = ((2 * c, c, 1, 1), (2 * c, 2 * c // groups, 3, 3), (c, 2 * c, 1, 1))
        self.w = nn.ParameterList([torch.randn(s) / math.sqrt(s[1] * s[2] * s[3]) for s in shapes])
        self.b = nn.ParameterList([torch.zeros(2 * c), torch.zeros(2 * c)])
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        gain = math.sqrt(2 / (1 + 0.2**2))
        y = F.leaky_relu(F.conv2d(x, self.w[0]) + self.b[0].view(1, -1, 1, 1), 0.2) * gain
        y = F.conv2d(y, self.w[1], padding=1, groups=self.groups)
        y = F.conv2d(F.leaky_relu(y + self.b[1].view(1, -1, 1, 1), 0.2) * gain, self.w[2])
        return x + y


@critic(piecewise=True)
def published_r3gan():
    """brownvc/R3GAN, Networks.py (arXiv:2501.05441): those blocks, a low-pass filter before a stride."""
    layers = {
        "rgb": nn.Conv2d(3, 4, 1),
        "one": Modern(4, 2),
        "widen": nn.Conv2d(4, 8, 1, bias=False),
        "two": Modern(8, 4),
    }
    layers |= {
        "basis": nn.Conv2d(8, 8, 4, groups=8, bias=False),
        "out": nn.Linear(8, 6, bias=False),
        "embed": nn.Linear(5, 6, bias=False),
    }

    def forward(m: Any, x: Tensor, y: Tensor) -> Tensor:
        x = m.two(m.widen(blurred(m.one(m.rgb(x)), 2)))
        return (m.out(m.basis(x).view(x.shape[0], -1)) * m.embed(y)).sum(1) / math.sqrt(6)

    return Applied(forward, **layers), IMAGES, (F.one_hot(torch.tensor([1, 4, 0]), 5).float(),)


@critic(piecewise=True)
def published_stylegan2_pytorch():
    """lucidrains/stylegan2-pytorch: residual blocks with a blur before the stride, the output squeezed to (N,)."""
    layers = {
        "net": nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.LeakyReLU(0.2, True),
            nn.Conv2d(6, 6, 3, padding=1),
            nn.LeakyReLU(0.2, True),
        )
    }
    layers |= {
        "skip": nn.Conv2d(3, 6, 1, stride=2),
        "down": nn.Conv2d(6, 6, 3, padding=1, stride=2),
        "last": nn.Conv2d(6, 6, 3, padding=1),
    }
    layers |= {"out": nn.Linear(96, 1)}

    def forward(m: Any, x: Tensor) -> Tensor:
        x = (m.down(blurred(m.net(x))) + m.skip(x)) * (1 / math.sqrt(2))
        return m.out(m.last(x).reshape(len(x), -1)).squeeze()

    return Applied(forward, **layers), IMAGES


def each() -> Iterator[Critic]:
    yield from CRITICS.values()
