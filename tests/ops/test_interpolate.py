"""interpolate: one weight a sample, layouts, any order of derivatives, random numbers, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import genfast
from genfast import ops
from genfast._registry import OPS
from tests.conftest import poisoned
from tests.triton.flow_cases import FORMS, strided


def written_out(real, fake, epsilon):
    """Algorithm 1, line 6, sample by sample."""
    return torch.stack([e * r + (1 - e) * f for r, f, e in zip(real, fake, epsilon)])


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 4),
    rest=st.sampled_from([(), (1,), (7,), (5000,), (3, 5), (4, 8, 8), (3, 65, 63), (2, 3, 4, 5)]),
    last=st.booleans(),
    wanted=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_equals_the_equation(n, rest, last, wanted):
    form = {3: torch.channels_last, 4: torch.channels_last_3d}.get(len(rest)) if last else None
    tensors = [torch.randn(n, *rest), torch.randn(n, *rest), torch.rand(n)]
    if form is not None:
        tensors[:2] = [t.contiguous(memory_format=form) for t in tensors[:2]]
    inputs = [t.requires_grad_(w) for t, w in zip(tensors, wanted)]
    with poisoned():
        y = ops.interpolate(inputs[0], inputs[1], epsilon=inputs[2])
        exact = written_out(*(t.double() for t in inputs))
        assert y.shape == exact.shape
        torch.testing.assert_close(y.double(), exact, rtol=1e-6, atol=1e-6)
        if form is not None:
            assert y.is_contiguous(memory_format=form)
        leaves = [t for t in inputs if t.requires_grad]
        if not leaves:
            return
        weights = torch.randn(y.shape)
        found = torch.autograd.grad(y, leaves, weights)
    for f, e in zip(found, torch.autograd.grad(exact, leaves, weights.double())):
        assert float((f - e).norm()) <= 2e-6 * float(e.norm()) + 1e-7


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("other", FORMS)
def test_any_two_layouts(form, other):
    real, fake, grad = (torch.randn(3, 4, 5, 7) for _ in range(3))
    a, b = strided(real, form).detach().requires_grad_(), strided(fake, other).detach().requires_grad_()
    e = torch.rand(6)[::2].requires_grad_()
    y = ops.interpolate(a, b, epsilon=e)
    torch.testing.assert_close(y, written_out(real, fake, e))
    found = torch.autograd.grad(y, (a, b, e), strided(grad, other))
    expected = torch.autograd.grad(written_out(a, b, e), (a, b, e), grad)
    for f, x in zip(found, expected):
        torch.testing.assert_close(f, x)


def test_ends_are_exact():
    real, fake = torch.randn(4, 6), torch.randn(4, 6)
    assert torch.equal(ops.interpolate(real, fake, epsilon=torch.ones(4)), real)
    assert torch.equal(ops.interpolate(real, fake, epsilon=torch.zeros(4)), fake)


def test_one_number_a_sample_from_the_generator():
    real, fake = torch.ones(64, 3, 5, 5), torch.zeros(64, 3, 5, 5)
    y = ops.interpolate(real, fake, generator=torch.Generator().manual_seed(7))
    epsilon = torch.rand(64, generator=torch.Generator().manual_seed(7))
    assert torch.equal(y, epsilon.reshape(-1, 1, 1, 1).expand_as(y))
    assert len(epsilon.unique()) > 60
    torch.manual_seed(3)
    a = ops.interpolate(real, fake)
    torch.manual_seed(3)
    assert torch.equal(a, ops.interpolate(real, fake))
    assert not torch.equal(a, ops.interpolate(real, fake))


def test_half_types_draw_in_float32_and_round_once():
    real, fake = torch.randn(8, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    y = ops.interpolate(real, fake, generator=torch.Generator().manual_seed(1))
    epsilon = torch.rand(8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(y, written_out(real.float(), fake.float(), epsilon).bfloat16())


def test_other_dtypes_beside_real():
    real, fake, e = (
        torch.randn(3, 4),
        torch.randn(3, 4).double().requires_grad_(),
        torch.rand(3).bfloat16().requires_grad_(),
    )
    y = ops.interpolate(real, fake, epsilon=e)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, written_out(real, fake.float(), e.float()))
    a, b = torch.autograd.grad(y.sum(), (fake, e))
    assert (a.dtype, b.dtype) == (torch.float64, torch.bfloat16)


def test_derivatives_of_every_order():
    args = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    args.append(torch.rand(2, dtype=torch.float64, requires_grad=True))

    def function(real, fake, e):
        return ops.interpolate(real, fake, epsilon=e)

    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)

    def second(real, fake, e):
        y = function(real, fake, e)
        first = torch.autograd.grad(y.pow(3).sum(), (real, fake, e), create_graph=True)
        return torch.autograd.grad(sum(f.pow(2).sum() for f in first), (real, fake, e), create_graph=True)

    assert torch.autograd.gradcheck(second, args)


def test_a_gradient_penalty_reaches_the_generator():
    """With the fake not detached, the penalty's gradient reaches it through the point and through the norm."""
    real, fake = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    e = torch.rand(4, dtype=torch.float64)

    def penalty(fake):
        at = ops.interpolate(real, fake, epsilon=e)
        (g,) = torch.autograd.grad(at.sin().prod(1).sum(), at, create_graph=True)
        return (ops.sample_norm(g) - 1).square().mean()

    assert torch.autograd.gradcheck(penalty, (fake,))


