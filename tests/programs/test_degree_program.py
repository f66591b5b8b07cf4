"""Lowering masked networks to degree-ordered programs."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from genfast import models, nn, ops
from genfast.programs.self_check import SelfCheckError
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
        ([Layer(torch.ones(4, 2).long())], TypeError, "weight of layer 1 is torch.int64, expected a floating-point "
        "tensor"),
        ([Layer([1.0])], TypeError, "weight of layer 1 is list"),
        ([Layer(torch.ones(4))], ValueError, r"weight of layer 1 has shape \(4,\), expected \(out, in\)"),
        ([Layer(torch.ones(4, 2), torch.ones(3))], ValueError, r"bias of layer 1 has shape \(3,\), expected \(4,\)"),
        ([Layer(torch.ones(4, 2), mask=torch.ones(4, 3))], ValueError, r"mask of layer 1 has shape \(4, 3\), expected"),
        ([Layer(torch.ones(4, 2), after="swish")], ValueError, "after='swish' of layer 1, expected one of 'none', "
        "'relu'"),
        ([Layer(torch.ones(4, 2), source=1)], ValueError, r"source=1 of layer 1, expected an index from 0 \(x\) to 0"),
        ([Layer(torch.ones(4, 2), residual=-1)], ValueError, "residual=-1 of layer 1"),
        ([Layer(torch.ones(4, 2), gate=torch.ones(3))], ValueError, r"gate of layer 1 has shape \(3,\), expected \(N, "
        r"4\)"),
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


# ---- what a call of the network does beside its layers ----


class Halved(nn.MADENetwork):
    def forward(self, x, context=None):
        return super().forward(x, context) * 0.5


class Described(nn.MADENetwork):
    """A subclass that is its parent."""

    def describe(self):
        return "mine"


class Mistaken(nn.MADENetwork):
    """Says another activation than it has, in its second layer."""

    def layers(self, context=None):
        found = super().layers(context)
        found[1].after = "tanh"
        return found


class Spread(nn.MaskedAutoregressive):
    def _params(self, x, context):
        return super()._params(x, context) * 0.5


class Own(torch.nn.Module):
    """A network with a list of modules under the name of the method."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([nn.MADENetwork(5, (16, 16), outputs=2)])

    def forward(self, x, context=None):
        return self.layers[0](x, context)


def made(kind=nn.MADENetwork):
    torch.manual_seed(0)
    network = kind(5, (16, 16), outputs=2)
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(2)
    return network


