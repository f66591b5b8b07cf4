"""ops.affine_coupling: what is special about it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast.ops import affine_coupling
from genfast.reference.affine_coupling import LAYOUTS, SCALES, split_params

SIZES = st.sampled_from([1, 2, 3, 7, 16, 17, 33])


def problem(scale, shape, width, dtype=torch.float64, factor=1.0):
    x = torch.randn(shape, dtype=dtype)
    channels = width if scale == "additive" else 2 * width
    return x, factor * torch.randn(shape[0], channels, *shape[2:], dtype=dtype)


@settings(max_examples=60, deadline=None)
@given(
    scale=st.sampled_from(SCALES),
    layout=st.sampled_from(LAYOUTS),
    transform=st.sampled_from(["first", "last"]),
    n=st.sampled_from([1, 3, 130]),
    channels=SIZES,
    side=st.sampled_from([(), (1,), (5,), (4, 4), (3, 7), (2, 3, 5)]),
    last=st.booleans(),
    data=st.data(),
)
def test_inverse_undoes_forward(scale, layout, transform, n, channels, side, last, data):
    width = data.draw(st.integers(1, channels))
    x, params = problem(scale, (n, channels, *side), width)
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim()) if last else None
    if form is not None:
        x, params = x.contiguous(memory_format=form), params.contiguous(memory_format=form)
    options = {"scale": scale, "layout": layout, "transform": transform}
    y, logdet = affine_coupling(x, params, **options)
    back, minus = affine_coupling(y, params, inverse=True, **options)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(minus, -logdet)
    expected, expected_logdet = genfast.reference.affine_coupling(
        x, params, None, None, scale, layout, transform == "last"
    )
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(logdet, expected_logdet)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(64, 48, 16, 16), (256, 12, 32, 32), (5000, 2), (40, 784), (1, 6, 300, 300)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_real_sizes_in_float32(scale, shape, channels_last):
    if channels_last and len(shape) == 2:
        pytest.skip("vectors have one layout")
    width = shape[1] // 2
    x, params = problem(scale, shape, width, torch.float32)
    if channels_last:
        x, params = (t.contiguous(memory_format=torch.channels_last) for t in (x, params))
    x.requires_grad_()
    params.requires_grad_()
    y, logdet = affine_coupling(x, params, scale=scale)
    exact = [t.detach().double().requires_grad_() for t in (x, params)]
    expected = genfast.reference.affine_coupling(*exact, scale=scale)
    weights = [torch.randn_like(e) for e in expected]
    grads = torch.autograd.grad((y, logdet), (x, params), [w.float() for w in weights])
    weights = [w.float().double() for w in weights]
    live = [i for i, e in enumerate(expected) if e.requires_grad]  # the additive logdet is constant
    exact_grads = torch.autograd.grad([expected[i] for i in live], exact, [weights[i] for i in live])
    expected = [e.detach() for e in expected]
    # The terms of a log-determinant may nearly cancel: then it is held to the rounding of its terms, not to that of the
    # rest.
    rows = [t.detach().movedim(1, -1).reshape(-1, t.shape[1]) for t in exact]
    terms = genfast.reference.affine_coupling(*rows, scale=scale)[1].view(shape[0], -1).abs().sum(1)
    slack = (0.0, 1e-8 * float(terms.norm()), 0.0, 0.0)
    bounds = (2e-6, 2e-6, 1e-5, 1e-5)
    for found, wanted, allowed, more in zip((y, logdet, *grads), (*expected, *exact_grads), bounds, slack):
        assert float((found.detach().double() - wanted).norm()) <= allowed * float(wanted.norm()) + more


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_masked_parameters_never_leak_and_get_no_gradient(scale, channels_last):
    x, params = problem(scale, (3, 4, 6, 5), 4)
    mask = torch.rand(1, 6, 5) < 0.5
    spoilt = params.clone()
    spoilt[mask.expand(3, params.shape[1], 6, 5)] = float("nan")
    if channels_last:
        x, spoilt = (t.contiguous(memory_format=torch.channels_last) for t in (x, spoilt))
    x.requires_grad_()
    spoilt.requires_grad_()
    y, logdet = affine_coupling(x, spoilt, scale=scale, mask=mask)
    expected, expected_logdet = affine_coupling(x, params, scale=scale, mask=mask)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(logdet, expected_logdet)
    where = mask.expand_as(x)
    assert torch.equal(y[where], x[where])
    dx, dparams = torch.autograd.grad(y.sum() + logdet.sum(), (x, spoilt))
    assert bool(dx.isfinite().all())
    assert bool((dparams[mask.expand(3, params.shape[1], 6, 5)] == 0).all())
    assert bool(dparams.isfinite().all())


def test_an_invalid_parameter_spoils_its_own_sample_alone():
    x, params = problem("exp", (4, 6, 5, 5), 3, torch.float32)
    clean, clean_logdet = affine_coupling(x, params)
    params[1, 0, 2, 2] = float("nan")
    params[2, 1, 0, 0] = float("inf")
    y, logdet = affine_coupling(x, params)
    assert torch.equal(y[[0, 3]], clean[[0, 3]])
    assert torch.equal(logdet[[0, 3]], clean_logdet[[0, 3]])
    assert bool(logdet[1].isnan())
    assert float(logdet[2]) == float("inf")
    assert not bool(y[1].isfinite().all())


@pytest.mark.parametrize("scale", SCALES)
def test_extreme_parameters_agree_with_eager(scale):
    r = torch.tensor([-1e4, -200.0, -88.5, -87.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 88.0, 88.7, 89.0, 1e4] * 3)
    x, t = torch.ones(1, 1, r.numel()), torch.zeros(1, 1, r.numel())
    params = t if scale == "additive" else torch.cat((r.reshape(1, 1, -1), t), 1)
    for inverse in (False, True):
        y, logdet = affine_coupling(x, params, scale=scale, inverse=inverse)
        expected, expected_logdet = genfast.reference.affine_coupling(x, params, scale=scale, inverse=inverse)
        torch.testing.assert_close(y, expected, rtol=2e-5, atol=2e-38)  # e^x flushes denormal results to zero
        torch.testing.assert_close(logdet, expected_logdet)


@pytest.mark.parametrize(("lo", "hi"), [(-1.0, 1.0), (-87.0, 88.0), (1e-8, 1e-3)])
@pytest.mark.parametrize(
    ("scale", "exact"),
    [
        ("exp", lambda r: r.exp()),
        ("sigmoid", lambda r: torch.sigmoid(r + 2)),
        ("tanh", lambda r: torch.tanh(r).exp()),
        ("softclamp", lambda r: (r / (1 + r.abs() / torch.tensor(1000.0, dtype=r.dtype).log())).exp()),
    ],
)
@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float32, 2.0**-23), (torch.float64, 2.0**-52)])
def test_scale_maps_to_a_few_ulp(scale, exact, lo, hi, dtype, epsilon):
    mp = (
        pytest.importorskip("mpmath", reason="an independent exponential needs mpmath")
        if dtype == torch.float64
        else None
    )
    r = torch.linspace(lo, hi, 513 if mp is None else 33, dtype=dtype)
    s, _ = affine_coupling(torch.ones(1, 1, len(r), dtype=dtype), torch.stack((r, r * 0))[None], scale=scale)
    if mp is None:
        wanted = exact(r.double())
    else:
        mp.mp.prec = 120
        functions = {
            "exp": mp.exp,
            "sigmoid": lambda v: 1 / (1 + mp.exp(-(v + 2))),
            "tanh": lambda v: mp.exp(mp.tanh(v)),
            "softclamp": lambda v: mp.exp(v / (1 + abs(v) / mp.log(1000))),
        }
        wanted = torch.tensor([float(functions[scale](mp.mpf(v))) for v in r.tolist()], dtype=dtype)
    ulps = ((s.flatten().double() - wanted.double()) / wanted.double().abs().clamp_min(1e-37)).abs() / epsilon
    condition = 8 if scale == "softclamp" else 4  # e^v turns half an ULP of v = 7 into seven halves
    assert float(ulps.max()) <= (condition if lo != -87.0 or scale == "tanh" else 64)


def test_outputs_are_written_everywhere(monkeypatch):
    """Every output starts as NaN here; an element that a kernel forgets stays so."""
    from genfast import _allocator

    real_like, real_pool = torch.empty_like, _allocator.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: real_like(*a, **k).fill_(float("nan")))
    monkeypatch.setattr(_allocator, "empty_like", lambda *a, **k: real_pool(*a, **k).fill_(float("nan")))
    for shape in ((3, 5, 7, 3), (2, 6, 16, 16), (9, 5), (300, 3), (2, 40, 3, 3)):
        for width in (1, shape[1] - 1, shape[1]):
            for form in (torch.contiguous_format, torch.channels_last):
                x, params = problem("sigmoid", shape, width)
                if len(shape) == 4:
                    x, params = x.contiguous(memory_format=form), params.contiguous(memory_format=form)
                x.requires_grad_()
                params.requires_grad_()
                y, logdet = affine_coupling(x, params, scale="sigmoid")
                grads = torch.autograd.grad((y, logdet), (x, params), (x.detach(), logdet.detach()))
                assert all(bool(t.isfinite().all()) for t in (y, logdet, *grads))


def test_only_the_kept_tensor_and_the_parameters_are_saved():
    for option in ("input", "output"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            x, params = (torch.randn(2, 4, 8, 8, requires_grad=True) for _ in range(2))
            y, _ = affine_coupling(x, params, save_for_backward=option)
        pointers = {t.data_ptr() for t in saved}
        assert pointers == {(x if option == "input" else y).data_ptr(), params.data_ptr()}


def test_peak_memory_is_the_outputs_and_the_gradients():
    from genfast._peak_memory import peak_bytes

    x, params, gy = (torch.randn(64, 48, 16, 16, requires_grad=i < 2) for i in range(3))
    gl = torch.randn(64)

    def step():
        y, logdet = affine_coupling(x, params)
        return torch.autograd.grad((y, logdet), (x, params), (gy, gl))

    step()
    tensors = 3 * x.nbytes + 64 * 4
    assert peak_bytes(step) <= 1.01 * tensors


def test_alpha_is_learned_per_channel_or_as_one():
    x, params = problem("tanh", (3, 4, 5, 5), 2)
    for shape in ((1,), (2,)):
        alpha = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        y, logdet = affine_coupling(x, params, scale="tanh", alpha=alpha)
        (found,) = torch.autograd.grad(y.square().sum() + logdet.sum(), alpha)
        e, e_logdet = genfast.reference.affine_coupling(x, params, alpha, scale="tanh")
        (expected,) = torch.autograd.grad(e.square().sum() + e_logdet.sum(), alpha)
        torch.testing.assert_close(found, expected)
    half, _ = affine_coupling(x, params, scale="tanh", alpha=0.5)
    again, _ = affine_coupling(x, params, scale="tanh", alpha=torch.tensor([0.5]))
    assert torch.equal(half, again)


X, P = torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x has dtype torch.int64, expected a floating-point", lambda: affine_coupling(X.long(), P)),
        (TypeError, "params has dtype torch.int32", lambda: affine_coupling(X, P.int())),
        (TypeError, "params is a list", lambda: affine_coupling(X, [1.0])),
        (ValueError, r"params has shape \(2, 3, 3, 3\).*2C'", lambda: affine_coupling(X, P[:, :3])),
        (ValueError, r"params has shape \(2, 10, 3, 3\)", lambda: affine_coupling(X, torch.zeros(2, 10, 3, 3))),
        (ValueError, r"params has shape \(1, 4, 3, 3\)", lambda: affine_coupling(X, P[:1])),
        (ValueError, r"params has shape \(2, 4, 3, 2\)", lambda: affine_coupling(X, P[..., :2])),
        (ValueError, r"x has shape \(4,\), expected \(N, C, ...\)", lambda: affine_coupling(torch.zeros(4),
        torch.zeros(4))),
        (ValueError, "scale='relu', expected one of 'exp'", lambda: affine_coupling(X, P, scale="relu")),
        (ValueError, "layout='x', expected one of", lambda: affine_coupling(X, P, layout="x")),
        (ValueError, "transform='middle'", lambda: affine_coupling(X, P, transform="middle")),
        (ValueError, "save_for_backward='both'", lambda: affine_coupling(X, P, save_for_backward="both")),
        (ValueError, "alpha goes with", lambda: affine_coupling(X, P, alpha=2.0)),
        (ValueError, r"alpha has shape \(3,\), expected \(1,\) or \(2,\)",
         lambda: affine_coupling(X, P, scale="tanh", alpha=torch.ones(3))),
        (TypeError, "mask has dtype torch.float32, expected torch.bool",
         lambda: affine_coupling(X, torch.cat((P, P), 1), mask=torch.ones(1, 3, 3))),
        (ValueError, r"mask has shape \(4, 3, 2\), expected one that broadcasts to \(4, 3, 3\)",
         lambda: affine_coupling(X, torch.cat((P, P), 1), mask=torch.ones(4, 3, 2) > 0)),
        (ValueError, "with a mask params transforms every channel",
         lambda: affine_coupling(X, P, mask=torch.ones(1, 3, 3) > 0)),
        (ValueError, "params is on meta and x on cpu", lambda: affine_coupling(X, P.to("meta"))),
    ],
)  # fmt: skip
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def shifted_first(x, params, scale, layout, mask, alpha, last, inverse):
    """y and logdet as the published codes write them."""
    width = params.shape[1] // 2
    r, t = split_params(params, scale, layout)
    maps = {
        "exp": lambda r: r,
        "sigmoid": lambda r: torch.nn.functional.logsigmoid(r + 2),
        "tanh": lambda r: alpha * r.tanh(),
    }
    log_s = maps[scale](r)
    if mask is not None:
        t, log_s = t.masked_fill(mask, 0), log_s.masked_fill(mask, 0)
    x_a, x_b = (x[:, x.shape[1] - width :], x[:, : x.shape[1] - width]) if last else (x[:, :width], x[:, width:])
    y_a = x_a * (-log_s).exp() - t if inverse else (x_a + t) * log_s.exp()
    log_s = -log_s if inverse else log_s
    return torch.cat((x_b, y_a) if last else (y_a, x_b), 1), log_s.flatten(1).sum(1)


@pytest.mark.parametrize("saved", ["input", "output"])
@pytest.mark.parametrize("scale", ["exp", "sigmoid", "tanh"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (9, 6), (2, 3, 40, 33)])
def test_the_shift_first(scale, layout, shape, saved):
    for last in (False, True):
        masked = layout.startswith("scale") and len(shape) == 4
        width = shape[1] if masked else shape[1] // 2
        x, params = problem(scale, shape, width)
        mask = (torch.arange(shape[2])[:, None] + torch.arange(shape[3])) % 2 == 0 if masked else None
        mask = None if mask is None else mask[None]
        options = {"scale": scale, "layout": layout, "mask": mask, "save_for_backward": saved, "shift_first": True}
        options |= {"alpha": 0.7} if scale == "tanh" else {}
        options["transform"] = "last" if last else "first"
        leaves = x.requires_grad_(), params.requires_grad_()
        weights = torch.randn_like(x), torch.randn(len(x), dtype=x.dtype)
        for inverse in (False, True):
            found = affine_coupling(x, params, inverse=inverse, **options)
            expected = shifted_first(x, params, scale, layout, mask, options.get("alpha"), last, inverse)
            torch.testing.assert_close(found, expected)
            for f, e in zip(
                torch.autograd.grad(found, leaves, weights), torch.autograd.grad(expected, leaves, weights)
            ):
                torch.testing.assert_close(f, e)
        back, minus = affine_coupling(found[0], params, **options)
        torch.testing.assert_close((back, minus), (x, -found[1]))


def test_the_shift_first_in_float32_and_without_the_option():
    x, params = problem("sigmoid", (4, 6, 16, 16), 3, torch.float32)
    other = affine_coupling(x, params, scale="sigmoid")[0]
    y, logdet = affine_coupling(x, params, scale="sigmoid", shift_first=True)
    expected = affine_coupling(x.double(), params.double(), scale="sigmoid", shift_first=True)
    torch.testing.assert_close(y.double(), expected[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(logdet.double(), expected[1], rtol=2e-6, atol=2e-5)
    assert float((other - y).abs().max()) > 0.1
    half = affine_coupling(x.bfloat16(), params.bfloat16(), scale="sigmoid", shift_first=True)[0]
    assert float((half.float() - y).norm() / y.norm()) < 1e-2


def test_the_slope_of_tanh_in_its_tail():
    r = torch.linspace(-12, 12, 97)[:, None]
    params = torch.cat((r, torch.zeros_like(r)), 1).requires_grad_()
    y, _ = affine_coupling(torch.ones(97, 1), params, scale="tanh")
    (grad,) = torch.autograd.grad(y.sum(), params)
    exact = 1 / torch.cosh(r.double()) ** 2 * torch.tanh(r.double()).exp()
    assert float((grad[:, :1] / exact - 1).abs().max()) < 5e-6
