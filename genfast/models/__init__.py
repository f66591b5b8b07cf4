"""Small whole models built from :mod:`genfast.nn`: one file each. Their plain PyTorch twins are in genfast.reference."""

from typing import Any

from ..reference.autoregressive import mu_law_decode, mu_law_encode
from ..reference.models import FlowModel, dequantize
from .autoregressive import AutoregressiveModel
from .gated_pixelcnn import GatedPixelCNN
from .glow import Glow
from .linear_flow import LinearFlow
from .nice import NICE
from .pixel_rnn import PixelRNN
from .pixelcnn import PixelCNN
from .pixelcnnpp import PixelCNNPlusPlus
from .realnvp import RealNVP
from .wavenet import WaveNet

NAMES: dict[str, type[FlowModel] | type[AutoregressiveModel]] = {
    "gated_pixelcnn": GatedPixelCNN, "glow": Glow, "linear_flow": LinearFlow, "nice": NICE, "pixelcnn": PixelCNN,
    "pixelcnnpp": PixelCNNPlusPlus, "pixelrnn": PixelRNN, "realnvp": RealNVP, "wavenet": WaveNet,
}  # fmt: skip


def build(name: str, **config: Any) -> Any:
    """The model ``name`` (a key of ``NAMES``) from its ``config``, as a checkpoint keeps it.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"models.build: name={name!r}, expected one of {', '.join(map(repr, NAMES))}")
    return NAMES[name](**config)


__all__ = [
    "AutoregressiveModel", "build", "dequantize", "FlowModel", "GatedPixelCNN", "Glow", "LinearFlow", "mu_law_decode",
    "mu_law_encode", "NAMES", "NICE", "PixelCNN", "PixelCNNPlusPlus", "PixelRNN", "RealNVP", "WaveNet",
]  # fmt: skip
