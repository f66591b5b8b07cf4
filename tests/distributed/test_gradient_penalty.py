"""Penalties through DistributedDataParallel and FSDP2: two ranks get the gradient of one process on the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import genfast
from genfast import distributed, ops, reference

from ..penalty import critics

N = 6


class Critic(nn.Module):
    """With a smooth and a piecewise-linear layer, a bias that no penalty sees, and a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Softplus(), nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.layers(x)


class Objective(nn.Module):
    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def forward(self, real, fake, epsilon):
        return ops.critic_step(self.critic, real, fake, epsilon=epsilon).loss


def given():
    """(critic, the whole batch, this rank's part of it): real, fake, epsilon."""
    torch.manual_seed(0)
    critic = Critic().double()
    whole = torch.randn(N, 5).double(), torch.randn(N, 5).double(), torch.rand(N).double()
    return critic, whole, tuple(t[distributed.portion(N)] for t in whole)


def direct(critic, batch, loss=True, penalty=True):
    real, fake, epsilon = batch
    found = critic(fake).mean() - critic(real).mean() if loss else 0
    if penalty:
        at = epsilon[:, None] * real + (1 - epsilon[:, None]) * fake
        found = found + reference.gradient_penalty(critic, at, "wgan-gp", 10.0, 1.0)[0]
    return found


def beside(d, r, f, e):
    (d(f).mean() - d(r).mean() + ops.gradient_penalty(d, r, f, epsilon=e)).backward()


def together(d, r, f, e):
    ops.critic_step(d, r, f, epsilon=e, batching="together").loss.backward()


def apart(d, r, f, e):
    ops.critic_step(d, r, f, epsilon=e).loss.backward()


def alone(d, r, f, e, **options):
    ops.gradient_penalty(d, r, f, epsilon=e, **options).backward()


def in_turn(d, r, f, e):
    (d(f).mean() - d(r).mean()).backward()
    alone(d, r, f, e)


def accumulated(d, r, f, e):
    with d.no_sync():
        (d(f).mean() - d(r).mean()).backward()
    alone(d, r, f, e)


def double_backward(d, r, f, e):
    alone(d, r, f, e, method="autograd")


def of_a_compiled_step(d, r, f, e):
    torch.compile(lambda: ops.critic_step(d, r, f, epsilon=e).loss, backend="aot_eager")().backward()


def by_objective(d, r, f, e):
    d(r, f, e).backward()


PATTERNS = (beside, together, apart, alone, double_backward)
OPTIONS = {
    "plain": {},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "views": {"gradient_as_bucket_view": True},
}


def error(critic, expected):
    gaps = [
        0.0 if p.grad is None else float((p.grad - (0 if q.grad is None else q.grad)).abs().max())
        for p, q in zip(critic.parameters(), expected.parameters())
    ]
    used = [p.grad for p in critic.layers.parameters()]
    return max(gaps) if all(g is not None for g in used[:-1]) else float("inf")


def _errors(option):
    found = {}
    wrapped = [(pattern, lambda c: DistributedDataParallel(c, **OPTIONS[option])) for pattern in PATTERNS]
    wrapped.append((by_objective, lambda c: DistributedDataParallel(Objective(c), **OPTIONS[option])))
    if option != "static":  # which PyTorch cannot combine with no_sync, nor with graphs that change
        sync = {} if option == "plain" else OPTIONS[option]
        wrapped.append((accumulated, lambda c: DistributedDataParallel(c, **sync)))
    if option == "unused":
        wrapped.append((in_turn, lambda c: DistributedDataParallel(c, **OPTIONS[option])))
    if option in ("plain", "unused"):
        wrapped.append((of_a_compiled_step, lambda c: DistributedDataParallel(c, **OPTIONS[option])))
        wrapped.append(
            (apart, lambda c: torch.compile(DistributedDataParallel(c, **OPTIONS[option]), backend="aot_eager"))
        )
        wrapped.append(
            (apart, lambda c: DistributedDataParallel(torch.compile(c, backend="aot_eager"), **OPTIONS[option]))
        )
    for i, (pattern, wrap) in enumerate(wrapped):
        critic, whole, part = given()
        expected, parallel = copy.deepcopy(critic), wrap(critic)
        for _ in range(2):  # of a static graph the first step is another than the rest
            critic.zero_grad()
            expected.zero_grad()
            pattern(parallel, *part)
            direct(expected, whole, loss=pattern not in (alone, double_backward)).backward()
            found[i, pattern.__name__] = max(error(critic, expected), found.get((i, pattern.__name__), 0.0))
        torch._dynamo.reset()
    return found


@pytest.mark.parametrize("option", OPTIONS)
def test_every_pattern_averages_the_gradients(ranks, option):
    for errors in ranks.run(_errors, option):
        assert {k: v for k, v in errors.items() if not v < 1e-13} == {}


