"""optim.Adam against torch.optim.Adam: numbers, state, hooks, closures, and what goes to torch's own step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import genfast

SHAPES = [(3, 5), (7,), (), (1, 1), (130, 40), (17, 3, 3)]


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in SHAPES]


def train(make, steps=25, dtype=torch.float64, between=lambda optimizer, i: None, missing=()):
    parameters = weights(dtype)
    optimizer = make(parameters)
    generator = torch.Generator().manual_seed(1)
    for i in range(steps):
        for k, p in enumerate(parameters):
            p.grad = None if k in missing and i % 2 else torch.randn(p.shape, generator=generator, dtype=dtype)
        optimizer.step()
        between(optimizer, i)
    return parameters, optimizer


OPTIONS = {
    "default": {},
    "every number": {"lr": 0.03, "betas": (0.5, 0.9), "eps": 1e-4, "weight_decay": 0.1},
    "decoupled": {"lr": 0.01, "weight_decay": 0.2, "decoupled_weight_decay": True},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True},
    "no momentum": {"betas": (0.0, 0.99)},
    "a tensor for lr": {"lr": torch.tensor(0.02), "foreach": False},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_the_numbers_are_torchs(name, dtype):
    options = OPTIONS[name]
    ours, optimizer = train(lambda p: genfast.optim.Adam(p, **options), dtype=dtype)
    theirs, plain = train(lambda p: torch.optim.Adam(p, **options), dtype=dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype is torch.float64 else {"rtol": 2e-5, "atol": 2e-6}
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, **tolerance)
        for key, value in plain.state[b].items():
            torch.testing.assert_close(optimizer.state[a][key], value, **tolerance)
            assert optimizer.state[a][key].dtype == value.dtype


def test_weights_without_a_gradient_and_different_counts():
    ours, _ = train(genfast.optim.Adam, missing=(1, 4))
    theirs, _ = train(torch.optim.Adam, missing=(1, 4))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_schedules_and_groups():
    def groups(optimizer):
        def make(p):
            made = optimizer([{"params": p[:2], "lr": 0.1}, {"params": p[2:], "betas": (0.8, 0.9)}], lr=1e-2)
            make.schedule = torch.optim.lr_scheduler.ExponentialLR(made, 0.9)
            return made

        return train(make, between=lambda o, i: make.schedule.step())[0]

    for a, b in zip(groups(genfast.optim.Adam), groups(torch.optim.Adam)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("to", [torch.optim.Adam, genfast.optim.Adam])
@pytest.mark.parametrize("source", [torch.optim.Adam, genfast.optim.Adam])
def test_states_move_between_the_two(source, to, tmp_path):
    parameters, optimizer = train(source, 7)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    made = to(parameters)
    made.load_state_dict(torch.load(tmp_path / "state.pt"))
    expected = torch.optim.Adam(others := copy.deepcopy(parameters))
    expected.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(5):
        for a, b in zip(parameters, others):
            a.grad = torch.full_like(a, 0.3)
            b.grad = a.grad.clone()
        made.step()
        expected.step()
    for a, b in zip(parameters, others):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert {float(s["step"]) for s in made.state.values()} == {12.0}


@pytest.mark.parametrize("strided", [False, True])  # torch's own step takes strided gradients
def test_hooks_and_closures_run_once(strided):
    p = nn.Parameter(torch.ones(4, 3))
    optimizer = genfast.optim.Adam([p])
    torch.optim.Adam([nn.Parameter(torch.ones(1))])  # wraps torch's step for its own hooks
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        calls.append("closure")
        assert torch.is_grad_enabled()
        p.grad = torch.ones(3, 4).t() if strided else torch.ones(4, 3)
        return 2.5

    assert optimizer.step(closure) == 2.5
    assert calls == ["before", "closure", "after"]
    assert float(p[0, 0]) < 1


def test_a_change_is_counted_so_that_an_old_graph_is_refused():
    p = nn.Parameter(torch.ones(3))
    optimizer = genfast.optim.Adam([p])
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_many_weights_on_two_threads():
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            p = nn.Parameter(torch.linspace(-1, 1, 300_007))
            q = nn.Parameter(torch.ones(5))
            optimizer = genfast.optim.Adam([q, p], lr=0.1)
            for _ in range(3):
                p.grad, q.grad = p.detach().sin(), q.detach().clone()
                optimizer.step()
            results.append((p.detach(), q.detach()))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("options", [{"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"weight_decay": -0.1}])
def test_bad_numbers_are_refused_as_by_torch(options):
    with pytest.raises(ValueError, match="Invalid"):
        genfast.optim.Adam([nn.Parameter(torch.ones(1))], **options)


def test_sparse_half_and_empty():
    p = nn.Parameter(torch.ones(3))
    optimizer = genfast.optim.Adam([p])
    p.grad = torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    half = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    half.grad = torch.ones_like(half)
    genfast.optim.Adam([half], lr=0.1).step()
    assert bool((half < 1).all())
    empty = nn.Parameter(torch.ones(0, 3))
    empty.grad = torch.ones(0, 3)
    genfast.optim.Adam([empty]).step()
    genfast.optim.Adam([nn.Parameter(torch.ones(2))]).step()
