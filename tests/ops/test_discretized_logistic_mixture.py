"""discretized_logistic_mixture_nll and _sample: probabilities, extremes, the published formula, errors."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F

import genfast
from genfast import ops


def every_pixel(levels, channels):
    """All levels**channels pixels as one batch of vectors (N, C)."""
    return torch.cartesian_prod(*[torch.arange(levels)] * channels).view(-1, channels)


def shared(params, x):
    """One position's parameters, for each pixel of a batch."""
    return params.expand(x.shape[0], -1)


EXTREMES = [
    pytest.param(0.0, 1.0, id="ordinary"),
    pytest.param(-9.0, 0.0, id="narrowest"),
    pytest.param(5.0, 0.0, id="widest"),
    pytest.param(-2.0, 30.0, id="means far out"),
]


@pytest.mark.parametrize(("log_scale", "spread"), EXTREMES)
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (1, 3), (1, 256), (1, 65536), (3, 2), (3, 7), (3, 16)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_probabilities_sum_to_one(channels, levels, log_scale, spread, dtype):
    k = 3
    params = torch.randn(1, (10 if channels == 3 else 3) * k, dtype=dtype)
    for c in range(channels):
        start = k + c * (3 if channels == 3 else 2) * k
        params[:, start : start + k] *= spread
        params[:, start + k : start + 2 * k] += log_scale
    x = every_pixel(levels, channels)
    nll = ops.discretized_logistic_mixture_nll(shared(params, x), x, levels=levels)
    total = float((-nll.double()).exp().sum())
    assert total == pytest.approx(1, abs=1e-10 if dtype is torch.float64 else 1e-5)


def direct(params, x, levels):
    """The sum of products of differences of sigmoids, as the paper writes it, in float64."""
    params = params.double()
    k = params.shape[1] // 10
    logits, rest = params[:, :k], params[:, k:].reshape(params.shape[0], 3, 3, k, *params.shape[2:])
    v = (x.double() * 2 / (levels - 1) - 1)[:, :, None]
    a, b, c = rest[:, :, 2].tanh().unbind(1)
    mean = rest[:, :, 0].clone()
    mean[:, 1] += a * v[:, 0]
    mean[:, 2] += b * v[:, 0] + c * v[:, 1]
    s, half = rest[:, :, 1].clamp(min=-7).exp(), 1 / (levels - 1)
    up, down = ((v - mean + half) / s).sigmoid(), ((v - mean - half) / s).sigmoid()
    up, down = up.masked_fill((x == levels - 1)[:, :, None], 1), down.masked_fill((x == 0)[:, :, None], 0)
    return -(logits.softmax(1) * (up - down).prod(1)).sum(1).log()


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(2, 5, 7), (3, 4, 8), (1, 1, 1), (2, 16, 16), (5, 6, 3)])
def test_equals_the_direct_sum(shape, form):
    n, h, w = shape
    params = torch.randn(n, 70, h, w).contiguous(memory_format=form).requires_grad_()
    x = torch.randint(256, (n, 3, h, w), dtype=torch.uint8)
    x.view(-1)[::7], x.view(-1)[1::7] = 0, 255
    found = ops.discretized_logistic_mixture_nll(params, x)
    exact_params = params.detach().double().requires_grad_()
    expected = direct(exact_params, x, 256)
    torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-6)
    weights = torch.randn(n, h, w)
    grad = torch.autograd.grad(found, params, weights)[0]
    exact = torch.autograd.grad(expected, exact_params, weights.double())[0]
    assert float((grad.double() - exact).norm() / exact.norm()) < 2e-6


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=lambda d: str(d)[6:]
)
def test_integer_types_and_layouts_of_x_give_the_same(dtype):
    x = torch.randint(100, (3, 3, 5, 6))
    params = torch.randn(3, 20, 5, 6)
    expected = ops.discretized_logistic_mixture_nll(params, x, levels=100)
    for same in (
        x,
        x.contiguous(memory_format=torch.channels_last),
        x.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    ):
        assert torch.equal(ops.discretized_logistic_mixture_nll(params, same.to(dtype), levels=100), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e20])
