"""RowLSTM, DiagonalBiLSTM and PixelRNN: causality, masks, state_dicts, errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import models, ops, reference
from genfast import nn as gnn
from genfast.nn import plain as plain_layers

HEIGHT, WIDTH = 4, 5
LAYERS = {
    "row B": (lambda: gnn.RowLSTM(2, 3), 1, "B"),
    "row A": (lambda: gnn.RowLSTM(2, 3, 5, mask_type="A"), 1, "A"),
    "row RGB B": (lambda: gnn.RowLSTM(3, 6, data_channels=3), 3, "B"),
    "row RGB A": (lambda: gnn.RowLSTM(6, 9, mask_type="A", data_channels=3), 3, "A"),
    "diagonal B": (lambda: gnn.DiagonalBiLSTM(2, 3), 1, "B"),
    "diagonal RGB B": (lambda: gnn.DiagonalBiLSTM(3, 6, data_channels=3), 3, "B"),
    "diagonal RGB A": (lambda: gnn.DiagonalBiLSTM(6, 9, mask_type="A", data_channels=3), 3, "A"),
}
each_layer = pytest.mark.parametrize(("make", "groups", "mask_type"), LAYERS.values(), ids=LAYERS)


def jacobian(function, channels):
    """|d out[co, r, c] / d in[ci, i, j]| as (co, r, c, ci, i, j)."""
    x = torch.randn(1, channels, HEIGHT, WIDTH, dtype=torch.float64)
    return torch.autograd.functional.jacobian(lambda t: function(t)[0], x)[:, :, :, 0].abs()


def order(groups, channel, r, c):
    return (r * WIDTH + c) * groups + channel % groups


def each(found):
    """(allowed order of the input, of the output, the derivative) for every pair."""
    outs, _, _, ins, _, _ = found.shape
    for co in range(outs):
        for r in range(HEIGHT):
            for c in range(WIDTH):
                for ci in range(ins):
                    for i in range(HEIGHT):
                        for j in range(WIDTH):
                            yield co, r, c, ci, i, j, float(found[co, r, c, ci, i, j])


@each_layer
def test_nothing_depends_on_a_later_input(make, groups, mask_type):
    layer = make().double()
    for co, r, c, ci, i, j, value in each(jacobian(layer, layer.in_channels)):
        later = order(groups, ci, i, j) - order(groups, co, r, c)
        if later > 0 or (later == 0 and mask_type == "A"):
            assert value == 0, (co, r, c, ci, i, j)
        elif (i, j) == (r, c):  # what the mask lets through at the centre does arrive
            assert value > 0, (co, r, c, ci, i, j)


def test_the_diagonal_bilstm_has_no_blind_spot():
    """Every earlier position is seen: those above and to the right arrive through the map that is shifted down."""
    for co, r, c, ci, i, j, value in each(jacobian(gnn.DiagonalBiLSTM(2, 3).double(), 2)):
        assert (value > 0) == (order(1, 0, i, j) <= order(1, 0, r, c)), (co, r, c, ci, i, j)


def test_the_row_lstm_sees_the_triangle_and_its_left_neighbours():
    for co, r, c, ci, i, j, value in each(jacobian(gnn.RowLSTM(2, 3).double(), 2)):
        # c - 1 in its own row; one column more on either side a row, from which the input convolution reaches one to
        # the left.
        seen = i <= r and c - (r - i) - 1 <= j <= c + (r - i)
        assert (value > 0) == seen, (co, r, c, ci, i, j)


def test_the_map_from_the_right_is_shifted_down_and_not_up():
    """A public port shifts it up, so that each row sees the next."""
    layer = gnn.DiagonalBiLSTM(1, 2)
    with torch.no_grad():
        layer.input_to_state.weight[:8] = 0  # the direction from the left
        layer.input_to_state.bias[:8] = 0
    x = torch.randn(1, 1, HEIGHT, WIDTH)
    y = layer(x)
    assert not y[:, :, 0].any()
    assert bool((y[:, :, 1:] != 0).all())
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    moved = (layer(changed) != y).any(1)[0]
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    expected[3:, :4] = True
    assert torch.equal(moved, expected)


@each_layer
def test_the_layers_are_their_references(make, groups, mask_type):
    layer = make()
    x = torch.randn(2, layer.in_channels, HEIGHT, WIDTH)
    conv = layer.input_to_state
    gates = F.conv2d(x, conv.weight * conv.mask, conv.bias, padding=conv.padding)
    if isinstance(layer, gnn.RowLSTM):
        expected = reference.row_lstm(gates, layer.state_to_state)[0]
    else:
        left, right = gates.chunk(2, 1)
        expected = reference.diagonal_lstm(left, layer.state_to_state[0])[0]
        mirrored = reference.diagonal_lstm(right.flip(3), layer.state_to_state[1])[0].flip(3)
        expected[:, :, 1:] += mirrored[:, :, :-1]
    torch.testing.assert_close(layer(x), expected)


@each_layer
def test_the_plain_twin_has_the_same_weights_numbers_and_gradients(make, groups, mask_type, monkeypatch):
    layer = make()
    options = {"mask_type": mask_type, "data_channels": groups}
    if isinstance(layer, gnn.RowLSTM):
        options["kernel_size"] = layer.kernel_size
    twin = getattr(plain_layers, type(layer).__name__)(layer.in_channels, layer.hidden, **options)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(2, layer.in_channels, HEIGHT, WIDTH)
    y = layer(x)
    expected_gradients = torch.autograd.grad(y.square().sum(), list(layer.parameters()))
    for name in ("row_lstm", "diagonal_lstm", "masked_conv2d"):
        monkeypatch.setattr(ops, name, None)  # the twin calls no op of ours
    expected = twin(x)
    torch.testing.assert_close(y, expected)
    for ours, plain in zip(expected_gradients, torch.autograd.grad(expected.square().sum(), list(twin.parameters()))):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@each_layer
def test_masked_weights_get_no_gradient_and_keep_their_value(make, groups, mask_type):
    layer = make()
    conv = layer.input_to_state
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    assert list(before) == ["state_to_state", "input_to_state.weight", "input_to_state.bias"]
    layer(torch.randn(2, layer.in_channels, HEIGHT, WIDTH)).square().sum().backward()
    assert not conv.weight.grad[~conv.mask].any()
    assert bool((conv.weight.grad[conv.mask] != 0).all())
    assert bool((layer.state_to_state.grad != 0).all())
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    plain = nn.Conv2d(layer.in_channels, conv.out_channels, conv.kernel_size)
    conv.load_state_dict(plain.state_dict())


@each_layer
def test_the_groups_of_the_gates_are_those_of_the_hidden_channels(make, groups, mask_type):
    """The gates are cut in four at multiples of hidden; a cut that splits the groups lets R be gated by G, a silent
    leak."""
    layer = make()
    mask = layer.input_to_state.mask
    centre = mask[:, :, 0, mask.shape[3] // 2]
    seen, seeing = (torch.arange(n) % groups for n in (layer.in_channels, layer.hidden))
    expected = seen < seeing[:, None] if mask_type == "A" else seen <= seeing[:, None]
    for part in centre.split(layer.hidden):
        assert torch.equal(part, expected)


def test_compiles_without_a_break():
    layer = gnn.DiagonalBiLSTM(3, 6, data_channels=3)
    x = torch.randn(2, 3, 4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for f, e in zip(torch.autograd.grad(compiled(x).square().sum(), list(layer.parameters())), expected):
        torch.testing.assert_close(f, e)


def test_errors():
    for layer in (gnn.RowLSTM, gnn.DiagonalBiLSTM):
        name = layer.__name__
        with pytest.raises(ValueError, match=f"{name}: mask_type='C', expected one of 'A', 'B'"):
            layer(2, 3, mask_type="C")
        with pytest.raises(ValueError, match=f"{name}: hidden=4 is not a multiple of data_channels=3"):
            layer(3, 4, data_channels=3)
        with pytest.raises(ValueError, match=f"{name}: in_channels=4 is not a multiple of data_channels=3"):
            layer(4, 3, data_channels=3)
        with pytest.raises(ValueError, match=f"{name}: hidden=0, expected at least 1"):
            layer(1, 0)
        with pytest.raises(ValueError, match=rf"{name}: x has shape \(2, 4, 5, 5\), expected \(N, 3, H, W\)"):
            layer(3, 3)(torch.zeros(2, 4, 5, 5))
    with pytest.raises(ValueError, match="RowLSTM: kernel_size=2, expected an odd number"):
        gnn.RowLSTM(2, 3, 2)
    with pytest.raises(ValueError, match="DiagonalBiLSTM: mask_type='A' .* sees no input"):
        gnn.DiagonalBiLSTM(2, 3, mask_type="A")


MODELS = {
    "row": dict(kind="row", channels=8, layers=2, levels=3),
    "diagonal": dict(kind="diagonal", channels=8, layers=2, levels=3),
    "row RGB": dict(kind="row", in_channels=3, channels=12, layers=1, levels=2),
    "diagonal RGB": dict(kind="diagonal", in_channels=3, channels=12, layers=1, levels=2),
}


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_the_logits_of_a_pixel_depend_on_earlier_ones_only(config):
    model = models.PixelRNN(**config).double()
    colours = config.get("in_channels", 1)
    x = torch.randint(config["levels"], (2, colours, HEIGHT, WIDTH))
    logits = model.logits(x)
    assert logits.shape == (2, config["levels"], colours, HEIGHT, WIDTH)
    # (levels, C, r, c, C, i, j) summed over the levels
    x = x[:1].double()
    found = torch.autograd.functional.jacobian(lambda t: model.logits(t)[0], x)[:, :, :, :, 0].abs().sum(0)
    reached = 0
    for co, r, c, ci, i, j, value in each(found):
        if order(colours, ci, i, j) >= order(colours, co, r, c):
            assert value == 0, (co, r, c, ci, i, j)
        else:
            reached += value > 0
    positions = colours * HEIGHT * WIDTH
    # The 7 x 7 convolution and the layers together reach every earlier value of so small an image.
    assert reached > 0.9 * positions * (positions - 1) / 2


@pytest.mark.parametrize("kind", ["row", "diagonal"])
def test_the_model_learns(kind):
    """A chequered image, whose every pixel but the first follows from the one before."""
    torch.manual_seed(0)
    board = (torch.arange(6)[:, None] + torch.arange(6)) % 2
    x = torch.stack([board, 1 - board])[:, None]
    model = models.PixelRNN(channels=8, layers=1, kind=kind, levels=2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = -model.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # One pixel remains to be guessed: ln 2 nats. At the start it is 36 ln 2 = 25.
    assert loss.item() < 1.0


def test_errors_of_the_model():
    with pytest.raises(ValueError, match="PixelRNN: kind='column', expected one of 'row', 'diagonal'"):
        models.PixelRNN(kind="column")
    with pytest.raises(ValueError, match="PixelRNN: channels=32, expected a multiple of 6"):
        models.PixelRNN(in_channels=3, channels=32)
    with pytest.raises(ValueError, match="PixelRNN: levels=1, expected at least 2"):
        models.PixelRNN(levels=1)
    with pytest.raises(ValueError, match=r"PixelRNN: x has shape \(2, 3, 4, 4\), expected \(N, 1, H, W\)"):
        models.PixelRNN(layers=1).log_prob(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
