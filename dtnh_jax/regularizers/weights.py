"""Regularizers of the weights, whose gradients need no backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dtnh_jax import _trees


class WeightRegularizer(NamedTuple):
    """A function of the parameters alone, with its gradient in closed form.

    Attributes:
      value: maps the parameters to a scalar in float32.
      gradient: maps the parameters to a tree like them, in their dtypes.
    """

    value: Callable[[optax.Params], Float[Array, ""]]
    gradient: Callable[[optax.Params], optax.Updates]


def check_weight_regularizer(regularizer: Any) -> None:
    """Raises TypeError for anything but a `WeightRegularizer`, with the cure."""
    if not isinstance(regularizer, WeightRegularizer):
        raise TypeError(
            "`regularizer` must be a WeightRegularizer such as "
            "`regularizers.l2_sp(params)`, or a dict of them, got "
            f"{type(regularizer).__name__}. A function `f` of the parameters becomes "
            "one as `WeightRegularizer(f, jax.grad(f))`."
        )


def l2() -> WeightRegularizer:
    """Pulls the parameters to zero: `1/2 ||params||^2`, summed over all entries.

    Returns:
      A `WeightRegularizer`; its gradient is `params`.

    Example:
      >>> print(l2().value({"w": jnp.array([3.0, 4.0])}))
      12.5
    """

    def gradient(params):
        return jax.tree.map(jnp.asarray, params)

    return WeightRegularizer(_half_square(gradient), gradient)


def l2_sp(
    source_params: optax.Params,
    *,
    new: Callable[[str], bool] | None = None,
    new_strength: float = 1.0,
) -> WeightRegularizer:
    """Pulls the parameters back to where they started: `1/2 ||params - source||^2`.

    The penalty is summed over all entries. Parameters without a pretrained value, such
    as a new head, have nowhere to go back to: their penalty is, as the paper proposes,
    `new_strength / 2 ||params||^2`. They are those that `new` picks out by their path,
    and those that are `None` in `source_params`.

    Args:
      source_params: pretrained parameters, a tree like the parameters in training.
        They are copied, so that donating or changing the originals is safe.
      new: tells from a path such as `"head/kernel"` whether a leaf is new.
      new_strength: strength of the plain penalty on new leaves, relative to the
        strength of the whole.

    Returns:
      A `WeightRegularizer`; its gradient, `params - source_params`, needs no autodiff.

    Raises:
      ValueError: if `new_strength` is negative or `new` picks out no leaf; on use, if
        the parameters are no tree like `source_params`.

    Example:
      >>> source = {"body": jnp.array([1.0, 2.0]), "head": jnp.zeros(1)}
      >>> pull = l2_sp(source, new=lambda path: path == "head", new_strength=0.1)
      >>> params = {"body": jnp.array([2.0, 2.0]), "head": jnp.ones(1)}
      >>> print(pull.gradient(params))
      {'body': Array([1., 0.], dtype=float32), 'head': Array([0.1], dtype=float32)}

    References:
      Li et al., 2018, equations 3 and 4, https://arxiv.org/abs/1802.01483
    """
    if not new_strength >= 0:
        raise ValueError(f"`new_strength` must be at least 0, got {new_strength}.")
    paths = _trees.names(source_params)
    if new is not None and not any(new(path) for path in paths):
        raise ValueError(
            f"`new` must pick out a leaf, got none among {', '.join(paths[:8])} ..."
        )
    leaves, treedef = _trees.flatten(source_params)
    anchors = [
        None if _trees.is_missing(leaf) or (new and new(path)) else jnp.array(leaf)
        for path, leaf in zip(paths, leaves)
    ]
    source = jax.tree.unflatten(treedef, anchors)

    def displacement(param, anchor, on_new):
        if not _trees.is_trainable(param):
            return param
        if anchor is None:
            return (on_new * param).astype(param.dtype)
        return param - anchor.astype(param.dtype)

    def map_leaves(params, on_new):
        anchors = _trees.align(source, params, "source_params", "params")
        leaves, treedef = _trees.flatten(params)
        moved = [displacement(p, a, on_new) for p, a in zip(leaves, anchors)]
        return jax.tree.unflatten(treedef, moved)

    def gradient(params):
        return map_leaves(params, new_strength)

    # Half the square of `sqrt(s) w` is `s / 2 ||w||^2`, whose gradient is `s w`.
    return WeightRegularizer(
        _half_square(lambda params: map_leaves(params, new_strength**0.5)), gradient
    )


def _half_square(displacement: Callable) -> Callable:
    """Returns half the squared norm of a displacement, summed in float32."""

    def value(params):
        leaves = [x for x in jax.tree.leaves(displacement(params))
                  if _trees.is_trainable(x)]  # fmt: skip
        squares = [jnp.sum(jnp.square(jnp.abs(_trees.as_float32(x)))) for x in leaves]
        return jnp.asarray(0.5 * sum(squares), jnp.float32)

    return value
