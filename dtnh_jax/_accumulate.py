"""Gradient accumulation for pairs: average first, resolve once."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from dtnh_jax import _axes, _trees
from dtnh_jax._arguments import check_count
from dtnh_jax._gradients import GradientPair
from dtnh_jax._metrics import regularizer_names


class AccumulateState(NamedTuple):
    """State of `accumulate_pairs`."""

    mini_step: Int[Array, ""]  # micro-batches since the last update
    sums: PyTree  # a `GradientPair` of their sums, in float32
    inner: optax.OptState


def accumulate_pairs(
    inner: optax.GradientTransformation, every_k: int
) -> optax.GradientTransformationExtraArgs:
    """Averages the gradient pairs of `every_k` micro-batches before they are resolved.

    `optax.MultiSteps` for pairs. The result equals one step on the joined batch. Rules
    are not linear: to resolve each micro-batch and average afterwards gives another
    update, whose sign may even differ. Sums are kept in float32. Between steps, updates
    are zero and `inner` is not called.

    Args:
      inner: a transformation of pairs, such as `optax.chain(dtnh(0.1), optax.sgd(0.1))`
        or `decoupled(...)`. It gets the pair in the form in which `update` got it, and
        the other keywords of the last micro-batch. As in `optax.MultiSteps`, its state
        keeps the dtypes of `init`.
      every_k: number of micro-batches in a step, at least 1.

    Returns:
      A transformation of pairs in either form. Its state has one more tree like the
      parameters for the loss, and one for each regularizer.

    Raises:
      ValueError: `every_k` is less than 1.
      TypeError: `inner` is no transformation, or `every_k` is no integer.

    Example:
      >>> from dtnh_jax import GradientPair, accumulate_pairs, dtnh
      >>> tx = accumulate_pairs(optax.chain(dtnh(1.0), optax.sgd(1.0)), every_k=2)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for sign in (1.0, -1.0):  # the regularizer's gradients sum to zero
      ...     g, r = jnp.array([1.0, 0.0]), sign * jnp.array([5.0, 0.0])
      ...     updates, state = tx.update(GradientPair(g, r), state, params)
      >>> print(updates)
      [-1. -0.]
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            "`inner` must be an Optax transformation of pairs, got "
            f"{type(inner).__name__}."
        )
    check_count("every_k", every_k)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        state = inner.init(params)
        names = regularizer_names(state)

        zeros = _trees.aligned(params, [], None, params).zeros
        regularizer = {name: zeros() for name in names} if names else zeros()
        sums = GradientPair(zeros(), regularizer)
        return AccumulateState(jnp.zeros([], jnp.int32), sums, state)

    def update(updates, state, params=None, *, regularizer_grads=None, **extra_args):
        pair = _trees.split_pair(updates, regularizer_grads)
        sums = GradientPair(
            _add(state.sums.loss, pair.loss, "updates"),
            _add(state.sums.regularizer, pair.regularizer, "regularizer_grads"),
        )

        def step(sums, inner_state):
            mean = GradientPair(
                _mean(sums.loss, pair.loss, every_k),
                _mean(sums.regularizer, pair.regularizer, every_k),
            )
            if regularizer_grads is None:
                return inner.update(mean, inner_state, params, **extra_args)
            keywords = {"regularizer_grads": mean.regularizer, **extra_args}
            return inner.update(mean.loss, inner_state, params, **keywords)

        # Both branches must return the same types, if possible those of the state.
        updates_like, state_like = jax.eval_shape(step, sums, state.inner)

        def apply(sums, inner_state):
            updates, new = step(sums, inner_state)
            new = jax.tree.map(_axes.cast_like, new, inner_state)
            return updates, jax.tree.map(jnp.zeros_like, sums), new

        def wait(sums, inner_state):
            zeros = jax.tree.map(_axes.zeros, updates_like)
            kept = jax.tree.map(_axes.shard_like, inner_state, state_like)
            return zeros, sums, kept

        is_last = state.mini_step == every_k - 1
        updates, sums, inner_state = jax.lax.cond(
            is_last, apply, wait, sums, state.inner
        )
        mini_step = jnp.where(is_last, 0, state.mini_step + 1)
        return updates, AccumulateState(mini_step, sums, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _add(sums: PyTree, grads: PyTree, name: str) -> PyTree:
    """Adds gradients in the precision of the sums; missing ones are zero."""
    leaves, treedef = _trees.flatten(sums)
    added = [
        total + x.astype(total.dtype)
        if _trees.is_trainable(x) and _trees.is_trainable(total)
        else total
        for total, x in zip(leaves, _trees.align(grads, sums, name, "params"))
    ]
    return jax.tree.unflatten(treedef, added)


def _mean(sums: PyTree, like: PyTree, every_k: int) -> PyTree:
    """Averages leaves with gradients, in their dtype; keeps other leaves."""
    leaves, treedef = _trees.flatten(like)

    def mean(leaf: Any, total: Any) -> Any:
        if not _trees.is_trainable(leaf):
            return leaf
        return (total / every_k).astype(leaf.dtype)

    totals = _trees.align(sums, like, "state.sums", "updates")
    return jax.tree.unflatten(treedef, [mean(*each) for each in zip(leaves, totals)])
