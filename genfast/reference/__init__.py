"""The specification: every op in plain PyTorch, as its paper writes it. Imports torch and nothing of ours."""

from .actnorm import actnorm, actnorm_backward, positions
from .adversarial import CRITIC_LOSSES
from .affine_coupling import affine_coupling, affine_coupling_backward
from .discretized_logistic_mixture import (
    discretized_logistic_mixture_nll,
    discretized_logistic_mixture_nll_backward,
    discretized_logistic_mixture_sample,
    pixelcnnpp_nll,
)
from .gated_activation import gated_activation, gated_activation_backward
from .gradient_penalty import gradient_penalty, penalty_of_norms
from .interpolate import interpolate, interpolate_backward
from .invertible_conv1x1 import (
    channel_mix,
    channel_mix_backward,
    plu_inverse,
    plu_matrix,
    plu_weight,
    plu_weight_backward,
)
from .masked_conv import colour_group, conv_mask, masked_conv, masked_conv_backward
from .minibatch_discrimination import (
    minibatch_discrimination,
    pairwise_l1_kernel_sum,
    pairwise_l1_kernel_sum_backward,
    pairwise_l1_kernel_sum_second_backward,
)
from .pixel_rnn import diagonal_lstm, diagonal_lstm_backward, row_lstm, row_lstm_backward
from .sample_norm import sample_norm, sample_norm_backward
from .spectral_norm import spectral_norm, spectral_norm_backward
from .squeeze import squeeze

__all__ = [
    "CRITIC_LOSSES", "actnorm", "actnorm_backward", "affine_coupling", "affine_coupling_backward", "channel_mix", "channel_mix_backward",
    "colour_group", "conv_mask", "diagonal_lstm", "diagonal_lstm_backward", "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_nll_backward", "discretized_logistic_mixture_sample", "gated_activation",
    "gated_activation_backward", "gradient_penalty", "masked_conv", "penalty_of_norms", "masked_conv_backward", "pixelcnnpp_nll", "plu_inverse", "plu_matrix",
    "plu_weight", "plu_weight_backward", "positions", "row_lstm", "row_lstm_backward", "squeeze",
    "interpolate", "interpolate_backward", "minibatch_discrimination", "pairwise_l1_kernel_sum",
    "pairwise_l1_kernel_sum_backward", "pairwise_l1_kernel_sum_second_backward", "sample_norm", "sample_norm_backward", "spectral_norm", "spectral_norm_backward",
]  # fmt: skip
