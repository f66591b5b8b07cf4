"""The rule of softmax attention, in memory linear in the number of keys.

o = softmax(s q k^T + mask) v. A panel of queries at a time forms its weights P, and from them whatever a sweep needs;
only q, k, v and o's gradients are kept, and P where all of it is one panel. PyTorch's fused attention has no double
backward at all (pytorch#116350).

    chain     dP = b v^T, dS = P (dP - sum P dP);  dq = s dS k, dk = s dS^T q, dv = P^T b
    tangent   S' = s (q' k^T + q k'^T), P' = P (S' - sum P S');  o' = P' v + P v'
    second    the derivative of <b, o'> + <c, o> by q, k, v, from the same panels
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch_private import set_grad_enabled
from .autograd_rule import otherwise
from .handlers import handles, named_arguments
from .sweeps import Sweeps
from .tape import Maybe, Rule, Tape

PANEL = 1 << 22  # elements of one panel of weights, over all batches and heads


class Attention(Rule):
    kind = "exact, smooth (attention by panels)"
    curved = True

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Maybe, causal: bool, scale: float, active: list[bool]
    ) -> None:
        self.q, self.k, self.v, self.mask, self.causal, self.scale, self.active = q, k, v, mask, causal, scale, active
        per_query = max(1, q.shape[:-2].numel() * k.shape[-2])
        self.panel = max(1, min(q.shape[-2], PANEL // per_query))
        self.saved: tuple[Maybe, list[Maybe]] = (None, [None] * 3)
        self.per_sample = q.dim() >= 3
        self.weights: Maybe = None

    def follow(self, axis: int, x: Tensor, y: Tensor) -> int:
        return axis if axis < x.dim() - 2 else -1

    def _panels(self) -> range:
        return range(0, self.q.shape[-2], self.panel)

    def _weights(self, rows: slice) -> Tensor:
        if self.weights is not None:
            return self.weights
        p = self._softmax(rows)
        if self.panel >= self.q.shape[-2]:
            self.weights = p
        return p

    def _softmax(self, rows: slice) -> Tensor:
        logits = (self.q[..., rows, :] * self.scale) @ self.k.mT
        length, keys = logits.shape[-2:]
        if self.causal:
            at = torch.arange(rows.start, rows.start + length, device=logits.device).unsqueeze(1)
            logits = logits.masked_fill(at < torch.arange(keys, device=logits.device), -math.inf)
        if self.mask is not None:
            m = self.mask if self.mask.shape[-2] == 1 else self.mask[..., rows, :]
            logits = logits.masked_fill(~m, -math.inf) if m.dtype == torch.bool else logits + m
        return torch.softmax(logits, -1)

    def forward(self) -> Tensor:
        return torch.cat([self._weights(slice(i, i + self.panel)) @ self.v for i in self._panels()], -2)

    def _chosen(self, found: list[Tensor]) -> list[Maybe]:
        return [x for x, on in zip(found, self.active) if on]

    def pull(self, sweeps: Sweeps, g: list[Maybe]) -> list[Maybe]:
        (b,) = g
        assert b is not None
        dq, dk, dv = torch.empty_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for i in self._panels():
            rows = slice(i, i + self.panel)
            p, bi = self._weights(rows), b[..., rows, :]
            ds = _through_softmax(p, bi @ self.v.mT).mul_(self.scale)
            dq[..., rows, :] = ds @ self.k
            dk += ds.mT @ self.q[..., rows, :]
            dv += p.mT @ bi
        return self._chosen([dq, dk, dv])

    def tangent(self, sweeps: Sweeps, b: list[Maybe], t: list[Maybe], wanted: bool) -> list[Maybe]:
        given = iter(t)
        directions = [next(given) if on else None for on in self.active]
        if all(x is None for x in directions):
            return [None]
        tq, tk, tv = (torch.zeros_like(x) if d is None else d for x, d in zip((self.q, self.k, self.v), directions))
        self.saved = (b[0], [tq, tk, tv])
        if not wanted:
            return [None]
        parts = []
        for i in self._panels():
            rows = slice(i, i + self.panel)
            p = self._weights(rows)
            ds = _pair(tq[..., rows, :], self.k, self.q[..., rows, :], tk).mul_(self.scale)
            parts.append(_through_softmax(p, ds) @ self.v + p @ tv)
        return [torch.cat(parts, -2)]

    def second(self, sweeps: Sweeps, c: list[Maybe], wanted: bool) -> list[Maybe]:
        b, (tq, tk, tv) = self.saved
        if b is None or tq is None or tk is None or tv is None:
            return self.pull(sweeps, c) if c[0] is not None else [None] * len(self.ins)
        dq, dk, dv = torch.empty_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        s = self.scale
        for i in self._panels():
            rows = slice(i, i + self.panel)
            q, tqi, bi = self.q[..., rows, :], tq[..., rows, :], b[..., rows, :]
            p = self._weights(rows)
            ds = _pair(tqi, self.k, q, tk).mul_(s)  # S'
            e = (p * ds).sum(-1, keepdim=True)
            bv = bi @ self.v.mT
            # <b, o'> = <P', b v^T> + <P, b tv^T>: its gradients by S' (a), by P at fixed S' (w), and so by S
            inner = (p * bv).sum(-1, keepdim=True)
            w = bi @ tv.mT if c[0] is None else _pair(bi, tv, c[0][..., rows, :], self.v)
            w.addcmul_(ds, inner, value=-1)
            ds -= e
            w.addcmul_(bv, ds)
            a = bv.sub_(inner).mul_(p)
            dp = ds.mul_(p)  # P'
            if c[0] is not None:
                dv += p.mT @ c[0][..., rows, :]
            gs = _through_softmax(p, w)
            dq[..., rows, :] = (gs @ self.k + a @ tk) * s
            dk += (gs.mT @ q + a.mT @ tqi) * s
            dv += dp.mT @ bi
        return self._chosen([dq, dk, dv])


def _through_softmax(p: Tensor, g: Tensor) -> Tensor:
    """P (g - sum P g), in the place of g."""
    return g.sub_((p * g).sum(-1, keepdim=True)).mul_(p)


def _pair(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """a b^T + c d^T."""
    return torch.cat([a, c], -1) @ torch.cat([b, d], -1).mT


@handles(F.scaled_dot_product_attention)
def _attention(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {k: v for k, v in kwargs.items() if k not in ("scale", "enable_gqa")}
    q, k, v, mask, dropout, causal = named_arguments(args, given, names, (None, 0.0, False))
    leading = q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    constants = [x for x in (q, k, v, mask) if isinstance(x, Tensor) and tape.slot(x) < 0]
    if (
        dropout
        or kwargs.get("enable_gqa")
        or not leading
        or q.dim() < 3
        or any(x.requires_grad for x in constants)
        or not q.numel()
    ):
        return otherwise(tape, func, args, kwargs)
    if tape.slot(mask) >= 0:
        return otherwise(tape, func, args, kwargs)
    if mask is not None and mask.dim() < 2:
        mask = mask.view(1, -1)
    scale = kwargs.get("scale")
    active = [tape.slot(x) >= 0 for x in (q, k, v)]
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rule = Attention(q.detach(), k.detach(), v.detach(), mask, causal, scale, active)
    return tape.record(rule, [x for x, on in zip((q, k, v), active) if on], rule.forward())


@handles(F.multi_head_attention_forward)
def _multi_head(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """nn.MultiheadAttention taken apart into products and attention; its rarer options go to PyTorch."""
    q, k, v, width, heads, in_weight, in_bias, bias_k, bias_v, add_zero, p, out_weight, out_bias = args[:13]
    training = kwargs.get("training", True)
    plain = (
        len(args) == 13
        and bias_k is None
        and bias_v is None
        and not add_zero
        and not (p and training)
        and kwargs.get("key_padding_mask") is None
        and not kwargs.get("need_weights", True)
        and not kwargs.get("use_separate_proj_weight", False)
        and kwargs.get("static_k") is None
        and kwargs.get("static_v") is None
        and q.dim() == 3
        and in_weight is not None
    )
    if not plain:
        return otherwise(tape, func, args, kwargs)
    set_grad_enabled(True)
    with tape:
        weights = in_weight.chunk(3)
        biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)
        parts = []
        for x, w, bias in zip((q, k, v), weights, biases):
            y = F.linear(x, w, bias)  # (length, batch, width)
            parts.append(y.reshape(y.shape[0], y.shape[1], heads, width // heads).permute(1, 2, 0, 3))
        mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
        if mask is not None and mask.dim() == 3:
            mask = mask.view(-1, heads, *mask.shape[1:])
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # here True forbids
        o = F.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], attn_mask=mask, is_causal=causal and mask is None
        )
        o = o.permute(2, 0, 1, 3).reshape(q.shape[0], q.shape[1], width)
        y = F.linear(o, out_weight, out_bias)
    set_grad_enabled(False)
    return y, None
