"""genfast.losses: values against formulas written out in float64, extreme logits, derivatives, errors."""

from __future__ import annotations

import inspect
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


def test_acgan():
    generator = torch.Generator().manual_seed(1)
    r, f = logits(4, 6)
    rc, fc = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (4, 6))
    ry, fy = (torch.randint(3, (n,), generator=generator) for n in (4, 6))

    def cross_entropy(scores, labels):
        picked = [math.exp(s[y]) / sum(map(math.exp, s)) for s, y in zip(scores.tolist(), labels.tolist())]
        return -mean(map(math.log, picked))

    critic, _ = by_hand("hinge", r.tolist(), f.tolist())
    found = losses.acgan_critic(r, f, rc, ry, fc, fy, loss="hinge", real_scale=2, fake_scale=0.5)
    assert found.item() == pytest.approx(critic + 2 * cross_entropy(rc, ry) + 0.5 * cross_entropy(fc, fy), rel=1e-12)
    found = losses.acgan_critic(r, f, rc, ry, loss="hinge")
    assert found.item() == pytest.approx(critic + cross_entropy(rc, ry), rel=1e-12)
    _, expected = by_hand("nonsaturating", r.tolist(), f.tolist())
    found = losses.acgan_generator(f, fc, fy, scale=0.1)
    assert found.item() == pytest.approx(expected + 0.1 * cross_entropy(fc, fy), rel=1e-12)
    scores = rc.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: losses.acgan_critic(r, f, s, ry), scores)


def test_infogan():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    mu, log_std = (torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    codes, values = torch.tensor([0, 1, 2, 3, 0]), torch.rand(5, 2, generator=generator, dtype=torch.float64)
    normal = torch.distributions.Normal(mu, log_std.exp())
    gaussian = -normal.log_prob(values).sum(1).mean()
    categorical = -torch.distributions.Categorical(logits=scores).log_prob(codes).mean()
    found = losses.infogan(scores, codes, mu, log_std, values, categorical=2.0, continuous=0.1)
    torch.testing.assert_close(found, 2 * categorical + 0.1 * gaussian)
    torch.testing.assert_close(losses.infogan((scores, scores), (codes, codes)), 2 * categorical)
    torch.testing.assert_close(losses.infogan(mean=mu, log_std=log_std, values=values), gaussian)
    assert torch.autograd.gradcheck(lambda *a: losses.infogan(a[0], codes, a[1], a[2], values), (scores, mu, log_std))


def test_cycle_and_identity():
    generator = torch.Generator().manual_seed(3)
    x, x2, y, y2 = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(4))
    by_elements = mean((x - x2).abs().flatten().tolist()) + mean((y - y2).abs().flatten().tolist())
    assert losses.cycle_consistency(x, x2, y, y2).item() == pytest.approx(10 * by_elements)
    assert losses.identity_mapping(x, x2, y, y2).item() == pytest.approx(5 * by_elements)
    assert losses.cycle_consistency(x, x, y, y).item() == 0
    assert torch.autograd.gradcheck(
        lambda a, b: losses.cycle_consistency(x, a, y, b), (x2.requires_grad_(), y2.requires_grad_())
    )


def test_feature_matching():
    generator = torch.Generator().manual_seed(4)
    real = [
        torch.randn(6, 3, generator=generator, dtype=torch.float64),
        torch.randn(6, 2, 4, generator=generator, dtype=torch.float64),
    ]
    fake = [
        torch.randn(5, 3, generator=generator, dtype=torch.float64),
        torch.randn(5, 2, 4, generator=generator, dtype=torch.float64),
    ]
    expected = sum((mean(r) - mean(f)).norm().item() ** 2 for r, f in zip(real, fake))
    assert losses.feature_matching(real, fake).item() == pytest.approx(expected)
    assert losses.feature_matching(real[0], real[0].flip(0)).item() == pytest.approx(0)
    assert torch.autograd.gradcheck(lambda f: losses.feature_matching(real[0], f), fake[0].requires_grad_())


