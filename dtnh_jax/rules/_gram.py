"""The Gram matrix of two gradients, and what rules compute from it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Entries:
    """A symmetric Gram matrix that is kept as its three entries.

    What rules are called with: `gram[..., i, j]` works as on an array `[..., 2, 2]`,
    but nothing is put together first, which at element scope would write four times
    the memory of the gradients. `jnp.asarray(gram)` is the array.
    """

    def __init__(self, xx: Array, xy: Array, yy: Array):
        self._rows = ((xx, xy), (xy, yy))

    def __getitem__(self, index: Any) -> Array:
        if isinstance(index, tuple) and len(index) == 3 and index[0] is Ellipsis:
            return self._rows[index[1]][index[2]]
        return self.__jax_array__()[index]

    def __jax_array__(self) -> Array:
        return jnp.stack([jnp.stack(row, axis=-1) for row in self._rows], axis=-2)


Gram = Float[Array, "*groups 2 2"] | Entries
Weights = Float[Array, "*groups 2"]
Rule = Callable[[Any], Weights]  # of a Gram
# What a function is known by, but for the types in it.
_NAMES = ("__module__", "__name__", "__qualname__", "__doc__")


class Polar(NamedTuple):
    """A Gram matrix as lengths and an angle, whose products cannot leave their range.

    Where nearly parallel gradients cancel, `versine` and `coversine` are what is left:
    `||g - r||^2` is `(g - r)**2 + 2 * g * r * versine`.
    """

    g: Float[Array, "*groups"]  # lengths, over that of the longer gradient
    r: Float[Array, "*groups"]
    cosine: Float[Array, "*groups"]  # in [-1, 1], and 0 where a gradient is
    has_both: Bool[Array, "*groups"]  # neither gradient is zero

    @property
    def versine(self) -> Array:
        """`1 - cosine`."""
        return 1 - self.cosine

    @property
    def coversine(self) -> Array:
        """`1 + cosine`."""
        return 1 + self.cosine

    @property
    def sine(self) -> Array:
        """Of the angle, at least 0."""
        return jnp.sqrt(self.versine * self.coversine)

    @property
    def rounding(self) -> float:
        """How much the cosine of two parallel gradients may differ from 1."""
        return 8 * float(jnp.finfo(self.cosine.dtype).eps)


def polar(gram: Gram) -> Polar:
    """Returns the polar form of a Gram matrix."""
    g, r = jnp.sqrt(gram[..., 0, 0]), jnp.sqrt(gram[..., 1, 1])
    cosine = jnp.clip(ratio(gram[..., 0, 1], g * r), -1, 1)
    longest = jnp.maximum(g, r)
    return Polar(ratio(g, longest), ratio(r, longest), cosine, (g > 0) & (r > 0))


def weights(loss: Any, regularizer: Any) -> Weights:
    """Returns the weights of the two gradients as one array."""
    return jnp.stack(jnp.broadcast_arrays(loss, regularizer), axis=-1)


def from_part(part: Callable[[Any], tuple[Any, Any]]) -> Rule:
    """Makes a rule of what it adds to the loss gradient.

    A weight near 1 is known to rounding, and what is beyond 1 is all that is left of a
    conflict with a regularizer that is much smaller than the loss. So rules of this
    kind tell it by itself, as `rule.part`; see `part_of`.

    Args:
      part: maps a Gram matrix to `w[0] - 1` and `w[1]`.
    """

    def rule(gram: Gram) -> Weights:
        excess, kept = part(gram)
        return weights(1 + excess, kept)

    for name in _NAMES:
        setattr(rule, name, getattr(part, name))
    rule.part = part  # pyright: ignore[reportFunctionMemberAccess]  (any has them)
    return rule


def part_of(rule: Rule, gram: Gram) -> tuple[Array, Array]:
    """Returns `w[0] - 1` and `w[1]` of any rule, as exactly as it can tell."""
    if part := getattr(rule, "part", None):
        excess, kept, _ = jnp.broadcast_arrays(*part(gram), gram[..., 0, 0])
        return excess, kept
    both = rule(gram)
    return both[..., 0] - 1, both[..., 1]


def ratio(numerator: Array, denominator: Array) -> Array:
    """A quotient that is 0 where the denominator is."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))
