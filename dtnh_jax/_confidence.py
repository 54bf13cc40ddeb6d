"""How sure the moving average of a gradient is of the gradient's sign."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dtnh_jax import _scopes, _trees
from dtnh_jax._options import Number


class Moments(NamedTuple):
    """What is known of the loss's gradient in one leaf."""

    raw_mean: Array  # to be kept, with the bias of a start from zero
    raw_root: Array
    mean: Array  # without it
    ratio: Array  # of the mean's size to the root mean square, from 0 to 1
    freedom: Float[Array, ""]  # degrees of freedom of the mean


def moments(
    xs: Sequence[Array],
    means: Sequence[Array],
    roots: Sequence[Array],
    step: Int[Array, ""],
    decay: Number,
) -> list[Moments]:
    """Takes one more gradient into account.

    Args:
      xs: leaves of the loss gradient.
      means: moving averages of those before, from zero.
      roots: roots of the moving averages of their squares, from zero.
      step: how many they are.
      decay: of the averages, at least 0 and below 1.
    """
    decay = jnp.asarray(decay, jnp.float32)
    forgotten = decay ** (step + 1)  # the weight that the zeros still have
    freedom = (1 + decay) / (1 - decay) * (1 - forgotten) / (1 + forgotten) - 1
    freedom = jnp.where(step == 0, 0, jnp.maximum(freedom, 0))

    def of_leaf(mean, root, x):
        x = _trees.as_float32(x)
        new_mean = decay * mean + (1 - decay) * x
        size = jnp.sqrt(1 - decay) * jnp.abs(x)
        new_root = _hypot(jnp.sqrt(decay) * root, size)
        unbiased = new_mean / (1 - forgotten)
        true_root = new_root / jnp.sqrt(1 - forgotten)
        ratio = jnp.abs(unbiased) * _scopes.reciprocal(true_root)
        return Moments(new_mean, new_root, unbiased, ratio, freedom)

    return [of_leaf(*each) for each in zip(means, roots, xs, strict=True)]


def _hypot(a: Array, b: Array) -> Array:
    """The root of a sum of squares, with a derivative of 0 where both are 0."""
    is_zero = (a == 0) & (b == 0)
    return jnp.where(is_zero, 0, jnp.hypot(jnp.where(is_zero, 1, a), b))


def confidence(ratio: Array, freedom: Float[Array, ""]) -> Array:
    """`2 p - 1`, at least 0, where `p` is the chance that a mean's true sign is plus.

    Args:
      ratio: of a mean to the root mean square of what it is of, from -1 to 1.
      freedom: degrees of freedom of the mean. Its t is
        `sqrt(freedom) * ratio / sqrt(1 - ratio^2)`.

    References:
      Wallace, 1959, equation 2.5, https://doi.org/10.1214/aoms/1177706090, for the
      normal deviate that is as likely as a t: wrong by less than 0.01 in `p` for one
      degree of freedom, and by less than 0.0005 for eighteen.
    """
    ratio = jnp.clip(ratio, 0, 1 - 2.0**-24)
    # log(1 + t^2 / freedom) = -log(1 - ratio^2)
    spread = _scopes.root(-freedom * jnp.log1p(-ratio * ratio))
    deviate = (8 * freedom + 1) / (8 * freedom + 3) * spread
    return jax.lax.erf(deviate / np.sqrt(2.0).astype(np.float32))
