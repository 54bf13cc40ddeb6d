"""`never_hurt`: a regularizer that is followed as far as the loss is known to agree."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from dtnh_jax import _measure, _scopes, _trees, metrics, rules
from dtnh_jax._axes import AxisName
from dtnh_jax._confidence import Moments, confidence, moments
from dtnh_jax._given import checked_regularizers, given_gradients, layout_of
from dtnh_jax._options import Mask, Number, Options, Strength, check_number
from dtnh_jax._part import Part, over_devices
from dtnh_jax._protect import Groups, add_parts, resolve_each, rows_of
from dtnh_jax.regularizers.weights import WeightRegularizer


class NeverHurtState(NamedTuple):
    """State of `never_hurt`: two trees like the parameters, in single precision."""

    # Updates so far with a finite loss gradient.
    step: Int[Array, ""]
    # Moving averages of the loss gradient and of its square, from zero. Of the second
    # the root is kept, which is in range where squares are not.
    mean: PyTree
    root_mean_square: PyTree
    # Of the last update; a dict by name where there are several regularizers.
    metrics: metrics.ConflictMetrics | dict[str, metrics.ConflictMetrics]


class Ingredients(NamedTuple):
    """What `never_hurt` is made of. Any part can be left out, to measure what it does.

    The first also goes without the average, by `reference_decay=0`: of one gradient
    there is no knowing how sure it is.
    """

    confidence: bool = True  # without it: 1 where the signs agree, 0 elsewhere
    bound: bool = True
    # No part of it: nothing at all of leaves in conflict with the average. On
    # validation images that never_hurt had less of what helps, and harmed as seldom.
    gate: bool = False


def never_hurt(
    strength: Strength | Mapping[str, Strength] = 1.0,
    *,
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    reference_decay: Number = 0.9,
    trust_ratio: Number = 1.0,
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
    2. It is cut down to `trust_ratio * |m|`, however large the strength.

    The chance is that of Student's t. A mean with weights `w` of the steps, of sum 1,
    has the standard error `sqrt((s^2 - m^2) / n)` and `n` degrees of freedom, where
    `n = 1 / (sum of w^2) - 1`: 18 after many steps with a decay of 0.9, and 0 after
    the first one, of which nothing can be concluded.

    What is left is added to the loss gradient. So in every parameter the update goes
    where the loss most likely falls, and at most `1 + trust_ratio` times as fast. At
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
      reference_decay: of the moving averages, at least 0 and below 1.
      trust_ratio: the most that a regularizer may add to a parameter's gradient, as a
        multiple of `|m|`. With more than 1 it helps more at a strength that suits, and
        harms at one that does not.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`. What is measured needs two sums over devices.

    Returns:
      A transformation that gives gradients: an optimizer comes after it.

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
    return with_ingredients(
        Ingredients(),
        strength,
        regularizer=regularizer,
        reference_decay=reference_decay,
        trust_ratio=trust_ratio,
        mask=mask,
        axis_name=axis_name,
    )


def with_ingredients(
    ingredients: Ingredients,
    strength: Strength | Mapping[str, Strength] = 1.0,
    *,
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    reference_decay: Number = 0.9,
    trust_ratio: Number = 1.0,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """`never_hurt` with the given parts, for the study of what each of them does."""
    # `None`, which elsewhere means to do without, has no meaning here.
    check_number("reference_decay", reference_decay, below=1.0)
    check_number("trust_ratio", trust_ratio)
    options = Options.checked(
        [(rules.gate, "leaf")],
        strength,
        "global",
        reference_decay,
        trust_ratio,
        mask,
        axis_name=axis_name,
    )
    pulls = None
    if regularizer is not None:
        pulls = checked_regularizers(options, regularizer)

    def init(params):
        layout = _trees.layout(params, [], mask, params)
        means = [jnp.zeros_like(x, _trees.single(x)) for x in layout.xs]
        roots = [jnp.real(mean) for mean in means]
        groups = len(rows_of(layout, None))
        return NeverHurtState(
            jnp.zeros([], jnp.int32),
            layout.scatter(means, others=optax.MaskedNode()),
            layout.scatter(roots, others=optax.MaskedNode()),
            options.join({n: metrics.initial(groups) for n in options.strengths}),
        )

    def update(updates, state, params=None, *, regularizer_grads=None, **extra_args):
        del extra_args
        loss, getters = given_gradients(
            options, pulls, updates, regularizer_grads, params
        )
        layout = layout_of(options, loss, getters, params)
        groups = Groups(np.eye(len(layout.xs), dtype=bool), rows_of(layout, None))

        def known(times: int = 0) -> list[Moments]:
            hidden = _measure.hide(state, times)
            means = layout.pick(hidden.mean)
            roots = layout.pick(hidden.root_mean_square)
            return moments(layout.xs, means, roots, hidden.step, reference_decay)

        def resolve(get_ys, strength, seen, bounds):
            del bounds
            if not layout.xs:
                return Part([], [], jnp.zeros([0]), jnp.zeros([0]))
            ys = get_ys()
            unit = seen.y_norm * strength
            if ingredients.bound:
                unit = jnp.minimum(unit, trust_ratio * seen.x_norm)
            resolved = [
                _sure_part(
                    ingredients,
                    each,
                    strength * _trees.as_float32(y),
                    trust_ratio,
                    cosine,
                    own_unit,
                )
                for each, y, cosine, own_unit in zip(
                    known(), ys, jnp.unstack(seen.cosine), jnp.unstack(unit),
                    strict=True,
                )
            ]  # fmt: skip
            parts, *reported = [list(column) for column in zip(*resolved)]
            nowhere = [jnp.array(False)] * len(parts)
            norms, conflicts = map(jnp.stack, reported)
            norm, conflict = over_devices(
                norms, conflicts, unit, list(zip(layout.xs, ys)), options.axes
            )
            return Part(parts, nowhere, norm, conflict)

        found = resolve_each(
            options, layout, groups, getters, state.step, state.metrics, resolve,
            lambda times: [each.mean for each in known(times)],
        )  # fmt: skip

        def kept(new: list[Array], tree: PyTree) -> PyTree:
            """Takes one more gradient into account, if that is finite."""
            pairs = zip(new, layout.pick(tree))
            new = [jnp.where(found.is_loss_finite, *each) for each in pairs]
            return layout.scatter(new, onto=tree)

        state = NeverHurtState(
            found.step,
            kept([each.raw_mean for each in known()], state.mean),
            kept([each.raw_root for each in known()], state.root_mean_square),
            found.metrics,
        )
        return add_parts(layout, found.parts), state

    return optax.GradientTransformationExtraArgs(init, update)


def _sure_part(
    ingredients: Ingredients,
    moments: Moments,
    y: Array,
    trust_ratio: Number,
    cosine: Float[Array, ""],
    unit: Float[Array, ""],
) -> tuple[Array, Array, Array]:
    """What is left of a regularizer's gradient in a leaf, its norm, and its conflict.

    Args:
      ingredients: the steps that are taken.
      moments: of the loss's gradient.
      y: the regularizer's, times its strength.
      trust_ratio: bound of what is left, as a multiple of the mean.
      cosine: of `y` and the mean.
      unit: of length, in which squares of what is left are in range.
    """
    mean = moments.mean
    size = jnp.abs(y)
    # From -1 to 1: of real numbers, whether the signs are the same.
    agreement = _scopes.real_product(jnp.sign(mean), jnp.sign(y))
    if ingredients.confidence:
        kept = confidence(agreement * moments.ratio, moments.freedom) * size
    else:
        kept = jnp.where(agreement > 0, size, 0)
    if ingredients.bound:
        kept = jnp.minimum(kept, jnp.asarray(trust_ratio) * jnp.abs(mean))
    if ingredients.gate:
        kept = jnp.where(cosine < 0, 0, kept)
    squares = jnp.square(kept * _scopes.reciprocal(unit))
    norm = unit * _scopes.root(jnp.sum(squares))
    return kept * jnp.sign(y), norm, jnp.mean(agreement < 0)
