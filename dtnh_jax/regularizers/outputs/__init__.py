"""Regularizers of a network's outputs, and the judge for held-out gradients."""

from dtnh_jax.regularizers.outputs._co_tuning import co_tuning
from dtnh_jax.regularizers.outputs._distillation import logit_distillation, lwf
from dtnh_jax.regularizers.outputs._expected_error import expected_error
from dtnh_jax.regularizers.outputs._kl import kl_to_reference, masked_kl
from dtnh_jax.regularizers.outputs._top_k import (
    TopK,
    top_k_kl,
    top_k_of_reference,
)

__all__ = [
    "TopK",
    "co_tuning",
    "expected_error",
    "kl_to_reference",
    "logit_distillation",
    "lwf",
    "masked_kl",
    "top_k_kl",
    "top_k_of_reference",
]
