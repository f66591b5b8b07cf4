"""masked_conv1d/2d/3d: the definition, real sizes, masked weights, colours, NaN, relu, threads, dtypes, errors."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast import _allocator, ops
from genfast._registry import OPS
from genfast._verify import TOLERANCES, relative_error

CONV = {3: ops.masked_conv1d, 4: ops.masked_conv2d, 5: ops.masked_conv3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def colour(channel, channels, data_channels, order):
    return channel % data_channels if order == "interleaved" else channel // (channels // data_channels)


def live(weight, mask_type, data_channels=1, group_order="interleaved", groups=1, center=None):
    """Which weights count: by the place of each tap and the colours of each pair of channels."""
    out, per = weight.shape[:2]
    at = tuple(k // 2 for k in weight.shape[2:]) if center is None else tuple(center)
    mask = torch.zeros(weight.shape, dtype=torch.bool)
    for tap in itertools.product(*map(range, weight.shape[2:])):
        if tap < at:
            mask[(slice(None), slice(None), *tap)] = True
    for o, i in itertools.product(range(out), range(per)):
        own = colour(o, out, data_channels, group_order)
        other = colour(o // (out // groups) * per + i, per * groups, data_channels, group_order)
        mask[(o, i, *at)] = other < own if mask_type == "A" else other <= own
    return mask


def dense(x, weight, bias, mask, dilation=1, groups=1, center=None, activation=None):
    """The library's convolution of the masked weight, padded so that the centre lies on the output's position."""
    kernel = weight.shape[2:]
    at = tuple(k // 2 for k in kernel) if center is None else center
    steps = (dilation,) * len(kernel) if isinstance(dilation, int) else dilation
    pads = [p for k, c, d in reversed(list(zip(kernel, at, steps))) for p in (c * d, (k - 1 - c) * d)]
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    y = conv(F.pad(x, pads), torch.where(mask, weight, 0.0), bias, dilation=tuple(steps), groups=groups)
    return y.relu() if activation == "relu" else y


def by_definition(x, weight, bias, mask_type, data_channels, group_order, dilation, groups, center, activation):
    """Position by position and tap by tap: an input counts if it comes before the output's position in raster order,
    and at that position if its colour comes before ("A") or not after ("B") the output's."""
    sizes, kernel, out = x.shape[2:], weight.shape[2:], weight.shape[0]
    per, own = weight.shape[1], out // groups
    parts = [
        F.pad(weight[g * own : (g + 1) * own].movedim(1, -1), (g * per, (groups - 1 - g) * per)) for g in range(groups)
    ]
    full = torch.cat(parts).movedim(-1, 1)  # (O, C, *kernel)
    pair = torch.tensor(
        [
            [
                colour(i, x.shape[1], data_channels, group_order) + (mask_type == "A")
                <= colour(o, out, data_channels, group_order)
                for i in range(x.shape[1])
            ]
            for o in range(out)
        ]
    )
    rows = []
    for p in itertools.product(*map(range, sizes)):
        y = x.new_zeros(x.shape[0], out) if bias is None else bias.expand(x.shape[0], -1)
        for tap in itertools.product(*map(range, kernel)):
            q = tuple(at + (t - c) * d for at, t, c, d in zip(p, tap, center, dilation))
            if q > p or any(not 0 <= a < s for a, s in zip(q, sizes)):
                continue
            w = full[(slice(None), slice(None), *tap)]
            y = y + x[(slice(None), slice(None), *q)] @ (torch.where(pair, w, 0.0) if q == p else w).T
        rows.append(y)
    y = torch.stack(rows, -1).view(x.shape[0], out, *sizes)
    return y.relu() if activation == "relu" else y


