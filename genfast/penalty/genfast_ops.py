"""The rules of genfast's own ops. Those without one here go to ``Autograd``, like any other function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..ops.bias_act import OP as BIAS_ACT
from ..ops.upfirdn2d import OP as UPFIRDN2D
from .arithmetic import add, scale
from .autograd_rule import otherwise
from .handlers import handles, named_arguments
from .linear_maps import mapped, of_images
from .normalisation import per_channel
from .tape import HANDLERS, Tape

HANDLERS[UPFIRDN2D.overload] = mapped(of_images, prefix=True)


@handles(BIAS_ACT.overload)
def _bias_act(tape: Tape, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The piecewise-linear ones as a term, a sign mask and a factor."""
    x, bias, act, alpha, gain, clamp = named_arguments(args, kwargs, ("x", "bias", "act", "alpha", "gain", "clamp"), ())
    if (
        tape.slot(x) < 0
        or tape.slot(bias) >= 0
        or act not in ("linear", "relu", "lrelu")
        or clamp is not None
        or x.dim() < 2
    ):
        return otherwise(tape, func, args, kwargs)
    term = per_channel(x, bias)
    if term is not None:
        rule, inputs, y = add(x, term, 1, None, 1, tape)
        x = tape.record(rule, inputs, y)
    if act != "linear":
        x = HANDLERS[F.leaky_relu](tape, func, (x, alpha if act == "lrelu" else 0.0), {})
    return x if gain == 1 else scale(tape, x, torch.full((), gain, dtype=x.dtype, device=x.device))
