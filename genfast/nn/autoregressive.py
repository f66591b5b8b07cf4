"""nn.MaskedAutoregressive and nn.Inverse."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .._derived import readable
from ..reference import autoregressive_flows as plain
from .bijection import Bijection
from .univariate import Fast, spline_options

if TYPE_CHECKING:
    from ..sampling import DegreeProgram

_ENGINE_SCALES = {"exp": "exp", "softclamp": "softclamp", "sigmoid": "sigmoid2", "additive": "additive"}


class MaskedAutoregressive(Fast, plain.MaskedAutoregressive, Bijection):
    """An autoregressive layer: z_i = f(x_i; theta_i), theta_i a function of the x before i, by a masked network.

    ``forward`` is one parallel pass. ``inverse`` goes through the network in the order of its degrees
    (:func:`genfast.ops.autoregressive_inverse`): each unit is computed once, so it costs about one pass too and not D of them.
    Both have gradients to x or z, the weights and the context. ``inverse_plain`` is the D passes.

    Args:
        network: a :class:`MADE`, or any module with ``forward(x (N, D), context (N, K)) -> (N, D, P)`` of which output i sees
            only what comes before i in some order, and ``layers(context)``, its :class:`genfast.sampling.Layer`s; without
            ``layers`` the inverse is ``inverse_plain``.
        transform: "affine", P = 2, the shift t then a (P = 1 for ``scale="additive"``), or "spline", P as
            :func:`genfast.ops.rational_quadratic_spline_packed` says.
        scale: s(a) of the affine one: "softclamp" log s = a / (1 + |a| / log 1000), "exp" e^a, "sigmoid" sigmoid(a + 2), or
            "additive" s = 1.
        normalising: z = (x - t) / s, MAF's direction; False: z = s x + t, which zuko has and :class:`Inverse` makes IAF of.
        bins, tails, bound, convention, min_bin_width, min_bin_height, min_derivative, slope, logit_scale: of the spline, on
            [-bound, bound] (5 without).

    Raises:
        TypeError, ValueError: options of the other transform, a network with another number of outputs or of the wrong shape.

    Source: MAF (arXiv:1705.07057, section 3), Neural Spline Flows (arXiv:1906.04032, section 3).

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.MaskedAutoregressive(genfast.nn.MADE(5, (16, 16), outputs=2))
        >>> z, logdet = layer(torch.randn(3, 5))
    """

    def __init__(self, network: nn.Module, *, transform: str = "affine", **options: Any) -> None:
        super().__init__(network, transform=transform, **options)
        self._program: DegreeProgram | None = None

    def __getstate__(self) -> dict[str, Any]:  # a copy lowers its own network
        return self.__dict__ | {"_program": None}

    def program(self, context: Tensor | None = None) -> DegreeProgram:
        """The network in the order of its degrees, lowered once."""
        from ..sampling import DegreeProgram  # which knows our modules

        layers = self.network.layers(context)  # type: ignore[operator]
        self._program = DegreeProgram.build(layers) if self._program is None else self._program.update(layers)
        return self._program

    def _has_program(self) -> bool:
        """Not under a compiler that comes before the first call, and not where masks or weights cannot be read."""
        if not hasattr(self.network, "layers"):
            return False
        if torch.compiler.is_compiling():
            return self._program is not None
        return readable(*self.network.parameters(), *self.network.buffers())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self._has_program():
            return self.inverse_plain(z, context)
        program = self.program(context)
        if isinstance(self.map, plain.AffineMap):
            scale = f"affine:{_ENGINE_SCALES[self.map.scale]}"
            return ops.autoregressive_inverse(z, program, scale, flip=self.map.normalising, eps=0.0)
        return ops.autoregressive_inverse(z, program, "spline", bins=self.map.bins, **spline_options(self.map))

    def extra_repr(self) -> str:
        return str(self.map)


class Inverse(plain.Inverse, Bijection):
    """A bijection the other way round: ``forward`` is its inverse, ``inverse`` its forward.

    Around a :class:`MaskedAutoregressive` it is an inverse autoregressive flow (IAF): sampling is the parallel pass.

    Source: IAF (arXiv:1606.04934, section 4).

    Example:
        >>> import torch, genfast
        >>> made = genfast.nn.MADE(5, (16, 16), outputs=2)
        >>> iaf = genfast.nn.Inverse(genfast.nn.MaskedAutoregressive(made, normalising=False))
        >>> x, logdet = iaf.inverse(torch.randn(3, 5))
    """

    def __init__(self, bijection: nn.Module) -> None:
        if not callable(getattr(bijection, "inverse", None)):
            raise TypeError(f"Inverse: {type(bijection).__name__} has no inverse method")
        super().__init__(bijection)