def inputs(shape, out, kernel, groups=1, bias=True, dtype=torch.float32, last=False):
    """x, weight and bias as leaves; the output has about unit variance."""
    per = shape[1] // groups
    x = torch.randn(shape, dtype=dtype)
    x = x.contiguous(memory_format=LAST[len(shape)]) if last else x
    w = torch.randn(out, per, *kernel, dtype=dtype) / math.sqrt(per * math.prod(kernel) / 2)
    return [t.requires_grad_() for t in (x, w, *([torch.randn(out, dtype=dtype)] if bias else []))]


def call(leaves, **options):
    x, w, *b = leaves
    return CONV[x.dim()](x, w, *b, **options)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def compare(leaves, expected_of, **options):
    """Output and gradients against ``expected_of`` the same values in float64."""
    exact = [t.detach().double().requires_grad_() for t in leaves]
    forward, backward = TOLERANCES[leaves[0].dtype]
    y, expected = call(leaves, **options), expected_of(*exact)
    assert (y.shape, y.dtype) == (expected.shape, leaves[0].dtype)
    assert relative_error(y, expected) <= forward
    weights = torch.randn_like(y)
    found = torch.autograd.grad(y, leaves, weights)
    for name, f, e in zip("xwb", found, torch.autograd.grad(expected, exact, weights.double(), allow_unused=True)):
        assert relative_error(f, torch.zeros_like(f).double() if e is None else e) <= backward, name
    return y, found


# x's shape, output channels, kernel, options; data_channels, group_order, dilation, groups, center and activation by
# default 1, interleaved, 1, 1, kernel // 2 and None.
CASES = {
    "1-D": ((2, 3, 9), 4, (3,), {}),
    "1-D even": ((2, 3, 9), 5, (4,), {"dilation": [2]}),
    "1-D all causal": ((2, 3, 9), 5, (3,), {"dilation": [2], "center": [2]}),
    "1-D relu": ((1, 2, 12), 18, (5,), {"activation": "relu"}),
    "2-D": ((2, 3, 4, 5), 4, (3, 3), {}),
    "2-D larger than the image": ((1, 2, 3, 4), 3, (7, 5), {}),
    "2-D even": ((2, 2, 4, 3), 3, (4, 2), {}),
    "2-D not square": ((1, 2, 5, 4), 3, (1, 3), {"dilation": [1, 2]}),
    "2-D column": ((1, 2, 5, 4), 3, (3, 1), {"dilation": [2, 1]}),
    "2-D dilated": ((1, 2, 5, 6), 3, (3, 3), {"dilation": [1, 3]}),
    "2-D all causal": ((2, 3, 4, 5), 4, (2, 3), {"center": [1, 2]}),
    "2-D first tap": ((2, 3, 4, 5), 4, (3, 3), {"center": [0, 0]}),
    "2-D first of its row": ((2, 3, 4, 5), 4, (3, 3), {"center": [1, 0]}),
    "2-D first row": ((2, 3, 4, 5), 4, (3, 3), {"center": [0, 1]}),
    "2-D groups": ((2, 4, 4, 3), 6, (3, 3), {"groups": 2, "activation": "relu"}),
    "2-D depthwise": ((2, 4, 4, 3), 4, (3, 3), {"groups": 4}),
    "2-D two colours": ((2, 4, 3, 4), 6, (3, 3), {"data_channels": 2}),
    "2-D three colours": ((1, 3, 4, 4), 9, (3, 3), {"data_channels": 3}),
    "2-D three colours 1x1": ((2, 6, 3, 4), 3, (1, 1), {"data_channels": 3}),
    "2-D colours and groups": ((1, 6, 3, 4), 12, (3, 3), {"data_channels": 3, "groups": 2}),
    "3-D": ((1, 2, 3, 3, 4), 3, (3, 3, 3), {}),
    "3-D even, dilated": ((2, 2, 3, 3, 3), 2, (2, 3, 2), {"dilation": [1, 2, 1]}),
    "3-D all causal": ((1, 2, 3, 4, 2), 3, (2, 2, 2), {"center": [1, 1, 1]}),
    "3-D colours": ((1, 4, 2, 3, 3), 2, (3, 1, 3), {"data_channels": 2}),
}


