"""Thin modules over :mod:`genfast.ops`: one file per operation family."""

from .actnorm import ActNorm
from .affine_coupling import AffineCoupling, GlowStep
from .bijection import Bijection, FlowSequential
from .invertible_conv1x1 import InvertibleConv1x1
from .pixel_rnn import DiagonalBiLSTM, RowLSTM
from .reversible import ReversibleSequential
from .squeeze import Split, Squeeze

__all__ = [
    "ActNorm", "AffineCoupling", "Bijection", "DiagonalBiLSTM", "FlowSequential", "GlowStep", "InvertibleConv1x1",
    "ReversibleSequential", "RowLSTM", "Split", "Squeeze",
]  # fmt: skip
