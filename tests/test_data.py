"""genfast.data: real images, and errors that say what is missing."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from genfast import cli, data
from genfast.models import neural_style


def test_digits_are_the_real_ones():
    digits = data.load("digits")
    assert digits.train.shape == (1618, 1, 8, 8)
    assert digits.test.shape == (179, 1, 8, 8)
    assert digits.train.dtype == torch.uint8
    assert int(digits.train.max()) == 16 == digits.bins - 1
    assert sorted(set(digits.test_labels.tolist())) == list(range(10))
    again = data.load("digits")
    assert torch.equal(digits.test, again.test)
    assert not torch.equal(digits.test, data.load("digits", seed=1).test)


def test_photo_patches_for_testing_come_from_elsewhere():
    photos = data.load("photos", size=16, count=400)
    assert photos.shape == (3, 16, 16)
    assert len(photos.train) == 360
    assert len(photos.test) == 40
    assert float(photos.train.float().std()) > 20
    train = {t.numpy().tobytes() for t in photos.train}
    assert not any(t.numpy().tobytes() in train for t in photos.test)


def test_a_folder_of_images(tmp_path):
    for i in range(5):
        mode, colour = ("RGB", (40 * i, 0, 0)) if i % 2 else ("L", 40 * i)
        Image.new(mode, (20 + i, 30), color=colour).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    found = data.load(str(tmp_path), size=8)
    assert found.shape == (3, 8, 8)
    assert len(found.train) + len(found.test) == 5
    assert found.bins == 256


@pytest.mark.parametrize(
    ("error", "message", "name", "options"),
    [
        (FileNotFoundError, "neither 'digits', 'photos'", "nowhere", {}),
        (ValueError, "size=999, expected 1 to", "photos", {"size": 999}),
        (ValueError, "count=1", "photos", {"count": 1}),
        ((ImportError, ValueError), "torchvision", "torchvision:CIFAR10", {}),
    ],
)
def test_errors(error, message, name, options):
    with pytest.raises(error, match=message):
        data.load(name, **options)


RAMP = np.linspace(0, 65535, 400).reshape(20, 20).round().astype(np.uint16)
GREY = (RAMP.astype(np.float64) / 257).round()


def pgm(path, white):
    path.write_bytes(
        b"P5 20 20 %d\n" % white + (RAMP.astype(np.float64) * white / 65535).round().astype(">u2").tobytes()
    )


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("grey.png", lambda path: Image.fromarray(RAMP).save(path)),
        ("grey.tif", lambda path: Image.fromarray(RAMP).save(path)),
        ("other_order.tif", lambda path: Image.fromarray(RAMP.astype(">u2")).save(path)),
        ("grey.pgm", lambda path: pgm(path, 65535)),
        ("twelve_bits.pgm", lambda path: pgm(path, 4095)),
    ],
)
def test_grey_levels_of_16_bits_become_the_nearest_of_8(tmp_path, name, write):
    write(tmp_path / name)
    values = np.asarray(data.picture(tmp_path / name))
    assert values.shape == (20, 20, 3)
    assert np.abs(values - GREY[:, :, None]).max() <= (1 if "twelve" in name else 0)


def pair(first, second):
    return Image.fromarray(np.uint8([[first, second]]))


def palette(path, transparency):
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 200, 100, 0])
    image.putdata([0, 1])
    image.save(path, transparency=transparency)


@pytest.mark.parametrize(
    ("name", "write", "share"),
    [
        ("index.png", lambda path: palette(path, 0), (1, 0)),
        ("index.gif", lambda path: palette(path, 0), (1, 0)),
        ("shares.png", lambda path: palette(path, bytes([255, 51])), (0, 0.8)),
        ("rgba.png", lambda path: pair([0, 0, 0, 0], [200, 100, 0, 204]).save(path), (1, 0.2)),
        ("rgba.webp", lambda path: pair([0, 0, 0, 0], [200, 100, 0, 204]).save(path, lossless=True), (1, 0.2)),
        ("rgb.png", lambda path: pair([0, 0, 0], [200, 100, 0]).save(path, transparency=(0, 0, 0)), (1, 0)),
    ],
)
@pytest.mark.parametrize("background", [None, "black", "#20a0ff"])
def test_what_is_transparent_shows_the_background(tmp_path, name, write, share, background):
    write(tmp_path / name)
    behind = np.array({None: (255, 255, 255), "black": (0, 0, 0), "#20a0ff": (32, 160, 255)}[background])
    options = {} if background is None else {"background": background}
    values = np.asarray(data.picture(tmp_path / name, **options)).astype(float)
    for i, (colour, transparent) in enumerate(zip(((0, 0, 0), (200, 100, 0)), share)):
        assert np.abs(values[0, i] - (np.array(colour) * (1 - transparent) + behind * transparent)).max() <= 1
    shown = neural_style.picture(str(tmp_path / name), 2, **options)  # which the style command reads
    assert (shown[0].permute(1, 2, 0) * 255).numpy() == pytest.approx(values, abs=1e-3)


def test_grey_with_transparency(tmp_path):
    Image.fromarray(np.uint8([[[80, 0], [80, 255]]]), "LA").save(tmp_path / "la.png")
    Image.fromarray(np.uint16([[0, 30000]])).save(tmp_path / "sixteen.png", transparency=0)
    for name, second in (("la.png", 80), ("sixteen.png", round(30000 / 257))):
        assert [data.picture(tmp_path / name, background="red").getpixel((x, 0)) for x in (0, 1)] == [
            (255, 0, 0),
            (second,) * 3,
        ]


def test_a_folder_trains_on_what_its_pictures_show(tmp_path):
    for i in range(4):
        Image.fromarray(np.roll(RAMP, 7 * i)).save(tmp_path / f"{i}.png")
    images = torch.cat([(found := data.load(str(tmp_path), size=20)).train, found.test])
    assert abs(float(images.float().mean()) - 127.5) < 1
    assert len(images.unique()) > 200
    for i in range(4):
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / f"{i}.png")
    assert data.load(str(tmp_path), size=4).train.unique().tolist() == [255]
    assert data.load(str(tmp_path), size=4, background="black").train.unique().tolist() == [0]
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    pair([255, 0, 0], [0, 0, 255]).resize((16, 8)).save(tmp_path / "0.jpg", exif=exif, quality=100)
    assert data.picture(tmp_path / "0.jpg").size == (8, 16)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("pipe.png", os.mkfifo, "pipe.png' is no regular file"),
        ("link.png", lambda path: path.symlink_to("nowhere"), "nowhere|link.png"),
        ("text.png", lambda path: path.write_text("no picture"), "text.png' cannot be read"),
        ("cut.png", lambda path: path.write_bytes(png()[:300]), "cut.png' cannot be read"),
        (
            "changed.png",
            lambda path: path.write_bytes(png()[:60] + b"xxxx" + png()[64:]),
            "changed.png' cannot be read",
        ),
        (
            "float.tif",
            lambda path: Image.fromarray(GREY.astype(np.float32)).save(path),
            "holds floats, whose white is not stated",
        ),
        (
            "int.tif",
            lambda path: Image.fromarray(GREY.astype(np.int32)).save(path),
            "holds 32-bit integers, whose white",
        ),
        ("bomb.png", lambda path: path.write_bytes(bomb()), "bomb.png' has too many pixels"),
    ],
)
def test_a_folder_with_what_is_no_picture_names_it(tmp_path, capsys, name, write, message):
    Image.new("L", (4, 4)).save(tmp_path / "z.png")
    Image.new("L", (4, 4)).save(tmp_path / "zz.png")
    write(tmp_path / name)
    with pytest.raises((OSError, ValueError), match=message):
        data.load(str(tmp_path), size=4)
    assert cli.main(["train", "glow", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (20, 20), dtype=np.uint16)).save(file, "png")
    return file.getvalue()


def bomb():
    """A PNG of a few bytes that says that it has 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    body = [struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_a_data_set_has_two_levels_at_least():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="Dataset: bins=1, expected at least 2 levels"):
        data.Dataset("grey", images, images, 1)