@pytest.mark.parametrize("levels", [2, 256, 65536])
def test_extreme_parameters_stay_finite_in_float32(channels, levels, scale):
    params = (torch.randn(2, (10 if channels == 3 else 3) * 4, 8, 8) * scale).clamp(-1e30, 80 if scale < 1e4 else 1e30)
    params.requires_grad_()
    for x in (torch.zeros(2, channels, 8, 8).long(), torch.randint(levels, (2, channels, 8, 8))):
        nll = ops.discretized_logistic_mixture_nll(params, x, levels=levels)
        assert bool(nll.isfinite().all())
        assert bool(torch.autograd.grad(nll.sum(), params)[0].isfinite().all())


def test_gradients_of_extreme_parameters_are_exact():
    """Narrow, wide and far logistics, where the written-out formula keeps no digit in float32."""
    log_s = torch.tensor([-7.0, -6.5, -4.0, -1.0, 0.0, 3.0, 8.0, 40.0])
    mean = torch.tensor([-50.0, -1.2, -1.0, -0.999, -0.3, 0.0, 0.004, 0.9, 1.0, 1.001, 3.0, 200.0])
    grid = torch.cartesian_prod(torch.zeros(1), mean, log_s)
    for level in (0, 1, 100, 127, 254, 255):
        x = torch.full((len(grid), 1), level)
        params, exact_params = grid.clone().requires_grad_(), grid.double().requires_grad_()
        found = ops.discretized_logistic_mixture_nll(params, x)
        expected = genfast.reference.discretized_logistic_mixture_nll(exact_params, x, 256)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=2e-6)
        grad = torch.autograd.grad(found.sum(), params)[0].double()
        exact = torch.autograd.grad(expected.sum(), exact_params)[0]
        torch.testing.assert_close(grad, exact, rtol=2e-5, atol=1e-5)


def test_a_component_of_probability_zero_changes_nothing():
    params, x = torch.randn(2, 30, 4), torch.randint(256, (2, 3, 4))
    params[:, 1] = -math.inf
    params.requires_grad_()
    nll = ops.discretized_logistic_mixture_nll(params, x)
    grad = torch.autograd.grad(nll.sum(), params)[0]
    assert bool(grad.isfinite().all())
    assert not grad[:, 1::3].any()
    blocks = [params[:, i : i + 3][:, [0, 2]] for i in range(0, 30, 3)]
    torch.testing.assert_close(ops.discretized_logistic_mixture_nll(torch.cat(blocks, 1), x), nll)


def test_clamped_log_scales_have_no_gradient():
    params = torch.randn(4, 6)
    params[:, 4:] = torch.tensor([-7.5, -6.5])
    params.requires_grad_()
    grad = torch.autograd.grad(ops.discretized_logistic_mixture_nll(params, torch.full((4, 1), 120)).sum(), params)[0]
    assert not grad[:, 4].any()
    assert bool(grad[:, 5].ne(0).all())


def test_not_a_number_stays_at_its_position():
    params = torch.randn(1, 20, 6, 6)
    params[0, 7, 2, 3] = math.nan
    nll = ops.discretized_logistic_mixture_nll(params, torch.randint(256, (1, 3, 6, 6)))
    assert nll.isnan().nonzero().tolist() == [[0, 2, 3]]


