"""Whatever mode of PyTorch a first call comes in, it gives what an ordinary call gives, and leaves nothing of the mode
behind.

A first call in the mode, then a training step; both are compared with those of a copy that never saw the mode. For
modules, models, the accelerated models of other libraries, and ops.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, stack_module_state, vmap
from torch.utils._pytree import tree_map_only

import genfast
from genfast import models
from genfast import nn as gnn

from .conftest import SAMPLES

Call = Callable[[Any, Tensor], "Tensor | Sequence[Tensor]"]


@dataclass(frozen=True)
class Subject:
    """A module that takes one tensor, and what is called of it.

    accelerated: a model of another library, of which a mode is asked for only where the plain model can do it.
    """

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    call: Call = lambda m, x: m(x)
    accelerated: bool = False


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: 0.5 * torch.randn(shape)


def levels(high: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, shape)


def log_prob(m: Any, x: Tensor) -> Any:
    return m.log_prob(x)


def inverse(m: Any, x: Tensor) -> Any:
    return m.inverse(x)


def zuko_log_prob(m: Any, x: Tensor) -> Any:
    return m().log_prob(x)


def zuko_inverse(m: Any, x: Tensor) -> Any:
    return m().transform.inv(x)


def conv() -> nn.Module:
    return nn.Conv2d(2, 4, 3, padding=1)


def ready(module: nn.Module) -> nn.Module:
    """Data-dependent layers set before, since what a first call does to parameters is another matter."""
    module.train()(torch.randn(16, 4, 6, 6))
    return module


def own() -> dict[str, Subject]:
    made = lambda: gnn.MADENetwork(4, (8, 8), outputs=2, order="reversed")  # noqa: E731
    images, vectors = rows(5, 4, 6, 6), rows(5, 4)
    return {
        "ActNorm": Subject(lambda: ready(gnn.ActNorm(4)), images),
        "AffineCoupling": Subject(lambda: gnn.AffineCoupling(conv(), scale="sigmoid"), images),
        "BatchNormFlow": Subject(lambda: gnn.BatchNormFlow(4).eval(), vectors),
        "CircularShift": Subject(lambda: gnn.CircularShift(4), vectors),
        "GlowStep": Subject(lambda: ready(gnn.GlowStep(4, conv())), images),
        "Householder": Subject(lambda: gnn.Householder(4), vectors),
        "InvertibleConv1x1": Subject(lambda: gnn.InvertibleConv1x1(4), images),
        "InvertibleConv1x1 inverse": Subject(lambda: gnn.InvertibleConv1x1(4, plu=False), images, inverse),
        "LULinear": Subject(lambda: gnn.LULinear(4, order="reversed"), vectors),
        "LULinear inverse": Subject(lambda: gnn.LULinear(4, order="reversed"), vectors, inverse),
        "MADE": Subject(made, vectors),
        "MaskedAutoregressive": Subject(lambda: gnn.MaskedAutoregressive(made()), vectors),
        "MaskedAutoregressive inverse": Subject(lambda: gnn.MaskedAutoregressive(made()), vectors, inverse),
        "MaskedConv2d": Subject(lambda: gnn.MaskedConv2d(4, 8, 3, padding=1, mask_type="A"), images),
        "NADE": Subject(lambda: gnn.NADENetwork(4, 8, order="reversed"), vectors),
        "Permutation": Subject(lambda: gnn.Permutation(4), vectors, inverse),
        "ReversibleSequential": Subject(lambda: ready(gnn.ReversibleSequential(gnn.GlowStep(4, conv()))), images),
        "Spline": Subject(lambda: gnn.Spline(4), vectors),
        "SplineCoupling": Subject(lambda: gnn.SplineCoupling(nn.Linear(2, 2 * 23)), vectors),
        "IAF": Subject(lambda: models.IAF(4, hidden=8, transforms=2), vectors, log_prob),
        "MAF": Subject(lambda: models.MAF(4, hidden=8, transforms=2).eval(), vectors, log_prob),
        "MAF inverse": Subject(lambda: models.MAF(4, hidden=8, transforms=2).eval(), vectors, inverse),
        "NSF": Subject(lambda: ready_model(models.NSF(4, hidden=8, transforms=1)), vectors, log_prob),
        "NICE": Subject(lambda: models.NICE(4, hidden=8, couplings=2), vectors, log_prob),
        "LinearFlow": Subject(lambda: ready_model(models.LinearFlow(4)), vectors, log_prob),
        "Glow": Subject(
            lambda: ready_model(models.Glow((1, 8, 8), levels=1, steps=2, hidden=8)), rows(3, 1, 8, 8), log_prob
        ),
        "RealNVP": Subject(lambda: ready_model(models.RealNVP((1, 8, 8), hidden=4)).eval(), rows(3, 1, 8, 8), log_prob),
        "MADE model": Subject(lambda: models.MADE(6, hidden=8), levels(2, 5, 6), log_prob),
        "NADE model": Subject(lambda: models.NADE(6, hidden=8), levels(2, 5, 6), log_prob),
        "DeepNADE": Subject(lambda: models.DeepNADE(6, hidden=8, orders=2).eval(), levels(2, 5, 6), log_prob),
        "RNADE": Subject(lambda: models.RNADE(4, hidden=8), vectors, log_prob),
        "PixelCNN": Subject(lambda: models.PixelCNN(channels=8, layers=2, levels=4), levels(4, 2, 1, 5, 6), log_prob),
        "GatedPixelCNN": Subject(
            lambda: models.GatedPixelCNN(channels=8, layers=2, levels=4), levels(4, 2, 1, 5, 6), log_prob
        ),
        "PixelCNN++": Subject(
            lambda: models.PixelCNNPlusPlus(filters=8, blocks=1, mixtures=2), levels(256, 2, 3, 8, 8), log_prob
        ),
        "PixelRNN": Subject(
            lambda: models.PixelRNN(channels=8, layers=1, kind="diagonal", levels=2), levels(2, 2, 1, 5, 6), log_prob
        ),
        "WaveNet": Subject(
            lambda: models.WaveNet(levels=16, residual=8, skip=8, layers=3), levels(16, 2, 1, 20), log_prob
        ),
    }


def ready_model(model: Any) -> nn.Module:
    model.train().log_prob(torch.randn(8, *model.shape))
    return model


def peers() -> dict[str, Subject]:
    zuko, nt, nf = (
        pytest.importorskip("zuko"),
        pytest.importorskip("nflows.transforms"),
        pytest.importorskip("normflows"),
    )
    vectors, images = rows(5, 4), rows(5, 4, 4, 4)
    small = {"hidden_features": (8, 8)}

    def outputs(m: Any, x: Tensor) -> Any:
        return m(x)

    subjects = {
        "zuko MAF": (lambda: zuko.flows.MAF(4, transforms=2, **small), vectors, zuko_log_prob),
        "zuko MAF inverse": (lambda: zuko.flows.MAF(4, transforms=2, **small), vectors, zuko_inverse),
        "zuko NSF": (lambda: zuko.flows.NSF(4, transforms=1, bins=4, **small), vectors, zuko_log_prob),
        "zuko NSF inverse": (lambda: zuko.flows.NSF(4, transforms=1, bins=4, **small), vectors, zuko_inverse),
        "zuko NICE": (lambda: zuko.flows.NICE(4, transforms=2, **small), vectors, zuko_log_prob),
        "zuko NICE inverse": (lambda: zuko.flows.NICE(4, transforms=2, **small), vectors, zuko_inverse),
        "zuko NCSF": (lambda: zuko.flows.NCSF(4, transforms=1, bins=4, **small), vectors, zuko_log_prob),
        "zuko NAF": (lambda: zuko.flows.NAF(4, transforms=1, **small), vectors, zuko_log_prob),
        "nflows MAF": (lambda: nt.MaskedAffineAutoregressiveTransform(4, 8), vectors, outputs),
        "nflows MAF inverse": (lambda: nt.MaskedAffineAutoregressiveTransform(4, 8), vectors, inverse),
        "nflows spline": (
            lambda: nt.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                4, 8, num_bins=4, tails="linear", tail_bound=3
            ),
            vectors,
            outputs,
        ),
        "nflows LULinear": (lambda: nt.LULinear(4, identity_init=False), vectors, outputs),
        "nflows LULinear inverse": (lambda: nt.LULinear(4, identity_init=False), vectors, inverse),
        "nflows 1x1": (lambda: nt.OneByOneConvolution(4, identity_init=False), images, outputs),
        "nflows ActNorm": (lambda: nt.ActNorm(4).eval(), vectors, outputs),
        "normflows MAF": (lambda: nf.flows.MaskedAffineAutoregressive(4, 8), vectors, outputs),
        "normflows MAF inverse": (lambda: nf.flows.MaskedAffineAutoregressive(4, 8), vectors, inverse),
        "normflows spline": (
            lambda: nf.flows.AutoregressiveRationalQuadraticSpline(4, 1, 8, num_bins=4),
            vectors,
            inverse,
        ),
        "normflows LU": (lambda: nf.flows.LULinearPermute(4), vectors, outputs),
        "normflows 1x1": (lambda: nf.flows.Invertible1x1Conv(4, use_lu=True), images, outputs),
        "normflows mixing": (lambda: nf.flows.InvertibleAffine(4, use_lu=True), vectors, inverse),
        "normflows coupling": (lambda: nf.flows.AffineCouplingBlock(nf.nets.MLP([2, 8, 4])), vectors, outputs),
    }
    return {name: Subject(make, x, call, True) for name, (make, x, call) in subjects.items()}


OWN, PEERS = own(), peers()
EVERY = OWN | PEERS


class Called(nn.Module):
    """``forward`` is the call, for the tools that take a module."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.module, x)


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for o in outputs for t in flat(o)]


