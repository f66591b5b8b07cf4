"""The functional API: one file per operation family."""

from typing import TYPE_CHECKING, Any

from .._renamed import renamed
from . import flow_program as _flow_program  # noqa: F401  the op of genfast.programs.FlowProgram
from .actnorm import actnorm
from .affine_coupling import affine_coupling
from .autoregressive_inverse import autoregressive_inverse
from .bias_act import bias_act
from .categorical_nll import categorical_nll
from .contextual_similarity import contextual_similarity
from .diagonal_gaussian import GaussianSample, diagonal_gaussian, diagonal_gaussian_kl
from .discretized_logistic_mixture import discretized_logistic_mixture_nll, discretized_logistic_mixture_sample
from .gated_activation import gated_activation
from .gram_matrix import gram_matrix, style_loss
from .interpolate import interpolate
from .invertible_conv1x1 import PLU, actnorm_conv1x1, invertible_conv1x1
from .masked_conv import masked_conv1d, masked_conv2d, masked_conv3d
from .masked_linear import masked_linear
from .minibatch_discrimination import minibatch_discrimination, pairwise_l1_kernel_sum
from .minibatch_stddev import minibatch_stddev
from .modulated_conv import modulated_conv2d
from .nade import nade, nade_sample
from .pairwise import kernel_distance, mmd, nearest_neighbors, pairwise_kernel_sum
from .pixel_norm import pixel_norm
from .pixel_rnn import diagonal_lstm, row_lstm
from .sample_norm import sample_norm
from .spectral_norm import spectral_norm
from .spline import linear_spline, quadratic_spline, rational_quadratic_spline, rational_quadratic_spline_packed
from .squeeze import squeeze, unsqueeze
from .upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "actnorm", "actnorm_conv1x1", "affine_coupling", "autoregressive_inverse", "bias_act", "categorical_nll",
    "contextual_similarity", "critic_step", "CriticLoss", "diagonal_gaussian", "diagonal_gaussian_kl", "diagonal_lstm",
    "discretized_logistic_mixture_nll", "discretized_logistic_mixture_sample", "downsample2d", "filter2d",
    "gated_activation", "GaussianSample", "gradient_penalty", "gram_matrix", "interpolate", "invertible_conv1x1",
    "kernel_distance", "linear_spline", "masked_conv1d", "masked_conv2d", "masked_conv3d", "masked_linear",
    "minibatch_discrimination", "minibatch_stddev", "mmd", "modulated_conv2d", "nade", "nade_sample",
    "nearest_neighbors", "pairwise_kernel_sum", "pairwise_l1_kernel_sum", "pixel_norm", "PLU", "quadratic_spline",
    "rational_quadratic_spline", "rational_quadratic_spline_packed", "row_lstm", "sample_norm", "setup_filter",
    "spectral_norm", "squeeze", "style_loss", "unsqueeze", "upfirdn2d", "upsample2d",
]  # fmt: skip

if TYPE_CHECKING:
    from ..penalty import CriticLoss, critic_step, gradient_penalty
else:  # so that mypy still reports names that this module does not have

    def __getattr__(name: str) -> Any:
        """Returns a public function of :mod:`genfast.penalty`, which is built on this package and cannot be imported
        before it, or a class under its name of the version before."""
        if name not in ("CriticLoss", "critic_step", "gradient_penalty"):
            return renamed(__name__, name, {"DiagonalGaussian": "GaussianSample"})
        from .. import penalty

        value = globals()[name] = getattr(penalty, name)
        return value
