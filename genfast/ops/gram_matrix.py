"""ops.gram_matrix and ops.style_loss: one triangle of each Gram matrix computed, the rest its mirror."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _allocator, _backend, reference
from .._native import kernels
from .._registry import Backward, Op, Sample
from .._tensors import accumulator
from . import _check, _layout

_CPU = kernels(
    "_cpu",
    gram_matrix="is_double channels_last x target target_stride out value scale shift factor n c s threads",
    gram_matrix_backward="is_double channels_last symmetrize x matrix grad out scale shift n c s threads",
)
_DTYPES = {**_backend.DTYPES, "cpu": _backend.DTYPES["reference"]}  # half types are converted for the C++ kernels


def _check_features(op: str, features: Tensor) -> None:
    if features.dim() < 3:
        raise ValueError(f"{op}: features has shape {tuple(features.shape)}, expected (N, C, L) or (N, C, H, W)")


def _check_matrix(op: str, name: str, matrix: Tensor, features: Tensor, may_broadcast: bool = False) -> None:
    n, c = features.shape[:2]
    if tuple(matrix.shape) != (n, c, c) and not (may_broadcast and tuple(matrix.shape) == (1, c, c)):
        batch = f"{n} or 1" if may_broadcast else n
        raise ValueError(
            f"{op}: {name} has shape {tuple(matrix.shape)}, expected ({batch}, {c}, {c}) for features of shape "
            f"{tuple(features.shape)}"
        )


def _check_gram(features: Tensor, scale: float, shift: float) -> None:
    _check.floating("gram_matrix", features=features)
    _check_features("gram_matrix", features)


def _check_gram_backward(features: Tensor, grad: Tensor, scale: float, shift: float) -> None:
    _check.floating("gram_matrix_backward", features=features, grad=grad)
    _check_features("gram_matrix_backward", features)
    _check_matrix("gram_matrix_backward", "grad", grad, features)


def _check_style(features: Tensor, target: Tensor, scale: float, shift: float, factor: float) -> None:
    _check.floating("style_loss", features=features, target=target)
    _check_features("style_loss", features)
    _check_matrix("style_loss", "target", target, features, True)


def _check_layers(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    scales: Sequence[float],
    shift: float,
    factors: Sequence[float],
) -> None:
    counts = [len(features), len(targets), len(scales), len(factors)]
    if not features or len(set(counts)) > 1:
        raise ValueError(
            f"style_loss_layers: {counts} features, targets, scales and factors; expected one of each a layer"
        )
    for f, a, scale, factor in zip(features, targets, scales, factors):
        _check_style(f, a, scale, shift, factor)
        if f.dtype != features[0].dtype or f.device != features[0].device or f.shape[0] != features[0].shape[0]:
            raise ValueError(
                f"style_loss_layers: features have {f.dtype} on {f.device} in batches of {f.shape[0]} and "
                f"{features[0].dtype} on {features[0].device} in batches of {features[0].shape[0]}; expected the same "
                "in each layer"
            )


def _check_style_backward(
    features: Tensor, grad: Tensor, difference: Tensor, scale: float, shift: float, factor: float
) -> None:
    _check.floating("style_loss_backward", features=features, grad=grad, difference=difference)
    _check_features("style_loss_backward", features)
    _check_matrix("style_loss_backward", "difference", difference, features)
    _check.shape("style_loss_backward", "grad", grad, (features.shape[0],), "one a sample")


def _fake_layers(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    scales: Sequence[float],
    shift: float,
    factors: Sequence[float],
) -> tuple[Tensor, Tensor]:
    n, dtype = features[0].shape[0], accumulator(features[0].dtype)
    entries = sum(n * f.shape[1] * f.shape[1] for f in features)
    return features[0].new_empty((len(features), n), dtype=dtype), features[0].new_empty(entries, dtype=dtype)


def _forward(
    features: Tensor, target: Tensor | None, scale: float, shift: float, factor: float
) -> tuple[Tensor | None, Tensor]:
    x, at = _layout.laid_out(features.to(accumulator(features.dtype)))
    c = at.c
    a = None if target is None else target.to(x.dtype).contiguous()
    value = None if a is None else x.new_empty(at.n)
    out = _allocator.empty_strided((at.n, c, c), (c * c, c, 1), x.dtype)
    _CPU.gram_matrix(
        is_double=x.dtype is torch.float64,
        x=at.view(x),
        target=a,
        target_stride=0 if a is None or a.shape[0] == 1 else c * c,
        out=out,
        value=value,
        scale=scale,
        shift=shift,
        factor=factor,
        n=at.n,
        c=c,
        s=at.s,
        channels_last=at.walks_channels,
        threads=torch.get_num_threads(),
    )
    return value, out


def _product(
    features: Tensor, matrix: Tensor, grad: Tensor | None, symmetrize: bool, scale: float, shift: float
) -> Tensor:
    x, at = _layout.laid_out(features.to(accumulator(features.dtype)))
    m, g = matrix.to(x.dtype).contiguous(), None if grad is None else grad.to(x.dtype).contiguous()
    out = at.empty_like(x)
    if out.numel():
        _CPU.gram_matrix_backward(
            is_double=x.dtype is torch.float64,
            symmetrize=symmetrize,
            x=at.view(x),
            matrix=m,
            grad=g,
            out=out,
            scale=scale,
            shift=shift,
            n=at.n,
            c=at.c,
            s=at.s,
            channels_last=at.walks_channels,
            threads=torch.get_num_threads(),
        )
    return out.to(features.dtype)


def _cpu_gram(features: Tensor, scale: float, shift: float) -> Tensor:
    _check_gram(features, scale, shift)
    return _forward(features, None, scale, shift, 1.0)[1]


def _cpu_gram_backward(features: Tensor, grad: Tensor, scale: float, shift: float) -> Tensor:
    _check_gram_backward(features, grad, scale, shift)
    return _product(features, grad, None, True, scale, shift)


def _cpu_style(features: Tensor, target: Tensor, scale: float, shift: float, factor: float) -> tuple[Tensor, Tensor]:
    _check_style(features, target, scale, shift, factor)
    value, difference = _forward(features, target, scale, shift, factor)
    assert value is not None
    return value, difference


def _cpu_style_backward(
    features: Tensor, grad: Tensor, difference: Tensor, scale: float, shift: float, factor: float
) -> Tensor:
    _check_style_backward(features, grad, difference, scale, shift, factor)
    return _product(features, difference, grad, False, 4 * factor * scale, shift)


def _setup_style(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, target, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    # The target itself is needed for its own gradient only: the difference does for that of the features.
    ctx.save_for_backward(features, output[1], target if ctx.needs_input_grad[1] else None)
    ctx.target = target.shape, target.dtype


def _backward_style(ctx: Any, grad: Tensor | None, grad_difference: Tensor | None) -> tuple[Any, ...]:
    features, difference, target = ctx.saved_tensors
    found = _gradients(
        features, difference, target, grad, grad_difference, ctx.options, ctx.target, ctx.needs_input_grad[:2]
    )
    return *found, None, None, None


def _gradients(
    features: Tensor,
    difference: Tensor,
    target: Tensor | None,
    grad: Tensor | None,
    grad_difference: Tensor | None,
    options: Sequence[float],
    kind: tuple[torch.Size, torch.dtype],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of a layer's features and target, the latter of shape and dtype ``kind``."""
    scale, shift, factor = options
    of_features = of_target = None
    if needs[0]:
        if grad is not None:
            of_features = OP_STYLE_BACKWARD(features, grad, difference, scale, shift, factor)
        if grad_difference is not None:  # of a second derivative
            more = OP.backward_op(features, grad_difference, scale, shift)
            of_features = more if of_features is None else of_features + more
    if needs[1]:
        assert target is not None
        shape, dtype = kind
        a = target.to(difference.dtype)
        of_target = torch.zeros_like(difference)
        if grad is not None:  # G - A, and not its symmetric part, which is kept
            of_target = -2 * factor * grad[:, None, None] * (difference + (a.mT - a) / 2)
        if grad_difference is not None:
            of_target = of_target - (grad_difference + grad_difference.mT) / 2
        of_target = of_target.sum_to_size(shape).to(dtype)
    return of_features, of_target


