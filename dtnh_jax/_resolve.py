"""The transformations that add a regularizer's gradient to the loss gradient."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from dtnh_jax import rules
from dtnh_jax._arguments import Number, Options, Strength, checked_options
from dtnh_jax._axes import AxisName, cast_like, check_parts
from dtnh_jax._geometry import (
    Measured,
    Scope,
    clipped,
    coefficients,
    groups_of,
    unmeasured,
)
from dtnh_jax._trees import AlignedLeaves, Mask, aligned, split_updates
from dtnh_jax.regularizers.weights import WeightRegularizer
from dtnh_jax.rules._gram import Coefficients, Gram


class ConflictState(NamedTuple):
    """State of a transformation that resolves conflicts."""

    # Updates so far with a finite protected gradient, as under `optax.apply_if_finite`.
    step: Int[Array, ""]
    # Moving average of the protected gradient, from zero; None without `ema_decay`.
    ema: PyTree
    # Parameters at `init`, for a self-anchored regularizer; else None. With several
    # regularizers this and `measured` are dicts by name.
    anchor: PyTree
    measured: Measured | dict[str, Measured]


def dtnh(
    strength: Strength | Mapping[str, Strength],
    *,
    scope: Scope = "global",
    ema_decay: Number | None = None,
    max_ratio: Strength | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a regularizer's gradient, without the component that opposes the loss.

    With `g` the gradient of the loss, `r` that of the regularizer and `strength` its
    factor, the update is

    `g + strength * (r - min(0, <g, r>) / ||g||^2 * g)`.

    Without conflict, `<g, r> >= 0`, that is the gradient of
    `loss + strength * regularizer`. With conflict it is the direction nearest to that
    gradient which lowers the loss as fast as `g`, to first order.

    Inner products are summed in float32, without an epsilon, and are correct for norms
    from 1e-18 to 1e18. Near the lower end they have four correct digits, because
    devices flush squares of small entries to zero. A group whose sums overflow or are
    not finite gets the loss gradient alone, and `conflict_metrics` counts it in
    `skipped`. A loss gradient that is not finite passes through unchanged, so that
    `optax.apply_if_finite` can reject it.

    Args:
      strength: factor of the regularizer, at least 0: a number, a schedule of the
        step, or a dict of these by the names of several regularizers.
      scope: which parameters share one inner product: `"global"` (all, as in the
        paper), `"leaf"`, `"unit"` (one output channel: sums over all axes except the
        last), `"element"`, or labels of the parameters, as in `optax.partition`: a tree
        or a function. A finer scope implies the guarantees of every coarser one.
      ema_decay: protect the moving average of the loss gradient with this decay per
        step, instead of the gradient of this mini-batch.
      max_ratio: the largest norm of the regularizer's part of the update, as a multiple
        of the protected gradient's norm in the same group (at element scope, of each
        entry): a number or a schedule of the step. The part is the update minus the
        loss gradient, so it includes the shrinkage by rules that shrink the loss
        gradient, such as `rules.mgda`.
      mask: a tree of bools, or a function from the parameters to one, as in
        `optax.masked`. Masked-out leaves get the loss gradient alone and take no part
        in inner products. Also mask out the parameters that a later transformation
        freezes: their gradients would count in inner products and norms.
      axis_name: name of a mapped axis, or a tuple of names, along which each device
        holds a PART of the parameters and of both gradients (fully sharded or tensor
        parallel), under `jax.shard_map`, `jax.pmap` or `jax.vmap`. Inner products are
        then summed over that axis, see `resolve_conflicts`. Leave it out if every
        device holds all parameters and the gradients of its own examples (data
        parallel): average those gradients with `jax.lax.pmean` first. Also leave it out
        under jit with sharded arrays: there the compiler adds the sums.

    Returns:
      A transformation of a `GradientPair`, or of the loss gradient with the
      regularizer's as the keyword `regularizer_grads`. Its updates are a tree like the
      loss gradient. The keyword `held_out_grads`, a gradient of the loss on examples
      held out from training, is protected in place of the loss gradient.

    Raises:
      ValueError: a value is out of range, or trees do not match.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from dtnh_jax import GradientPair, dtnh
      >>> tx = optax.chain(dtnh(strength=1.0), optax.sgd(1.0))
      >>> params = jnp.zeros(2)
      >>> g, r = jnp.array([1.0, 0.0]), jnp.array([-1.0, 2.0])
      >>> updates, state = tx.update(GradientPair(g, r), tx.init(params), params)
      >>> print(updates)  # the component of `r` against `g` is gone, the rest is kept
      [-1. -2.]

    References:
      Wan et al., 2019, https://arxiv.org/abs/1911.07489
    """
    return resolve_conflicts(
        rules.dtnh,
        strength,
        scope=scope,
        ema_decay=ema_decay,
        max_ratio=max_ratio,
        mask=mask,
        axis_name=axis_name,
    )


