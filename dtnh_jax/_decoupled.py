"""Adds the regularizer's step to the optimizer's step, as AdamW adds weight decay."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dtnh_jax import _axes, rules
from dtnh_jax._arguments import Number, Strength, check_optimizer, checked_options
from dtnh_jax._axes import AxisName
from dtnh_jax._geometry import Scope, matched
from dtnh_jax._resolve import ConflictState, init_state, resolve
from dtnh_jax._trees import Mask, is_trainable, prevent_cse, split_updates
from dtnh_jax.regularizers.weights import WeightRegularizer


class DecoupledState(NamedTuple):
    """State of `decoupled`."""

    conflict: ConflictState
    optimizer: optax.OptState
    # State of the regularizer's own optimizer: None, one, or a dict of them by name.
    regularizer_optimizer: Any


def decoupled(
    optimizer: optax.GradientTransformation,
    strength: Strength | Mapping[str, Strength],
    *,
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    regularizer_optimizer: optax.GradientTransformation | None = None,
    rule: rules.Rule | None = None,
    scope: Scope = "global",
    ema_decay: Number | None = None,
    max_ratio: Strength | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Optimizes the loss alone, and adds the regularizer's step after the optimizer.

    An adaptive optimizer that follows the projection rescales the projected gradient
    and breaks the guarantee: with `g = (1, 1, 1, 2)` and `r = (-2, -2, -2, 1.25)`,
    DTNH gives a direction `d` with `<d, g> = 7`, but `<sign(d), g> = -1`. Here, as in
    AdamW's weight decay, the inner optimizer gets `g` alone and returns `u`. The
    regularizer's own step, `-strength * r`, is resolved against `g` and added to `u`.
    For any inner optimizer, the loss falls to first order at least as fast as with `u`
    alone: `<g, update> <= <g, u>`.

    Before resolution, `g` is scaled to the length of the regularizer's step in every
    group, because gradients and steps have different units. The scale has no effect on
    rules that only project the regularizer, such as `rules.dtnh`, `rules.gate` and
    `rules.orthogonal`.

    Args:
      optimizer: any Optax optimizer, learning rate included. It gets the loss gradient.
      strength: factor of the regularizer's step, in units of the parameters per step,
        like AdamW's weight decay times its learning rate: a number, a schedule of the
        step, or a dict by name.
      regularizer: a regularizer of the weights, or a dict of several by name. With it,
        `update` takes plain gradients and needs `params`. Without it, `update` takes a
        `GradientPair`, or the keyword `regularizer_grads`.
      regularizer_optimizer: maps `r` to its step, which `strength` multiplies; plain
        descent, `-r`, by default. Each of several regularizers has its own state.
        Keywords of `update`, such as `value`, go to both optimizers.
      rule: as in `resolve_conflicts`; `rules.dtnh` by default.
      scope: as in `dtnh`.
      ema_decay: as in `dtnh`.
      max_ratio: the largest norm of the regularizer's part, as a multiple of the norm
        of the inner optimizer's update `u` in the same group; a number or a schedule of
        the step.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`; the inner optimizer updates each device's part. A
        `regularizer_optimizer` needs one more collective, of one number; `max_ratio`
        needs one more, of the norms of `u`.

    Returns:
      A complete optimizer; its updates are added to the parameters.

    Raises:
      ValueError: a value is out of range, or trees do not match.
      TypeError: an argument has the wrong type.

    Example:
      >>> from dtnh_jax import decoupled, regularizers
      >>> source = {"w": jnp.array([1.0, 2.0])}
      >>> pull = regularizers.l2_sp(source)
      >>> tx = decoupled(optax.adamw(1e-3), strength=1e-4, regularizer=pull)
      >>> params = {"w": jnp.array([2.0, 2.0])}
      >>> grads = {"w": jnp.array([-1.0, 0.5])}  # the loss wants `w[0]` to grow
      >>> updates, state = tx.update(grads, tx.init(params), params)

    References:
      Loshchilov and Hutter, 2019, "Decoupled weight decay regularization",
      https://arxiv.org/abs/1711.05101; Wan et al., 2019,
      https://arxiv.org/abs/1911.07489
    """
    check_optimizer("optimizer", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)
    descent = regularizer_optimizer
    if descent is not None:
        check_optimizer("regularizer_optimizer", descent)
        descent = optax.with_extra_args_support(descent)
    options = checked_options(
        rule, strength, regularizer, scope, ema_decay, max_ratio, mask, axis_name
    )

    def init(params):
        own = None
        if descent is not None:
            own = options.join(
                {name: descent.init(params) for name in options.strengths}
            )
        return DecoupledState(init_state(options, params), optimizer.init(params), own)

    def update(
        updates,
        state,
        params=None,
        *,
        regularizer_grads=None,
        held_out_grads=None,
        **extra_args,
    ):
        loss, gradients = split_updates(
            options, updates, regularizer_grads, params, state.conflict.anchor
        )
        own = state.regularizer_optimizer
        if descent is not None:
            own = dict(options.by_name(own, "state.regularizer_optimizer"))
            for name, r in gradients.items():
                v, own[name] = _step(
                    descent, r(), own[name], params, options.axes, extra_args
                )
                gradients[name] = lambda v=v: v
            own = options.join(own)
        updates, inner = optimizer.update(loss, state.optimizer, params, **extra_args)
        leaves, part, conflict = resolve(
            options,
            state.conflict,
            prevent_cse(loss),  # else XLA shares the squares with those of Adam
            gradients,
            params,
            held_out_grads,
            # Gradients and steps have different units.
            coefficients_of=lambda _, gram: matched(options.rule, gram),
            lengths=updates,
        )
        return leaves.subtracted(updates, part), DecoupledState(conflict, inner, own)

    return optax.GradientTransformationExtraArgs(init, update)


