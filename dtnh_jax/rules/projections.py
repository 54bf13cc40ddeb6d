"""Rules that put the loss first: its progress is at least what `g` alone makes.

Each is written as what it adds to `g`: coefficients of `g` and of `r`.
"""

from typing import Any

import jax.numpy as jnp

from dtnh_jax.rules._gram import AnyGram, from_coefficients, ratio

Coefficients = tuple[Any, Any]  # what is added to `g`: weights of `g` and of `r`


@from_coefficients
def weighted_sum(gram: AnyGram) -> Coefficients:
    """No resolution: `g + r`, the gradient of the regularized loss.

    The one rule of this file that promises the loss nothing.

    Example:
      >>> print(weighted_sum(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [1. 1.]
    """
    return 0, jnp.ones_like(gram[..., 0, 0])


@from_coefficients
def dtnh(gram: AnyGram) -> Coefficients:
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
    return -ratio(conflict, gram[..., 0, 0]), 1


@from_coefficients
def gate(gram: AnyGram) -> Coefficients:
    """Drops the regularizer where it conflicts with the loss.

    The update is `g + r` where `<g, r> >= 0` and `g` elsewhere, so it makes at least
    the progress of `g` alone. It is the only rule here that jumps as a conflict
    begins. At element scope it is the same as `dtnh`.

    Example:
      >>> print(gate(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [1. 0.]

    References:
      Du et al., 2018, without weighting by the cosine, https://arxiv.org/abs/1812.02224
      Tian et al., 2024, selective projection decay, https://arxiv.org/abs/2411.01713

    Differs from selective projection decay, which shares only the test: there `r` is
    kept where `<g, r> > 0`, not where it is 0, and sets how far the parameters are
    projected back after the step instead of being added to the gradient.
    """
    is_kept = gram[..., 0, 1] >= 0
    return 0, is_kept.astype(gram[..., 0, 0].dtype)


@from_coefficients
def orthogonal(gram: AnyGram) -> Coefficients:
    """Keeps only what the regularizer has at right angles to the loss.

    The update is `g + r - <g, r> / ||g||^2 * g`, whose progress is exactly that of `g`
    alone, `<g, update> = ||g||^2`: the regularizer can neither slow nor speed the loss.

    Example:
      >>> print(orthogonal(jnp.array([[1.0, 2.0], [2.0, 9.0]])))
      [-1.  1.]

    References:
      Hsieh et al., 2024, Bloop, https://arxiv.org/abs/2402.02998

    Differs from the paper, which projects on a moving average of `g`, and from its code
    in that nothing is added to `||g||^2`. The average is the option `ema_decay`
    of the transformations.
    """
    return -ratio(gram[..., 0, 1], gram[..., 0, 0]), 1


@from_coefficients
def dynamic_barrier(gram: AnyGram) -> Coefficients:
    """Follows the regularizer, and the loss only as far as its progress demands.

    The update is `max(0, 1 - <g, r> / ||g||^2) * g + r`: the point nearest to `r` that
    makes at least the progress of `g` alone, `<g, update> >= ||g||^2`. Where `r` does
    so by itself, the update is `r`.

    Example:
      >>> print(dynamic_barrier(jnp.array([[1.0, 2.0], [2.0, 9.0]])))
      [0. 1.]

    References:
      Gong et al., 2021, https://openreview.net/forum?id=817F5yuNAf1
      Hsieh et al., 2024, as a baseline, https://arxiv.org/abs/2402.02998

    Differs from the paper, which leaves the barrier open: here it is `||g||^2`, as in
    the code of the second reference.
    """
    along = ratio(gram[..., 0, 1], gram[..., 0, 0])
    return jnp.maximum(-1, -along), 1
