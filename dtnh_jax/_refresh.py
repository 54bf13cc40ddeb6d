"""Resolution with one backward pass on most steps: weights are kept for some."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dtnh_jax import rules
from dtnh_jax._arguments import Strength, checked_options
from dtnh_jax._geometry import Measured, finite
from dtnh_jax._gradients import linearized
from dtnh_jax._resolve import ConflictState, init_state, resolve
from dtnh_jax.rules._gram import Gram


class RefreshState(NamedTuple):
    """State of `refreshed_gradient`."""

    step: Int[Array, ""]  # refreshed or not, with a finite loss gradient
    # Of loss and regularizer, as they were last measured; by name where there are
    # several regularizers.
    weights: Float[Array, "2"] | dict[str, Float[Array, "2"]]
    measured: Measured | dict[str, Measured]  # by the last step that measured


class RefreshedGradient(NamedTuple):
    """What `refreshed_gradient` returns.

    Attributes:
      init: maps the parameters to a state.
      refresh: maps `(params, state, *args)` to values, gradient and state, with two
        backward passes.
      reuse: the same with one.
    """

    init: Callable[[optax.Params], RefreshState]
    refresh: Callable[..., tuple[Any, optax.Updates, RefreshState]]
    reuse: Callable[..., tuple[Any, optax.Updates, RefreshState]]


def refreshed_gradient(
    objective: Callable[..., Any],
    strength: Strength | Mapping[str, Strength],
    *,
    rule: rules.Rule = rules.dtnh,
    has_aux: bool = False,
) -> RefreshedGradient:
    """Resolves a regularizer of features or outputs with few second backward passes.

    `refresh` takes the gradients `g` and `r` of both terms, resolves them as
    `resolve_conflicts(rule, strength)` does, and keeps the rule's weights `w`. `reuse`
    needs one backward pass, that of

    `w[0] * loss + w[1] * strength * regularizer`.

    Jit a step with each, and choose in the loop: `refresh` on every eighth step, say,
    and on the first. Without a conflict `rules.dtnh` has the weights 1 and 1, and
    nothing is approximated. Else the weights are some steps old, and the rule's
    guarantee is about the gradients of that time. Where `g` was then much shorter than
    `r`, `w[0]` is large, and so is the loss's part until both are measured again.

    There is only the global scope: weights of whole terms can stand in front of a
    backward pass; weights that differ between leaves need each leaf's gradient of
    the loss alone, which is the pass that is to be saved.

    A regularizer gradient that is not finite is left out of `refresh` and counted in
    `conflict_metrics`, and the weights stay as they were: 1 and 0 until the first are
    measured. In `reuse`, one backward pass cannot tell which of the terms made its
    result not finite: it is returned as it is, for `optax.apply_if_finite` to see, as
    is a loss gradient that is not finite. Metrics are those of the last `refresh`.

    Gradients are ready when this returns them, so in loops that are mapped over devices
    the objective has to average both of its terms, by `jax.lax.pmean`.

    Args:
      objective: maps `(params, *args)` to `(loss, regularizer)`, or with `has_aux` to
        `((loss, regularizer), aux)`, as for `value_and_gradient_pair`.
      strength: factor of the regularizer, as in `dtnh`; schedules see every step.
      rule: a rule of the whole gradients, see `dtnh_jax.rules`.
      has_aux: whether `objective` returns auxiliary data too.

    Returns:
      Three functions. `init(params)` returns a state; `refresh(params, state, *args)`
      and `reuse(params, state, *args)` return `((loss, regularizer), gradient, state)`,
      or with `has_aux` `(((loss, regularizer), aux), gradient, state)`. The gradient is
      resolved: it is for any optimizer, and for none of this library's transformations.

    Raises:
      ValueError: for values that are out of range.
      TypeError: for arguments of another kind.

    Example:
      >>> import jax
      >>> from dtnh_jax import refreshed_gradient
      >>> def objective(params):
      ...     return jnp.sum(params**2), -jnp.sum(params)
      >>> resolved = refreshed_gradient(objective, 1.0)
      >>> refresh, reuse = map(jax.jit, (resolved.refresh, resolved.reuse))
      >>> params = jnp.array([1.0, 1.0])
      >>> state = resolved.init(params)
      >>> for number in range(20):
      ...     take_gradient = reuse if number % 10 else refresh
      ...     values, gradient, state = take_gradient(params, state)
      >>> print(gradient)
      [2. 2.]

    References:
      The rule: Wan et al., 2019, https://arxiv.org/abs/1911.07489. Weights of many
      tasks that are kept for some steps: Navon et al., 2022,
      https://arxiv.org/abs/2202.01017.
    """
    options = checked_options(rule, strength)
    linearize = linearized(objective, has_aux)

    def init(params):
        state = init_state(options, params)
        weights = {name: jnp.array([1.0, 0.0]) for name in options.strengths}
        return RefreshState(state.step, options.join(weights), state.measured)

    def refresh(params, state, *args, **kwargs):
        at = linearize(params, *args, **kwargs)
        options.by_name(at.values[1], "regularizer")  # has it the names of `strength`?
        loss = at.tree(at.gradient(lambda outputs: outputs[0]))
        gradients = {
            name: at.tree(at.gradient(_term(name))) for name in options.strengths
        }
        before = ConflictState(state.step, None, None, state.measured)
        leaves, part, after = resolve(
            options,
            before,
            loss,
            {name: lambda r=r: r for name, r in gradients.items()},
            params,
        )
        g = leaves.pick(loss, "updates")
        gradient = leaves.restore([x + y for x, y in zip(g, part)])
        seen = options.by_name(after.measured, "state.measured")
        kept = options.by_name(state.weights, "state.weights")
        weights = {name: _weights(rule, seen[name], kept[name]) for name in kept}
        state = RefreshState(after.step, options.join(weights), after.measured)
        return values_of(at), gradient, state

    def reuse(params, state, *args, **kwargs):
        at = linearize(params, *args, **kwargs)
        kept = options.by_name(state.weights, "state.weights")
        options.by_name(at.values[1], "regularizer")

        def combined(outputs):
            total = outputs[0] * (1 + sum(w[0] - 1 for w in kept.values()))
            for name, w in kept.items():
                factor = w[1] * options.strength_at(name, state.step)
                total = total + factor * _term(name)(outputs)
            return total

        leaves = at.gradient(combined)
        is_finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))
        step = jnp.where(is_finite, optax.safe_increment(state.step), state.step)
        return values_of(at), at.tree(leaves), state._replace(step=step)

    def values_of(at):
        return (at.values, at.aux) if has_aux else at.values

    def _term(name):
        return lambda outputs: options.by_name(outputs[1], "regularizer")[name]

    return RefreshedGradient(init, refresh, reuse)


def _weights(
    rule: rules.Rule, measured: Measured, kept: Float[Array, "2"]
) -> Float[Array, "2"]:
    """The weights of the two gradients, or those before where one is not finite."""
    gram = Gram(*measured.sums[:3, 0])  # of the only group
    is_finite = finite(gram)
    safe = Gram(*[jnp.where(is_finite, x, 1) for x in (gram.gg, gram.gr, gram.rr)])
    return jnp.where(is_finite, rule(safe).astype(kept.dtype), kept)
