"""A PixelCNN training step, and its samplers: the standard loop of one forward pass per pixel against the cached engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work
from genfast.reference import autoregressive as plain

BATCH = 16


def _images(size: int) -> Tensor:
    """Grey patches of real photographs."""
    photos = genfast.data.load("photos", size=size, count=2 * BATCH)
    return photos.train[:BATCH, 1:2].to(_ceilings.DEVICE)


def _step(model: Any, x: Tensor, *, compiled: bool = False) -> Work:
    model.to(_ceilings.DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def loss(x: Tensor) -> Tensor:
        mean: Tensor = model.nll(model(x), x).mean()
        return mean

    function = torch.compile(loss, dynamic=False) if compiled else loss

    def run() -> None:
        optimizer.zero_grad()
        function(x).backward()
        optimizer.step()

    run.gradient_bytes = sum(p.nbytes for p in model.parameters())  # type: ignore[attr-defined]
    return run


def _training(layers: int, kernel: int, size: int, *, compiled: bool, quick: bool) -> Case:
    def work(family: Any, channels_last: bool = False, compiled: bool = False) -> Work:
        torch.manual_seed(0)
        model = family.PixelCNN(1, 64, layers, kernel)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        return _step(model, _images(size), compiled=compiled)

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: work(plain)}
    if compiled:
        providers["compile"] = lambda: work(plain, compiled=True)
    providers["trick"] = lambda: work(plain, channels_last=True)
    providers["genfast"] = lambda: work(genfast.models)
    taps = (layers - 1) * (kernel**2 + 1) // 2 * 64 * 64 + (kernel**2 - 1) // 2 * 64 + 64 * 256
    flops = 3 * 2 * BATCH * size * size * taps
    name = f"pixelcnn train step {layers} layers {kernel}x{kernel}, batch {BATCH}, {size}x{size}"
    return Case(name, providers, flops=flops, quick=quick, notes={"trick": "the plain model with channels_last weights"})


def _sampling(name: str, build: Callable[[Any], Any], n: int, shape: tuple[int, ...], *, quick: bool) -> Case:
    """The plain model's loop and ours, on the same weights and the same uniform numbers; both return the images."""

    def work(family: Any, **options: Any) -> Work:
        torch.manual_seed(0)
        model: nn.Module = build(family).eval()
        uniforms = torch.rand((n, model.uniforms_per_pixel(), *shape[1:]), generator=torch.Generator().manual_seed(0))
        return lambda: model.sample(n, shape, uniforms=uniforms, **options).float()

    sampler = genfast.sampling.Sampler
    torch.manual_seed(0)
    model = build(genfast.models)
    flops = 2 * n * sampler(model, levels=model.levels, head=model.head).prepare(shape).multiplications
    providers = {"reference": lambda: work(plain), "genfast": lambda: work(genfast.models)}
    return Case(f"sample {name}, {n} of {'x'.join(map(str, shape))}", providers, flops=flops, quick=quick, once=("reference",))


CASES = [
    _training(2, 5, 16, compiled=False, quick=True),
    _training(8, 7, 28, compiled=True, quick=False),
    _sampling("pixelcnn 3 layers", lambda f: f.PixelCNN(1, 32, 3, 5), 2, (1, 12, 12), quick=True),
    _sampling("pixelcnn", lambda f: f.PixelCNN(), 1, (1, 28, 28), quick=False),
    _sampling("pixelcnn", lambda f: f.PixelCNN(), 16, (1, 28, 28), quick=False),
    # 66 channels: 64 is no multiple of three colours.
    _sampling("gated_pixelcnn", lambda f: f.GatedPixelCNN(3, 66), 1, (3, 32, 32), quick=False),
    _sampling("pixelcnnpp", lambda f: f.PixelCNNPlusPlus(3, 40), 1, (3, 32, 32), quick=False),
    _sampling("wavenet", lambda f: f.WaveNet(), 1, (1, 1000), quick=False),
]
