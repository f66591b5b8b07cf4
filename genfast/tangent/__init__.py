"""Penalties on a critic's input gradient without double backward: the record of a pass, its rules, and the sweeps."""

from . import attention, normalisation, own, pointwise, rules  # noqa: F401  each registers its rules
from .critic import Pass, attach, facts, once, per_sample_outputs, restored, unwrapped
from .explain import explain
from .tape import Unsupported

__all__ = ["Pass", "Unsupported", "attach", "explain", "facts", "once", "per_sample_outputs", "restored", "unwrapped"]