def _step(
    optimizer, grads, state, params, axes, extra_args
) -> tuple[optax.Updates, optax.OptState]:
    """Returns an optimizer's negated step, which acts as a gradient, and its state.

    A step that is not finite is returned, so that `resolve` counts it and leaves it
    out; the optimizer's state then stays as it was.
    """
    step, new_state = optimizer.update(grads, state, params, **extra_args)
    finite = [
        jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(step) if is_trainable(x)
    ]
    is_finite = jnp.all(jnp.stack([jnp.array(True), *finite]))
    is_finite = _axes.all_devices(is_finite, axes)
    new_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old), new_state, state
    )
    return jax.tree.map(lambda x: -x if is_trainable(x) else x, step), new_state


def cautious(
    optimizer: optax.GradientTransformation,
    strength: Strength | Mapping[str, Strength],
    *,
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Cautious decay: adds the regularizer's step where the optimizer's step agrees.

    Let `u` be the update of `optimizer` from the loss gradient alone, and `r` the
    regularizer's gradient. The update is `u - strength * r` in coordinates where
    `u * r <= 0`, and `u` elsewhere. The sign test uses the optimizer's step, momentum
    included; `decoupled(..., scope="element")` uses the gradient of the current step.

    Args:
      optimizer: any Optax optimizer, learning rate included.
      strength: as in `decoupled`: factor of the regularizer's step, in units of the
        parameters per step.
      regularizer: a regularizer of the weights, or a dict of several, as in
        `decoupled`.
      mask: as in `dtnh`.

    Returns:
      A complete optimizer; its updates are added to the parameters.

    Raises:
      ValueError: a value is out of range, or trees do not match.
      TypeError: an argument has the wrong type.

    Example:
      >>> from dtnh_jax import GradientPair, cautious
      >>> tx = cautious(optax.sgd(1.0), strength=0.5)
      >>> g, r = jnp.array([1.0, 1.0]), jnp.array([2.0, -2.0])
      >>> updates, _ = tx.update(GradientPair(g, r), tx.init(g), g)
      >>> print(updates)
      [-2. -1.]

    References:
      Chen et al., 2025, "Cautious weight decay", https://arxiv.org/abs/2510.12402

    Differs from the paper in that `r` may be the gradient of any regularizer.
    """
    check_optimizer("optimizer", optimizer)
    optimizer = optax.with_extra_args_support(optimizer)
    options = checked_options(rules.gate, strength, regularizer, "element", mask=mask)

    def init(params):
        return DecoupledState(init_state(options, params), optimizer.init(params), None)

    def update(updates, state, params=None, *, regularizer_grads=None, **extra_args):
        loss, gradients = split_updates(
            options, updates, regularizer_grads, params, state.conflict.anchor
        )
        updates, inner = optimizer.update(loss, state.optimizer, params, **extra_args)
        # The gate compares steps instead of gradients: `-u` acts as the gradient.
        back = jax.tree.map(lambda x: -x if is_trainable(x) else x, updates)
        leaves, part, conflict = resolve(
            options, state.conflict, back, gradients, params
        )
        return leaves.subtracted(updates, part), DecoupledState(conflict, inner, None)

    return optax.GradientTransformationExtraArgs(init, update)
