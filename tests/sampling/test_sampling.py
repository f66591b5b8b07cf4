"""The cached sampler does what the standard loop does, for every model and for networks of the user's own."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from genfast import nn as gnn
from genfast.models import GatedPixelCNN, PixelCNN, PixelCNNPlusPlus, WaveNet
from genfast.sampling import CausalityError, LoweringError, Sampler, assert_causal, sample_equivalence, sampler

# name, model, shape, context
MODELS = {
    "pixelcnn": lambda: (PixelCNN(1, 8, 3, 5, 5), (1, 6, 7), None),
    "pixelcnn one layer": lambda: (PixelCNN(1, 5, 1, 3, 2), (1, 1, 1), None),
    "pixelcnn wide": lambda: (PixelCNN(1, 40, 2, 7, 256), (1, 5, 9), None),
    "pixelcnn colours": lambda: (PixelCNN(3, 9, 3, 5, 5), (3, 5, 6), None),
    "pixelcnn two colours": lambda: (PixelCNN(2, 34, 2, 3, 7), (2, 4, 5), None),
    "gated": lambda: (GatedPixelCNN(1, 8, 3, 5, 5), (1, 6, 7), None),
    "gated colours": lambda: (GatedPixelCNN(3, 12, 3, 3, 5), (3, 5, 4), None),
    "gated class": lambda: (GatedPixelCNN(3, 12, 2, 3, 5, context_channels=4), (3, 4, 5), torch.randn(3, 4)),
    "gated map": lambda: (GatedPixelCNN(1, 12, 2, 3, 5, context_channels=4), (1, 6, 7), torch.randn(3, 4, 6, 7)),
    "wavenet": lambda: (WaveNet(16, 8, 12, 3, 2), (1, 40), None),
    "wavenet k=3 conditional": lambda: (WaveNet(16, 20, 12, 3, 1, 3, context_channels=5), (1, 33), torch.randn(3, 5)),
    "wavenet local condition": lambda: (WaveNet(16, 8, 12, 3, 1, context_channels=5), (1, 21), torch.randn(3, 5, 21)),
    "pixelcnnpp": lambda: (PixelCNNPlusPlus(1, 8, 1, 3), (1, 8, 8), None),
    "pixelcnnpp colours": lambda: (PixelCNNPlusPlus(3, 20, 1, 3), (3, 8, 12), None),
    "pixelcnnpp few levels": lambda: (PixelCNNPlusPlus(3, 7, 2, 2, 5), (3, 4, 8), None),
}


def made(name):
    model, shape, context = MODELS[name]()
    with torch.no_grad():  # nothing may hide behind small weights
        for p in model.parameters():
            p.mul_(1.5)
    return model, shape, context


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_computes_what_the_network_does_and_draws_the_same_images(name):
    model, shape, context = made(name)
    report = sample_equivalence(model, shape, n=3, context=context)
    assert report.error < 2e-6
    assert report.different == 0
    assert report.passed


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (lambda: PixelCNN(), (1, 28, 28)),
        (lambda: GatedPixelCNN(3, 66), (3, 32, 32)),
        (lambda: PixelCNNPlusPlus(3, 40), (3, 32, 32)),
        (lambda: WaveNet(), (1, 3000)),
    ],
)
def test_teacher_forced_at_real_sizes(model, shape):
    model = model().eval()
    x = torch.randint(256, (3, *shape))
    with torch.no_grad():
        expected = model(x)
    found = model.sampler.teacher_forced(x)
    assert float((found - expected).norm() / expected.norm()) < 2e-6


def test_a_sampler_keeps_few_programs():
    model = PixelCNN(1, 8, 2, 3, 4)
    for side in range(3, 3 + 2 * sampler.SHAPES):
        model.sample(1, (1, side, side))
    assert len(model.sampler._prepared) <= sampler.SHAPES


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["v3", "base"])
def test_every_instruction_set(isa):
    if sys.platform == "darwin" or os.uname().machine not in ("x86_64", "amd64"):
        pytest.skip("only x86-64 has several instruction sets")
    script = (
        "import torch\nfrom tests.sampling.test_sampling import MODELS, made\nfrom genfast.sampling import "
        "sample_equivalence\n"
        "torch.manual_seed(0)\n"
        "for name in ('pixelcnn wide', 'gated colours', 'wavenet', 'pixelcnnpp colours'):\n"
        "    m, s, c = made(name)\n    r = sample_equivalence(m, s, n=3, context=c)\n    assert r.passed, (name, r)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"GENFAST_CPU_ISA": isa},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["pixelcnn colours", "gated map", "wavenet", "pixelcnnpp colours"])
def test_the_number_of_images_and_of_threads_does_not_change_an_image(name):
    model, shape, context = made(name)
    n = 23
    context = None if context is None else torch.randn(n, *context.shape[1:])
    uniforms = torch.rand(n, model.uniforms_per_pixel(), *shape[1:])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(model.sample(n, shape, uniforms=uniforms, context=context))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    one = model.sample(1, shape, uniforms=uniforms[4:5], context=None if context is None else context[4:5])
    assert torch.equal(one[0], results[0][4])


def test_many_images_in_bounded_memory(monkeypatch):
    model = PixelCNN(1, 8, 2, 3, 4)
    uniforms = torch.rand(100, 1, 5, 5)
    whole = model.sample(100, (1, 5, 5), uniforms=uniforms)
    floats = model.sampler.prepare((1, 5, 5)).image_floats
    monkeypatch.setattr(sampler, "WAVE", 3 * floats * 4)
    seen = []
    empty = sampler._allocator.empty_strided
    monkeypatch.setattr(
        sampler._allocator, "empty_strided", lambda shape, *rest: seen.append(shape[0]) or empty(shape, *rest)
    )
    parts = model.sample(100, (1, 5, 5), uniforms=uniforms)
    assert torch.equal(whole, parts)
    assert len(seen) > 10
    assert max(seen) <= torch.get_num_threads() * 3 * floats + 64


def test_no_images():
    assert PixelCNN(1, 8, 2, 3, 4).sample(0, (1, 5, 5)).shape == (0, 1, 5, 5)


def test_temperature():
    model, shape, _ = made("pixelcnn")
    uniforms = torch.rand(4, 1, *shape[1:])
    for temperature in (0.5, 2.0):
        drawn = [
            model.sample(4, shape, uniforms=uniforms, temperature=temperature, method=m) for m in ("cached", "naive")
        ]
        assert torch.equal(*drawn)
    cold = model.sample(2, shape, temperature=1e-4)
    logits = model.logits(cold).detach()
    assert torch.equal(logits.argmax(1), cold)
    model, shape, _ = made("pixelcnnpp")
    uniforms = torch.rand(4, 2, *shape[1:])
    drawn = [model.sample(4, shape, uniforms=uniforms, temperature=0.7, method=m) for m in ("cached", "naive")]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("name", ["pixelcnn colours", "gated", "pixelcnnpp colours", "wavenet"])
def test_a_prefix_is_kept_and_continued(name):
    model, shape, context = made(name)
    uniforms = torch.rand(3, model.uniforms_per_pixel(), *shape[1:])
    whole = model.sample(3, shape, uniforms=uniforms)
    rows = shape[1] // 2
    again = model.sample(3, shape, uniforms=uniforms, prefix=whole[:, :, :rows])
    assert torch.equal(whole, again)
    other = torch.randint(model.levels, (1, shape[0], rows, *shape[2:]))
    for method in ("cached", "naive"):
        drawn = model.sample(3, shape, uniforms=uniforms, prefix=other, method=method)
        assert torch.equal(drawn[:, :, :rows], other.expand(3, *other.shape[1:]))
    assert torch.equal(drawn, model.sample(3, shape, uniforms=uniforms, prefix=other))
    full = model.sample(3, shape, prefix=whole)
    assert torch.equal(full, whole)


def test_a_changed_weight_is_seen():
    model = PixelCNN(1, 8, 2, 3, 4)
    uniforms = torch.rand(4, 1, 6, 6)
    first = model.sample(4, (1, 6, 6), uniforms=uniforms)
    program = model.sampler.prepare((1, 6, 6))
    assert model.sampler.prepare((1, 6, 6)) is program
    optimizer = torch.optim.SGD(model.parameters(), lr=50.0)
    model.log_prob(first).sum().backward()
    optimizer.step()
    assert model.sampler.prepare((1, 6, 6)) is not program
    second = model.sample(4, (1, 6, 6), uniforms=uniforms)
    assert not torch.equal(first, second)
    assert torch.equal(second, model.sample(4, (1, 6, 6), uniforms=uniforms, method="naive"))
    model.load_state_dict(PixelCNN(1, 8, 2, 3, 4).state_dict())
    drawn = [model.sample(4, (1, 6, 6), uniforms=uniforms, method=m) for m in ("cached", "naive")]
    assert torch.equal(*drawn)


def test_masked_weights_never_enter_whatever_they_hold():
    model = PixelCNN(3, 9, 2, 3, 4)
    uniforms = torch.rand(2, 3, 4, 5)
    clean = model.sample(2, (3, 4, 5), uniforms=uniforms)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, gnn.MaskedConv2d):
                m.weight[~m.mask] = float("nan")
    assert torch.equal(clean, model.sample(2, (3, 4, 5), uniforms=uniforms))


def test_weight_norm_is_folded():
    model = PixelCNN(1, 8, 3, 3, 4)
    for m in list(model.modules()):
        if isinstance(m, gnn.MaskedConv2d):
            gnn.weight_norm(m)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("original0"):
                p.mul_(1.7)
    assert sample_equivalence(model, (1, 5, 6)).passed
    plus = PixelCNNPlusPlus(1, 6, 1, 2)
    for m in list(plus.modules()):
        if isinstance(m, nn.Conv2d):
            nn.utils.parametrizations.weight_norm(m)
    assert sample_equivalence(plus, (1, 4, 8)).passed


class Custom(nn.Module):
    """Residuals, skips, concatenation, dilation, groups, both blocks of a user's own, and every activation."""

    def __init__(self):
        super().__init__()
        self.scale = gnn.ScaleLevels(6)
        self.first = gnn.MaskedConv2d(1, 12, (3, 5), mask_type="A")
        self.left = gnn.MaskedConv2d(12, 12, 3, mask_type="B", dilation=2, groups=3)
        self.even = gnn.MaskedConv2d(12, 8, (2, 4), mask_type="B")
        self.stack = nn.Sequential(
            nn.ELU(), nn.Conv2d(20, 24, 1), gnn.GatedActivation(3), nn.Dropout(0.5), nn.Identity()
        )
        self.named = nn.ModuleDict({"tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "relu": nn.ReLU()})
        self.shift = gnn.Shift(down=1, right=2)
        self.out = nn.Conv2d(24, 6, 1)

    def forward(self, x):
        h = self.first(self.scale(x))
        a = self.named["tanh"](h) + 0.5 * torch.sigmoid(self.left(h)) * 1.5
        b = self.even(self.named["relu"](a).tanh())
        c = self.stack(torch.cat([a, b], dim=1))
        d = torch.add(c, self.shift(h))
        return self.out(nn.functional.elu(torch.cat((d, a / 2), 1)))


def test_a_users_own_network():
    assert sample_equivalence(Custom(), (1, 7, 6), n=3, levels=6).passed


def test_a_sequential_of_embedded_levels():
    embedded = nn.Sequential(gnn.LevelEmbedding(4, 7), gnn.MaskedConv2d(7, 4, 3, mask_type="A"))
    assert sample_equivalence(embedded, (1, 5, 6), levels=4).passed


class Video(nn.Module):
    """A masked decoder over (frame, row, column) with residuals, dilation, gates and a condition."""

    def __init__(self, colours=1, levels=4):
        super().__init__()
        c = dict(data_channels=colours)
        self.scale = gnn.ScaleLevels(levels)
        self.first = gnn.MaskedConv3d(colours, 12, 3, mask_type="A", **c)
        self.second = gnn.MaskedConv3d(12, 24, (3, 3, 5), dilation=(1, 2, 1), **c)
        self.gate = gnn.GatedActivation()
        self.condition = gnn.ConditionBias(3, 24)
        self.third = gnn.MaskedConv3d(12, 12, (2, 3, 3), center=(1, 1, 1), activation="relu", **c)
        self.out = gnn.MaskedConv3d(12, levels * colours, 1, **c)

    def forward(self, x, context):
        h = self.first(self.scale(x))
        h = h + self.gate(self.second(h), self.condition(context))
        return self.out(h + self.third(h))


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("condition", [(3, 3), (3, 3, 3, 5, 4)], ids=["vector", "map"])
def test_video(colours, condition):
    net, context = Video(colours), torch.randn(condition)
    assert_causal(
        net, (colours, 2, 3, 3), levels=4, context=context[:1, :, :2, :3, :3] if len(condition) > 2 else context[:1]
    )
    assert sample_equivalence(net, (colours, 3, 5, 4), n=3, levels=4, context=context).passed
    s = Sampler(net, levels=4)
    uniforms = torch.rand(3, colours, 3, 5, 4)
    whole = s.sample(3, (colours, 3, 5, 4), uniforms=uniforms, context=context)
    for method in ("cached", "naive"):
        again = s.sample(
            3, (colours, 3, 5, 4), uniforms=uniforms, context=context, prefix=whole[:, :, :2], method=method
        )
        assert torch.equal(whole, again)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        assert torch.equal(whole, s.sample(3, (colours, 3, 5, 4), uniforms=uniforms, context=context))
    finally:
        torch.set_num_threads(before)


def test_batch_normalisation_of_a_trained_network_is_folded():
    colours = dict(data_channels=3)
    net = nn.Sequential(
        gnn.ScaleLevels(4),
        gnn.MaskedConv2d(3, 9, 3, mask_type="A", **colours),
        nn.BatchNorm2d(9),
        nn.ReLU(),
        gnn.MaskedConv2d(9, 9, 3, **colours),
        nn.BatchNorm2d(9, affine=False),
        gnn.MaskedConv2d(9, 12, 1, **colours),
    )
    for _ in range(3):  # as training leaves it
        net(torch.randint(4, (8, 3, 6, 6)))
    assert sample_equivalence(net, (3, 5, 6), levels=4).passed


def test_blocked_colours():
    colours = dict(data_channels=3, group_order="blocked")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = gnn.ScaleLevels(4)
            self.first = gnn.GatedMaskedConv2d(3, 12, 3, mask_type="A", **colours)
            self.second = gnn.GatedMaskedConv2d(12, 12, 3, **colours)
            self.out = gnn.MaskedConv2d(12, 12, 1, **colours)

        def forward(self, x):
            x = self.scale(x)
            v, h, s = self.first(x, x)
            v, h, t = self.second(v, h)
            return self.out(s + t)

    # Blocked logits lie colour by colour, and both samplers read them so.
    report = sample_equivalence(Net(), (3, 5, 4), n=3, levels=4)
    assert report.passed, report
    assert_causal(Net(), (3, 3, 3), levels=4)
    with pytest.raises(CausalityError, match="depends on colour"):
        assert_causal(Net(), (3, 3, 3), levels=4, group_order="interleaved")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(8, 8, 3, padding=1), r"^1: is Conv2d.*sees the future.*MaskedConv2d"),
        (nn.GroupNorm(2, 8), r"^1.*: a .*GroupNorm has no pixel program"),
        (nn.BatchNorm2d(8, track_running_stats=False), r"^1.*: has no running statistics"),
        (nn.ConvTranspose2d(8, 8, 1), r"^1.*: a .*ConvTranspose2d has no pixel program"),
        (nn.ELU(0.5), r"^1: is ELU\(alpha=0.5\)"),
        (gnn.RowLSTM(8, 8), r"^1: a .*RowLSTM has no pixel program"),
        (gnn.DownShiftedConv2d(8, 8), "depends on the pixel that it predicts"),
    ],
)
def test_what_has_no_pixel_program_is_named_and_falls_back_only_when_asked(layer, message):
    net = nn.Sequential(gnn.MaskedConv2d(1, 8, 3, mask_type="A"), layer, gnn.MaskedConv2d(8, 4, 1))
    net = nn.Sequential(*net)
    s = Sampler(net, levels=4, input="unit")
    with pytest.raises(LoweringError, match=message):
        s.sample(1, (1, 4, 4), method="cached")
    wrapped = nn.Sequential(gnn.ScaleLevels(4), *net)
    assert Sampler(wrapped, levels=4).sample(1, (1, 4, 4), method="naive").shape == (1, 1, 4, 4)


