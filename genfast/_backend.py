"""Which backend serves a call: the one place where that is decided.

CPU tensors go to the C++ kernels, CUDA tensors to CUDA C++ or Triton, everything else to the
plain PyTorch reference. ``GENFAST_BACKEND`` or :func:`backend` forces one; a forced backend that
cannot serve a call raises :class:`BackendError` and says why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BACKENDS = ("cpu", "cuda", "triton", "reference")

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "reference": (torch.float32, torch.float64, torch.bfloat16, torch.float16),
}

# Preference per device type; whatever is not named here runs the reference.
PREFERENCE: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}


class MissingKernelsWarning(RuntimeWarning):
    """The compiled kernels are missing, so that every op runs its plain PyTorch reference; ``import genfast`` says it
    once."""


class BackendError(RuntimeError):
    """A forced backend cannot serve a call; names the op, the dtype, the shape and the reason."""


def _validated(name: str | None) -> str | None:
    if name is None or name == "":
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(BACKENDS)}")
    return name


# The forced backend, or None. Read on every call, hence a plain module attribute.
forced: str | None = _validated(os.environ.get("GENFAST_BACKEND"))


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Forces a backend inside a ``with`` block: "cpu", "cuda", "triton", "reference" or None.

    Raises:
        ValueError: for a name that is none of these.

    Example:
        >>> import torch, genfast
        >>> with genfast.backend("reference"):
        ...     y, logdet = genfast.ops.actnorm(torch.ones(2, 3), torch.ones(3), torch.zeros(3))
    """
    global forced
    before, forced = forced, _validated(name)
    try:
        yield
    finally:
        forced = before


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} does not import: {error}"


@functools.cache
def extension(name: str) -> tuple[ModuleType | None, str]:
    """The compiled module ``genfast._cpu`` or ``genfast._cuda``, or None and the reason."""
    return _load(f"genfast.{name}")


def has_kernels(device: str | torch.device = "cpu") -> bool:
    """Whether compiled kernels, and not the plain PyTorch references, serve tensors on ``device``.

    Args:
        device: "cpu" or "cuda", or a ``torch.device``. Other types of device have no kernels.

    Example:
        >>> import genfast
        >>> genfast.has_kernels("mps")
        False
    """
    device_type = torch.device(device).type
    return any(not unusable(name, device_type) for name in PREFERENCE.get(device_type, ()) if name != "reference")


def missing_kernels() -> str:
    """Why the CPU kernels are missing and what to do about it, for a warning or an error; empty where they are
    there."""
    _, reason = extension("_cpu")
    if not reason:
        return ""
    package = Path(__file__).resolve().parent
    if (package.parent / "csrc" / "bind_cpu.cpp").exists():
        return (
            f"genfast was imported from the source folder {package}, in which its kernels are not built and which "
            "shadows an installed genfast: run from another folder, or build them there with 'pip install -e .' "
            f"({reason})"
        )
    return f"genfast's CPU kernels are missing ({reason}): install it again with a C++ compiler present"


def warn_of_missing_kernels() -> None:
    """Says at import that the references run, unless ``GENFAST_BACKEND=reference`` asks for them."""
    problem = missing_kernels()
    if problem and forced != "reference":
        warnings.warn(
            f"{problem}. Until then every op runs its plain PyTorch reference: right, and slow. "
            "GENFAST_BACKEND=reference silences this warning",
            MissingKernelsWarning,
            stacklevel=3,
        )


def triton_kernel(family: str, name: str, check: Callable[..., None] | None = None) -> Callable[..., Any]:
    """The function ``name`` of genfast.kernels.<family>, imported at the first call; ``check`` sees the arguments
    before.

    Triton launches on the current GPU, so the arguments' is made current where it is another.
    """

    @functools.cache
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(f"genfast.kernels.{family}"), name)
        return function

    def kernel(*args: Any) -> Any:
        if check is not None:
            check(*args)
        index = _gpu(args)
        if index < 0 or index == torch.cuda.current_device():
            return load()(*args)
        with torch.cuda.device(index):
            return load()(*args)

    return kernel


def _gpu(args: Iterable[Any]) -> int:
    """The number of the GPU that the first tensor among ``args`` is on; -1 where that is the CPU."""
    for a in args:
        first = a[0] if isinstance(a, (list, tuple)) and a else a
        if isinstance(first, torch.Tensor):
            return first.get_device()
    return -1


def triton_interprets() -> bool:
    """Whether Triton kernels run in the interpreter, where they take CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def unusable(name: str, device_type: str) -> str:
    """Why backend ``name`` cannot run on tensors of ``device_type``; empty when it can."""
    if name == "reference":
        return ""
    if name == "cpu":
        if device_type != "cpu":
            return f"it takes CPU tensors, not {device_type} tensors"
        return extension("_cpu")[1]
    if name == "cuda":
        if device_type != "cuda":
            return f"it takes CUDA tensors, not {device_type} tensors"
        return extension("_cuda")[1]
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and triton_interprets()):
        return ""
    return f"it takes CUDA tensors (or CPU tensors under TRITON_INTERPRET=1), not {device_type} tensors"