@pytest.mark.parametrize("name", ["interpolate_backward"])
def test_opcheck_of_the_backward(name):
    real, fake, grad = (torch.randn(2, 3, 4, requires_grad=True) for _ in range(3))
    torch.library.opcheck(
        OPS[name].overload, (grad, real, fake, torch.rand(2, requires_grad=True), [True, False, True])
    )


def test_compiles_without_a_break():
    real, fake = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8, requires_grad=True)
    e = torch.rand(4)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda r, f: ops.interpolate(r, f, epsilon=e).square().sum(), fullgraph=True, backend="aot_eager"
    )
    found, expected = compiled(real, fake), ops.interpolate(real, fake, epsilon=e).square().sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v, fake)[0] for v in (found, expected)))
    drawn = torch.compile(lambda r, f: ops.interpolate(r, f), fullgraph=True, backend="aot_eager")
    y = drawn(torch.ones(4, 6), torch.zeros(4, 6))
    assert torch.equal(y, y[:, :1].expand(4, 6))


def test_the_thread_count_does_not_change_the_bits():
    args = [torch.randn(3, 40000, requires_grad=True) for _ in range(2)] + [torch.rand(3, requires_grad=True)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y = ops.interpolate(args[0], args[1], epsilon=args[2])
            results.append((y, *torch.autograd.grad(y.square().sum(), args)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("shape", [(0, 3, 4), (0,), (2, 0, 3)])
def test_empty(shape):
    args = [torch.randn(shape, requires_grad=True) for _ in range(2)] + [torch.rand(shape[0], requires_grad=True)]
    y = ops.interpolate(args[0], args[1], epsilon=args[2])
    assert y.shape == shape
    for g, a in zip(torch.autograd.grad(y.sum(), args), args):
        assert g.shape == a.shape
        assert not g.any()


@pytest.mark.parametrize(
    ("real", "fake", "options", "error", "message"),
    [
        (torch.ones(4, 3), torch.ones(3, 3), {}, ValueError, r"real has shape \(4, 3\) and fake \(3, 3\), expected "
        r"the same"),
        (torch.ones(4, 3), torch.ones(4, 1), {}, ValueError, r"fake \(4, 1\)"),
        (torch.ones(()), torch.ones(()), {}, ValueError, r"expected the same shape \(N, \.\.\.\)"),
        (torch.ones(4, 3), torch.ones(4, 3).long(), {}, TypeError, r"fake has dtype torch\.int64"),
        (torch.ones(4, 3).long(), torch.ones(4, 3), {}, TypeError, r"real has dtype torch\.int64"),
        (torch.ones(4, 3), None, {}, TypeError, r"fake is a NoneType, expected a torch\.Tensor"),
        ([1.0], torch.ones(1), {}, TypeError, r"real is a list"),
        (torch.ones(4, 3), torch.ones(4, 3, device="meta"), {}, ValueError, r"fake is on meta and real on cpu"),
        (torch.ones(4, 3), torch.ones(4, 3), {"epsilon": torch.rand(3)}, ValueError, r"epsilon has shape \(3,\), "
        r"expected"),
        (torch.ones(4, 3), torch.ones(4, 3), {"epsilon": torch.rand(4, 3)}, ValueError, r"epsilon has shape \(4, 3\)"),
        (torch.ones(4, 3), torch.ones(4, 3), {"epsilon": torch.ones(4).long()}, TypeError, r"epsilon has dtype "
        r"torch\.int64"),
        (
            torch.ones(4, 3), torch.ones(4, 3), {"epsilon": torch.rand(4), "generator": torch.Generator()}, ValueError,
            "both epsilon and generator",
        ),
    ],
)  # fmt: skip
def test_errors(real, fake, options, error, message):
    with pytest.raises(error, match=message):
        ops.interpolate(real, fake, **options)


def test_a_forced_backend_says_why():
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match="takes float32, float64, not float16"):
        ops.interpolate(torch.ones(2, 3).half(), torch.ones(2, 3).half())
