"""Regularizers of the weights, whose gradients need no backward pass."""

from dtnh_jax.regularizers.weights._interface import (
    WeightRegularizer,
    check_weight_regularizer,
)

__all__ = ["WeightRegularizer", "check_weight_regularizer"]
