"""The Gram matrix of two gradients, and how rules answer to it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Gram:
    """The Gram matrix `[[<g, g>, <g, r>], [<g, r>, <r, r>]]` of each group.

    It is kept as three arrays of one shape `[*groups]`: at element scope, an array
    `[*groups, 2, 2]` would take four times the memory of a gradient. A rule reads it
    like that array, `gram[..., i, j]`, and `jnp.asarray(gram)` makes it.

    Attributes:
      gg: `<g, g>`.
      gr: `<g, r>`.
      rr: `<r, r>`.
    """

    def __init__(self, gg: Array, gr: Array, rr: Array):
        self.gg, self.gr, self.rr = gg, gr, rr

    def __getitem__(self, index: Any) -> Array:
        if isinstance(index, tuple) and len(index) == 3 and index[0] is Ellipsis:
            return ((self.gg, self.gr), (self.gr, self.rr))[index[1]][index[2]]
        return self.__jax_array__()[index]

    def __jax_array__(self) -> Array:
        rows = ((self.gg, self.gr), (self.gr, self.rr))
        return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


# What rules are called with.
AnyGram = Gram | Float[Array, "*groups 2 2"]
Weights = Float[Array, "*groups 2"]
Rule = Callable[[Any], Weights]  # of `AnyGram`
# What a function is known by, but for the types in it.
_NAMES = ("__module__", "__name__", "__qualname__", "__doc__")


class Coefficients(NamedTuple):
    """What a rule adds to `g` in each group: `g * g's gradient + r * r's`.

    The first is a rule's weight of `g` less 1. A weight near 1 is known to rounding,
    and what is beyond 1 is all that is left of a conflict with a small regularizer: so
    it is not computed by subtraction where a rule can tell it by itself.
    """

    g: Float[Array, "*groups"]
    r: Float[Array, "*groups"]


def from_coefficients(coefficients: Callable[[Any], tuple[Any, Any]]) -> Rule:
    """Makes a rule from a function that returns its `Coefficients`."""

    def rule(gram: AnyGram) -> Weights:
        g, r = coefficients(gram)
        return weights(1 + g, r)

    for name in _NAMES:
        setattr(rule, name, getattr(coefficients, name))
    rule.coefficients = coefficients  # pyright: ignore[reportFunctionMemberAccess]
    return rule


def coefficients(rule: Rule, gram: Gram) -> Coefficients:
    """Returns what any rule adds to `g`, as exactly as the rule can tell."""
    if exact := getattr(rule, "coefficients", None):
        g, r, _ = jnp.broadcast_arrays(*exact(gram), gram.gg)
    else:
        both = rule(gram)
        g, r = both[..., 0] - 1, both[..., 1]
    return Coefficients(g.astype(gram.gg.dtype), r.astype(gram.gg.dtype))


def weights(loss: Any, regularizer: Any) -> Weights:
    """Returns the weights of the two gradients as one array."""
    return jnp.stack(jnp.broadcast_arrays(loss, regularizer), axis=-1)


def ratio(numerator: Array, denominator: Array) -> Array:
    """A quotient that is 0 where the denominator is."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))


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


def polar(gram: AnyGram) -> Polar:
    """Returns the polar form of a Gram matrix."""
    g, r = jnp.sqrt(gram[..., 0, 0]), jnp.sqrt(gram[..., 1, 1])
    cosine = jnp.clip(ratio(gram[..., 0, 1], g * r), -1, 1)
    longest = jnp.maximum(g, r)
    return Polar(ratio(g, longest), ratio(r, longest), cosine, (g > 0) & (r > 0))