def test_networks_that_see_their_own_pixel_or_colour_are_refused():
    own = nn.Sequential(gnn.ScaleLevels(4), gnn.MaskedConv2d(1, 4, 3, mask_type="B"))
    with pytest.raises(LoweringError, match="depends on the pixel that it predicts"):
        Sampler(own, levels=4).sample(1, (1, 4, 4))
    mixed = nn.Sequential(
        gnn.ScaleLevels(4), gnn.MaskedConv2d(3, 6, 3, mask_type="A", data_channels=3), nn.Conv2d(6, 12, 1)
    )
    with pytest.raises(LoweringError, match="2: lets colour 0 see colour 1 of its own pixel; give it data_channels=3"):
        Sampler(mixed, levels=4).sample(1, (3, 4, 4))
    with pytest.raises(LoweringError, match=r"has 5 channels, expected levels \* colours = 4"):
        Sampler(nn.Sequential(gnn.ScaleLevels(4), gnn.MaskedConv2d(1, 5, 3, mask_type="A")), levels=4).prepare(
            (1, 4, 4)
        )
    with pytest.raises(LoweringError, match="6 x 8 image does not divide by the 4"):
        PixelCNNPlusPlus(1, 4, 1, 1).sampler.prepare((1, 6, 8))


def test_control_flow_on_values_is_an_error_that_says_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = gnn.MaskedConv2d(1, 4, 3, mask_type="A")

        def forward(self, x):
            return self.conv(x.float()) if x.sum() > 0 else self.conv(-x.float())

    with pytest.raises(LoweringError, match="Net: its forward cannot be traced"):
        Sampler(Net(), levels=4).sample(1, (1, 4, 4), method="cached")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"method": "quick"}, ValueError, "method='quick'"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0"),
        ({"n": -1}, ValueError, "n=-1"),
        ({"shape": (1, 4)}, ValueError, r"shape=\(1, 4\), expected \(1, H, W\)"),
        ({"shape": (3, 4, 4)}, ValueError, r"shape=\(3, 4, 4\), expected \(1, H, W\)"),
        ({"shape": None}, ValueError, "shape=None"),
        (
            {"prefix": torch.zeros(1, 1, 5, 4, dtype=torch.long)},
            ValueError,
            r"prefix has shape \(1, 1, 5, 4\).*at most 4, 4",
        ),
        ({"prefix": torch.zeros(1, 1, 2, 3, dtype=torch.long)}, ValueError, r"prefix has shape \(1, 1, 2, 3\)"),
        ({"prefix": torch.zeros(3, 1, 2, 4, dtype=torch.long)}, ValueError, r"expected \(2 or 1, 1, at most 4, 4\)"),
        ({"prefix": torch.full((1, 1, 2, 4), 4)}, ValueError, "prefix holds values from 4 to 4, expected 0 to 3"),
        ({"prefix": torch.zeros(1, 1, 2, 4)}, TypeError, "prefix has dtype torch.float32"),
        ({"uniforms": torch.rand(2, 1, 4, 5)}, ValueError, r"uniforms have shape .*expected \(2, 1, 4, 4\)"),
        ({"context": torch.rand(3, 2)}, ValueError, "context has 3 rows, expected n=2"),
    ],
)
def test_bad_input(options, error, message):
    model = PixelCNN(1, 8, 2, 3, 4)
    arguments = {"n": 2, "shape": (1, 4, 4)} | options
    with pytest.raises(error, match=message):
        model.sample(arguments.pop("n"), arguments.pop("shape"), **arguments)


