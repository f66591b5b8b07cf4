"""The degree-ordered inverse: held to the loop of one pass a level, to peers on their own weights, and to autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import genfast
from genfast import ops, reference
from genfast._registry import OPS
from genfast.ops.autoregressive_inverse import OP, SCALES, gather_once
from genfast.sampling import DegreeProgram, Layer


def made(inputs: int, hidden: tuple[int, ...], width: int, dtype=torch.float64, activation="relu") -> list[Layer]:
    degrees = [torch.arange(inputs), *(torch.arange(h) % max(1, inputs - 1) for h in hidden)]
    degrees.append(torch.arange(inputs).repeat_interleave(width) - 1)
    return [
        Layer(
            torch.randn(len(b), len(a), dtype=dtype) / len(a) ** 0.5,
            torch.randn(len(b), dtype=dtype) / 4,
            b[:, None] >= a,
            after=activation if i < len(hidden) else "none",
        )
        for i, (a, b) in enumerate(zip(degrees, degrees[1:]))
    ]


def network(layers: list[Layer], x: Tensor) -> Tensor:
    """What the layers say, with PyTorch's masked products."""
    act = reference.program_activation
    number = reference.autoregressive_inverse.__globals__["ACTIVATIONS"].index
    outputs = [x]
    for layer in layers:
        h = act(number(layer.before), outputs[layer.source])
        weight = layer.weight if layer.mask is None else layer.weight * layer.mask
        h = torch.nn.functional.linear(h, weight, layer.bias)
        h = act(number(layer.after), h if layer.context is None else h + layer.context)
        h = h if layer.gate is None else h * layer.gate
        outputs.append(h if layer.residual is None else h + outputs[layer.residual])
    return outputs[-1]


def passes(layers: list[Layer], z: Tensor, transform: str, options: list[float]) -> tuple[Tensor, Tensor]:
    """The usual loop: D passes of the whole network."""
    x = torch.zeros_like(z)
    for _ in range(z.shape[1]):
        params = network(layers, x).unflatten(1, (z.shape[1], -1))
        x, slope = reference.autoregressive_inverse.__globals__["autoregressive_univariate"](
            z, params, transform, options
        )
    return x, slope.sum(1)


