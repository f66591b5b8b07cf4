"""categorical_nll: both layouts in every memory format, against the sum written out; errors."""

from __future__ import annotations

import math

import pytest
import torch

from genfast import ops


def written_out(logits, x, layout):
    """-log of the softmax at x, element by element."""
    n, c = x.shape[:2]
    levels = logits.shape[1] // c
    shape = (n, levels, c, *x.shape[2:]) if layout == "interleaved" else (n, c, levels, *x.shape[2:])
    each = logits.reshape(shape)
    each = each if layout == "blocked" else each.transpose(1, 2)
    p = each.exp() / each.exp().sum(2, keepdim=True)
    return -p.gather(2, x.long()[:, :, None])[:, :, 0].log()


FORMS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", ["interleaved", "blocked"])
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (3, 4), (3, 37), (2, 256)])
def test_equals_the_softmax(channels, levels, layout, form):
    logits = (
        torch.randn(3, levels * channels, 5, 4, dtype=torch.float64).contiguous(memory_format=form).requires_grad_()
    )
    x = torch.randint(levels, (3, channels, 5, 4), dtype=torch.uint8)
    found = ops.categorical_nll(logits, x, layout=layout)
    expected = written_out(logits, x, layout)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(x.shape, dtype=torch.float64)
    grads = [torch.autograd.grad(nll, logits, weights)[0] for nll in (found, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["interleaved", "blocked"])
@pytest.mark.parametrize("positions", [(), (7,), (2, 3, 4)])
def test_vectors_sequences_and_volumes(layout, positions):
    logits, x = torch.randn(2, 30, *positions), torch.randint(10, (2, 3, *positions))
    torch.testing.assert_close(ops.categorical_nll(logits, x, layout=layout), written_out(logits, x, layout))
    assert ops.categorical_nll(logits[:0], x[:0], layout=layout).shape == (0, 3, *positions)


def test_halves_give_float32_and_huge_logits_stay_finite():
    x = torch.randint(8, (2, 3, 4))
    assert ops.categorical_nll(torch.randn(2, 24, 4).bfloat16(), x).dtype == torch.float32
    logits = torch.zeros(2, 24, 4)
    logits[:, :3] = 1e30
    found = ops.categorical_nll(logits, x)
    assert torch.equal(found, torch.where(x == 0, 0.0, 1e30))
    assert ops.categorical_nll(torch.zeros(2, 24, 4), x).allclose(torch.tensor(math.log(8)))


def test_compiles_without_a_break():
    logits, x = torch.randn(2, 24, 4), torch.randint(8, (2, 3, 4))
    compiled = torch.compile(ops.categorical_nll, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, x), ops.categorical_nll(logits, x))


@pytest.mark.parametrize(
    ("logits", "x", "options", "error", "message"),
    [
        (
            (2, 24, 4),
            (2, 3, 4),
            {"layout": "bands"},
            ValueError,
            "layout='bands', expected one of 'interleaved', 'blocked'",
        ),
        (
            (2, 25, 4),
            (2, 3, 4),
            {},
            ValueError,
            r"x has shape \(2, 3, 4\) and logits \(2, 25, 4\); expected logits \(N, levels",
        ),
        ((2, 24, 4), (2, 3, 5), {}, ValueError, r"x has shape \(2, 3, 5\)"),
        (
            (2, 24, 4),
            (2, 3, 4),
            {"dtype": torch.float32},
            TypeError,
            r"x has dtype torch\.float32, expected integer levels",
        ),
        ((2, 24, 4), (2, 3, 4), {"value": 8}, ValueError, "x has values from 0 to 8, expected 0 to levels - 1 = 7"),
        ((2, 24, 4), (2, 3, 4), {"value": -100}, ValueError, "x has values from -100 to 0"),
    ],
)
def test_errors(logits, x, options, error, message):
    options = dict(options)
    x = torch.zeros(x, dtype=options.pop("dtype", torch.int64))
    x.view(-1)[5] = options.pop("value", 0)
    with pytest.raises(error, match=message):
        ops.categorical_nll(torch.zeros(logits), x, **options)


def test_integer_logits_are_refused():
    with pytest.raises(TypeError, match=r"logits has dtype torch\.int64"):
        ops.categorical_nll(torch.zeros(2, 24).long(), torch.zeros(2, 3).long())
