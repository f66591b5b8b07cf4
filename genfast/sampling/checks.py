"""Is a network causal, what does it see, and does its cached sampler do what the standard loop does?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._files import write_atomically
from .._modes import evaluating
from . import inputs
from .sampler import Sampler


class CausalityError(AssertionError):
    """A network sees its own future; names an output and an input that it should not have seen."""


@dataclass(frozen=True)
class _Subject:
    """A network under a check: how it is called, and with what."""

    name: str
    network: Any
    shape: tuple[int, ...]
    levels: int
    head: str
    conditions: inputs.Conditions
    entrance: inputs.Entrance
    device: torch.device

    def image(self, seed: int) -> Tensor:
        x = torch.randint(self.levels, (1, *self.shape), generator=torch.Generator().manual_seed(seed))
        return x.to(self.device)

    def call(self, x: Tensor) -> Tensor:
        """The output for what the network takes, which has been made of whole numbers."""
        out: Tensor = self.conditions.expanded(len(x)).call(self.network, x)
        return out

    def fed(self, x: Tensor) -> Tensor:
        return inputs.feed(x, self.entrance.input, self.levels, inputs.dtype_of(self.network))

    def dependence(self, x: Tensor, outputs: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """For each output (channel, *position), which entries of x (C, *spatial) move it, as bool.

        By the gradient where whole numbers become floats by a scale, or by conversions and arithmetic alone; a network
        that embeds or compares them, or whose output has no gradient by them, is asked by changing one entry after the
        other.
        """
        how = self.entrance
        if how.input in ("unit", "signed") or (how.input == "integers" and how.smooth):
            found = self._by_gradient(x, outputs)
            if found is not None and any(bool(f.any()) for f in found):
                return found
        return self._by_change(x, outputs)

    def _by_gradient(self, x: Tensor, outputs: Sequence[tuple[int, ...]]) -> list[Tensor] | None:
        fed = self.fed(x)
        values = (fed if fed.is_floating_point() else fed.to(inputs.dtype_of(self.network))).clone().requires_grad_()
        try:
            with torch.enable_grad():
                out = self.call(values)
        except (RuntimeError, TypeError, ValueError, IndexError):  # whole numbers alone
            return None
        if not out.requires_grad:
            return None
        found = []
        for o in outputs:
            (grad,) = torch.autograd.grad(out[(0, *o)], values, retain_graph=True, allow_unused=True)
            found.append((torch.zeros_like(values[0]) if grad is None else grad[0]).cpu() != 0)
        return found

    def _by_change(self, x: Tensor, outputs: Sequence[tuple[int, ...]]) -> list[Tensor]:
        changed = x.repeat(x[0].numel() + 1, *(1,) * (x.dim() - 1))
        flat = changed.view(len(changed), -1)
        every = torch.arange(x[0].numel(), device=x.device)
        flat[every + 1, every] = (flat[every + 1, every] + 1) % self.levels
        with torch.no_grad():
            out = self.call(self.fed(changed))
        moved = ((out[1:] - out[:1]).abs() > 10 * torch.finfo(out.dtype).eps * out.abs().max()).cpu()
        places: list[tuple[Any, ...]] = [(slice(None), *o) for o in outputs]
        return [moved[place].view(x.shape[1:]) for place in places]


def _subject(
    name: str,
    network: Any,
    shape: Sequence[int] | None,
    levels: int | None,
    head: str | None,
    context: inputs.Context,
    input: inputs.Input,
) -> _Subject:
    """Shape, levels and head from the model's attributes where they are not given; the network is called once."""
    inner = inputs.unwrapped(network)
    if shape is None:
        colours = int(getattr(inner, "in_channels", 1))
        shape = (colours, 32) if getattr(inner, "dims", 2) == 1 else (colours, 8, 8)
    shape = tuple(shape)
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise ValueError(f"shape={shape}, expected (C, H, W), (C, L) or (C, T, H, W)")
    levels = int(getattr(inner, "levels", 256)) if levels is None else levels
    head = str(getattr(inner, "head", "categorical")) if head is None else head
    sampler = Sampler(network, levels=levels, head=head, input=input)  # which checks what it is given
    conditions = inputs.bind(name, network, context)
    value = inputs.own_input(network) if input is None else input
    with inputs.probing(network, sampler._device()):
        how = inputs.entrance(name, network, conditions, shape, levels, value, sampler._device())
    return _Subject(name, network, shape, levels, head, conditions, how, sampler._device())


