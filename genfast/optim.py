"""optim.Adam: torch's, whose step over the many small weights of a flow is one call."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ._native import kernels

_CPU = kernels(
    "_cpu",
    adam="""
        is_double addresses sizes count lr beta1 beta2 eps weight_decay correction1 root_correction2 decoupled maximize
        threads
    """,
)
_DTYPES = (torch.float32, torch.float64)
_PLAIN = (Tensor, torch.nn.Parameter)


class Adam(torch.optim.Adam):
    """torch.optim.Adam with one call a step for each group of weights on the CPU.

    The arguments, the state_dict, the hooks and, to rounding, the numbers are those of torch.optim.Adam. torch's own
    step takes longer than the whole pass of a small flow, since it looks at each weight several times (its ``fused``
    form too). What the kernel does not cover (amsgrad, ``capturable``, ``differentiable``, an lr that is a tensor,
    sparse or strided gradients, weights on a GPU, groups whose weights have made different numbers of steps) goes to
    torch's step.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay, ...: as of torch.optim.Adam.

    Source: Kingma and Ba (arXiv:1412.6980, algorithm 1); AdamW: Loshchilov and Hutter (arXiv:1711.05101, algorithm 2).

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.MAF(3, hidden=8)
        >>> optimizer = genfast.optim.Adam(model.parameters(), lr=1e-3)
        >>> (-model.log_prob(torch.randn(5, 3)).mean()).backward()
        >>> optimizer.step()
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; ``closure``, if any, computes the loss anew, and its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = None if torch.compiler.is_compiling() or _CPU is None else [self._ready(g) for g in self.param_groups]
        if ready is None or None in ready:
            self._separate_steps()
            plain: Any = torch.optim.Adam.step
            plain = (
                plain.__wrapped__ if getattr(plain, "hooked", False) else plain
            )  # the hooks have run around this one
            plain(self)
            return loss
        with torch.no_grad():
            for group, tensors in zip(self.param_groups, ready):
                if tensors:
                    self._run(group, tensors)
        return loss

    def _ready(self, group: dict[str, Any]) -> list[tuple[Tensor, Tensor]] | None:
        """The weights of a group that have gradients, with these; None where torch's own step must serve."""
        numbers = (group["lr"], group["eps"], group["weight_decay"], *group["betas"])
        if group["amsgrad"] or group["capturable"] or group["differentiable"] or group["fused"] or group["foreach"]:
            return None
        if any(isinstance(n, Tensor) for n in numbers):
            return None
        tensors: list[tuple[Tensor, Tensor]] = []
        waiting = []
        dtype = None
        step = None
        for p in group["params"]:
            g = p.grad
            if g is None:
                waiting.append(p)
                continue
            dtype = dtype or p.dtype
            if (
                type(p) not in _PLAIN
                or type(g) is not Tensor
                or not p.is_cpu
                or p.dtype is not dtype
                or g.dtype is not dtype
                or g.layout is not torch.strided
                or not p.is_contiguous()
                or not g.is_contiguous()
                or g.is_neg()
            ):
                return None
            state = self.state[p]
            if not state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] = torch.zeros(()) if step is None or float(step) else step
            if step is None:
                step = state["step"]
            elif state["step"] is not step:
                if not torch.equal(state["step"], step):
                    return None
                state["step"] = step  # one number for the whole group
            tensors.append((p, g))
        for p in waiting:
            if step is not None and p in self.state and self.state[p].get("step") is step:
                self.state[p]["step"] = step.clone()  # this weight makes no step now
        return tensors if dtype in (None, *_DTYPES) else None

    def _run(self, group: dict[str, Any], tensors: list[tuple[Tensor, Tensor]]) -> None:
        states = [self.state[p] for p, _ in tensors]
        step = states[0]["step"]
        step += 1
        count = float(step)
        beta1, beta2 = group["betas"]
        addresses, sizes = array("Q"), array("q")
        for (p, g), state in zip(tensors, states):
            m, v = state["exp_avg"], state["exp_avg_sq"]
            addresses.extend((p.data_ptr(), g.data_ptr(), m.data_ptr(), v.data_ptr()))
            sizes.append(p.numel())
        _CPU.adam(
            is_double=tensors[0][0].dtype is torch.float64,
            addresses=addresses.buffer_info()[0],
            sizes=sizes.buffer_info()[0],
            count=len(sizes),
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            correction1=1 - beta1**count,
            root_correction2=(1 - beta2**count) ** 0.5,
            decoupled=bool(group.get("decoupled_weight_decay", False)),
            maximize=bool(group["maximize"]),
            threads=torch.get_num_threads(),
        )
        for p, _ in tensors:
            torch.autograd.graph.increment_version(p)

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim.Adam's."""
        self._separate_steps()
        return super().state_dict()

    def _separate_steps(self) -> None:
        """Gives each weight a count of its own again, as torch's step adds to each."""
        seen: set[int] = set()
        for state in self.state.values():
            step = state.get("step")
            if isinstance(step, Tensor):
                if id(step) in seen:
                    state["step"] = step.clone()
                seen.add(id(step))
