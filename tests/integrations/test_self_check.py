"""Accelerated inverses against changed modules of the peers, weights written by any way, and layers that are read
wrongly."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import genfast
from genfast.integrations import _autoregressive
from genfast.programs.self_check import SelfCheckError

nt = pytest.importorskip("nflows.transforms")
nf = pytest.importorskip("normflows")
zuko = pytest.importorskip("zuko")
from genfast.integrations import zuko as zuko_integration  # noqa: E402


def nflows_maf():
    return nt.MaskedAffineAutoregressiveTransform(5, 16, num_blocks=2)


def normflows_maf():
    return nf.flows.MaskedAffineAutoregressive(5, 16, num_blocks=2)


def zuko_maf():
    return zuko.flows.MAF(5, transforms=1, hidden_features=(16, 16))


def inverse(model, z):
    if isinstance(model, zuko.lazy.Flow):
        return model().transform.inv.call_and_ladj(z)
    return model.inverse(z)


BUILDS = [nflows_maf, normflows_maf, zuko_maf]


def pair(build, change=lambda model: None):
    torch.manual_seed(0)
    plain = build().double().eval()
    change(plain)
    fast = copy.deepcopy(plain)
    genfast.accelerate(fast)
    return plain, fast, torch.randn(3, 5, dtype=torch.float64)


def same(plain, fast, z):
    for a, b in zip(inverse(fast, z), inverse(plain, z)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("build", BUILDS)
def test_weights_written_by_any_way_are_seen(build):
    plain, fast, z = pair(build)
    with torch.no_grad():
        same(plain, fast, z)
        for model in (plain, fast):
            for i, p in enumerate(model.parameters()):
                p.data.mul_(1.5) if i % 2 else p.numpy().__imul__(1.5)
        same(plain, fast, z)


@pytest.mark.parametrize("build", BUILDS[:2])
def test_a_changed_block_keeps_the_librarys_way(build):
    def change(model):
        block = model.autoregressive_net.blocks[1]

        class Louder(type(block)):
            def forward(self, inputs, context=None):
                return 1.5 * super().forward(inputs, context)

        block.__class__ = Louder

    plain, fast, z = pair(build, change)
    same(plain, fast, z)


def test_a_changed_network_keeps_zukos_way():
    def change(model):
        hyper = model.transform.transforms[0].hyper

        class Louder(type(hyper)):
            def forward(self, x):
                return 0.5 * super().forward(x)

        hyper.__class__ = Louder

    plain, fast, z = pair(zuko_maf, change)
    same(plain, fast, z)


@pytest.mark.parametrize("build", BUILDS)
def test_layers_that_are_read_wrongly_are_found_out(build, monkeypatch):
    _, fast, z = pair(build)

    def faulty(function):
        def read(*args):
            layers = function(*args)
            return [*layers[:-1], replace(layers[-1], before="tanh")] if isinstance(layers, list) else layers

        return read

    for module, name in ((_autoregressive, "made_layers"), (zuko_integration, "_layers")):
        monkeypatch.setattr(module, name, faulty(getattr(module, name)))
    with pytest.raises(SelfCheckError, match="its inverse in the order of degrees differs from what its network says"):
        inverse(fast, z)
    with pytest.raises(SelfCheckError):  # nor is it trusted the second time
        inverse(fast, z)
