"""Every bijection of vectors: exact log-determinants, inverses, contexts, plain twins, copies, compilation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from genfast.nn import plain

MASK = torch.tensor([True, False, True, False, True])


class Conditioner(nn.Module):
    def __init__(self, inputs, outputs, context=0, images=False):
        super().__init__()
        self.layer = nn.Conv2d(inputs, outputs, 1) if images else nn.Linear(inputs, outputs)
        self.context = nn.Linear(context, outputs) if context else None

    def forward(self, x, context=None):
        y = self.layer(x)
        return torch.sin(2 * (y if self.context is None else y + self.context(context)))


def autoregressive(family, outputs, context=0, **options):
    made = {k: options.pop(k) for k in ("order", "residual", "degrees") if k in options}
    network = family.MADENetwork(5, (16, 16), outputs=outputs, context=context, **made)
    return family.MaskedAutoregressive(network, **options)


# name: (layer from a family of modules, features, context size)
LAYERS = {
    "permutation": lambda f: f.Permutation(5, [3, 1, 4, 0, 2]),
    "shift": lambda f: f.CircularShift(5),
    "lu": lambda f: f.LULinear(5),
    "lu permuted": lambda f: f.LULinear(5, bias=False, order="random"),
    "householder": lambda f: f.Householder(5),
    "householder few": lambda f: f.Householder(5, 2),
    "batch norm": lambda f: f.BatchNormFlow(5),
    "spline": lambda f: f.Spline(5, bins=4, bound=3.0),
    "spline zuko": lambda f: f.Spline(5, bins=6, convention="zuko"),
    "spline circular": lambda f: f.Spline(5, bins=4, bound=torch.pi, tails="circular"),
    "spline zuko sizes": lambda f: f.Spline(
        5, bins=6, convention="zuko", min_bin_width=0.1, slope=1e-2, logit_scale=0.5
    ),
    "spline context": lambda f: f.Spline(5, bins=4, context=3),
    "coupling": lambda f: f.SplineCoupling(Conditioner(3, 2 * 11), bins=4),
    "coupling last": lambda f: f.SplineCoupling(Conditioner(2, 3 * 11), bins=4, width=3, transform="last"),
    "coupling mask": lambda f: f.SplineCoupling(Conditioner(3, 2 * 11), bins=4, mask=MASK),
    "coupling context": lambda f: f.SplineCoupling(Conditioner(3, 2 * 14, context=3), bins=5, convention="zuko"),
    "affine": lambda f: autoregressive(f, 2),
    "affine exp": lambda f: autoregressive(f, 2, scale="exp", normalising=False, order="random"),
    "affine sigmoid": lambda f: autoregressive(f, 2, scale="sigmoid", residual=True),
    "affine additive": lambda f: autoregressive(f, 1, scale="additive", order="reversed"),
    "affine context": lambda f: autoregressive(f, 2, context=3, normalising=False),
    "iaf": lambda f: f.Inverse(autoregressive(f, 2, normalising=False)),
    "autoregressive spline": lambda f: autoregressive(f, 11, transform="spline", bins=4, bound=3.0),
    "autoregressive spline context": lambda f: autoregressive(
        f, 11, context=3, transform="spline", bins=4, convention="zuko"
    ),
}


each_layer = pytest.mark.parametrize("name", LAYERS)


def made(name, dtype=torch.float64, family=gnn):
    torch.manual_seed(1)
    layer = LAYERS[name](family).to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype)
    context = torch.randn(7, 3, generator=generator, dtype=torch.float64).to(dtype) if "context" in name else None
    if name == "batch norm":
        for _ in range(20):
            layer(3 * x + 1)
        layer.eval()
    return layer, x, context


@each_layer
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_inverse_and_exact_logdet(name, dtype, near):
    layer, x, context = made(name, dtype)
    z, logdet = layer(x, context)
    assert z.shape == x.shape
    assert logdet.shape == (7,)
    assert not torch.equal(z, x)
    back, minus = layer.inverse(z, context)
    torch.testing.assert_close(back, x, atol=near, rtol=near)
    torch.testing.assert_close(minus, -logdet, atol=10 * near, rtol=near)
    if dtype is torch.float64:
        for i in range(2):
            one = None if context is None else context[i : i + 1]
            jacobian = torch.autograd.functional.jacobian(lambda v, one=one: layer(v[None], one)[0][0], x[i])
            torch.testing.assert_close(logdet[i], torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-8)


@each_layer
def test_the_plain_twin_has_the_same_state_and_gives_the_same_numbers(name):
    torch.manual_seed(5)
    first = LAYERS[name](gnn)
    torch.manual_seed(5)
    second = LAYERS[name](plain)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    layer, x, context = made(name)
    twin = LAYERS[name](plain).double().train(layer.training)
    twin.load_state_dict(layer.state_dict())
    for way in ("forward", "inverse"):
        given = x.clone().requires_grad_()
        given_context = [] if context is None else [context.clone().requires_grad_()]
        results = []
        for module in (layer, twin):
            value, logdet = getattr(module, way)(given, *given_context)
            leaves = [given, *given_context, *module.parameters()]
            loss = (value * torch.arange(1.0, 6)).sin().sum() + logdet.sum()
            results.append((value, logdet, *torch.autograd.grad(loss, leaves, allow_unused=True)))
        for found, expected in zip(*results):
            if expected is None:
                assert found is None or not bool(found.any())
            else:
                torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@each_layer
def test_copies_pickles_and_empty_batches(name):
    layer, x, context = made(name, torch.float32)
    z, logdet = layer(x, context)
    layer.inverse(z, context)  # what it caches is not copied
    fresh = LAYERS[name](gnn).train(layer.training)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        for a, b in zip((*other(x, context), *other.inverse(z, context)), (z, logdet, *layer.inverse(z, context))):
            assert torch.equal(a, b)
    assert repr(layer)
    none = None if context is None else context[:0]
    for way in (layer, layer.inverse):
        value, logdet = way(x[:0], none)
        assert value.shape == (0, 5)
        assert logdet.shape == (0,)
        if value.requires_grad:
            value.sum().backward()


def test_one_feature():
    torch.manual_seed(0)
    x, context = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    for layer in (
        gnn.MaskedAutoregressive(gnn.MADENetwork(1, (8,), outputs=2, context=2)),
        gnn.MaskedAutoregressive(gnn.MADENetwork(1, (8,), outputs=11, context=2), transform="spline", bins=4),
        gnn.LULinear(1),
        gnn.Householder(1),
        gnn.Permutation(1),
        gnn.BatchNormFlow(1).eval(),
        gnn.Spline(1),
    ):
        layer = layer.double()
        z, logdet = layer(x, context)
        back, minus = layer.inverse(z, context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(minus, -logdet)


@pytest.mark.parametrize("name", ["affine", "coupling", "lu", "householder", "batch norm", "autoregressive spline"])
def test_compiles_without_a_break(name):
    layer, x, context = made(name, torch.float32)
    parameters = list(layer.parameters())

    def loss(v):
        z, logdet = layer(v, context)
        return z.square().sum() - logdet.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), loss(x), rtol=1e-5, atol=1e-4)
    for f, e in zip(*(torch.autograd.grad(g(x), parameters) for g in (compiled, loss))):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
