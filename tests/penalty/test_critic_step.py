"""What joins batches or not, finite differences, outputs of other forms, penalties of one's own, and norms with
gradients."""

from __future__ import annotations

import copy
import functools
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import genfast
from genfast import ops

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*couples the samples")


def data(n=6, seed=0, shape=(8,)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *shape, dtype=D, generator=generator), torch.randn(
        n, *shape, dtype=D, generator=generator
    ) + 1


def gradient(value, module):
    found = torch.autograd.grad(value, list(module.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(module.parameters(), found)]
    )


def input_gradient(critic, x, *context, take=lambda d: d):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(take(critic(x, *context)).sum(), x, create_graph=True)[0]


def wgan_gp(critic, x, take=lambda d: d, weight=10.0):
    return weight * (input_gradient(critic, x, take=take).flatten(1).norm(dim=1) - 1).square().mean()


def plain_step(critic, real, fake, at, penalised="wgan-gp"):
    loss = F.softplus(critic(fake)).mean() + F.softplus(-critic(real)).mean()
    if penalised == "r1":
        return loss + 5 * input_gradient(critic, real).square().flatten(1).sum(1).mean()
    return loss + wgan_gp(critic, at)


def assert_equal(found, expected, module, tolerance=1e-10):
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=tolerance)
    a, b = gradient(found, module), gradient(expected, module)
    assert float((a - b).norm()) <= tolerance * float(b.norm())


class Body(nn.Module):
    """A critic whose hidden layer goes through ``between``, a method that samples may meet in."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.o = nn.Linear(8, width), nn.Linear(width, 1)
        self.double()

    def between(self, h):
        return h

    def forward(self, x):
        return self.o(self.between(self.a(x).tanh()))


class DetachedMean(Body):
    def between(self, h):
        with torch.no_grad():
            mean = h.mean(0)
        return h - mean


class Item(Body):
    def between(self, h):
        return h * (1 + h.abs().mean().item())


class Length(Body):
    def between(self, h):
        return h * len(h) / 4


class Shape(Body):
    def forward(self, x):
        n, _ = x.shape
        return super().forward(x) * n**0.5


class MaskOfTheMean(Body):
    def between(self, h):
        return h * (h > h.mean(0)).to(h.dtype)


class RawData(Body):
    def between(self, h):
        return h / h.data.norm()


class FirstSample(Body):
    def between(self, h):
        return h - h.detach()[:1]


class Numpy(Body):
    def between(self, h):
        return h * float(h.detach().numpy().std())


class Branch(Body):
    """Samples meet only in data that come later."""

    def between(self, h):
        return h / h.detach().abs().mean() if bool((h > 0.99).any()) else h


class Switched(Body):
    """Its record changes after the first call."""

    centred = False

    def between(self, h):
        return h - h.mean(0).detach() if self.centred else h


COUPLED = [DetachedMean, Item, Length, Shape, MaskOfTheMean, RawData, FirstSample, Numpy]


@pytest.mark.parametrize("kind", COUPLED, ids=lambda c: c.__name__)
@pytest.mark.parametrize("batching", ["auto", "apart", "together"])
@pytest.mark.filterwarnings("ignore:.*batching='together'")
def test_real_and_fake_meet_in_no_batch_that_changes_them(kind, batching):
    """Three calls, since what is learnt in the first serves the others; the first has equal real and fake samples."""
    critic = kind()
    for seed in (0, 1, 2):
        real, fake = data(seed=seed)
        fake = real.clone() if seed == 0 else fake
        step = ops.critic_step(critic, real, fake, loss="minimax", points=real, batching=batching)
        assert_equal(step.loss, plain_step(critic, real, fake, real), critic)


@pytest.mark.parametrize("batching", ["auto", "together"])
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", None])
@pytest.mark.filterwarnings("ignore:.*batching='together'")
def test_a_record_that_changes_is_compared_again(batching, penalty):
    switched, branch = Switched(), Branch()
    for i in range(4):
        real, fake = data(seed=i)
        switched.centred = i >= 2
        big = 1.0 if i < 2 else 20.0
        points = {"points": real} if penalty == "wgan-gp" else {}
        for critic, scale in ((switched, 1.0), (branch, big)):
            r, f = scale * real, scale * fake
            points = {"points": r} if penalty == "wgan-gp" else {}
            found = ops.critic_step(critic, r, f, loss="minimax", penalty=penalty, batching=batching, **points).loss
            expected = F.softplus(critic(f)).mean() + F.softplus(-critic(r)).mean()
            if penalty:
                expected = plain_step(critic, r, f, r, penalty)
            assert_equal(found, expected, critic)


def test_together_says_why_it_is_not_followed():
    real, fake = data()
    for kind, why in ((DetachedMean, "mean"), (Length, "one batch of all samples differ"), (Item, "item")):
        critic = kind()
        with pytest.warns(
            UserWarning, match=rf"critic_step: batching='together' is not followed for this critic: .*{why}"
        ):
            ops.critic_step(critic, real, fake, points=real, batching="together")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.critic_step(critic, real, fake, points=real, batching="together")


def sizes(critic, *calls, **options):
    """The batch sizes of the critic's passes in the last of some equal steps."""
    seen = []
    handle = critic.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    real, fake = data()
    for _ in range(3):
        seen.clear()
        ops.critic_step(critic, real, fake, points=real, **options)
    handle.remove()
    return seen


