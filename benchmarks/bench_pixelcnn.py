"""A PixelCNN training step, and its samplers: the standard loop of one forward pass per pixel against the cached
engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import genfast
from benchmarks import _ceilings
from benchmarks._case import Case, Work, captured
from genfast.models import plain
from genfast.sampling.naive import draw_categorical

BATCH = 16


def _ours(model: Any) -> Any:
    """``model`` as it is, where :func:`plain` would give its twin."""
    return model


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
    def work(variant: Any, channels_last: bool = False, compiled: bool = False) -> Work:
        torch.manual_seed(0)
        model = variant(genfast.models.PixelCNN)(1, 64, layers, kernel)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        return _step(model, _images(size), compiled=compiled)

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: work(plain)}
    if compiled:
        providers["compile"] = lambda: work(plain, compiled=True)
    providers["trick"] = lambda: work(plain, channels_last=True)
    providers["genfast"] = lambda: work(_ours)
    taps = (layers - 1) * (kernel**2 + 1) // 2 * 64 * 64 + (kernel**2 - 1) // 2 * 64 + 64 * 256
    flops = 3 * 2 * BATCH * size * size * taps
    name = f"pixelcnn train step {layers} layers {kernel}x{kernel}, batch {BATCH}, {size}x{size}"
    return Case(
        name, providers, flops=flops, quick=quick, notes={"trick": "the plain model with channels_last weights"}
    )


def _multiplications(build: Callable[[Any], Any], n: int, shape: tuple[int, ...]) -> Callable[[], int]:
    """FLOPs of the products of the pixel program, which takes seconds to make."""

    def count() -> int:
        model = build(_ours)
        sampler = genfast.sampling.Sampler(model, levels=model.levels, head=model.head)
        return int(2 * n * sampler.prepare(shape).multiplications)

    return count


def _sampling(name: str, build: Callable[[Any], Any], n: int, shape: tuple[int, ...], *, quick: bool) -> Case:
    """The plain model's loop and ours, on the same weights and the same uniform numbers; both return the images."""

    def work(variant: Any, **options: Any) -> Work:
        torch.manual_seed(0)
        model: nn.Module = build(variant).eval()
        uniforms = torch.rand((n, model.uniforms_per_pixel(), *shape[1:]), generator=torch.Generator().manual_seed(0))
        return lambda: model.sample(n, shape, uniforms=uniforms, **options).float()

    providers = {"reference": lambda: work(plain), "genfast": lambda: work(_ours)}
    title = f"sample {name}, {n} of {'x'.join(map(str, shape))}"
    return Case(title, providers, flops=_multiplications(build, n, shape), quick=quick, once=("reference",))


class Loop:
    """The standard loop a pixel at a time, whose place is a number on the device, so that one graph serves every
    pixel."""

    def __init__(self, model: Any, n: int, shape: tuple[int, ...], uniforms: Tensor) -> None:
        self.model = model
        self.images = torch.zeros((n, *shape), dtype=torch.int64, device=uniforms.device)
        self.flat, self.uniforms = self.images.flatten(2), uniforms.flatten(2)  # views
        self.at = torch.zeros(1, dtype=torch.int64, device=uniforms.device)

    @torch.no_grad()
    def step(self) -> None:
        model, u = self.model, self.uniforms.index_select(2, self.at)[:, :, 0]
        colours = self.images.shape[1]
        if model.head == "categorical":
            for k in range(colours):
                here = model(self.images).flatten(2).index_select(2, self.at)[:, :, 0]
                drawn = draw_categorical(here.unflatten(1, (model.levels, colours))[:, :, k], u[:, k])
                self.flat[:, k].index_copy_(1, self.at, drawn[:, None])
        else:
            here = model(self.images).flatten(2).index_select(2, self.at)
            drawn = genfast.reference.discretized_logistic_mixture_sample(
                here, u[..., None], colours, model.levels, 1.0
            )
            self.flat.index_copy_(2, self.at, drawn)
        self.at.add_(1)

    def start(self) -> None:
        self.images.zero_()
        self.at.zero_()


