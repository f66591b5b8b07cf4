"""genfast: the hot paths of generative models, fast and exact. See README.md."""

from . import _signals  # noqa: F401, I001  first, since Ctrl-C on the command line may come while torch is loading
import torch  # noqa: F401  before the extensions, so that all share one OpenMP thread pool

from . import data, integrations, losses, metrics, models, nn, ops, reference, sampling
from ._backend import BackendError, MissingKernelsWarning, backend, has_kernels, warn_of_missing_kernels
from ._info import info
from .integrations import accelerate, report, restore
from .tangent import explain

__version__ = "0.1.0"
__all__ = [
    "BackendError", "MissingKernelsWarning", "accelerate", "backend", "data", "explain", "has_kernels", "info", "integrations",
    "losses", "metrics", "models", "nn", "ops", "reference", "report", "restore", "sampling",
]  # fmt: skip

warn_of_missing_kernels()