def published(x, params):
    """discretized_mix_logistic_loss of PixelCNN++ in its PyTorch form: x (B, H, W, 3) in [-1, 1], params (B, H, W,
    10K)."""
    xs, nr_mix = list(x.shape), params.shape[-1] // 10
    logit_probs = params[..., :nr_mix]
    rest = params[..., nr_mix:].contiguous().view([*xs, nr_mix * 3])
    means = rest[..., :nr_mix]
    log_scales = torch.clamp(rest[..., nr_mix : 2 * nr_mix], min=-7.0)
    coeffs = torch.tanh(rest[..., 2 * nr_mix : 3 * nr_mix])
    x = x.unsqueeze(-1) + torch.zeros([*xs, nr_mix])
    m2 = (means[..., 1, :] + coeffs[..., 0, :] * x[..., 0, :]).view(*xs[:3], 1, nr_mix)
    m3 = (means[..., 2, :] + coeffs[..., 1, :] * x[..., 0, :] + coeffs[..., 2, :] * x[..., 1, :]).view(
        *xs[:3], 1, nr_mix
    )
    means = torch.cat((means[..., 0, :].unsqueeze(3), m2, m3), dim=3)
    centered_x = x - means
    inv_stdv = torch.exp(-log_scales)
    plus_in = inv_stdv * (centered_x + 1.0 / 255.0)
    min_in = inv_stdv * (centered_x - 1.0 / 255.0)
    cdf_delta = torch.sigmoid(plus_in) - torch.sigmoid(min_in)
    log_cdf_plus = plus_in - F.softplus(plus_in)
    log_one_minus_cdf_min = -F.softplus(min_in)
    mid_in = inv_stdv * centered_x
    log_pdf_mid = mid_in - log_scales - 2.0 * F.softplus(mid_in)
    inner_inner_cond = (cdf_delta > 1e-5).float()
    inner_inner_out = inner_inner_cond * torch.log(torch.clamp(cdf_delta, min=1e-12)) + (1.0 - inner_inner_cond) * (
        log_pdf_mid - math.log(127.5)
    )
    inner_cond = (x > 0.999).float()
    inner_out = inner_cond * log_one_minus_cdf_min + (1.0 - inner_cond) * inner_inner_out
    cond = (x < -0.999).float()
    log_probs = cond * log_cdf_plus + (1.0 - cond) * inner_out
    log_probs = torch.sum(log_probs, dim=3) + F.log_softmax(logit_probs, dim=-1)
    return -torch.logsumexp(log_probs, dim=-1)


def test_parity_equals_the_published_code():
    params = torch.randn(2, 100, 8, 8)
    params[0, 10:] *= 4  # reaches the density branch
    params.requires_grad_()
    x = torch.randint(256, (2, 3, 8, 8))
    x[:, :, 0], x[:, :, 1] = 0, 255
    found = ops.discretized_logistic_mixture_nll(params, x, parity="pixelcnn++")
    scaled = (x.float() * 2 / 255 - 1).permute(0, 2, 3, 1)
    expected = published(scaled, params.permute(0, 2, 3, 1))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(nll.sum(), params)[0] for nll in (found, expected)), rtol=1e-4, atol=1e-4
    )
    ours = ops.discretized_logistic_mixture_nll(params, x)
    assert not torch.equal(found, ours)
    torch.testing.assert_close(ours[1], found[1], rtol=1e-3, atol=1e-3)


def test_half_precision_gives_float32():
    params, x = torch.randn(2, 20, 5).bfloat16().requires_grad_(), torch.randint(256, (2, 3, 5))
    nll = ops.discretized_logistic_mixture_nll(params, x)
    assert nll.dtype == torch.float32
    assert torch.autograd.grad(nll.sum(), params)[0].dtype == torch.bfloat16


def test_opcheck_of_the_backward():
    for form in (torch.contiguous_format, torch.channels_last):
        params = torch.randn(2, 20, 3, 5).contiguous(memory_format=form)
        args = (params, torch.randint(256, (2, 3, 3, 5)), torch.randn(2, 3, 5), 256)
        torch.library.opcheck(torch.ops.genfast.discretized_logistic_mixture_nll_backward.default, args)


