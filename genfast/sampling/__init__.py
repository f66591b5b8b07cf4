"""Samplers that compute every activation once."""

from .lowering import LoweringError
from .sampler import Sampler

__all__ = ["LoweringError", "Sampler"]
