"""losses.total_variation: its formula, flat and loud images, errors."""

from __future__ import annotations

import pytest
import torch

from genfast import losses


def variation_by_hand(x, kind):
    """Elementwise, of one sample with any number of spatial axes."""
    total = 0.0
    for index in torch.cartesian_prod(*[torch.arange(n) for n in x.shape]).reshape(-1, x.dim()).tolist():
        steps = []
        for axis in range(1, x.dim()):
            if index[axis] + 1 < x.shape[axis]:
                to = list(index)
                to[axis] += 1
                steps.append(float(x[tuple(to)] - x[tuple(index)]))
        squares = sum(s * s for s in steps)
        total += {"anisotropic": sum(map(abs, steps)), "isotropic": squares**0.5, "squared": squares}[kind]
    return total


@pytest.mark.parametrize("kind", ["anisotropic", "isotropic", "squared"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 2, 4, 5), (1, 1, 2, 3, 4), (2, 1, 1, 1)])
def test_total_variation_is_its_formula(kind, shape):
    x = torch.randn(shape, dtype=torch.float64)
    expected = torch.tensor([variation_by_hand(sample, kind) for sample in x], dtype=torch.float64)
    torch.testing.assert_close(losses.total_variation(x, kind=kind, reduction="none"), expected)
    torch.testing.assert_close(losses.total_variation(x, kind=kind, reduction="sum"), expected.sum())
    torch.testing.assert_close(losses.total_variation(x, kind=kind), expected.sum() / x.numel())
    assert torch.autograd.gradcheck(lambda x: losses.total_variation(x, kind=kind), x.requires_grad_())


@pytest.mark.parametrize("kind", ["anisotropic", "isotropic", "squared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_total_variation_of_flat_and_of_loud_images_is_finite(kind, dtype):
    x = torch.zeros(1, 3, 8, 8, dtype=dtype)
    x[..., 4:, :] = 1000
    x.requires_grad_()
    value = losses.total_variation(x, kind=kind, reduction="sum")
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.item(), 3.0 * 8 * (1000.0 if kind != "squared" else 1e6))
    value.backward()
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad[..., :3, :] == 0).all())
    assert bool((x.grad[..., 4, :] > 0).all())


def test_total_variation_says_what_is_wrong():
    with pytest.raises(ValueError, match="kind='l2'"):
        losses.total_variation(torch.zeros(1, 1, 2), kind="l2")
    with pytest.raises(ValueError, match="reduction='max'"):
        losses.total_variation(torch.zeros(1, 1, 2), reduction="max")
    with pytest.raises(TypeError, match="x is torch.uint8"):
        losses.total_variation(torch.zeros(1, 1, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"x has shape \(2, 2\)"):
        losses.total_variation(torch.zeros(2, 2))
