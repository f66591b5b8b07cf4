"""Some rows of a batch of samples, from the random numbers of all: what each of several processes draws."""

from __future__ import annotations

import pytest
import torch

from genfast import models

PIXELS = {"channels": 4, "layers": 1, "levels": 5, "shape": (1, 4, 4)}
CASES = {
    "glow": {"shape": (1, 4, 4), "levels": 1, "steps": 1, "hidden": 4},
    "maf": {"dim": 4, "hidden": 8, "transforms": 1},
    "rnade": {"dim": 4, "hidden": 4, "components": 2},
    "made": {"dim": 6, "hidden": 8, "orders": 3},
    "deep_nade": {"dim": 6, "hidden": 8, "orders": 3},
    "nade": {"dim": 6, "hidden": 8, "levels": 4},
    "pixelcnn": PIXELS,
    "pixelcnnpp": {"filters": 4, "blocks": 1, "mixtures": 2, "in_channels": 1, "shape": (1, 4, 4)},
    "cgan": {"shape": (1, 4, 4), "classes": 3, "hidden": 8},
    "gan": {"shape": (2,), "hidden": 8},
    "vae": {"shape": (1, 4, 4), "levels": 5, "hidden": 8, "base": 2},
    "autoencoder": {"shape": (1, 4, 4), "levels": 5, "hidden": 8, "base": 2},
}


def same(model, **options):
    def drawn(rows):
        torch.manual_seed(0)
        return model.sample(7, generator=torch.Generator().manual_seed(0), rows=rows, **options)

    everything = drawn(None)
    for rows in (slice(2, 5), slice(0, 3), slice(7, 7)):
        torch.testing.assert_close(drawn(rows), everything[rows], rtol=1e-5, atol=1e-6)
    assert everything.unique(dim=0).shape[0] > 1


@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_all(name):
    same(models.build(name, **CASES[name]).eval())


def test_rows_take_their_conditions():
    labels, context = torch.arange(7).flip(0) % 3, torch.randn(7, 2)
    same(models.build("cgan", **CASES["cgan"]), context=labels)
    same(models.MAF(4, hidden=8, transforms=1, context=2).eval(), context=context)
    same(models.MAF(4, hidden=8, transforms=1, context=2).eval(), context=context[0])
    same(models.RNADE(4, hidden=4, components=2, context_features=2), context=context)
    same(models.MADE(6, hidden=8, context_features=2).eval(), context=context)
    pixels = models.PixelCNN(**PIXELS)
    same(pixels, prefix=torch.randint(5, (7, 1, 2, 4)))
    same(pixels, prefix=torch.randint(5, (1, 1, 2, 4)), method="naive")
    same(models.plain(models.PixelCNN)(**PIXELS), prefix=torch.randint(5, (7, 1, 2, 4)))
    given, known = torch.randint(2, (7, 6)), torch.rand(7, 6) < 0.5
    same(models.DeepNADE(6, hidden=8, orders=2).eval(), given=given, known=known)
