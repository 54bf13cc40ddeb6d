"""Regularizers towards a pretrained network: of weights, features and outputs."""

from dtnh_jax.regularizers.estimators._categories import category_relationship
from dtnh_jax.regularizers.estimators._channels import (
    attention_from_losses,
    channel_attention,
)
from dtnh_jax.regularizers.estimators._fisher import diagonal_fisher
from dtnh_jax.regularizers.estimators._temperature import calibration_temperature
from dtnh_jax.regularizers.features._distances import (
    attention_transfer,
    delta,
    feature_map,
)
from dtnh_jax.regularizers.features._relations import cka, relational
from dtnh_jax.regularizers.outputs._co_tuning import co_tuning
from dtnh_jax.regularizers.outputs._distillation import logit_distillation, lwf
from dtnh_jax.regularizers.outputs._expected_error import expected_error
from dtnh_jax.regularizers.outputs._kl import kl_to_reference, masked_kl
from dtnh_jax.regularizers.outputs._top_k import TopK, top_k_kl, top_k_of_reference
from dtnh_jax.regularizers.spectrum import batch_spectral_shrinkage
from dtnh_jax.regularizers.weights import WeightRegularizer, check_weight_regularizer
from dtnh_jax.regularizers.weights._lora import lora_decay
from dtnh_jax.regularizers.weights._penalties import l1_sp, l2, l2_sp, l2_sp_fisher

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