@pytest.mark.parametrize(("batching", "expected"), [("apart", [6, 6, 6]), ("auto", [12, 6]), ("together", [18])])
def test_batches_of_a_critic_that_keeps_samples_apart(batching, expected):
    assert sizes(Body(), batching=batching) == expected


def test_auto_joins_nothing_in_a_critic_that_a_pass_changes():
    class Counting(Body):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    dropped = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1)).double()
    normed = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 16)), nn.Linear(16, 1)).double()
    for critic in (dropped, normed, Counting()):
        assert sizes(critic) == [6, 6, 6]
    assert sizes(dropped, batching="together") == [18]
    assert sizes(dropped.eval()) == [12, 6]


class Noise(nn.Module):
    """Draws from each kind of generator."""

    def forward(self, x):
        return x + torch.randn_like(x) * random.uniform(0.5, 1)


@pytest.mark.parametrize(
    "layer", [lambda: nn.Dropout(0.5), lambda: nn.RReLU(), Noise], ids=["dropout", "rrelu", "noise"]
)
@pytest.mark.parametrize("batching", ["auto", "apart"])
def test_the_same_seed_draws_what_plain_code_draws(layer, batching):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(8, 16), layer(), nn.Tanh(), nn.Linear(16, 1)).double()
    for i in range(3):
        real, fake = data(seed=i)
        results = []
        for ours in (True, False):
            torch.manual_seed(i), random.seed(i)
            if ours:
                found = ops.critic_step(critic, real, fake, loss="minimax", batching=batching).loss
            else:
                e = torch.rand(6, dtype=D).view(-1, 1)
                loss = F.softplus(-critic(real)).mean()
                found = loss + F.softplus(critic(fake)).mean() + wgan_gp(critic, e * real + (1 - e) * fake)
            results.append((found, torch.get_rng_state(), random.getstate()))
        assert_equal(results[0][0], results[1][0], critic)
        assert torch.equal(results[0][1], results[1][1])
        assert results[0][2] == results[1][2]


# Finite differences.


def finite_difference_critics():
    def made(*layers):
        torch.manual_seed(1)
        return nn.Sequential(*layers).double()

    old = torch.nn.utils.spectral_norm
    new = nn.utils.parametrizations.spectral_norm
    yield "batch norm", made(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    yield "dropout", made(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 1))
    yield "spectral norm", made(new(nn.Linear(8, 32)), nn.Tanh(), nn.Linear(32, 1))
    yield "older spectral norm", made(old(nn.Linear(8, 32)), nn.Tanh(), old(nn.Linear(32, 1)))


