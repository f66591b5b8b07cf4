"""models.RealNVP."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.flow_lowering import lower
from ..programs import FlowBuilder, LoweringError
from .base_flow import DiagonalGaussian, FlowModel, latent_parts
from .conditioners import MLP, ResNet


class RealNVP(FlowModel):
    """Affine couplings with a learned tanh scale (arXiv:1605.08803), on vectors or on images.

    Vectors: couplings that transform the two halves in turn, activation norms between. Images: per level three
    checkerboard couplings, squeeze, three channel couplings, and half of the channels factored out; four checkerboard
    couplings at the end (section 3.6). Activation norm stands in for the paper's batch norm, so that a sample's density
    does not depend on its batch.

    Args:
        shape: D, or (C, H, W) with H and W multiples of 2^levels.
        couplings: on vectors, how many.
        levels: on images, how often half of the channels are factored out.
        hidden: width of the conditioner, an MLP or a residual network.
        depth: hidden layers of the MLP, or blocks of the residual network.
        context: size of a conditioning vector; 0 for none.

    Example:
        >>> import torch, genfast
        >>> genfast.models.RealNVP((1, 8, 8), hidden=8).sample(4).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        couplings: int = 8,
        levels: int = 1,
        hidden: int = 64,
        depth: int = 2,
        context: int = 0,
    ) -> None:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        super().__init__(shape)
        if len(shape) not in (1, 3) or (len(shape) == 1 and shape[0] < 2):
            raise ValueError(f"RealNVP: shape={shape}, expected (D,) with D >= 2, or (C, H, W)")
        self.config = dict(
            shape=list(shape), couplings=couplings, levels=levels, hidden=hidden, depth=depth, context=context
        )
        self._hidden, self._depth, self._context = hidden, depth, context
        self.stages = nn.ModuleList()
        if len(shape) == 1:
            self.stages.append(self._vectors(shape[0], couplings))
        else:
            channels, height, width = shape
            if levels < 0 or height % 2**levels or width % 2**levels:
                raise ValueError(f"RealNVP: shape={shape} with levels={levels}, expected H and W multiples of 2^levels")
            for _ in range(levels):
                checkers = self._checkerboards(channels, height, width, 3)
                channels, height, width = 4 * channels, height // 2, width // 2
                self.stages.append(
                    self.layers.FlowSequential(*checkers, self.layers.Squeeze(), *self._channelwise(channels, 3))
                )
                channels //= 2
            self.stages.append(self.layers.FlowSequential(*self._checkerboards(channels, height, width, 4)))
        self.base = DiagonalGaussian(self.dim, trainable=False)

    def _vectors(self, dim: int, couplings: int) -> nn.Module:
        steps = []
        for i in range(couplings):
            transform, width = ("first", dim // 2) if i % 2 == 0 else ("last", dim - dim // 2)
            network = MLP(dim - width, 2 * width, self._hidden, self._depth, self._context)
            steps.append(self.layers.ActNorm(dim))
            steps.append(
                self.layers.AffineCoupling(network, scale="tanh", alpha="learn", width=width, transform=transform)
            )
        flow: nn.Module = self.layers.FlowSequential(*steps)
        return flow

    def _checkerboards(self, channels: int, height: int, width: int, count: int) -> list[nn.Module]:
        board = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == 0
        steps = []
        for i in range(count):
            network = ResNet(channels, 2 * channels, self._hidden, self._depth, self._context)
            mask = (board if i % 2 == 0 else ~board)[None].clone()  # its own memory: checkpoints refuse shared tensors
            steps.append(self.layers.ActNorm(channels))
            steps.append(self.layers.AffineCoupling(network, scale="tanh", alpha="learn", width=channels, mask=mask))
        return steps

    def _channelwise(self, channels: int, count: int) -> list[nn.Module]:
        steps = []
        for i in range(count):
            width = channels // 2
            network = ResNet(channels - width, 2 * width, self._hidden, self._depth, self._context)
            steps.append(self.layers.ActNorm(channels))
            steps.append(
                self.layers.AffineCoupling(
                    network, scale="tanh", alpha="learn", width=width, transform="first" if i % 2 == 0 else "last"
                )
            )
        return steps

    def add_steps(self, builder: FlowBuilder) -> None:
        if len(self.shape) != 1:
            raise LoweringError("RealNVP of images has no flow program")
        lower(self.stages[0], builder)

    def program_modules(self) -> list[nn.Module]:
        return [self.stages]

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, parts, logdets = self.check(x), [], []
        for i, stage in enumerate(self.stages):
            x, logdet = stage(x, context)
            logdets.append(logdet)
            if i < len(self.stages) - 1:
                x, out = x.chunk(2, 1)
                parts.append(out.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), torch.stack(logdets).sum(0)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = latent_parts(z, self.shape, len(self.stages) - 1)
        x, logdets = parts.pop(), []
        for stage in reversed(self.stages):
            x, logdet = stage.inverse(x, context)  # type: ignore[operator]
            logdets.append(logdet)
            if parts:
                x = torch.cat((x, parts.pop()), 1)
        return x, torch.stack(logdets).sum(0)
