"""Other people's modules are called or refused, never mistaken; a program that differs from its network is found
out."""

from __future__ import annotations

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import genfast
from genfast import nn as gnn
from genfast._calls import hook_in_the_way, stands_for, weights_of_calls
from genfast._contents import Contents
from genfast.programs.self_check import SelfCheckError
from genfast.sampling import LoweringError, Sampler, rules

SHAPE = (1, 6, 5)


class Call(nn.Module):
    """A function of a feature map as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def around(*middle, features=8, out=8):
    torch.manual_seed(0)
    first = gnn.MaskedConv2d(1, features, 3, mask_type="A")
    return nn.Sequential(gnn.ScaleLevels(4), first, *middle, nn.Conv2d(out, 4, 1)).eval()


def error_of(network, shape=SHAPE, levels=4, **options):
    """How far the program is from the network, with nothing that would raise first."""
    x = torch.randint(levels, (2, *shape), generator=torch.Generator().manual_seed(1))
    found = Sampler(network, levels=levels, self_check=False, **options).teacher_forced(x)
    with torch.no_grad():
        expected = network(x)
    return float((found - expected).abs().max() / expected.abs().max())


# ---- what a call does beside its class's forward ----


def old_weight_norm(net):
    nn.utils.weight_norm(net[3])
    with torch.no_grad():
        net[3].weight_g.mul_(3)  # the weight between calls is the old one


def old_spectral_norm(net):
    nn.utils.spectral_norm(net[3])
    nn.utils.spectral_norm(net[1])
    with torch.no_grad():
        net[3].weight_orig.mul_(torch.rand_like(net[3].weight_orig))


def pruned(net):
    prune.l1_unstructured(net[3], "weight", 0.5)
    prune.random_unstructured(net[3], "bias", 0.5)
    with torch.no_grad():
        net[3].weight_orig.mul_(3)


def pruned_twice(net):
    prune.l1_unstructured(net[3], "weight", 0.5)
    prune.ln_structured(net[3], "weight", 0.5, 2, 0)


def parametrized(net):
    parametrizations.spectral_norm(net[3])
    parametrizations.weight_norm(net[1])


FOLLOWED = [old_weight_norm, old_spectral_norm, pruned, pruned_twice, parametrized]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
@pytest.mark.parametrize("change", FOLLOWED)
def test_hooks_that_compute_a_weight_are_followed(change):
    net = around(nn.ReLU())
    change(net)
    x = torch.randint(4, (2, *SHAPE))
    with weights_of_calls(net):
        weights = [m.weight.detach().clone() for m in (net[1], net[3])]
    found = Sampler(net, levels=4, self_check=False).teacher_forced(x)
    with torch.no_grad():
        torch.testing.assert_close(found, net(x), rtol=1e-5, atol=1e-5)
    for module, weight in zip((net[1], net[3]), weights):
        torch.testing.assert_close(module.weight, weight)  # what the call has left


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning")
def test_reading_weights_leaves_the_module_as_it_was():
    net = around(nn.ReLU())
    old_weight_norm(net)
    old, inside = net[3].weight, None
    with weights_of_calls(net):
        inside = net[3].weight
    assert net[3].weight is old
    torch.testing.assert_close(inside, 3 * old)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 4


class InnerScaled(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight, bias) * 4


class Property(nn.Conv2d):
    @property
    def dilation(self):
        return (1, 1)

    @dilation.setter
    def dilation(self, value):
        pass


class Called(nn.Conv2d):
    def __call__(self, x):
        return 4 * super().__call__(x)


class Wider(nn.ReLU):
    def forward(self, x):
        return 2 * super().forward(x) + 1


class OnlyInit(gnn.MaskedConv2d):
    """A subclass that is its parent."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3)
        self.note = "mine"

    def describe(self):
        return self.note


def hooked(register, hook):
    def change(net):
        getattr(net[3], register)(hook)

    return change


