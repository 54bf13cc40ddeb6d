"""Fine-tuning with regularizers that never work against the loss."""

from dtnh_jax import regularizers, rules
from dtnh_jax._accumulate import accumulate_pairs
from dtnh_jax._decoupled import decoupled
from dtnh_jax._never_hurt import NeverHurtState, never_hurt
from dtnh_jax._protect import ConflictState
from dtnh_jax._refresh import refreshed_gradient
from dtnh_jax._resolve import add_regularizer, dtnh, resolve_conflicts
from dtnh_jax.gradients import GradientPair, value_and_gradient_pair
from dtnh_jax.metrics import conflict_metrics, first_order_harm

__all__ = [
    "ConflictState",
    "GradientPair",
    "NeverHurtState",
    "accumulate_pairs",
    "add_regularizer",
    "conflict_metrics",
    "decoupled",
    "dtnh",
    "first_order_harm",
    "never_hurt",
    "refreshed_gradient",
    "regularizers",
    "resolve_conflicts",
    "rules",
    "value_and_gradient_pair",
]