@pytest.mark.parametrize(
    ("name", "critic"), list(finite_difference_critics()), ids=lambda v: v if isinstance(v, str) else ""
)
@pytest.mark.parametrize("around", [None, "lambda", "partial", "method"])
def test_finite_differences_of_critics_with_state(name, critic, around):
    """The same value, gradient and state as one plain pass leaves."""
    ours, plain = copy.deepcopy(critic), copy.deepcopy(critic)
    called = {None: ours, "lambda": lambda x: ours(x), "partial": functools.partial(ours), "method": ours.forward}[
        around
    ]
    real, fake = data(10)
    for seed in (0, 1):
        torch.manual_seed(seed)
        found = ops.critic_step(called, real, fake, loss="minimax", points=real, method="finite-difference").loss
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        expected = F.softplus(-plain(real)).mean() + F.softplus(plain(fake)).mean() + wgan_gp(plain, real)
        a, b = gradient(found, ours), gradient(expected, plain)
        assert float((a - b).norm()) <= 1e-6 * float(b.norm())
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        assert torch.equal(state, torch.get_rng_state())
        for mine, theirs in zip(ours.buffers(), plain.buffers()):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_finite_differences_leave_other_graphs_alone():
    """A loss made of the same critic beforehand, whose graph keeps the running statistics."""
    critic = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1)).double()
    real, fake = data()
    context = torch.randn(6, 8, dtype=D, requires_grad=True)
    scaled = context * 2
    for method in ("finite-difference", "auto"):
        loss = critic(fake).mean() - critic(real).mean()
        penalty = ops.gradient_penalty(lambda x, c: critic(x + c), real, fake, context=scaled, method=method)
        (g,) = torch.autograd.grad(penalty, scaled, retain_graph=True)
        (loss + penalty + scaled.sum()).backward(retain_graph=True)
        torch.testing.assert_close(context.grad, 2 * (g + 1))
        context.grad = None


def test_finite_differences_of_a_critic_that_does_not_repeat_itself():
    real, fake = data()
    hidden = iter(range(1, 1000))
    module = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with pytest.raises(
        RuntimeError, match=r"gradient_penalty: finite differences need a critic that repeats its outputs"
    ):
        ops.gradient_penalty(lambda x: module(x) * next(hidden), real, fake, method="finite-difference")


@pytest.mark.parametrize("around", ["lambda", "module"])
def test_a_missing_second_derivative_is_met_with_finite_differences(around):
    """hardsigmoid has none on CPUs."""
    module = nn.Sequential(nn.Linear(8, 16), nn.Hardsigmoid(), nn.Linear(16, 1)).double()
    smooth = nn.Sequential(module[0], nn.Hardtanh(-3, 3), module[2])
    real, fake = data()
    critic = module if around == "module" else lambda x: module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [ops.gradient_penalty(critic, real, fake, points=real) for _ in range(2)]
        step = ops.critic_step(critic, real, fake, points=real, loss="minimax")
    expected = wgan_gp(lambda x: smooth[2](smooth[1](smooth[0](x)) / 6 + 0.5), real)
    for value in found:
        assert_equal(value, expected, module, 1e-6)
    assert_equal(step.loss, F.softplus(-module(real)).mean() + F.softplus(module(fake)).mean() + expected, module, 1e-6)


# Outputs.


class Heads(Body):
    def __init__(self, form):
        super().__init__()
        torch.manual_seed(4)
        self.classes, self.form = nn.Linear(16, 3).double(), form

    def forward(self, x):
        h = self.a(x).tanh()
        source, classes = self.o(h), self.classes(h)
        if self.form == "dict":
            return {"source": source, "classes": classes}
        if self.form == "object":
            return torch.return_types.max((source, classes))
        return (source, classes) if self.form == "tuple" else [classes, source]


