"""Small whole models built from :mod:`genfast.nn`: one file each. Their plain PyTorch twins are in genfast.reference.models."""

from typing import Any

from ..reference.models import FlowModel, dequantize
from .glow import Glow
from .linear_flow import LinearFlow
from .nice import NICE
from .pixel_rnn import PixelRNN
from .realnvp import RealNVP

NAMES: dict[str, type[FlowModel]] = {"glow": Glow, "linear_flow": LinearFlow, "nice": NICE, "realnvp": RealNVP}


def build(name: str, **config: Any) -> FlowModel:
    """The model ``name`` (a key of ``NAMES``) from its ``config``, as a checkpoint keeps it.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"models.build: name={name!r}, expected one of {', '.join(map(repr, NAMES))}")
    return NAMES[name](**config)


__all__ = ["NAMES", "FlowModel", "Glow", "LinearFlow", "NICE", "PixelRNN", "RealNVP", "build", "dequantize"]
