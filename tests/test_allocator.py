"""The allocator of large CPU outputs: what it hands out again, what it lets go, and that a child process does not hang
in it."""

from __future__ import annotations

import itertools
import os
import signal
import time

import pytest
import torch

from genfast import _allocator

_MEBIBYTE = 1 << 20
_rising = itertools.count(1)


@pytest.fixture(autouse=True)
def _nothing_kept():
    _allocator.clear()
    yield
    _allocator.clear()


def _block(nbytes: int = _MEBIBYTE) -> torch.Tensor:
    return _allocator.empty_strided((nbytes // 4,), (1,), torch.float32)


def _counted() -> int:
    return sum(storage.nbytes() for storage in _allocator._blocks.values())


def test_a_free_block_is_handed_out_again_and_one_in_use_is_not():
    first = _block()
    address = first.data_ptr()
    view = first[3:]
    del first
    assert _block().data_ptr() != address  # the view still refers to it
    del view
    assert address in [_block().data_ptr() for _ in range(2)]


@pytest.mark.parametrize("count", [lambda number: 3, lambda number: next(_rising)], ids=["constant", "rising"])
def test_it_is_off_where_references_are_not_counted_exactly(monkeypatch, count):
    monkeypatch.setattr(_allocator, "_references", count)
    assert _allocator._references_of_a_free_block() == 0
    monkeypatch.setattr(_allocator, "_ALONE", 0)
    monkeypatch.setattr(_allocator, "limit", 0)
    block = _block()
    assert block.shape == (_MEBIBYTE // 4,)
    assert not _allocator._blocks


def test_it_is_on_here():
    assert _allocator._references_of_a_free_block() == _allocator._ALONE > 0


@pytest.mark.parametrize("change", ["resized", "shared"])
def test_a_block_that_was_resized_or_shared_is_let_go(change):
    block = _block()
    if change == "resized":
        block.untyped_storage().resize_(8 * _MEBIBYTE)
    else:
        block.share_memory_()
    number = next(iter(_allocator._blocks))
    _block()
    assert number not in _allocator._blocks
    assert _allocator._total == _counted() == _MEBIBYTE


def test_rising_sizes_leave_no_more_than_the_limit_and_stale_ones_go(monkeypatch):
    monkeypatch.setattr(_allocator, "limit", 64 * _MEBIBYTE)
    monkeypatch.setattr(_allocator, "_STALE", 16)
    for i in range(300):
        _block(_MEBIBYTE + 4096 * i)
        assert _allocator._total == _counted() <= _allocator.limit
    for _ in range(40):
        _block(_MEBIBYTE)
    assert _allocator._total == _counted() <= 2 * _MEBIBYTE


def test_blocks_in_use_are_never_let_go(monkeypatch):
    monkeypatch.setattr(_allocator, "limit", 8 * _MEBIBYTE)
    held = [_block().fill_(i) for i in range(12)]
    for i in range(40):
        _block(_MEBIBYTE + 4096 * i).fill_(-1)
    assert [float(t.amax()) for t in held] == list(range(12))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_while_the_lock_is_held_does_not_hang_the_child():
    assert _allocator._lock.acquire(blocking=False)
    try:
        child = os.fork()
        if not child:
            os._exit(0 if _block().fill_(1).sum() and _allocator._blocks else 1)
    finally:
        _allocator._lock.release()
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
    assert _allocator._lock.acquire(blocking=False)
    try:
        assert _block().numel() == _MEBIBYTE // 4
        assert not _allocator._blocks
    finally:
        _allocator._lock.release()


def test_memory_is_reused_only_when_nothing_refers_to_it():
    like = torch.empty(1 << 19)
    first = _allocator.empty_like(like)
    address = first.data_ptr()
    assert _allocator.empty_like(like).data_ptr() != address
    del first
    again = _allocator.empty_like(like)
    assert again.data_ptr() == address
    for keep in (
        lambda t: t[3:5],
        lambda t: t.untyped_storage(),
        lambda t: t.numpy(),
        lambda t: t.detach(),
        memoryview_of,
    ):
        held, again = keep(again), None
        others = [_allocator.empty_like(like) for _ in range(8)]
        assert all(o.data_ptr() != address for o in others), keep
        del held, others
        again = next(t for t in (_allocator.empty_like(like) for _ in range(16)) if t.data_ptr() == address)


def memoryview_of(t):
    return memoryview(t.numpy())


def test_memory_in_use_beyond_the_limit_is_not_kept(monkeypatch):
    monkeypatch.setattr(_allocator, "limit", 5 << 20)
    held = [_allocator.empty_like(torch.empty(1 << 19)) for _ in range(6)]
    assert len({t.data_ptr() for t in held}) == 6
    assert _allocator._total <= 5 << 20