@pytest.mark.parametrize(
    ("form", "output"),
    [
        ("tuple", 0),
        ("tuple", -2),
        ("list", 1),
        ("dict", "source"),
        ("object", "values"),
        ("tuple", lambda o: o[0]),
        ("dict", lambda o: o["source"].squeeze(1)),
    ],
)
@pytest.mark.parametrize("method", ["auto", "autograd", "finite-difference"])
def test_outputs_of_other_forms(form, output, method):
    critic = Heads(form)
    plain = Heads("tuple")
    plain.load_state_dict(critic.state_dict())
    real, fake = data()

    def first(x):
        return plain(x)[0]

    found = ops.gradient_penalty(critic, real, fake, points=real, output=output, method=method)
    step = ops.critic_step(critic, real, fake, points=real, output=output, method=method, loss="minimax")
    tolerance = 1e-6 if method == "finite-difference" else 1e-10
    for value, expected in ((found, wgan_gp(first, real)), (step.loss, plain_step(first, real, fake, real))):
        a, b = gradient(value, critic), gradient(expected, plain)
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
        assert float((a - b).norm()) <= tolerance * float(b.norm())


class Patches(nn.Module):
    """A PatchGAN: (N, 1, 3, 3); with ``scales`` also a second map, of another size."""

    def __init__(self, norm=False, scales=False):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Conv2d(2, 4, 3, 2, 1), nn.Conv2d(4, 1, 2)
        self.norm = nn.BatchNorm2d(4) if norm else nn.InstanceNorm2d(4)
        self.scales = scales
        self.double()

    def forward(self, x):
        h = self.b(F.softplus(self.norm(self.a(x))))
        return [h, F.avg_pool2d(h, 2)] if self.scales else h


def patchwise(real, fake):
    return 0.5 * (real - 1).square().mean() + 0.5 * fake.square().mean()


@pytest.mark.parametrize("patches", ["sum", "mean"])
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1", "r2", "r1r2"])
@pytest.mark.parametrize("batching", ["auto", "apart", "together"])
@pytest.mark.parametrize("norm", [False, True], ids=["instance", "batch"])
@pytest.mark.filterwarnings("ignore:.*batching='together'")
def test_patches(patches, penalty, batching, norm):
    """The penalty on the sum or mean of a sample's patches; the loss of each patch."""
    critic = Patches(norm)
    real, fake = data(4, shape=(2, 8, 8))
    real.requires_grad_()

    def take(d):
        return d.flatten(1).sum(1) if patches == "sum" else d.flatten(1).mean(1)

    def r1(x):
        x = x if x.requires_grad else x.detach().requires_grad_()
        (g,) = torch.autograd.grad(take(critic(x)).sum(), x, create_graph=True)
        return 5 * g.square().flatten(1).sum(1).mean()

    points = {"points": 0.5 * (real + fake).detach()} if penalty == "wgan-gp" else {}
    for _ in range(2):
        step = ops.critic_step(
            critic, real, fake, loss="lsgan", penalty=penalty, patches=patches, batching=batching, **points
        )
        assert step.real_logits.shape == (4, 1, 3, 3)
        alone = ops.gradient_penalty(critic, real, fake, kind=penalty, patches=patches, **points)
        if penalty == "wgan-gp":
            expected = wgan_gp(critic, points["points"], take)
        else:
            expected = sum(r1(x) for name, x in (("r1", real), ("r2", fake)) if name in penalty or penalty == "r1r2")
        assert_equal(alone, expected, critic)
        total = expected + patchwise(critic(real), critic(fake))
        assert_equal(step.loss, total, critic)
        a, b = (torch.autograd.grad(v, real, retain_graph=True)[0] for v in (step.loss, total))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "autograd", "finite-difference"])
