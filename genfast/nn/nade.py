"""nn.NADE and nn.DeepNADE: the layers of the neural autoregressive distribution estimators."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..reference.nade import NADE as PlainNADE
from ..reference.nade import DeepNADE as PlainDeepNADE


class NADE(PlainNADE):
    """The conditionals of a NADE, through :func:`genfast.ops.nade`: parameters of p(x_d | those before d) for each d.

    Args:
        features: D.
        hidden: H units, shared by all steps.
        outputs: P parameters of a conditional: 1 logit, a logit a level, or 3 K of a mixture of Gaussians.
        activation: "sigmoid", "relu" or "tanh".
        rescale: whether step d multiplies the hidden layer's input by a number rho_d, as RNADE does; it begins at d^(-1/2).
        order: the degree of each input, 1 to D, each once: None or "natural", "reversed", "random" or integers.
        context: K features of a condition, 0 for none; ``Linear(K, H, bias=False)`` adds to the hidden bias.
        generator: of a random order.

    ``forward(x, context=None)`` maps (N, D) and (N, K) to (N, D, P). ``sample(uniforms, kind)`` draws in one pass; ``given``
    and ``known`` hold what is to stay. Rows of the weights are in the order of the steps: ``order.argsort()`` names their features.

    Raises:
        ValueError: arguments that do not fit, by name.

    Source: Larochelle, Murray 2011 (PMLR 15); Uria, Murray, Larochelle 2013 (arXiv:1306.0186).

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.NADE(8, 32)
        >>> logits, x = layer(torch.ones(2, 8)), layer.sample(torch.rand(5, 8, 1))
    """

    def _parameters_of(self, x: Tensor, hidden_bias: Tensor) -> Tensor:
        return ops.nade(x, self.weight, self.readout, self.bias, hidden_bias, rescale=self.rescale, activation=self.activation)

    def _samples_of(
        self, uniforms: Tensor, readout: Tensor, bias: Tensor, hidden_bias: Tensor, given: Tensor | None, known: Tensor | None,
        kind: str,
    ) -> Tensor:  # fmt: skip
        return ops.nade_sample(
            uniforms, self.weight, readout, bias, hidden_bias, rescale=self.rescale, activation=self.activation, kind=kind,
            given=given, known=known,
        )  # fmt: skip


class DeepNADE(PlainDeepNADE):
    """One network for every order (DeepNADE): from [x m, m], m the mask of what is known, to parameters of all the rest.

    Args:
        features: D.
        hidden: widths of the hidden layers.
        outputs: P parameters of a conditional.
        activation: "sigmoid", "relu" or "tanh".
        context: K features of a condition, 0 for none.

    ``forward(x, mask, context=None)`` gives (N, D, P). For one feature after the other, ``first``, ``learn`` and
    ``conditional`` keep the first layer's pre-activation, to which a step adds one feature. The products are the library's.

    Raises:
        ValueError: arguments that do not fit, by name.

    Source: Uria, Murray, Larochelle 2014 (arXiv:1310.1757, section 3).

    Example:
        >>> import torch, genfast
        >>> net = genfast.nn.DeepNADE(8, (32, 32))
        >>> logits = net(torch.ones(2, 8), torch.arange(8).expand(2, 8) < 3)
    """
