"""The penalty on critics that do what people's critics do: equal to double backward, refused as it refuses, or told of.

Every critic here is called twice with the same seeds in plain code and by the op: value, gradients, buffers, Python
attributes and the generators afterwards must agree.
"""

# ruff: noqa: NPY002  critics draw from NumPy's global generator

from __future__ import annotations

import copy
import functools
import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import genfast
from genfast import ops, penalty
from genfast.penalty import autograd_rule
from genfast.penalty.state import State, facts

N, WIDTH = 6, 16


class Critic(nn.Module):
    """Three linear layers, and whatever a case adds, in a function of them and the input."""

    def __init__(self, function, **layers):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        self.calls = 0
        self.function = function
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x):
        self.calls += 1
        return self.function(self, x)


def seed(number=1):
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def flat(gradients, tensors):
    return torch.cat([torch.zeros_like(t).flatten() if g is None else g.flatten() for g, t in zip(gradients, tensors)])


def double_backward(critic, x, parameters):
    """(value, parameter gradient) in plain code."""
    at = x.detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(critic(at).sum(), at, create_graph=True)
    value = 10 * (g.flatten(1).norm(dim=1) - 1).square().mean()
    return value.detach(), flat(torch.autograd.grad(value, parameters, allow_unused=True), parameters)


def by_the_op(critic, x, parameters, **options):
    value = ops.gradient_penalty(critic, x, x, points=x, **options)
    return value.detach(), flat(torch.autograd.grad(value, parameters, allow_unused=True), parameters)


def trainable(module):
    return [p for p in module.parameters() if p.requires_grad]


def build(function, layers=dict, dtype=torch.float64):
    torch.manual_seed(0)
    return Critic(function, **layers()).to(dtype)


def inputs(dtype=torch.float64):
    return torch.randn(N, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def agree(critic, x, tolerance=1e-9, calls=2, wrap=lambda c: c, context=None, **options):
    """Runs both ways ``calls`` times from the same state."""
    plain = copy.deepcopy(critic)
    for call in range(calls):
        seed(call)
        with context() if context else torch.enable_grad():
            expected, e_gradient = double_backward(plain, x, trainable(plain))
        after = torch.rand(1), random.random(), np.random.rand()
        seed(call)
        with context() if context else torch.enable_grad():
            value, gradient = by_the_op(wrap(critic), x, trainable(critic), **options)
        assert (torch.rand(1), random.random(), np.random.rand()) == after, "the generators are elsewhere"
        assert float((value - expected).abs()) <= tolerance * float(expected.abs())
        assert float((gradient - e_gradient).norm()) <= tolerance * float(e_gradient.norm())
        for (name, a), b in zip(critic.named_buffers(), plain.buffers()):
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"buffer {name}: {m}")
        if hasattr(critic, "calls"):
            assert critic.calls == plain.calls


# What has rules, or calls that PyTorch differentiates: exact.


def rows_of_tanh(m, x):
    return m.a(x).tanh()


def recomputed(*layers, **options):
    """A checkpoint around these layers."""
    return (
        lambda m, x: m.out(checkpoint(m.inner, rows_of_tanh(m, x), use_reentrant=False, **options)),
        lambda: {"inner": nn.Sequential(*(layer() for layer in layers))},
    )


def square_of_weight(m, h):
    return F.hardswish(F.linear(h, m.b.weight.exp() * 0.1))


def normalised(activation):
    """In place after a norm that learns nothing, whose output its own rule keeps."""
    return (
        lambda m, x: m.out(activation(m.norm(m.b(m.a(x).sin())))),
        lambda: {"norm": nn.LayerNorm(WIDTH, elementwise_affine=False)},
    )


def assigned(m, x):
    h = m.a(x).clone()
    h[:, 2:5] = 2 * h[:, 5:8]
    h[:, 0] = 0
    h[h < -0.2] = 0.1
    rest = torch.zeros(N, WIDTH, dtype=x.dtype)
    rest[:, 3:] = h[:, :-3]
    rest[:, :3] = m.b.bias[:3]
    h[:, [1, 4]] = rest[:, :1]
    return m.out((h + rest).tanh())


