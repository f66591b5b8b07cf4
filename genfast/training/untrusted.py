"""Reading checkpoints of unknown origin: no code of theirs runs, and they ask for no more memory than they bring.

Used by :mod:`genfast.checkpoints`.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import models
from .. import nn as gnn

LARGEST = 2**24  # number in a config; a width, a count of layers or the side of an image is far below it
LARGEST_SHAPE = 2**28  # numbers in one sample
LARGEST_BINS = 2**16

# ---- models ----


def build(metadata: dict[str, str], tensors: dict[str, Tensor], file: Path) -> Any:
    """The model that the metadata of a weights file name, with weights of its own; ``tensors`` fit it and may be
    loaded.

    Raises:
        ValueError: metadata that are missing, are no JSON or ask for too much; tensors that the model does not have or
            that it cannot work with.
    """
    bins, config = _bins(metadata, file), _config(metadata, file)
    name = metadata["model"]
    # Twice what the models here take and more: they make up to four tensors for each of their own, and one for each
    # order.
    orders = sum(len(t) for t in tensors.values() if t.dim() == 2 and not t.is_floating_point())
    budget = _Shapes(200 + 8 * len(tensors) + 2 * orders, 2**22 + 4 * sum(t.numel() for t in tensors.values()))
    try:
        with torch.random.fork_rng(devices=[]), budget:
            shapes: dict[str, Tensor] = models.build(name, **config).state_dict()
        _check_shapes(shapes, tensors)
        model = models.build(name, **config)
        _check_values(model, tensors)
        if isinstance(model, models.AutoregressiveModel | models.AutoencoderModel) and model.levels != bins:
            raise ValueError(f"it has levels={model.levels}, and bins={bins}")
    except Exception as error:  # whatever a constructor makes of values that nobody has checked
        raise ValueError(f"checkpoint: {str(file)!r} is no {name} that can be used: {error}") from error
    return model


def _bins(metadata: dict[str, str], file: Path) -> int:
    for key in ("config", "bins", "step"):
        if key not in metadata:
            raise ValueError(f"checkpoint: {str(file)!r} has no {key!r} in its metadata; it was not written by genfast")
    text = metadata["bins"]
    bins = int(text) if text.isdecimal() and len(text) < 8 else -1
    if bins == 1 or not 0 <= bins <= LARGEST_BINS:  # 0 of points
        raise ValueError(f"checkpoint: {str(file)!r} has bins={text!r}, expected 2 to {LARGEST_BINS}, or 0 of points")
    return bins


def _config(metadata: dict[str, str], file: Path) -> dict[str, Any]:
    """The model's config, of numbers that a model could have."""
    try:
        config = json.loads(metadata["config"])
    except (ValueError, RecursionError) as error:
        raise ValueError(f"checkpoint: {str(file)!r} has a config that is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"checkpoint: {str(file)!r} has config={config!r}, expected names and values")

    def check(name: str, value: Any) -> None:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for part in parts:
            check(name, part)
        if isinstance(value, int | float) and not abs(value) <= LARGEST:  # which nan is not either
            raise ValueError(f"checkpoint: {str(file)!r} asks for {name}={value}, expected at most {LARGEST}")
        whole = name == "shape" and isinstance(value, list) and all(isinstance(n, int) for n in value)
        if whole and math.prod(value) > LARGEST_SHAPE:
            raise ValueError(
                f"checkpoint: {str(file)!r} asks for shape={value}, expected at most {LARGEST_SHAPE} numbers"
            )

    for name, value in config.items():
        check(name, value)
    return config


class _Shapes(TorchFunctionMode):
    """While entered, new floating-point tensors have shapes and no memory, and what else is made stays within a budget.

    Not the device "meta" for all: constructors read the whole numbers that they make, orders and degrees.

    Args:
        calls: of the functions that make tensors.
        elements: of tensors that take memory.
    """

    weights = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.eye)
    numbers = (torch.arange, torch.randperm, torch.randint)

    def __init__(self, calls: int, elements: int) -> None:
        super().__init__()
        self.calls, self.elements = calls, elements

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.weights or func in self.numbers:
            shape = func(*args, **{k: v for k, v in kwargs.items() if k != "generator"} | {"device": "meta"})
            without = func in self.weights and kwargs.get("device") is None and shape.is_floating_point()
            self.calls -= 1
            self.elements -= 0 if without else shape.numel()
            # Raised nowhere else: what ends a torch.no_grad() comes through here too, and must end it.
            if min(self.calls, self.elements) < 0:
                raise ValueError("its config asks for more than the file holds")
            if without:
                return shape
        return func(*args, **kwargs)


