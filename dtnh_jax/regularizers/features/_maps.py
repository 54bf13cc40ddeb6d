"""Feature maps of two networks side by side, in float32."""

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
      teacher: the same.
      axes: those in which the maps of a layer have to agree.
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
    """Returns arrays by their name, or in a sequence by their number.

    An array alone is one layer: its first axis is the batch, not the layers.

    Raises:
      TypeError: if there is anything else than arrays.
      ValueError: if there are no layers, or a layer is a number.
    """
    if hasattr(maps, "shape"):
        maps = [maps]
    if isinstance(maps, (str, bytes)) or not isinstance(maps, (Mapping, Sequence)):
        raise TypeError(
            f"`{argument}` must be an array, or a dict or sequence of one for each "
            f"layer, got {type(maps).__name__}."
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
    """Raises ValueError if there is a layer too many or too few."""
    if layers.keys() != wanted.keys():
        raise ValueError(
            f"`{argument}` must have the layers of `student`, {list(wanted)}, got "
            f"{list(layers)}."
        )


def on_every_device(x: Array) -> Array:
    """Gathers an array that is sharded over explicit axes of a mesh.

    Relations between the examples of a batch need all of them, and on such meshes JAX
    leaves it to us to say so.
    """
    sharding = jax.typeof(x).sharding
    if all(axis is None for axis in sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, PartitionSpec()))


def unit(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Divides by the 2-norm over axes; what is zero stays zero."""
    # Of no effect on the result, but without it squares soon leave float32.
    greatest = jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0)
    x = x / _or_one(jax.lax.stop_gradient(greatest))
    return x / jnp.sqrt(_or_one(jnp.sum(jnp.square(x), axis, keepdims=True)))


def _or_one(x: Array) -> Array:
    return jnp.where(x == 0, 1.0, x)
