"""`never_hurt`: bounds a regularizer's gradient by a trust from held-out examples."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from dtnh_jax import rules
from dtnh_jax._arguments import (
    Options,
    Strength,
    check_number,
    checked_options,
    value_at,
)
from dtnh_jax._axes import AxisName
from dtnh_jax._geometry import Measured, finite, groups_of, safe_sqrt
from dtnh_jax._resolve import ConflictState, init_state, resolve
from dtnh_jax._trees import Mask, aligned, split_updates
from dtnh_jax.regularizers.weights import WeightRegularizer
from dtnh_jax.rules._gram import Coefficients, Gram, ratio

# Learned trust: its first value, its minimum and its maximum.
START, FLOOR, CAP = 0.03, 0.01, 3.0
# Decay of the moving average of the agreement; the largest change of the logarithm of
# trust in a step; the agreement at which that change is three quarters of the largest.
_AGREEMENT_DECAY, _LARGEST_STEP, _CLEAR_AGREEMENT = 0.9, 0.4, 1 / 30


class NeverHurtState(NamedTuple):
    """State of `never_hurt`: scalars; with several regularizers, dicts by name."""

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
    """Adds a regularizer's gradient, at most `trust` times the loss gradient's norm.

    With `g` the loss gradient and `r` that of the regularizer times its strength, the
    update is

    `g + min(1, trust * mean(||g||) / max(||r||)) * r`,

    where the mean and the maximum are over the steps so far. The regularizer's part is
    at most `trust` times as long as the mean loss gradient, whatever the strength: a
    strength that is too large acts like a good one. Nothing is projected, because a
    regularizer that generalizes must often oppose the loss on the training examples.

    Only held-out examples can tell how far to trust the regularizer. There are two
    ways to use them:

    - **Few examples**: set `trust` to the choice of `choose_trust`, which
      cross-validates: 0.5 to use the regularizer, 0 to do without it.
    - **Many examples, one pass**: leave `trust` out and pass `held_out_grads`, the
      gradient of a loss on examples that are not trained on, at every step or every
      few steps. Trust rises while the moving average of the cosine of that gradient
      and `r` is above 0, and falls while it is below 0, between 0.01 and 3. For
      classifiers, use the gradient of `regularizers.expected_error`. Before the first
      such gradient, trust is 0.03: the regularizer can neither hurt nor help much.

    The state is a few scalars, and the anchor of a self-anchored regularizer.

    Args:
      strength: the largest factor of the regularizer's gradient, at least 0: a number,
        a schedule of the step, or a dict of these by the names of several
        regularizers. With too small a strength the bound has no effect: take a
        hundred times the usual strength.
      regularizer: a regularizer of the weights, or a dict of several by the names of
        `strength`. With it, updates are plain gradients of the loss and `update` needs
        `params`. Without it, updates are a `GradientPair`, or `update` also takes
        `regularizer_grads`.
      trust: the largest ratio of the regularizer's part to the mean loss gradient, at
        least 0: a number or a schedule of the step. None learns it.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`.

    Returns:
      A transformation of gradients; chain an optimizer after it. `conflict_metrics`
      reports `trust` beside the other metrics.

    Raises:
      ValueError: a value is out of range, or trees do not match.
      TypeError: an argument has the wrong type.

    Example:
      >>> from dtnh_jax import never_hurt
      >>> from dtnh_jax.regularizers import l2_sp
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> safe = never_hurt(100.0, regularizer=l2_sp(params), trust=0.3)
      >>> tx = optax.chain(safe, optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([0.1, -0.2])}, state, params)

    References:
      Bound by the norm of the main gradient: He et al., 2022, "MetaBalance",
      https://arxiv.org/abs/2203.06801. Weights learned from agreement with held-out
      gradients: Lin et al., 2019, https://arxiv.org/abs/1910.12795. The form of the
      bound, and how `trust` is chosen, are this library's own.
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
        loss, gradients = split_updates(
            options, updates, regularizer_grads, params, state.anchor
        )
        measured = options.by_name(state.measured, "state.measured")
        largest = dict(options.by_name(state.largest, "state.largest"))
        agreement = options.by_name(state.agreement, "state.agreement")
        level = {name: x.trust for name, x in measured.items()}
        if trust is not None:
            level = {name: value_at(trust, state.step) for name in level}
        elif held_out_grads is not None:
            cosines = _cosines(options, loss, gradients, held_out_grads, params)
            agreement = {
                name: _AGREEMENT_DECAY * agreement[name]
                + (1 - _AGREEMENT_DECAY) * cosines[name]
                for name in level
            }
            level = {name: _next_trust(level[name], agreement[name]) for name in level}
        loss_norms = state.loss_norms

        def coefficients_of(name: str, gram: Gram) -> Coefficients:
            nonlocal loss_norms
            is_finite = finite(gram)
            g, r = (
                jnp.where(is_finite, safe_sqrt(x), 0)[0] for x in (gram.gg, gram.rr)
            )
            # `g` is the same for every regularizer.
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
            coefficients_of=coefficients_of,
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
    """Returns the cosine of the held-out gradient and each regularizer's gradient."""
    params = loss if params is None else params
    first = {name: gradient() for name, gradient in gradients.items()}
    leaves = aligned(loss, list(first.values()), options.mask, params)
    groups = groups_of(options.scope, leaves, params, options.axes)
    h, found = leaves.pick(held_out_grads, "held_out_grads"), {}
    for name, gradient in gradients.items():
        again = leaves.getter(gradient, "regularizer_grads")
        grams = groups.measure(h, again)
        found[name] = jnp.zeros([])
        for gram in grams:  # one, or none if the mask keeps no leaf
            cosine = ratio(ratio(gram.gr, safe_sqrt(gram.gg)), safe_sqrt(gram.rr))[0]
            is_finite = finite(gram)[0] & jnp.isfinite(cosine)
            found[name] = jnp.where(is_finite, cosine, 0).astype(jnp.float32)
    return found


def _next_trust(
    trust: Float[Array, ""], agreement: Float[Array, ""]
) -> Float[Array, ""]:
    """Returns the trust of the next step, from the moving average of the cosine."""
    change = _LARGEST_STEP * jnp.tanh(agreement / np.float32(_CLEAR_AGREEMENT))
    low, high = np.float32(np.log(FLOOR)), np.float32(np.log(CAP))
    return jnp.exp(jnp.clip(jnp.log(trust) + change, low, high))
