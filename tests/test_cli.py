"""The command line, as a person meets it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from typing import get_args

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import genfast
from genfast import _registry, _verify, cli, models
from genfast.models.base_adversarial import CriticLoss, Game
from genfast.models.base_autoregressive_flow import Activation
from genfast.reference.masked_linear import ACTIVATIONS


def test_info_tells_versions_devices_and_backends(capsys):
    assert cli.main(["info"]) == 0
    said = capsys.readouterr().out
    for word in (
        torch.__version__,
        "x86-64" if genfast.info()["cpu"]["kernels"].startswith("x86") else "baseline",
        "affine_coupling",
        "threads",
        "not triton",
    ):
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
    words = [
        "train",
        "glow",
        "--data",
        "digits",
        "--out",
        str(run),
        "--steps",
        "3",
        "--hidden",
        "4",
        "--flow-steps",
        "1",
    ]
    assert cli.main(words) == 0
    assert "bits/dim on held-out images" in capsys.readouterr().out
    assert (
        cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "10", "--temperature", "0.7"]) == 0
    )
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
        (["train", "glow", "--steps", "-5"], "train: steps=-5, expected at least 1"),
        (["train", "wgan-gp", "--steps", "0"], "train: steps=0, expected at least 1"),
        (["train", "vae", "--minutes", "0"], "train: minutes=0.0, expected a positive number"),
        (["train", "glow", "--lr", "nan"], "train: lr=nan, expected a positive number"),
        (["train", "glow", "--batch-size", "0"], "train: batch_size=0, expected at least 1"),
        (["train", "gan", "--sample-every", "-1"], "sample_every=-1, expected at least 0"),
        (["train", "glow", "--data", ""], "data: '' is neither 'digits', 'photos'"),
        (["train", "glow", "--data", " "], "data: ' ' is neither 'digits', 'photos'"),
        (["train", "glow", "--device", "cuda"], "device='cuda', and "),
        (["train", "glow", "--device", "cuda:99"], "device='cuda:99', "),
        (["train", "glow", "--device", "meta"], "device='meta', expected cpu or cuda"),
        (["train", "glow", "--device", "abacus"], "device='abacus', expected cpu or cuda"),
        (["train", "glow", "--resume", "--out", "nowhere"], "'nowhere' holds no checkpoint to resume"),
        (
            ["train", "glow", "--out", "file.png/run"],
            "train: --out: the folder 'file.png/run' cannot be written to: Not a dir",
        ),
        (
            ["train", "glow", "--out", "file.png"],
            "train: --out: the folder 'file.png' cannot be written to: File exists",
        ),
        (["sample", "--checkpoint", "nowhere", "-n", "0"], "sample: n=0, expected at least 1"),
        (["sample", "--checkpoint", "nowhere", "--device", "cuda"], "device='cuda', and "),
        (
            ["style", "--content", "china", "--style", "flower", "--out", "s.docx"],
            "style: --out='s.docx' has the extension '.docx'",
        ),
        (["style", "--content", "china", "--style", "flower", "--out", "s"], "style: --out='s' has the extension ''"),
        (
            ["style", "--content", "china", "--style", "flower", "--sheet", "s.xbm"],
            "style: --sheet='s.xbm' has the extension",
        ),
        (
            ["style", "--content", "china", "--style", "flower", "--out", "file.png/s.png"],
            "style: --out: the folder 'file.png' cannot be written to",
        ),
        (
            ["style", "--content", "china", "--style", "flower", "--out", "folder.png"],
            "style: --out='folder.png' is a folder",
        ),
        (
            ["style", "--content", "china", "--style", "flower", "--out", "pipe.png"],
            "--out='pipe.png' is no regular file",
        ),
        (["style", "--content", "china", "--style", "flower", "--device", "cuda"], "device='cuda', and "),
        (["style", "--content", "china", "--style", "file.png"], "picture: 'file.png' cannot be read"),
        (["style", "--content", "pipe.png", "--style", "flower"], "'pipe.png' is neither a file nor one of"),
        (
            ["style", "--content", "china", "--style", "flower", "--network", "vgg19", "--weights", "file.png"],
            "cannot be read",
        ),
        (
            ["style", "--content", "china", "--style", "flower", "--network", "vgg19", "--weights", "pipe.png"],
            "is no file",
        ),
        (
            ["style", "--content", "china", "--style", "flower", "--background", "puce"],
            "background='puce', expected a colour",
        ),
        (["train", "glow", "--background", "puce"], "background='puce', expected a colour"),
        (["verify", "--json", "folder.png"], "verify: --json='folder.png' is a folder"),
        (["demo", "--seconds", "0"], "demo: seconds=0.0, expected a positive number"),
        (["demo", "--out", "file.png"], "demo: --out: the folder 'file.png' cannot be written to"),
    ],
)
def test_errors_are_one_line_and_status_2(words, message, capsys, tmp_path, monkeypatch):
    if ("cuda" in words or "cuda:99" in words) and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.png").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert cli.main(words) == 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "out") == ["file.png", "folder.png", "pipe.png"]
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("genfast: error: ")
    assert message in said[0]


@pytest.mark.slow
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
    covered = int(said.split(" of 25 modes")[0].split()[-1])
    assert covered <= 3  # where single ones of 10,000 samples fall on several by chance
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "100"]) == 0
    with Image.open(picture) as image:
        assert min(image.size) > 400
    assert cli.main([*words, "--resume"]) == 0
    assert cli.main([*words, "--resume", "--loss", "hinge"]) == 2
    assert "was trained with Recipe(loss='wasserstein'" in capsys.readouterr().err


def test_a_gan_takes_its_recipe_from_the_command_line(tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "sevens.png"
    words = [
        "train", "cgan", "--data", "digits", "--out", str(run), "--steps", "2", "--hidden", "8", "--loss",
        "relativistic",
        "--penalty", "r1,r2", "--penalty-weight", "0.5", "--lazy", "2", "--critic-steps", "2", "--lr", "0.01",
        "--critic-lr", "0.02", "--ema", "0.5", "--latent-dim", "3", "--depth", "1", "--sample-every", "1",
    ]  # fmt: skip
    assert cli.main(words) == 0
    recipe = json.loads((run / "metrics.json").read_text())["recipe"]
    wanted = {
        "loss": "relativistic",
        "penalty": ["r1", "r2"],
        "weight": 0.5,
        "lazy": 2,
        "critic_steps": 2,
        "generator_lr": 0.01,
        "critic_lr": 0.02,
        "ema": 0.5,
    }
    assert {k: recipe[k] for k in wanted} == wanted
    assert len(list((run / "progress").iterdir())) == 2
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "9", "--label", "7"]) == 0
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "--label", "70"]) == 2
    assert "labels outside [0, 10)" in capsys.readouterr().err
    none = ["train", "r3gan", "--out", str(tmp_path / "other"), "--width", "8", "--steps", "1", "--penalty", "none"]
    assert cli.main(none) == 0
    assert json.loads((tmp_path / "other" / "metrics.json").read_text())["recipe"]["penalty"] is None


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run on images and one on points."""
    folder = tmp_path_factory.mktemp("trained")
    words = ["--batch-size", "8", "--hidden", "4", "--steps", "1"]
    assert cli.main(["train", "glow", "--flow-steps", "1", "--out", str(folder / "glow"), *words]) == 0
    assert cli.main(["train", "gan", "--data", "8gaussians", "--out", str(folder / "gan"), *words]) == 0
    return folder


