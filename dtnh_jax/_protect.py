"""From two trees to the regularizer's part: what every transformation does first."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PyTree

from dtnh_jax import _axes, _measure, _part, _scopes, _trees, metrics
from dtnh_jax._given import Getters, layout_of
from dtnh_jax._options import Options


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


class Groups(NamedTuple):
    """Leaves that take part, in groups."""

    member: Bool[np.ndarray, "groups leaves"]  # that a rule sees as one
    rows: Bool[np.ndarray, "rows leaves"]  # that the metrics see as one


# (regularizer's gradient, strength, geometry with the gradient that is protected,
# geometry of what the trust ratio is of) -> what is left of `strength` times the first.
Resolver = Callable[
    [Callable[[], list[Array]], Array, _scopes.Geometry, _scopes.Geometry | None],
    _part.Part,
]


class Resolved(NamedTuple):
    """What `resolve_each` has found."""

    parts: list[RegularizerPart]  # for each regularizer
    metrics: Any  # as in `ConflictState`
    step: Int[Array, ""]  # the next one
    is_loss_finite: Bool[Array, ""]


def regularizer_parts(
    options: Options,
    loss: optax.Updates,
    getters: Getters,
    state: ConflictState,
    params: optax.Params | None,
    lengths: optax.Updates | None = None,
) -> tuple[_trees.Layout, list[RegularizerPart], ConflictState]:
    """Resolves every regularizer against the loss.

    Args:
      options: of the transformation.
      loss: gradient of the loss.
      getters: for each regularizer a function that returns its gradient.
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
    members = [_member(stage, layout) for stage in stages]
    groups = Groups(members[0], rows_of(layout, labels[0]))
    decay = options.reference_decay

    def get_average(times=0):
        return _moving_average(layout, _measure.hide(state, times), decay)

    def get_protected(times):
        if decay is None:
            return layout.xs
        unbias = 1 / (1 - jnp.asarray(decay, jnp.float32) ** (state.step + 1))
        return [unbias * m for m in get_average(times)]

    trust_lengths = of_trust = None
    if options.trust_ratio is not None and lengths is not None:
        trust_lengths = layout.gather(lengths, "updates")
        of_trust = _measure.paired(
            lambda _: trust_lengths, lambda _: trust_lengths, members[-1]
        )

    def resolve(get_ys, strength, seen, bounds):
        trust = None
        if options.trust_ratio is not None:
            trust = _part.Trust(options.trust_ratio, trust_lengths, bounds)
        return _in_stages(
            get_protected(0), get_ys, strength, stages, trust, seen, options.axes
        )

    found = resolve_each(
        options, layout, groups, getters, state.step, state.metrics, resolve,
        None if decay is None else get_protected, of_trust,
    )  # fmt: skip
    reference = state.reference
    if decay is not None:
        kept = [
            jnp.where(found.is_loss_finite, new, old)
            for new, old in zip(get_average(), layout.pick(state.reference))
        ]
        reference = layout.scatter(kept, onto=state.reference)
    return layout, found.parts, ConflictState(found.step, reference, found.metrics)


def resolve_each(
    options: Options,
    layout: _trees.Layout,
    groups: Groups,
    getters: Getters,
    step: Int[Array, ""],
    before: Any,
    resolve: Resolver,
    get_protected: Callable[[int], list[Array]] | None = None,
    of_trust: _measure.Pairing | None = None,
) -> Resolved:
    """Measures every regularizer's gradient, and has it resolved.

    All is measured together: where devices hold parts, that is one collective.

    Args:
      options: of the transformation.
      layout: of the leaves that take part.
      groups: of leaves that are measured together, and reported together.
      getters: as in `regularizer_parts`.
      step: of this update.
      before: the metrics in the state.
      resolve: what is to be done.
      get_protected: returns the gradient that is protected, where it is not the loss's.
        Where that is not finite it need not be either: nothing is then done with it.
      of_trust: what else is to be measured, for `resolve`.

    Returns:
      A part for each regularizer, and what goes into the state.
    """
    get_ys = {
        name: lambda times, get=get: layout.gather(get(times), "regularizer_grads")
        for name, get in getters.items()
    }
    pairings = []
    for get in get_ys.values():
        for get_xs in (lambda _: layout.xs, get_protected):
            if get_xs is not None:
                pairings.append(_measure.paired(get_xs, get, groups.member))
    measured = _measure.measure(
        [*pairings, of_trust] if of_trust else pairings, options.axes
    )
    each = len(pairings) // len(getters)
    bounds = measured[-1] if of_trust else None
    is_loss_finite = jnp.all(jnp.isfinite(measured[0].x_norm))
    copies = _axes.copies([[x] for x in layout.xs], options.axes)
    devices = _axes.count(options.axes)
    sizes = [x.size * devices // int(n) for x, n in zip(layout.xs, copies)]

    parts, by_name = [], {}
    for i, (name, get) in enumerate(get_ys.items()):
        leaves, seen = measured[each * i], measured[each * (i + 1) - 1]
        strength = options.strength_at(name, step).astype(leaves.y_norm.dtype)
        part = resolve(lambda get=get: get(0), strength, seen, bounds)
        is_finite = jnp.all(jnp.isfinite(strength * leaves.y_norm))
        skipped = options.by_name(before, "state.metrics")[name].skipped
        skipped = skipped + jnp.where(is_finite, 0, 1)
        by_name[name] = metrics.measured(
            leaves, strength, part, sizes, groups.rows, skipped
        )
        parts.append(
            RegularizerPart(
                part.leaves,
                [strength.astype(y.dtype) * y for y in get(0)],
                part.is_whole,
                is_finite & is_loss_finite,
            )
        )
    step = jnp.where(is_loss_finite, optax.safe_increment(step), step)
    return Resolved(parts, options.join(by_name), step, is_loss_finite)


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


def _member(
    stage: _part.Stage, layout: _trees.Layout
) -> Bool[np.ndarray, "groups leaves"]:
    return _part.membership(stage.scope, stage.labels, len(layout.xs))[1]


def _in_stages(
    protected: list[Array],
    get_ys: Callable[[], list[Array]],
    strength: Array,
    stages: list[_part.Stage],
    trust: _part.Trust | None,
    seen: _scopes.Geometry,
    axes: tuple[str, ...],
) -> _part.Part:
    """Resolves stage by stage, each what the one before it has left."""
    bounds = [None] * (len(stages) - 1) + [trust]
    first = part = _part.resolve(
        protected, get_ys, strength, stages[0], bounds[0], seen, axes
    )
    for stage, bound in zip(stages[1:], bounds[1:]):
        left = part.leaves
        member = _part.membership(stage.scope, stage.labels, len(left))[1]
        pairing = _measure.Pairing(lambda _, left=left: (protected, left), member)
        (seen,) = _measure.measure([pairing], axes)
        then = _part.resolve(
            protected, lambda left=left: left, jnp.ones([]), stage, bound, seen, axes
        )
        whole = [a & b for a, b in zip(part.is_whole, then.is_whole)]
        part = then._replace(is_whole=whole, conflict=first.conflict)
    return part


def _moving_average(
    layout: _trees.Layout, state: ConflictState, decay: Any
) -> list[Array]:
    """Returns the new moving average of the loss gradient, biased towards zero."""
    return [
        decay * m + (1 - decay) * _trees.as_float32(x)
        for m, x in zip(layout.pick(state.reference), layout.xs)
    ]
