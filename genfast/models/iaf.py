"""models.IAF."""

from __future__ import annotations

from typing import Literal

from ..nn.univariate import AffineMap
from .base_autoregressive_flow import Activation, AutoregressiveFlow, Hidden
from .base_flow import DiagonalGaussian


class IAF(AutoregressiveFlow):
    """Inverse autoregressive flow: x_i = s_i z_i + m_i, (s_i, m_i) a function of the z before i (arXiv:1606.04934).

    A sample and its log_prob are one parallel pass (``sample_and_log_prob``, for variational inference); log_prob of
    given data goes through the degree-ordered inverse. Both have gradients.

    Args:
        dim, transforms, hidden, depth, context, order, residual, activation: as in :class:`MAF`.
        norm: None, as reverse-KL training has no data to start "act" from; "act" for training on data.
        scale: s = e^alpha with "softclamp" or "exp"; "sigmoid": s = sigmoid(alpha + 2), a gate as the paper's
            (algorithm 1), open at the start.

    Example:
        >>> import torch, genfast
        >>> x, log_prob = genfast.models.IAF(6, hidden=32).sample_and_log_prob(5)
        >>> (log_prob + 0.5 * x.square().sum(1)).mean().backward()  # a step of the reverse KL to a normal density
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
        norm: Literal["act", "batch"] | None = None,
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
        if norm == "batch":
            raise ValueError("IAF: norm='batch' has no inverse in training, which sampling is; expected 'act' or None")
        steps = []
        outputs = AffineMap(scale).outputs
        for i in range(transforms):
            steps += self.norms(dim, norm)
            network = self.made(dim, i, order, hidden, depth, outputs, context, residual, activation)
            inner = self.layers.MaskedAutoregressive(network, transform="affine", scale=scale, normalising=False)
            steps.append(self.layers.Inverse(inner))
        super().__init__(dim, DiagonalGaussian(dim, trainable=False), steps, config)
