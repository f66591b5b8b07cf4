"""nn.MaskedConv1d/2d/3d and weight normalisation that leaves masked taps out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import ops, reference


def _several(name: str, argument: str, value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    found = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(found) != dims:
        raise ValueError(f"{name}: {argument}={value!r}, expected one number or {dims}")
    return found


class _MaskedConv(nn.modules.conv._ConvNd):
    """What the three have in common; ``dims`` is the number of spatial axes."""

    dims: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = "causal",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        mask_type: str = "B",
        data_channels: int = 1,
        group_order: str = "interleaved",
        center: int | Sequence[int] | None = None,
        activation: str | None = None,
    ) -> None:
        name, dims = type(self).__name__, self.dims
        if mask_type not in ("A", "B"):
            raise ValueError(f"{name}: mask_type={mask_type!r}, expected 'A' or 'B'")
        if group_order not in ("interleaved", "blocked"):
            raise ValueError(f"{name}: group_order={group_order!r}, expected 'interleaved' or 'blocked'")
        if activation not in (None, "relu"):
            raise ValueError(f"{name}: activation={activation!r}, expected None or 'relu'")
        for label, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if data_channels < 1 or value % data_channels:
                raise ValueError(f"{name}: {label}={value} is not a multiple of data_channels={data_channels}")
        kernel = _several(name, "kernel_size", kernel_size, dims)
        dilated = _several(name, "dilation", dilation, dims)
        for argument, sizes in (("kernel_size", kernel), ("dilation", dilated)):
            if min(sizes) < 1:
                raise ValueError(f"{name}: {argument}={sizes}, expected at least 1")
        if set(_several(name, "stride", stride, dims)) != {1}:
            raise ValueError(f"{name}: stride={stride!r}, expected 1: a masked convolution keeps the size")
        if padding_mode != "zeros":
            raise ValueError(
                f"{name}: padding_mode={padding_mode!r}, expected 'zeros': other modes would show the future"
            )
        at = tuple(k // 2 for k in kernel) if center is None else _several(name, "center", center, dims)
        if any(not 0 <= c < k for c, k in zip(at, kernel)):
            raise ValueError(f"{name}: center={center!r}, expected a position inside kernel_size={kernel}")
        self._check_padding(name, padding, kernel, dilated, at)
        super().__init__(
            in_channels,
            out_channels,
            kernel,
            (1,) * dims,
            tuple(c * d for c, d in zip(at, dilated)),
            dilated,
            False,
            (0,) * dims,
            groups,
            bias,
            "zeros",
            device,
            dtype,
        )
        self.mask_type, self.data_channels, self.group_order = mask_type, data_channels, group_order
        self.center, self.activation = at, activation
        with (
            torch.no_grad()
        ):  # masked weights get no gradient, so they stay zero and a checkpoint serves a plain convolution
            self.weight.masked_fill_(~self.mask, 0)

    @staticmethod
    def _check_padding(
        name: str,
        padding: str | int | Sequence[int],
        kernel: tuple[int, ...],
        dilation: tuple[int, ...],
        at: tuple[int, ...],
    ) -> None:
        if padding == "causal":
            return
        even = any(k % 2 == 0 for k in kernel)
        if padding == "same":
            if even:
                raise ValueError(
                    f"{name}: padding='same' with an even kernel_size={kernel} has no centre; use padding='causal', "
                    f"which puts tap {at} on the output's position"
                )
            return
        if isinstance(padding, str):
            raise ValueError(f"{name}: padding={padding!r}, expected 'causal', 'same' or dilation * (kernel_size // 2)")
        wanted = tuple(d * (k // 2) for k, d in zip(kernel, dilation))
        if even or _several(name, "padding", padding, len(kernel)) != wanted:
            raise ValueError(
                f"{name}: padding={padding!r}, expected 'causal', 'same' or {wanted} with an odd kernel; "
                f"kernel_size={kernel}, dilation={dilation}"
            )

    def _masked(self, mask_type: str, data_channels: int, group_order: str) -> Tensor:
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return reference.conv_mask(shape, self.center, mask_type, data_channels, group_order, self.groups)

    @property
    def mask(self) -> Tensor:
        """Which weights are live, bool like ``weight``."""
        return self._masked(self.mask_type, self.data_channels, self.group_order).to(self.weight.device)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes checkpoints of masked convolutions that have a ``mask`` buffer, as most PixelCNN code registers one, if
        it is this layer's mask."""
        theirs = state_dict.get(f"{prefix}mask")
        if theirs is not None:
            state_dict = {k: v for k, v in state_dict.items() if k != f"{prefix}mask"}
            wrong = self._mask_fault(theirs)
            if wrong:
                error_msgs.append(f"{type(self).__name__}: {prefix}mask {wrong}")
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _mask_fault(self, theirs: Tensor) -> str:
        """What a checkpoint's mask has that this layer's has not; empty if they are one."""
        mine = self._masked(self.mask_type, self.data_channels, self.group_order)
        if theirs.is_meta:
            return ""
        theirs = theirs.detach().cpu()
        try:
            live = (theirs != 0).broadcast_to(mine.shape)
        except RuntimeError:
            return f"has shape {tuple(theirs.shape)}, expected {tuple(mine.shape)}"
        if not bool(((theirs == 0) | (theirs == 1)).all()):
            return "holds numbers other than 0 and 1"
        if torch.equal(live, mine):
            return ""
        others = (
            (t, d, o)
            for d in sorted({1, 2, 3, self.data_channels})
            if self.in_channels % d == 0 and self.out_channels % d == 0
            for t in ("A", "B")
            for o in (("interleaved", "blocked") if d > 1 else ("interleaved",))
        )
        fits = next(
            (
                f"mask_type={t!r}, data_channels={d}, group_order={o!r}"
                for t, d, o in others
                if torch.equal(live, self._masked(t, d, o))
            ),
            None,
        )
        first = tuple((live != mine).nonzero()[0].tolist())
        said = (
            f"it is that of {fits}"
            if fits
            else f"they differ first at weight {first}, {int((live != mine).sum())} in all"
        )
        return (
            f"is not the mask of this layer, mask_type={self.mask_type!r}, data_channels={self.data_channels}, "
            f"group_order={self.group_order!r}: {said}"
        )

    def forward(self, x: Tensor) -> Tensor:
        function = (ops.masked_conv1d, ops.masked_conv2d, ops.masked_conv3d)[self.dims - 1]
        return function(
            x,
            self.weight,
            self.bias,
            mask_type=self.mask_type,
            data_channels=self.data_channels,
            group_order=self.group_order,
            dilation=self.dilation,
            groups=self.groups,
            center=self.center,
            activation=self.activation,
        )

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, mask_type={self.mask_type!r}"
        if self.data_channels > 1:
            text += f", data_channels={self.data_channels}, group_order={self.group_order!r}"
        if self.center != tuple(k // 2 for k in self.kernel_size):
            text += f", center={self.center}"
        return text + (f", activation={self.activation!r}" if self.activation else "")


_DOC = """A causal convolution in the place of ``nn.Conv{dims}d``, whose state_dict it loads (PixelRNN, section 3.4).

    Computes live taps only, through :func:`genfast.ops.masked_conv{dims}d`. The stored weight is never changed by a
    forward pass; its masked entries start at zero and get exactly zero gradient. A checkpoint may hold a ``mask``
    buffer, which must be this layer's mask and is left out.

    Args:
        in_channels, out_channels, kernel_size, dilation, groups, bias, device, dtype: as of ``nn.Conv{dims}d``.
        stride: 1.
        padding: "causal" (the centre tap lies on the output's position; any kernel), "same" or
            ``dilation * (kernel_size // 2)`` (odd kernels; the same thing).
        mask_type: "A" leaves the centre out (first layer), "B" takes it.
        data_channels: colours per pixel; at the centre an output sees earlier colours ("A"), and its own too ("B").
        group_order: which channel is which colour: "interleaved" (c mod data_channels) or "blocked".
        center: the tap on the output's position; None for kernel_size // 2.
        activation: None or "relu", fused.

    Raises:
        ValueError: arguments that do not fit, by name.

    Example:
        >>> import torch, genfast
        >>> layer = genfast.nn.MaskedConv{dims}d(4, 8, 3, mask_type="B")
        >>> layer(torch.randn(2, 4, {side})).shape
        torch.Size([2, 8, {side}])
    """


class MaskedConv1d(_MaskedConv):
    __doc__ = _DOC.format(dims=1, side="6")
    dims = 1


class MaskedConv2d(_MaskedConv):
    __doc__ = _DOC.format(dims=2, side="6, 6")
    dims = 2


class MaskedConv3d(_MaskedConv):
    __doc__ = _DOC.format(dims=3, side="6, 6, 6")
    dims = 3


class _LiveWeightNorm(nn.Module):
    """w = g v / |v|, the norm over the live taps of each output channel, so that masked values of v do not count."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    mask: Tensor

    def _parts(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v without what is masked, and its norm per output channel."""
        live = torch.where(self.mask, v, v.new_zeros(()))
        norm: Tensor = torch.linalg.vector_norm(live.flatten(1), dim=1)
        return live, norm.view(-1, *(1,) * (v.dim() - 1))

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        live, norm = self._parts(v)
        # An output channel without a live tap (type A, first colour, 1 x 1) has norm zero and stays zero.
        return live * torch.where(norm > 0, g / norm.clamp_min(torch.finfo(v.dtype).tiny), norm)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self._parts(weight)[1], weight


def weight_norm(module: nn.Module, name: str = "weight") -> nn.Module:
    """Weight normalisation (arXiv:1602.07868) whose norm leaves masked taps out; the keys are those of torch's
    weight_norm.

    ``module`` is changed in place and returned. Modules without a mask get the ordinary norm per output channel.

    Example:
        >>> import genfast
        >>> layer = genfast.nn.weight_norm(genfast.nn.MaskedConv2d(3, 6, 3, mask_type="A", data_channels=3))
    """
    weight = getattr(module, name)
    mask = module.mask if isinstance(module, _MaskedConv) else torch.ones_like(weight, dtype=torch.bool)
    parametrize.register_parametrization(module, name, _LiveWeightNorm(mask))
    return module