ORDERED = [
    (case, o)
    for case in CASES
    for o in ("interleaved", "blocked")
    if o == "interleaved" or "data_channels" in CASES[case][3]
]


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize(("case", "group_order"), ORDERED)
def test_equals_the_definition(case, group_order, mask_type):
    shape, out, kernel, given = CASES[case]
    options = (
        dict(
            mask_type=mask_type,
            data_channels=1,
            group_order=group_order,
            dilation=[1] * len(kernel),
            groups=1,
            center=[k // 2 for k in kernel],
            activation=None,
        )
        | given
    )
    leaves = inputs(shape, out, kernel, options["groups"], dtype=torch.float64)
    compare(leaves, lambda x, w, b: by_definition(x, w, b, *options.values()), **options)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_random_configurations_equal_the_definition(data):
    dims = data.draw(st.sampled_from([1, 2, 2, 3]), "axes")
    few = {1: 11, 2: 4, 3: 3}[dims]
    kernel = data.draw(st.tuples(*[st.integers(1, 4 if dims < 3 else 2)] * dims), "kernel")
    colours, groups = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (2, 3)]), "colours, groups")
    step = math.lcm(colours, groups)
    shape = (
        data.draw(st.integers(1, 3), "n"),
        step * data.draw(st.sampled_from([1, 2, 7, 17]), "c"),
        *data.draw(st.tuples(*[st.integers(1, few)] * dims), "size"),
    )
    options = dict(
        mask_type=data.draw(st.sampled_from("AB")),
        data_channels=colours,
        group_order=data.draw(st.sampled_from(["interleaved", "blocked"])),
        dilation=list(data.draw(st.tuples(*[st.integers(1, 3)] * dims), "dilation")),
        groups=groups,
        center=[data.draw(st.integers(0, k - 1)) for k in kernel],
        activation=data.draw(st.sampled_from([None, "relu"])),
    )
    leaves = inputs(
        shape,
        step * data.draw(st.sampled_from([1, 3, 11, 23]), "out"),
        kernel,
        groups,
        bias=data.draw(st.booleans(), "bias"),
        dtype=torch.float64,
        last=dims > 1 and data.draw(st.booleans(), "last"),
    )
    compare(leaves, lambda x, w, b=None: by_definition(x, w, b, *options.values()), **options)


REAL = {
    "64 channels 3x3": ((4, 64, 28, 28), 64, (3, 3), "B"),
    "64 channels 7x7": ((4, 64, 28, 28), 32, (7, 7), "B"),
    "first layer 7x7": ((4, 1, 28, 28), 64, (7, 7), "A"),
    "to one channel": ((4, 64, 28, 28), 1, (3, 3), "B"),
    "1x1": ((4, 66, 28, 28), 33, (1, 1), "B"),
    "5 to 17": ((3, 5, 27, 29), 17, (3, 3), "A"),
    "17 to 66": ((2, 17, 13, 31), 66, (5, 5), "B"),
    "66 to 5": ((2, 66, 28, 28), 5, (3, 5), "B"),
    "33 to 33": ((4, 33, 28, 28), 33, (3, 3), "B"),
}


@pytest.mark.parametrize("last", [False, True], ids=["dense", "channels_last"])
@pytest.mark.parametrize("case", REAL)
def test_real_sizes_equal_the_dense_convolution(case, last):
    shape, out, kernel, mask_type = REAL[case]
    leaves = inputs(shape, out, kernel, last=last)
    mask = live(leaves[1], mask_type)
    y, (dx, dw, _) = compare(leaves, lambda x, w, b: dense(x, w, b, mask), mask_type=mask_type)
    if shape[1] > 1 and out > 1:
        form = torch.channels_last if last else torch.contiguous_format
        assert y.is_contiguous(memory_format=form)
        assert dx.is_contiguous(memory_format=form)
    assert not dw[~mask].any()


