"""The Gram matrix of two gradients, and the types of rules."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Gram:
    """The Gram matrix `[[<g, g>, <g, r>], [<g, r>, <r, r>]]` of each group.

    It is stored as three arrays of shape `[*groups]`: at element scope, an array
    `[*groups, 2, 2]` would take four times the memory of a gradient. A rule indexes it
    like that array, `gram[..., i, j]`; `jnp.asarray(gram)` returns that array.

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


# Rules accept both.
AnyGram = Gram | Float[Array, "*groups 2 2"]
Weights = Float[Array, "*groups 2"]
Rule = Callable[[Any], Weights]  # from `AnyGram`
# Attributes that a rule copies from its function; not the types of its arguments.
_NAMES = ("__module__", "__name__", "__qualname__", "__doc__")


class Coefficients(NamedTuple):
    """The coefficients of both gradients in the regularizer's part, for each group.

    The part is the update minus the loss gradient, so the coefficient of `g` is a
    rule's weight of `g` minus 1. In a conflict with a small regularizer that difference
    is tiny, and the subtraction would lose it to rounding. So rules return it directly
    if they can.
    """

    g: Float[Array, "*groups"]
    r: Float[Array, "*groups"]


def from_coefficients(coefficients: Callable[[Any], tuple[Any, Any]]) -> Rule:
    """Returns a rule, from a function that returns its `Coefficients`."""

    def rule(gram: AnyGram) -> Weights:
        g, r = coefficients(gram)
        return weights(1 + g, r)

    for name in _NAMES:
        setattr(rule, name, getattr(coefficients, name))
    rule.coefficients = coefficients  # pyright: ignore[reportFunctionMemberAccess]
    return rule


def coefficients(rule: Rule, gram: Gram) -> Coefficients:
    """Returns the coefficients of any rule, exactly if the rule defines them."""
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
    """Returns the quotient, or 0 where the denominator is 0."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))


class Polar(NamedTuple):
    """A Gram matrix as lengths and a cosine, whose products can not overflow.

    `versine` and `coversine` stay accurate where nearly parallel gradients cancel:
    `||g - r||^2` is `(g - r)**2 + 2 * g * r * versine`.
    """

    g: Float[Array, "*groups"]  # lengths, divided by that of the longer gradient
    r: Float[Array, "*groups"]
    cosine: Float[Array, "*groups"]  # in [-1, 1]; 0 if a gradient is zero
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
        """Sine of the angle, at least 0."""
        return jnp.sqrt(self.versine * self.coversine)

    @property
    def rounding(self) -> float:
        """Largest rounding error of the cosine of two parallel gradients."""
        return 8 * float(jnp.finfo(self.cosine.dtype).eps)


def polar(gram: AnyGram) -> Polar:
    """Returns the polar form of a Gram matrix."""
    g, r = jnp.sqrt(gram[..., 0, 0]), jnp.sqrt(gram[..., 1, 1])
    cosine = jnp.clip(ratio(gram[..., 0, 1], g * r), -1, 1)
    longest = jnp.maximum(g, r)
    return Polar(ratio(g, longest), ratio(r, longest), cosine, (g > 0) & (r > 0))
