"""What holds for every op, on every sample that it declares."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten

import genfast
from genfast import _registry, _verify
from genfast.ops.activation import activation_chain
from tests.conftest import each_sample, each_sample_compiled

BACKWARD = {op.name: _registry.OPS.get(f"{op.name}_backward") for op in _registry.OPS.values()}


def leaves(args, dtype=torch.float64, form=None, constant=()):
    """Fresh arguments, floating tensors requiring a gradient."""

    def made(a, differentiated):
        if isinstance(a, Tensor) and a.is_floating_point():
            a = a.to(dtype, copy=True)
            if form is not None and a.dim() == 4:
                a = a.contiguous(memory_format=form)
            a.requires_grad_(differentiated)
        return a

    return [tree_map(partial(made, differentiated=i not in constant), a) for i, a in enumerate(args)]


def floating(args):
    return tuple(a for a in _registry._tensors(args) if a.requires_grad)


# Of whose outputs the first alone has a derivative; the others are kept for the backward.
FIRST_ALONE = ("contextual_similarity",)


def as_function(op, args):
    """The op as a function of its differentiable tensors."""
    flat, structure = tree_flatten(args)
    places = [i for i, a in enumerate(flat) if isinstance(a, Tensor) and a.requires_grad]

    def function(*tensors):
        filled = list(flat)
        for i, t in zip(places, tensors):
            filled[i] = t
        out = op(*tree_unflatten(filled, structure))
        if op.name in FIRST_ALONE:
            return out[0]
        return out if isinstance(out, Tensor) else tuple(o for o in out if o.numel() and o.is_floating_point())

    return function


@each_sample
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
def test_matches_the_float64_reference(op, sample, backend, dtype):
    if backend != "reference" and backend not in op.kernels:
        pytest.skip(f"there is no {backend} kernel")
    if dtype not in op.dtypes[backend]:
        pytest.skip(f"the {backend} kernels take no {dtype}")
    forward, backward = _verify.errors(op, sample, dtype, "cpu", backend)
    allowed = _verify.TOLERANCES[dtype]
    assert forward <= allowed[0]
    assert backward <= allowed[1]


@each_sample
def test_gradcheck_on_the_kernel(op, sample):
    args = leaves(sample.args, constant=sample.constant)
    assert torch.autograd.gradcheck(as_function(op, args), floating(args), fast_mode=True)


@each_sample
def test_second_derivatives(op, sample):
    if op.name == "squeeze":
        pytest.skip("linear: its gradient is squeeze again, checked above")
    args = leaves(sample.args, constant=sample.constant)
    assert torch.autograd.gradgradcheck(as_function(op, args), floating(args), fast_mode=True)


@each_sample
def test_channels_last_gives_the_same_and_keeps_the_format(op, sample):
    if not any(a.dim() == 4 for a in _registry._tensors(sample.args)):
        pytest.skip("no images among the arguments")
    results = []
    for form in (torch.contiguous_format, torch.channels_last):
        args = leaves(sample.args, form=form, constant=sample.constant)
        out = as_function(op, args)(*floating(args))
        out = (out,) if isinstance(out, Tensor) else out
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, floating(args), [torch.randn(o.shape, dtype=o.dtype) for o in out])
        results.append([*out, *grads])
        for o in out:
            if o.dim() == 4 and o.shape[1] > 1:
                assert o.is_contiguous(memory_format=form)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_sample
def test_strided_inputs_give_the_same(op, sample):
    """Every tensor as a slice of a larger one, which no kernel may read as if it were dense."""
    args = leaves(sample.args, constant=sample.constant)

    def strided(a):
        big = torch.full([2 * s + 1 for s in a.shape], 99, dtype=a.dtype)
        view = big[tuple(slice(1, None, 2) for _ in a.shape)]
        view.copy_(a.detach())
        assert view.numel() <= 1 or not view.is_contiguous() or a.numel() == a.shape[0] == 1
        return view

    for o, e in zip(_outputs(op(*tree_map_only(Tensor, strided, args))), _outputs(op(*args))):
        assert torch.equal(o, e)


def _outputs(result):
    return [result] if isinstance(result, Tensor) else list(result)


# Which arguments carry the batch axis, where it is not the first one alone.
BATCHED = {
    "activation_chain": (0, 1), "activation_second": (0, 1, 2, 3), "affine_coupling": (0, 1), "apply_bits": (0, 1),
    "autoregressive_inverse": (0, 2), "channel_mix": (0, 1), "channel_scale": (0, 1, 2),
    "contextual_similarity": (0, 1), "diagonal_gaussian": (0, 1, 2, 3, 4), "discretized_logistic_mixture_nll": (0, 1),
    "flow_program": (0, 1), "gated_activation": (0, 1), "interpolate": (0, 1, 2), "linear_input": (0, 2),
    "linear_spline": (0, 1), "linear_weight": (0, 1), "nade": (0, 4), "nearest_rows": (0, 1),
    "pairwise_kernel_sum": (0, 1), "plu_weight": (), "quadratic_spline": (0, 1, 2),
    "rational_quadratic_spline": (0, 1, 2, 3), "rational_quadratic_spline_packed": (0, 1), "style_loss": (0, 1),
    "style_loss_layers": (0, 1),
}  # fmt: skip


# Whose backward takes what the op took.
TAKES_ITS_ARGUMENTS = (
    "affine_coupling",
    "actnorm",
    "bias_act",
    "gated_activation",
    "minibatch_stddev",
    "pixel_norm",
    "plu_weight",
)


@each_sample
def test_an_empty_batch(op, sample):
    if op.name == "spectral_norm":
        pytest.skip("a weight has no batch")
    args = list(sample.args)
    if op.name == "plu_weight":
        args[-2] = 0
    if op.name == "apply_bits" and args[1].dim() == 1:
        args[1] = args[1][:0]
    for i in BATCHED.get(op.name, (0,)):
        if isinstance(args[i], list):
            args[i] = [a[:0] for a in args[i]]
        elif args[i] is not None and (args[i].dim() > 1 or op.name == "interpolate"):  # a vector is one for all samples
            args[i] = args[i][:0]
    args = leaves(args, constant=sample.constant)
    out = _outputs(op(*args))
    if op.name == "linear_weight":  # a sum over the batch
        assert not out[0].count_nonzero()
    else:
        assert any(o.shape[0] == 0 for o in out)
    found = torch.autograd.grad([o.sum() for o in out if o.requires_grad], floating(args), allow_unused=True)
    for g, a in zip(found, floating(args)):
        assert g is None or (g.shape == a.shape and bool(g.isfinite().all()))


@each_sample_compiled
def test_opcheck(op, sample):
    args = leaves(sample.args, constant=sample.constant)
    torch.library.opcheck(op.overload, tuple(args))
    backward = BACKWARD[op.name]
    if backward is not None and op.name != "squeeze":
        out = _outputs(op(*leaves(sample.args)))
        grads = [torch.randn_like(o) for o in out if o.is_floating_point()]
        plain = ("affine_coupling", "actnorm", "plu_weight", "gated_activation", "channel_scale")
        rest = args if op.name in plain else None
        if op.name == "masked_conv":
            x, weight, _, *options = args
            rest = [x, weight, out[0], *options, [True, True, True]]
        if rest is not None:
            torch.library.opcheck(
                backward.overload,
                (*grads, *(a.detach() if isinstance(a, Tensor) else a for a in rest)),
                test_utils=("test_schema", "test_faketensor"),
            )


@each_sample_compiled
def test_compiles_without_a_break_and_equals_eager(op, sample):
    args = leaves(sample.args, torch.float32, constant=sample.constant)
    function = as_function(op, args)

    def loss(*tensors):
        out = function(*tensors)
        return sum((o * o.detach().cos()).sum() for o in ((out,) if isinstance(out, Tensor) else out))

    eager = torch.autograd.grad(loss(*floating(args)), floating(args), allow_unused=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(*floating(args)), floating(args), allow_unused=True)
    for f, e in zip(found, eager):
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


@each_sample
def test_forward_mode_is_exact_not_zero(op, sample):
    """A torch.library op has no tangent rule; a call that needs one must get it from the reference."""
    args = leaves(sample.args, constant=sample.constant)
    tensors = tuple(t.detach() for t in floating(args))
    function = as_function(op, args)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    found = _outputs(torch.func.jvp(function, tensors, tangents)[1])
    step = 1e-6
    ahead = _outputs(function(*(t + step * d for t, d in zip(tensors, tangents))))
    behind = _outputs(function(*(t - step * d for t, d in zip(tensors, tangents))))
    for f, a, b in zip(found, ahead, behind):
        torch.testing.assert_close(f, (a - b) / (2 * step), rtol=1e-5, atol=1e-5)


@each_sample
def test_functorch_grad(op, sample):
    args = leaves(sample.args, constant=sample.constant)
    tensors = floating(args)
    function = as_function(op, args)

    def loss(*ts):
        return sum(o.sum() for o in _outputs(function(*ts)))

    expected = torch.autograd.grad(loss(*tensors), tensors)
    found = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*(t.detach() for t in tensors))
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e)


def test_the_raw_op_refuses_forward_mode():
    x = torch.ones(2, 3)
    op = _registry.OPS["actnorm"]
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode rule"):
        op.overload(x, torch.ones(3), torch.ones(3), False, False)


def test_two_runs_give_the_same_bits():
    x, p = torch.randn(16, 12, 33, 31), torch.randn(16, 12, 33, 31)
    w = torch.randn(12, 12)
    for call in (
        lambda: genfast.ops.affine_coupling(x, p),
        lambda: genfast.ops.actnorm(x, w[0], w[1]),
        lambda: genfast.ops.invertible_conv1x1(x, w),
    ):
        assert all(torch.equal(a, b) for a, b in zip(call(), call()))


def test_the_thread_count_does_not_change_the_bits():
    x, p = (torch.randn(3, 8, 65, 63, requires_grad=True) for _ in range(2))
    w = torch.randn(8, 8, requires_grad=True)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            y, logdet = genfast.ops.affine_coupling(x, p, scale="sigmoid")
            mixed, _ = genfast.ops.invertible_conv1x1(y, w)
            results.append([y, logdet, *torch.autograd.grad(mixed.square().sum() + logdet.sum(), (x, p, w))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_a_forced_backend_that_cannot_serve_says_why():
    x = torch.ones(2, 3)
    with genfast.backend("cuda"), pytest.raises(genfast.BackendError, match=r"actnorm.*float32.*\(2, 3\).*no kernel"):
        genfast.ops.actnorm(x, torch.ones(3), torch.ones(3))
    with genfast.backend("cpu"), pytest.raises(genfast.BackendError, match="takes float32, float64, not bfloat16"):
        genfast.ops.actnorm(x.bfloat16(), torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match="expected one of cpu, cuda, triton, reference"), genfast.backend("tpu"):
        pass


def test_half_types_on_the_cpu_run_the_reference_and_sum_in_float32():
    x = torch.randn(4, 6, 5, 5, dtype=torch.bfloat16)
    y, logdet = genfast.ops.affine_coupling(x, torch.randn(4, 6, 5, 5, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert logdet.dtype == torch.float32


def test_autocast_output_of_a_conditioner_is_taken():
    x = torch.randn(2, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        params = torch.nn.functional.conv2d(x[:, 2:], torch.randn(4, 2, 3, 3), padding=1)
        assert params.dtype == torch.bfloat16
        y, logdet = genfast.ops.affine_coupling(x, params)
    expected, _ = genfast.reference.affine_coupling(x, params.float())
    assert y.dtype == logdet.dtype == torch.float32
    torch.testing.assert_close(y, expected)


def test_profiler_and_dispatch_modes_see_the_ops():
    x, one = torch.randn(2, 3), torch.ones(3)
    with torch.profiler.profile() as profile:
        genfast.ops.actnorm(x, one, one)
    assert any(e.key == "genfast::actnorm" for e in profile.key_averages())
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        genfast.ops.actnorm(x, one, one)
    assert any("genfast.actnorm" in s for s in seen)


def test_vmap_over_stacked_parameters():
    x, scales, bias = torch.randn(2, 3, 4, 4), torch.rand(5, 3) + 0.5, torch.randn(3)
    y, logdet = torch.vmap(lambda s: genfast.ops.actnorm(x, s, bias))(scales)
    assert y.shape == (5, 2, 3, 4, 4)
    for i in range(5):
        expected = genfast.ops.actnorm(x, scales[i], bias)
        torch.testing.assert_close((y[i], logdet[i]), expected)


# ---- what reaches a kernel ----


def _recorded():
    """A call of every op, among them of the backward ops, as the samples and their derivatives make them."""
    from tests.fuzz import declared_calls

    return {name.rpartition(".")[2]: args for name, _, args, _ in declared_calls()}


@pytest.fixture(scope="module")
def recorded():
    return _recorded()


def test_every_op_has_a_check_and_every_backward_op_refuses_shapes_that_do_not_fit(recorded):
    assert all(callable(op.check) for op in _registry.OPS.values())
    backwards = [op for op in _registry.OPS.values() if op.check_before_kernels]
    assert len(backwards) == 27
    assert {op.name for op in backwards} <= set(recorded)
    for op in backwards:
        args = recorded[op.name]
        for i, name in enumerate(op.argument_names):
            t = args[i]
            if not name.startswith("grad") or not isinstance(t, Tensor):
                continue
            for other in (
                t.new_ones((*t.shape, 2)),
                t.new_ones([s + 1 for s in t.shape]) if t.dim() else t.new_ones(3),
            ):
                changed = [*args[:i], other, *args[i + 1 :]]
                with pytest.raises(ValueError, match=name):
                    op.overload(*changed)
                with pytest.raises(ValueError, match=name):  # as autograd calls it
                    op(*changed)


def test_the_guard_answers_the_same_in_c_and_in_python(recorded):
    if _registry._CPU is None:
        pytest.skip("there is no extension")
    for name, args in recorded.items():
        op = _registry.OPS[name]
        plain = _registry.Signature(op.kinds, op._taken("cpu"), op._taken("cuda"))
        args = op._completed(args)
        for i in range(len(args)):
            changes = [None, 1, 1.0, "x", [1], [True], (1.0,), True]
            if isinstance(args[i], Tensor):
                t = args[i]
                changes += [
                    t.to(torch.uint8),
                    t.to(torch.complex64),
                    t.half(),
                    t[:0] if t.dim() else t,
                    t.to("meta"),
                    t.to_sparse(),
                    torch._efficientzerotensor(t.shape),
                    torch._neg_view(t.float()),
                    torch.nn.Parameter(t.float()),
                ]
            for change in (args[i], *changes):
                changed = (*args[:i], change, *args[i + 1 :])
                expected = _registry._guard_in_python(plain, changed)
                assert _registry._guard(op.signature, changed) == expected, (name, i, change)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool, torch.complex64], ids=str)
def test_integers_are_squeezed_by_the_reference(dtype):
    x = (torch.arange(2 * 3 * 8 * 12) % 251).reshape(2, 3, 8, 12).to(dtype)
    for order in ("pixel_unshuffle", "space_to_depth"):
        y = genfast.ops.squeeze(x, 4, order=order)
        assert y.dtype == dtype
        assert torch.equal(y.to(torch.complex128), genfast.reference.squeeze(x.to(torch.complex128), 4, order, False))
        assert torch.equal(genfast.ops.unsqueeze(y, 4, order=order), x)


def test_tensors_without_numbers_in_memory_are_taken_or_refused_by_name():
    x = torch.randn(2, 3)
    zero = torch._efficientzerotensor(2, 3)
    assert torch.equal(activation_chain(zero, x, "tanh"), x)
    assert torch.equal(_registry.OPS["activation_chain"].direct(zero, x, "tanh"), x)
    for wrong, what in (
        (x.to_sparse(), "torch.sparse_coo"),
        (x.to_mkldnn(), "torch._mkldnn"),
        (torch.nested.nested_tensor([x, x]), "nested"),
        (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantised"),
    ):
        for call in (_registry.OPS["pixel_norm"], torch.ops.genfast.pixel_norm):
            with pytest.raises((TypeError, RuntimeError), match=f"x .*{what}|{what}"):
                call(wrong, 1e-8)


@pytest.mark.parametrize("perm", [[10**9, 1, 2, 3], [0, 1, 1, 3], [-1, 1, 2, 3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_permutation_that_is_none_is_refused(perm, dtype):
    one = torch.eye(4, dtype=dtype)
    plu = genfast.ops.PLU(torch.tensor(perm), one, one, one[0] + 1, one[1])
    for inverse in (False, True):
        with pytest.raises(ValueError, match="perm is no permutation"):
            genfast.ops.invertible_conv1x1(torch.randn(2, 4, 3, 3, dtype=dtype), plu, inverse=inverse)
    with pytest.raises(TypeError, match="sign_s is None"):
        genfast.ops.invertible_conv1x1(torch.randn(2, 4), plu._replace(perm=torch.arange(4), sign_s=None))


def test_programs_whose_numbers_point_elsewhere_are_refused(recorded):
    op = _registry.OPS["autoregressive_inverse"]
    z, packed, statics, code, *options = recorded["autoregressive_inverse"]
    expected = op(z, packed, statics, code, *options)
    refused = 0
    for i in range(len(code)):
        changed = code.clone()
        changed[i] = 10**9
        try:
            found = op(z, packed, statics, changed, *options)
        except ValueError:
            refused += 1
        else:  # a number that this kind of layer does not use
            assert all(torch.equal(f, e) for f, e in zip(found, expected))
    assert refused > 0.8 * len(code)


def test_a_dilation_far_beyond_the_image_takes_no_memory():
    x, w = torch.randn(1, 2, 4, 4, 4, requires_grad=True), torch.randn(3, 2, 3, 3, 3, requires_grad=True)
    far = genfast.ops.masked_conv3d(x, w, mask_type="B", dilation=10**6)
    near = genfast.ops.masked_conv3d(x, w, mask_type="B", dilation=4)
    assert torch.equal(far, near)
    for a, b in zip(torch.autograd.grad(far.square().sum(), (x, w)), torch.autograd.grad(near.square().sum(), (x, w))):
        assert torch.equal(a, b)


def test_an_input_of_another_dtype_than_its_gradient_is_read_as_what_it_is():
    x, grad = torch.randn(4, 6, 3, 7).bfloat16(), torch.randn(4, 6, 3, 7)
    found = torch.ops.genfast.pixel_norm_backward(grad, x, 1e-8)
    assert torch.equal(found, genfast.reference.pixel_norm_backward(grad, x, 1e-8))