def _setup_layers(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, targets, ctx.scales, ctx.shift, ctx.factors = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1], *features, *(a if a.requires_grad else None for a in targets))
    ctx.targets = [(a.shape, a.dtype) for a in targets]


def _backward_layers(ctx: Any, grad: Tensor | None, grad_differences: Tensor | None) -> tuple[Any, ...]:
    count = len(ctx.scales)
    differences, *rest = ctx.saved_tensors
    features, targets = rest[:count], rest[count:]
    shapes = [(f.shape[0], f.shape[1], f.shape[1]) for f in features]

    def by_layer(flat: Tensor | None) -> list[Any]:
        if flat is None:
            return [None] * count
        return [t.reshape(s) for t, s in zip(flat.split([math.prod(s) for s in shapes]), shapes)]

    grads = [None] * count if grad is None else grad.contiguous().unbind()
    found = [
        _gradients(f, d, a, g, more, (scale, ctx.shift, factor), kind, needs)
        for f, d, a, g, more, scale, factor, kind, needs in zip(
            features,
            by_layer(differences),
            targets,
            grads,
            by_layer(grad_differences),
            ctx.scales,
            ctx.factors,
            ctx.targets,
            zip(*ctx.needs_input_grad[:2]),
        )
    ]
    return [f for f, _ in found], [a for _, a in found], None, None, None


