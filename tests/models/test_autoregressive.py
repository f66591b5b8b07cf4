"""The autoregressive models: normalised, equal to their plain twins, and better on real digits than simple
baselines."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import genfast
from genfast import data, models, training
from genfast.models import GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, PixelRNN, WaveNet, plain


def every(shape, levels):
    """All images of a tiny space."""
    size = math.prod(shape)
    return torch.cartesian_prod(*[torch.arange(levels)] * size).view(-1, *shape)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: PixelCNN(1, 8, 3, 3, 3), (1, 2, 2)),
        (lambda: PixelCNN(3, 6, 2, 3, 2), (3, 2, 2)),
        (lambda: GatedPixelCNN(1, 8, 2, 3, 3), (1, 2, 2)),
        (lambda: GatedPixelCNN(3, 6, 2, 3, 2), (3, 2, 2)),
        (lambda: WaveNet(3, 8, 8, 2, 1), (1, 5)),
        (lambda: PixelRNN(1, 8, 2, "row", 3), (1, 2, 2)),
        (lambda: PixelRNN(1, 8, 2, "diagonal", 3), (1, 2, 2)),
        (lambda: PixelCNNPlusPlus(1, 4, 1, 2, 2), (1, 4, 4)),
    ],
)
def test_probabilities_of_a_tiny_space_sum_to_one(model, shape):
    model = model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
        total = sum(model.log_prob(x).double().exp().sum() for x in every(shape, model.levels).split(8192))
    assert float(total) == pytest.approx(1, abs=2e-5)


TWINS = [
    (PixelCNN, plain(PixelCNN), (3, 18, 3, 5, 6), {}, (3, 6, 7), None),
    (GatedPixelCNN, plain(GatedPixelCNN), (3, 12, 3, 3, 6), {"context_channels": 4}, (3, 6, 7), (4, 4)),
    (GatedPixelCNN, plain(GatedPixelCNN), (1, 12, 2, 5, 6), {"context_channels": 2}, (1, 6, 7), (4, 2, 6, 7)),
    (WaveNet, plain(WaveNet), (16, 8, 12, 3, 2), {"context_channels": 2}, (1, 30), (4, 2, 30)),
    (PixelCNNPlusPlus, plain(PixelCNNPlusPlus), (3, 8, 1, 3), {}, (3, 8, 8), None),
    (PixelRNN, plain(PixelRNN), (3, 12, 2, "row", 4), {}, (3, 4, 5), None),
    (PixelRNN, plain(PixelRNN), (3, 12, 2, "diagonal", 4), {}, (3, 4, 5), None),
]


@pytest.mark.parametrize(("ours", "twin", "args", "options", "shape", "context"), TWINS)
def test_the_plain_twin_has_the_same_weights_numbers_gradients_and_samples(ours, twin, args, options, shape, context):
    torch.manual_seed(1)
    a = ours(*args, **options)
    torch.manual_seed(1)
    b = twin(*args, **options)
    assert a.config == b.config
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters()):
        assert name == other
        assert torch.equal(p, q)
    b.load_state_dict(a.state_dict())
    a.load_state_dict(b.state_dict())
    x = torch.randint(a.levels, (4, *shape))
    h = None if context is None else torch.randn(context)
    found, expected = a.log_prob(x, h), b.log_prob(x, h)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-4)
    found.sum().backward()
    expected.sum().backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters()):
        if q.grad is None:
            assert p.grad is None, name
            continue
        assert float((p.grad - q.grad).norm()) <= 2e-5 * float(q.grad.norm()) + 1e-7, name
    uniforms = torch.rand(2, a.uniforms_per_pixel(), *shape[1:])
    h = None if h is None else h[:2]
    assert torch.equal(
        a.sample(2, shape, uniforms=uniforms, context=h), b.sample(2, shape, uniforms=uniforms, context=h)
    )


def test_the_likelihood_is_the_sum_of_the_conditionals():
    model = PixelCNN(3, 9, 2, 3, 5)
    x = torch.randint(5, (3, 3, 4, 5))
    logits = model.logits(x)
    assert logits.shape == (3, 5, 3, 4, 5)
    conditionals = logits.log_softmax(1).gather(1, x[:, None]).squeeze(1)
    torch.testing.assert_close(model.log_prob(x), conditionals.flatten(1).sum(1))
    torch.testing.assert_close(model.bits_per_dim(x), -conditionals.flatten(1).mean(1) / math.log(2))
    with pytest.raises(TypeError, match="a mixture has no logits"):
        PixelCNNPlusPlus(1, 4, 1, 1).logits(x[:, :1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PixelCNN(3, 64), ValueError, "PixelCNN: channels=64, expected a multiple of 3, in_channels=3"),
        (lambda: PixelCNN(kernel_size=4), ValueError, "kernel_size=4, expected an odd"),
        (lambda: PixelCNN(layers=0), ValueError, "layers=0"),
        (lambda: PixelCNN(levels=1), ValueError, "levels=1"),
        (lambda: PixelCNN(0), ValueError, "in_channels=0"),
        (lambda: PixelCNN(shape=(3, 4, 4)), ValueError, r"shape=\(3, 4, 4\), expected \(1, H, W\)"),
        (
            lambda: GatedPixelCNN(3, 64),
            ValueError,
            "GatedPixelCNN: channels=64, expected a multiple of 3, in_channels=3",
        ),
        (lambda: GatedPixelCNN(kernel_size=4), ValueError, "kernel_size=4"),
        (lambda: PixelCNNPlusPlus(2), ValueError, "in_channels=2, expected 1 or 3"),
        (lambda: PixelCNNPlusPlus(filters=0), ValueError, "filters=0"),
        (
            lambda: PixelCNNPlusPlus(1, 4, 1).log_prob(torch.zeros(1, 1, 6, 8, dtype=torch.long)),
            ValueError,
            "multiples of 4",
        ),
        (lambda: WaveNet(kernel_size=1), ValueError, "kernel_size=1"),
        (lambda: PixelRNN(kind="column"), ValueError, "kind='column'"),
        (lambda: PixelCNN(levels=4).log_prob(torch.zeros(1, 1, 4, 4)), TypeError, "x has dtype torch.float32"),
        (lambda: PixelCNN(levels=4).log_prob(torch.full((1, 1, 4, 4), 4)), ValueError, "from 4 to 4, expected 0 to 3"),
        (
            lambda: PixelCNN(levels=4).log_prob(torch.full((1, 1, 4, 4), -1)),
            ValueError,
            "from -1 to -1, expected 0 to 3",
        ),
        (lambda: PixelCNN(levels=4).log_prob(torch.zeros(1, 3, 4, 4).long()), ValueError, r"expected \(N, 1, H, W\)"),
        (lambda: WaveNet(4, 4, 4, 2, 1).log_prob(torch.zeros(1, 1, 4, 4).long()), ValueError, r"expected \(N, 1, L\)"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_empty_batches_and_small_images():
    model = PixelCNN(1, 8, 2, 7, 4)
    assert model.log_prob(torch.zeros(0, 1, 5, 5, dtype=torch.uint8)).shape == (0,)
    assert model.log_prob(torch.zeros(2, 1, 1, 1, dtype=torch.uint8)).shape == (2,)


def test_the_rows_and_columns_of_pixelcnnpp_begin_at_exact_zero():
    """The output of a shifted convolution is shifted with its bias, or the border would leak it (PixelCNN++ and its
    caches)."""
    model = PixelCNNPlusPlus(1, 4, 1, 1)
    with torch.no_grad():
        model.first_v.bias.fill_(3.0)
    x = model.ones(model.scale(torch.randint(256, (1, 1, 8, 8))))
    v = model.one_down(model.first_v(x))
    assert bool((v[:, :, 0] == 0).all())
    assert bool((v[:, :, 1] != 0).any())


def test_mu_law():
    audio = torch.linspace(-1, 1, 1001)
    x = models.mu_law_encode(audio)
    assert int(x.min()) == 0
    assert int(x.max()) == 255
    assert bool((x[1:] >= x[:-1]).all())
    assert torch.equal(models.mu_law_encode(models.mu_law_decode(torch.arange(256))), torch.arange(256))
    assert float((models.mu_law_decode(x) - audio).abs().max()) < 0.03


def test_checkpoints_rebuild_every_model():
    for name in ("pixelcnn", "gated_pixelcnn", "pixelcnnpp", "pixelrnn", "wavenet"):
        small = {"pixelcnnpp": {"filters": 4, "blocks": 1, "mixtures": 2}, "wavenet": {"layers": 2, "stacks": 1}}
        model = models.build(name, **small.get(name, {"channels": 8, "layers": 1}))
        again = models.build(name, **copy.deepcopy(model.config))
        again.load_state_dict(model.state_dict())


def test_a_compiled_training_step_is_the_eager_one():
    model = PixelCNN(1, 8, 2, 3, 4)
    x = torch.randint(4, (2, 1, 6, 6))

    def loss(x):
        return model.nll(model(x), x).mean()

    eager = torch.autograd.grad(loss(x), list(model.parameters()))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x), list(model.parameters())), eager):
        torch.testing.assert_close(a, b)


def _baselines(digits):
    """Bits per dimension on held-out digits: a histogram per pixel, and one per pixel given the pixel before (add
    one)."""
    train, test = digits.train.long().flatten(1), digits.test.long().flatten(1)
    levels, size = digits.bins, train.shape[1]
    histogram = torch.ones(size, levels)
    markov = torch.ones(size, levels, levels)
    before = [torch.cat((torch.zeros_like(t[:, :1]), t[:, :-1]), 1) for t in (train, test)]
    at = torch.arange(size)
    for i in range(size):
        histogram[i] += torch.bincount(train[:, i], minlength=levels)
        markov[i] += torch.bincount(before[0][:, i] * levels + train[:, i], minlength=levels**2).view(levels, levels)
    p = (histogram / histogram.sum(1, keepdim=True))[at, test]
    q = (markov / markov.sum(2, keepdim=True))[at, before[1], test]
    return [-float(v.log2().mean()) for v in (p, q)]


@pytest.mark.slow
def test_training_on_real_digits_beats_a_histogram_and_a_markov_chain():
    digits = data.load("digits")
    histogram, markov = _baselines(digits)
    assert markov < histogram
    torch.manual_seed(0)
    model = PixelCNN(1, 32, 5, 5, digits.bins, shape=digits.shape)
    trainer = training.Trainer(model, digits, batch_size=64, lr=2e-3)
    for _ in range(400):
        trainer.step()
    found = trainer.evaluate()["bits_per_dim"]
    # 1.93 where it was written, against 2.43 and 2.31; the margins leave room for another processor's rounding.
    assert found < histogram - 0.4
    assert found < markov - 0.3
    samples = model.sample(64, generator=torch.Generator().manual_seed(0))
    assert samples.shape == (64, *digits.shape)
    ink = samples.float().mean()
    assert 0.7 < float(ink / digits.train.float().mean()) < 1.3
    assert genfast.models.NAMES["pixelcnn"] is PixelCNN


@pytest.mark.parametrize("name", ["pixelcnn", "gated_pixelcnn", "pixelcnnpp", "pixelrnn", "wavenet"])
def test_every_model_trains_from_the_command_line_and_samples(name, tmp_path):
    from genfast import cli

    small = {"pixelcnnpp": ["--filters", "8"], "wavenet": ["--layers", "4"]}.get(
        name, ["--channels", "16", "--layers", "2"]
    )
    out = str(tmp_path / "run")
    assert cli.main(["train", name, "--data", "digits", "--steps", "3", "--batch-size", "8", "--out", out, *small]) == 0
    assert (tmp_path / "run" / "samples.png").exists()
    method = ["--method", "naive"] if name == "pixelrnn" else []
    assert cli.main(["sample", "--checkpoint", out, "--out", str(tmp_path / "s.png"), "-n", "3", *method]) == 0
    assert (tmp_path / "s.png").exists()


def test_photos_train_in_colour(tmp_path):
    from genfast import cli

    out = str(tmp_path / "run")
    words = [
        "train",
        "pixelcnn",
        "--data",
        "photos",
        "--size",
        "8",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--layers",
        "2",
    ]
    assert cli.main([*words, "--out", out, "--seed", "1"]) == 0
    model, _, _ = training.load_checkpoint(out)
    assert model.config["channels"] == 66
    assert cli.main(["train", "pixelcnn", "--levels", "4", "--out", str(tmp_path / "x")]) == 2
    assert cli.main(["train", "pixelcnn", "--filters", "4", "--out", str(tmp_path / "x")]) == 2


@pytest.mark.parametrize("kind", [PixelCNN, GatedPixelCNN, PixelRNN])
def test_the_default_width_fits_the_colours(kind):
    usual = {1: 32, 2: 32, 3: 36} if kind is PixelRNN else {1: 64, 2: 64, 3: 66}
    for colours, channels in usual.items():
        model = kind(in_channels=colours, layers=1, levels=4)
        assert model.config["channels"] == channels
        assert type(model)(**model.config)(torch.zeros(1, colours, 3, 3, dtype=torch.long)).shape == (
            1,
            4 * colours,
            3,
            3,
        )
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: channels=64, expected a multiple of \d, (twice )?in_channels=3"
    ):
        kind(in_channels=3, channels=64)
