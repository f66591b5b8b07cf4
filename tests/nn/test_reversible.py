"""nn.ReversibleSequential: the gradients of the plain chain, in memory that does not grow with its length."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from genfast._peak_memory import peak_bytes


def network(inputs, outputs, hidden=16, factor=0.3):
    net = nn.Sequential(nn.Conv2d(inputs, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, outputs, 3, padding=1))
    with torch.no_grad():
        net[2].weight.mul_(factor)
    return net


def chain(kind, steps, channels=6):
    half = channels // 2
    if kind == "glow":
        return [gnn.GlowStep(channels, network(half, channels)) for _ in range(steps)]
    if kind == "coupling":
        sides = ["first", "last"]
        return [
            gnn.AffineCoupling(network(half, channels), scale="tanh", alpha="learn", width=half, transform=sides[i % 2])
            for i in range(steps)
        ]
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 0
    made = []
    for i in range(steps // 2):
        made.append(gnn.ActNorm(channels))
        made.append(
            gnn.AffineCoupling(
                network(channels, 2 * channels), mask=(board if i % 2 else ~board)[None], scale="softclamp"
            )
        )
    return made


def gradients(module, x, context=None):
    x = [t.clone().requires_grad_() for t in (x if isinstance(x, tuple) else (x,))]
    z, logdet = module(tuple(x) if len(x) == 2 else x[0], *(() if context is None else (context,)))
    loss = sum(t.square().mean() for t in (z if isinstance(z, tuple) else (z,))) - 0.01 * logdet.mean()
    found = torch.autograd.grad(loss, [*x, *module.parameters(), *([] if context is None else [context])])
    return loss.detach(), found


@pytest.mark.parametrize(
    ("kind", "paired"), [("glow", False), ("glow", True), ("coupling", False), ("checkerboard", False)]
)
def test_gradients_equal_the_plain_chain_over_32_steps(kind, paired):
    steps = chain(kind, 32)
    plain, reversible = gnn.FlowSequential(*steps), gnn.ReversibleSequential(*steps)
    x = torch.randn(4, 6, 8, 8)
    with torch.no_grad():
        plain(x)
    state = (x[:, :3].clone(), x[:, 3:].clone()) if paired else x
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no drift to speak of
        (loss, expected), (again, found) = gradients(plain, state), gradients(reversible, state)
    torch.testing.assert_close(again, loss)
    flat_e, flat_f = (torch.cat([g.flatten() for g in gs]) for gs in (expected, found))
    assert float((flat_f - flat_e).norm()) <= 1e-4 * float(flat_e.norm())
    for f, e in zip(found, expected):
        assert float((f - e).norm()) <= 1e-4 * float(e.norm()) + 1e-6


def test_gradients_to_the_context_and_to_shared_parameters():
    class Conditioner(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.context = network(2, 4), nn.Linear(3, 4)

        def forward(self, x, context):
            return self.net(x) + 0.1 * self.context(context)[..., None, None]

    shared = Conditioner()
    steps = [gnn.GlowStep(4, shared) for _ in range(3)]
    context = torch.randn(2, 3, requires_grad=True)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        gnn.FlowSequential(*steps)(x, context)
    _, expected = gradients(gnn.FlowSequential(*steps), x, context)
    _, found = gradients(gnn.ReversibleSequential(*steps), x, context)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6)


def test_memory_does_not_grow_with_depth():
    def peak(module):
        x = torch.randn(4, 6, 16, 16, requires_grad=True)
        with torch.no_grad():
            module(x)

        def activations():
            z, logdet = module(x)
            (dx,) = torch.autograd.grad(z.square().sum() - logdet.sum(), x)
            return dx

        activations()
        gc.collect()
        return peak_bytes(activations)

    peaks = {}
    for steps in (8, 32):
        made = chain("glow", steps)
        for p in (p for s in made for p in s.parameters()):
            p.requires_grad_(False)  # parameter gradients grow with depth in any scheme; activations are the point
        peaks[steps] = peak(gnn.ReversibleSequential(*made)), peak(gnn.FlowSequential(*made))
    assert peaks[32][0] <= 1.3 * peaks[8][0]
    assert peaks[32][1] > 3 * peaks[8][1]  # the plain chain does grow, so the measurement can tell


def test_one_output_alone_may_be_used():
    steps = chain("glow", 3, 4)
    module, plain = gnn.ReversibleSequential(*steps), gnn.FlowSequential(*steps)
    x = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        plain(x)
    for which in (0, 1):
        found, expected = (
            torch.autograd.grad(m(x)[which].sum(), list(m.parameters()), allow_unused=True) for m in (module, plain)
        )
        for f, e in zip(found, expected):
            torch.testing.assert_close(torch.zeros_like(f) if e is None else e, f, rtol=1e-3, atol=1e-4)


def test_an_ill_conditioned_inverse_warns_with_the_measured_drift():
    norm = gnn.ActNorm(4)
    with torch.no_grad():
        norm.log_scale.copy_(torch.tensor([12.0, -12.0, 12.0, -12.0]))
        norm.initialized.fill_(True)
        norm._look()
    steps = []
    for _ in range(4):
        steps += [norm, gnn.InvertibleConv1x1(4)]
    module = gnn.ReversibleSequential(*steps)
    z, _ = module(torch.randn(4, 4, 4, 4, requires_grad=True))
    with pytest.warns(UserWarning, match=r"rebuilt through 8 modules differs from the true one by \d"):
        z.sum().backward()


class FunctionalDropout(nn.Module):
    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.3, training=True)


class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


class Counter(nn.Module):
    """A buffer of a user's own that each call moves."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return x * (1 + 0.1 * self.calls)


