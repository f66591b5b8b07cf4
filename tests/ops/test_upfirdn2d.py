"""upfirdn2d: against zeros inserted and a convolution, layouts, any order of derivatives, the helpers, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops

FORMS = {"dense": torch.contiguous_format, "channels_last": torch.channels_last}
pair = st.tuples(st.integers(1, 4), st.integers(1, 4))


def written_out(x, f, up, down, padding, flip, gain):
    """Element by element, in float64."""
    f = f if f.ndim == 2 else np.outer(f, f)
    f = f if flip else f[::-1, ::-1]
    x0, x1, y0, y1 = padding
    n, c, h, w = x.shape
    z = np.zeros((n, c, h * up[1], w * up[0]))
    z[:, :, :: up[1], :: up[0]] = x
    z = np.pad(z, ((0, 0), (0, 0), (max(y0, 0), max(y1, 0)), (max(x0, 0), max(x1, 0))))
    z = z[:, :, max(-y0, 0) : z.shape[2] - max(-y1, 0), max(-x0, 0) : z.shape[3] - max(-x1, 0)]
    fh, fw = f.shape
    windows = np.lib.stride_tricks.sliding_window_view(z, (fh, fw), axis=(2, 3))[:, :, :: down[1], :: down[0]]
    return torch.from_numpy(gain * np.einsum("nchwij,ij->nchw", windows, f))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_equals_zeros_inserted_and_a_convolution(data):
    draw = data.draw
    shape = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([1, 2, 3, 9, 17])),
        draw(st.integers(1, 20)),
        draw(st.integers(1, 70)),
    )
    up, down = draw(pair), draw(pair)
    taps = draw(st.tuples(st.integers(1, 6)) | st.tuples(st.integers(1, 6), st.integers(1, 6)))
    kind = draw(st.sampled_from(["any", "rank one", "smooth"]))
    f = torch.randn(taps)
    if kind == "rank one" and len(taps) == 2:
        f = torch.randn(taps[0], 1) * torch.randn(1, taps[1])
    if kind == "smooth":
        f = ops.setup_filter(list(range(1, taps[0] + 1)), separable=len(taps) == 1)
    padding = [draw(st.integers(-3, 9)) for _ in range(4)]
    for axis, size, factor, first in ((-1, shape[3], up[0], 0), (0, shape[2], up[1], 2)):
        short = f.shape[axis] - size * factor - padding[first] - padding[first + 1]
        padding[first] += max(short, 0)
    flip, gain, last = draw(st.booleans()), draw(st.sampled_from([1.0, 4.0, -0.3])), draw(st.booleans())
    x = torch.randn(shape).contiguous(memory_format=FORMS["channels_last" if last else "dense"]).requires_grad_()
    y = ops.upfirdn2d(x, f, up=up, down=down, padding=padding, flip_filter=flip, gain=gain)
    exact = written_out(x.detach().double().numpy(), f.double().numpy(), up, down, padding, flip, gain)
    assert y.shape == exact.shape
    assert float((y.detach() - exact).norm()) <= 1e-6 * float(exact.norm()) + 1e-30
    if not x.is_contiguous():
        assert y.is_contiguous(memory_format=torch.channels_last)
    # The gradient is the transpose: <upfirdn2d(v), d> = <v, dx> for every v.
    d, v = torch.randn(y.shape), torch.randn(shape)
    (dx,) = torch.autograd.grad(y, x, d)
    assert dx.shape == x.shape
    forward = written_out(v.double().numpy(), f.double().numpy(), up, down, padding, flip, gain)
    scale = float(forward.norm() * d.norm()) + 1e-30
    assert abs(float((forward * d).sum()) - float((v.double() * dx).sum())) <= 2e-6 * scale


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(2, 16), (5, 31), (33, 47), (40, 130)])
@pytest.mark.parametrize("channels", [1, 3, 16, 40])
def test_the_library_arrangements_agree(form, size, channels):
    """Depthwise transposed and strided convolutions, over the sizes between which the kernel changes its way."""
    x = torch.randn(2, channels, *size).contiguous(memory_format=FORMS[form])
    f = ops.setup_filter([1, 3, 3, 1])
    weight = f.expand(channels, 1, 4, 4)
    expected = F.conv_transpose2d(x, 4 * weight, stride=2, padding=1, groups=channels)
    torch.testing.assert_close(ops.upsample2d(x, f), expected, rtol=1e-5, atol=1e-6)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1)), weight, stride=2, groups=channels)
    torch.testing.assert_close(ops.downsample2d(x, f), expected, rtol=1e-5, atol=1e-6)
    expected = F.conv2d(F.pad(x, (2, 1, 2, 1)), weight, groups=channels)
    torch.testing.assert_close(ops.filter2d(x, f), expected, rtol=1e-5, atol=1e-6)


def test_outputs_larger_than_the_cache():
    """Written past the cache, whose lines a whole image must fill."""
    x, f = torch.randn(2, 24, 160, 161), torch.randn(4, 3)
    for form in FORMS.values():
        for g in (f, f[:1].T @ f[1:2]):
            y = ops.upfirdn2d(x.contiguous(memory_format=form), g, up=2, padding=2)
            exact = genfast.reference.upfirdn2d(x.double(), g.double(), (2, 2), (1, 1), (2, 2, 2, 2), False, 1.0)
            assert float((y - exact).norm()) <= 1e-6 * float(exact.norm())


@pytest.mark.parametrize(
    "slices", [(slice(None), slice(1, 4)), (slice(None, None, 2),), (..., slice(None, None, 2), slice(None))]
)
def test_views_are_read_in_place_or_copied(slices):
    big, f = torch.randn(4, 6, 12, 40), torch.randn(3, 3)
    for x in (big[slices], big.contiguous(memory_format=torch.channels_last)[slices], big.transpose(2, 3)[slices]):
        for up in (1, 2):
            found = ops.upfirdn2d(x, f, up=up, padding=1)
            expected = ops.upfirdn2d(x.contiguous(), f, up=up, padding=1)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fs", [(4,), (3, 4)])
@pytest.mark.parametrize(
    ("up", "down", "padding"), [(2, 1, (2, 1, 2, 1)), (1, 2, (1, 1, 1, 1)), ((3, 2), (2, 1), (-1, 3, 2, -2))]
)
def test_derivatives_of_every_order(fs, up, down, padding):
    f = torch.randn(fs, dtype=torch.float64)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)

    def cubed(t):
        return ops.upfirdn2d(t, f, up=up, down=down, padding=padding) ** 3

    def once(t):
        return torch.autograd.grad(cubed(t).sum(), t, create_graph=True)[0]

    def twice(t):
        return torch.autograd.grad(once(t).square().sum(), t, create_graph=True)[0]

    assert torch.autograd.gradcheck(cubed, (x,))
    assert torch.autograd.gradgradcheck(cubed, (x,))
    assert torch.autograd.gradcheck(twice, (x,))
    assert float(twice(x).detach().abs().max()) > 0


def test_the_gradient_runs_the_kernel():
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y = ops.upsample2d(x, ops.setup_filter([1, 3, 3, 1]))
    with torch.profiler.profile() as profile:
        torch.autograd.grad(y.sum(), x)
    names = [e.key for e in profile.key_averages()]
    assert "genfast::upfirdn2d" in names
    assert not any("convolution" in name for name in names)


def test_dynamic_shapes_compile_without_a_break():
    f = ops.setup_filter([1, 3, 3, 1])
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: ops.downsample2d(ops.upsample2d(t, f), f), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for size in (5, 8, 13):
        x = torch.randn(2, 3, size, size + 2, requires_grad=True)
        y, expected = compiled(x), ops.downsample2d(ops.upsample2d(x, f), f)
        torch.testing.assert_close(y, expected)
        grads = [torch.autograd.grad(t.square().sum(), x)[0] for t in (y, expected)]
        torch.testing.assert_close(*grads)


def test_the_thread_count_does_not_change_the_bits():
    before = torch.get_num_threads()
    try:
        for form in FORMS.values():
            x, f, results = torch.randn(3, 17, 65, 63).contiguous(memory_format=form), torch.randn(4, 4), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append((ops.upsample2d(x, f), ops.downsample2d(x, f), ops.filter2d(x[..., :9], f)))
            assert all(torch.equal(a, b) for a, b in zip(*results))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_not_a_number_stays_within_its_footprint(form):
    x = torch.randn(1, 3, 9, 9).contiguous(memory_format=FORMS[form])
    x[0, 1, 4, 5] = math.nan
    y = ops.filter2d(x, torch.ones(3, 3))
    assert y.isnan().nonzero().tolist() == [[0, 1, i, j] for i in (3, 4, 5) for j in (4, 5, 6)]


def test_a_filter_of_zeros_and_an_output_without_input():
    x = torch.randn(1, 2, 5, 5)
    assert not ops.filter2d(x, torch.zeros(3, 3)).any()
    y = ops.upfirdn2d(x, torch.ones(2, 2), padding=(20, 0, 0, 0))
    assert not y[..., :18].any()
    assert y[..., 20:].all()


def test_half_types_and_filters_of_another_dtype():
    x, f = torch.randn(2, 3, 8, 8), ops.setup_filter([1, 2, 1])
    assert ops.upsample2d(x, f.double()).dtype == torch.float32
    y = ops.upsample2d(x.bfloat16().contiguous(memory_format=torch.channels_last), f)
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), ops.upsample2d(x.bfloat16().float(), f), rtol=8e-3, atol=8e-3)


def test_setup_filter():
    assert torch.equal(ops.setup_filter(None), torch.ones(1, 1))
    assert torch.equal(ops.setup_filter(3), torch.ones(1, 1))
    assert torch.equal(ops.setup_filter([1, 3]), torch.tensor([[1.0, 3.0], [3.0, 9.0]]) / 16)
    assert ops.setup_filter(range(1, 9)).shape == (8,)
    assert ops.setup_filter(list(range(1, 9)), separable=False).shape == (8, 8)
    assert torch.equal(ops.setup_filter([1, 3], separable=True, flip_filter=True), torch.tensor([0.75, 0.25]))
    for separable in (False, True):  # the gain is the whole filter's, however it is kept
        f = ops.setup_filter([1, 2, 1], gain=9, separable=separable)
        assert math.isclose(float(ops.upfirdn2d(torch.ones(1, 1, 3, 3), f)), 9.0, rel_tol=1e-6)
    assert torch.equal(ops.setup_filter([[1.0, -1.0]], normalize=False), torch.tensor([[1.0, -1.0]]))


def test_helpers_keep_a_constant_image_and_scale_sizes():
    x = torch.ones(1, 2, 12, 10)
    for taps in ([1, 3, 3, 1], [1, 2, 1], [1] * 12):
        f = ops.setup_filter(taps)
        for found, size in (
            (ops.filter2d(x, f), (12, 10)),
            (ops.upsample2d(x, f), (24, 20)),
            (ops.upsample2d(x, f, up=(1, 3)), (36, 10)),
            (ops.downsample2d(x, f), (6, 5)),
            (ops.downsample2d(x, f, down=(5, 2)), (6, 2)),
            (ops.upsample2d(x, f, padding=(1, 2, 3, -1)), (26, 23)),
        ):
            assert found.shape[2:] == size
        if len(taps) < 5:  # away from the border; each phase of these filters has the same sum
            torch.testing.assert_close(ops.filter2d(x, f)[..., 2:-2, 2:-2], torch.ones(1, 2, 8, 6))
            torch.testing.assert_close(ops.upsample2d(x, f)[..., 4:-4, 4:-4], torch.ones(1, 2, 16, 12))


def test_modules():
    x = torch.randn(2, 3, 8, 8)
    f = ops.setup_filter([1, 3, 3, 1])
    up, down = genfast.nn.Upsample2d(), genfast.nn.Downsample2d([1, 2, 1], down=(2, 1), gain=2)
    assert torch.equal(up(x), ops.upsample2d(x, f))
    assert torch.equal(down(x), ops.downsample2d(x, ops.setup_filter([1, 2, 1]), down=(2, 1), gain=2))
    both = genfast.nn.Upfirdn2d([1, 3, 3, 1], up=2, down=3, padding=(2, 1), flip_filter=True, gain=4)
    assert torch.equal(both(x), ops.upfirdn2d(x, f, up=2, down=3, padding=(2, 1), flip_filter=True, gain=4))
    assert list(both.state_dict()) == ["filter"]
    assert not list(both.parameters())
    assert "up=2" in repr(both)
    assert "up=2" in repr(up)
    assert "down=(2, 1)" in repr(down)


X = torch.ones(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.upfirdn2d([1.0], torch.ones(1)), TypeError, "x is a list, expected a torch.Tensor"),
        (lambda: ops.upfirdn2d(X.int(), torch.ones(1)), TypeError, "x has dtype torch.int32"),
        (lambda: ops.upfirdn2d(X, torch.ones(1, dtype=torch.int64)), TypeError, "filter has dtype torch.int64"),
        (lambda: ops.upfirdn2d(X, [1.0, 2.0]), TypeError, "filter is a list, expected a torch.Tensor"),
        (lambda: ops.upfirdn2d(X[0], torch.ones(1)), ValueError, r"x has shape \(1, 4, 4\), expected \(N, C, H, W\)"),
        (lambda: ops.upfirdn2d(X[..., :0], torch.ones(1)), ValueError, "at least one row and column"),
        (lambda: ops.upfirdn2d(X, torch.ones(1, 1, 1)), ValueError, r"filter has shape \(1, 1, 1\)"),
        (lambda: ops.upfirdn2d(X, torch.ones(0)), ValueError, r"filter has shape \(0,\)"),
        (
            lambda: ops.upfirdn2d(X, torch.ones(2, requires_grad=True)),
            ValueError,
            r"filter requires a gradient.*detach",
        ),
        (lambda: ops.upfirdn2d(X, torch.ones(1, device="meta")), ValueError, "filter is on meta and x on cpu"),
        (lambda: ops.upfirdn2d(X, torch.ones(5)), ValueError, "has 4x4 positions, fewer than the filter's 5x5 taps"),
        (lambda: ops.upfirdn2d(X, torch.ones(2), padding=-2), ValueError, "has 0x0 positions"),
        (lambda: ops.upfirdn2d(X, torch.ones(1), up=0), ValueError, "up=0, expected a positive integer"),
        (lambda: ops.upfirdn2d(X, torch.ones(1), up=2.5), ValueError, "up=2.5, expected a positive integer"),
        (lambda: ops.upfirdn2d(X, torch.ones(1), down=(1, 2, 3)), ValueError, r"down=\(1, 2, 3\), expected"),
        (lambda: ops.upfirdn2d(X, torch.ones(1), padding=(1, 2, 3)), ValueError, r"padding=\(1, 2, 3\), expected"),
        (lambda: ops.filter2d(X, torch.ones(1), padding=0.5), ValueError, "filter2d: padding=0.5"),
        (lambda: ops.upsample2d(X, torch.ones(1), up=-1), ValueError, "upsample2d: up=-1"),
        (lambda: ops.downsample2d(X, torch.ones(1), down=()), ValueError, r"downsample2d: down=\(\)"),
        (lambda: ops.upsample2d(X, "a"), TypeError, "upsample2d: filter is a str"),
        (lambda: ops.setup_filter(torch.ones(1, 1, 1)), ValueError, r"taps have shape \(1, 1, 1\)"),
        (lambda: ops.setup_filter([]), ValueError, r"taps have shape \(0,\)"),
        (lambda: ops.setup_filter([[1.0]], separable=True), ValueError, "with separable=True"),
        (lambda: ops.setup_filter([1, -1]), ValueError, "sum to zero.*normalize=False"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("options", [((0, 1), (1, 1), (0,) * 4), ((1, 1), (1,), (0,) * 4), ((1, 1), (1, 1), (0, 0))])
def test_errors_of_the_raw_op(options):
    with pytest.raises(ValueError, match="expected"):
        torch.ops.genfast.upfirdn2d(X, torch.ones(1, 1), *options, False, 1.0)
