"""nn.Permutation and nn.CircularShift: errors; what they compute is tested as every bijection is."""

from __future__ import annotations

import pytest
import torch

from genfast import nn as gnn


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"order=\[0, 0, 1\], expected a permutation", lambda: gnn.Permutation(3, [0, 0, 1])),
        (ValueError, "order='up', expected", lambda: gnn.Permutation(3, "up")),
        (ValueError, "Permutation: features=0", lambda: gnn.Permutation(0)),
        (ValueError, r"Permutation: x has shape \(2, 4\)", lambda: gnn.Permutation(3)(torch.zeros(2, 4))),
        (ValueError, "CircularShift: features=3 and bound=-1", lambda: gnn.CircularShift(3, bound=-1)),
        (ValueError, r"CircularShift: x has shape \(2, 4\)", lambda: gnn.CircularShift(3)(torch.zeros(2, 4))),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