@pytest.mark.parametrize(
    ("inputs", "batch"), [(1, 1), (1, 40), (2, 2), (2, 17), (7, 3), (7, 5), (7, 8), (7, 9), (40, 4), (40, 7), (40, 100)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_equals_one_pass_an_input(inputs, batch, dtype):
    layers = made(inputs, (21, 50), 2, dtype)
    z = torch.randn(batch, inputs, dtype=dtype)
    x, logdet = ops.autoregressive_inverse(z, DegreeProgram.build(layers), "affine:softclamp")
    expected = passes(layers, z, "affine:softclamp", [0, 0, math.log(1e-3)])
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    torch.testing.assert_close((x, logdet), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("scale_first", [False, True])
@pytest.mark.parametrize("batch", [3, 20])
def test_every_affine_form(scale, flip, scale_first, batch):
    layers = made(5, (13,), 1 if scale == "additive" else 2, activation="tanh")
    z = torch.randn(batch, 5, dtype=torch.float64)
    found = ops.autoregressive_inverse(
        z, DegreeProgram.build(layers), f"affine:{scale}", flip=flip, scale_first=scale_first, eps=0.01, slope=0.02
    )
    constant = math.log(0.02) if scale == "softclamp" else 0.01
    torch.testing.assert_close(found, passes(layers, z, f"affine:{scale}", [flip, scale_first, constant]))


@pytest.mark.parametrize("tails", ["linear", "circular", None])
@pytest.mark.parametrize("convention", ["nflows", "zuko"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("batch", [3, 37])
def test_splines(tails, convention, flip, batch):
    bins = 5
    width = 3 * bins + {"linear": -1, "circular": 0, None: 1}[tails]
    layers = made(6, (17,), width)
    z = torch.rand(batch, 6, dtype=torch.float64) if tails is None else 1.5 * torch.randn(batch, 6, dtype=torch.float64)
    more = {"bound": 2.0} if tails else {}
    found = ops.autoregressive_inverse(
        z, DegreeProgram.build(layers), "spline", flip=flip, bins=bins, tails=tails, convention=convention, **more
    )
    x, logdet = torch.zeros_like(z) + (0 if tails else 0.5), None
    for _ in range(6):
        params = network(layers, x).unflatten(1, (6, width))
        x, logdet = ops.rational_quadratic_spline_packed(
            z, params, bins, tails=tails, convention=convention, inverse=not flip, **more
        )
    torch.testing.assert_close(found, (x, logdet.sum(1)))


@pytest.mark.parametrize("before", ["none", "gelu"])
@pytest.mark.parametrize("after", reference.autoregressive_inverse.__globals__["ACTIVATIONS"])
@pytest.mark.parametrize("batch", [2, 19])
def test_layers_of_every_kind(before, after, batch):
    """Sources that branch, activations on both sides, residual, context and gate, gradients to all."""
    dtype = torch.float64
    degrees = torch.arange(15) % 4
    inputs = torch.arange(5)

    def weight(a, b):
        return torch.randn(len(b), len(a), dtype=dtype, requires_grad=True), torch.randn(
            len(b), dtype=dtype, requires_grad=True
        )

    context, gate = (torch.randn(batch, 15, dtype=dtype, requires_grad=True) for _ in range(2))
    outputs = inputs.repeat_interleave(2) - 1
    layers = [
        Layer(*weight(inputs, degrees), degrees[:, None] >= inputs, context=context),
        Layer(*weight(degrees, degrees), degrees[:, None] >= degrees, before=before, after=after, residual=1),
        Layer(*weight(inputs, degrees), degrees[:, None] >= inputs, source=0, after=after, gate=gate, residual=2),
        Layer(
            *weight(degrees, degrees), degrees[:, None] >= degrees, source=3, before=before, context=context, residual=3
        ),
        Layer(*weight(degrees, outputs), outputs[:, None] >= degrees, before=after),
    ]
    with torch.no_grad():
        for layer in layers:
            layer.weight.mul_(0.15)
    program = DegreeProgram.build(layers)
    z = torch.randn(batch, 5, dtype=dtype, requires_grad=True)
    leaves = [z, context, gate, *program.parameters()]
    found = ops.autoregressive_inverse(z, program)
    expected = passes(layers, z, "affine:exp", [0, 0, 0])
    torch.testing.assert_close(found, expected)
    weights = [torch.randn_like(f) for f in found]
    grads, exact = (torch.autograd.grad(o, leaves, weights) for o in (found, expected))
    torch.testing.assert_close(grads, exact)


def test_the_masks_dead_weights_get_no_gradient_and_may_hold_anything():
    layers = made(6, (11, 12), 2)
    for layer in layers:
        layer.weight[~layer.mask] = math.nan
        layer.weight.requires_grad_()
    z = torch.randn(9, 6, dtype=torch.float64)
    x, logdet = ops.autoregressive_inverse(z, DegreeProgram.build(layers))
    (x.square().sum() + logdet.sum()).backward()
    assert bool(x.isfinite().all())
    for layer in layers:
        assert bool((layer.weight.grad[~layer.mask] == 0).all())
        assert bool(layer.weight.grad[layer.mask].isfinite().all())


def test_third_derivative():
    layers = made(3, (7,), 2, activation="tanh")
    program = DegreeProgram.build(layers)
    z = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def second(w):
        layers[0].weight = w
        x, logdet = ops.autoregressive_inverse(z, program.update(layers))
        (first,) = torch.autograd.grad(x.square().sum() + logdet.sin().sum(), z, create_graph=True)
        return torch.autograd.grad(first.square().sum(), z, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, layers[0].weight.clone().requires_grad_(), fast_mode=True)


def test_gradients_of_large_batches_and_few_inputs():
    """More samples than one run of the weights' products, and an input without hidden units."""
    for inputs, batch in ((9, 1100), (1, 70)):
        layers = made(inputs, (70, 40), 2)
        for layer in layers:
            layer.weight.requires_grad_(), layer.bias.requires_grad_()
        program = DegreeProgram.build(layers)
        z = torch.randn(batch, inputs, dtype=torch.float64, requires_grad=True)
        leaves = [z, *program.parameters()]
        outputs = [ops.autoregressive_inverse(z, program), passes(layers, z, "affine:exp", [0, 0, 0])]
        grads = [
            torch.autograd.grad(x.sin().sum() + logdet.square().sum(), leaves, allow_unused=True)
            for x, logdet in outputs
        ]
        for found, expected in zip(*grads):
            assert expected is not None or not found.count_nonzero()
            if expected is not None:
                torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("batch", [1, 3, 50, 257])
def test_the_thread_count_does_not_change_the_bits(batch):
    layers = made(16, (100, 120), 2, torch.float32)
    for layer in layers:
        layer.weight.requires_grad_()
    program = DegreeProgram.build(layers)
    z = torch.randn(batch, 16, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            x, logdet = ops.autoregressive_inverse(z, program)
            grads = torch.autograd.grad(x.sum() + logdet.sum(), [z, *(layer.weight for layer in layers)])
            results.append([x, logdet, *grads])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_bernoulli_draws_what_the_loop_draws():
    layers = made(20, (60,), 1)
    z = torch.rand(70, 20, dtype=torch.float64)
    for batch in (70, 3):
        x, logdet = ops.autoregressive_inverse(z[:batch], DegreeProgram.build(layers), "bernoulli")
        expected, _ = passes(layers, z[:batch], "bernoulli", [])
        assert torch.equal(x, expected)
        assert set(x.unique().tolist()) == {0.0, 1.0}
        assert not logdet.count_nonzero()
    layers[0].weight.requires_grad_()
    x, _ = ops.autoregressive_inverse(z, DegreeProgram.build(layers), "bernoulli")
    assert torch.equal(
        torch.autograd.grad(x.sum(), layers[0].weight, allow_unused=True)[0], torch.zeros(60, 20).double()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_computed_in_float32_and_rounded(dtype):
    layers = made(6, (20,), 2, dtype)
    z = torch.randn(9, 6, dtype=dtype)
    x, logdet = ops.autoregressive_inverse(z, DegreeProgram.build(layers))
    for layer in layers:
        layer.weight, layer.bias = layer.weight.float(), layer.bias.float()
    expected, slope = ops.autoregressive_inverse(z.float(), DegreeProgram.build(layers))
    assert x.dtype == dtype
    assert logdet.dtype == torch.float32
    assert torch.equal(x, expected.to(dtype))
    assert torch.equal(logdet, slope)


def test_an_empty_batch_and_a_nan_stay_where_they_are():
    layers = made(6, (20,), 2, torch.float32)
    program = DegreeProgram.build(layers)
    x, logdet = ops.autoregressive_inverse(torch.randn(0, 6), program)
    assert x.shape == (0, 6)
    assert logdet.shape == (0,)
    for batch in (3, 40):
        z = torch.randn(batch, 6)
        clean, _ = ops.autoregressive_inverse(z, program)
        z[1, 2] = math.nan
        x, logdet = ops.autoregressive_inverse(z, program)
        others = torch.arange(batch) != 1
        assert torch.equal(x[others], clean[others])
        assert torch.equal(x[1, :2], clean[1, :2])
        assert bool(x[1, 2:].isnan().all())
        assert logdet.isnan().nonzero().tolist() == [[1]]


def test_compiles_with_its_program():
    layers = made(5, (12,), 2, torch.float32)
    for layer in layers:
        layer.weight.requires_grad_()
    program = DegreeProgram.build(layers)

    def loss(z):
        x, logdet = ops.autoregressive_inverse(z, program, "affine:softclamp")
        return x.square().sum() + logdet.sum()

    z = torch.randn(9, 5, requires_grad=True)
    leaves = [z, *(layer.weight for layer in layers)]
    expected = torch.autograd.grad(loss(z), leaves)
    found = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(z), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("context", [0, 3])
def test_zuko_on_its_own_weights(residual, context):
    zuko = pytest.importorskip("zuko")
    flow = zuko.flows.MAF(11, context, transforms=2, hidden_features=(40, 33), residual=residual)
    c = torch.randn(25, context) if context else None
    z = torch.randn(25, 11)
    for lazy in flow.transform.transforms:
        layers: list[Layer] = []
        for module in lazy.hyper:
            if isinstance(module, zuko.nn.MaskedLinear):
                w, m, static = module.weight, module.mask, None
                if not layers and context:
                    static = torch.nn.functional.linear(c, (w * m)[:, 11:])
                    w, m = w[:, :11], m[:, :11]
                layers.append(Layer(w, module.bias, m, context=static))
            elif isinstance(module, zuko.nn.Residual):
                first = len(layers)
                layers.append(Layer(module[0].weight, module[0].bias, module[0].mask, after="relu"))
                layers.append(Layer(module[2].weight, module[2].bias, module[2].mask, residual=first))
            else:
                layers[-1].after = "relu"
        leaves = list(lazy.hyper.parameters())
        x, logdet = ops.autoregressive_inverse(z, DegreeProgram.build(layers), "affine:softclamp")
        transform = lazy(c) if context else lazy()
        expected = transform.inv(z)
        slope = -transform.log_abs_det_jacobian(expected, z)
        torch.testing.assert_close((x, logdet), (expected, slope), rtol=1e-5, atol=1e-5)
        weights = torch.randn_like(x), torch.randn_like(logdet)
        grads = [torch.autograd.grad(o, leaves, weights, retain_graph=True) for o in ((x, logdet), (expected, slope))]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("library", ["nflows", "normflows"])
@pytest.mark.parametrize("blocks", ["residual", "feedforward"])
@pytest.mark.parametrize("context", [None, 4])
def test_nflows_and_normflows_on_their_own_weights(library, blocks, context):
    pytest.importorskip(library)
    if library == "nflows":
        from nflows.transforms.autoregressive import MaskedAffineAutoregressiveTransform as Transform
    else:
        from normflows.flows.affine.autoregressive import MaskedAffineAutoregressive as Transform
    if library == "normflows" and blocks == "feedforward" and context:
        pytest.skip("normflows refuses it")
    transform = Transform(9, 23, context, num_blocks=2, use_residual_blocks=blocks == "residual")
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(0.1 * torch.randn_like(p))
    net = transform.autoregressive_net
    c = torch.randn(21, context) if context else None
    initial = net.initial_layer
    static = None if c is None else net.context_layer(c)
    feedforward = (
        "relu" if blocks == "feedforward" and library == "nflows" else "none"
    )  # normflows has no activation there
    if static is not None and library == "nflows":
        static = static.relu()
    layers = [Layer(initial.weight, initial.bias, initial.mask, context=static, after=feedforward)]
    for block in net.blocks:
        if blocks == "feedforward":
            layers.append(Layer(block.linear.weight, block.linear.bias, block.linear.mask, after="relu"))
            continue
        a, b = block.linear_layers
        inner = None if c is None else block.context_layer(c)
        gate = None if inner is None or library == "nflows" else inner.sigmoid()
        layers.append(Layer(a.weight, a.bias, a.mask, before="relu", context=inner if library == "nflows" else None))
        layers.append(Layer(b.weight, b.bias, b.mask, before="relu", residual=len(layers) - 1, gate=gate))
    last = net.final_layer
    layers.append(Layer(last.weight, last.bias, last.mask))
    z = torch.randn(21, 9)
    scale = "softplus" if library == "nflows" else "sigmoid2"
    found = ops.autoregressive_inverse(z, DegreeProgram.build(layers), f"affine:{scale}", scale_first=True)
    torch.testing.assert_close(found, transform.inverse(z, c), rtol=1e-4, atol=1e-4)


def test_gather_once_is_its_own_derivative():
    index, inverse = torch.tensor([3, 0, 1]), torch.tensor([3, 0, 1])
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = gather_once(x, index, inverse)
    assert torch.equal(y, torch.stack([x[:, 2], torch.zeros(2), x[:, 0]], 1))
    assert torch.autograd.gradcheck(lambda t: gather_once(t, index, inverse), x)
    assert torch.autograd.gradgradcheck(lambda t: gather_once(t, index, inverse).square(), x)
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\), expected a last axis of 3"):
        gather_once(torch.randn(2, 4), index, inverse)


def test_errors_name_what_does_not_fit():
    program = DegreeProgram.build(made(4, (9,), 2, torch.float32))
    z = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"z has shape \(5, 3\), expected \(N, 4\)"):
        ops.autoregressive_inverse(z[:, :3], program)
    with pytest.raises(ValueError, match=r"z has shape \(4,\)"):
        ops.autoregressive_inverse(z[0], program)
    with pytest.raises(TypeError, match="z has dtype torch.int64"):
        ops.autoregressive_inverse(z.long(), program)
    with pytest.raises(TypeError, match="z is a list"):
        ops.autoregressive_inverse([1.0], program)
    with pytest.raises(ValueError, match="transform='affine:cube', expected one of 'affine:exp'"):
        ops.autoregressive_inverse(z, program, "affine:cube")
    with pytest.raises(ValueError, match="gives 2 parameters an input, expected 1 for transform='affine:additive'"):
        ops.autoregressive_inverse(z, program, "affine:additive")
    with pytest.raises(ValueError, match="gives 2 parameters an input, expected 23 for transform='spline'"):
        ops.autoregressive_inverse(z, program, "spline")
    with pytest.raises(ValueError, match="convention='other'"):
        ops.autoregressive_inverse(z, program, "spline", convention="other")
    layers = made(4, (9,), 2, torch.float32)
    layers[0].context = torch.randn(7, 9)
    with pytest.raises(ValueError, match=r"contexts and gates, side by side has shape \(7, 9\), expected \(5, 9\)"):
        ops.autoregressive_inverse(z, DegreeProgram.build(layers))
    program = DegreeProgram.build(layers)
    with pytest.raises(ValueError, match="statics is None"):
        OP(z, program.packed(), None, program.code, "affine:exp", [0, 0, 0])
    with pytest.raises(ValueError, match="code is torch.float32"):
        OP(z, program.packed(), None, program.code.float(), "affine:exp", [0, 0, 0])
    with pytest.raises(ValueError, match="options has 2 numbers, expected 3"):
        OP(z, program.packed(), program.statics(z.dtype), program.code, "affine:exp", [0, 0])
    with pytest.raises(ValueError, match="packed has shape"):
        OP(z, program.packed()[1:], layers[0].context[:5], program.code, "affine:exp", [0, 0, 0])


def test_the_forced_reference_agrees():
    layers = made(8, (20, 20), 2)
    z = torch.randn(12, 8, dtype=torch.float64)
    program = DegreeProgram.build(layers)
    with genfast.backend("reference"):
        expected = ops.autoregressive_inverse(z, program)
    torch.testing.assert_close(ops.autoregressive_inverse(z, program), expected)


def test_the_backward_works_when_the_dispatcher_calls_it():
    """Which calls an op with autograd shut off, where this one takes derivatives of its own: of tensors on two devices,
    say."""
    op = OPS["autoregressive_inverse"]
    sample = next(iter(op.samples(torch.Generator().manual_seed(0))))
    z, packed, *rest = sample.args
    found = []
    for call in (op, op.overload):
        leaves = [z.clone().requires_grad_(), packed.clone().requires_grad_()]
        with genfast.backend("reference"):
            x, logdet = call(*leaves, *rest)
            found.append(torch.autograd.grad(x.sum() + logdet.sum(), leaves))
    torch.testing.assert_close(found[0], found[1])

    backward = OPS["autoregressive_inverse_backward"]
    args = (torch.ones_like(z), None, z, x.detach(), packed, *rest, True)
    with torch.no_grad(), genfast.backend("reference"):
        torch.testing.assert_close(backward.overload(*args)[:2], backward(*args)[:2])
