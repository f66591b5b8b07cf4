"""nn.ContextualSimilarityLoss, with the conventions of the published codes by name."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import ops

# eps is on the scale of 1 - cos: the codes that halve that distance add twice theirs.
PRESETS: dict[str, dict[str, Any]] = {
    "official": {"eps": 2e-5},
    "s-aiueo32": {"log_eps": 1e-5},
    "cocosnet": {"bandwidth": 0.1, "center": "sample"},
    "cocosnet-forward": {"bandwidth": 0.1, "eps": 1e-3, "center": "sample", "over": "targets"},
    "zoom": {"eps": 2e-3, "spatial_weight": 0.1, "spatial_eps": 1e-3, "spatial_scale": 255.0},
    "adgan": {"bandwidth": 0.1, "eps": 2e-5},
}
_DEFAULTS: dict[str, Any] = {
    "bandwidth": 0.5,
    "distance": "cosine",
    "eps": 1e-5,
    "center": True,
    "over": "sources",
    "spatial_weight": 0.0,
    "spatial_bandwidth": None,
    "spatial_eps": 1e-5,
    "spatial_scale": 1.0,
    "log_eps": 0.0,
    "symmetric": False,
    "reduction": "mean",
}


class ContextualSimilarityLoss(nn.Module):
    """-log of the contextual similarity of two feature maps, :func:`genfast.ops.contextual_similarity`.

    It takes feature maps; :class:`genfast.losses.ContextualLoss` takes images, and runs the network that makes features
    of them.

    The published codes differ in nearly every choice; ``preset`` takes one's, and each may be overridden by keyword:

    ================== ========= ==== ======== ======= ==============================================
    preset             bandwidth eps  center   maximum code
    ================== ========= ==== ======== ======= ==============================================
    official           0.5       2e-5 batch    sources roimehrez/contextualLoss (TensorFlow)
    s-aiueo32          0.5       1e-5 batch    sources S-aiueo32/contextual_loss_pytorch, log_eps 1e-5
    cocosnet           0.1       1e-5 sample   sources microsoft/CoCosNet, ContextualLoss
    cocosnet-forward   0.1       1e-3 sample   targets microsoft/CoCosNet, ContextualLoss_forward
    zoom               0.5       2e-3 batch    sources ceciliavision/zoom-learn-zoom, with its spatial term
    adgan              0.1       2e-5 batch    sources menyifang/ADGAN
    ================== ========= ==== ======== ======= ==============================================

    eps is on the scale of 1 - cos, where some of these codes halve it and add half as much. Maximum over the sources
    (x) is the mean over targets of each one's best source; over the targets (y), the mean over sources of each one's
    best target.

    Args:
        preset: a name of the table; None is S-aiueo32's without its log_eps.
        options: bandwidth, distance, eps, center, over, spatial_weight, spatial_bandwidth, spatial_eps, spatial_scale
            and reduction as of the op; ``log_eps``, added within the logarithm; ``symmetric``, the mean of the losses
            of (x, y) and (y, x).

    forward(x, y): (B, C, *spatial) twice, x generated and y the target; a scalar, or (B,) with reduction="none": the
        logarithm
    is of each sample's similarity. An empty batch has loss 0.

    Raises:
        ValueError: an unknown preset; TypeError: an unknown option. Other values are checked at the first call.

    Source: Mechrez et al. (arXiv:1803.02077, section 3.2); Zhang et al. (arXiv:1905.05169) for the spatial term.

    Example:
        >>> import torch, genfast
        >>> loss = genfast.nn.ContextualSimilarityLoss("cocosnet", bandwidth=0.2)
        >>> loss(torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8)).shape
        torch.Size([])
    """

    def __init__(self, preset: str | None = None, **options: Any) -> None:
        super().__init__()
        if preset is not None and preset not in PRESETS:
            raise ValueError(
                f"ContextualSimilarityLoss: preset={preset!r}, expected None or one of {', '.join(map(repr, PRESETS))}"
            )
        for name in options:
            if name not in _DEFAULTS:
                raise TypeError(
                    f"ContextualSimilarityLoss: unknown option {name!r}, expected one of {', '.join(_DEFAULTS)}"
                )
        self.preset = preset
        self.options = _DEFAULTS | (PRESETS[preset] if preset is not None else {}) | options
        if self.options["reduction"] not in ("mean", "none"):
            raise ValueError(
                f"ContextualSimilarityLoss: reduction={self.options['reduction']!r}, expected 'mean' or 'none'"
            )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        options = dict(self.options)
        log_eps, symmetric, reduction = (options.pop(name) for name in ("log_eps", "symmetric", "reduction"))
        pairs = ((x, y), (y, x)) if symmetric else ((x, y),)
        losses = [-(ops.contextual_similarity(*pair, **options, reduction="none") + log_eps).log() for pair in pairs]
        loss: Tensor = (losses[0] + losses[1]) / 2 if symmetric else losses[0]
        if reduction == "none":
            return loss
        return loss.mean() if len(loss) else loss.sum()  # an empty batch has loss 0

    def extra_repr(self) -> str:
        changed = (f"{name}={value!r}" for name, value in self.options.items() if value != _DEFAULTS[name])
        return ", ".join(([repr(self.preset)] if self.preset else []) + list(changed))
