"""nn.ActNorm."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from .._derived import ordinary, readable
from ..programs import FlowBuilder, LoweringError
from .bijection import Bijection


def _after_loading(module: ActNorm, incompatible: object) -> None:
    module._look()


class ActNorm(Bijection):
    """Activation normalisation: y = e^log_scale x + bias per channel, set from the first batch (Glow, section 3.1).

    The first ``forward`` in training mode sets ``log_scale`` and ``bias`` so that its output has zero mean and unit
    variance per channel, over all ranks when torch.distributed is initialised. That happens once: the flag is in the
    state_dict. Before it, in evaluation mode or through ``inverse``, the layer is what its parameters say (the
    identity).

    Args:
        channels: C; inputs are (N, C, ...).
        eps: a channel with a standard deviation below this is not scaled up any further.
        shift_first: y = e^log_scale (x + bias), as OpenAI's Glow and its ports have it; see
            :func:`genfast.ops.actnorm`.

    Raises:
        ValueError: a first batch without a single position, from which nothing can be set.

    Example:
        >>> import torch, genfast
        >>> z, logdet = genfast.nn.ActNorm(3)(torch.randn(8, 3, 4, 4))
    """

    def __init__(self, channels: int, *, eps: float = 1e-6, shift_first: bool = False) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"ActNorm: channels={channels}, expected at least 1")
        self.channels = channels
        self.eps = eps
        self.shift_first = shift_first
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._pending = True  # the buffer's value on the host: reading a CUDA buffer each call would synchronise
        self.register_load_state_dict_post_hook(_after_loading)

    initialized: Tensor

    def _look(self) -> None:
        self._pending = not bool(self.initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Sets the parameters from a batch ``x`` (N, C, ...), unless that was done before."""
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            if x.is_meta or (type(x).__name__ == "FakeTensor" and not torch.compiler.is_exporting()):
                return  # a call for shapes alone
            if not readable(x, self.initialized):
                raise RuntimeError(
                    "ActNorm: the first call in training sets the parameters from its batch, which an exported or a "
                    "batched one cannot; call the model once on a batch before, or call eval()"
                )
            with ordinary():
                self._initialize(x)
        else:
            self._initialize(x)

    def _initialize(self, x: Tensor) -> None:
        if bool(self.initialized):
            self._pending = False
            return
        values = x.detach().transpose(0, 1).flatten(1).double()
        count = torch.tensor([float(values.shape[1])], dtype=torch.float64, device=x.device)
        sums = torch.cat((count, values.sum(1), (values**2).sum(1)))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        if not float(sums[0]):
            raise ValueError(f"ActNorm: x has shape {tuple(x.shape)}; the first training batch must not be empty")
        mean, square = sums[1 : self.channels + 1] / sums[0], sums[self.channels + 1 :] / sums[0]
        deviation = (square - mean**2).clamp_min(0).sqrt().clamp_min(self.eps)
        self.log_scale.copy_(-deviation.log())
        self.bias.copy_(-mean if self.shift_first else -mean / deviation)
        self.initialized.fill_(True)
        self._pending = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self._pending and self.training:
            self.initialize(x)
        return ops.actnorm(x, self.log_scale, self.bias, log_scale=True, shift_first=self.shift_first)

    def add_steps(self, builder: FlowBuilder) -> None:
        if self._pending and self.training:
            raise LoweringError("ActNorm waits for its first batch")
        mode = "shift_then_scale" if self.shift_first else "scale_then_shift"
        builder.features = builder.scale(builder.features, self.log_scale, self.bias, mode=mode)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return ops.actnorm(z, self.log_scale, self.bias, log_scale=True, inverse=True, shift_first=self.shift_first)

    def extra_repr(self) -> str:
        return f"{self.channels}{', shift_first=True' if self.shift_first else ''}"
