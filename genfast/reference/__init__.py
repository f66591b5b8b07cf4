"""The specification: every op in plain PyTorch, as its paper writes it. Imports torch and nothing of ours."""

from .activation import SLOPES, activation_chain, activation_second, apply_bits, leaky_relu_bits
from .actnorm import actnorm, actnorm_backward, positions
from .adversarial import CRITIC_LOSSES, GENERATOR_LOSSES
from .affine_coupling import affine_coupling, affine_coupling_backward
from .autoregressive_inverse import HEADER as PROGRAM_HEADER
from .autoregressive_inverse import autoregressive_inverse, autoregressive_inverse_backward, program_activation
from .bias_act import bias_act, bias_act_backward, bias_act_second
from .contextual_similarity import contextual_distance, contextual_similarity, contextual_similarity_backward
from .diagonal_gaussian import diagonal_gaussian, diagonal_gaussian_backward
from .discretized_logistic_mixture import (
    discretized_logistic_mixture_nll,
    discretized_logistic_mixture_nll_backward,
    discretized_logistic_mixture_sample,
    pixelcnnpp_nll,
)
from .gated_activation import gated_activation, gated_activation_backward
from .gradient_penalty import gradient_penalty, penalty_of_norms, penalty_points
from .gram_matrix import gram_matrix, gram_matrix_backward, style_loss, style_loss_backward, style_loss_layers
from .householder import householder
from .interpolate import interpolate, interpolate_backward
from .invertible_conv1x1 import (
    channel_mix,
    channel_mix_backward,
    plu_inverse,
    plu_matrix,
    plu_weight,
    plu_weight_backward,
)
from .linear import linear, linear_input, linear_weight
from .masked_conv import colour_group, conv_mask, masked_conv, masked_conv_backward
from .masked_linear import masked_linear, masked_linear_backward, staircase, staircase_mask
from .minibatch_discrimination import (
    minibatch_discrimination,
    pairwise_l1_kernel_sum,
    pairwise_l1_kernel_sum_backward,
    pairwise_l1_kernel_sum_second_backward,
)
from .minibatch_stddev import minibatch_stddev, minibatch_stddev_backward
from .modulated_conv import channel_scale, channel_scale_backward, modulated_conv2d, tap_energy
from .nade import mixture_of_gaussians_log_prob, nade, nade_backward, nade_draw, nade_sample
from .pairwise import mmd, nearest_rows, pairwise_kernel_sum, pairwise_kernel_sum_backward
from .pixel_norm import pixel_norm, pixel_norm_backward
from .pixel_rnn import diagonal_lstm, diagonal_lstm_backward, row_lstm, row_lstm_backward
from .sample_norm import sample_norm, sample_norm_backward
from .spectral_norm import spectral_norm, spectral_norm_backward
from .spline import (
    SPLINE_DEFAULTS,
    linear_spline,
    quadratic_spline,
    rational_quadratic_spline,
    rational_quadratic_spline_backward,
    rational_quadratic_spline_packed,
    rational_quadratic_spline_packed_backward,
)
from .squeeze import squeeze
from .upfirdn2d import upfirdn2d

__all__ = [
    "activation_chain", "activation_second", "actnorm", "actnorm_backward", "affine_coupling",
    "affine_coupling_backward", "apply_bits", "autoregressive_inverse", "autoregressive_inverse_backward", "bias_act",
    "bias_act_backward", "bias_act_second", "channel_mix", "channel_mix_backward", "channel_scale",
    "channel_scale_backward", "colour_group", "contextual_distance", "contextual_similarity",
    "contextual_similarity_backward", "conv_mask", "CRITIC_LOSSES", "diagonal_gaussian", "diagonal_gaussian_backward",
    "diagonal_lstm", "diagonal_lstm_backward", "discretized_logistic_mixture_nll",
    "discretized_logistic_mixture_nll_backward", "discretized_logistic_mixture_sample", "gated_activation",
    "gated_activation_backward", "GENERATOR_LOSSES", "gradient_penalty", "gram_matrix", "gram_matrix_backward",
    "householder", "interpolate", "interpolate_backward", "leaky_relu_bits", "linear", "linear_input", "linear_spline",
    "linear_weight", "masked_conv", "masked_conv_backward", "masked_linear", "masked_linear_backward",
    "minibatch_discrimination", "minibatch_stddev", "minibatch_stddev_backward", "mixture_of_gaussians_log_prob", "mmd",
    "modulated_conv2d", "nade", "nade_backward", "nade_draw", "nade_sample", "nearest_rows", "pairwise_kernel_sum",
    "pairwise_kernel_sum_backward", "pairwise_l1_kernel_sum", "pairwise_l1_kernel_sum_backward",
    "pairwise_l1_kernel_sum_second_backward", "penalty_of_norms", "penalty_points", "pixel_norm", "pixel_norm_backward",
    "pixelcnnpp_nll", "plu_inverse", "plu_matrix", "plu_weight", "plu_weight_backward", "positions",
    "program_activation", "PROGRAM_HEADER", "quadratic_spline", "rational_quadratic_spline",
    "rational_quadratic_spline_backward", "rational_quadratic_spline_packed",
    "rational_quadratic_spline_packed_backward", "row_lstm", "row_lstm_backward", "sample_norm", "sample_norm_backward",
    "SLOPES", "spectral_norm", "spectral_norm_backward", "SPLINE_DEFAULTS", "squeeze", "staircase", "staircase_mask",
    "style_loss", "style_loss_backward", "style_loss_layers", "tap_energy", "upfirdn2d",
]  # fmt: skip
