"""Small whole models built from :mod:`genfast.nn`: one file each. Their plain PyTorch twins are in genfast.reference."""

from typing import Any

from ..reference.autoregressive import mu_law_decode, mu_law_encode
from ..reference.flow import FlowDistribution
from ..reference.models import DensityModel, DiagonalGaussian, FlowModel, dequantize
from .adversarial import AdversarialModel, Recipe
from .adversarial_autoencoder import AdversarialAutoencoder
from .autoencoder import Autoencoder
from .autoencoding import AutoencoderModel
from .autoregressive import AutoregressiveModel
from .cgan import ConditionalGAN
from .dcgan import DCGAN
from .deep_nade import DeepNADE
from .denoising_autoencoder import DenoisingAutoencoder
from .flow import Flow
from .gan import GAN
from .gated_pixelcnn import GatedPixelCNN
from .glow import Glow
from .iaf import IAF
from .linear_flow import LinearFlow
from .lsgan import LSGAN
from .made import MADE
from .maf import MAF
from .nade import NADE
from .neural_style import StyleTransfer, style_transfer
from .nice import NICE
from .nsf import NSF
from .pixel_rnn import PixelRNN
from .pixelcnn import PixelCNN
from .pixelcnnpp import PixelCNNPlusPlus
from .r3gan import R3GAN
from .realnvp import RealNVP
from .rnade import RNADE
from .sagan import SAGAN
from .sparse_autoencoder import SparseAutoencoder
from .vae import VAE
from .vaegan import VAEGAN
from .wae import WAE
from .wavenet import WaveNet
from .wgan import WGAN
from .wgan_gp import WGANGP

NAMES: dict[str, type[DensityModel] | type[AutoregressiveModel] | type[AdversarialModel] | type[AutoencoderModel]] = {
    "cgan": ConditionalGAN, "dcgan": DCGAN, "gan": GAN, "lsgan": LSGAN, "r3gan": R3GAN, "sagan": SAGAN, "wgan": WGAN,
    "wgan-gp": WGANGP, "gated_pixelcnn": GatedPixelCNN, "glow": Glow, "iaf": IAF, "linear_flow": LinearFlow, "maf": MAF,
    "nice": NICE, "nsf": NSF, "deep_nade": DeepNADE, "made": MADE, "nade": NADE, "rnade": RNADE,
    "pixelcnn": PixelCNN, "pixelcnnpp": PixelCNNPlusPlus, "pixelrnn": PixelRNN, "realnvp": RealNVP, "wavenet": WaveNet,
    "aae": AdversarialAutoencoder, "autoencoder": Autoencoder, "denoising_autoencoder": DenoisingAutoencoder,
    "sparse_autoencoder": SparseAutoencoder, "vae": VAE, "vaegan": VAEGAN, "wae": WAE,
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
    "AdversarialAutoencoder", "AdversarialModel", "Autoencoder", "AutoencoderModel", "AutoregressiveModel", "build",
    "ConditionalGAN", "DCGAN", "DeepNADE", "DenoisingAutoencoder", "DensityModel", "dequantize", "DiagonalGaussian", "Flow",
    "FlowDistribution", "FlowModel", "GAN", "GatedPixelCNN", "Glow", "IAF", "LinearFlow", "LSGAN", "MADE", "MAF",
    "mu_law_decode", "mu_law_encode", "NADE", "NAMES", "NICE", "NSF", "PixelCNN", "PixelCNNPlusPlus", "PixelRNN", "R3GAN",
    "RealNVP", "Recipe", "RNADE", "SAGAN", "SparseAutoencoder", "style_transfer", "StyleTransfer", "VAE", "VAEGAN", "WAE",
    "WaveNet", "WGAN", "WGANGP",
]  # fmt: skip
