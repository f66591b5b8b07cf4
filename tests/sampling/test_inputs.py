"""Other people's networks as they take an image and conditions: floats, one-hot, any names, any type, any mode."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import models
from genfast import nn as gnn
from genfast._modes import evaluating
from genfast.sampling import (
    CausalityError,
    LoweringError,
    Sampler,
    assert_causal,
    inputs,
    receptive_field,
    sample_equivalence,
)

LEVELS = 8
SHAPE = (1, 5, 6)


def stack(colours=1, out=None, inputs=None, **options):
    """A causal stack that takes floats."""
    options = {"data_channels": colours, **options}
    wide = 8 * colours
    return nn.Sequential(
        gnn.MaskedConv2d(inputs or colours, wide, 3, mask_type="A", **options),
        nn.ReLU(),
        gnn.MaskedConv2d(wide, LEVELS * colours if out is None else out, 1, **options),
    )


def loud(net):
    """With weights by which the image decides on the logits."""
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4)
    return net.eval()


class OneHot(nn.Module):
    def forward(self, x):
        return F.one_hot(x[:, 0], LEVELS).movedim(-1, 1).float()


class Before(nn.Module):
    """A function before a stack."""

    def __init__(self, function, net=None):
        super().__init__()
        self.function, self.net = function, net or stack()

    def forward(self, x):
        return self.net(self.function(x))


@torch.no_grad()
def users_loop(call, n, shape, uniforms, order="interleaved"):
    """The loop of a user, who feeds and reads the network as it was trained."""
    x = torch.zeros(n, *shape, dtype=torch.int64)
    for i in range(shape[1]):
        for j in range(shape[2]):
            for k in range(shape[0]):
                logits = call(x)[:, :, i, j]
                size = (LEVELS, shape[0]) if order == "interleaved" else (shape[0], LEVELS)
                logits = logits.unflatten(1, size).select(2 if order == "interleaved" else 1, k)
                sums = logits.double().softmax(1).cumsum(1)
                x[:, k, i, j] = (sums <= uniforms[:, k, i, j, None]).sum(1).clamp(max=LEVELS - 1)
    return x


def agrees(x, expected):
    """All but a pixel that lies on the border between two levels, and what hangs on it."""
    return (x == expected).flatten(1).all(1).float().mean() > 0.7


SCALES = {
    "unit": ("unit", lambda x: x / (LEVELS - 1)),
    "signed": ("signed", lambda x: 2 * x / (LEVELS - 1) - 1),
    "function": (lambda x: torch.sqrt(x.float()), lambda x: torch.sqrt(x.float())),
}


# ---- how whole numbers enter ----


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("colours", [1, 3])
def test_a_network_of_floats_draws_what_its_users_loop_draws(scale, colours):
    how, feed = SCALES[scale]
    net, shape = loud(stack(colours)), (colours, 5, 6)
    s, uniforms = Sampler(net, levels=LEVELS, input=how), torch.rand(6, colours, 5, 6)
    expected = users_loop(lambda x: net(feed(x)), 6, shape, uniforms)
    for method in ("cached", "naive"):
        assert agrees(s.sample(6, shape, uniforms=uniforms, method=method), expected)
    report = sample_equivalence(net, shape, levels=LEVELS, input=how)
    assert report.error < 1e-5
    assert_causal(net, (colours, 3, 3), levels=LEVELS, input=how)
    unscaled = Sampler(Before(lambda x: x.float(), net), levels=LEVELS)
    assert not agrees(unscaled.sample(6, shape, uniforms=uniforms), expected)


CHECKS = {
    "sample": lambda net: Sampler(net, levels=LEVELS).sample(1, SHAPE),
    "naive": lambda net: Sampler(net, levels=LEVELS).sample(1, SHAPE, method="naive"),
    "prepare": lambda net: Sampler(net, levels=LEVELS).prepare(SHAPE),
    "assert_causal": lambda net: assert_causal(net, SHAPE, levels=LEVELS),
    "receptive_field": lambda net: receptive_field(net, SHAPE, levels=LEVELS),
    "sample_equivalence": lambda net: sample_equivalence(net, SHAPE, levels=LEVELS),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_network_of_floats_needs_a_scale(check):
    with pytest.raises(ValueError, match=r"Sequential takes floats; say by input= .*'unit' \(x / 7\), 'signed'"):
        check(stack())


@pytest.mark.parametrize(
    ("function", "whole"),
    [
        (torch.Tensor.float, True), (lambda x: x.to(torch.float32) * 2, True), (gnn.ScaleLevels(LEVELS), True),
        (lambda x: x / 7, True), (lambda x: 2.0 * x / 7 - 1, True), (lambda x: (x - 3.5) / 3.5, True),
        (lambda x: (x / 7 - 0.13) / 0.31, True), (lambda x: (x > 3).float(), True),
        (lambda x: torch.linspace(-1, 1, 8)[x], True),
        (lambda x: x, False), (lambda x: x - 0.5, False), (lambda x: 2.0 * x - 1, False), (lambda x: (x - 0.5) / 0.5,
        False),
        (lambda x: 2 * x - 1, False), (lambda x: x[:, :1], False), (lambda x: (x - 0.5).to(torch.float32), False),
    ],
)  # fmt: skip
def test_whether_a_network_takes_whole_numbers_is_found_out(function, whole):
    net = Before(function)
    if whole:
        assert_causal(net, (1, 3, 3), levels=LEVELS)
        Sampler(net, levels=LEVELS).sample(1, (1, 3, 3), method="naive")
    else:
        with pytest.raises(ValueError, match="Before takes floats"):
            Sampler(net, levels=LEVELS).sample(1, (1, 3, 3), method="naive")


def test_one_hot_inputs():
    net = loud(nn.Sequential(OneHot(), stack(inputs=LEVELS)))
    assert_causal(net, SHAPE, levels=LEVELS)
    assert receptive_field(net, SHAPE, levels=LEVELS).seen.sum() == 4
    with pytest.raises(CausalityError, match="depends on colour 0"):
        assert_causal(nn.Sequential(OneHot(), gnn.MaskedConv2d(LEVELS, LEVELS, 3)), SHAPE, levels=LEVELS)
    # As a function before a network of floats, the cached engine looks it up.
    floats, one_hot = net[1], OneHot()
    s, uniforms = Sampler(floats, levels=LEVELS, input=one_hot), torch.rand(4, *SHAPE)
    expected = Sampler(net, levels=LEVELS).sample(4, SHAPE, uniforms=uniforms, method="naive")
    assert agrees(s.sample(4, SHAPE, uniforms=uniforms, method="cached"), expected)


def test_a_function_of_more_than_a_pixel_has_no_program():
    s = Sampler(loud(stack()), levels=LEVELS, input=lambda x: x.float().cumsum(3) / 20)
    with pytest.raises(LoweringError, match="not of each pixel alone.*method='naive'"):
        s.sample(1, SHAPE, method="cached")
    assert s.sample(1, SHAPE, method="naive").shape == (1, *SHAPE)


@pytest.mark.parametrize("method", ["auto", "cached", "naive"])
def test_images_that_the_network_does_not_take(method):
    s = Sampler(stack(), levels=LEVELS, input="unit")
    with pytest.raises(ValueError, match=r"Sequential takes no images of \(3, 4, 4\): .*expected 3 input channels"):
        s.sample(1, (3, 4, 4), method=method)
    with pytest.raises((ValueError, LoweringError), match=r"levels \* colours = 5"):
        Sampler(stack(), levels=5, input="unit").sample(1, (1, 4, 4), method=method)


def test_uniform_numbers_outside_their_range():
    for value in (float("nan"), 1.0, -0.1):
        with pytest.raises(ValueError, match=r"uniforms hold values outside \[0, 1\)"):
            Sampler(stack(), levels=LEVELS, input="unit").sample(1, SHAPE, uniforms=torch.full((1, *SHAPE), value))
    almost = torch.full((1, *SHAPE), 1 - 1e-12, dtype=torch.float64)
    assert Sampler(stack(), levels=LEVELS, input="unit").sample(1, SHAPE, uniforms=almost).shape == (1, *SHAPE)


def test_bad_settings():
    with pytest.raises(
        ValueError, match="input='byte', expected one of 'integers', 'unit', 'signed', a function or None"
    ):
        Sampler(stack(), input="byte")
    with pytest.raises(ValueError, match="group_order='rgb'"):
        Sampler(stack(), group_order="rgb")
    with pytest.raises(TypeError, match="network is a int"):
        Sampler(3)
    with pytest.raises(TypeError, match=r"takes no images of .*torch.int64, expected a floating-point dtype"):
        Sampler(stack(), levels=LEVELS, input="integers").sample(1, SHAPE)


class Noisy(nn.Module):
    """Draws random numbers and counts its calls."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(gnn.ScaleLevels(LEVELS), stack(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.net(x) + 0 * torch.rand(())


