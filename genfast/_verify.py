"""``genfast verify``: every op, on every backend that this machine can use, against the float64 reference.

Each op that declares ``samples`` is run forward and backward over fresh random inputs; a newly declared op is in the table
without being listed here.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._registry import OPS, Op, Sample, _tensors

# Relative errors ||out - reference|| / ||reference|| allowed: forward, gradients.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-12, 1e-11),
    torch.float32: (2e-6, 1e-5),
    torch.bfloat16: (1e-2, 2e-2),  # the gradients are rounded once more than the outputs
    torch.float16: (2e-3, 4e-3),
}
DTYPES = {str(d).removeprefix("torch."): d for d in TOLERANCES}


@dataclass(frozen=True)
class Row:
    """One op on one backend in one dtype: the worst relative errors over its samples."""

    op: str
    device: str
    backend: str
    dtype: torch.dtype
    forward: float
    backward: float
    worst: str

    @property
    def passed(self) -> bool:
        forward, backward = TOLERANCES[self.dtype]
        return self.forward <= forward and self.backward <= backward


def _prepared(sample: Sample, dtype: torch.dtype, device: str, rounded: torch.dtype | None = None) -> list[Any]:
    """The sample's arguments as fresh leaves; ``rounded`` first rounds the values to that dtype."""

    def prepared(a: Any, differentiated: bool) -> Any:
        if isinstance(a, list):
            return [prepared(element, differentiated) for element in a]
        if not isinstance(a, Tensor):
            return a
        if not a.is_floating_point():
            return a.to(device)
        value = a if rounded is None else a.to(rounded)
        return value.to(device=device, dtype=dtype, copy=True).requires_grad_(differentiated)

    return [prepared(a, i not in sample.constant) for i, a in enumerate(sample.args)]


def _outputs(result: Any) -> list[Tensor]:
    """The floating outputs; bits and levels have tests of their own."""
    return [t for t in ([result] if isinstance(result, Tensor) else result) if t.is_floating_point()]


def relative_error(found: Tensor | None, expected: Tensor | None) -> float:
    """||found - expected|| / ||expected||; infinite where one is not finite and the other is."""
    if expected is None or not expected.numel():
        return 0.0
    if found is None:
        return float(expected.detach().norm())
    expected = expected.detach().double()
    found = found.detach().to(device=expected.device, dtype=torch.float64)
    if found.shape != expected.shape or not bool(found.isfinite().eq(expected.isfinite()).all()):
        return float("inf")
    error, norm = float((found - expected).norm()), float(expected.norm())
    return error / norm if norm else error


def errors(op: Op, sample: Sample, dtype: torch.dtype, device: str, backend: str) -> tuple[float, float]:
    """The relative errors of outputs and of gradients for one call, on weights drawn for the outputs."""
    args, exact = _prepared(sample, dtype, device), _prepared(sample, torch.float64, "cpu", rounded=dtype)
    expected = _outputs(op.reference(*exact))
    with _backend.backend(backend):
        found = _outputs(op(*args))
        forward = max(relative_error(f, e) for f, e in zip(found, expected))
        weights = [torch.randn_like(e) for e in expected]
        leaves, exact_leaves = ([a for a in _tensors(s) if a.requires_grad] for s in (args, exact))
        live = [i for i, e in enumerate(expected) if e.requires_grad]
        if not live:
            return forward, 0.0
        cotangents = [weights[i].to(found[i].dtype) for i in live]
        grads = torch.autograd.grad([found[i] for i in live], leaves, [c.to(device) for c in cotangents], allow_unused=True)
    exact_grads = torch.autograd.grad(
        [expected[i] for i in live], exact_leaves, [c.double() for c in cotangents], allow_unused=True
    )
    return forward, max(relative_error(g, e) for g, e in zip(grads, exact_grads))


def rows(ops: Sequence[str] | None, device: str | None, dtype: str | None, seed: int) -> Iterator[Row]:
    """The table, row by row."""
    devices = [device] if device else ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    dtypes = [DTYPES[dtype]] if dtype else list(TOLERANCES)
    for name in ops or list(OPS):
        op = OPS[name]
        if op.samples is None:
            continue
        for where in devices:
            for backend in _backend.BACKENDS:
                if op.refusal(backend, where):
                    continue
                for kind in dtypes:
                    if kind not in op.dtypes[backend]:
                        continue
                    worst, forward, backward = "", 0.0, 0.0
                    for sample in op.samples(torch.Generator().manual_seed(seed)):
                        f, b = errors(op, sample, kind, where, backend)
                        if max(f, b) > max(forward, backward) or not worst:
                            worst = sample.label
                        forward, backward = max(forward, f), max(backward, b)
                    yield Row(name, where, backend, kind, forward, backward, worst)


def run(ops: Sequence[str] | None = None, device: str | None = None, dtype: str | None = None, seed: int | None = None) -> int:
    """Prints the table and a verdict; returns the exit status, 0 when every row passed.

    Args:
        ops: names of ops; all that declare samples without.
        device: "cpu" or "cuda"; all that are there without.
        dtype: "float64", "float32", "bfloat16" or "float16"; all without.
        seed: of the random inputs; drawn and printed without, so that a failure can be repeated.

    Raises:
        ValueError: an unknown op, device or dtype, or a device that is not there.
    """
    known = [name for name, op in OPS.items() if op.samples is not None]
    for name in ops or ():
        if name not in known:
            raise ValueError(f"verify: op={name!r}, expected one of {', '.join(known)}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"verify: dtype={dtype!r}, expected one of {', '.join(DTYPES)}")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"verify: device={device!r}, expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("verify: device='cuda', but no CUDA GPU is visible to PyTorch")
    seed = secrets.randbits(31) if seed is None else seed
    print(f"relative errors against the float64 reference, seed {seed}")
    print(f"{'op':<18} {'device':<6} {'backend':<9} {'dtype':<8} {'forward':>8} {'backward':>8}  {'verdict':<7} worst sample")
    torch.manual_seed(seed)
    count = failed = 0
    for row in rows(ops, device, dtype, seed):
        count += 1
        failed += not row.passed
        kind = str(row.dtype).removeprefix("torch.")
        print(
            f"{row.op:<18} {row.device:<6} {row.backend:<9} {kind:<8} {row.forward:8.1e} {row.backward:8.1e}  "
            f"{'pass' if row.passed else 'FAIL':<7} {row.worst}",
            flush=True,
        )
    if not count:
        print("nothing was verified: no backend serves what was asked for")
        return 1
    print(f"{count - failed} of {count} passed" if failed else f"all {count} passed")
    return 1 if failed else 0
