"""The sweep over launch choices, and what it reads of compiled kernels, as far as they go without a GPU."""

from __future__ import annotations

import importlib

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import _launches, sass, tune
from genfast.kernels import aot


def test_every_choice_is_swept_and_its_present_values_are_sound():
    listed = {s.name: s for s in tune.sweeps()}
    for family in aot.families():
        tunable = getattr(importlib.import_module(f"genfast.kernels.{family}"), "TUNABLE", {})
        for name, choice in tunable.items():
            sweep = listed.pop(f"{family}.{name}")
            for dtype in sweep.dtypes:
                candidates = sweep.candidates(dtype)
                assert len(candidates) > 1
                assert candidates[0] == choice.of(dtype.itemsize)
                if choice.now:
                    assert all(set(c) == set(choice.now) for c in candidates)
                named = [c for c in candidates if c]  # none is named where the kernel's own rule decides
                assert len(named) >= len(candidates) - (not choice.now)
                assert all(min(c.values()) >= 0 for c in named)
                assert len({tuple(sorted(c.items())) for c in candidates}) == len(candidates)
    assert not listed
    assert all(tune.TINY in s.sizes for s in tune.sweeps())
    text = tune.listing(tune.sweeps())
    assert "affine_coupling.forward" in text


def test_cases_meet_every_sweep_before_the_next_size():
    found = tune.cases(tune.sweeps(["actnorm", "squeeze.move"]))
    assert [c.name for c in found[:4]] == [
        "actnorm.forward, 256 MB, float32",
        "actnorm.backward, 256 MB, float32",
        "squeeze.move, 256 MB, float32",
        "actnorm.forward, 256 MB, bfloat16",
    ]
    assert len(found) == 12


def test_an_unknown_name_is_told_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tune", "--op", "actnorm", "nonsense"])
    with pytest.raises(SystemExit):
        tune.main()
    said = capsys.readouterr().err
    assert "--op: nonsense: expected" in said
    assert "actnorm.backward" in said


def test_a_launch_is_compiled_at_its_real_size_without_a_gpu():
    case = tune.Case(tune.sweeps(["interpolate.forward"])[0], "1 GB", torch.float32)
    with case.sweep.tunable.trying({"tile": 512, "each": 4}):
        (launch,) = _launches.launches(lambda device: case.make(device).work)
    assert (launch.kernel, launch.warps, launch.spilled) == ("interpolate._forward", 4, 0)
    assert launch.grid == (case.make("meta").bytes // (3 * 4 * 512),)
    assert launch.constants["BLOCK"] == 512
    code = _launches.read(launch.sass)
    assert (code.loads[16], code.stores) == (2, {16: 1})  # all of both images in vectors of 16 bytes
    assert 0.5 <= launch.occupancy <= 1
    row = dict(zip(sass.HEADERS, sass.row(case, case.make("meta"), launch), strict=True))
    assert row["bound by"] == "memory"
    assert _launches.triton.runtime.driver._active is None or torch.cuda.is_available()


LISTING = """
        .global _kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E R0, desc[UR8][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
        /*0040*/                   IMAD.WIDE R2, R5, 0x4, R2 ;
        /*0050*/                   FFMA R4, R4, R4, R4 ;
        /*0060*/                   ISETP.GE.AND P1, PT, R5, R6, PT ;
        /*0070*/              @!P1 BRA `(.L_x_1) ;
        /*0080*/                   STG.E.U16 desc[UR8][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
        /*00b0*/                   NOP;
"""


def test_machine_code_is_read():
    code = _launches.read(LISTING)
    assert code.loop
    assert code.loads == {16: 1}
    assert not code.stores
    assert dict(code.counts) == {"device": 1, "special": 1, "imad": 1, "fma": 1, "alu": 1, "other": 1}
    assert code.wide == 1
    assert code.busy == {"issue": 6, "fma": 3, "alu": 2, "special": 8, "double": 0, "memory": 16}
    whole = _launches.read(LISTING.replace("@!P1 BRA `(.L_x_1)", "NOP"))
    assert not whole.loop
    assert (whole.loads, whole.stores) == ({16: 1, 4: 1}, {2: 1})
    assert whole.issued == 10