def inverted(layer, n=3):
    """How far the inverse is from the forward, and by how many warnings."""
    z = torch.randn(n, 5, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        x, logdet = layer.inverse(z)
        again, minus = layer(x)
    return float((again - z).abs().max() + (logdet + minus).abs().max()), [str(w.message) for w in said]


def add_hook(network):
    network.linears[1].register_forward_hook(lambda m, i, o: o * 0.5)


def add_forward(network):
    forward = network.linears[1].forward
    network.linears[1].forward = lambda *a: forward(*a) * 0.5


def add_module(network):
    class Louder(nn.MaskedLinear):
        def forward(self, x, activation="none"):
            return super().forward(x, activation) * 0.5

    network.linears[1].__class__ = Louder


CHANGED = {
    "a hook": (lambda: (lambda m: (add_hook(m), m)[1])(made()), "linears.1 has the forward hook"),
    "a forward of its own": (lambda: (lambda m: (add_forward(m), m)[1])(made()), "linears.1 has a forward of its own"),
    "another layer": (
        lambda: (lambda m: (add_module(m), m)[1])(made()),
        "linears.1 is a .*Louder, expected a MaskedLinear",
    ),
    "another forward": (lambda: made(Halved), "Halved overrides methods of MADENetwork, but not layers"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_network_that_its_layers_do_not_describe_takes_the_plain_inverse(name):
    build, message = CHANGED[name]
    error, said = inverted(nn.MaskedAutoregressive(build()))
    assert error < 1e-5
    assert len(said) == 1
    assert re.search(message, said[0])


def test_other_changes_of_a_layer_and_none():
    for layer, warned in (
        (Spread(made()), 1),
        (nn.MaskedAutoregressive(made(Described)), 0),
        (nn.MaskedAutoregressive(Own()), 0),
        (nn.MaskedAutoregressive(made()), 0),
    ):
        error, said = inverted(layer)
        assert error < 1e-5
        assert len(said) == warned


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_weights_that_a_call_computes():
    network = made()
    torch.nn.utils.weight_norm(network.linears[0])
    torch.nn.utils.spectral_norm(network.linears[1])
    layer = nn.MaskedAutoregressive(network).eval()
    with torch.no_grad():
        network.linears[0].weight_g.mul_(3)
        network.linears[1].weight_orig.mul_(torch.rand_like(network.linears[1].weight_orig))
    error, said = inverted(layer)
    assert error < 1e-5
    assert not [w for w in said if "inverse" in w]
    z = torch.randn(3, 5)
    for p in network.parameters():
        p.grad = None
    layer.inverse(z)[0].sum().backward()
    grads = [network.linears[0].weight_g.grad.clone(), network.linears[1].weight_orig.grad.clone()]
    for p in network.parameters():
        p.grad = None
    layer.inverse_plain(z)[0].sum().backward()
    torch.testing.assert_close(grads, [network.linears[0].weight_g.grad, network.linears[1].weight_orig.grad])


def test_layers_that_are_not_the_network_are_found_out():
    layer = nn.MaskedAutoregressive(made(Mistaken))
    with pytest.raises(
        SelfCheckError, match=r"differs from what its network says .* the difference begins at layer 2 \(linears.1\)"
    ):
        layer.inverse(torch.randn(3, 5))


def test_the_comparison_of_layers_runs_once_and_leaves_no_trace(monkeypatch):
    network, calls = made(), []
    forward = nn.MADENetwork.forward
    monkeypatch.setattr(
        nn.MADENetwork, "forward", lambda self, x, context=None: calls.append(len(x)) or forward(self, x, context)
    )
    layer = nn.MaskedAutoregressive(network)
    state, z = torch.get_rng_state(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    layer.inverse(z[:0])
    assert calls == []
    first = layer.inverse(z)[0]
    assert calls == [1]
    assert first.requires_grad
    network.linears[0].weight.data.mul_(2)
    assert not torch.equal(layer.inverse(z)[0], first)
    assert calls == [1]
    network.resample(order="reversed")
    layer.inverse(z)
    assert calls == [1, 1]
    assert torch.equal(state, torch.get_rng_state())


def test_a_row_that_rounding_spoils_is_no_error():
    """Scales of up to 1000 against shifts of a thousand: x loses digits that the comparison must not ask for."""
    for seed in range(5):
        torch.manual_seed(seed)
        network = nn.MADENetwork(12, (64, 64), outputs=2)
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(30)
        nn.MaskedAutoregressive(network).inverse(torch.randn(2, 12))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.data.mul_(2),
        lambda w: w.detach().numpy().__imul__(2),
        lambda w: setattr(w, "data", w.data * 2),
        lambda w: w.data.view(-1)[-1:].add_(1),
    ],
)
def test_packed_weights_follow_every_write(write):
    weight, z = torch.nn.Parameter(torch.randn(8, 4)), torch.randn(3, 4)
    program = DegreeProgram.build([Layer(weight, mask=strict(4))])
    with torch.no_grad():
        program.packed()
        write(weight)
        found, _ = ops.autoregressive_inverse(z, program)
        expected, _ = ops.autoregressive_inverse(z, DegreeProgram.build([Layer(weight, mask=strict(4))]))
    assert torch.equal(found, expected)


def test_masks_are_compared_by_contents():
    mask = strict(3)
    program = DegreeProgram.build([Layer(torch.randn(6, 3), mask=mask)])
    mask.data[:, 0] = False
    assert program.update([Layer(torch.randn(6, 3), mask=mask)]).multiplications < program.multiplications
    network, z = made(), torch.randn(3, 5)
    layer = nn.MaskedAutoregressive(network)
    with torch.no_grad():
        layer.inverse(z)
        other = made()
        other.resample(order="reversed")
        for a, b in zip(network.buffers(), other.buffers()):
            a.data.copy_(b)  # as moving averages and DistributedDataParallel write buffers
        x, _ = layer.inverse(z)
        torch.testing.assert_close(layer(x)[0], z)


def test_binary_samples_of_a_network_with_hooks():
    model = models.MADE(12, hidden=24).eval()

    def drawn(method):
        return model.sample(40, generator=torch.Generator().manual_seed(0), method=method)

    assert torch.equal(drawn("cached"), drawn("naive"))
    torch.nn.utils.parametrizations.weight_norm(model.network.linears[0])
    model.network.linears[0].parametrizations.weight.original0.data.mul_(5)
    assert torch.equal(drawn("cached"), drawn("naive"))
    model.network.linears[0].register_forward_hook(lambda m, i, o: o * 3)
    with pytest.warns(UserWarning, match="one pass for each feature.*forward hook"):
        cached = drawn("cached")
    assert torch.equal(cached, drawn("naive"))


def _scaled_output(layer):
    layer.network.linears[-1].register_forward_hook(lambda module, args, y: 2 * y)


def _other_forward(layer):
    linear = layer.network.linears[0]
    linear.forward = lambda x, activation="none": type(linear).forward(linear, x, activation) + 0.1


def _other_degrees(layer):
    linear = layer.network.linears[1]
    linear.in_degrees.copy_(torch.ones_like(linear.in_degrees))
    linear._sort()


@pytest.mark.filterwarnings("ignore:MaskedAutoregressive. the inverse takes one pass")
@pytest.mark.parametrize(
    "change",
    [
        _scaled_output,
        _other_forward,
        _other_degrees,
        lambda layer: setattr(layer.network, "activation", "tanh"),
        lambda layer: setattr(layer.network.linears[0], "weight", torch.nn.Parameter(torch.randn(12, 5))),
        lambda layer: layer.network.linears[2].weight.data.mul_(1.5),
        lambda layer: layer.network.linears.__setitem__(1, nn.MaskedLinear([2] * 12, [3] * 12)),
        lambda layer: layer.network.resample(order="reversed"),
        lambda layer: setattr(layer, "network", nn.MADENetwork(5, (7,), outputs=2)),
    ],
    ids=["hook", "forward", "degrees", "setting", "parameter", "data", "submodule", "resample", "network"],
)
def test_the_inverse_follows_every_change_between_two_calls(change):
    layer = nn.MaskedAutoregressive(nn.MADENetwork(5, (12, 12), outputs=2)).eval()
    z = torch.randn(4, 5)
    with torch.no_grad():
        first, _ = layer.inverse(z)
        assert layer._unchanged_program() is layer._program
        change(layer)
        x, logdet = layer.inverse(z)
        expected, expected_logdet = layer.inverse_plain(z)
    assert torch.allclose(x, expected, atol=1e-5)
    assert torch.allclose(logdet, expected_logdet, atol=1e-5)
    assert not torch.allclose(x, first, atol=1e-3)


def test_a_setting_that_may_change_in_place_is_looked_at_anew():
    layer = nn.MaskedAutoregressive(nn.MADENetwork(5, (12,), outputs=2)).eval()
    layer.network.notes = []
    with torch.no_grad():
        layer.inverse(torch.randn(2, 5))
    assert layer._unchanged_program() is None


def test_a_parameter_of_another_shape_is_not_read_as_the_old_one():
    layer = nn.MaskedAutoregressive(nn.MADENetwork(5, (12,), outputs=2)).eval()
    with torch.no_grad():
        layer.inverse(torch.randn(2, 5))
        layer.network.linears[0].weight.data = torch.randn(14, 5)
        with pytest.raises(ValueError, match=r"weight of layer 1 has shape \(14, 5\), expected \(12, 5\)"):
            layer.inverse(torch.randn(2, 5))
