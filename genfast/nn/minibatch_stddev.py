"""nn.MinibatchStddev."""

from __future__ import annotations

from torch import Tensor, nn

from .. import ops


class MinibatchStddev(nn.Module):
    """The standard deviation over groups of the batch as more channels, through :func:`genfast.ops.minibatch_stddev`.

    It couples samples: a gradient penalty of a critic with this layer is exact for the critic's summed output, and no
        longer
    speaks of each sample alone. Over several processes a group is of one rank's samples.

    Args:
        group_size: samples of a group at most; None for the whole batch.
        features: how many channels are added.
        eps: added to the variance.

    Raises:
        ValueError: sizes below 1; in ``forward`` what the op raises.

    Example:
        >>> import torch, genfast
        >>> genfast.nn.MinibatchStddev()(torch.randn(8, 16, 4, 4)).shape
        torch.Size([8, 17, 4, 4])
    """

    def __init__(self, group_size: int | None = 4, features: int = 1, *, eps: float = 1e-8) -> None:
        super().__init__()
        if features < 1 or (group_size is not None and group_size < 1):
            raise ValueError(f"MinibatchStddev: group_size={group_size}, features={features}, expected at least 1 each")
        self.group_size = group_size
        self.features = features
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.minibatch_stddev(x, group_size=self.group_size, features=self.features, eps=self.eps)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}, features={self.features}"
