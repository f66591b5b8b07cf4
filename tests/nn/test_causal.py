"""Shifted convolutions and the small layers of causal networks: what each output sees, shapes, types, errors."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast import nn as gnn
from tests.nn.test_masked_conv import seen


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
        gnn.DownShiftedConv2d(1, 1, kernel, stride),
        (4, 6),
        lambda r, c, i, j: stride * r - h < i <= stride * r and abs(j - stride * c) <= w // 2,
    )
    assert shape == (4 // stride, 6 // stride)


@pytest.mark.parametrize("kernel", [(2, 2), (1, 2), (2, 1), (3, 4), 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_what_a_down_right_shifted_convolution_sees(kernel, stride):
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    shape = exact_sets(
        gnn.DownRightShiftedConv2d(1, 1, kernel, stride),
        (4, 6),
        lambda r, c, i, j: stride * r - h < i <= stride * r and stride * c - w < j <= stride * c,
    )
    assert shape == (4 // stride, 6 // stride)


@pytest.mark.parametrize("kernel", [(2, 3), (3, 5), 3])
def test_what_a_transposed_down_shifted_convolution_sees(kernel):
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    shape = exact_sets(
        gnn.DownShiftedConvTranspose2d(1, 1, kernel),
        (3, 4),
        lambda r, c, i, j: 0 <= r - 2 * i < h and 0 <= c + w // 2 - 2 * j < w,
    )
    assert shape == (6, 8)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 4), 2])
def test_what_a_transposed_down_right_shifted_convolution_sees(kernel):
    h, w = (kernel, kernel) if isinstance(kernel, int) else kernel
    shape = exact_sets(
        gnn.DownRightShiftedConvTranspose2d(1, 1, kernel),
        (3, 4),
        lambda r, c, i, j: 0 <= r - 2 * i < h and 0 <= c - 2 * j < w,
    )
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_scaled_levels_have_the_networks_type(dtype):
    x = torch.arange(65536).view(1, 1, -1)
    scaled = nn.Sequential(gnn.ScaleLevels(65536)).to(dtype)(x)
    assert scaled.dtype is dtype
    assert not gnn.ScaleLevels(4).state_dict()
    torch.testing.assert_close(scaled.double(), 2 * x.double() / 65535 - 1, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert gnn.ScaleLevels(4)(torch.ones(1, dtype=torch.float64)).dtype is torch.float64