def own_forward(net):
    forward = net[3].forward
    net[3].forward = lambda x: forward(x) * 4


def replaced(module):
    def change(net):
        net[3] = module

    return change


def times_four(module, inputs, output):
    return output * 4


def twice(module, inputs):
    return (inputs[0] * 2,)


REFUSED = {
    "forward hook": (hooked("register_forward_hook", times_four), r"^3 \(Conv2d\): has the forward hook times_four"),
    "pre-hook": (hooked("register_forward_pre_hook", twice), r"^3 \(Conv2d\): has the forward pre-hook twice.*naive"),
    "hook of a block": (
        lambda net: net.register_forward_hook(times_four),
        r"^the network \(Sequential\): has the forward hook",
    ),
    "a wide kernel": (
        replaced(Scaled(8, 4, 3, padding=1)),
        "^conv2d in 3: calls conv2d with a kernel that is not 1 x 1",
    ),
    "a module of torch": (
        replaced(nn.PReLU()),
        r"3 \(PReLU\): a torch.nn.modules.activation.PReLU has no pixel program",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_call_adds_is_refused_by_name(name):
    change, message = REFUSED[name]
    net = around(nn.ReLU())
    change(net)
    with pytest.raises(LoweringError, match=message):
        Sampler(net, levels=4, self_check=False, group_order="interleaved", input="integers").sample(
            1, SHAPE, method="cached"
        )


def test_global_hooks_are_refused():
    net = around(nn.ReLU())
    sampler = Sampler(net, levels=4)
    sampler.prepare(SHAPE)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: o * 2 if isinstance(m, nn.Conv2d) else None)
    try:
        with pytest.raises(LoweringError, match="has the forward hook of all modules"):
            sampler.sample(1, SHAPE, method="cached")
    finally:
        handle.remove()
    assert sampler.sample(1, SHAPE, method="cached").shape == (1, *SHAPE)


def test_a_hook_that_comes_later_is_seen():
    net = around(nn.ReLU())
    sampler = Sampler(net, levels=4)
    first = sampler.prepare(SHAPE)
    handle = net[3].register_forward_hook(lambda m, i, o: o * 2)
    with pytest.raises(LoweringError, match="forward hook"):
        sampler.prepare(SHAPE)
    handle.remove()
    net[2].register_forward_hook(lambda m, i, o: None).remove()
    assert str(sampler.prepare(SHAPE)) == str(first)
    net[2].forward = torch.tanh  # a forward of its own, and another function
    x = torch.randint(4, (2, *SHAPE))
    with torch.no_grad():
        torch.testing.assert_close(sampler.teacher_forced(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "last", [own_forward, *(replaced(c(8, 4, 1)) for c in (Scaled, InnerScaled, Property, Called))]
)
def test_a_changed_convolution_is_followed(last):
    net = around(nn.ReLU())
    last(net)
    assert error_of(net) < 1e-6


@pytest.mark.parametrize("middle", [lambda: Wider(), lambda: nn.Sequential(OnlyInit(8), Wider()), lambda: OnlyInit(8)])
def test_subclasses_are_traced_or_are_their_parents(middle):
    assert error_of(around(middle())) < 1e-6


class Equalised(nn.Conv2d):
    """A weight that is scaled at each call, and split into groups."""

    def forward(self, x):
        return F.conv2d(input=x, weight=self.weight * 0.3, bias=self.bias + 1, groups=self.groups)


def test_a_weight_that_is_computed_in_the_forward():
    net = around(Equalised(8, 8, 1, groups=2))
    sampler, x = Sampler(net, levels=4), torch.randint(4, (2, *SHAPE))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(sampler.teacher_forced(x), net(x), rtol=1e-5, atol=1e-6)
            net[2].weight.data.mul_(3)


def test_which_class_a_module_stands_for():
    assert stands_for(OnlyInit(4), (gnn.MaskedConv2d,)) is gnn.MaskedConv2d
    assert stands_for(parametrizations.weight_norm(OnlyInit(4)), (gnn.MaskedConv2d,)) is gnn.MaskedConv2d
    assert stands_for(gnn.MaskedConv2d(1, 1, 3), (nn.Conv2d,)) is None
    for module in (Scaled(1, 1, 1), InnerScaled(1, 1, 1), Property(1, 1, 1), Called(1, 1, 1)):
        assert stands_for(module, (nn.Conv2d,)) is None
    module = nn.Conv2d(1, 1, 1)
    module._conv_forward = None
    assert stands_for(module, (nn.Conv2d,)) is None
    plain = nn.Conv2d(1, 1, 1)
    assert hook_in_the_way(plain) == ""
    plain.register_full_backward_hook(lambda m, i, o: None)  # runs in no forward pass
    assert hook_in_the_way(plain) == ""


# ---- writes in place, keywords and small functions ----


class Branch(nn.Module):
    """x + f(x), the first part of f in place or not."""

    def __init__(self, first):
        super().__init__()
        self.branch = nn.Sequential(first, nn.Conv2d(8, 8, 1))

    def forward(self, x):
        return x + self.branch(x)


def with_old(write):
    """The old name of a tensor that is written into."""

    def function(x):
        old = x
        x = write(x)
        return old + x * 0.5

    return Call(function)


def accumulated(x):
    kept = x
    for factor in (0.5, 2.0):
        x += torch.tanh(x) * factor
    return torch.cat((kept, x), 1)


def through_dropout(x):
    y = F.dropout(x, 0.5, False)  # the same tensor
    y.relu_()
    return x - 2 * y


def forgotten(x):
    x.mul_(0.5)
    F.relu(x, inplace=True)
    return x


def gated_by_chunks(x):
    f, g = x.chunk(2, dim=-3)
    return g.sigmoid() * f


def a_part_in_place(x):
    a, b = x.chunk(2, 1)
    return torch.cat((a.relu_(), b), 1) + x


def the_whole_in_place(x):
    part = x[:, 4:]
    return torch.cat((x.relu_()[:, :4], part), 1)


def cloned(x):
    y = x.clone()
    y.tanh_()
    return x - y


MIDDLES = {
    "in-place relu opens a branch": lambda: (Branch(nn.ReLU(True)),),
    "in-place elu opens a branch": lambda: (Branch(nn.ELU(inplace=True)),),
    "in-place leaky relu opens a branch": lambda: (Branch(nn.LeakyReLU(0.3, True)),),
    "dropout in place, then relu": lambda: (Branch(nn.Sequential(nn.Dropout(0.5, True), nn.ReLU(True))),),
    "add_": lambda: (with_old(lambda x: x.add_(torch.tanh(x), alpha=0.5)),),
    "iadd": lambda: (with_old(lambda x: operator.iadd(x, torch.tanh(x))),),
    "isub": lambda: (with_old(lambda x: operator.isub(x, torch.tanh(x))),),
    "imul": lambda: (with_old(lambda x: operator.imul(x, 3)),),
    "itruediv": lambda: (with_old(lambda x: operator.itruediv(x, 3)),),
    "torch.relu_": lambda: (with_old(torch.relu_),),
    "F.elu_": lambda: (with_old(F.elu_),),
    "neg_": lambda: (with_old(lambda x: x.neg_()),),
    "accumulated": lambda: (Call(accumulated), nn.Conv2d(16, 8, 1)),
    "through dropout": lambda: (Call(through_dropout),),
    "forgotten results": lambda: (Call(forgotten),),
    "cloned": lambda: (Call(cloned),),
    "alpha": lambda: (Call(lambda x: torch.add(x, torch.tanh(x), alpha=2.5)),),
    "sub alpha": lambda: (Call(lambda x: torch.sub(torch.tanh(x), x, alpha=3)),),
    "keywords": lambda: (Call(lambda x: F.elu(input=torch.add(input=x, other=x, alpha=2))),),
    "module keywords": lambda: (Call(lambda x: x), Branch(nn.Identity())),
    "number first": lambda: (Call(lambda x: 1 - 2 * x + 0.25),),
    "half": lambda: (Call(lambda x: x - 0.5),),
    "negative": lambda: (Call(lambda x: -x / 3),),
    "leaky": lambda: (Call(lambda x: F.leaky_relu(x, 0.2)), nn.LeakyReLU(-0.5)),
    "gate by hand": lambda: (Call(lambda x: torch.tanh(x[:, :4]) * torch.sigmoid(x[:, 4:])),),
    "gate by chunks": lambda: (Call(gated_by_chunks),),
    "split": lambda: (Call(lambda x: torch.cat(torch.split(x, [3, 5], 1)[::-1], dim=-3)),),
    "glu": lambda: (nn.GLU(1),),
    "crop": lambda: (Call(lambda x: F.pad(x, (0, 0, 1, 0))[:, :, :6]),),
    "crop all": lambda: (Call(lambda x: F.pad(x, (2, 0, 1, 0))[..., :-1, :-2]),),
    "crop by padding": lambda: (Call(lambda x: F.pad(x, (1, -1))),),
    "clone and contiguous": lambda: (Call(lambda x: x.clone().contiguous().float().detach() + x),),
    "functional dropout": lambda: (Call(lambda x: F.dropout(x, 0.5, training=False)),),
}
HALVED = {"gate by hand", "gate by chunks", "glu"}


@pytest.mark.parametrize("name", MIDDLES)
def test_functions_and_writes_in_place(name):
    assert error_of(around(*MIDDLES[name](), out=4 if name in HALVED else 8)) < 1e-6


class FromFloats(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.conv = scale, gnn.MaskedConv2d(3, 12, 3, mask_type="A", data_channels=3)

    def forward(self, x):
        return self.conv(self.scale(x))


@pytest.mark.parametrize(
    "scale",
    [lambda x: x.float(), lambda x: x.float() / 3 * 2 - 1, lambda x: (x - 1.5) / 1.5, lambda x: -x.to(torch.float32)],
)
def test_an_image_scaled_by_hand(scale):
    assert error_of(FromFloats(scale).eval(), (3, 5, 4), group_order="interleaved", input="integers") < 1e-6


def test_an_image_of_several_colours_that_meets_functions_first():
    """Channels of the image lie otherwise than those of maps."""
    torch.manual_seed(0)
    for middle in (nn.ReLU(), gnn.Shift(down=1), Call(lambda x: torch.cat((x, -x), 1)), gnn.ConcatELU()):
        width = 3 if isinstance(middle, (nn.ReLU, gnn.Shift)) else 6
        net = nn.Sequential(gnn.ScaleLevels(4), middle, gnn.Shift(down=1), nn.Conv2d(width, 12, 1)).eval()
        assert error_of(net, (3, 5, 4), group_order="interleaved") < 1e-6


WRONG = {
    "out=": (lambda x: torch.add(x, x, out=torch.empty(1)), "is called with out="),
    "a part is written into": (a_part_in_place, "shares its memory"),
    "the whole is written into": (the_whole_in_place, "shares its memory"),
    "dropout that stays": (lambda x: F.dropout(x, 0.5), "training=True"),
    "rounding mode": (lambda x: torch.div(x, 2, rounding_mode="floor"), "is called with rounding_mode='floor'"),
    "elu alpha": (lambda x: F.elu(x, 0.5), "is called with alpha=0.5"),
    "two maps": (lambda x: x * x, "neither of which is a sigmoid"),
    "rows": (lambda x: x.cumsum(2), "calls cumsum"),
    "padding that stays": (lambda x: torch.tanh(F.pad(x, (0, 0, 1, 0)))[:, :, 1:], "takes a padded map"),
    "the future": (lambda x: F.pad(x, (0, 0, 0, 1))[:, :, 1:], "reads rows below its own"),
    "set data": (lambda x: setattr(x, "data", -x) or x, r"sets .data of a tensor"),
    "values": (lambda x: x if x.sum() > 0 else -x, "its forward cannot be traced"),
    "unknown keyword": (lambda x: torch.cat((x[:, :4], x[:, 4:]), axis=1), "'axis'"),
    "an axis of rows": (lambda x: torch.cat((x[:, :, :3], x[:, :, 3:]), 2), "padded map|joins along axis 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_program_is_refused_by_name(name):
    function, message = WRONG[name]
    with pytest.raises(LoweringError, match=message):
        Sampler(around(Call(function)), levels=4, self_check=False).prepare(SHAPE)


def test_the_image_is_not_written_into():
    net = nn.Sequential(Call(lambda x: x.mul_(2)), gnn.ScaleLevels(4), gnn.MaskedConv2d(1, 4, 3, mask_type="A")).eval()
    with pytest.raises(LoweringError, match="writes in place into the images"):
        Sampler(net, levels=4, self_check=False, input="integers").prepare(SHAPE)


class Conditional(nn.Module):
    """A condition through a module that no tracer could follow, with a hook, and in training mode."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), Call(lambda c: c if c.sum() > 0 else -c))
        self.encoder.register_forward_hook(lambda m, i, o: o * 2)
        self.scale, self.first = gnn.ScaleLevels(4), gnn.MaskedConv2d(1, 8, 3, mask_type="A")
        self.condition, self.gate = gnn.ConditionBias(3, 8), gnn.GatedActivation()
        self.out = nn.Conv2d(4, 4, 1)

    def forward(self, x, context):
        return self.out(self.gate(x=self.first(self.scale(x)), bias=self.condition(self.encoder(context))))


def test_what_the_image_does_not_reach_is_called():
    torch.manual_seed(0)
    net, context, x = Conditional(), torch.randn(2, 3), torch.randint(4, (2, *SHAPE))
    before = copy.deepcopy(net.state_dict())
    found = Sampler(net, levels=4).teacher_forced(x, context=context)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert net.training
    with torch.no_grad():
        torch.testing.assert_close(found, net.eval()(x, context), rtol=1e-5, atol=1e-5)


# ---- the comparison with the network ----


def faulty(monkeypatch, target, rule):
    right = rules.FUNCTION_RULES[target]
    monkeypatch.setitem(rules.FUNCTION_RULES, target, rules.Rule(rule, right.reads, right.signature))


def deep(colours=1):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            c = dict(data_channels=colours)
            self.scale, self.first = gnn.ScaleLevels(4), gnn.MaskedConv2d(colours, 12, 3, mask_type="A", **c)
            self.second, self.third = gnn.MaskedConv2d(12, 12, 3, **c), gnn.MaskedConv2d(12, 12, 3, **c)
            self.out = gnn.MaskedConv2d(12, 4 * colours, 1, **c)

        def forward(self, x):
            h = self.second(torch.relu(self.first(self.scale(x))))
            return self.out(h + torch.tanh(self.third(h)))

    torch.manual_seed(0)
    return Deep().eval()


@pytest.mark.parametrize("colours", [1, 3])
def test_a_wrong_program_is_found_out_and_the_layer_named(monkeypatch, colours):
    shape = (colours, 5, 4)
    net = deep(colours)
    Sampler(net, levels=4).prepare(shape)
    faulty(monkeypatch, torch.tanh, lambda low, input: low.pointwise("sigmoid", input))
    with pytest.raises(SelfCheckError, match="the difference begins at tanh; sample with method='naive'"):
        Sampler(net, levels=4).prepare(shape)
    sampler = Sampler(net, levels=4, self_check=False)  # the switch
    assert sampler.sample(1, shape, method="cached").shape == (1, *shape)
    sampler = Sampler(net, levels=4)
    for _ in range(2):  # not trusted the second time either
        with pytest.raises(SelfCheckError):
            sampler.sample(1, shape, method="cached")
    assert sampler.sample(1, shape, method="naive").shape == (1, *shape)


def test_a_small_error_is_no_rounding(monkeypatch):
    def rule(low, input):
        return low.affine(low.pointwise("tanh", input), 1 + 1e-4, 0.0)

    faulty(monkeypatch, torch.tanh, rule)
    with pytest.raises(SelfCheckError, match="begins at tanh"):
        Sampler(deep(), levels=4).prepare(SHAPE)


def test_rounding_is_no_error():
    """Layers that cancel: the network's own rounding is ten thousand times what a few units in the last place are."""
    net = around(Call(lambda x: (x * 1e4 + torch.tanh(x)) - x * 1e4))
    Sampler(net, levels=4).prepare(SHAPE)


def test_the_comparison_runs_once_for_a_structure(monkeypatch):
    net, calls = deep(), []
    forward = type(net).forward

    def counted(self, x):
        calls.append(isinstance(x, torch.Tensor))
        return forward(self, x)

    monkeypatch.setattr(type(net), "forward", counted)
    sampler = Sampler(net, levels=4, input="integers", group_order="interleaved")

    def called():
        calls.clear()
        sampler.prepare(SHAPE)
        return sum(calls)

    called()
    assert called() == 0
    with torch.no_grad():
        net.first.weight.mul_(2)
    assert called() == 0  # other weights, the same program
    net.third.activation = "relu"
    assert called() == 1
    assert called() == 0


def test_the_comparison_leaves_no_trace():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            if isinstance(x, torch.Tensor):
                self.seen += 1
                torch.rand(1)
            return x

    net = around(Counting(), nn.BatchNorm2d(8), nn.Dropout(0.5)).train()
    net[3].eval()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    Sampler(net, levels=4, input="integers", group_order="interleaved").prepare(SHAPE)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in net] == [True, True, True, False, True, True]


# ---- contents ----


def test_contents_see_every_change():
    layer = nn.Linear(3, 4)
    strided = torch.arange(12.0).view(3, 4).t()
    tensors = [*layer.parameters(), strided, torch.arange(5), torch.empty(0)]
    contents = Contents(tensors)
    assert contents.same(tensors)
    assert contents.same([t.clone() for t in tensors])
    assert not contents.same(tensors[:-1])
    for change in (
        lambda: layer.weight.data.view(-1)[-1].add_(1e-3),
        lambda: strided.numpy().__setitem__((0, 2), 7),
        lambda: tensors[3].set_(torch.arange(5) + 1),
        lambda: setattr(layer.bias, "data", layer.bias.data.double()),
        lambda: setattr(layer.weight, "data", layer.weight.data.view(3, 4)),
    ):
        contents = Contents(tensors)
        assert contents.same(tensors)
        change()
        assert not contents.same(tensors)
    nan = torch.tensor([float("nan")])
    assert Contents([nan]).same([nan])
    assert bool(Contents(tensors).unchanged(tensors))
    moved = Contents(tensors)
    strided += 1
    assert not bool(moved.unchanged(tensors))


@pytest.mark.parametrize(
    "build", [lambda: genfast.models.PixelCNN(1, 8, 2, 3, 4), lambda: genfast.models.MAF(4, hidden=8)]
)
def test_a_program_is_kept_as_long_as_the_weights_are(build):
    model = build().eval()
    context = torch.no_grad()
    with context:
        if isinstance(model, genfast.models.PixelCNN):
            assert model.sampler.prepare(SHAPE) is model.sampler.prepare(SHAPE)
        else:
            layer = next(m for m in model.modules() if isinstance(m, gnn.MaskedAutoregressive))
            assert layer.program().packed() is layer.program().packed()
