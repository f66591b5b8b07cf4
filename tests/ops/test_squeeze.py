"""ops.squeeze and ops.unsqueeze: against PyTorch's pixel_unshuffle and by index, and errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from genfast import ops


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 3),
    c=st.sampled_from([1, 3, 5, 16]),
    h=st.integers(1, 4),
    w=st.integers(1, 9),
    f=st.integers(1, 4),
    order=st.sampled_from(["pixel_unshuffle", "space_to_depth"]),
    last=st.booleans(),
)
def test_squeeze_and_back(n, c, h, w, f, order, last):
    x = torch.randn(n, c, h * f, w * f)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y = ops.squeeze(x, f, order=order)
    assert torch.equal(ops.unsqueeze(y, f, order=order), x)
    if order == "pixel_unshuffle":
        assert torch.equal(y, F.pixel_unshuffle(x, f))
    else:
        i, j, k = f - 1, 0, c - 1
        assert torch.equal(y[:, (i * f + j) * c + k], x[:, k, i::f, j::f])


X = torch.zeros(2, 4, 4, 6)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "squeeze: x has 4x6 positions, expected multiples of factor=5", lambda: ops.squeeze(X, 5)),
        (ValueError, "unsqueeze: x has 4 channels, expected a multiple of factor.2 = 9", lambda: ops.unsqueeze(X, 3)),
        (ValueError, "squeeze: order='x', expected one of", lambda: ops.squeeze(X, order="x")),
        (ValueError, "squeeze: factor=0", lambda: ops.squeeze(X, 0)),
        (ValueError, r"squeeze: x has shape \(2, 4, 4\)", lambda: ops.squeeze(X[..., 0])),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
