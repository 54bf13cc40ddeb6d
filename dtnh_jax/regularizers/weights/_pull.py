"""The pull towards pretrained parameters, as functions that are pytrees.

A `Partial` of a function of this file has arrays as leaves and a `Pull` in its tree
definition: two of them with equal shapes share one compiled program.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from dtnh_jax import _trees
from dtnh_jax.regularizers.weights import _anchors


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Pull:
    """The norm and the strength: constants of a compiled program."""

    norm: Literal["l1", "l2"]  # of displacements
    new_strength: float  # factor of half the squares of new leaves


def value(
    pull: Pull,
    fisher: optax.Params | None,
    anchor: optax.Params,
    params: optax.Params,
) -> Float[Array, ""]:
    """Returns the penalty of all displacements and new leaves."""
    total = jnp.zeros([], jnp.float32)
    for param, source, weight in _columns(fisher, anchor, params):
        if not _trees.is_trainable(param):
            continue
        if _trees.is_missing(source):
            part = pull.new_strength * half_square(_trees.as_float32(param))
        else:
            moved = _trees.as_float32(_displacement(param, source))
            if pull.norm == "l1":
                part = _sum_of_moduli(moved)
            else:
                part = half_square(moved, weight)
        total += part.astype(jnp.float32)
    return total


def gradient(
    pull: Pull,
    fisher: optax.Params | None,
    anchor: optax.Params,
    params: optax.Params,
) -> optax.Updates:
    """Returns the gradient of `value`, in the dtypes of the parameters."""

    def of_leaf(param, source, weight):
        if not _trees.is_trainable(param):
            return param
        if _trees.is_missing(source):
            return (pull.new_strength * param).astype(param.dtype)
        moved = _displacement(param, source)
        if pull.norm == "l1":
            return jnp.sign(moved)
        if weight is None:
            return moved
        moved = _trees.as_float32(moved)
        return (weight.astype(moved.dtype) * moved).astype(param.dtype)

    leaves = [of_leaf(*column) for column in _columns(fisher, anchor, params)]
    return jax.tree.unflatten(_trees.flatten(params)[1], leaves)


def anchored_value(
    pull: Pull,
    fisher: optax.Params | None,
    params: optax.Params,
    anchor: optax.Params | None = None,
) -> Float[Array, ""]:
    """Returns `value` with the anchor from an optimizer's state."""
    return value(pull, fisher, _checked(anchor), params)


def anchored_gradient(
    pull: Pull,
    fisher: optax.Params | None,
    params: optax.Params,
    anchor: optax.Params | None = None,
) -> optax.Updates:
    """Returns `gradient` with the anchor from an optimizer's state."""
    return gradient(pull, fisher, _checked(anchor), params)


def half_square(x: Array, weight: Array | None = None) -> Array:
    """Returns half the sum of squares, weighted if there are weights."""
    squares = jnp.square(jnp.abs(x))
    if weight is not None:
        squares = weight.astype(squares.dtype) * squares
    return 0.5 * jnp.sum(squares)


def _columns(fisher, anchor, params):
    """Returns `(parameter, its source, its Fisher information)` of every leaf."""
    leaves, _ = _trees.flatten(params)
    sources = _trees.align(anchor, params, "source_params", "params")
    if fisher is None:
        return list(zip(leaves, sources, [None] * len(leaves)))
    weights = _trees.align(fisher, params, "fisher", "params")
    columns = []
    for i, (param, source, weight) in enumerate(zip(leaves, sources, weights)):
        if not _trees.is_missing(weight):
            weight = _trees.as_float32(_anchors.to_device(weight))
        elif _trees.is_trainable(param) and not _trees.is_missing(source):
            raise ValueError(
                "`fisher` must have an array for every leaf that is not new, got "
                f"{weight} at '{_trees.names(params)[i]}'."
            )
        columns.append((param, source, weight))
    return columns


def _displacement(param: Array | np.ndarray, source: Array | np.ndarray) -> Array:
    return jnp.asarray(param) - _anchors.to_device(source).astype(param.dtype)


def _sum_of_moduli(x: Array) -> Array:
    """Sums `|x|`, with the derivative 0 at 0, where `jnp.abs` has 1."""
    direction = jax.lax.stop_gradient(jnp.conj(jnp.sign(x)))
    return jnp.sum(jnp.real(direction * x))


def _checked(anchor: optax.Params | None) -> optax.Params:
    if anchor is None:
        raise ValueError(
            "`anchor` must be given, because this regularizer is self-anchored: it has "
            "no `source_params`. Add it with `add_regularizer` and call "
            "`tx.init(params)`, or give it the pretrained parameters as source."
        )
    return anchor
