"""Checkpoints that a crash cannot tear, written by one process or many, and read by any number of them.

A run's folder holds the last two ``checkpoint-<step>``, each with

    weights.safetensors  the whole model to sample from, with its name and config: what :func:`load` and
    ``genfast sample`` read training.json        what of the trainer's state is numbers and names: the step, the curves,
    the recipe state/               its tensors (model, optimisers, averages, generators),
    torch.distributed.checkpoint's format: each rank
                         writes its shards, and any number of ranks, with shards or without, reads them
    checksums.json       SHA-256 of training.json and of the files of state/; that of the weights is in their own
    metadata

All of it is written under a temporary name, reaches the disk, and is renamed by rank 0 once every rank has finished.

A checkpoint may come from somebody else. Its checksums show damage, not intent, so nothing in it is trusted: the
pickles of ``state/`` are read by unpicklers that know the classes of that format and no others; a model is built only
once the shapes that its config asks for are those of the file's own tensors; numbers that become indices are checked
before anything uses them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import _files, models
from . import distributed, untrusted

KEEP = 2  # checkpoints
FILES = ("weights.safetensors", "training.json", "state/.metadata")  # without which a checkpoint cannot be resumed
LOCK = ".lock"
F = TypeVar("F", bound=Callable[..., Any])


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a run's folder, in order, damaged ones too."""
    names = (p.name.removeprefix("checkpoint-") for p in folder.glob("checkpoint-*") if p.is_dir())
    return sorted(int(s) for s in names if s.isdecimal() and s.isascii())


def latest(folder: str | Path) -> Path:
    """The newest checkpoint in a run's folder, or the folder itself if it is one.

    Raises:
        FileNotFoundError: there is none, or the newest has no weights.
    """
    folder = Path(folder)
    if (folder / "weights.safetensors").is_file():
        return folder
    present = steps(folder)
    if not present:
        raise FileNotFoundError(f"checkpoint: {str(folder)!r} holds no checkpoint-<step> with weights.safetensors")
    newest = folder / f"checkpoint-{present[-1]}"
    if not (newest / "weights.safetensors").is_file():
        raise FileNotFoundError(_damaged(newest, "holds no weights.safetensors"))
    return newest


def _damaged(checkpoint: Path, what: str) -> str:
    """A message about a checkpoint that cannot be used, which names the one before it where there is one."""
    step = checkpoint.name.removeprefix("checkpoint-")
    older = [s for s in steps(checkpoint.parent) if step.isdecimal() and s < int(step)]
    hint = f"; remove it to go back to checkpoint-{older[-1]}" if older else ""
    return f"checkpoint: {str(checkpoint)!r} {what}{hint}"


def check_folder(out: Path, resume: bool) -> None:
    """Raises FileExistsError where a new run would write over another, FileNotFoundError where there is none to
    resume."""
    if steps(out) and not resume:
        raise FileExistsError(
            f"train: {str(out)!r} holds a run already; go on with --resume (resume=True) or name another folder"
        )
    if resume and not steps(out):
        raise FileNotFoundError(
            f"train: {str(out)!r} holds no checkpoint to resume; without --resume a new run begins there"
        )


def _acquire(path: Path) -> int | None:
    """A descriptor that holds the lock ``path``, None where another process holds it.

    The file is removed while it is held, so what was opened may be gone by the time that it is locked: then once more.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):
                os.close(descriptor)
                raise
            warnings.warn(
                f"train: the file system of {str(path.parent)!r} has no locks: start no other run there", stacklevel=2
            )
            return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Holds a run's folder, which is made where it is missing, on rank 0 for all ranks.

    Raises:
        BlockingIOError: another process trains in it. OSError: it cannot be written to.
    """
    error: OSError | None = None
    descriptor: int | None = None
    new = not out.exists()
    if distributed.first():
        try:
            _files.check_folder(out, "train: --out")
            out.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(out / LOCK)
            if descriptor is None:
                error = BlockingIOError(
                    f"train: another process trains in {str(out)!r}; wait for it or name another folder"
                )
        except OSError as raised:
            error = raised
    try:
        if distributed.total(error is not None)[0]:
            raise error or BlockingIOError(f"train: rank 0 cannot train in {str(out)!r}")
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                (out / LOCK).unlink()
            os.close(descriptor)  # and with it the lock
            with contextlib.suppress(OSError):
                if new:
                    out.rmdir()  # which fails unless nothing has been written


