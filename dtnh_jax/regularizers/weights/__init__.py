"""Regularizers of the weights, whose gradients need no backward pass."""

from dtnh_jax.regularizers.weights._interface import (
    WeightRegularizer,
    check_weight_regularizer,
)
from dtnh_jax.regularizers.weights._lora import lora_decay
from dtnh_jax.regularizers.weights._penalties import l1_sp, l2, l2_sp, l2_sp_fisher

__all__ = [
    "WeightRegularizer",
    "check_weight_regularizer",
    "l1_sp",
    "l2",
    "l2_sp",
    "l2_sp_fisher",
    "lora_decay",
]
