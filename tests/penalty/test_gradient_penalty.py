"""gradient_penalty and critic_step against double backward in float64, over the catalogue of critics."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import genfast
from genfast import ops, reference
from tests.penalty import critics
from tests.penalty.critics import CRITICS

KINDS = {  # kind: weight, target (wgan-lp: as a share of the mean norm, so that some samples are above it)
    "wgan-gp": (10.0, 1.0),
    "wgan-lp": (4.0, 0.8),
    "r1": (0.7, 1.0),
    "r2": (3.0, 1.0),
    "dragan": (10.0, 0.5),
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# What the op does, spelled out.


def epsilon(real, generator, drawn=None):
    """One uniform number per sample, drawn in the data's dtype (or in ``drawn``)."""
    e = torch.rand(len(real), generator=generator, dtype=drawn or real.dtype)
    return e.to(real.dtype).reshape(-1, *[1] * (real.dim() - 1))


def points(kind, real, fake, generator, drawn=None):
    """Where the gradient is taken."""
    if kind in ("wgan-gp", "wgan-lp"):
        e = epsilon(real, generator, drawn)
        return e * real + (1 - e) * fake
    if kind == "dragan":
        noise = torch.rand(real.shape, generator=generator, dtype=drawn or real.dtype).to(real.dtype)
        return real + 0.5 * real.std() * epsilon(real, generator, drawn) * noise
    return {"r1": real, "r2": fake}[kind]


class Watched:
    """The inputs that a critic is called with, unseen by any mode."""

    def __init__(self, critic):
        self.inputs, self.handles = [], [m.register_forward_pre_hook(self.keep) for m in critics.modules(critic)[:1]]

    def keep(self, module, args):
        with torch._C.DisableTorchFunction():
            self.inputs.append(args[0].detach().clone())

    def other_than(self, *known):
        """The samples seen that are none of these, each once: perturbed or interpolated ones."""
        old = {row.numpy().tobytes() for t in known for row in t}
        rows = {row.numpy().tobytes(): row for t in self.inputs for row in t}
        return torch.stack([row for key, row in rows.items() if key not in old])


def given(context):
    return context if context else None


def leaves(critic, real, fake, context, inputs):
    """What gradients are asked for, by name: the parameters, and the data and the context with ``inputs``."""
    named = {k: p for k, p in critics.named_parameters(critic).items() if p.requires_grad}
    if inputs:
        data = {"real": real, "fake": fake} | {
            f"context {i}": c for i, c in enumerate(context) if c.is_floating_point()
        }
        named |= {k: t.requires_grad_() for k, t in data.items()}
    return named


def gradients(value, named):
    if not value.requires_grad:
        return {k: torch.zeros_like(t) for k, t in named.items()}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {k: torch.zeros_like(t) if g is None else g for (k, t), g in zip(named.items(), found)}


def exact(entry, kind, weight, target, drawn=torch.float64, seed=1, inputs=False):
    """(value, norms, gradients, buffers) by double backward, in float64 also for float32: the error found is the op's
    own."""
    critic, real, fake, context = entry.make(torch.float64)
    named = leaves(critic, real, fake, context, inputs)
    torch.manual_seed(seed)
    at = points(kind, real, fake, torch.Generator().manual_seed(seed), drawn)
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention has no double backward
        value, norms = reference.gradient_penalty(critic, at, kind, weight, target, context)
        return value.detach(), norms.detach(), gradients(value, named), critics.buffers(critic)


def ours(entry, kind, weight, target, dtype, seed=1, inputs=False, **options):
    critic, real, fake, context = entry.make(dtype)
    named = leaves(critic, real, fake, context, inputs)
    before = {k: t.detach().clone() for k, t in named.items()}
    torch.manual_seed(seed)
    value, norms = ops.gradient_penalty(
        critic,
        real,
        fake,
        kind=kind,
        weight=weight,
        target=target,
        context=given(context),
        generator=torch.Generator().manual_seed(seed),
        return_norms=True,
        **options,
    )
    found = gradients(value, named)
    for k, t in named.items():
        assert torch.equal(t, before[k]), f"{k} was changed"
    return value, norms, found, critics.buffers(critic)


def close(found, expected, tolerance, what, floor=0.0):
    """Relative to the norm of the tensor. ``floor``: the rounding of terms that cancel, relative to all gradients."""
    assert found.shape == expected.shape
    error = float((found.double() - expected.double()).norm())
    size = float(expected.double().norm())
    assert error <= tolerance * size + floor, (
        f"{what}: {error:.2e} off of {size:.2e}, allowed {tolerance * size + floor:.2e}"
    )


def compare(found, expected, tolerance):
    assert found.keys() == expected.keys()
    scale = math.sqrt(sum(float(e.double().square().sum()) for e in expected.values()))
    for name, e in expected.items():
        close(found[name], e, tolerance, f"gradient of {name}", 0.05 * tolerance * scale + 1e-30)


def catalogue(*marks, without=()):
    chosen = [
        c for c in CRITICS.values() if all(getattr(c, m) for m in marks) and not any(getattr(c, m) for m in without)
    ]
    return pytest.mark.parametrize("entry", chosen, ids=[c.name for c in chosen])


def check(entry, kind, dtype, inputs=False, **options):
    weight, target = KINDS[kind]
    if kind == "wgan-lp":
        target *= float(exact(entry, kind, weight, 0.0)[1].mean())
    value, norms, found, state = ours(entry, kind, weight, target, dtype, inputs=inputs, **options)
    e_value, e_norms, e_found, e_state = exact(entry, kind, weight, target, dtype, inputs=inputs)
    tolerance = TOLERANCE[dtype]
    assert value.shape == ()
    assert value.dtype == norms.dtype == dtype
    assert norms.requires_grad or not value.requires_grad
    close(value.detach(), e_value, tolerance, "value")
    close(norms, e_norms, tolerance, "norms")
    compare(found, e_found, tolerance)
    for a, b in zip(state, e_state):
        close(a, b, tolerance, "state after the call", 1e-30)


