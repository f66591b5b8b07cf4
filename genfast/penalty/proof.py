"""One comparison of a recorded pass with double backward, for critics that call what no rule of ours is for.

Such a call is differentiated by PyTorch, alone, which is right as long as it computes what it is given and nothing
else. That cannot be seen from outside, so the first time that a critic makes such a call both ways are run from one
state, and their input gradients and the parameter gradients of one random direction compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .tape import Unsupported

TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-2,
}  # of norms: one kink that rounding flips must not count as an error
HALF = 0.15  # of norms, where products are in a half type


def prove(
    critic: Callable[..., Any],
    x: Tensor,
    context: Sequence[Tensor],
    rows: int,
    record: Callable[..., Any],
    parameters: Sequence[Tensor],
    restore: Callable[[], None],
) -> None:
    """Raises Unsupported where a recorded pass and double backward differ.

    critic: as it is called in plain code. record: (x, context) to a ``Pass`` of it. rows: of x, that are enough.
    parameters: those of its modules. restore: puts back what a pass changes.
    """
    device = x.device.type
    tolerance = HALF if torch.is_autocast_enabled(device) else TOLERANCE.get(x.dtype, HALF)
    generator = torch.Generator().manual_seed(0)
    error = 0.0
    for attempt in range(2):  # at a kink the two ways may take different sides, but not at two points
        at, given = x.detach()[:rows], [_few(c, x.shape[0], rows) for c in context]
        if attempt:
            at = at + 0.01 * at.abs().mean() * torch.randn(at.shape, generator=generator).to(at)
        try:
            error = _difference(critic, at, given, record, parameters, restore, generator)
        except (torch.OutOfMemoryError, MemoryError):  # double backward takes more memory than what is to be proven
            return
        if error <= tolerance:
            return
    raise Unsupported(f"its derivatives differ by {error:.1e} from those of double backward, relative to their norm")


def _few(c: Any, batch: int, rows: int) -> Any:
    if not isinstance(c, Tensor):
        return c
    few = c.detach()[:rows] if c.dim() and c.shape[0] == batch else c.detach()
    return few.requires_grad_(c.requires_grad)


def _difference(
    critic: Callable[..., Any],
    at: Tensor,
    context: Sequence[Any],
    record: Callable[..., Any],
    parameters: Sequence[Tensor],
    restore: Callable[[], None],
    generator: torch.Generator,
) -> float:
    restore()
    recorded = record(at, context)
    g = recorded.input_gradient(len(at))
    direction = torch.randn(at.shape, generator=generator).to(at)
    recorded.sweep(None if g is None else direction)
    found = [(t, d) for t, d in recorded.gradients() if d is not None]
    leaves = _leaves([*parameters, *(t for t, _ in found)])
    ours = _gradients([t for t, _ in found], leaves, [d.to(t.dtype) for t, d in found])
    del recorded, found
    restore()
    with torch.enable_grad():
        point = at.clone().requires_grad_()
        try:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                d = critic(point, *context).sum()
            (expected,) = (
                torch.autograd.grad(d, point, create_graph=True, allow_unused=True) if d.requires_grad else (None,)
            )
            total = at.new_zeros(()) if expected is None else (expected * direction).sum()
            theirs = _gradients([total] if total.requires_grad else [], leaves, None)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise Unsupported(f"double backward of it raises {type(error).__name__}: {error}") from error
    by_x = [x if x is not None else torch.zeros_like(at) for x in (g, None if expected is None else expected.detach())]
    scale = float(by_x[1].double().norm()) * float(direction.double().norm())
    floor = 100 * torch.finfo(at.dtype).eps * scale
    return max(_relative([by_x[0]], [by_x[1]], 0.0), _relative(ours, theirs, floor))


def _gradients(outputs: list[Tensor], leaves: list[Tensor], given: list[Tensor] | None) -> list[Tensor]:
    if not outputs or not leaves:
        return [torch.zeros_like(p) for p in leaves]
    found = torch.autograd.grad(outputs, leaves, given, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if d is None else d for p, d in zip(leaves, found)]


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Those that require gradients among ``tensors`` and what they are made of."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    queue: list[Any] = []
    for t in tensors:
        if t.requires_grad and t.grad_fn is None:
            found[id(t)] = t
        elif t.grad_fn is not None:
            queue.append(t.grad_fn)
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        queue += [n for n, _ in node.next_functions if n is not None]
    return list(found.values())


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor], floor: float) -> float:
    """The norm of the difference, relative to the larger norm."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, expected)) ** 0.5
    size = max(sum(float(a.double().square().sum()) for a in side) ** 0.5 for side in (found, expected))
    if difference != difference or size != size or size == float("inf"):
        return (
            0.0 if any(not bool(b.isfinite().all()) for b in expected) else float("inf")
        )  # divergence is told of elsewhere
    return 0.0 if difference <= floor else difference / size
