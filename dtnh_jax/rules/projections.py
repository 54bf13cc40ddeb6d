"""Rules that protect the loss: it falls at least as fast as with `g` alone.

Each function returns the coefficients of `g` and `r` in the regularizer's part, which
is the update minus `g`.
"""

from typing import Any

import jax.numpy as jnp

from dtnh_jax.rules._gram import AnyGram, from_coefficients, ratio

Coefficients = tuple[Any, Any]  # of `g` and `r` in the update minus `g`


@from_coefficients
def weighted_sum(gram: AnyGram) -> Coefficients:
    """Adds both gradients: `g + r`, the gradient of the regularized loss.

    The only rule here that guarantees nothing for the loss.

    Example:
      >>> print(weighted_sum(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [1. 1.]
    """
    return 0, jnp.ones_like(gram[..., 0, 0])


@from_coefficients
def dtnh(gram: AnyGram) -> Coefficients:
    """Removes the component of `r` that opposes `g` in a conflict.

    The update is `g + r - min(0, <g, r>) / ||g||^2 * g`: the point nearest to `g + r`
    that makes at least the progress of `g` alone, `<g, update> >= ||g||^2`. Without
    conflict, `<g, r> >= 0`, it is `g + r`. If `g` is zero, it is `r`.

    Example:
      >>> print(dtnh(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [3. 1.]

    References:
      Wan et al., 2019, Algorithm 1, https://arxiv.org/abs/1911.07489

    Differs from the paper in notation only: here `r` is already multiplied by
    `strength`.
    """
    conflict = jnp.minimum(0, gram[..., 0, 1])
    return -ratio(conflict, gram[..., 0, 0]), 1


@from_coefficients
def gate(gram: AnyGram) -> Coefficients:
    """Drops `r` in a conflict.

    The update is `g + r` if `<g, r> >= 0`, else `g`, so it makes at least the progress
    of `g` alone. It is the only rule that is not continuous where a conflict begins. At
    element scope it equals `dtnh`.

    Example:
      >>> print(gate(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [1. 0.]

    References:
      Du et al., 2018, without weighting by the cosine, https://arxiv.org/abs/1812.02224
      Tian et al., 2024, selective projection decay, https://arxiv.org/abs/2411.01713

    Differs from selective projection decay, which shares only the test, and with
    `<g, r> > 0` instead of `>= 0`. There `r` is not added to the gradient: it sets how
    far the parameters are projected back after the step.
    """
    is_kept = gram[..., 0, 1] >= 0
    return 0, is_kept.astype(gram[..., 0, 0].dtype)


@from_coefficients
def orthogonal(gram: AnyGram) -> Coefficients:
    """Keeps only the component of `r` orthogonal to `g`.

    The update is `g + r - <g, r> / ||g||^2 * g`. It makes exactly the progress of `g`
    alone, `<g, update> = ||g||^2`: the regularizer neither slows nor speeds the loss.

    Example:
      >>> print(orthogonal(jnp.array([[1.0, 2.0], [2.0, 9.0]])))
      [-1.  1.]

    References:
      Hsieh et al., 2024, Bloop, https://arxiv.org/abs/2402.02998

    Differs from the paper, which projects on a moving average of `g`: for that, set the
    option `ema_decay` of the transformations. Differs from the official code, which
    adds a constant to `||g||^2`.
    """
    return -ratio(gram[..., 0, 1], gram[..., 0, 0]), 1


@from_coefficients
def dynamic_barrier(gram: AnyGram) -> Coefficients:
    """Takes the point nearest to `r` that makes at least the progress of `g`.

    The update is `max(0, 1 - <g, r> / ||g||^2) * g + r`, and `<g, update> >= ||g||^2`.
    If `r` alone makes that progress, the update is `r`.

    Example:
      >>> print(dynamic_barrier(jnp.array([[1.0, 2.0], [2.0, 9.0]])))
      [0. 1.]

    References:
      Gong et al., 2021, https://openreview.net/forum?id=817F5yuNAf1
      Hsieh et al., 2024, as a baseline, https://arxiv.org/abs/2402.02998

    Differs from the paper, which does not fix the barrier: here it is `||g||^2`, as in
    the code of the second reference.
    """
    along = ratio(gram[..., 0, 1], gram[..., 0, 0])
    return jnp.maximum(-1, -along), 1
