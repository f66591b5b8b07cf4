"""Thin modules over :mod:`genfast.ops`: one file per operation family."""

from typing import TYPE_CHECKING, Any

from .._renamed import renamed
from .actnorm import ActNorm
from .affine_coupling import AffineCoupling, GlowStep
from .autoregressive import Inverse, MaskedAutoregressive
from .batch_norm_flow import BatchNormFlow
from .bias_act import BiasAct
from .bijection import Bijection, FlowSequential
from .causal import (
    AppendOnes,
    ConcatELU,
    ConditionBias,
    DownRightShiftedConv2d,
    DownRightShiftedConvTranspose2d,
    DownShiftedConv2d,
    DownShiftedConvTranspose2d,
    LevelEmbedding,
    ScaleLevels,
    Shift,
)
from .contextual_similarity import ContextualSimilarityLoss
from .gated_activation import GatedActivation, GatedMaskedConv2d
from .gradient_penalty import CriticStep, GradientPenalty
from .gram_matrix import GramLoss, GramMatrix
from .invertible_conv1x1 import InvertibleConv1x1
from .linear_flows import Householder, LULinear
from .made import MADENetwork
from .masked_conv import MaskedConv1d, MaskedConv2d, MaskedConv3d, weight_norm
from .masked_linear import MaskedLinear
from .minibatch_discrimination import MinibatchDiscrimination
from .minibatch_stddev import MinibatchStddev
from .modulated_conv import ModulatedConv2d
from .nade import DeepNADENetwork, NADENetwork
from .permutation import CircularShift, Permutation
from .pixel_norm import PixelNorm
from .pixel_rnn import DiagonalBiLSTM, RowLSTM
from .reversible import ReversibleSequential
from .spectral_norm import spectral_norm
from .spline_coupling import Spline, SplineCoupling
from .squeeze import Split, Squeeze
from .upfirdn2d import Downsample2d, Upfirdn2d, Upsample2d

__all__ = [
    "ActNorm", "AffineCoupling", "AppendOnes", "BatchNormFlow", "BiasAct", "Bijection", "CircularShift", "ConcatELU",
    "ConditionBias", "ContextualSimilarityLoss", "CriticStep", "DeepNADENetwork", "DiagonalBiLSTM",
    "DownRightShiftedConv2d", "DownRightShiftedConvTranspose2d", "Downsample2d", "DownShiftedConv2d",
    "DownShiftedConvTranspose2d", "FlowSequential", "GatedActivation", "GatedMaskedConv2d", "GlowStep",
    "GradientPenalty", "GramLoss", "GramMatrix", "Householder", "Inverse", "InvertibleConv1x1", "LevelEmbedding",
    "LULinear", "MADENetwork", "MaskedAutoregressive", "MaskedConv1d", "MaskedConv2d", "MaskedConv3d", "MaskedLinear",
    "MinibatchDiscrimination", "MinibatchStddev", "ModulatedConv2d", "NADENetwork", "Permutation", "PixelNorm",
    "ReversibleSequential", "RowLSTM", "ScaleLevels", "Shift", "spectral_norm", "Spline", "SplineCoupling", "Split",
    "Squeeze", "Upfirdn2d", "Upsample2d", "weight_norm",
]  # fmt: skip

_RENAMED = {
    "MADE": "MADENetwork",
    "NADE": "NADENetwork",
    "DeepNADE": "DeepNADENetwork",
    "ContextualLoss": "ContextualSimilarityLoss",
}

if not TYPE_CHECKING:  # so that mypy still reports names that this module does not have

    def __getattr__(name: str) -> Any:
        """Returns a class under its name of the version before."""
        return renamed(__name__, name, _RENAMED)
