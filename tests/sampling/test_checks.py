"""assert_causal, receptive_field and sample_equivalence find what they are for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from genfast.models import GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelRNN, WaveNet
from genfast.sampling import CausalityError, assert_causal, receptive_field, sample_equivalence


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: PixelCNN(1, 8, 3, 5, 5), (1, 5, 6)),
        (lambda: PixelCNN(3, 9, 3, 3, 5), (3, 4, 5)),
        (lambda: GatedPixelCNN(1, 8, 3, 3, 5), (1, 5, 6)),
        (lambda: GatedPixelCNN(3, 12, 2, 3, 5), (3, 4, 5)),
        (lambda: PixelCNNPlusPlus(1, 8, 1, 2), (1, 4, 8)),
        (lambda: PixelCNNPlusPlus(3, 8, 1, 2), (3, 4, 8)),
        (lambda: WaveNet(16, 8, 12, 3, 2), (1, 30)),
        (lambda: PixelRNN(1, 8, 2, "row", 4), (1, 5, 5)),
        (lambda: PixelRNN(3, 12, 2, "row", 4), (3, 4, 4)),
        (lambda: PixelRNN(1, 8, 2, "diagonal", 4), (1, 5, 5)),
        (lambda: PixelRNN(3, 12, 2, "diagonal", 4), (3, 4, 4)),
    ],
)
def test_every_model_is_causal(model, shape):
    assert_causal(model(), shape)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(gnn.ScaleLevels(4), nn.Conv2d(1, 4, 3, padding=1)),
        nn.Sequential(gnn.ScaleLevels(4), gnn.MaskedConv2d(1, 4, 3, mask_type="B")),
        nn.Sequential(gnn.ScaleLevels(4), gnn.DownShiftedConv2d(1, 4)),
        nn.Sequential(gnn.LevelEmbedding(4, 4), gnn.MaskedConv2d(4, 4, 3, mask_type="B")),
    ],
)
def test_a_leak_is_found_and_located(net):
    with pytest.raises(CausalityError, match=r"Sequential: output channel \d+ at .* depends on colour 0 at"):
        assert_causal(net, (1, 4, 4), levels=4)


def test_colours_out_of_order_are_found():
    net = nn.Sequential(gnn.ScaleLevels(2), gnn.MaskedConv2d(3, 6, 1, mask_type="B", data_channels=3))
    with pytest.raises(CausalityError):
        assert_causal(net, (3, 2, 2), levels=2)
    leaky = nn.Sequential(
        gnn.ScaleLevels(2), gnn.MaskedConv2d(3, 6, 3, mask_type="A", data_channels=3), nn.Conv2d(6, 6, 1)
    )
    with pytest.raises(CausalityError):
        assert_causal(leaky, (3, 2, 2), levels=2)


def test_the_blind_spot_of_pixelcnn_and_none_in_the_gated_one(tmp_path):
    plain = receptive_field(PixelCNN(1, 8, 4, 3, 5), (1, 9, 9))
    assert bool(plain.blind.any())
    assert not bool((plain.seen & plain.blind).any())
    # The published triangle: above and to the right of the line that 3 x 3 kernels open upwards.
    assert bool(plain.blind[0, 3, 6:].any())
    gated = receptive_field(GatedPixelCNN(1, 8, 6, 3, 5), (1, 9, 9))
    assert not bool(gated.blind.any())
    assert int(gated.seen.sum()) == 4 * 9 + 4
    assert "X" in str(plain)
    plain.save(tmp_path / "field.png")
    from PIL import Image

    picture = Image.open(tmp_path / "field.png")
    assert picture.size == (144, 144)
    assert picture.getpixel((72, 72)) == (200, 50, 50)


def test_wavenet_sees_as_far_as_it_says():
    model = WaveNet(8, 8, 8, 3, 2).double()  # the farthest sample enters by one path only
    field = receptive_field(model, (1, 40), position=(35,))
    seen = field.seen[0].nonzero().flatten()
    assert int(seen.max()) == 34
    assert 35 - int(seen.min()) == model.receptive_field


def test_without_a_shape():
    model = PixelCNN(1, 6, 2, 3, 4)
    assert_causal(model)
    assert receptive_field(model).seen.shape == (1, 8, 8)
    assert sample_equivalence(WaveNet(4, 4, 4, 2, 1)).passed


def test_bad_positions():
    with pytest.raises(ValueError, match=r"position=\(9,\)"):
        receptive_field(PixelCNN(1, 8, 2, 3, 5), (1, 9, 9), position=(9,))
    with pytest.raises(ValueError, match=r"shape=\(9,\)"):
        receptive_field(PixelCNN(1, 8, 2, 3, 5), (9,))


def test_the_model_keeps_its_mode():
    model = PixelCNN(1, 8, 2, 3, 5).train()
    assert_causal(model, (1, 3, 3))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(0)
