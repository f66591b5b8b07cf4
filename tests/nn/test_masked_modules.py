"""Masked convolutions as modules, weight normalisation, the gated layer, shifted convolutions and small causal layers."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import nn as gnn
from genfast import ops
from genfast.reference import causal
from genfast.sampling import receptive_field

CONV = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}
MASKED = {1: gnn.MaskedConv1d, 2: gnn.MaskedConv2d, 3: gnn.MaskedConv3d}
ORDERS = ["interleaved", "blocked"]
NAN = math.nan


def colours(channels, data_channels, order):
    return [c % data_channels if order == "interleaved" else c // (channels // data_channels) for c in range(channels)]


def seen(function, shape):
    """Which inputs (C, H, W) each output (O, H, W) depends on, bool (O, H, W, C, H, W)."""
    x = torch.randn(1, *shape, dtype=torch.float64)
    return torch.autograd.functional.jacobian(lambda t: function(t)[0], x)[:, :, :, 0] != 0


# Masked convolutions.


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 3])
def test_loads_a_plain_convolution(dims, mask_type, groups):
    plain = CONV[dims][0](6, 9, 3, padding=2, dilation=2, groups=groups)
    layer = MASKED[dims](6, 9, 3, padding=2, dilation=2, groups=groups, mask_type=mask_type, data_channels=3)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert list(layer.state_dict()) == ["weight", "bias"]
    x = torch.randn(2, 6, *(5,) * dims)
    expected = CONV[dims][1](x, plain.weight * layer.mask, plain.bias, padding=2, dilation=2, groups=groups)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.weight, plain.weight)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_plain_convolution_loads_it(dims):
    layer, plain = MASKED[dims](4, 5, 3, mask_type="A", bias=False), CONV[dims][0](4, 5, 3, padding=1, bias=False)
    assert list(layer.state_dict()) == ["weight"]
    plain.load_state_dict(layer.state_dict(), strict=True)
    x = torch.randn(2, 4, *(5,) * dims)
    torch.testing.assert_close(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def test_default_initialisation_is_that_of_the_plain_convolution():
    torch.manual_seed(3)
    layer = gnn.MaskedConv2d(4, 6, 3, data_channels=2)
    torch.manual_seed(3)
    plain = nn.Conv2d(4, 6, 3)
    assert torch.equal(layer.weight, plain.weight * layer.mask)
    assert torch.equal(layer.bias, plain.bias)


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ],
    ids=["Adam", "AdamW", "SGD"],
)
def test_the_state_dict_stays_clean_in_training(optimiser):
    layer = gnn.MaskedConv2d(3, 6, 5, mask_type="A", data_channels=3)
    mask, before = layer.mask, layer.weight.detach().clone()
    assert not layer.state_dict()["weight"][~mask].any()
    steps = optimiser(layer.parameters())
    for _ in range(4):
        steps.zero_grad()
        layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
        steps.step()
    assert not layer.state_dict()["weight"][~mask].any()
    assert bool((layer.weight != before)[mask].all())


def test_every_padding_that_is_taken_is_the_same():
    x = torch.randn(2, 4, 7, 8)
    for dilation, numbers in ((1, (1, (1, 1))), (2, (2, [2, 2])), ((1, 2), ((1, 2),))):
        made = [gnn.MaskedConv2d(4, 5, 3, padding=p, dilation=dilation) for p in ("causal", "same", *numbers)]
        for layer in made:
            layer.load_state_dict(made[0].state_dict())
            assert layer.stride == (1, 1)
            assert torch.equal(layer(x), made[0](x))
    layer = gnn.MaskedConv2d(4, 5, (2, 4))
    assert layer(x).shape == (2, 5, 7, 8)
    assert layer.center == (1, 2)


def test_every_tap_may_be_causal():
    layer = gnn.MaskedConv1d(3, 4, 3, dilation=2, center=2)
    assert bool(layer.mask.all())
    x = torch.randn(2, 3, 11)
    expected = F.conv1d(F.pad(x, (4, 0)), layer.weight, layer.bias, dilation=2)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 4, (2, 3)), {"padding": "same"}, r"padding='same' with an even kernel_size=\(2, 3\) has no centre"),
        ((4, 4, 4), {"padding": 2}, r"padding=2, expected 'causal', 'same' or \(2, 2\) with an odd kernel"),
        ((4, 4, 3), {"padding": 0}, r"padding=0, expected 'causal', 'same' or \(1, 1\)"),
        ((4, 4, 3), {"padding": 1, "dilation": 2}, r"padding=1, expected 'causal', 'same' or \(2, 2\)"),
        ((4, 4, 3), {"padding": (1, 1, 1)}, r"padding=\(1, 1, 1\), expected one number or 2"),
        ((4, 4, 3), {"padding": "valid"}, "padding='valid', expected 'causal', 'same'"),
        ((4, 4, 3), {"stride": 2}, "stride=2, expected 1"),
        ((4, 4, 3, (1, 2)), {}, r"stride=\(1, 2\), expected 1"),
        ((4, 4, 3), {"padding_mode": "circular"}, "padding_mode='circular', expected 'zeros'"),
        ((4, 4, 3), {"mask_type": "C"}, "mask_type='C', expected 'A' or 'B'"),
        ((4, 4, 3), {"group_order": "rgb"}, "group_order='rgb', expected 'interleaved' or 'blocked'"),
        ((4, 4, 3), {"activation": "tanh"}, "activation='tanh', expected None or 'relu'"),
        ((4, 6, 3), {"data_channels": 3}, "in_channels=4 is not a multiple of data_channels=3"),
        ((6, 4, 3), {"data_channels": 3}, "out_channels=4 is not a multiple of data_channels=3"),
        ((4, 4, 3), {"data_channels": 0}, "in_channels=4 is not a multiple of data_channels=0"),
        ((4, 4, 3), {"center": 3}, r"center=3, expected a position inside kernel_size=\(3, 3\)"),
        ((4, 4, 3), {"center": (0, -1)}, r"center=\(0, -1\), expected a position"),
        ((4, 4, 3), {"center": (1,)}, r"center=\(1,\), expected one number or 2"),
        ((4, 4, (3,)), {}, r"kernel_size=\(3,\), expected one number or 2"),
        ((4, 4, 0), {}, r"kernel_size=\(0, 0\), expected at least 1"),
        ((4, 4, 3), {"dilation": 0}, r"dilation=\(0, 0\), expected at least 1"),
        ((4, 4, 3), {"dilation": (1, 1, 1)}, r"dilation=\(1, 1, 1\), expected one number or 2"),
    ],
)  # fmt: skip
def test_errors_of_a_masked_convolution(arguments, options, message):
    with pytest.raises(ValueError, match=f"MaskedConv2d: {message}"):
        gnn.MaskedConv2d(*arguments, **options)


def test_shapes_that_do_not_fit_the_layer():
    layer = gnn.MaskedConv2d(4, 4, 3)
    with pytest.raises(ValueError, match=r"masked_conv2d: x has shape \(4, 5, 5\), expected 4 axes"):
        layer(torch.zeros(4, 5, 5))
    with pytest.raises(ValueError, match=r"weight has shape \(4, 4, 3, 3\), expected 5 input channels"):
        layer(torch.zeros(1, 5, 5, 5))


def test_what_a_masked_convolution_says_of_itself():
    assert repr(gnn.MaskedConv2d(4, 4, 3, mask_type="A")) == (
        "MaskedConv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), mask_type='A')"
    )
    text = repr(gnn.MaskedConv1d(3, 6, 3, data_channels=3, group_order="blocked", center=2, activation="relu"))
    assert text.endswith("mask_type='B', data_channels=3, group_order='blocked', center=(2,), activation='relu')")


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(again):
    x = torch.randn(2, 6, 5, 5)
    masked = gnn.MaskedConv2d(6, 9, (2, 3), mask_type="A", data_channels=3, group_order="blocked", activation="relu")
    gated = gnn.GatedMaskedConv2d(6, 6, data_channels=3, context_channels=2)
    for layer, arguments in ((masked, (x,)), (gated, (x, x, torch.randn(2, 2)))):
        other = again(layer)
        assert repr(other) == repr(layer)
        assert all(torch.equal(a, b) and a is not b for a, b in zip(other.parameters(), layer.parameters()))
        found, expected = (
            [t for t in (m(*arguments),) for t in (t if isinstance(t, tuple) else (t,))] for m in (other, layer)
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_dtype_and_device_arguments():
    layer = gnn.MaskedConv2d(2, 3, 3, dtype=torch.float64)
    assert layer(torch.zeros(1, 2, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert gnn.MaskedConv2d(2, 3, 3, device="meta").weight.device.type == "meta"


# Weight normalisation.


def test_weight_norm_equals_that_of_torch_where_nothing_is_masked():
    ours, theirs = gnn.MaskedConv1d(3, 5, 2, center=1), nn.Conv1d(3, 5, 2)
    theirs.load_state_dict(ours.state_dict())
    assert gnn.weight_norm(ours) is ours
    torch.nn.utils.parametrizations.weight_norm(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    plain = gnn.weight_norm(copy.deepcopy(torch.nn.utils.parametrize.remove_parametrizations(theirs, "weight")))
    with torch.no_grad():
        for layer in (ours, plain):
            layer.parametrizations.weight.original0.mul_(1.5)
        theirs.weight.mul_(1.5)
    x = torch.randn(2, 3, 9)
    torch.testing.assert_close(ours(x), theirs(F.pad(x, (1, 0))))
    torch.testing.assert_close(plain(x), theirs(x))


def test_gradients_of_weight_norm_equal_those_of_torch():
    ours, theirs = gnn.MaskedConv1d(3, 5, 2, center=1, dtype=torch.float64), nn.Conv1d(3, 5, 2, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    x, results = torch.randn(2, 3, 9, dtype=torch.float64), []
    for layer, wide in ((gnn.weight_norm(ours), x), (torch.nn.utils.parametrizations.weight_norm(theirs), F.pad(x, (1, 0)))):
        results.append(torch.autograd.grad(layer(wide).pow(3).sum(), layer.parameters()))
    for f, e in zip(*results):
        torch.testing.assert_close(f, e)


@pytest.mark.parametrize("poison", [0.0, 1.0, 1e30, 3e38, math.inf, -math.inf, NAN])
def test_masked_values_of_v_do_not_count(poison):
    layer = gnn.weight_norm(gnn.MaskedConv2d(3, 6, 3, mask_type="A", data_channels=3))
    x, mask = torch.randn(2, 3, 5, 5, requires_grad=True), layer.mask
    expected = layer(x)
    names = [n for n, _ in layer.named_parameters()]
    assert names == ["bias", "parametrizations.weight.original0", "parametrizations.weight.original1"]
    leaves = [x, *layer.parameters()]
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    with torch.no_grad():
        layer.parametrizations.weight.original1[~mask] = poison
    found = layer(x)
    assert torch.equal(found, expected)
    for f, e in zip(torch.autograd.grad(found.square().sum(), leaves), wanted):
        assert bool(f.isfinite().all())
        assert torch.equal(f, e)
    assert not wanted[-1][~mask].any()
    norms = torch.where(mask, layer.weight, 0.0).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, layer.parametrizations.weight.original0.flatten())


def test_weight_norm_of_a_channel_without_a_live_tap():
    layer = gnn.weight_norm(gnn.MaskedConv2d(3, 6, 1, mask_type="A", data_channels=3))
    red = torch.arange(6) % 3 == 0
    with torch.no_grad():
        layer.parametrizations.weight.original0.fill_(2.0)
    y = layer(torch.randn(2, 3, 4, 4))
    assert torch.equal(y[:, red], layer.bias[red].view(-1, 1, 1).expand(2, 2, 4, 4))
    y.square().sum().backward()
    for p in layer.parameters():
        assert bool(p.grad.isfinite().all())
    assert not layer.parametrizations.weight.original0.grad[red].any()
    assert bool(layer.parametrizations.weight.original0.grad[~red].all())


def test_weight_norm_can_be_removed_and_copied():
    layer = gnn.weight_norm(gnn.MaskedConv2d(3, 6, 3))
    x = torch.randn(1, 3, 4, 4)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    assert torch.equal(layer(x), y)


# Compilation.


def compiled_equals_eager(module, inputs):
    torch._dynamo.reset()
    results = []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        loss = sum(o.square().sum() for o in out)
        results.append([*out, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
    for f, e in zip(*results):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


def test_compiled_without_a_break():
    x = torch.randn(2, 6, 5, 6)
    compiled_equals_eager(gnn.MaskedConv2d(6, 9, 3, data_channels=3, activation="relu"), [x])
    compiled_equals_eager(gnn.weight_norm(gnn.MaskedConv2d(6, 9, 3, mask_type="A", data_channels=3)), [x])
    compiled_equals_eager(gnn.GatedMaskedConv2d(6, 6, data_channels=3, context_channels=4), [x, x + 1, torch.randn(2, 4)])


# The layer of Gated PixelCNN.


class Stack(nn.Module):
    """Gated layers on an image, the first of type A."""

    def __init__(self, layers, kernel_size=3, **options):
        super().__init__()
        colours = options.get("data_channels", 1)
        width = 2 * colours
        self.scale = gnn.ScaleLevels(256)
        self.layers = nn.ModuleList(
            gnn.GatedMaskedConv2d(width if i else colours, width, kernel_size, mask_type="B" if i else "A", **options)
            for i in range(layers)
        )

    def forward(self, x):
        v = h = self.scale(x)
        skips = 0
        for layer in self.layers:
            v, h, skip = layer(v, h)
            skips = skips + skip
        return h + skips


def test_bug_blind_spot():
    """Every earlier pixel is seen; a plain stack of masked convolutions is blind to the right of the rows above."""
    gated = receptive_field(Stack(4), (1, 7, 7), position=(4, 3))
    assert not bool(gated.blind.any())
    assert gated.seen[0].sum() == 4 * 7 + 3
    plain = nn.Sequential(gnn.ScaleLevels(256), *(gnn.MaskedConv2d(1, 1, 3, mask_type=t) for t in "ABBB"))
    assert bool(receptive_field(plain, (1, 7, 7), position=(4, 3)).blind.any())
    larger = receptive_field(Stack(2, 5), (1, 9, 9), position=(4, 4))
    assert not bool(larger.blind.any())


def test_the_first_row_is_seen_along_its_length():
    """One type A layer and B after it: nothing is lost along the row (anantzoid/Conditional-PixelCNN-decoder 9)."""
    field = receptive_field(Stack(6), (1, 3, 7), position=(0, 6))
    assert field.seen[0].tolist() == [[True] * 6 + [False], [False] * 7, [False] * 7]


def test_the_vertical_stack_never_sees_the_horizontal():
    layer = gnn.GatedMaskedConv2d(4, 4)
    v, h = (torch.randn(1, 4, 5, 5, requires_grad=True) for _ in range(2))
    out_v, out_h, skip = layer(v, h)
    assert torch.autograd.grad(out_v.sum(), h, retain_graph=True, allow_unused=True) == (None,)
    assert bool(torch.autograd.grad(out_v.sum(), v, retain_graph=True)[0].any())
    for out in (out_h, skip):
        grads = torch.autograd.grad(out.sum(), (v, h), retain_graph=True)
        assert all(bool(g.any()) for g in grads)


def test_what_each_stack_sees():
    layer = gnn.GatedMaskedConv2d(1, 1, 3).double()
    zero = torch.zeros(1, 1, 4, 5, dtype=torch.float64)
    by_v = seen(lambda t: torch.cat(layer(t, zero), 1), (1, 4, 5))[:, :, :, 0]
    by_h = seen(lambda t: torch.cat(layer(zero, t)[1:], 1), (1, 4, 5))[:, :, :, 0]
    places = list(itertools.product(range(4), range(5)))
    for (r, c), (i, j) in itertools.product(places, places):
        assert bool(by_v[0, r, c, i, j]) == (r - 1 <= i <= r and abs(c - j) <= 1)
        for out in (1, 2):
            assert bool(by_v[out, r, c, i, j]) == (r - 2 <= i <= r - 1 and abs(c - j) <= 1)
            assert bool(by_h[out - 1, r, c, i, j]) == (i == r and c - 1 <= j <= c)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kinds", ["A", "AB", "B"])
def test_order_of_pixels_and_colours(order, kinds):
    options = dict(data_channels=3, group_order=order)
    layers = nn.ModuleList(
        gnn.GatedMaskedConv2d(6 if i else 3, 6, mask_type=k, **options) for i, k in enumerate(kinds)
    ).double()  # fmt: skip

    def network(x):
        v = h = x
        for layer in layers:
            v, h, skip = layer(v, h)
        return torch.cat((h, skip), 1)

    found = seen(network, (3, 3, 4))
    ins, outs = colours(3, 3, order), colours(6, 3, order) * 2
    places = list(itertools.product(range(3), range(4)))
    for (o, own), (r, c), (i, other), at in itertools.product(enumerate(outs), places, enumerate(ins), places):
        value = bool(found[(o, r, c, i, *at)])
        if at > (r, c):
            assert not value, (o, r, c, i, at)
        elif at == (r, c):
            assert value == (other < own if kinds[0] == "A" else other <= own), (o, r, c, i, at)
        elif r - 1 <= at[0] and abs(at[1] - c) <= 1:  # what lies above or to the left is seen in every colour
            assert value, (o, r, c, i, at)


@pytest.mark.parametrize("order", ORDERS)
def test_bug_gate_mixes_colours(order):
    """Both halves of the gate of a channel have that channel's colour, in either order of the groups."""
    layer = gnn.GatedMaskedConv2d(3, 6, mask_type="A", data_channels=3, group_order=order)
    before, after = colours(12, 3, order), colours(6, 3, order)
    for gate in (layer.gate_h, layer.gate_v):
        x = torch.randn(1, 12, 1, 1, requires_grad=True)
        y = gate(x)
        for channel in range(6):
            read = torch.autograd.grad(y[0, channel].sum(), x, retain_graph=True)[0].flatten().nonzero().flatten().tolist()
            assert len(read) == 2
            assert {before[c] for c in read} == {after[channel]}
    with pytest.raises(ValueError, match="GatedMaskedConv2d: channels=4 is not a multiple of data_channels=3"):
        gnn.GatedMaskedConv2d(3, 4, data_channels=3, group_order=order)


