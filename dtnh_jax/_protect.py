"""From two trees to the regularizer's part: what every transformation does first."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PyTree

from dtnh_jax import _part, _scopes, _trees, metrics
from dtnh_jax._options import Options
from dtnh_jax.regularizers.weights import WeightRegularizer, check_weight_regularizer


class ConflictState(NamedTuple):
    """State of a transformation that resolves conflicts."""

    # Updates so far with a finite loss gradient, as under `optax.apply_if_finite`.
    step: Int[Array, ""]
    # The moving average of the loss gradient, from zero; None where none is kept.
    reference: PyTree
    # Of the last update; a dict by name where there are several regularizers.
    metrics: metrics.ConflictMetrics | dict[str, metrics.ConflictMetrics]


class RegularizerPart(NamedTuple):
    """What one regularizer adds to the update, leaf by leaf."""

    leaves: list[Array]  # after resolution, at least in single precision
    scaled: list[Array]  # before it: strength times the gradient
    is_whole: list[Bool[Array, "..."]]  # where the two are the same
    is_finite: Bool[Array, ""]  # whether any of this can be used


def init_state(options: Options, params: optax.Params) -> ConflictState:
    """Returns the state before the first update."""
    layout = _trees.layout(params, [], options.mask, params)
    reference = None
    if options.reference_decay is not None:
        zeros = [jnp.zeros_like(x, _trees.single(x)) for x in layout.xs]
        reference = layout.scatter(zeros, others=optax.MaskedNode())
    groups = len(rows_of(layout, _part.labels_of(options.stages[0][1], params)))
    return ConflictState(
        jnp.zeros([], jnp.int32),
        reference,
        options.join({name: metrics.initial(groups) for name in options.strengths}),
    )


def checked_regularizers(
    options: Options, regularizer: Any
) -> dict[str, WeightRegularizer]:
    """Returns regularizers of the weights by name, if that is what they are."""
    regularizers = options.by_name(regularizer, "regularizer")
    for value in regularizers.values():
        check_weight_regularizer(value)
    return regularizers


Getters = dict[str, Callable[[], optax.Updates]]  # of gradients, by regularizer


def given_gradients(
    options: Options,
    regularizers: Mapping[str, WeightRegularizer] | None,
    updates: optax.Updates,
    regularizer_grads: Any,
    params: optax.Params | None,
) -> tuple[optax.Updates, Getters]:
    """Sorts what `update` is given into the loss gradient and the regularizers'.

    Args:
      options: of the transformation.
      regularizers: of the weights, whose gradients are worked out from the parameters;
        None where gradients come as a pair.
      updates: gradient of the loss, or a pair.
      regularizer_grads: of the regularizers, where `updates` is no pair.
      params: the parameters.

    Returns:
      The loss gradient, and functions that return the others.
    """
    if regularizers is None:
        loss, given = _trees.split_pair(updates, regularizer_grads)
        grads = options.by_name(given, "regularizer_grads")
        return loss, {name: lambda r=r: r for name, r in grads.items()}
    if params is None:
        raise ValueError(
            "`params` must be given to `update`, because the regularizer's gradient is "
            "computed from them, got None."
        )

    def getter(each: WeightRegularizer, at: optax.Params = params):
        return lambda: each.gradient(at)

    return updates, {name: getter(each) for name, each in regularizers.items()}


class Groups(NamedTuple):
    """Leaves that take part, in groups."""

    member: Bool[np.ndarray, "groups leaves"]  # that a rule sees as one
    rows: Bool[np.ndarray, "rows leaves"]  # that the metrics see as one


# (regularizer's gradient, strength, geometry with the loss, whether the loss gradient
# is finite) -> what is left of `strength` times the gradient.
Resolver = Callable[
    [Callable[[], list[Array]], Array, _scopes.Geometry, Bool[Array, ""]], _part.Part
]


def layout_of(
    options: Options,
    loss: optax.Updates,
    getters: Mapping[str, Callable[[], optax.Updates]],
    params: optax.Params | None,
) -> _trees.Layout:
    """Finds the leaves that take part in an update."""
    trees = [get() for get in getters.values()]
    return _trees.layout(loss, trees, options.mask, loss if params is None else params)


def regularizer_parts(
    options: Options,
    loss: optax.Updates,
    getters: Mapping[str, Callable[[], optax.Updates]],
    state: ConflictState,
    params: optax.Params | None,
    lengths: optax.Updates | None = None,
) -> tuple[_trees.Layout, list[RegularizerPart], ConflictState]:
    """Resolves every regularizer against the loss.

    Args:
      options: of the transformation.
      loss: gradient of the loss.
      getters: for each regularizer a function that returns its gradient. It is called
        more than once, so that what is in closed form is never kept in memory.
      state: before the update.
      params: the parameters, for masks and labels that are functions of them.
      lengths: a tree whose norms the trust ratio is of, instead of the gradient that
        is protected.

    Returns:
      The layout of the leaves that take part, a part for each regularizer, and the
      state after the update.
    """
    layout = layout_of(options, loss, getters, params)
    params = loss if params is None else params
    labels = [_part.labels_of(scope, params) for _, scope in options.stages]
    stages = [
        _part.Stage(rule, scope, of and [of[i] for i in layout.at], options.is_coupled)
        for (rule, scope), of in zip(options.stages, labels)
    ]
    trust = None
    if options.trust_ratio is not None:
        given = None if lengths is None else layout.gather(lengths, "updates")
        trust = _part.Trust(options.trust_ratio, given)
    _, member = _part.membership(stages[0].scope, stages[0].labels, len(layout.xs))
    groups = Groups(member, rows_of(layout, labels[0]))
    average = protected = None

    def resolve(get_ys, strength, leaves, is_loss_finite):
        nonlocal average, protected
        if options.reference_decay is None:
            return _in_stages(layout.xs, get_ys, strength, stages, trust, leaves)
        if protected is None:
            average, protected = _moving_average(
                layout, state, options.reference_decay, is_loss_finite
            )
        seen = _scopes.measure_leaves(protected, get_ys, groups.member)
        return _in_stages(protected, get_ys, strength, stages, trust, seen)

    parts, seen, step = resolve_each(
        options, layout, groups, getters, state.step, state.metrics, resolve
    )
    reference = state.reference
    if average is not None:
        reference = layout.scatter(average, onto=state.reference)
    return layout, parts, ConflictState(step, reference, seen)


def resolve_each(
    options: Options,
    layout: _trees.Layout,
    groups: Groups,
    getters: Mapping[str, Callable[[], optax.Updates]],
    step: Int[Array, ""],
    before: Any,
    resolve: Resolver,
) -> tuple[list[RegularizerPart], Any, Int[Array, ""]]:
    """Measures every regularizer's gradient, and has it resolved.

    Args:
      options: of the transformation.
      layout: of the leaves that take part.
      groups: of leaves that are measured together, and reported together.
      getters: as in `regularizer_parts`.
      step: of this update.
      before: the metrics in the state.
      resolve: what is to be done.

    Returns:
      A part for each regularizer, the metrics, and the next step.
    """
    parts, by_name = [], {}
    is_loss_finite = jnp.array(True)
    for name, get in getters.items():
        strength = options.strength_at(name, step)

        def get_ys(get=get):
            return layout.gather(get(), "regularizer_grads")

        leaves = _scopes.measure_leaves(layout.xs, get_ys, groups.member)
        strength = strength.astype(leaves.y_norm.dtype)
        is_loss_finite = jnp.all(jnp.isfinite(leaves.x_norm))
        part = resolve(get_ys, strength, leaves, is_loss_finite)
        is_finite = jnp.all(jnp.isfinite(strength * leaves.y_norm))
        skipped = options.by_name(before, "state.metrics")[name].skipped
        by_name[name] = metrics.measured(
            leaves,
            strength,
            part,
            [x.size for x in layout.xs],
            groups.rows,
            skipped + jnp.where(is_finite, 0, 1),
        )
        parts.append(
            RegularizerPart(
                part.leaves,
                [strength.astype(y.dtype) * y for y in get_ys()],
                part.is_whole,
                is_finite & is_loss_finite,
            )
        )
    step = jnp.where(is_loss_finite, optax.safe_increment(step), step)
    return parts, options.join(by_name), step


def add_parts(layout: _trees.Layout, parts: list[RegularizerPart]) -> optax.Updates:
    """The loss gradient plus what is left of every regularizer's."""
    updates = layout.xs
    for part in parts:
        added = [
            _add(x, *each)
            for x, *each in zip(updates, part.leaves, part.scaled, part.is_whole)
        ]
        updates = [jnp.where(part.is_finite, new, x) for new, x in zip(added, updates)]
    return layout.scatter(updates)


