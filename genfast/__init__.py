"""genfast: the hot paths of generative models, fast and exact. See README.md."""

from . import _signals  # noqa: F401, I001  first, since Ctrl-C on the command line may come while torch is loading
import importlib
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  before the extensions, so that all share one OpenMP thread pool

from . import integrations, losses, models, nn, ops, optim, reference, sampling
from ._backend import BackendError, MissingKernelsWarning, backend, has_kernels, warn_of_missing_kernels
from ._info import info
from .integrations import accelerate, report, restore
from .penalty import explain

if TYPE_CHECKING:
    from . import training
    from .training import checkpoints, data, distributed, metrics

__version__ = "0.1.0"
__all__ = [
    "BackendError", "MissingKernelsWarning", "accelerate", "backend", "checkpoints", "data", "distributed", "explain",
    "has_kernels", "info", "integrations", "losses", "metrics", "models", "nn", "ops", "optim", "reference", "report",
    "restore", "sampling", "training",
]  # fmt: skip

warn_of_missing_kernels()


def __getattr__(name: str) -> Any:
    """What belongs to training, which is imported when it is first asked for."""
    if name == "training":
        return importlib.import_module(".training", __name__)
    if name in ("checkpoints", "data", "distributed", "metrics"):
        return importlib.import_module(f".training.{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