def summed_up(m, x):
    total = torch.zeros(N, WIDTH, dtype=x.dtype)
    total += m.a(x).tanh()
    total.add_(m.b(m.a(x).sin()), alpha=0.5)
    factor = torch.ones(N, WIDTH, dtype=x.dtype)
    factor *= total
    factor.mul_(2).div_(3)
    place = torch.zeros_like(total)
    place.copy_(factor)
    return m.out(place.sin())


def draws_of_all(m, x):
    h = m.a(x) * random.random()
    return m.out(F.dropout(h, 0.4) + np.random.rand() * h.tanh())


def moving_centre(m, x):
    h = m.a(x) - m.buffer
    with torch.no_grad():
        m.buffer.mul_(0.9).add_(h.mean(0), alpha=0.1)
    return m.out(h.tanh())


def rebound(m, x):
    h = m.a(x) * m.buffer
    m.buffer = m.buffer + 1
    return m.out(h.tanh())


def no_out(m, x):
    h = F.normalize(torch.add(m.a(x), 1.0, out=None), dim=1, out=None)
    h = torch.cat([h[:, :8], h[:, 8:]], 1, out=None) * torch.norm(m.a(x), dim=1, keepdim=True)
    return m.out(torch.tensordot(h, m.b.weight, dims=([1], [0]))) + torch.sum(h.tanh(), 1, keepdim=True, out=None)


def twice_under(m, x):
    return m.out(
        checkpoint(lambda h: h * checkpoint(m.b, h.sin(), use_reentrant=False).erf(), m.a(x), use_reentrant=False)
    )


EXACT = {
    "checkpoint of hardswish": recomputed(lambda: nn.Linear(16, 16), nn.Hardswish),
    "checkpoint of softsign and a norm": recomputed(lambda: nn.LayerNorm(16), nn.Softsign),
    "checkpoint of CELU, its random numbers not put back": recomputed(nn.CELU, preserve_rng_state=False),
    "checkpoint of a weight's function": (
        lambda m, x: m.out(checkpoint(functools.partial(square_of_weight, m), rows_of_tanh(m, x), use_reentrant=False)),
        dict,
    ),
    "nested checkpoints": (twice_under, dict),
    "checkpoint of a sequence": (
        lambda m, x: m.out(checkpoint_sequential(m.inner, 2, m.a(x), use_reentrant=False)),
        lambda: {"inner": nn.Sequential(nn.Linear(16, 16), nn.CELU(), nn.Linear(16, 16), nn.Softsign())},
    ),
    "a parameter times a number made of x": (lambda m, x: m.out(m.a(x).tanh() + m.a.bias * x.square().mean()), dict),
    "a number times a number made of x": (
        lambda m, x: m.out(rows_of_tanh(m, x)) * (m.gain * x.square().mean()),
        lambda: {"gain": nn.Parameter(torch.tensor(0.7))},
    ),
    "a parameter of a row a sample times their mean": (
        lambda m, x: m.out((m.rows * m.a(x).mean(0, keepdim=True)).tanh() + m.a(x)),
        lambda: {"rows": nn.Parameter(torch.randn(N, WIDTH))},
    ),
    "a matrix times a vector made of x": (
        lambda m, x: m.out((m.b.weight * m.a(x).mean(0)).sum(0) + m.a(x).sin()),
        dict,
    ),
    "matrices times the batch": (
        lambda m, x: m.out((rows_of_tanh(m, x) @ m.many).mean(0)),
        lambda: {"many": nn.Parameter(torch.randn(10, WIDTH, WIDTH) / 4)},
    ),
    "assignments": (assigned, dict),
    "sums into constants": (summed_up, dict),
    "a centre that moves": (moving_centre, lambda: {"buffer": torch.zeros(WIDTH)}),
    "a buffer that is rebound": (rebound, lambda: {"buffer": torch.ones(WIDTH)}),
    "functions given out=None": (no_out, dict),
    "numbers from all generators": (draws_of_all, dict),
    "an argument in a dict": (
        lambda m, x: m.out(m.inner({"h": m.a(x)})),
        lambda: {"inner": Critic(lambda m, given: given["h"].erf())},
    ),
    **{
        f"{kind.__name__} in place after a norm": normalised(kind(inplace=True))
        for kind in (nn.ELU, nn.SELU, nn.SiLU, nn.Mish, nn.ReLU, nn.LeakyReLU, nn.CELU, nn.Hardtanh)
    },
    "tanh in place after a norm": normalised(torch.tanh_),
    "dropout in place after a norm": normalised(nn.Dropout(0.4, inplace=True)),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:.*couples the samples")
def test_equal_to_double_backward(name):
    agree(build(*EXACT[name]), inputs(), method="exact")


@pytest.mark.parametrize("name", ["checkpoint of hardswish", "sums into constants", "SiLU in place after a norm"])
def test_a_step_is_equal_too(name):
    """Loss and penalty, each sample's batch apart."""
    critic, x = build(*EXACT[name]), inputs()
    plain = copy.deepcopy(critic)
    step = ops.critic_step(
        critic, x, x + 1, loss="minimax", penalty="wgan-gp", points=x, batching="apart", method="exact"
    )
    gradient = flat(torch.autograd.grad(step.loss, trainable(critic), allow_unused=True), trainable(critic))
    loss = F.softplus(plain(x + 1)).mean() + F.softplus(-plain(x)).mean()
    expected = (
        flat(torch.autograd.grad(loss, trainable(plain), allow_unused=True), trainable(plain))
        + double_backward(plain, x, trainable(plain))[1]
    )
    assert float((gradient - expected).norm()) <= 1e-9 * float(expected.norm())


class PatchCritic(nn.Module):
    """pix2pix and CycleGAN: instance norm that learns nothing, then an activation in place; patches."""

    def __init__(self):
        super().__init__()
        layers = [nn.Conv2d(3, 6, 4, 2, 1), nn.LeakyReLU(0.2, True)]
        layers += [nn.Conv2d(6, 8, 4, 2, 1), nn.InstanceNorm2d(8), nn.LeakyReLU(0.2, True)]
        layers += [nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8, affine=False).eval(), nn.LeakyReLU(0.2, True)]
        self.model = nn.Sequential(*layers, nn.Conv2d(8, 1, 3, 1, 1))

    def forward(self, x):
        return self.model(x).mean((1, 2, 3))