def test_a_long_sequence_and_a_volume():
    for shape, out, kernel, options in (
        ((2, 32, 3000), 40, (2,), dict(dilation=[256], center=[1], activation="relu")),
        ((1, 8, 5, 12, 14), 24, (3, 3, 3), dict(dilation=[1, 1, 1], center=[1, 1, 1])),
    ):
        leaves = inputs(shape, out, kernel)
        mask = live(leaves[1], "B", center=options["center"])
        compare(leaves, lambda x, w, b: dense(x, w, b, mask, **options), mask_type="B", **options)  # noqa: B023


COLOURS = [(1, "interleaved", 1), (3, "interleaved", 1), (3, "blocked", 1), (3, "blocked", 2)]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize(("data_channels", "group_order", "groups"), COLOURS)
def test_masked_weights_never_count_and_are_never_changed(mask_type, data_channels, group_order, groups, activation):
    options = dict(data_channels=data_channels, group_order=group_order, groups=groups)
    leaves = inputs((2, 12, 6, 7), 18, (3, 5), groups)
    mask = live(leaves[1], mask_type, **options)
    results = []
    for poison in (0.0, math.nan, math.inf, -math.inf, 3e38):
        x, w, b = (t.detach().clone() for t in leaves)
        w[~mask] = poison
        stored = w.clone()
        for t in (x, w, b):
            t.requires_grad_()
        version = w._version
        y = call((x, w, b), mask_type=mask_type, activation=activation, **options)
        torch.manual_seed(1)
        found = [y, *torch.autograd.grad(y, (x, w, b), torch.randn_like(y))]
        assert w._version == version
        assert torch.equal(w.detach().view(torch.int32), stored.view(torch.int32))
        assert torch.equal(found[2][~mask], torch.zeros(int((~mask).sum())))
        assert bool(found[2][mask].any())
        results.append(found)
    for found in results:
        for f, e in zip(found, results[0]):
            assert bool(f.isfinite().all())
            assert torch.equal(f, e)


