"""Training: one trainer, runs that resume bit by bit, data, checkpoints, many devices, metrics and pictures."""

from .checkpoints import latest
from .checkpoints import load as load_checkpoint
from .pictures import image_grid, save_picture
from .runs import train
from .trainer import Trainer, TrainingError

__all__ = ["image_grid", "latest", "load_checkpoint", "save_picture", "train", "Trainer", "TrainingError"]