class PhaseShuffle(nn.Module):
    """WaveGAN: each sample is shifted by an assignment to some rows."""

    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Conv1d(2, 6, 5, 2, 2), nn.Linear(6, 1)

    def forward(self, x):
        h = F.leaky_relu(self.a(x), 0.2, inplace=True)
        shifted = h.clone()
        rows = torch.tensor([0, 2])
        shifted[rows] = F.pad(h[rows][..., :-1], (1, 0), mode="reflect")
        return self.out(shifted.mean(2))


@pytest.mark.parametrize(("kind", "shape"), [(PatchCritic, (3, 3, 16, 16)), (PhaseShuffle, (4, 2, 16))])
def test_published_critics_in_place(kind, shape):
    torch.manual_seed(0)
    agree(kind().double(), torch.randn(shape, dtype=torch.float64), method="exact")


# What PyTorch shows to no function mode, or no rule follows: the plain way, and a warning that says why.


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, g):
        return 2 * g


@torch.jit.script
def scripted_in_place(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2.0).tanh_()


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    return 2 * torch.tanh(x)


def data_replaced(m, x):
    h = m.a(x)
    h.data = h.data.clamp(-0.5, 0.5)
    return m.out(h.tanh())


def data_clamped(m, x):
    h = m.a(x)
    h.data.clamp_(-0.5, 0.5)
    return m.out(h.tanh())


def data_doubled_after_use(m, x):
    h = rows_of_tanh(m, x)
    y = m.out(h)
    h.data.mul_(2)
    return y


def gradient_inside(m, x, **options):
    h = rows_of_tanh(m, x)
    (g,) = torch.autograd.grad(m.out(F.softsign(h)).sum(), h, create_graph=True, **options)
    return m.out(h if g is None else h * g)


def tangent_inside(m, x):
    h = rows_of_tanh(m, x)
    return m.out(h * torch.func.jvp(lambda v: m.b(v).sin(), (h,), (torch.ones_like(h),))[1])


def dual_inside(m, x):
    with torch.autograd.forward_ad.dual_level():
        h = torch.autograd.forward_ad.make_dual(rows_of_tanh(m, x), torch.ones(N, WIDTH, dtype=x.dtype))
        y = torch.autograd.forward_ad.unpack_dual(m.b(h).sin())
        return m.out(y.primal * y.tangent)


def scripted_without_gradients(m, x):
    h = m.a(x)
    with torch.no_grad():
        scripted_in_place(h)
    return m.out(h.sin())