@pytest.mark.parametrize(
    ("model", "out", "message"),
    [
        ("glow", "s", "sample: --out='s' has the extension ''"),
        ("glow", "s.svg", "has the extension '.svg'"),
        ("glow", "s.xbm", "has the extension '.xbm'"),
        ("gan", "s.bmp", "has the extension '.bmp'"),
        ("gan", "s.pgf", "has the extension '.pgf'"),
        ("glow", "file.png/s.png", "sample: --out: the folder 'file.png' cannot be written to"),
        ("glow", "folder.png", "sample: --out='folder.png' is a folder"),
    ],
)
def test_what_cannot_be_written_is_known_before_samples_are_drawn(
    trained, tmp_path, capsys, monkeypatch, model, out, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.png").write_text("")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(cli.distributed, "sample", lambda *a, **k: pytest.fail("samples were drawn"))
    assert cli.main(["sample", "--checkpoint", str(trained / model), "--out", out]) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.png", "folder.png"]


@pytest.mark.parametrize(
    ("model", "out"), [("glow", "a.JPG"), ("glow", "new/a.webp"), ("gan", "a.svg"), ("gan", "a.pdf")]
)
def test_pictures_of_other_kinds_are_written(trained, tmp_path, capsys, model, out):
    assert cli.main(["sample", "--checkpoint", str(trained / model), "--out", str(tmp_path / out), "-n", "3"]) == 0
    assert (tmp_path / out).stat().st_size > 100


def test_a_folder_that_cannot_be_written_to_is_known_before_the_data_are_read(tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cli.data, "load", lambda *a, **k: pytest.fail("the data were read"))
    monkeypatch.setattr(
        cli._files.tempfile, "NamedTemporaryFile", refuse
    )  # the tests may run as root, whom nothing refuses
    for words in (["train", "glow"], ["train", "gan"], ["style", "--content", "china", "--style", "flower"], ["demo"]):
        out = tmp_path / ("s.png" if words[0] == "style" else "run")
        assert cli.main([*words, "--out", str(out)]) == 2
        assert "cannot be written to: Permission denied" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words", [["train", "glow"], ["train", "wgan-gp", "--data", "8gaussians"], ["train", "vae"], ["demo"]]
)
@pytest.mark.parametrize(
    ("missing", "command"), [("matplotlib", "pip install matplotlib"), ("sklearn", "pip install scikit-learn")]
)
def test_what_a_run_needs_is_known_before_it_trains(tmp_path, capsys, monkeypatch, words, missing, command):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "sklearn" and "8gaussians" in words:
        words = ["train", "wgan-gp", "--data", "swissroll"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].endswith(command)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["pixelcnn", "--channels", "8", "--layers", "1"],
        ["glow", "--hidden", "4", "--flow-steps", "1"],
        ["nade", "--hidden", "4"],
        ["vae", "--hidden", "4"],
        ["gan", "--hidden", "4"],
        ["wgan-gp", "--data", "8gaussians", "--hidden", "4"],
        ["dcgan", "--width", "4"],
    ],
)
def test_a_run_that_diverges_is_one_line_and_status_1(tmp_path, capsys, words):
    more = ["--steps", "12", "--batch-size", "8", "--lr", "1e6", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *words, *more]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "there is no checkpoint from before" in said.err
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_a_checkpoint_without_levels_is_one_line(trained, tmp_path, capsys):
    model, metadata, folder = genfast.training.load_checkpoint(trained / "glow")
    (tmp_path / "weights").mkdir()
    tensors = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, tmp_path / "weights" / "weights.safetensors", {**metadata, "bins": "1", "checksum": ""})
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "weights"), "--out", str(tmp_path / "s.png")]) == 2
    assert "bins='1', expected 2 to 65536" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_full_standard_output_is_one_line(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["info"]) == 2
    assert capsys.readouterr().err == "genfast: error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("name", models.NAMES)
