"""minibatch_stddev: groups, features, layouts, third derivatives, coupling, extremes, errors; and the module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import _registry, ops
from genfast.nn import MinibatchStddev

FORMS = {"dense": None, "channels_last": torch.channels_last}


def written_out(x, group_size=4, features=1, eps=1e-8):
    """Sample by sample: the group of sample n is all whose index agrees with n modulo the number of groups."""
    groups = max(1, len(x) // group_size)
    planes = []
    for n in range(len(x)):
        members = x[n % groups :: groups]
        deviation = ((members - members.mean(0)).square().mean(0) + eps).sqrt()
        means = torch.stack([part.mean() for part in deviation.chunk(features)])
        planes.append(means.reshape(-1, *[1] * (x.dim() - 2)).expand(features, *x.shape[2:]))
    return torch.cat((x, torch.stack(planes)), 1)


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 3),
    group_size=st.integers(1, 5),
    features=st.sampled_from([1, 2, 3]),
    last=st.booleans(),
    c=st.sampled_from([1, 2, 5, 16, 37]),
    positions=st.sampled_from([(), (1,), (4, 4), (5, 7), (70, 65), (2, 3, 5), (9000,)]),
)
def test_equals_the_equation(groups, group_size, features, c, positions, last):
    shape = (groups * group_size, c * features, *positions)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)) if last else None
    x = torch.randn(shape)
    x = (x if form is None else x.contiguous(memory_format=form)).requires_grad_()
    y = ops.minibatch_stddev(x, group_size=group_size, features=features, eps=1e-4)
    expected = written_out(x.double(), group_size, features, 1e-4)
    if form is not None and min(x.shape[1:]) > 1:
        assert y.is_contiguous(memory_format=form)
    assert torch.equal(y[:, : shape[1]], x)
    torch.testing.assert_close(y.double(), expected, rtol=2e-6, atol=1e-7)
    weights = torch.randn(y.shape)
    found, exact = (torch.autograd.grad(t, x, w)[0] for t, w in ((y, weights), (expected, weights.double())))
    assert float((found - exact).norm()) <= 2e-6 * float(exact.norm())


def test_the_layer_of_stylegan2_for_the_default_arguments():
    """N = 8, G = 4: reshape(G, M, F, c, H, W), the statistics over G, repeated G times."""
    x = torch.randn(8, 6, 4, 4)
    y = x.reshape(4, 2, 2, 3, 4, 4)
    y = ((y - y.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])
    y = y.reshape(-1, 2, 1, 1).repeat(4, 1, 4, 4)
    torch.testing.assert_close(ops.minibatch_stddev(x, features=2), torch.cat([x, y], dim=1))


@pytest.mark.parametrize("form", FORMS)
def test_strides_of_x_and_gradient(form):
    big = torch.randn(4, 24, 12, 10)
    x = (
        (big if FORMS[form] is None else big.contiguous(memory_format=FORMS[form]))[:, 6:18, ::2]
        .detach()
        .requires_grad_()
    )
    for weights in (torch.randn(4, 1, 6, 10).expand(4, 14, 6, 10), torch.randn(6, 10, 4, 14).permute(2, 3, 0, 1)):
        results = []
        for function in (lambda t: ops.minibatch_stddev(t, group_size=2, features=2), lambda t: written_out(t, 2, 2)):
            y = function(x)
            first = torch.autograd.grad(y, x, weights, create_graph=True)[0]
            results.append([y, first, torch.autograd.grad(first.square().sum(), x)[0]])
        for found, expected in zip(*results):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_group_sizes():
    x = torch.randn(6, 4, 3, 3)
    assert torch.equal(ops.minibatch_stddev(x, group_size=None), ops.minibatch_stddev(x, group_size=6))
    assert torch.equal(ops.minibatch_stddev(x, group_size=100), ops.minibatch_stddev(x, group_size=6))
    assert torch.equal(ops.minibatch_stddev(x[:3]), ops.minibatch_stddev(x[:3], group_size=3))
    alone = ops.minibatch_stddev(x, group_size=1, eps=0.25)[:, 4]
    assert torch.equal(alone, torch.full((6, 3, 3), 0.5))


@pytest.mark.parametrize("shape", [(4, 6, 3), (4, 4)])
def test_third_derivatives(shape):
    """Along random directions, against those of the equation by PyTorch."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w = torch.randn(shape[0], shape[1] + 2, *shape[2:], dtype=torch.float64)
    directions, results = [torch.randn_like(x) for _ in range(2)], []
    for function in (lambda t: ops.minibatch_stddev(t, group_size=2, features=2), lambda t: written_out(t, 2, 2)):
        y = function(x)
        first = torch.autograd.grad((y.square() * w).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad((first * directions[0]).sum() + first.square().sum(), x, create_graph=True)[0]
        results.append((first, second, torch.autograd.grad((second * directions[1]).sum(), x)[0]))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradcheck_of_the_backward_itself():
    x = torch.randn(4, 4, 3, dtype=torch.float64, requires_grad=True)
    d = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    op = _registry.OPS["minibatch_stddev_backward"]
    assert torch.autograd.gradcheck(lambda d, x: op(d, x, 2, 2, 1e-2), (d, x))
    assert torch.autograd.gradgradcheck(lambda d, x: op(d, x, 2, 2, 1e-2), (d, x))


def test_couples_the_samples_of_a_group_and_no_others():
    x = torch.randn(6, 2, 3, requires_grad=True)
    y = ops.minibatch_stddev(x, group_size=3)
    for n in range(6):
        grad = torch.autograd.grad(y[n, 2].sum(), x, retain_graph=True)[0]
        assert grad.flatten(1).any(1).tolist() == [i % 2 == n % 2 for i in range(6)]


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 40)])
def test_extremes(shape):
    same = torch.randn(1, *shape[1:]).expand(shape).clone().requires_grad_()
    y = ops.minibatch_stddev(same)
    torch.testing.assert_close(y[:, shape[1] :], torch.full_like(y[:, shape[1] :], 1e-4))
    grad = torch.autograd.grad(y[:, shape[1] :].sum(), same)[0]
    assert not grad.any()
    # A mean far above the deviation, where a difference of means of squares would be all rounding.
    x = 4096 + torch.randint(-8, 8, shape) / 64
    torch.testing.assert_close(ops.minibatch_stddev(x).double(), written_out(x.double()), rtol=1e-6, atol=0)
    x = torch.randn(shape)
    x[2, 1] = math.nan
    found = ops.minibatch_stddev(x)
    assert bool(found[:, shape[1] :].isnan().all())
    assert torch.equal(found[:, : shape[1]].isnan(), x.isnan())


