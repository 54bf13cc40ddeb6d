"""Scales of a layer's channels, for both kinds of Flax networks."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def scale(output: Any, scales: Mapping[str, Any], path: str) -> jax.Array:
    """Multiplies the output of the layer at a path, in the output's dtype.

    Raises:
      TypeError: the output is no array.
      ValueError: there are no scales for its channels.
    """
    shape = getattr(output, "shape", None)
    if not shape:
        raise TypeError(
            f"`layers` must be layers that return an array [..., channels], got "
            f"{path!r}, which returns "
            f"{type(output).__name__ if shape is None else 'a scalar'}."
        )
    if path not in scales:
        raise ValueError(
            f"`scales` must have an entry for each layer, got none for {path!r} among "
            f"{list(scales)}."
        )
    if jnp.shape(scales[path]) != shape[-1:]:
        raise ValueError(
            f"`scales` must have a number for each channel, got shape "
            f"{jnp.shape(scales[path])} for {shape[-1]} channels at {path!r}."
        )
    factors = jnp.asarray(scales[path], output.dtype)
    return output * factors.reshape((1,) * (len(shape) - 1) + shape[-1:])


def check_all_used(scales: Mapping[str, Any], used: Iterable[str]) -> None:
    """Raises ValueError if some scales belong to no scaled layer."""
    unused = sorted(set(scales) - set(used))
    if unused:
        raise ValueError(
            f"`scales` must only have the layers {sorted(used)}, got {unused} too."
        )
