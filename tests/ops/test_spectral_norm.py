"""spectral_norm: the algorithm step by step, torch's parametrisation, layouts, any order of derivatives, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import genfast
from genfast import nn as gnn
from genfast import ops
from genfast._registry import OPS
from tests.conftest import poisoned
from tests.triton.flow_cases import FORMS, strided

SHAPES = [
    ((1, 1), 0), ((6, 9), 0), ((6, 9), 1), ((70, 133), 0), ((130, 67), 1), ((5, 3, 4, 4), 0), ((6, 21, 3, 3), 1),
    ((3, 4, 5), 2), ((4, 37, 5, 5), 1), ((33, 2100), 0), ((9, 5, 3, 3, 3), 0), ((257, 3), 0),
]  # fmt: skip


def written_out(weight, u, v, iterations, eps, dim):
    """Algorithm 1 with a matrix at hand; autograd sees W alone."""
    matrix = weight.movedim(dim, 0).flatten(1)
    with torch.no_grad():
        for _ in range(iterations):
            if v is None or iterations == 0:
                right = matrix.T @ u
                right = right / max(float(right.norm()), eps)
                u = matrix @ right
                u = u / max(float(u.norm()), eps)
                last = right
            else:
                u = matrix @ v
                u = u / max(float(u.norm()), eps)
                v = matrix.T @ u
                v = v / max(float(v.norm()), eps)
                last = v
        if not iterations:
            last = v
    sigma = u @ matrix @ last
    return weight / sigma, u, last, sigma


def start(shape, dim, dtype=torch.float32):
    weight = torch.randn(shape, dtype=dtype)
    return weight, torch.randn(shape[dim], dtype=dtype), torch.randn(weight.numel() // shape[dim], dtype=dtype)


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize(("given", "iterations"), [(False, 1), (False, 4), (True, 1), (True, 3), (True, 0)])
def test_equals_the_algorithm(shape, dim, given, iterations):
    weight, u, v = start(shape, dim)
    if not iterations:  # vectors for which sigma is not the small rest of a sum that cancels
        _, u, v, _ = written_out(weight, u, None, 5, 1e-12, dim)
    weight.requires_grad_()
    exact = weight.detach().double().requires_grad_()
    with poisoned():
        found = ops.spectral_norm(weight, u, v if given else None, iterations=iterations, dim=dim)
    expected = written_out(exact, u.double(), v.double() if given else None, iterations, 1e-12, dim)
    for f, e in zip(found, expected):
        assert f.shape == e.shape
        assert float((f - e).norm()) <= 3e-6 * float(e.norm())
    weights = torch.randn(shape)
    with poisoned():
        (dw,) = torch.autograd.grad((found[0] * weights).sum() + 0.3 * found[3], weight)
    (dexact,) = torch.autograd.grad((expected[0] * weights).sum() + 0.3 * expected[3], exact)
    assert float((dw - dexact).norm()) <= 1e-5 * float(dexact.norm()) + 1e-6


def test_converges_to_the_largest_singular_value():
    weight = torch.randn(20, 30, dtype=torch.float64)
    normed, u, v, sigma = ops.spectral_norm(weight, torch.randn(20, dtype=torch.float64), iterations=2000)
    torch.testing.assert_close(sigma, torch.linalg.matrix_norm(weight, 2))
    torch.testing.assert_close(torch.linalg.matrix_norm(normed, 2), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(weight @ v, sigma * u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dim", [0, 1, 3, -1])
@pytest.mark.parametrize("form", FORMS)
def test_any_layout(form, dim):
    weight, u, v = start((6, 4, 3, 5), dim)
    laid = strided(weight, form).detach().requires_grad_()
    weight.requires_grad_()
    grad = torch.randn(weight.shape)
    for given, iterations in ((None, 2), (v, 1)):
        a = ops.spectral_norm(laid, u, given, iterations=iterations, dim=dim)
        b = ops.spectral_norm(weight, u, given, iterations=iterations, dim=dim)
        for f, e in zip(a, b):
            torch.testing.assert_close(f, e)
        for other in (grad, strided(grad, form)):
            (da,) = torch.autograd.grad(a[0], laid, other, retain_graph=True)
            (db,) = torch.autograd.grad(b[0], weight, grad, retain_graph=True)
            torch.testing.assert_close(da, db)
    if form == "channels_last":
        assert a[0].is_contiguous(memory_format=torch.channels_last)


def test_its_arguments_stay_as_they_are():
    weight, u, v = start((5, 7), 0)
    kept = [t.clone() for t in (weight, u, v)]
    found = ops.spectral_norm(weight, u, v, iterations=2)
    assert all(torch.equal(a, b) for a, b in zip((weight, u, v), kept))
    same = ops.spectral_norm(weight, u, v, iterations=0)
    assert torch.equal(same[1], u)
    assert same[1].data_ptr() != u.data_ptr()
    assert not any(f.data_ptr() in (weight.data_ptr(), u.data_ptr(), v.data_ptr()) for f in found)


def test_u_and_v_are_constants():
    """The derivative holds u and v fixed: dW = (G - <G, W_sn> u v^T) / sigma, though they were made of W."""
    weight, u, _ = start((5, 7), 0, torch.float64)
    weight.requires_grad_()
    u.requires_grad_()
    normed, left, right, sigma = ops.spectral_norm(weight, u, iterations=1)
    assert not left.requires_grad
    assert not right.requires_grad
    grad = torch.randn(5, 7, dtype=torch.float64)
    dw, du = torch.autograd.grad(normed, (weight, u), grad, allow_unused=True)
    assert du is None
    torch.testing.assert_close(dw, (grad - (grad * normed).sum() * torch.outer(left, right)) / sigma)


@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((2, 3, 2), 1)])
def test_derivatives_of_every_order(shape, dim):
    weight, u, _ = start(shape, dim, torch.float64)
    _, u, v, _ = ops.spectral_norm(weight, u, iterations=5, dim=dim)
    weight.requires_grad_()

    def function(w):
        normed, _, _, sigma = ops.spectral_norm(w, u, v, iterations=0, dim=dim)
        return normed, sigma

    assert torch.autograd.gradcheck(function, (weight,))
    assert torch.autograd.gradgradcheck(function, (weight,))

    def second(w):
        normed, sigma = function(w)
        (first,) = torch.autograd.grad(normed.pow(3).sum() + sigma.square(), w, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), w, create_graph=True)

    assert torch.autograd.gradcheck(second, (weight,))


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_second_derivatives_equal_autograds(iterations):
    """With iterations no difference quotient will do; autograd through the algorithm, u and v without a graph, does."""
    weight, u, v = start((5, 3, 2, 2), 0, torch.float64)
    _, u, v, _ = ops.spectral_norm(weight, u, iterations=3)
    weight.requires_grad_()
    results = []
    for function in (
        lambda: ops.spectral_norm(weight, u, v, iterations=iterations),
        lambda: written_out(weight, u, v, iterations, 1e-12, 0),
    ):
        normed, _, _, sigma = function()
        loss = normed.pow(3).sum() + sigma.pow(2)
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), weight, create_graph=True)
        (third,) = torch.autograd.grad(second.pow(2).sum(), weight)
        results.append((first, second, third))
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected)


def test_half_weights_iterate_in_float32():
    weight, u, v = start((12, 40), 0)
    half = weight.bfloat16().requires_grad_()
    normed, left, right, sigma = ops.spectral_norm(half, u, v, iterations=3)
    assert (normed.dtype, left.dtype, right.dtype, sigma.dtype) == (torch.bfloat16, *(torch.float32,) * 3)
    exact = ops.spectral_norm(half.detach().float(), u, v, iterations=3)
    torch.testing.assert_close(left, exact[1])
    torch.testing.assert_close(sigma.detach(), exact[3])
    assert torch.autograd.grad(normed.sum(), half)[0].dtype == torch.bfloat16


def test_a_zero_weight_is_what_the_reference_makes_of_it():
    found = ops.spectral_norm(torch.zeros(3, 4), torch.ones(3))
    assert bool(found[0].isnan().all())  # 0 / 0, as torch's own
    assert not any(bool(f.any()) for f in found[1:])


def test_opcheck_of_the_backward():
    weight, u, v = start((4, 3, 2, 2), 1)
    weight, u, v, sigma = weight.requires_grad_(), u, v, torch.ones((), requires_grad=True)
    for grads in ((torch.randn_like(weight), None), (torch.randn_like(weight).requires_grad_(), torch.ones(()))):
        torch.library.opcheck(OPS["spectral_norm_backward"].overload, (*grads, weight, u, v, sigma, 1))
    for given, iterations in ((None, 2), (v, 1)):
        torch.library.opcheck(OPS["spectral_norm"].overload, (weight, u, given, iterations, 1e-12, 1))


@pytest.mark.parametrize(("shape", "dim"), [((130, 517), 0), ((517, 130), 1), ((40, 96, 3, 3), 1)])
def test_the_thread_count_does_not_change_the_bits(shape, dim):
    weight, u, v = start(shape, dim)
    weight.requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            normed, left, right, sigma = ops.spectral_norm(weight, u, v, iterations=2, dim=dim)
            (dw,) = torch.autograd.grad(normed.square().sum(), weight)
            results.append((normed, left, right, sigma, dw))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(
    ("weight", "u", "v", "options", "error", "message"),
    [
        ((5,), (5,), None, {}, ValueError, r"weight has shape \(5,\), expected two axes or more"),
        (
            (0, 5),
            (0,),
            None,
            {},
            ValueError,
            r"weight has shape \(0, 5\), expected two axes or more, none of them empty",
        ),
        ((4, 5), (5,), None, {}, ValueError, r"u has shape \(5,\), expected \(4,\)"),
        ((4, 5), (4,), None, {"dim": 1}, ValueError, r"u has shape \(4,\), expected \(5,\) \(one per index of axis 1"),
        ((4, 5), (4,), (4,), {}, ValueError, r"v has shape \(4,\), expected \(5,\)"),
        ((4, 5), (4,), None, {"dim": 2}, ValueError, r"dim=2, expected an axis of the weight of shape \(4, 5\)"),
        ((4, 5), (4,), None, {"dim": -3}, ValueError, r"dim=-1, expected an axis"),
        ((4, 5), (4,), None, {"iterations": 0}, ValueError, "iterations=0, expected at least 1, or 0 with v"),
        ((4, 5), (4,), (5,), {"iterations": -1}, ValueError, "iterations=-1, expected at least 0"),
        ((4, 5), (4,), None, {"eps": 0.0}, ValueError, r"eps=0\.0, expected a positive number"),
    ],
)
def test_errors(weight, u, v, options, error, message):
    v = None if v is None else torch.ones(v)
    with pytest.raises(error, match=message):
        ops.spectral_norm(torch.ones(weight), torch.ones(u), v, **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"weight has dtype torch\.int64"):
        ops.spectral_norm(torch.ones(3, 4).long(), torch.ones(3))
    with pytest.raises(TypeError, match=r"u has dtype torch\.int64"):
        ops.spectral_norm(torch.ones(3, 4), torch.ones(3).long())
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match="takes float32, float64, not bfloat16"):
        ops.spectral_norm(torch.ones(3, 4).bfloat16(), torch.ones(3).bfloat16())


# ---- the module ----

LAYERS = {
    "linear": lambda: nn.Linear(7, 5),
    "conv1d": lambda: nn.Conv1d(3, 4, 5),
    "conv2d": lambda: nn.Conv2d(3, 8, 3),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 4),
    "embedding": lambda: nn.Embedding(9, 5),
}


def pair(label, **options):
    """A layer with ours, and one with torch's, in the same state."""
    ours = LAYERS[label]()
    theirs = copy.deepcopy(ours)
    gnn.spectral_norm(ours, **options)
    parametrizations.spectral_norm(theirs, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours.double(), theirs.double()


@pytest.mark.parametrize("options", [{}, {"n_power_iterations": 3, "eps": 1e-6}, {"dim": 1}], ids=str)
@pytest.mark.parametrize("label", LAYERS)
def test_equals_torchs_parametrisation(label, options):
    ours, theirs = pair(label, **options)
    for training in (True, True, False, True):
        ours.train(training)
        theirs.train(training)
        a, b = ours.weight, theirs.weight
        torch.testing.assert_close(a, b)
        weights = torch.randn_like(a)
        grads = [
            torch.autograd.grad((w * weights).sum(), m.parametrizations.weight.original)[0]
            for w, m in ((a, ours), (b, theirs))
        ]
        torch.testing.assert_close(*grads)
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)