@pytest.mark.parametrize("shape", [(2, 1, 300, 300), (2, 3, 100, 100), (2, 70, 40, 30)])
@pytest.mark.parametrize("form", FORMS)
def test_the_rounding_of_equal_terms_does_not_add_up(form, shape):
    x = torch.zeros(shape)
    x[1] = 0.2
    x = x if FORMS[form] is None else x.contiguous(memory_format=FORMS[form])
    torch.testing.assert_close(ops.minibatch_stddev(x).double(), written_out(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(8, 64, 33, 31), (16, 48, 4, 4), (64, 512)])
@pytest.mark.parametrize("form", FORMS)
def test_the_thread_count_does_not_change_the_bits(form, shape):
    x = torch.randn(shape)
    x = (x if FORMS[form] is None or x.dim() < 4 else x.contiguous(memory_format=FORMS[form])).requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.minibatch_stddev(x, features=2)
            results.append((y, torch.autograd.grad(y.pow(3).sum(), x)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_saves_only_its_input():
    x = torch.randn(4, 8, 5, 5, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ops.minibatch_stddev(x)
    assert saved == [x.data_ptr()]


@pytest.mark.parametrize("shape", [(0, 6, 4, 4), (0, 6), (2, 6, 0, 4)])
def test_empty(shape):
    x = torch.randn(shape, requires_grad=True)
    y = ops.minibatch_stddev(x)
    assert y.shape == (shape[0], 7, *shape[2:])
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


def test_half_types_are_summed_in_float32():
    x = (300 * torch.randn(4, 40, 5, 5)).half()  # squares overflow float16
    y = ops.minibatch_stddev(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.double(), written_out(x.double()), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(6, 4, 2), {}, ValueError, "a batch of 6 is not a multiple of group_size=4"),
        (
            torch.zeros(4, 4, 2),
            {"features": 3},
            ValueError,
            "x has 4 channels, expected a positive multiple of features=3",
        ),
        (torch.zeros(4, 0, 2), {}, ValueError, "x has 0 channels"),
        (torch.zeros(4), {}, ValueError, r"x has shape \(4,\), expected \(N, C, ...\)"),
        (torch.zeros(()), {"group_size": None}, ValueError, r"x has shape \(\)"),
        (torch.zeros(4, 4), {"group_size": 0}, ValueError, "group_size=0, expected at least 1"),
        (torch.zeros(4, 4), {"features": 1.0}, TypeError, r"features=1\.0, expected an int"),
        (torch.zeros(4, 4), {"eps": 0}, ValueError, "eps=0, expected a positive number"),
        (torch.zeros(4, 4).long(), {}, TypeError, r"x has dtype torch\.int64, expected a floating-point dtype"),
    ],
)
def test_errors(x, options, error, message):
    with pytest.raises(error, match=message):
        ops.minibatch_stddev(x, **options)


def test_a_forced_backend_that_cannot_serve():
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match=r"takes float32, float64, not float16"):
        ops.minibatch_stddev(torch.zeros(2, 8).half())


def test_module():
    layer = MinibatchStddev(2, 3, eps=1e-3)
    x = torch.randn(4, 6, 2, 2)
    torch.testing.assert_close(layer(x), written_out(x, 2, 3, 1e-3))
    assert not layer.state_dict()
    assert repr(layer) == "MinibatchStddev(group_size=2, features=3)"
    assert MinibatchStddev(None)(x).shape == (4, 7, 2, 2)
    for arguments in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match="expected at least 1 each"):
            MinibatchStddev(*arguments)
