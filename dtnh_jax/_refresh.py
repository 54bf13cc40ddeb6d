"""`refreshed_gradient`: reuses a rule's weights to save second backward passes."""

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

    step: Int[Array, ""]  # steps of both kinds so far with a finite loss gradient
    # Weights of loss and regularizer from the last `refresh`; a dict by name if there
    # are several regularizers.
    weights: Float[Array, "2"] | dict[str, Float[Array, "2"]]
    measured: Measured | dict[str, Measured]  # from the last `refresh`


class RefreshedGradient(NamedTuple):
    """The three functions of `refreshed_gradient`.

    Attributes:
      init: maps the parameters to a state.
      refresh: maps `(params, state, *args)` to values, gradient and state, with two
        backward passes.
      reuse: the same, with one backward pass.
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

    `refresh` computes the gradients `g` and `r` of both terms, resolves them like
    `resolve_conflicts(rule, strength)`, and stores the rule's weights `w`. `reuse`
    needs one backward pass, that of

    `w[0] * loss + w[1] * strength * regularizer`.

    Jit a step with each, and choose between them in the loop: for example `refresh` on
    the first and every eighth step. Without conflict, `rules.dtnh` has the weights 1
    and 1, and `reuse` is exact. With conflict, the weights are some steps old, and the
    rule's guarantee holds for the gradients of the last `refresh`. If `g` was then much
    shorter than `r`, `w[0]` is large, and the loss keeps a large weight until the next
    `refresh`.

    The only scope is the global one. Weights of whole terms can be applied before a
    backward pass; weights that differ between leaves need the loss gradient of each
    leaf, which is the pass that `reuse` saves.

    `refresh` leaves out a regularizer gradient that is not finite, counts it in
    `conflict_metrics` and keeps the old weights, initially 1 and 0. A loss gradient
    that is not finite passes through unchanged, so that `optax.apply_if_finite` can
    reject it. In `reuse`, one backward pass does not show which term made its result
    not finite, so the result also passes through. Metrics are those of the last
    `refresh`.

    The returned gradients are already resolved. So in loops that are mapped over
    devices the objective must average both of its terms by `jax.lax.pmean`.

    Args:
      objective: maps `(params, *args)` to `(loss, regularizer)`, or with `has_aux` to
        `((loss, regularizer), aux)`, as for `value_and_gradient_pair`.
      strength: factor of the regularizer, as in `dtnh`; schedules count every step.
      rule: a rule for the whole gradients, see `dtnh_jax.rules`.
      has_aux: whether `objective` also returns auxiliary data.

    Returns:
      Three functions. `init(params)` returns a state; `refresh(params, state, *args)`
      and `reuse(params, state, *args)` return `((loss, regularizer), gradient, state)`,
      or with `has_aux` `(((loss, regularizer), aux), gradient, state)`. The gradient is
      resolved: pass it to any optimizer, but not to this library's transformations.

    Raises:
      ValueError: a value is out of range.
      TypeError: an argument has the wrong type.

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
      The rule: Wan et al., 2019, https://arxiv.org/abs/1911.07489. Reusing the weights
      of many tasks for some steps: Navon et al., 2022,
      https://arxiv.org/abs/2202.01017.
    """
    options = checked_options(rule, strength)
    linearize = linearized(objective, has_aux)

    def init(params):
        state = init_state(options, params)
        weights = {name: jnp.array([1.0, 0.0]) for name in options.strengths}
        return RefreshState(state.step, options.join(weights), state.measured)

    def refresh(params, state, *args, **kwargs):
        evaluated = linearize(params, *args, **kwargs)
        options.by_name(evaluated.values[1], "regularizer")  # checks the names
        loss = evaluated.tree(evaluated.gradient(lambda outputs: outputs[0]))
        gradients = {
            name: evaluated.tree(evaluated.gradient(_term(name)))
            for name in options.strengths
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
        measured = options.by_name(after.measured, "state.measured")
        old = options.by_name(state.weights, "state.weights")
        weights = {name: _weights(rule, measured[name], old[name]) for name in old}
        state = RefreshState(after.step, options.join(weights), after.measured)
        return values_of(evaluated), gradient, state

    def reuse(params, state, *args, **kwargs):
        evaluated = linearize(params, *args, **kwargs)
        kept = options.by_name(state.weights, "state.weights")
        options.by_name(evaluated.values[1], "regularizer")

        def combined(outputs):
            total = outputs[0] * (1 + sum(w[0] - 1 for w in kept.values()))
            for name, w in kept.items():
                factor = w[1] * options.strength_at(name, state.step)
                total = total + factor * _term(name)(outputs)
            return total

        leaves = evaluated.gradient(combined)
        is_finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves]))
        step = jnp.where(is_finite, optax.safe_increment(state.step), state.step)
        return values_of(evaluated), evaluated.tree(leaves), state._replace(step=step)

    def values_of(evaluated):
        return (evaluated.values, evaluated.aux) if has_aux else evaluated.values

    def _term(name):
        return lambda outputs: options.by_name(outputs[1], "regularizer")[name]

    return RefreshedGradient(init, refresh, reuse)


def _weights(
    rule: rules.Rule, measured: Measured, old: Float[Array, "2"]
) -> Float[Array, "2"]:
    """Returns the weights of the two gradients; the old ones if a sum is not finite."""
    gram = Gram(*measured.sums[:3, 0])  # of the only group
    is_finite = finite(gram)
    safe = Gram(*[jnp.where(is_finite, x, 1) for x in (gram.gg, gram.gr, gram.rr)])
    return jnp.where(is_finite, rule(safe).astype(old.dtype), old)
