"""The pool of large CPU outputs: what it hands out again, what it lets go, and that a child process does not hang in
it."""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest
import torch

from genfast import _pool

_MEBIBYTE = 1 << 20
_rising = itertools.count(1)


@pytest.fixture(autouse=True)
def _empty_pool():
    _pool.clear()
    yield
    _pool.clear()


def _block(nbytes: int = _MEBIBYTE) -> torch.Tensor:
    return _pool.empty_strided((nbytes // 4,), (1,), torch.float32)


def _counted() -> int:
    return sum(storage.nbytes() for storage in _pool._blocks.values())


def test_a_free_block_is_handed_out_again_and_one_in_use_is_not():
    first = _block()
    address = first.data_ptr()
    view = first[3:]
    del first
    assert _block().data_ptr() != address  # the view still refers to it
    del view
    assert address in [_block().data_ptr() for _ in range(2)]


@pytest.mark.parametrize("count", [lambda number: 3, lambda number: next(_rising)], ids=["constant", "rising"])
def test_the_pool_is_off_where_references_are_not_counted_exactly(monkeypatch, count):
    monkeypatch.setattr(_pool, "_references", count)
    assert _pool._references_of_the_pool() == 0
    monkeypatch.setattr(_pool, "_ALONE", 0)
    monkeypatch.setattr(_pool, "limit", 0)
    block = _block()
    assert block.shape == (_MEBIBYTE // 4,)
    assert not _pool._blocks


def test_the_pool_is_on_here():
    assert _pool._references_of_the_pool() == _pool._ALONE > 0


@pytest.mark.parametrize("change", ["resized", "shared"])
def test_a_block_that_was_resized_or_shared_is_let_go(change):
    block = _block()
    if change == "resized":
        block.untyped_storage().resize_(8 * _MEBIBYTE)
    else:
        block.share_memory_()
    number = next(iter(_pool._blocks))
    _block()
    assert number not in _pool._blocks
    assert _pool._total == _counted() == _MEBIBYTE


def test_rising_sizes_leave_no_more_than_the_limit_and_stale_ones_go(monkeypatch):
    monkeypatch.setattr(_pool, "limit", 64 * _MEBIBYTE)
    monkeypatch.setattr(_pool, "_STALE", 16)
    for i in range(300):
        _block(_MEBIBYTE + 4096 * i)
        assert _pool._total == _counted() <= _pool.limit
    for _ in range(40):
        _block(_MEBIBYTE)
    assert _pool._total == _counted() <= 2 * _MEBIBYTE


def test_blocks_in_use_are_never_let_go(monkeypatch):
    monkeypatch.setattr(_pool, "limit", 8 * _MEBIBYTE)
    held = [_block().fill_(i) for i in range(12)]
    for i in range(40):
        _block(_MEBIBYTE + 4096 * i).fill_(-1)
    assert [float(t.amax()) for t in held] == list(range(12))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_the_lock_is_held_does_not_hang_the_child():
    assert _pool._lock.acquire(blocking=False)
    try:
        child = os.fork()
        if not child:
            os._exit(0 if _block().fill_(1).sum() and _pool._blocks else 1)
    finally:
        _pool._lock.release()
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pytest.fail("the child hangs")


def test_a_call_inside_a_call_takes_ordinary_memory():
    assert _pool._lock.acquire(blocking=False)
    try:
        assert _block().numel() == _MEBIBYTE // 4
        assert not _pool._blocks
    finally:
        _pool._lock.release()


def test_memory_is_reused_only_when_nothing_refers_to_it():
    like = torch.empty(1 << 19)
    first = _pool.empty_like(like)
    address = first.data_ptr()
    assert _pool.empty_like(like).data_ptr() != address
    del first
    again = _pool.empty_like(like)
    assert again.data_ptr() == address
    for keep in (
        lambda t: t[3:5],
        lambda t: t.untyped_storage(),
        lambda t: t.numpy(),
        lambda t: t.detach(),
        memoryview_of,
    ):
        held, again = keep(again), None
        others = [_pool.empty_like(like) for _ in range(8)]
        assert all(o.data_ptr() != address for o in others), keep
        del held, others
        again = next(t for t in (_pool.empty_like(like) for _ in range(16)) if t.data_ptr() == address)


def memoryview_of(t):
    return memoryview(t.numpy())


def test_memory_in_use_beyond_the_limit_is_not_the_pools(monkeypatch):
    monkeypatch.setattr(_pool, "limit", 5 << 20)
    held = [_pool.empty_like(torch.empty(1 << 19)) for _ in range(6)]
    assert len({t.data_ptr() for t in held}) == 6
    assert _pool._total <= 5 << 20