def test_the_thread_count_does_not_change_the_bits():
    params = torch.randn(3, 50, 33, 31, requires_grad=True)
    x = torch.randint(256, (3, 3, 33, 31))
    uniforms = torch.rand(3, 4, 33, 31)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            nll = ops.discretized_logistic_mixture_nll(params, x)
            grad = torch.autograd.grad(nll.mean(), params)[0]
            results.append((nll, grad, ops.discretized_logistic_mixture_sample(params, uniforms)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize(
    ("params", "x", "options", "error", "message"),
    [
        ((2, 100, 4), (2, 3, 4), {"dtype": torch.float32}, TypeError, r"x has dtype torch\.float32, expected integer "
        r"levels"),
        ((2, 100, 4), (2, 3, 4), {"dtype": torch.bool}, TypeError, r"x has dtype torch\.bool"),
        ((2, 99, 4), (2, 3, 4), {}, ValueError, r"params has shape \(2, 99, 4\), expected \(N, 10K, \.\.\.\) for 3 "
        r"channels"),
        ((2, 10, 4), (2, 1, 4), {}, ValueError, r"expected \(N, 3K, \.\.\.\) for 1 channel:"),
        ((2, 0, 4), (2, 3, 4), {}, ValueError, r"params has shape \(2, 0, 4\)"),
        ((2, 100, 4), (2, 2, 4), {}, ValueError, "got 2 channels, expected 1 or 3"),
        ((2, 100, 4), (2, 3, 5), {}, ValueError, r"x has shape \(2, 3, 5\) and params \(2, 100, 4\)"),
        ((2, 100, 4), (1, 3, 4), {}, ValueError, r"x has shape \(1, 3, 4\)"),
        ((2, 100, 4), (2, 3, 4), {"levels": 1}, ValueError, "levels=1, expected 2 to 65536"),
        ((2, 100, 4), (2, 3, 4), {"value": 256}, ValueError, "x has values from 0 to 256, expected 0 to levels - 1 = "
        "255"),
        ((2, 100, 4), (2, 3, 4), {"value": -1}, ValueError, "x has values from -1 to 0, expected 0"),
        ((2, 100, 4), (2, 3, 4), {"parity": "pixelcnn"}, ValueError, r"parity='pixelcnn', expected one of "
        r"'pixelcnn\+\+'"),
        ((2, 100, 4), (2, 3, 4), {"params": torch.int64}, TypeError, r"params has dtype torch\.int64"),
    ],
)  # fmt: skip
def test_errors(params, x, options, error, message):
    options = dict(options)
    x = torch.zeros(x, dtype=options.pop("dtype", torch.int64))
    if "value" in options:
        x.view(-1)[3] = options.pop("value")
    with pytest.raises(error, match=message):
        ops.discretized_logistic_mixture_nll(
            torch.zeros(params, dtype=options.pop("params", torch.float32)), x, **options
        )


def test_parity_under_a_forced_backend_says_why():
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match="'cpu' has no kernel for parity"):
        ops.discretized_logistic_mixture_nll(torch.zeros(1, 10), torch.zeros(1, 3).long(), parity="pixelcnn++")


# ---- sampling ----


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize(("channels", "levels"), [(1, 5), (1, 256), (3, 4)])
def test_samples_follow_the_probabilities(channels, levels, temperature):
    """Pearson's chi-square over all pixels, those expected less than 8 times taken together."""
    k, count = 3, 60000
    generator = torch.Generator().manual_seed(3)
    params = 0.7 * torch.randn(1, (10 if channels == 3 else 3) * k, generator=generator, dtype=torch.float64)
    drawn = ops.discretized_logistic_mixture_sample(
        params.expand(count, -1), channels=channels, levels=levels, temperature=temperature, generator=generator
    )
    tempered = params.clone()  # the mixture that a temperature stands for
    tempered[:, :k] /= temperature
    for c in range(channels):
        start = 2 * k + c * (3 if channels == 3 else 2) * k
        tempered[:, start : start + k] += math.log(temperature)
    pixels = every_pixel(levels, channels)
    expected = count * (-ops.discretized_logistic_mixture_nll(shared(tempered, pixels), pixels, levels=levels)).exp()
    places = (drawn * levels ** torch.arange(channels - 1, -1, -1)).sum(1)
    seen = torch.bincount(places, minlength=levels**channels).double()
    rare = expected < 8
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
    keep = expected > 0
    statistic = float(((seen - expected) ** 2 / expected)[keep].sum())
    freedom = int(keep.sum()) - 1
    assert freedom > 3
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_samples_equal_the_reference_on_the_same_uniforms():
    for channels, shape in ((3, (2, 40, 9, 8)), (1, (2, 12, 9, 8)), (1, (2, 270, 9, 8))):
        params = torch.randn(shape)
        uniforms = torch.rand(2, 1 + channels, 9, 8)
        uniforms.view(-1)[:8] = torch.tensor([0.0, 1.0, 1e-7, 1 - 1e-7] * 2)
        for p in (params, params.double(), params.contiguous(memory_format=torch.channels_last), params[:, :, ::2, 1:]):
            u = uniforms if p.shape == params.shape else uniforms[:, :, ::2, 1:]
            found = ops.discretized_logistic_mixture_sample(p, u, channels=channels, levels=100, temperature=0.75)
            with genfast.backend("reference"):
                expected = ops.discretized_logistic_mixture_sample(
                    p, u, channels=channels, levels=100, temperature=0.75
                )
            assert torch.equal(found, expected)
            assert found.dtype == torch.int64
            assert found.shape == (2, channels, *p.shape[2:])


def test_the_component_is_the_first_whose_cumulative_probability_exceeds_u():
    params = torch.zeros(5, 9)  # three components of probability 1/3, at -1, 0 and 1
    params[:, 3:6] = torch.tensor([-1.0, 0.0, 1.0])
    params[:, 6:] = -7
    uniforms = torch.tensor([[0.0, 0.5], [0.33, 0.5], [0.34, 0.5], [0.67, 0.5], [1.0, 0.5]])
    found = ops.discretized_logistic_mixture_sample(params, uniforms, channels=1, levels=3)
    assert found.flatten().tolist() == [0, 0, 1, 2, 2]


def test_green_follows_the_red_that_was_snapped():
    """mean_G = tanh(a) x_R with x_R on the grid {-1, 1}: 0.1 of red becomes 1, and green comes out as +-tanh(a) of
    it."""
    params = torch.zeros(1, 10)
    params[:, [2, 5, 8]] = -7
    params[:, 1], params[:, 3] = 0.1, 3.0
    uniforms = torch.full((1, 4), 0.5)
    assert ops.discretized_logistic_mixture_sample(params, uniforms, levels=2).tolist()[0][:2] == [1, 1]
    params[:, 1] = -0.1
    assert ops.discretized_logistic_mixture_sample(params, uniforms, levels=2).tolist()[0][:2] == [0, 0]


def test_samples_repeat_with_a_generator_and_carry_no_gradient():
    params = torch.randn(2, 20, 4, 4, requires_grad=True)
    draws = [
        ops.discretized_logistic_mixture_sample(params, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not draws[0].requires_grad
    compiled = torch.compile(ops.discretized_logistic_mixture_sample, fullgraph=True, backend="aot_eager")
    uniforms = torch.rand(2, 4, 4, 4)
    assert torch.equal(compiled(params, uniforms), ops.discretized_logistic_mixture_sample(params, uniforms))
    torch.library.opcheck(
        torch.ops.genfast.discretized_logistic_mixture_sample.default, (params.detach(), uniforms, 3, 256, 1.0)
    )


def test_sampling_an_empty_batch():
    assert ops.discretized_logistic_mixture_sample(torch.zeros(0, 10, 4)).shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 2}, ValueError, "got 2 channels, expected 1 or 3"),
        ({"channels": 1}, ValueError, r"params has shape \(2, 20, 4\), expected \(N, 3K, \.\.\.\) for 1 channel"),
        ({"levels": 70000}, ValueError, "levels=70000, expected 2 to 65536"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0, expected more than 0"),
        ({"uniforms": torch.rand(2, 3, 4)}, ValueError, r"uniforms has shape \(2, 3, 4\), expected \(2, 4, 4\)"),
        ({"uniforms": torch.zeros(2, 4, 4).long()}, TypeError, r"uniforms has dtype torch\.int64"),
    ],
)
def test_sampling_errors(options, error, message):
    with pytest.raises(error, match=message):
        ops.discretized_logistic_mixture_sample(torch.zeros(2, 20, 4), **options)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 2, 4, 8])  # a logit, a mean, a log-scale, and those of green
def test_samples_of_parameters_that_are_not_finite_are_refused(place, value, backend):
    params = torch.zeros(2, 20, 3, 4)
    params[1, place, 1, 2] = value
    params[1, (place + 1) if place else 1, 1, 2] = value  # of both components
    with genfast.backend(backend) if backend else contextlib.nullcontext():
        with pytest.raises(FloatingPointError, match=r"channel \d of sample 1 is drawn, at position \(1, 2\)"):
            ops.discretized_logistic_mixture_sample(params, levels=16)
        params[1, :, 1, 2] = 0
        params[:, 0] = -math.inf  # a component that is never drawn
        assert int(ops.discretized_logistic_mixture_sample(params, levels=16).min()) >= 0
