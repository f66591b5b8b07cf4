"""The specification: every op in plain PyTorch, as its paper writes it. Imports torch and nothing of ours."""

from .actnorm import actnorm, actnorm_backward, positions
from .affine_coupling import affine_coupling, affine_coupling_backward
from .invertible_conv1x1 import (
    channel_mix,
    channel_mix_backward,
    plu_inverse,
    plu_matrix,
    plu_weight,
    plu_weight_backward,
)
from .pixel_rnn import diagonal_lstm, diagonal_lstm_backward, row_lstm, row_lstm_backward
from .squeeze import squeeze

__all__ = [
    "actnorm", "actnorm_backward", "affine_coupling", "affine_coupling_backward", "channel_mix", "channel_mix_backward",
    "diagonal_lstm", "diagonal_lstm_backward",
    "plu_inverse", "plu_matrix", "plu_weight", "plu_weight_backward", "positions", "row_lstm",
    "row_lstm_backward", "squeeze",
]  # fmt: skip
