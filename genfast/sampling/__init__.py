"""Samplers that compute every activation once, and checks of any causal network."""

from ..programs import DegreeProgram, Layer, LoweringError, Program
from .checks import CausalityError, Equivalence, ReceptiveField, assert_causal, receptive_field, sample_equivalence
from .sampler import Sampler

__all__ = [
    "CausalityError",
    "DegreeProgram",
    "Equivalence",
    "Layer",
    "LoweringError",
    "Program",
    "ReceptiveField",
    "Sampler",
    "assert_causal",
    "receptive_field",
    "sample_equivalence",
]
