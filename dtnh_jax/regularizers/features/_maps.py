"""Pairs the feature maps of two networks, in float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

Map = Float[Array | np.ndarray, "_ ..."]  # [batch, ..., channels]
FeatureMaps = Map | Mapping[str, Map] | Sequence[Map]


def paired(
    student: FeatureMaps,
    teacher: FeatureMaps,
    axes: slice = slice(None),
    alike: str = "of one shape",
) -> dict[str | int, tuple[Array, Array]]:
    """Returns maps of the same layers, the teacher's without gradient.

    Args:
      student: maps by layer, or one map.
      teacher: maps by layer, or one map.
      axes: axes in which the maps of a layer must agree.
      alike: the same in words, for the error.
    """
    ours, theirs = by_layer(student, "student"), by_layer(teacher, "teacher")
    check_layers(theirs, ours, "teacher")
    for name in ours:
        if ours[name].shape[axes] != theirs[name].shape[axes]:
            raise ValueError(
                f"`student` and `teacher` must have maps {alike}, got "
                f"{ours[name].shape} and {theirs[name].shape} at layer {name!r}."
            )
    return {name: (ours[name], jax.lax.stop_gradient(theirs[name])) for name in ours}


def by_layer(maps: Any, argument: str) -> dict[str | int, Array]:
    """Returns arrays by name, or by number for a sequence.

    A single array is one layer: its first axis is the batch, not the layers.

    Raises:
      TypeError: a layer is no array.
      ValueError: there are no layers, or a layer is a number.
    """
    if hasattr(maps, "shape"):
        maps = [maps]
    if isinstance(maps, (str, bytes)) or not isinstance(maps, (Mapping, Sequence)):
        raise TypeError(
            f"`{argument}` must be an array, or a dict or sequence with an array for "
            f"each layer, got {type(maps).__name__}."
        )
    layers = dict(maps.items() if isinstance(maps, Mapping) else enumerate(maps))
    if not layers:
        raise ValueError(
            f"`{argument}` must have at least one layer, got an empty "
            f"{type(maps).__name__}."
        )
    for name, value in layers.items():
        if not hasattr(value, "shape"):
            raise TypeError(
                f"`{argument}` must have an array for each layer, got "
                f"{type(value).__name__} at layer {name!r}."
            )
        if not value.shape:
            raise ValueError(
                f"`{argument}` must have arrays with at least one axis, got a number "
                f"at layer {name!r}."
            )
    return {name: jnp.asarray(value, jnp.float32) for name, value in layers.items()}


def check_layers(
    layers: Mapping[str | int, Array], wanted: Mapping[str | int, Array], argument: str
) -> None:
    """Raises ValueError if a layer is missing or unknown."""
    if layers.keys() != wanted.keys():
        raise ValueError(
            f"`{argument}` must have the layers of `student`, {list(wanted)}, got "
            f"{list(layers)}."
        )


def on_every_device(x: Array) -> Array:
    """Gathers an array that is sharded over explicit axes of a mesh.

    Relations between the examples of a batch need all examples, and on such meshes JAX
    does not gather them by itself.
    """
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def unit(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Divides by the 2-norm over axes; zeros stay zero."""
    # Does not change the result, but keeps squares in the range of float32.
    greatest = jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0)
    x = x / _or_one(jax.lax.stop_gradient(greatest))
    return x / jnp.sqrt(_or_one(jnp.sum(jnp.square(x), axis, keepdims=True)))


def _or_one(x: Array) -> Array:
    return jnp.where(x == 0, 1.0, x)