def taps_seen(mask_type, size=5):
    """Which taps of a 2-D kernel reach the middle of an image of its size."""
    x = torch.zeros(1, 1, size, size, requires_grad=True)
    y = ops.masked_conv2d(x, torch.ones(1, 1, size, size), mask_type=mask_type)
    return torch.autograd.grad(y[0, 0, size // 2, size // 2], x)[0][0, 0].bool().tolist()


def test_bug_mask_zeroes_the_whole_centre_row():
    """The left taps of the centre row count, in both types (j-min/PixelCNN issue 3)."""
    for mask_type in "AB":
        assert taps_seen(mask_type)[2][:2] == [True, True]


def test_bug_reversed_mask():
    """What is above is seen, what is below is not (iaf-vae issue 4)."""
    for mask_type in "AB":
        assert taps_seen(mask_type) == [
            [True] * 5,
            [True] * 5,
            [True, True, mask_type == "B", False, False],
            [False] * 5,
            [False] * 5,
        ]


def test_bug_gradients_of_masked_weights():
    """No gradient reaches them, so they count neither in a clipped norm nor in the optimiser (CompressAI issue 25)."""
    x, w, b = inputs((2, 4, 5, 5), 4, (3, 3))
    mask = live(w, "A")
    grad = torch.autograd.grad(ops.masked_conv2d(x, w, b, mask_type="A").square().sum(), w)[0]
    plain = torch.where(mask, w, 0.0).detach().requires_grad_()
    unmasked = torch.autograd.grad(F.conv2d(x, plain, b, padding=1).square().sum(), plain)[0]
    assert float(grad.norm()) < float(unmasked.norm())
    torch.testing.assert_close(grad, unmasked * mask)


@pytest.mark.parametrize("group_order", ["interleaved", "blocked"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_red_before_green_before_blue_at_the_centre(mask_type, group_order):
    x, w, b = inputs((1, 6, 3, 3), 9, (3, 3))
    y = ops.masked_conv2d(x, w, b, mask_type=mask_type, data_channels=3, group_order=group_order)
    names_in = ["RGBRGB", "RRGGBB"][group_order == "blocked"]
    names_out = ["RGBRGBRGB", "RRRGGGBBB"][group_order == "blocked"]
    sees = {"A": {"R": "", "G": "R", "B": "RG"}, "B": {"R": "R", "G": "RG", "B": "RGB"}}[mask_type]
    for o, name in enumerate(names_out):
        grad = torch.autograd.grad(y[0, o, 1, 1], x, retain_graph=True)[0][0] != 0
        assert [bool(g[1, 1]) for g in grad] == [i in sees[name] for i in names_in]
        assert all(
            g.tolist()[0] == [True] * 3 and bool(g[1, 0]) for g in grad
        )  # earlier pixels are seen in every colour
        assert not bool(grad[:, 1, 2].any() or grad[:, 2].any())


@pytest.mark.parametrize("shape", [(7, 8), (11,), (3, 4, 4)], ids=["2-D", "1-D", "3-D"])
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_not_a_number_reaches_exactly_what_sees_it(shape, mask_type):
    _, w, b = inputs((1, 3, *shape), 20, (3,) * len(shape))
    at = tuple(s // 2 for s in shape)
    x = torch.randn(1, 3, *shape)
    x[(0, 1, *at)] = math.nan
    found = call((x, w, b), mask_type=mask_type).isnan()
    for p in itertools.product(*map(range, shape)):
        offset = tuple(a - q for a, q in zip(at, p))
        sees = max(map(abs, offset)) <= 1 and (offset < (0,) * len(p) or (mask_type == "B" and not any(offset)))
        assert found[(0, slice(None), *p)].tolist() == [sees] * 20, p
    assert torch.equal(call((x, w, b), mask_type=mask_type, activation="relu").isnan(), found)


def test_a_gradient_that_is_not_a_number_reaches_exactly_what_was_seen():
    x, w, b = inputs((1, 4, 6, 7), 18, (3, 3))
    d = torch.randn(1, 18, 6, 7)
    d[0, 5, 3, 3] = math.nan
    dx, dw, db = torch.autograd.grad(ops.masked_conv2d(x, w, b, mask_type="A"), (x, w, b), d)
    assert sorted({tuple(p[2:]) for p in dx.isnan().nonzero().tolist()}) == [(2, 2), (2, 3), (2, 4), (3, 2)]
    assert db.isnan().tolist() == [o == 5 for o in range(18)]
    assert torch.equal(dw.isnan(), live(w, "A") & (torch.arange(18) == 5)[:, None, None, None])


@pytest.mark.parametrize("last", [False, True], ids=["dense", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "out", "options"),
    [((4, 33, 50, 41), 40, {}), ((2, 66, 45, 47), 66, {"groups": 2}), ((3, 40, 49, 50), 40, {"mask_type": "A"})],
)
def test_every_element_of_a_reused_block_is_written(shape, out, options, last):
    options = {"mask_type": "B", **options}
    leaves = inputs(shape, out, (3, 3), options.get("groups", 1), last=last)
    assert min(math.prod(shape), math.prod(shape) // shape[1] * out) * 4 >= _allocator.MINIMUM
    _allocator.clear()
    try:
        for name, channels in (("y", out), ("dx", shape[1])):
            blocks = [
                _allocator.empty_strided((math.prod(shape) // shape[1] * channels,), (1,), torch.float32)
                for _ in range(3)
            ]
            addresses = {block.fill_(math.nan).data_ptr() for block in blocks}
            del blocks
            if name == "y":
                found = y = call(leaves, **options)
            else:
                found = torch.autograd.grad(y, leaves[0], torch.randn_like(y))[0]
            assert found.data_ptr() in addresses, name
            assert bool(found.isfinite().all()), name
    finally:
        _allocator.clear()


def test_relu_is_the_relu_of_what_comes_out():
    for last in (False, True):
        leaves = inputs((2, 6, 7, 8), 18, (3, 3), last=last)
        results = []
        for fused in (True, False):
            y = call(leaves, mask_type="B", activation="relu" if fused else None)
            y = y if fused else y.relu()
            torch.manual_seed(1)
            results.append([y, *torch.autograd.grad(y, leaves, torch.randn(y.shape))])
        assert bool((results[0][0] == 0).any())
        assert torch.equal(results[0][0], results[1][0])
        for f, e in zip(*results):
            torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_second_derivatives_equal_those_of_the_dense_convolution(activation):
    leaves = inputs((2, 4, 4, 5), 6, (3, 3), dtype=torch.float64)
    mask = live(leaves[1], "B", 2)
    directions = [torch.randn_like(t) for t in leaves]
    results = []
    for function in (
        lambda x, w, b: ops.masked_conv2d(x, w, b, mask_type="B", data_channels=2, activation=activation),
        lambda x, w, b: dense(x, w, b, mask, activation=activation),
    ):
        grads = torch.autograd.grad(function(*leaves).pow(3).sum(), leaves, create_graph=True)
        results.append(torch.autograd.grad(grads, leaves, directions))
    assert all(bool(r.any()) for r in results[0])
    for f, e in zip(*results):
        torch.testing.assert_close(f, e)
    assert not results[0][1][~mask].any()


THREADED = {
    "images": ((3, 33, 17, 19), 66, (3, 3), {}),
    "one image": ((1, 33, 17, 19), 20, (5, 5), {"activation": "relu"}),
    "colours": ((2, 18, 9, 10), 36, (3, 3), {"data_channels": 3, "mask_type": "A"}),
    "groups": ((2, 18, 9, 10), 36, (3, 3), {"groups": 3}),
    "sequence": ((1, 8, 999), 24, (2,), {"dilation": 16, "center": 1}),
    "volume": ((2, 5, 4, 7, 6), 17, (3, 3, 3), {"activation": "relu"}),
}


@pytest.mark.parametrize("case", THREADED)
def test_neither_the_thread_count_nor_the_run_changes_the_bits(case):
    shape, out, kernel, options = THREADED[case]
    options = {"mask_type": "B", **options}
    for last in (False, True) if len(shape) == 4 else (False,):
        leaves = inputs(shape, out, kernel, options.get("groups", 1), last=last)
        results = []
        for count in (1, 2, 2, 1, 3):
            with threads(count):
                y = call(leaves, **options)
                results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        for found in results[1:]:
            assert all(torch.equal(f, e) for f, e in zip(found, results[0]))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_asked_for(wanted, activation):
    leaves = inputs((2, 5, 6, 7), 17, (3, 3))
    y = call(leaves, mask_type="B", activation=activation)
    weights = torch.randn_like(y)
    full = torch.autograd.grad(y, leaves, weights)
    some = [t.detach().requires_grad_(w) for t, w in zip(leaves, wanted)]
    y = call(some, mask_type="B", activation=activation)
    assert y.requires_grad == any(wanted)
    if any(wanted):
        y.backward(weights)
    for t, w, e in zip(some, wanted, full):
        assert (t.grad is not None) == w
        assert not w or torch.equal(t.grad, e)


def test_a_gradient_in_any_strides():
    leaves = inputs((2, 6, 5, 7), 64, (3, 3))  # 64 channels: one in channels_last order is used where it lies
    y = call(leaves, mask_type="B")
    for weights in (
        torch.randn(2, 1, 5, 1).expand(2, 64, 5, 7),
        torch.randn(5, 7, 64, 2).permute(3, 2, 0, 1),
        torch.randn(2, 64, 5, 7).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 128, 5, 14)[::2, ::2, :, ::2],
    ):
        found = torch.autograd.grad(y, leaves, weights, retain_graph=True)
        for f, e in zip(found, torch.autograd.grad(y, leaves, weights.contiguous(), retain_graph=True)):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


def test_autocast():
    leaves = inputs((2, 6, 7, 8), 9, (3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.masked_conv2d(*leaves, mask_type="B", data_channels=3, activation="relu")
    assert y.dtype == torch.bfloat16
    found = torch.autograd.grad(y, leaves, torch.ones_like(y))
    rounded = [t.detach().bfloat16().double().requires_grad_() for t in leaves]
    expected = dense(*rounded, live(leaves[1], "B", 3), activation="relu")
    assert relative_error(y, expected) <= TOLERANCES[torch.bfloat16][0]
    # The derivative at the rounded output, so that rounding at the kink does not count.
    linear = dense(*rounded, live(leaves[1], "B", 3))
    for f, e in zip(found, torch.autograd.grad(linear, rounded, (y > 0).double())):
        assert f.dtype == torch.float32
        assert relative_error(f, e) <= TOLERANCES[torch.bfloat16][1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.masked_conv2d(*(t.double() for t in leaves), mask_type="B").dtype == torch.float64
        with torch.autocast("cpu", enabled=False):
            assert ops.masked_conv2d(*leaves, mask_type="B").dtype == torch.float32


def test_a_weight_of_another_dtype():
    x, w, b = inputs((2, 3, 5, 5), 4, (3, 3), dtype=torch.float64)
    x32 = x.detach().float().requires_grad_()
    y = ops.masked_conv2d(x32, w, b, mask_type="B")
    assert y.dtype == torch.float32
    found = torch.autograd.grad(y.sum(), (x32, w, b))
    assert [f.dtype for f in found] == [torch.float32, torch.float64, torch.float64]
    assert relative_error(y, dense(x, w, b, live(w, "B"))) < TOLERANCES[torch.float32][0]


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5), (2, 4, 5, 0)])
def test_empty(shape):
    leaves = inputs(shape, 6, (3, 3))
    y = call(leaves, mask_type="B", activation="relu")
    assert y.shape == (shape[0], 6, *shape[2:])
    for f, t in zip(torch.autograd.grad(y.sum(), leaves), leaves):
        assert f.shape == t.shape
        assert not f.any()


def test_nothing_live_leaves_the_bias():
    leaves = inputs((2, 3, 4, 5), 7, (1, 1))
    y = call(leaves, mask_type="A")
    assert torch.equal(y, leaves[2].view(-1, 1, 1).expand_as(y))
    dx, dw, db = torch.autograd.grad(y.sum(), leaves)
    assert not dx.any()
    assert not dw.any()
    assert torch.equal(db, torch.full((7,), 40.0))


X, W = (2, 6, 5, 5), (4, 6, 3, 3)


@pytest.mark.parametrize(
    ("x", "weight", "options", "error", "message"),
    [
        (X, W, {"mask_type": "C"}, ValueError, "mask_type='C', expected one of 'A', 'B'"),
        (X, W, {"mask_type": "b"}, ValueError, "mask_type='b'"),
        (X, W, {"group_order": "rgb"}, ValueError, "group_order='rgb', expected one of 'interleaved', 'blocked'"),
        (X, W, {"activation": "tanh"}, ValueError, "activation='tanh', expected one of 'none', 'relu'"),
        (X, W, {"data_channels": 0}, ValueError, "data_channels=0, expected at least 1"),
        (X, W, {"groups": 0}, ValueError, "groups=0, expected at least 1"),
        (X, W, {"data_channels": 4}, ValueError, "x's channels are 6, not a multiple of data_channels=4"),
        (X, W, {"data_channels": 3}, ValueError, "weight's output channels are 4, not a multiple of data_channels=3"),
        (X, W, {"groups": 5}, ValueError, "x's channels are 6, not a multiple of groups=5"),
        (X, W, {"groups": 3}, ValueError, "weight's output channels are 4, not a multiple of groups=3"),
        (X, W, {"groups": 2}, ValueError, r"weight has shape \(4, 6, 3, 3\), expected 3 input channels per group"),
        (X, (4, 5, 3, 3), {}, ValueError, r"weight has shape \(4, 5, 3, 3\), expected 6 input channels"),
        (X, (4, 6, 3), {}, ValueError, r"weight has shape \(4, 6, 3\), expected 4 axes"),
        ((6, 5, 5), W, {}, ValueError, r"x has shape \(6, 5, 5\), expected 4 axes"),
        (X, W, {"dilation": 0}, ValueError, r"dilation=\(0, 0\), expected 2 numbers of at least 1"),
        (X, W, {"dilation": (1, -1)}, ValueError, r"dilation=\(1, -1\)"),
        (X, W, {"dilation": (1, 1, 1)}, ValueError, r"dilation=\(1, 1, 1\), expected one number or 2"),
        (X, W, {"center": 3}, ValueError, r"center=\(3, 3\), expected a position inside the kernel \(3, 3\)"),
        (X, W, {"center": (1, -1)}, ValueError, r"center=\(1, -1\)"),
        (X, W, {"center": (1,)}, ValueError, r"center=\(1,\), expected one number or 2"),
        (X, W, {"bias": torch.zeros(6)}, ValueError, r"bias has shape \(6,\), expected \(4,\)"),
        (X, W, {"bias": torch.zeros(4, 1)}, ValueError, r"bias has shape \(4, 1\)"),
        (X, W, {"bias": torch.zeros(4).long()}, TypeError, "bias has dtype torch.int64, expected a floating-point"),
        (X, W, {"bias": [0.0] * 4}, TypeError, "bias is a list, expected a torch.Tensor"),
        (torch.zeros(X).long(), W, {}, TypeError, "x has dtype torch.int64, expected a floating-point"),
        (X, torch.zeros(W).int(), {}, TypeError, "weight has dtype torch.int32, expected a floating-point"),
        ([1.0], W, {}, TypeError, "x is a list, expected a torch.Tensor"),
        (X, [1.0], {}, TypeError, "weight is a list, expected a torch.Tensor"),
    ],
)
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_errors(x, weight, options, error, message, grad):
    x, weight = (torch.zeros(t) if isinstance(t, tuple) else t for t in (x, weight))
    if grad and isinstance(weight, torch.Tensor) and weight.is_floating_point():
        weight.requires_grad_()
    with pytest.raises(error, match=f"masked_conv2d: {message}"):
        ops.masked_conv2d(x, weight, **{"mask_type": "B", **options})


def test_errors_under_autocast_and_of_the_raw_op():
    x, w = torch.zeros(X), torch.zeros(W)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="masked_conv2d: x has dtype torch.int64"):
            ops.masked_conv2d(x.long(), w, mask_type="B")
        with pytest.raises(TypeError, match="masked_conv2d: bias is a list"):
            ops.masked_conv2d(x, w, [0.0] * 4, mask_type="B")
    op = OPS["masked_conv"]
    rest = ("B", 1, "interleaved", [1, 1], 1, [1, 1], "none")
    with pytest.raises(ValueError, match=r"masked_conv: x has shape \(2, 6\)"):
        op(x[:, :, 0, 0], w, None, *rest)
    with pytest.raises(ValueError, match=r"masked_conv2d: weight has shape \(4, 6, 3\)"):
        op(x, w[..., 0], None, *rest)
    with pytest.raises(ValueError, match="masked_conv2d: dilation"):
        op(x, w, None, "B", 1, "interleaved", [1], 1, [1, 1], "none")
