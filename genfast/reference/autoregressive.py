"""The autoregressive models in plain PyTorch, as one would write them eagerly: the yardstick of :mod:`genfast.models`.

Each takes its layers from the class attribute ``layers``, as the flows of :mod:`genfast.reference.models` do. ``forward`` gives
what a pixel is drawn from: logits (N, levels * C, ...), level by level, or the parameters of a mixture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._derived import readable_now
from . import causal
from .discretized_logistic_mixture import discretized_logistic_mixture_nll, discretized_logistic_mixture_sample
from .modes import evaluating

# ---- drawing ----


def draw_categorical(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """The smallest level whose cumulative probability exceeds the uniform number; logits (..., levels), uniforms (...)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().double()
    sums = weight.cumsum(-1)
    return (sums <= uniforms.double()[..., None] * sums[..., -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)


def drawable(params: Tensor, colours: int, head: str) -> Tensor:
    """Whether there is something to draw, (N,), of the logits (N, levels) of a colour or the parameters (N, P) of a mixture.

    A logit of minus infinity forbids its level or component; NaN, plus infinity and logits that forbid all have no meaning.
    """
    if head == "categorical":
        return params.amax(1).isfinite()
    count = params.shape[1] // (1 + (3 if colours == 3 else 2) * colours)
    return params[:, :count].amax(1).isfinite() & params[:, count:].isfinite().all(1)


def not_drawable(name: str, head: str, image: int, colour: int, position: Sequence[int]) -> FloatingPointError:
    """The error of a pixel for which :func:`drawable` does not hold."""
    where = f"image {image}" + (f", colour {colour}" if head == "categorical" else "")
    what = "logits" if head == "categorical" else "mixture parameters"
    return FloatingPointError(
        f"{name}: the network's {what} of {where} at position {tuple(position)} are not finite (a NaN, an infinity, or every "
        "level forbidden by a logit of -inf)"
    )


def head_channels(name: str, out: Any, images: Tensor, levels: int, head: str) -> int:
    """The channels of a network's output for ``images``, or an error that says what was expected."""
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: the network gives a {type(out).__name__}, expected a tensor")
    colours = images.shape[1]
    per = 1 + (3 if colours == 3 else 2) * colours
    wanted = levels * colours if head == "categorical" else per
    fits = out.dim() == images.dim() and out.shape[0] == images.shape[0] and out.shape[2:] == images.shape[2:]
    if not fits or (out.shape[1] != wanted if head == "categorical" else not out.shape[1] or out.shape[1] % per):
        channels = f"levels * colours = {wanted}" if head == "categorical" else f"a multiple of {per}"
        rest = ", ".join(map(str, images.shape[2:]))
        raise ValueError(
            f"{name}: the network gives shape {tuple(out.shape)}, expected ({len(images)}, {channels}, {rest}) for "
            f"{colours} colour{'s' if colours > 1 else ''}"
        )
    return int(out.shape[1])


def of_colour(logits: Tensor, colours: int, levels: int, colour: int, group_order: str = "interleaved") -> Tensor:
    """Of logits (N, levels * C, ...) those of one colour, (N, levels, ...): they lie level by level, or colour by colour where
    the network's colours are "blocked"."""
    blocked = group_order == "blocked"
    parts: Tensor = logits.unflatten(1, (colours, levels) if blocked else (levels, colours))
    return parts[:, colour] if blocked else parts[:, :, colour]


@torch.no_grad()
def naive_sample(
    network: Callable[..., Any], images: Tensor, uniforms: Tensor, given: int, *, levels: int, head: str,
    context: Tensor | None = None, temperature: float = 1.0, progress: bool = False, group_order: str = "interleaved",
) -> Tensor:  # fmt: skip
    """The standard loop: one forward pass over the whole image per pixel and colour. Fills ``images`` from row ``given``.

    Raises:
        ValueError: an output of another shape than the head's.
        FloatingPointError: names the first pixel of a row whose logits are not finite.
    """
    from tqdm import trange

    colours, every = images.shape[1], slice(None)
    draws = colours if head == "categorical" else 1
    with evaluating(network):
        for row in trange(given, images.shape[2], unit="row", disable=None if progress else True):
            # Asked for once a row: of a GPU, each answer is waited for.
            fits = torch.ones((*images.shape[3:], draws, len(images)), dtype=torch.bool, device=images.device)
            for rest in itertools.product(*(range(size) for size in images.shape[3:])):
                at = (row, *rest)
                for k in range(draws):
                    out = network(images) if context is None else network(images, context)
                    head_channels("sample", out, images, levels, head)
                    here, u = out[(every, every, *at)], uniforms[(every, every, *at)]
                    if head == "categorical":
                        params = of_colour(here, colours, levels, k, group_order)
                        images[(every, k, *at)] = draw_categorical(params, u[:, k], temperature)
                    else:
                        params = here
                        drawn = discretized_logistic_mixture_sample(here[..., None], u[..., None], colours, levels, temperature)
                        images[(every, every, *at)] = drawn[..., 0].clamp_min(0)  # -1 where there is nothing to draw
                    fits[(*rest, k)] = drawable(params, colours, head)
            if not bool(fits.all()):
                *place, colour, image = (~fits).nonzero()[0].tolist()
                raise not_drawable("sample", head, image, colour, (row, *place))
    return images


def of_rows(rows: slice, n: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """Of tensors with ``n`` rows these rows; what is None or has one row for all stays."""
    return tuple(t if t is None or len(t) != n else t[rows] for t in tensors)


# ---- what every model has ----


class AutoregressiveModel(nn.Module):
    """p(x) = prod p(x_i | x_<i) over integer images (N, C, H, W) or sequences (N, C, L). ``config`` rebuilds the model."""

    layers: Any = causal
    head = "categorical"
    dims = 2
    config: dict[str, Any]

    def __init__(self, in_channels: int, levels: int, shape: Sequence[int] | None) -> None:
        super().__init__()
        name = type(self).__name__
        if in_channels < 1:
            raise ValueError(f"{name}: in_channels={in_channels}, expected at least 1")
        if levels < 2:
            raise ValueError(f"{name}: levels={levels}, expected at least 2")
        if shape is not None and (len(shape) != self.dims + 1 or shape[0] != in_channels):
            raise ValueError(f"{name}: shape={tuple(shape)}, expected ({in_channels}, {'H, W' if self.dims == 2 else 'L'})")
        self.in_channels, self.levels = in_channels, levels
        self.shape = None if shape is None else tuple(shape)

    def width(self, channels: int | None, usual: int, per_colour: int = 1) -> int:
        """Hidden channels: ``usual`` or the next number above it that the colours divide, or those given if they do."""
        per = per_colour * self.in_channels
        found = -(-usual // per) * per if channels is None else channels
        if found < 1 or found % per:
            twice = "twice " if per_colour == 2 else ""
            name, colours = type(self).__name__, self.in_channels
            raise ValueError(f"{name}: channels={channels}, expected a multiple of {per}, {twice}in_channels={colours}")
        return found

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, levels * C, ...) logits, level by level, or (N, P, ...) mixture parameters."""
        raise NotImplementedError

    def check(self, x: Tensor) -> Tensor:
        """``x``, or an error that says what was expected of it."""
        name = type(self).__name__
        if x.is_floating_point() or x.dtype == torch.bool:
            raise TypeError(f"{name}: x has dtype {x.dtype}, expected whole numbers in [0, {self.levels})")
        if x.dim() != self.dims + 2 or x.shape[1] != self.in_channels:
            wanted = f"(N, {self.in_channels}, {'H, W' if self.dims == 2 else 'L'})"
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected {wanted}")
        # Of a GPU's tensor only the loss asks, which need not wait for the answer.
        if not x.is_cuda and x.numel() and readable_now(x) and (int(x.min()) < 0 or int(x.max()) >= self.levels):
            raise ValueError(f"{name}: x holds values from {int(x.min())} to {int(x.max())}, expected 0 to {self.levels - 1}")
        return x

    def logits(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(N, levels, C, ...) of a categorical head.

        Raises:
            TypeError: the model's head is a mixture.
        """
        if self.head != "categorical":
            raise TypeError(f"{type(self).__name__}: a mixture has no logits per level")
        found: Tensor = self(x, context).unflatten(1, (self.levels, self.in_channels))
        return found

    def nll(self, out: Tensor, x: Tensor) -> Tensor:
        """-log p per position in nats, (N, C, ...) or, of a mixture, (N, ...)."""
        if self.head == "categorical":
            logits: Tensor = out.unflatten(1, (self.levels, self.in_channels))
            return F.cross_entropy(logits, x.long(), reduction="none")
        return discretized_logistic_mixture_nll(out, x.long(), self.levels)

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """log p(x) in nats, (N,), of whole numbers x (N, C, ...)."""
        nll = self.nll(self(self.check(x), context), x)
        return -nll.flatten(1).sum(1)

    def bits_per_dim(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """-log2 p(x) per dimension, (N,)."""
        return -self.log_prob(x, context) / (math.prod(x.shape[1:]) * math.log(2))

    def uniforms_per_pixel(self) -> int:
        """Random numbers that a pixel takes."""
        return self.in_channels if self.head == "categorical" else 1 + self.in_channels

    @torch.no_grad()
    def sample(
        self, n: int, shape: Sequence[int] | None = None, *, context: Tensor | None = None, temperature: float = 1.0,
        prefix: Tensor | None = None, uniforms: Tensor | None = None, generator: torch.Generator | None = None,
        progress: bool = False, rows: slice | None = None,
    ) -> Tensor:  # fmt: skip
        """Integer images (n, *shape) by the standard loop; only ``rows`` of them, from the random numbers of all, if given."""
        shape = self.shape_of(shape)
        if uniforms is None:
            uniforms = torch.rand((n, self.uniforms_per_pixel(), *shape[1:]), generator=generator)
        if rows is not None:
            n, (uniforms, context, prefix) = len(range(n)[rows]), of_rows(rows, n, uniforms, context, prefix)
        images = torch.zeros((n, *shape), dtype=torch.int64)
        given = 0 if prefix is None else prefix.shape[2]
        if prefix is not None:
            images[:, :, :given] = prefix
        return naive_sample(
            self, images, uniforms, given, levels=self.levels, head=self.head, context=context, temperature=temperature,
            progress=progress,
        )  # fmt: skip

    def shape_of(self, shape: Sequence[int] | None) -> tuple[int, ...]:
        """``shape``, or the model's own."""
        if shape is None and self.shape is None:
            raise ValueError(f"{type(self).__name__}.sample: shape=None, expected (C, H, W): the model was built without one")
        found = tuple(shape) if shape is not None else self.shape
        assert found is not None
        if len(found) != self.dims + 1 or found[0] != self.in_channels or min(found) < 1:
            wanted = f"({self.in_channels}, {'H, W' if self.dims == 2 else 'L'})"
            raise ValueError(f"{type(self).__name__}.sample: shape={found}, expected {wanted}")
        return found


class PixelCNN(AutoregressiveModel):
    """PixelCNN (arXiv:1601.06759, section 3.5): a stack of masked convolutions with residuals.

    The first layer has type A, the others type B and a ReLU; 1 x 1 maps to the logits. With three colours each is seen by
    the later ones (interleaved channels).

    Args:
        in_channels: colours.
        channels: of the hidden maps; a multiple of in_channels. By default 64, or what is next to it that is one.
        layers: masked ``kernel_size`` x ``kernel_size`` convolutions, the first included.
        levels: of a colour.
        shape: (C, H, W), what ``sample`` draws unless told otherwise.

    Raises:
        ValueError: arguments that do not fit, by name.
    """

    def __init__(
        self, in_channels: int = 1, channels: int | None = None, layers: int = 8, kernel_size: int = 7, levels: int = 256, *,
        shape: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, levels, shape)
        channels = self.width(channels, 64)
        self.config = {
            "in_channels": in_channels, "channels": channels, "layers": layers, "kernel_size": kernel_size, "levels": levels,
            "shape": self.shape,
        }  # fmt: skip
        if layers < 1:
            raise ValueError(f"{type(self).__name__}: layers={layers}, expected at least 1")
        if kernel_size % 2 == 0:
            raise ValueError(f"{type(self).__name__}: kernel_size={kernel_size}, expected an odd number")
        conv = self.layers.MaskedConv2d
        self.scale = causal.ScaleLevels(levels)
        self.first = conv(in_channels, channels, kernel_size, mask_type="A", data_channels=in_channels, activation="relu")
        self.body = nn.ModuleList(
            conv(channels, channels, kernel_size, mask_type="B", data_channels=in_channels, activation="relu")
            for _ in range(layers - 1)
        )
        self.out = conv(channels, levels * in_channels, 1, mask_type="B", data_channels=in_channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        causal.check_context(type(self).__name__, context, False)
        h = self.first(self.scale(x))
        for layer in self.body:
            h = h + layer(h)
        out: Tensor = self.out(h)
        return out


class GatedPixelCNN(AutoregressiveModel):
    """Gated PixelCNN (arXiv:1606.05328), conditional on ``context`` (N, D) or (N, D, H, W) if ``context_channels`` is D.

    Args:
        in_channels: colours.
        channels: of the stacks; a multiple of in_channels. By default 64, or what is next to it that is one.
        layers: gated layers, the first (type A, 7 x 7) included.
        kernel_size: of the others, odd.
        levels: of a colour.
        context_channels: features of the condition, or None.
        shape: (C, H, W), what ``sample`` draws unless told otherwise.

    Raises:
        ValueError: arguments that do not fit, by name.
    """

    def __init__(
        self, in_channels: int = 1, channels: int | None = None, layers: int = 8, kernel_size: int = 5, levels: int = 256, *,
        context_channels: int | None = None, shape: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, levels, shape)
        channels = self.width(channels, 64)
        self.config = {
            "in_channels": in_channels, "channels": channels, "layers": layers, "kernel_size": kernel_size, "levels": levels,
            "context_channels": context_channels, "shape": self.shape,
        }  # fmt: skip
        if layers < 1:
            raise ValueError(f"{type(self).__name__}: layers={layers}, expected at least 1")
        layer = self.layers.GatedMaskedConv2d
        colours: dict[str, Any] = dict(data_channels=in_channels)
        self.scale = causal.ScaleLevels(levels)
        self.first = layer(in_channels, channels, 7, mask_type="A", context_channels=context_channels, **colours)
        self.body = nn.ModuleList(
            layer(channels, channels, kernel_size, context_channels=context_channels, **colours) for _ in range(layers - 1)
        )
        conv = self.layers.MaskedConv2d
        self.hidden = conv(channels, channels, 1, mask_type="B", activation="relu", **colours)
        self.out = conv(channels, levels * in_channels, 1, mask_type="B", **colours)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.scale(x)
        v, h, skips = self.first(x, x, context)
        for layer in self.body:
            v, h, skip = layer(v, h, context)
            skips = skips + skip
        out: Tensor = self.out(self.hidden(F.relu(skips)))
        return out


class GatedResidual(nn.Module):
    """The residual block of PixelCNN++ (arXiv:1701.05517, section 2.5): conv, gate, and a short cut from ``aside``."""

    def __init__(self, conv: Any, channels: int, aside: int, dropout: float) -> None:
        super().__init__()
        self.elu = causal.ConcatELU()
        self.conv_in = conv(2 * channels, channels)
        self.short_cut = nn.Conv2d(2 * aside, channels, 1) if aside else None
        self.dropout = nn.Dropout2d(dropout)
        self.conv_out = conv(2 * channels, 2 * channels)

    def forward(self, x: Tensor, aside: Tensor | None = None) -> Tensor:
        h = self.conv_in(self.elu(x))
        if self.short_cut is not None:
            h = h + self.short_cut(self.elu(aside))
        h = self.conv_out(self.dropout(self.elu(h)))
        return x + F.glu(h, 1)


class PixelCNNPlusPlus(AutoregressiveModel):
    """PixelCNN++ (arXiv:1701.05517): two streams over three resolutions with short cuts, and a mixture of logistics.

    Args:
        in_channels: 1 or 3.
        filters: of both streams.
        blocks: residual blocks at each resolution of the way down; one more on the way up below the finest.
        mixtures: K logistics.
        levels: of a colour.
        dropout: in the blocks.
        shape: (C, H, W), what ``sample`` draws unless told otherwise; H and W are multiples of 4.

    Raises:
        ValueError: arguments that do not fit, by name.
    """

    head = "logistic_mixture"

    def __init__(
        self, in_channels: int = 3, filters: int = 80, blocks: int = 2, mixtures: int = 10, levels: int = 256, *,
        dropout: float = 0.0, shape: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(in_channels, levels, shape)
        name = type(self).__name__
        if in_channels not in (1, 3):
            raise ValueError(f"{name}: in_channels={in_channels}, expected 1 or 3")
        for label, value in (("filters", filters), ("blocks", blocks), ("mixtures", mixtures)):
            if value < 1:
                raise ValueError(f"{name}: {label}={value}, expected at least 1")
        self.config = {
            "in_channels": in_channels, "filters": filters, "blocks": blocks, "mixtures": mixtures, "levels": levels,
            "dropout": dropout, "shape": self.shape,
        }  # fmt: skip
        f = filters
        down, right = causal.DownShiftedConv2d, causal.DownRightShiftedConv2d
        self.scale, self.ones = causal.ScaleLevels(levels), causal.AppendOnes()
        self.one_down, self.one_right = causal.Shift(down=1), causal.Shift(right=1)
        self.first_v = down(in_channels + 1, f, (2, 3))
        self.first_h = nn.ModuleList([down(in_channels + 1, f, (1, 3)), right(in_channels + 1, f, (2, 1))])

        def stream(conv: Any, aside: Sequence[int]) -> nn.ModuleList:
            return nn.ModuleList(GatedResidual(conv, f, a, dropout) for a in aside)

        counts = [blocks, blocks + 1, blocks + 1]
        self.encode_v = nn.ModuleList(stream(down, [0] * blocks) for _ in range(3))
        self.encode_h = nn.ModuleList(stream(right, [f] * blocks) for _ in range(3))
        self.halve_v = nn.ModuleList(down(f, f, (2, 3), 2) for _ in range(2))
        self.halve_h = nn.ModuleList(right(f, f, (2, 2), 2) for _ in range(2))
        self.decode_v = nn.ModuleList(stream(down, [f] * k) for k in counts)
        self.decode_h = nn.ModuleList(stream(right, [2 * f] * k) for k in counts)
        self.double_v = nn.ModuleList(causal.DownShiftedConvTranspose2d(f, f) for _ in range(2))
        self.double_h = nn.ModuleList(causal.DownRightShiftedConvTranspose2d(f, f) for _ in range(2))
        self.out = nn.Conv2d(f, (10 if in_channels == 3 else 3) * mixtures, 1)

    def check(self, x: Tensor) -> Tensor:
        x = super().check(x)
        if x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(f"{type(self).__name__}: x has shape {tuple(x.shape)}, expected H and W that are multiples of 4")
        return x

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        causal.check_context(type(self).__name__, context, False)
        x = self.ones(self.scale(x))
        v = self.one_down(self.first_v(x))
        h = self.one_down(self.first_h[0](x)) + self.one_right(self.first_h[1](x))
        kept = [(v, h)]
        for level in range(3):
            for block_v, block_h in zip(self.encode_v[level], self.encode_h[level]):  # type: ignore[call-overload]
                v = block_v(v)
                h = block_h(h, v)
                kept.append((v, h))
            if level < 2:
                v, h = self.halve_v[level](v), self.halve_h[level](h)
                kept.append((v, h))
        v, h = kept.pop()
        for level in range(3):
            for block_v, block_h in zip(self.decode_v[level], self.decode_h[level]):  # type: ignore[call-overload]
                side_v, side_h = kept.pop()
                v = block_v(v, side_v)
                h = block_h(h, torch.cat((v, side_h), 1))
            if level < 2:
                v, h = self.double_v[level](v), self.double_h[level](h)
        out: Tensor = self.out(F.elu(h))
        return out


class WaveNet(AutoregressiveModel):
    """WaveNet (arXiv:1609.03499): dilated gated convolutions over a sequence of mu-law levels, residuals and skips.

    Args:
        levels: of the mu-law.
        residual, skip: channels.
        layers: per stack; layer i has dilation 2^i.
        stacks: repetitions.
        kernel_size: taps of a layer, all causal.
        context_channels: features of the condition (N, D) or (N, D, L), or None.
        shape: (1, L), what ``sample`` draws unless told otherwise.

    Raises:
        ValueError: arguments that do not fit, by name.
    """

    dims = 1

    def __init__(
        self, levels: int = 256, residual: int = 64, skip: int = 128, layers: int = 10, stacks: int = 2, kernel_size: int = 2,
        *, context_channels: int | None = None, shape: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(1, levels, shape)
        self.config = {
            "levels": levels, "residual": residual, "skip": skip, "layers": layers, "stacks": stacks,
            "kernel_size": kernel_size, "context_channels": context_channels, "shape": self.shape,
        }  # fmt: skip
        if layers < 1 or stacks < 1 or kernel_size < 2:
            raise ValueError(
                f"{type(self).__name__}: layers={layers}, stacks={stacks}, kernel_size={kernel_size}, expected at least 1, 1, 2"
            )
        conv, gate = self.layers.MaskedConv1d, self.layers.GatedActivation
        count, end = layers * stacks, (kernel_size - 1,)
        self.embed = causal.LevelEmbedding(levels, residual)
        self.first = conv(residual, residual, kernel_size, mask_type="A", center=end)
        self.dilated = nn.ModuleList(
            conv(residual, 2 * residual, kernel_size, dilation=2 ** (i % layers), mask_type="B", center=end)
            for i in range(count)
        )
        self.gate = gate()
        features = context_channels or 0
        self.conditions = nn.ModuleList(causal.ConditionBias(features, 2 * residual) for _ in range(count if features else 0))
        self.residuals = nn.ModuleList(nn.Conv1d(residual, residual, 1) for _ in range(count - 1))
        self.skips = nn.ModuleList(nn.Conv1d(residual, skip, 1) for _ in range(count))
        self.hidden, self.out = nn.Conv1d(skip, skip, 1), nn.Conv1d(skip, levels, 1)

    @property
    def receptive_field(self) -> int:
        """How many samples a prediction sees."""
        c = self.config
        back = (c["kernel_size"] - 1) * (1 + c["stacks"] * (2 ** c["layers"] - 1))
        return int(back)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        causal.check_context(type(self).__name__, context, len(self.conditions) > 0)
        h = self.first(self.embed(x))
        skips: Any = None
        for i, dilated in enumerate(self.dilated):
            z = dilated(h)
            z = self.gate(z, self.conditions[i](context)) if len(self.conditions) else self.gate(z)
            skips = self.skips[i](z) if skips is None else skips + self.skips[i](z)
            if i < len(self.residuals):
                h = h + self.residuals[i](z)
        out: Tensor = self.out(F.relu(self.hidden(F.relu(skips))))
        return out


def mu_law_encode(audio: Tensor, levels: int = 256) -> Tensor:
    """Audio in [-1, 1] to whole numbers in [0, levels) (ITU-T G.711; WaveNet, section 2.2)."""
    mu = levels - 1
    compressed = audio.sign() * torch.log1p(mu * audio.abs().clamp_max(1)) / math.log1p(mu)
    return ((compressed + 1) / 2 * mu + 0.5).floor().long()


def mu_law_decode(x: Tensor, levels: int = 256) -> Tensor:
    """The middle of each level of :func:`mu_law_encode`, in [-1, 1]."""
    mu = levels - 1
    y = 2 * x.double() / mu - 1
    return (y.sign() * ((1 + mu) ** y.abs() - 1) / mu).float()