PLAIN = {
    "data replaced": (data_replaced, "__set__"),
    "data clamped": (data_clamped, "changed in place"),
    "data doubled after use": (data_doubled_after_use, "changed in place after use"),
    "autograd.grad": (gradient_inside, "grad of a value"),
    "autograd.grad that allows unused": (functools.partial(gradient_inside, allow_unused=True), "grad of a value"),
    "func.jvp": (tangent_inside, "depends on x"),
    "forward_ad": (dual_inside, "depends on x"),
    "mark_dirty": (lambda m, x: m.out(Doubled.apply(m.a(x)).tanh()), "in-place operation"),
    "mark_dirty of a clone": (lambda m, x: m.out(Doubled.apply(m.a(x).clone()).tanh()), "in-place operation"),
    "a script in place": (lambda m, x: m.out(scripted_in_place(m.a(x))), "TorchScript"),
    "a script in place, without gradients": (scripted_without_gradients, "changed in place"),
    "a script": (lambda m, x: m.out(scripted(m.a(x))), "no function mode"),
    "a sum into a part": (lambda m, x: m.out(_sum_into_part(m.a(x)).tanh()), "another tensor reads"),
}


def _sum_into_part(h):
    h[:, 1] += h[:, 2]
    return h


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_way_with_a_warning(name):
    function, reason = PLAIN[name]
    critic, x = build(function), inputs()
    with pytest.raises(penalty.Unsupported, match=reason):
        ops.gradient_penalty(copy.deepcopy(critic), x, x, points=x, method="exact")
    with pytest.warns(UserWarning, match="(?s)double backward is used for this critic.*" + reason) as told:
        agree(critic, x)
    assert sum("double backward is used" in str(w.message) for w in told) == 1


def test_a_step_takes_the_plain_way_too():
    critic, x = build(PLAIN["mark_dirty"][0]), inputs()
    with pytest.warns(UserWarning, match="double backward is used"):
        step = ops.critic_step(critic, x, x + 1, loss="minimax", penalty="wgan-gp", points=x)
    plain = copy.deepcopy(critic)
    penalty, gradient = double_backward(plain, x, trainable(plain))
    loss = F.softplus(plain(x + 1)).mean() + F.softplus(-plain(x)).mean()
    gradient = gradient + flat(torch.autograd.grad(loss, trainable(plain), allow_unused=True), trainable(plain))
    found = flat(torch.autograd.grad(step.loss, trainable(critic), allow_unused=True), trainable(critic))
    torch.testing.assert_close(step.loss.detach(), (loss + penalty).detach())
    torch.testing.assert_close(found, gradient)


# What PyTorch refuses is refused in its words.


def after_use(m, x):
    h = m.a(x) * m.buffer
    m.buffer.add_(1)
    return m.out(h.tanh())


def written_after_use(m, x):
    h = rows_of_tanh(m, x)
    y = m.out(h)
    with torch.no_grad():
        h.mul_(2)
    return y


REFUSED = {
    "a buffer changed after use": (after_use, lambda: {"buffer": torch.ones(WIDTH)}),
    "a value changed after use": (written_after_use, dict),
    "out=": (lambda m, x: m.out(torch.add(m.a(x), 1.0, out=torch.empty(N, WIDTH, dtype=x.dtype))), dict),
    "a reentrant checkpoint": (lambda m, x: m.out(checkpoint(m.b, m.a(x), use_reentrant=True)), dict),
    "a deep copy": (lambda m, x: m.out(copy.deepcopy(m.a(x))), dict),
    "an error of its own": (lambda m, x: m.out(m.a(x)[:, :3]), dict),
}


