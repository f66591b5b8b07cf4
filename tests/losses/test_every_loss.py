"""Every public loss refuses by name an argument that is no tensor."""

from __future__ import annotations

import inspect

import pytest
import torch

from genfast import losses
from tests.losses.test_adversarial import GAMES


def _arguments():
    """Every public loss that is a function, with arguments that it takes."""
    n, images, classes = torch.zeros(4), torch.rand(4, 3), torch.tensor([0, 1, 2, 0])
    logits = torch.zeros(4, 3)
    cycle = {"x": images, "y": images}
    calls = {
        "acgan_critic": {
            "real": n,
            "fake": n,
            "real_classes": logits,
            "real_labels": classes,
            "fake_classes": logits,
            "fake_labels": classes,
        },
        "acgan_generator": {"fake": n, "fake_classes": logits, "fake_labels": classes},
        "critic_loss": {"real": n, "fake": n},
        "generator_loss": {"fake": n},
        "cycle_consistency": cycle | {"x_again": images, "y_again": images},
        "identity_mapping": cycle | {"x_mapped": images, "y_mapped": images},
        "elbo": {"log_likelihood": n, "kl": n},
        "feature_matching": {"real": images, "fake": images},
        "importance_weighted_bound": {"log_weights": images},
        "kl_to_bernoulli": {"activations": images},
        "infogan": {"logits": logits, "codes": classes, "mean": images, "log_std": images, "values": images},
        "log_likelihood": {"x": images, "parameters": images},
        "total_variation": {"x": torch.rand(1, 3, 4, 4)},
    }
    for game in GAMES:
        name, both = game.replace("-", "_"), {"real": n, "fake": n}
        calls[f"{name}_critic"] = both
        calls[f"{name}_generator"] = both if game.startswith("relativistic") else {"fake": n}
    return calls


OPTIONS = {
    "critic_loss": {"loss": "hinge"},
    "generator_loss": {"loss": "hinge"},
    "kl_to_bernoulli": {"rho": 0.1},
    "log_likelihood": {"likelihood": "bernoulli"},
}


def test_the_losses_called_with_no_tensors_are_all():
    others = {"bits_per_dim", "clip_weights_", "random_features", "vgg_features"}  # which take numbers, modules, files
    functions = {n for n in losses.__all__ if callable(getattr(losses, n)) and not isinstance(getattr(losses, n), type)}
    assert functions - others == set(_arguments())


@pytest.mark.parametrize(
    "wrong", [None, 1.0, [[0.0]], "x", torch.zeros(4).numpy()], ids=["None", "float", "list", "str", "numpy"]
)
@pytest.mark.parametrize("name", sorted(_arguments()))
def test_what_is_no_tensor_is_refused_by_name(name, wrong):
    function, arguments = getattr(losses, name), _arguments()[name]
    function(**arguments, **OPTIONS.get(name, {}))
    optional = inspect.signature(function).parameters
    for argument in arguments:
        if wrong is None and optional[argument].default is not inspect.Parameter.empty:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^\w+: .*\b{argument}\b"):
            function(**{**arguments, argument: wrong}, **OPTIONS.get(name, {}))
