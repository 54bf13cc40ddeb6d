"""Conflict metrics of the last update, read from an optimizer's state."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from dtnh_jax import _trees
from dtnh_jax._geometry import Measured, real_product, safe_sqrt
from dtnh_jax.rules._gram import ratio


def conflict_metrics(
    opt_state: optax.OptState, *, per_group: bool = False
) -> dict[str, Any]:
    """Returns the conflict metrics of the last update, found anywhere in a state.

    Args:
      opt_state: state of an optimizer that contains a transformation of this library:
        chained, masked, partitioned, accumulated, with injected hyperparameters, or
        NNX's.
      per_group: return arrays with the metrics of each group: one entry at global
        scope; `[leaves]` at scopes `"leaf"`, `"unit"` and `"element"`, in the order of
        the parameters' leaves, with zeros for leaves that take no part; `[labels]`, in
        sorted order, if the scope is labels.

    Returns:
      Scalars by name:
        `cosine` of the two whole gradients;
        `conflict`, the share of the parameters that are in groups in conflict;
        `loss_norm`, the norm of the protected gradient: the loss gradient, or with
        `ema_decay` its moving average, or the held-out gradient;
        `regularizer_norm`, the norm of the regularizer's gradient times its strength;
        `removed`, the share of that norm that the rule removed;
        `trust`, only of `never_hurt`: the largest norm of the regularizer's part, as a
        multiple of the loss gradient's mean norm;
        `skipped`, the number of updates so far that left out a regularizer gradient, or
        a group of it, because a sum was not finite (not with `per_group`).
      With several regularizers, a dict of these by their names. With several
      transformations, as in `optax.partition`, a dict of these by their path.

    Raises:
      ValueError: the state has no such transformation.

    Example:
      >>> from dtnh_jax import GradientPair, dtnh
      >>> tx = optax.chain(dtnh(strength=1.0), optax.adam(1e-3))
      >>> pair = GradientPair(jnp.array([1.0, 0.0]), jnp.array([-3.0, 4.0]))
      >>> _, state = tx.update(pair, tx.init(jnp.zeros(2)))
      >>> metrics = conflict_metrics(state)
      >>> print(f"{metrics['cosine']:.1f} {metrics['removed']:.1f}")
      -0.6 0.2
    """
    by_place: dict[str, dict[str, Any]] = {}
    for place, name, measured in _find(opt_state):
        by_place.setdefault(place, {})[name] = _derived(measured, per_group)
    if not by_place:
        raise ValueError(
            "`opt_state` must hold the state of a transformation of dtnh_jax, got "
            f"none in a {type(opt_state).__name__}."
        )
    places = {
        place: names[""] if set(names) == {""} else names
        for place, names in by_place.items()
    }
    return places if len(places) > 1 else next(iter(places.values()))


def _derived(measured: Measured, per_group: bool) -> dict[str, Any]:
    """Returns the metrics of one regularizer; for an abstract state, their shapes."""
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in measured)
    if is_abstract:
        return jax.eval_shape(lambda m: _metrics(m, per_group), measured)
    return _metrics(measured, per_group)


def _metrics(measured: Measured, per_group: bool) -> dict[str, Any]:
    sums, size, skipped, trust = measured
    if not per_group:
        sums, size = jnp.sum(sums, axis=-1), jnp.sum(size, axis=-1)
    axis = sums.ndim - 1 - per_group  # states may be a batch
    mm, mr, rr, part, conflicting = jnp.unstack(sums, axis=axis)
    loss_norm, regularizer_norm = safe_sqrt(mm), safe_sqrt(rr)
    cosine = ratio(ratio(mr, loss_norm), regularizer_norm)
    removed = 1 - ratio(safe_sqrt(part), regularizer_norm)
    removed = jnp.where(regularizer_norm > 0, jnp.clip(removed, 0, 1), 0)
    metrics = {
        # Norms show values that are not finite; the other metrics stay readable.
        "cosine": jnp.clip(jnp.where(jnp.isfinite(cosine), cosine, 0), -1, 1),
        "conflict": ratio(conflicting, size),
        "loss_norm": loss_norm,
        "regularizer_norm": regularizer_norm,
        "removed": jnp.where(jnp.isfinite(removed), removed, 0),
    }
    if trust is not None:
        metrics["trust"] = trust
    return metrics if per_group else {**metrics, "skipped": skipped}


def regularizer_names(opt_state: optax.OptState) -> list[str]:
    """Returns the names of the regularizers in a state; none if there is one only."""
    return sorted({name for _, name, _ in _find(opt_state)} - {""})


def first_order_harm(
    loss_grads: PyTree, updates: PyTree, updates_without: PyTree
) -> Float[Array, ""]:
    """Returns how much the regularizer's part raises the loss, to first order.

    It is `<g, updates - updates_without>`, summed in float32: positive if the
    regularizer raises the loss, negative if it lowers it.

    Args:
      loss_grads: gradient `g` of the loss, on this batch or another.
      updates: updates of the optimizer, to be added to the parameters.
      updates_without: updates of the same optimizer, in the same state, from the loss
        gradient alone.

    Returns:
      A scalar in float32, in units of the loss.

    Raises:
      ValueError: the trees do not match.

    Example:
      >>> g = jnp.array([1.0, 0.0])
      >>> print(first_order_harm(g, -g + jnp.array([0.3, 1.0]), -g))
      0.3

    References:
      Tian et al., 2024, https://arxiv.org/abs/2411.01713: the same test, for gradients.
    """
    grads = _trees.flatten(loss_grads)[0]
    columns = [
        grads,
        _trees.align(updates, loss_grads, "updates", "loss_grads"),
        _trees.align(updates_without, loss_grads, "updates_without", "loss_grads"),
    ]
    total = jnp.zeros([], jnp.float32)
    for row in zip(*columns):
        if all(_trees.is_trainable(x) for x in row):
            g, new, old = map(_trees.as_float32, row)
            total += jnp.sum(real_product(g, new - old)).astype(jnp.float32)
    return total


def _find(opt_state: optax.OptState) -> Iterator[tuple[str, str, Measured]]:
    """Yields path, regularizer's name and sums of every transformation in a state."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=_is_measured)
    for path, value in leaves:
        if isinstance(value, Measured):
            field = max(i for i, key in enumerate(path) if _name(key) == "measured")
            place = "/".join(_name(key) for key in path[:field])
            name = "/".join(_name(key) for key in path[field + 1 :])
            yield place, name, Measured(*map(_plain, value))


def _is_measured(node: Any) -> bool:
    return isinstance(node, Measured)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _plain(entry: Any) -> Any:
    """Returns the value of an NNX variable; any other entry unchanged."""
    return entry.get_value() if hasattr(entry, "get_value") else entry