def test_asking_a_network_leaves_no_trace():
    net = Noisy()
    s, shape = Sampler(net, levels=LEVELS), (3, 3, 4)
    state = torch.get_rng_state()
    with pytest.raises(LoweringError):
        s.prepare(shape)
    s._order("sample", shape, inputs.Conditions())
    assert torch.equal(torch.get_rng_state(), state)
    assert net.calls == 0


# ---- conditions ----


class Conditional(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.first = gnn.ScaleLevels(LEVELS), gnn.MaskedConv2d(1, 8, 3, mask_type="A")
        self.embed, self.out = nn.Embedding(10, 8), gnn.MaskedConv2d(8, LEVELS, 1)

    def given(self, x, label, shift=None):
        h = self.first(self.scale(x)) + self.embed(label)[:, :, None, None]
        return self.out(torch.relu(h if shift is None else h + shift[:, None, None, None]))


class ByName(Conditional):
    def forward(self, x, label):
        return self.given(x, label)


class Starred(Conditional):
    def forward(self, x, *conditions):
        return self.given(x, *conditions)


class KeywordOnly(Conditional):
    def forward(self, x, *, label, scale=1.0):
        return self.given(x, label) * scale


class Two(Conditional):
    def forward(self, x, label, shift=None):
        return self.given(x, label, shift)


class Optional(Conditional):
    def forward(self, x, temperature=1.0, y=None):
        return self.given(x, torch.zeros(len(x), dtype=torch.long) if y is None else y) / temperature


class Keywords(Conditional):
    def forward(self, x, **given):
        return self.given(x, given["label"])


LABEL, SHIFT = torch.tensor([1, 7]), torch.tensor([[0.5], [-2.0]])


@pytest.mark.parametrize(
    ("kind", "context", "args", "kwargs"),
    [
        (ByName, LABEL, (LABEL,), {}),
        (ByName, {"label": LABEL}, (LABEL,), {}),
        (ByName, [LABEL], (LABEL,), {}),
        (Starred, LABEL, (LABEL,), {}),
        (Starred, (LABEL, SHIFT[:, 0]), (LABEL, SHIFT[:, 0]), {}),
        (KeywordOnly, LABEL, (), {"label": LABEL}),
        (KeywordOnly, {"label": LABEL, "scale": 2.0}, (), {"label": LABEL, "scale": 2.0}),
        (Two, LABEL, (LABEL,), {}),
        (Two, (LABEL, SHIFT[:, 0]), (LABEL, SHIFT[:, 0]), {}),
        (Two, {"shift": SHIFT[:, 0], "label": LABEL}, (LABEL, SHIFT[:, 0]), {}),
        (Optional, LABEL, (), {"y": LABEL}),
        (Optional, None, (), {}),
        (Keywords, {"label": LABEL}, (), {"label": LABEL}),
    ],
)
def test_conditions_of_any_name(kind, context, args, kwargs):
    net, uniforms = loud(kind()), torch.rand(2, *SHAPE)
    expected = users_loop(lambda x: net(x, *args, **kwargs), 2, SHAPE, uniforms)
    for wrapped in (net, nn.DataParallel(net)):
        s = Sampler(wrapped, levels=LEVELS)
        assert torch.equal(s.sample(2, SHAPE, uniforms=uniforms, context=context, method="naive"), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(s.sample(2, SHAPE, uniforms=uniforms, context=context), expected)
    one = context
    if context is not None:
        one = (
            {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in context.items()}
            if isinstance(context, dict)
            else (context[:1] if isinstance(context, torch.Tensor) else [c[:1] for c in context])
        )
    assert_causal(net, (1, 3, 3), levels=LEVELS, context=one)


@pytest.mark.parametrize(("kind", "context"), [(ByName, LABEL), (KeywordOnly, {"label": LABEL}), (Starred, LABEL)])
def test_a_condition_that_is_added_as_a_map_has_a_program(kind, context):
    report = sample_equivalence(loud(kind()), SHAPE, levels=LEVELS, context=context)
    assert report.passed, report


class Positions(Conditional):
    """A learned map and a learned vector, which no condition changes."""

    def __init__(self):
        super().__init__()
        self.map, self.vector = nn.Parameter(torch.randn(1, 8, 5, 6)), nn.Parameter(torch.randn(8, 1, 1))

    def forward(self, x):
        return self.out(torch.relu(self.first(self.scale(x)) + self.map + self.vector))


class Maps(Conditional):
    """A condition of the image's size through a convolution that sees all of it."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8))

    def forward(self, x, image):
        return self.out(torch.relu(self.first(self.scale(x)) + self.encoder(image)))


def test_maps_of_parameters_and_of_conditions_have_a_program():
    assert sample_equivalence(loud(Positions()), SHAPE, levels=LEVELS).passed
    net, image = Maps(), torch.randn(2, 2, 5, 6)
    net.train()
    assert sample_equivalence(net, SHAPE, levels=LEVELS, context=image).passed
    assert net.encoder[1].num_batches_tracked == 0  # in evaluation mode, whatever mode it was in
    with pytest.raises(ValueError, match=r"Maps takes no images of \(1, 5, 6\) with this context: .*must match"):
        Sampler(net, levels=LEVELS).sample(2, SHAPE, context=image[:, :, :4])


@pytest.mark.parametrize(
    ("kind", "context", "message"),
    [
        (models.PixelCNN, LABEL, "PixelCNN: context is given"),
        (models.PixelRNN, LABEL, "PixelRNN: context is given"),
        (ByName, None, "the network needs 'label', which context does not give"),
        (ByName, {"lable": LABEL}, "context has 'lable', the network takes 'label'"),
        (ByName, LABEL[:1], "context 'label' has 1 rows, expected n=2"),
        (Two, (LABEL, SHIFT, SHIFT), "context has 3 conditions, the network takes 2: 'label', 'shift'"),
        (Two, {"shift": SHIFT}, "the network needs 'label'"),
        (Keywords, LABEL, "takes conditions by name alone"),
        (lambda: Before(gnn.ScaleLevels(LEVELS)), LABEL, "context was given, but the network takes none"),
    ],
)
def test_conditions_that_do_not_fit_are_named(kind, context, message):
    with pytest.raises(ValueError, match=message):
        Sampler(kind(), levels=LEVELS).sample(2, SHAPE, context=context)


def test_functions_and_compiled_networks():
    net, uniforms = loud(ByName()), torch.rand(2, *SHAPE)
    expected = users_loop(lambda x: net(x, LABEL), 2, SHAPE, uniforms)
    for function, context in (
        (functools.partial(net, label=LABEL), None),
        (lambda x: net(x, LABEL), None),
        (lambda x, label: net(x, label), LABEL),
        (net.forward, LABEL),
        (torch.compile(net, backend="eager"), LABEL),
        (torch.compile(net, backend="eager"), {"label": LABEL}),
    ):
        drawn = Sampler(function, levels=LEVELS).sample(2, SHAPE, uniforms=uniforms, context=context, method="naive")
        assert torch.equal(drawn, expected)
    compiled = Sampler(torch.compile(net, backend="eager"), levels=LEVELS)
    assert torch.equal(compiled.sample(2, SHAPE, uniforms=uniforms, context=LABEL, method="cached"), expected)
    assert not net.training
    with pytest.raises(LoweringError, match="a function has no pixel program"):
        Sampler(lambda x: net(x, LABEL), levels=LEVELS).sample(2, SHAPE, method="cached")


def test_the_loop_runs_with_one_warning_where_there_is_no_program():
    model = models.PixelRNN(1, 8, 1, levels=4)
    with pytest.warns(UserWarning, match="the standard loop runs.*RowLSTM has no pixel program"):
        model.sample(1, (1, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample(1, (1, 3, 3))
        model.sample(1, (1, 3, 3), method="naive")
    with pytest.raises(LoweringError, match="RowLSTM has no pixel program"):
        model.sample(1, (1, 3, 3), method="cached")


# ---- what is drawn from ----


def faulty(value, colours=1, everywhere=True):
    net = loud(nn.Sequential(gnn.ScaleLevels(LEVELS), *stack(colours)))
    with torch.no_grad():
        net[3].bias[slice(1 * colours, None) if everywhere is None else slice(1 * colours, 1 * colours + 1)] = value
    return net


@pytest.mark.parametrize("method", ["cached", "naive"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_located(method, value):
    s = Sampler(faulty(value, 3), levels=LEVELS)
    prefix = torch.zeros(1, 3, 2, 6, dtype=torch.long)
    with pytest.raises(FloatingPointError, match=r"logits of image 0, colour 0 at position \(2, 0\) are not finite"):
        s.sample(3, (3, 5, 6), method=method, prefix=prefix)
    assert torch.equal(s.sample(3, (3, 2, 6), method=method, prefix=prefix), prefix.expand(3, -1, -1, -1))


@pytest.mark.parametrize("method", ["cached", "naive"])
def test_where_a_fault_begins(method):
    """A weight that is not finite shows in one image and pixel, where a colour has been drawn that it reads."""
    net = faulty(0.0)
    with torch.no_grad():
        net[0].levels = LEVELS
    table = torch.linspace(-1, 1, LEVELS)
    table[-1] = float("nan")
    s = Sampler(net[1:], levels=LEVELS, input=lambda x: table[x][:, :] if x.dim() > 1 else table[x])
    prefix = torch.zeros(3, 1, 3, 6, dtype=torch.long)
    prefix[1, 0, 2, 4] = LEVELS - 1
    with pytest.raises(FloatingPointError, match=r"image 1, colour 0 at position \(3, 3\)"):
        s.sample(3, SHAPE, method=method, prefix=prefix, uniforms=torch.zeros(3, *SHAPE))


@pytest.mark.parametrize("method", ["cached", "naive"])
def test_forbidden_levels(method):
    net = faulty(float("-inf"))
    s = Sampler(net, levels=LEVELS)
    assert 1 not in s.sample(20, SHAPE, method=method).unique()
    with torch.no_grad():
        net[3].bias[:2] = float("-inf")  # a uniform number of zero falls on the first level that may be drawn
    drawn = s.sample(2, SHAPE, method=method, uniforms=torch.zeros(2, *SHAPE))
    assert int(drawn.min()) >= 2
    with torch.no_grad():
        net[3].bias.fill_(float("-inf"))
    with pytest.raises(FloatingPointError, match=r"image 0, colour 0 at position \(0, 0\)"):
        s.sample(2, SHAPE, method=method)


@pytest.mark.parametrize("method", ["cached", "naive"])
@pytest.mark.parametrize("place", [0, 5, 12, 21])  # a logit, a mean, a log-scale, a coefficient
def test_mixtures_that_are_not_finite_are_located(method, place):
    model = models.PixelCNNPlusPlus(3, 4, 1, 3, 16)
    with torch.no_grad():
        model.out.bias[place] = float("nan")
    with pytest.raises(FloatingPointError, match=r"mixture parameters of image 0 at position \(0, 0\) are not finite"):
        model.sample(2, (3, 4, 4), method=method)


@pytest.mark.parametrize("hidden", [nn.ReLU(), None], ids=["relu", "fused"])
def test_a_relu_does_not_hide_what_is_not_a_number(hidden):
    net = nn.Sequential(
        gnn.ScaleLevels(4),
        gnn.MaskedConv2d(1, 8, 3, mask_type="A", activation=None if hidden else "relu"),
        hidden or nn.Identity(),
        nn.Conv2d(8, 4, 1),
    )
    with torch.no_grad():
        net[1].bias[0] = float("nan")
    for method in ("cached", "naive"):
        with pytest.raises(FloatingPointError, match="position"):
            Sampler(net, levels=4).sample(1, SHAPE, method=method)


def test_a_weight_that_is_not_a_number_is_found_where_pixels_are_drawn():
    model = models.PixelCNN(1, 4, 2, 3, 4)
    with torch.no_grad():
        model.first.weight[0, 0, 0, 0] = float("nan")  # a tap that lies outside the image in the first row and column
    for method in ("cached", "naive"):
        with pytest.raises(FloatingPointError, match="logits of image 0, colour 0 at position"):
            model.sample(1, (1, 3, 4), method=method)


# ---- the order of colours ----


class Foreign(nn.Module):
    """Colours in blocks through a masked convolution of the user's own, which says nothing of their order."""

    def __init__(self):
        super().__init__()
        self.inner = stack(3, group_order="blocked")

    def forward(self, x):
        x = x.float() / (LEVELS - 1)
        for layer in self.inner:
            x = (
                F.conv2d(x, layer.weight * layer.mask, layer.bias, padding=layer.padding)
                if hasattr(layer, "mask")
                else layer(x)
            )
        return x


@pytest.mark.parametrize("order", ["interleaved", "blocked"])
def test_both_samplers_read_logits_in_the_networks_order(order):
    shape, uniforms = (3, 4, 5), torch.rand(4, 3, 4, 5)
    net = loud(nn.Sequential(gnn.ScaleLevels(LEVELS), stack(3, group_order=order)))
    expected = users_loop(net, 4, shape, uniforms, order)
    for method in ("cached", "naive"):
        assert agrees(Sampler(net, levels=LEVELS).sample(4, shape, uniforms=uniforms, method=method), expected)
    x = torch.randint(LEVELS, (2, *shape))
    torch.testing.assert_close(Sampler(net, levels=LEVELS).teacher_forced(x), net(x), rtol=1e-4, atol=1e-4)
    other = "interleaved" if order == "blocked" else "blocked"
    with pytest.raises(LoweringError, match=f"group_order='{order}', expected '{other}'"):
        Sampler(net, levels=LEVELS, group_order=other).sample(1, shape, method="cached")


def test_the_order_of_a_users_own_convolutions_is_found_out():
    net, shape, uniforms = loud(Foreign()), (3, 4, 5), torch.rand(4, 3, 4, 5)
    drawn = Sampler(net, levels=LEVELS).sample(4, shape, uniforms=uniforms, method="naive")
    assert agrees(drawn, users_loop(net, 4, shape, uniforms, "blocked"))
    mixed = nn.Sequential(gnn.ScaleLevels(LEVELS), gnn.MaskedConv2d(3, 3 * LEVELS, 1, data_channels=1))
    with pytest.raises(LoweringError, match="see their own or a later colour"):
        Sampler(loud(mixed), levels=LEVELS).sample(1, shape, method="naive")


# ---- modes and types ----


@pytest.mark.parametrize("method", ["cached", "naive"])
def test_every_module_keeps_its_own_mode(method):
    net = nn.Sequential(gnn.ScaleLevels(LEVELS), *stack(), nn.BatchNorm2d(LEVELS), nn.Dropout(0.5))
    net.train()
    net[4].eval()
    before = [m.training for m in net.modules()]
    s = Sampler(net, levels=LEVELS)
    s.sample(1, SHAPE, method=method)
    s.teacher_forced(torch.zeros(1, *SHAPE, dtype=torch.long))
    assert_causal(net, (1, 3, 3), levels=LEVELS)
    receptive_field(net, SHAPE, levels=LEVELS)
    sample_equivalence(net, SHAPE, levels=LEVELS)
    with pytest.raises(ValueError, match="takes no images"):
        s.sample(1, (2, 4, 4), method=method)
    assert [m.training for m in net.modules()] == before


WIDE = [models.PixelCNN, models.GatedPixelCNN, models.WaveNet, models.PixelCNNPlusPlus, models.PixelRNN]
OTHER_TYPES = [*((k, torch.float64) for k in WIDE), *((k, torch.bfloat16) for k in WIDE[:3]), (WIDE[0], torch.float16)]


@pytest.mark.parametrize(("kind", "dtype"), OTHER_TYPES)
def test_networks_of_other_types_are_sampled_in_their_type(kind, dtype):
    levels = (
        {"levels": 4}
        if kind is not models.PixelCNNPlusPlus
        else {"levels": 4, "filters": 4, "blocks": 1, "mixtures": 1}
    )
    small = {
        models.WaveNet: {"residual": 8, "skip": 8, "layers": 2, "stacks": 1},
        models.PixelCNNPlusPlus: {"in_channels": 1},
    }
    model = kind(**levels, **small.get(kind, {"channels": 8, "layers": 2})).to(dtype)
    shape = (1, 6) if kind is models.WaveNet else (1, 4, 4)
    assert model(torch.zeros(1, *shape, dtype=torch.long)).dtype is dtype
    uniforms = torch.rand(1, model.uniforms_per_pixel(), *shape[1:])
    with pytest.warns(UserWarning, match=f"its parameters are {dtype}|RowLSTM"):
        drawn = model.sample(1, shape, uniforms=uniforms)
    assert torch.equal(drawn, model.sample(1, shape, uniforms=uniforms, method="naive"))
    with pytest.raises(LoweringError, match=f"its parameters are {dtype}, and the engine computes in float32"):
        model.sampler.prepare(shape)


def test_a_default_type_of_float64():
    net = loud(nn.Sequential(gnn.ScaleLevels(LEVELS), *stack()))
    uniforms = torch.rand(4, *SHAPE)
    expected = Sampler(net, levels=LEVELS).sample(4, SHAPE, uniforms=uniforms)
    torch.set_default_dtype(torch.float64)
    try:
        for method in ("cached", "naive"):
            assert torch.equal(Sampler(net, levels=LEVELS).sample(4, SHAPE, uniforms=uniforms, method=method), expected)
        assert sample_equivalence(net, SHAPE, levels=LEVELS).passed
        embedded = nn.Sequential(gnn.LevelEmbedding(LEVELS, 7).float(), stack(inputs=7).float())
        assert sample_equivalence(embedded, SHAPE, levels=LEVELS).passed
        wide = models.PixelCNN(in_channels=1, levels=4, channels=16, layers=2)
        with pytest.warns(UserWarning, match="its parameters are torch.float64"):
            assert wide.sample(1, (1, 4, 4)).shape == (1, 1, 4, 4)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_built_in_inference_mode_samples():
    with torch.inference_mode():
        model = models.PixelCNN(in_channels=1, levels=4, channels=16, layers=2).eval()
        uniforms = torch.rand(2, 1, 4, 4)
        drawn = model.sample(2, (1, 4, 4), uniforms=uniforms)
    assert torch.equal(drawn, model.sample(2, (1, 4, 4), uniforms=uniforms))
    assert torch.equal(drawn, model.sample(2, (1, 4, 4), uniforms=uniforms, method="naive"))


def test_used_samplers_can_be_copied_and_pickled():
    s, uniforms = Sampler(nn.Sequential(gnn.ScaleLevels(LEVELS), *stack()), levels=LEVELS), torch.rand(3, *SHAPE)
    expected = s.sample(3, SHAPE, uniforms=uniforms)
    for other in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert torch.equal(other.sample(3, SHAPE, uniforms=uniforms), expected)


class Merging(nn.Linear):
    """Its weight is another one in evaluation mode, as that of LoRA layers is, which ``train`` sees to."""

    merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data.add_(-1 if mode else 1)
            self.merged = not mode
        return self


def test_modes_come_back_by_the_modules_own_train():
    net = nn.Sequential(Merging(2, 2), nn.BatchNorm1d(2).eval(), nn.Sequential(Merging(2, 2).eval(), nn.Dropout()))
    modes, weights = [m.training for m in net.modules()], [p.clone() for p in net.parameters()]

    def interrupted():
        with evaluating(net, None):
            assert not any(m.training for m in net.modules())
            assert net[0].merged
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert [m.training for m in net.modules()] == modes
    for p, before in zip(net.parameters(), weights):
        torch.testing.assert_close(p, before)
