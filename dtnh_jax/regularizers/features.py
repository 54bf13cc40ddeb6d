"""Regularizers of feature maps: near those of the pretrained network."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Map = Float[Array | np.ndarray, "_ ..."]  # [batch, ..., channels]
FeatureMaps = Mapping[str, Map] | Sequence[Map]


def feature_map(student: FeatureMaps, teacher: FeatureMaps) -> Float[Array, ""]:
    """Distance of feature maps: `1/2 sum over layers of ||FM - FM0||^2`, per example.

    Squares are summed over layers and over all positions and channels of a map, and
    averaged over the batch. The teacher's maps get no gradient.

    Args:
      student: feature maps `[batch, ...]` of the network in training, by layer.
      teacher: those of the pretrained network on the same batch.

    Returns:
      A scalar in float32.

    Raises:
      ValueError: if layers or shapes differ.

    Example:
      >>> student = {"conv": jnp.array([[1.0, 2.0], [0.0, 0.0]])}
      >>> teacher = {"conv": jnp.array([[1.0, 0.0], [0.0, 0.0]])}
      >>> print(feature_map(student, teacher))  # 1/2 * 4, over a batch of two
      1.0

    References:
      Wan et al., 2019, section III.B, https://arxiv.org/abs/1911.07489; Li et al.,
      2019, "DELTA", equation 4, https://arxiv.org/abs/1901.09229

    Differs from DELTA's code, which sums over the batch: there, strengths are smaller
    by the batch size.
    """
    total = jnp.zeros([], jnp.float32)
    for ours, theirs in _paired(student, teacher):
        difference = ours.astype(jnp.float32) - theirs.astype(jnp.float32)
        total += 0.5 * jnp.sum(jnp.square(difference)) / max(len(ours), 1)
    return total


def _paired(student: FeatureMaps, teacher: FeatureMaps) -> list[tuple[Array, Array]]:
    """Returns maps of the same layers side by side, the teacher's without gradient."""
    ours, theirs = _by_layer(student), _by_layer(teacher)
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            "`student` and `teacher` must have the same layers, at least one, got "
            f"{list(ours)} and {list(theirs)}."
        )
    for name in ours:
        if ours[name].shape != theirs[name].shape:
            raise ValueError(
                f"`student` and `teacher` must have maps of one shape, got "
                f"{ours[name].shape} and {theirs[name].shape} at layer {name!r}."
            )
    return [(ours[name], jax.lax.stop_gradient(theirs[name])) for name in ours]


def _by_layer(maps: FeatureMaps) -> dict[str | int, Array]:
    pairs = maps.items() if isinstance(maps, Mapping) else enumerate(maps)
    return {name: jnp.asarray(value) for name, value in pairs}