@pytest.mark.parametrize("label", LAYERS)
def test_checkpoints_exchange_both_ways(label):
    ours, theirs = gnn.spectral_norm(LAYERS[label]()), parametrizations.spectral_norm(LAYERS[label]())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours.eval().weight, theirs.eval().weight)
    other = gnn.spectral_norm(LAYERS[label]()).eval()
    theirs.load_state_dict(other.state_dict())
    torch.testing.assert_close(other.weight, theirs.weight)


def test_vectors_move_in_training_alone():
    layer = gnn.spectral_norm(nn.Linear(7, 5))
    held = layer.parametrizations.weight[0]
    x = torch.randn(2, 7)
    before = held._u.clone()
    layer(x)
    assert not torch.equal(held._u, before)
    layer.eval()
    before = [held._u.clone(), held._v.clone()]
    first = layer(x)
    assert torch.equal(layer(x), first)
    assert torch.equal(held._u, before[0])
    assert torch.equal(held._v, before[1])


def test_deepcopy_and_two_forwards_before_a_backward():
    layer = gnn.spectral_norm(nn.Linear(7, 5))
    twin = copy.deepcopy(layer)
    x, y = torch.randn(2, 7), torch.randn(2, 7)
    for model in (layer, twin):
        (
            model(x).sum() - model(y).sum()
        ).backward()  # the second forward moves u and v, which the first one's graph holds
    original, other = layer.parametrizations.weight.original, twin.parametrizations.weight.original
    assert original.data_ptr() != other.data_ptr()
    assert torch.equal(original.grad, other.grad)
    assert torch.equal(layer.parametrizations.weight[0]._u, twin.parametrizations.weight[0]._u)


