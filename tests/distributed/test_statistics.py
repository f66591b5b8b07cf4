"""Statistics of a batch that lies on two ranks: activation norms, batch norms of flows, and what they are to one
process."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from genfast import distributed
from genfast import nn as gnn

PARTS = {"even": 3, "uneven": 1, "none on the second": 6, "none on the first": 0}  # rows of the first rank, of 6
LAYERS = {
    "actnorm": lambda: gnn.ActNorm(4),
    "glow step": lambda: gnn.GlowStep(4, nn.Conv2d(2, 4, 3, padding=1)),
    "sequence": lambda: gnn.FlowSequential(gnn.ActNorm(4), gnn.InvertibleConv1x1(4), gnn.ActNorm(4)),
    "reversible": lambda: gnn.ReversibleSequential(gnn.ActNorm(4), gnn.GlowStep(4, nn.Conv2d(2, 4, 3, padding=1))),
    "batch norm": lambda: gnn.BatchNormFlow(4, over_ranks=True),
}


def images(shift=1.0):
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 + shift


def first_batch(name, rows):
    """(state, z, logdet) of a layer behind its first batch, of which the first rank has so many rows."""
    torch.manual_seed(0)
    layer = LAYERS[name]()
    part = slice(None) if distributed.size() == 1 else slice(0, rows) if distributed.first() else slice(rows, 6)
    z, logdet = layer(images()[part])
    return layer.state_dict(), z.detach(), logdet.detach()


def _first_batches():
    return {(name, parts): first_batch(name, rows) for name in LAYERS for parts, rows in PARTS.items()}


def test_layers_are_set_as_by_one_process(ranks):
    first, second = ranks.run(_first_batches)
    for (name, parts), (state, z, logdet) in first.items():
        expected, whole, dets = first_batch(name, 6)
        other = second[name, parts]
        for k, value in expected.items():
            assert torch.equal(state[k], other[0][k]), (name, parts, k)  # to the bit
            torch.testing.assert_close(state[k], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.cat((z, other[1])), whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat((logdet, other[2])), dets, rtol=1e-4, atol=1e-4)


def _nothing():
    """What both ranks say of a first batch that is empty on both, and the layer behind it."""
    said = []
    for layer in (gnn.ActNorm(4), gnn.BatchNormFlow(4, over_ranks=True)):
        try:
            layer(torch.zeros(0, 4, 3, 3))
        except ValueError as error:
            said.append(str(error))
        layer(images())
    return said


def test_an_empty_batch_is_refused_on_all_ranks(ranks):
    for norm, batch_norm in ranks.run(_nothing):
        assert "ActNorm: x has shape (0, 4, 3, 3); the first training batch must not be empty" in norm
        assert "BatchNormFlow: x has shape (0, 4, 3, 3); training needs at least 2" in batch_norm


def trained(rows, strategy="ddp"):
    """A flow with batch norms in float64, some steps on a batch: (losses, gradients of the last, running
    statistics)."""
    torch.manual_seed(0)
    flow = gnn.FlowSequential(
        gnn.BatchNormFlow(4),
        gnn.AffineCoupling(nn.Conv2d(2, 4, 3, padding=1)),
        gnn.BatchNormFlow(4),
        gnn.InvertibleConv1x1(4),
    ).double()
    part = slice(None) if distributed.size() == 1 else slice(0, rows) if distributed.first() else slice(rows, 6)

    def loss(x):
        z, logdet = flow(x)
        return (0.5 * z.square().flatten(1).sum(1) - logdet).sum() * (distributed.size() / 6)

    objective, losses = distributed.parallel(distributed.Objective(flow, loss)), []
    for i in range(2):
        flow.zero_grad()
        value = objective(images(float(i)).double()[part])
        value.backward()
        losses.append(distributed.total(float(value.detach()))[0] / distributed.size())
        with torch.no_grad():
            for p in flow.parameters():
                p -= 0.05 * p.grad
    return losses, [p.grad for p in flow.parameters()], copy.deepcopy(list(flow.buffers()))


def _trained():
    return [trained(rows) for rows in PARTS.values()]


def test_a_flow_with_batch_norms_trains_as_in_one_process(ranks):
    losses, gradients, buffers = trained(6)
    for found in ranks.run(_trained):
        for ours in found:
            assert ours[0] == pytest.approx(losses, rel=1e-10)
            for a, b in zip(ours[1] + ours[2], gradients + buffers):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
