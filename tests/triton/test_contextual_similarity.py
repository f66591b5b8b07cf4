"""The Triton kernels of contextual_similarity in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from genfast._verify import relative_error
from genfast.kernels import contextual_similarity as contextual_kernels
from tests.triton.flow_cases import FORWARD, GRADIENT, each_dtype, exact, outputs, run


def rows(count, channels, distance="cosine", batch=1):
    made = torch.randn(batch, count, channels)
    return torch.nn.functional.normalize(made, dim=2) if distance == "cosine" else made


def check_contextual(
    x,
    y,
    distance="cosine",
    over="sources",
    mean=False,
    prior=(None, None, 0.0),
    bandwidth=0.5,
    eps=1e-2,
    needs=(True, True),
    looser=1.0,
):
    """The forward against the reference, and the backward for what this forward gave."""
    given = (*prior, bandwidth, eps, distance, over)
    args = (x, y, *given, mean)
    found = run(OPS["contextual_similarity"], args)
    expected = outputs(OPS["contextual_similarity"].reference(*exact(args)))
    for i in (1, 3):
        assert torch.equal(found[i], expected[i])
    for i in (0, 2, 4):
        error = relative_error(found[i], expected[i])
        assert error <= looser * FORWARD[x.dtype], f"output {i} is off by {error:.1e}"
    grad = torch.randn_like(found[0])
    backward = (grad, x, y, *given, *found, *needs)
    dx, dy = run(OPS["contextual_similarity_backward"], backward)
    of_x, of_y = OPS["contextual_similarity_backward"].reference(*exact(backward))
    for error in (relative_error(dx, of_x), relative_error(dy, of_y)):
        assert error <= looser * GRADIENT[x.dtype], f"a gradient is off by {error:.1e}"
    return found, dx, dy


@pytest.mark.parametrize("over", ["sources", "targets"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_contextual_parts_and_batches(distance, over, monkeypatch):
    """More tiles than one on each side, shared between programs."""
    monkeypatch.setattr(contextual_kernels, "MULTIPROCESSORS", 3)
    n, m = (20, 35) if distance == "l1" else (70, 66)
    check_contextual(rows(n, 5, distance, 2), rows(m, 5, distance, 2), distance, over)


@each_dtype
@pytest.mark.parametrize("channels", [3, 40, 300])
def test_contextual_channels(channels, dtype):
    """Whole rows of half types, and more channels than a program holds."""
    x, y = rows(9, channels).to(dtype), rows(11, channels).to(dtype)
    check_contextual(x, y, mean=channels == 40)


@pytest.mark.usefixtures("tf32")
def test_contextual_under_tf32():
    check_contextual(rows(9, 20), rows(11, 20), mean=True)
    check_contextual(rows(9, 140, "l2"), rows(11, 140, "l2"), "l2")


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("over", ["sources", "targets"])
def test_contextual_rows_that_touch(over, mean):
    """Through a distance of zero nothing flows; the products of these integers are exact, so that it is zero."""
    made = torch.randint(-3, 4, (1, 14, 6)).float()
    x, y = made[:, :9], made[:, 4:].clone()
    y[:, 7] = y[:, 1]  # and a row that touches twice
    _, dx, _ = check_contextual(x, y, "l2", over, mean)
    assert bool(dx.isfinite().all())


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_contextual_one_gradient(needs):
    _, dx, dy = check_contextual(rows(9, 6), rows(7, 6), needs=needs)
    assert (dx.numel() > 0, dy.numel() > 0) == needs


def test_contextual_rows_that_win_nothing():
    x, y = rows(12, 6), rows(3, 6)
    for mean in (False, True):
        found, dx, _ = check_contextual(x, y, mean=mean)
        idle = torch.ones(12, dtype=torch.bool)
        idle[found[1].flatten()] = False
        assert idle.sum() >= 9
        assert not dx[0, idle].any()
        assert bool(dx[0, ~idle].any(1).all())


@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_contextual_ties_go_to_the_lowest_index(distance, monkeypatch):
    monkeypatch.setattr(contextual_kernels, "MULTIPROCESSORS", 5)
    # Entries of 1/2 and -1/2 make unit rows, and every product and sum of them is exact in whichever order a BLAS takes
    # it.
    y = (torch.randint(0, 2, (1, 6, 4)) - 0.5).repeat(1, 12, 1)
    x = (torch.randint(0, 2, (1, 5, 4)) - 0.5).repeat(1, 14, 1)
    for over in ("sources", "targets"):
        value, winner, _, nearest, _ = run(
            OPS["contextual_similarity"], (x, y, None, None, 0.0, 0.5, 1e-2, distance, over, False)
        )
        assert int(nearest.max()) < 6
        assert int(winner.max()) < (5 if over == "sources" else 6)
        assert bool(value.isfinite().all())


@pytest.mark.parametrize("over", ["sources", "targets"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "l1"])
def test_contextual_degenerate_features_stay_finite(distance, over):
    same, zero = rows(8, 4, distance), torch.zeros(1, 8, 4)
    equal = rows(1, 4, distance).expand(1, 8, 4)
    for x, y in ((same, same), (equal, equal), (zero, same), (same, zero), (zero, zero)):
        for bandwidth in (0.5, 1e-3):
            args = (x, y, None, None, 0.0, bandwidth, 1e-5, distance, over, distance != "l1")
            found = run(OPS["contextual_similarity"], args)
            grads = run(
                OPS["contextual_similarity_backward"], (torch.ones_like(found[0]), *args[:-1], *found, True, True)
            )
            assert all(bool(t.isfinite().all()) for t in (*found, *grads))
            assert bool((found[0] <= 1.000001).all())
    value = run(OPS["contextual_similarity"], (equal, equal, None, None, 0.0, 0.5, 1e-5, distance, over, False))[0]
    torch.testing.assert_close(value, torch.full((1, 8), 1 / 8))


@pytest.mark.parametrize("over", ["sources", "targets"])
def test_contextual_passes_on_what_is_not_a_number(over):
    x = rows(5, 4)
    x[0, 2] = torch.nan
    value = run(OPS["contextual_similarity"], (x, rows(6, 4), None, None, 0.0, 0.5, 1e-2, "cosine", over, False))[0]
    assert bool(value[0, 2].isnan()) if over == "targets" else bool(value.isnan().all())


def test_contextual_strided_gradient():
    x, y = rows(9, 6), rows(7, 6)
    args = (x.mT.contiguous().mT, y.mT.contiguous().mT, None, None, 0.0, 0.5, 1e-2, "cosine", "sources", True)
    found = run(OPS["contextual_similarity"], args)
    wide = torch.ones(()).expand(1, 7)
    dense, strides = (
        run(OPS["contextual_similarity_backward"], (g, x, y, *args[2:-1], *found, True, True))
        for g in (wide.contiguous(), wide)
    )
    assert torch.equal(dense[0], strides[0])
    assert torch.equal(dense[1], strides[1])


def test_contextual_empty_batch():
    x, y = torch.randn(0, 4, 3), torch.randn(0, 5, 3)
    check_contextual(x, y, mean=True)
