"""Lowering masked networks to degree-ordered programs."""

from __future__ import annotations

import pytest
import torch

from genfast import ops
from genfast.sampling import DegreeProgram, Layer, LoweringError


def strict(inputs: int, width: int = 2) -> torch.Tensor:
    return torch.ones(inputs, inputs).tril(-1).repeat_interleave(width, 0).bool()


def test_levels_follow_from_the_masks():
    order = torch.tensor([2, 0, 3, 1])  # input i is the order[i]-th
    mask = (order[:, None] > order).repeat_interleave(2, 0)
    program = DegreeProgram.build([Layer(torch.randn(8, 4), mask=mask)])
    assert (program.inputs, program.width, program.levels) == (4, 2, 4)
    assert program.order.tolist() == [1, 3, 0, 2]
    coupling = torch.tensor([[0, 0], [1, 0]]).bool().repeat_interleave(3, 0).repeat_interleave(3, 1)
    assert DegreeProgram.build([Layer(torch.randn(6, 6), mask=coupling)]).levels == 2
    assert DegreeProgram.build([Layer(torch.randn(6, 6), mask=torch.zeros(6, 6))]).levels == 1


def test_units_that_nothing_needs_are_left_out():
    hidden = torch.tensor([0, 1, 2, 3])  # degree 3 needs the last input, which no parameter sees
    mask, out = hidden[:, None] >= torch.arange(4), (torch.arange(4) - 1)[:, None] >= hidden
    program = DegreeProgram.build([Layer(torch.randn(4, 4), mask=mask), Layer(torch.randn(4, 4), mask=out)])
    assert program.multiplications == (1 + 2 + 3) + (0 + 1 + 2 + 3)
    assert "4 inputs of 1 parameters in 4 levels" in str(program)


def test_given_levels_and_those_that_cannot_be():
    layers = [Layer(torch.randn(6, 3), mask=torch.tensor([[0, 0, 0], [1, 0, 0], [1, 0, 0]]).repeat_interleave(2, 0))]
    assert DegreeProgram.build(layers).levels == 2
    assert DegreeProgram.build(layers, levels=[0, 2, 1]).order.tolist() == [0, 2, 1]
    with pytest.raises(LoweringError, match="input 1 of level 0 depends on input 0 of level 0, expected a lower one"):
        DegreeProgram.build(layers, levels=torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"levels=\(0, 2, 3\), expected 3 numbers that take all values from 0"):
        DegreeProgram.build(layers, levels=[0, 2, 3])


def test_masks_that_no_order_solves():
    with pytest.raises(LoweringError, match="parameters of input 1 depend on that input itself"):
        DegreeProgram.build([Layer(torch.randn(3, 3), mask=torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0, 0]]))])
    with pytest.raises(LoweringError, match=r"inputs \[0, 2\] depend on one another in a circle"):
        DegreeProgram.build([Layer(torch.randn(3, 3), mask=torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]]))])
    with pytest.raises(LoweringError, match="parameters of input 0 depend on that input itself"):
        DegreeProgram.build([Layer(torch.randn(3, 3))])


@pytest.mark.parametrize(
    ("layers", "kind", "message"),
    [
        ([], ValueError, "layers is empty"),
        ([Layer(torch.ones(4, 2).long())], TypeError, "weight of layer 1 is torch.int64, expected a floating-point tensor"),
        ([Layer([1.0])], TypeError, "weight of layer 1 is list"),
        ([Layer(torch.ones(4))], ValueError, r"weight of layer 1 has shape \(4,\), expected \(out, in\)"),
        ([Layer(torch.ones(4, 2), torch.ones(3))], ValueError, r"bias of layer 1 has shape \(3,\), expected \(4,\)"),
        ([Layer(torch.ones(4, 2), mask=torch.ones(4, 3))], ValueError, r"mask of layer 1 has shape \(4, 3\), expected"),
        ([Layer(torch.ones(4, 2), after="swish")], ValueError, "after='swish' of layer 1, expected one of 'none', 'relu'"),
        ([Layer(torch.ones(4, 2), source=1)], ValueError, r"source=1 of layer 1, expected an index from 0 \(x\) to 0"),
        ([Layer(torch.ones(4, 2), residual=-1)], ValueError, "residual=-1 of layer 1"),
        ([Layer(torch.ones(4, 2), gate=torch.ones(3))], ValueError, r"gate of layer 1 has shape \(3,\), expected \(N, 4\)"),
        ([Layer(torch.ones(3, 2))], ValueError, "the last layer gives 3 numbers for 2 inputs"),
        ([Layer(torch.ones(0, 0))], ValueError, "the last layer gives 0 numbers for 0 inputs"),
        ([Layer(torch.ones(3, 2)), Layer(torch.ones(2, 4))], ValueError, r"weight of layer 2 .* expected \(out, 3\)"),
        ([Layer(torch.ones(4, 2), residual=0)], ValueError, "layer 1 gives 4 numbers, its residual 2"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit(layers, kind, message):
    with pytest.raises(kind, match=message):
        DegreeProgram.build(layers)


def test_packing_is_kept_until_a_weight_changes():
    weight, bias = torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(8))
    layers = [Layer(weight, bias, strict(4))]
    program = DegreeProgram.build(layers)
    with torch.no_grad():
        first = program.packed()
        assert program.packed() is first
        assert program.update(layers).packed() is first
        weight.mul_(2)
        second = program.packed()
        assert second is not first
        weight.data = torch.randn(8, 4)
        assert program.packed() is not second
        assert program.packed(torch.float64).dtype is torch.float64
        z = torch.randn(3, 4)
        x, _ = ops.autoregressive_inverse(z, program)
        fresh, _ = ops.autoregressive_inverse(z, DegreeProgram.build(layers))
        assert torch.equal(x, fresh)
    packed = program.packed()
    assert packed.requires_grad
    packed.sum().backward()
    assert torch.equal(weight.grad, strict(4).float())
    assert torch.equal(bias.grad, torch.ones(8))
    with torch.inference_mode():
        assert torch.equal(program.packed(), packed)


def test_update_lowers_anew_where_a_mask_or_a_shape_has_changed():
    mask = strict(3)
    program = DegreeProgram.build([Layer(torch.randn(6, 3), mask=mask)])
    same = program.update([Layer(torch.randn(6, 3), mask=mask)])
    assert same.code is program.code
    assert program.update([Layer(torch.randn(6, 3), mask=mask.float())]).code is program.code
    mask[:, 0] = False
    changed = program.update([Layer(torch.randn(6, 3), mask=mask)])
    assert changed.multiplications < program.multiplications
    wider = program.update([Layer(torch.randn(9, 3), mask=strict(3, 3))])
    assert wider.width == 3


def test_weights_may_be_shared_and_in_other_dtypes():
    weight = torch.randn(4, 4, requires_grad=True)
    degrees = torch.arange(4)
    mask = degrees[:, None] >= degrees
    layers = [Layer(weight, mask=mask), Layer(weight, mask=mask), Layer(torch.randn(4, 4).double(), mask=strict(4, 1))]
    x, _ = ops.autoregressive_inverse(torch.randn(5, 4), DegreeProgram.build(layers), "affine:additive")
    x.sum().backward()
    assert weight.grad is not None
    assert x.dtype == torch.float32
