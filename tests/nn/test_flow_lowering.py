"""Whole flows as one program: equal to the layers one by one, seen to change, refused by name."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import genfast
from genfast import models
from genfast.models.base_flow import FlowModel
from genfast.programs.self_check import SelfCheckError

gnn = genfast.nn


def conditioner(inputs, outputs, *between):
    return nn.Sequential(nn.Linear(inputs, 9), *between, nn.Linear(9, outputs))


def flow(*layers, base=None, dim=4):
    return models.Flow(models.DiagonalGaussian(dim) if base is None else base, layers)


MODELS = {
    "MAF": (lambda: models.MAF(5, hidden=20, context=3), 5, 3),
    "MAF of residual blocks": (
        lambda: models.MAF(5, hidden=24, residual=True, activation="silu", order="random", scale="exp"),
        5,
        0,
    ),
    "MAF, additive": (lambda: models.MAF(4, hidden=[20, 7], scale="additive", norm=None), 4, 0),
    "MAF, batch norm in evaluation": (lambda: models.MAF(4, hidden=20, scale="sigmoid", norm="batch").eval(), 4, 0),
    "MAF of one feature": (lambda: models.MAF(1, hidden=8), 1, 0),
    "NSF, coupling": (lambda: models.NSF(6, hidden=16, context=3), 6, 3),
    "NSF, autoregressive, zuko's": (
        lambda: models.NSF(6, hidden=16, coupling="autoregressive", convention="zuko"),
        6,
        0,
    ),
    "NSF, LU": (lambda: models.NSF(6, hidden=16, mixing="lu", bins=5), 6, 0),
    "NSF, permutation": (lambda: models.NSF(7, hidden=16, mixing="permutation", transforms=3), 7, 0),
    "NICE": (lambda: models.NICE(6, hidden=16, context=2), 6, 2),
    "NICE, Gaussian": (lambda: models.NICE(7, hidden=16, prior="gaussian"), 7, 0),
    "RealNVP": (lambda: models.RealNVP(6, hidden=16, context=2), 6, 2),
    "Householder": (lambda: flow(gnn.Householder(4), gnn.Permutation(4, "random")), 4, 0),
    "LU and actnorm, shift first": (
        lambda: flow(gnn.LULinear(4, order="random"), gnn.ActNorm(4, shift_first=True)),
        4,
        0,
    ),
    "GELU, softclamp": (
        lambda: flow(gnn.AffineCoupling(conditioner(2, 4, nn.GELU(), nn.Dropout(0.0)), scale="softclamp")),
        4,
        0,
    ),
    "shift first, interleaved": (
        lambda: flow(
            gnn.AffineCoupling(
                conditioner(2, 4, nn.ELU()),
                scale="sigmoid",
                layout="shift_scale_interleaved",
                transform="last",
                shift_first=True,
            )
        ),
        4,
        0,
    ),
    "tanh with a number": (
        lambda: flow(gnn.AffineCoupling(conditioner(1, 6, nn.Softplus()), width=3, scale="tanh", alpha=0.7)),
        4,
        0,
    ),
    "masked spline": (
        lambda: flow(gnn.SplineCoupling(conditioner(2, 46, nn.Tanh()), mask=torch.tensor([1, 0, 0, 1]).bool())),
        4,
        0,
    ),
    "a base of its own": (
        lambda: flow(gnn.LULinear(4), base=torch.distributions.StudentT(torch.full((4,), 5.0))),
        4,
        0,
    ),
}


def prepared(name, dtype=torch.float64):
    build, features, contexts = MODELS[name]
    torch.manual_seed(0)
    model = build().to(dtype)
    x = 1.3 * torch.randn(41, features, dtype=dtype)
    context = torch.randn(41, contexts, dtype=dtype) if contexts else None
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model(x, context)  # the first batch sets the activation norms
    return model, x, context


def by_layers(model, x, context):
    z, logdet = model(x, context)
    return model._base_density(z) + logdet


def runs_whole(model, x, context=None):
    return model.flow_program(x, context) == ""


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_whole_flow_equals_its_layers(name, dtype):
    model, x, context = prepared(name, dtype)
    x.requires_grad_()
    inputs = [t for t in (x, context) if t is not None]
    for t in inputs:
        t.requires_grad_()
    inputs += list(model.parameters())
    whole = model.log_prob(x, context)
    assert model.flow_program(x, context) == ""
    expected = by_layers(model, x, context)
    exact = dtype is torch.float64
    torch.testing.assert_close(whole, expected, rtol=1e-12 if exact else 2e-5, atol=1e-12 if exact else 2e-5)
    weight = torch.randn_like(whole)
    grads = [torch.autograd.grad((t * weight).sum(), inputs, allow_unused=True) for t in (whole, expected)]
    for a, b in zip(*grads):
        if b is None:
            assert a is None or not a.any()
            continue
        assert float((a - b).norm()) <= (1e-11 if exact else 2e-5) * max(float(b.norm()), 1e-2)


@pytest.mark.parametrize("name", ["MAF", "NSF, coupling", "RealNVP"])
def test_what_changes_between_two_calls_is_seen(name):
    model, x, context = prepared(name)

    def check():
        with torch.no_grad():
            torch.testing.assert_close(model.log_prob(x, context), by_layers(model, x, context), rtol=1e-11, atol=1e-11)

    check()
    for p in model.parameters():
        p.data.mul_(1.01)
    check()
    for p in model.parameters():
        p.detach().numpy()[...] *= 1.01
    check()
    linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
    linear.weight = nn.Parameter(linear.weight.detach() * 2)
    check()
    model.load_state_dict({k: 0.9 * v if v.is_floating_point() else v for k, v in model.state_dict().items()})
    check()
    if name == "MAF":
        made = next(m for m in model.modules() if isinstance(m, gnn.MADENetwork))
        made.resample(order="random")
        check()
    handle = linear.register_forward_hook(lambda module, inputs, output: output + 1)
    assert not runs_whole(model, x, context)
    check()
    handle.remove()
    check()
    assert runs_whole(model, x, context)
    before = model.log_prob(x, context)
    base, model.base = model.base, models.DiagonalGaussian(model.dim).double()
    with torch.no_grad():
        model.base.loc += 1
    check()
    model.base = base
    assert torch.equal(model.log_prob(x, context), before)


def test_the_latents_permutation_is_part_of_what_is_compared():
    model = flow(gnn.Permutation(4, [1, 2, 3, 0]), base=models.DiagonalGaussian(4))
    with torch.no_grad():
        model.base.loc += torch.arange(4)
    x = torch.randn(3, 4)
    first = model.log_prob(x)
    model.flow[0].order.copy_(torch.arange(4))
    assert not torch.equal(model.log_prob(x), first)
    torch.testing.assert_close(model.log_prob(x), by_layers(model, x, None))


class Louder(gnn.AffineCoupling):
    def forward(self, x, context=None):
        z, logdet = super().forward(x, context)
        return 2 * z, logdet + x.shape[1] * torch.log(torch.tensor(2.0))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: flow(Louder(conditioner(2, 4, nn.ReLU()))), "Louder overrides methods of AffineCoupling"),
        (lambda: models.IAF(4, hidden=8), "Inverse has no step of a flow program"),
        (lambda: flow(gnn.AffineCoupling(conditioner(2, 4, nn.Hardswish()))), "Hardswish has no step"),
        (lambda: flow(gnn.AffineCoupling(conditioner(2, 4, nn.LeakyReLU(0.2)))), "LeakyReLU has no step"),
        (lambda: flow(gnn.AffineCoupling(conditioner(2, 4, nn.Dropout(0.5)))), "Dropout has no step"),
        (lambda: models.NSF(4, hidden=8, tails="circular"), "CircularShift has no step"),
        (lambda: models.MAF(4, hidden=8, norm="batch"), "BatchNormFlow in training"),
        (
            lambda: flow(gnn.AffineCoupling(nn.utils.parametrizations.weight_norm(nn.Linear(2, 4)))),
            "Linear has parametrized weights",
        ),
        (lambda: models.RealNVP((1, 8, 8), hidden=8), "its data are no float32 or float64 vectors"),
    ],
)
def test_what_has_no_program_runs_by_layers_and_says_why(build, reason):
    torch.manual_seed(0)
    model = build()
    x = torch.randn(9, *model.shape) * 0.3
    model(x)
    torch.manual_seed(1)
    whole = model.log_prob(x)
    torch.manual_seed(1)
    torch.testing.assert_close(whole, by_layers(model, x, None), rtol=1e-4, atol=1e-4)
    assert re.search(reason, model.flow_program(x)), model.flow_program(x)


def test_a_subclass_with_a_forward_of_its_own_is_called():
    class Shifted(models.MAF):
        def forward(self, x, context=None):
            return super().forward(x + 1, context)

    model = Shifted(3, hidden=8, norm=None)
    x = torch.randn(5, 3)
    torch.testing.assert_close(model.log_prob(x), by_layers(model, x, None))
    assert not runs_whole(model, x)
    plain = models.MAF(3, hidden=8, norm=None)
    plain.register_forward_hook(lambda module, inputs, output: (output[0], output[1] + 1))
    torch.testing.assert_close(plain.log_prob(x), by_layers(plain, x, None))


def test_a_wrong_program_is_found_out(monkeypatch):
    model, x, context = prepared("NICE")
    right = gnn.AffineCoupling.add_steps

    def wrong(self, builder):
        right(self, builder)
        builder.features = builder.features[::-1]

    monkeypatch.setattr(gnn.AffineCoupling, "add_steps", wrong)
    with pytest.raises(SelfCheckError, match="its flow program differs from what its layers say"):
        model.log_prob(x, context)


def test_copies_pickles_and_dtypes():
    model, x, context = prepared("MAF")
    expected = model.log_prob(x, context)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            next(other.parameters()).add_(1)
        torch.testing.assert_close(other.log_prob(x, context), by_layers(other, x, context))
        assert not torch.equal(other.log_prob(x, context), expected)
    single = model.float()
    torch.testing.assert_close(single.log_prob(x.float(), context.float()), expected.float(), rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(single).bfloat16()
    assert half.log_prob(x.bfloat16(), context.bfloat16()).isfinite().all()
    torch.testing.assert_close(model.double().log_prob(x, context), expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives_and_transforms():
    model, x, context = prepared("MAF")
    score = torch.func.vmap(torch.func.grad(lambda a, c: model.log_prob(a[None], c[None])[0]))(x, context)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model.log_prob(leaf, context).sum(), leaf, create_graph=True)
    torch.testing.assert_close(grad, score)
    parameters = list(model.parameters())
    found = torch.autograd.grad(grad.square().sum(), parameters, allow_unused=True)
    (again,) = torch.autograd.grad(by_layers(model, leaf, context).sum(), leaf, create_graph=True)
    expected = torch.autograd.grad(again.square().sum(), parameters, allow_unused=True)
    for a, b in zip(found, expected):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_compiled_and_eager_agree():
    model, x, context = prepared("MAF", torch.float32)
    expected = model.log_prob(x, context)
    compiled = torch.compile(model.log_prob, backend="aot_eager")
    torch.testing.assert_close(compiled(x, context), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["MAF", "NSF, coupling", "NSF, autoregressive, zuko's", "RealNVP"])
def test_training_goes_the_same_way(name, monkeypatch):
    curves = []
    for whole in (True, False):
        model, x, context = prepared(name)
        if not whole:
            monkeypatch.setattr(FlowModel, "_whole", lambda self, x, context: None)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = -model.log_prob(x, context).mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        curves.append(torch.stack(losses))
    torch.testing.assert_close(*curves, rtol=1e-9, atol=1e-9)
    assert curves[0][-1] < curves[0][0] - 0.1


def test_frozen_weights_and_inputs_that_need_gradients():
    model, x, context = prepared("MAF")
    for p in model.parameters():
        p.requires_grad_(False)
    assert not model.log_prob(x, context).requires_grad
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model.log_prob(leaf, context).sum(), leaf)
    (expected,) = torch.autograd.grad(by_layers(model, leaf, context).sum(), leaf)
    torch.testing.assert_close(grad, expected)
    next(model.parameters()).requires_grad_(True)
    model.log_prob(x, context).sum().backward()
    assert [p.grad is not None for p in model.parameters()].count(True) == 1


def test_an_empty_batch_and_wrong_shapes():
    model, x, context = prepared("MAF")
    assert model.log_prob(x[:0], context[:0]).shape == (0,)
    with pytest.raises(ValueError, match="x has shape"):
        model.log_prob(x[:, :3], context)
    with pytest.raises(ValueError, match="context"):
        model.log_prob(x)