# The catalogue.


@catalogue()
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
@pytest.mark.filterwarnings("ignore")
def test_float32_equals_double_backward(entry, kind):
    # complex numbers have no rule
    check(entry, kind, torch.float32, method="auto" if entry.name == "unusual_functions" else "exact")


@catalogue()
@pytest.mark.parametrize("kind", ["wgan-gp", "wgan-lp", "r1", "r2", "dragan"])
@pytest.mark.filterwarnings("ignore")
def test_float64_equals_double_backward_to_parameters_context_and_data(entry, kind):
    check(entry, kind, torch.float64, inputs=True)


@pytest.mark.parametrize("method", ["exact", "autograd"])
@pytest.mark.parametrize(
    "name", ["mlp_relu", "dcgan", "layer_norm", "projection", "dropout", "spectral_norm", "functional"]
)
def test_methods_that_are_exact(name, method):
    check(CRITICS[name], "wgan-gp", torch.float64, inputs=True, method=method)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (n, "float64")
        for n in ("smooth_activations", "layer_norm", "mlp_leaky_relu", "dcgan", "attention_fused", "projection")
    ]
    + [(n, "float32") for n in ("smooth_activations", "saturating_activations", "attention_fused")],
)
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_finite_differences(name, kind, dtype):
    """Float32 needs steps so large that they cross kinks, so there only smooth critics are told of."""
    weight, target = KINDS[kind]
    value, norms, found, _ = ours(CRITICS[name], kind, weight, target, DTYPES[dtype], method="finite-difference")
    e_value, e_norms, e_found, _ = exact(CRITICS[name], kind, weight, target, DTYPES[dtype])
    close(value.detach(), e_value, TOLERANCE[DTYPES[dtype]], "value")
    close(norms, e_norms, TOLERANCE[DTYPES[dtype]], "norms")
    compare(found, e_found, {"float32": 5e-3, "float64": 1e-6}[dtype])


@torch.library.custom_op("genfast_tests::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


@torch.library.custom_op("genfast_tests::opaque_backward", mutates_args=())
def opaque_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return gradient * x.cos()


opaque.register_autograd(
    lambda ctx, g: opaque_backward(g, ctx.saved_tensors[0]),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.parametrize("method", ["finite-difference", "auto"])
def test_a_kernel_without_a_second_derivative(method):
    """What fused attention is to PyTorch: a first derivative and no more."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(5, 8), critics.Function(opaque), nn.Linear(8, 1)).double()
    real = torch.randn(6, 5, dtype=torch.float64)
    named = dict(critic.named_parameters())
    value = ops.gradient_penalty(critic, real, kind="r1", method=method)
    found = gradients(value, named)
    critic[1] = critics.Function(torch.sin)
    expected, _ = reference.gradient_penalty(critic, real, "r1", 10.0, 1.0)
    close(value.detach(), expected.detach(), 1e-10, "value")
    compare(found, gradients(expected, named), 1e-6)


@pytest.mark.parametrize(
    "name", ["kinks", "dcgan", "gated", "group_norm", "batch_norm", "dropout", "attention_fused", "stylegan2"]
)
@pytest.mark.parametrize("kind", ["wgan-gp", "r1", "ar1"])
@pytest.mark.filterwarnings("ignore")
def test_gradient_is_that_of_the_value(name, kind):
    """By finite differences of the op's own value along a direction, the random numbers kept."""
    critic, real, fake, context = CRITICS[name].make(torch.float64)
    named = leaves(critic, real, fake, context, False)
    direction = {k: torch.randn_like(p) for k, p in named.items()}

    def value():
        torch.manual_seed(1)
        generator = torch.Generator().manual_seed(1)
        return ops.gradient_penalty(critic, real, fake, kind=kind, context=given(context), generator=generator)

    slope = sum(float((g * direction[k]).sum()) for k, g in gradients(value(), named).items())
    ends, h = [], 1e-6
    for step in (h, -2 * h):
        with torch.no_grad():
            for k, p in named.items():
                p.add_(direction[k], alpha=step)
        ends.append(float(value().detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-6)


# Closed forms.


@pytest.mark.parametrize("kind", ["wgan-gp", "wgan-lp", "r1"])
@pytest.mark.parametrize("size", [0.5, 2.0])
def test_linear_critic(kind, size):
    critic = nn.Linear(7, 1).double()
    w = critic.weight
    with torch.no_grad():
        w *= size / w.norm()
    real, fake = torch.randn(2, 5, 7, dtype=torch.float64)
    value, norms = ops.gradient_penalty(critic, real, fake, kind=kind, weight=3.0, target=1.2, return_norms=True)
    over = size - 1.2 if kind == "wgan-gp" else max(0.0, size - 1.2)
    expected, slope = (1.5 * size**2, 3 * size) if kind == "r1" else (3 * over**2, 6 * over)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(norms, torch.full((5,), size, dtype=torch.float64))
    value.backward()
    torch.testing.assert_close(w.grad, slope * w.detach() / size)
    assert not critic.bias.grad.any()


def test_quadratic_critic():
    critic, real, _, _ = CRITICS["quadratic"].make(torch.float64)
    value = ops.gradient_penalty(critic, real, kind="r1", weight=0.8)
    s = (critic.a.detach() + critic.a.detach().t()) / 2
    close(value.detach(), 0.4 * (real @ s).square().sum(1).mean(), 1e-13, "value")
    m = 0.8 * s @ real.t() @ real / len(real)
    (found,) = torch.autograd.grad(value, critic.a)
    close(found, (m + m.t()) / 2, 1e-13, "gradient")


def test_one_hidden_layer():
    critic = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 1)).double()
    real = torch.randn(6, 4, dtype=torch.float64)
    w, c, v = critic[0].weight.detach(), critic[0].bias.detach(), critic[2].weight.detach()[0]
    mask = (real @ w.t() + c > 0).double()
    g = (mask * v) @ w
    n = g.norm(dim=1, keepdim=True)
    value = ops.gradient_penalty(critic, real, real, kind="wgan-gp", weight=2.0, target=0.7)
    close(value.detach(), 2 * (n - 0.7).square().mean(), 1e-13, "value")
    value.backward()
    u = 4 * (n - 0.7) / n * g / len(real)
    close(critic[0].weight.grad, (mask * v).t() @ u, 1e-13, "gradient of w")
    close(critic[2].weight.grad[0], (mask * (u @ w.t())).sum(0), 1e-13, "gradient of v")
    assert not critic[0].bias.grad.any()
    assert not critic[2].bias.grad.any()


@pytest.mark.parametrize("kind", ["wgan-gp", "wgan-lp", "r1", "dragan"])
def test_a_gradient_of_zero_is_safe(kind):
    critic = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1))
    nn.init.constant_(critic[0].bias, -100.0)
    real = torch.randn(5, 4)
    value, norms = ops.gradient_penalty(critic, real, real, kind=kind, weight=10.0, target=0.5, return_norms=True)
    assert float(value.detach()) == {"wgan-gp": 2.5, "dragan": 2.5}.get(kind, 0.0)
    assert not norms.any()
    value.backward()
    for p in critic.parameters():
        assert p.grad is not None
        assert not p.grad.any()


