"""normflows' flows with our kernels: the same numbers, the same modules."""

from __future__ import annotations

import copy

import pytest
import torch

import genfast

nf = pytest.importorskip(
    "normflows", reason="normflows is not installed: pip install --no-deps -r requirements/peers.txt"
)

from .common import CHECKS, Case, build, same  # noqa: E402

C = torch.linspace(-1, 1, 9 * 3).view(9, 3)
F = nf.flows
pytestmark = pytest.mark.filterwarnings("ignore:torch.lu is deprecated")


def _flat(result):
    z, log_det = result
    return [*(z if isinstance(z, list) else [z]), torch.as_tensor(log_det)]


def _case(make, swapped, x=lambda: 2 * torch.randn(9, 5), context=False, ways=("forward", "inverse"), prime=None):
    def call(way):
        return lambda m, x: _flat(getattr(m, way)(x, context=C.to(x.dtype)) if context else getattr(m, way)(x))

    return Case(make, x, {way: call(way) for way in ways}, swapped, prime=prime)


def _unit():
    return torch.rand(9, 5)


def _image():
    return torch.randn(3, 6, 4, 2)


def _first_batch(m, x):
    for module in m.modules():
        if isinstance(module, F.ActNorm):
            module(x)


def _mlp(*sizes):
    return nf.nets.MLP(list(sizes), init_zeros=False)


RQ = F.neural_spline.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressive
RQC = F.neural_spline.coupling.PiecewiseRationalQuadraticCoupling
CASES = {
    "maf": _case(lambda: F.MaskedAffineAutoregressive(5, 16), 9),
    "maf context": _case(lambda: F.MaskedAffineAutoregressive(5, 16, 3), 9, context=True),
    "maf feedforward": _case(lambda: F.MaskedAffineAutoregressive(5, 16, use_residual_blocks=False), 5),
    "rq": _case(lambda: F.AutoregressiveRationalQuadraticSpline(5, 2, 16, permute_mask=True), 9),
    "rq context": _case(lambda: F.AutoregressiveRationalQuadraticSpline(5, 2, 16, 3), 9, context=True),
    "rq circular": _case(lambda: RQ(5, 16, tails="circular", tail_bound=3.0), 9),
    "rq bounded": _case(lambda: RQ(5, 16), 9, x=_unit),
    "rq bounds": _case(lambda: RQ(5, 16, tails="linear", tail_bound=torch.linspace(1, 2, 5)), 9),
    "rq mixed tails": _case(lambda: F.CircularAutoregressiveRationalQuadraticSpline(5, 2, 16, ind_circ=[1, 2]), 8),
    "rq coupling": _case(lambda: F.CoupledRationalQuadraticSpline(5, 2, 16), 2),
    "rq coupling context": _case(lambda: F.CoupledRationalQuadraticSpline(5, 2, 16, 3), 2, context=True),
    "rq coupling circular": _case(lambda: F.CoupledRationalQuadraticSpline(5, 2, 16, tails="circular"), 2),
    "rq coupling mixed": _case(lambda: F.CircularCoupledRationalQuadraticSpline(5, 2, 16, ind_circ=[1, 2]), 0),
    "coupling exp": _case(lambda: F.AffineCouplingBlock(_mlp(3, 8, 4)), 1),
    "coupling sigmoid_inv": _case(lambda: F.AffineCouplingBlock(_mlp(3, 8, 4), scale_map="sigmoid_inv"), 1),
    "coupling sigmoid": _case(lambda: F.AffineCouplingBlock(_mlp(3, 8, 4), scale_map="sigmoid"), 0),
    "coupling additive": _case(lambda: F.AffineCouplingBlock(_mlp(3, 8, 2), scale=False), 0),
    "constant": _case(lambda: F.AffineConstFlow((5,)), 1),
    "constant per pixel": _case(lambda: F.AffineConstFlow((6, 4, 2)), 0, x=_image),
    "actnorm": _case(lambda: F.ActNorm((5,)), 1, prime=_first_batch),
    "actnorm images": _case(lambda: F.ActNorm((6, 1, 1)), 1, x=_image, prime=_first_batch),
    "conv lu": _case(lambda: F.Invertible1x1Conv(6, True), 1, x=_image),
    "conv": _case(lambda: F.Invertible1x1Conv(6, False), 1, x=_image),
    "affine lu": _case(lambda: F.InvertibleAffine(5), 1),
    "affine": _case(lambda: F.InvertibleAffine(5, False), 0),
    "lu permute": _case(lambda: F.LULinearPermute(5), 1),
    "glow": _case(lambda: F.GlowBlock(6, 16), 2, x=_image, prime=_first_batch),
    "glow exp": _case(lambda: F.GlowBlock(6, 16, scale_map="exp"), 3, x=_image, prime=_first_batch),
}
each_case = pytest.mark.parametrize("name", CASES)


@each_case
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_case(name, check):
    check(CASES[name])


def test_log_determinants_keep_their_shapes():
    for name, case in CASES.items():
        plain, fast, x = build(case)
        for call in case.calls.values():
            shapes = [[t.shape for t in call(m, x)] for m in (fast, plain)]
            assert shapes[0] == shapes[1], name


@pytest.mark.parametrize("name", ["maf", "maf context", "maf feedforward", "rq", "rq context", "rq circular"])
def test_the_inverse_does_not_call_the_network(name, monkeypatch):
    _, fast, x = build(CASES[name])
    way = "forward" if "Spline" in type(fast).__name__ else "inverse"  # the wrappers turn round what they hold
    CASES[name].calls[way](fast, x)  # the first time a row is put through the network, as a check
    monkeypatch.setattr(nf.nets.MADE, "forward", None)
    assert CASES[name].calls[way](fast, x)[0].shape == x.shape


def test_a_flow_samples_alike():
    torch.manual_seed(0)
    flows = [
        F.MaskedAffineAutoregressive(4, 16),
        F.LULinearPermute(4),
        F.AutoregressiveRationalQuadraticSpline(4, 1, 16),
    ]
    plain = nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(0.1 * torch.randn_like(p))
    fast = copy.deepcopy(plain)
    genfast.accelerate(fast)
    found = []
    for model in (fast, plain):
        torch.manual_seed(1)
        with torch.no_grad():
            z, log_q = model.sample(7)
            found.append([z, log_q, model.log_prob(z)])
    same(*found, 1e-4, 1e-4)


def test_actnorm_is_set_from_its_first_batch_either_way():
    for way in ("forward", "inverse"):
        found = []
        for accelerated in (True, False):
            torch.manual_seed(0)
            model = F.ActNorm((6, 1, 1))
            if accelerated:
                genfast.accelerate(model)
            z, log_det = getattr(model, way)(3 * torch.randn(8, 6, 4, 2) + 1)
            assert float(model.data_dep_init_done) == 1
            found.append([z, log_det, model.s, model.t])
        same(*found, 1e-6, 1e-6)


def test_a_matrix_that_is_no_permutation_runs_normflows_itself():
    plain, fast, x = build(CASES["conv lu"])
    for model in (plain, fast):
        model.P.copy_(torch.linalg.qr(torch.arange(36.0).view(6, 6).double().sin())[0])
    same(_flat(fast(x)), _flat(plain(x)), 1e-9, 1e-9)