def _check_shapes(shapes: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for key in [*shapes, *tensors]:
        if key not in tensors or key not in shapes:
            raise ValueError(f"it {'lacks' if key in shapes else 'has an unknown'} {key}")
        a, b = shapes[key], tensors[key]
        if a.shape != b.shape or (a.dtype != b.dtype and not (a.is_floating_point() and b.is_floating_point())):
            raise ValueError(f"its {key} is {b.dtype} {tuple(b.shape)}, expected {a.dtype} {tuple(a.shape)}")


def _check_values(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError for numbers that are not finite, and for those that select and that ``model`` cannot select
    by."""
    for key, t in tensors.items():
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise ValueError(f"its {key} holds values that are not finite")
        if key.rpartition(".")[2] == "sign_s" and not bool((t.abs() == 1).all()):
            raise ValueError(f"its {key} holds other values than 1 and -1")
    for prefix, module in model.named_modules():
        path = f"{prefix}." if prefix else ""
        if isinstance(module, gnn.MADENetwork):
            _check_degrees(path, module, tensors)
        if isinstance(module, gnn.MaskedLinear):
            continue
        for name, own in module.named_buffers(recurse=False):
            key = f"{path}{name}"
            if key not in tensors or own.is_floating_point():
                continue
            t = tensors[key]
            if own.dim() == 0:
                end = len(tensors[f"{path}orders"]) if name == "turn" else 2**62
                if not 0 <= int(t) < end:
                    raise ValueError(f"its {key} is {int(t)}, expected 0 to {end - 1}")
            elif own.dtype == torch.bool:
                if not torch.equal(t, own):
                    raise ValueError(f"its {key} is not the mask that its config has")
            elif not torch.equal(t.sort(-1).values, own.sort(-1).values):
                raise ValueError(f"its {key} is no permutation of {int(own.min())} to {int(own.max())}")


def _check_degrees(path: str, module: gnn.MADENetwork, tensors: dict[str, Tensor]) -> None:
    """Raises ValueError where a layer does not go on with the degrees that the layer before ended with."""
    names = [f"{path}linears.{i}." for i in range(len(module.linears))]
    first = before = tensors[f"{names[0]}in_degrees"]
    if not torch.equal(first.sort().values, torch.arange(1, module.features + 1)):
        raise ValueError(f"its {names[0]}in_degrees is no permutation of 1 to {module.features}")
    for name in names:
        inputs, outputs = tensors[f"{name}in_degrees"], tensors[f"{name}out_degrees"]
        if not torch.equal(inputs, before) or int(outputs.min()) < 0 or int(outputs.max()) > module.features:
            raise ValueError(f"its {name}in_degrees and out_degrees do not fit the layers beside it")
        before = outputs
    if not torch.equal(before, first.repeat_interleave(module.outputs)):
        raise ValueError(f"its {names[-1]}out_degrees are not those of the inputs")


# ---- the state of a trainer ----

_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "collections": ("OrderedDict",),
}


class _MetadataUnpickler(pickle.Unpickler):
    """Reads what torch.distributed.checkpoint writes about a checkpoint, and no pickle that names anything else."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # of Python 3.13
        if name in _METADATA.get(module, ()) or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return getattr(importlib.import_module(module), name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of its format")


def reader(folder: Path) -> Any:
    """A reader of torch.distributed.checkpoint that runs no code from the folder and opens no file outside it.

    Its ``read_metadata`` raises ValueError for what is no such metadata.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            data = (folder / ".metadata").read_bytes()
            try:
                value = _MetadataUnpickler(io.BytesIO(data)).load()
                if not isinstance(value, Metadata):
                    raise TypeError(f"it is a {type(value).__name__}")
                for info in value.storage_data.values():
                    if (
                        pathlib.PurePath(info.relative_path).name != str(info.relative_path)
                        or info.transform_descriptors
                    ):
                        raise ValueError(f"it names {str(info.relative_path)!r}, which is none of its files")
                value.storage_meta = value.storage_meta or StorageMeta()
                value.storage_meta.load_id = self.load_id
            except Exception as error:  # a damaged pickle fails in any way that there is
                raise ValueError(f"checkpoint: {str(folder / '.metadata')!r} was not read: {error}") from error
            return value

    return Reader(folder)


def planner() -> Any:
    """A planner that reads the numbers and names between the tensors as torch.load's ``weights_only`` does, without
    code."""
    from torch.distributed.checkpoint._nested_dict import set_element  # type: ignore[attr-defined]
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
            entry = torch.load(value, weights_only=True)
            if self.flatten_state_dict:
                set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], entry)
            else:
                self.state_dict[read_item.dest_index.fqn] = entry

    return Planner(allow_partial_load=True)
