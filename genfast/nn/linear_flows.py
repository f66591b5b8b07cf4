"""nn.LULinear and nn.Householder: learned linear maps of the features with an inverse and a cheap log-determinant."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops, reference
from ..programs import FlowBuilder, LoweringError
from .bijection import Bijection
from .permutation import Permutation


class LULinear(Bijection):
    """z = P L (U + diag(e^log_s)) x + bias with a fixed permutation P: a full linear map that cannot become singular.

    Starts at z = x[:, order]. The matrix is made in one pass, and the bias is added in the product's own;
    :class:`InvertibleConv1x1` is the same for images, started from a rotation.

    Args:
        features: D; inputs are (N, D, ...).
        bias: whether there is one.
        order: of P, as in :class:`Permutation`; None for none.

    Source: Oliva et al. (arXiv:1801.09819, section 3.1), Neural Spline Flows (arXiv:1906.04032, section 3.3).

    Example:
        >>> import torch, genfast
        >>> z, logdet = genfast.nn.LULinear(5)(torch.randn(2, 5))
    """

    perm: Tensor
    sign_s: Tensor
    bias: nn.Parameter | None

    def __init__(self, features: int, *, bias: bool = True, order: str | Sequence[int] | Tensor | None = None) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"LULinear: features={features}, expected at least 1")
        self.features = features
        self.lower = nn.Parameter(torch.zeros(features, features))
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_s = nn.Parameter(torch.zeros(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        perm = torch.arange(features) if order is None else Permutation(features, order).order
        self.register_buffer("perm", perm)
        self.register_buffer("sign_s", torch.ones(features))

    def factors(self) -> ops.PLU:
        """What :func:`genfast.ops.invertible_conv1x1` takes as ``weight``."""
        return ops.PLU(self.perm, self.lower, self.upper, self.sign_s, self.log_s)

    def add_steps(self, builder: FlowBuilder) -> None:
        """Adds z = P (I + L) (U + diag(e^log_s)) x + bias to a program, triangle by triangle."""
        if not bool((self.sign_s == 1).all()):
            raise LoweringError("LULinear with a negative diagonal has no step of a flow program")
        triangle = torch.ones(self.features, self.features, dtype=torch.bool)
        x = builder.features
        x = builder.linear(self.upper, None, x, mask=triangle.triu(1), added=builder.scale(x, self.log_s, None))
        x = builder.linear(self.lower, None, x, mask=triangle.tril(-1), added=x)
        x = [x[i] for i in self.perm.tolist()]
        builder.features = x if self.bias is None else builder.scale(x, None, self.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.invertible_conv1x1(x, self.factors(), self.bias)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.invertible_conv1x1(z, self.factors(), self.bias, inverse=True)

    def extra_repr(self) -> str:
        return f"{self.features}, bias={self.bias is not None}"


class Householder(Bijection):
    """z = H_K ... H_1 x, a product of K reflections H = I - 2 v v^T / |v|^2: a learned rotation or reflection, logdet
    0.

    K = D reaches every orthogonal matrix. The product is taken as a whole, I - V^T S^-1 V with a triangular S of K x K
    numbers, so the batch is read once and not K times. A vector of zeros reflects nothing.

    Args:
        features: D; inputs are (N, D).
        reflections: K; D without.

    Source: Tomczak and Welling (arXiv:1611.09630, section 3); the product's form is that of Joffrain et al.
    (Accumulating Householder transformations, revisited, ACM TOMS 2006).

    Example:
        >>> import torch, genfast
        >>> z, logdet = genfast.nn.Householder(5)(torch.randn(2, 5))
    """

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__()
        count = features if reflections is None else reflections
        if features < 1 or count < 1:
            raise ValueError(f"Householder: features={features} and reflections={reflections}, expected at least 1")
        self.vectors = nn.Parameter(torch.randn(count, features))

    def matrix(self) -> Tensor:
        """Q (D, D) of z = Q x."""
        return reference.householder(self.vectors)

    def add_steps(self, builder: FlowBuilder) -> None:
        """Adds the product with the whole matrix to a program; a rotation adds nothing to the log-determinant."""
        builder.features = builder.linear(self.matrix, None, builder.features, units=self.vectors.shape[1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._product(x, self.matrix())

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._product(z, self.matrix().T)

    def _product(self, x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() != 2 or x.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"Householder: x has shape {tuple(x.shape)}, expected (N, {self.vectors.shape[1]})")
        return torch.nn.functional.linear(x, matrix), x.new_zeros(x.shape[0])

    def extra_repr(self) -> str:
        return f"{self.vectors.shape[1]}, reflections={self.vectors.shape[0]}"
