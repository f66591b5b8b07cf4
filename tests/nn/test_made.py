"""MADE: what an output depends on, for every form of it; new orders over the same weights; the plain twin."""

from __future__ import annotations

import copy

import pytest
import torch

import genfast
from genfast import nn, reference
from genfast.nn import plain

FORMS = [
    {},
    {"order": "reversed"},
    {"order": "random", "degrees": "random"},
    {"order": [2, 4, 1, 3, 5]},
    {"order": [1, 2, 2, 1, 3]},
    {"hidden": ()},
    {"hidden": (2,)},
    {"hidden": (9, 3, 14), "degrees": "random"},
    {"hidden": (3, 4), "degrees": [[1, 4, 2], [4, 3, 2, 2]]},
    {"residual": True, "hidden": (17, 17)},
    {"residual": True, "hidden": (17,), "activation": "elu", "degrees": "random"},
    {"activation": "tanh"},
]
CONTEXTS = [0, 3]


def build(features=5, twin=False, **form):
    torch.manual_seed(1)
    form = {"hidden": (24, 31), "outputs": 2, **form}
    return (plain.MADENetwork if twin else nn.MADENetwork)(features, **form).double()


def arguments(made, n=3):
    context = torch.randn(n, made.context_features, dtype=torch.float64) if made.context_features else None
    return torch.randn(n, made.features, dtype=torch.float64), context


def dependence(made, of="x"):
    """bool (D, D) or (D, K): which inputs, or features of the context, each output depends on, for any of some
    samples."""
    x, context = arguments(made, 16)
    function = (lambda x: made(x, context).sum(0)) if of == "x" else (lambda c: made(x, c).sum(0))
    jacobian = torch.autograd.functional.jacobian(function, x if of == "x" else context)
    return (jacobian != 0).any(2).any(1)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_an_output_depends_on_earlier_inputs_alone(form, context):
    made = build(**{"activation": "tanh", **form}, context=context)
    before = made.order[:, None] > made.order
    found = dependence(made)
    assert not bool((found & ~before).any())
    if min(form.get("hidden", (24,)), default=24) >= 17:  # units for every degree
        assert torch.equal(found, before)
    if context and not isinstance(form.get("degrees"), list):  # given degrees may have no unit for the first outputs
        assert bool(dependence(made, "context").all())


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_plain_twin_gives_the_same(form, context):
    ours, twin = build(**form, context=context), build(**form, context=context, twin=True)
    assert list(ours.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), twin.state_dict().values()))
    x, c = arguments(ours)
    y, expected = ours(x, c), twin(x, c)
    assert y.shape == (3, 5, 2)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(o, list(m.parameters()), g) for o, m in ((y, ours), (expected, twin)))):
        torch.testing.assert_close(a, b)


def test_degrees_are_those_of_the_paper():
    made = nn.MADENetwork(5, (8, 7), outputs=2)
    first, second, last = made.linears
    assert first.in_degrees.tolist() == [1, 2, 3, 4, 5]
    assert first.out_degrees.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert second.in_degrees.tolist() == first.out_degrees.tolist()
    assert last.out_degrees.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert torch.equal(first.mask, first.out_degrees[:, None] >= first.in_degrees)
    assert torch.equal(last.mask, last.out_degrees[:, None] > last.in_degrees)
    drawn = nn.MADENetwork(50, (9, 200), degrees="random", generator=torch.Generator().manual_seed(3))
    a, b = drawn.linears[0].out_degrees, drawn.linears[1].out_degrees
    assert 1 <= int(a.min()) <= int(b.min())
    assert int(b.max()) <= 49
    for layer in drawn.linears[:-1]:
        assert bool((layer.out_degrees.diff() >= 0).all())


def test_draws_follow_the_generator():
    made = [
        nn.MADENetwork(9, (20,), order="random", degrees="random", generator=torch.Generator().manual_seed(s))
        for s in (3, 3, 4)
    ]
    assert torch.equal(made[0].order, made[1].order)
    assert torch.equal(made[0].linears[0].out_degrees, made[1].linears[0].out_degrees)
    assert not torch.equal(made[0].order, made[2].order)
    assert sorted(made[0].order.tolist()) == list(range(1, 10))


