"""Minibatch standard deviation (progressive growing of GANs, 1710.10196, section 3; StyleGAN2, 1912.04958): the batch
in groups, the standard deviation of every element over its group, and its mean over a feature as one more channel."""

from __future__ import annotations

import torch
from torch import Tensor


def _grouped(x: Tensor, group_size: int, features: int) -> Tensor:
    """(G, M, F, c, S): sample g M + m is member g of group m."""
    wide = x if x.element_size() >= 4 else x.float()
    group = min(group_size, x.shape[0])
    return wide.reshape(group, x.shape[0] // group, features, x.shape[1] // features, -1)


def minibatch_stddev(x: Tensor, group_size: int, features: int, eps: float) -> Tensor:
    """(N, C + F, ...) of x (N, C, ...)."""
    n, tail = x.shape[0], x.shape[2:]
    if not x.numel():
        return torch.cat((x, x.new_zeros((n, features, *tail))), 1)
    groups = _grouped(x, group_size, features)
    deviation = (groups.var(0, unbiased=False) + eps).sqrt()
    t = deviation.mean((2, 3)).repeat(len(groups), 1).to(x.dtype)
    return torch.cat((x, t.reshape(n, features, *[1] * len(tail)).expand(n, features, *tail)), 1)


def minibatch_stddev_backward(grad_y: Tensor, x: Tensor, group_size: int, features: int, eps: float) -> Tensor:
    """dx = d + k (x - mean) / sqrt(var + eps), k the gradient of the group's statistic over G and the number of
    elements."""
    d, rest = grad_y[:, : x.shape[1]], grad_y[:, x.shape[1] :]
    if not x.numel():
        return d.clone()
    groups = _grouped(x, group_size, features)
    away = groups - groups.mean(0)
    deviation = ((away * away).mean(0) + eps).sqrt()
    group, m, _, c, s = groups.shape
    k = rest.to(groups.dtype).reshape(group, m, features, s).sum((0, 3)) / (group * c * s)
    through = k[:, :, None, None] * away / deviation
    return (d.to(groups.dtype) + through.reshape(x.shape)).to(x.dtype)
