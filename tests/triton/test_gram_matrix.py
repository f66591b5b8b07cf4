"""The Triton kernels of gram_matrix in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import genfast
from genfast._registry import OPS
from genfast._verify import relative_error
from genfast.kernels import _common
from genfast.kernels import gram_matrix as gram_kernels
from tests.triton.flow_cases import FORMS, FORWARD, GRADIENT, compare, each_dtype, run, strided


def check_gram(features, scale=0.3, shift=0.0, grad=None):
    dtype = features.dtype
    g = compare(OPS["gram_matrix"], (features, scale, shift), FORWARD[dtype])[0]
    assert torch.equal(g, g.mT)
    grad = torch.randn_like(g) if grad is None else grad
    compare(OPS["gram_matrix_backward"], (features, grad, scale, shift), GRADIENT[dtype])


def check_style(features, target, scale=0.3, shift=0.0, factor=0.7):
    dtype = features.dtype
    difference = compare(OPS["style_loss"], (features, target, scale, shift, factor), FORWARD[dtype])[1]
    assert torch.equal(difference, difference.mT)
    grad = torch.randn(features.shape[0])
    compare(OPS["style_loss_backward"], (features, grad, difference, scale, shift, factor), GRADIENT[dtype])


@each_dtype
def test_gram_parts_of_the_positions(dtype, monkeypatch):
    monkeypatch.setattr(gram_kernels, "STEPS", 1)
    monkeypatch.setattr(gram_kernels, "JOINING", 0)
    monkeypatch.setattr(gram_kernels, "MULTIPROCESSORS", 3)
    for n, c, shift in ((1, 67, 0.0), (2, 3, -1.0)):
        features = torch.randn(n, c, 150).to(dtype)
        assert (
            gram_kernels._parts(
                gram_kernels.view(features), gram_kernels._gram_tile("ieee", True, c, False, False)
            ).splits
            == 3
        )
        check_gram(features, shift=shift)
        check_style(features, torch.randn(1, c, c), shift=shift)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(("wide", "dtype"), [(False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)])
def test_gram_large_tiles(wide, dtype, monkeypatch):
    """With and without parts; on the diagonal and beside it."""
    monkeypatch.setattr(gram_kernels, "LARGE_FROM", 2)
    monkeypatch.setattr(gram_kernels, "WIDE_FROM", 2 if wide else 1 << 30)
    c = 270 if wide else 130
    assert gram_kernels._gram_tile("ieee", True, c, False, False, True).halves == 1 + wide
    check_gram(torch.randn(1, c, 20).to(dtype))
    monkeypatch.setattr(gram_kernels, "STEPS", 1)
    monkeypatch.setattr(gram_kernels, "JOINING", 0)
    check_style(torch.randn(1, c, 130).to(dtype), torch.randn(1, c, c))


def test_gram_parts_leave_no_round_nearly_empty():
    for programs, at_once, most, joining, found in (
        (10, 264, 999, 0.0, 25),
        (20, 132, 8, 0.0, 6),
        (36, 264, 999, 0.0, 7),
        (999, 132, 999, 0.0, 1),
        (1, 528, 3, 0.0, 3),
        (5, 4, 0, 0.0, 1),
        (72, 132, 8, 0.1, 3),
        (36, 264, 999, 0.9, 1),
    ):
        assert _common.parts(programs, at_once, most, joining) == found


@pytest.mark.parametrize("form", FORMS)
def test_gram_strides(form):
    features = strided(torch.randn(2, 5, 6, 4), form)
    check_gram(features)
    check_gram(features, shift=0.5, grad=torch.ones(()).expand(2, 5, 5))
    check_style(features, torch.randn(2, 5, 5).mT)


def test_gram_targets_of_half_types():
    check_style(torch.randn(2, 5, 9), torch.randn(2, 5, 5).half())


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (1, 1, 1)])
def test_gram_empty(shape):
    check_gram(torch.randn(shape))
    check_style(torch.randn(shape), torch.randn(1, shape[1], shape[1]))


def test_gram_of_large_activations_in_float16():
    """Sums of squares beyond float16's range, and a gradient below it."""
    features = torch.full((1, 3, 2000), 300.0).half()
    g = run(OPS["gram_matrix"], (features, 1 / 6000, 0.0))[0]
    torch.testing.assert_close(g, torch.full((1, 3, 3), 30000.0))
    grad = torch.full((1, 3, 3), 1e-9)
    found = run(OPS["gram_matrix_backward"], (features, grad, 1.0, 0.0))[0]
    torch.testing.assert_close(found, torch.full_like(features, 6 * 300e-9))


@pytest.mark.usefixtures("tf32")
def test_gram_under_tf32():
    check_gram(torch.randn(1, 70, 40))
    check_style(torch.randn(2, 5, 40), torch.randn(1, 5, 5))


def check_layers(shapes, dtype=torch.float32, shift=0.0, forms=()):
    features = [torch.randn(s).to(dtype) for s in shapes]
    for i in forms:
        features[i] = features[i].contiguous(memory_format=torch.channels_last)
    targets = [torch.randn(s[0] if i % 2 else 1, s[1], s[1]) for i, s in enumerate(shapes)]
    scales = [0.3 / (i + 1) for i in range(len(shapes))]
    args = (features, targets, scales, shift, [1.5 / s[1] for s in shapes])
    values, flat = compare(OPS["style_loss_layers"], args, FORWARD[dtype])
    differences = [d.view(s[0], s[1], s[1]) for d, s in zip(flat.split([s[0] * s[1] ** 2 for s in shapes]), shapes)]
    assert all(torch.equal(d, d.mT) for d in differences)
    return args, values, differences


