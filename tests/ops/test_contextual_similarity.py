"""contextual_similarity: both published conventions, presets, the bilateral form, degenerate features, any order of
derivatives, threads, memory, errors, the module."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from genfast import nn as gnn
from genfast import ops
from genfast._peak_memory import peak_bytes
from genfast._registry import OPS
from tests.conftest import poisoned

OP = OPS["contextual_similarity"]


def maps(*shapes, dtype=torch.float64):
    return [torch.randn(s, dtype=dtype) for s in shapes]


def written_out(x, y, h=0.5, eps=1e-5, center="batch", distance="cosine", over="sources", prior=None, w=0.0):
    """One sample and one source at a time, from the paper's equations."""
    found = []
    mean = y.mean((0, *range(2, y.dim())))
    for xb, yb in zip(x, y):
        xs, ys = xb.flatten(1).T, yb.flatten(1).T
        if center == "sample":
            mean = ys.mean(0)
        if center == "channel":
            level = ys.mean(1, keepdim=True)
            xs, ys = xs - level, ys - level
        elif center:
            xs, ys = xs - mean, ys - mean
        rows = []
        for i, xi in enumerate(xs):
            if distance == "cosine":
                d = 1 - (ys @ xi) / (ys.norm(dim=1) * xi.norm())
            else:
                d = (ys - xi).square().sum(1) if distance == "l2" else (ys - xi).abs().sum(1)
            weights = torch.exp((1 - d / (d.min() + eps)) / h)
            row = weights / weights.sum()
            rows.append(row if prior is None else (1 - w) * row + w * prior[i])
        a = torch.stack(rows)
        found.append(a.amax(0 if over == "sources" else 1).mean())
    return torch.stack(found)


@pytest.mark.parametrize("over", ["sources", "targets"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize("center", [False, "batch", "sample", "channel"])
def test_equals_the_paper_in_both_conventions(over, distance, center):
    other = (3, 5, 6, 7) if center == "channel" else (3, 5, 4, 9)
    x, y = maps((3, 5, 6, 7), other)
    x.requires_grad_(), y.requires_grad_()
    options = {"eps": 1e-3, "center": center, "distance": distance, "over": over}
    found = ops.contextual_similarity(x, y, bandwidth=0.4, **options, reduction="none")
    expected = written_out(x, y, 0.4, **options)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    weights = torch.rand(3, dtype=torch.float64)
    for f, e in zip(torch.autograd.grad(found, (x, y), weights), torch.autograd.grad(expected, (x, y), weights)):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ops.contextual_similarity(x, y, bandwidth=0.4, **options), found.mean())


def test_equals_the_published_port_in_float64():
    """Values of S-aiueo32's code, on pairs drawn one after another."""
    cases = (
        ((6, 7), 16, 0.5, 1.8655903271075156),
        ((8, 8), 32, 0.1, 1.0268530825405389),
        ((12, 12), 64, 0.5, 4.019434801956222),
    )
    for size, c, h, expected in cases:
        x, y = maps((1, c, *size), (1, c, *size))
        found = gnn.ContextualSimilarityLoss("s-aiueo32", bandwidth=h)(x, y)
        assert found.item() == pytest.approx(expected, abs=1e-13)


def test_presets_are_the_published_formulas():
    x, y = maps((2, 6, 5, 5), (2, 6, 5, 5))

    def published(h, kappa, eps, center, axis, log_eps=0.0):
        mean = y.mean((0, 2, 3), keepdim=True) if center == "batch" else y.mean((2, 3), keepdim=True)
        xh, yh = (F.normalize(t - mean, dim=1).flatten(2) for t in (x, y))
        d = kappa * (1 - xh.mT @ yh)
        weights = torch.exp((1 - d / (d.amin(2, keepdim=True) + eps)) / h)
        a = weights / weights.sum(2, keepdim=True)
        return -(a.amax(axis).mean(1) + log_eps).log()

    expected = {
        "official": published(0.5, 0.5, 1e-5, "batch", 1),
        "s-aiueo32": published(0.5, 1, 1e-5, "batch", 1, 1e-5),
        "cocosnet": published(0.1, 1, 1e-5, "sample", 1),
        "cocosnet-forward": published(0.1, 1, 1e-3, "sample", 2),
        "zoom": published(0.5, 0.5, 1e-3, "batch", 1),
        "adgan": published(0.1, 0.5, 1e-5, "batch", 1),
    }
    for name, loss in expected.items():
        options = {"spatial_weight": 0.0} if name == "zoom" else {}
        torch.testing.assert_close(gnn.ContextualSimilarityLoss(name, reduction="none", **options)(x, y), loss)
        torch.testing.assert_close(gnn.ContextualSimilarityLoss(name, **options)(x, y), loss.mean())


def grid_similarity(sizes, others, h, eps, scale):
    """P as the codes have it: contextual similarity of coordinates at squared distance, written out over all pairs."""

    def points(size):
        return torch.tensor(
            [[i * scale / size[0], j * scale / size[1]] for i in range(size[0]) for j in range(size[1])],
            dtype=torch.float64,
        )

    d = (points(sizes).unsqueeze(1) - points(others)).square().sum(2)
    weights = torch.exp(-d / (d.amin(1, keepdim=True) + eps) / h)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("over", ["sources", "targets"])
@pytest.mark.parametrize("other", [(4, 6), (5, 3)])
def test_the_bilateral_form_on_equal_and_different_grids(over, other):
    x, y = maps((2, 5, 4, 6), (2, 5, *other))
    x.requires_grad_(), y.requires_grad_()
    prior = grid_similarity((4, 6), other, 0.7, 0.05, 2.0)
    found = ops.contextual_similarity(
        x,
        y,
        eps=1e-3,
        over=over,
        spatial_weight=0.4,
        spatial_bandwidth=0.7,
        spatial_eps=0.05,
        spatial_scale=2.0,
        reduction="none",
    )
    expected = written_out(x, y, 0.5, 1e-3, over=over, prior=prior, w=0.4)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for f, e in zip(torch.autograd.grad(found.sum(), (x, y)), torch.autograd.grad(expected.sum(), (x, y))):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-11)


