"""NADE, RNADE, DeepNADE and MADE: normalised, equal to their plain twins, sampled as they score, better than
independence."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from genfast import data, models, training
from genfast.models import MADE, NADE, RNADE, DeepNADE, plain


def every(dim, levels):
    return torch.cartesian_prod(*[torch.arange(levels)] * dim).view(-1, dim)


def louder(model, factor=3.0):
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


DISCRETE = [
    lambda: NADE(6, 9),
    lambda: NADE(4, 9, 3, activation="tanh", order="random"),
    lambda: MADE(6, 12, orders=2),
    lambda: MADE(4, 12, 1, 3),
    lambda: DeepNADE(6, 9, orders=2),
    lambda: DeepNADE(4, 9, 1, 3, activation="tanh"),
]


@pytest.mark.parametrize("make", DISCRETE)
def test_probabilities_of_all_vectors_sum_to_one(make):
    model = louder(make()).eval()
    with torch.no_grad():
        total = model.log_prob(every(model.dim, model.levels)).double().exp().sum()
    assert float(total) == pytest.approx(1, abs=2e-5)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dim", [1, 2])
def test_the_density_of_rnade_integrates_to_one(dim, rescale):
    torch.manual_seed(2)
    model = louder(RNADE(dim, 8, 3, rescale=rescale, order="reversed"), 1.5).double()
    with torch.no_grad():
        side = torch.linspace(-20, 20, 801 if dim == 2 else 20001, dtype=torch.float64)
        grid = torch.cartesian_prod(*[side] * dim).view(-1, dim)
        total = sum(model.log_prob(part).exp().sum() for part in grid.split(1 << 18)) * float(side[1] - side[0]) ** dim
    assert float(total) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("make", DISCRETE)
def test_the_nll_is_the_sum_of_conditionals(make):
    model = louder(make()).eval()
    x = torch.randint(model.levels, (5, model.dim))
    if getattr(model, "orders", torch.zeros(1)).shape[0] > 1:
        model.orders = model.orders[:1]
    with torch.no_grad():
        order = model.orders[0] if hasattr(model, "orders") else model.network.order
        total = torch.zeros(5)
        for d in order.argsort().tolist():
            later = order >= order[d]
            other = torch.where(later, torch.randint(model.levels, x.shape), x)  # what is not known yet plays no part
            logits = model.logits(other)[:, d]
            p = torch.stack([-torch.nn.functional.softplus(logits), -torch.nn.functional.softplus(-logits)], 1)
            p = p if model.levels == 2 else logits.log_softmax(-1)
            total += p.gather(1, x[:, d, None])[:, 0]
    torch.testing.assert_close(model.log_prob(x), total, rtol=1e-5, atol=1e-5)


def test_no_loss_with_a_sigmoid_of_its_own_is_given_probabilities():
    """log_prob of a model that is sure is near 0, which no sigmoid under a loss that has one reaches (0.313 a
    pixel)."""
    model = NADE(8, 4)
    with torch.no_grad():
        model.network.bias.fill_(20.0)
        model.network.readout.zero_()
    assert float(model.log_prob(torch.ones(1, 8, dtype=torch.int64)).detach()) > -1e-6


TWINS = [
    (NADE, plain(NADE), (10, 17, 2), {"context_features": 3, "order": "random"}),
    (NADE, plain(NADE), (10, 17, 4), {"activation": "relu"}),
    (MADE, plain(MADE), (10, 20, 2, 2), {"orders": 2}),
    (MADE, plain(MADE), (10, 20, 2, 3), {"context_features": 3}),
    (DeepNADE, plain(DeepNADE), (10, 12, 2, 2), {"orders": 2, "context_features": 3}),
    (DeepNADE, plain(DeepNADE), (10, 12, 2, 3), {}),
]


@pytest.mark.parametrize(("ours", "twin", "args", "options"), TWINS)
def test_the_plain_twin_has_the_same_weights_numbers_gradients_and_samples(ours, twin, args, options):
    torch.manual_seed(1)
    a = ours(*args, **options).eval()
    torch.manual_seed(1)
    b = twin(*args, **options).eval()
    assert a.config == b.config
    assert {k: v.shape for k, v in a.state_dict().items()} == {k: v.shape for k, v in b.state_dict().items()}
    for p, q in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.equal(p, q)
    x = torch.randint(a.levels, (6, 10))
    context = torch.randn(6, 3) if "context_features" in options else None
    found, expected = a.log_prob(x, context), b.log_prob(x, context)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(found.sum(), list(a.parameters()))
    for g, e in zip(grads, torch.autograd.grad(expected.sum(), list(b.parameters()))):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    uniforms = torch.rand(6, 10)
    draws = [
        m.sample(6, context=context, uniforms=uniforms, method=method, generator=torch.Generator().manual_seed(3))
        for m in (a, b)
        for method in ("cached", "naive")
    ]
    assert draws[0].dtype == torch.int64
    assert 0 <= int(draws[0].min()) <= int(draws[0].max()) < a.levels
    assert all(torch.equal(draws[0], d) for d in draws[1:])


def test_rnade_and_its_plain_twin():
    torch.manual_seed(1)
    a = RNADE(7, 11, 4, context_features=2, order="random")
    b = plain(RNADE)(**a.config)
    b.load_state_dict(a.state_dict())
    x, context, uniforms = torch.randn(5, 7), torch.randn(5, 2), torch.rand(5, 7, 2)
    torch.testing.assert_close(a.log_prob(x, context), b.log_prob(x, context), rtol=1e-5, atol=1e-5)
    found = a.sample(5, context=context, uniforms=uniforms)
    torch.testing.assert_close(found, b.sample(5, context=context, uniforms=uniforms), rtol=1e-4, atol=1e-4)


def test_rnades_scaled_gradients_are_those_of_the_means_times_the_deviations():
    model = RNADE(3, 5, 2)
    scaled = RNADE(**(model.config | {"scale_gradients": True}))
    scaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        for m in (model, scaled):
            m.network.readout.zero_()
            m.network.bias[:, 4:] = math.log(0.25)
    x = torch.randn(8, 3)
    grads = [torch.autograd.grad(m.log_prob(x).sum(), m.network.bias)[0] for m in (model, scaled)]
    torch.testing.assert_close(model.log_prob(x), scaled.log_prob(x))
    torch.testing.assert_close(grads[1][:, 2:4], 0.25 * grads[0][:, 2:4])
    torch.testing.assert_close(grads[1][:, :2], grads[0][:, :2])
    torch.testing.assert_close(grads[1][:, 4:], grads[0][:, 4:])


@pytest.mark.parametrize(
    "make", [*DISCRETE[:5:2], lambda: NADE(8, 9, order="random"), lambda: DeepNADE(8, 9, orders=3)]
)
def test_samples_come_as_often_as_their_probability_says(make):
    torch.manual_seed(4)
    model = louder(make()).eval()
    x = model.sample(20_000, generator=torch.Generator().manual_seed(0))
    base = model.levels ** torch.arange(model.dim)
    found = torch.bincount((x * base).sum(1), minlength=model.levels**model.dim) / len(x)
    space = every(model.dim, model.levels)
    with torch.no_grad():
        exact = torch.zeros_like(found).scatter_(0, (space * base).sum(1), model.log_prob(space).exp())
    assert float((found - exact).abs().max()) < 0.018  # 5 standard deviations of a frequency of one half


def test_what_is_known_stays_and_what_is_drawn_depends_on_it():
    torch.manual_seed(5)
    model = louder(DeepNADE(5, 16, orders=2)).eval()
    known = torch.tensor([False, True, False, True, False])
    given = torch.tensor([[0, 1, 0, 0, 0]]).expand(20_000, 5)
    x = model.sample(20_000, given=given, known=known)
    assert torch.equal(x[:, known], given[:, known])
    # The joint of the known and one unknown under the order that begins with the known.
    order = torch.tensor([3, 1, 4, 2, 5])
    features = order.argsort()
    with torch.no_grad():
        logits = model.conditionals(given[:1].float(), features)[0, :, 0]
    assert float(x[:, 0].float().mean()) == pytest.approx(float(logits[0].sigmoid()), abs=0.35)
    for make in (NADE(5, 16), MADE(5, 16), MADE(5, 16, levels=3), NADE(5, 16, 3, order="reversed")):
        y = make.sample(50, given=given[:50], known=known)
        assert torch.equal(y[:, known], given[:50][:, known])
        z = make.sample(3, prefix=torch.tensor([[1, 0], [0, 1], [1, 1]]))
        assert z[:, :2].tolist() == [[1, 0], [0, 1], [1, 1]]


def test_an_estimate_of_deep_nade_is_right_in_the_mean():
    torch.manual_seed(6)
    model = louder(DeepNADE(3, 8), 2.0)
    x = torch.tensor([[1, 0, 1]])
    exact = []
    with torch.no_grad():
        for order in ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)):
            out = model.conditionals(model.scaled(x), torch.tensor(order))
            exact.append(-model.nll(out, x).sum())
        model.train()
        found = model.log_prob(x.expand(60_000, 3))
    mean = torch.stack(exact).mean()
    assert float(found.mean()) == pytest.approx(float(mean), abs=5 * float(found.std()) / 60_000**0.5)


def test_conditionals_of_deep_nade_in_parts_equal_those_of_the_network():
    model = louder(DeepNADE(6, 10, levels=3, context_features=2))
    x, context, features = torch.rand(4, 6), torch.randn(4, 2), torch.randperm(6)
    model.rows = 90  # two steps at a time
    found = model.conditionals(x, features, context)
    for place, d in enumerate(features.tolist()):
        mask = torch.zeros(4, 6, dtype=torch.bool)
        mask[:, features[:place]] = True
        torch.testing.assert_close(found[:, d], model.network(x, mask, context)[:, d])


def test_made_takes_its_orders_in_turn_and_a_checkpoint_keeps_the_place():
    model = MADE(6, 12, orders=3)
    x = torch.randint(2, (4, 6))
    seen = []
    for _ in range(4):
        model.log_prob(x)
        seen.append(model.network.order.tolist())
    assert seen[0] == [1, 2, 3, 4, 5, 6]
    assert seen[3] == seen[0]
    assert len({tuple(s) for s in seen}) == 3
    other = MADE(**model.config)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.log_prob(x), model.log_prob(x))
    assert torch.equal(other.network.order, model.network.order)
    weights = [p.clone() for p in model.parameters()]
    model.eval().log_prob(x)
    assert all(torch.equal(p, q) for p, q in zip(weights, model.parameters()))  # no mask destroys what another needs


def test_models_are_copied_and_moved_with_their_order():
    model = NADE(6, 4, order="random")
    other = copy.deepcopy(model)
    third = NADE(6, 4)
    third.load_state_dict(model.state_dict())
    x = torch.randint(2, (3, 6))
    torch.testing.assert_close(other.log_prob(x), model.log_prob(x))
    torch.testing.assert_close(third.log_prob(x), model.log_prob(x))


@pytest.fixture(scope="module")
def digits():
    black_and_white = data.binarized(data.load("digits"))
    return data.Dataset("digits", black_and_white.train.flatten(1), black_and_white.test.flatten(1), 2)


def independent(view):
    """Bits per dimension of independent pixels with the training set's frequencies, smoothed by one count each."""
    count = torch.stack([(view.train == level).sum(0) + 1.0 for level in range(view.bins)])
    log_p = (count / count.sum(0)).log2()
    return float(-log_p.gather(0, view.test.long()).mean())


