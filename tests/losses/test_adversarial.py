"""The losses of critics and generators: values by the papers' formulas, extreme logits, derivatives, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from genfast import losses, reference

GAMES = tuple(losses.CRITIC_LOSSES)


def logits(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def sigmoid(v):
    return 1 / (1 + math.exp(-v))


def by_hand(game, r, f):
    """(critic, generator) from Python numbers, with the logarithms of sigmoids that the papers print."""
    if game in ("minimax", "nonsaturating"):
        critic = -mean(math.log(sigmoid(v)) for v in r) - mean(math.log(1 - sigmoid(v)) for v in f)
        if game == "minimax":
            return critic, mean(math.log(1 - sigmoid(v)) for v in f)
        return critic, -mean(math.log(sigmoid(v)) for v in f)
    if game == "lsgan":
        return mean((v - 1) ** 2 for v in r) / 2 + mean(v**2 for v in f) / 2, mean((v - 1) ** 2 for v in f) / 2
    if game == "hinge":
        return mean(max(0, 1 - v) for v in r) + mean(max(0, 1 + v) for v in f), -mean(f)
    if game == "wasserstein":
        return mean(f) - mean(r), -mean(f)
    if game == "relativistic":
        return (
            -mean(math.log(sigmoid(a - b)) for a, b in zip(r, f)),
            -mean(math.log(sigmoid(b - a)) for a, b in zip(r, f)),
        )
    above, below = [v - mean(f) for v in r], [v - mean(r) for v in f]
    return (
        -mean(math.log(sigmoid(v)) for v in above) - mean(math.log(1 - sigmoid(v)) for v in below),
        -mean(math.log(sigmoid(v)) for v in below) - mean(math.log(1 - sigmoid(v)) for v in above),
    )


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("column", [False, True])
def test_both_sides_are_the_papers(game, column):
    r, f = logits(7, 7)
    critic, generator = by_hand(game, r.tolist(), f.tolist())
    if column:
        r, f = r[:, None], f[:, None]
    torch.testing.assert_close(losses.critic_loss(game, r, f).item(), critic, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses.generator_loss(game, f, r).item(), generator, rtol=1e-12, atol=1e-12)
    name = game.replace("-", "_")
    assert torch.equal(getattr(losses, f"{name}_critic")(r, f), losses.critic_loss(game, r, f))
    given = (f, r) if game.startswith("relativistic") else (f,)
    assert torch.equal(getattr(losses, f"{name}_generator")(*given), losses.generator_loss(game, f, r))
    assert losses.critic_loss(game, r, f).shape == ()


def test_every_game_has_both_sides():
    assert list(losses.CRITIC_LOSSES) == list(losses.GENERATOR_LOSSES)
    assert reference.GENERATOR_LOSSES is losses.GENERATOR_LOSSES


@pytest.mark.parametrize("game", GAMES)
def test_extreme_logits_stay_finite_with_a_gradient_that_says_where_to_go(game):
    for dtype in (torch.float32, torch.bfloat16):
        for sign in (1.0, -1.0):
            r = torch.full((4,), 1e4 * sign, dtype=dtype, requires_grad=True)
            f = torch.full((4,), -1e4 * sign, dtype=dtype, requires_grad=True)
            critic, generator = losses.critic_loss(game, r, f), losses.generator_loss(game, f, r)
            assert bool(torch.isfinite(critic))
            assert bool(torch.isfinite(generator))
            gradients = torch.autograd.grad(critic + generator, (r, f))
            assert all(bool(torch.isfinite(g).all()) for g in gradients)
    # a generator that loses for certain still learns, except under the minimax loss, which saturates
    f = torch.full((2,), -200.0, requires_grad=True)
    (g,) = torch.autograd.grad(losses.generator_loss(game, f, torch.full((2,), 200.0)), f)
    assert bool((g < -0.1).all()) != (game == "minimax")


@pytest.mark.parametrize("game", GAMES)
def test_derivatives(game):
    r, f = (t.requires_grad_() for t in logits(5, 5, seed=3))
    assert torch.autograd.gradcheck(lambda a, b: losses.critic_loss(game, a, b), (r, f))
    assert torch.autograd.gradcheck(lambda a, b: losses.generator_loss(game, b, a), (r, f))
    assert torch.autograd.gradgradcheck(lambda a, b: losses.critic_loss(game, a, b), (r, f))


def test_batches_may_differ_where_samples_are_not_compared_one_by_one():
    r, f = logits(7, 4)
    for game in GAMES:
        if game == "relativistic":
            with pytest.raises(ValueError, match=r"real \(7,\) and fake \(4,\) are compared one by one"):
                losses.critic_loss(game, r, f)
        else:
            assert losses.critic_loss(game, r, f).shape == ()


def test_lsgan_labels():
    r, f = logits(5, 6)
    found = losses.lsgan_critic(r, f, a=-1.0, b=2.0)
    torch.testing.assert_close(found, ((r - 2) ** 2).mean() / 2 + ((f + 1) ** 2).mean() / 2)
    torch.testing.assert_close(losses.lsgan_generator(f, c=0.5), ((f - 0.5) ** 2).mean() / 2)


def test_weight_clipping():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    before = [p.detach().clone() for p in module.parameters()]
    assert losses.clip_weights_(module, 0.1) is module
    for p, q in zip(module.parameters(), before):
        assert torch.equal(p, q.clamp(-0.1, 0.1))
    losses.clip_weights_(module)
    assert max(float(p.detach().abs().max()) for p in module.parameters()) <= 0.01
    losses.clip_weights_(torch.nn.ReLU())
    with pytest.raises(ValueError, match="bound=0"):
        losses.clip_weights_(module, 0)


def test_a_loss_compiles_whole():
    r, f = torch.randn(8), torch.randn(8)
    compiled = torch.compile(lambda a, b: losses.critic_loss("relativistic", a, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(r, f), F.softplus(f - r).mean())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: losses.critic_loss("wgan", *logits(2, 2)), ValueError, "loss='wgan', expected one of 'minimax'"),
        (lambda: losses.generator_loss("wgan", *logits(2)), ValueError, "loss='wgan', expected one of 'minimax'"),
        (lambda: losses.generator_loss("relativistic", *logits(2)), ValueError, "real is None"),
        (
            lambda: losses.hinge_critic(torch.zeros(2, 3), torch.zeros(2)),
            ValueError,
            r"real has shape \(2, 3\), expected one",
        ),
        (lambda: losses.hinge_critic(torch.zeros(2), torch.zeros(0)), ValueError, r"fake has shape \(0,\)"),
        (lambda: losses.hinge_generator(torch.zeros(2, dtype=torch.int64)), TypeError, "fake has dtype torch.int64"),
        (lambda: losses.lsgan_generator(torch.zeros(())), ValueError, r"fake has shape \(\)"),
        (
            lambda: losses.relativistic_critic(torch.zeros(3, 1), torch.zeros(3)),
            ValueError,
            r"real \(3, 1\) and fake \(3,\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
