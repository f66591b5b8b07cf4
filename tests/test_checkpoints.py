"""Checkpoints: whole or not at all, noticed where damaged, harmless where somebody else made them."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from genfast import checkpoints, cli, data, models, training
from genfast.training import runs, untrusted

SMALL = {"levels": 1, "steps": 1, "hidden": 4}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits):
    out = tmp_path_factory.mktemp("runs") / "glow"
    training.train("glow", digits, out, config=SMALL, steps=2, save_every=1, batch_size=8)
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def resume(run, digits, **options):
    return training.train("glow", digits, run, steps=3, batch_size=8, resume=True, **options)


# ---- damage ----


@pytest.mark.parametrize("name", ["weights.safetensors", "training.json", "state/.metadata", "state/__0_0.distcp"])
def test_a_flipped_byte_is_noticed(run, digits, name):
    file = run / "checkpoint-2" / name
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{name}.*has changed since it was written.*remove it to go back to checkpoint-1"
    ):
        resume(run, digits)
    if name == "weights.safetensors":
        with pytest.raises(ValueError, match="has changed since it was written"):
            checkpoints.load(run)
    else:
        checkpoints.load(run)
    assert not (run / "checkpoint-3").exists()


@pytest.mark.parametrize(
    "name", ["weights.safetensors", "training.json", "state/.metadata", "state/__0_0.distcp", "state"]
)
def test_what_is_missing_is_named_and_no_run_begins_anew(run, digits, name):
    path = run / "checkpoint-2" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=rf"checkpoint-2.*holds no {name}"):
        resume(run, digits)
    with pytest.raises(FileExistsError, match="holds a run already"):
        training.train("glow", digits, run, steps=3)
    if name == "weights.safetensors":
        with pytest.raises(
            FileNotFoundError, match="holds no weights.safetensors; remove it to go back to checkpoint-1"
        ):
            checkpoints.load(run)


def test_there_must_be_something_to_resume(tmp_path, digits):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint to resume"):
        resume(tmp_path / "nowhere", digits)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "training.json without 'step'"),
        ("[]", "training.json with a list"),
        ("{", "training.json that is no JSON"),
        ('{"step": 2, "losses": "no"}', "whose 'losses' is a str, expected list"),
        ('{"step": 2, "losses": [4.0]}', "1 losses after 2 steps"),
    ],
)
def test_notes_of_another_version_must_hold_what_resuming_needs(run, digits, text, message):
    (run / "checkpoint-2" / "checksums.json").unlink()  # which a version before had not
    (run / "checkpoint-2" / "training.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        resume(run, digits)


@pytest.mark.parametrize("size", [0, 4, 100, 2000])
def test_weights_cut_off_are_one_line(run, capsys, size):
    file = run / "checkpoint-2" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert cli.main(["sample", "--checkpoint", str(run), "--out", str(run / "s.png")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "weights.safetensors that is truncated or damaged" in said[0]


# ---- somebody else's ----


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_the_metadata_of_a_state_run_no_code(run, digits, tmp_path):
    metadata = run / "checkpoint-2" / "state" / ".metadata"
    (run / "checkpoint-2" / "checksums.json").unlink()
    honest = pickle.loads(metadata.read_bytes())
    for value in (Evil(tmp_path / "ran"), [Evil(tmp_path / "ran")]):
        honest.planner_data = value
        for content in (pickle.dumps(honest), pickle.dumps(value), pickle.dumps(value, protocol=0)):
            metadata.write_bytes(content)
            with pytest.raises(ValueError, match="it names posix.system, which is no part of its format"):
                resume(run, digits)
    assert not (tmp_path / "ran").exists()
    honest.planner_data = None
    next(iter(honest.storage_data.values())).relative_path = "../../elsewhere"
    for value, message in ((honest, "'../../elsewhere', which is none of its files"), ({}, "it is a dict")):
        metadata.write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match=message):
            resume(run, digits)


def test_the_numbers_of_a_state_run_no_code(run, digits, tmp_path):
    trainer = training.Trainer(checkpoints.load(run)[0], digits, batch_size=8)
    trainer.restore(run / "checkpoint-2")
    state = trainer.state()
    state["optimizers"]["model"]["param_groups"][0]["lr"] = Evil(tmp_path / "ran")
    checkpoints.save(run, "glow", trainer.model, state | {"step": 3, "history": [{}] * 3}, 17)
    with pytest.raises(ValueError, match="does not fit what it is to resume"):
        training.train("glow", digits, run, steps=4, batch_size=8, resume=True)
    assert not (tmp_path / "ran").exists()


def crafted(tmp_path, name="glow", asked=None, change=None, **metadata):
    """A weights file as genfast writes it, with what a person could change in it."""
    shape = {"levels": 17, "dim": 64} if name in ("made", "nade", "deep_nade") else {"dim": 64} if name == "maf" else {}
    if name in ("glow", "realnvp"):
        shape = {"shape": (1, 8, 8), "levels": 1, "hidden": 4}
    elif name == "pixelcnn":
        shape = {"levels": 17, "channels": 8, "layers": 1, "shape": (1, 8, 8)}
    else:
        shape["hidden"] = 8
    model = models.build(name, **shape)
    tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    if change is not None:
        change(tensors)
    written = {"model": name, "config": json.dumps(model.config | (asked or {})), "bins": "17", "step": "1"} | metadata
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file(tensors, folder / "weights.safetensors", {k: v for k, v in written.items() if v is not None})
    return folder


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("glow", {"hidden": 10**7}),
        ("glow", {"steps": 10**7}),
        ("glow", {"hidden": 10**15}),
        ("glow", {"shape": [3, 10**6, 10**6]}),
        ("glow", {"shape": "abc"}),
        ("glow", {"nothing": 1}),
        ("maf", {"dim": 10**7}),
        ("maf", {"transforms": 10**7}),
        ("made", {"orders": 10**7}),
        ("made", {"layers": 10**6}),
        ("nade", {"dim": 10**7}),
        ("pixelcnn", {"channels": 10**6}),
        ("pixelcnn", {"layers": 10**7}),
        ("pixelcnn", {"levels": 16}),
        ("realnvp", {"depth": float("nan")}),
    ],
)
def test_a_config_gets_no_more_than_its_file_brings(tmp_path, name, config):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=rf"^checkpoint: .*(no {name} that can be used|asks for)"):
        checkpoints.load(crafted(tmp_path, name, config))
    assert torch.is_grad_enabled()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("glow", "levels.0.0.conv.perm", 10**6, "no permutation of 0 to 3"),
        ("glow", "levels.0.0.conv.perm", -1, "no permutation of 0 to 3"),
        ("glow", "levels.0.0.conv.perm", 1, "no permutation of 0 to 3"),
        ("glow", "levels.0.0.conv.sign_s", 0.5, "other values than 1 and -1"),
        ("glow", "levels.0.0.conv.lower", float("nan"), "not finite"),
        ("realnvp", "stages.0.1.mask", True, "not the mask that its config has"),
        ("nade", "network.order", 65, "no permutation of 1 to 64"),
        ("deep_nade", "orders", 0, "no permutation of 1 to 64"),
        ("made", "orders", 0, "no permutation of 1 to 64"),
        ("made", "turn", 5, "turn is 5, expected 0 to 0"),
        ("made", "network.linears.0.in_degrees", 9, "no permutation of 1 to 64"),
        ("made", "network.linears.1.in_degrees", 9, "do not fit the layers beside it"),
        ("made", "network.linears.0.out_degrees", -5, "do not fit the layers beside it"),
        ("made", "network.linears.2.out_degrees", 2, "not those of the inputs"),
    ],
)
def test_numbers_that_select_are_checked(tmp_path, name, key, value, message):
    def change(tensors):
        tensors[key].view(-1)[:2] = value

    with pytest.raises(ValueError, match=message):
        checkpoints.load(crafted(tmp_path, name, change=change))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"bins": "1"}, "bins='1', expected 2 to 65536"),
        ({"bins": "-3"}, "bins='-3'"),
        ({"bins": "many"}, "bins='many'"),
        ({"bins": None}, "no 'bins' in its metadata"),
        ({"config": None}, "no 'config' in its metadata"),
        ({"step": None}, "no 'step' in its metadata"),
        ({"model": None}, "names no model"),
        ({"model": "gpt"}, "name='gpt', expected one of"),
        ({"config": "{"}, "config that is no JSON"),
        ({"config": "[" * 100_000}, "config that is no JSON"),
        ({"config": "[]"}, "expected names and values"),
        ({"checksum": "0"}, "has changed since it was written"),
    ],
)
def test_metadata_that_are_missing_or_wrong_are_one_line(tmp_path, capsys, metadata, message):
    folder = crafted(tmp_path, **metadata)
    assert cli.main(["sample", "--checkpoint", str(folder), "--out", str(tmp_path / "s.png")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]


def test_levels_must_be_those_of_the_data(tmp_path):
    with pytest.raises(ValueError, match="it has levels=17, and bins=2"):
        checkpoints.load(crafted(tmp_path, "pixelcnn", bins="2"))


def test_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    os.mkfifo(tmp_path / "checkpoint-1" / "weights.safetensors")
    with pytest.raises(FileNotFoundError, match="holds no weights.safetensors"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("name", sorted(models.NAMES))
def test_every_model_has_its_shapes_without_memory(tmp_path, digits, name):
    """So that what is checked before a model is built is the model."""
    config = runs.fitted(name, digits, {"levels": 1} if name == "glow" else {})[1]
    with untrusted._Shapes(10**4, 10**7):
        shapes = models.build(name, **config)
    metadata = {"model": name, "config": json.dumps(shapes.config), "bins": "17", "step": "1"}
    state = {k: torch.zeros(0) for k in shapes.state_dict()}
    assert sum(t.numel() for t in shapes.parameters() if t.device.type != "meta") <= 64
    with pytest.raises(ValueError, match=r"expected torch.*\("):  # the first shape, and not a fault of the config
        untrusted.build(metadata, state, tmp_path)


# ---- writing ----


def test_two_runs_cannot_share_a_folder(run, digits):
    with checkpoints._lock(run):
        for options in ({"resume": True}, {}):
            with pytest.raises(BlockingIOError, match="another process trains in"):
                training.train("glow", digits, run, steps=3, batch_size=8, **options)
        with pytest.raises(BlockingIOError):
            training.train("gan", digits, run, steps=1)
        with pytest.raises(BlockingIOError):
            training.train("vae", digits, run, steps=1)
    assert not (run / checkpoints.LOCK).exists()
    assert resume(run, digits)["steps"] == 3


def test_files_are_on_the_disk_before_they_get_their_names(run, digits, monkeypatch):
    events: list[tuple[str, int]] = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor):
        events.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def renamed(source, target):
        inside = [p for p in (source.rglob("*") if source.is_dir() else [source]) if p.is_file()]
        synced = {inode for what, inode in events if what == "sync"}
        missing = [p.name for p in inside if p.stat().st_ino not in synced]
        assert not missing, missing
        replace(source, target)
        events.append(("rename", target.parent.stat().st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", renamed)
    resume(run, digits)
    assert ("rename", run.stat().st_ino) in events
    assert events[-1] == ("sync", run.stat().st_ino)  # and the folder after the last one


@pytest.mark.parametrize("limit", [200, 20_000])
def test_a_full_disk_is_one_line_and_leaves_the_run_as_it_was(run, digits, capsys, limit):
    """By a limit on the size of files, which every writer meets, Python's, C++'s and Rust's."""
    before = sorted(p for p in run.rglob("*"))
    words = ["train", "glow", "--out", str(run), "--steps", "3", "--batch-size", "8", "--resume"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = cli.main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "File too large" in said[0]
    assert sorted(p for p in run.rglob("*")) == before
    assert resume(run, digits)["steps"] == 3


def test_weights_carry_their_checksum(run):
    file = run / "checkpoint-2" / "weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    assert metadata["checksum"] == checkpoints._checksum(metadata, load_file(file))
    assert len(metadata["checksum"]) == 64
