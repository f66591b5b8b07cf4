"""Calls of the public API, each as a function of tensors: run on fake CUDA tensors, and captured in a graph on a
GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from genfast import losses, models, ops
from genfast import nn as gnn


class Case(NamedTuple):
    """``run(*inputs)`` gives tensors, what it returns and the gradients; ``state`` is what it changes in place."""

    run: Callable[..., list[Tensor]]
    inputs: list[Tensor]
    state: list[Tensor]


def _differentiated(function: Callable[..., Any], modules: Sequence[nn.Module]) -> Callable[..., list[Tensor]]:
    """Outputs, and the gradients of all inputs and parameters for a cotangent that differs by element."""
    parameters = [p for m in modules for p in m.parameters()]

    def run(*inputs: Tensor) -> list[Tensor]:
        inputs = tuple(t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs)
        outputs = [t for t in tree_leaves(function(*inputs)) if isinstance(t, Tensor)]
        return _with_gradients(outputs, [t for t in (*inputs, *parameters) if t.requires_grad])

    return run


def _with_gradients(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    live = [o for o in outputs if o.requires_grad]
    if not live or not leaves:
        return outputs
    cotangents = [torch.linspace(0.5, 1.5, o.numel(), device=o.device).to(o.dtype).view(o.shape) for o in live]
    grads = torch.autograd.grad(live, leaves, cotangents, allow_unused=True)
    return [*(o.detach() for o in outputs), *(g for g in grads if g is not None)]


def _case(device: Any, function: Any, *inputs: Tensor, modules: Sequence[nn.Module] = ()) -> Case:
    modules = [function] if isinstance(function, nn.Module) and not modules else list(modules)
    for m in modules:
        m.to(device)
    state = [b for m in modules for b in m.buffers() if b.is_floating_point()]
    return Case(_differentiated(function, modules), [t.to(device) for t in inputs], state)


def _both(device: Any, flow: nn.Module, *inputs: Tensor) -> Case:
    def there_and_back(x: Tensor, *rest: Tensor) -> Any:
        z, logdet = flow(x, *rest)
        return z, logdet, flow.inverse(x, *rest)

    return _case(device, there_and_back, *inputs, modules=[flow])


def _net(inputs: int, outputs: int, width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, outputs, 3, padding=1))


def _critic() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(32, 1),
    )


def _smooth_critic() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def _penalty(device: Any, critic: nn.Module, x: Tensor, **options: Any) -> Case:
    critic.to(device)
    options = {"loss": "hinge", **options}

    def run(real: Tensor, fake: Tensor) -> list[Tensor]:
        step = ops.critic_step(critic, real, fake, **options)
        return [step.loss.detach(), *torch.autograd.grad(step.loss, [*critic.parameters()], allow_unused=True)[:-1]]

    return Case(run, [x.to(device), x.flip(0).to(device)], [])


def _sampled(device: Any, model: Any, n: int, shape: tuple[int, ...], context: Tensor | None = None) -> Case:
    model.to(device)
    uniforms = torch.rand(n, model.sampler.uniforms_per_pixel(shape[0]), *shape[1:]).to(device)
    more = () if context is None else (context.to(device),)

    def run(uniforms: Tensor, *context: Tensor) -> list[Tensor]:
        return [model.sample(n, shape, uniforms=uniforms, context=context[0] if context else None)]

    return Case(run, [uniforms, *more], [])


def _density(device: Any, model: Any, x: Tensor) -> Case:
    """The loss of a model, and its samples."""
    return _case(device, lambda x: model.log_prob(x), x, modules=[model])


def _glow(device: Any) -> Case:
    model = models.Glow((3, 8, 8), levels=2, steps=2, hidden=8)
    model.to(device)

    def run(x: Tensor) -> list[Tensor]:
        loss = -model.log_prob(x).mean()
        return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)[:8]]

    return Case(run, [torch.randn(4, 3, 8, 8).to(device)], [])


def _inverse(device: Any, model: Any, *inputs: Tensor) -> Case:
    model.to(device)
    return Case(lambda *z: [t.detach() for t in model.inverse(*z)], [t.to(device) for t in inputs], [])


def _nade_samples(device: Any, layer: Any) -> Case:
    layer.to(device)
    return Case(lambda uniforms: [layer.sample(uniforms)], [torch.rand(5, 8, 1).to(device)], [])


def _style(device: Any) -> Case:
    network = losses.random_features(width=4)
    both = losses.FeatureLosses(
        content=losses.PerceptualLoss(network, "relu4_2", normalization=None),
        style=losses.StyleLoss(network, ["relu1_1", "relu2_1"], normalization=None),
        weights={"style": 100.0},
    ).to(device)
    both.set_target(content=torch.rand(1, 3, 32, 32).to(device), style=torch.rand(1, 3, 20, 20).to(device))
    return Case(_differentiated(lambda x: both(x), []), [torch.rand(1, 3, 32, 32).to(device)], [])


def _gram_loss(device: Any) -> Case:
    loss = gnn.GramLoss.of_features([_x(1, 4, 4, 4), _x(1, 6, 3, 3)])
    return _case(device, lambda *features: loss(list(features)), _x(2, 4, 8, 8), _x(2, 6, 5, 5), modules=[loss])


def _x(*shape: int) -> Tensor:
    return torch.randn(shape)


def _levels(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape)


CASES: dict[str, Callable[[Any], Case]] = {
    # layers
    "ActNorm": lambda d: _both(d, gnn.ActNorm(4), _x(3, 4, 5, 5)),
    "AffineCoupling": lambda d: _both(d, gnn.AffineCoupling(_net(2, 4), scale="sigmoid"), _x(3, 4, 5, 5)),
    "AffineCoupling, tanh": lambda d: _both(d, gnn.AffineCoupling(_net(2, 4), scale="tanh"), _x(3, 4, 5, 5)),
    "GlowStep": lambda d: _both(d, gnn.GlowStep(4, _net(2, 4)), _x(3, 4, 5, 5)),
    "ReversibleSequential": lambda d: _case(
        d, gnn.ReversibleSequential(*(gnn.GlowStep(4, _net(2, 4)) for _ in range(2))), _x(3, 4, 5, 5)
    ),
    "FlowSequential": lambda d: _both(d, gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4)), _x(3, 4, 5, 5)),
    "BatchNormFlow": lambda d: _case(d, gnn.BatchNormFlow(5), _x(7, 5)),
    "InvertibleConv1x1": lambda d: _both(d, gnn.InvertibleConv1x1(6), _x(3, 6, 5, 5)),
    "Inverse": lambda d: _both(
        d, gnn.Inverse(gnn.MaskedAutoregressive(gnn.MADENetwork(5, (16, 16), outputs=2), normalising=False)), _x(7, 5)
    ),
    "LULinear": lambda d: _both(d, gnn.LULinear(5), _x(7, 5)),
    "Householder": lambda d: _both(d, gnn.Householder(5), _x(7, 5)),
    "Permutation": lambda d: _both(d, gnn.Permutation(5), _x(7, 5)),
    "CircularShift": lambda d: _both(d, gnn.CircularShift(5), _x(7, 5)),
    "SplineCoupling": lambda d: _both(d, gnn.SplineCoupling(nn.Linear(3, 3 * 23), bins=8), _x(7, 6)),
    "Spline": lambda d: _both(d, gnn.Spline(4, bins=16), _x(7, 4)),
    "Squeeze": lambda d: _both(d, gnn.Squeeze(), _x(2, 4, 8, 8)),
    "Split": lambda d: _case(d, gnn.Split(), _x(2, 12, 4, 4)),
    "MaskedAutoregressive": lambda d: _both(
        d, gnn.MaskedAutoregressive(gnn.MADENetwork(5, (16, 16), outputs=2)), _x(7, 5)
    ),
    "MaskedAutoregressive, spline": lambda d: _both(
        d, gnn.MaskedAutoregressive(gnn.MADENetwork(5, (16, 16), outputs=23), transform="spline"), _x(7, 5)
    ),
    "MADENetwork": lambda d: _case(d, gnn.MADENetwork(6, (32, 32), outputs=2, order="random"), _x(7, 6)),
    "MaskedLinear": lambda d: _case(d, gnn.MaskedLinear([1, 3, 2], [1, 1, 2, 2]), _x(7, 3)),
    "MaskedConv1d": lambda d: _case(d, gnn.MaskedConv1d(4, 6, 3, dilation=2), _x(3, 4, 9)),
    "MaskedConv2d": lambda d: _case(d, gnn.MaskedConv2d(6, 9, 5, data_channels=3, mask_type="A"), _x(3, 6, 8, 8)),
    "MaskedConv3d": lambda d: _case(d, gnn.MaskedConv3d(2, 4, 3), _x(2, 2, 4, 5, 6)),
    "weight_norm": lambda d: _case(d, gnn.weight_norm(gnn.MaskedConv2d(4, 6, 3)), _x(3, 4, 8, 8)),
    "GatedMaskedConv2d": lambda d: _case(d, gnn.GatedMaskedConv2d(8, 8, 3), _x(2, 8, 6, 6), _x(2, 8, 6, 6)),
    "GatedActivation": lambda d: _case(d, gnn.GatedActivation(), _x(2, 8, 6, 6), _x(2, 8)),
    "RowLSTM": lambda d: _case(d, gnn.RowLSTM(6, 9, data_channels=3), _x(2, 6, 5, 5)),
    "DiagonalBiLSTM": lambda d: _case(d, gnn.DiagonalBiLSTM(6, 9, data_channels=3), _x(2, 6, 5, 5)),
    "NADENetwork": lambda d: _case(d, gnn.NADENetwork(8, 32), _levels(2, 5, 8).float()),
    "DeepNADENetwork": lambda d: _case(
        d, gnn.DeepNADENetwork(8, (32, 32)), _levels(2, 5, 8).float(), _levels(2, 5, 8).bool()
    ),
    "BiasAct": lambda d: _case(d, gnn.BiasAct(16, act="lrelu", clamp=256.0), _x(2, 16, 8, 8)),
    "PixelNorm": lambda d: _case(d, gnn.PixelNorm(), _x(2, 16, 8, 8)),
    "MinibatchStddev": lambda d: _case(d, gnn.MinibatchStddev(), _x(8, 16, 4, 4)),
    "MinibatchDiscrimination": lambda d: _case(d, gnn.MinibatchDiscrimination(32, 10, 5), _x(4, 32)),
    "ModulatedConv2d": lambda d: _case(d, gnn.ModulatedConv2d(8, 4, 3, style_dim=16, up=2), _x(2, 8, 8, 8), _x(2, 16)),
    "Upfirdn2d": lambda d: _case(d, gnn.Upfirdn2d([1, 3, 3, 1], up=2, padding=(2, 1, 2, 1), gain=4), _x(2, 3, 8, 8)),
    "Upsample2d": lambda d: _case(d, gnn.Upsample2d(), _x(2, 3, 8, 8)),
    "Downsample2d": lambda d: _case(d, gnn.Downsample2d(), _x(2, 3, 8, 8)),
    "spectral_norm": lambda d: _case(d, gnn.spectral_norm(nn.Conv2d(3, 8, 3)), _x(2, 3, 8, 8)),
    "ContextualSimilarityLoss": lambda d: _case(
        d, gnn.ContextualSimilarityLoss("cocosnet", bandwidth=0.2), _x(2, 16, 8, 8), _x(2, 16, 8, 8)
    ),
    "GramMatrix": lambda d: _case(d, gnn.GramMatrix(), _x(2, 8, 4, 4)),
    "GramLoss": lambda d: _gram_loss(d),
    # functions whose public form does more than the op
    "affine_coupling, a number as alpha": lambda d: _case(
        d, lambda x, p: ops.affine_coupling(x, p, scale="tanh", alpha=0.7), _x(3, 4, 5, 5), _x(3, 4, 5, 5)
    ),
    "categorical_nll": lambda d: _case(d, lambda a, x: ops.categorical_nll(a, x), _x(2, 48, 8, 8), _levels(16, 2, 3, 8,
    8)),
    "discretized_logistic_mixture_nll": lambda d: _case(
        d, lambda a, x: ops.discretized_logistic_mixture_nll(a, x), _x(2, 100, 8, 8), _levels(256, 2, 3, 8, 8)
    ),
    "discretized_logistic_mixture_sample": lambda d: _case(
        d, lambda a, u: ops.discretized_logistic_mixture_sample(a.detach(), uniforms=u.detach()), _x(2, 100, 8, 8),
        torch.rand(2, 4, 8, 8),
    ),
    "diagonal_gaussian": lambda d: _case(d, lambda m, s: ops.diagonal_gaussian(m, s), _x(4, 3), _x(4, 3)),
    "interpolate": lambda d: _case(d, lambda a, b: ops.interpolate(a, b), _x(4, 3, 6, 6), _x(4, 3, 6, 6)),
    "mmd": lambda d: _case(d, lambda a, b: ops.mmd(a, b, kernel="imq"), _x(16, 8), _x(16, 8)),
    "nearest_neighbors": lambda d: _case(d, lambda a, b: ops.nearest_neighbors(a, b), _x(9, 3), _x(17, 3)),
    "contextual_similarity": lambda d: _case(d, lambda a, b: ops.contextual_similarity(a, b), _x(2, 16, 8, 8), _x(2, 16,
    8, 8)),
    "style losses": _style,
    # whole steps
    "critic_step": lambda d: _penalty(d, _critic(), _x(4, 3, 8, 8), penalty="r1r2"),
    "critic_step, WGAN-GP": lambda d: _penalty(d, _critic(), _x(4, 3, 8, 8), penalty="wgan-gp", loss="wasserstein"),
    "critic_step, smooth": lambda d: _penalty(d, _smooth_critic(), _x(5, 6), penalty="r1", batching="apart"),
    "Glow": _glow,
    "RealNVP": lambda d: _density(d, models.RealNVP((3, 8, 8), hidden=8), _x(2, 3, 8, 8)),
    "MAF": lambda d: _density(d, models.MAF(6, hidden=32), _x(5, 6)),
    "MAF sampling": lambda d: _inverse(d, models.MAF(6, hidden=32), _x(5, 6)),
    "NSF sampling": lambda d: _inverse(d, models.NSF(6, hidden=32), _x(5, 6)),
    "PixelCNN": lambda d: _density(d, models.GatedPixelCNN(3, 12, 2, 3, 4), _levels(4, 2, 3, 6, 5)),
    "PixelCNN++": lambda d: _density(d, models.PixelCNNPlusPlus(filters=8, blocks=1, mixtures=2), _levels(256, 2, 3, 8,
    8)),
    "PixelCNN sampling": lambda d: _sampled(d, models.GatedPixelCNN(3, 12, 2, 3, 4), 3, (3, 6, 5)),
    "PixelCNN sampling, class": lambda d: _sampled(
        d, models.GatedPixelCNN(1, 12, 2, 3, 4, context_channels=3), 3, (1, 6, 5), _x(3, 3)
    ),
    "PixelCNN++ sampling": lambda d: _sampled(d, models.PixelCNNPlusPlus(filters=8, blocks=1, mixtures=2), 2, (3, 8,
    8)),
    "NADE sampling": lambda d: _nade_samples(d, gnn.NADENetwork(8, 32)),
}  # fmt: skip


def of_sample(op: Any, sample: Any, device: Any, dtype: torch.dtype = torch.float32) -> Case:
    """An op on a sample, forward and backward through the registry; what is no floating tensor stays as it is."""
    leaves, spec = tree_flatten(list(sample.args))
    whose = [i for i, a in enumerate(sample.args) for _ in tree_leaves(a)]
    fixed = [
        a.to(device) if isinstance(a, Tensor) and not a.is_floating_point() else None if isinstance(a, Tensor) else a
        for a in leaves
    ]
    places = [i for i, a in enumerate(leaves) if isinstance(a, Tensor) and a.is_floating_point()]

    def run(*tensors: Tensor) -> list[Tensor]:
        given, live = list(fixed), []
        for i, t in zip(places, tensors):
            given[i] = t.detach().requires_grad_(whose[i] not in sample.constant)
            live.append(given[i])
        outputs = [t for t in tree_leaves(op(*tree_unflatten(given, spec))) if isinstance(t, Tensor)]
        return _with_gradients(outputs, [t for t in live if t.requires_grad])

    return Case(run, [leaves[i].to(device=device, dtype=dtype) for i in places], [])