@pytest.mark.parametrize(
    ("make", "steps", "share"),
    [
        (lambda: NADE(64, 64), 200, 0.85),
        (lambda: MADE(64, 128, orders=2), 200, 0.9),
        (lambda: DeepNADE(64, 96), 300, 0.9),
    ],
)
def test_training_on_binarized_digits_beats_independent_pixels(digits, make, steps, share):
    torch.manual_seed(0)
    trainer = training.Trainer(make(), digits, batch_size=64, lr=5e-3)
    for _ in range(steps):
        trainer.step()
    assert trainer.evaluate()["bits_per_dim"] < share * independent(digits)


def test_training_rnade_on_a_table_beats_independent_gaussians():
    table = data.table("digits")
    torch.manual_seed(0)
    model = RNADE(64, 32, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(100):
        x = table.train[torch.randint(len(table.train), (64,))]
        loss = -model.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 50.0)
        optimizer.step()
    independent = torch.distributions.Normal(0.0, 1.0).log_prob(table.test).sum(1).mean()
    with torch.no_grad():
        found = model.log_prob(table.test).mean()
    assert float(found) > float(independent) + 35  # nats; they have 90


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "NADE: x has dtype torch.float32", lambda: NADE(4, 3).log_prob(torch.ones(2, 4))),
        (
            ValueError,
            r"MADE: x has shape \(2, 5\), expected \(N, 4\)",
            lambda: MADE(4, 3).log_prob(torch.ones(2, 5).long()),
        ),
        (ValueError, "DeepNADE: x holds values from 2 to 2", lambda: DeepNADE(4, 3).log_prob(torch.full((2, 4), 2))),
        (ValueError, "NADENetwork: hidden=0, expected a whole number", lambda: NADE(4, 0)),
        (ValueError, "NADENetwork: order=.*expected each of 1 to 3 once", lambda: NADE(3, 2, order=[1, 1, 2])),
        (ValueError, "NADENetwork: activation='elu'", lambda: NADE(3, 2, activation="elu")),
        (ValueError, "MADE: orders=0, expected at least 1", lambda: MADE(3, 2, orders=0)),
        (ValueError, "DeepNADE: layers=0, expected at least 1", lambda: DeepNADE(3, 2, layers=0)),
        (ValueError, "RNADE: components=0", lambda: RNADE(3, components=0)),
        (TypeError, "RNADE: x has dtype torch.int64", lambda: RNADE(3).log_prob(torch.ones(1, 3).long())),
        (ValueError, "NADENetwork.sample: temperature|NADE.sample: n=1", lambda: NADE(3, 2).sample(1, temperature=0.0)),
        (ValueError, "method='fast'", lambda: NADE(3, 2).sample(1, method="fast")),
        (
            ValueError,
            r"uniforms has shape \(2, 3\), expected \(1, 3\)",
            lambda: NADE(3, 2).sample(1, uniforms=torch.rand(2, 3)),
        ),
        (ValueError, "one of given and known is missing", lambda: NADE(3, 2).sample(1, given=torch.ones(1, 3).long())),
        (ValueError, "called without one", lambda: NADE(3, 2, context_features=2).log_prob(torch.ones(1, 3).long())),
        (ValueError, "called with one", lambda: DeepNADE(3, 2).log_prob(torch.ones(1, 3).long(), torch.ones(1, 2))),
    ],
)
def test_bad_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_the_command_line_trains_and_samples(tmp_path, capsys):
    from genfast.cli import main

    for name, options in (("made", ["--binary", "--orders", "2"]), ("nade", []), ("rnade", ["--components", "3"])):
        out = tmp_path / name
        words = [
            "train",
            name,
            "--data",
            "digits",
            "--hidden",
            "24",
            "--steps",
            "3",
            "--batch-size",
            "16",
            "--out",
            str(out),
        ]
        assert main([*words, *options]) == 0
        assert "bits/dim" in capsys.readouterr().out
        picture = tmp_path / f"{name}.png"
        assert main(["sample", "--checkpoint", str(out), "-n", "4", "--out", str(picture)]) == 0
        assert picture.stat().st_size > 100
    assert models.build("made", dim=4).dim == 4


@pytest.mark.parametrize(
    "make", [*DISCRETE, lambda: RNADE(4, 6, 2), lambda: plain(NADE)(6, 9), lambda: plain(NADE)(4, 9, 3)]
)
@pytest.mark.parametrize("method", ["cached", "naive"])
def test_parameters_that_are_not_finite_are_located(make, method):
    model = make()
    options = {} if isinstance(model, RNADE) else {"method": method}
    dimension = model.dim - 1
    with torch.no_grad():
        if hasattr(model.network, "bias"):
            model.network.bias[-1] = math.nan
            dimension = int(model.network.order.argmax())  # of its last step
        else:
            model.network.linears[-1].bias[-1] = math.nan
    with pytest.raises(
        FloatingPointError, match=rf"sample: the network's parameters of dimension {dimension} of sample 0"
    ):
        model.sample(3, **options)


def test_hidden_units_that_are_not_finite_are_located():
    for model in (NADE(6, 9, activation="relu"), MADE(6, 12), DeepNADE(6, 9)):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if name.endswith(("hidden_bias", "linears.0.bias")))[0] = (
                math.nan
            )
        with pytest.raises(FloatingPointError, match=r"parameters of dimension \d of sample 0 are not finite"):
            model.sample(2)
