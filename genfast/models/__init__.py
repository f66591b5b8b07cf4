"""Small whole models, one file each. Their layers are those of :mod:`genfast.nn`, or with :func:`plain` its plain
twins."""

import functools
from typing import Any, TypeVar

from ..nn import plain as plain_layers
from .adversarial_autoencoder import AdversarialAutoencoder
from .autoencoder import Autoencoder
from .base_adversarial import AdversarialModel, Recipe
from .base_autoencoder import AutoencoderModel
from .base_autoregressive import AutoregressiveModel
from .base_flow import DensityModel, DiagonalGaussian, FlowModel, dequantize
from .cgan import ConditionalGAN
from .dcgan import DCGAN
from .deep_nade import DeepNADE
from .denoising_autoencoder import DenoisingAutoencoder
from .flow import Flow, FlowDistribution
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
from .wavenet import WaveNet, mu_law_decode, mu_law_encode
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


Model = TypeVar("Model", DensityModel, AutoregressiveModel)


@functools.cache
def plain(model: type[Model]) -> type[Model]:
    """``model`` with the layers of :mod:`genfast.nn.plain` in place of genfast.nn's, for tests and as a yardstick of
    speed.

    Parameters, initial values, ``config`` and state_dict are the same. Autoregressive models sample by the standard
    loop.

    Args:
        model: a flow, an autoregressive model or a density model of vectors.

    Raises:
        TypeError: a model whose layers are not an argument.

    Example:
        >>> import torch, genfast
        >>> genfast.models.plain(genfast.models.MAF)(3, hidden=8).log_prob(torch.randn(5, 3)).shape
        torch.Size([5])
    """
    if not isinstance(getattr(model, "layers", None), type(plain_layers)):
        raise TypeError(f"models.plain: model={model!r}, expected a flow, an autoregressive model or one of vectors")
    return type(
        model.__name__, (model,), {"layers": plain_layers, "__module__": model.__module__, "__doc__": model.__doc__}
    )


__all__ = [
    "AdversarialAutoencoder", "AdversarialModel", "Autoencoder", "AutoencoderModel", "AutoregressiveModel", "build",
    "ConditionalGAN", "DCGAN", "DeepNADE", "DenoisingAutoencoder", "DensityModel", "dequantize", "DiagonalGaussian",
    "Flow", "FlowDistribution", "FlowModel", "GAN", "GatedPixelCNN", "Glow", "IAF", "LinearFlow", "LSGAN", "MADE",
    "MAF", "mu_law_decode", "mu_law_encode", "NADE", "NAMES", "NICE", "NSF", "PixelCNN", "PixelCNNPlusPlus", "PixelRNN",
    "plain", "R3GAN", "RealNVP", "Recipe", "RNADE", "SAGAN", "SparseAutoencoder", "style_transfer", "StyleTransfer",
    "VAE", "VAEGAN", "WAE", "WaveNet", "WGAN", "WGANGP",
]  # fmt: skip
