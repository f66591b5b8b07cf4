"""nn.MaskedAutoregressive and nn.Inverse."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .._calls import changes_nothing, class_of
from .._compiler import uncompiled
from .._contents import ModuleContents
from .._derived import readable_module
from .._modes import evaluating
from ..programs import DegreeProgram, FlowBuilder, LoweringError, layers_of
from ..programs import self_check as checks
from .bijection import Bijection
from .flow_lowering import lower_map, lower_network
from .made import MADENetwork
from .univariate import AffineMap, Mapped, spline_options, univariate

_ENGINE_SCALES = {"exp": "exp", "softclamp": "softclamp", "sigmoid": "sigmoid2", "additive": "additive"}


class MaskedAutoregressive(Mapped, Bijection):
    """An autoregressive layer: z_i = f(x_i; theta_i), theta_i a function of the x before i, by a masked network.

    ``forward`` is one parallel pass. ``inverse`` goes through the network in the order of its degrees
    (:func:`genfast.ops.autoregressive_inverse`): each unit is computed once, so it costs about one pass too and not D
    of them. Both have gradients to x or z, the weights and the context. ``inverse_plain`` is the D passes.

    Args:
        network: a :class:`MADENetwork`, or any module with ``forward(x (N, D), context (N, K)) -> (N, D, P)`` of which
            output i sees only what comes before i in some order, and a method ``layers(context)``, its
            :class:`genfast.sampling.Layer`s. Without that method the inverse is ``inverse_plain``; so it is, with a
            warning, where hooks or a changed forward make a call of the network another function than its layers.
        transform: "affine", P = 2, the shift t then a (P = 1 for ``scale="additive"``), or "spline", P as
            :func:`genfast.ops.rational_quadratic_spline_packed` says.
        scale: s(a) of the affine one: "softclamp" log s = a / (1 + |a| / log 1000), "exp" e^a, "sigmoid" sigmoid(a +
            2), or "additive" s = 1.
        normalising: z = (x - t) / s, MAF's direction; False: z = s x + t, which zuko has and :class:`Inverse` makes IAF
            of.
        bins, tails, bound, convention, min_bin_width, min_bin_height, min_derivative, slope, logit_scale: of the
        spline, on
            [-bound, bound] (5 without).

    Raises:
        TypeError, ValueError: options of the other transform, a network with another number of outputs or of the wrong
            shape.

    Source: MAF (arXiv:1705.07057, section 3), Neural Spline Flows (arXiv:1906.04032, section 3).

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.MaskedAutoregressive(genfast.nn.MADENetwork(5, (16, 16), outputs=2))
        >>> z, logdet = layer(torch.randn(3, 5))
    """

    def __init__(self, network: nn.Module, *, transform: str = "affine", **options: Any) -> None:
        super().__init__()
        self.network = network
        self.map = univariate(transform, options)
        outputs = getattr(network, "outputs", self.map.outputs)
        if outputs != self.map.outputs:
            raise ValueError(
                f"MaskedAutoregressive: the network has outputs={outputs}, expected {self.map.outputs} for {self.map}"
            )
        self._program: DegreeProgram | None = None
        self._lowered: ModuleContents | None = (
            None  # what ``_program`` was made from: of a MADE, whose layers follow from that
        )
        self._proven: tuple[object, object] | None = None  # the program's code and the map that agreed with the network

    def __getstate__(self) -> dict[str, Any]:  # a copy lowers its own network
        return self.__dict__ | {"_program": None, "_lowered": None, "_proven": None}

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        params: Tensor = self.network(x) if context is None else self.network(x, context)
        if params.shape != (*x.shape, self.map.outputs):
            raise ValueError(
                f"MaskedAutoregressive: the network {type(self.network).__name__} returned {tuple(params.shape)} for "
                f"an input of {tuple(x.shape)}, expected {(*x.shape, self.map.outputs)}"
            )
        return params

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mapped(x, self._params(x, context), False)

    def add_steps(self, builder: FlowBuilder) -> None:
        """Adds the network and the map to a program."""
        params = lower_network(self.network, builder, builder.features, builder.context or None)
        builder.features = lower_map(self.map, builder, builder.features, params)

    def inverse_plain(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass of the whole network per feature: after pass k, the first k of the order are right."""
        x = torch.zeros_like(z)
        logdet = z.new_zeros(z.shape[0])
        for _ in range(z.shape[1]):
            x, logdet = self._mapped(z, self._params(x, context), True)
        return x, logdet

    def program(self, context: Tensor | None = None) -> DegreeProgram:
        """The network in the order of its degrees, lowered once.

        Raises:
            LoweringError: a call of the network is another function than its layers, by name.
        """
        layers = layers_of(self.network, context)
        self._program = DegreeProgram.build(layers) if self._program is None else self._program.update(layers)
        return self._program

    def _has_program(self) -> bool:
        """Not under a compiler that comes before the first call, and not where masks or weights cannot be read."""
        if not callable(getattr(type(self.network), "layers", None)):
            return False
        if torch.compiler.is_compiling():
            return self._program is not None
        return readable_module(self.network)

    def _unchanged_program(self) -> DegreeProgram | None:
        """The last program, where one walk over the network shows that it would be made again."""
        if (
            self._lowered is None
            or torch.compiler.is_compiling()
            or not changes_nothing(class_of(self), MaskedAutoregressive)
        ):
            return None
        return self._program if self._lowered.same(self.network) else None

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        program = self._unchanged_program() if context is None else None
        if program is None:
            if not self._has_program():
                return self.inverse_plain(z, context)
            try:
                if not changes_nothing(class_of(self), MaskedAutoregressive):
                    raise LoweringError(f"{type(self).__name__}: it overrides methods that its inverse does not call")
                program = self.program(context)
            except LoweringError as error:
                warnings.warn(f"MaskedAutoregressive: the inverse takes one pass for each input. {error}", stacklevel=2)
                return self.inverse_plain(z, context)
            if context is None and type(self.network) is MADENetwork and not torch.compiler.is_compiling():
                self._lowered = ModuleContents(self.network)
        result = self._solve(z, program)
        if (self._proven is None or self._proven[0] is not program.code or self._proven[1] != self.map) and z.numel():
            self._prove(z, context)
        return result

    def _solve(self, z: Tensor, program: DegreeProgram) -> tuple[Tensor, Tensor]:
        if isinstance(self.map, AffineMap):
            scale = f"affine:{_ENGINE_SCALES[self.map.scale]}"
            return ops.autoregressive_inverse(z, program, scale, flip=self.map.normalising, eps=0.0)
        return ops.autoregressive_inverse(z, program, "spline", bins=self.map.bins, **spline_options(self.map))

    @uncompiled("it compares numbers")
    def _prove(self, z: Tensor, context: Tensor | None) -> None:
        """The first time for a program, and for one with other masks, one row is put through the network itself."""
        if type(z) is not Tensor or not checks.can_look(z.device):
            return
        z, context = z[:1].detach(), None if context is None else context[:1].detach()
        with torch.inference_mode(False), checks.quietly(z.device), evaluating(self):
            z, context = z.clone(), None if context is None else context.clone()
            program = self.program(context)
            x, logdet = self._solve(z if z.dtype.itemsize > 2 else z.float(), program)

            def again(layer: MaskedAutoregressive, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
                own = z.dtype if dtype == x.dtype and layer is self else dtype
                params = layer._params(x.to(own), None if context is None else context.to(own))
                return layer._mapped(z.to(own), params, True)

            name = f"MaskedAutoregressive of a {type(self.network).__name__}"
            checks.check_row(
                name,
                self,
                x,
                logdet,
                again,
                lambda: checks.first_layer(self.network, program.layers, lambda: again(self, x.dtype), x.to(z.dtype)),
            )
        self._proven = program.code, self.map

    def extra_repr(self) -> str:
        return str(self.map)


class Inverse(Bijection):
    """A bijection the other way round: ``forward`` is its inverse, ``inverse`` its forward.

    Around a :class:`MaskedAutoregressive` it is an inverse autoregressive flow (IAF): sampling is the parallel pass.

    Source: IAF (arXiv:1606.04934, section 4).

    Example:
        >>> import torch, genfast
        >>> made = genfast.nn.MADENetwork(5, (16, 16), outputs=2)
        >>> iaf = genfast.nn.Inverse(genfast.nn.MaskedAutoregressive(made, normalising=False))
        >>> x, logdet = iaf.inverse(torch.randn(3, 5))
    """

    def __init__(self, bijection: nn.Module) -> None:
        if not callable(getattr(bijection, "inverse", None)):
            raise TypeError(f"Inverse: {type(bijection).__name__} has no inverse method")
        super().__init__()
        self.bijection: Any = bijection

    def forward(self, x: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        result: tuple[Any, Tensor] = self.bijection.inverse(x, context)
        return result

    def inverse(self, z: Any, context: Tensor | None = None) -> tuple[Any, Tensor]:
        result: tuple[Any, Tensor] = self.bijection(z, context)
        return result
