"""Training: trainers, runs that resume bit by bit, data, checkpoints, many devices, metrics and pictures."""

from .adversarial import AdversarialTrainer
from .adversarial import train as train_adversarial
from .checkpoints import latest
from .checkpoints import load as load_checkpoint
from .pictures import image_grid, save_picture
from .trainer import Trainer, TrainingError, train
from .variational import AutoencoderTrainer
from .variational import train as train_autoencoder

__all__ = [
    "AdversarialTrainer", "AutoencoderTrainer", "image_grid", "latest", "load_checkpoint", "save_picture", "train",
    "train_adversarial", "train_autoencoder", "Trainer", "TrainingError",
]  # fmt: skip