def assert_causal(
    network: Any,
    shape: Sequence[int] | None = None,
    *,
    levels: int | None = None,
    head: str | None = None,
    context: inputs.Context = None,
    input: inputs.Input = None,
    group_order: str | None = None,
    seed: int = 0,
) -> None:
    """Raises unless every output depends on earlier inputs only: the gradient to every other input is exactly zero.

    A logit of colour k may see the pixels before its own in raster order, and the colours before k of its own; the
    parameters of a mixture may see the pixels before only. Takes one backward pass for each output channel of a few and
    each position, so give a small ``shape``.

    Args:
        network: as for :class:`Sampler`; in evaluation mode while it is checked.
        shape: (C, H, W), (C, L) or (C, T, H, W); (C, 8, 8) or (C, 32) with the model's own C by default.
        levels, head, input: of :class:`Sampler`; the model's own by default.
        context: (1, ...), as of :meth:`Sampler.sample`, if the network takes one.
        group_order: of :class:`Sampler`; None for either, all outputs in the same.

    Raises:
        CausalityError: names the first offending output and input.
        ValueError: a network that takes floats without ``input``; a condition that is missing or too many, by name.
    """
    with evaluating(*inputs.modules_of(network)):
        subject = _subject("assert_causal", network, shape, levels, head, context, input)
        shape, channels, colours = subject.shape, subject.entrance.channels, subject.shape[0]
        per = max(1, channels // colours)
        chosen = _spread(per, min(4, per))
        count = [
            *(i * colours + k for i in chosen for k in range(colours)),
            *(k * per + i for i in chosen for k in range(colours)),
        ]
        positions = torch.cartesian_prod(*(torch.arange(s) for s in shape[1:])).view(-1, len(shape) - 1).tolist()
        outputs = [(c, *p) for p in positions for c in sorted({c for c in count if c < channels})]
        seen = subject.dependence(subject.image(seed), outputs)
    number = {tuple(p): i for i, p in enumerate(positions)}
    orders = [group_order] if group_order is not None else ["interleaved", "blocked"]
    faults = [_first_fault(outputs, seen, number, subject.head, colours, per, order) for order in orders]
    fault = faults[0] if all(faults) else None
    if fault is not None:
        channel, position, colour, at = fault
        raise CausalityError(
            f"{inputs.name_of(network)}: output channel {channel} at {position} depends on colour {colour} at {at}, "
            "which comes later"
        )


def _spread(count: int, some: int) -> list[int]:
    """``some`` of the numbers below ``count``, the first and the last among them."""
    return [round(i * (count - 1) / max(1, some - 1)) for i in range(some)]


def _first_fault(
    outputs: list[tuple[int, ...]],
    seen: list[Tensor],
    number: dict[tuple[int, ...], int],
    head: str,
    colours: int,
    per: int,
    order: str,
) -> tuple[int, tuple[int, ...], int, tuple[int, ...]] | None:
    """The first output (channel, position) that sees a (colour, position) which does not come before it."""
    for (channel, *position), map_ in zip(outputs, seen):
        own_colour = channel % colours if order == "interleaved" else channel // per
        for colour, *at in map_.nonzero().tolist():
            here, there = number[tuple(position)], number[tuple(at)]
            own = here == there and head == "categorical" and colour < own_colour
            if there > here or (there == here and not own):
                return channel, tuple(position), colour, tuple(at)
    return None


@dataclass(frozen=True)
class ReceptiveField:
    """What one output sees, (C, H, W) bool: ``seen``, and ``blind``, the earlier inputs that it could see and does
    not."""

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

        seen, blind = self.seen.any(0), self.blind.any(0)
        seen, blind = (t.reshape(t.shape[0], -1) for t in (seen, blind))
        pixels = torch.full((*seen.shape, 3), 200, dtype=torch.uint8)
        pixels[seen] = torch.tensor([70, 120, 200], dtype=torch.uint8)
        pixels[blind & ~seen] = torch.tensor([240, 200, 60], dtype=torch.uint8)
        pixels[(*self.position, 0)[:2]] = torch.tensor([200, 50, 50], dtype=torch.uint8)
        picture = Image.fromarray(pixels.numpy())
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        write_atomically(Path(path), picture.save)


def receptive_field(
    network: Any,
    shape: Sequence[int] | None = None,
    *,
    position: Sequence[int] | None = None,
    levels: int | None = None,
    context: inputs.Context = None,
    input: inputs.Input = None,
    seed: int = 0,
) -> ReceptiveField:
    """What the output at ``position`` (the middle by default) depends on, and which earlier inputs it is blind to.

    Args and errors as of :func:`assert_causal`.

    Example:
        >>> import torch, genfast
        >>> net = genfast.models.PixelCNN(channels=4, layers=3, kernel_size=3)
        >>> field = genfast.sampling.receptive_field(net, (1, 9, 9))
        >>> bool(field.blind.any())
        True
    """
    with evaluating(*inputs.modules_of(network)):
        subject = _subject("receptive_field", network, shape, levels, None, context, input)
        shape = subject.shape
        at = tuple(s // 2 for s in shape[1:]) if position is None else tuple(position)
        if len(at) != len(shape) - 1 or any(not 0 <= p < s for p, s in zip(at, shape[1:])):
            raise ValueError(f"receptive_field: position={at}, expected one inside {shape[1:]}")
        seen = torch.zeros(shape, dtype=torch.bool)
        channels = _spread(subject.entrance.channels, min(subject.entrance.channels, 8))
        for attempt in range(3):  # a ReLU that is closed for one image hides an input
            for map_ in subject.dependence(subject.image(seed + attempt), [(c, *at) for c in channels]):
                seen |= map_
    order = torch.arange(math.prod(shape[1:])).view(shape[1:])
    earlier = (order < order[at]).expand(shape)
    return ReceptiveField(seen, earlier & ~seen, at)


@dataclass(frozen=True)
class Equivalence:
    """How far the cached sampler is from the standard loop: the largest difference of what pixels are drawn from,
    relative to the largest value, and how many levels of how many differ when both draw with the same uniform
    numbers."""

    error: float
    different: int
    total: int

    @property
    def passed(self) -> bool:
        return self.error < 1e-4 and self.different == 0


def sample_equivalence(
    network: nn.Module,
    shape: Sequence[int] | None = None,
    *,
    n: int = 2,
    levels: int | None = None,
    head: str | None = None,
    context: inputs.Context = None,
    input: inputs.Input = None,
    seed: int = 0,
) -> Equivalence:
    """Compares cached and naive sampling of any network of :mod:`genfast.nn` layers, on random images of ``shape``.

    Raises:
        LoweringError: the network has no pixel program.
    """
    with evaluating(*inputs.modules_of(network)):
        subject = _subject("sample_equivalence", network, shape, levels, head, context, input)
        shape = subject.shape
        sampler = Sampler(network, levels=subject.levels, head=subject.head, input=subject.entrance.input)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(subject.levels, (n, *shape), generator=generator).to(subject.device)
        with torch.no_grad():
            expected = subject.call(subject.fed(x))
        found = sampler.teacher_forced(x, context=context)
        uniforms = torch.rand(
            (n, sampler.uniforms_per_pixel(shape[0]), *shape[1:]), generator=generator, dtype=torch.float32
        )
        drawn = [sampler.sample(n, shape, method=m, uniforms=uniforms, context=context) for m in ("cached", "naive")]
    scale = max(float(expected.abs().max()), 1e-30)
    return Equivalence(
        float((found - expected).abs().max()) / scale, int((drawn[0] != drawn[1]).sum()), drawn[0].numel()
    )
