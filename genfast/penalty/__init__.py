"""Penalties on a critic's input gradient without double backward: the record of a pass, its rules, and the sweeps."""

from . import (  # noqa: F401  each registers its rules
    arithmetic,
    attention,
    autograd_rule,
    genfast_ops,
    linear_maps,
    normalisation,
    pointwise,
    products,
    random_numbers,
    selection,
)
from .api import critic_step, gradient_penalty
from .explain import explain
from .settings import CriticLoss
from .tape import Unsupported

__all__ = ["CriticLoss", "Unsupported", "critic_step", "explain", "gradient_penalty"]
