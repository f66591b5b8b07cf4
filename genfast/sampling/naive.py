"""The standard loop of sampling, one forward pass per pixel and colour, and what it draws by."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._modes import evaluating
from ..reference import discretized_logistic_mixture_sample


def draw_categorical(logits: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
    """The smallest level whose cumulative probability exceeds the uniform number; logits (..., levels), uniforms
    (...)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp().double()
    sums = weight.cumsum(-1)
    return (sums <= uniforms.double()[..., None] * sums[..., -1:]).sum(-1).clamp_max(logits.shape[-1] - 1)


def drawable(params: Tensor, colours: int, head: str) -> Tensor:
    """Whether there is something to draw, (N,), of the logits (N, levels) of a colour or the parameters (N, P) of a
    mixture.

    A logit of minus infinity forbids its level or component; NaN, plus infinity and logits that forbid all have no
    meaning.
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
        f"{name}: the network's {what} of {where} at position {tuple(position)} are not finite (a NaN, an infinity, "
        "or every level forbidden by a logit of -inf)"
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
    """Of logits (N, levels * C, ...) those of one colour, (N, levels, ...): they lie level by level, or colour by
    colour where the network's colours are "blocked"."""
    blocked = group_order == "blocked"
    parts: Tensor = logits.unflatten(1, (colours, levels) if blocked else (levels, colours))
    return parts[:, colour] if blocked else parts[:, :, colour]


@torch.no_grad()
def naive_sample(
    network: Callable[..., Any],
    images: Tensor,
    uniforms: Tensor,
    given: int,
    *,
    levels: int,
    head: str,
    context: Tensor | None = None,
    temperature: float = 1.0,
    progress: bool = False,
    group_order: str = "interleaved",
) -> Tensor:
    """The standard loop: one forward pass over the whole image per pixel and colour. Fills ``images`` from row
    ``given``.

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
                        drawn = discretized_logistic_mixture_sample(
                            here[..., None], u[..., None], colours, levels, temperature
                        )
                        images[(every, every, *at)] = drawn[..., 0].clamp_min(0)  # -1 where there is nothing to draw
                    fits[(*rest, k)] = drawable(params, colours, head)
            if not bool(fits.all()):
                *place, colour, image = (~fits).nonzero()[0].tolist()
                raise not_drawable("sample", head, image, colour, (row, *place))
    return images