def test_an_empty_folder_names_what_it_takes(tmp_path):
    with pytest.raises(ValueError, match=r"holds 0 images, expected at least 2 of .png"):
        data.load(str(tmp_path))


SIZES = {"breast_cancer": (569, 30), "diabetes": (442, 10), "digits": (1797, 64), "iris": (150, 4), "wine": (178, 13)}


@pytest.mark.parametrize("name", data.TABLES)
def test_tables_are_standardised_by_their_training_part(name):
    found = data.table(name)
    rows, columns = SIZES[name]
    assert found.shape == (columns,)
    assert len(found.train) + len(found.test) == rows
    assert len(found.test) == len(found.test_labels) == rows // 10
    assert found.train.dtype == found.test.dtype == torch.float32
    torch.testing.assert_close(found.train.mean(0), torch.zeros(columns), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.train.std(0, correction=0), torch.ones(columns), atol=1e-4, rtol=0)
    assert torch.equal(found.test, data.table(name).test)
    assert not torch.equal(found.test, data.table(name, seed=1).test)


def test_a_table_of_digits_holds_the_images_of_the_same_split():
    table, images = data.table("digits"), data.load("digits")
    assert torch.equal(table.test_labels, images.test_labels)
    levels = ((table.mean + table.std * table.test) * 17).floor()
    near = (levels - images.test.flatten(1).float()).abs()  # the noise may come within rounding of a whole number
    assert float(near.max()) <= 1
    assert float(near.mean()) < 1e-3


def test_a_table_of_another_name_is_refused():
    with pytest.raises(ValueError, match="table: name='mnist', expected one of 'breast_cancer'"):
        data.table("mnist")


def test_binarized_images_are_black_and_white():
    digits = data.load("digits")
    found = data.binarized(digits)
    assert found.bins == 2
    assert torch.equal(found.train.bool(), digits.train > 8)
    assert torch.equal(data.binarized(found).test, found.test)
