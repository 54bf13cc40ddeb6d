"""Feature maps of two networks side by side, in float32."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Map = Float[Array | np.ndarray, "_ ..."]  # [batch, ..., channels]
FeatureMaps = Mapping[str, Map] | Sequence[Map]


def paired(
    student: FeatureMaps,
    teacher: FeatureMaps,
    axes: slice = slice(None),
    alike: str = "of one shape",
) -> dict[str | int, tuple[Array, Array]]:
    """Returns maps of the same layers, the teacher's without gradient.

    Args:
      student: maps by layer.
      teacher: maps by layer.
      axes: those in which the maps of a layer have to agree.
      alike: the same in words, for the error.
    """
    ours, theirs = by_layer(student), by_layer(teacher)
    if ours.keys() != theirs.keys() or not ours:
        raise ValueError(
            "`student` and `teacher` must have the same layers, at least one, got "
            f"{list(ours)} and {list(theirs)}."
        )
    for name in ours:
        if ours[name].shape[axes] != theirs[name].shape[axes]:
            raise ValueError(
                f"`student` and `teacher` must have maps {alike}, got "
                f"{ours[name].shape} and {theirs[name].shape} at layer {name!r}."
            )
    return {name: (ours[name], jax.lax.stop_gradient(theirs[name])) for name in ours}


def by_layer(maps: Mapping | Sequence) -> dict[str | int, Array]:
    """Returns arrays by their name, or in a sequence by their number."""
    pairs = maps.items() if isinstance(maps, Mapping) else enumerate(maps)
    return {name: jnp.asarray(value, jnp.float32) for name, value in pairs}


def unit(x: Array, axis: int | tuple[int, ...]) -> Array:
    """Divides by the 2-norm over axes; what is zero stays zero."""
    # Of no effect on the result, but without it squares soon leave float32.
    greatest = jnp.max(jnp.abs(x), axis, keepdims=True, initial=0.0)
    x = x / _or_one(jax.lax.stop_gradient(greatest))
    return x / jnp.sqrt(_or_one(jnp.sum(jnp.square(x), axis, keepdims=True)))


def _or_one(x: Array) -> Array:
    return jnp.where(x == 0, 1.0, x)
