"""Estimators that some regularizers need: they run once, before training."""

from dtnh_jax.regularizers.estimators._categories import category_relationship
from dtnh_jax.regularizers.estimators._channels import (
    attention_from_losses,
    channel_attention,
)
from dtnh_jax.regularizers.estimators._fisher import diagonal_fisher
from dtnh_jax.regularizers.estimators._temperature import calibration_temperature

__all__ = [
    "attention_from_losses",
    "calibration_temperature",
    "category_relationship",
    "channel_attention",
    "diagonal_fisher",
]
