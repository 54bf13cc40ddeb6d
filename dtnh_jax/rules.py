"""Conflict rules: how much of two gradients to take, from their Gram matrix alone.

A rule maps the Gram matrix `[[<g, g>, <g, r>], [<r, g>, <r, r>]]` of the loss gradient
`g` and the scaled regularizer gradient `r = strength * dregularizer` to weights `w`,
and the update is `w[0] * g + w[1] * r`. Rules are pure functions and work on any number
of leading axes, one matrix for each group of parameters. They are called with both
gradients divided by the length of the longer one, so every rule has to be homogeneous:
`rule(c * gram) == rule(gram)`.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


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


def weighted_sum(gram: Gram) -> Weights:
    """No resolution: `g + r`, the gradient of the regularized loss.

    Example:
      >>> print(weighted_sum(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [1. 1.]
    """
    one = jnp.ones_like(gram[..., 0, 0])
    return _weights(one, one)


def dtnh(gram: Gram) -> Weights:
    """Projects the regularizer away from the loss where they conflict.

    The update is `g + r - min(0, <g, r>) / ||g||^2 * g`: the point nearest to `g + r`
    that makes at least the progress of `g` alone, `<g, update> >= ||g||^2`. Without
    conflict, `<g, r> >= 0`, it is `g + r`. A zero `g` protects nothing.

    Example:
      >>> print(dtnh(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [3. 1.]

    References:
      Wan et al., 2019, Algorithm 1, https://arxiv.org/abs/1911.07489

    Differs from the paper, where the correction has no name for `strength`: here `r`
    has been multiplied by it, which comes to the same.
    """
    conflict = jnp.minimum(0, gram[..., 0, 1])
    return _weights(1 - _ratio(conflict, gram[..., 0, 0]), 1)


def _weights(loss, regularizer) -> Weights:
    return jnp.stack(jnp.broadcast_arrays(loss, regularizer), axis=-1)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """A quotient that is 0 where the denominator is."""
    is_zero = denominator == 0
    return jnp.where(is_zero, 0, numerator / jnp.where(is_zero, 1, denominator))
