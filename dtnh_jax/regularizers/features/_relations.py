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

    With all features of an example as one vector, distances are Euclidean, and divided
    by their mean over the batch; angles are the cosines at the middle one of three
    examples. Both are compared with the teacher's by the Huber loss with delta 1, and
    averaged: distances over ordered pairs, angles over ordered triplets of distinct
    examples. Layers are summed. The teacher's maps get no gradient.

    Examples that coincide have no direction to each other: the cosine of an angle with
    them as a side counts as 0. A batch of one has no pairs and one of two no triplets;
    the mean over none is 0.

    Angles take memory and time proportional to `batch^3`, so they suit batches up to
    some hundred examples. With `angle=0` they are left out.

    Args:
      student: feature maps `[batch, ...]` of the network in training, by layer as in
        `feature_map`. On meshes with explicit axes they are gathered.
      teacher: those of the pretrained network on the same batch, of any feature size.
      distance: factor of the distances, at least 0.
      angle: factor of the angles, at least 0.

    Returns:
      A scalar in float32.

    Raises:
      TypeError: as `feature_map`.
      ValueError: as `feature_map`; if batch sizes differ, or a factor is negative.

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

    Differs from the paper, which sums where this averages, and from the authors' code,
    which averages over all `batch^2` and `batch^3` entries, those of an example with
    itself, which are 0, among them: there, terms are smaller, by `(batch - 1) / batch`
    for distances. The code also takes the mean distance over those above 0, but it
    lifts all between two examples above it: so that is the mean over pairs, as here.
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
            # From an example to another and back is no angle.
            is_angle = ~jnp.eye(batch, dtype=bool)[None]
            triplets = max(batch * (batch - 1) * (batch - 2), 1)
            total += angle * jnp.sum(jnp.where(is_angle, angles, 0.0)) / triplets
    return total


def cka(student: FeatureMaps, teacher: FeatureMaps) -> Float[Array, ""]:
    """Dissimilarity of features up to rotation and scale: 1 minus their linear CKA.

    With the features of each example as one vector, centred over the batch, and their
    Gram matrices `K` of the student and `L` of the teacher, `[batch, batch]`, that is
    `1 - <K, L> / (||K|| ||L||)`. It is from 0 to 1 for each layer; layers are summed.
    The teacher's maps get no gradient.

    Examples that are all alike, as in a batch of one, have no relations: if either
    network's are, the layer counts as 0 without gradient. So does a batch of two, where
    any two networks agree. In batches that are small next to the number of features
    even unrelated networks look alike, so use large ones.

    Args:
      student: feature maps `[batch, ...]` of the network in training, by layer as in
        `feature_map`. On meshes with explicit axes they are gathered.
      teacher: those of the pretrained network on the same batch, of any feature size.

    Returns:
      A scalar in float32.

    Raises:
      TypeError: as `feature_map`.
      ValueError: as `feature_map`, and if batch sizes differ.

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
        # Half the squared distance of unit vectors: 1 minus their product, but never
        # below 0, and exact where the two are near.
        difference = unit(ours, (0, 1)) - unit(theirs, (0, 1))
        apart = 0.5 * jnp.sum(jnp.square(difference))
        total += jnp.where(has_spread, apart, 0.0)
    return total


def _flat(x: Array) -> Array:
    """Returns `[batch, features]`, whole on every device."""
    x = on_every_device(x)
    return x.reshape(len(x), math.prod(x.shape[1:]))


def _distances(x: Array) -> Array:
    """Returns distances `[batch, batch]` in units of their mean over pairs."""
    x = _flat(x)

    # From differences, not inner products, so that equal examples are at 0 exactly.
    # One example after the other, so that no [batch, batch, features] are in memory.
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
    """Returns `[batch, batch]` inner products of what examples differ by."""
    x = _flat(x)
    # Then examples that are all alike are exactly zero, which a mean would round.
    x = x - jax.lax.stop_gradient(x[:1])
    x = x - jnp.sum(x, axis=0, keepdims=True) / max(len(x), 1)
    return jnp.matmul(x, x.T, precision=jax.lax.Precision.HIGHEST)