def test_bad_samplers_and_conditions():
    with pytest.raises(ValueError, match="head='gauss'"):
        Sampler(nn.Identity(), head="gauss")
    with pytest.raises(ValueError, match="levels=1"):
        Sampler(nn.Identity(), levels=1)
    model = GatedPixelCNN(1, 8, 2, 3, 4, context_channels=3)
    with pytest.raises(ValueError, match=r"context has shape \(2, 4\), expected \(N, 3\)"):
        model.sample(2, (1, 4, 4), context=torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"map of \(5, 4\) positions, expected \(4, 4\)"):
        model.sample(2, (1, 4, 4), context=torch.rand(2, 3, 5, 4))


def test_progress_and_ctrl_c(capsys, monkeypatch):
    model = PixelCNN(1, 8, 2, 3, 4)
    model.sample(2, (1, 6, 6), progress=True)
    calls = []

    def interrupted(**fields):
        calls.append(fields)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sampler, "_CPU", type("Stub", (), {"pixel_program": staticmethod(interrupted)}))
    with pytest.raises(KeyboardInterrupt):
        model.sample(2, (1, 6, 6), progress=True)
    assert len(calls) == 3  # a call for each row
    monkeypatch.undo()
    assert model.sample(2, (1, 6, 6)).shape == (2, 1, 6, 6)


