"""nn.GatedMaskedConv2d, the layer of Gated PixelCNN, and nn.GatedActivation: what each output sees, conditions,
errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from genfast import ops
from genfast.nn import plain as twins
from genfast.sampling import receptive_field
from tests.nn.test_masked_conv import ORDERS, colours, compiled_equals_eager, same_numbers, seen


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
    ).double()

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
            read = (
                torch.autograd.grad(y[0, channel].sum(), x, retain_graph=True)[0].flatten().nonzero().flatten().tolist()
            )
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
)
def test_conditions_that_do_not_fit(context_channels, shape, message):
    layer = gnn.GatedMaskedConv2d(4, 4, context_channels=context_channels)
    x = torch.zeros(2, 4, 5, 5)
    with pytest.raises(ValueError, match=message):
        layer(x, x, None if shape is None else torch.zeros(shape))


@pytest.mark.parametrize("twin", [gnn, twins], ids=["nn", "plain"])
def test_errors_of_the_gated_layer(twin):
    for options, message in (
        (dict(kernel_size=4), "kernel_size=4, expected an odd number"),
        (dict(kernel_size=0), "kernel_size=0, expected an odd number"),
        (dict(data_channels=3), "channels=4 is not a multiple of data_channels=3"),
        (dict(data_channels=0), "channels=4 is not a multiple of data_channels=0"),
    ):
        with pytest.raises(ValueError, match=f"GatedMaskedConv2d: {message}"):
            twin.GatedMaskedConv2d(4, 4, **options)


def test_compiled_without_a_break():
    x = torch.randn(2, 6, 5, 6)
    compiled_equals_eager(
        gnn.GatedMaskedConv2d(6, 6, data_channels=3, context_channels=4), [x, x + 1, torch.randn(2, 4)]
    )


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_the_plain_twin_gives_the_same_numbers(mask_type, order):
    options = dict(mask_type=mask_type, data_channels=3, group_order=order)
    x = torch.randn(2, 6, 5, 6).double()
    for context in (None, torch.randn(2, 4).double(), torch.randn(2, 4, 5, 6).double()):
        features = None if context is None else 4
        pair = [t.GatedMaskedConv2d(6, 6, 3, context_channels=features, **options).double() for t in (gnn, twins)]
        same_numbers(*pair, [x, x + 1, *([] if context is None else [context])])


@pytest.mark.parametrize("groups", [1, 3])
def test_the_plain_gate_gives_the_same_numbers(groups):
    x = torch.randn(2, 12, 3, 4)
    for bias in (None, torch.randn(12), torch.randn(2, 12), torch.randn(2, 12, 3, 4)):
        torch.testing.assert_close(gnn.GatedActivation(groups)(x, bias), twins.GatedActivation(groups)(x, bias))
        assert torch.equal(gnn.GatedActivation(groups)(x, bias), ops.gated_activation(x, bias, groups=groups))
    assert repr(gnn.GatedActivation()) == "GatedActivation()"
    assert repr(gnn.GatedActivation(3)) == "GatedActivation(groups=3)"