def test_historical_averaging_holds_the_mean_of_all_it_saw():
    module = torch.nn.Linear(3, 2).double()
    history = losses.HistoricalAveraging(module)
    assert list(history.parameters()) == []
    held = sum(b.numel() for b in history.buffers())
    seen = [[p.detach().clone() for p in module.parameters()]]
    for _ in range(4):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        history.update()
        seen.append([p.detach().clone() for p in module.parameters()])
    assert sum(b.numel() for b in history.buffers()) == held
    means = [sum(at) / len(seen) for at in zip(*seen)]
    penalty = history()
    expected = sum(float((p.detach() - m).square().sum()) for p, m in zip(module.parameters(), means))
    assert penalty.item() == pytest.approx(expected)
    gradients = torch.autograd.grad(penalty, list(module.parameters()))
    for g, p, m in zip(gradients, module.parameters(), means):
        torch.testing.assert_close(g, 2 * (p - m))
    other = losses.HistoricalAveraging(torch.nn.Linear(3, 2).double())
    other.load_state_dict(history.state_dict())
    assert int(other.count) == 5
    assert all(torch.equal(a, b) for a, b in zip(other.buffers(), history.buffers()))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: losses.critic_loss("wgan", *logits(2, 2)), ValueError, "loss='wgan', expected one of 'minimax'"),
        (lambda: losses.generator_loss("wgan", *logits(2)), ValueError, "loss='wgan', expected one of 'minimax'"),
        (lambda: losses.generator_loss("relativistic", *logits(2)), ValueError, "real is None"),
        (lambda: losses.hinge_critic(torch.zeros(2, 3), torch.zeros(2)), ValueError, r"real has shape \(2, 3\), expected one"),
        (lambda: losses.hinge_critic(torch.zeros(2), torch.zeros(0)), ValueError, r"fake has shape \(0,\)"),
        (lambda: losses.hinge_generator(torch.zeros(2, dtype=torch.int64)), TypeError, "fake has dtype torch.int64"),
        (lambda: losses.lsgan_generator(torch.zeros(())), ValueError, r"fake has shape \(\)"),
        (lambda: losses.relativistic_critic(torch.zeros(3, 1), torch.zeros(3)), ValueError, r"real \(3, 1\) and fake \(3,\)"),
        (
            lambda: losses.acgan_generator(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2)),
            ValueError,
            "fake_labels",
        ),
        (
            lambda: losses.acgan_critic(*logits(2, 2), torch.zeros(2), torch.zeros(2).long()),
            ValueError,
            "real_classes has shape",
        ),
        (
            lambda: losses.acgan_critic(*logits(2, 2), torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2, 3)),
            ValueError,
            "go together",
        ),
        (lambda: losses.infogan(), ValueError, "no codes were given"),
        (lambda: losses.infogan(torch.zeros(2, 3)), ValueError, "1 logits and 0 codes"),
        (lambda: losses.infogan(mean=torch.zeros(2, 3)), ValueError, r"expected \(N, D\) all three"),
        (
            lambda: losses.cycle_consistency(*(torch.zeros(n, 2) for n in (1, 2, 1, 1))),
            ValueError,
            r"x_again has shape \(2, 2\)",
        ),
        (lambda: losses.feature_matching(torch.zeros(2, 3), torch.zeros(2, 4)), ValueError, r"\(3,\)\] in real"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_loss_compiles_whole():
    r, f = torch.randn(8), torch.randn(8)
    compiled = torch.compile(lambda a, b: losses.critic_loss("relativistic", a, b), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(r, f), F.softplus(f - r).mean())


def _arguments():
    """Every public loss that is a function, with arguments that it takes."""
    n, images, classes = torch.zeros(4), torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    logits = torch.zeros(4, 3)
    cycle = {"x": images, "y": images}
    calls = {
        "acgan_critic": {
            "real": n, "fake": n, "real_classes": logits, "real_labels": classes, "fake_classes": logits,
            "fake_labels": classes,
        },
        "acgan_generator": {"fake": n, "fake_classes": logits, "fake_labels": classes},
        "critic_loss": {"real": n, "fake": n}, "generator_loss": {"fake": n},
        "cycle_consistency": cycle | {"x_again": images, "y_again": images},
        "identity_mapping": cycle | {"x_mapped": images, "y_mapped": images},
        "elbo": {"log_likelihood": n, "kl": n}, "feature_matching": {"real": images, "fake": images},
        "importance_weighted_bound": {"log_weights": images}, "kl_to_bernoulli": {"activations": images},
        "infogan": {"logits": logits, "codes": classes, "mean": images, "log_std": images, "values": images},
        "log_likelihood": {"x": images, "parameters": images}, "total_variation": {"x": torch.rand(1, 3, 4, 4)},
    }  # fmt: skip
    for game in GAMES:
        name, both = game.replace("-", "_"), {"real": n, "fake": n}
        calls[f"{name}_critic"] = both
        calls[f"{name}_generator"] = both if game.startswith("relativistic") else {"fake": n}
    return calls


OPTIONS = {
    "critic_loss": {"loss": "hinge"}, "generator_loss": {"loss": "hinge"}, "kl_to_bernoulli": {"rho": 0.1},
    "log_likelihood": {"likelihood": "bernoulli"},
}  # fmt: skip


def test_the_losses_called_with_no_tensors_are_all():
    others = {"bits_per_dim", "clip_weights_", "random_features", "vgg_features"}  # which take numbers, modules, files
    functions = {n for n in losses.__all__ if callable(getattr(losses, n)) and not isinstance(getattr(losses, n), type)}
    assert functions - others == set(_arguments())


@pytest.mark.parametrize(
    "wrong", [None, 1.0, [[0.0]], "x", torch.zeros(4).numpy()], ids=["None", "float", "list", "str", "numpy"]
)
@pytest.mark.parametrize("name", sorted(_arguments()))
def test_what_is_no_tensor_is_refused_by_name(name, wrong):
    function, arguments = getattr(losses, name), _arguments()[name]
    function(**arguments, **OPTIONS.get(name, {}))
    optional = inspect.signature(function).parameters
    for argument in arguments:
        if wrong is None and optional[argument].default is not inspect.Parameter.empty:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^\w+: .*\b{argument}\b"):
            function(**{**arguments, argument: wrong}, **OPTIONS.get(name, {}))
