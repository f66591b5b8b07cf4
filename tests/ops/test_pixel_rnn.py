"""row_lstm and diagonal_lstm: position by position, causality, the published bugs, threads, formats, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast import _allocator, ops, reference

BOTH = {"row": (ops.row_lstm, 3), "diagonal": (ops.diagonal_lstm, 2)}
both = pytest.mark.parametrize(("op", "taps"), BOTH.values(), ids=BOTH)


def cell(a, c):
    o, f, i, g = a.chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def by_position(gates, weight, h0, c0, diagonal):
    """The definition, one position of one image at a time, on no convolution and no skewed map."""
    hidden, (height, width) = weight.shape[1], gates.shape[2:]
    zero = gates.new_zeros(hidden)
    found = torch.zeros(gates.shape[0], hidden, height, width, dtype=gates.dtype)
    for n in range(gates.shape[0]):
        state = {}

        def before(r, c):
            if diagonal:
                outside = (zero, zero) if r < 0 else (zero if h0 is None else h0, zero if c0 is None else c0)
            elif not 0 <= c < width:
                outside = (zero, zero)
            else:
                outside = (zero if h0 is None else h0[:, c], zero if c0 is None else c0[:, c])
            return state.get((r, c), outside)  # noqa: B023

        for r in range(height):
            for c in range(width):
                a = gates[n, :, r, c]
                if diagonal:
                    a = a + weight[..., 0] @ before(r - 1, c)[0] + weight[..., 1] @ before(r, c - 1)[0]
                    state[r, c] = cell(a, before(r, c - 1)[1])
                else:
                    for j in range(weight.shape[2]):
                        a = a + weight[..., j] @ before(r - 1, c + j - weight.shape[2] // 2)[0]
                    state[r, c] = cell(a, before(r - 1, c)[1])
                found[n, :, r, c] = state[r, c][0]
    return found


@settings(max_examples=40, deadline=None)
@given(
    diagonal=st.booleans(),
    n=st.integers(1, 3),
    hidden=st.sampled_from([1, 2, 7, 8, 17]),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    taps=st.sampled_from([1, 3, 5]),
    states=st.booleans(),
    last=st.booleans(),
)
def test_equals_the_definition_position_by_position(diagonal, n, hidden, height, width, taps, states, last):
    gates = torch.randn(n, 4 * hidden, height, width, dtype=torch.float64)
    gates = gates.contiguous(memory_format=torch.channels_last) if last else gates
    weight = 0.5 * torch.randn(4 * hidden, hidden, 2 if diagonal else taps, dtype=torch.float64)
    shape = (hidden,) if diagonal else (hidden, width)
    h0, c0 = (torch.randn(shape, dtype=torch.float64) if states else None for _ in range(2))
    op = ops.diagonal_lstm if diagonal else ops.row_lstm
    torch.testing.assert_close(op(gates, weight, h0=h0, c0=c0), by_position(gates, weight, h0, c0, diagonal))


def test_skew_and_back():
    x = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    skewed = reference.pixel_rnn.skew(x)
    assert skewed.shape == (2, 3, 4, 8)
    for r in range(4):
        assert torch.equal(skewed[:, :, r, r : r + 5], x[:, :, r])
        assert not skewed[:, :, r, :r].any()
        assert not skewed[:, :, r, r + 5 :].any()
    assert torch.equal(reference.pixel_rnn.unskew(skewed, 5), x)


def dependence(op, taps, r, c, height=5, width=6):
    """|d h(r, c) / d gates| at every position."""
    gates = torch.randn(1, 8, height, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, 2, taps, dtype=torch.float64)
    (grad,) = torch.autograd.grad(op(gates, weight)[0, :, r, c].sum(), gates)
    return grad[0].abs().sum(0)


@pytest.mark.parametrize(("r", "c"), [(0, 0), (2, 3), (3, 0), (1, 5), (4, 5)])
def test_the_row_lstm_sees_the_triangle_above_and_nothing_else(r, c):
    found = dependence(*BOTH["row"], r, c)
    for i in range(5):
        for j in range(6):
            assert bool(found[i, j]) == (i <= r and abs(j - c) <= r - i), (i, j)


@pytest.mark.parametrize(("r", "c"), [(0, 0), (2, 3), (3, 0), (1, 5), (4, 5)])
def test_the_diagonal_lstm_sees_all_above_and_to_the_left_and_nothing_else(r, c):
    """A public port pads the state-to-state convolution after the column, and so reads row r + 1."""
    found = dependence(*BOTH["diagonal"], r, c)
    for i in range(5):
        for j in range(6):
            assert bool(found[i, j]) == (i <= r and j <= c), (i, j)


@both
def test_the_content_gate_is_a_tanh(op, taps):
    """A public port has a sigmoid on all four gates, so that no cell can fall below zero."""
    gates = torch.zeros(1, 8, 3, 3)
    gates[:, 6:] = -2
    h = op(gates, torch.zeros(8, 2, taps))
    assert bool((h < 0).all())
    expected = 0.5 * torch.tanh(0.5 * torch.tanh(torch.tensor(-2.0)))
    torch.testing.assert_close(h[0, :, 0, 0], expected.expand(2))


def run(op, gates, weight, cotangent):
    gates, weight = gates.detach().requires_grad_(), weight.detach().requires_grad_()
    h = op(gates, weight)
    return [h.detach(), *torch.autograd.grad(h, (gates, weight), cotangent)]


@both
@pytest.mark.parametrize("shape", [(2, 64, 28, 28), (18, 33, 9, 11), (1, 96, 13, 5), (5, 16, 3, 40)])
def test_float32_on_shapes_of_practice(op, taps, shape):
    n, hidden, height, width = shape
    gates, weight = (
        torch.randn(n, 4 * hidden, height, width),
        torch.randn(4 * hidden, hidden, taps) / (taps * hidden) ** 0.5,
    )
    cotangent = torch.randn(shape)
    plain = reference.row_lstm if op is ops.row_lstm else reference.diagonal_lstm
    expected = run(lambda g, w: plain(g, w)[0], gates.double(), weight.double(), cotangent.double())
    for f, e, allowed in zip(run(op, gates, weight, cotangent), expected, (2e-6, 1e-5, 1e-5)):
        assert float((f - e).norm() / e.norm()) <= allowed


@both
@pytest.mark.parametrize("n", [1, 2, 3, 16, 19])
def test_neither_the_thread_count_nor_a_second_run_changes_the_bits(op, taps, n):
    gates, weight, cotangent = torch.randn(n, 36, 7, 10), 0.3 * torch.randn(36, 9, taps), torch.randn(n, 9, 7, 10)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run(op, gates, weight, cotangent))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@both
def test_every_element_of_every_output_is_written(op, taps, monkeypatch):
    def poisoned(shape, stride, dtype):
        return torch.empty_strided(shape, stride, dtype=dtype).fill_(float("nan"))

    monkeypatch.setattr(_allocator, "empty_strided", poisoned)
    for n, hidden, height, width in [(3, 5, 4, 6), (17, 16, 1, 3), (2, 17, 5, 1)]:
        args = (
            torch.randn(n, 4 * hidden, height, width),
            torch.randn(4 * hidden, hidden, taps),
            torch.randn(n, hidden, height, width),
        )
        for form in (torch.contiguous_format, torch.channels_last):
            found = run(op, args[0].contiguous(memory_format=form), args[1], args[2].contiguous(memory_format=form))
            assert all(bool(f.isfinite().all()) for f in found)


@both
def test_large_gates_saturate_and_stay_finite(op, taps):
    gates = 1e4 * torch.randn(2, 16, 6, 6)
    found = run(op, gates, 1e3 * torch.randn(16, 4, taps), torch.ones(2, 4, 6, 6))
    assert all(bool(f.isfinite().all()) for f in found)
    assert float(found[0].abs().max()) <= 1


@both
def test_a_batch_is_its_samples(op, taps):
    gates, weight = torch.randn(5, 24, 6, 7), 0.3 * torch.randn(24, 6, taps)
    together = op(gates, weight)
    for i in range(5):
        assert torch.equal(op(gates[i : i + 1], weight)[0], together[i])


@both
def test_the_states_are_kept_only_for_a_derivative(op, taps):
    gates, weight = torch.randn(2, 8, 4, 4), torch.randn(8, 2, taps)
    registered = ops.pixel_rnn.OPS["row_lstm" if op is ops.row_lstm else "diagonal_lstm"]
    assert registered(gates, weight, None, None, False)[1].numel() == 0
    assert registered(gates, weight, None, None, True)[1].shape == (2, 4, 4, 5, 2)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        op(gates.requires_grad_(), weight)
    assert (2, 4, 4, 5, 2) in sizes
    assert (2, 8, 4, 4) not in sizes  # the gates themselves are not


@both
def test_errors_name_the_argument(op, taps):
    gates, weight = torch.randn(2, 8, 4, 5), torch.randn(8, 2, taps)
    with pytest.raises(ValueError, match=r"gates has shape \(8, 4, 5\), expected \(N, 4h, H, W\)"):
        op(gates[0], weight)
    with pytest.raises(ValueError, match=r"gates has shape \(2, 8, 0, 5\)"):
        op(gates[:, :, :0], weight)
    with pytest.raises(ValueError, match="gates has 6 channels, expected 4h"):
        op(gates[:, :6], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 3, \d\), expected \(8, 2, \d\)"):
        op(gates, torch.randn(8, 3, taps))
    with pytest.raises(ValueError, match=r"weight has shape \(8, 2\), expected \(8, 2, k\)"):
        op(gates, weight[..., 0])
    with pytest.raises(ValueError, match="h0 has shape"):
        op(gates, weight, h0=torch.zeros(3))
    with pytest.raises(ValueError, match="c0 has shape"):
        op(gates, weight, c0=torch.zeros(2, 4))
    with pytest.raises(TypeError, match="gates has dtype torch.int64"):
        op(gates.long(), weight)
    with pytest.raises(TypeError, match="weight is a list"):
        op(gates, [1.0])


def test_errors_of_each():
    gates = torch.randn(2, 8, 4, 5)
    with pytest.raises(ValueError, match="row_lstm: weight has 4 taps, expected an odd number"):
        ops.row_lstm(gates, torch.randn(8, 2, 4))
    with pytest.raises(ValueError, match=r"diagonal_lstm: weight has shape \(8, 2, 3\), expected \(8, 2, 2\)"):
        ops.diagonal_lstm(gates, torch.randn(8, 2, 3))
