"""The Triton kernels of bias_act in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from genfast._registry import OPS
from genfast.kernels import bias_act as bias_act_kernels
from genfast.reference.bias_act import ACTIVATIONS, PIECEWISE_LINEAR
from tests.triton.flow_cases import FORMS, FORWARD, GRADIENT, compare, each_dtype, strided


def check_bias_act(x, bias, act="lrelu", gain=1.5, clamp=0.8, grad=None, second=True):
    options = (act, 0.3, gain, clamp)
    compare(OPS["bias_act"], (x, bias, *options), FORWARD[x.dtype])
    grad = torch.randn_like(x) if grad is None else grad
    compare(OPS["bias_act_backward"], (grad, x, bias, *options), GRADIENT[x.dtype])
    if second and act not in PIECEWISE_LINEAR:
        compare(OPS["bias_act_second"], (torch.randn_like(x), grad, x, bias, *options), GRADIENT[x.dtype])


@each_dtype
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_activations(act, dtype):
    x, bias = (3 * torch.randn(2, 3, 37)).to(dtype), torch.randn(3).to(dtype)
    check_bias_act(x, bias, act, clamp=None)
    if dtype is torch.float32:  # what a rounded half type is clamped to is another element's
        check_bias_act(x, bias, act, gain=-1.5)


@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 5), (3, 2100), (700, 3), (2, 3, 1300), (2, 70, 3, 5), (2, 3, 3, 5, 2), (0, 3, 4)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_act_shapes(shape, with_bias):
    check_bias_act(torch.randn(shape), torch.randn(shape[1]) if with_bias else None, "swish")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_bias_act_strides(form, with_bias):
    x = strided(torch.randn(2, 5, 6, 4), form)
    bias = torch.randn(10)[::2] if with_bias else None
    for grad in (torch.randn(2, 5, 6, 4), strided(torch.randn(2, 5, 6, 4), form), torch.ones(()).expand(2, 5, 6, 4)):
        check_bias_act(x, bias, "softplus", grad=grad)


def test_bias_act_64_bit_offsets(monkeypatch):
    plain = bias_act_kernels._seen
    far = property(lambda self: True)
    monkeypatch.setattr(bias_act_kernels.View, "far", far)
    assert plain(None, torch.ones(2, 3))[0].far
    check_bias_act(torch.randn(2, 3, 50), torch.randn(3), "elu")


def test_bias_act_more_tiles_than_programs(monkeypatch):
    monkeypatch.setitem(bias_act_kernels.TUNABLE["backward"].now, "rows", 3)
    check_bias_act(torch.randn(5, 2, 1500), torch.randn(2), "tanh")


def test_bias_act_bias_of_another_dtype():
    for x, bias in ((torch.randn(2, 3, 5).half(), torch.randn(3)), (torch.randn(2, 3, 5), torch.randn(3).bfloat16())):
        y = compare(OPS["bias_act"], (x, bias, "lrelu", 0.2, 1.0, None), FORWARD[torch.float16])[0]
        found = compare(OPS["bias_act_backward"], (torch.randn_like(x), x, bias, "lrelu", 0.2, 1.0, None), 1e-2)
        assert [y.dtype, *(t.dtype for t in found)] == [x.dtype, x.dtype, bias.dtype]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_bias_act_extremes_element_by_element(act):
    """Every element by itself: the tails are as exact as the middle."""
    values = torch.cat([s * torch.logspace(-12, 1.9, 200) for s in (1.0, -1.0)]).reshape(1, 400)
    op, options = OPS["bias_act"], (act, 0.2, 1.0, None)
    y = op.kernels["triton"](values, None, *options)
    exact = op.reference(values.double(), None, *options)
    assert float(((y - exact) / exact.abs().clamp_min(1e-30)).abs().max()) < 2e-6
