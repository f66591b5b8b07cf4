"""nn.Split: halves and back, errors; nn.Squeeze is tested as every bijection is, in test_bijection.py."""

from __future__ import annotations

import pytest
import torch

from genfast import nn as gnn


def test_split_and_back():
    x = torch.randn(2, 5, 3, 3)
    (kept, out), logdet = gnn.Split()(x)
    assert kept.shape[1] == 3
    assert out.shape[1] == 2
    assert torch.equal(gnn.Split().inverse((kept, out))[0], x)
    assert bool((logdet == 0).all())


@pytest.mark.parametrize(
    ("error", "message", "call"), [(ValueError, r"Split: x has shape \(2, 1\)", lambda: gnn.Split()(torch.zeros(2, 1)))]
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
