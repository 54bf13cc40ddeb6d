"""`never_hurt`: a regularizer that is trusted as far as held-out examples say."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from dtnh_jax import rules
from dtnh_jax._arguments import Options, Strength, at, check_number, checked_options
from dtnh_jax._axes import AxisName
from dtnh_jax._geometry import Measured, finite, groups_of, root
from dtnh_jax._resolve import ConflictState, init_state, resolve
from dtnh_jax._trees import Mask, aligned, given
from dtnh_jax.regularizers.weights import WeightRegularizer
from dtnh_jax.rules._gram import Coefficients, Gram, ratio

# Of trust that is learned: where it starts, and between what it stays.
START, FLOOR, CAP = 0.03, 0.01, 3.0
# The agreement's moving average; how far one step moves the logarithm of trust, and
# the agreement at which it moves by three quarters of that.
_DECAY, _STEP, _CLEAR = 0.9, 0.4, 1 / 30


class NeverHurtState(NamedTuple):
    """State of `never_hurt`: scalars; those of a regularizer in a dict by name."""

    # Updates so far with a finite loss gradient.
    step: Int[Array, ""]
    # Sum of the norms of those gradients.
    loss_norms: Float[Array, ""]
    # The largest norm so far of the regularizer's gradient, times its strength.
    largest: PyTree
    # Moving average of the cosine of the held-out and the regularizer's gradient.
    agreement: PyTree
    # As in `ConflictState`.
    anchor: PyTree
    measured: Measured | dict[str, Measured]


def never_hurt(
    strength: Strength | Mapping[str, Strength] = 1.0,
    *,
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    trust: Strength | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a regularizer's gradient, scaled to a share of the loss gradient: its trust.

    With `g` the loss gradient and `r` that of the regularizer times its strength, the
    update is

    `g + min(1, trust * mean(||g||) / max(||r||)) * r`,

    where the mean and the maximum are over the steps so far. So the part of the
    regularizer has at most `trust` times the usual length of the loss gradient, however
    large the strength: a strength that is too large does what a good one does. There is
    no projection, because a regularizer that generalizes must often work against the
    loss on the training examples.

    Only held-out examples can tell how far to trust it. There are two ways:

    - **Few examples**: give `trust` what `choose_trust` finds by cross-validation: 1 or
      0, to trust it or not. With 1 the regularizer's part is as long as the loss
      gradient at most.
    - **Many examples, one pass**: leave `trust` out and pass `held_out_grads`, the
      gradient of a loss on examples that are not trained on, at every step or every
      few. Trust rises while the moving average of its cosine with `r` is above 0, and
      falls while it is below, between 0.01 and 3. For classifiers take the gradient of
      `regularizers.expected_error`. Until some are given, trust is 0.03, with which a
      regularizer can neither hurt nor help much.

    The state is a few scalars (and, for a self-anchored regularizer, its anchor).

    Args:
      strength: the most that a regularizer's gradient is multiplied by, at least 0: a
        number, a schedule of the step, or a dict of these by the names of several
        regularizers. Too small a strength leaves trust nothing to choose from: take a
        hundred times the usual one.
      regularizer: of the weights, or a dict of several by the names of `strength`.
        Then updates are plain gradients of the loss, and `params` are needed. Without
        one, updates are a `GradientPair`, or `regularizer_grads` is given.
      trust: a level for all steps, at least 0, or a schedule; None to learn it.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`.

    Returns:
      A transformation that gives gradients: an optimizer comes after it.
      `conflict_metrics` shows `trust` beside the other metrics.

    Raises:
      ValueError: for values that are out of range or trees that do not match.
      TypeError: for arguments of another kind.

    Example:
      >>> from dtnh_jax import never_hurt
      >>> from dtnh_jax.regularizers import l2_sp
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> safe = never_hurt(100.0, regularizer=l2_sp(params), trust=0.3)
      >>> tx = optax.chain(safe, optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([0.1, -0.2])}, state, params)

    References:
      Bounds by the size of the main gradient: He et al., 2022, "MetaBalance",
      https://arxiv.org/abs/2203.06801. Weights learned from agreement with held-out
      gradients: Lin et al., 2019, https://arxiv.org/abs/1910.12795. The form of the
      bound and its choice are this library's.
    """
    if trust is not None:
        check_number("trust", trust, schedule=True)
    options = checked_options(
        rules.weighted_sum, strength, regularizer, mask=mask, axis_name=axis_name
    )
    start = jnp.float32(START) if trust is None else jnp.zeros([], jnp.float32)

    def init(params):
        state = init_state(options, params)
        zeros = options.join({name: jnp.zeros([]) for name in options.strengths})
        measured = options.by_name(state.measured, "state.measured")
        measured = {name: x._replace(trust=start) for name, x in measured.items()}
        return NeverHurtState(
            state.step,
            loss_norms=jnp.zeros([]),
            largest=zeros,
            agreement=zeros,
            anchor=state.anchor,
            measured=options.join(measured),
        )

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
        loss, gradients = given(
            options, updates, regularizer_grads, params, state.anchor
        )
        measured = options.by_name(state.measured, "state.measured")
        largest = dict(options.by_name(state.largest, "state.largest"))
        agreement = options.by_name(state.agreement, "state.agreement")
        level = {name: x.trust for name, x in measured.items()}
        if trust is not None:
            level = {name: at(trust, state.step) for name in level}
        elif held_out_grads is not None:
            cosines = _cosines(options, loss, gradients, held_out_grads, params)
            agreement = {
                name: _DECAY * agreement[name] + (1 - _DECAY) * cosines[name]
                for name in level
            }
            level = {name: _moved(level[name], agreement[name]) for name in level}
        loss_norms = state.loss_norms

        def ask(name: str, gram: Gram) -> Coefficients:
            nonlocal loss_norms
            is_finite = finite(gram)
            g, r = (jnp.where(is_finite, root(x), 0)[0] for x in (gram.gg, gram.rr))
            # Every regularizer sees the same `g`.
            loss_norms = jnp.maximum(loss_norms, state.loss_norms + g)
            largest[name] = jnp.maximum(largest[name], r)
            limit = level[name] * loss_norms / (state.step + 1).astype(jnp.float32)
            factor = jnp.minimum(1, ratio(limit, largest[name]))
            factor = jnp.where(largest[name] > 0, factor, 1)
            return Coefficients(
                jnp.zeros_like(gram.gg), jnp.where(is_finite, factor, 0)
            )

        leaves, part, after = resolve(
            options,
            ConflictState(state.step, None, state.anchor, state.measured),
            loss,
            gradients,
            params,
            ask=ask,
        )
        measured = options.by_name(after.measured, "state.measured")
        measured = {n: x._replace(trust=level[n]) for n, x in measured.items()}
        g = leaves.pick(loss, "updates")
        return leaves.restore([x + y for x, y in zip(g, part)]), NeverHurtState(
            after.step,
            loss_norms,
            options.join(largest),
            options.join(agreement),
            state.anchor,
            options.join(measured),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _cosines(
    options: Options,
    loss: optax.Updates,
    gradients: Mapping[str, Any],
    held_out_grads: optax.Updates,
    params: optax.Params | None,
) -> dict[str, Float[Array, ""]]:
    """Returns the cosine of the held-out with each regularizer's gradient."""
    params = loss if params is None else params
    first = {name: gradient() for name, gradient in gradients.items()}
    leaves = aligned(loss, list(first.values()), options.mask, params)
    groups = groups_of(options.scope, leaves, params, options.axes)
    h, found = leaves.pick(held_out_grads, "held_out_grads"), {}
    for name, gradient in gradients.items():
        again = leaves.getter(gradient, "regularizer_grads")
        grams = groups.measure(h, again)
        found[name] = jnp.zeros([])
        for gram in grams:  # one, or none where no leaf takes part
            cosine = ratio(ratio(gram.gr, root(gram.gg)), root(gram.rr))[0]
            is_finite = finite(gram)[0] & jnp.isfinite(cosine)
            found[name] = jnp.where(is_finite, cosine, 0).astype(jnp.float32)
    return found


def _moved(trust: Float[Array, ""], agreement: Float[Array, ""]) -> Float[Array, ""]:
    """Returns the trust after a step in which gradients agreed so far."""
    moved = jnp.log(trust) + _STEP * jnp.tanh(agreement / np.float32(_CLEAR))
    return jnp.exp(jnp.clip(moved, np.float32(np.log(FLOOR)), np.float32(np.log(CAP))))
