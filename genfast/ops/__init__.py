"""The functional API: one file per operation family."""

from .actnorm import actnorm
from .affine_coupling import affine_coupling
from .invertible_conv1x1 import PLU, actnorm_conv1x1, invertible_conv1x1
from .pixel_rnn import diagonal_lstm, row_lstm
from .squeeze import squeeze, unsqueeze

__all__ = [
    "PLU", "actnorm", "actnorm_conv1x1", "affine_coupling", "diagonal_lstm", "invertible_conv1x1", "row_lstm", "squeeze",
    "unsqueeze",
]  # fmt: skip
