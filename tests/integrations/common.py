"""What every peer's accelerated models are held to: the plain ones, in float64 and in float32."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import genfast
from genfast.integrations import Swapped
from genfast.integrations._class_swap import KEPT
from genfast.integrations._whole_flow import WHAT as WHOLE_FLOW


@dataclass(frozen=True)
class Case:
    """A model, and calls of it that return tensors and take one that is differentiated.

    noise: a standard deviation added to the parameters, since many begin as the identity.
    swapped: how many modules our kernels are to go into.
    """

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    calls: dict[str, Callable[[Any, Tensor], Sequence[Tensor]]]
    swapped: int
    noise: float = 0.1
    prime: Callable[[Any, Tensor], Any] | None = None


def build(case: Case, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module, Tensor]:
    """The plain model, an accelerated copy, and an input."""
    torch.manual_seed(0)
    plain, x = case.make().to(dtype), case.x().to(dtype)
    if case.prime is not None:
        case.prime(plain, x)
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(case.noise * torch.randn_like(p))
    fast = copy.deepcopy(plain)
    report = genfast.report(genfast.accelerate(fast))
    parts = [e for e in report.swapped if e.detail != WHOLE_FLOW]
    assert len(parts) == case.swapped, str(report)
    return plain, fast, x


def results(model: nn.Module, x: Tensor, call: Callable[[Any, Tensor], Sequence[Tensor]]) -> list[Tensor | None]:
    """Outputs, then the gradients of a fixed function of them to x and all parameters."""
    x = x.clone().requires_grad_()
    outputs = list(call(model, x))
    loss = sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape).cos()).sum() for o in outputs)
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
    return [*(o.detach() for o in outputs), *grads]


def same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None], rtol: float, atol: float) -> None:
    """Equal to rounding; a gradient that is missing on one side is zero on the other."""
    assert len(found) == len(expected)
    for f, e in zip(found, expected):
        if f is None or e is None:
            assert all(t is None or not t.any() for t in (f, e))
            continue
        torch.testing.assert_close(f, e, rtol=rtol, atol=atol)


def check_float64(case: Case) -> None:
    plain, fast, x = build(case)
    for training in (True, False):
        plain.train(training), fast.train(training)
        for name, call in case.calls.items():
            try:
                same(results(fast, x, call), results(plain, x, call), 1e-7, 1e-9)
            except AssertionError as error:
                raise AssertionError(f"{name}, training={training}: {error}") from None


def check_float32(case: Case) -> None:
    """As near the float64 results as the peer's own float32 is, or as our ops are held to be to theirs."""
    plain, fast, x = build(case, torch.float32)
    exact = copy.deepcopy(plain).double()
    for name, call in case.calls.items():
        truth = results(exact, x.double(), call)
        count = len(list(call(plain, x)))
        for i, (f, p, t) in enumerate(zip(results(fast, x, call), results(plain, x, call), truth)):
            if f is None or p is None or t is None:
                continue
            scale = t.norm().clamp_min(1e-6)
            ours, theirs = float((f - t).norm() / scale), float((p - t).norm() / scale)
            assert ours <= 3 * theirs + (3e-6 if i < count else 1e-5), (
                f"{name}, output {i}: {ours:.1e} off, the plain model {theirs:.1e}"
            )


def check_parameters(case: Case) -> None:
    torch.manual_seed(0)
    model = case.make()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    text, classes = repr(model), [type(m) for m in model.modules()]
    random = torch.get_rng_state()
    genfast.accelerate(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p is before[name][0] and torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), classes))
    assert repr(model) == text
    model.load_state_dict(state)


def check_training(case: Case) -> None:
    """Three steps of Adam lead to the same parameters."""
    plain, fast, x = build(case)
    call = next(iter(case.calls.values()))
    for model in (plain, fast):
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            sum(o.square().sum() for o in call(model, x)).backward()
            optimizer.step()
    same(list(fast.parameters()), list(plain.parameters()), 1e-6, 1e-8)


def check_copies(case: Case) -> None:
    """Copies of an accelerated model are accelerated, equal, and free of what it keeps between calls."""
    _, model, x = build(case)
    model.eval()
    calls = case.calls.values()

    def outputs(m: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return [o for call in calls for o in call(m, x)]

    expected = outputs(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert not any(KEPT in m.__dict__ for m in other.modules())
        assert [isinstance(m, Swapped) for m in other.modules()] == [isinstance(m, Swapped) for m in model.modules()]
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert all(torch.equal(a, b) for a, b in zip(outputs(other), expected))
        genfast.restore(other)
        assert not any(isinstance(m, Swapped) for m in other.modules())


def check_restore(case: Case) -> None:
    """``restore`` gives the same classes, attributes and bits; accelerating twice is accelerating once."""
    plain, model, x = build(case)
    for call in case.calls.values():
        call(model, x)  # so that something is kept
    classes = [type(m) for m in model.modules()]
    genfast.accelerate(model)
    assert [type(m) for m in model.modules()] == classes
    genfast.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert [set(m.__dict__) for m in model.modules()] == [set(m.__dict__) for m in plain.modules()]
    plain.eval(), model.eval()
    for call in case.calls.values():
        assert all(torch.equal(a, b) for a, b in zip(call(model, x), call(plain, x)))
    assert not genfast.restore(model).entries


CHECKS = [check_float64, check_float32, check_parameters, check_training, check_copies, check_restore]