def test_the_help_of_a_model_shows_the_options_of_its_constructor_with_defaults(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # one line for each option
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", name, "--help"])
    assert ended.value.code == 0
    section = capsys.readouterr().out.split("\nmodel:\n")[-1].split("\n\n")[0]
    shown = {}
    for line in re.split(r"\n  (?=--)", "\n" + section):
        if line.strip():
            line = " ".join(line.split())
            shown[re.match(r"--([\w-]+)", line)[1]] = line
    model = models.NAMES[name]
    by_data = {"shape", "dim", "in_channels", "context", "context_channels", "context_features"}
    if model is models.ConditionalGAN:
        by_data.add("classes")
    if issubclass(model, models.AutoregressiveModel | models.AutoencoderModel):
        by_data.add("levels")
    options = {k: v.default for k, v in inspect.signature(model).parameters.items() if k not in by_data}
    names = {k: "flow-steps" if k == "steps" else k.replace("_", "-") for k in options}
    if options:
        assert sorted(shown) == sorted(names.values())
    for key, default in options.items():
        text = "null" if default is None else str(default)
        assert f"default: {text})" in shown[names[key]]
        assert re.search(r"[a-z]\S* .*\(type: ", shown[names[key]].split(" ", 1)[1])


@pytest.mark.parametrize("name", models.NAMES)
def test_the_arguments_of_a_model_are_only_what_was_given(name):
    a = cli.train_arguments([name, "--steps", "3"])
    assert (a.model, a.steps, a.batch_size, a.model_config, a.recipe) == (name, 3, 64, {}, {})
    for option, parameter in cli.model_options(models.NAMES[name]).items():
        if type(parameter.default) in (int, float):
            words = [name, f"--{option.replace('_', '-')}", str(parameter.default)]
            assert cli.train_arguments(words).model_config == {parameter.name: parameter.default}


def test_the_recipe_shows_the_defaults_of_the_model(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "wgan-gp", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(models.Recipe):
        assert f"--{'penalty-weight' if field.name == 'weight' else field.name.replace('_', '-')}" in said
    assert "default: wasserstein)" in said


@pytest.mark.parametrize("kind", ["yaml", "json"])
def test_a_config_file_gives_options_and_the_command_line_wins(tmp_path, kind):
    options = {"hidden": 4, "flow_steps": 2, "scale": "exp", "reversible": True, "steps": 7, "lr": 0.01}
    text = json.dumps(options) if kind == "json" else "".join(f"{k}: {json.dumps(v)}\n" for k, v in options.items())
    file = tmp_path / f"options.{kind}"
    file.write_text(text)
    for words in (["--hidden", "8", "--config", str(file)], ["--config", str(file), "--hidden", "8"]):
        a = cli.train_arguments(["glow", *words])
        assert a.model_config == {"hidden": 8, "steps": 2, "scale": "exp", "reversible": True}
        assert (a.steps, a.lr) == (7, 0.01)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["glow", "--hidden", "wide"], "train: hidden='wide', expected int"),
        (["glow", "--hidden", "1.5"], "train: hidden='1.5', expected int"),
        (["glow", "--steps", "many"], "train: steps='many', expected int or null"),
        (["glow", "--lr", "fast"], "train: lr='fast', expected number or null"),
        (["vae", "--beta", "big"], "train: beta='big', expected number"),
        (["maf", "--hidden", "wide"], "train: hidden='wide', expected int or "),
        (["glow", "--scale", "linear"], "train: scale='linear', expected 'exp', 'sigmoid', 'tanh', "),
        (["gan", "--loss", "none"], "train: loss='none', expected 'minimax', "),
        (["gan", "--optimizer", "sgd"], "train: optimizer='sgd', expected 'adam', 'rmsprop'"),
        (["maf", "--activation", "step"], "train: activation='step', expected 'elu', "),
        (["nsf", "--hidden", "[8, 8]"], "hidden=[8, 8] with couplings, expected at least 2"),
        (["glow", "--lr", "inf"], "train: lr=inf, expected a positive number"),
        (["glow", "--config", "unknown.yaml"], "train: --config='unknown.yaml': Option 'gamma' is not accepted"),
        (["glow", "--config", "wrong.yaml"], "train: --config='wrong.yaml': hidden='wide', expected int"),
        (["glow", "--config", "torn.yaml"], "torn.yaml"),
        (["glow", "--config", "missing.yaml"], "missing.yaml"),
        (["glow", "--config", "nested.yaml"], "train: --config='nested.yaml': Option 'config' is not accepted"),
        (["glow", "--config", "switch.yaml"], "switch.yaml"),
        (["vae", "--config", "levels.yaml"], "train: --config='levels.yaml': Option 'levels' is not accepted"),
        (["glow", "--config="], "train: --config=''"),
        (["glow", "--hidden"], "--hidden"),
        (["glow", "stray"], "stray"),
        (["glow", "--nothing", "1"], "glow takes no --nothing"),
        (["nothing"], "train: model='nothing', expected one of cgan, "),
        ([], "train: model=None, expected one of cgan, "),
    ],
)
def test_options_that_do_not_parse_are_one_line_and_status_2(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unknown.yaml").write_text("gamma: 1\n")
    (tmp_path / "wrong.yaml").write_text("hidden: wide\n")
    (tmp_path / "torn.yaml").write_text("hidden: [1\n")
    (tmp_path / "nested.yaml").write_text("config: wrong.yaml\n")
    (tmp_path / "switch.yaml").write_text("reversible: 3\n")
    (tmp_path / "levels.yaml").write_text("levels: 3\n")
    assert cli.main(["train", *words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("genfast: error: NSF: " if words[:1] == ["nsf"] else "genfast: error: train: ")
    assert message in said[0]


@pytest.mark.parametrize("text", ["#x", "null", "2024", "true"])
def test_the_names_of_folders_and_files_are_taken_as_they_are(text):
    a = cli.train_arguments(["glow", "--out", text, "--root", text, "--data", text, "--background", text])
    assert (str(a.out), a.root, a.data, a.background) == (text,) * 4


def test_penalties_come_as_words_or_as_a_list(tmp_path):
    file = tmp_path / "options.yaml"
    for text, penalty in (("[r1, r2]", ("r1", "r2")), ("r1,r2", ("r1", "r2")), ("[r1]", "r1"), ("none", None)):
        file.write_text(f"penalty: {text}\npenalty_weight: 1e-1\n")
        assert cli.train_arguments(["gan", "--config", str(file)]).recipe == {"penalty": penalty, "weight": 0.1}
        assert cli.train_arguments(["gan", "--penalty", text]).recipe == {"penalty": penalty}


def test_choices_are_in_the_help(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    for name, words in (
        ("gan", ("--loss {minimax,nonsaturating,hinge,", "--optimizer {adam,rmsprop}", "wgan-gp, wgan-lp, r1, r2")),
        ("aae", ("--loss {minimax,nonsaturating,hinge,lsgan,wasserstein}",)),
        ("maf", ("--activation {elu,gelu,", "--order {alternating,random}")),
        ("nsf", ("--coupling {coupling,autoregressive}", "--mixing", "'lu', 'permutation'")),
    ):
        with pytest.raises(SystemExit):
            cli.main(["train", name, "--help"])
        shown = capsys.readouterr().out.replace('"', "")
        for word in words:
            assert word in shown


def test_the_choices_of_annotations_are_those_of_the_library():
    known = genfast.losses.CRITIC_LOSSES
    games = [k for k in known if not k.startswith("relativistic")]
    assert list(get_args(Game)) == games
    assert list(get_args(CriticLoss)) == list(known)
    assert list(get_args(Activation)) == list(ACTIVATIONS)


def test_importing_the_package_needs_no_parser():
    code = "import sys, genfast, genfast.cli; assert not {'jsonargparse', 'yaml'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_whose_classes_are_an_option_learns_labels(tmp_path, capsys):
    run, picture = tmp_path / "run", tmp_path / "sevens.png"
    words = ["sagan", "--width", "4", "--classes", "10", "--steps", "1", "--batch-size", "4", "--sample-every", "0"]
    assert cli.main(["train", *words, "--out", str(run)]) == 0
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(picture), "-n", "4", "--label", "7"]) == 0
    assert cli.main(["train", "cgan", "--classes", "10"]) == 2
    assert "cgan takes no --classes; the data decide them" in capsys.readouterr().err
