"""ACGAN, InfoGAN, cycles, feature matching and historical averaging: values in float64, derivatives, errors."""

from __future__ import annotations

import math

import pytest
import torch

from genfast import losses
from tests.losses.test_adversarial import by_hand, logits, mean


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
        (lambda: losses.acgan_generator(torch.zeros(2), torch.zeros(2, 3), torch.zeros(2)), ValueError, "fake_labels"),
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