def test_the_bilateral_form_of_sequences_and_of_zoom():
    x, y = maps((2, 5, 9), (2, 5, 9))
    prior = grid_similarity((1, 9), (1, 9), 0.5, 1e-5, 1.0)
    found = ops.contextual_similarity(x, y, spatial_weight=0.1, reduction="none")
    torch.testing.assert_close(found, written_out(x, y, prior=prior, w=0.1))
    x, y = maps((1, 5, 6, 6), (1, 5, 6, 6))
    options = gnn.ContextualSimilarityLoss("zoom").options
    prior = grid_similarity((6, 6), (6, 6), 0.5, 1e-3, options["spatial_scale"])
    expected = -written_out(x, y, 0.5, 2e-3, prior=prior, w=0.1).log().mean()
    torch.testing.assert_close(gnn.ContextualSimilarityLoss("zoom")(x, y), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_identical_features_are_wholly_similar(dtype):
    x = torch.randn(2, 32, 9, 8, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-3
    for h, center in itertools.product((0.1, 0.5), (True, "sample", False)):
        y = x.clone().requires_grad_()
        found = ops.contextual_similarity(y, x, bandwidth=h, center=center)
        assert found.dtype == (dtype if dtype.itemsize >= 4 else torch.float32)
        assert found.item() == pytest.approx(1, abs=tolerance)
        (g,) = torch.autograd.grad(found, y)
        assert g.dtype == dtype
        assert bool(g.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 0.7, -123.0])
def test_constant_features_are_similar_to_all_alike(dtype, value):
    x, y = (
        torch.full((2, 6, 3, 5), value, dtype=dtype, requires_grad=True),
        torch.full((2, 6, 4, 4), value, dtype=dtype),
    )
    y.requires_grad_()
    for over, center in itertools.product(("sources", "targets"), (True, "sample")):
        found = ops.contextual_similarity(x, y, over=over, center=center)
        assert found.item() == pytest.approx(1 / 16, rel=1e-6)
        for g in torch.autograd.grad(found, (x, y)):
            assert not g.count_nonzero()
    assert float(gnn.ContextualSimilarityLoss("s-aiueo32")(x, y)) == pytest.approx(2.7724287509918213, abs=2e-6)
    for distance in ("cosine", "l2", "l1"):
        found = ops.contextual_similarity(x, y, distance=distance, center=False)
        assert found.item() == pytest.approx(1 / 16, rel=0.05)
        for g in torch.autograd.grad(found, (x, y)):
            assert bool(g.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_source_at_the_mean_and_zero_vectors_have_zero_gradients(dtype):
    x, y = maps((1, 7, 5, 5), (1, 7, 5, 5), dtype=dtype)
    x[0, :, 2, 3] = y.mean((0, 2, 3))
    x.requires_grad_()
    found = ops.contextual_similarity(x, y)
    (g,) = torch.autograd.grad(found, x)
    assert bool(found.isfinite())
    assert bool(g.isfinite().all())
    assert float(g.abs().max()) < 1
    assert not g[0, :, 2, 3].count_nonzero()
    x, y = maps((1, 7, 5, 5), (1, 7, 5, 5), dtype=dtype)
    x[0, :, 0], y[0, :, 1] = 0, 0
    x.requires_grad_(), y.requires_grad_()
    found = ops.contextual_similarity(x, y, center=False)
    gx, gy = torch.autograd.grad(found, (x, y))
    assert bool(found.isfinite() & gx.isfinite().all() & gy.isfinite().all())
    assert not gx[0, :, 0].count_nonzero()
    assert not gy[0, :, 1].count_nonzero()


@pytest.mark.parametrize("over", ["sources", "targets"])
def test_one_source_and_one_target(over):
    x, y = maps((2, 5, 1, 1), (2, 5, 3, 4))
    one = gnn.ContextualSimilarityLoss(reduction="none")(x, y)
    torch.testing.assert_close(one, torch.full((2,), math.log(12), dtype=torch.float64))  # a row sums to 1
    x, y = maps((2, 5, 3, 4), (2, 5, 1, 1))
    x.requires_grad_()
    found = ops.contextual_similarity(x, y, over=over, reduction="none")
    assert bool((found == 1).all())
    (g,) = torch.autograd.grad(found.sum(), x)
    assert float(g.abs().max()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("over", ["sources", "targets"])
def test_a_bandwidth_near_zero(dtype, over):
    x, y = maps((2, 16, 6, 6), (2, 16, 5, 7), dtype=dtype)
    x[0, :, 1, 1] = y[0, :, 2, 2]
    x.requires_grad_(), y.requires_grad_()
    found = ops.contextual_similarity(x, y, bandwidth=1e-6, over=over, reduction="none")
    for b in range(2):  # each source chooses one target wholly
        mean = y.detach().mean((0, 2, 3))
        xs, ys = (F.normalize(t[b].detach().flatten(1).T - mean) for t in (x, y))
        chosen = (xs @ ys.T).argmax(1).unique().numel() / 35
        assert float(found[b]) == pytest.approx(chosen if over == "sources" else 1, rel=1e-5)
    for g in torch.autograd.grad(found.sum(), (x, y)):
        assert bool(g.isfinite().all())


def test_half_precision_is_that_of_its_values():
    x, y = maps((2, 32, 8, 8), (2, 32, 8, 8))
    for dtype in (torch.bfloat16, torch.float16):
        xs, ys = x.to(dtype).requires_grad_(), y.to(dtype)
        found = gnn.ContextualSimilarityLoss("official")(xs, ys)
        exact = xs.detach().double().requires_grad_()
        expected = gnn.ContextualSimilarityLoss("official")(exact, ys.double())
        assert found.item() == pytest.approx(float(expected), rel=2e-6)
        g, e = torch.autograd.grad(found, xs)[0].double(), torch.autograd.grad(expected, exact)[0]
        assert float((g - e).norm() / e.norm()) < 4e-3 * (
            1 if dtype == torch.float16 else 4
        )  # the gradient's own rounding


def test_near_duplicates_stay_finite_and_right():
    """Where rounding makes 1 - cos negative, an unclamped minimum changes the exponent's sign."""
    for c in (3, 64, 256):
        y = torch.randn(1, c, 16, 16)
        x = y.flip(3).clone()
        x[..., :8] = torch.randn(1, c, 16, 8)
        found = gnn.ContextualSimilarityLoss(bandwidth=0.1)(x.requires_grad_(), y)
        expected = gnn.ContextualSimilarityLoss(bandwidth=0.1)(x.detach().double(), y.double())
        assert found.item() == pytest.approx(float(expected), abs=2e-3)
        assert bool(torch.autograd.grad(found, x)[0].isfinite().all())


def test_invariances_and_bounds():
    x, y = maps((1, 6, 7, 7), (1, 6, 5, 9))
    found = ops.contextual_similarity(x, y)
    assert 1 / 45 <= float(found) <= 1
    torch.testing.assert_close(ops.contextual_similarity(3 * x + 2, 3 * y + 2), found)
    mixed = (
        x.flatten(2)[..., torch.randperm(49)].reshape(x.shape),
        y.flatten(2)[..., torch.randperm(45)].reshape(y.shape),
    )
    torch.testing.assert_close(ops.contextual_similarity(*mixed), found)


def test_symmetric_is_the_mean_of_both():
    x, y = maps((2, 6, 4, 4), (2, 6, 4, 4))
    loss, both = gnn.ContextualSimilarityLoss("official"), gnn.ContextualSimilarityLoss("official", symmetric=True)
    torch.testing.assert_close(both(x, y), (loss(x, y) + loss(y, x)) / 2)


def rows_of(n, m, c, batch=2, dtype=torch.float64):
    return [F.normalize(torch.randn(batch, k, c, dtype=dtype), dim=2) for k in (n, m)]


@pytest.mark.parametrize("keep_mean", [False, True])
def test_rows_that_win_nothing_have_exactly_zero_gradient(keep_mean):
    x, y = rows_of(70, 40, 12)
    value, winner, *_ = OP(x.requires_grad_(), y, None, None, 0.0, 0.2, 1e-4, "cosine", "sources", keep_mean)
    (g,) = torch.autograd.grad(value.sum(), x)
    for b in range(2):
        idle = torch.ones(70, dtype=torch.bool)
        idle[winner[b]] = False
        assert 0 < int(idle.sum()) < 70
        assert not g[b, idle].count_nonzero()
        assert bool((g[b, ~idle].abs().amax(1) > 0).all())


def test_ties_go_to_the_lowest_index():
    x, y = (torch.randint(0, 2, (1, k, 4)) - 0.5 for k in (9, 7))  # unit rows, whose products are exact
    x, y = torch.cat((x, x), 1), torch.cat((y, y), 1)
    for over in ("sources", "targets"):
        _, winner, _, nearest, _ = OP(x, y, None, None, 0.0, 0.5, 1e-3, "cosine", over, False)
        assert int(nearest.max()) < 7
        assert int(winner.max()) < (9 if over == "sources" else 7)


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize("over", ["sources", "targets"])
def test_derivatives_of_any_order(distance, over):
    x, y = maps((1, 3, 4), (1, 3, 5))
    x.requires_grad_(), y.requires_grad_()

    def similarity(a, b):
        return ops.contextual_similarity(a, b, eps=1e-2, distance=distance, over=over)

    assert torch.autograd.gradcheck(similarity, (x, y))
    assert torch.autograd.gradgradcheck(similarity, (x, y))

    def second(a):
        (g,) = torch.autograd.grad(similarity(a, y), a, create_graph=True)
        return torch.autograd.grad(g.square().sum(), a, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (x,), rtol=1e-2, atol=1e-4)


def test_errors_name_the_argument():
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    wrong = (
        ((x.long(), y), {}, TypeError, "x has dtype torch.int64"),
        ((x[0, 0], y), {}, ValueError, r"x has shape \(4, 4\), expected \(batch, channels"),
        ((x, y[:, :2]), {}, ValueError, r"y has shape \(2, 2, 4, 4\), expected \(2, 3, 4, 4\)"),
        ((x, y[..., :0]), {}, ValueError, "y has shape .* at least one channel and position"),
        ((x, y), {"bandwidth": 0.0}, ValueError, "bandwidth=0.0, expected a positive"),
        ((x, y), {"bandwidth": math.nan}, ValueError, "bandwidth=nan"),
        ((x, y), {"eps": 0.0}, ValueError, "eps=0.0"),
        ((x, y), {"distance": "cos"}, ValueError, "distance='cos', expected one of 'cosine'"),
        ((x, y), {"over": "rows"}, ValueError, "over='rows'"),
        ((x, y), {"center": "y"}, ValueError, "center='y'"),
        ((x, y[..., :2]), {"center": "channel"}, ValueError, "center='channel' takes"),
        ((x, y), {"spatial_weight": 1.0}, ValueError, "spatial_weight=1.0"),
        ((x, y), {"spatial_weight": 0.5, "spatial_eps": 0.0}, ValueError, "spatial_eps=0.0"),
        ((x[:, :, None], y[:, :, None]), {"spatial_weight": 0.5}, ValueError, "one or two spatial axes"),
        ((x, y), {"reduction": "sum"}, ValueError, "reduction='sum'"),
    )
    for args, options, kind, message in wrong:
        with pytest.raises(kind, match=message):
            ops.contextual_similarity(*args, **options)
    rows = x.flatten(2).mT
    with pytest.raises(TypeError, match="y has dtype torch.float64 and x torch.float32"):
        OP(rows, rows.double(), None, None, 0.0, 0.5, 1e-5, "cosine", "sources", False)
    with pytest.raises(TypeError, match="bandwidth is a tensor that requires a gradient"):
        ops.contextual_similarity(x, y, bandwidth=torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match="of prior_rows and prior_columns one is None"):
        OP(rows, rows, torch.ones(16, 4), None, 0.1, 0.5, 1e-5, "cosine", "sources", False)
    with pytest.raises(ValueError, match=r"prior is of 4 x 3 targets, expected 16"):
        OP(rows, rows, torch.ones(16, 4), torch.ones(16, 3), 0.1, 0.5, 1e-5, "cosine", "sources", False)
    with pytest.raises(ValueError, match="keep_mean=True with distance='l1'"):
        OP(rows, rows, None, None, 0.0, 0.5, 1e-5, "l1", "sources", True)
    with pytest.raises(ValueError, match="preset='paper', expected None or one of 'official'"):
        gnn.ContextualSimilarityLoss("paper")
    with pytest.raises(TypeError, match="unknown option 'sigma', expected one of bandwidth"):
        gnn.ContextualSimilarityLoss(sigma=1)
    with pytest.raises(ValueError, match="ContextualSimilarityLoss: reduction='sum'"):
        gnn.ContextualSimilarityLoss(reduction="sum")
    assert "'cocosnet', bandwidth=0.1, center='sample'" in repr(gnn.ContextualSimilarityLoss("cocosnet"))


def test_compiles_whole():
    x, y = maps((1, 8, 5, 5), (1, 8, 5, 5), dtype=torch.float32)
    loss = gnn.ContextualSimilarityLoss("zoom")
    x.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for f, e in zip(torch.autograd.grad(compiled(x, y), x), torch.autograd.grad(loss(x, y), x)):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
@pytest.mark.parametrize("over", ["sources", "targets"])
def test_the_kept_mean_gives_the_gradient_that_a_second_look_gives(distance, over):
    x, y = rows_of(61, 83, 19)
    grads = []
    for keep_mean in (False, True):
        leaf = x.clone().requires_grad_()
        value, *_ = OP(leaf, y, None, None, 0.0, 0.2, 1e-3, distance, over, keep_mean)
        torch.manual_seed(1)
        grads.append(torch.autograd.grad(value, leaf, torch.randn_like(value))[0])
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_clamped_distances_carry_nothing_with_the_mean_and_without():
    y = rows_of(1, 40, 6, 1, torch.float32)[1]
    x = torch.cat((y * (1 + 1e-6), rows_of(9, 1, 6, 1, torch.float32)[0]), 1)  # products that round above 1
    wide = x.double().requires_grad_()
    expected = OP.reference(wide, y.double(), None, None, 0.0, 0.5, 1e-2, "cosine", "sources", False)[0]
    (e,) = torch.autograd.grad(expected.sum(), wide)
    assert (
        int(
            (OP.reference(wide, y.double(), None, None, 0.0, 0.5, 1e-2, "cosine", "sources", False)[2][:, 0] == 0).sum()
        )
        > 20
    )
    for keep_mean in (False, True):
        leaf = x.clone().requires_grad_()
        value = OP(leaf, y, None, None, 0.0, 0.5, 1e-2, "cosine", "sources", keep_mean)[0]
        (g,) = torch.autograd.grad(value.sum(), leaf)
        assert float((g - e).norm() / e.norm()) < 1e-5


@pytest.mark.parametrize(
    "options", [{}, {"distance": "l2"}, {"distance": "l1"}, {"spatial_weight": 0.2}, {"over": "targets"}]
)
def test_the_thread_count_does_not_change_the_bits(options):
    x, y = maps((2, 33, 23, 17), (2, 33, 23, 19), dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
            rows, targets = (t.flatten(2).mT.contiguous() for t in (a, b))
            torch.manual_seed(0)
            prior = (torch.rand(391, 23), torch.rand(391, 19)) if "spatial_weight" in options else (None, None)
            rest = (
                options.get("spatial_weight", 0.0),
                0.5,
                1e-3,
                options.get("distance", "l2"),
                options.get("over", "sources"),
            )
            out = OP(rows, targets, *prior, *rest, False)
            results.append([*out, *torch.autograd.grad(out[0].square().sum(), (a, b))])
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(torch.equal(f, e) for f, e in zip(found, results[0]))


@pytest.mark.parametrize("where", ["source", "target"])
def test_a_nan_is_seen(where):
    x, y = rows_of(30, 90, 8, dtype=torch.float32)
    (x if where == "source" else y)[1, 17, 3] = math.nan
    value, *_ = OP(x, y, None, None, 0.0, 0.5, 1e-3, "cosine", "sources", False)
    assert bool(value[0].isfinite().all())
    assert bool(value[1].isnan().all())


def test_memory_grows_with_the_number_of_features_not_its_square():
    def peak(side):
        x, y = maps((1, 32, side, side), (1, 32, side, side), dtype=torch.float32)
        x.requires_grad_()
        return peak_bytes(lambda: torch.autograd.grad(ops.contextual_similarity(x, y), x))

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small, large = peak(64), peak(128)  # both beyond the size from which some sums are kept
    finally:
        torch.set_num_threads(before)
    assert large < 5 * small  # four times the features
    assert large < 4 * 128**4 / 10  # a tenth of one array of N x M; the eager form holds five and more


@pytest.mark.slow
def test_65536_features_on_rows_checked_in_float64():
    """Where the eager form's arrays take 86 GB. The statistics of some rows, and the maxima of some columns."""
    x, y = maps((1, 64, 256, 256), (1, 64, 256, 256), dtype=torch.float32)
    rows, targets = (F.normalize(t - y.mean((0, 2, 3), keepdim=True), dim=1).flatten(2).mT.contiguous() for t in (x, y))
    found = []
    arguments = (rows, targets, None, None, 0.0, 0.5, 1e-5, "cosine", "sources", False)
    assert peak_bytes(lambda: found.append(OP(*arguments))) < 1 << 30
    value, winner, statistics, nearest = (t[0] for t in found[0][:4])
    columns = torch.randint(0, 65536, (32,))
    chosen = torch.cat((torch.randint(0, 65536, (32,)), winner[columns]))
    d = 1 - rows[0, chosen].double() @ targets[0].double().T
    m = d.amin(1)
    t = d / (m + 1e-5).unsqueeze(1)
    a = ((1 - t) / 0.5).softmax(1)
    torch.testing.assert_close(statistics[0, chosen].double(), m, rtol=1e-6, atol=0)
    relative = t - t.amin(1, keepdim=True)
    torch.testing.assert_close(statistics[1, chosen].double(), (-relative / 0.5).exp().sum(1) - 1, rtol=2e-5, atol=0)
    torch.testing.assert_close(statistics[2, chosen].double(), (a * relative).sum(1), rtol=2e-6, atol=0)
    torch.testing.assert_close(d.gather(1, nearest[chosen].unsqueeze(1)).squeeze(1), m, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        value[columns].double(), a[32:].gather(1, columns.unsqueeze(1)).squeeze(1), rtol=1e-5, atol=0
    )
    assert bool((a <= value.double() * (1 + 1e-5)).all())


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
@pytest.mark.parametrize("over", ["sources", "targets"])
def test_every_element_is_written(distance, over):
    x, y = rows_of(29, 71, 13, dtype=torch.float32)
    x.requires_grad_(), y.requires_grad_()
    with poisoned():
        out = OP(x, y, None, None, 0.0, 0.5, 1e-3, distance, over, distance != "l1")
        grads = torch.autograd.grad(out[0].sum(), (x, y))
    assert all(bool(t.isfinite().all()) for t in (out[0], out[2], out[4], *grads))
    assert bool((out[1] >= 0).all() & (out[3] >= 0).all() & (out[3] < 71).all())


def features(kind, noise=0.0):
    """A target as networks give it, with an area of one colour, or smooth; and a source near it."""
    if kind == "smooth":
        y = F.interpolate(torch.randn(1, 24, 4, 4), size=(10, 10), mode="bicubic", align_corners=True).relu()
    else:
        y = torch.randn(1, 24, 10, 10).relu()
    if kind == "flat":
        y[:, :, :5] = y[:, :, :1, :1]
    return y + noise * torch.randn_like(y), y


DISTANCES = [{}, {"distance": "l2", "center": False, "eps": 1e-5}, {"distance": "l1", "center": False, "eps": 1e-5}]
CONVENTIONS = [(preset, {}) for preset in ("s-aiueo32", "official", "adgan", "cocosnet", "cocosnet-forward", "zoom")]
CONVENTIONS += [("official", options) for options in DISTANCES[1:]]


@pytest.mark.parametrize("kind", ["features", "flat", "smooth"])
@pytest.mark.parametrize(("preset", "options"), CONVENTIONS)
def test_an_optimiser_stays_where_features_match(preset, options, kind):
    """Adam divides a gradient by its size: what is rounding must be below 1e-11, where 1 / (h eps) is up to 1e6."""
    x, y = features(kind)
    loss = gnn.ContextualSimilarityLoss(preset, **options, symmetric=kind == "features")
    leaf = x.clone().requires_grad_()
    optimiser = torch.optim.Adam([leaf], lr=0.01)
    for _ in range(10):
        optimiser.zero_grad()
        loss(leaf, y).backward()
        optimiser.step()
    expected = x.double().requires_grad_()
    (exact,) = torch.autograd.grad(loss(expected, y.double()), expected)
    if float(exact.abs().max()) < 1e-12:  # a smooth target's own best source may be its neighbour
        assert float((leaf - y).abs().max()) < 1e-4
    else:
        (found,) = torch.autograd.grad(loss(x.requires_grad_(), y), x)
        assert float((found - exact).abs().max()) < 1e-5 * (1 + float(exact.abs().max()))


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", ["features", "flat", "smooth"])
@pytest.mark.parametrize(("preset", "options"), CONVENTIONS)
def test_gradients_near_a_match_are_held_to_an_absolute_bound(preset, options, kind, both):
    loss = gnn.ContextualSimilarityLoss(preset, **options)
    for noise in (1e-4, 1e-3, 3e-2):
        x, y = features(kind, noise)
        grads = []
        for dtype in (torch.float32, torch.float64):
            leaves = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_(both)
            grads.append(torch.autograd.grad(loss(*leaves), leaves if both else leaves[0]))
        for found, exact in zip(*grads):
            # An area of one colour has ties, whose winner rounding decides where the spatial term alone tells them
            # apart.
            if not (kind == "flat" and preset in ("zoom", "cocosnet-forward")):
                assert float((found - exact).abs().max()) < 1e-5 * (1 + float(exact.abs().max()))


@pytest.mark.parametrize("options", [*DISTANCES, {"over": "targets"}, {"spatial_weight": 0.3}, {"center": "sample"}])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "y"])
def test_what_is_not_finite_passes_through(options, bad, where):
    if (where, options.get("distance")) == ("y", "l1") and math.isinf(bad):
        pytest.skip("by the formula a target at infinity is one that no source resembles")
    x, y = maps((2, 6, 5, 5), (2, 6, 5, 5), dtype=torch.float32)
    (x if where == "x" else y)[1, 2, 3, 3] = bad
    for over in [options["over"]] if "over" in options else ["sources", "targets"]:
        leaf = x.clone().requires_grad_()
        value = ops.contextual_similarity(leaf, y, **(options | {"over": over}), reduction="none")
        assert bool(value[1].isnan())
        assert bool(value[0].isfinite()) or (where == "y" and options.get("center", True) is True)
        (grad,) = torch.autograd.grad(gnn.ContextualSimilarityLoss(**(options | {"over": over}))(leaf, y), leaf)
        assert bool(grad[1].isnan().any())


def test_one_target_that_is_not_a_number():
    x, y = torch.randn(1, 4, 3), torch.full((1, 4, 1), math.nan)
    for over in ("sources", "targets"):
        assert bool(ops.contextual_similarity(x, y, center=False, over=over).isnan())


@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float16, torch.bfloat16)]
)
def test_two_dtypes_are_taken_in_the_wider(dtypes):
    x, y = (torch.randn(1, 4, 5, 5).to(dtype).requires_grad_() for dtype in dtypes)
    wide = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    loss = gnn.ContextualSimilarityLoss("official", symmetric=True)
    found, expected = loss(x, y), loss(x.to(wide), y.to(wide))
    assert found.dtype is wide
    assert torch.equal(found, expected)
    grads = torch.autograd.grad(found, (x, y))
    assert [g.dtype for g in grads] == list(dtypes)
    for f, e in zip(grads, torch.autograd.grad(expected, (x, y))):
        torch.testing.assert_close(f, e, rtol=4 * torch.finfo(f.dtype).eps, atol=1e-2 * float(e.abs().max()))


def test_autocast_with_a_target_that_was_kept():
    network = torch.nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        target = network(torch.rand(1, 3, 12, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = network(torch.rand(1, 3, 12, 12))
        loss = gnn.ContextualSimilarityLoss("official")(features, target)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, gnn.ContextualSimilarityLoss("official")(features.float(), target))
    loss.backward()
    assert bool(network.weight.grad.isfinite().all())


@pytest.mark.parametrize("options", [{}, {"center": "sample"}, {"distance": "l1"}, {"spatial_weight": 0.1}])
def test_an_empty_batch(options):
    x, y = maps((0, 8, 4, 4), (0, 8, 4, 4), dtype=torch.float32)
    x.requires_grad_()
    assert float(ops.contextual_similarity(x, y, **options).detach()) == 0
    assert ops.contextual_similarity(x, y, **options, reduction="none").shape == (0,)
    loss = gnn.ContextualSimilarityLoss(symmetric=True, **options)(x, y)
    loss.backward()
    assert float(loss.detach()) == 0
    assert x.grad.shape == x.shape