def _gpu_sampling(
    name: str,
    build: Callable[[Any], Any],
    n: int,
    shape: tuple[int, ...],
    *,
    steps: int | None = None,
    tf32: bool = False,
) -> Case:
    """As _sampling, the loop also as a graph of one pixel that is replayed; over ``steps`` pixels only, which are
    compared."""
    total = math.prod(shape[1:])
    part = min(steps or total, total)

    def given(variant: Any) -> tuple[Any, Tensor]:
        torch.manual_seed(0)
        model = build(variant).eval().to(_ceilings.DEVICE)
        uniforms = torch.rand((n, model.uniforms_per_pixel(), *shape[1:]), generator=torch.Generator().manual_seed(0))
        return model, uniforms.to(_ceilings.DEVICE)

    def naive(graph: bool, dtype: str = "float32") -> Work:
        model, uniforms = given(plain)
        loop = Loop(model, n, shape, uniforms)
        with _ceilings.products(dtype):
            if graph:
                loop.step()
                loop.start()
            step = captured([loop.step]) if graph else loop.step

        def run() -> Any:
            loop.start()
            for _ in range(part):
                step()
            # Where the logits are rounded otherwise some draws are others, and all that follow them.
            return loop.flat[:, :, :part].float() if dtype == "float32" else [None]

        run.part = part, total  # type: ignore[attr-defined]
        return run

    def cached() -> Work:
        model, uniforms = given(_ours)
        return lambda: model.sample(n, shape, uniforms=uniforms).flatten(2)[:, :, :part].float()

    providers: dict[str, Callable[[], Work]] = {"reference": lambda: naive(False), "graph": lambda: naive(True)}
    if tf32:
        providers["graph tf32"] = lambda: naive(True, "tf32")
    providers["genfast"] = cached
    notes = {"graph": "the loop with one pixel's passes as a CUDA graph"}
    if part < total:
        notes["reference"] = (
            f"the time of {part} of {total} pixels, each of which takes the same passes, times {total / part:g}"
        )
    title = f"sample {name}, {n} of {'x'.join(map(str, shape))}"
    return Case(title, providers, flops=_multiplications(build, n, shape), quick=False, notes=notes, priority=0)


if _ceilings.DEVICE == "cuda":
    SAMPLING = [
        _gpu_sampling(name, build, n, shape, steps=steps, tf32=n == 1024)
        for n, steps in ((1, 64), (1024, 2), (64, 16))
        for name, build, shape in (
            ("pixelcnn", lambda variant: variant(genfast.models.PixelCNN)(), (1, 28, 28)),
            ("gated_pixelcnn", lambda variant: variant(genfast.models.GatedPixelCNN)(3, 66), (3, 32, 32)),
            ("pixelcnnpp", lambda variant: variant(genfast.models.PixelCNNPlusPlus)(3, 40), (3, 32, 32)),
            ("wavenet", lambda variant: variant(genfast.models.WaveNet)(), (1, 1000)),
        )
    ]
    SAMPLING.append(
        _gpu_sampling(
            "pixelcnn 3 layers", lambda variant: variant(genfast.models.PixelCNN)(1, 32, 3, 5), 1, (1, 28, 28)
        )
    )  # all pixels
else:
    SAMPLING = [
        _sampling(
            "pixelcnn 3 layers",
            lambda variant: variant(genfast.models.PixelCNN)(1, 32, 3, 5),
            2,
            (1, 12, 12),
            quick=True,
        ),
        _sampling("pixelcnn", lambda variant: variant(genfast.models.PixelCNN)(), 1, (1, 28, 28), quick=False),
        _sampling("pixelcnn", lambda variant: variant(genfast.models.PixelCNN)(), 16, (1, 28, 28), quick=False),
        # 66 channels: 64 is no multiple of three colours.
        _sampling(
            "gated_pixelcnn", lambda variant: variant(genfast.models.GatedPixelCNN)(3, 66), 1, (3, 32, 32), quick=False
        ),
        _sampling(
            "pixelcnnpp", lambda variant: variant(genfast.models.PixelCNNPlusPlus)(3, 40), 1, (3, 32, 32), quick=False
        ),
        _sampling("wavenet", lambda variant: variant(genfast.models.WaveNet)(), 1, (1, 1000), quick=False),
    ]

CASES = [_training(2, 5, 16, compiled=False, quick=True), _training(8, 7, 28, compiled=True, quick=False), *SAMPLING]
