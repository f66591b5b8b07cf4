"""genfast.metrics: modes counted, and the figures of torchmetrics on a network of the user's."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from genfast import data, metrics


@pytest.mark.parametrize("name", ["25gaussians", "8gaussians"])
def test_the_data_themselves_score_as_gaussians_do(name):
    points = data.points(name)
    scores = metrics.mode_scores(points.test, points.centres, points.std, minimum=100)
    assert scores.covered == len(points.centres) == int(name.split("g")[0])
    assert scores.within_3 == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    assert scores.within_4 == pytest.approx(1 - math.exp(-8), abs=0.001)
    assert scores.kl < 0.005


def test_points_are_those_of_gan_toy():
    grid = data.points("25gaussians")
    assert grid.shape == (2,)
    assert grid.train.shape == (90_000, 2)
    assert grid.train.dtype == torch.float32
    assert sorted({round(v * 2.828) for v in grid.centres.flatten().tolist()}) == [-4, -2, 0, 2, 4]
    assert grid.std == pytest.approx(0.05 / 2.828)
    apart = grid.train - grid.centres[grid.train_labels]
    assert float(apart.std()) == pytest.approx(grid.std, rel=0.01)
    assert float(grid.train.std()) == pytest.approx(1, abs=0.01)  # what the divisor is for
    ring = data.points("8gaussians", count=1000)
    torch.testing.assert_close(ring.centres.norm(dim=1), torch.full((8,), 2 / 1.414))
    assert ring.std == pytest.approx(0.02 / 1.414)
    assert torch.equal(ring.train, data.points("8gaussians", count=1000).train)
    assert not torch.equal(ring.train, data.points("8gaussians", count=1000, seed=1).train)
    roll = data.points("swissroll", count=1000)
    assert roll.centres is None
    assert len(roll.train) == 900
    assert 1 < float(roll.train.abs().max()) < 2.5
    with pytest.raises(ValueError, match="name='ring', expected one of"):
        data.points("ring")
    with pytest.raises(ValueError, match="count=1"):
        data.points("8gaussians", count=1)
    with pytest.raises(ValueError, match="'8gaussians' are points"):
        data.load("8gaussians")


def test_modes_by_hand():
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    samples = torch.tensor([[0.0, 0.0], [0.0, 0.29], [0.0, 0.35], [0.45, 0.0], [1.0, 0.1], [1.0, 0.6]])
    scores = metrics.mode_scores(samples, centres, 0.1, minimum=1)
    assert scores.covered == 2
    assert scores.within_3 == pytest.approx(3 / 6)
    assert scores.within_4 == pytest.approx(5 / 6)  # 0.6 of (1, 1) is at distance 0.4, give or take rounding
    p = [4 / 6, 1 / 6, 1 / 6]
    assert scores.kl == pytest.approx(sum(v * math.log(4 * v) for v in p))
    assert metrics.mode_scores(samples, centres, 0.1).covered == 1  # two at least


def test_points_spread_evenly_cover_no_mode():
    points = data.points("25gaussians", count=10)
    reach = float(points.centres.max()) * 1.25
    spread = (2 * torch.rand(10_000, 2, generator=torch.Generator().manual_seed(0)) - 1) * reach
    assert metrics.mode_scores(spread, points.centres, points.std, minimum=1).covered == 25
    assert metrics.mode_scores(spread, points.centres, points.std).covered == 0
    true = points.centres.repeat(400, 1) + points.std * torch.randn(
        10_000, 2, generator=torch.Generator().manual_seed(0)
    )
    assert metrics.mode_scores(true, points.centres, points.std).covered == 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(2, 2), 0.1), "expected .N, D. and .K, D."),
        ((torch.zeros(0, 2), torch.zeros(2, 2), 0.1), "expected .N, D. and .K, D."),
        ((torch.zeros(3, 2), torch.zeros(2, 3), 0.1), "expected .N, D. and .K, D."),
        ((torch.zeros(3, 2), torch.zeros(2, 2), 0.0), "std=0.0"),
    ],
)
def test_errors_of_mode_scores(arguments, message):
    with pytest.raises(ValueError, match=message):
        metrics.mode_scores(*arguments)


def test_image_scores_are_those_of_gaussians_with_known_moments():
    pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(4000, 1, 2, 2, generator=generator)
    fake = 0.5 * torch.randn(3000, 1, 2, 2, generator=generator) + 1
    scores = metrics.image_scores(real, fake, torch.nn.Flatten(), logits=lambda x: 20 * x.flatten(1))
    # ||m - m'||^2 + tr(S + S' - 2 (S S')^(1/2)) of N(0, 1) and N(1, 1/4) in four dimensions
    assert scores.fid == pytest.approx(4 * (1 + (1 - 0.5) ** 2), rel=0.03)
    assert scores.kid > 0.5
    assert 1 < scores.inception_score < 4
    same = metrics.image_scores(real[:2000], real[2000:], torch.nn.Flatten())
    assert same.fid < 0.02
    assert abs(same.kid) < 0.01
    assert same.inception_score is None
    assert metrics.image_scores(real, fake, torch.nn.Flatten()) == metrics.image_scores(real, fake, torch.nn.Flatten())


def test_image_scores_say_what_is_missing(monkeypatch):
    for name in ("torchmetrics", "torchmetrics.image.fid"):
        monkeypatch.setitem(sys.modules, name, None)
    images = torch.rand(4, 1, 2, 2)
    with pytest.raises(ImportError, match=r"need torchmetrics: pip install torchmetrics"):
        metrics.image_scores(images, images, torch.nn.Flatten())
    with pytest.raises(ValueError, match="expected two images at least, of one shape"):
        metrics.image_scores(images, images[:1], torch.nn.Flatten())
