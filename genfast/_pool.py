"""Large CPU outputs from memory that is used again, since fresh memory costs more than the kernels.

The C library returns large freed blocks to the system and asks for them anew, and each new page then costs a fault: measured
0.6 us per 4 KiB, where a kernel writes those 4 KiB in 0.05 us. So outputs from 1 MiB on are made on storages that the pool
keeps, and hands out again once nothing else refers to them: no tensor, view, saved activation, NumPy array or storage
object. At most GENFAST_POOL_BYTES (default 512 MiB) are kept; 0 turns the pool off.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import deque

import torch
from torch import Tensor, UntypedStorage

MINIMUM = 1 << 20  # smaller blocks come from the C library's heap, which does keep them

limit = int(os.environ.get("GENFAST_POOL_BYTES", 512 << 20))
_kept: dict[int, deque[UntypedStorage]] = {}
_total = 0
_lock = threading.Lock()


def _uses(storage: UntypedStorage) -> int:
    """References to the memory from tensors."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def _idle(storage: UntypedStorage, nbytes: int) -> bool:
    """Whether the pool alone holds a storage: one reference from C++, and from Python the deque, the loop and the call."""
    return (
        _uses(storage) == 1
        and sys.getrefcount(storage) <= 4
        and storage.nbytes() == nbytes  # a user may have resized it
        and not storage.is_shared()  # or given it to another process
    )


def _take(nbytes: int) -> UntypedStorage | None:
    global _total
    with _lock:
        queue = _kept.setdefault(nbytes, deque())
        for _ in range(len(queue)):
            storage = queue.popleft()
            queue.append(storage)  # the one handed out longest ago is tried first
            if _idle(storage, nbytes):
                return storage
        if _total + nbytes > limit:
            return None
        storage = UntypedStorage(nbytes)
        queue.append(storage)
        _total += nbytes
        return storage


def empty_strided(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor with the given dense strides."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= MINIMUM:
        storage = _take(nbytes)
        if storage is not None:
            return torch.empty(0, dtype=dtype).set_(storage, 0, shape, stride)  # type: ignore[call-overload,no-any-return]
    return torch.empty_strided(shape, stride, dtype=dtype)


def empty_like(like: Tensor) -> Tensor:
    """An uninitialised tensor like a dense one on the CPU, in its order."""
    if like.numel() * like.element_size() < MINIMUM:
        return torch.empty_like(like)
    return empty_strided(like.shape, like.stride(), like.dtype)


def clear() -> None:
    """Lets go of all that is kept; tensors in use keep their memory."""
    global _total
    with _lock:
        _kept.clear()
        _total = 0
