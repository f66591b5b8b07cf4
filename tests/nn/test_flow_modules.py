"""The flow modules: exact log-determinants, initialisation, context, formats, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import genfast
from genfast import nn as gnn


class Conditioner(nn.Module):
    def __init__(self, inputs, outputs, context=0, images=True):
        super().__init__()
        self.layer = nn.Conv2d(inputs, outputs, 3, padding=1) if images else nn.Linear(inputs, outputs)
        self.context = nn.Linear(context, outputs) if context else None

    def forward(self, x, context=None):
        y = 0.5 * torch.tanh(self.layer(x))
        if self.context is None:
            return y
        c = self.context(context)
        return y + (c[..., None, None] if y.dim() == 4 else c)


BOARD = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
MODULES = {
    "actnorm": lambda: gnn.ActNorm(4),
    "conv plu": lambda: gnn.InvertibleConv1x1(4),
    "conv full": lambda: gnn.InvertibleConv1x1(4, plu=False),
    "squeeze": lambda: gnn.Squeeze(),
    "coupling": lambda: gnn.AffineCoupling(Conditioner(2, 4), scale="sigmoid"),
    "coupling last": lambda: gnn.AffineCoupling(Conditioner(1, 6), width=3, transform="last", layout="shift_scale_interleaved"),
    "coupling tanh": lambda: gnn.AffineCoupling(Conditioner(2, 4), scale="tanh", alpha="learn", width=2),
    "coupling additive": lambda: gnn.AffineCoupling(Conditioner(2, 2), scale="additive"),
    "checkerboard": lambda: gnn.AffineCoupling(Conditioner(4, 8), mask=BOARD[None]),
    "glow step": lambda: gnn.GlowStep(4, Conditioner(2, 4)),
    "glow step full": lambda: gnn.GlowStep(4, Conditioner(2, 4), plu=False, scale="exp"),
    "sequence": lambda: gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4), gnn.GlowStep(4, Conditioner(2, 4))),
    "reversible": lambda: gnn.ReversibleSequential(gnn.ActNorm(4), gnn.GlowStep(4, Conditioner(2, 4))),
}
each_module = pytest.mark.parametrize("name", MODULES)


@each_module
@pytest.mark.parametrize("last", [False, True])
def test_inverse_and_exact_logdet(name, last):
    module = MODULES[name]().double()
    module(torch.randn(8, 4, 4, 4, dtype=torch.float64))  # sets activation norms
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    z, logdet = module(x)
    back, minus = module.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v.reshape(1, 4, 4, 4))[0].flatten(), x[i].flatten())
        torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian)[1])


@each_module
def test_copies_pickles_and_state_dicts_are_equal_modules(name):
    module = MODULES[name]()
    x = torch.randn(3, 4, 4, 4)
    z, logdet = module(x)
    fresh = MODULES[name]()
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        for a, b in zip(other(x), (z, logdet)):
            assert torch.equal(a, b)
    assert repr(module)


@each_module
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_break(name, backend):
    if backend == "inductor" and name not in ("glow step", "checkerboard"):
        pytest.skip("one channel and one mask coupling stand for the others under inductor")
    module = MODULES[name]()
    x = torch.randn(3, 4, 4, 4)
    module(x)
    module.eval()
    parameters = list(module.parameters())

    def loss(v):
        z, logdet = module(v)
        return z.square().sum() - logdet.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for f, e in zip(*(torch.autograd.grad(g(x), parameters, allow_unused=True) for g in (compiled, loss) if parameters)):
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x), loss(x), rtol=1e-5, atol=1e-4)


@each_module
def test_an_empty_batch(name):
    module = MODULES[name]()
    module(torch.randn(3, 4, 4, 4))
    z, logdet = module(torch.zeros(0, 4, 4, 4))
    assert z.shape[0] == logdet.shape[0] == 0
    if z.requires_grad:
        z.sum().backward()


@pytest.mark.parametrize("images", [True, False])
def test_context_reaches_the_conditioner(images):
    shape = (3, 4, 5, 5) if images else (3, 4)
    module = gnn.FlowSequential(
        gnn.GlowStep(4, Conditioner(2, 4, context=2, images=images)),
        gnn.AffineCoupling(Conditioner(2, 4, context=2, images=images)),
    )
    x, a, b = torch.randn(shape), torch.randn(3, 2), torch.randn(3, 2)
    z, _ = module(x, a)
    assert not torch.allclose(z, module(x, b)[0])
    torch.testing.assert_close(module.inverse(z, a)[0], x)


def test_glow_step_on_pairs_equals_tensors_and_its_parts():
    step = gnn.GlowStep(4, Conditioner(2, 4)).double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    z, logdet = step(x)
    (a, b), pair_logdet = step((x[:, :2], x[:, 2:]))
    torch.testing.assert_close(torch.cat((a, b), 1), z)
    torch.testing.assert_close(pair_logdet, logdet)
    y, first = step.actnorm(x)
    y, second = step.conv(y)
    y, third = step.coupling(y)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(first + second + third, logdet)


def test_actnorm_starts_from_the_first_batch_once():
    norm = gnn.ActNorm(3)
    x = 5 + 3 * torch.randn(64, 3, 6, 6)
    with torch.no_grad():
        assert torch.equal(norm.eval()(x)[0], x)  # evaluation does not start it
        z, _ = norm.train()(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3), unbiased=False), torch.ones(3))
    before = copy.deepcopy(norm.state_dict())
    norm(x + 100)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), norm.state_dict().values()))
    loaded = gnn.ActNorm(3)
    loaded.load_state_dict(before)
    loaded(x + 100)
    assert torch.equal(loaded.bias, norm.bias)


def test_actnorm_of_a_constant_channel_stays_finite():
    norm = gnn.ActNorm(2)
    z, logdet = norm(torch.ones(4, 2, 3, 3))
    assert bool(z.isfinite().all())
    assert bool(logdet.isfinite().all())
    with pytest.raises(ValueError, match="first training batch must not be empty"):
        gnn.ActNorm(2)(torch.zeros(0, 2, 3, 3))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "ActNorm: channels=0", lambda: gnn.ActNorm(0)),
        (ValueError, "InvertibleConv1x1: channels=0", lambda: gnn.InvertibleConv1x1(0)),
        (ValueError, "GlowStep: channels=1", lambda: gnn.GlowStep(1, nn.Identity())),
        (ValueError, "scale='x', expected one of", lambda: gnn.AffineCoupling(nn.Identity(), scale="x")),
        (ValueError, "alpha goes with", lambda: gnn.AffineCoupling(nn.Identity(), alpha=1.0)),
        (ValueError, "needs width", lambda: gnn.AffineCoupling(nn.Identity(), scale="tanh", alpha="learn")),
        (TypeError, "mask has dtype", lambda: gnn.AffineCoupling(nn.Identity(), mask=torch.ones(1, 2, 2))),
        (TypeError, "has no inverse method", lambda: gnn.FlowSequential(nn.ReLU())),
        (ValueError, r"conditioner Conv2d returned \(2, 3, 4, 4\) for an input of \(2, 2, 4, 4\), expected \(2, 4, 4, 4\)",
         lambda: gnn.AffineCoupling(nn.Conv2d(2, 3, 1))(torch.zeros(2, 4, 4, 4))),
        (ValueError, "width=9 with 4 channels", lambda: gnn.AffineCoupling(nn.Identity(), width=9)(torch.zeros(2, 4, 4, 4))),
        (ValueError, r"Split: x has shape \(2, 1\)", lambda: gnn.Split()(torch.zeros(2, 1))),
        (TypeError, "x has dtype torch.int64", lambda: gnn.InvertibleConv1x1(4)(torch.ones(2, 4, 4, 4).long())),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_split_and_back():
    x = torch.randn(2, 5, 3, 3)
    (kept, out), logdet = gnn.Split()(x)
    assert kept.shape[1] == 3
    assert out.shape[1] == 2
    assert torch.equal(gnn.Split().inverse((kept, out))[0], x)
    assert bool((logdet == 0).all())


def test_doctests_of_the_package_run():
    import doctest
    import importlib
    import pkgutil

    tried = 0
    for info in pkgutil.walk_packages(genfast.__path__, "genfast."):
        if ".kernels" in info.name or info.name.endswith(("__main__", "_cpu", "_cuda")):
            continue
        try:
            module = importlib.import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name not in ("nflows", "normflows", "zuko"):
                raise
            continue  # the integration of a peer that is not installed
        finder = doctest.DocTestFinder(exclude_empty=True)
        for test in finder.find(module, globs={}):
            if test.examples:
                failed, count = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
                tried += count
                assert failed == 0, test.name
    assert tried > 40


@pytest.mark.parametrize("shape", [(16, 3, 8, 8), (512, 3)])
def test_actnorm_far_from_zero_is_that_of_its_parameters(shape):
    """s x and b nearly cancel there: what rounding took from s counts x times."""
    x = 1000 + torch.randn(shape)
    for form in [torch.contiguous_format, *([torch.channels_last] if len(shape) == 4 else [])]:
        x = x.contiguous(memory_format=form)
        for first in (False, True):
            norm = gnn.ActNorm(3, shift_first=first)
            z, logdet = norm(x)
            exact = copy.deepcopy(norm).double()
            assert float((z - exact(x.double())[0]).abs().max()) < 3e-6
            if first:
                assert float(z.transpose(0, 1).flatten(1).mean(1).abs().max()) < 1e-4
            torch.testing.assert_close(norm.inverse(z)[0], x, rtol=1e-6, atol=0)
            torch.testing.assert_close(norm.inverse(z)[1], -logdet)


def test_shift_first_layers_are_openai_glow_s():
    """(x + loc) s, the convolution, then (x_a + t) s: on tensors, on pairs, and back."""
    step = gnn.GlowStep(4, torch.nn.Conv2d(2, 4, 3, padding=1), shift_first=True).double()
    x = 2 + torch.randn(3, 4, 5, 6, dtype=torch.float64)
    z, logdet = step(x)
    norm = step.actnorm
    s, loc = (v.reshape(1, -1, 1, 1) for v in (norm.log_scale.exp(), norm.bias))
    torch.testing.assert_close(norm.bias.detach(), -x.mean((0, 2, 3)))
    mixed, of_conv = step.conv((x + loc) * s)
    torch.testing.assert_close(norm(x)[0], (x + loc) * s)
    r, t = step.coupling.conditioner(mixed[:, 2:]).chunk(2, 1)
    expected = torch.cat(((mixed[:, :2] + t) * torch.sigmoid(r + 2), mixed[:, 2:]), 1)
    torch.testing.assert_close(z, expected)
    of_norm = norm.log_scale.sum() * 30
    torch.testing.assert_close(logdet, of_norm + of_conv + torch.nn.functional.logsigmoid(r + 2).flatten(1).sum(1))
    torch.testing.assert_close(step.inverse(z)[0], x)
    pair, _ = step((x[:, :2], x[:, 2:]))
    torch.testing.assert_close(torch.cat(pair, 1), z)
    torch.testing.assert_close(torch.cat(step.inverse(pair)[0], 1), x)
    for a, b in zip(
        torch.autograd.grad(z.square().sum() + logdet.sum(), list(step.parameters()), allow_unused=True),
        torch.autograd.grad(
            expected.square().sum() + (of_norm + of_conv + torch.nn.functional.logsigmoid(r + 2).flatten(1).sum(1)).sum(),
            list(step.parameters()), allow_unused=True,
        ),
    ):  # fmt: skip
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
    assert "shift_first=True" in repr(step)