def test_the_residual_is_there_in_type_b_alone():
    for mask_type, residual, expected in (("A", True, False), ("B", True, True), ("B", False, False)):
        assert gnn.GatedMaskedConv2d(4, 4, mask_type=mask_type, residual=residual).residual is expected
    assert gnn.GatedMaskedConv2d(2, 4).residual is False
    layer = gnn.GatedMaskedConv2d(4, 4)
    v, h = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        layer.out.weight.zero_()
        layer.out.bias.zero_()
    assert torch.equal(layer(v, h)[1], h)  # once, not twice


def test_conditions():
    layer = gnn.GatedMaskedConv2d(4, 6, context_channels=3)
    v, h = torch.randn(2, 4, 5, 7), torch.randn(2, 4, 5, 7)
    vector = torch.randn(2, 3, requires_grad=True)
    out = layer(v, h, vector)
    assert [o.shape for o in out] == [(2, 6, 5, 7)] * 3
    for a, b in zip(out, layer(v, h, vector[:, :, None, None].expand(2, 3, 5, 7))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(bool(g.all()) for g in torch.autograd.grad([o.sum() for o in out], vector))
    # A map is read where it lies: in one layer it moves its own position alone.
    spatial = torch.randn(2, 3, 5, 7)
    other = spatial.clone()
    other[:, :, 2, 3] += 1
    for a, b in zip(layer(v, h, spatial), layer(v, h, other)):
        moved = (a != b).any(0).any(0)
        assert moved.nonzero().tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("context_channels", "shape", "message"),
    [
        (3, None, "GatedMaskedConv2d: context is None, expected a condition, as context_channels was given"),
        (None, (2, 3), "GatedMaskedConv2d: context is given, expected None without context_channels"),
        (3, (2, 4), r"ConditionBias: context has shape \(2, 4\), expected \(N, 3\) or \(N, 3, \*spatial\)"),
        (3, (3,), r"ConditionBias: context has shape \(3,\)"),
        (3, (2, 3, 4, 5), r"bias has shape \(2, 8, 4, 5\), expected .* x's shape \(2, 8, 5, 5\)"),
        (3, (3, 3), r"bias has shape \(3, 8\)"),
    ],
)  # fmt: skip
def test_conditions_that_do_not_fit(context_channels, shape, message):
    layer = gnn.GatedMaskedConv2d(4, 4, context_channels=context_channels)
    x = torch.zeros(2, 4, 5, 5)
    with pytest.raises(ValueError, match=message):
        layer(x, x, None if shape is None else torch.zeros(shape))


