"""Checkpoints that a crash cannot tear, written by one process or many, and read by any number of them.

A run's folder holds the last two ``checkpoint-<step>``, each with

    weights.safetensors  the whole model to sample from, with its name and config: what :func:`load` and ``genfast sample`` read
    training.json        what of the trainer's state is numbers and names: the step, the curves, the recipe
    state/               its tensors (model, optimisers, averages, generators), torch.distributed.checkpoint's format: each rank
                         writes its shards, and any number of ranks, with shards or without, reads them

All of it is written under a temporary name and renamed by rank 0 once every rank has finished. The format of ``state/`` holds
pickles: resume only runs of your own; sampling reads weights.safetensors, which holds none.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import distributed, models

KEEP = 2  # checkpoints


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, in order."""
    found = (p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*") if (p / "weights.safetensors").exists())
    return sorted(int(s) for s in found if s.isdigit())


def latest(folder: str | Path) -> Path:
    """The newest checkpoint in a run's folder, or the folder itself if it is one.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(folder)
    if (folder / "weights.safetensors").exists():
        return folder
    found = steps(folder)
    if not found:
        raise FileNotFoundError(f"checkpoint: {str(folder)!r} holds no checkpoint-<step> with weights.safetensors")
    return folder / f"checkpoint-{found[-1]}"


def check_folder(out: Path, resume: bool) -> None:
    """Raises FileExistsError where a new run would write over another."""
    if steps(out) and not resume:
        raise FileExistsError(f"train: {str(out)!r} holds a run already; resume it or name another folder")


# ---- what a state is made of ----


def _tensors(value: Any) -> bool:
    """Whether there are tensors in a state's entry."""
    return isinstance(value, Tensor) or (isinstance(value, dict) and any(_tensors(v) for v in value.values()))


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimiser of a module's parameters by their names, which outlives shards and ranks."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    return get_optimizer_state_dict(module, optimizer)


def set_optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts back what :func:`optimizer_state` gave, filled by :func:`restore`."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    set_optimizer_state_dict(module, optimizer, state)


# ---- writing ----


def save(
    folder: Path, name: str, model: Any, state: dict[str, Any], bins: int, weights: dict[str, Tensor] | None = None
) -> Path:
    """Writes ``checkpoint-<step>``, then drops all but the newest few; all ranks call this together.

    Args:
        folder: of the run.
        name: of the model, a key of ``models.NAMES``.
        model: its ``config`` is kept, and its weights are those to sample from.
        state: entries of numbers, strings, lists and dicts of them (JSON), "step" among them, and entries that are tensors or
            dicts with tensors inside, equal on all ranks or DTensors.
        bins: of the data.
        weights: those to sample from, where they are not the model's own.

    Raises:
        OSError: the disk's. No part of the checkpoint is left.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save as write

    target = folder / f"checkpoint-{state['step']}"
    temporary = folder / f".{target.name}.partial"  # one name for all ranks
    try:
        if distributed.first():
            for dead in folder.glob(".checkpoint-*"):  # of a run that was killed while it saved
                shutil.rmtree(dead, ignore_errors=True)
            temporary.mkdir(parents=True)
        distributed.barrier()
        gathered: dict[str, Tensor] = {}
        for key, value in (model.state_dict() if weights is None else weights).items():
            t = distributed.full(value)
            if distributed.first():
                gathered[key] = t.cpu().contiguous()
        if distributed.first():
            metadata = {"model": name, "config": json.dumps(model.config), "bins": str(bins), "step": str(state["step"])}
            save_file(gathered, temporary / "weights.safetensors", metadata)
            notes = {key: value for key, value in state.items() if not _tensors(value)}
            (temporary / "training.json").write_text(json.dumps(notes))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which one process is
            try:
                write({key: value for key, value in state.items() if _tensors(value)}, checkpoint_id=temporary / "state")
            except CheckpointException as error:  # no Exception, and it hides the disk's
                raise next(iter(error.failures.values()))[0] from None
        if distributed.first():
            shutil.rmtree(target, ignore_errors=True)
            os.replace(temporary, target)
            for step in steps(folder)[:-KEEP]:
                shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
        distributed.barrier()
    finally:
        if distributed.first():
            shutil.rmtree(temporary, ignore_errors=True)
    return target


# ---- reading ----


def load(folder: str | Path, device: str = "cpu") -> tuple[Any, dict[str, str], Path]:
    """(model in evaluation mode, metadata, checkpoint folder) from a run's folder or a checkpoint.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a weights file that is not one of ours.
    """
    path = latest(folder)
    with safe_open(path / "weights.safetensors", framework="pt") as opened:
        metadata = opened.metadata() or {}
    if "model" not in metadata:
        raise ValueError(f"checkpoint: {str(path / 'weights.safetensors')!r} names no model; it was not written by genfast")
    model = models.build(metadata["model"], **json.loads(metadata["config"]))
    model.load_state_dict(load_file(path / "weights.safetensors"))
    return model.to(device).eval(), metadata, path


def begin(out: Path, name: str, resume: bool, config: dict[str, Any]) -> tuple[Any, Path | None]:
    """(model, None) for a new run in the folder ``out``; (model, checkpoint) for one that goes on, whose config is its own.

    Raises:
        FileExistsError: it holds a run, and ``resume`` is not set.
        ValueError: it holds a run of another model than ``name``.
    """
    check_folder(out, resume)
    if not steps(out):
        return models.build(name, **config), None
    model, metadata, checkpoint = load(out)
    if metadata["model"] != name:
        raise ValueError(f"train: {str(out)!r} holds a {metadata['model']}, not a {name}")
    return model, checkpoint


def notes(checkpoint: Path) -> dict[str, Any]:
    """The entries of a checkpoint's state that hold no tensors.

    Raises:
        FileNotFoundError: there is only a model, and nothing to go on with.
    """
    if not (checkpoint / "training.json").exists():
        raise FileNotFoundError(f"checkpoint: {str(checkpoint)!r} holds no training.json: it can be sampled from, not resumed")
    found: dict[str, Any] = json.loads((checkpoint / "training.json").read_text())
    return found


def _paths(entries: dict[str, Any], above: str = "") -> Iterator[str]:
    """The names that torch.distributed.checkpoint gives to tensors."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{above}{key}.")
        elif isinstance(value, Tensor):
            yield f"{above}{key}"


