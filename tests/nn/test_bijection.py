"""Every bijection of images: exact log-determinants, inverses, contexts, copies, compilation, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

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
    "coupling last": lambda: gnn.AffineCoupling(
        Conditioner(1, 6), width=3, transform="last", layout="shift_scale_interleaved"
    ),
    "coupling tanh": lambda: gnn.AffineCoupling(Conditioner(2, 4), scale="tanh", alpha="learn", width=2),
    "coupling additive": lambda: gnn.AffineCoupling(Conditioner(2, 2), scale="additive"),
    "checkerboard": lambda: gnn.AffineCoupling(Conditioner(4, 8), mask=BOARD[None]),
    "glow step": lambda: gnn.GlowStep(4, Conditioner(2, 4)),
    "glow step full": lambda: gnn.GlowStep(4, Conditioner(2, 4), plu=False, scale="exp"),
    "sequence": lambda: gnn.FlowSequential(
        gnn.ActNorm(4), gnn.InvertibleConv1x1(4), gnn.GlowStep(4, Conditioner(2, 4))
    ),
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
        jacobian = torch.autograd.functional.jacobian(
            lambda v: module(v.reshape(1, 4, 4, 4))[0].flatten(), x[i].flatten()
        )
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
    for f, e in zip(
        *(torch.autograd.grad(g(x), parameters, allow_unused=True) for g in (compiled, loss) if parameters)
    ):
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


@pytest.mark.parametrize(
    ("error", "message", "call"), [(TypeError, "has no inverse method", lambda: gnn.FlowSequential(nn.ReLU()))]
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