def moving(kind):
    """A conditioner whose calls move something."""
    first, last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
    if kind == "spectral norm":
        first, last = (nn.utils.parametrizations.spectral_norm(c) for c in (first, last))
    elif kind == "old spectral norm":
        first, last = (nn.utils.spectral_norm(c) for c in (first, last))
    elif kind == "genfast spectral norm":
        first, last = (gnn.spectral_norm(c) for c in (first, last))
    between = {
        "dropout": nn.Dropout(0.3),
        "functional dropout": FunctionalDropout(),
        "noise": Noise(),
        "counter": Counter(),
        "batch norm": nn.BatchNorm2d(8),
        "rrelu": nn.RReLU(),
    }.get(kind, nn.ReLU())
    return nn.Sequential(first, between, last)


class Duck(nn.Module):
    """Somebody's coupling, no Bijection of ours: rebuilding it takes two calls of the conditioner."""

    def __init__(self, conditioner):
        super().__init__()
        self.conditioner = conditioner

    def _scales(self, x):
        s, t = self.conditioner(x).chunk(2, 1)
        return torch.tanh(s), t

    def forward(self, x, context=None):
        a, b = x.chunk(2, 1)
        s, t = self._scales(b)
        return torch.cat([b, a * s.exp() + t], 1), s.flatten(1).sum(1)

    def inverse(self, z, context=None):
        b, a = z.chunk(2, 1)
        s, t = self._scales(b)
        return torch.cat([(a - t) * (-s).exp(), b], 1), -s.flatten(1).sum(1)


KINDS = [
    "spectral norm",
    "old spectral norm",
    "genfast spectral norm",
    "dropout",
    "functional dropout",
    "noise",
    "counter",
    "batch norm",
    "rrelu",
]


@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        *(("duck", kind) for kind in KINDS),
        *((s, k) for s in ("glow", "coupling") for k in ("spectral norm", "dropout")),
    ],
)
def test_what_a_call_moves_is_replayed(kind, stage):
    shared = moving(kind)
    make = {
        "glow": lambda c: gnn.GlowStep(4, c),
        "coupling": lambda c: gnn.AffineCoupling(c, scale="tanh"),
        "duck": Duck,
    }[stage]
    steps = [make(c) for c in (shared, moving(kind), shared)]
    plain, reversible = gnn.FlowSequential(*steps), gnn.ReversibleSequential(*steps)
    x = torch.randn(4, 4, 6, 6)
    plain(x)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    found, after = [], []
    for chain_ in (plain, reversible):
        plain.load_state_dict(state)
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runs = [gradients(chain_, x) for _ in range(2)]  # the second begins where the first has ended
        found.append([g for _, grads in runs for g in grads])
        after.append([*(b.clone() for b in plain.buffers()), torch.get_rng_state()])
    for f, e in zip(found[1], found[0]):
        torch.testing.assert_close(f, e, rtol=2e-3, atol=2e-5)
    for f, e in zip(after[1], after[0]):
        torch.testing.assert_close(f, e)