def test_one_feature_depends_on_the_context_alone():
    for residual in (False, True):
        made = build(1, hidden=(6, 6), context=2, residual=residual)
        x, c = arguments(made, 4)
        y = made(x, c)
        assert torch.equal(y, made(x + 1, c))
        assert not torch.equal(y[0], y[1])
    constant = build(1, hidden=(6,))
    assert torch.equal(constant(x), constant(x + 1))


def test_a_residual_net_begins_near_the_one_without_blocks():
    made = build(residual=True, hidden=(24, 24))
    x, _ = arguments(made)
    first, *_, last = made.linears
    torch.testing.assert_close(made(x).flatten(1), last(first(x)), rtol=0.05, atol=0.05)
    assert not torch.equal(made(x).flatten(1), last(first(x)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_new_order_touches_no_weight(form):
    """Orders come and go in order-agnostic training, and what one kills the next may use."""
    made = build(**form)
    before = copy.deepcopy(made.state_dict())
    x, _ = arguments(made)
    y = made(x)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        made.resample(order="random", generator=generator)
        found = dependence(made)
        assert not bool((found & ~(made.order[:, None] > made.order)).any())
        for name, value in made.state_dict().items():
            if value.is_floating_point():
                assert torch.equal(value, before[name])
    made.resample(order=before["linears.0.in_degrees"])
    assert torch.equal(made(x), y)
    dead = [~layer.mask for layer in made.linears]
    made(x).square().sum().backward()
    for layer, hidden in zip(made.linears, dead):
        assert not layer.weight.grad[hidden].count_nonzero()
    optimizer.step()
    for i, hidden in enumerate(dead):
        assert torch.equal(made.linears[i].weight[hidden], before[f"linears.{i}.weight"][hidden])


def test_new_hidden_degrees():
    for residual in (False, True):
        made = build(9, hidden=(40, 40), residual=residual)
        before = [layer.out_degrees.clone() for layer in made.linears]
        made.resample(degrees="random", generator=torch.Generator().manual_seed(2))
        after = [layer.out_degrees for layer in made.linears]
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[-1], after[-1])
        assert bool((after[0].diff() < 0).any())  # a unit's degree is drawn for that unit
        assert torch.equal(dependence(made), made.order[:, None] > made.order)
        twin = plain.MADENetwork(9, (40, 40), outputs=2, residual=residual).double()
        twin.load_state_dict(made.state_dict())
        x, _ = arguments(made)
        torch.testing.assert_close(made(x), twin(x))


@pytest.mark.parametrize("residual", [False, True])
def test_a_state_dict_brings_its_order(residual, tmp_path):
    form = {"order": "random", "degrees": "random", "hidden": (20, 20), "residual": residual, "context": 2}
    saved = nn.MADENetwork(7, **form, generator=torch.Generator().manual_seed(1))
    other = nn.MADENetwork(7, **form, generator=torch.Generator().manual_seed(2))
    x, c = torch.randn(4, 7), torch.randn(4, 2)
    assert not torch.equal(saved(x, c), other(x, c))
    torch.save(saved.state_dict(), tmp_path / "made.pt")
    other.load_state_dict(torch.load(tmp_path / "made.pt"))
    assert torch.equal(saved(x, c), other(x, c))
    assert torch.equal(copy.deepcopy(saved)(x, c), saved(x, c))
    names = set(saved.state_dict())
    assert {"linears.0.weight", "linears.0.in_degrees", "linears.0.out_degrees", "context.weight"} <= names
    assert not any(n.endswith(("rows", "columns", "counts")) for n in names)


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_layers_of_the_degree_program_are_the_network(form, context):
    made = build(**form, context=context)
    x, c = arguments(made)
    program = genfast.sampling.DegreeProgram.build(made.layers(c))
    assert program.levels <= 5
    # z = x + shift solved for x: with the x that comes out, the network gives the shifts that went in.
    z = torch.randn_like(x)
    found, logdet = genfast.ops.autoregressive_inverse(z, _shifts(made, c), "affine:additive")
    torch.testing.assert_close(found + made(found, c)[..., 0], z, rtol=1e-9, atol=1e-9)
    assert not logdet.count_nonzero()


def _shifts(made, context):
    """The program of a net of which the first output alone counts."""
    *layers, last = made.layers(context)
    last.weight, last.bias = last.weight[:: made.outputs], last.bias[:: made.outputs]
    last.mask = last.mask[:: made.outputs]
    if last.context is not None:
        last.context = last.context[:, :: made.outputs]
    return genfast.sampling.DegreeProgram.build([*layers, last])


def test_it_compiles_and_trains():
    made = nn.MADENetwork(6, (32, 32), outputs=2, context=3)
    x, c = torch.randn(16, 6), torch.randn(16, 3)
    torch.testing.assert_close(torch.compile(made, fullgraph=True)(x, c), made(x, c))
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        shift, log_scale = made(x, c).unbind(-1)
        loss = (0.5 * ((x - shift) * (-log_scale).exp()).square() + log_scale).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


def test_other_devices_and_dtypes():
    made = nn.MADENetwork(6, (8,)).to(torch.bfloat16)
    assert made(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert made.linears[0].rows.dtype == torch.int64
    assert made(torch.randn(0, 6, dtype=torch.bfloat16)).shape == (0, 6, 1)
    assert nn.MADENetwork(6, (8,)).to("meta")(torch.empty(2, 6, device="meta")).shape == (2, 6, 1)


def test_masked_linear_takes_other_degrees():
    layer = nn.MaskedLinear([1, 2, 3], [2, 1, 3, 0])
    assert torch.equal(layer.mask, torch.tensor([2, 1, 3, 0])[:, None] >= torch.tensor([1, 2, 3]))
    weight = layer.weight.detach().clone()
    layer.set_degrees([3, 2, 1], [0, 1, 2, 3])
    assert torch.equal(layer.mask, torch.arange(4)[:, None] >= torch.tensor([3, 2, 1]))
    assert torch.equal(layer.weight, weight)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(layer(x, "silu"), torch.nn.functional.silu(x @ (weight * layer.mask).t() + layer.bias))
    assert layer.staircase.mask.equal(reference.staircase_mask(layer.rows, layer.columns, layer.counts))
    assert "strict=True" in repr(nn.MaskedLinear([1], [1], strict=True))


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("features=0, expected a whole number of at least 1", lambda: nn.MADENetwork(0)),
        ("hidden=0, expected", lambda: nn.MADENetwork(3, (4, 0))),
        ("activation='swish', expected one of", lambda: nn.MADENetwork(3, activation="swish")),
        ("order='down', expected None", lambda: nn.MADENetwork(3, order="down")),
        (r"order=\[1, 2, 4\], expected 3 degrees from 1 to 3", lambda: nn.MADENetwork(3, order=[1, 2, 4])),
        ("order has dtype torch.float32", lambda: nn.MADENetwork(3, order=torch.rand(3))),
        ("degrees='odd', expected", lambda: nn.MADENetwork(3, degrees="odd")),
        ("degrees has 1 layers, expected one for each", lambda: nn.MADENetwork(3, (4, 4), degrees=[[1, 1, 2, 2]])),
        (r"degrees=\[1, 3\], expected 2 degrees from 0 to 2", lambda: nn.MADENetwork(3, (2,), degrees=[[1, 3]])),
        ("expected one or more layers of equal width", lambda: nn.MADENetwork(3, (4, 5), residual=True)),
        ("differ with residual=True", lambda: nn.MADENetwork(3, (2, 2), residual=True, degrees=[[1, 2], [1, 1]])),
        (r"x has shape \(2, 4\), expected \(N, 3\)", lambda: nn.MADENetwork(3)(torch.zeros(2, 4))),
        ("made with context=0, called with one", lambda: nn.MADENetwork(3)(torch.zeros(2, 3), torch.zeros(2, 1))),
        ("made with context=2, called without one", lambda: nn.MADENetwork(3, context=2)(torch.zeros(2, 3))),
        (
            r"context has shape \(1, 2\), expected \(2, 2\)",
            lambda: nn.MADENetwork(3, context=2)(torch.zeros(2, 3), torch.zeros(1, 2)),
        ),
        ("in_degrees has dtype torch.float32", lambda: nn.MaskedLinear([1.5], [1])),
        (r"out_degrees has shape \(2,\), expected \(1,\)", lambda: nn.MaskedLinear([1], [1]).set_degrees([1], [1, 2])),
    ],
)
def test_bad_input_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call()
