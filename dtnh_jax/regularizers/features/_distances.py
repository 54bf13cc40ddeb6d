"""Distances between the feature maps of two networks."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dtnh_jax.regularizers.features._maps import (
    FeatureMaps,
    by_layer,
    check_layers,
    paired,
    unit,
)

Weights = Float[Array | np.ndarray, "_"]  # [channels]
ChannelAttention = Weights | Mapping[str, Weights] | Sequence[Weights]


def feature_map(student: FeatureMaps, teacher: FeatureMaps) -> Float[Array, ""]:
    """Returns the distance of feature maps, `1/2 sum over layers of ||FM - FM0||^2`.

    Squares are summed over layers and over all positions and channels of a map, and
    averaged over the batch. The teacher's maps get no gradient.

    Args:
      student: feature maps `[batch, ...]` of the network in training: a dict or
        sequence with an array for each layer, or a single array.
      teacher: feature maps of the pretrained network on the same batch.

    Returns:
      A scalar in float32.

    Raises:
      TypeError: a layer is no array.
      ValueError: there are no layers, or layers or shapes differ.

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
    for ours, theirs in paired(student, teacher).values():
        total += 0.5 * jnp.sum(jnp.square(ours - theirs)) / max(len(ours), 1)
    return total


def delta(
    student: FeatureMaps, teacher: FeatureMaps, channel_attention: ChannelAttention
) -> Float[Array, ""]:
    """Returns the distance of feature maps, with a weight for each channel.

    A layer with weights `a` adds `1/2 sum over channels of a_c ||FM_c - FM0_c||^2`.
    Squares are averaged over positions and over the batch; layers are summed. The
    teacher's maps and the weights get no gradient.

    Args:
      student: feature maps `[batch, ..., channels]` of the network in training, by
        layer as in `feature_map`.
      teacher: feature maps of the pretrained network on the same batch.
      channel_attention: weights `[channels]` by layer, which sum to 1 in each layer;
        see `regularizers.channel_attention`.

    Returns:
      A scalar in float32.

    Raises:
      TypeError: as in `feature_map`.
      ValueError: as in `feature_map`; also if numbers of channels differ.

    Example:
      >>> student = {"conv": jnp.array([[[1.0, 2.0], [0.0, 0.0]]])}  # two positions
      >>> teacher = {"conv": jnp.zeros((1, 2, 2))}
      >>> attention = {"conv": jnp.array([0.5, 0.5])}
      >>> print(delta(student, teacher, attention))  # 1/2 * (0.5 * 1 + 0.5 * 4) / 2
      0.625

    References:
      Li et al., 2019, "DELTA", equations 4 to 6, https://arxiv.org/abs/1901.09229

    Differs from DELTA's code, which sums over the batch, and multiplies each layer by
    its number of channels: there, strengths are smaller, and wide layers count more.
    """
    pairs = paired(student, teacher)
    attention = by_layer(channel_attention, "channel_attention")
    check_layers(
        attention, {name: x for name, (x, _) in pairs.items()}, "channel_attention"
    )
    for name, (ours, _) in pairs.items():
        _check_channels(name, ours)
        if attention[name].shape != ours.shape[-1:]:
            raise ValueError(
                "`channel_attention` must have a weight for each channel, got shape "
                f"{attention[name].shape} for {ours.shape[-1]} channels at layer "
                f"{name!r}."
            )
    total = jnp.zeros([], jnp.float32)
    for name, (ours, theirs) in pairs.items():
        squares = jnp.sum(jnp.square(ours - theirs), axis=tuple(range(ours.ndim - 1)))
        weighted = jnp.sum(jax.lax.stop_gradient(attention[name]) * squares)
        total += 0.5 * weighted / max(math.prod(ours.shape[:-1]), 1)
    return total


def attention_transfer(student: FeatureMaps, teacher: FeatureMaps) -> Float[Array, ""]:
    """Returns the distance of two networks' spatial attention, for any channels.

    The attention map of an example has a value for each position: the mean over
    channels of the squared features, divided by the 2-norm over positions. The penalty
    is `1/2 ||Q - Q0||^2`, summed over layers and positions and averaged over the batch;
    each layer contributes 0 to 1. The teacher's maps get no gradient.

    If all features are zero, the attention map is zero and has no gradient. For maps
    with one position or no positions, the penalty is 0 unless one of the two maps is
    zero.

    Args:
      student: feature maps `[batch, ..., channels]` of the network in training, by
        layer as in `feature_map`.
      teacher: feature maps of the pretrained network on the same batch, with the same
        positions and any number of channels.

    Returns:
      A scalar in float32.

    Raises:
      TypeError: as in `feature_map`.
      ValueError: there are no layers, or layers, batch sizes or positions differ.

    Example:
      >>> student = {"conv": jnp.array([[[1.0], [0.0]]])}  # looks at position 0
      >>> teacher = {"conv": jnp.array([[[0.0, 0.0], [0.0, 2.0]]])}  # at position 1
      >>> print(attention_transfer(student, teacher))
      1.0

    References:
      Zagoruyko and Komodakis, 2017, equation 2 with p = 2,
      https://arxiv.org/abs/1612.03928

    Differs from the authors' code, which has no factor 1/2 and also averages over
    positions: there, strengths are larger by half the number of positions.
    """
    total = jnp.zeros([], jnp.float32)
    pairs = paired(student, teacher, slice(-1), "of one batch size and positions")
    for name, (ours, theirs) in pairs.items():
        _check_channels(name, ours)
        _check_channels(name, theirs, "teacher")
        difference = _attention_map(ours) - _attention_map(theirs)
        total += 0.5 * jnp.sum(jnp.square(difference)) / max(len(ours), 1)
    return total


def _attention_map(x: Array) -> Array:
    """Returns `[batch, positions]` of norm 1 over positions."""
    energy = jnp.sum(jnp.square(x), axis=-1)  # the norm makes it equal to the mean
    return unit(energy.reshape(len(x), math.prod(energy.shape[1:])), axis=1)


def _check_channels(name: str | int, maps: Array, argument: str = "student") -> None:
    if maps.ndim < 2:
        raise ValueError(
            f"`{argument}` must have maps [batch, ..., channels], got shape "
            f"{maps.shape} at layer {name!r}."
        )