@pytest.mark.parametrize("method", ["auto", "exact"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_pytorch_refuses(name, method):
    critic, x = build(*REFUSED[name]), inputs()
    with pytest.raises(Exception) as plain:  # noqa: PT011
        double_backward(copy.deepcopy(critic), x, trainable(critic))
    with pytest.raises((type(plain.value), penalty.Unsupported)) as ours:
        by_the_op(critic, x, trainable(critic), method=method)
    if method == "auto":
        assert type(ours.value) is type(plain.value)
        assert str(plain.value)[:40] in str(ours.value)  # behind what the critic was given


# A record proves itself.


def test_a_wrong_derivative_is_noticed(monkeypatch):
    """The generic rule is made to forget what curvature adds."""
    monkeypatch.setattr(autograd_rule.Autograd, "second", lambda self, tape, c, wanted: self.pull(tape, c))
    critic, x = build(lambda m, x: m.out(torch.logcumsumexp(m.a(x), 1))), inputs()
    with pytest.warns(UserWarning, match=r"double backward is used.*differ by"):
        agree(critic, x)


def test_a_proof_is_made_once():
    counted = []
    critic, x = build(lambda m, x: m.out(torch.logcumsumexp(m.a(x), 1))), inputs()
    critic.register_forward_hook(lambda *_: counted.append(1))

    def passes(function):
        counted.clear()
        ops.gradient_penalty(function, x, x, points=x)
        return len(counted)

    def fresh():
        return lambda x: critic(x)

    assert passes(critic) > 1
    assert passes(critic) == 1
    assert passes(fresh()) > 1  # whose own code might do more
    assert passes(fresh()) == 1


# dtypes under autocast.


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "function", [lambda m, x: m.out(F.leaky_relu(m.a(x))), lambda m, x: m.out((m.a(x) @ m.b.weight).tanh())]
)
def test_float64_is_left_alone_by_autocast(cast, function):
    agree(build(function), inputs(), 1e-12, context=lambda: torch.autocast("cpu", dtype=cast), method="exact")


# Functions around a critic.


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.out, self.calls = nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1), 0

    def forward(self, x):
        self.calls += 1
        return self.out(F.dropout(self.norm(self.a(x)).tanh(), 0.3))

    def score(self, x):
        return self(x)


class Holder:
    def __init__(self, net):
        self.net, self.log = net, []

    def __call__(self, x):
        return self.net(x)

    def critic(self, x):
        return self.inner(x)

    def inner(self, x):
        return self.net(x)


class Slotted:
    __slots__ = ("net",)

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


def decorated(f):
    @functools.wraps(f)
    def inner(*args):
        return f(*args)

    return inner


def called(m, x):
    return m(x)


