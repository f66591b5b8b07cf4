"""The Triton kernels of minibatch_stddev in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from genfast.kernels import minibatch_stddev as minibatch_stddev_kernels
from tests.triton.flow_cases import FORMS, FORWARD, GRADIENT, compare, each_dtype, strided


def check_minibatch_stddev(x, group_size=4, features=1, eps=1e-4, grad=None):
    y = compare(OPS["minibatch_stddev"], (x, group_size, features, eps), FORWARD[x.dtype])[0]
    grad = torch.randn_like(y) if grad is None else grad
    compare(OPS["minibatch_stddev_backward"], (grad, x, group_size, features, eps), GRADIENT[x.dtype])


@each_dtype
@pytest.mark.parametrize(
    ("shape", "group_size", "features"),
    [
        ((1, 1), 4, 1),
        ((6, 5), 3, 1),
        ((4, 2100), 2, 2),
        ((8, 3, 37), 4, 3),
        ((4, 4, 1300), 2, 2),
        ((3, 70, 3, 5), 4, 1),
        ((4, 6, 3, 5, 2), 1, 2),
        ((0, 3, 4), 4, 1),
        ((2, 3, 0), 4, 1),
    ],
)
def test_minibatch_stddev_shapes(shape, group_size, features, dtype):
    check_minibatch_stddev(torch.randn(shape).to(dtype), group_size, features)


@pytest.mark.parametrize("form", FORMS)
def test_minibatch_stddev_strides(form):
    x = strided(torch.randn(4, 6, 6, 4), form)
    wide = torch.randn(4, 8, 6, 4)
    for grad in (wide, strided(wide, form), torch.ones(()).expand(4, 8, 6, 4)):
        check_minibatch_stddev(x, 2, 2, grad=grad)


def test_minibatch_stddev_more_tiles_than_programs(monkeypatch):
    monkeypatch.setitem(minibatch_stddev_kernels.TUNABLE["forward"].now, "parts", 2)
    check_minibatch_stddev(torch.randn(4, 4, 1300), 2, 2)


def test_minibatch_stddev_64_bit_offsets(monkeypatch):
    monkeypatch.setattr(minibatch_stddev_kernels.View, "far", property(lambda self: True))
    check_minibatch_stddev(torch.randn(4, 6, 40), 2, 2)


def test_minibatch_stddev_of_a_far_mean():
    check_minibatch_stddev(4096 + torch.randint(-8, 8, (4, 3, 50)) / 64, eps=1e-8)