def test_a_critic_that_does_not_look():
    """Its gradient is zero everywhere."""
    critic = critics.Applied(lambda m, x: m.w.expand(len(x)), w=nn.Parameter(torch.ones(1)))
    value, norms = ops.gradient_penalty(
        critic, torch.ones(3, 5), torch.ones(3, 5), weight=2.0, target=0.5, return_norms=True
    )
    assert float(value.detach()) == 0.5
    assert norms.tolist() == [0.0, 0.0, 0.0]
    value.backward()
    assert critic.w.grad.tolist() == [0.0]


def test_one_sided_counts_only_the_norms_above():
    critic = critics.Applied(
        lambda m, x: m.w * 0.5 * x.square().sum(1), w=nn.Parameter(torch.ones((), dtype=torch.float64))
    )
    real = torch.tensor([[0.5], [3.0], [1.0], [2.0]], dtype=torch.float64)
    value = ops.gradient_penalty(critic, real, real, kind="wgan-lp", weight=1.0)
    assert float(value.detach()) == (2**2 + 1**2) / 4
    value.backward()
    assert float(critic.w.grad) == 2 * (2 * 3 + 1 * 2) / 4


# Random numbers.


def test_the_points_are_on_segments_with_one_number_per_sample():
    critic, real, fake, _ = CRITICS["dcgan"].make(torch.float64)
    watched = Watched(critic)
    ops.gradient_penalty(critic, real, fake, kind="wgan-gp", generator=torch.Generator().manual_seed(3))
    seen = watched.other_than(real, fake)
    e = epsilon(real, torch.Generator().manual_seed(3))
    torch.testing.assert_close(seen, e * real + (1 - e) * fake)
    assert len(watched.inputs) == 1
    watched = Watched(critic)
    ops.gradient_penalty(critic, real, fake, kind="wgan-gp", epsilon=torch.tensor([0.0, 0.25, 1.0]).double())
    torch.testing.assert_close(watched.inputs[-1], torch.stack((fake[0], 0.25 * real[1] + 0.75 * fake[1], real[2])))


def test_dragan_stays_near_the_data():
    critic = nn.Linear(6, 1)
    real = 3 * torch.randn(4096, 6)
    watched = Watched(critic)
    ops.gradient_penalty(critic, real, kind="dragan")
    noise = watched.other_than(real) - real
    assert 0 < float(noise.abs().max()) <= 0.5 * float(real.std()) * 1.001
    assert float(noise.abs().max()) > 0.4 * float(real.std())
    assert abs(float(noise.mean())) < 0.5 * float(real.std())


