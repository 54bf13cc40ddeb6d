"""`never_hurt`: a regularizer that is followed as far as the loss is known to agree."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from dtnh_jax import rules
from dtnh_jax._arguments import Number, Strength, check_number, checked_options
from dtnh_jax._axes import AxisName, check_parts, of_type
from dtnh_jax._geometry import Measured, clipped, finite, groups_of, root
from dtnh_jax._resolve import init_state
from dtnh_jax._trees import Mask, aligned, given
from dtnh_jax.regularizers.weights import WeightRegularizer
from dtnh_jax.rules._gram import Coefficients, Gram, ratio


class NeverHurtState(NamedTuple):
    """State of `never_hurt`: two trees like the parameters, in single precision."""

    # Updates so far with a finite loss gradient.
    step: Int[Array, ""]
    # Moving averages of the loss gradient and of its square, from zero.
    mean: PyTree
    mean_square: PyTree
    # As in `ConflictState`.
    anchor: PyTree
    measured: Measured | dict[str, Measured]


def never_hurt(
    strength: Strength | Mapping[str, Strength] = 1.0,
    *,
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    ema_decay: Number = 0.9,
    max_ratio: Strength = 1.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds a regularizer's gradient as far as it is sure that the loss agrees.

    The gradient of a mini-batch is a noisy estimate of the loss's, so that what agrees
    with it may work against the loss all the same. The moving average `m` of gradients
    knows better, and the moving average of their squares, `s^2`, tells how well. For
    each parameter:

    1. The regularizer's gradient, times its strength, is multiplied by the confidence
       `max(0, 2 p - 1)`, where `p` is the chance that the loss's gradient has its sign.
    2. It is cut down to `max_ratio * |m|`, however large the strength.

    The chance is that of Student's t. A mean with weights `w` of the steps, of sum 1,
    has the standard error `sqrt((s^2 - m^2) / n)` and `n` degrees of freedom, where
    `n = 1 / (sum of w^2) - 1`: 18 after many steps with a decay of 0.9, and 0 after
    the first one, of which nothing can be concluded.

    What is left is added to the loss gradient. So in every parameter the update goes
    where the loss most likely falls, and at most `1 + max_ratio` times as fast. At
    the first step nothing is known, and the update is the loss gradient.

    It keeps two trees of the size of the parameters, as Adam does. Adam's own are of
    no use here: its squares are averaged over a thousand steps, and its decay of means
    is another.

    Args:
      strength: factor of the regularizer, at least 0: a number, a schedule of the
        step, or a dict of these by the names of several regularizers.
      regularizer: of the weights, or a dict of several by the names of `strength`.
        Then updates are plain gradients of the loss, and `params` are needed. Without
        one, updates are a `GradientPair`, or `regularizer_grads` is given.
      ema_decay: of the moving averages, at least 0 and below 1.
      max_ratio: the most that a regularizer may add to a parameter's gradient, as a
        multiple of `|m|`. With more than 1 it helps more at a strength that suits, and
        harms at one that does not.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`.

    Returns:
      A transformation that gives gradients: an optimizer comes after it. With the
      keyword `held_out_grads` the averages are of the gradient on held-out examples.

    Raises:
      ValueError: for values that are out of range or trees that do not match.
      TypeError: for arguments of another kind.

    Example:
      >>> from dtnh_jax import never_hurt
      >>> from dtnh_jax.regularizers import l2_sp
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> tx = optax.chain(never_hurt(regularizer=l2_sp(params)), optax.adamw(1e-3))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([0.1, -0.2])}, state, params)

    References:
      The direction to protect: Hsieh et al., 2024, "Bloop",
      https://arxiv.org/abs/2402.02998. Confidence and bounds are this library's.
    """
    # `None`, which elsewhere means to do without, has no meaning here.
    check_number("ema_decay", ema_decay, below=1.0)
    check_number("max_ratio", max_ratio, schedule=True)
    options = checked_options(
        rules.gate,
        strength,
        regularizer,
        "element",
        ema_decay,
        max_ratio,
        mask,
        axis_name,
    )

    def init(params):
        state = init_state(options, params)
        squares = jax.tree.map(jnp.real, state.ema)
        return NeverHurtState(
            state.step, state.ema, squares, state.anchor, state.measured
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
        params = loss if params is None else params
        first = {name: gradient() for name, gradient in gradients.items()}
        leaves = aligned(loss, list(first.values()), mask, params)
        groups = groups_of("element", leaves, params, options.axes)
        g = leaves.pick(loss, "updates")
        check_parts(g, leaves.pick(params, "params"), options.axes)
        watched = g
        if held_out_grads is not None:
            watched = leaves.pick(held_out_grads, "held_out_grads")
        decay = jnp.asarray(options.ema_decay, jnp.float32)
        forgotten = decay ** (state.step + 1).astype(jnp.float32)  # weight of the zeros
        means, squares = (
            [decay * old + (1 - decay) * x for old, x in zip(leaves.pick(*tree), new)]
            for tree, new in (
                ((state.mean, "state.mean"), watched),
                ((state.mean_square, "state.mean_square"), map(_square, watched)),
            )
        )
        m = [x / (1 - forgotten) for x in means]
        spread = [root(x / (1 - forgotten)) for x in squares]
        freedom = (1 + decay) / (1 - decay) * (1 - forgotten) / (1 + forgotten) - 1
        freedom = jnp.where(state.step == 0, 0, jnp.maximum(freedom, 0))

        total, measured = g, {}
        for name, before in options.by_name(state.measured, "state.measured").items():
            factor = options.strength_at(name, state.step)
            r = leaves.pick(first[name], "regularizer_grads")
            again = leaves.getter(gradients[name], "regularizer_grads")
            grams = groups.measure(m, again, factor)
            c = [_sure(*each, freedom) for each in zip(grams, spread)]
            bounded = clipped(c, grams, options.max_ratio_at(state.step))
            part = groups.contribution(bounded, m, r, factor)
            total = [x + y for x, y in zip(total, part)]
            measured[name] = groups.record(grams, bounded, m, r, before)

        norms = next(iter(measured.values())).sums[0]
        is_finite = jnp.all(jnp.isfinite(norms))

        def kept(new, tree, name):
            """Takes one more gradient into account, if that is finite."""
            pairs = [(of_type(x, y), y) for x, y in zip(new, leaves.pick(tree, name))]
            return leaves.onto(tree, [jnp.where(is_finite, *each) for each in pairs])

        return leaves.restore(total), NeverHurtState(
            jnp.where(is_finite, optax.safe_increment(state.step), state.step),
            kept(means, state.mean, "state.mean"),
            kept(squares, state.mean_square, "state.mean_square"),
            state.anchor,
            options.join(measured),
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _square(x: Array) -> Array:
    return jnp.square(jnp.abs(x))


def _sure(gram: Gram, spread: Array, freedom: Float[Array, ""]) -> Coefficients:
    """Takes of the regularizer the share that is sure to agree with the mean.

    Args:
      gram: of the mean and the regularizer's gradient, number by number.
      spread: root mean square of the loss gradient.
      freedom: degrees of freedom of the mean.
    """
    share = confidence(jnp.sign(gram.gr) * ratio(root(gram.gg), spread), freedom)
    return Coefficients(jnp.zeros_like(share), jnp.where(finite(gram), share, 0))


def confidence(ratio: Array, freedom: Float[Array, ""]) -> Array:
    """`2 p - 1`, at least 0, where `p` is the chance that a mean's true sign is plus.

    Args:
      ratio: of a mean to the root mean square of what it is of, from -1 to 1.
      freedom: degrees of freedom of the mean. Its t is
        `sqrt(freedom) * ratio / sqrt(1 - ratio^2)`.

    References:
      Wallace, 1959, equation 2.5, https://doi.org/10.1214/aoms/1177706090, for the
      normal deviate that is as likely as a t: wrong by less than 0.01 in `p` for one
      degree of freedom, and by less than 0.0005 for eighteen.
    """
    ratio = jnp.clip(ratio, 0, 1 - 2.0**-24)
    # log(1 + t^2 / freedom) = -log(1 - ratio^2)
    spread = root(-freedom * jnp.log1p(-ratio * ratio))
    deviate = (8 * freedom + 1) / (8 * freedom + 3) * spread
    return jax.lax.erf(deviate / np.sqrt(2.0).astype(np.float32))
