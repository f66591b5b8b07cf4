"""Kernel sums over pairs, MMD, kernel distance, nearest rows: the written-out matrix, peers, ties, memory, threads,
errors."""

from __future__ import annotations

import importlib

import pytest
import torch

import genfast
from genfast import _registry, ops, reference
from genfast._peak_memory import peak_bytes
from genfast.ops.pairwise import wae_scales

KERNELS = [("rbf", [0.05, 0.4]), ("imq", [0.7, 6.0, 40.0]), ("polynomial", [0.1])]
each_kernel = pytest.mark.parametrize(("kernel", "scales"), KERNELS, ids=[k for k, _ in KERNELS])


def matrix(x, y, kernel, scales, degree=3, offset=1.0):
    """The whole kernel matrix, from differences."""
    d = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
    if kernel == "polynomial":
        return (scales[0] * x @ y.mT + offset) ** degree
    return sum(torch.exp(-s * d) if kernel == "rbf" else s / (s + d) for s in scales)


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    error = float((found.double() - expected.double()).norm())
    assert error <= tolerance * max(float(expected.double().norm()), 1e-30)


SIZES = [(1, 1, 1), (2, 3, 2), (97, 64, 16), (130, 65, 17), (61, 200, 5), (200, 2100, 3), (101, 40, 150), (7, 300, 1)]


@each_kernel
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_equals_the_matrix(kernel, scales, sizes, dtype):
    n, m, c = sizes
    scales = [s / c for s in scales] if kernel == "rbf" else [s * c for s in scales] if kernel == "imq" else [1 / c]
    x, y = (torch.randn(2, rows, c, dtype=dtype) for rows in (n, m))
    forward, gradient = {torch.float64: (1e-13, 1e-12), torch.float32: (2e-6, 1e-5)}[dtype]
    for other in (y, None):
        for exclude in (False, True) if other is None else (False,):
            a, b = (t.double().requires_grad_() for t in (x, y))
            k = matrix(a, a if other is None else b, kernel, scales)
            if exclude:
                k = k * (1 - torch.eye(n, dtype=torch.float64))
            weights = torch.rand(2, n, dtype=torch.float64)
            leaves = (a,) if other is None else (a, b)
            expected = torch.autograd.grad(k.sum(2), leaves, weights)
            p, q = (t.clone().requires_grad_() for t in (x, y))
            found = ops.pairwise_kernel_sum(
                p, None if other is None else q, kernel=kernel, scales=scales, exclude_diagonal=exclude
            )
            close(found, k.sum(2), forward)
            for f, e in zip(torch.autograd.grad(found, (p,) if other is None else (p, q), weights.to(dtype)), expected):
                if n > 1 or kernel == "polynomial" or other is not None:
                    close(f, e, gradient)
                else:
                    assert not f.any()  # one row and itself


@pytest.mark.parametrize("shift", [0.0, 30.0, 1000.0])
def test_rows_far_from_zero_keep_their_digits(shift):
    x, y = torch.randn(1, 90, 40) + shift, torch.randn(1, 80, 40) + shift
    for kernel, scales in KERNELS[:2]:
        scaled = [s / 40 for s in scales] if kernel == "rbf" else [s * 40 for s in scales]
        found = ops.pairwise_kernel_sum(x, y, kernel=kernel, scales=scaled)
        close(found, matrix(x.double(), y.double(), kernel, scaled).sum(2), 2e-6)


@each_kernel
def test_gradient_of_one_side_alone(kernel, scales):
    x, y = torch.randn(1, 20, 30), torch.randn(1, 70, 30)
    weights = torch.rand(1, 20)
    scales = [s / 30 for s in scales]

    def gradient(*wanted):
        a, b = x.clone().requires_grad_("x" in wanted), y.clone().requires_grad_("y" in wanted)
        found = ops.pairwise_kernel_sum(a, b, kernel=kernel, scales=scales)
        return torch.autograd.grad(found, [t for t in (a, b) if t.requires_grad], weights)

    both = gradient("x", "y")
    assert torch.equal(gradient("x")[0], both[0])
    assert torch.equal(gradient("y")[0], both[1])


@each_kernel
def test_third_derivative(kernel, scales):
    x, y = (torch.randn(1, n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 3))

    def slope(a, b):
        found = ops.pairwise_kernel_sum(a, b, kernel=kernel, scales=scales, degree=4)
        (first,) = torch.autograd.grad(found.square().sum(), a, create_graph=True)
        return torch.autograd.grad(first.square().sum(), a, create_graph=True)[0]

    assert torch.autograd.gradcheck(slope, (x, y), fast_mode=True)


