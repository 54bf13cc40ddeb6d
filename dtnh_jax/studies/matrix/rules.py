"""What becomes of two gradients: one row for each way to put an optimizer together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dtnh_jax import cautious, decoupled, never_hurt, resolve_conflicts, rules
from dtnh_jax.studies.matrix.catalogue import ALONE

# (inner optimizer, strength) -> a transformation of a `GradientPair`. The optimizer's
# learning rate is 1: what a row returns is multiplied by the learning rate at the end,
# so a regularizer that is added beside the optimizer is too, as in AdamW. The strength
# may be traced.
Builder = Callable[
    [optax.GradientTransformation, Float[Array, ""] | float],
    optax.GradientTransformation,
]


def _in_front(rule: Any, **options: Any) -> Builder:
    """Resolves before the optimizer, with options of `resolve_conflicts`."""

    def build(optimizer, strength):
        return optax.chain(resolve_conflicts(rule, strength, **options), optimizer)

    return build


def _never_hurt(**options: Any) -> Builder:
    """Puts `never_hurt` before the optimizer."""

    def build(optimizer, strength):
        return optax.chain(never_hurt(strength, **options), optimizer)

    return build


def kept_weights(refresh_every: int) -> Builder:
    """What `refreshed_gradient` returns, made of the pair that it does without.

    So accuracies are those of `dtnh_jax.refreshed_gradient`, and times are not.

    Args:
      refresh_every: how many steps weights are kept for.
    """

    def build(optimizer, strength):
        resolve = resolve_conflicts(rules.dtnh, strength)  # for what it sees

        def init(params):
            step, weight = jnp.zeros([], jnp.int32), jnp.ones([])
            return optimizer.init(params), resolve.init(params), step, weight

        def update(updates, state, params=None):
            inner, seen, step, weight = state
            is_refresh = step % refresh_every == 0
            _, seen = resolve.update(updates, seen, params)
            g, r = updates.loss, updates.regularizer
            product = strength * optax.tree.vdot(g, r)
            slope = product / optax.tree.norm(g, squared=True)
            weight = jnp.where(is_refresh, 1 - jnp.minimum(slope, 0), weight)
            resolved = jax.tree.map(lambda g, r: weight * g + strength * r, g, r)
            resolved, inner = optimizer.update(resolved, inner, params)
            return resolved, (inner, seen, step + 1, weight)

        return optax.GradientTransformation(init, update)

    return build


# A candidate is one more row. Results are kept by the name of the row: one that means
# something else from now on needs another name.
RULES: dict[str, Builder] = {
    ALONE: lambda optimizer, strength: optimizer,
    "sum": _in_front(rules.weighted_sum),
    "dtnh": _in_front(rules.dtnh),
    # The decay is the default of the authors' code, `ema=0.1`.
    "bloop": _in_front(rules.orthogonal, ema_decay=0.9),
    "pcgrad": _in_front(rules.pcgrad),
    # The test of selective projection decay, tensor by tensor, for any regularizer;
    # how far that method goes back depends on how far a step went, which is not here.
    "spd": _in_front(rules.gate, scope="leaf"),
    "cautious": cautious,
    "dtnh-element": _in_front(
        rules.dtnh, scope="element", ema_decay=0.9, max_ratio=1.0
    ),
    **{f"refresh-{every}": kept_weights(every) for every in (2, 4, 8, 16)},
    # Beside the optimizer, which gets the loss's gradient alone.
    "sum-decoupled": lambda optimizer, strength: decoupled(
        optimizer, strength, rule=rules.weighted_sum
    ),
    "dtnh-decoupled": decoupled,
    "never-hurt": _never_hurt(),
    # The same with another bound.
    "bound-0.3": _never_hurt(max_ratio=0.3),
    "bound-0.1": _never_hurt(max_ratio=0.1),
    "bound-3": _never_hurt(max_ratio=3.0),
    "bound-10": _never_hurt(max_ratio=10.0),
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1.0, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(1.0),
}
