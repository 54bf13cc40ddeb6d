"""The regularizer's part of an update: what a rule leaves of its gradient.

With `x` the gradient that is protected and `y` the scaled one of the regularizer, a
rule's update `w[0] * x + w[1] * y` is `x` plus a part `(w[0] - 1) * x + w[1] * y` that
is the regularizer's. Only that part is computed here, as a multiple of `x / ||x||` and
one of `y`, which stay in range where `||y|| / ||x||` does not.

Shape letters: L leaves, G groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from dtnh_jax import _axes, _scopes, _trees, rules
from dtnh_jax._plan import (
    Plan,
    add,
    bounded,
    keeps_all,
    make_plan,
    part_norm,
    shrinkage,
)
from dtnh_jax._scopes import Geometry

NAMED_SCOPES = ("global", "leaf", "unit", "element")
Scope = str | PyTree[str] | Callable[[PyTree], PyTree[str]]


class Part(NamedTuple):
    """The regularizer's part of an update, and what a log wants to know about it."""

    leaves: list[Array]  # at least single precision, with the strength
    is_whole: list[Bool[Array, "..."]]  # where nothing was taken from the regularizer
    norm: Float[Array, "L"]  # of each leaf of the part, before the trust ratio
    conflict: Float[Array, "L"]  # share of each leaf that was in conflict


def check_scope(scope: Any) -> None:
    """Raises ValueError for a name that is no scope, TypeError for no scope at all."""
    if isinstance(scope, str) and scope not in NAMED_SCOPES:
        raise ValueError(
            f"`scope` must be one of {', '.join(NAMED_SCOPES)}, or a tree of labels, "
            f"or a function from the parameters to one, got {scope!r}."
        )
    if scope is None or isinstance(scope, (int, float)):
        raise TypeError(
            f"`scope` must be a name, a tree of labels or a function, got {scope!r}."
        )


def labels_of(scope: Scope, tree: PyTree) -> list[str] | None:
    """The label of each leaf of `tree`, or None where the scope is a named one."""
    if isinstance(scope, str):
        return None
    labels = scope(tree) if callable(scope) else scope
    return _trees.prefix_leaves(labels, tree, "scope")


class Stage(NamedTuple):
    """A rule and the groups that it works in."""

    rule: rules.Rule
    scope: Scope
    labels: list[str] | None  # of the leaves, None for a named scope
    is_coupled: bool = True  # whether lengths of `x` and `y` have the same unit


class Trust(NamedTuple):
    """A bound of the part's norm, per group (per leaf at element scope)."""

    ratio: Array | Any
    # L arrays whose norms are the measure, and these norms in their geometry; None for
    # the gradient that is protected.
    lengths: list[Array] | None = None
    leaves: Geometry | None = None


def resolve(
    xs: list[Array],
    get_ys: Callable[[], list[Array]],
    strength: Float[Array, ""],
    stage: Stage,
    trust: Trust | None,
    leaves: Geometry,
    axes: tuple[str, ...] = (),
) -> Part:
    """Applies a rule in every group of a scope.

    Args:
      xs: L arrays, the gradient that is protected.
      get_ys: returns L arrays, the regularizer's gradient before `strength`; see
        `Pairing`.
      strength: factor of `ys`.
      stage: the rule and where it works.
      trust: what bounds the part, if anything.
      leaves: the geometry `[L]` of `xs` and `ys`.
      axes: names of axes along which each device holds a part, see `_axes`. Only parts
        whose rule works inside of a leaf are summed over them once more.

    Returns:
      The part, all groups together.
    """
    if not xs:
        return Part([], [], jnp.zeros([0]), jnp.zeros([0]))
    leaves = leaves._replace(y_norm=leaves.y_norm * strength)
    if stage.scope not in ("unit", "element"):
        return _resolve_groups(xs, get_ys(), strength, stage, trust, leaves)
    ys = get_ys()
    lengths = [None] * len(xs)
    if trust is not None and trust.lengths is not None:
        lengths = trust.lengths
    columns = zip(xs, ys, lengths, *map(jnp.unstack, leaves))
    if stage.scope == "unit":
        resolved = [
            _resolve_units(x, y, strength, stage, trust, length)
            for x, y, length, *_ in columns
        ]
    else:
        resolved = [
            _resolve_elements(x, y, strength, stage, Geometry(*leaf))
            for x, y, _, *leaf in columns
        ]
    parts, is_whole, *seen = [list(column) for column in zip(*resolved)]
    norms, conflicts = map(jnp.stack, seen)
    norm, conflict = over_devices(
        norms, conflicts, _longest(leaves), list(zip(xs, ys)), axes
    )
    if trust is not None and stage.scope == "element":
        # One number has no length but its own: the bound is per leaf.
        own = leaves if trust.leaves is None else trust.leaves
        shrink = jnp.unstack(shrinkage(norm, trust.ratio * own.x_norm))
        parts = [by * part for by, part in zip(shrink, parts)]
        is_whole = [whole & (by == 1) for by, whole in zip(shrink, is_whole)]
    return Part(parts, is_whole, norm, conflict)