def test_threads_and_runs_do_not_change_the_bits():
    x, y = torch.randn(3, 500, 20, requires_grad=True), torch.randn(3, 700, 20, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            value = ops.mmd(x, y, kernel="imq") + ops.kernel_distance(x, y).sum()
            distance, index = ops.nearest_neighbors(x, y, k=3)
            results.append([value, distance, index, *torch.autograd.grad(value + distance.sum(), (x, y))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_a_batch_equals_its_entries():
    for sizes in ((40, 9, 12, 5), (3, 300, 260, 20)):  # an entry a thread; all threads in turn
        b, n, m, c = sizes
        x, y = torch.randn(b, n, c), torch.randn(b, m, c)
        whole = ops.mmd(x, y, kernel="rbf", bandwidths=[1.0, 3.0], reduction="none")
        for i in range(b):
            assert torch.equal(whole[i], ops.mmd(x[i], y[i], kernel="rbf", bandwidths=[1.0, 3.0]))


# ---- mmd ----


def written_out(x, y, kernel, scales, unbiased):
    xx, yy, xy = (matrix(a, b, kernel, scales) for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    if unbiased:
        return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()
    return xx.mean() + yy.mean() - 2 * xy.mean()


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_equals_the_written_out(unbiased):
    x, y = torch.randn(50, 6, dtype=torch.float64), torch.randn(70, 6, dtype=torch.float64) + 0.3
    for kernel, scales in KERNELS:
        expected = written_out(x, y, kernel, scales, unbiased)
        options = {"gamma": scales[0]} if kernel == "polynomial" else {"bandwidths": scales}
        if kernel == "rbf":
            options["bandwidths"] = [(0.5 / s) ** 0.5 for s in scales]
        torch.testing.assert_close(ops.mmd(x, y, kernel=kernel, unbiased=unbiased, **options), expected)
        found = reference.mmd(x[None], y[None], kernel, scales, 3, 1.0, unbiased)
        torch.testing.assert_close(found[0], expected)


def test_imq_is_that_of_the_wasserstein_autoencoder():
    """wae.py, mmd_penalty with kernel IMQ and a normal prior, line by line."""
    n, dim, scale = 40, 8, 1.5
    qz, pz = torch.randn(n, dim, dtype=torch.float64), scale * torch.randn(n, dim, dtype=torch.float64)
    norms_pz, norms_qz = pz.square().sum(1, keepdim=True), qz.square().sum(1, keepdim=True)
    distances_pz = norms_pz + norms_pz.T - 2.0 * pz @ pz.T
    distances_qz = norms_qz + norms_qz.T - 2.0 * qz @ qz.T
    distances = norms_qz + norms_pz.T - 2.0 * qz @ pz.T
    stat = 0.0
    for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0):
        c = 2.0 * dim * scale**2 * factor
        res1 = (c / (c + distances_qz) + c / (c + distances_pz)) * (1.0 - torch.eye(n))
        stat = stat + res1.sum() / (n * n - n) - (c / (c + distances)).sum() * 2.0 / (n * n)
    torch.testing.assert_close(ops.mmd(qz, pz, kernel="imq", prior_scale=scale), stat)
    torch.testing.assert_close(ops.mmd(qz, pz, kernel="imq", bandwidths=wae_scales(dim, scale)), stat)


def test_the_median_is_that_of_all_pairs():
    x, y = torch.randn(60, 5, dtype=torch.float64), torch.randn(50, 5, dtype=torch.float64) * 2
    sigma = torch.pdist(torch.cat((x, y))).median()
    for bandwidths in (None, "median"):
        found = ops.mmd(x, y, bandwidths=bandwidths)
        torch.testing.assert_close(found, ops.mmd(x, y, bandwidths=float(sigma)))
    found = ops.mmd(x, y, kernel="imq", bandwidths="median")
    torch.testing.assert_close(found, ops.mmd(x, y, kernel="imq", bandwidths=float(sigma**2)))
    same = torch.ones(9, 4)
    assert float(ops.mmd(same, same)) == 0
    assert ops.mmd(torch.randn(3000, 2), torch.randn(3000, 2)).isfinite()


def test_sets_of_one_law_and_of_two():
    x, y = torch.randn(400, 4), torch.randn(400, 4)
    for kernel in ("rbf", "imq", "polynomial"):
        near, far = (float(ops.mmd(x, y + shift, kernel=kernel)) for shift in (0.0, 1.0))
        assert far > 10 * abs(near)
        assert float(ops.mmd(x, x.flip(0), kernel=kernel, unbiased=False)) == pytest.approx(0, abs=2e-5)


def test_half_types_sum_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.randn(64, 20).to(dtype).requires_grad_(), torch.randn(64, 20).to(dtype)
        found = ops.mmd(x, y, kernel="imq")
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, ops.mmd(x.float(), y.float(), kernel="imq"))
        assert torch.autograd.grad(found, x)[0].dtype == dtype


def test_no_array_over_pairs():
    n = 2000
    x, y = torch.randn(n, 8, requires_grad=True), torch.randn(n, 8, requires_grad=True)

    def work():
        distance, _ = ops.nearest_neighbors(x, y)
        return torch.autograd.grad(ops.mmd(x, y, kernel="imq") + ops.kernel_distance(x, y) + distance.sum(), (x, y))

    work()
    assert peak_bytes(work, "cpu") < n * n * 4 / 4


# ---- kernel distance ----


def test_kernel_distance_equals_torchmetrics():
    kid = pytest.importorskip("torchmetrics.image.kid")
    x, y = torch.rand(120, 64, dtype=torch.float64) * 3, torch.rand(120, 64, dtype=torch.float64) * 2
    torch.testing.assert_close(ops.kernel_distance(x, y), kid.poly_mmd(x, y))
    torch.testing.assert_close(
        ops.kernel_distance(x, y, degree=2, gamma=0.1, offset=0.5), kid.poly_mmd(x, y, degree=2, gamma=0.1, coef=0.5)
    )
    torch.testing.assert_close(
        ops.kernel_distance(x.float(), y.float()).double(), kid.poly_mmd(x, y), rtol=1e-4, atol=1e-4
    )


def test_subsets_are_drawn_without_repetition_and_repeatably(monkeypatch):
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(50, 6, dtype=torch.float64) + 1

    def draw():
        return ops.kernel_distance(x, y, subsets=7, subset_size=30, generator=torch.Generator().manual_seed(3))

    found, generator = draw(), torch.Generator().manual_seed(3)
    for value in found:
        i, j = (torch.randperm(n, generator=generator)[:30] for n in (40, 50))
        torch.testing.assert_close(value, ops.kernel_distance(x[i], y[j]))
    monkeypatch.setattr(importlib.import_module("genfast.ops.pairwise"), "_AT_ONCE", 400)  # two at a time
    torch.testing.assert_close(draw(), found)
    whole = ops.kernel_distance(x, y, subsets=3, subset_size=40)
    assert whole.shape == (3,)


# ---- nearest neighbours ----


@pytest.mark.parametrize("sizes", [(1, 1, 1), (97, 64, 16), (130, 65, 40), (50, 1000, 3), (5, 67, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_nearest_equals_all_distances(sizes, dtype):
    n, m, c = sizes
    x, y = torch.randn(2, n, c, dtype=dtype) + 5, torch.randn(2, m, c, dtype=dtype) + 5
    for k in {1, min(3, m), m if m < 70 else 9}:
        distance, index = ops.nearest_neighbors(x, y, k=k)
        every = (x[:, :, None].double() - y[:, None].double()).norm(dim=3)
        expected = every.sort(2).values[..., :k]
        close(distance, expected, 1e-6 if dtype is torch.float32 else 1e-13)
        close(every.gather(2, index), expected, 1e-6 if dtype is torch.float32 else 1e-13)
        assert (distance[..., 1:] >= distance[..., :-1]).all()
        assert all(len(set(row.tolist())) == k for row in index.flatten(0, 1))


def test_nearest_of_equal_rows_is_the_first():
    y = torch.randn(5, 30).repeat(40, 1)
    distance, index = ops.nearest_neighbors(y[:5], y, k=3)
    assert torch.equal(index, torch.arange(5)[:, None] + torch.tensor([0, 5, 10]))
    assert not distance.any()
    small, _ = ops.nearest_neighbors(y[:, :4], exclude_self=True)
    assert not small.any()
    _, index = ops.nearest_neighbors(y, exclude_self=True)
    assert index[0] == 5
    assert (index[1:5, 0] == torch.arange(6, 10)).all()
    assert (index[5:, 0] == torch.arange(195) % 5).all()


def test_slope_of_the_distance():
    x, y = (
        torch.randn(9, 4, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 4, dtype=torch.float64, requires_grad=True),
    )

    def distances(a, b):
        return ops.nearest_neighbors(a, b, k=2)[0]

    assert torch.autograd.gradcheck(distances, (x, y))
    assert torch.autograd.gradgradcheck(distances, (x, y))
    same = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(ops.nearest_neighbors(same, x.detach())[0].sum(), same)
    assert not slope.any()
    assert not ops.nearest_neighbors(x, y)[1].requires_grad


def test_nearest_of_rows_that_are_not_finite():
    x = torch.randn(6, 20)
    x[2] = float("nan")
    x[4, 0] = float("inf")
    for c in (20, 5):
        _, index = ops.nearest_neighbors(x[:, :c], k=6)
        assert all(sorted(row) == list(range(6)) for row in index.tolist())


# ---- errors ----


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ops.mmd(torch.ones(4, 2).long(), torch.ones(4, 2)), TypeError, "x has dtype"),
        (lambda: ops.mmd(torch.ones(4), torch.ones(4)), ValueError, r"x has shape \(4,\), expected \(N, C\)"),
        (lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 3)), ValueError, r"y has shape \(4, 3\), expected \(M, 2\)"),
        (
            lambda: _registry.OPS["pairwise_kernel_sum"](
                torch.ones(1, 4, 2), torch.ones(1, 4, 2).double(), "rbf", [1.0], 1, 0.0, False
            ),
            TypeError,
            "y has dtype torch.float64",
        ),
        (
            lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 2), bandwidths=torch.ones((), requires_grad=True)),
            TypeError,
            "bandwidths is a tensor that requires a gradient",
        ),
        (lambda: ops.mmd(torch.ones(1, 2), torch.ones(4, 2)), ValueError, "x has 1 rows, expected at least 2"),
        (lambda: ops.mmd(torch.ones(4, 2), torch.ones(0, 2), unbiased=False), ValueError, "y has 0 rows"),
        (lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 2), kernel="cosine"), ValueError, "kernel='cosine'"),
        (lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 2), bandwidths="mean"), ValueError, "bandwidths='mean'"),
        (lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 2), bandwidths=[]), ValueError, r"bandwidths=\[\]"),
        (lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 2), bandwidths=-1.0), ValueError, r"bandwidths=\[-1.0\]"),
        (lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 2), reduction="max"), ValueError, "reduction='max'"),
        (
            lambda: ops.mmd(torch.ones(4, 2), torch.ones(4, 2), kernel="polynomial", bandwidths=1.0), ValueError,
            "a polynomial has gamma",
        ),
        (lambda: ops.kernel_distance(torch.ones(4, 2), torch.ones(5, 2), subsets=2), ValueError, "subset_size=1000"),
        (lambda: ops.kernel_distance(torch.ones(4, 2), torch.ones(5, 2), subsets=0, subset_size=2), ValueError,
        "subsets=0"),
        (lambda: ops.kernel_distance(torch.ones(1, 4, 2), torch.ones(1, 5, 2), subsets=2), ValueError,
        r"expected \(N, C\)"),
        (lambda: ops.kernel_distance(torch.ones(4, 2), torch.ones(4, 2), degree=0), ValueError, "degree=0"),
        (lambda: ops.nearest_neighbors(torch.ones(4, 2), torch.ones(3, 2), k=4), ValueError, "k=4, expected 1 to 3"),
        (lambda: ops.nearest_neighbors(torch.ones(4, 2), k=4, exclude_self=True), ValueError, "k=4, expected 1 to 3"),
        (lambda: ops.nearest_neighbors(torch.ones(4, 2), torch.ones(4, 2), exclude_self=True), ValueError,
        "exclude_self"),
        (
            lambda: ops.pairwise_kernel_sum(
                torch.ones(1, 2, 2), torch.ones(1, 2, 2), kernel="rbf", scales=[1], exclude_diagonal=True
            ),
            ValueError, "exclude_diagonal",
        ),
        (lambda: ops.pairwise_kernel_sum(torch.ones(1, 2, 2), kernel="rbf", scales=[0]), ValueError, r"scales=\[0.0\]"),
        (lambda: ops.pairwise_kernel_sum(torch.ones(2, 2), kernel="rbf", scales=[1]), ValueError,
        r"expected \(B, N, C\)"),
        (
            lambda: ops.pairwise_kernel_sum(torch.ones(1, 2, 2), torch.ones(2, 2, 2), kernel="rbf", scales=[1]),
            ValueError,
            r"y has shape \(2, 2, 2\), expected \(1, M, 2\)",
        ),
    ],
)  # fmt: skip
def test_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_empty_sides():
    x, none = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 0, 4, requires_grad=True)
    found = ops.pairwise_kernel_sum(x, none, kernel="rbf", scales=[1.0])
    assert torch.equal(found, torch.zeros(2, 3))
    dx, dy = torch.autograd.grad(found.sum(), (x, none))
    assert not dx.any()
    assert dy.shape == none.shape
    wide = ops.pairwise_kernel_sum(torch.ones(1, 3, 0), torch.ones(1, 2, 0), kernel="imq", scales=[1.0])
    assert torch.equal(wide, torch.full((1, 3), 2.0))


