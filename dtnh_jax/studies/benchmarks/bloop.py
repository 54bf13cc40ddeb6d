"""Bloop as in its authors' code: two gradients from two calls of `jax.grad`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from dtnh_jax import GradientPair


class BloopState(NamedTuple):
    """State of Bloop."""

    average: PyTree  # moving average of loss gradients


def bloop(strength: float, rate: float = 0.1) -> optax.GradientTransformation:
    """`g + strength * (r - <m, r> / ||m||^2 * m)`, with `m` the moving average of `g`.

    It does not handle extreme scales, half precision or numbers that are not finite.

    Args:
      strength: factor of the regularizer.
      rate: weight of the newest gradient in the average.

    Returns:
      A transformation of a `GradientPair`.

    Example:
      >>> tx = bloop(strength=1.0)
      >>> g, r = jnp.array([1.0, 0.0]), jnp.array([-1.0, 2.0])
      >>> updates, _ = tx.update(GradientPair(g, r), tx.init(g))
      >>> print(updates.round(3))
      [1. 2.]

    References:
      Hsieh et al., 2024, algorithm 1, https://arxiv.org/abs/2402.02998
    """

    def init(params):
        return BloopState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        g, r = updates
        m = jax.tree.map(lambda m, g: m + rate * (g - m), state.average, g)
        # The authors add 1e-7 to the squared norm, against division by zero.
        share = _inner(m, r) / (_inner(m, m) + 1e-7)
        new = jax.tree.map(lambda g, r, m: g + strength * (r - share * m), g, r, m)
        return new, BloopState(m)

    return optax.GradientTransformation(init, update)


def two_gradients(objective, *args) -> tuple[GradientPair, PyTree]:
    """Returns both gradients of `objective(*args) -> (loss, regularizer), aux`."""

    def pick(number):
        def term(*args) -> tuple[Array, PyTree]:
            values, aux = objective(*args)
            return values[number], aux

        return term

    loss, aux = jax.grad(pick(0), has_aux=True)(*args)
    regularizer, _ = jax.grad(pick(1), has_aux=True)(*args)
    return GradientPair(loss, regularizer), aux


def _inner(a: PyTree, b: PyTree) -> Array:
    return jnp.asarray(optax.tree.vdot(a, b))
