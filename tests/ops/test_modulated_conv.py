"""modulated_conv2d: against a weight for each sample and zeros inserted, derivatives, float16, the module, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops, reference
from genfast.ops.modulated_conv import OP_ENERGY, OP_SCALE

D = torch.float64


def drawn(n=2, i=3, o=4, kernel=3, size=(5, 6), dtype=D, grad=True):
    return (
        torch.randn(n, i, *size, dtype=dtype, requires_grad=grad),
        torch.randn(o, i, kernel, kernel, dtype=dtype, requires_grad=grad),
        torch.randn(n, i, dtype=dtype, requires_grad=grad),
    )


def with_groups(x, weight, styles, eps=1e-8):
    """The other arrangement: a weight for each sample, as groups of one convolution."""
    n, i = styles.shape
    w = weight[None] * styles[:, None, :, None, None]
    w = w * (w.square().sum((2, 3, 4), keepdim=True) + eps).rsqrt()
    y = F.conv2d(x.reshape(1, n * i, *x.shape[2:]), w.flatten(0, 1), padding=weight.shape[-1] // 2, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_equals_a_weight_for_each_sample_and_zeros_inserted(data):
    draw = data.draw
    up, down, kh, kw = (draw(st.integers(1, 3)) for _ in range(4))
    taps = draw(st.sampled_from([None, (1,), (4,), (3,), (2, 5), (4, 4)]))
    f = None if taps is None else torch.randn(taps, dtype=D)
    padding = [draw(st.integers(-1, 4)) for _ in range(4)]
    n, i, o = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 20])), draw(st.sampled_from([1, 4]))
    x, weight, styles = torch.randn(n, i, 8, 9, dtype=D), torch.randn(o, i, kh, kw, dtype=D), torch.randn(n, i, dtype=D)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    inputs = [t.requires_grad_() for t in (x, weight, styles)]
    demodulate, flip = draw(st.booleans()), draw(st.booleans())
    exact = reference.modulated_conv2d(x, weight, styles, None, up, down, padding, demodulate, f, flip, 1e-8)
    noise = draw(st.sampled_from([None, (), (1, 1), (n, 1)]))
    noise = None if noise is None else torch.randn(*noise, *exact.shape[2:], dtype=D)
    y = ops.modulated_conv2d(
        x,
        weight,
        styles,
        noise=noise,
        up=up,
        down=down,
        padding=padding,
        demodulate=demodulate,
        resample_filter=f,
        flip_weight=flip,
    )
    exact = exact if noise is None else exact + noise
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    cotangent = torch.randn_like(exact)
    for found, expected in zip(*(torch.autograd.grad(t, inputs, cotangent) for t in (y, exact))):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["dense", "channels_last"])
def test_float32_equals_the_grouped_arrangement(form):
    x, weight, styles = drawn(4, 32, 48, 3, (16, 20), torch.float32)
    x = x.detach().contiguous(memory_format=form).requires_grad_()
    y = ops.modulated_conv2d(x, weight, styles, padding=1)
    assert y.is_contiguous(memory_format=form)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, styles)]
    exact = with_groups(*wide)
    assert float((y - exact).detach().norm()) <= 2e-6 * float(exact.detach().norm())
    cotangent = torch.randn(y.shape).contiguous(memory_format=form)
    for found, expected in zip(
        torch.autograd.grad(y, (x, weight, styles), cotangent), torch.autograd.grad(exact, wide, cotangent.double())
    ):
        assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


OPTIONS = {
    "plain": dict(padding=1),
    "no demodulation": dict(padding=1, demodulate=False),
    "up": dict(up=2, padding=1, resample_filter=torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=D)),
    "down": dict(down=2, padding=1, resample_filter=torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D), flip_weight=False),
}


@pytest.mark.parametrize("label", OPTIONS)
def test_derivatives_of_every_order(label):
    x, weight, styles = drawn(2, 2, 2, 3, (4, 4))
    shape = ops.modulated_conv2d(x, weight, styles, **OPTIONS[label]).shape
    noise = torch.randn(2, 1, *shape[2:], dtype=D, requires_grad=True)

    def function(x, weight, styles, noise):
        return ops.modulated_conv2d(x, weight, styles, noise=noise, **OPTIONS[label])

    def twice(*inputs):
        first = torch.autograd.grad((function(*inputs) ** 3).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs, create_graph=True)

    inputs = (x, weight, styles, noise)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradcheck(twice, inputs, fast_mode=True, rtol=1e-2)


def test_each_output_channel_has_a_weight_of_unit_norm():
    x, weight, styles = drawn(grad=False)
    torch.testing.assert_close(  # one position at a time: the weight itself is the response to unit impulses
        ops.modulated_conv2d(torch.eye(3, dtype=D).reshape(3, 3, 1, 1), weight[:, :, :1, :1], styles[:1].expand(3, 3))
        .square()
        .sum((0, 2, 3)),
        torch.ones(4, dtype=D),
        rtol=1e-6,
        atol=1e-6,
    )
    scaled = ops.modulated_conv2d(x, 1e3 * weight, 1e2 * styles, padding=1)
    torch.testing.assert_close(scaled, ops.modulated_conv2d(x, weight, styles, padding=1), rtol=1e-6, atol=1e-6)


def test_no_weight_for_each_sample_is_kept():
    x, weight, styles = drawn(6, 16, 16, 3, (4, 4), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.modulated_conv2d(x, weight, styles, padding=1)
    assert max(saved) == weight.numel()


def test_zeros_stay_finite():
    x, weight, styles = drawn()
    with torch.no_grad():
        styles[0] = 0
        weight[1] = 0
    y = ops.modulated_conv2d(x, weight, styles, padding=1)
    assert not y[0].any()
    assert not y[:, 1].any()
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.square().sum() + y.sum(), (x, weight, styles)))
    half = [t.detach().half() for t in (x, weight, styles)]
    assert bool(ops.modulated_conv2d(*half, padding=1).isfinite().all())


def test_float16_does_not_overflow():
    x, weight, styles = drawn(2, 64, 8, 3, (6, 6), torch.float16, grad=False)
    large = (weight * 1000, styles * 1000)  # a sum of 576 squares of products of these is beyond float16, and so is one
    y = ops.modulated_conv2d(x, *large, padding=1)
    exact = with_groups(*(t.double() for t in (x, *large)))
    assert y.dtype == torch.float16
    assert float((y - exact).detach().norm()) <= 2e-3 * float(exact.detach().norm())
    leaves = [t.clone().requires_grad_() for t in (weight, styles)]
    wide = [t.double().requires_grad_() for t in (weight, styles)]
    cotangent = torch.randn(y.shape)
    found = torch.autograd.grad(ops.modulated_conv2d(x, *leaves, padding=1), leaves, cotangent.half())
    expected = torch.autograd.grad(with_groups(x.double(), *wide), wide, cotangent.double())
    for f, e in zip(found, expected):
        assert float((f - e).norm()) <= 5e-3 * float(e.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_sums_the_demodulation_in_float32(dtype):
    x, weight, styles = drawn(2, 64, 8, 3, (6, 6), torch.float32)
    with torch.no_grad():
        styles *= 1000
    with torch.autocast("cpu", dtype=dtype):
        y = ops.modulated_conv2d(x, weight, styles, padding=1)
    exact = with_groups(x.double(), weight.double(), styles.double())
    assert float((y - exact).detach().norm()) <= (1e-2 if dtype is torch.bfloat16 else 2e-3) * float(
        exact.detach().norm()
    )
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.float().sum(), (x, weight, styles)))


@pytest.mark.parametrize("label", OPTIONS)
def test_compiles_without_a_break_and_equals_eager(label):
    options = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in OPTIONS[label].items()}
    inputs = drawn(2, 4, 5, 3, (8, 8), torch.float32)

    def loss(*t):
        return ops.modulated_conv2d(*t, **options).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        torch.autograd.grad(compiled(*inputs), inputs), torch.autograd.grad(loss(*inputs), inputs)
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_empty_batch():
    x, weight, styles = drawn(0)
    y = ops.modulated_conv2d(x, weight, styles, padding=1, noise=torch.randn(5, 6, dtype=D))
    assert y.shape == (0, 4, 5, 6)
    dx, dw, ds = torch.autograd.grad(y.sum(), (x, weight, styles))
    assert dx.shape == x.shape
    assert ds.shape == styles.shape
    assert not dw.any()


def test_a_gradient_is_not_asked_for_where_none_is_wanted():
    x, weight, styles = drawn(grad=False)
    noise = torch.randn(5, 6, dtype=D)
    y = ops.modulated_conv2d(x, weight, styles.requires_grad_(), padding=1, noise=noise)
    assert torch.autograd.grad(y.sum(), styles)[0].shape == styles.shape


def test_the_thread_count_does_not_change_the_bits_of_the_scaling():
    before, results = torch.get_num_threads(), []
    x, scale, noise = torch.randn(3, 20, 70, 65), torch.randn(3, 20), torch.randn(3, 1, 70, 65)
    try:
        for form in (torch.contiguous_format, torch.channels_last):
            leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=form).detach(), scale, noise)]
            results = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                y = OP_SCALE(*leaves)
                results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
            assert all(torch.equal(a, b) for a, b in zip(*results))
    finally:
        torch.set_num_threads(before)


def test_module():
    torch.manual_seed(1)
    layer = genfast.nn.ModulatedConv2d(6, 5, 3, 8, up=2)
    x, w = torch.randn(2, 6, 7, 7), torch.randn(2, 8)
    styles = F.linear(w, layer.affine_weight / 8**0.5, layer.affine_bias)
    f = ops.setup_filter([1, 3, 3, 1])
    expected = ops.modulated_conv2d(x, layer.weight, styles, up=2, padding=1, resample_filter=f)
    torch.testing.assert_close(layer(x, w), expected)
    noise = torch.randn(14, 14)
    torch.testing.assert_close(layer(x, w, noise), expected + noise)
    assert sorted(layer.state_dict()) == ["affine_bias", "affine_weight", "resample_filter", "weight"]
    assert all(p.grad is not None for p in layer.parameters() if layer(x, w).sum().backward() is None)
    assert "style_dim=8" in repr(layer)


def test_module_at_equal_and_at_plain_learning_rates_computes_the_same():
    x, w = torch.randn(2, 6, 7, 7), torch.randn(2, 8)
    for demodulate in (True, False):
        results = []
        for equalized in (True, False):
            torch.manual_seed(3)
            layer = genfast.nn.ModulatedConv2d(6, 5, 1, 8, demodulate=demodulate, equalized_lr=equalized)
            assert layer.resample_filter is None
            results.append(layer(x, w))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


X, W, S = torch.ones(2, 3, 4, 4), torch.ones(5, 3, 3, 3), torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.modulated_conv2d(X.int(), W, S), TypeError, "x has dtype torch.int32"),
        (lambda: ops.modulated_conv2d(X, W.tolist(), S), TypeError, "weight is a list"),
        (lambda: ops.modulated_conv2d(X, W, S.long()), TypeError, "styles has dtype torch.int64"),
        (lambda: ops.modulated_conv2d(X, W, S, noise=X.int()), TypeError, "noise has dtype torch.int32"),
        (lambda: ops.modulated_conv2d(X, W, S.to("meta")), ValueError, "styles is on meta and x on cpu"),
        (lambda: ops.modulated_conv2d(X[0], W, S), ValueError, r"x has shape \(3, 4, 4\), expected \(N, I, H, W\)"),
        (lambda: ops.modulated_conv2d(X, W[:, :2], S), ValueError, r"weight has shape \(5, 2, 3, 3\), expected \(O, I "
        r"= 3"),
        (lambda: ops.modulated_conv2d(X, W[:0], S), ValueError, r"weight has shape \(0, 3, 3, 3\)"),
        (lambda: ops.modulated_conv2d(X, W, S[:1]), ValueError, r"styles has shape \(1, 3\), expected \(2, 3\)"),
        (lambda: ops.modulated_conv2d(X, W, S, up=0), ValueError, "up=0, expected a positive integer"),
        (lambda: ops.modulated_conv2d(X, W, S, down=(2, 2)), ValueError, r"down=\(2, 2\), expected a positive integer"),
        (lambda: ops.modulated_conv2d(X, W, S, padding=(1, 2, 3)), ValueError, r"modulated_conv2d: padding=\(1, 2, "
        r"3\)"),
        (lambda: ops.modulated_conv2d(X, W, S, resample_filter=[1.0]), TypeError, "modulated_conv2d: filter is a list"),
        (lambda: ops.modulated_conv2d(X, W, S, noise=torch.ones(4, 4)), ValueError, r"\(4, 4\), expected \(2, 2\)"),
        (lambda: ops.modulated_conv2d(X, W, S, noise=torch.ones(2, 5, 2, 2)), ValueError, r"expected .*\(2, 1, 2, 2\)"),
        (
            lambda: ops.modulated_conv2d(X, W, S, up=2, padding=1, resample_filter=torch.ones(4, requires_grad=True)),
            ValueError, "filter requires a gradient",
        ),
        (lambda: OP_SCALE(X[0, 0, 0], S, None), ValueError, r"channel_scale: x has shape \(4,\)"),
        (lambda: OP_SCALE(X, S[:, :2], None), ValueError, r"scale has shape \(2, 2\), expected \(2, 3\)"),
        (lambda: OP_SCALE(X, S, X), ValueError, r"noise has shape \(2, 3, 4, 4\), expected \(2, 1, 4, 4\)"),
        (lambda: OP_ENERGY(S), ValueError, r"tap_energy: weight has shape \(2, 3\)"),
        (lambda: OP_ENERGY(W.int()), TypeError, "weight has dtype torch.int32"),
        (lambda: genfast.nn.ModulatedConv2d(3, 0, 3, 8), ValueError, "out_channels=0, expected at least 1"),
        (lambda: genfast.nn.ModulatedConv2d(3, 3, 3, 8, up=0), ValueError, "up=0, expected at least 1"),
        (lambda: genfast.nn.ModulatedConv2d(3, 3, 3, 8)(X, S), ValueError, r"shape \(2, 3\), expected \(N, style_dim "
        r"= 8\)"),
    ],
)  # fmt: skip
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