def test_kernels_serve_every_op_of_the_family():
    for name in ("pairwise_kernel_sum", "pairwise_kernel_sum_backward", "nearest_rows"):
        assert {"cpu", "triton"} <= set(_registry.OPS[name].kernels)
    with genfast.backend("cpu"):
        assert ops.mmd(torch.randn(5, 3), torch.randn(4, 3)).isfinite()


@pytest.mark.parametrize("kernel", ["rbf", "imq"])
@pytest.mark.parametrize("c", [5, 48])
@pytest.mark.parametrize("twice", [False, True])
def test_a_row_far_from_all_others_keeps_its_gradient(kernel, c, twice):
    """What a row adds to itself, or to its equal, weighs most of all and is exactly nothing: no rounding of it may
    stay."""
    rows = torch.randn(70, c) / c**0.5
    rows[0] *= 6
    x = rows[None].clone().requires_grad_()
    y = x.detach().clone() if twice else None
    for scale in (1.0, 40.0):
        found = ops.pairwise_kernel_sum(x, y, kernel=kernel, scales=[scale if kernel == "rbf" else 1 / scale])
        leaf = x.detach().double().requires_grad_()
        exact = matrix(leaf, leaf.detach() if twice else leaf, kernel, [scale if kernel == "rbf" else 1 / scale]).sum(2)
        torch.testing.assert_close(found, exact.float(), rtol=2e-6, atol=0)
        (grad,), (expected,) = (torch.autograd.grad(v.sum(), at) for v, at in ((found, x), (exact, leaf)))
        error = (grad[0].double() - expected[0]).norm(dim=1) / expected[0].norm(dim=1).clamp_min(1e-30)
        assert float(error.max()) < 2e-4  # of each row by itself
    assert torch.equal(ops.pairwise_kernel_sum(x[:, :1], kernel=kernel, scales=[1e4]), torch.ones(1, 1))


