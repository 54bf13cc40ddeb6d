"""Resolution with one backward pass on most steps: weights are kept for some."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dtnh_jax import _plan, metrics, rules
from dtnh_jax._options import Options, Strength, check_count
from dtnh_jax._protect import ConflictState, add_parts, init_state, regularizer_parts
from dtnh_jax._scopes import Geometry
from dtnh_jax.gradients import linearized


class RefreshState(NamedTuple):
    """State of `refreshed_gradient`."""

    step: Int[Array, ""]  # steps so far with a finite loss gradient
    # Of loss and regularizer, as they were last measured; by name where there are
    # several regularizers.
    weights: Float[Array, "2"] | dict[str, Float[Array, "2"]]
    # Of the last step that measured anything.
    metrics: metrics.ConflictMetrics | dict[str, metrics.ConflictMetrics]


class RefreshedGradient(NamedTuple):
    """What `refreshed_gradient` returns."""

    init: Callable[[optax.Params], RefreshState]
    # (params, state, *args) -> values, gradient, state. The first measures when it is
    # time to, the second always, the third does not.
    value_and_gradient: Callable[..., tuple[Any, optax.Updates, RefreshState]]
    refresh: Callable[..., tuple[Any, optax.Updates, RefreshState]]
    reuse: Callable[..., tuple[Any, optax.Updates, RefreshState]]


def refreshed_gradient(
    objective: Callable[..., Any],
    strength: Strength | Mapping[str, Strength],
    *,
    refresh_every: int,
    rule: rules.Rule = rules.dtnh,
    has_aux: bool = False,
) -> RefreshedGradient:
    """Resolves a regularizer of features or outputs with few second backward passes.

    On steps 0, `refresh_every`, `2 * refresh_every` and so on the gradients `g` and `r`
    of both terms are taken and resolved as by `resolve_conflicts(rule, strength)`, and
    the rule's weights `w` are kept. On all others one backward pass is enough, that of

    `w[0] * loss + w[1] * strength * regularizer`.

    Where the terms are not in conflict `rules.dtnh` has the weights 1 and 1, and
    nothing is approximated; with `refresh_every=1` nothing ever is. Else the weights
    are up to `refresh_every - 1` steps old: the rule's guarantee is about the gradients
    of that time. Where `g` was then much shorter than `r`, `w[0]` is large, and so is
    the loss's part until both are measured again.

    Whether a step measures is decided inside of the program, by a branch. XLA runs
    convolutions in branches on one thread of a CPU, an order of magnitude slower than
    elsewhere. For those there are `refresh`, which always measures, and `reuse`, which
    does not: jit a step with each, and choose in the loop, by the number of the step.

    There is only the global scope: weights of whole terms can stand in front of a
    backward pass; weights that differ between leaves need each leaf's gradient of
    the loss alone, which is the pass that is to be saved.

    One backward pass cannot tell which of the terms made its result not finite. So in
    such a step both are taken out of turn, at the cost of two more, and all is as
    elsewhere (`reuse`, which keeps nothing for them, repeats the forward pass too): a
    regularizer gradient that is not finite is left out and counted in
    `conflict_metrics`, and a loss gradient that is not finite is returned as it is, for
    `optax.apply_if_finite` to see. Neither changes the weights, which are 1 and 0 until
    the first are measured.

    Gradients are ready when this returns them, so in loops that are mapped over devices
    the objective has to average both of its terms, by `jax.lax.pmean`.

    Args:
      objective: maps `(params, *args)` to `(loss, regularizer)`, or with `has_aux` to
        `((loss, regularizer), aux)`, as for `value_and_gradient_pair`.
      strength: factor of the regularizer, as in `dtnh`; schedules see every step.
      refresh_every: how many steps weights are kept for, at least 1.
      rule: a rule of the whole gradients, see `dtnh_jax.rules`.
      has_aux: whether `objective` returns auxiliary data too.

    Returns:
      Four functions. `init(params)` returns a state, and `value_and_gradient(params,
      state, *args)` returns `((loss, regularizer), gradient, state)`, or with `has_aux`
      `(((loss, regularizer), aux), gradient, state)`. The gradient is resolved: it is
      for any optimizer, and for none of this library's transformations. `refresh` and
      `reuse` are the same, but measure whether it is time to or not; where what `reuse`
      has to return is not finite, it measures all the same.

    Raises:
      ValueError: for values that are out of range.
      TypeError: for arguments of another kind.

    Example:
      >>> from dtnh_jax import refreshed_gradient
      >>> def objective(params):
      ...     return jnp.sum(params**2), -jnp.sum(params)
      >>> resolved = refreshed_gradient(objective, 1.0, refresh_every=10)
      >>> params = jnp.array([1.0, 1.0])
      >>> state = resolved.init(params)
      >>> for _ in range(2):  # the first measures, the second does not
      ...     values, gradient, state = resolved.value_and_gradient(params, state)
      ...     print(gradient)
      [2. 2.]
      [2. 2.]

      Or the loop decides, which is faster on a CPU:

      >>> refresh, reuse = map(jax.jit, (resolved.refresh, resolved.reuse))
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
    check_count("refresh_every", refresh_every)
    if not callable(rule):
        raise TypeError(
            "`rule` must be a function such as `dtnh_jax.rules.dtnh`, got "
            f"{type(rule).__name__}: pairs of a rule and a scope are for "
            "`resolve_conflicts`."
        )
    options = Options.checked(rule, strength, "global", None, None, None)
    linearize = linearized(objective, has_aux)

    def init(params):
        state = init_state(options, params)
        unmeasured = {name: jnp.array([1.0, 0.0]) for name in options.strengths}
        return RefreshState(state.step, options.join(unmeasured), state.metrics)

    def step(is_due, params, state, *args, **kwargs):
        """`is_due` is a bool, or an array where the program is to decide."""
        at = linearize(params, *args, **kwargs)
        kept = options.by_name(state.weights, "state.weights")
        options.by_name(at.values[1], "regularizer")  # has it the names of `strength`?

        def combined(outputs):
            """The one term of a step in between, linear in the two."""
            total = outputs[0] * (1 + sum(w[0] - 1 for w in kept.values()))
            for name, value in options.by_name(outputs[1], "regularizer").items():
                factor = kept[name][1] * options.strength_at(name, state.step)
                total = total + factor * value
            return total

        def both(at):
            loss = at.tree(at.gradient(lambda outputs: outputs[0]))
            getters = {}
            for name in options.strengths:
                r = at.tree(at.gradient(_term(options, name)))
                getters[name] = lambda _, r=r: r
            before = ConflictState(state.step, None, state.metrics)
            layout, parts, after = regularizer_parts(
                options, loss, getters, before, params
            )
            seen = options.by_name(after.metrics, "state.metrics")
            weights = {name: _weights(rule, seen[name], kept[name]) for name in kept}
            new = RefreshState(after.step, options.join(weights), after.metrics)
            return at.leaves(add_parts(layout, parts)), new

        def one():
            return at.gradient(combined)

        def unknown():
            shapes = jax.eval_shape(one)
            return [jnp.full(x.shape, jnp.nan, x.dtype) for x in shapes]

        if is_due is True:
            leaves, state = both(at)
        else:
            guess = one() if is_due is False else jax.lax.cond(is_due, unknown, one)
            finite = [jnp.all(jnp.isfinite(x)) for x in guess]
            following = state._replace(step=optax.safe_increment(state.step))

            def again():
                # Where that is rare, what a backward pass needs is not kept for it.
                if is_due is False:
                    return both(linearize(params, *args, **kwargs))
                return both(at)

            leaves, state = jax.lax.cond(
                jnp.all(jnp.array(finite)), lambda: (guess, following), again
            )
        outputs = (at.values, at.aux) if has_aux else at.values
        return outputs, at.tree(leaves), state

    def value_and_gradient(params, state, *args, **kwargs):
        is_due = refresh_every == 1 or state.step % refresh_every == 0
        return step(is_due, params, state, *args, **kwargs)

    refresh, reuse = (functools.partial(step, is_due) for is_due in (True, False))
    return RefreshedGradient(init, value_and_gradient, refresh, reuse)


def _term(options: Options, name: str) -> Callable[[Any], Any]:
    return lambda outputs: options.by_name(outputs[1], "regularizer")[name]


def _weights(
    rule: rules.Rule, seen: metrics.ConflictMetrics, kept: Float[Array, "2"]
) -> Float[Array, "2"]:
    """The weights of the two gradients, or those before where one is not finite."""
    norms = seen.loss_norm, seen.regularizer_norm
    gram, _ = _plan.told(Geometry(*norms, seen.cosine))
    weights = rule(gram)
    return jnp.where(jnp.isfinite(norms[0]) & jnp.isfinite(norms[1]), weights, kept)