def over_devices(
    norms: Float[Array, "L"],
    conflicts: Float[Array, "L"],
    unit: Float[Array, "L"],
    leaves: list[tuple[Array, ...]],
    axes: tuple[str, ...],
) -> tuple[Array, Array]:
    """Joins what devices report of their parts of each leaf, with one collective.

    Args:
      norms: of their parts.
      conflicts: shares of their parts that are in conflict.
      unit: the same on all devices, in which the squares of `norms` are in range.
      leaves: for each leaf the arrays that this is about, see `_axes.copies`.
      axes: along which devices hold parts.
    """
    if not axes:
        return norms, conflicts
    copies = _axes.copies(leaves, axes)
    # The share of a leaf is the mean of the shares that devices have of it.
    share = np.asarray(copies / _axes.count(axes), np.float32)
    squares = jnp.square(norms * _scopes.reciprocal(unit))
    squares, conflicts = _axes.add((squares, conflicts * share), copies, axes)
    return unit * _scopes.root(squares), conflicts


def _longest(leaf: Geometry) -> Array:
    """A safe unit of length for parts, which are seldom longer than both gradients."""
    return jnp.maximum(leaf.x_norm, leaf.y_norm)


def _resolve_groups(xs, ys, strength, stage, trust, leaves: Geometry) -> Part:
    """Groups of whole leaves: the rule works on a vector with an entry per group."""
    index, member = membership(stage.scope, stage.labels, len(xs))
    groups = _scopes.merge(leaves, member)
    plan = make_plan(groups, stage.rule, stage.is_coupled)
    share = leaves.x_norm * _scopes.reciprocal(groups.x_norm)[index]
    norms = part_norm(leaves, Plan(plan.along[index] * share, plan.kept[index]))
    if trust is not None:
        bounds = groups
        if trust.leaves is not None:
            bounds = _scopes.merge(trust.leaves, member)
        plan = bounded(plan, groups, trust.ratio * bounds.x_norm)
    columns = [
        plan.along,
        _scopes.reciprocal(groups.x_norm),
        plan.kept * strength,
        keeps_all(plan),
    ]
    # Without the barrier XLA works these vectors out anew in the loop of every leaf.
    columns = jax.lax.optimization_barrier(columns)
    rows = list(zip(*[list(jnp.unstack(column)) for column in columns]))
    parts, is_whole = [], []
    for g, x, y in zip(index, xs, ys):
        along, by, kept, whole = rows[g]
        x, y = _trees.as_float32(x), _trees.as_float32(y)
        parts.append(add(along * (by * x), kept * y))
        is_whole.append(whole)
    conflict = (groups.cosine < 0).astype(jnp.float32)
    return Part(parts, is_whole, norms, conflict[index])


def _resolve_units(x, y, strength, stage, trust, length) -> tuple:
    """Output channels of one leaf: the rule works on a vector with an entry of each.

    Returns the part, where it is whole, its norm before the trust ratio, and the share
    of channels in conflict.
    """
    units = _scopes.measure_units(x, y)
    units = units._replace(y_norm=units.y_norm * strength)
    plan = make_plan(units, stage.rule, stage.is_coupled)
    norm = _scopes.norm(part_norm(units, plan))
    if trust is not None:
        own = units if length is None else _scopes.measure_units(length, length)
        plan = bounded(plan, units, trust.ratio * own.x_norm)
    x, y = _trees.as_float32(x), _trees.as_float32(y)
    direction = _scopes.reciprocal(units.x_norm) * x
    part = add(plan.along * direction, plan.kept * strength * y)
    return part, keeps_all(plan), norm, jnp.mean(units.cosine < 0)


def _resolve_elements(x, y, strength, stage, leaf: Geometry) -> tuple:
    """Numbers of one leaf, each by itself: lengths and sums need no square root.

    Returns the part, where it is whole, its norm, and the share in conflict.
    """
    x, y = _trees.as_float32(x), strength * _trees.as_float32(y)
    elements = _scopes.measure_elements(x, y)
    plan = make_plan(elements, stage.rule, stage.is_coupled)
    part = add(plan.along * jnp.sign(x), plan.kept * y)
    unit = _longest(leaf)
    squares = jnp.square(jnp.abs(part * _scopes.reciprocal(unit)))
    norm = unit * _scopes.root(jnp.sum(squares))
    return part, keeps_all(plan), norm, jnp.mean(elements.cosine < 0)


def membership(
    scope: Scope, labels: list[str] | None, leaves: int
) -> tuple[Int[np.ndarray, "L"], Bool[np.ndarray, "G L"]]:
    """Returns the group of each leaf, and the same as a table."""
    if labels is not None:
        index = np.unique(np.array(labels, str), return_inverse=True)[1]
    elif scope == "leaf":
        index = np.arange(leaves)
    else:
        index = np.zeros(leaves, int)
    return index, np.arange(index.max(initial=-1) + 1)[:, None] == index[None, :]