def test_patches_of_several_scales(method):
    critic = Patches(scales=True)
    real, fake = data(4, shape=(2, 8, 8))
    found = ops.gradient_penalty(critic, real, fake, points=real, patches="sum", method=method)
    expected = wgan_gp(critic, real, lambda d: sum(s.flatten(1).sum(1) for s in d))
    assert_equal(found, expected, critic, 1e-6 if method == "finite-difference" else 1e-10)


def test_ar1_of_patches():
    critic = Patches()
    real, fake = data(4, shape=(2, 8, 8))
    found = ops.gradient_penalty(critic, real, kind="ar1", points=fake, patches="sum", weight=3.0)
    assert_equal(found, 3 * (critic(real) - critic(fake)).flatten(1).sum(1).square().mean(), critic)


# Penalties of one's own.


def wgan_div(g):
    return g.flatten(1).square().sum(1) ** 3


def l_infinity(g):
    return (g.flatten(1).abs().amax(1) - 0.1).clamp(min=0).square()


def by_pixel(g):
    return (g.norm(dim=1) - 1).square().flatten(1).mean(1)


def whole_batch(g):
    return g.flatten(1).norm(dim=1).var() + g.sum().square()


OWN = [wgan_div, l_infinity, by_pixel, whole_batch]


def own_expected(function, critic, batches, weight):
    total = 0
    for x in batches:
        total = total + weight * function(input_gradient(critic, x)).mean()
    return total


@pytest.mark.parametrize("function", OWN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["exact", "autograd", "finite-difference"])
def test_a_penalty_of_ones_own(function, method):
    critic = nn.Sequential(nn.Conv2d(2, 4, 3, 2, 1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 1)).double()
    real, fake = data(5, shape=(2, 8, 8))
    tolerance = 1e-6 if method == "finite-difference" else 1e-10
    found = ops.gradient_penalty(critic, real, fake, points=real, penalty=function, method=method)
    assert_equal(found, own_expected(function, critic, [real], 1.0), critic, tolerance)
    found = ops.gradient_penalty(critic, real, fake[:3], kind="r1r2", penalty=function, weight=2.5, method=method)
    assert_equal(found, own_expected(function, critic, [real, fake[:3]], 2.5), critic, tolerance)
    for batching in ("apart", "together"):
        step = ops.critic_step(
            critic, real, fake, loss="minimax", penalty=function, kind="r1r2", batching=batching, method=method
        )
        expected = F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()
        assert_equal(step.loss, expected + own_expected(function, critic, [real, fake], 1.0), critic, tolerance)


@pytest.mark.parametrize("method", ["exact", "autograd", "finite-difference"])
def test_a_multiplier_in_a_penalty_is_learnt(method):
    critic, multiplier = Body(), nn.Parameter(torch.tensor(0.7, dtype=D))
    real, fake = data()

    def penalty(g):
        return multiplier * (g.norm(dim=1) - 1).square()

    expected = multiplier * wgan_gp(critic, real, weight=1.0)
    for value in (
        ops.gradient_penalty(critic, real, fake, points=real, penalty=penalty, method=method),
        ops.critic_step(critic, real, real, points=real, penalty=penalty, method=method).loss,
    ):
        assert_equal(value, expected, critic, 1e-6)
        a, b = (torch.autograd.grad(v, multiplier, retain_graph=True)[0] for v in (value, expected))
        torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


@pytest.mark.parametrize("batching", ["apart", "together"])
@pytest.mark.parametrize("method", ["exact", "autograd"])
def test_what_a_loss_of_ones_own_uses_is_learnt(batching, method):
    critic, scale = Body(), nn.Parameter(torch.tensor(1.7, dtype=D))
    real, fake = data()

    def loss(r, f):
        return F.softplus(-scale * r).mean() + F.softplus(scale * f).mean()

    found = ops.critic_step(critic, real, fake, loss=loss, points=real, batching=batching, method=method).loss
    expected = loss(critic(real), critic(fake)) + wgan_gp(critic, real)
    assert_equal(found, expected, critic)
    a, b = (torch.autograd.grad(v, scale, retain_graph=True)[0] for v in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=0)