@pytest.mark.parametrize("twin", [gnn, causal], ids=["nn", "plain"])
def test_errors_of_the_gated_layer(twin):
    for options, message in (
        (dict(kernel_size=4), "kernel_size=4, expected an odd number"),
        (dict(kernel_size=0), "kernel_size=0, expected an odd number"),
        (dict(data_channels=3), "channels=4 is not a multiple of data_channels=3"),
        (dict(data_channels=0), "channels=4 is not a multiple of data_channels=0"),
    ):
        with pytest.raises(ValueError, match=f"GatedMaskedConv2d: {message}"):
            twin.GatedMaskedConv2d(4, 4, **options)


# The plain twins.


def same_numbers(ours, plain, inputs):
    plain.load_state_dict(ours.state_dict(), strict=True)
    assert list(plain.state_dict()) == list(ours.state_dict())
    results = []
    for module in (ours, plain):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = module(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        torch.manual_seed(1)
        loss = sum((o * torch.randn_like(o)).sum() for o in out)
        results.append([*out, *torch.autograd.grad(loss, [*leaves, *module.parameters()])])
    for f, e in zip(*results):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_the_plain_twins_give_the_same_numbers(mask_type, order):
    options = dict(mask_type=mask_type, data_channels=3, group_order=order)
    x = torch.randn(2, 6, 5, 6).double()
    for kernel, more in ((3, {}), ((2, 4), {"activation": "relu"}), ((2, 3), {"center": (1, 2), "dilation": 2})):
        pair = [t.MaskedConv2d(6, 9, kernel, **options, **more).double() for t in (gnn, causal)]
        same_numbers(*pair, [x])
    pair = [t.MaskedConv1d(6, 9, 2, dilation=3, center=(1,), bias=False, **options).double() for t in (gnn, causal)]
    same_numbers(*pair, [x[..., 0]])
    for context in (None, torch.randn(2, 4).double(), torch.randn(2, 4, 5, 6).double()):
        features = None if context is None else 4
        pair = [t.GatedMaskedConv2d(6, 6, 3, context_channels=features, **options).double() for t in (gnn, causal)]
        same_numbers(*pair, [x, x + 1, *([] if context is None else [context])])


@pytest.mark.parametrize("groups", [1, 3])
def test_the_plain_gate_gives_the_same_numbers(groups):
    x = torch.randn(2, 12, 3, 4)
    for bias in (None, torch.randn(12), torch.randn(2, 12), torch.randn(2, 12, 3, 4)):
        torch.testing.assert_close(gnn.GatedActivation(groups)(x, bias), causal.GatedActivation(groups)(x, bias))
        assert torch.equal(gnn.GatedActivation(groups)(x, bias), ops.gated_activation(x, bias, groups=groups))
    assert repr(gnn.GatedActivation()) == "GatedActivation()"
    assert repr(gnn.GatedActivation(3)) == "GatedActivation(groups=3)"


# Shifted convolutions.


def exact_sets(layer, size, sees):
    """The layer maps an image of ``size``; output (r, c) depends on input (i, j) exactly if sees(r, c, i, j)."""
    found = seen(layer.double(), (1, *size))[0, :, :, 0]
    for place in itertools.product(*map(range, found.shape)):
        assert bool(found[place]) == sees(*place), place
    return found.shape[:2]


@pytest.mark.parametrize("kernel", [(2, 3), (1, 3), (3, 5), (2, 1), 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_a_down_shifted_convolution_sees(kernel, stride):
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    shape = exact_sets(
        gnn.DownShiftedConv2d(1, 1, kernel, stride), (4, 6),
        lambda r, c, i, j: stride * r - h < i <= stride * r and abs(j - stride * c) <= w // 2,
    )  # fmt: skip
    assert shape == (4 // stride, 6 // stride)


@pytest.mark.parametrize("kernel", [(2, 2), (1, 2), (2, 1), (3, 4), 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_a_down_right_shifted_convolution_sees(kernel, stride):
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    shape = exact_sets(
        gnn.DownRightShiftedConv2d(1, 1, kernel, stride), (4, 6),
        lambda r, c, i, j: stride * r - h < i <= stride * r and stride * c - w < j <= stride * c,
    )  # fmt: skip
    assert shape == (4 // stride, 6 // stride)


@pytest.mark.parametrize("kernel", [(2, 3), (3, 5), 3])
def test_what_a_transposed_down_shifted_convolution_sees(kernel):
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    shape = exact_sets(
        gnn.DownShiftedConvTranspose2d(1, 1, kernel), (3, 4),
        lambda r, c, i, j: 0 <= r - 2 * i < h and 0 <= c + w // 2 - 2 * j < w,
    )  # fmt: skip
    assert shape == (6, 8)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 4), 2])
def test_what_a_transposed_down_right_shifted_convolution_sees(kernel):
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    shape = exact_sets(
        gnn.DownRightShiftedConvTranspose2d(1, 1, kernel), (3, 4),
        lambda r, c, i, j: 0 <= r - 2 * i < h and 0 <= c - 2 * j < w,
    )  # fmt: skip
    assert shape == (6, 8)


def test_down_and_up_again_sees_no_later_row_or_column():
    down = gnn.DownRightShiftedConv2d(1, 1, stride=2)
    up = gnn.DownRightShiftedConvTranspose2d(1, 1)
    found = seen(nn.Sequential(down, up).double(), (1, 4, 6))[0, :, :, 0]
    for r, c, i, j in found.nonzero().tolist():
        assert i <= r
        assert j <= c
    down, up = gnn.DownShiftedConv2d(1, 1, stride=2), gnn.DownShiftedConvTranspose2d(1, 1)
    found = seen(nn.Sequential(down, up).double(), (1, 4, 6))[0, :, :, 0]
    assert all(i <= r for r, _, i, _ in found.nonzero().tolist())
    assert any(j > c for _, c, _, j in found.nonzero().tolist())


def test_even_widths_are_refused():
    for layer in (gnn.DownShiftedConv2d, gnn.DownShiftedConvTranspose2d):
        for kernel in ((2, 4), 2):
            with pytest.raises(ValueError, match=rf"{layer.__name__}: kernel_size=.*, expected an odd width"):
                layer(1, 1, kernel)


def test_shifts():
    x = torch.arange(1.0, 13).view(1, 1, 3, 4)
    assert gnn.Shift(down=1)(x)[0, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert gnn.Shift(right=1)(x)[0, 0].tolist() == [[0, 1, 2, 3], [0, 5, 6, 7], [0, 9, 10, 11]]
    assert gnn.Shift(2, 3)(x)[0, 0].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]]
    assert torch.equal(gnn.Shift()(x), x)
    assert not gnn.Shift(down=5, right=7)(x).any()
    assert gnn.Shift(down=1)(x[:, :, 0])[0, 0].tolist() == [0, 1, 2, 3]
    assert repr(gnn.Shift(1, 2)) == "Shift(down=1, right=2)"
    for arguments in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match=r"Shift: down=.*, right=.*, expected at least 0"):
            gnn.Shift(*arguments)


def test_bug_boundary_of_a_shifted_map():
    """It is the map that is shifted, bias and all: its first row, or column, is exactly zero (PixelCNN++)."""
    x = torch.randn(2, 3, 4, 5)
    down = nn.Sequential(gnn.DownShiftedConv2d(3, 4, (2, 3)), gnn.Shift(down=1))
    right = nn.Sequential(gnn.DownRightShiftedConv2d(3, 4, (2, 1)), gnn.Shift(right=1))
    for network in (down, right):
        nn.init.constant_(network[0].bias, 7.0)
    assert not down(x)[:, :, 0].any()
    assert bool((down(x)[:, :, 1:] != 0).all())
    assert not right(x)[..., 0].any()
    assert bool((right(x)[..., 1:] != 0).all())
    found = seen(down.double(), (3, 4, 5))
    assert all(i < r for _, r, _, _, i, _ in found.nonzero().tolist())
    found = seen(right.double(), (3, 4, 5))
    assert all(i <= r and j < c for _, r, c, _, i, j in found.nonzero().tolist())


# Small layers.


def test_scaled_levels():
    scale = gnn.ScaleLevels(5)
    assert scale(torch.arange(5)).tolist() == [-1, -0.5, 0, 0.5, 1]
    assert scale(torch.arange(5, dtype=torch.uint8)).dtype == torch.float32
    assert scale(torch.arange(5).double()).dtype == torch.float64
    assert scale(torch.zeros(2, 3, 4)).shape == (2, 3, 4)
    assert repr(scale) == "ScaleLevels(5)"
    with pytest.raises(ValueError, match="ScaleLevels: levels=1, expected at least 2"):
        gnn.ScaleLevels(1)


def test_embedded_levels():
    embed = gnn.LevelEmbedding(4, 3)
    for shape in ((2, 1, 5), (2, 1, 4, 5), (2, 1, 2, 3, 4)):
        x = torch.randint(4, shape)
        y = embed(x)
        assert y.shape == (2, 3, *shape[2:])
        assert torch.equal(y, (F.one_hot(x[:, 0], 4).float() @ embed.weight).movedim(-1, 1))
        assert torch.equal(embed(x.float()), y)
    assert repr(embed) == "LevelEmbedding(4, 3)"
    for shape in ((2, 3, 4, 4), (4,)):
        with pytest.raises(ValueError, match=r"LevelEmbedding: x has shape \(.*\), expected \(N, 1, \*spatial\)"):
            embed(torch.zeros(shape).long())
    for level in (4, -1):
        with pytest.raises(IndexError):
            embed(torch.full((1, 1, 2), level))


def test_appended_ones():
    for shape in ((2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 4, 5)):
        x = torch.randn(shape)
        y = gnn.AppendOnes()(x)
        assert y.shape == (2, 4, *shape[2:])
        assert torch.equal(y[:, :3], x)
        assert bool((y[:, 3] == 1).all())


def test_concatenated_elu():
    x = torch.tensor([[[-1.0, 0.0, 2.0]]])
    low = [math.expm1(-1), math.expm1(-2)]
    torch.testing.assert_close(gnn.ConcatELU()(x), torch.tensor([[[low[0], 0.0, 2.0], [1.0, 0.0, low[1]]]]))


def test_condition_bias():
    layer = gnn.ConditionBias(3, 5)
    assert list(layer.state_dict()) == ["linear.weight"]
    vector, spatial = torch.randn(2, 3), torch.randn(2, 3, 4, 6)
    torch.testing.assert_close(layer(vector), vector @ layer.linear.weight.T)
    torch.testing.assert_close(layer(spatial), F.conv2d(spatial, layer.linear.weight[:, :, None, None]))
    assert layer(torch.randn(2, 3, 7)).shape == (2, 5, 7)
    for shape in ((2, 4), (3,), (2, 4, 3)):
        with pytest.raises(ValueError, match=r"ConditionBias: context has shape \(.*\), expected \(N, 3\)"):
            layer(torch.zeros(shape))


# Checkpoints of other people's masked convolutions.


class Published(nn.Conv2d):
    """The masked convolution of most PixelCNN repositories: a mask as a buffer, and the weight multiplied in place."""

    def __init__(self, mask_type, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("mask", self.weight.data.clone())
        _, _, height, width = self.weight.size()
        self.mask.fill_(1)
        self.mask[:, :, height // 2, width // 2 + (mask_type == "B") :] = 0
        self.mask[:, :, height // 2 + 1 :] = 0

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


def published():
    return nn.Sequential(
        Published("A", 1, 8, 7, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), Published("B", 8, 8, 3, padding=1)
    ).eval()


def loading(first="A", last="B", **options):
    return nn.Sequential(
        gnn.MaskedConv2d(1, 8, 7, padding=3, bias=False, mask_type=first), nn.BatchNorm2d(8), nn.ReLU(),
        gnn.MaskedConv2d(8, 8, 3, padding=1, mask_type=last, **options),
    ).eval()  # fmt: skip


def test_a_checkpoint_with_mask_buffers_loads():
    theirs, ours, x = published(), loading(), torch.randn(2, 1, 9, 8)
    checkpoint = theirs.state_dict()
    before = list(checkpoint)
    assert ours.load_state_dict(checkpoint) == ([], [])
    assert list(checkpoint) == before
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert not any("mask" in k for k in ours.state_dict())
    for convert in (torch.Tensor.bool, torch.Tensor.double, lambda m: m[:1, :1]):
        loading().load_state_dict({k: convert(v) if "mask" in k else v for k, v in checkpoint.items()})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.masks"'):
        loading().load_state_dict({**checkpoint, "0.masks": checkpoint["0.mask"]})
    normed = gnn.MaskedConv2d(8, 8, 3)
    gnn.weight_norm(normed)
    normed.load_state_dict({**normed.state_dict(), "mask": published()[3].mask})


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_with_another_mask_does_not_load(strict):
    with pytest.raises(
        RuntimeError, match="0.mask is not the mask of this layer, mask_type='B'.*: it is that of mask_type='A'"
    ):
        loading(first="B").load_state_dict(published().state_dict(), strict=strict)
    colours = gnn.MaskedConv2d(6, 6, 3, data_channels=3, group_order="blocked").mask
    layer = gnn.MaskedConv2d(6, 6, 3, data_channels=3)
    with pytest.raises(RuntimeError, match="it is that of mask_type='B', data_channels=3, group_order='blocked'"):
        layer.load_state_dict({**layer.state_dict(), "mask": colours}, strict=strict)
    row = published()[3].mask.clone()
    row[:, :, 1] = 0  # a published mistake: the whole row of the centre
    layer = gnn.MaskedConv2d(8, 8, 3)
    with pytest.raises(RuntimeError, match=r"mask is not .*they differ first at weight \(0, 0, 1, 0\), 128 in all"):
        layer.load_state_dict({**layer.state_dict(), "mask": row}, strict=strict)
    with pytest.raises(RuntimeError, match=r"mask has shape \(8, 8, 5, 5\), expected \(8, 8, 3, 3\)"):
        layer.load_state_dict({**layer.state_dict(), "mask": torch.ones(8, 8, 5, 5)}, strict=strict)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scaled_levels_have_the_networks_type(dtype):
    x = torch.arange(65536).view(1, 1, -1)
    scaled = nn.Sequential(gnn.ScaleLevels(65536)).to(dtype)(x)
    assert scaled.dtype is dtype
    assert not gnn.ScaleLevels(4).state_dict()
    torch.testing.assert_close(scaled.double(), 2 * x.double() / 65535 - 1, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert gnn.ScaleLevels(4)(torch.ones(1, dtype=torch.float64)).dtype is torch.float64