def resolve_conflicts(
    rule: rules.Rule,
    strength: Strength | Mapping[str, Strength],
    *,
    scope: Scope = "global",
    ema_decay: Number | None = None,
    max_ratio: Strength | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a regularizer's gradient to the loss gradient, as far as `rule` allows.

    Let `m` be the protected gradient: the loss gradient `g`, its moving average, or a
    held-out gradient. Let `r` be the regularizer's gradient times `strength`. The
    update is `g + (w[0] - 1) * m + w[1] * r`, where `w = rule(G)` and `G` is the Gram
    matrix of `(m, r)` in each group of `scope`. With several regularizers, each is
    resolved separately, and their parts are summed.

    Rules are not linear. Average gradients over devices and micro-batches before this
    transformation, and clip them after it.

    With `axis_name`, one collective reduces all sums of a regularizer, and metrics
    describe the whole gradients. At scope `"unit"`, a unit is the part that one device
    holds: shard leaves along their last axis to keep units whole; otherwise the scope
    is finer. A leaf that all devices hold, such as a small bias, counts once under
    `jax.shard_map`, because its type shows this. With `check_vma=False`, and under
    `jax.pmap` and `jax.vmap`, the type does not show it, and the leaf counts once for
    each device: there mask it out, or give it a label of its own in `scope`.

    Args:
      rule: maps Gram matrices `[..., 2, 2]` to weights `[..., 2]`; see
        `dtnh_jax.rules`.
      strength: as in `dtnh`.
      scope: as in `dtnh`.
      ema_decay: as in `dtnh`.
      max_ratio: as in `dtnh`.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`.

    Returns:
      A transformation like that of `dtnh`.

    Raises:
      ValueError: a value is out of range, or trees do not match.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from dtnh_jax import resolve_conflicts, rules
      >>> tx = resolve_conflicts(rules.weighted_sum, strength=0.5, scope="leaf")
      >>> g, r = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([-1.0, 2.0])}
      >>> updates, state = tx.update(g, tx.init(g), regularizer_grads=r)
      >>> print(updates["w"])
      [0.5 1. ]
    """
    return _resolving(
        checked_options(
            rule, strength, None, scope, ema_decay, max_ratio, mask, axis_name
        )
    )


def add_regularizer(
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer],
    strength: Strength | Mapping[str, Strength],
    *,
    rule: rules.Rule | None = None,
    scope: Scope = "global",
    ema_decay: Number | None = None,
    max_ratio: Strength | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of a regularizer of the weights to plain gradients.

    Put it at the place of `optax.add_decayed_weights` in a chain. The regularizer's
    gradient is computed from the parameters in closed form, without a backward pass. A
    self-anchored regularizer, such as `l2_sp()`, pulls back to the parameters that
    `init` gets, and keeps a copy of them in the state.

    Args:
      regularizer: a regularizer of the weights, see `dtnh_jax.regularizers`, or a dict
        of several by name.
      strength: factor of the regularizer, as in `dtnh`; for several regularizers, a
        dict with the same keys.
      rule: a function that resolves conflicts; `rules.dtnh` by default.
      scope: as in `dtnh`.
      ema_decay: as in `dtnh`.
      max_ratio: as in `dtnh`.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`.

    Returns:
      A transformation of the loss gradient. Its `update` needs `params`.

    Raises:
      ValueError: a value is out of range, or trees do not match.
      TypeError: an argument has the wrong type.

    Example:
      >>> import jax.numpy as jnp
      >>> from dtnh_jax import add_regularizer
      >>> from dtnh_jax.regularizers import l2_sp
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> pull = add_regularizer(l2_sp(params), strength=0.1)
      >>> tx = optax.chain(pull, optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> grads = {"w": jnp.array([1.0, 1.0])}
      >>> updates, state = tx.update(grads, state, params)
    """
    return _resolving(
        checked_options(
            rule, strength, regularizer, scope, ema_decay, max_ratio, mask, axis_name
        )
    )


def _resolving(options: Options) -> optax.GradientTransformationExtraArgs:
    def init(params):
        return init_state(options, params)

    def update(
        updates,
        state,
        params=None,
        *,
        regularizer_grads=None,
        held_out_grads=None,
        **extra_args,
    ):
        del extra_args
        loss, gradients = split_updates(
            options, updates, regularizer_grads, params, state.anchor
        )
        leaves, part, state = resolve(
            options, state, loss, gradients, params, held_out_grads
        )
        g = leaves.pick(loss, "updates")
        return leaves.restore([x + y for x, y in zip(g, part)]), state

    return optax.GradientTransformationExtraArgs(init, update)


def init_state(options: Options, params: optax.Params) -> ConflictState:
    """Returns the state before the first update; shapes and dtypes suffice."""
    leaves = aligned(params, [], options.mask, params)
    rows = groups_of(options.scope, leaves, params, options.axes).rows
    return ConflictState(
        step=jnp.zeros([], jnp.int32),
        ema=None if options.ema_decay is None else leaves.zeros(),
        anchor=options.anchors(params),
        measured=options.join({name: unmeasured(rows) for name in options.strengths}),
    )


def resolve(
    options: Options,
    state: ConflictState,
    loss: optax.Updates,
    gradients: Mapping[str, Callable[[], optax.Updates]],
    params: optax.Params | None,
    held_out_grads: optax.Updates | None = None,
    coefficients_of: Callable[[str, Gram], Coefficients] | None = None,
    lengths: optax.Updates | None = None,
) -> tuple[AlignedLeaves, list[Array], ConflictState]:
    """Resolves every regularizer's gradient against the gradient that is protected.

    Args:
      options: arguments of the transformation.
      state: state before the update.
      loss: gradient `g` of the loss.
      gradients: by name, functions that return a gradient `r`, before its strength.
      params: the parameters, for masks and labels that are functions of them.
      held_out_grads: gradient of a loss on held-out examples; protected if given.
      coefficients_of: maps the name of a regularizer and a Gram matrix to the
        coefficients; by default those of the rule.
      lengths: a tree whose norms `max_ratio` multiplies, in place of the protected
        gradient's.

    Returns:
      The leaves that take part; the sum of all regularizers' parts there; the next
      state.
    """
    params = loss if params is None else params
    first = {name: gradient() for name, gradient in gradients.items()}
    leaves = aligned(loss, list(first.values()), options.mask, params)
    groups = groups_of(options.scope, leaves, params, options.axes)
    g = leaves.pick(loss, "updates")
    check_parts(g, leaves.pick(params, "params"), options.axes)
    if held_out_grads is not None:
        g = leaves.pick(held_out_grads, "held_out_grads")
    m, ema = averaged(leaves, g, state, options.ema_decay)
    rho, longest = options.max_ratio_at(state.step), None
    if rho is not None and lengths is not None:
        u = leaves.pick(lengths, "updates")
        longest = groups.measure(u, lambda: u)

    total, measured = [jnp.zeros([], x.dtype) for x in m], {}
    for name, before in options.by_name(state.measured, "state.measured").items():
        r = leaves.pick(first[name], "regularizer_grads")
        again = leaves.getter(gradients[name], "regularizer_grads")
        strength = options.strength_at(name, state.step)
        grams = groups.measure(m, again, strength)  # Gram matrices of m and r, by group
        c = [
            coefficients_of(name, gram)
            if coefficients_of
            else coefficients(options.rule, gram)
            for gram in grams
        ]
        bounded = clipped(c, grams, rho, longest)
        part = groups.contribution(bounded, m, r, strength)  # c.g * m + c.r * r
        total = [x + y for x, y in zip(total, part)]
        measured[name] = groups.record(grams, c, m, r, before)

    # A gradient that is not finite leaves step and average as they were, as under
    # `optax.apply_if_finite`.
    squares = next(iter(measured.values())).sums[0]
    is_finite = jnp.all(jnp.isfinite(squares))
    if state.ema is not None:
        olds = leaves.pick(state.ema, "state.ema")
        ema = [
            jnp.where(is_finite, cast_like(new, old), old)
            for new, old in zip(ema, olds)
        ]
        ema = leaves.onto(state.ema, ema)
    step = jnp.where(is_finite, optax.safe_increment(state.step), state.step)
    after = ConflictState(step, ema, state.anchor, options.join(measured))
    return leaves, total, after


def averaged(
    leaves: AlignedLeaves, g: list[Array], state: ConflictState, decay: Number | None
) -> tuple[list[Array], Any]:
    """Returns a gradient's moving average, without and with its bias towards zero."""
    if decay is None:
        return g, None
    decay = jnp.asarray(decay, jnp.float32)
    unbias = 1 / (1 - decay ** (state.step + 1).astype(jnp.float32))
    old = leaves.pick(state.ema, "state.ema")
    new = [decay * m + (1 - decay) * x for m, x in zip(old, g)]
    return [unbias * m for m in new], new