KINDS = {
    "wgan-gp": ("wgan-gp",),
    "r1": ("r1",),
    "r1r2": ("r1", "r2"),
    "dragan": ("dragan",),
    "ar1": ("ar1",),
    "alone": ("wgan-gp",),
}


def _critics(names):
    """Half a batch each: the largest gap to the gradient of the whole, as its papers write it."""
    worst = {}
    for name in names:
        for label, kinds in KINDS.items():
            critic, real, fake, context = critics.CRITICS[name].make(torch.float64)
            expected = copy.deepcopy(critic)
            real, fake = (torch.cat((t, 0.5 * t))[:4] for t in (real, fake))
            context = tuple(torch.cat((c, c))[:4] for c in context)
            drawn = [reference.penalty_points(real, fake, k, torch.Generator().manual_seed(1)) for k in kinds]
            half = distributed.portion(4)
            sets = {"context": tuple(c[half] for c in context) or None}
            if kinds[0] in ("wgan-gp", "dragan", "ar1"):
                sets["points"] = drawn[0][half]
            parallel = DistributedDataParallel(critic)
            if label == "alone":
                ops.gradient_penalty(parallel, real[half], fake[half], **sets).backward()
            else:
                ops.critic_step(parallel, real[half], fake[half], loss="minimax", penalty=label, **sets).loss.backward()
            r, f = (expected(x, *context).flatten() for x in (real, fake))
            total = 0 if label == "alone" else reference.CRITIC_LOSSES["minimax"](r, f)
            for kind, at in zip(kinds, drawn):
                if kind == "ar1":
                    total = total + 10 * (r - expected(at, *context).flatten()).square().mean()
                else:
                    total = total + reference.gradient_penalty(expected, at, kind, 10.0, 1.0, context)[0]
            total.backward()
            pairs = [
                (p.grad, torch.zeros_like(p) if q.grad is None else q.grad)
                for p, q in zip(critic.parameters(), expected.parameters())
            ]
            worst[name, label] = max(float((g - q).norm() / (q.norm() + 1e-3)) for g, q in pairs)
    return worst


def test_critics_of_all_sorts_and_every_kind(ranks):
    for errors in ranks.run(_critics, ("dcgan", "layer_norm", "projection")):
        assert {k: v for k, v in errors.items() if not v < 1e-10} == {}


def _statistics():
    """Of a critic with buffers: what the ranks hold after two steps, and whether looking at it leaves the reducer
    alone."""
    torch.manual_seed(distributed.rank())  # the wrapper makes them equal
    critic = nn.Sequential(
        genfast.nn.spectral_norm(nn.Linear(5, 8)),
        nn.BatchNorm1d(8),
        nn.LeakyReLU(0.2),
        nn.utils.spectral_norm(nn.Linear(8, 1)),
    ).double()
    parallel = DistributedDataParallel(critic)
    torch.manual_seed(distributed.rank())
    genfast.explain(parallel, torch.randn(3, 5).double())
    for _ in range(2):
        critic.zero_grad()
        apart(parallel, torch.randn(3, 5).double(), torch.randn(3, 5).double(), torch.rand(3).double())
        with torch.no_grad():
            for p in critic.parameters():
                p -= 0.1 * p.grad
    parallel(torch.randn(3, 5).double())
    with torch.no_grad():
        parallel(torch.randn(3, 5).double())
    return {k: v for k, v in critic.state_dict().items() if "running" not in k}


def test_weights_and_power_iterations_stay_equal(ranks):
    a, b = ranks.run(_statistics)
    assert a.keys() == b.keys()
    for k in a:
        assert torch.equal(a[k], b[k]), k


def _sharded():
    """Gradients of an objective sharded as a whole, and what is said of critics that are sharded themselves."""
    from torch.distributed.fsdp import fully_shard

    found, said = {}, {}
    for again in (False, True):
        critic, whole, part = given()
        critic.unused = None
        expected = copy.deepcopy(critic)
        objective = fully_shard(Objective(critic), reshard_after_forward=again)
        by_objective(objective, *part)
        direct(expected, whole).backward()
        pairs = zip(critic.parameters(), expected.parameters())
        found[again] = max(float((p.grad.full_tensor() - q.grad).abs().max()) for p, q in pairs)
    for which in ("critic", "layer"):
        critic, _, part = given()
        fully_shard(critic if which == "critic" else critic.layers[2])
        try:
            by_objective(fully_shard(Objective(critic)), *part)
        except ValueError as error:
            said[which] = str(error)
    return found, said


def test_sharded_objectives_are_exact_and_sharded_critics_are_refused(ranks):
    for found, said in ranks.run(_sharded):
        assert max(found.values()) < 1e-13
        assert (
            "critic gathers weights on its own, since it is sharded (fully_shard); leave the critic whole"
            in said["critic"]
        )
        assert "since its part 'layers.2' is sharded" in said["layer"]
        assert said["layer"].endswith("and shard that: fully_shard(objective)")
