"""The tiles that only an H100 or H200 has room for, which are in no AOT list: they compile for sm_90 and do not
spill."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from benchmarks.tune import compile_candidate


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "label"),
    [("gram_matrix.forward", "1024 channels, 128 x 128"), ("contextual_similarity.least", "16384 rows of 256")],
)
def test_tiles_for_an_h200_do_not_spill(name, label):
    found = compile_candidate((name, label, "bfloat16", 0, 90))
    assert found.good, found
    assert 99 * 1024 < found.shared <= 227 * 1024