def test_a_penalty_through_normalised_layers_equals_torchs():
    critics = []
    for wrap in (gnn.spectral_norm, parametrizations.spectral_norm):
        torch.manual_seed(1)
        critics.append(nn.Sequential(wrap(nn.Linear(6, 9)), nn.Tanh(), wrap(nn.Linear(9, 1))).double())
    critics[1].load_state_dict(critics[0].state_dict())
    x = torch.randn(4, 6, dtype=torch.float64)
    grads = []
    for critic in critics:
        at = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(critic(at).sum(), at, create_graph=True)
        (ops.sample_norm(g) - 1).square().mean().backward()
        grads.append([p.grad for p in critic.parameters()])
    for a, b in zip(*grads):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_compiles_without_a_break():
    layer = nn.Sequential(
        gnn.spectral_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), gnn.spectral_norm(nn.ConvTranspose2d(4, 2, 3))
    )
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 3, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, True, False):
        layer.train(training)
        twin.train(training)
        a, b = compiled(x), twin(x)
        torch.testing.assert_close(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    for a, b in zip(layer.buffers(), twin.buffers()):
        torch.testing.assert_close(a, b)


def test_vectors_and_other_names():
    layer = nn.LayerNorm(6)
    gnn.spectral_norm(layer)
    torch.testing.assert_close(layer.weight.norm(), torch.ones(()))
    assert list(layer.state_dict()) == ["bias", "parametrizations.weight.original"]
    layer = gnn.spectral_norm(nn.Bilinear(3, 4, 5), "weight")
    assert parametrize.is_parametrized(layer, "weight")
    layer.weight = torch.ones(5, 3, 4)  # assignable, as torch's is
    assert torch.equal(layer.parametrizations.weight.original, torch.ones(5, 3, 4))


def test_module_errors():
    with pytest.raises(ValueError, match=r"spectral_norm: ReLU has no parameter 'weight'"):
        gnn.spectral_norm(nn.ReLU())
    with pytest.raises(ValueError, match="n_power_iterations=0, expected at least 1"):
        gnn.spectral_norm(nn.Linear(2, 2), n_power_iterations=0)
    with pytest.raises(ValueError, match=r"dim=2, expected an axis of the weight of shape \(3, 2\)"):
        gnn.spectral_norm(nn.Linear(2, 3), dim=2)
