"""One evaluation of a style transfer: content and style of an image against kept targets, and the gradient in the
image."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work
from genfast import losses

STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
CONTENT = "relu4_2"
WEIGHT = 1e4


def _gram(f: Tensor) -> Tensor:
    """As in PyTorch's fast_neural_style example."""
    n, c, h, w = f.shape
    rows = f.reshape(n, c, h * w)
    return rows.bmm(rows.mT) / (c * h * w)


class Plain(nn.Module):
    """As in PyTorch's tutorial of style transfer: the losses behind their layers, nothing behind the last, targets
    kept."""

    def __init__(self, network: nn.Sequential, content: Tensor, style: Tensor) -> None:
        super().__init__()
        names = list(network._modules)
        self.names = names[: 1 + max(names.index(name) for name in (*STYLE, CONTENT))]
        self.network = network[: len(self.names)]
        with torch.no_grad():
            self.content = self.features(content)[CONTENT]
            found = self.features(style)
            self.grams = {name: _gram(found[name]) for name in STYLE}

    def features(self, x: Tensor) -> dict[str, Tensor]:
        found = {}
        for name, module in zip(self.names, self.network):
            x = module(x)
            found[name] = x
        return found

    def forward(self, x: Tensor) -> Tensor:
        found = self.features(x)
        style = torch.stack([F.mse_loss(_gram(found[name]), gram) for name, gram in self.grams.items()]).sum()
        return F.mse_loss(found[CONTENT], self.content) + WEIGHT * style


def _ours(network: nn.Sequential, content: Tensor, style: Tensor) -> nn.Module:
    together = losses.FeatureLosses(
        content=losses.PerceptualLoss(network, CONTENT, normalization=None),
        style=losses.StyleLoss(network, STYLE, normalization=None),
        weights={"style": WEIGHT},
    )
    together.set_target(content=content, style=style)
    return together


def _case(width: int, size: int, *, quick: bool) -> Case:
    def work(build: Callable[[nn.Sequential, Tensor, Tensor], nn.Module], compiled: bool = False) -> Work:
        network = losses.random_features("vgg19", width=width).to(_ceilings.DEVICE)
        pictures = [genfast.models.neural_style.picture(name, size) for name in ("china", "flower")]
        content, style = (F.interpolate(p, (size, size)).sub(0.5).div(0.25).to(_ceilings.DEVICE) for p in pictures)
        loss = build(network, content, style)
        loss = torch.compile(loss, dynamic=False) if compiled else loss
        image = (0.9 * content + 0.1 * style).requires_grad_()

        def run() -> list[Tensor]:
            value = loss(image)
            return [value, *torch.autograd.grad(value, image)]

        return run

    providers = {
        "reference": lambda: work(Plain),
        "compile": lambda: work(Plain, compiled=True),
        "genfast": lambda: work(_ours),
    }
    flops, channels = 0, 3
    for block, convolutions in enumerate((2, 2, 4, 4, 1)):
        for _ in range(convolutions):
            outputs = width * min(2**block, 8)
            flops += 2 * 2 * 9 * channels * outputs * (size >> block) ** 2  # forward, and backward to the input
            channels = outputs
        flops += 2 * 2 * channels**2 * (size >> block) ** 2  # the Gram matrix and its derivative
    return Case(f"style transfer step vgg19 width {width}, {size}x{size}", providers, flops=flops, quick=quick)


CASES = [_case(16, 128, quick=True), _case(64, 256, quick=False)]
