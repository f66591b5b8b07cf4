"""Large CPU outputs from memory that is used again, since fresh memory costs more than the kernels.

The C library returns large freed blocks to the system and asks for them anew, and each new page then costs a fault:
measured 0.6 us per 4 KiB, where a kernel writes those 4 KiB in 0.05 us. So outputs from 1 MiB on are made on storages
that the allocator keeps, and hands out again once nothing else refers to them: no tensor, view, saved activation, NumPy
array or storage object. At most GENFAST_POOL_BYTES (default 512 MiB) are kept; 0 turns the allocator off, and it is off
where the interpreter does not count references exactly. A block that has not been asked for in a while goes, the
longest unused first, and so does one that a user has resized or shared with another process.
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections import OrderedDict, deque

import torch
from torch import Tensor, UntypedStorage

from ._torch_private import storage_uses

MINIMUM = 1 << 20  # smaller blocks come from the C library's heap, which does keep them

limit = int(os.environ.get("GENFAST_POOL_BYTES", 512 << 20))
_STALE = 512  # requests after which a block that served none of them is let go
_TRIMMED = 4  # blocks that a request looks at, to let stale ones go

_blocks: OrderedDict[int, UntypedStorage] = OrderedDict()  # by number, the longest unused first
_asked: dict[int, int] = {}  # of each block: its size, which a user may have changed since
_used: dict[int, int] = {}  # of each block: the request that it last served
_sizes: dict[int, deque[int]] = {}  # the blocks of each size, the one handed out longest ago first
_total = 0
_requests = 0
_lock = threading.Lock()


def _references(number: int) -> int:
    """To a block's object and its memory, together."""
    storage = _blocks[number]
    return storage_uses(storage) + sys.getrefcount(storage)


def _references_of_a_free_block() -> int:
    """What :func:`_references` gives for a block that nothing else refers to, which depends on the version of Python.

    Returns 0, with which no block counts as free, where a reference to a block does not show in the count or remains in
    it.
    """
    _blocks[-1] = UntypedStorage(8)
    try:
        free = _references(-1)
        storage = _blocks[-1]
        with_storage = _references(-1)
        tensor = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (8,), (1,))  # type: ignore[call-overload]
        del storage
        with_tensor = _references(-1)
        view = tensor[1:]
        del tensor
        with_view = _references(-1)
        del view
        if min(with_storage, with_tensor, with_view) <= free or _references(-1) != free:
            return 0
        return free
    except AttributeError:  # a PyTorch without the count
        return 0
    finally:
        del _blocks[-1]


_ALONE = _references_of_a_free_block()
if not _ALONE:
    limit = 0


def _changed(number: int) -> bool:
    """Whether a user has resized a block or given it to another process."""
    storage = _blocks[number]
    return storage.nbytes() != _asked[number] or storage.is_shared()


def _forget(number: int) -> None:
    global _total
    size = _asked.pop(number)
    del _blocks[number], _used[number]
    numbers = _sizes[size]
    numbers.remove(number)
    if not numbers:
        del _sizes[size]
    _total -= size


def _trim(nbytes: int, most: int) -> None:
    """Lets go of stale blocks, and of any that are idle while ``nbytes`` more would not fit; looks at so many at
    most."""
    for _ in range(min(most, len(_blocks))):
        number = next(iter(_blocks))
        crowded = _total + nbytes > limit
        if _changed(number):
            _forget(number)
        elif _references(number) > _ALONE:  # in use: as good as new
            _blocks.move_to_end(number)
            _used[number] = _requests
        elif crowded or _requests - _used[number] > _STALE:
            _forget(number)
        else:
            return


def _take(nbytes: int) -> UntypedStorage | None:
    global _total, _requests
    # Not waited for: the holder may be this very thread, interrupted by the garbage collector or by a signal.
    lock = _lock
    if not lock.acquire(blocking=False):
        return None
    try:
        _requests += 1
        numbers = _sizes.get(nbytes, ())
        for number in list(numbers):
            if _changed(number):
                _forget(number)
            elif _references(number) <= _ALONE:
                _used[number] = _requests
                _blocks.move_to_end(number)
                _sizes[nbytes].remove(number)
                _sizes[nbytes].append(number)
                _trim(0, _TRIMMED)
                return _blocks[number]
        if nbytes > limit:
            return None
        _trim(nbytes, len(_blocks) if _total + nbytes > limit else _TRIMMED)
        if _total + nbytes > limit:
            return None
        storage = UntypedStorage(nbytes)
        _blocks[_requests], _asked[_requests], _used[_requests] = storage, nbytes, _requests
        _sizes.setdefault(nbytes, deque()).append(_requests)
        _total += nbytes
        return storage
    finally:
        lock.release()


def _after_fork() -> None:
    """In a child process: another thread may have held the lock, or been in the middle of a change."""
    global _lock, _total
    _lock = threading.Lock()
    for table in (_blocks, _asked, _used, _sizes):
        table.clear()
    _total = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


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
        for table in (_blocks, _asked, _used, _sizes):
            table.clear()
        _total = 0
