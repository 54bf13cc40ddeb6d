"""`value_and_gradient_pair`: two gradients from one forward pass."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

_NEW_VALUES = "_overwrite_with_gradient"  # as `flax.linen.fp8_ops` calls them


class GradientPair(NamedTuple):
    """The gradients of a loss and of a regularizer, before the latter's strength.

    A pytree, so it can be averaged over devices, donated or differentiated like any
    gradient. The transformations of this library take it in place of the gradient.

    Attributes:
      loss: gradient of the empirical loss, a tree like the parameters.
      regularizer: gradient of the regularizer, a tree like the parameters, or a dict
        of such trees by the names of several regularizers.
    """

    loss: PyTree
    regularizer: PyTree

    # Flax's `TrainState` indexes the gradients by string, to take out the new scales of
    # its 8-bit layers.

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str):
            return isinstance(self.loss, Mapping) and key in self.loss
        return tuple.__contains__(self, key)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return tuple.__getitem__(self, key)
        loss, regularizer = self.loss[key], self.regularizer
        if key == _NEW_VALUES:
            return loss
        if key in regularizer:
            return GradientPair(loss, regularizer[key])
        return GradientPair(loss, {name: r[key] for name, r in regularizer.items()})


def value_and_gradient_pair(
    objective: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, GradientPair]]:
    """Differentiates a loss and a regularizer that share a forward pass.

    The forward pass is linearized once, and its linear map is transposed separately for
    each output. Compared with two calls of `jax.grad`, this saves a forward pass.
    Compared with one `jax.vjp` and two one-hot cotangents, it saves products with
    zeros: the transpose for one output contains only the operations of that output.

    Args:
      objective: maps `(params, *args)` to `(loss, regularizer)`, or with `has_aux` to
        `((loss, regularizer), aux)`. The loss is a scalar; the regularizer is a
        scalar, or a dict of scalars by name, not yet multiplied by its strength.
      has_aux: whether `objective` also returns auxiliary data, such as new batch
        statistics. They come from the shared forward pass and are not differentiated.

    Returns:
      A function of `(params, *args)` that returns `((loss, regularizer), pair)`, or
      with `has_aux` `(((loss, regularizer), aux), pair)`.

    Raises:
      TypeError: at the call, `objective` does not return a pair of scalars.

    Example:
      >>> def objective(params, x):
      ...     return jnp.sum(params * x), 0.5 * jnp.sum(params**2)
      >>> params, x = jnp.array([3.0, 4.0]), jnp.array([1.0, 2.0])
      >>> (loss, regularizer), pair = value_and_gradient_pair(objective)(params, x)
      >>> print(loss, regularizer, pair.loss, pair.regularizer)
      11.0 12.5 [1. 2.] [3. 4.]
    """
    linearize = linearized(objective, has_aux)

    def value_and_pair(params, *args, **kwargs):
        evaluated = linearize(params, *args, **kwargs)
        _, regularizer = evaluated.values
        if isinstance(regularizer, dict):
            r = {
                name: evaluated.tree(
                    evaluated.gradient(lambda out, name=name: out[1][name])
                )
                for name in regularizer
            }
        else:
            r = evaluated.tree(evaluated.gradient(lambda out: out[1]))
        g = evaluated.tree(evaluated.gradient(lambda out: out[0]))
        pair = GradientPair(g, r)
        return (
            (evaluated.values, evaluated.aux) if has_aux else evaluated.values
        ), pair

    return value_and_pair


class Linearized(NamedTuple):
    """The values of an objective, and functions that compute its gradients."""

    values: tuple[Any, Any]  # loss and regularizer
    aux: Any
    # Maps a function that selects a scalar from the two values, or combines them
    # linearly, to the gradient of that scalar: a list of the trainable leaves, computed
    # with one backward pass.
    gradient: Callable[[Callable[[Any], Any]], list[Array]]
    tree: Callable[[list[Array]], PyTree]  # such a list -> a tree like the parameters
    leaves: Callable[[PyTree], list[Array]]  # the inverse of `tree`


def linearized(
    objective: Callable[..., Any], has_aux: bool
) -> Callable[..., Linearized]:
    """Returns a function that evaluates an objective and keeps its linear map."""

    def linearize(params, *args, **kwargs):
        leaves, treedef = jax.tree.flatten(params)
        trained = [i for i, leaf in enumerate(leaves) if _is_inexact(leaf)]

        def of_trained(values):
            filled = list(leaves)
            for i, value in zip(trained, values):
                filled[i] = value
            outputs = objective(jax.tree.unflatten(treedef, filled), *args, **kwargs)
            values, aux = _split_outputs(outputs, has_aux)
            return values, aux

        primals = [leaves[i] for i in trained]
        values, linear, aux = jax.linearize(of_trained, primals, has_aux=True)

        def gradient(select):
            (cotangents,) = jax.linear_transpose(lambda t: select(linear(t)), primals)(
                jnp.ones_like(select(values))
            )
            return cotangents

        def tree(cotangents):
            gradients = [np.zeros(np.shape(x), jax.dtypes.float0) for x in leaves]
            for i, cotangent in zip(trained, cotangents):
                gradients[i] = cotangent
            return jax.tree.unflatten(treedef, gradients)

        def trained_leaves(gradients):
            found = jax.tree.leaves(gradients)
            return [found[i] for i in trained]

        return Linearized(values, aux, gradient, tree, trained_leaves)

    return linearize


def _is_inexact(leaf) -> bool:
    """Returns whether a leaf can be trained: floating or complex, not integer."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _split_outputs(outputs, has_aux: bool):
    """Returns `(loss, regularizer), aux`; raises TypeError for another structure."""
    wanted = "((loss, regularizer), aux)" if has_aux else "(loss, regularizer)"
    message = f"`objective` must return {wanted} of scalars"
    if not (isinstance(outputs, tuple) and len(outputs) == 2):
        raise TypeError(f"{message}, got {type(outputs).__name__}.")
    values, aux = outputs if has_aux else (outputs, None)
    if not (isinstance(values, tuple) and len(values) == 2):
        raise TypeError(f"{message}, got {type(values).__name__} for the pair.")
    loss, regularizer = values
    named = (
        regularizer if isinstance(regularizer, dict) else {"regularizer": regularizer}
    )
    for name, value in {"loss": loss, **named}.items():
        shape = getattr(value, "shape", ())
        if isinstance(value, (tuple, list, dict)) or shape != ():
            kind = f"shape {shape}" if shape else type(value).__name__
            raise TypeError(f"{message}, got {name} of {kind}.")
    return jax.tree.map(_as_inexact, (loss, regularizer)), aux


def _as_inexact(value) -> Array:
    """Returns a term as a floating array; a constant term may be a plain number."""
    return jnp.asarray(value, None if _is_inexact(value) else jnp.float32)
