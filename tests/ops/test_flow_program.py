"""ops.flow_program beyond what every op is tested for: errors, tiles, threads, kept values, broken programs."""

from __future__ import annotations

import pytest
import torch

from genfast.ops.flow_program import OP, OP_BACKWARD, TILES
from genfast.reference import flow_program as reference

X, CONTEXT, WEIGHTS, CODE, OPTIONS, ROWS, TILE, KEEP = range(8)
SAMPLES = {sample.label: sample.args for sample in OP.samples(torch.Generator().manual_seed(0))}
each_program = pytest.mark.parametrize("args", SAMPLES.values(), ids=SAMPLES)


def batch(args, n, dtype=torch.float64, **changes):
    """The call with n rows, some numbers of the program's call changed."""
    generator = torch.Generator().manual_seed(n)
    made = list(args)
    for i in (X, CONTEXT):
        if made[i] is not None:
            made[i] = torch.randn(n, made[i].shape[1], generator=generator, dtype=dtype)
    made[WEIGHTS] = made[WEIGHTS].to(dtype)
    for name, value in changes.items():
        made[{"tile": TILE, "keep": KEEP}[name]] = value
    return made


def gradients(call, args):
    leaves = [
        a.clone().requires_grad_() if i in (X, CONTEXT, WEIGHTS) and a is not None else a for i, a in enumerate(args)
    ]
    z, total, _ = call(*leaves)
    generator = torch.Generator().manual_seed(3)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in (z, total))
    return [z, total, *torch.autograd.grad(loss, [a for a in leaves[:3] if a is not None])]


@each_program
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("n", [1, 31, 33, 130])
def test_batches_of_any_size_in_tiles_of_any(args, tile, n):
    expected = gradients(reference.flow_program, batch(args, n))
    for keep in (False, True):
        for made, wanted in zip(gradients(OP, batch(args, n, tile=tile, keep=keep)), expected):
            torch.testing.assert_close(made, wanted, rtol=1e-11, atol=1e-11)


@each_program
def test_two_runs_give_the_same_bits_and_threads_the_same_forward(args):
    args = batch(args, 70_000 if args[X].shape[1] < 4 else 20_000, torch.float32, keep=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two, again = gradients(OP, args), gradients(OP, args)
        torch.set_num_threads(1)
        one = gradients(OP, args)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(two, again))
    assert all(torch.equal(a, b) for a, b in zip(one[:-1], two[:-1]))  # all but the weights' sums
    torch.testing.assert_close(one[-1], two[-1], rtol=1e-3, atol=1e-3 * float(two[-1].abs().max()))


@each_program
def test_strided_inputs(args):
    args = batch(args, 40)
    strided = list(args)
    for i in (X, CONTEXT):
        if args[i] is not None:
            strided[i] = args[i].t().contiguous().t()
    strided[WEIGHTS] = torch.stack([args[WEIGHTS], args[WEIGHTS]], 1)[:, 0]
    for a, b in zip(gradients(OP, strided), gradients(OP, args)):
        assert torch.equal(a, b)


@each_program
def test_second_derivatives(args):
    def second(call):
        leaves = [a.clone().requires_grad_() for a in args[:3] if a is not None]
        of = iter(leaves)
        whole = [next(of) if i < 3 and a is not None else a for i, a in enumerate(args)]
        z, total, _ = call(*whole)
        grads = torch.autograd.grad((z.square().sum() + total.square().sum()), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    for a, b in zip(second(OP), second(reference.flow_program)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@each_program
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(args, bad):
    args = batch(args, 35)
    expected = OP(*args)[:2]
    args[X] = args[X].clone()
    args[X][7, 0] = bad
    z, total, _ = OP(*args)
    others = torch.arange(35) != 7
    assert torch.equal(z[others], expected[0][others])
    assert torch.equal(total[others], expected[1][others])
    assert not bool(z[7].isfinite().all() & total[7].isfinite()) or bad == float("inf")


@each_program
def test_gradients_that_are_not_needed_are_not_made(args):
    args = batch(args, 33, keep=True)
    _, _, values = OP(*args)
    call = (None, torch.ones(33, dtype=torch.float64), *args[:3], values, *args[3:7])
    every = OP_BACKWARD(*call, True, args[CONTEXT] is not None)
    few = OP_BACKWARD(*call, False, False)
    assert len(few[0]) == len(few[1]) == 0
    torch.testing.assert_close(few[2], every[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({X: torch.zeros(5, 4).double()}, ValueError, r"x has shape \(5, 4\), expected \(N, 3\)"),
        ({X: torch.zeros(5, 3).long()}, TypeError, "x has dtype torch.int64, expected a floating-point dtype"),
        ({CONTEXT: None}, ValueError, r"context is None, expected \(5, 2\)"),
        ({CONTEXT: torch.zeros(4, 2).double()}, ValueError, r"context has shape \(4, 2\), expected \(5, 2\)"),
        ({WEIGHTS: torch.zeros(7).double()}, ValueError, r"weights has shape \(7,\), expected"),
        ({WEIGHTS: torch.zeros(7)}, TypeError, "weights has dtype torch.float32, expected that of x, torch.float64"),
        ({TILE: 48}, ValueError, "tile=48, expected one of 32, 64, 128"),
        ({ROWS: 3}, ValueError, "rows=3, expected"),
        (
            {CODE: torch.zeros(3).long()},
            ValueError,
            r"code is torch.int64 of shape \(3,\), expected a FlowProgram's int64 vector",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    args = [change.get(i, a) for i, a in enumerate(SAMPLES["autoregressive, affine"])]
    with pytest.raises(error, match=f"flow_program: {message}"):
        OP(*args)


@each_program
def test_a_broken_program_is_refused_before_a_kernel_runs(args):
    """Every number of the code in turn becomes another; what is taken must stay within its memory."""
    generator = torch.Generator().manual_seed(1)
    refused = 0
    for i in torch.randperm(len(args[CODE]), generator=generator)[:200].tolist():
        for value in (-7, 1 << 20, 1 << 60):
            code = args[CODE].clone()
            code[i] = value
            changed = [*args[:CODE], code, *args[CODE + 1 :]]
            try:
                z, _, _ = OP(*changed)
            except ValueError as error:
                refused += "flow_program" in str(error)
            else:
                assert z.shape == args[X].shape
    assert refused > 300


@each_program
def test_the_values_that_are_kept_are_the_references(args):
    for n in (0, 1, 70):
        args = batch(args, n, keep=True)
        # torch's softplus, in the logistic density, leaves e^-x out beyond x = 20.
        torch.testing.assert_close(OP(*args)[2], reference.flow_program(*args)[2], rtol=1e-11, atol=3e-9)
