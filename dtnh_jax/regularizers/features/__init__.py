"""Regularizers of feature maps, towards those of the pretrained network."""

from dtnh_jax.regularizers.features._distances import (
    attention_transfer,
    delta,
    feature_map,
)
from dtnh_jax.regularizers.features._relations import cka, relational

__all__ = ["attention_transfer", "cka", "delta", "feature_map", "relational"]