def count_launches(monkeypatch):
    """The grids of the kernels that layers share, as they are launched."""
    grids = []

    class Counted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append((self.kernel.fn.__name__, grid))
            return self.kernel[grid]

    for name in ("_gram_layers", "_join_layers"):
        monkeypatch.setattr(gram_kernels, name, Counted(getattr(gram_kernels, name)))
    return grids


@each_dtype
@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_gram_layers_with_and_without_parts(dtype, shift, monkeypatch):
    monkeypatch.setattr(gram_kernels, "STEPS", 1)
    grids = count_launches(monkeypatch)
    check_layers([(1, 67, 3, 5), (1, 1, 8, 12), (1, 3, 1, 1)], dtype, shift)
    check_layers([(2, 2, 9, 8), (2, 5, 4, 4)], dtype, shift)
    assert [name for name, _ in grids] == ["_gram_layers", "_join_layers"] * 2
    assert grids[0][1][0] > 3 + 1 + 1  # tiles


def test_gram_layers_in_both_orders_share_the_second_kernel(monkeypatch):
    grids = count_launches(monkeypatch)
    check_layers([(2, 3, 5, 4), (2, 70, 4, 4), (2, 1, 6, 7), (2, 8, 4, 3)], forms=(1, 3))
    assert [name for name, _ in grids] == ["_gram_layers", "_gram_layers", "_join_layers"]
    check_layers([(2, 16, 4, 8), (2, 32, 4, 4)], torch.bfloat16, forms=(0, 1))
    assert len(grids) == 5


def test_gram_layers_equal_the_layers_by_themselves(monkeypatch):
    """To the bit where the positions are split alike; the squares are added in another order."""
    monkeypatch.setattr(gram_kernels, "STEPS", 1 << 20)
    args, values, differences = check_layers([(2, 70, 5, 4), (2, 3, 9, 9)], shift=0.5)
    for f, a, scale, factor, value, difference in zip(*args[:3], args[4], values, differences):
        alone, d = run(OPS["style_loss"], (f, a, scale, 0.5, factor))
        assert torch.equal(difference, d)
        torch.testing.assert_close(value, alone, rtol=1e-6, atol=0)


def test_gram_layers_that_do_not_lie_together(monkeypatch):
    """Strides without a 1, no positions and no samples go layer by layer; a slice off the vectors' grid does not."""
    grids = count_launches(monkeypatch)
    wide = torch.randn(2, 3, 8, 6)
    features, targets = [wide[..., ::2], torch.randn(2, 4, 7)], [torch.randn(1, 3, 3), torch.randn(1, 4, 4)]
    compare(OPS["style_loss_layers"], (features, targets, [1.0, 2.0], 0.0, [0.5, 0.25]), FORWARD[torch.float32])
    check_layers([(2, 3, 0, 4), (2, 2, 3, 3)])
    check_layers([(0, 3, 2, 4), (0, 2, 3, 3)])
    assert not grids
    features[0] = torch.randn(2 * 3 * 16 + 1)[1:].view(2, 3, 16)
    compare(OPS["style_loss_layers"], (features, targets, [1.0, 2.0], 0.0, [0.5, 0.25]), FORWARD[torch.float32])
    assert len(grids) == 2


@pytest.mark.usefixtures("tf32")
def test_gram_layers_under_tf32(monkeypatch):
    monkeypatch.setattr(gram_kernels, "LARGE_FROM", 2)
    check_layers([(1, 130, 4, 5), (1, 3, 8, 8)])


def test_style_loss_of_layers_shares_launches_and_has_their_gradient(monkeypatch):
    grids = count_launches(monkeypatch)
    xs = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((3, 8), (66, 4), (1, 5))]
    targets = [torch.randn(1, c, c, requires_grad=True) for c in (3, 66, 1)]
    weights = [0.5, 2.0, 1.0]
    for reduction in ("mean", "none"):
        grids.clear()
        with genfast.backend("triton"):
            loss = genfast.ops.style_loss(xs, targets, weights, shift=0.25, reduction=reduction)
            found = [loss, *torch.autograd.grad(loss.sum(), [*xs, *targets])]
        assert [name for name, _ in grids] == ["_gram_layers", "_join_layers"]
        exactly = [t.detach().double().requires_grad_() for t in (*xs, *targets)]
        loss = genfast.ops.style_loss(exactly[:3], exactly[3:], weights, shift=0.25, reduction=reduction)
        expected = [loss, *torch.autograd.grad(loss.sum(), exactly)]
        assert [name for name, _ in grids] == ["_gram_layers", "_join_layers"]
        for f, e in zip(found, expected):
            assert relative_error(f, e) <= GRADIENT[torch.float32]


def test_style_loss_of_mixed_dtypes_goes_layer_by_layer(monkeypatch):
    grids = count_launches(monkeypatch)
    xs, targets = [torch.randn(1, 3, 9), torch.randn(1, 4, 9).half()], [torch.randn(1, 3, 3), torch.randn(1, 4, 4)]
    with genfast.backend("triton"):
        genfast.ops.style_loss(xs, targets)
        genfast.ops.style_loss(xs[:1], targets[:1])
    assert not grids