def _add(x: Array, part: Array, scaled: Array, is_whole: Array) -> Array:
    """`x + scaled` bit by bit where nothing was resolved, else rounded only once."""
    rounded = (_trees.as_float32(x) + part).astype(x.dtype)
    return jnp.where(is_whole, x + scaled.astype(x.dtype), rounded)


def rows_of(
    layout: _trees.Layout, labels: list[str] | None
) -> Bool[np.ndarray, "rows leaves"]:
    """Which leaves that take part are in which row of the metrics per group.

    There is a row for every label or every leaf, whether it takes part or not, so that
    their number is the same from `init` on.
    """
    positions = len(_trees.flatten(layout.tree)[0])
    _, member = _part.membership("leaf", labels, positions)
    return member[:, layout.at]


def _in_stages(
    protected: list[Array],
    get_ys: Callable[[], list[Array]],
    strength: Array,
    stages: list[_part.Stage],
    trust: _part.Trust | None,
    seen: _scopes.Geometry,
) -> _part.Part:
    """Resolves stage by stage, each what the one before it has left."""
    bounds = [None] * (len(stages) - 1) + [trust]
    first = part = _part.resolve(
        protected, get_ys, strength, stages[0], bounds[0], seen
    )
    for stage, bound in zip(stages[1:], bounds[1:]):
        left = part.leaves
        member = _part.membership(stage.scope, stage.labels, len(left))[1]
        seen = _scopes.measure_leaves(protected, lambda left=left: left, member)
        then = _part.resolve(
            protected, lambda left=left: left, jnp.ones([]), stage, bound, seen
        )
        whole = [a & b for a, b in zip(part.is_whole, then.is_whole)]
        part = then._replace(is_whole=whole, conflict=first.conflict)
    return part


def _moving_average(
    layout: _trees.Layout, state: ConflictState, decay, usable: Bool[Array, ""]
) -> tuple[list[Array], list[Array]]:
    """Returns the new moving average of the loss gradient, raw and without its bias."""
    old = layout.pick(state.reference)
    new = [
        jnp.where(usable, decay * m + (1 - decay) * _trees.as_float32(x), m)
        for m, x in zip(old, layout.xs)
    ]
    unbias = 1 / (1 - jnp.asarray(decay, jnp.float32) ** (state.step + 1))
    return new, [m * unbias for m in new]
