"""The functional API: one file per operation family."""

from .actnorm import actnorm
from .affine_coupling import affine_coupling
from .categorical_nll import categorical_nll
from .discretized_logistic_mixture import discretized_logistic_mixture_nll, discretized_logistic_mixture_sample
from .gated_activation import gated_activation
from .gradient_penalty import CriticStep, critic_step, gradient_penalty
from .interpolate import interpolate
from .invertible_conv1x1 import PLU, actnorm_conv1x1, invertible_conv1x1
from .masked_conv import masked_conv1d, masked_conv2d, masked_conv3d
from .minibatch_discrimination import minibatch_discrimination, pairwise_l1_kernel_sum
from .pixel_rnn import diagonal_lstm, row_lstm
from .sample_norm import sample_norm
from .spectral_norm import spectral_norm
from .squeeze import squeeze, unsqueeze

__all__ = [
    "actnorm", "actnorm_conv1x1", "affine_coupling", "CriticStep", "categorical_nll", "critic_step", "diagonal_lstm", "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_sample", "gated_activation", "gradient_penalty", "invertible_conv1x1", "masked_conv1d", "masked_conv2d",
    "interpolate", "masked_conv3d", "minibatch_discrimination", "PLU", "pairwise_l1_kernel_sum", "row_lstm",
    "sample_norm", "spectral_norm", "squeeze", "unsqueeze",
]  # fmt: skip