# Norms.


@pytest.mark.parametrize("method", ["exact", "autograd", "finite-difference"])
@pytest.mark.parametrize("kind", ["wgan-gp", "r1r2"])
@pytest.mark.parametrize("layer", ["plain", "dropout", "spectral norm", "batch norm"])
def test_norms_carry_a_gradient(method, kind, layer):
    torch.manual_seed(2)
    first, between = (
        nn.Linear(8, 16),
        {"dropout": nn.Dropout(0.4), "batch norm": nn.BatchNorm1d(16)}.get(layer, nn.Identity()),
    )
    if layer == "spectral norm":
        first = nn.utils.parametrizations.spectral_norm(first)
    ours = nn.Sequential(first, between, nn.Tanh(), nn.Linear(16, 1)).double()
    plain = copy.deepcopy(ours)
    real, fake = data()
    real.requires_grad_()
    points = {"points": real} if kind == "wgan-gp" else {}
    torch.manual_seed(0)
    value, norms = ops.gradient_penalty(
        ours, real, fake, kind=kind, return_norms=True, method=method, weight=2.0, **points
    )
    before = [b.clone() for b in ours.buffers()], torch.get_rng_state()
    found = 0.3 * value + (norms - 0.5).square().sum() + norms.var()
    a, a_x = gradient(found, ours), torch.autograd.grad(found, real, retain_graph=True)[0]
    assert all(map(torch.equal, before[0], ours.buffers()))
    assert torch.equal(before[1], torch.get_rng_state())
    torch.manual_seed(0)
    parts = []
    for x in [real] if kind == "wgan-gp" else [real, fake]:
        x = x if x.requires_grad else x.detach().requires_grad_()
        parts.append(torch.autograd.grad(plain(x).sum(), x, create_graph=True)[0].norm(dim=1))
    norms = torch.cat(parts)
    value = 2 * (norms - 1).square().mean() if kind == "wgan-gp" else sum(p.square().mean() for p in parts)
    expected = 0.3 * value + (norms - 0.5).square().sum() + norms.var()
    tolerance = 1e-6 if method == "finite-difference" else 1e-10
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    b, b_x = gradient(expected, plain), torch.autograd.grad(expected, real)[0]
    assert float((a - b).norm()) <= tolerance * float(b.norm())
    assert float((a_x - b_x).norm()) <= tolerance * float(b_x.norm())


def test_norms_in_other_modes():
    critic = Body()
    real, fake = data()
    _, norms = ops.gradient_penalty(critic, real, fake, return_norms="detached")
    assert not norms.requires_grad
    with torch.no_grad():
        assert not ops.gradient_penalty(critic, real, fake, return_norms=True)[1].requires_grad
    _, norms = ops.gradient_penalty(critic, real, fake, return_norms=True)
    with torch.no_grad():
        critic.a.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        norms.sum().backward()


# torch.compile, and modules.


@pytest.mark.parametrize("what", ["penalty and output", "patches and norms"])
def test_compile_the_new_arguments(what):
    torch._dynamo.reset()
    critic = Patches() if what == "patches and norms" else Heads("dict")
    real, fake = data(4, shape=(2, 8, 8)) if what == "patches and norms" else data()

    def value(r, f):
        if what == "patches and norms":
            penalty, norms = ops.gradient_penalty(critic, r, f, points=r, patches="sum", return_norms="detached")
            return penalty + norms.sum()
        options = {"penalty": whole_batch, "output": "source", "points": r}
        return (
            ops.gradient_penalty(critic, r, f, **options)
            + ops.critic_step(critic, r, f, loss="minimax", **options).loss
        )

    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    assert_equal(compiled(real, fake), value(real, fake), critic)


