"""Regularizers of the relations between the examples of a batch."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dtnh_jax.regularizers.features._maps import (
    FeatureMaps,
    on_every_device,
    paired,
    unit,
)


def relational(
    student: FeatureMaps,
    teacher: FeatureMaps,
    *,
    distance: float = 1.0,
    angle: float = 2.0,
) -> Float[Array, ""]:
    """Keeps the distances and the angles between the examples of a batch.

    The features of an example form one vector. Distances are Euclidean, divided by
    their mean over the batch. Angles are cosines at the middle one of three examples.
    The Huber loss with delta 1 compares both with the teacher's. Its values are
    averaged: distances over ordered pairs, angles over ordered triplets of distinct
    examples. Layers are summed. The teacher's maps get no gradient.

    Two equal examples define no direction, and the cosine of an angle with such a side
    counts as 0. A batch of one has no pairs, a batch of two no triplets; a mean over
    none is 0.

    Angles take memory and time proportional to `batch^3`, so they suit batches of up to
    a few hundred examples. `angle=0` skips them.

    Args:
      student: feature maps `[batch, ...]` of the network in training, by layer as in
        `feature_map`. On meshes with explicit axes they are gathered.
      teacher: feature maps of the pretrained network on the same batch, of any feature
        size.
      distance: factor of the distances, at least 0.
      angle: factor of the angles, at least 0.

    Returns:
      A scalar in float32.

    Raises:
      TypeError: as in `feature_map`.
      ValueError: as in `feature_map`; also if batch sizes differ, or a factor is
        negative.

    Example:
      >>> teacher = {"pooled": jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])}
      >>> turned = {"pooled": 3 * teacher["pooled"][:, ::-1]}
      >>> other = {"pooled": jnp.array([[5.0], [5.0], [7.0]])}  # two coincide
      >>> of_turned = relational(turned, teacher, angle=0.0)
      >>> of_other = relational(other, teacher, angle=0.0)
      >>> print(f"{of_turned:.3f} {of_other:.3f}")
      0.000 0.204

    References:
      Park et al., 2019, equations 4 to 9, https://arxiv.org/abs/1904.05068

    Differs from the paper, which sums instead of averaging. Differs from the authors'
    code, which averages over all `batch^2` and `batch^3` entries, including the zeros
    of an example with itself: there, terms are smaller, by `(batch - 1) / batch` for
    distances. That code takes the mean over distances above 0, which is the mean over
    pairs, as here, because it raises every distance between two examples above 0.
    """
    for name, value in (("distance", distance), ("angle", angle)):
        if not value >= 0:
            raise ValueError(f"`{name}` must be at least 0, got {value}.")
    total = jnp.zeros([], jnp.float32)
    pairs = paired(student, teacher, slice(1), "of one batch size")
    for ours, theirs in pairs.values():
        batch = len(ours)
        ours, theirs = _distances(ours), _distances(theirs)
        if distance:
            lengths = optax.losses.huber_loss(ours, theirs)
            total += distance * jnp.sum(lengths) / max(batch * (batch - 1), 1)
        if angle:
            angles = optax.losses.huber_loss(_cosines(ours), _cosines(theirs))
            # A triplet of an example, another and the first again has no angle.
            is_angle = ~jnp.eye(batch, dtype=bool)[None]
            triplets = max(batch * (batch - 1) * (batch - 2), 1)
            total += angle * jnp.sum(jnp.where(is_angle, angles, 0.0)) / triplets
    return total


def cka(student: FeatureMaps, teacher: FeatureMaps) -> Float[Array, ""]:
    """Returns 1 minus linear CKA: dissimilarity of features up to rotation and scale.

    The features of each example form one vector, centred over the batch. With their
    Gram matrices `[batch, batch]`, `K` of the student and `L` of the teacher, it is
    `1 - <K, L> / (||K|| ||L||)`. Each layer contributes 0 to 1; layers are summed. The
    teacher's maps get no gradient.

    If all examples have equal features in either network, as in a batch of one, the
    layer counts as 0 and has no gradient. So does a batch of two, for which any two
    networks agree. In batches that are small compared with the number of features, even
    unrelated networks look similar, so use large batches.

    Args:
      student: feature maps `[batch, ...]` of the network in training, by layer as in
        `feature_map`. On meshes with explicit axes they are gathered.
      teacher: feature maps of the pretrained network on the same batch, of any feature
        size.

    Returns:
      A scalar in float32.

    Raises:
      TypeError: as in `feature_map`.
      ValueError: as in `feature_map`; also if batch sizes differ.

    Example:
      >>> teacher = {"pooled": jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])}
      >>> turned = {"pooled": 3 * teacher["pooled"][:, ::-1]}
      >>> other = {"pooled": jnp.array([[0.0], [1.0], [1.0]])}
      >>> print(f"{cka(turned, teacher):.3f} {cka(other, teacher):.3f}")
      0.000 0.684

    References:
      Kornblith et al., 2019, section 3, https://arxiv.org/abs/1905.00414
    """
    total = jnp.zeros([], jnp.float32)
    pairs = paired(student, teacher, slice(1), "of one batch size")
    for ours, theirs in pairs.values():
        ours, theirs = _centred_gram(ours), _centred_gram(theirs)
        has_spread = jnp.any(ours != 0) & jnp.any(theirs != 0)
        # Half the squared distance of unit vectors equals 1 minus their product, is
        # never negative, and is exact for similar ones.
        difference = unit(ours, (0, 1)) - unit(theirs, (0, 1))
        apart = 0.5 * jnp.sum(jnp.square(difference))
        total += jnp.where(has_spread, apart, 0.0)
    return total


def _flat(x: Array) -> Array:
    """Returns `[batch, features]`, gathered on every device."""
    x = on_every_device(x)
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _distances(x: Array) -> Array:
    """Returns distances `[batch, batch]` in units of their mean over pairs."""
    x = _flat(x)

    # Differences, not inner products, so that equal examples have distance 0 exactly.
    # One example at a time, so that no [batch, batch, features] is in memory.
    @jax.checkpoint
    def to_all(example):
        square = jnp.sum(jnp.square(x - example[None]), axis=1)
        is_zero = square == 0
        return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))

    distances = jax.lax.map(to_all, x)
    mean = jnp.sum(distances) / max(len(x) * (len(x) - 1), 1)
    return distances / jnp.where(mean == 0, 1.0, mean)


def _cosines(distances: Array) -> Array:
    """Returns cosines `[j, i, k]` at `j` between `i` and `k`, by the law of cosines."""
    is_zero = distances == 0
    inverse = jnp.where(is_zero, 0.0, 1.0 / jnp.where(is_zero, 1.0, distances))
    square = jnp.square(distances)
    double = square[:, :, None] + square[:, None, :] - square[None, :, :]
    return 0.5 * double * inverse[:, :, None] * inverse[:, None, :]


def _centred_gram(x: Array) -> Array:
    """Returns the inner products `[batch, batch]` of centred examples."""
    x = _flat(x)
    # Equal examples become exactly zero; subtracting their mean alone would round.
    x = x - jax.lax.stop_gradient(x[:1])
    x = x - jnp.sum(x, axis=0, keepdims=True) / max(len(x), 1)
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
