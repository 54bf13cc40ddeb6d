"""What the last update saw and did: cosines, conflicts, norms, harm."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from dtnh_jax import _scopes, _trees
from dtnh_jax._part import Part
from dtnh_jax._scopes import Geometry


class GroupMetrics(NamedTuple):
    """The metrics of each leaf of the parameters, or of each label in sorted order."""

    cosine: Float[Array, "groups"]
    conflict: Float[Array, "groups"]
    loss_norm: Float[Array, "groups"]
    regularizer_norm: Float[Array, "groups"]
    removed: Float[Array, "groups"]


class ConflictMetrics(NamedTuple):
    """What the last update saw and did with one regularizer; see `conflict_metrics`."""

    cosine: Float[Array, ""]
    conflict: Float[Array, ""]
    loss_norm: Float[Array, ""]
    regularizer_norm: Float[Array, ""]
    removed: Float[Array, ""]
    skipped: Int[Array, ""]
    groups: GroupMetrics


def initial(groups: int) -> ConflictMetrics:
    """Metrics before the first update, with the shapes of all later ones."""
    zeros = [jnp.zeros([1 + groups], jnp.float32)] * len(GroupMetrics._fields)
    return _metrics(zeros, jnp.zeros([], jnp.int32))


def measured(
    leaves: Geometry,
    strength: Float[Array, ""],
    part: Part,
    sizes: list[int],
    rows: Bool[np.ndarray, "rows leaves"],
    skipped: Int[Array, ""],
) -> ConflictMetrics:
    """Metrics of an update.

    Args:
      leaves: geometry `[leaves]` of the gradients of loss and regularizer.
      strength: factor of the regularizer's.
      part: what the rule left of it.
      sizes: how many parameters each leaf has.
      rows: which leaves are in which row of `GroupMetrics`.
      skipped: how many updates had to do without the regularizer so far.
    """
    # The whole is one more row, so that everything is worked out together.
    member = np.concatenate([np.ones([1, len(sizes)], bool), rows])
    joined = _scopes.merge(leaves, member)
    kept, _ = _scopes.hypot(jnp.where(member, part.norm[None, :], 0))
    weights = member * np.array(sizes, np.float32)[None, :]
    # Divided at the end, so that a share of all is exactly 1.
    conflict = jnp.sum(weights * part.conflict[None, :], axis=1)
    conflict = conflict / np.maximum(weights.sum(axis=1), 1)
    regularizer_norm = strength * joined.y_norm
    removed = 1 - kept * _scopes.reciprocal(regularizer_norm)
    removed = jnp.where(regularizer_norm > 0, jnp.clip(removed, 0, 1), 0)
    # Of what is not finite the norms tell; a log of the rest stays readable.
    cosine, removed = [
        jnp.where(jnp.isfinite(field), field, 0) for field in (joined.cosine, removed)
    ]
    fields = [cosine, conflict, joined.x_norm, regularizer_norm, removed]
    return _metrics([field.astype(jnp.float32) for field in fields], skipped)


def _metrics(
    fields: list[Float[Array, "rows"]], skipped: Int[Array, ""]
) -> ConflictMetrics:
    """Sorts metrics into those of the whole, which is the first row, and of groups."""
    cosine, conflict, loss_norm, regularizer_norm, removed = [x[0] for x in fields]
    return ConflictMetrics(
        cosine,
        conflict,
        loss_norm,
        regularizer_norm,
        removed,
        skipped,
        GroupMetrics(*[x[1:] for x in fields]),
    )


def conflict_metrics(
    opt_state: optax.OptState, *, per_group: bool = False
) -> dict[str, Any]:
    """What the last update saw and did, from wherever it is in an optimizer's state.

    Args:
      opt_state: state of any optimizer with one of this library's transformations in
        it: chained, masked, partitioned, accumulated, with injected hyperparameters,
        or NNX's.
      per_group: return each leaf's metrics `[leaves]`, in the order of the leaves of
        the parameters and zero for those that take no part, or where the scope is
        labels each label's `[labels]`, in sorted order.

    Returns:
      Scalars by name:
        `cosine` of the two whole gradients;
        `conflict`, the share of the groups in conflict, weighted by parameters;
        `loss_norm`, the norm of the loss gradient;
        `regularizer_norm`, that of the regularizer's, times its strength;
        `removed`, the share of the regularizer's norm that resolution took away;
        `skipped`, how many updates so far had to leave out a regularizer gradient
        that was not finite (not with `per_group`).
      With several regularizers, a dict of these by their names. With several
      transformations, as in `optax.partition`, a dict of these by their place.

    Raises:
      ValueError: if there is no such transformation in the state.

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
    for place, name, value in _find(opt_state):
        fields = value.groups if per_group else value
        by_place.setdefault(place, {})[name] = {
            key: _plain(entry)
            for key, entry in fields._asdict().items()
            if key != "groups"
        }
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


def regularizer_names(opt_state: optax.OptState) -> list[str]:
    """Names of the regularizers in an optimizer's state, none where one is unnamed."""
    return sorted({name for _, name, _ in _find(opt_state)} - {""})


def first_order_harm(
    loss_grads: PyTree, updates: PyTree, updates_without: PyTree
) -> Float[Array, ""]:
    """How much the regularizer's part of an update raises the loss to first order.

    It is `<g, updates - updates_without>`, summed in float32: above 0 where the
    regularizer works against the loss, and below 0 where it helps.

    Args:
      loss_grads: gradient `g` of the loss, on this batch or another.
      updates: what is added to the parameters.
      updates_without: what would be added without the regularizer: of the same
        optimizer, in the same state, from the loss gradient alone.

    Returns:
      A scalar in float32, in units of the loss.

    Raises:
      ValueError: if the trees do not match.

    Example:
      >>> g = jnp.array([1.0, 0.0])
      >>> print(first_order_harm(g, -g + jnp.array([0.3, 1.0]), -g))
      0.3

    References:
      The test of Tian et al., 2024, https://arxiv.org/abs/2411.01713, in update space.
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
            total += jnp.sum(_scopes.real_product(g, new - old)).astype(jnp.float32)
    return total


def _find(opt_state: optax.OptState) -> Iterator[tuple[str, str, ConflictMetrics]]:
    """Yields each transformation's place, each regularizer's name and its metrics."""
    leaves, _ = jax.tree.flatten_with_path(opt_state, is_leaf=_is_metrics)
    for path, value in leaves:
        if isinstance(value, ConflictMetrics):
            field = max(i for i, key in enumerate(path) if _name(key) == "metrics")
            place = "/".join(_name(key) for key in path[:field])
            yield place, "/".join(_name(key) for key in path[field + 1 :]), value


def _is_metrics(node: Any) -> bool:
    return isinstance(node, ConflictMetrics)


def _name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _plain(entry: Any) -> Any:
    """An array, or its shape where the state is abstract; out of NNX's variables."""
    return entry.get_value() if hasattr(entry, "get_value") else entry
