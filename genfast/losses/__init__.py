"""Losses: both sides of the adversarial games, the terms added to them, variational bounds, losses on features."""

from ..reference.adversarial import CRITIC_LOSSES, GENERATOR_LOSSES
from .adversarial import (
    clip_weights_,
    critic_loss,
    generator_loss,
    hinge_critic,
    hinge_generator,
    lsgan_critic,
    lsgan_generator,
    minimax_critic,
    minimax_generator,
    nonsaturating_critic,
    nonsaturating_generator,
    relativistic_average_critic,
    relativistic_average_generator,
    relativistic_critic,
    relativistic_generator,
    wasserstein_critic,
    wasserstein_generator,
)
from .auxiliary import (
    HistoricalAveraging,
    acgan_critic,
    acgan_generator,
    cycle_consistency,
    feature_matching,
    identity_mapping,
    infogan,
)
from .features import FeatureExtractor, random_features, vgg_features
from .perceptual import ContextualLoss, FeatureLosses, PerceptualLoss, StyleLoss
from .variation import total_variation
from .variational import (
    ELBO,
    LIKELIHOODS,
    bits_per_dim,
    elbo,
    importance_weighted_bound,
    kl_to_bernoulli,
    log_likelihood,
)

__all__ = [
    "acgan_critic", "acgan_generator", "bits_per_dim", "clip_weights_", "ContextualLoss", "critic_loss",
    "CRITIC_LOSSES", "cycle_consistency", "ELBO", "elbo", "feature_matching", "FeatureExtractor", "FeatureLosses",
    "generator_loss", "GENERATOR_LOSSES", "hinge_critic", "hinge_generator", "HistoricalAveraging", "identity_mapping",
    "importance_weighted_bound", "infogan", "kl_to_bernoulli", "LIKELIHOODS", "log_likelihood", "lsgan_critic",
    "lsgan_generator", "minimax_critic", "minimax_generator", "nonsaturating_critic", "nonsaturating_generator",
    "PerceptualLoss", "random_features", "relativistic_average_critic", "relativistic_average_generator",
    "relativistic_critic", "relativistic_generator", "StyleLoss", "total_variation", "vgg_features",
    "wasserstein_critic", "wasserstein_generator",
]  # fmt: skip
