"""Two processes take the steps of one: losses, gradients, weights, figures, samples and checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
import math

import pytest
import torch

from genfast import checkpoints, cli, data, distributed, models, training
from genfast.training.runs import draw, fitted

DIGITS = data.load("digits")
MODELS = {
    "glow": {"levels": 2, "steps": 2, "hidden": 4},
    "glow reversible": {"levels": 2, "steps": 2, "hidden": 4, "reversible": True},
    "realnvp": {"hidden": 4, "depth": 1},
    "nice": {"hidden": 8},
    "linear_flow": {},
    "maf": {"hidden": 8, "transforms": 2},
    "iaf": {"hidden": 8, "transforms": 1},
    "nsf": {"hidden": 8, "transforms": 1},
    "rnade": {"hidden": 8, "components": 2},
    "made": {"hidden": 16, "layers": 1, "orders": 2},
    "nade": {"hidden": 8},
    "pixelcnn": {"channels": 4, "layers": 2, "kernel_size": 3},
    "pixelrnn": {"channels": 4, "layers": 1},
    "gated_pixelcnn": {"channels": 4, "layers": 2, "kernel_size": 3},
    "pixelcnnpp": {"filters": 4, "blocks": 1, "mixtures": 2, "dropout": 0.0},
    "pixelcnnpp dropout": {"filters": 4, "blocks": 1, "mixtures": 2, "dropout": 0.5},
    "wavenet": {"layers": 2, "residual": 4, "skip": 4, "stacks": 1},
}
SHARDED = ("glow", "glow reversible", "maf", "made", "gated_pixelcnn", "wavenet")
CASES = [(label, "ddp") for label in MODELS if "dropout" not in label] + [(label, "fsdp") for label in SHARDED]
SINGLE = ("gated_pixelcnn", "pixelcnnpp", "pixelcnnpp dropout")  # their inputs are scaled in float32
UNEVEN = 15


def trainer(label, strategy="ddp", seed=0, **options):
    name = label.split()[0]
    view, config = fitted(name, DIGITS, MODELS[label])
    torch.manual_seed(0)
    model = models.build(name, **config)
    if name == "nsf":
        # Behind an activation norm of the first batch, splines that start as the identity leave the norm's scales
        # gradients of zero, whose rounding Adam would divide by its eps of 1e-8.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model = model if label in SINGLE else model.double()
    return training.Trainer(model, view, batch_size=UNEVEN, clip=0.02, seed=seed, parallel=strategy, **options)


def full(tensors):
    return {k: distributed.full(v).clone() for k, v in tensors.items()}


def samples(model, n):
    by_pixels = isinstance(model, models.AutoregressiveModel)
    sample = draw if by_pixels else distributed.sample
    return sample(model, n, generator=torch.Generator().manual_seed(3), temperature=0.9)


def run(label, strategy="ddp"):
    """What three steps of a model lead to."""
    made = trainer(label, strategy)
    found = {"losses": [made.step()["bits_per_dim"] for _ in range(3)]}
    found["gradients"] = full({k: p.grad for k, p in made.model.named_parameters() if p.grad is not None})
    found["weights"] = full(made.model.state_dict())
    found["evaluated"] = [made.evaluate(n)["bits_per_dim"] for n in (37, 1)]  # of one image the second rank has none
    model = distributed.whole(made.model.eval())
    found["samples"] = [samples(model, n) for n in (5, 1, 0)]
    found["losses"].append(made.step()["bits_per_dim"])  # it goes on
    return found


def runs():
    return {case: run(*case) for case in CASES}


@pytest.fixture(scope="module")
def both(ranks):
    first, second = ranks.run(runs)
    return first, second, {label: run(label) for label, strategy in CASES if strategy == "ddp"}


def apart(a, b):
    """The largest difference of two dicts of tensors, relative to the norm of each tensor."""
    assert a.keys() == b.keys()
    found = [
        float((a[k].double() - b[k].double()).norm() / b[k].double().norm().clamp_min(1e-3)) for k in b if b[k].numel()
    ]
    assert all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in b)
    return max(found)


@pytest.mark.parametrize(("label", "strategy"), CASES)
def test_two_processes_take_the_steps_of_one(both, label, strategy):
    first, second, one = both[0][label, strategy], both[1][label, strategy], both[2][label]
    categorical = issubclass(models.NAMES[label.split()[0]], models.AutoregressiveModel)
    close = 1e-5 if label in SINGLE else 1e-6 if categorical else 1e-12  # logits go to float32 in the likelihood
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=close)
    assert math.hypot(*(float(g.norm()) for g in one["gradients"].values())) == pytest.approx(0.02, rel=1e-3)  # clipped
    loose = max(10 * close, 1e-9)  # Adam divides gradients of 1e-17 by 1e-8
    assert apart(first["gradients"], one["gradients"]) < loose
    assert apart(first["weights"], one["weights"]) < loose
    assert apart(first["weights"], second["weights"]) == 0
    assert first["evaluated"] == second["evaluated"] == pytest.approx(one["evaluated"], rel=10 * close)
    for mine, theirs, alone in zip(first["samples"], second["samples"], one["samples"]):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, alone, rtol=1e-5, atol=1e-5)


# ---- checkpoints ----


def go_on(folder, strategy, steps, resume, label="glow"):
    """Trains up to ``steps``, from the checkpoint in ``folder`` if ``resume``, and leaves one there."""
    made = trainer(label, strategy)
    if resume:
        made.restore(checkpoints.latest(folder))
    while len(made.history) < steps:
        made.step()
    checkpoints.save(folder, label.split()[0], made.model, made.state(), DIGITS.bins)
    return [h["bits_per_dim"] for h in made.history], full(made.model.state_dict())


def go_on_unused(folder):
    """Of a model with parameters that no step uses."""
    return [
        go_on(folder / "unused", strategy, steps, resume, "gated_pixelcnn")
        for strategy, steps, resume in (("ddp", 2, False), ("fsdp", 4, True), ("ddp", 6, True))
    ][-1]


def dropped(folder):
    """Four steps with dropout, in one go and in two; the first draw of each rank in a step."""
    curves = [go_on(folder / "whole", "ddp", 4, False, "pixelcnnpp dropout")[0]]
    for steps in (2, 4):
        curves.append(go_on(folder / "parts", "ddp", steps, steps == 4, "pixelcnnpp dropout")[0])
    return curves, float(torch.rand(()))


def lost():
    """A step of which one rank's part is not finite, told on this one."""
    made = trainer("nice")
    made.step()
    if distributed.rank() == 1:
        real = made.task.bits
        made.task.bits = lambda *args: real(*args) * math.nan
    with pytest.raises(training.TrainingError) as told:
        made.step()
    return str(told.value), made.history