def holding_folder(train: F) -> F:
    """A ``train(name, data, out, ...)`` that holds the folder ``out`` while it runs, so that two runs cannot share it.

    Its BlockingIOError means that another process holds the folder.
    """

    @functools.wraps(train)
    def held(name: str, data: Any, out: str | Path, *args: Any, **options: Any) -> Any:
        with _lock(Path(out)):
            return train(name, data, out, *args, **options)

    return cast(F, held)


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
        state: entries of numbers, strings, lists and dicts of them (JSON), "step" among them, and entries that are
            tensors or dicts with tensors inside, equal on all ranks or DTensors.
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
            metadata = {
                "model": name,
                "config": json.dumps(model.config),
                "bins": str(bins),
                "step": str(state["step"]),
            }
            metadata["checksum"] = _checksum(metadata, gathered)
            try:
                save_file(gathered, temporary / "weights.safetensors", metadata)
            except SafetensorError as error:  # no OSError, though what it says is the disk's
                raise OSError(
                    f"checkpoint: {str(target / 'weights.safetensors')!r} could not be written: {error}"
                ) from error
            notes = {key: value for key, value in state.items() if not _tensors(value)}
            (temporary / "training.json").write_text(json.dumps(notes), encoding="utf-8")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which one process is
            try:
                write(
                    {key: value for key, value in state.items() if _tensors(value)}, checkpoint_id=temporary / "state"
                )
            except CheckpointException as error:  # no Exception, and it hides the disk's
                raise next(iter(error.failures.values()))[0] from None
        if distributed.first():
            sums = {name: _file_checksum(temporary / name) for name in _summed(temporary)}
            (temporary / "checksums.json").write_text(json.dumps(sums, indent=1), encoding="utf-8")
            for path in (*(p for p in temporary.rglob("*") if p.is_file()), temporary / "state", temporary):
                _files.sync(path)
            if target.exists():
                os.replace(target, folder / f".{target.name}.replaced")
            os.replace(temporary, target)
            _files.sync(folder)
            shutil.rmtree(folder / f".{target.name}.replaced", ignore_errors=True)
            for step in steps(folder)[:-KEEP]:
                shutil.rmtree(folder / f"checkpoint-{step}", ignore_errors=True)
        distributed.barrier()
    finally:
        if distributed.first():
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _checksum(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    """SHA-256 of what a weights file says and holds, whatever the order in which it does."""
    digest = hashlib.sha256(json.dumps({k: v for k, v in metadata.items() if k != "checksum"}, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _file_checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _summed(checkpoint: Path) -> list[str]:
    """The files of a checkpoint whose sums are in checksums.json."""
    return ["training.json", *sorted(f"state/{p.name}" for p in (checkpoint / "state").iterdir())]


# ---- reading ----


def load(folder: str | Path, device: str = "cpu") -> tuple[Any, dict[str, str], Path]:
    """(model in evaluation mode, metadata, checkpoint folder) from a run's folder or a checkpoint.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: a device that is not there; a weights file that is not one of ours, that is damaged, or that holds
            what its model cannot.
    """
    distributed.check_device(device)
    path = latest(folder)
    file = path / "weights.safetensors"
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(_damaged(path, f"holds weights.safetensors that is truncated or damaged: {error}")) from error
    if "model" not in metadata:
        raise ValueError(f"checkpoint: {str(file)!r} names no model; it was not written by genfast")
    if metadata.get("checksum", "") not in ("", _checksum(metadata, tensors)):
        raise ValueError(
            _damaged(path, "holds weights.safetensors that has changed since it was written: its checksum differs")
        )
    model = untrusted.build(metadata, tensors, file)
    model.load_state_dict(tensors)
    return model.to(device).eval(), metadata, path


def begin(out: Path, name: str, resume: bool, config: dict[str, Any]) -> tuple[Any, Path | None]:
    """(model, None) for a new run in the folder ``out``; (model, checkpoint) for one that goes on, whose config is its
    own.

    Raises:
        FileExistsError: it holds a run, and ``resume`` is not set.
        FileNotFoundError: ``resume`` is set, and it holds no run, or its newest checkpoint lacks a file.
        ValueError: it holds a run of another model than ``name``, or a damaged one.
    """
    check_folder(out, resume)
    if not resume:
        return models.build(name, **config), None
    newest = out / f"checkpoint-{steps(out)[-1]}"
    _check_files(newest)
    model, metadata, checkpoint = load(newest)
    if metadata["model"] != name:
        raise ValueError(f"train: {str(out)!r} holds a {metadata['model']}, not a {name}")
    return model, checkpoint


def _check_files(checkpoint: Path) -> None:
    """Raises FileNotFoundError for a file that resuming needs, ValueError for one that is not what was written."""
    for name in FILES:
        if not (checkpoint / name).is_file():
            use = "cannot be used" if name == FILES[0] else "can be sampled from, not resumed"
            raise FileNotFoundError(_damaged(checkpoint, f"holds no {name}: it {use}"))
    if not (checkpoint / "checksums.json").is_file():  # of a version that wrote none
        return
    error = ""
    if distributed.first():  # once for all ranks, which may share the disk
        sums = _json(checkpoint / "checksums.json")
        for name in _summed(checkpoint):
            if not error and sums.get(name) != _file_checksum(checkpoint / name):
                error = f"holds {name} that has changed since it was written (its checksum)"
        for name in sums:
            if not error and not (checkpoint / name).is_file():
                error = f"holds no {name}, which was written with it"
    if distributed.total(bool(error))[0]:
        raise ValueError(_damaged(checkpoint, error or "is damaged, as rank 0 says"))


def _json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(_damaged(path.parent, f"holds {path.name} that is no JSON: {error}")) from error
    if not isinstance(value, dict):
        raise ValueError(
            _damaged(path.parent, f"holds {path.name} with a {type(value).__name__}, expected names and values")
        )
    return value


def notes(checkpoint: Path, expected: Collection[str] = ()) -> dict[str, Any]:
    """The entries of a checkpoint's state that hold no tensors; the ``expected`` ones are among them.

    Raises:
        FileNotFoundError: there is only a model, and nothing to go on with.
        ValueError: it is damaged, or lacks an entry.
    """
    if not (checkpoint / "training.json").is_file():
        raise FileNotFoundError(_damaged(checkpoint, "holds no training.json: it can be sampled from, not resumed"))
    entries = _json(checkpoint / "training.json")
    for key in expected:
        if key not in entries:
            raise ValueError(_damaged(checkpoint, f"holds training.json without {key!r}, and cannot be resumed"))
    return entries


def _paths(entries: dict[str, Any], above: str = "") -> Iterator[str]:
    """The names that torch.distributed.checkpoint gives to tensors."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _paths(value, f"{above}{key}.")
        elif isinstance(value, Tensor):
            yield f"{above}{key}"


def _check_complete(checkpoint: Path, wanted: Iterable[str], kept: Collection[str]) -> None:
    """Raises ValueError for a tensor that the checkpoint lacks; only a parameter that no step has used may have no
    state."""
    used = {name.rpartition(".")[0] for name in kept}
    for name in wanted:
        if name not in kept and (".state." not in name or name.rpartition(".")[0] in used):
            raise ValueError(f"checkpoint: {str(checkpoint)!r} does not fit what it is to resume: it lacks {name}")


def restore(checkpoint: Path, state: dict[str, Any]) -> None:
    """Fills a state, made as for :func:`save` by a trainer that has just begun; all ranks call this together.

    Tensors are written in place, shards of them where they are DTensors, whatever ranks and shards wrote the
    checkpoint. The other entries are replaced.

    Raises:
        FileNotFoundError: there is only a model, and nothing to go on with.
        ValueError: the checkpoint lacks a tensor, or has one of another shape.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load as read

    entries = notes(checkpoint, [key for key, value in state.items() if not _tensors(value)])
    for key in entries.keys() & state.keys():
        if type(entries[key]) is not type(state[key]):
            said = f"{type(entries[key]).__name__}, expected {type(state[key]).__name__}"
            raise ValueError(_damaged(checkpoint, f"holds training.json whose {key!r} is a {said}"))
    for key, value in entries.items():
        if isinstance(value, list) and len(value) != entries["step"]:  # the curves
            raise ValueError(
                _damaged(checkpoint, f"holds training.json with {len(value)} {key} after {entries['step']} steps")
            )
    tensors = {key: value for key, value in state.items() if _tensors(value)}
    reader = untrusted.reader(checkpoint / "state")
    _check_complete(checkpoint, _paths(tensors), reader.read_metadata().state_dict_metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            read(tensors, storage_reader=reader, planner=untrusted.planner())
        except CheckpointException as error:
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, OSError):
                raise cause from None
            raise ValueError(f"checkpoint: {str(checkpoint)!r} does not fit what it is to resume: {cause}") from cause
    state.update(tensors)
    state.update({key: value for key, value in entries.items() if key in state})
