"""ops.actnorm: scales that are zero or negative, and errors."""

from __future__ import annotations

import pytest
import torch

from genfast import ops


def test_actnorm_with_a_zero_scale_is_not_invertible_and_says_so_in_its_logdet():
    x = torch.randn(2, 3, 4, 4)
    y, logdet = ops.actnorm(x, torch.tensor([1.0, 0.0, 2.0]), torch.zeros(3))
    assert bool((logdet == -torch.inf).all())
    assert bool((y[:, 1] == 0).all())
    back, _ = ops.actnorm(x, torch.tensor([1.0, 0.0, 2.0]), torch.zeros(3), inverse=True)
    assert not bool(back[:, 1].isfinite().any())
    assert bool(back[:, [0, 2]].isfinite().all())


def test_actnorm_takes_negative_scales():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scale = torch.tensor([-2.0, 0.5, -0.1], dtype=torch.float64)
    y, logdet = ops.actnorm(x, scale, scale)
    torch.testing.assert_close(ops.actnorm(y, scale, scale, inverse=True)[0], x)
    torch.testing.assert_close(logdet, (16 * scale.abs().log().sum()).expand(2))


X = torch.zeros(2, 4, 4, 6)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "actnorm: x has dtype torch.int64", lambda: ops.actnorm(X.long(), torch.ones(4), torch.ones(4))),
        (
            ValueError,
            r"actnorm: scale has shape \(3,\), expected \(4,\)",
            lambda: ops.actnorm(X, torch.ones(3), torch.ones(4)),
        ),
        (ValueError, r"actnorm: bias has shape \(4, 1\)", lambda: ops.actnorm(X, torch.ones(4), torch.ones(4, 1))),
        (ValueError, r"actnorm: x has shape \(5,\)", lambda: ops.actnorm(torch.ones(5), torch.ones(5), torch.ones(5))),
        (
            ValueError,
            "bias is on meta and x on cpu",
            lambda: ops.actnorm(X, torch.ones(4), torch.ones(4, device="meta")),
        ),
    ],
)
def test_bad_input_is_named(error, message, call):
    with pytest.raises(error, match=message):
        call()
