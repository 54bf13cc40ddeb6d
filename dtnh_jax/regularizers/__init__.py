"""Regularizers towards a pretrained network: of weights, features and outputs."""

from dtnh_jax.regularizers.categories import (
    calibration_temperature,
    category_relationship,
)
from dtnh_jax.regularizers.channels import attention_from_losses, channel_attention
from dtnh_jax.regularizers.features import attention_transfer, delta, feature_map
from dtnh_jax.regularizers.fisher import diagonal_fisher
from dtnh_jax.regularizers.outputs import co_tuning, logit_distillation, lwf
from dtnh_jax.regularizers.relations import cka, relational
from dtnh_jax.regularizers.spectrum import batch_spectral_shrinkage
from dtnh_jax.regularizers.weights import (
    WeightRegularizer,
    check_weight_regularizer,
    l1_sp,
    l2,
    l2_sp,
    l2_sp_fisher,
    lora_decay,
)

__all__ = [
    "WeightRegularizer",
    "attention_from_losses",
    "attention_transfer",
    "batch_spectral_shrinkage",
    "calibration_temperature",
    "category_relationship",
    "channel_attention",
    "check_weight_regularizer",
    "cka",
    "co_tuning",
    "delta",
    "diagonal_fisher",
    "feature_map",
    "l1_sp",
    "l2",
    "l2_sp",
    "l2_sp_fisher",
    "logit_distillation",
    "lora_decay",
    "lwf",
    "relational",
]