def _samples_gram(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, scale, shift in (
        ("images", (2, 5, 4, 3), 1 / 60, 0.0),
        ("shifted", (2, 7, 3, 3), 0.3, -1.5),
        ("sequence", (3, 4, 9), 1.0, 0.0),
        ("volume", (1, 3, 2, 3, 2), 1.0, 0.5),
        ("one channel", (2, 1, 3, 4), 1.0, 0.0),
        ("one position", (2, 6, 1, 1), 1.0, 0.0),
        ("whole and broken tiles", (1, 67, 5, 3), 1 / 64, 0.0),
    ):
        yield Sample(label, (torch.randn(shape, generator=generator, dtype=torch.float64), scale, shift))


def _samples_style(generator: torch.Generator) -> Iterator[Sample]:
    for label, shape, batch, shift in (
        ("images", (2, 5, 4, 3), 2, 0.0),
        ("one target for all, shifted", (3, 4, 3, 3), 1, 0.7),
        ("sequence", (2, 3, 9), 2, 0.0),
        ("whole and broken tiles", (1, 67, 5, 3), 1, 0.0),
    ):
        c = shape[1]
        features = torch.randn(shape, generator=generator, dtype=torch.float64)
        target = torch.randn((batch, c, c), generator=generator, dtype=torch.float64)  # of no symmetry
        yield Sample(label, (features, target, 0.25, shift, 1 / c))


def _samples_layers(generator: torch.Generator) -> Iterator[Sample]:
    for label, shapes, batch, shift in (
        ("images", ((2, 5, 4, 3), (2, 3, 6, 5)), 2, 0.0),
        ("one channel, one target for all, shifted", ((2, 1, 3), (2, 4, 3, 3)), 1, 0.7),
        ("whole and broken tiles", ((1, 67, 5, 3), (1, 2, 40, 5), (1, 3, 2, 2)), 1, 0.0),
    ):
        features = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        targets = [torch.randn((batch, s[1], s[1]), generator=generator, dtype=torch.float64) for s in shapes]
        yield Sample(label, (features, targets, [1 / s[1] for s in shapes], shift, [0.25 + 0.5 * s[1] for s in shapes]))


OP = Op(
    "gram_matrix(Tensor features, float scale, float shift)",
    reference=reference.gram_matrix,
    outputs={"gram": "(N, C, C) like features as accumulator"},
    check=_check_gram,
    kernels={"cpu": _cpu_gram, "triton": "gram_matrix"},
    backward=Backward(
        "features, grad, scale, shift -> features",
        reference=reference.gram_matrix_backward,
        check=_check_gram_backward,
        check_before_kernels=False,
        kernels={"cpu": _cpu_gram_backward, "triton": "gram_matrix"},
    ),
    samples=_samples_gram,
    dtypes=_DTYPES,
)

OP_STYLE_BACKWARD = Op(
    "style_loss_backward(Tensor features, Tensor grad, Tensor difference, float scale, float shift, float factor)",
    reference=reference.style_loss_backward,
    outputs={"features": "like features"},
    check=_check_style_backward,
    kernels={"cpu": _cpu_style_backward, "triton": "gram_matrix"},
    dtypes=_DTYPES,
)

OP_STYLE = Op(
    "style_loss(Tensor features, Tensor target, float scale, float shift, float factor)",
    reference=reference.style_loss,
    outputs={"value": "(N,) like features as accumulator", "difference": "(N, C, C) like features as accumulator"},
    check=_check_style,
    kernels={"cpu": _cpu_style, "triton": "gram_matrix"},
    setup_context=_setup_style,
    backward=_backward_style,
    samples=_samples_style,
    dtypes=_DTYPES,
)

# No kernel for the CPU, where a launch costs nothing to share.
OP_LAYERS = Op(
    "style_loss_layers(Tensor[] features, Tensor[] targets, float[] scales, float shift, float[] factors) -> (Tensor, "
    "Tensor)",
    reference=reference.style_loss_layers,
    check=_check_layers,
    fake=_fake_layers,
    kernels={"triton": "gram_matrix"},
    setup_context=_setup_layers,
    backward=_backward_layers,
    samples=_samples_layers,
)


def _together(layers: Sequence[Tensor]) -> bool:
    """Whether these layers, of one batch, are to share their launches."""
    first = layers[0]
    if len(layers) < 2 or first.dtype is torch.float64 or _backend.forced not in (None, "triton"):
        return False
    return (first.is_cuda or _backend.forced is not None) and all(
        f.dtype == first.dtype and f.device == first.device for f in layers
    )


def _scale(features: Tensor, normalize: bool) -> float:
    return 1.0 / max(1, math.prod(features.shape[1:])) if normalize else 1.0


def gram_matrix(features: Tensor, *, normalize: bool = True, shift: float = 0.0) -> Tensor:
    """Gram matrices of a batch of feature maps: G = (F + shift)(F + shift)^T, F the C rows of positions of a sample.

    One triangle is computed and mirrored, so that G is symmetric to the bit; it is scaled before it is rounded, so half
    types do not overflow. Differentiable to any order; the first derivative, (dG + dG^T)(F + shift), is one product.

    Args:
        features: (N, C, H, W) or (N, C, L), floating point, one or more axes of positions, any strides.
        normalize: divides by C * H * W, as Johnson et al. do; without, G is the plain sum.
        shift: added to each feature first (Novak & Nikulin, arXiv:1605.04603, who use -1).

    Returns:
        (N, C, C): float32 for half types, else the dtype of features.

    Raises:
        TypeError, ValueError: features that are not floating point, or have fewer than three axes.

    Source: Gatys et al. (arXiv:1508.06576, section 2); Johnson et al. (arXiv:1603.08155, section 3.2).

    Example:
        >>> import torch, genfast
        >>> genfast.ops.gram_matrix(torch.ones(1, 2, 4, 4))
        tensor([[[0.5000, 0.5000],
                 [0.5000, 0.5000]]])
    """
    _check_gram(features, 1.0, shift)
    result: Tensor = OP(features, _scale(features, normalize), shift)
    return result


def style_loss(
    features: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
    shift: float = 0.0,
    targets_are: str = "gram",
    reduction: str = "mean",
) -> Tensor:
    """The style loss: sum over layers of weight times the mean of (G - A)^2 over the C x C entries and the batch.

    The difference and its square are taken where the Gram matrix is mirrored, and the derivative of a layer is one
    product. On a GPU layers of one dtype, half or float32, share the forward's two kernel launches.
    A target's Gram matrix is computed once, by :func:`gram_matrix` with the same ``normalize`` and ``shift``, and kept.

    The published variants, with G and A plain sums (``normalize=False``) unless told, for N maps of M positions:

    - piq.StyleLoss: the default weights, ``normalize=False``.
    - Gatys et al., 1 / (4 N^2 M^2) sum of squares: ``normalize=False`` and weight 1 / (4 M^2), as the mean divides by
        N^2; the
      same is ``normalize=True`` and weight N^2 / 4.
    - Johnson et al., squared Frobenius norm of matrices divided by C H W: ``normalize=True`` and weight C^2.
    - PyTorch's fast_neural_style: ``normalize=True``, and its style weight.

    Args:
        features: (N, C, H, W) or (N, C, L), or a sequence of them, one a layer.
        targets: for each layer (N, C, C) or (1, C, C), Gram matrices; with ``targets_are="features"`` feature maps of N
            or 1 samples and any size. Gradients flow to targets that require them.
        weights: one a layer; None for 1 each.
        normalize, shift: as in :func:`gram_matrix`.
        targets_are: "gram" or "features".
        reduction: "mean" over the batch, or "none" for one value a sample.

    Returns:
        A scalar, or (N,) without reduction; float32 for half types. An empty batch has loss 0.

    Raises:
        TypeError, ValueError: arguments that do not fit, by name.

    Source: Gatys et al. (arXiv:1508.06576, section 2).

    Example:
        >>> import torch, genfast
        >>> target = genfast.ops.gram_matrix(torch.ones(1, 2, 4, 4))
        >>> genfast.ops.style_loss(torch.zeros(1, 2, 8, 8), target)
        tensor(0.2500)
    """
    _check.choice("style_loss", "targets_are", targets_are, ("gram", "features"))
    _check.choice("style_loss", "reduction", reduction, ("mean", "none"))
    for name, maps in (("features", features), ("targets", targets)):
        if not isinstance(maps, (Tensor, Sequence)) or isinstance(maps, str):
            raise TypeError(
                f"style_loss: {name} is a {type(maps).__name__}, expected a torch.Tensor or a sequence of them"
            )
    layers = [features] if isinstance(features, Tensor) else list(features)
    given = [targets] if isinstance(targets, Tensor) else list(targets)
    if not layers:
        raise ValueError("style_loss: features is an empty sequence, expected a tensor a layer")
    if len(given) != len(layers):
        raise ValueError(f"style_loss: {len(given)} targets for {len(layers)} layers of features; expected one each")
    if weights is not None and len(weights) != len(layers):
        raise ValueError(f"style_loss: {len(weights)} weights for {len(layers)} layers of features; expected one each")
    batch, scales, factors = None, [], []
    for i, (f, a) in enumerate(zip(layers, given)):
        _check.tensors("style_loss", features=f, targets=a)
        _check.floating("style_loss", features=f, targets=a)
        _check_features("style_loss", f)
        if targets_are == "features":
            _check_features("style_loss", a)
            given[i] = gram_matrix(a, normalize=normalize, shift=shift)
        n, c = f.shape[:2]
        if batch not in (None, n):
            raise ValueError(f"style_loss: features have batches of {batch} and {n}; expected the same in each layer")
        batch = n
        factor = (1.0 if weights is None else weights[i]) / max(1, c * c)
        factors.append(factor / max(1, n) if reduction == "mean" else factor)
        scales.append(_scale(f, normalize))
    if _together(layers):
        values: Tensor = OP_LAYERS(layers, given, scales, shift, factors)[0]
        return values.sum() if reduction == "mean" else values.sum(0)
    total: Tensor | None = None
    for f, a, scale, factor in zip(layers, given, scales, factors):
        value: Tensor = OP_STYLE(f, a, scale, shift, factor)[0]
        total = value if total is None else total + value
    assert total is not None
    return total.sum() if reduction == "mean" else total
