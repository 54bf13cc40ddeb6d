"""What becomes of two gradients: one row for each way to put an optimizer together."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dtnh_jax import GradientPair, decoupled, never_hurt, resolve_conflicts, rules
from dtnh_jax._never_hurt import Ingredients, with_ingredients

# (inner optimizer, strength) -> a transformation of a `GradientPair`. The optimizer's
# learning rate is 1: what a row returns is multiplied by the learning rate at the end,
# so a regularizer that is added beside the optimizer is too, as in AdamW. The strength
# may be traced.
Builder = Callable[
    [optax.GradientTransformation, Float[Array, ""] | float],
    optax.GradientTransformation,
]
ALONE = "none"  # the loss alone, without a regularizer


def _in_front(rule: Any, **options: Any) -> Builder:
    """Resolves before the optimizer, with options of `resolve_conflicts`."""

    def build(optimizer, strength):
        return optax.chain(resolve_conflicts(rule, strength, **options), optimizer)

    return build


def _recipe(**given: Any) -> Builder:
    """`never_hurt` with some of its ingredients, or other options."""
    parts = {name: given.pop(name) for name in Ingredients._fields if name in given}

    def build(optimizer, strength):
        recipe = with_ingredients(Ingredients(**parts), strength, **given)
        return optax.chain(recipe, optimizer)

    return build


def cautious(
    optimizer: optax.GradientTransformation, strength: Float[Array, ""] | float
) -> optax.GradientTransformation:
    """Cautious weight decay: adds the regularizer where the optimizer's step agrees.

    With `u` the optimizer's update, the update is `u - strength * r` in coordinates
    where `u * r <= 0`, and `u` elsewhere.

    Args:
      optimizer: gets the loss gradient.
      strength: factor of the regularizer's gradient.

    Returns:
      A transformation of a `GradientPair`.

    Example:
      >>> tx = cautious(optax.sgd(1.0), strength=0.5)
      >>> g, r = jnp.array([1.0, 1.0]), jnp.array([2.0, -2.0])
      >>> updates, _ = tx.update(GradientPair(g, r), tx.init(g))
      >>> print(updates)
      [-2. -1.]

    References:
      Chen et al., 2025, "Cautious weight decay", https://arxiv.org/abs/2510.12402

    Differs from the paper in that `r` may be the gradient of any regularizer.
    """
    # The gate of steps instead of gradients: both of them turned round.
    gate = resolve_conflicts(rules.gate, strength, scope="element")

    def init(params):
        return optimizer.init(params), gate.init(params)

    def update(updates, state, params=None):
        step, inner = optimizer.update(updates.loss, state[0], params)
        back = jax.tree.map(jnp.negative, updates.regularizer)
        step, seen = gate.update(GradientPair(step, back), state[1], params)
        return step, (inner, seen)

    return optax.GradientTransformation(init, update)


def kept_weights(refresh_every: int) -> Builder:
    """What `refreshed_gradient` returns, made of the pair that it does without.

    So accuracies are those of `dtnh_jax.refreshed_gradient`, and times are not.

    Args:
      refresh_every: how many steps weights are kept for.
    """

    def build(optimizer, strength):
        resolve = resolve_conflicts(rules.dtnh, strength)  # for what it sees

        def init(params):
            return optimizer.init(params), resolve.init(params), jnp.ones([])

        def update(updates, state, params=None):
            inner, seen, weight = state
            is_refresh = seen.step % refresh_every == 0
            _, seen = resolve.update(updates, seen, params)
            g, r = updates.loss, updates.regularizer
            product = strength * optax.tree.vdot(g, r)
            slope = product / optax.tree.norm(g, squared=True)
            weight = jnp.where(is_refresh, 1 - jnp.minimum(slope, 0), weight)
            resolved = jax.tree.map(lambda g, r: weight * g + strength * r, g, r)
            step, inner = optimizer.update(resolved, inner, params)
            return step, (inner, seen, weight)

        return optax.GradientTransformation(init, update)

    return build


# A candidate is one more row. Results are kept by the name of the row: one that means
# something else from now on needs another name.
RULES: dict[str, Builder] = {
    ALONE: lambda optimizer, strength: optimizer,
    "sum": _in_front(rules.weighted_sum),
    "dtnh": _in_front(rules.dtnh),
    # The decay is the default of the authors' code, `ema=0.1`.
    "bloop": _in_front(rules.orthogonal, reference_decay=0.9),
    "pcgrad": _in_front(rules.pcgrad),
    # The test of selective projection decay, tensor by tensor, for any regularizer;
    # how far that method goes back depends on how far a step went, which is not here.
    "spd": _in_front(rules.gate, scope="leaf"),
    "cautious": cautious,
    "element": _in_front(
        rules.dtnh, scope="element", reference_decay=0.9, trust_ratio=1.0
    ),
    "gate-element": _in_front(
        [(rules.gate, "leaf"), (rules.dtnh, "element")],
        reference_decay=0.9,
        trust_ratio=1.0,
    ),
    **{f"refresh-{every}": kept_weights(every) for every in (2, 4, 8, 16)},
    # Beside the optimizer, which gets the loss's gradient alone.
    "sum-decoupled": lambda optimizer, strength: decoupled(
        optimizer, strength, rule=rules.weighted_sum
    ),
    "dtnh-decoupled": decoupled,
    "never-hurt": lambda optimizer, strength: optax.chain(
        never_hurt(strength), optimizer
    ),
    # The same without one of its parts, with one more, or with another bound.
    "without-bound": _recipe(bound=False),
    "without-confidence": _recipe(confidence=False),
    "without-average": _recipe(confidence=False, reference_decay=0.0),
    "with-gate": _recipe(gate=True),
    "bound-0.3": _recipe(trust_ratio=0.3),
    "bound-0.1": _recipe(trust_ratio=0.1),
    "bound-3": _recipe(trust_ratio=3.0),
    "bound-10": _recipe(trust_ratio=10.0),
}
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1.0, momentum=0.9, nesterov=True),
    "adamw": lambda: optax.adamw(1.0),
}
# What the learning rate of plain fine-tuning is chosen from, by optimizer.
LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "adamw": (0.0003, 0.001, 0.003, 0.01),
}
