"""Regularizers towards a pretrained network: of weights, features and outputs."""

from dtnh_jax.regularizers.features import feature_map
from dtnh_jax.regularizers.outputs import logit_distillation
from dtnh_jax.regularizers.weights import (
    WeightRegularizer,
    check_weight_regularizer,
    l2,
    l2_sp,
)

__all__ = [
    "WeightRegularizer",
    "check_weight_regularizer",
    "feature_map",
    "l2",
    "l2_sp",
    "logit_distillation",
]
