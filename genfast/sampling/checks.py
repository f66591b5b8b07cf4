"""Is a network causal, what does it see, and does its cached sampler do what the standard loop does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..reference.causal import LevelEmbedding
from .sampler import Sampler


class CausalityError(AssertionError):
    """A network sees its own future; names an output and an input that it should not have seen."""


def _setting(
    network: nn.Module, shape: Sequence[int] | None, levels: int | None, head: str | None, seed: int
) -> tuple[tuple[int, ...], int, str, Tensor]:
    """Shape, levels, head and a random image, from the model's attributes where they are not given."""
    if shape is None:
        colours = int(getattr(network, "in_channels", 1))
        shape = (colours, 32) if getattr(network, "dims", 2) == 1 else (colours, 8, 8)
    shape = tuple(shape)
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise ValueError(f"shape={shape}, expected (C, H, W), (C, L) or (C, T, H, W)")
    levels = int(getattr(network, "levels", 256)) if levels is None else levels
    head = str(getattr(network, "head", "categorical")) if head is None else head
    generator = torch.Generator().manual_seed(seed)
    return shape, levels, head, torch.randint(levels, (1, *shape), generator=generator)


def _dependence(network: nn.Module, x: Tensor, context: Tensor | None, outputs: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """For each output (channel, *position), which entries of x (C, *spatial) move it, as bool.

    By the gradient where there is one, summed over random weights; a network that embeds whole numbers is asked instead by
    changing one entry after the other.
    """
    call = (lambda v: network(v)) if context is None else (lambda v: network(v, context.expand(len(v), *context.shape[1:])))
    if any(isinstance(m, (LevelEmbedding, nn.Embedding)) for m in network.modules()):
        changed = x.repeat(x[0].numel() + 1, *(1,) * (x.dim() - 1))
        flat = changed.view(len(changed), -1)
        every = torch.arange(x[0].numel())
        flat[every + 1, every] = (flat[every + 1, every] + 1) % (int(x.max()) + 1 if int(x.max()) else 2)
        with torch.no_grad():
            out = call(changed)
        moved = (out[1:] - out[:1]).abs() > 10 * torch.finfo(out.dtype).eps * out.abs().max()
        return [moved[(slice(None), *o)].view(x.shape[1:]) for o in outputs]
    values = x.to(torch.get_default_dtype()).requires_grad_()
    out = call(values)
    found = []
    for o in outputs:
        (grad,) = torch.autograd.grad(out[(0, *o)], values, retain_graph=True, allow_unused=True)
        found.append(torch.zeros(x.shape[1:], dtype=torch.bool) if grad is None else grad[0] != 0)
    return found


def assert_causal(
    network: nn.Module, shape: Sequence[int] | None = None, *, levels: int | None = None, head: str | None = None,
    context: Tensor | None = None, seed: int = 0,
) -> None:  # fmt: skip
    """Raises unless every output depends on earlier inputs only: the gradient to every other input is exactly zero.

    A logit of colour k may see the pixels before its own in raster order, and the colours before k of its own; the parameters
    of a mixture may see the pixels before only. Takes one backward pass for each output channel of a few and each position,
    so give a small ``shape``.

    Args:
        network: as for :class:`Sampler`; in evaluation mode while it is checked.
        shape: (C, H, W), (C, L) or (C, T, H, W); (C, 8, 8) or (C, 32) with the model's own C by default.
        levels, head: of :class:`Sampler`; the model's own by default.
        context: (1, ...), if the network takes one.

    Raises:
        CausalityError: names the first offending output and input.
    """
    shape, levels, head, x = _setting(network, shape, levels, head, seed)
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            channels = network(x).shape[1] if context is None else network(x, context).shape[1]
        colours = shape[0]
        count = min(4, channels // colours)
        chosen = [
            round(i * (channels // colours - 1) / max(1, count - 1)) * colours + k for i in range(count) for k in range(colours)
        ]
        positions = torch.cartesian_prod(*(torch.arange(s) for s in shape[1:])).view(-1, len(shape) - 1).tolist()
        outputs = [(c, *p) for p in positions for c in sorted(set(chosen))]
        seen = _dependence(network, x, context, outputs)
    finally:
        network.train(training)
    number = {tuple(p): i for i, p in enumerate(positions)}
    for (channel, *position), map_ in zip(outputs, seen):
        for colour, *at in map_.nonzero().tolist():
            here, there = number[tuple(position)], number[tuple(at)]
            own = here == there and head == "categorical" and colour < channel % colours
            if there > here or (there == here and not own):
                raise CausalityError(
                    f"{type(network).__name__}: output channel {channel} at {tuple(position)} depends on colour {colour} at "
                    f"{tuple(at)}, which comes later"
                )


@dataclass(frozen=True)
class ReceptiveField:
    """What one output sees, (C, H, W) bool: ``seen``, and ``blind``, the earlier inputs that it could see and does not."""

    seen: Tensor
    blind: Tensor
    position: tuple[int, ...]

    def __str__(self) -> str:
        seen, blind = self.seen.any(0), self.blind.any(0)
        rows = zip(seen.reshape(seen.shape[0], -1), blind.reshape(blind.shape[0], -1))
        marks = [["#" if s else "o" if b else "." for s, b in zip(*row)] for row in rows]
        at = (*self.position, 0)[:2]
        marks[at[0]][at[1]] = "X"
        return "\n".join("".join(row) for row in marks) + "\nX output, # seen, o blind spot, . later"

    def save(self, path: str | Path, *, scale: int = 16) -> None:
        """A PNG: the output in red, what it sees in blue, its blind spot in yellow, what comes later in grey."""
        from PIL import Image

        from ..training import save_picture

        seen, blind = self.seen.any(0), self.blind.any(0)
        seen, blind = (t.reshape(t.shape[0], -1) for t in (seen, blind))
        pixels = torch.full((*seen.shape, 3), 200, dtype=torch.uint8)
        pixels[seen] = torch.tensor([70, 120, 200], dtype=torch.uint8)
        pixels[blind & ~seen] = torch.tensor([240, 200, 60], dtype=torch.uint8)
        pixels[(*self.position, 0)[:2]] = torch.tensor([200, 50, 50], dtype=torch.uint8)
        picture = Image.fromarray(pixels.numpy())
        save_picture(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST), Path(path))


def receptive_field(
    network: nn.Module, shape: Sequence[int] | None = None, *, position: Sequence[int] | None = None, levels: int | None = None,
    context: Tensor | None = None, seed: int = 0,
) -> ReceptiveField:  # fmt: skip
    """What the output at ``position`` (the middle by default) depends on, and which earlier inputs it is blind to.

    Example:
        >>> import torch, genfast
        >>> net = genfast.models.PixelCNN(channels=4, layers=3, kernel_size=3)
        >>> field = genfast.sampling.receptive_field(net, (1, 9, 9))
        >>> bool(field.blind.any())
        True
    """
    shape, levels, _, x = _setting(network, shape, levels, "categorical", seed)
    at = tuple(s // 2 for s in shape[1:]) if position is None else tuple(position)
    if len(at) != len(shape) - 1 or any(not 0 <= p < s for p, s in zip(at, shape[1:])):
        raise ValueError(f"receptive_field: position={at}, expected one inside {shape[1:]}")
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            channels = network(x).shape[1] if context is None else network(x, context).shape[1]
        seen = torch.zeros(shape, dtype=torch.bool)
        for attempt in range(3):  # a ReLU that is closed for one image hides an input
            x = torch.randint(levels, (1, *shape), generator=torch.Generator().manual_seed(seed + attempt))
            for map_ in _dependence(network, x, context, [(c, *at) for c in range(min(channels, 8))]):
                seen |= map_
    finally:
        network.train(training)
    order = torch.arange(x[0, 0].numel()).view(shape[1:])
    earlier = (order < order[at]).expand(shape)
    return ReceptiveField(seen, earlier & ~seen, at)


@dataclass(frozen=True)
class Equivalence:
    """How far the cached sampler is from the standard loop: the largest difference of what pixels are drawn from, relative to
    the largest value, and how many levels of how many differ when both draw with the same uniform numbers."""

    error: float
    different: int
    total: int

    @property
    def passed(self) -> bool:
        return self.error < 1e-4 and self.different == 0


def sample_equivalence(
    network: nn.Module, shape: Sequence[int] | None = None, *, n: int = 2, levels: int | None = None, head: str | None = None,
    context: Tensor | None = None, seed: int = 0,
) -> Equivalence:  # fmt: skip
    """Compares cached and naive sampling of any network of :mod:`genfast.nn` layers, on random images of ``shape``.

    Raises:
        LoweringError: the network has no pixel program.
    """
    shape, levels, head, _ = _setting(network, shape, levels, head, seed)
    sampler = Sampler(network, levels=levels, head=head)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(levels, (n, *shape), generator=generator).to(sampler._device())
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            expected = network(x) if context is None else network(x, context)
    finally:
        network.train(training)
    found = sampler.teacher_forced(x, context=context)
    uniforms = torch.rand((n, sampler.uniforms_per_pixel(shape[0]), *shape[1:]), generator=generator)
    drawn = [sampler.sample(n, shape, method=m, uniforms=uniforms, context=context) for m in ("cached", "naive")]
    scale = max(float(expected.abs().max()), 1e-30)
    return Equivalence(float((found - expected).abs().max()) / scale, int((drawn[0] != drawn[1]).sum()), drawn[0].numel())
