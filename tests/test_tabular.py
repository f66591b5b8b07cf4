"""Density estimation on real tables: held-out log-likelihood not worse than zuko's from the same weights and
batches."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("zuko", reason="zuko is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from benchmarks import tabular
from genfast import nn as gnn
from genfast.nn import plain


@pytest.mark.parametrize(("kind", "dtype", "near"), [("MAF", torch.float32, 5e-3), ("NSF", torch.float64, 1e-4)])
def test_not_worse_than_zuko(kind, dtype, near):
    """An NSF in float64: in float32 the rounding of steep splines parts the two runs, to either side."""
    found = tabular.compare("diabetes", kind, steps=60, hidden=32, transforms=2, dtype=dtype)
    ours, theirs = found["runs"]["genfast"], found["runs"]["zuko"]
    assert found["initially_apart"] < 1e-3
    assert ours["final"] > theirs["final"] - near  # nats
    assert ours["final"] > ours["curve"][0] + 0.5  # and something was learned
    text = tabular.table({"comparisons": [found, found]})
    assert "diabetes (398 x 10)" in text
    json.dumps(found)


def test_gradients_of_a_trained_spline_flow_are_no_further_from_float64_than_zukos():
    found = tabular.compare("diabetes", "NSF", steps=60, hidden=32, transforms=2, lr=3e-3)
    assert found["runs"]["genfast"]["gradient_error"] < 1.5 * found["runs"]["zuko"]["gradient_error"]


@pytest.mark.parametrize("kind", ["MAF", "NSF"])
@pytest.mark.parametrize(
    ("layers", "family"), [(gnn, tabular.models.Flow), (plain, tabular.models.plain(tabular.models.Flow))]
)
def test_the_same_numbers_on_zukos_weights(kind, layers, family):
    torch.manual_seed(0)
    theirs = tabular.zuko_flow(kind, 6, 3, 24).double()
    ours = tabular.from_zuko(theirs, layers, family).double()
    for own, other in zip(ours.flow.children(), theirs.transform.transforms):
        for a, b in zip(own.network.linears, (m for m in other.hyper if isinstance(m, torch.nn.Linear))):
            a.load_state_dict(b.state_dict(), strict=False)  # in float64
    x = 2 * torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(x), theirs().log_prob(x))
    z = 2 * torch.randn(9, 6, dtype=torch.float64)
    torch.testing.assert_close(ours.inverse(z)[0], theirs().transform.inv(z), rtol=1e-7, atol=1e-7)
