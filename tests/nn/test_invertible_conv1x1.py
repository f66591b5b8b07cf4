"""nn.InvertibleConv1x1: a bias beside its factors, errors."""

from __future__ import annotations

import pytest
import torch

from genfast import nn as gnn
from genfast import ops


def test_the_bias_of_an_invertible_convolution():
    torch.manual_seed(0)
    conv = gnn.InvertibleConv1x1(4).double()

    x, bias = torch.randn(2, 4, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    y, logdet = ops.invertible_conv1x1(x, conv.factors(), bias)
    plainly, same = conv(x)
    torch.testing.assert_close(y, plainly + bias[:, None, None])
    torch.testing.assert_close(logdet, same)
    torch.testing.assert_close(ops.invertible_conv1x1(y, conv.factors(), bias, inverse=True)[0], x)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected \(4,\)"):
        ops.invertible_conv1x1(x, conv.factors(), bias[:3])


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "InvertibleConv1x1: channels=0", lambda: gnn.InvertibleConv1x1(0)),
        (TypeError, "x has dtype torch.int64", lambda: gnn.InvertibleConv1x1(4)(torch.ones(2, 4, 4, 4).long())),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