def _check_complete(checkpoint: Path, wanted: Iterable[str], kept: Collection[str]) -> None:
    """Raises ValueError for a tensor that the checkpoint lacks; only a parameter that no step has used may have no state."""
    used = {name.rpartition(".")[0] for name in kept}
    for name in wanted:
        if name not in kept and (".state." not in name or name.rpartition(".")[0] in used):
            raise ValueError(f"checkpoint: {str(checkpoint)!r} does not fit what it is to resume: it lacks {name}")


def restore(checkpoint: Path, state: dict[str, Any]) -> None:
    """Fills a state, made as for :func:`save` by a trainer that has just begun; all ranks call this together.

    Tensors are written in place, shards of them where they are DTensors, whatever ranks and shards wrote the checkpoint. The
    other entries are replaced.

    Raises:
        FileNotFoundError: there is only a model, and nothing to go on with.
        ValueError: the checkpoint lacks a tensor, or has one of another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load as read

    found = notes(checkpoint)
    tensors = {key: value for key, value in state.items() if _tensors(value)}
    reader = FileSystemReader(checkpoint / "state")
    _check_complete(checkpoint, _paths(tensors), reader.read_metadata().state_dict_metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            read(tensors, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=True))
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, OSError):
                raise cause from None
            raise ValueError(f"checkpoint: {str(checkpoint)!r} does not fit what it is to resume: {cause}") from cause
    state.update(tensors)
    state.update(found)
