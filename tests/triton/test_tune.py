"""Every launch choice gives the same numbers: a sample of the sweeps' candidates, in Triton's interpreter."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import tune

# The interpreter does not tell apart how many threads share a tile, so candidates differ in more than these.
SAMPLE = [
    ("pixel_norm.norm", {"tile": 8192, "each": 16}),
    ("squeeze.move", {"tile": 512, "each": 4}),
    ("affine_coupling.forward", {"tile": 4096, "each": 16}),
    ("affine_coupling.backward", {"tile": 512, "each": 4}),
]


def _tiny(name: str) -> tune.Case:
    return tune.Case(tune.sweeps([name])[0], tune.TINY, torch.float32)


@pytest.mark.parametrize(("name", "candidate"), SAMPLE, ids=[name for name, _ in SAMPLE])
def test_candidates_give_the_present_choices_numbers(name, candidate):
    case = _tiny(name)
    assert candidate in case.candidates
    assert tune.check(case, candidate, "cpu") <= tune.bound(case)


def _one_tile_fewer_from_the_second_call(monkeypatch):
    from genfast.kernels import interpolate

    calls = itertools.count()
    monkeypatch.setattr(interpolate, "cdiv", lambda a, b: -(-a // b) - (next(calls) > 0))


def test_what_a_candidate_does_not_write_is_seen(monkeypatch):
    _one_tile_fewer_from_the_second_call(monkeypatch)
    case = _tiny("interpolate.forward")
    assert not tune.check(case, {"tile": 512}, "cpu") <= tune.bound(case)


def test_a_case_is_run_and_reported(monkeypatch):
    """All of a sweep's work on one case but the clock."""
    times = iter((2.0, 1.0))
    monkeypatch.setattr(tune, "milliseconds", lambda works: next(times))
    monkeypatch.setattr(tune, "ROTATED", 0)
    case = _tiny("squeeze.move")
    compiled = [tune.Compiled(20), tune.Compiled(255, spilled=8), tune.Compiled(30), tune.Compiled(error="no")]
    found = tune.run(case, compiled, 1e6, "cpu")
    assert [c["wrong"] for c in found["candidates"]] == ["", "spills 8 bytes", "", "no"]
    assert found["candidates"][2]["share_of_copy"] == pytest.approx(found["bytes"] / 1e-3 / 1e6)
    best = tune.said(case.candidates[2])
    assert best in tune.table([found])
    assert "2.00x" in tune.table([found])
    assert best in tune.advice([found])

    _one_tile_fewer_from_the_second_call(monkeypatch)
    monkeypatch.setattr(tune, "milliseconds", lambda works: 1.0)
    found = tune.run(_tiny("interpolate.forward"), [tune.Compiled(20)] * 2, 1e6, "cpu")
    assert "differs from the present choice" in found["candidates"][1]["wrong"]
    assert "ms" not in found["candidates"][1]