def test_two_dtypes_are_taken_in_the_wider_and_an_empty_batch_is_nothing():
    x, y = torch.randn(6, 4).bfloat16(), torch.randn(7, 4)
    assert torch.equal(ops.mmd(x, y), ops.mmd(x.float(), y))
    assert torch.equal(ops.kernel_distance(x, y), ops.kernel_distance(x.float(), y))
    assert torch.equal(ops.nearest_neighbors(x, y)[0], ops.nearest_neighbors(x.float(), y)[0])
    assert torch.equal(
        ops.pairwise_kernel_sum(x[None], y[None], kernel="rbf", scales=[0.5]),
        ops.pairwise_kernel_sum(x[None].float(), y[None], kernel="rbf", scales=[0.5]),
    )
    assert float(ops.mmd(torch.rand(0, 5, 3), torch.rand(0, 5, 3))) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("c", [3, 40])
def test_what_is_not_finite_passes_through(bad, c):
    for where in (0, 1):
        sets = [torch.randn(9, c), torch.randn(8, c)]
        sets[where][4, 1] = bad
        leaf = sets[0].requires_grad_()
        for value in (ops.mmd(leaf, sets[1]), ops.mmd(leaf, sets[1], kernel="imq"), ops.kernel_distance(leaf, sets[1])):
            # A row at infinity has similarity 0 with others by the formula, so that a value may be finite; its gradient
            # is not.
            assert bad == float("inf") or bool(value.isnan())
            assert not bool(value.isfinite()) or not bool(torch.autograd.grad(value, leaf)[0].isfinite().all())
