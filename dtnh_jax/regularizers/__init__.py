"""Regularizers towards a pretrained network: of weights, features and outputs."""

from dtnh_jax.regularizers.estimators import (
    attention_from_losses,
    calibration_temperature,
    category_relationship,
    channel_attention,
    diagonal_fisher,
)
from dtnh_jax.regularizers.features import (
    attention_transfer,
    cka,
    delta,
    feature_map,
    relational,
)
from dtnh_jax.regularizers.outputs import (
    TopK,
    co_tuning,
    expected_error,
    kl_to_reference,
    logit_distillation,
    lwf,
    masked_kl,
    top_k_kl,
    top_k_of_reference,
)
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
    "TopK",
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
    "expected_error",
    "feature_map",
    "kl_to_reference",
    "l1_sp",
    "l2",
    "l2_sp",
    "l2_sp_fisher",
    "logit_distillation",
    "lora_decay",
    "lwf",
    "masked_kl",
    "relational",
    "top_k_kl",
    "top_k_of_reference",
]