def legs(folder):
    """What two processes write and read for the test below."""
    found = {}
    for strategy in distributed.STRATEGIES:
        go_on(folder / f"2 {strategy} to 1", strategy, 3, False)
        found["1 to 2", strategy] = go_on(folder / f"1 to 2 {strategy}", strategy, 6, True)
    for strategy, other in (("ddp", "fsdp"), ("fsdp", "ddp")):
        go_on(folder / f"2 {strategy} to 2", strategy, 3, False)
        found[strategy, other] = go_on(folder / f"2 {strategy} to 2", other, 6, True)
    return found


def test_a_run_resumes_on_another_number_of_processes(ranks, tmp_path):
    losses, weights = go_on(tmp_path / "whole", "ddp", 6, False)
    for strategy in distributed.STRATEGIES:
        go_on(tmp_path / f"1 to 2 {strategy}", "ddp", 3, False)
    go_on(tmp_path / "1 to 1", "ddp", 3, False)
    again, same = go_on(tmp_path / "1 to 1", "ddp", 6, True)
    assert again == losses
    assert all(torch.equal(same[k], weights[k]) for k in weights)
    continued = dict(ranks.run(legs, tmp_path)[0])
    for strategy in distributed.STRATEGIES:
        continued[strategy, "2 to 1"] = go_on(tmp_path / f"2 {strategy} to 1", "ddp", 6, True)
    assert len(continued) == 6
    for curve, ended in continued.values():
        assert curve == pytest.approx(losses, rel=1e-12)
        assert apart(ended, weights) < 1e-9  # Adam divides gradients of 1e-17 by 1e-8
    files = {p.name for p in (tmp_path / "2 fsdp to 1" / "checkpoint-3" / "state").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp"}  # each process wrote its part
    assert checkpoints.load(tmp_path / "2 fsdp to 1")[1]["step"] == "6"


def test_parameters_that_no_step_uses_need_no_state(ranks, tmp_path):
    losses, weights = go_on(tmp_path / "whole", "ddp", 6, False, "gated_pixelcnn")
    curve, ended = ranks.run(go_on_unused, tmp_path)[0]
    assert curve == pytest.approx(losses, rel=1e-5)
    assert apart(ended, weights) < 1e-4
    again, same = go_on(tmp_path / "unused", "ddp", 6, True, "gated_pixelcnn")
    assert again == curve
    assert all(torch.equal(same[k], ended[k]) for k in ended)


def test_dropout_differs_by_rank_and_repeats(ranks, tmp_path):
    (curves, first), (same, second) = ranks.run(dropped, tmp_path)
    assert curves == same
    assert curves[0] == curves[2]  # bit by bit
    assert curves[0][:2] == curves[1]
    assert first != second


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(ranks):
    first, second = ranks.run(lost)
    assert first == second
    assert first[0].startswith("the loss is nan at step 2")
    assert len(first[1]) == 1


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    go_on(tmp_path, "ddp", 1, False)
    other = trainer("nice")
    with pytest.raises(ValueError, match=r"does not fit what it is to resume: it lacks model\.log_scale"):
        other.restore(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match="can be sampled from, not resumed"):
        trainer("glow").restore(tmp_path / "checkpoint-1")


def test_what_a_killed_run_left_is_cleaned(tmp_path):
    (tmp_path / ".checkpoint-7.partial" / "state").mkdir(parents=True)
    (tmp_path / ".checkpoint-1.partial").mkdir()
    go_on(tmp_path, "ddp", 1, False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1"]


# ---- the command line ----


def commands(folder):
    """Trains and samples as ``torchrun`` would have the two processes do; what is printed on this one."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = [
            cli.main(["train", "glow", "--out", str(folder / "two"), *SMALL, "--parallel", "fsdp"]),
            cli.main(["train", "glow", "--out", str(folder / "two"), *SMALL]),
            cli.main(["train", "glow", "--out", str(folder / "none"), *SMALL, "--batch-size", "1"]),
            *(cli.main(drawing(folder, name, "two")) for name in DRAWN),
            cli.main(drawing(folder, "cgan", "two") + ["--label", "70"]),
        ]
    return status, said.getvalue()


SMALL = ["--steps", "2", "--hidden", "4", "--flow-steps", "1", "--batch-size", "5"]
DRAWN = {"glow": 5, "cgan": 13, "vae": 3, "gated_pixelcnn": 1}
SHAPES = {
    "glow": {"shape": (1, 8, 8), "levels": 1, "steps": 1, "hidden": 4},
    "cgan": {"shape": (1, 8, 8), "classes": 10, "hidden": 8},
    "vae": {"shape": (1, 8, 8), "levels": 17, "hidden": 8, "base": 2},
    "gated_pixelcnn": {"channels": 4, "layers": 2, "kernel_size": 3, "levels": 17, "shape": (1, 8, 8)},
}


def drawing(folder, name, which):
    checkpoint, out = folder / name, folder / f"{name} {which}.png"
    return ["sample", "--checkpoint", str(checkpoint), "--out", str(out), "-n", str(DRAWN[name])]


def test_the_commands_share_their_work(ranks, tmp_path, capsys):
    for name, config in SHAPES.items():
        torch.manual_seed(0)
        checkpoints.save(tmp_path / name, name, models.build(name, **config), {"step": 0}, DIGITS.bins)
        assert cli.main(drawing(tmp_path, name, "one")) == 0
    assert cli.main(["train", "glow", "--out", str(tmp_path / "one"), *SMALL]) == 0
    (status, first), (same, second) = ranks.run(commands, tmp_path)
    assert status == same == [0, 2, 2, 0, 0, 0, 0, 2]
    assert "2 steps, " in first
    assert first.count("holds a run already") == second.count("holds a run already") == 1
    assert "batch_size=1 on 2 ranks, expected at least one item for each" in first
    assert "labels outside [0, 10)" in second
    assert second.count("\n") == 3  # the errors alone
    one, two = (json.loads((tmp_path / which / "metrics.json").read_text()) for which in ("one", "two"))
    assert two["parameters"] == one["parameters"]
    for figure in ("train_bits_per_dim", "test_bits_per_dim"):
        assert two[figure] == pytest.approx(one[figure], rel=1e-5)
    assert (tmp_path / "two" / "loss.png").exists()
    for name in DRAWN:
        assert (tmp_path / f"{name} one.png").read_bytes() == (tmp_path / f"{name} two.png").read_bytes(), name