def step(module: Called, x: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of a function of them to x and to the parameters."""
    if x.is_floating_point():
        x = x.clone().requires_grad_()
    outputs = flat(module(x))
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape).cos()).sum() for o in outputs)
    assert isinstance(loss, Tensor)
    wanted = [t for t in (x, *module.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*(o.detach() for o in outputs), *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, wanted))]


def same(found: Any, expected: Any) -> None:
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        assert type(f) in (Tensor, nn.Parameter)
        assert not f.is_inference()
        torch.testing.assert_close(f, e, rtol=1e-4, atol=2e-5)


def fake(module: Called, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        outputs = flat(module(mode.from_tensor(x)))
    assert [tuple(o.shape) for o in outputs] == [tuple(o.shape) for o in flat(module(x))]


def meta(module: Called, x: Tensor) -> None:
    outputs = flat(copy.deepcopy(module).to("meta")(x.to("meta")))
    assert all(o.is_meta for o in outputs)
    assert [tuple(o.shape) for o in outputs] == [tuple(o.shape) for o in flat(module(x))]


def exported(module: Called, x: Tensor) -> None:
    program = torch.export.export(module, (x,), strict=False)
    same([t.detach() for t in flat(program.module()(x))], [t.detach() for t in flat(module(x))])


def traced(module: Called, x: Tensor) -> None:
    graph = torch.jit.trace(module, x, check_trace=False)
    same([t.detach() for t in flat(graph(x))], [t.detach() for t in flat(module(x))])


def stacked(module: Called, x: Tensor) -> None:
    members = [module, copy.deepcopy(module)]
    with torch.no_grad():
        for p in members[1].parameters():
            p.add_(0.1 * torch.randn_like(p))
    params, buffers = stack_module_state(members)
    found = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)), randomness="same")(params, buffers)
    for i, member in enumerate(members):
        same([t[i].detach() for t in flat(found)], [t.detach() for t in flat(member(x))])


def inference(module: Called, x: Tensor) -> None:
    with torch.inference_mode():
        module(x)


def no_grad(module: Called, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def compiled(module: Called, x: Tensor, **options: Any) -> None:
    torch._dynamo.reset()
    graph = torch.compile(module, backend="aot_eager", fullgraph=True, **options)
    same(flat([t.detach() for t in flat(graph(x))]), [t.detach() for t in flat(copy.deepcopy(module)(x))])


def dynamic(module: Called, x: Tensor) -> None:
    compiled(module, x, dynamic=True)


MODES: dict[str, Callable[[Called, Tensor], None]] = {
    "inference": inference,
    "no_grad": no_grad,
    "fake": fake,
    "meta": meta,
    "export": exported,
    "trace": traced,
    "vmap": stacked,
    "compile": compiled,
    "dynamic": dynamic,
}


def attempt(mode: str, module: Called, x: Tensor) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            MODES[mode](module, x)
        except Exception as error:
            return error
    return None


# Minutes of one core go into the compiles and exports of everything and into tracing the large models, so all of it is
# for GENFAST_EVERY_MODE=1; each kind of what is kept between calls has a case here.
SLOW = {
    "export": ("zuko NICE", "nflows LULinear"),
    "compile": ("PixelCNN", "normflows mixing"),
    "dynamic": ("Spline", "zuko MAF"),
}
LARGE = {"DeepNADE", "GatedPixelCNN", "PixelCNN++", "PixelRNN", "RealNVP", "RNADE", "WaveNet", "MAF"}


def pairs() -> list[tuple[str, str]]:
    if os.environ.get("GENFAST_EVERY_MODE") == "1":
        return [(mode, name) for mode in MODES for name in EVERY]
    found = [(mode, name) for mode in MODES if mode not in SLOW for name in EVERY if name not in LARGE]
    found += [("inference", name) for name in EVERY if name in LARGE]
    return found + [(mode, name) for mode, names in SLOW.items() for name in names]


@pytest.mark.parametrize(("mode", "name"), pairs())
def test_a_first_call_in_a_mode(mode: str, name: str) -> None:
    subject = EVERY[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated functions of the libraries
        plain = Called(subject.make(), subject.call)
    module, x = copy.deepcopy(plain), subject.x()
    if subject.accelerated:
        genfast.accelerate(module)
    reference = copy.deepcopy(module)
    error = attempt(mode, module, x)
    if error is not None and (not subject.accelerated or attempt(mode, plain, x) is None):
        raise error
    same(step(module, x), step(reference, x))


FIRST = {op.name: (op, sample) for op, sample in reversed(SAMPLES)}


@pytest.mark.parametrize("name", FIRST)
def test_an_ops_first_call_in_a_mode(name: str) -> None:
    op, sample = FIRST[name]
    args = tree_map_only(Tensor, Tensor.clone, list(sample.args))
    with torch.inference_mode():
        inside = flat(op(*args))
    with FakeTensorMode() as mode:
        shapes = flat(op(*tree_map_only(Tensor, mode.from_tensor, args)))
    outside = flat(op(*args))
    for i, f, o in zip(inside, shapes, outside):
        assert torch.equal(i, o) or bool((i.isnan() == o.isnan()).all())
        assert (f.shape, f.dtype, f.device) == (o.shape, o.dtype, o.device)
    leaves = [
        a.requires_grad_()
        for k, a in enumerate(args)
        if isinstance(a, Tensor) and a.is_floating_point() and k not in sample.constant
    ]
    with_gradients = [o for o in flat(op(*args)) if o.requires_grad and o.numel()]
    if with_gradients:
        grads = torch.autograd.grad([o.sum() for o in with_gradients], leaves, allow_unused=True)
        assert not any(g.is_inference() for g in grads if g is not None)