def test_compile_refuses_or_runs_what_no_graph_holds():
    torch._dynamo.reset()
    critic, multiplier = Body(), nn.Parameter(torch.ones((), dtype=D))
    real, fake = data()

    def norms(r, f):
        value, norms = ops.gradient_penalty(critic, r, f, points=r, return_norms=True)
        return value + norms.var()

    assert_equal(torch.compile(norms, backend="eager")(real, fake), norms(real, fake), critic)
    torch._dynamo.reset()  # else the graphs that were made just now serve
    with pytest.raises(Exception, match="whose norms carry a gradient"):
        torch.compile(norms, backend="eager", fullgraph=True)(real, fake)

    def learnt(g):
        return multiplier * g.norm(dim=1)

    compiled = torch.compile(lambda r, f: ops.gradient_penalty(critic, r, f, points=r, penalty=learnt), backend="eager")
    with pytest.raises(Exception, match="penalty depends on tensors that require a gradient"):
        compiled(real, fake)

    def loss(r, f):
        return multiplier * (f.mean() - r.mean())

    compiled = torch.compile(lambda r, f: ops.critic_step(critic, r, f, points=r, loss=loss).loss, backend="eager")
    with pytest.raises(Exception, match="loss depends on tensors that require a gradient"):
        compiled(real, fake)


def test_modules_take_the_same_arguments():
    critic, patched = Heads("tuple"), Patches()
    real, fake = data()
    module = genfast.nn.GradientPenalty("r1", penalty=wgan_div, output=0, every=2)
    found = module(critic, real)
    assert torch.equal(found, ops.gradient_penalty(critic, real, kind="r1", penalty=wgan_div, output=0, weight=2.0))
    assert float(module(critic, real)) == 0
    images = data(3, shape=(2, 8, 8))
    module = genfast.nn.CriticStep("lsgan", wgan_div, kind="r1r2", patches="sum", batching="apart")
    step = module(patched, *images)
    expected = ops.critic_step(patched, *images, loss="lsgan", penalty=wgan_div, kind="r1r2", patches="sum")
    torch.testing.assert_close(step.loss, expected.loss)
    lazy = genfast.nn.CriticStep("minimax", every=2)
    results = [lazy(Body(), real, fake, points=real) for _ in range(2)]
    assert [r.penalty.item() > 0 for r in results] == [True, False]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1"])
def test_values_without_gradients(mode, penalty):
    critic = Body()
    real, fake = data()
    points = {"points": real} if penalty == "wgan-gp" else {}
    expected = ops.critic_step(critic, real, fake, loss="minimax", penalty=penalty, **points).loss
    for batching in ("auto", "together"):
        with mode():
            found = ops.critic_step(
                critic, real, fake, loss="minimax", penalty=penalty, batching=batching, **points
            ).loss
        assert not found.requires_grad
        torch.testing.assert_close(found.clone(), expected.detach())


# Errors.

