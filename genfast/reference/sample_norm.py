"""The Euclidean norm of each sample (WGAN-GP, 1704.00028, equation 3): |x_n| over all but the batch axis."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_norm(x: Tensor, squared: bool = False) -> Tensor:
    """x (N, ...) to (N,), in float32 for half types. All derivatives are zero at a sample that is zero."""
    flat = (x if x.element_size() >= 4 else x.float()).flatten(1)
    if squared or not flat.shape[1]:
        return flat.square().sum(1)
    # |x| = m |x / m| for any constant m > 0: with the largest magnitude no square overflows or vanishes.
    largest = flat.detach().abs().amax(1)
    zero = largest == 0
    scale = torch.where(zero | largest.isinf(), 1, largest)
    sum_of_squares = (flat / scale.unsqueeze(1)).square().sum(1)
    return scale * torch.where(zero, 0 * sum_of_squares, torch.where(zero, 1, sum_of_squares).sqrt())


def sample_norm_backward(x: Tensor, norm: Tensor, grad: Tensor, squared: bool) -> Tensor:
    """g x / |x|, zero where |x| is; g 2 x for the square."""

    def per_sample(v: Tensor) -> Tensor:
        return v.reshape(-1, *(1,) * (x.dim() - 1))

    wide = x if x.element_size() >= 4 else x.float()
    if squared:
        return (2 * per_sample(grad) * wide).to(x.dtype)
    zero = norm == 0
    direction = wide / per_sample(torch.where(zero, 1, norm))
    return torch.where(per_sample(zero), 0, direction * per_sample(grad)).to(x.dtype)
