"""Autoregressive, spline, linear and batch-norm flow layers: exact log-determinants, inverses, contexts, twins, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from genfast import reference
from genfast.reference import autoregressive_flows as plain

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
    network = family.MADE(5, (16, 16), outputs=outputs, context=context, **made)
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
    "autoregressive spline context": lambda f: autoregressive(f, 11, context=3, transform="spline", bins=4, convention="zuko"),
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
    second = LAYERS[name](plain.AUTOREGRESSIVE)
    assert list(first.state_dict()) == list(second.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    layer, x, context = made(name)
    twin = LAYERS[name](plain.AUTOREGRESSIVE).double().train(layer.training)
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


@pytest.mark.parametrize("name", [n for n in LAYERS if n.startswith(("affine", "autoregressive", "iaf"))])
def test_the_degree_ordered_inverse_is_that_of_many_passes(name):
    layer, x, context = made(name)
    inner = layer.bijection if name == "iaf" else layer
    for found, expected in zip(inner.inverse(x, context), inner.inverse_plain(x, context)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        inner.network.linears[0].weight.mul_(1.5)  # a step of an optimiser is seen
    for found, expected in zip(inner.inverse(x, context), inner.inverse_plain(x, context)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_network_without_layers_is_inverted_by_passes():
    class Network(nn.Module):
        def forward(self, x):
            return torch.stack((x.cumsum(1) - x, 0.1 * (x.cumsum(1) - x)), 2)

    layer = gnn.MaskedAutoregressive(Network()).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    z, logdet = layer(x)
    back, minus = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -logdet)


@pytest.mark.parametrize("scale", ["exp", "softclamp", "sigmoid", "additive"])
@pytest.mark.parametrize("normalising", [True, False])
def test_the_affine_formulas(scale, normalising):
    """MAF, equation 4: z = (x - mu) e^-alpha; the other way round z = s x + t."""
    made = gnn.MADE(3, (8,), outputs=1 if scale == "additive" else 2)
    layer = gnn.MaskedAutoregressive(made, scale=scale, normalising=normalising)
    x = torch.randn(4, 3)
    params = made(x)
    a = torch.zeros(4, 3) if scale == "additive" else params[..., 1]
    log_s = {
        "exp": a, "softclamp": a / (1 + a.abs() / 6.907755278982137), "sigmoid": torch.sigmoid(a + 2).log(), "additive": a,
    }[scale]  # fmt: skip
    t = params[..., 0]
    z, logdet = layer(x)
    torch.testing.assert_close(z, (x - t) * (-log_s).exp() if normalising else x * log_s.exp() + t)
    torch.testing.assert_close(logdet, (-log_s if normalising else log_s).sum(1))


def test_images_go_through_spline_couplings_by_channels():
    torch.manual_seed(0)
    for options in ({}, {"mask": torch.tensor([True, False, True, False])}):
        layer = gnn.SplineCoupling(Conditioner(2, 2 * 11, images=True), bins=4, **options).double()
        x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
        z, logdet = layer(x)
        torch.testing.assert_close(layer.inverse(z)[0], x)
        jacobian = torch.autograd.functional.jacobian(lambda v, f=layer: f(v[None])[0][0], x[0]).reshape(36, 36)
        torch.testing.assert_close(logdet[0], torch.linalg.slogdet(jacobian)[1])
    spline = gnn.Spline(4, bins=4).double()
    torch.nn.init.normal_(spline.params)
    torch.testing.assert_close(spline(x)[0][1, :, 2, 0], spline(x[1:, :, 2, 0])[0][0])


def test_splines_start_as_the_identity():
    x = 2 * torch.randn(50, 3)
    for convention in ("nflows", "zuko"):
        z, logdet = gnn.Spline(3, convention=convention)(x)
        torch.testing.assert_close(z, x)
        torch.testing.assert_close(logdet, torch.zeros(50), atol=1e-5, rtol=0)


def test_householder_is_the_product_of_reflections():
    torch.manual_seed(0)
    vectors = torch.randn(6, 4, dtype=torch.float64)
    expected = torch.eye(4, dtype=torch.float64)
    for v in vectors:
        expected = expected - 2 * torch.outer(v, v @ expected) / v.dot(v)
    torch.testing.assert_close(reference.householder(vectors), expected)
    for scale in (1e-200, 1e200):  # squares would under- or overflow
        torch.testing.assert_close(reference.householder(vectors * scale), expected)
    vectors[2] = 0
    vectors.requires_grad_()
    q = reference.householder(vectors)
    (gradient,) = torch.autograd.grad(q.sin().sum(), vectors)
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(q @ q.T, torch.eye(4, dtype=torch.float64))
    assert torch.autograd.gradcheck(reference.householder, torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    wide = reference.householder(torch.randn(64, 64))
    assert float((wide @ wide.T - torch.eye(64)).abs().max()) < 2e-6


def test_batch_norm_uses_the_batch_in_training_and_its_gradient():
    torch.manual_seed(0)
    norm = gnn.BatchNormFlow(3).double()
    torch.nn.init.normal_(norm.log_gamma)
    torch.nn.init.normal_(norm.beta)
    x = (5 + 2 * torch.randn(32, 3, dtype=torch.float64)).requires_grad_()
    z, logdet = norm(x)
    torch.testing.assert_close(z.mean(0), norm.beta)
    torch.testing.assert_close(z.std(0, unbiased=False), norm.log_gamma.exp(), rtol=1e-4, atol=0)
    expected = (norm.log_gamma - 0.5 * (x.var(0, unbiased=False) + 1e-5).log()).sum()
    torch.testing.assert_close(logdet, expected.expand(32))
    found = torch.autograd.grad(logdet.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(32 * expected, x)[0])
    torch.testing.assert_close(norm.running_mean, 0.1 * x.detach().mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.detach().var(0))
    standard = nn.BatchNorm1d(3).double()
    standard(x.detach())
    torch.testing.assert_close(norm.running_var, standard.running_var)
    with pytest.raises(RuntimeError, match="no inverse in training"):
        norm.inverse(z)
    for shape in ((1, 3), (0, 3)):
        with pytest.raises(ValueError, match="training needs at least 2 positions"):
            norm(torch.zeros(shape, dtype=torch.float64))
    images = gnn.BatchNormFlow(3)
    z, _ = images(7 + torch.randn(4, 3, 5, 5))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def test_the_bias_of_an_invertible_convolution():
    torch.manual_seed(0)
    conv = gnn.InvertibleConv1x1(4).double()
    from genfast import ops

    x, bias = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y, logdet = ops.invertible_conv1x1(x, conv.factors(), bias)
    plainly, same = conv(x)
    torch.testing.assert_close(y, plainly + bias[:, None, None])
    torch.testing.assert_close(logdet, same)
    torch.testing.assert_close(ops.invertible_conv1x1(y, conv.factors(), bias, inverse=True)[0], x)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        ops.invertible_conv1x1(x, conv.factors(), bias[:3])


def test_one_feature():
    torch.manual_seed(0)
    x, context = torch.randn(6, 1, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    for layer in (
        gnn.MaskedAutoregressive(gnn.MADE(1, (8,), outputs=2, context=2)),
        gnn.MaskedAutoregressive(gnn.MADE(1, (8,), outputs=11, context=2), transform="spline", bins=4),
        gnn.LULinear(1), gnn.Householder(1), gnn.Permutation(1), gnn.BatchNormFlow(1).eval(), gnn.Spline(1),
    ):  # fmt: skip
        layer = layer.double()
        z, logdet = layer(x, context)
        back, minus = layer.inverse(z, context)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(minus, -logdet)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "transform='cubic', expected 'affine' or 'spline'",
         lambda: gnn.MaskedAutoregressive(nn.Identity(), transform="cubic")),
        (TypeError, "transform='affine' takes no bins", lambda: gnn.MaskedAutoregressive(nn.Identity(), bins=3)),
        (ValueError, "scale='tanh', expected one of", lambda: gnn.MaskedAutoregressive(nn.Identity(), scale="tanh")),
        (ValueError, "the network has outputs=3, expected 2", lambda: gnn.MaskedAutoregressive(gnn.MADE(4, (8,), outputs=3))),
        (ValueError, r"the network Identity returned \(2, 4\) for an input of \(2, 4\), expected \(2, 4, 2\)",
         lambda: gnn.MaskedAutoregressive(nn.Identity())(torch.zeros(2, 4))),
        (ValueError, "spline: bins=1, expected 2 to 64", lambda: gnn.Spline(3, bins=1)),
        (ValueError, "tails='cubic', expected one of", lambda: gnn.Spline(3, tails="cubic")),
        (ValueError, "convention='x', expected one of", lambda: gnn.Spline(3, convention="x")),
        (ValueError, "bound=0, expected more than 0", lambda: gnn.Spline(3, bound=0)),
        (ValueError, "Spline: features=0", lambda: gnn.Spline(0)),
        (ValueError, r"Spline: x has shape \(2, 4\)", lambda: gnn.Spline(3)(torch.zeros(2, 4))),
        (ValueError, "called without a context", lambda: gnn.Spline(3, context=2)(torch.zeros(2, 3))),
        (ValueError, "width=4 with 4 features", lambda: gnn.SplineCoupling(nn.Identity(), width=4)(torch.zeros(2, 4))),
        (ValueError, "transform='all', expected", lambda: gnn.SplineCoupling(nn.Identity(), transform="all")),
        (ValueError, "mask has dtype torch.int64", lambda: gnn.SplineCoupling(nn.Identity(), mask=torch.ones(3).long())),
        (ValueError, "neither all nor none", lambda: gnn.SplineCoupling(nn.Identity(), mask=torch.ones(3) > 0)),
        (ValueError, r"x has shape \(2, 4\), expected \(N, 5",
         lambda: gnn.SplineCoupling(nn.Identity(), mask=MASK)(torch.zeros(2, 4))),
        (ValueError, r"conditioner Linear returned \(2, 5\) for an input of \(2, 2\), expected \(2, 46\)",
         lambda: gnn.SplineCoupling(nn.Linear(2, 5))(torch.zeros(2, 4))),
        (TypeError, "Inverse: ReLU has no inverse method", lambda: gnn.Inverse(nn.ReLU())),
        (ValueError, r"order=\[0, 0, 1\], expected a permutation", lambda: gnn.Permutation(3, [0, 0, 1])),
        (ValueError, "order='up', expected", lambda: gnn.Permutation(3, "up")),
        (ValueError, "Permutation: features=0", lambda: gnn.Permutation(0)),
        (ValueError, r"Permutation: x has shape \(2, 4\)", lambda: gnn.Permutation(3)(torch.zeros(2, 4))),
        (ValueError, "CircularShift: features=3 and bound=-1", lambda: gnn.CircularShift(3, bound=-1)),
        (ValueError, r"CircularShift: x has shape \(2, 4\)", lambda: gnn.CircularShift(3)(torch.zeros(2, 4))),
        (ValueError, "LULinear: features=0", lambda: gnn.LULinear(0)),
        (ValueError, "Householder: features=3 and reflections=0", lambda: gnn.Householder(3, 0)),
        (ValueError, r"Householder: x has shape \(2, 4\)", lambda: gnn.Householder(3)(torch.zeros(2, 4))),
        (ValueError, "BatchNormFlow: features=3, momentum=2", lambda: gnn.BatchNormFlow(3, momentum=2)),
        (ValueError, r"BatchNormFlow: x has shape \(2, 4\)", lambda: gnn.BatchNormFlow(3)(torch.zeros(2, 4))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


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
