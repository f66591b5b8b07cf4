"""Evaluation mode for a while: every module gets its own mode back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


def restore_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    """Gives each module the mode that it had, parents before their children.

    ``train`` is called only where a class has its own, which may do more than set a flag (LoRA layers split their
    weights in it); it then may also reach into children, whose flags are therefore set afterwards.
    """
    for module, training in modes:
        if type(module).train is not nn.Module.train and module.training != training:
            module.train(training)
    for module, training in modes:
        if module.training != training:
            module.training = training


@contextlib.contextmanager
def evaluating(*networks: object) -> Iterator[None]:
    """Puts modules into evaluation mode, and afterwards, also after an error, each submodule back into its own.

    ``network.train(network.training)`` would not do: it thaws a batch norm or a backbone that its owner has frozen by
    calling ``eval`` on it alone. What is no module is passed over.

    Example:
        >>> import torch
        >>> from genfast._modes import evaluating
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm2d(3).eval(), torch.nn.Dropout())
        >>> with evaluating(net):
        ...     net[1].training
        False
        >>> net[0].training, net[1].training
        (False, True)
    """
    modules = [m for network in networks if isinstance(network, nn.Module) for m in network.modules()]
    modes = [(m, m.training) for m in modules]
    try:
        for network in networks:
            if isinstance(network, nn.Module) and any(m.training for m in network.modules()):
                network.eval()
        yield
    finally:
        restore_modes(modes)
