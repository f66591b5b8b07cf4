"""Masked convolutions as modules: initialisation, masks, weight normalisation, copies, compilation, published
checkpoints."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import nn as gnn
from genfast.nn import plain as twins

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
)
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
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_dtype_and_device_arguments():
    layer = gnn.MaskedConv2d(2, 3, 3, dtype=torch.float64)
    assert layer(torch.zeros(1, 2, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert gnn.MaskedConv2d(2, 3, 3, device="meta").weight.device.type == "meta"


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
    for layer, wide in (
        (gnn.weight_norm(ours), x),
        (torch.nn.utils.parametrizations.weight_norm(theirs), F.pad(x, (1, 0))),
    ):
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


def test_compiled_without_a_break():
    x = torch.randn(2, 6, 5, 6)
    compiled_equals_eager(gnn.MaskedConv2d(6, 9, 3, data_channels=3, activation="relu"), [x])
    compiled_equals_eager(gnn.weight_norm(gnn.MaskedConv2d(6, 9, 3, mask_type="A", data_channels=3)), [x])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mask_type", ["A", "B"])
def test_the_plain_twin_gives_the_same_numbers(mask_type, order):
    options = dict(mask_type=mask_type, data_channels=3, group_order=order)
    x = torch.randn(2, 6, 5, 6).double()
    for kernel, more in ((3, {}), ((2, 4), {"activation": "relu"}), ((2, 3), {"center": (1, 2), "dilation": 2})):
        pair = [t.MaskedConv2d(6, 9, kernel, **options, **more).double() for t in (gnn, twins)]
        same_numbers(*pair, [x])
    pair = [t.MaskedConv1d(6, 9, 2, dilation=3, center=(1,), bias=False, **options).double() for t in (gnn, twins)]
    same_numbers(*pair, [x[..., 0]])


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
        gnn.MaskedConv2d(1, 8, 7, padding=3, bias=False, mask_type=first),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        gnn.MaskedConv2d(8, 8, 3, padding=1, mask_type=last, **options),
    ).eval()


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
