"""Regularization beside an optimizer instead of in front of it, as AdamW does it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from dtnh_jax import _axes, _trees, rules
from dtnh_jax._axes import AxisName
from dtnh_jax._given import checked_regularizers, given_gradients
from dtnh_jax._options import Mask, Number, Options, Stages, Strength
from dtnh_jax._part import Scope
from dtnh_jax._protect import (
    ConflictState,
    init_state,
    regularizer_parts,
)
from dtnh_jax.regularizers.weights import WeightRegularizer


class DecoupledState(NamedTuple):
    """State of `decoupled`."""

    conflict: ConflictState
    optimizer: optax.OptState
    # Of the regularizer's own optimizer: None, one state, or a dict of them by name.
    regularizer_optimizer: Any


def decoupled(
    optimizer: optax.GradientTransformation,
    strength: Strength | Mapping[str, Strength],
    *,
    regularizer: WeightRegularizer | Mapping[str, WeightRegularizer] | None = None,
    regularizer_optimizer: optax.GradientTransformation | None = None,
    rule: rules.Rule | Stages | None = None,
    scope: Scope = "global",
    reference_decay: Number | None = None,
    trust_ratio: Number | None = None,
    mask: Mask | None = None,
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer see the loss alone, and adds the regularizer's step to its.

    An adaptive optimizer that comes after the projection rescales what was projected,
    and the guarantee is gone: with `g = (1, 1, 1, 2)` and `r = (-2, -2, -2, 1.25)`
    DTNH gives a direction `d` with `<d, g> = 7`, but `<sign(d), g> = -1`. So, as AdamW
    does with weight decay, the inner optimizer turns `g` alone into its update `u`,
    and the regularizer's own step, `-strength * r`, is resolved against `g` and added
    to `u`. Whatever the inner optimizer is, the loss falls to first order at least as
    fast as with `u` alone: `<g, update> <= <g, u>`.

    Before resolution, `g` is scaled to the length of the step in every group, because
    lengths of gradients and of steps have no common unit. Rules that only project the
    regularizer, such as `rules.dtnh`, `rules.gate` and `rules.orthogonal`, do not
    depend on it.

    Args:
      optimizer: any Optax optimizer, learning rate included. It gets the loss gradient.
      strength: factor of the regularizer's step, in units of the parameters per step,
        like AdamW's weight decay times its learning rate: a number, a schedule of the
        step, or a dict by name.
      regularizer: of the weights, or a dict of several: then `update` takes plain
        gradients and needs `params`. Without it, `update` takes a `GradientPair`, or
        the keyword `regularizer_grads`.
      regularizer_optimizer: turns `r` into its step, which `strength` multiplies;
        plain descent, `-r`, by default. Several regularizers have a state of it each.
      rule: as in `resolve_conflicts`; `rules.dtnh` by default.
      scope: as in `dtnh`.
      reference_decay: as in `dtnh`.
      trust_ratio: at most how long the regularizer's part may be, as a multiple of the
        norm of the inner optimizer's update `u` in the same group.
      mask: as in `dtnh`.
      axis_name: as in `dtnh`; the inner optimizer works on what a device holds. A
        `regularizer_optimizer` adds a sum over devices, of one number.

    Returns:
      A complete optimizer; what it returns is added to the parameters.

    Raises:
      ValueError: for values that are out of range or trees that do not match.
      TypeError: for arguments of another kind.

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
    for name, value in [
        ("optimizer", optimizer),
        ("regularizer_optimizer", regularizer_optimizer or optimizer),
    ]:
        if not isinstance(value, optax.GradientTransformation):
            raise TypeError(
                f"`{name}` must be an Optax optimizer such as `optax.adamw(1e-3)`, got "
                f"{type(value).__name__}."
            )
    options = Options.checked(
        rules.dtnh if rule is None else rule,
        strength,
        scope,
        reference_decay,
        trust_ratio,
        mask,
        is_coupled=False,
        axis_name=axis_name,
    )
    regularizers = None
    if regularizer is not None:
        regularizers = checked_regularizers(options, regularizer)
    optimizer = optax.with_extra_args_support(optimizer)
    of_regularizer = regularizer_optimizer and optax.with_extra_args_support(
        regularizer_optimizer
    )

    def init(params):
        own = None
        if of_regularizer is not None:
            own = options.join(
                {n: of_regularizer.init(params) for n in options.strengths}
            )
        return DecoupledState(init_state(options, params), optimizer.init(params), own)

    def update(updates, state, params=None, *, regularizer_grads=None, **extra_args):
        loss, getters = given_gradients(
            options, regularizers, updates, regularizer_grads, params
        )
        own_states = state.regularizer_optimizer
        if of_regularizer is not None:
            stepped = {
                name: _descent(of_regularizer, get(0), own, params, options.axes)
                for (name, get), own in zip(
                    getters.items(), options.by_name(own_states, "state").values()
                )
            }
            getters = {name: lambda _, r=r: r for name, (r, _) in stepped.items()}
            own_states = options.join({name: own for name, (_, own) in stepped.items()})

        updates, inner = optimizer.update(loss, state.optimizer, params, **extra_args)
        lengths = None if options.trust_ratio is None else updates
        layout, parts, conflict = regularizer_parts(
            options, loss, getters, state.conflict, params, lengths
        )
        leaves = layout.pick(updates)
        for part in parts:
            leaves = [
                _subtract(leaf, each, part.is_finite)
                for leaf, each in zip(leaves, part.leaves)
            ]
        updates = layout.scatter(leaves, onto=updates)
        return updates, DecoupledState(conflict, inner, own_states)

    return optax.GradientTransformationExtraArgs(init, update)


def _descent(
    optimizer: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None,
    axes: tuple[str, ...],
) -> tuple[optax.Updates, optax.OptState]:
    """An optimizer's step, as if it were a gradient, and its state.

    A step that is not finite is returned as it is, to be counted and left out, but the
    optimizer is not to remember it.
    """
    step, new_state = optimizer.update(grads, state, params)
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(step)
              if _trees.is_trainable(x)]  # fmt: skip
    is_finite = jnp.all(jnp.stack([jnp.array(True), *finite]))
    is_finite = _axes.everywhere(is_finite, axes)
    new_state = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old), new_state, state
    )
    return jax.tree.map(lambda x: -x if _trees.is_trainable(x) else x, step), new_state


def _subtract(update: Any, part: Array, is_finite: Bool[Array, ""]) -> Any:
    """The update less the part, where the optimizer gave one."""
    if _trees.is_missing(update):
        return update
    moved = (_trees.as_float32(update) - part).astype(update.dtype)
    return jnp.where(is_finite, moved, update)
