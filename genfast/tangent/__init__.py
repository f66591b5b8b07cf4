"""Penalties on a critic's input gradient without double backward: the record of a pass, its rules, and the sweeps."""

from . import attention, normalisation, own, pointwise, rules  # noqa: F401  each registers its rules
from .critic import Pass, attach, once, per_sample_outputs
from .explain import explain
from .state import State, facts, modules, restored, unwrapped
from .tape import Unsupported

__all__ = [
    "Pass", "State", "Unsupported", "attach", "explain", "facts", "modules", "once", "per_sample_outputs", "restored",
    "unwrapped",
]  # fmt: skip
