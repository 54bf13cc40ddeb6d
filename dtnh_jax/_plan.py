"""What a rule leaves of a regularizer's gradient, as two numbers for each group.

They are of lengths and cosines alone: nothing here is as large as a gradient, but for
`add`, which puts a part together.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dtnh_jax import _scopes, rules
from dtnh_jax._scopes import Geometry
from dtnh_jax.rules._gram import part_of

# Relative to its summands, a sum below this is their rounding: the two cancel.
_ROUNDING = 1e-6
# Sums over many parameters leave this much of a square uncertain.
_UNCERTAIN = 1e-5
# A ratio of lengths beyond this one is as good as infinite in single precision.
_SMALLEST_RATIO = 1e-15


class Plan(NamedTuple):
    """The regularizer's part in coordinates: `along * x / ||x|| + kept * y`."""

    along: Float[Array, "..."]
    kept: Float[Array, "..."]


def keeps_all(plan: Plan) -> Bool[Array, "..."]:
    """Whether nothing is taken from the regularizer, nor added to it."""
    return (plan.along == 0) & (plan.kept == 1)


def make_plan(group: Geometry, rule: rules.Rule, is_coupled: bool) -> Plan:
    """Asks the rule, about gradients that are scaled so that their squares exist."""
    if not is_coupled:  # then `x` is but a direction, of any length: that of `y`
        group = group._replace(x_norm=jnp.where(group.x_norm > 0, group.y_norm, 0))
    gram, x = told(group)
    excess, kept = part_of(rule, gram)
    return Plan(excess * x, kept)


def told(group: Geometry) -> tuple[rules.Entries, Array]:
    """Returns what a rule is told of two gradients, and the length of `x` in it."""
    largest = jnp.maximum(group.x_norm, group.y_norm)
    by = _scopes.reciprocal(largest)
    x, y = [
        jnp.where(n == 0, 0, jnp.maximum(n * by, _SMALLEST_RATIO))
        for n in (group.x_norm, group.y_norm)
    ]
    return rules.Entries(x * x, x * y * group.cosine, y * y), x * largest


def part_norm(group: Geometry, plan: Plan, uncertain: float = 0.0) -> Array:
    """The length of the part; `uncertain` is the share of squares that may be lost."""
    along, kept = plan.along, plan.kept * group.y_norm
    largest = jnp.maximum(jnp.abs(along), jnp.abs(kept))
    a, b = [value * _scopes.reciprocal(largest) for value in (along, kept)]
    squares = a * a + b * b
    square = squares + 2 * a * b * group.cosine
    return largest * _scopes.root(jnp.maximum(square, uncertain * squares))


def bounded(plan: Plan, group: Geometry, limit: Array) -> Plan:
    """Shrinks a plan until the norm of the part that it makes is at most `limit`.

    Where the part's two summands cancel, its norm is known no better than to rounding:
    a bound that trusted a smaller value would let a huge regularizer's rounding
    through. So the norm here errs on the large side.
    """
    shrink = shrinkage(part_norm(group, plan, _UNCERTAIN), limit)
    return Plan(plan.along * shrink, plan.kept * shrink)


def shrinkage(norm: Array, limit: Array) -> Array:
    """The factor, at most 1, that brings a norm down to a limit."""
    return jnp.where(norm > limit, limit * _scopes.reciprocal(norm), 1)


def add(along: Array, kept: Array) -> Array:
    """`along + kept`, with an exact zero where the two cancel but for rounding."""
    part = along + kept
    rounding = _ROUNDING * (jnp.abs(along) + jnp.abs(kept))
    return jnp.where(jnp.abs(part) <= rounding, 0, part)
