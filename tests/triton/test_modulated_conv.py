"""The Triton kernels of modulated_conv in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from tests.triton import flow_cases as cases
from tests.triton.flow_cases import FORWARD, GRADIENT

SCALES = {
    "images": ((2, 5, 3, 7), (2, 1, 3, 7)),
    "one noise": ((3, 4, 5, 6), (1, 1, 5, 6)),
    "no noise": ((2, 9, 11, 13), None),
    "more channels than a tile": ((1, 1100, 2, 2), (1, 1, 2, 2)),
    "more positions than a tile": ((1, 3, 40, 40), (1, 1, 40, 40)),
    "vectors": ((5, 7), (5, 1)),
    "sequences": ((2, 3, 300), (1, 1, 300)),
    "empty batch": ((0, 3, 4, 4), (1, 1, 4, 4)),
    "no positions": ((2, 3, 0, 4), (2, 1, 0, 4)),
}


@pytest.mark.parametrize("form", ["dense", "channels_last", "channel slice"])
@pytest.mark.parametrize("label", SCALES)
def test_channel_scale_shapes(label, form):
    xs, ns = SCALES[label]
    if form == "channels_last" and len(xs) != 4:
        pytest.skip("no images")
    x, scale = cases.strided(torch.randn(xs), form), torch.randn(xs[0], 2 * xs[1])[:, ::2]
    noise = None if ns is None else torch.randn(ns)
    cases.compare(OPS["channel_scale"], (x, scale, noise), FORWARD[torch.float32])
    for grad in (torch.randn(xs), torch.ones(()).expand(xs)):
        cases.compare(OPS["channel_scale_backward"], (grad, x, scale, noise), GRADIENT[torch.float32])


@pytest.mark.parametrize("shape", [(3, 5, 3, 3), (2, 700, 1, 1), (1, 3, 11, 13), (0, 3, 3, 3), (2, 2, 0, 3)])
def test_tap_energy_shapes(shape):
    cases.compare(OPS["tap_energy"], (torch.randn(shape),), FORWARD[torch.float32])
