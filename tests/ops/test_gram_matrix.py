"""gram_matrix and style_loss: symmetry to the bit, ranges, layouts, threads, derivatives, published losses, errors."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops, reference
from genfast._registry import OPS
from tests.conftest import poisoned

# Channels and positions around the edges of vectors, tiles, blocks, panels, runs of terms and groups.
SIZES = (
    (1, 1), (1, 5000), (3, 7), (6, 512), (15, 513), (16, 16), (17, 1025), (63, 65), (64, 64), (65, 300), (100, 4097),
    (129, 77),
    (257, 130),
)  # fmt: skip


def written_out(x, scale=1.0, shift=0.0):
    f = x.double().flatten(2) + shift
    return scale * torch.einsum("nip,njp->nij", f, f)


def piq_style(x, y):
    """piq.StyleLoss for one layer: piq/perceptual.py of 0.8.0, gram_matrix and ContentLoss.forward with mse."""
    grams = [torch.stack([torch.mm(f, f.t()) for f in t.flatten(2)]).unsqueeze(1) for t in (x, y)]
    return F.mse_loss(*grams)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("c", "s"), SIZES)
def test_forward_and_backward_at_the_edges_of_tiles(c, s, dtype):
    for n in (1, 2, 3):
        x = torch.randn(n, c, s, dtype=dtype, requires_grad=True)
        g = ops.gram_matrix(x, normalize=False, shift=0.25)
        exact = written_out(x.detach(), shift=0.25)
        out = g.detach()
        bound = 2e-6 if dtype == torch.float32 else 1e-14
        assert float((out.double() - exact).norm()) <= bound * float(exact.norm())
        assert torch.equal(g, g.mT)
        weights = torch.randn(n, c, c, dtype=dtype)
        (dx,) = torch.autograd.grad(g, x, weights)
        expected = reference.gram_matrix_backward(x.detach().double(), weights.double(), 1.0, 0.25)
        assert float((dx.double() - expected).norm()) <= 5 * bound * float(expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_symmetric_to_the_bit(dtype):
    for c, s in ((5, 3), (67, 1000), (130, 5000)):
        g = ops.gram_matrix(torch.randn(2, c, s).to(dtype))
        assert torch.equal(g, g.mT)
        assert g.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        r = reference.gram_matrix(torch.randn(1, c, s).to(dtype))
        assert torch.equal(r, r.mT)


def test_trace_is_the_squared_norm():
    x = torch.randn(3, 70, 9, 11, dtype=torch.float64)
    g = ops.gram_matrix(x, normalize=False)
    torch.testing.assert_close(g.diagonal(dim1=1, dim2=2).sum(1), x.flatten(1).square().sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_of_activations_size_do_not_overflow(dtype):
    x = torch.full((1, 4, 256, 256), 300.0, dtype=dtype, requires_grad=True)
    assert not torch.isfinite((x.flatten(2) @ x.flatten(2).mT).half()).any()  # what the formula in half precision gives
    g = ops.gram_matrix(x, normalize=False)
    torch.testing.assert_close(g, torch.full((1, 4, 4), float(x[0, 0, 0, 0]) ** 2 * 256 * 256))
    torch.testing.assert_close(ops.gram_matrix(x), g / (4 * 256 * 256))
    loss = ops.style_loss(x, torch.zeros(1, 4, 4))
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(1e-3))
    assert dx.dtype == dtype
    assert bool(loss.isfinite())
    assert bool(dx.isfinite().all())
    assert bool(dx.count_nonzero())


def test_constant_and_zero_features_and_identical_grams():
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    assert not ops.gram_matrix(x).any()
    (dx,) = torch.autograd.grad(ops.style_loss(x, torch.ones(1, 3, 3)), x)
    assert not dx.any()
    y = torch.randn(2, 20, 8, 8, requires_grad=True)
    loss = ops.style_loss(y, ops.gram_matrix(y.detach()))
    assert float(loss) == 0
    assert not torch.autograd.grad(loss, y)[0].any()


def test_empty_batches_and_no_positions():
    assert ops.gram_matrix(torch.randn(0, 3, 4, 4)).shape == (0, 3, 3)
    assert not ops.gram_matrix(torch.randn(2, 3, 0)).any()
    assert ops.gram_matrix(torch.randn(2, 0, 4)).shape == (2, 0, 0)
    assert float(ops.style_loss(torch.randn(0, 3, 4, 4), torch.randn(0, 3, 3))) == 0
    x = torch.randn(2, 3, 0, requires_grad=True)
    assert torch.autograd.grad(ops.gram_matrix(x).sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("shape", [(2, 67, 6, 11), (2, 5, 3, 4, 2), (1, 130, 17, 31)])
def test_layouts_give_the_same_bits_and_keep_the_order(shape):
    x = torch.randn(shape)
    form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    target = torch.randn(1, shape[1], shape[1])
    weights = torch.randn(shape[0], shape[1], shape[1])
    wide = torch.full((shape[0], shape[1] + 2, *shape[2:]), math.nan)
    wide[:, 1:-1] = x
    found = []
    for view in (x, x.contiguous(memory_format=form), wide[:, 1:-1], x.flip(-1).flip(-1).mT.mT):
        view = view.detach().requires_grad_()
        g, loss = ops.gram_matrix(view, shift=-1), ops.style_loss(view, target, reduction="none")
        grads = [*torch.autograd.grad(g, view, weights), *torch.autograd.grad(loss.sum(), view)]
        assert all(d.is_contiguous(memory_format=form) == view.is_contiguous(memory_format=form) for d in grads)
        found.append((g, loss, *grads))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][:2], others[:2]))
        for a, b in zip(found[0][2:], others[2:]):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(1, 64, 128, 128), (1, 128, 64, 64), (3, 100, 40, 40), (1, 300, 20, 20), (5, 16, 9, 9)]
)
def test_the_thread_count_does_not_change_the_bits(shape):
    x = torch.randn(shape, requires_grad=True)
    target = torch.randn(1, shape[1], shape[1])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            g, loss = ops.gram_matrix(x), ops.style_loss(x, target)
            results.append([g, loss, *torch.autograd.grad(g, x, target.expand_as(g)), *torch.autograd.grad(loss, x)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_sample_does_not_depend_on_its_batch():
    x = torch.randn(5, 70, 50, 50)
    whole = ops.gram_matrix(x)
    assert all(torch.equal(whole[i : i + 1], ops.gram_matrix(x[i : i + 1])) for i in range(5))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 90), st.integers(0, 1 << 30))
def test_any_shape_equals_the_reference(n, c, s, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, s, generator=generator, dtype=torch.float64)
    a = torch.randn(n, c, c, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(ops.gram_matrix(x, normalize=False), reference.gram_matrix(x), rtol=1e-11, atol=1e-11)
    found, expected = OPS["style_loss"](x, a, 0.5, 0.1, 2.0), reference.style_loss(x, a, 0.5, 0.1, 2.0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_what_the_kernels_leave_unwritten_would_be_nan():
    x, a = torch.randn(2, 70, 90), torch.randn(2, 70, 70)
    with poisoned():
        g = ops.gram_matrix(x)
        value, difference = OPS["style_loss"](x, a, 1.0, 0.0, 1.0)
        dx = OPS["gram_matrix_backward"](x, a, 1.0, 0.0)
    assert all(bool(t.isfinite().all()) for t in (g, value, difference, dx))


def test_third_derivatives():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    a = torch.randn(1, 3, 3, dtype=torch.float64, requires_grad=True)
    for function in (lambda x: ops.gram_matrix(x).sin(), lambda x: ops.style_loss(x, a, normalize=False)):

        def second(x, function=function):
            weights = torch.linspace(1, 2, function(x).numel(), dtype=torch.float64).reshape(function(x).shape)
            (first,) = torch.autograd.grad(function(x), x, weights, create_graph=True)
            return torch.autograd.grad(first.sin().sum(), x, create_graph=True)[0]

        assert torch.autograd.gradcheck(second, (x,))
    assert torch.autograd.gradgradcheck(lambda x, a: ops.style_loss(x, (a + a.mT) / 2), (x, a))


def test_the_backward_ops_pass_opcheck_and_gradcheck():
    x, g = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3, 3)))
    v = torch.randn(2, dtype=torch.float64, requires_grad=True)
    for op, args in (
        (OPS["gram_matrix_backward"], (x, g, 0.5, 0.1)),
        (OPS["style_loss_backward"], (x, v, g, 0.5, 0.1, 2.0)),
    ):
        torch.library.opcheck(op.overload, args)
        assert torch.autograd.gradcheck(op, args)
        assert torch.autograd.gradgradcheck(op, args)


def test_the_gradient_of_gatys():
    """arXiv:1508.06576, equation 6, before its mask of relu: dE/dF = (F^T (G - A))^T / (N^2 M^2)."""
    x, y = torch.randn(2, 1, 5, 3, 4, dtype=torch.float64).unbind()
    x.requires_grad_()
    n, m = 5, 12
    g, a = ops.gram_matrix(x.detach(), normalize=False), ops.gram_matrix(y, normalize=False)
    expected_loss = (g - a).square().sum() / (4 * n**2 * m**2)
    expected = ((g - a) @ x.detach().flatten(2) / (n**2 * m**2)).reshape(x.shape)
    for loss in (
        ops.style_loss(x, a, [1 / (4 * m**2)], normalize=False),
        ops.style_loss(x, ops.gram_matrix(y), [n**2 / 4]),
    ):
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)


def test_equals_the_losses_of_johnson_and_of_pytorchs_example():
    x, y = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64).unbind()
    c, h, w = 5, 4, 6

    def gram(t):  # pytorch/examples, fast_neural_style/neural_style/utils.py
        f = t.view(3, c, h * w)
        return f.bmm(f.transpose(1, 2)) / (c * h * w)

    a = ops.gram_matrix(y)
    torch.testing.assert_close(a, gram(y))
    torch.testing.assert_close(ops.style_loss(x, a), F.mse_loss(gram(x), gram(y)))
    squared_norms = (gram(x) - gram(y)).square().sum((1, 2))
    torch.testing.assert_close(ops.style_loss(x, a, [c**2], reduction="none"), squared_norms)


def test_equals_piqs_style_loss():
    x, y = torch.randn(2, 3, 5, 4, 6).unbind()
    x.requires_grad_()
    found, expected = ops.style_loss(x, y, targets_are="features", normalize=False), piq_style(x, y)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (found, expected)))


def test_equals_piq_itself_where_it_is_installed():
    perceptual = pytest.importorskip("piq.perceptual")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 7, 3, stride=2))
    theirs = perceptual.StyleLoss(network, ["1", "2"], [0.5, 3.0], mean=[0.0] * 3, std=[1.0] * 3)
    x, y = torch.rand(2, 4, 3, 16, 18).unbind()
    x.requires_grad_()

    def layers(t):
        return [network[:2](t), network(t)]

    ours = ops.style_loss(layers(x), layers(y), [0.5, 3.0], targets_are="features", normalize=False)
    torch.testing.assert_close(ours, theirs(x, y))
    torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (ours, theirs(x, y))))


def test_layers_weights_and_targets():
    xs = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((3, 8), (5, 4), (7, 2))]
    ys = [torch.randn(2, c, 3, 3) for c in (3, 5, 7)]
    weights = [0.5, 2.0, 1.0]
    targets = [ops.gram_matrix(y, shift=-1) for y in ys]
    expected = sum(
        w * F.mse_loss(reference.gram_matrix(x, 1 / x[0].numel(), -1.0), a) for w, x, a in zip(weights, xs, targets)
    )
    found = ops.style_loss(xs, targets, weights, shift=-1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ops.style_loss(xs, ys, weights, shift=-1, targets_are="features"), expected)
    torch.testing.assert_close(ops.style_loss(xs, targets, weights, shift=-1, reduction="none").mean(), expected)
    for f, e in zip(torch.autograd.grad(found, xs), torch.autograd.grad(expected, xs)):
        torch.testing.assert_close(f, e)


def layered():
    xs = [torch.randn(2, c, s, dtype=torch.float64, requires_grad=True) for c, s in ((3, 4), (1, 5), (2, 3))]
    targets = [torch.randn(n, c, c, dtype=torch.float64, requires_grad=True) for n, c in ((1, 3), (2, 1), (1, 2))]
    return xs, targets, [0.5, 1.0, 0.25], 0.1, [1.0, 2.0, 0.5]


def test_layers_together_are_the_layers_by_themselves():
    xs, targets, scales, shift, factors = layered()
    values, flat = OPS["style_loss_layers"](xs, targets, scales, shift, factors)
    grads = torch.autograd.grad(values.sin().sum() + flat.square().sum(), [*xs, *targets])
    alone = [OPS["style_loss"](x, a, s, shift, k) for x, a, s, k in zip(xs, targets, scales, factors)]
    torch.testing.assert_close(values, torch.stack([v for v, _ in alone]))
    torch.testing.assert_close(flat, torch.cat([d.flatten() for _, d in alone]))
    expected = torch.autograd.grad(sum(v.sin().sum() + d.square().sum() for v, d in alone), [*xs, *targets])
    torch.testing.assert_close(grads, expected)


def test_layers_together_differentiate_what_needs_it_alone():
    xs, targets, *options = layered()
    for t in (xs[0], targets[1], targets[2]):
        t.requires_grad_(False)
    leaves = [xs[1], xs[2], targets[0]]
    values, _ = OPS["style_loss_layers"](xs, targets, *options)
    assert all(bool(g.count_nonzero()) for g in torch.autograd.grad(values.sum(), leaves, create_graph=True))
    (flat,) = torch.autograd.grad(OPS["style_loss_layers"](xs, targets, *options)[1].sum(), [leaves[0]])
    assert flat.shape == xs[1].shape


def test_third_derivatives_of_layers_together():
    xs, targets, *options = layered()

    def second(x):
        values = OPS["style_loss_layers"]([x, *xs[1:]], targets, *options)[0]
        (first,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        return torch.autograd.grad(first.sin().sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (xs[0],))


def test_layers_together_compile_with_dynamic_shapes():
    def loss(xs, targets):
        return OPS["style_loss_layers"](xs, targets, [0.5] * 3, 0.1, [1.0] * 3)[0].sum()

    xs, targets, *_ = layered()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for f, e in zip(torch.autograd.grad(compiled(xs, targets), xs), torch.autograd.grad(loss(xs, targets), xs)):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_is_the_same_with_layers_together(reduction, monkeypatch):
    """As on a GPU, eager and compiled."""
    xs, targets, *_ = layered()

    def loss(xs, targets):
        return ops.style_loss(xs, targets, [0.5, 2.0, 1.0], shift=-1, reduction=reduction).sum()

    expected = [loss(xs, targets), *torch.autograd.grad(loss(xs, targets), [*xs, *targets])]
    monkeypatch.setattr(sys.modules["genfast.ops.gram_matrix"], "_together", lambda layers: True)
    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        found = function(xs, targets)
        torch.testing.assert_close([found, *torch.autograd.grad(found, [*xs, *targets])], expected)
    with pytest.raises(ValueError, match=r"style_loss: target has shape \(1, 3, 3\), expected \(2 or 1, 2, 2\)"):
        ops.style_loss([xs[2], xs[0]], [targets[0], targets[2]])
    with pytest.raises(ValueError, match="batches of 2 and 1"):
        ops.style_loss([xs[0], xs[1][:1]], targets[:2])


def test_the_target_has_a_gradient_too():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    a = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: ops.style_loss(x, a), (a,))
    y = torch.randn(1, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: ops.style_loss(x, y, targets_are="features"), (y,))


def test_half_features_with_a_float32_target():
    x = torch.randn(2, 20, 9, 9)
    a = ops.gram_matrix(torch.randn(1, 20, 9, 9))
    found = ops.style_loss(x.bfloat16().requires_grad_(), a)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, ops.style_loss(x.bfloat16().float(), a))


def test_under_autocast():
    x = torch.randn(2, 20, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ops.gram_matrix(x), ops.gram_matrix(x))
        assert ops.gram_matrix(x.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.gram_matrix(torch.ones(2, 3)), ValueError, r"features has shape \(2, 3\), expected \(N, C, L\)"),
        (lambda: ops.gram_matrix(torch.ones(2, 3, 4).long()), TypeError, r"features has dtype torch\.int64"),
        (lambda: ops.gram_matrix([1]), TypeError, "features is a list"),
        (lambda: ops.style_loss([], []), ValueError, "features is an empty sequence"),
        (lambda: ops.style_loss(torch.ones(2, 3, 4), [torch.ones(1, 3, 3)] * 2), ValueError, "2 targets for 1 layers"),
        (lambda: ops.style_loss(torch.ones(2, 3, 4), torch.ones(1, 3, 3), [1, 2]), ValueError,
        "2 weights for 1 layers"),
        (
            lambda: ops.style_loss(torch.ones(2, 3, 4), torch.ones(3, 3, 3)), ValueError,
            r"target has shape \(3, 3, 3\), expected \(2 or 1, 3, 3\) for features of shape \(2, 3, 4\)",
        ),
        (lambda: ops.style_loss(torch.ones(2, 3, 4), torch.ones(3, 3)), ValueError, r"target has shape \(3, 3\)"),
        (
            lambda: ops.style_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 3), targets_are="maps"), ValueError,
            "targets_are='maps', expected one of 'gram', 'features'",
        ),
        (
            lambda: ops.style_loss(torch.ones(2, 3, 4), torch.ones(2, 3, 3), reduction="sum"), ValueError,
            "reduction='sum', expected one of 'mean', 'none'",
        ),
        (
            lambda: ops.style_loss([torch.ones(2, 3, 4), torch.ones(1, 3, 4)], [torch.ones(1, 3, 3)] * 2,
            reduction="none"),
            ValueError, "batches of 2 and 1",
        ),
        (lambda: OPS["gram_matrix_backward"](torch.ones(2, 3, 4), torch.ones(1, 3, 3), 1.0, 0.0), ValueError,
        "grad has shape"),
        (
            lambda: OPS["style_loss_layers"]([torch.ones(2, 3, 4)], [torch.ones(1, 3, 3)] * 2, [1.0], 0.0, [1.0]),
            ValueError,
            r"\[1, 2, 1, 1\] features, targets, scales and factors",
        ),
        (lambda: OPS["style_loss_layers"]([], [], [], 0.0, []), ValueError, "expected one of each a layer"),
        (
            lambda: OPS["style_loss_layers"](
                [torch.ones(2, 3, 4), torch.ones(1, 3, 4)], [torch.ones(1, 3, 3)] * 2, [1.0] * 2, 0.0, [1.0] * 2
            ),
            ValueError, "in batches of 1 and torch.float32 on cpu in batches of 2",
        ),
        (
            lambda: OPS["style_loss_backward"](torch.ones(2, 3, 4), torch.ones(1), torch.ones(2, 3, 3), 1.0, 0.0, 1.0),
            ValueError, r"grad has shape \(1,\), expected \(2,\)",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_the_modules():
    x, y = torch.randn(2, 2, 5, 4, 4).unbind()
    assert torch.equal(
        genfast.nn.GramMatrix(normalize=False, shift=-1)(x), ops.gram_matrix(x, normalize=False, shift=-1)
    )
    loss = genfast.nn.GramLoss.of_features([y], [3.0])
    assert torch.equal(loss([x]), ops.style_loss(x, ops.gram_matrix(y), [3.0]))
    other = genfast.nn.GramLoss([torch.zeros(2, 5, 5)], [3.0])
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other([x]), loss([x]))
    assert loss.double().target_0.dtype == torch.float64