WRAPPED = {
    "lambda": lambda m: lambda x: m(x),
    "default argument": lambda m: lambda x, m=m: m(x),
    "partial": lambda m: functools.partial(called, m),
    "bound method": lambda m: m.score,
    "bound method of an object": lambda m: Holder(m).critic,
    "callable object": Holder,
    "callable object with slots": Slotted,
    "nested": lambda m: lambda x: (lambda y: m(y))(x),
    "in a list": lambda m: lambda x, nets=[m]: nets[0](x),
    "in a dict": lambda m: lambda x, nets={"d": m}: nets["d"](x),
    "attribute": lambda m: (lambda holder: lambda x: holder.net(x))(Holder(m)),
    "decorated": lambda m: decorated(lambda x: m(x)),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.filterwarnings("ignore:.*couples the samples")
def test_a_new_function_at_each_call_runs_the_critic_once(name):
    torch.manual_seed(0)
    critic, counted = Stateful().double(), []
    critic.norm.register_forward_hook(lambda module, *_: counted.append(1) if module is critic.norm else None)
    agree(critic, inputs(), calls=3, wrap=WRAPPED[name], method="exact")
    assert len(counted) == 3


@pytest.mark.parametrize("norm", [spectral_norm, parametrizations.spectral_norm, genfast.nn.spectral_norm])
@pytest.mark.parametrize("activation", [nn.LeakyReLU, nn.Tanh, nn.Hardswish])
def test_spectral_norms_behind_a_lambda(norm, activation):
    torch.manual_seed(0)
    critic = nn.Sequential(norm(nn.Linear(8, WIDTH)), activation(), norm(nn.Linear(WIDTH, 1))).double()
    agree(critic, inputs(), wrap=lambda m: lambda x: m(x), method="exact")


class PowerIterated(nn.Module):
    """Spectral norm as SAGAN's ports have it: u and v are parameters without gradients, replaced through ``data``."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        rows, columns = layer.weight.shape
        self.bar = nn.Parameter(layer.weight.data)
        self.u = nn.Parameter(F.normalize(torch.randn(rows), dim=0), requires_grad=False)
        self.v = nn.Parameter(F.normalize(torch.randn(columns), dim=0), requires_grad=False)
        del layer.weight

    def forward(self, x):
        self.v.data = F.normalize(self.bar.data.t() @ self.u.data, dim=0)
        self.u.data = F.normalize(self.bar.data @ self.v.data, dim=0)
        return F.linear(x, self.bar / self.u.dot(self.bar.mv(self.v)), self.layer.bias)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softsign])
def test_power_iterations_in_parameters(activation):
    torch.manual_seed(0)
    critic = nn.Sequential(
        PowerIterated(nn.Linear(8, WIDTH)), activation(), PowerIterated(nn.Linear(WIDTH, 1))
    ).double()
    agree(critic, inputs(), calls=3, wrap=lambda m: lambda x: m(x), method="exact")


def test_what_is_remembered_keeps_no_critic_alive():
    critic, x = Stateful(), inputs(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ops.gradient_penalty(functools.partial(called, critic), x, x, points=x)
    gone = weakref.ref(critic)
    del critic
    gc.collect()
    assert gone() is None


# A pass that is repeated leaves no trace of the first.


class Growing(nn.Module):
    """Piecewise linear until a norm and a smooth layer fade in, as in progressive growing."""

    def __init__(self, noise):
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)
        self.noise, self.grown, self.calls, self.log = noise, False, 0, []

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        h = self.noise(F.relu(self.a(x)))
        return self.out(F.silu(self.norm(h)) if self.grown else h)


NOISE = {
    "dropout": nn.Dropout(0.3),
    "dropout of channels": lambda h: F.dropout1d(h, 0.3),
    "normal": lambda h: h + torch.randn_like(h),
    "Python and NumPy": lambda h: h * random.random() + np.random.rand(),
}


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.filterwarnings("ignore:.*couples the samples")
def test_a_critic_that_grows(noise):
    torch.manual_seed(0)
    critic, x = Growing(NOISE[noise]).double(), inputs()
    ops.gradient_penalty(critic, x, x, points=x)
    assert facts(critic).curved is False
    critic.grown = True
    agree(critic, x, calls=2, method="exact")
    assert int(critic.norm.num_batches_tracked) == 2
    assert critic.log == [1, 2, 3]


def test_state_is_put_back_whole():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("moved", torch.zeros(3))
            self.register_buffer("rebound", torch.zeros(3))
            self.u = nn.Parameter(torch.zeros(3), requires_grad=False)
            self.generator, self.count, self.seen, self.table = torch.Generator().manual_seed(3), 0, [], {"a": 1}

    m = Everything()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    bound = m.rebound
    state = State(lambda x: m(x))
    seed(5)
    state = State(m)
    draws = torch.rand(2), random.random(), np.random.rand(), torch.rand(2, generator=m.generator)
    m.moved += 1
    m.rebound = torch.ones(3)
    m.u.data = torch.ones(3)
    m.count, m.new = 7, 1
    m.seen.append(1)
    m.table["b"] = 2
    state()
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert m.rebound is bound
    assert (m.count, m.seen, m.table) == (0, [], {"a": 1})
    assert not hasattr(m, "new")
    again = torch.rand(2), random.random(), np.random.rand(), torch.rand(2, generator=m.generator)
    assert torch.equal(draws[0], again[0])
    assert draws[1:3] == again[1:3]
    assert torch.equal(draws[3], again[3])


# The same seed draws the same numbers, whatever memory order our convolutions work in.


class Noisy(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.a, self.b, self.out, self.noise = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 1), noise

    def forward(self, x):
        h = self.noise(F.leaky_relu(self.a(x)))
        return self.out(h.flatten(2).mean(2) if h.dim() == 4 else h.mean(1))


ORDERS = {
    "dropout": lambda h: F.dropout(h, 0.3),
    "dropout in place": lambda h: F.dropout(h, 0.3, True, True),
    "dropout of tokens": lambda h: F.dropout(h.flatten(2).transpose(1, 2), 0.3),
    "dropout of a permutation": lambda h: F.dropout(h.permute(0, 2, 3, 1), 0.3).permute(0, 3, 1, 2),
    "normal": lambda h: h + torch.randn_like(h),
    "empty_like": lambda h: h + torch.empty_like(h).normal_(),
    "RReLU": lambda h: F.rrelu(h, training=True),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_same_seed_draws_the_same_numbers(order, memory_format):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6).to(memory_format=memory_format)
    agree(Noisy(ORDERS[order]), x, 1e-4, method="exact")
