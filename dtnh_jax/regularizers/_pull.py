"""A pull towards pretrained parameters, whatever its shape."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Float

from dtnh_jax import _trees
from dtnh_jax.regularizers import _anchors
from dtnh_jax.regularizers._anchors import New


def pull(
    source_params: optax.Params,
    weights: optax.Params | None,
    *,
    penalty: Callable[[Array, Any], Array],
    slope: Callable[[Array, Any], Array],
    new: New | None,
    new_strength: float,
    dtype: Any,
    memory_kind: str | None,
) -> tuple[Partial, Partial]:
    """A penalty of displacements from the source, and plain L2 on new leaves.

    Args:
      source_params: as in `l2_sp`.
      weights: of the displacements' entries, a tree like the source, or None.
      penalty: maps the displacement of a leaf, and its weights, to a scalar.
      slope: maps the same to the gradient of that scalar.
      new: as in `l2_sp`.
      new_strength: as in `l2_sp`.
      dtype: as in `l2_sp`.
      memory_kind: as in `l2_sp`.

    Returns:
      The value and the gradient, as functions of the parameters.
    """
    if not new_strength >= 0:
        raise ValueError(f"`new_strength` must be at least 0, got {new_strength}.")
    _anchors.check_dtype(dtype)
    is_new = _anchors.new_leaves(source_params, new)
    factors = _checked_fisher(weights, source_params, is_new)
    leaves, treedef = _trees.flatten(source_params)

    def keep(leaf, skip):
        return None if skip else _anchors.keep(leaf, dtype, memory_kind)

    anchors = [keep(leaf, skip) for leaf, skip in zip(leaves, is_new)]
    if factors is not None:
        factors = [keep(leaf, skip) for leaf, skip in zip(factors, is_new)]

    def columns(anchors, factors, params):
        """The leaves of the parameters, with the anchor and the weights of each."""
        leaves, _ = _trees.flatten(params)
        source = jax.tree.unflatten(treedef, anchors)
        anchors = _trees.align(source, params, "source_params", "params")
        if factors is None:
            return zip(leaves, anchors, [None] * len(leaves))
        factors = jax.tree.unflatten(treedef, factors)
        factors = _trees.align(factors, params, "fisher", "params")
        factors = [
            None if _trees.is_missing(x) else _trees.as_float32(_anchors.to_device(x))
            for x in factors
        ]
        return zip(leaves, anchors, factors)

    def displacement(param, anchor):
        return param - _anchors.to_device(anchor).astype(param.dtype)

    def value(anchors, factors, params):
        parts = []
        for param, anchor, factor in columns(anchors, factors, params):
            if not _trees.is_trainable(param):
                continue
            if anchor is None:
                parts.append(new_strength * half_square(_trees.as_float32(param)))
            else:
                moved = _trees.as_float32(displacement(param, anchor))
                parts.append(penalty(moved, factor))
        return total(parts)

    def gradient(anchors, factors, params):
        def of_leaf(param, anchor, factor):
            if not _trees.is_trainable(param):
                return param
            if anchor is None:
                return (new_strength * param).astype(param.dtype)
            return slope(displacement(param, anchor), factor).astype(param.dtype)

        moved = [of_leaf(*column) for column in columns(anchors, factors, params)]
        return jax.tree.unflatten(jax.tree.structure(params, _trees.is_missing), moved)

    # As arguments of `Partial`, the copies are leaves of the regularizer.
    return Partial(value, anchors, factors), Partial(gradient, anchors, factors)


def _checked_fisher(
    fisher: optax.Params | None, source_params: optax.Params, is_new: list[bool]
) -> list[Any] | None:
    """Returns the leaves of the Fisher in the order of the source's."""
    if fisher is None:
        return None
    paths = _trees.names(source_params)
    leaves = _trees.align(fisher, source_params, "fisher", "source_params")
    for path, leaf, skip in zip(paths, leaves, is_new):
        if skip:
            continue
        if _trees.is_missing(leaf):
            raise ValueError(
                "`fisher` must have an array wherever a leaf is not new, got "
                f"{leaf} at '{path}'."
            )
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise ValueError(
                f"`fisher` must be real, got {jnp.result_type(leaf)} at '{path}'."
            )
        if isinstance(leaf, Tracer):
            continue
        with jax.ensure_compile_time_eval():
            is_fine = jnp.all(jnp.isfinite(leaf) & (jnp.asarray(leaf) >= 0))
        if not is_fine:
            raise ValueError(
                "`fisher` must be finite and at least 0, got entries that are not at "
                f"'{path}'."
            )
    return leaves


def half_square(x: Array, weight: Array | None = None) -> Array:
    """Returns half the sum of squares, each times its weight if there are any."""
    squares = jnp.square(jnp.abs(x))
    return 0.5 * jnp.sum(squares if weight is None else weight * squares)


def total(parts: list[Array]) -> Float[Array, ""]:
    return jnp.asarray(sum(parts), jnp.float32)
