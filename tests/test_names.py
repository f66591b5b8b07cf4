"""Public names: no two classes share one, and a name that changed is still found for one version, with a warning."""

from __future__ import annotations

import importlib
import inspect
import warnings

import pytest

import genfast

ROOMS = ("ops", "nn", "models", "losses", "sampling", "penalty", "programs", "training", "integrations")
RENAMED = {
    "nn": {
        "MADE": "MADENetwork",
        "NADE": "NADENetwork",
        "DeepNADE": "DeepNADENetwork",
        "ContextualLoss": "ContextualSimilarityLoss",
    },
    "ops": {"DiagonalGaussian": "GaussianSample"},
}

# What only the penalty, the engines and genfast.nn call.
PRIVATE = [
    "activation_chain",
    "activation_second",
    "apply_bits",
    "apply_bits_",
    "channel_scale",
    "gather_once",
    "leaky_relu_bits",
    "leaky_relu_bits_",
    "linear",
    "linear_input",
    "linear_weight",
    "Staircase",
    "staircase",
    "staircase_from_mask",
    "tap_energy",
    "wae_scales",
]


def test_what_our_own_modules_call_is_not_public():
    assert not set(PRIVATE) & set(genfast.ops.__all__)
    assert not [name for name in PRIVATE if callable(getattr(genfast.ops, name, None))]


def test_no_two_public_classes_share_a_name():
    classes: dict[str, tuple[str, type]] = {}
    for room in ROOMS:
        module = importlib.import_module(f"genfast.{room}")
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                first, cls = classes.setdefault(name, (room, value))
                assert cls is value, f"genfast.{first}.{name} and genfast.{room}.{name} are two classes"


@pytest.mark.parametrize(("room", "old"), [(room, old) for room, names in RENAMED.items() for old in names])
def test_an_old_name_warns_and_names_the_new_one(room, old):
    module, new = importlib.import_module(f"genfast.{room}"), RENAMED[room][old]
    with pytest.warns(DeprecationWarning, match=rf"genfast\.{room}\.{old} is now genfast\.{room}\.{new};") as record:
        assert getattr(module, old) is getattr(module, new)
    assert record[0].filename == __file__
    assert old not in module.__all__


@pytest.mark.parametrize("room", RENAMED)
def test_a_name_that_never_was_is_an_error(room):
    module = importlib.import_module(f"genfast.{room}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match=f"module 'genfast.{room}' has no attribute 'Missing'"):
            _ = module.Missing