@pytest.mark.parametrize("kind", ["wgan-gp", "dragan", "ar1"])
def test_generators(kind):
    critic, real, fake, _ = CRITICS["smooth_activations"].make()

    def value(seed):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return float(ops.gradient_penalty(critic, real, fake, kind=kind, generator=generator).detach())

    assert value(1) == value(1) != value(2)
    torch.manual_seed(5)
    first = value(None)
    assert value(None) != first
    torch.manual_seed(5)
    assert value(None) == first
    state = torch.get_rng_state()
    value(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_ar1_is_r1_in_expectation():
    """arXiv:2501.08316: weight (D(x + s n) - D(x))^2 is R1 of gamma = 2 s^2 weight, for small s."""
    critic = nn.Linear(8, 1).double()
    real = torch.randn(20000, 8, dtype=torch.float64)
    value = ops.gradient_penalty(critic, real, kind="ar1", weight=150.0, sigma=0.1)
    value.backward()
    w = critic.weight.detach()
    assert float(value.detach()) == pytest.approx(1.5 * float(w.square().sum()), rel=0.05)
    close(critic.weight.grad, 3 * w, 0.1, "gradient")


# Layouts, batches, dtypes.


@pytest.mark.parametrize("name", ["dcgan", "pooling", "upsampling", "group_norm", "published_r3gan"])
@pytest.mark.parametrize("form", ["channels_last", "strided"])
def test_layouts(name, form):
    results = []
    for layout in ("dense", form):
        critic, real, fake, context = CRITICS[name].make()
        if layout == "channels_last":
            critic, real, fake = (
                critic.to(memory_format=torch.channels_last),
                *(t.contiguous(memory_format=torch.channels_last) for t in (real, fake)),
            )
        elif layout == "strided":
            real, fake = (F.pad(t, (1, 2, 1, 0))[..., 1:, 1:-2] for t in (real, fake))
            assert not real.is_contiguous()
        generator = torch.Generator().manual_seed(1)
        value = ops.gradient_penalty(critic, real, fake, context=given(context), generator=generator)
        results.append((value.detach(), gradients(value, critics.named_parameters(critic))))
    close(results[1][0], results[0][0], 1e-5, "value")
    compare(results[1][1], results[0][1], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_eps_of_rms_norm_is_that_of_the_dtype(dtype):
    critic = nn.Sequential(nn.RMSNorm(6), nn.Linear(6, 1)).to(DTYPES[dtype])
    real = 1e-3 * torch.randn(4, 6, dtype=DTYPES[dtype])
    found = ops.gradient_penalty(critic, real, kind="r1")
    expected, _ = reference.gradient_penalty(critic, real, "r1", 10.0, 1.0)
    close(found.detach(), expected.detach(), TOLERANCE[DTYPES[dtype]], "value")
    named = dict(critic.named_parameters())
    compare(gradients(found, named), gradients(expected, named), TOLERANCE[DTYPES[dtype]])


def test_one_sample():
    critic, real, fake, _ = CRITICS["dcgan"].make(torch.float64)
    value = ops.gradient_penalty(critic, real[:1], kind="r1")
    close(value.detach(), reference.gradient_penalty(critic, real[:1], "r1", 10.0, 1.0)[0].detach(), 1e-10, "value")


def test_an_empty_batch_is_refused():
    """A mean over no samples is not a number."""
    critic, real, fake, _ = CRITICS["dcgan"].make()
    with pytest.raises(ValueError, match="real"):
        ops.gradient_penalty(critic, real[:0], fake[:0])


def wide(name):
    if name == "conv":
        layers = [
            nn.Conv2d(3, 32, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(32, 32, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
        ]
        return nn.Sequential(*layers, nn.Linear(512, 1))
    layers = [nn.Flatten(), nn.Linear(768, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 1))


@pytest.mark.parametrize("name", ["conv", "mlp"])
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_autocast(name, kind):
    critic, real, fake = wide(name), torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
    named = dict(critic.named_parameters())
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = ops.gradient_penalty(critic, real, fake, kind=kind, generator=torch.Generator().manual_seed(1))
        assert value.dtype == torch.float32
        results.append((value.detach(), gradients(value, named)))
    close(results[1][0], results[0][0], 5e-2, "value")
    for name, e in results[0][1].items():
        assert results[1][1][name].dtype == torch.float32
        close(results[1][1][name], e, 5e-2, name, 1e-6)


def test_autocast_where_dtypes_meet():
    """A residual sum of a bfloat16 branch and a float32 one, whose cotangents come back in float32."""

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.linear, self.out = (
                nn.Conv2d(3, 3, 3, padding=1),
                nn.Linear(192, 192),
                nn.Linear(192, 1),
            )

        def forward(self, x):
            h = (x + torch.tanh(self.convolution(x))).flatten(1)
            return self.out(h + torch.tanh(self.linear(h)))

    critic, real, fake = Residual(), torch.randn(8, 3, 8, 8), torch.randn(8, 3, 8, 8)
    named, results = dict(critic.named_parameters()), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            step = ops.critic_step(critic, real, fake, loss="minimax", penalty="r1")
        results.append(gradients(step.loss, named))
    for name, e in results[0].items():
        close(results[1][name], e, 5e-2, name, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_loss_scaling(penalty, dtype):
    """The recipe: the step in autocast, the scaler around its one loss; nothing of the penalty is scaled by hand."""
    torch.manual_seed(2)
    critic, real, fake = wide("conv"), torch.randn(8, 3, 16, 16), torch.randn(8, 3, 16, 16)
    named, results = dict(critic.named_parameters()), []
    for scale in (None, 1024.0):
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=scale is not None):
            step = ops.critic_step(
                critic, real, fake, loss="minimax", penalty=penalty, generator=torch.Generator().manual_seed(1)
            )
        scaler.scale(step.loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (scale or 1.0)
        results.append((step.loss.detach(), {k: p.grad.clone() for k, p in named.items()}))
    close(results[1][0], results[0][0], 5e-2, "loss")
    found, expected = (torch.cat([g.flatten() for g in r[1].values()]) for r in reversed(results))
    close(found, expected, 5e-2, "gradients")


# What can go wrong.


MLP = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1))
X = torch.ones(3, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.gradient_penalty(MLP, X, X, kind="wgan"), ValueError, r"kind.*'wgan'.*wgan-gp.*r1"),
        (lambda: ops.gradient_penalty(MLP, X, X, method="fast"), ValueError, r"method.*'fast'.*auto.*exact"),
        (lambda: ops.gradient_penalty(MLP, X), ValueError, "fake"),
        (lambda: ops.gradient_penalty(MLP, X, kind="r2"), ValueError, "fake"),
        (lambda: ops.gradient_penalty(MLP, X, X[:2]), ValueError, r"fake has shape \(2, 5\).*\(3, 5\)"),
        (lambda: ops.gradient_penalty(MLP, X, torch.ones(1, 5)), ValueError, r"fake has shape \(1, 5\).*\(3, 5\)"),
        (lambda: ops.gradient_penalty(MLP, X, X.double()), (TypeError, ValueError), r"fake has .*float64.*float32"),
        (lambda: ops.gradient_penalty(MLP, X.long(), X.long()), TypeError, r"real has dtype torch\.int64"),
        (lambda: ops.gradient_penalty(nn.Linear(5, 2), X, X), ValueError, r"critic.*\(3, 2\).*\(3,\)"),
        (lambda: ops.gradient_penalty(lambda x: MLP(x).mean(), X, X), ValueError, r"critic.*\(\).*\(3,\)"),
        (lambda: ops.gradient_penalty(lambda x: MLP(x)[:2], X, X), ValueError, r"critic.*\(2, 1\).*\(3,\)"),
        (lambda: ops.gradient_penalty(lambda x: (MLP(x),), X, X), TypeError, "critic.*tuple"),
        (lambda: ops.critic_step(MLP, X, X, loss="bce"), ValueError, r"loss.*'bce'.*hinge"),
        (lambda: ops.critic_step(MLP, X, X, penalty="gp"), ValueError, r"'gp'.*wgan-gp"),
        (lambda: ops.critic_step(MLP, X, X[:2]), ValueError, r"fake has shape \(2, 5\)"),
        (lambda: ops.critic_step(nn.Linear(5, 2), X, X), ValueError, r"critic.*, 2\).*one value per sample"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("where", ["data", "parameter"])
@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_not_a_number_is_told(where, kind):
    critic, real = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(3, 5)
    if where == "data":
        real[1, 2] = math.nan
    else:
        critic[0].weight.data[1, 2] = math.nan
    with pytest.raises((ValueError, RuntimeError, ArithmeticError), match="(?i)nan|finite"):
        ops.gradient_penalty(critic, real, real.clone(), kind=kind).backward()


@pytest.mark.parametrize("name", ["batch_norm", "minibatch_deviation"])
def test_coupled_samples_are_warned_of(name):
    critic, real, fake, _ = CRITICS[name].make()
    with pytest.warns(UserWarning, match="(?i)sample"):
        ops.gradient_penalty(critic, real, fake)


def test_no_warning_without_cause():
    for name in (
        "dcgan",
        "layer_norm",
        "attention_fused",
        "batch_norm_frozen",
        "group_norm",
        "projection",
        "spectral_norm",
    ):
        critic, real, fake, context = CRITICS[name].make()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.gradient_penalty(critic, real, fake, context=given(context)).backward()


@pytest.mark.parametrize("name", ["mlp_leaky_relu", "layer_norm"])
@pytest.mark.parametrize("what", ["penalty", "square", "step"])
def test_a_second_derivative_raises_or_is_right(name, what):
    """Of the penalty's own gradient; never a silent zero in its place."""
    critic, real, fake, _ = CRITICS[name].make(torch.float64)
    parameters = critics.parameters(critic)

    def second(value):
        first = torch.autograd.grad(value, parameters, create_graph=True, allow_unused=True)
        found = torch.autograd.grad(
            sum(g.square().sum() for g in first if g is not None), parameters, allow_unused=True
        )
        return {str(i): torch.zeros_like(p) if g is None else g for i, (p, g) in enumerate(zip(parameters, found))}

    value, _ = reference.gradient_penalty(critic, real, "r1", 10.0, 1.0)
    if what == "step":
        value = value + reference.CRITIC_LOSSES["minimax"](critic(real).flatten(), critic(fake).flatten())
    expected = second(value.square() if what == "square" else value)
    try:
        if what == "step":
            found = second(ops.critic_step(critic, real, fake, loss="minimax", penalty="r1").loss)
        else:
            value = ops.gradient_penalty(critic, real, kind="r1")
            found = second(value.square() if what == "square" else value)
    except (RuntimeError, NotImplementedError):
        return
    compare(found, expected, 1e-9)


# Using it.


def test_backward_scales_and_accumulates():
    critic, real, fake, _ = CRITICS["dcgan"].make(torch.float64)
    named = critics.named_parameters(critic)

    def value(seed):
        return ops.gradient_penalty(critic, real, fake, generator=torch.Generator().manual_seed(seed))

    one, two = (gradients(value(seed), named) for seed in (1, 2))
    (3 * value(1)).backward()
    value(2).backward()
    compare({k: p.grad for k, p in named.items()}, {k: 3 * one[k] + two[k] for k in named}, 1e-12)
    critic.zero_grad()
    both = value(1)
    (both - 2 * value(2) + critic(real).mean() * 0).backward(retain_graph=True)
    both.backward()
    compare({k: p.grad for k, p in named.items()}, {k: 2 * one[k] - 2 * two[k] for k in named}, 1e-12)


def test_every_parameter_in_use_gets_a_gradient():
    """The last bias has no part in the input's gradient; a missing gradient would stop distributed training."""
    critic, real, fake, _ = CRITICS["dcgan"].make()
    ops.gradient_penalty(critic, real, fake).backward()
    assert all(p.grad is not None for p in critic.parameters())


def test_without_gradients():
    critic, real, fake, _ = CRITICS["layer_norm"].make(torch.float64)
    expected, _ = reference.gradient_penalty(critic, real, "r1", 10.0, 1.0)
    with torch.no_grad():
        value = ops.gradient_penalty(critic, real, kind="r1")
    assert not value.requires_grad
    close(value, expected.detach(), 1e-10, "value")
    critic.requires_grad_(False)
    value = ops.gradient_penalty(critic, real, kind="r1")
    close(value, expected.detach(), 1e-10, "value")
    assert not value.requires_grad


@pytest.mark.parametrize("kind", ["wgan-gp", "dragan", "ar1"])
def test_points_may_be_given(kind):
    critic, real, fake, _ = CRITICS["layer_norm"].make(torch.float64)
    at = reference.penalty_points(real, fake, kind, torch.Generator().manual_seed(2))
    given, drawn = (
        ops.gradient_penalty(critic, real, fake, kind=kind, **options)
        for options in ({"points": at}, {"generator": torch.Generator().manual_seed(2)})
    )
    assert torch.equal(given, drawn)
    step = ops.critic_step(critic, real, fake, penalty=kind, points=at)
    close(step.penalty, given.detach(), 1e-12, "penalty")
    for points, message in (
        (at[:-1], r"points have shape \("),
        (at.float(), "and dtype torch.float32, expected those of real"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.gradient_penalty(critic, real, fake, kind=kind, points=points)
    for other in ("r1", "r1r2"):
        with pytest.raises(ValueError, match=f"'{other}' draws none, expected a penalty of wgan-gp"):
            ops.gradient_penalty(critic, real, fake, kind=other, points=at)
        with pytest.raises(ValueError, match=f"'{other}' draws none"):
            ops.critic_step(critic, real, fake, penalty=other, points=at)


def test_the_data_is_left_alone():
    critic, real, fake, _ = CRITICS["mlp_leaky_relu"].make()
    real.requires_grad_()
    ops.gradient_penalty(critic, real.detach(), fake).backward()
    assert real.grad is None
    assert not fake.requires_grad


def test_a_penalty_through_the_generator():
    """Gradients reach what made the fake samples."""
    critic, real, fake, _ = CRITICS["smooth_activations"].make(torch.float64)
    make = nn.Linear(5, 5).double()
    results = []
    for penalty in (ops.gradient_penalty, None):
        made, e = make(fake), epsilon(real, torch.Generator().manual_seed(1))
        if penalty is None:
            value = reference.gradient_penalty(critic, e * real + (1 - e) * made, "wgan-gp", 10.0, 1.0)[0]
        else:
            value = penalty(critic, real, made, generator=torch.Generator().manual_seed(1))
        results.append(gradients(value, dict(make.named_parameters())))
    compare(*results, 1e-10)


@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
def test_module(kind):
    critic, real, fake, context = CRITICS["projection"].make(torch.float64)
    module = genfast.nn.GradientPenalty(kind=kind, weight=2.0, target=0.5)
    torch.manual_seed(1)
    found = module(critic, real, fake, context=context)
    torch.manual_seed(1)
    expected = ops.gradient_penalty(critic, real, fake, kind=kind, weight=2.0, target=0.5, context=context)
    assert torch.equal(found, expected)
    assert kind in repr(module)


def test_lazy_regularisation():
    """Every fourth call counts four times, the first among them (StyleGAN2, arXiv:1912.04958, appendix B)."""
    critic, real, fake, _ = CRITICS["dcgan"].make(torch.float64)
    named = critics.named_parameters(critic)
    module = genfast.nn.GradientPenalty(kind="r1", weight=2.0, every=4)
    once = ops.gradient_penalty(critic, real, kind="r1", weight=2.0)
    calls = [module(critic, real) for _ in range(9)]
    assert [float(c) != 0 for c in calls] == [i % 4 == 0 for i in range(9)]
    expected = {k: 4 * g for k, g in gradients(once, named).items()}
    for c in calls[::4]:
        close(c.detach(), 4 * once.detach(), 1e-12, "value")
        compare(gradients(c, named), expected, 1e-12)
    (calls[1] + critic(real).mean()).backward()
    with pytest.raises(ValueError, match="every"):
        genfast.nn.GradientPenalty(every=0)


def test_explain_names_each_layer_and_its_rule():
    for name in ("dcgan", "layer_norm", "residual_in_place", "attention_fused", "unusual_functions"):
        critic, real, _, _ = CRITICS[name].make()
        text = genfast.explain(critic, real)
        for part, m in critic.named_modules():
            if not any(m.children()) and any(True for _ in m.parameters()):
                assert part in text
    assert isinstance(genfast.explain(CRITICS["dcgan"].make()[0]), str)
    assert "finite" in genfast.explain(
        nn.Sequential(nn.Linear(5, 8), critics.Function(opaque), nn.Linear(8, 1)), torch.randn(2, 5)
    )


# The critic step.


def expected_step(entry, loss, penalty, weight, target, critic, real, fake, context, fake_context, drawn=None, seed=1):
    """Adversarial loss and penalty apart, by autograd."""
    with sdpa_kernel(SDPBackend.MATH):
        r, f = critic(real, *context).flatten(), critic(fake, *fake_context).flatten()
        adversarial = loss(r, f) if callable(loss) else reference.CRITIC_LOSSES[loss](r, f)
        value = r.new_zeros(())
        for kind in ("r1", "r2") if penalty == "r1r2" else () if penalty is None else (penalty,):
            at = points(kind, real, fake, torch.Generator().manual_seed(seed), drawn)
            c = fake_context if kind == "r2" else context
            value = value + reference.gradient_penalty(critic, at, kind, weight, target, c)[0]
    return adversarial, value, r, f


def check_step(entry, loss, penalty, dtype=torch.float64, inputs=False, other_context=False, **options):
    weight, target = KINDS.get(penalty, (2.0, 1.0))
    if penalty == "wgan-lp":
        target = 0.05
    results = []
    for make in ("ours", "expected"):
        critic, real, fake, context = entry.make(dtype if make == "ours" else torch.float64)
        if (
            entry.advances and not entry.couples
        ):  # one pass for all would advance the power iteration less often than three
            for m in critics.modules(critic):
                m.eval()
        fake_context = tuple(c.flip(0) for c in context) if other_context else context
        named = leaves(critic, real, fake, context, inputs)
        torch.manual_seed(1)
        if make == "ours":
            other = given(fake_context) if other_context else None
            step = ops.critic_step(
                critic,
                real,
                fake,
                loss=loss,
                penalty=penalty,
                weight=weight,
                target=target,
                context=given(context),
                fake_context=other,
                generator=torch.Generator().manual_seed(1),
                **options,
            )
            close(step.loss.detach(), (step.adversarial + step.penalty).detach(), TOLERANCE[dtype], "sum")
            total, parts = step.loss, (step.adversarial, step.penalty, step.real_logits, step.fake_logits)
            assert step.real_logits.shape == step.fake_logits.shape == (len(real),)
            assert step.loss.dtype == dtype
        else:
            parts = expected_step(
                entry, loss, penalty, weight, target, critic, real, fake, context, fake_context, dtype
            )
            total = parts[0] + parts[1]
        results.append(([total.detach(), *(p.detach() for p in parts)], gradients(total, named)))
    (found, found_gradients), (expected, expected_gradients) = results
    scale = float(sum(e.abs().max() for e in expected))
    for name, f, e in zip(("loss", "adversarial", "penalty", "real_logits", "fake_logits"), found, expected):
        close(f, e, TOLERANCE[dtype], name, 0.1 * TOLERANCE[dtype] * scale)  # the loss is a difference
    compare(found_gradients, expected_gradients, TOLERANCE[dtype])


LOSSES = ("wasserstein", "hinge", "minimax", "lsgan", "relativistic")
PENALTIES = ("wgan-gp", "wgan-lp", "r1", "r2", "r1r2", "dragan", None)


@catalogue(without=("random",))
@pytest.mark.parametrize(
    ("loss", "penalty", "batching"),
    [("wasserstein", "wgan-gp", "together"), ("minimax", "r1", "apart"), ("relativistic", "r1r2", "together")],
)
@pytest.mark.filterwarnings("ignore")
def test_step_equals_loss_and_penalty_apart(entry, loss, penalty, batching):
    check_step(entry, loss, penalty, batching=batching)


@pytest.mark.parametrize("name", ["dcgan", "layer_norm", "projection", "minibatch_deviation"])
@pytest.mark.parametrize("batching", ["together", "apart"])
@pytest.mark.parametrize(("loss", "penalty"), list(itertools.product(LOSSES, PENALTIES)))
@pytest.mark.filterwarnings("ignore")
def test_step_with_each_loss_and_penalty(name, loss, penalty, batching):
    check_step(CRITICS[name], loss, penalty, inputs=True, batching=batching)


@pytest.mark.parametrize("name", ["mlp_leaky_relu", "dcgan", "group_norm", "published_r3gan", "batch_norm"])
@pytest.mark.parametrize(("loss", "penalty"), [("wasserstein", "wgan-gp"), ("hinge", "r1"), ("relativistic", "r1r2")])
@pytest.mark.filterwarnings("ignore")
def test_step_in_float32(name, loss, penalty):
    check_step(CRITICS[name], loss, penalty, dtype=torch.float32)


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r2", "r1r2"])
@pytest.mark.parametrize(
    "name", ["projection", "conditioned_by_concatenation", "modulated_by_context", "published_r3gan"]
)
def test_step_with_another_context_for_fake(name, penalty):
    check_step(CRITICS[name], "hinge", penalty, inputs=True, other_context=True)


@pytest.mark.parametrize("method", ["exact", "autograd"])
def test_step_by_other_methods(method):
    check_step(CRITICS["dcgan"], "minimax", "r1", method=method)


def test_step_with_a_loss_of_ones_own():
    def loss(real, fake):
        return (real - fake.mean()).square().mean() + torch.logsumexp(fake, 0)

    for penalty in ("wgan-gp", "r1", "r1r2"):
        check_step(CRITICS["dcgan"], loss, penalty)


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r1r2"])
@pytest.mark.parametrize("name", ["dropout", "dropout_of_channels", "random_leak"])
def test_step_of_a_random_critic_is_one_draw(name, penalty):
    """However many passes share a mask, the gradient is that of the value which those masks gave."""
    critic, real, fake, _ = CRITICS[name].make(torch.float64)
    named = leaves(critic, real, fake, (), False)
    direction = {k: torch.randn_like(p) for k, p in named.items()}

    def total():
        torch.manual_seed(1)
        return ops.critic_step(
            critic, real, fake, loss="minimax", penalty=penalty, generator=torch.Generator().manual_seed(1)
        ).loss

    slope = sum(float((g * direction[k]).sum()) for k, g in gradients(total(), named).items())
    ends, h = [], 1e-6
    for step in (h, -2 * h):
        with torch.no_grad():
            for k, p in named.items():
                p.add_(direction[k], alpha=step)
        ends.append(float(total().detach()))
    assert slope == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=2e-6)


@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r1r2"])
@catalogue("advances", without=("couples",))
def test_step_advances_the_state_once(entry, penalty):
    """A power iteration belongs to a forward pass, and a step is one: real, fake and interpolated samples meet one
    weight."""
    weight, target = 2.0, 1.0
    critic, real, fake, context = entry.make(torch.float64)
    generator = torch.Generator().manual_seed(1)
    step = ops.critic_step(
        critic,
        real,
        fake,
        loss="minimax",
        penalty=penalty,
        weight=weight,
        target=target,
        context=given(context),
        generator=generator,
        batching="together",
    )
    found, state = gradients(step.loss, critics.named_parameters(critic)), critics.buffers(critic)
    critic, real, fake, context = entry.make(torch.float64)
    parts = (
        [real, fake]
        if penalty != "wgan-gp"
        else [real, fake, points(penalty, real, fake, torch.Generator().manual_seed(1))]
    )
    x = torch.cat(parts).requires_grad_()
    d = critic(x, *(torch.cat([c] * len(parts)) for c in context)).flatten()
    (g,) = torch.autograd.grad(d.sum(), x, create_graph=True)
    norms = [p.flatten(1).norm(dim=1) for p in g.split(len(real))]
    r, f = d[: len(real)], d[len(real) : 2 * len(real)]
    value = {
        "wgan-gp": weight * (norms[-1] - target).square().mean(),
        "r1": weight / 2 * norms[0].square().mean(),
        "r1r2": weight / 2 * (norms[0].square().mean() + norms[1].square().mean()),
    }[penalty]
    total = value + reference.CRITIC_LOSSES["minimax"](r, f)
    close(step.loss.detach(), total.detach(), 1e-10, "loss")
    compare(found, gradients(total, critics.named_parameters(critic)), 1e-10)
    for a, b in zip(state, critics.buffers(critic)):
        close(a, b, 1e-10, "state")


# Not torch's own multi-head attention, which moves the batch axis, nor an index of row numbers, as GAN stability's:
# neither can be told from a coupling of samples.
APART = [
    "mlp_leaky_relu", "dcgan", "pooling", "residual_in_place", "prelu", "where_activation", "smooth_activations",
    "saturating_activations", "silu_convolutional", "layer_norm", "layer_norm_of_images", "group_norm", "instance_norm",
    "rms_norm", "dropout", "attention_by_products", "attention_fused", "sagan", "projection", "modulated_by_context",
    *(name for name in CRITICS if name.startswith("published") and name != "published_gan_stability"),
]  # fmt: skip


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_step_is_one_pass_where_samples_are_kept_apart(name, penalty):
    critic, real, fake, context = CRITICS[name].make()
    options = {"penalty": penalty, "context": given(context), "batching": "together"}
    ops.critic_step(critic, real, fake, **options)  # what is learnt of the critic is kept
    watched = Watched(critic)
    ops.critic_step(critic, real, fake, **options).loss.backward()
    assert [len(x) for x in watched.inputs] == [(3 if penalty == "wgan-gp" else 2) * len(real)]


def test_a_step_of_training():
    """WGAN-GP's step with Adam, ours beside double backward, for three iterations."""
    results = []
    for exactly in (False, True):
        critic, real, fake, _ = CRITICS["dcgan"].make(torch.float64)
        optimizer = torch.optim.Adam(critic.parameters(), 1e-2, (0.0, 0.9))
        for i in range(3):
            optimizer.zero_grad()
            if exactly:
                adversarial, value, _, _ = expected_step(
                    None, "wasserstein", "wgan-gp", 10.0, 1.0, critic, real, fake, (), (), seed=i
                )
                (adversarial + value).backward()
            else:
                ops.critic_step(critic, real, fake, generator=torch.Generator().manual_seed(i)).loss.backward()
            optimizer.step()
        results.append({k: p.detach() for k, p in critics.named_parameters(critic).items()})
    compare(*results, 1e-7)


def test_step_module():
    critic, real, fake, _ = CRITICS["dcgan"].make()
    module = genfast.nn.CriticStep(loss="minimax", penalty="r1", weight=2.0)
    found, expected = (
        module(critic, real, fake),
        ops.critic_step(critic, real, fake, loss="minimax", penalty="r1", weight=2.0),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


# torch.compile.


def compiled_equals_eager(function, critic, real, fake, backend, tolerance=1e-5):
    torch._dynamo.reset()
    named, results = critics.named_parameters(critic), []
    for f in (function, torch.compile(function, fullgraph=True, backend=backend)):
        torch.manual_seed(1)
        value = f(real, fake)
        results.append((value.detach(), gradients(value, named)))
    close(results[1][0], results[0][0], tolerance, "value")
    compare(results[1][1], results[0][1], tolerance)


@pytest.mark.parametrize("kind", ["wgan-gp", "r1"])
@pytest.mark.parametrize("name", ["mlp_leaky_relu", "dcgan", "layer_norm", "attention_fused"])
def test_compile_fullgraph(name, kind):
    critic, real, fake, _ = CRITICS[name].make()
    fixed = real if kind == "r1" else fake  # equal ends: every point between them is the same
    compiled_equals_eager(
        lambda r, f: ops.gradient_penalty(critic, r, f, kind=kind) * 2, critic, fixed, fixed.clone(), "aot_eager"
    )


def test_compile_draws_new_points():
    torch._dynamo.reset()
    critic, real, fake, _ = CRITICS["mlp_leaky_relu"].make()
    compiled = torch.compile(lambda r, f: ops.gradient_penalty(critic, r, f), fullgraph=True, backend="aot_eager")
    assert len({float(compiled(real, fake).detach()) for _ in range(4)}) > 1


@pytest.mark.parametrize(("loss", "penalty"), [("wasserstein", "wgan-gp"), ("minimax", "r1"), ("relativistic", "r1r2")])
def test_compile_a_whole_step(loss, penalty):
    critic, real, fake, _ = CRITICS["dcgan"].make()
    fake = real.clone() if penalty == "wgan-gp" else fake

    def step(r, f):
        found = ops.critic_step(critic, r, f, loss=loss, penalty=penalty)
        return found.loss + 0 * found.real_logits.sum().detach()

    compiled_equals_eager(step, critic, real, fake, "aot_eager")


@pytest.mark.slow
def test_compile_a_whole_step_with_inductor():
    critic, real, fake, _ = CRITICS["dcgan"].make()
    compiled_equals_eager(
        lambda r, f: ops.critic_step(critic, r, f, loss="minimax", penalty="r1").loss, critic, real, fake, "inductor"
    )
