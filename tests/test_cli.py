"""The command line, as a person meets it."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

import genfast
from genfast import _registry, _verify, cli


def test_info_tells_versions_devices_and_backends(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    for word in (torch.__version__, "x86-64" if genfast.info()["cpu"]["kernels"].startswith("x86") else "baseline",
                 "affine_coupling", "threads", "not triton"):  # fmt: skip
        assert word in said
    found = genfast.info()
    assert found["ops"]["affine_coupling"]["cpu"]["serves"] == ["cpu", "reference"]
    assert "takes CUDA tensors" in found["ops"]["affine_coupling"]["cpu"]["cannot"]["triton"] or _interprets()


def _interprets():
    from genfast import _backend

    return _backend.triton_interprets()


def test_verify_passes_and_repeats_a_seed(capsys):
    assert cli.main(["verify", "--op", "actnorm", "--op", "squeeze", "--dtype", "float32", "--seed", "7"]) == 0
    first = capsys.readouterr().out
    assert "seed 7" in first
    assert "passed" in first
    assert "FAIL" not in first
    assert cli.main(["verify", "--op", "actnorm", "--op", "squeeze", "--dtype", "float32", "--seed", "7"]) == 0
    assert capsys.readouterr().out == first


def test_verify_fails_on_a_wrong_kernel_and_knows_new_ops(capsys, monkeypatch):
    op = _registry.OPS["actnorm"]

    def wrong(x, scale, bias, log_scale, inverse):
        y, logdet = op.reference(x, scale, bias, log_scale, inverse)
        return y * 1.001, logdet

    monkeypatch.setitem(op.preferred, "cpu", (wrong, op.dtypes["cpu"]))
    monkeypatch.setitem(op.kernels, "cpu", wrong)
    monkeypatch.setitem(_registry.OPS, "another", op)
    assert _verify.run(dtype="float32") == 1
    said = capsys.readouterr().out
    assert "FAIL" in said
    assert "another" in said


def test_train_then_sample(tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "samples.png"
    words = ["train", "glow", "--data", "digits", "--out", str(run), "--steps", "3", "--hidden", "4", "--flow-steps", "1"]
    assert cli.main(words) == 0
    assert "bits/dim on held-out images" in capsys.readouterr().out
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "10", "--temperature", "0.7"]) == 0
    with Image.open(picture) as image:
        assert image.size[0] > image.size[1]
    assert cli.main(words) == 2
    assert "genfast: error: train:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "glow", "--data", "nowhere"], "neither 'digits', 'photos'"),
        (["sample", "--checkpoint", "nowhere"], "holds no checkpoint"),
        (["verify", "--op", "nothing"], "op='nothing', expected one of"),
        (["verify", "--device", "cuda"], "no CUDA GPU is visible"),
        (["train", "glow", "--levels", "5", "--steps", "1"], "multiples of 2"),
        (["train", "glow", "--loss", "hinge", "--penalty-weight", "1"], "glow takes no --loss, --penalty-weight"),
        (["train", "glow", "--data", "8gaussians"], "are points"),
        (["train", "dcgan", "--data", "25gaussians"], "expected square images"),
        (["train", "cgan", "--data", "photos"], "cgan needs labels, and photos has none"),
        (["train", "gan", "--levels", "2"], "gan takes no --levels"),
        (["train", "glow", "--parallel", "fsdp"], "parallel='fsdp' needs a process group: start with torchrun"),
        (["train", "gan", "--parallel", "fsdp"], "gan takes no --parallel fsdp"),
        (["train", "gan", "--lazy", "0"], "lazy=0, expected at least 1"),
    ],
)
def test_errors_are_one_line_and_status_2(words, message, capsys, tmp_path, monkeypatch):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("genfast: error: ")
    assert message in said[0]


def test_the_demo_compares_and_draws(tmp_path, capsys):
    assert cli.main(["demo", "--seconds", "2", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    for word in ("genfast", "plain PyTorch", "ratio", "bits/dim", "loss curves: at most"):
        assert word in said
    apart = float(said.split("loss curves: at most ")[1].split()[0])
    assert apart < 1e-2
    assert "critic losses at most" in said
    for name in ("samples", "data", "loss", "interpolation", "pixelcnn", "wgan_gp"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 200


def test_train_and_sample_a_gan_on_points(tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "samples.png"
    words = [
        "train",
        "wgan-gp",
        "--data",
        "25gaussians",
        "--out",
        str(run),
        "--steps",
        "2",
        "--hidden",
        "8",
        "--batch-size",
        "16",
    ]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "2 steps, critic" in said
    assert "of 25 modes" in said
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "100"]) == 0
    with Image.open(picture) as image:
        assert min(image.size) > 400
    assert cli.main([*words, "--resume"]) == 0
    assert cli.main([*words, "--resume", "--loss", "hinge"]) == 2
    assert "was trained with Recipe(loss='wasserstein'" in capsys.readouterr().err


def test_a_gan_takes_its_recipe_from_the_command_line(tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "sevens.png"
    words = [
        "train", "cgan", "--data", "digits", "--out", str(run), "--steps", "2", "--hidden", "8", "--loss", "relativistic",
        "--penalty", "r1,r2", "--penalty-weight", "0.5", "--lazy", "2", "--critic-steps", "2", "--lr", "0.01",
        "--critic-lr", "0.02", "--ema", "0.5", "--latent-dim", "3", "--depth", "1", "--sample-every", "1",
    ]  # fmt: skip
    assert cli.main(words) == 0
    recipe = json.loads((run / "metrics.json").read_text())["recipe"]
    wanted = {"loss": "relativistic", "penalty": ["r1", "r2"], "weight": 0.5, "lazy": 2, "critic_steps": 2,
              "generator_lr": 0.01, "critic_lr": 0.02, "ema": 0.5}  # fmt: skip
    assert {k: recipe[k] for k in wanted} == wanted
    assert len(list((run / "progress").iterdir())) == 2
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "9", "--label", "7"]) == 0
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "--label", "70"]) == 2
    assert "labels outside [0, 10)" in capsys.readouterr().err
    none = ["train", "r3gan", "--out", str(tmp_path / "other"), "--width", "8", "--steps", "1", "--penalty", "none"]
    assert cli.main(none) == 0
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["recipe"]["penalty"] is None