def test_training_mode_is_restored_and_dropout_is_off():
    model = PixelCNNPlusPlus(1, 6, 1, 2, dropout=0.9)
    model.train()
    uniforms = torch.rand(2, 2, 4, 4)
    cached = model.sample(2, (1, 4, 4), uniforms=uniforms)
    assert torch.equal(cached, model.sample(2, (1, 4, 4), uniforms=uniforms, method="naive"))
    assert model.training


def test_copies_and_pickles_have_samplers_of_their_own():
    model = PixelCNN(1, 8, 2, 3, 4)
    uniforms = torch.rand(3, 1, 5, 5)
    expected = model.sample(3, (1, 5, 5), uniforms=uniforms)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(expected, other.sample(3, (1, 5, 5), uniforms=uniforms))
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(-3)
        assert not torch.equal(expected, other.sample(3, (1, 5, 5), uniforms=uniforms))
        assert torch.equal(expected, model.sample(3, (1, 5, 5), uniforms=uniforms))


def test_the_program_prints_and_counts_what_one_forward_pass_needs():
    model = PixelCNN(1, 64, 8, 7, 256)
    program = model.sampler.prepare((1, 28, 28))
    taps = 7 * (3 * 7 + 4) * 64 * 64  # type B at 7 x 7
    assert program.multiplications == pytest.approx(28 * 28 * (24 * 64 + taps + 64 * 256), rel=1e-12)
    text = str(program)
    assert "row begins:" in text
    assert "categorical(" in text
    assert "1344 products a channel" in text


def test_samples_follow_the_model():
    """Frequencies of all images of a tiny space against their probabilities."""
    small = PixelCNN(1, 8, 2, 3, 2)
    with torch.no_grad():
        for p in small.parameters():
            p.mul_(2)
    n = 40000
    drawn = small.sample(n, (1, 2, 2), generator=torch.Generator().manual_seed(0)).flatten(1)
    every = torch.cartesian_prod(*[torch.arange(2)] * 4)
    p = small.log_prob(every.view(-1, 1, 2, 2)).exp().detach()
    seen = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / n
    chi = (n * (seen - p) ** 2 / p).sum()
    assert chi < 37.7  # 15 degrees of freedom, 0.1%
