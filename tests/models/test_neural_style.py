"""Style transfer: the loss falls, the seed decides, and the command line writes whole pictures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from genfast import cli, losses, models
from genfast.models import neural_style


@pytest.fixture
def pictures():
    pytest.importorskip("sklearn")
    return [neural_style.picture(name, 48) for name in ("china", "flower")]


def transfer(content, style, **options):
    network = losses.random_features(width=8)
    return models.style_transfer(
        content, style, network, normalization=((0.5,) * 3, (0.25,) * 3), **({"steps": 12} | options)
    )


@pytest.mark.parametrize(
    ("options", "fall"),
    [
        ({}, 0.1),
        ({"optimizer": "adam", "steps": 30}, 0.6),
        ({"loss": "contextual", "style_weight": 1.0}, 0.5),
        ({"init": "noise"}, 0.2),
        ({"init": "style", "style_weight": 0.1}, 0.7),
        ({"tv_weight": 10.0}, 0.2),
        ({"content_weight": 0.0}, 0.1),
        ({"style_weight": 0.0, "init": "noise"}, 0.9),
        ({"relative": False, "style_weight": 1e4}, 0.5),
    ],
)
def test_the_loss_falls(pictures, options, fall):
    result = transfer(*pictures, **options)
    assert result.image.shape == pictures[0].shape
    assert 0 <= float(result.image.min()) <= float(result.image.max()) <= 1
    assert result.losses[-1] < fall * result.losses[0]
    assert sorted(result.losses[:-1], reverse=True) == result.losses[:-1]
    assert result.losses[-1] == pytest.approx(min(result.losses), rel=0.5)


def test_the_image_is_nearer_to_the_style_by_a_loss_of_our_own(pictures):
    content, style = pictures
    network = losses.random_features(width=8)
    image = transfer(content, style).image

    def far(a):
        def gram(x):
            for name, module in network.named_children():
                x = module(x)
                if name == "relu2_1":
                    return x[0].flatten(1) @ x[0].flatten(1).T / x[0, 0].numel()
            raise AssertionError

        return float((gram((a - 0.5) / 0.25) - gram((style - 0.5) / 0.25)).norm())

    assert far(image) < 0.2 * far(content)


def test_the_seed_decides(pictures):
    runs = [transfer(*pictures, steps=3, init="noise", seed=seed).image for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    state = torch.get_rng_state()
    transfer(*pictures, steps=1, init="noise")
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_given_stays_as_it_is(pictures):
    content, style = (p.to(memory_format=torch.channels_last) for p in pictures)
    before = content.clone(), style.clone()
    network = losses.random_features(width=4).requires_grad_()
    result = models.style_transfer(content, style[0], network, normalization=None, steps=2, init=content.flip(3))
    assert result.losses[-1] < result.losses[0]
    assert torch.equal(content, before[0])
    assert torch.equal(style, before[1])
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    batch = models.style_transfer(content.repeat(2, 1, 1, 1), style, network, normalization=None, steps=2)
    assert batch.image.shape[0] == 2
    options = {"normalization": None, "steps": 10, "optimizer": "adam"}
    half = models.style_transfer(content.bfloat16(), style, network.bfloat16(), **options)
    assert half.image.dtype == torch.bfloat16
    assert half.losses[-1] < half.losses[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "lpips"}, ValueError, "loss='lpips', expected one of 'gram', 'contextual'"),
        ({"optimizer": "sgd"}, ValueError, "optimizer='sgd'"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"init": "zero"}, ValueError, "init='zero'"),
        ({"init": torch.zeros(1, 3, 2, 2)}, ValueError, r"init has shape \(1, 3, 2, 2\), expected content's"),
        ({"tv_weight": -1.0}, ValueError, "tv_weight=-1.0"),
        ({"style_weight": 0, "content_weight": 0}, ValueError, "not both of content and style 0"),
        ({"content": torch.zeros(3, 4, 4, dtype=torch.uint8)}, TypeError, "content is torch.uint8"),
        ({"content": torch.zeros(4, 4)}, ValueError, r"content has shape \(4, 4\)"),
        ({"style": torch.zeros(1, 1, 4, 4)}, ValueError, "as many channels"),
        ({"style": torch.zeros(2, 3, 4, 4)}, ValueError, "a batch of 1 or of the content's size"),
        ({"content": torch.full((1, 3, 32, 32), float("nan"))}, RuntimeError, "the loss is nan"),
    ],
)
def test_errors_name_the_argument(options, error, message):
    images = {"content": torch.rand(1, 3, 32, 32), "style": torch.rand(1, 3, 32, 32)}
    with pytest.raises(error, match=message):
        transfer(**(images | options))


def test_pictures_by_name_and_by_file(tmp_path):
    pytest.importorskip("sklearn")
    china = neural_style.picture("china", 100)
    assert china.shape == (1, 3, 67, 100)
    Image.fromarray((china[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)).save(tmp_path / "c.png")
    again = neural_style.picture(str(tmp_path / "c.png"), 100)
    assert torch.equal(again, china)
    Image.fromarray(np.zeros((4, 8), np.uint8)).save(tmp_path / "grey.png")
    assert neural_style.picture(str(tmp_path / "grey.png"), 4).shape == (1, 3, 2, 4)
    with pytest.raises(FileNotFoundError, match="neither a file nor one of 'china', 'flower'"):
        neural_style.picture("nowhere.jpg", 10)
    with pytest.raises(ValueError, match="size=0"):
        neural_style.picture("china", 0)


def words(tmp_path, *more):
    out = str(tmp_path / "out" / "styled.png")
    return ["style", "--content", "china", "--style", "flower", "--size", "32", "--steps", "2", "--out", out, *more]


def test_the_command_writes_pictures_and_says_how_far_it_came(tmp_path, capsys):
    pytest.importorskip("sklearn")
    sheet = tmp_path / "sheet.png"
    assert cli.main(words(tmp_path, "--sheet", str(sheet), "--tv-weight", "1")) == 0
    said = capsys.readouterr().out
    before, after = (float(word) for word in said.split("loss ")[1].split(";")[0].split(" -> "))
    assert after < before
    assert "2 steps" in said
    with Image.open(tmp_path / "out" / "styled.png") as image:
        assert image.size == (32, 21)
        first = np.array(image)
    with Image.open(sheet) as image:
        assert image.width > 4 * image.height / 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["styled.png"]
    assert cli.main(words(tmp_path, "--tv-weight", "1")) == 0
    with Image.open(tmp_path / "out" / "styled.png") as image:
        assert np.array_equal(first, np.array(image))
    assert cli.main(words(tmp_path, "--seed", "1", "--loss", "contextual", "--init", "noise")) == 0
    with Image.open(tmp_path / "out" / "styled.png") as image:
        assert not np.array_equal(first, np.array(image))


def test_the_command_takes_other_networks(tmp_path, capsys):
    pytest.importorskip("sklearn")
    torch.save(losses.random_features("vgg16", seed=5).state_dict(), tmp_path / "w.pth")
    assert cli.main(words(tmp_path, "--network", "vgg16", "--weights", str(tmp_path / "w.pth"))) == 0
    code = tmp_path / "mine.py"
    code.write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()\n"
    )
    mine = ["--network", f"{code}:net", "--normalization", "none", "--content-layers", "0", "--style-layers", "0,1"]
    assert cli.main(words(tmp_path, *mine)) == 0
    capsys.readouterr()
    for more, message in (
        (["--network", f"{code}:other"], "has no 'other'"),
        (["--network", "vgg11"], "expected random, vgg16, vgg19 or FILE.py:FUNCTION"),
        (["--weights", "w.pth"], "--weights are of --network vgg16 or vgg19"),
        (["--network", "vgg16", "--weights", "nowhere.pth"], "weights='nowhere.pth'"),
        (["--normalization", "none"], "that of 'random' is known"),
        (["--content", "nowhere.jpg"], "'nowhere.jpg' is neither a file"),
        (["--steps", "0"], "steps=0"),
        (["--style-layers", "relu9_1"], "layers has 'relu9_1'"),
    ):
        assert cli.main(words(tmp_path, *more)) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert message in said[0]
