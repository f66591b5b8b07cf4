"""genfast.data: real images, and errors that say what is missing."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from genfast import data


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
