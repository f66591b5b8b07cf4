"""models.MAF."""

from __future__ import annotations

from typing import Literal

from ..nn.univariate import AffineMap
from .base_autoregressive_flow import Activation, AutoregressiveFlow, Hidden
from .base_flow import DiagonalGaussian


class MAF(AutoregressiveFlow):
    """Masked autoregressive flow: z_i = (x_i - mu_i) e^-alpha_i, mu and alpha functions of the x before i
    (arXiv:1705.07057).

    log_prob is one parallel pass; a sample costs about as much, since each hidden unit is computed once, in degree
    order.

    Args:
        dim: D; data are (N, D).
        transforms: how many; their orders alternate between first to last and last to first.
        hidden: units per layer of the masked networks, or a list of widths.
        depth: their hidden layers where ``hidden`` is one number.
        context: size of a conditioning vector; 0 for none.
        order: "alternating" or "random".
        norm: before each transform: "act" (:class:`genfast.nn.ActNorm`), "batch" (:class:`genfast.nn.BatchNormFlow`,
            the paper's, section 3.4) or None.
        scale: "softclamp" (alpha stays within log 1000), "exp" (the paper's: alpha as it is), "sigmoid" or "additive".
        residual: whether the masked networks are residual.
        activation: of :class:`genfast.nn.MADENetwork`.

    Example:
        >>> import torch, genfast
        >>> model = genfast.models.MAF(6, hidden=32, context=2)
        >>> x = model.sample(5, torch.randn(5, 2))
        >>> model.distribution(torch.zeros(2)).log_prob(x).shape
        torch.Size([5])
    """

    def __init__(
        self,
        dim: int,
        *,
        transforms: int = 5,
        hidden: Hidden = 256,
        depth: int = 2,
        context: int = 0,
        order: Literal["alternating", "random"] = "alternating",
        norm: Literal["act", "batch"] | None = "act",
        scale: Literal["exp", "softclamp", "sigmoid", "additive"] = "softclamp",
        residual: bool = False,
        activation: Activation = "relu",
    ) -> None:
        config = dict(
            dim=dim,
            transforms=transforms,
            hidden=hidden,
            depth=depth,
            context=context,
            order=order,
            norm=norm,
            scale=scale,
            residual=residual,
            activation=activation,
        )
        self.check_options(dim, transforms, order, norm)
        steps = []
        outputs = AffineMap(scale).outputs
        for i in range(transforms):
            steps += self.norms(dim, norm)
            network = self.made(dim, i, order, hidden, depth, outputs, context, residual, activation)
            steps.append(self.layers.MaskedAutoregressive(network, transform="affine", scale=scale))
        super().__init__(dim, DiagonalGaussian(dim, trainable=False), steps, config)
