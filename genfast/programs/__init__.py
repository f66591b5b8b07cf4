"""Flat programs: what a network becomes when it runs as one call of an engine."""

from . import degree_program_samples  # noqa: F401  gives the op its samples
from .degree_program import DegreeProgram, Layer, layers_of
from .errors import LoweringError
from .pixel_program import Program

__all__ = ["DegreeProgram", "Layer", "LoweringError", "Program", "layers_of"]
