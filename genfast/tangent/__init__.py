"""Penalties on a critic's input gradient without double backward: the record of a pass, its rules, and the sweeps."""

from . import attention, normalisation, own, pointwise, rules  # noqa: F401  each registers its rules
from .critic import Pass, attach, per_sample_outputs
from .explain import explain
from .state import facts, modules, restored, unwrapped
from .tape import Unsupported

__all__ = ["Pass", "Unsupported", "attach", "explain", "facts", "modules", "per_sample_outputs", "restored", "unwrapped"]
