"""Packed weights are packed anew after every way to change them that can be seen."""

from __future__ import annotations

import copy

import pytest
import torch

from genfast import models


def maf():
    return models.MAF(6, hidden=8, transforms=2), lambda m: -m.log_prob(torch.ones(4, 6)).mean()


def pixelcnn():
    model = models.PixelCNN(channels=4, layers=2, kernel_size=3, levels=64, shape=(1, 5, 5))
    return model, lambda m: -m.log_prob(torch.ones(4, 1, 5, 5, dtype=torch.int64)).mean()


def drawn(model):
    return model.sample(16, generator=torch.Generator().manual_seed(0))


def optimised(kind):
    def change(model, loss):
        optimizer = kind(model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    return change


def loaded(model, loss):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.3 * torch.randn_like(p))
    model.load_state_dict(other.state_dict())


def replaced(model, loss):
    for p in model.parameters():
        p.data = p.data + 0.3 * torch.randn_like(p)


CHANGES = {
    "fused Adam": optimised(lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
    "fused SGD": optimised(lambda p: torch.optim.SGD(p, lr=0.05, fused=True)),
    "Adam": optimised(lambda p: torch.optim.Adam(p, lr=0.1)),
    "load_state_dict": loaded,
    "data replaced": replaced,
}


@pytest.mark.parametrize("build", [maf, pixelcnn])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_packed_anew(build, change):
    model, loss = build()
    model.eval()
    before = drawn(model)
    assert torch.equal(drawn(model), before)
    CHANGES[change](model, loss)
    after = drawn(model)
    fresh = type(model)(**model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert not torch.equal(after, before)
    assert torch.equal(after, drawn(fresh))
