"""Rules of multi-task learning: the regularizer counts as much as the loss.

They treat both gradients alike, and most of them also protect the regularizer from the
loss. Two conventions make them comparable with `weighted_sum`, at the same learning
rate:

- Some papers average over tasks, others sum. Here every rule sums, which for two
  gradients is twice the average.
- If one gradient is zero, the update is the other one. By their definitions, `mgda` and
  `nash_mtl` would return zero. Then a regularizer such as L2-SP, whose gradient is
  zero at the start, would stop training before its first step.

The second convention does not help if a gradient is nearly zero: the update of `mgda`,
`imtl_g` and `aligned_mtl` is at most a small multiple of the shorter gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from dtnh_jax.rules._gram import AnyGram, Weights, polar, ratio, weights


def pcgrad(gram: AnyGram) -> Weights:
    """Adds both gradients, each projected away from the other in a conflict.

    The update is `g + r - min(0, <g, r>) * (g / ||g||^2 + r / ||r||^2)`: the projection
    of `dtnh`, applied to both gradients. It raises neither term, but may slow both.
    Without conflict it is `g + r`.

    Example:
      >>> print(pcgrad(jnp.array([[1.0, -2.0], [-2.0, 8.0]])))
      [3.   1.25]

    For two gradients this equals `upgrad`, the sum of both projections onto the dual
    cone, because a gradient projected away from the other never conflicts with itself.

    References:
      Yu et al., 2020, Algorithm 1, https://arxiv.org/abs/2001.06782;
      Quinton and Rey, 2024, Proposition 1, https://arxiv.org/abs/2406.16232

    Differs from the first paper only for more than two tasks: two tasks need no
    shuffling. Differs from the second paper, which averages the projections: here they
    are summed.
    """
    conflict = jnp.minimum(0, gram[..., 0, 1])
    return weights(
        1 - ratio(conflict, gram[..., 0, 0]), 1 - ratio(conflict, gram[..., 1, 1])
    )


def dualproj(gram: AnyGram) -> Weights:
    """Projects `g + r` onto the directions that raise neither term.

    The update is `max(1, -<g, r> / ||g||^2) * g + max(1, -<g, r> / ||r||^2) * r`: the
    point nearest to `g + r` with `<g, d> >= 0` and `<r, d> >= 0`. If `g + r` itself
    raises neither term, it is the update, even in a conflict. If the regularizer
    outweighs the loss, the update is that of `dtnh` minus `g`: to first order the loss
    neither rises nor falls.

    Example:
      >>> print(dualproj(jnp.array([[1.0, -2.0], [-2.0, 8.0]])))
      [2. 1.]

    References:
      Lopez-Paz and Ranzato, 2017, Equation 11, https://arxiv.org/abs/1706.08840

    Differs from the paper, which projects the gradient of the current task against
    those of past tasks: here the sum is projected against its own summands.
    """
    conflict = jnp.minimum(0, gram[..., 0, 1])
    return weights(
        jnp.maximum(1, -ratio(conflict, gram[..., 0, 0])),
        jnp.maximum(1, -ratio(conflict, gram[..., 1, 1])),
    )


def cagrad(gram: AnyGram, *, c: float | Float[Array, ""] = 0.5) -> Weights:
    """Maximizes the progress of the worse-off term, within a ball around `g + r`.

    The update maximizes `min(<g, d>, <r, d>)` over `||d - (g + r)|| <= c * ||g + r||`.
    It lowers the sum of both terms, but may raise the loss. It is
    `g + r + c * ||g + r|| * m / ||m||` with `m` on the segment from `g` to `r`. For two
    gradients, the stationary `m` has a closed form. With

      q = (||g||^2 - ||r||^2) / sqrt(||g||^2 ||r||^2 - <g, r>^2),
      R = sqrt(4 c^2 - (1 - c^2) q^2)

    and `h = (||r||^2 - <g, r>, ||g||^2 - <g, r>)`, the weights are
    `1 + (R * h + (-1, 1) * (||g||^2 - ||r||^2)) / ||g - r||^2` if these are real and at
    least 1. Otherwise `m` is the shorter of the two gradients.

    Args:
      gram: Gram matrices `[..., 2, 2]`.
      c: radius of the ball relative to `||g + r||`, at least 0 and below 1; 0 is the
        plain sum. To set it, pass `functools.partial(cagrad, c=0.2)` as the rule.

    Returns:
      The weights `[..., 2]`.

    Raises:
      ValueError: `c` is out of range.

    Example:
      >>> print(cagrad(jnp.array([[4.0, 0.0], [0.0, 4.0]])))
      [1.5 1.5]

    References:
      Liu et al., 2021, Algorithm 1, https://arxiv.org/abs/2110.14048

    Differs from the paper, whose ball is around the average, so that its update is half
    of this one. Differs from the official code, which divides the update by `1 + c^2`.
    """
    if isinstance(c, (int, float)) and not 0 <= c < 1:
        raise ValueError(f"`c` must be at least 0 and below 1, got {c}.")
    p = polar(gram)
    apart = p.g - p.r
    square_of_sum = apart**2 + 2 * p.g * p.r * p.coversine
    square_of_difference = apart**2 + 2 * p.g * p.r * p.versine
    excess, area = apart * (p.g + p.r), p.g * p.r * p.sine
    limit = 2 * c / jnp.sqrt(1 - c * c)  # of |q|, where R is 0
    q = jnp.clip(ratio(excess, area), -limit, limit)
    reach = jnp.sqrt(jnp.maximum(0, 4 * c * c - (1 - c * c) * q * q))
    inner_g = reach * p.r * (p.g * p.versine - apart) - excess
    inner_r = reach * p.g * (p.r * p.versine + apart) + excess
    is_inner = (jnp.abs(excess) < limit * area) & (inner_g >= 0) & (inner_r >= 0)
    radius = c * jnp.sqrt(square_of_sum)
    end_g = jnp.where(apart < 0, ratio(radius, p.g), jnp.where(apart == 0, c, 0))
    end_r = jnp.where(apart > 0, ratio(radius, p.r), jnp.where(apart == 0, c, 0))
    extra_g = jnp.where(is_inner, ratio(inner_g, square_of_difference), end_g)
    extra_r = jnp.where(is_inner, ratio(inner_r, square_of_difference), end_r)
    return weights(
        jnp.where(p.has_both, 1 + extra_g, 1), jnp.where(p.has_both, 1 + extra_r, 1)
    )


def mgda(gram: AnyGram) -> Weights:
    """Takes twice the shortest vector on the segment between the gradients.

    The update is `2 * (a * g + (1 - a) * r)` with the `a` in `[0, 1]` that makes it
    shortest: `a : 1 - a = max(0, ||r||^2 - <g, r>) : max(0, ||g||^2 - <g, r>)`. It
    lowers both terms unless it is zero. It is tiny if either gradient is, and at
    element scope it is zero in every conflict.

    Example:
      >>> print(mgda(jnp.array([[1.0, -2.0], [-2.0, 11.0]])))
      [1.625 0.375]

    References:
      Désidéri, 2012, https://doi.org/10.1016/j.crma.2012.03.014
      Sener and Koltun, 2018, for two tasks, https://arxiv.org/abs/1810.04650

    Differs from the papers, whose weights sum to 1: here they sum to 2, so that two
    equal gradients have the update `g + r`. Also, a zero gradient is left out; by the
    definition the update would be zero.
    """
    cross = gram[..., 0, 1]
    g = jnp.maximum(0, gram[..., 1, 1] - cross)
    r = jnp.maximum(0, gram[..., 0, 0] - cross)
    is_free = (g + r == 0) | (gram[..., 0, 0] == 0) | (gram[..., 1, 1] == 0)
    return weights(
        jnp.where(is_free, 1, 2 * ratio(g, g + r)),
        jnp.where(is_free, 1, 2 * ratio(r, g + r)),
    )


def imtl_g(gram: AnyGram) -> Weights:
    """Takes the update whose projections on both gradients are equal.

    The update is `2 * (||r|| * g + ||g|| * r) / (||g|| + ||r||)`, which bisects the
    angle between the gradients. It raises neither term, and its direction does not
    depend on the strength.

    Example:
      >>> print(imtl_g(jnp.array([[1.0, -2.0], [-2.0, 9.0]])))
      [1.5 0.5]

    References:
      Liu et al., 2021, IMTL-G, https://openreview.net/forum?id=IMPnRXEWpvr

    Differs from the paper, whose weights sum to 1: here they sum to 2, so that
    gradients of equal length have the update `g + r`. For parallel gradients the
    paper's linear system has no unique solution; here they get its limit.
    """
    p = polar(gram)
    total = p.g + p.r
    return weights(
        jnp.where(p.has_both, 2 * ratio(p.r, total), 1),
        jnp.where(p.has_both, 2 * ratio(p.g, total), 1),
    )


def nash_mtl(gram: AnyGram) -> Weights:
    """Maximizes the product of both terms' progress: the Nash bargaining solution.

    The weights solve `w * (G @ w) = ||G||`, where `G` is the Gram matrix and `||G||`
    its Frobenius norm: `w = sqrt(||G|| / (1 + cos)) * (1 / ||g||, 1 / ||r||)`. The
    update raises neither term. Its direction is that of `imtl_g`; its length is
    `sqrt(2 ||G||)`, whatever the angle. For opposite gradients it is zero.

    Example:
      >>> print(nash_mtl(jnp.array([[4.0, 4.0], [4.0, 4.0]])))
      [1. 1.]

    References:
      Navon et al., 2022, https://arxiv.org/abs/2202.01017

    Differs from the paper's equation `G @ w = 1 / w`, whose update has the length
    `sqrt(2)` however small the gradients are. The factor `||G||`, from the official
    code, makes the rule homogeneous; two equal gradients then have the update `g + r`.
    The official code also clips the update: chain `optax.clip_by_global_norm` for that.
    """
    p = polar(gram)
    frobenius = jnp.sqrt(p.g**4 + p.r**4 + 2 * (p.g * p.r * p.cosine) ** 2)
    length = jnp.sqrt(ratio(frobenius, p.coversine))
    length = jnp.where(p.coversine > p.rounding, length, 0)
    return weights(
        jnp.where(p.has_both, ratio(length, p.g), 1),
        jnp.where(p.has_both, ratio(length, p.r), 1),
    )


def aligned_mtl(gram: AnyGram) -> Weights:
    """Adds the nearest orthogonal pair of equal length in place of the gradients.

    The pair has the smaller singular value of `(g, r)` as its length, and `w` is
    `sqrt(smallest eigenvalue) * G^(-1/2) @ (1, 1)`. For two gradients, with
    `D = sqrt(||g||^2 ||r||^2 - <g, r>^2)`, that is
    `(||r||^2 + D - <g, r>, ||g||^2 + D - <g, r>) / (largest eigenvalue + D)`.
    Neither term dominates, but weights may be negative and the update may raise the
    loss.

    Parallel gradients, which are the only case at element scope, have no such pair.
    Their update is `g + r`, in conflicts too.

    Example:
      >>> print(aligned_mtl(jnp.array([[1.0, 0.0], [0.0, 4.0]])))
      [1.  0.5]

    References:
      Senushkin et al., 2023, Algorithm 1, https://arxiv.org/abs/2305.19000

    Differs from the paper, whose task weights sum to 1: here both are 1. Only the angle
    decides whether the rank is 1, because gradients of very different lengths need not
    be parallel.
    """
    p = polar(gram)
    cross, area = p.g * p.r * p.cosine, p.g * p.r * p.sine
    spread = jnp.sqrt(((p.g - p.r) * (p.g + p.r)) ** 2 + 4 * cross**2)
    scale = (p.g**2 + p.r**2 + spread) / 2 + area
    is_parallel = jnp.minimum(p.versine, p.coversine) <= p.rounding
    is_plain = is_parallel | ~p.has_both
    tilt = p.sine - p.cosine
    return weights(
        jnp.where(is_plain, 1, ratio(p.r * (p.r + p.g * tilt), scale)),
        jnp.where(is_plain, 1, ratio(p.g * (p.g + p.r * tilt), scale)),
    )
