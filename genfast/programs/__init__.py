"""Flat programs: what a network becomes when it runs as one call of an engine."""

from . import degree_program_samples, flow_program_samples  # noqa: F401  give the ops their samples
from .degree_program import DegreeProgram, Layer, layers_of
from .errors import LoweringError
from .flow_program import FlowBuilder, FlowProgram
from .pixel_program import Program

__all__ = ["DegreeProgram", "FlowBuilder", "FlowProgram", "Layer", "LoweringError", "Program", "layers_of"]
