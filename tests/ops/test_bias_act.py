"""bias_act: the nine activations, layouts, axes, the clamp, derivatives to third order, errors; and the module."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import _registry, ops
from genfast.nn import BiasAct
from genfast.reference.bias_act import ACTIVATIONS, PIECEWISE_LINEAR

FORMS = {"dense": None, "channels_last": torch.channels_last}
# PyTorch's own functions; softplus beyond PyTorch's threshold is exact here.
FUNCTIONS = {
    "linear": lambda v: v,
    "relu": F.relu,
    "lrelu": lambda v: F.leaky_relu(v, 0.2),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "elu": F.elu,
    "selu": F.selu,
    "softplus": lambda v: F.softplus(v, threshold=50),
    "swish": F.silu,
}
each_act = pytest.mark.parametrize("act", ACTIVATIONS)


def written_out(x, bias, act, gain, clamp, dim=1):
    v = x if bias is None else x + bias.reshape([-1 if i == dim else 1 for i in range(x.dim())])
    y = gain * FUNCTIONS[act](v)
    return y if clamp is None else y.clamp(-clamp, clamp)


def test_defaults_are_those_of_the_networks():
    root = math.sqrt(2)
    gains = {
        "linear": 1,
        "relu": root,
        "lrelu": root,
        "tanh": 1,
        "sigmoid": 1,
        "elu": 1,
        "selu": 1,
        "softplus": 1,
        "swish": root,
    }
    x, bias = torch.randn(4, 3, 5, 5).double(), torch.randn(3).double()
    assert list(gains) == list(ACTIVATIONS)
    for act, gain in gains.items():
        torch.testing.assert_close(
            ops.bias_act(x, bias, act=act), written_out(x, bias, act, gain, None), rtol=1e-12, atol=1e-12
        )
    y = ops.bias_act(x, bias, act="lrelu", alpha=0.5, gain=3, clamp=1)
    torch.testing.assert_close(y, (3 * F.leaky_relu(x + bias.reshape(-1, 1, 1), 0.5)).clamp(-1, 1))


@settings(max_examples=80, deadline=None)
@given(
    n=st.sampled_from([1, 2, 3, 70]),
    c=st.sampled_from([1, 2, 3, 5, 16, 33, 130, 600]),
    act=st.sampled_from(list(ACTIVATIONS)),
    positions=st.sampled_from([(), (1,), (300,), (2, 2), (5, 7), (7, 9), (8, 8), (2, 3, 5)]),
    last=st.booleans(),
    biased=st.booleans(),
    clamp=st.sampled_from([None, 0.5]),
)
def test_equals_the_equation(n, c, act, positions, last, biased, clamp):
    shape = (n, c, *positions)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)) if last else None
    x = torch.randn(shape)
    x = (x if form is None else x.contiguous(memory_format=form)).requires_grad_()
    inputs = (x, torch.randn(c, requires_grad=True)) if biased else (x,)
    y = ops.bias_act(*inputs, act=act, gain=1.25, clamp=clamp)
    expected = written_out(*(t.double() for t in inputs), *(() if biased else (None,)), act, 1.25, clamp)
    if form is not None and min(y.shape[1:]) > 1:
        assert y.is_contiguous(memory_format=form)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn(y.shape)
    if clamp is not None:  # which side of the clamp an element within rounding of it falls on is not the matter
        weights[(expected.abs() - clamp).abs() < 1e-6] = 0
    if act == "linear" and clamp is None:
        expected = expected + 0 * x.double()
    grads = torch.autograd.grad(y, inputs, weights)
    exact = torch.autograd.grad(expected, inputs, weights.double())
    assert float((grads[0] - exact[0]).norm()) <= 1e-6 * float(exact[0].norm()) + 1e-12
    if (
        biased
    ):  # a sum, whose terms cancel, of slopes that are exact to an error of size 1, also where swish's crosses zero
        terms = weights.abs().transpose(0, 1).flatten(1).sum(1)
        assert bool(((grads[1] - exact[1]).abs() <= 5e-7 * terms + 1e-12).all())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("biased", [False, True])
def test_strides_of_x_bias_and_gradient(form, biased):
    big = torch.randn(3, 24, 12, 10)
    x = (
        (big if FORMS[form] is None else big.contiguous(memory_format=FORMS[form]))[:, 6:18, ::2]
        .detach()
        .requires_grad_()
    )
    inputs = (x, torch.randn(12, 2)[:, 0].detach().requires_grad_()) if biased else (x,)
    for weights in (torch.randn(3, 1, 6, 10).expand(3, 12, 6, 10), torch.randn(6, 10, 3, 12).permute(2, 3, 0, 1)):
        results = []
        for function in (
            lambda *t: ops.bias_act(*t, act="swish", gain=1.0, clamp=2.0),
            lambda *t: written_out(t[0], t[1] if biased else None, "swish", 1.0, 2.0),
        ):
            y = function(*inputs)
            first = torch.autograd.grad(y, inputs, weights, create_graph=True)
            results.append([y, *first, *torch.autograd.grad(first[0].square().sum(), inputs)])
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 3), (7,), (4, 5)])
def test_any_axis(shape):
    for dim in range(-len(shape), len(shape)):
        for x in (torch.randn(shape).double(), torch.randn(shape[::-1]).double().permute(*range(len(shape))[::-1])):
            bias = torch.randn(shape[dim]).double()
            y = ops.bias_act(x, bias, dim=dim, act="lrelu")
            torch.testing.assert_close(y, written_out(x, bias, "lrelu", math.sqrt(2), None, dim % len(shape)))
    without = ops.bias_act(torch.randn(shape), dim=99, act="tanh")
    assert without.shape == shape
    assert float(ops.bias_act(torch.tensor(0.5), act="tanh")) == pytest.approx(math.tanh(0.5))


def test_nothing_to_do_is_the_input_itself():
    x = torch.randn(2, 3)
    assert ops.bias_act(x) is x
    assert ops.bias_act(x, clamp=9.0) is not x
    assert torch.equal(_registry.OPS["bias_act"](x, None, "linear", 0.0, 1.0, None), x)


@each_act
@pytest.mark.parametrize("clamp", [None, 0.9])
def test_third_derivatives(act, clamp):
    """Along random directions, against the reference's, which are PyTorch's."""
    x, bias = (
        torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(4, dtype=torch.float64, requires_grad=True),
    )
    weights = [torch.randn_like(x) for _ in range(3)]
    results = []
    for function in (
        lambda: ops.bias_act(x, bias, act=act, gain=1.1, clamp=clamp),
        lambda: written_out(x, bias, act, 1.1, clamp),
    ):
        out = function()
        found = []
        for w in weights:
            dx, db = torch.autograd.grad(out, (x, bias), w * out.detach().cos(), create_graph=True, allow_unused=True)
            dx = torch.zeros_like(x) if dx is None else dx
            db = torch.zeros_like(bias) if db is None else db
            found += [dx, db]
            # Nonlinear in both, so that the next order has every mixed term.
            out = dx * dx * x + x * db.reshape(-1, 1).square()
        results.append(found)
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", ["lrelu", "swish", "selu"])
@pytest.mark.parametrize("order", [1, 2])
def test_gradcheck_of_the_derivatives_themselves(act, order):
    x, d, e = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    op = _registry.OPS["bias_act_backward" if order == 1 else "bias_act_second"]
    given = (d, x, bias) if order == 1 else (e, d, x, bias)
    if order == 2 and act in PIECEWISE_LINEAR:
        pytest.skip("zero, and never asked for")
    assert torch.autograd.gradcheck(lambda *t: op(*t, act, 0.3, 1.2, 1.5), given)
    assert torch.autograd.gradgradcheck(lambda *t: op(*t, act, 0.3, 1.2, 1.5), given)


@pytest.mark.parametrize(("act", "reaches"), [("linear", 0), ("relu", 0), ("lrelu", 0), ("tanh", 1), ("swish", 1)])
def test_a_penalty_sends_no_zeros_through_what_is_linear_in_pieces(act, reaches):
    """The second derivative is no gradient, not zeros, for the layer below; the bias still gets one."""
    below, above = torch.nn.Linear(4, 6), torch.nn.Linear(6, 1)
    bias = torch.zeros(6, requires_grad=True)
    x = torch.randn(5, 4, requires_grad=True)
    hidden = below(x)
    seen = []
    hidden.register_hook(lambda g: seen.append(g) if g is not None else None)
    slope = torch.autograd.grad(above(ops.bias_act(hidden, bias, act=act)).sum(), x, create_graph=True)[0]
    seen.clear()
    (slope.norm(dim=1) - 1).square().mean().backward()
    assert len(seen) == reaches
    assert bias.grad is not None
    assert bool(bias.grad.any()) == bool(reaches)
    exact = torch.autograd.functional.jacobian(
        lambda w: (
            (
                torch.autograd.grad(
                    F.linear(
                        written_out(F.linear(x, w, below.bias), bias, act, ACTIVATIONS[act][1], None), above.weight
                    ).sum(),
                    x,
                    create_graph=True,
                )[0].norm(dim=1)
                - 1
            )
            .square()
            .mean()
        ),
        below.weight.detach(),
    )
    torch.testing.assert_close(below.weight.grad, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@each_act
def test_extremes(act, dtype):
    v = torch.tensor([0.0, 1e-30, 1e-8, 1e-4, 0.1, 1.0, 5.0, 9.0, 19.9, 20.1, 60.0, 300.0, 1e30], dtype=dtype)
    x = torch.cat((v, -v)).reshape(2, 13).requires_grad_()
    y = ops.bias_act(x, act=act, gain=1.0) if act != "linear" else ops.bias_act(x, torch.zeros(13, dtype=dtype))
    exact = FUNCTIONS[act](x.detach().double())
    ordinary = exact.abs() > torch.finfo(dtype).tiny
    assert float(((y.detach().double() - exact) / exact)[ordinary].abs().max()) < 8 * torch.finfo(dtype).eps
    assert not ordinary.all() or float(y.detach()[~ordinary].abs().max()) <= torch.finfo(dtype).tiny
    grad = torch.autograd.grad(y.sum(), x, create_graph=True)[0]
    wide = x.detach().double().requires_grad_()
    first = torch.autograd.grad(FUNCTIONS[act](wide).sum(), wide, create_graph=True)[0]
    assert bool(grad.isfinite().all())
    atol = (8 if dtype is torch.float32 else 16) * torch.finfo(
        dtype
    ).eps  # in float64 PyTorch's own v (1 - s) is off as much
    torch.testing.assert_close(grad.double(), first, rtol=0, atol=atol)
    if act not in PIECEWISE_LINEAR:
        second = torch.autograd.grad(grad.sum(), x)[0]
        assert bool(second.isfinite().all())
        exact = torch.autograd.grad(first.sum(), wide)[0].nan_to_num()  # PyTorch's own is NaN at 1e30 for some
        smooth = x.detach() != 0  # at a corner either side is right
        torch.testing.assert_close(second.double()[smooth], exact[smooth], rtol=0, atol=atol)


def test_the_clamp_and_corners():
    x = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0, math.nan]], requires_grad=True)
    y = ops.bias_act(x, act="linear", clamp=1.0)
    assert y.tolist()[0][:5] == [-1, -1, 0, 1, 1]
    assert math.isnan(y[0, 5].detach())
    grad = torch.autograd.grad(y[:, :5].sum(), x)[0]
    assert grad.tolist()[0][:5] == [0, 1, 1, 1, 0]
    assert ops.bias_act(x[:, :5], act="linear", clamp=0).tolist() == [[0] * 5]
    for act, slope in (("relu", 0.0), ("lrelu", 0.25), ("elu", 1.0)):
        zero = torch.zeros(1, 1, requires_grad=True)
        assert float(torch.autograd.grad(ops.bias_act(zero, act=act, alpha=0.25, gain=1.0), zero)[0]) == slope


@pytest.mark.parametrize("gain", [-2.0, 0.0, 0.5])
@pytest.mark.parametrize("alpha", [-0.5, 0.0, 1.5])
def test_any_gain_and_slope(gain, alpha):
    """Derivatives that looked at y for the sign of v would be wrong here."""
    x = torch.randn(3, 4, 9, dtype=torch.float64, requires_grad=True)
    y = ops.bias_act(x, act="lrelu", alpha=alpha, gain=gain)
    torch.testing.assert_close(y, gain * torch.where(x > 0, x, alpha * x))
    slope = gain * torch.where(x > 0, 1.0, alpha)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], slope.double())


def test_not_a_number_stays_in_place():
    for act in ACTIVATIONS:
        x = torch.randn(2, 3, 5)
        x[1, 2, 3] = math.nan
        assert ops.bias_act(x, torch.zeros(3), act=act, clamp=5.0).isnan().nonzero().tolist() == [[1, 2, 3]]


def test_saves_only_its_inputs():
    x, bias = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.bias_act(x, bias, act="lrelu")
    assert sorted(saved) == sorted((x.data_ptr(), bias.data_ptr()))


@pytest.mark.parametrize("shape", [(3, 32, 33, 31), (9, 100, 3, 5), (200, 70)])
@pytest.mark.parametrize("form", FORMS)
def test_the_thread_count_does_not_change_the_bits(form, shape):
    x = torch.randn(shape)
    x = (x if FORMS[form] is None or x.dim() < 4 else x.contiguous(memory_format=FORMS[form])).requires_grad_()
    bias, results = torch.randn(shape[1], requires_grad=True), []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.bias_act(x, bias, act="swish")
            first = torch.autograd.grad(y.square().sum(), (x, bias), create_graph=True)
            results.append((y, *first, *torch.autograd.grad(first[0].square().sum(), (x, bias))))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_sum_of_a_large_constant_gradient_is_exact():
    """8 million ones: a running sum in float32 would stop short."""
    for shape in ((2, 2, 2048, 1024), (2**20, 2), (2**17, 2, 4, 4)):
        bias = torch.zeros(2, requires_grad=True)
        ops.bias_act(torch.ones(shape), bias, act="linear").sum().backward()
        assert bias.grad.tolist() == [math.prod(shape) / 2] * 2


@pytest.mark.parametrize("shape", [(1, 2, 700, 700), (20000, 3), (300, 5, 3, 3)])
@pytest.mark.parametrize("form", FORMS)
def test_the_rounding_of_equal_terms_does_not_add_up(form, shape):
    x = torch.ones(shape)
    x = x if FORMS[form] is None or x.dim() < 4 else x.contiguous(memory_format=FORMS[form])
    bias = torch.zeros(shape[1], requires_grad=True)
    ops.bias_act(x, bias, act="linear").backward(torch.full_like(x, 0.1))
    exact = float(torch.tensor(0.1)) * (x.numel() // shape[1])
    torch.testing.assert_close(
        bias.grad.double(), torch.full((shape[1],), exact, dtype=torch.float64), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (0, 6), (2, 6, 0, 4), (2, 0, 3)])
def test_empty(shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(shape[1], requires_grad=True)
    y = ops.bias_act(x, bias, act="tanh")
    assert y.shape == shape
    first = torch.autograd.grad(y.sum(), (x, bias), create_graph=True)
    for g, t in zip((*first, *torch.autograd.grad(first[0].sum(), (x, bias))), (x, bias, x, bias)):
        assert g.shape == t.shape
        assert not g.any()


def test_a_bias_of_another_dtype():
    x, bias = torch.randn(2, 6, 4).bfloat16().requires_grad_(), torch.randn(6, requires_grad=True)
    y = ops.bias_act(x, bias, act="lrelu")
    assert y.dtype == torch.bfloat16
    dx, dbias = torch.autograd.grad(y.sum(), (x, bias))
    assert (dx.dtype, dbias.dtype) == (torch.bfloat16, torch.float32)
    assert ops.bias_act(x.float(), bias.double()).dtype == torch.float32


@pytest.mark.parametrize(
    ("x", "bias", "options", "error", "message"),
    [
        (
            (2, 5),
            (4,),
            {},
            ValueError,
            r"bias has shape \(4,\), expected \(5,\) \(one for each position along axis 1 of x\)",
        ),
        ((2, 5), (2, 5), {}, ValueError, r"bias has shape \(2, 5\)"),
        ((2, 5), (5,), {"dim": 2}, ValueError, r"dim=2 of x with shape \(2, 5\), expected one of its 2 axes"),
        ((2, 5), (5,), {"dim": 1.0}, TypeError, r"dim=1\.0, expected an int"),
        ((2, 5), (5,), {"act": "gelu"}, ValueError, r"act='gelu', expected one of 'linear', 'relu', .*'swish'"),
        ((2, 5), (5,), {"clamp": -1}, ValueError, r"clamp=-1\.0, expected a number that is not negative"),
        ((2, 5), (5,), {"clamp": math.nan}, ValueError, r"clamp=nan"),
        ((2, 5), (5,), {"dtype": torch.int64}, TypeError, r"bias has dtype torch\.int64, expected a floating-point"),
    ],
)
def test_errors(x, bias, options, error, message):
    options = dict(options)
    bias = torch.zeros(bias, dtype=options.pop("dtype", torch.float32))
    with pytest.raises(error, match=message):
        ops.bias_act(torch.zeros(x), bias, **options)


def test_what_is_no_floating_tensor_is_refused():
    with pytest.raises(TypeError, match=r"x has dtype torch\.int64"):
        ops.bias_act(torch.zeros(2, 8).long())
    with pytest.raises(TypeError, match="bias is a list"):
        ops.bias_act(torch.zeros(2, 2), [0.0, 0.0])
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match=r"takes float32, float64, not float16"):
        ops.bias_act(torch.zeros(2, 8).half(), act="relu")
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(N, C, ...\)"):
        _registry.OPS["bias_act"](torch.zeros(3), None, "relu", 0.0, 1.0, None)


def test_module():
    layer = BiasAct(6, act="lrelu", alpha=0.1, gain=1.0, clamp=2.0)
    assert {k: tuple(v.shape) for k, v in layer.state_dict().items()} == {"bias": (6,)}
    assert "lrelu" in repr(layer)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(2, 6, 4)
    torch.testing.assert_close(layer(x), F.leaky_relu(x + layer.bias[:, None], 0.1).clamp(-2, 2))
    layer(x).sum().backward()
    assert layer.bias.grad is not None
    rows = torch.randn(3, 4, 6)
    torch.testing.assert_close(BiasAct(6, act="tanh", dim=-1)(rows), rows.tanh())
    assert not list(BiasAct(None, act="swish").parameters())
    for arguments in ({"act": "gelu"}, {"clamp": -1.0}):
        with pytest.raises(ValueError, match="bias_act"):
            BiasAct(3, **arguments)
    with pytest.raises(ValueError, match="channels=0"):
        BiasAct(0)
