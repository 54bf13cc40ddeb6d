"""Fine-tuning with regularizers, as Optax transformations that limit their harm."""

from dtnh_jax import regularizers, rules
from dtnh_jax._accumulate import accumulate_pairs
from dtnh_jax._choose_trust import TrustChoice, choose_trust, smooth_accuracy
from dtnh_jax._decoupled import cautious, decoupled
from dtnh_jax._gradients import GradientPair, value_and_gradient_pair
from dtnh_jax._metrics import conflict_metrics, first_order_harm
from dtnh_jax._never_hurt import NeverHurtState, never_hurt
from dtnh_jax._refresh import refreshed_gradient
from dtnh_jax._resolve import (
    ConflictState,
    add_regularizer,
    dtnh,
    resolve_conflicts,
)

__all__ = [
    "ConflictState",
    "GradientPair",
    "NeverHurtState",
    "TrustChoice",
    "accumulate_pairs",
    "add_regularizer",
    "cautious",
    "choose_trust",
    "conflict_metrics",
    "decoupled",
    "dtnh",
    "first_order_harm",
    "never_hurt",
    "refreshed_gradient",
    "regularizers",
    "resolve_conflicts",
    "rules",
    "smooth_accuracy",
    "value_and_gradient_pair",
]