TUPLE, PATCH, X = Heads("tuple"), Patches(), torch.ones(3, 8, dtype=D)
IMAGES = torch.ones(3, 2, 8, 8, dtype=D)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda op: op(TUPLE, X, X), TypeError, r"critic returned a tuple.*output="),
        (lambda op: op(Heads("dict"), X, X), TypeError, r"critic returned a dict.*output="),
        (lambda op: op(TUPLE, X, X, output=2), ValueError, r"output=2.*tuple of 2"),
        (lambda op: op(TUPLE, X, X, output="source"), TypeError, r"output='source' is a key.*tuple"),
        (lambda op: op(Heads("dict"), X, X, output="src"), ValueError, r"output='src'.*\['classes', 'source'\]"),
        (lambda op: op(Heads("dict"), X, X, output=0), TypeError, r"output=0 is an index.*dict"),
        (lambda op: op(Body(), X, X, output=0), TypeError, r"output=0 is an index.*Tensor"),
        (lambda op: op(TUPLE, X, X, output=True), TypeError, "output is a bool"),
        (lambda op: op(TUPLE, X, X, output=lambda o: o), TypeError, "critic returned a tuple"),
        (lambda op: op(PATCH, IMAGES, IMAGES), ValueError, r"\(3, 1, 3, 3\).*\(3,\).*patches='sum'.*output="),
        (
            lambda op: op(PATCH, IMAGES, IMAGES, patches="max"),
            ValueError,
            "patches='max', expected one of 'sum', 'mean'",
        ),
        (lambda op: op(Body(), X, X, penalty=lambda g: 1.0), TypeError, "penalty returned a float"),
        (lambda op: op(Body(), X, X, penalty=lambda g: g), ValueError, r"penalty returned shape \(3, 8\).*\(3,\)"),
        (lambda op: op(Body(), X, X, penalty=lambda g: g.detach().sum()), ValueError, "penalty does not depend"),
        (lambda op: op(Body(), X, X, penalty=3), TypeError, "penalty is a int"),
        (lambda op: op(Body(), X, X, penalty=wgan_div, kind="ar1"), ValueError, "'ar1' takes no gradient"),
        (
            lambda op: op(nn.Linear(8, 1, dtype=D), X, X, penalty=lambda g: (g - g).square().sum(1).sqrt()),
            FloatingPointError,
            "derivative of penalty",
        ),
        (lambda op: op(Body(), X, X, epsilon=torch.ones(2)), ValueError, r"epsilon has shape \(2,\), expected.*\(3,\)"),
        (lambda op: op(Body(), X, X, epsilon=torch.ones(3, 8)), ValueError, r"epsilon has shape \(3, 8\).*points="),
        (lambda op: op(Body(), X, X, epsilon=torch.ones(3).long()), TypeError, "epsilon has dtype torch.int64"),
        (lambda op: op(Body(), X, X, points=X[:2]), ValueError, r"points have shape \(2, 8\)"),
        (lambda op: op(Body(), X, X, weight=nn.Parameter(torch.ones(()))), ValueError, "weight requires a gradient"),
    ],
)
@pytest.mark.parametrize("op", ["gradient_penalty", "critic_step"])
def test_errors_name_the_argument(op, call, error, message):
    with pytest.raises(error, match=f"(?s){op}: .*{message}"):
        call(getattr(ops, op))


def test_errors_of_each():
    with pytest.raises(ValueError, match="critic_step: fake has 1 samples and real 3, and loss='relativistic'"):
        ops.critic_step(Body(), X, X[:1], loss="relativistic", penalty="r1")
    with pytest.raises(RuntimeError, match=r"critic_step: the critic raised for fake of shape \(3, 7\).*mat1"):
        ops.critic_step(Body(), X, X[:, :7], penalty="r1")
    with pytest.raises(RuntimeError, match=r"gradient_penalty: the critic raised for samples of shape \(3, 7\)"):
        ops.gradient_penalty(Body(), X, X[:, :7], kind="r1r2")
    with pytest.raises(ValueError, match="loss does not depend"):
        ops.critic_step(Body(), X, X, loss=lambda r, f: r.new_ones(()))
    with pytest.raises(ValueError, match="kind='r1' is where a penalty of your own.*penalty='wgan-gp'"):
        ops.critic_step(Body(), X, X, kind="r1")
    with pytest.raises(ValueError, match="sigma=0"):
        ops.gradient_penalty(Body(), X, kind="ar1", sigma=0)
    with pytest.raises(ValueError, match="'dragan' interpolates nothing"):
        ops.gradient_penalty(Body(), X, kind="dragan", epsilon=torch.ones(3))
    with pytest.raises(ValueError, match="return_norms='all'"):
        ops.gradient_penalty(Body(), X, X, return_norms="all")
    with pytest.raises(TypeError, match="penalty is a int"):
        genfast.nn.GradientPenalty(penalty=1)
    with pytest.raises(ValueError, match="CriticStep: kind='r1'"):
        genfast.nn.CriticStep(kind="r1")
