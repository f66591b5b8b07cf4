"""Each private symbol of torch: that this torch has it, what its fallback answers, and that ops give the same numbers
then."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import genfast
from genfast import _allocator, _derived, _registry, _torch_private

# By the name that genfast gives it: where each symbol stands in torch. What it is for stands beside it in
# _torch_private.py.
SYMBOLS = {
    "dispatch_modes": ("_C", "_len_torch_dispatch_stack"),
    "function_modes": ("_C", "_len_torch_function_stack"),
    "tracing_state": ("_C", "_get_tracing_state"),
    "profiler_enabled": ("_C._autograd", "_profiler_enabled"),
    "transform": ("_C._functorch", "peek_interpreter_stack"),
    "is_transformed": ("_C._functorch", "is_functorch_wrapped_tensor"),
    "is_zero_tensor": ("Tensor", "_is_zerotensor"),
    "_use_count": ("_C", "_storage_Use_Count"),
    "set_grad_enabled": ("_C", "_set_grad_enabled"),
    "saved_tensor_hooks": ("_C._autograd", "_top_saved_tensors_default_hooks"),
    "graph_is_retained": ("_C._autograd", "_get_current_graph_task_keep_graph"),
    "_is_excluded": ("_C", "_dispatch_tls_is_dispatch_key_excluded"),
    "_set_excluded": ("_C", "_dispatch_tls_set_dispatch_key_excluded"),
    "_get_dispatch_mode": ("_C", "_get_dispatch_mode"),
    "_set_tracing_state": ("_C", "_set_tracing_state"),
    "forward_ad": ("autograd.forward_ad", "_current_level"),
}


def load(monkeypatch, owner, symbol):
    """_torch_private as it would be with a torch that lacks ``symbol``."""
    with monkeypatch.context() as patch:
        found = torch
        for name in owner.split("."):
            found = getattr(found, name)
        if owner == "Tensor":  # inherits its methods: None hides one
            patch.setattr(torch.Tensor, symbol, None, raising=False)
        else:
            patch.delattr(found, symbol)
        spec = importlib.util.spec_from_file_location("genfast._torch_private_lacking", Path(_torch_private.__file__))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def numbers():
    """Outputs and gradients of ops whose kernels, tables and references differ."""
    generator = torch.Generator().manual_seed(1)
    results = []
    for name in ("actnorm", "pixel_norm", "masked_linear", "bias_act"):
        op = _registry.OPS[name]
        for sample in list(op.samples(generator))[:2]:
            args = [
                a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                for a in sample.args
            ]
            outputs = op(*args)
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            leaves = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
            results += [*outputs, *torch.autograd.grad([o.sum() for o in outputs], leaves, allow_unused=True)]
    return [r.detach() for r in results if r is not None]


def test_this_torch_lacks_nothing():
    assert _torch_private.MISSING == []


@pytest.mark.parametrize("name", SYMBOLS)
def test_ops_give_the_same_numbers_without(name, monkeypatch):
    owner, symbol = SYMBOLS[name]
    lacking = load(monkeypatch, owner, symbol)
    assert [f"{owner}.{symbol}"] == lacking.MISSING
    expected = numbers()
    for module in (_registry, _derived, _allocator):
        for public in vars(lacking):
            if hasattr(module, public) and getattr(module, public) is getattr(_torch_private, public, None):
                monkeypatch.setattr(module, public, getattr(lacking, public))
    found = numbers()
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # where the reference runs it rounds otherwise


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("dispatch_modes", 1),  # a call that a mode watches must dispatch, or the mode does not see it
        ("function_modes", 1),
        ("profiler_enabled", True),  # a profile lacks what does not dispatch
        ("graph_is_retained", True),  # what a second backward needs must not be freed
    ],
)
def test_what_cannot_be_asked_is_taken_to_be_so(name, answer, monkeypatch):
    assert getattr(load(monkeypatch, *SYMBOLS[name]), name)() == answer


def test_without_transforms_known_every_call_counts_as_one_inside(monkeypatch):
    """A kernel would read the memory of a batched tensor, which is not that of a sample."""
    lacking = load(monkeypatch, *SYMBOLS["transform"])
    assert lacking.transform() is not None
    assert load(monkeypatch, *SYMBOLS["is_transformed"]).is_transformed(torch.ones(2))


def test_without_the_forward_level_every_call_counts_as_differentiated(monkeypatch):
    """torch.library ops have no tangent rule, and PyTorch would take the tangent for zero."""
    assert load(monkeypatch, *SYMBOLS["forward_ad"]).forward_ad._current_level >= 0


def test_without_tracing_state_asks_publicly(monkeypatch):
    lacking = load(monkeypatch, *SYMBOLS["tracing_state"])
    assert lacking.tracing_state() is None
    seen = []
    torch.jit.trace(lambda x: (seen.append(lacking.tracing_state()), x + 1)[1], torch.ones(2), check_trace=False)
    assert seen[0]


def test_a_zero_tensor_is_known_by_its_lack_of_memory(monkeypatch):
    """A kernel that is given it would read address 0."""
    lacking = load(monkeypatch, *SYMBOLS["is_zero_tensor"])
    zeros = torch._efficientzerotensor((3,))
    assert _torch_private.is_zero_tensor(zeros)
    assert lacking.is_zero_tensor(zeros)
    assert not lacking.is_zero_tensor(torch.ones(3))


def test_without_counts_no_memory_is_used_again(monkeypatch):
    """The pool hands out memory to which as many refer as to fresh memory: two counts must never be equal."""
    storage = torch.ones(3).untyped_storage()
    assert _torch_private.storage_uses(storage) >= 1
    lacking = load(monkeypatch, *SYMBOLS["_use_count"])
    assert len({lacking.storage_uses(storage) for _ in range(3)}) == 3


def test_gradients_are_set_publicly_and_saved_tensors_go_through_hooks(monkeypatch):
    lacking = load(monkeypatch, *SYMBOLS["set_grad_enabled"])
    lacking.set_grad_enabled(False)
    assert not torch.is_grad_enabled()
    lacking.set_grad_enabled(True)
    assert torch.is_grad_enabled()
    assert load(monkeypatch, *SYMBOLS["saved_tensor_hooks"]).saved_tensor_hooks(False) is not None


def test_autograd_inside_an_op(monkeypatch):
    """Below the dispatcher's keys of autograd nothing is recorded; without them a reference that differentiates
    raises."""
    x = torch.ones(2, requires_grad=True)
    with torch._C._AutoDispatchBelowAutograd():
        assert not (2 * x).requires_grad
        with _torch_private.autograd_works():
            assert (2 * x).requires_grad
        with load(monkeypatch, *SYMBOLS["_set_excluded"]).autograd_works():
            assert not (2 * x).requires_grad


def test_modes_are_left_and_come_back():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert _torch_private.fake_tensors()
        with _torch_private.without_modes():
            assert not isinstance(torch.ones(2), FakeTensor)
        assert isinstance(torch.ones(2), FakeTensor)
    inside = []
    torch.func.vmap(lambda row: (inside.append(_left(row)), row)[1])(torch.ones(2, 3))
    assert inside == [(True, False)]


def _left(row):
    before = _torch_private.transform() is not None
    with _torch_private.without_modes():
        return before, _torch_private.transform() is not None


def test_nothing_else_names_private_torch():
    """A private symbol elsewhere would have neither a fallback nor a test."""
    private = ("torch._C", "torch.utils._", "torch._functorch", "from torch import _C")
    for path in Path(genfast.__file__).parent.rglob("*.py"):
        if path.name != "_torch_private.py":
            text = path.read_text().replace("torch._C._nn.pad", "")  # a function that users call as F.pad
            assert not [symbol for symbol in private if symbol in text], path