def test_the_backward_meets_the_training_flags_and_the_autocast_of_the_forward():
    steps = [gnn.AffineCoupling(moving("dropout"), scale="tanh") for _ in range(3)]
    found = []
    for kind in (gnn.FlowSequential, gnn.ReversibleSequential):
        module = kind(*steps).train()
        torch.manual_seed(1)
        x = torch.randn(4, 4, 6, 6, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            z, logdet = module(x)
        module.eval()
        loss = z.float().square().mean() - logdet.mean()
        found.append(torch.autograd.grad(loss, [x, *module.parameters()]))
        assert not any(m.training for m in module.modules())
    for f, e in zip(*found):
        torch.testing.assert_close(f, e, rtol=2e-2, atol=2e-3)


def test_random_numbers_that_begin_later():
    steps = [gnn.AffineCoupling(moving("dropout"), scale="tanh") for _ in range(3)]
    plain, reversible = gnn.FlowSequential(*steps), gnn.ReversibleSequential(*steps)
    x = torch.randn(4, 4, 6, 6)
    gradients(reversible.eval(), x)
    assert reversible._draws is False
    found = []
    for chain_ in (plain.train(), reversible.train()):
        torch.manual_seed(1)
        found.append([*gradients(chain_, x)[1], torch.get_rng_state()])
    for f, e in zip(found[1], found[0]):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-5)


def test_two_forwards_before_their_backwards():
    steps = [gnn.AffineCoupling(moving("spectral norm"), scale="tanh") for _ in range(2)]
    plain, reversible = gnn.FlowSequential(*steps), gnn.ReversibleSequential(*steps)
    x = torch.randn(4, 4, 6, 6)
    plain(x)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    found = []
    for chain_ in (plain, reversible):
        plain.load_state_dict(state)
        losses = [chain_(x)[0].square().mean(), chain_(2 * x)[0].square().mean()]
        found.append([torch.autograd.grad(loss, list(chain_.parameters())) for loss in losses])
    for f, e in zip(found[1][0] + found[1][1], found[0][0] + found[0][1]):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-5)


def test_a_generator_of_a_modules_own_is_refused_by_name():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.generator = nn.Conv2d(2, 4, 1), torch.Generator().manual_seed(0)

        def forward(self, x):
            return self.conv(x) + torch.randn(x.shape[0], 4, *x.shape[2:], generator=self.generator)

    module = gnn.ReversibleSequential(gnn.AffineCoupling(nn.Conv2d(2, 4, 1)), gnn.AffineCoupling(Own()))
    z, _ = module(torch.randn(2, 4, 4, 4, requires_grad=True))
    with pytest.raises(
        RuntimeError, match=r"1 \(AffineCoupling\) gives other numbers when the backward calls it again"
    ):
        z.sum().backward()


def test_hooks_and_overridden_forwards_are_called():
    class Doubled(gnn.GlowStep):
        def forward(self, x, context=None):
            z, logdet = super().forward(x, context)
            return 2 * z, logdet + x[0].numel() * torch.tensor(2.0).log()

        def inverse(self, z, context=None):
            x, logdet = super().inverse(z / 2, context)
            return x, logdet - x[0].numel() * torch.tensor(2.0).log()

    steps = [Doubled(4, network(2, 4)) for _ in range(2)]
    plain, reversible = gnn.FlowSequential(*steps), gnn.ReversibleSequential(*steps)
    x = torch.randn(2, 4, 6, 6)
    plain(x)
    (loss, expected), (again, found) = gradients(plain, x), gradients(reversible, x)
    torch.testing.assert_close(again, loss)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-3, atol=1e-5)


def test_batch_norm_flow_in_training_is_refused_by_name():
    module = gnn.ReversibleSequential(gnn.BatchNormFlow(4))
    with pytest.raises(ValueError, match="0 is a BatchNormFlow in training mode, which has no inverse"):
        module(torch.randn(2, 4, 4, 4))
    module.eval()(torch.randn(2, 4, 4, 4))


def test_second_derivatives_are_refused():
    module = gnn.ReversibleSequential(*chain("glow", 2, 4))
    x = torch.randn(2, 4, 4, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)


def test_it_compiles_without_a_break():
    steps = chain("glow", 3, 4)
    module = gnn.ReversibleSequential(*steps)
    x = torch.randn(2, 4, 4, 4)
    module(x)
    module.eval()

    def loss(v):
        z, logdet = module(v)
        return z.square().sum() - logdet.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found, expected = (torch.autograd.grad(g(x), list(module.parameters())) for g in (compiled, loss))
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)


def test_its_state_dict_is_the_plain_chains():
    steps = chain("glow", 2, 4)
    assert list(gnn.ReversibleSequential(*steps).state_dict()) == list(gnn.FlowSequential(*steps).state_dict())
