"""Weights that are kept for some steps: what is exact, what it costs, what can fail."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dtnh_jax import (
    conflict_metrics,
    dtnh,
    refreshed_gradient,
    resolve_conflicts,
    rules,
    value_and_gradient_pair,
)

PARAMS = {"w": jnp.array([[0.3, -0.2], [0.5, 0.1]]), "v": jnp.array([1.0, -2.0])}
X = jax.random.normal(jax.random.key(0), (6, 2))


def terms(params, x):
    """A loss and a regularizer of the features that mostly conflict."""
    features = jnp.tanh(x @ params["w"])
    outputs = features @ params["v"]
    return jnp.mean((outputs - 1) ** 2), jnp.mean(outputs**2) - jnp.mean(features)


def agreeing(params, x):
    loss, _ = terms(params, x)
    return loss, 3 * loss


def run(resolved, steps, every, rate=0.1):
    """Plain descent: the gradients, and the last state."""
    refresh, reuse = jax.jit(resolved.refresh), jax.jit(resolved.reuse)
    params, state, gradients = PARAMS, resolved.init(PARAMS), []
    for i in range(steps):
        take = reuse if i % every else refresh
        _, gradient, state = take(params, state, X * (1 + 0.1 * i))
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
        gradients.append(gradient)
    return gradients, state


def as_transformation(objective, tx):
    """The same with two backward passes in every step."""

    def refresh(params, state, x):
        values, pair = value_and_gradient_pair(objective)(params, x)
        gradient, state = tx.update(pair, state, params)
        return values, gradient, state

    return refreshed_gradient(objective, 1.0)._replace(init=tx.init, refresh=refresh)


SCHEDULE = optax.linear_schedule(0.5, 4.0, 5)


def test_refreshed_at_every_step_it_is_dtnh():
    got, state = run(refreshed_gradient(terms, SCHEDULE), 6, every=1)
    wanted, expected = run(as_transformation(terms, dtnh(SCHEDULE)), 6, every=1)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        conflict_metrics(state), conflict_metrics(expected), rtol=1e-4
    )
    assert conflict_metrics(state)["conflict"] == 1


def test_without_conflict_nothing_is_approximated_and_schedules_see_every_step():
    got, state = run(refreshed_gradient(agreeing, SCHEDULE), 6, every=4, rate=0.01)
    tx = as_transformation(agreeing, dtnh(SCHEDULE))
    wanted, _ = run(tx, 6, every=1, rate=0.01)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.weights, [1, 1])
    assert state.step == 6


@pytest.mark.parametrize("rule", [rules.dtnh, rules.gate, rules.mgda])
def test_weights_are_those_of_the_last_refresh(rule):
    tx = resolve_conflicts(rule, 2.0)
    resolved = refreshed_gradient(terms, 2.0, rule=rule)
    refresh, reuse = jax.jit(resolved.refresh), jax.jit(resolved.reuse)
    state = resolved.init(PARAMS)
    for i in range(5):
        x = X * (1 + 0.2 * i)
        values, pair = value_and_gradient_pair(terms)(PARAMS, x)
        take = reuse if i % 3 else refresh
        got_values, got, state = take(PARAMS, state, x)
        chex.assert_trees_all_close(got_values, values, rtol=1e-6)
        if i % 3 == 0:
            wanted, seen = tx.update(pair, tx.init(PARAMS))
            metrics = conflict_metrics(seen)
            g, r = metrics["loss_norm"], metrics["regularizer_norm"]
            gram = jnp.array(
                [[g * g, g * r * metrics["cosine"]], [g * r * metrics["cosine"], r * r]]
            )
            w = rule(gram)
        else:
            scaled = optax.tree.scale(2 * w[1], pair.regularizer)
            wanted = optax.tree.add(optax.tree.scale(w[0], pair.loss), scaled)
        chex.assert_trees_all_close(got, wanted, rtol=2e-4, atol=1e-5)
        chex.assert_trees_all_close(state.weights, w, rtol=1e-4)
        np.testing.assert_allclose(conflict_metrics(state)["loss_norm"], g, rtol=1e-5)
    assert state.step == 5
    assert refresh._cache_size() == reuse._cache_size() == 1


def test_several_regularizers_and_what_cannot_be_trained():
    def objective(params, x):
        loss, regularizer = terms(params, x)
        named = {"features": regularizer, "size": jnp.sum(params["v"] ** 2)}
        return (loss, named), x[0, 0]

    strength, params = {"features": 2.0, "size": 0.5}, {**PARAMS, "count": jnp.array(3)}
    resolved = refreshed_gradient(objective, strength, has_aux=True)
    state = resolved.init(params)
    (_, aux), first, state = resolved.refresh(params, state, X)
    assert aux == X[0, 0]
    _, pair = value_and_gradient_pair(objective, has_aux=True)(params, X)
    tx = dtnh(strength)
    wanted, _ = tx.update(pair, tx.init(params), params)
    for name in PARAMS:
        np.testing.assert_allclose(first[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert set(conflict_metrics(state)) == {"features", "size"}
    # With the same batch and parameters the one backward pass is that of the update.
    _, second, state = resolved.reuse(params, state, X)
    assert second["count"].dtype == jax.dtypes.float0
    for name in PARAMS:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-4, atol=1e-6)


def breaking(params, x):
    """Each term has a gradient that is not finite where its part of `x` is not."""
    loss, regularizer = terms(params, x[2:])
    return loss + x[0, 0] * params["v"][0], regularizer + x[1, 0] * params["v"][0]


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("term", ["loss", "regularizer"])
def test_a_refresh_leaves_out_a_regularizer_that_is_not_finite(at, term):
    resolved = refreshed_gradient(breaking, 2.0)
    refresh, reuse = jax.jit(resolved.refresh), jax.jit(resolved.reuse)
    good = jnp.concatenate([jnp.zeros((2, 2)), X])
    bad = good.at[["loss", "regularizer"].index(term), 0].set(jnp.inf)
    state = resolved.init(PARAMS)
    for _ in range(at):
        _, _, state = refresh(PARAMS, state, good)
    before = state
    _, got, state = refresh(PARAMS, state, bad)
    _, pair = value_and_gradient_pair(breaking)(PARAMS, bad)
    np.testing.assert_array_equal(state.weights, before.weights)
    assert conflict_metrics(state)["skipped"] == 1
    if term == "regularizer":
        chex.assert_trees_all_close(got, pair.loss, rtol=1e-5)
        assert state.step == at + 1
    else:
        assert not np.all(np.isfinite(got["v"]))
        assert state.step == at
    _, after, _ = reuse(PARAMS, state, good)
    chex.assert_tree_all_finite(after)


def test_a_reuse_that_is_not_finite_is_passed_on():
    resolved = refreshed_gradient(breaking, 2.0)
    good = jnp.concatenate([jnp.zeros((2, 2)), X])
    _, _, state = resolved.refresh(PARAMS, resolved.init(PARAMS), good)
    _, got, after = resolved.reuse(PARAMS, state, good.at[1, 0].set(jnp.inf))
    assert not np.all(np.isfinite(got["v"]))
    assert after.step == state.step == 1


def operations(jaxpr):
    """Names of all operations of a program, those of inner programs included."""
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found.append(equation.primitive.name)
        for inner in programs.inner(equation.params):
            found += operations(inner)
    return found


def test_one_forward_pass_and_one_or_two_backward_passes_without_a_branch():
    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x), jnp.mean(x**2)

    params = [jnp.eye(2)] * 3
    resolved = refreshed_gradient(deep, 1.0)
    args = params, resolved.init(params), X
    refresh, reuse = (
        operations(jax.make_jaxpr(f)(*args)) for f in (resolved.refresh, resolved.reuse)
    )
    plain = operations(jax.make_jaxpr(jax.grad(lambda p: deep(p, X)[0]))(params))
    forward, backward = 3, plain.count("dot_general") - 3
    assert reuse.count("dot_general") == forward + backward
    assert refresh.count("dot_general") == forward + 2 * backward
    assert not {"cond", "while", "scan"} & {*refresh, *reuse}


def test_finite_input_raises_no_alarm_for_nan():
    resolved = refreshed_gradient(terms, 1.0)
    with jax.debug_nans(True):
        state = resolved.init(PARAMS)
        for take in (resolved.refresh, resolved.reuse):
            _, gradient, state = jax.jit(take)(PARAMS, state, X)
    chex.assert_tree_all_finite(gradient)


def test_on_an_explicit_mesh():
    """Values and gradients are those of one device, and cut like the parameters."""
    mesh = jax.make_mesh(
        (4,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4]
    )
    keys = jax.random.split(jax.random.key(1))
    params = {"w": jax.random.normal(keys[0], (2, 8)), "v": jnp.ones(8)}
    specs = {"w": P(None, "x"), "v": P("x")}
    cut = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, specs
    )

    def wide_terms(params, x):
        features = jnp.tanh(x @ params["w"])
        outputs = jnp.sum(features * params["v"][None], axis=1)
        regularizer = jnp.mean((outputs + 1) ** 2) + jnp.mean(features)
        return jnp.mean((outputs - 1) ** 2), regularizer

    def both(params, x):
        resolved = refreshed_gradient(wide_terms, SCHEDULE)
        state, found = resolved.init(params), []
        for take in (resolved.refresh, resolved.reuse):
            values, gradient, state = jax.jit(take)(params, state, x)
            found.append((values, gradient))
        return found, conflict_metrics(state)

    expected = both(params, X)
    assert expected[1]["conflict"] == 1
    with jax.set_mesh(mesh):
        found = both(cut, jax.device_put(X, NamedSharding(mesh, P())))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
    for _, gradient in found[0]:
        assert {name: x.sharding.spec for name, x in gradient.items()} == specs


def test_a_step_that_reuses_weights_keeps_no_more_than_a_plain_one():
    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x), jnp.mean(x**2)

    def plain(params, state, x):
        return jax.grad(lambda p: sum(deep(p, x)))(params), state

    params = [jnp.zeros((8, 8))] * 6
    resolved = refreshed_gradient(deep, 1.0)

    def temporary(step):
        lowered = jax.jit(step).lower(
            params, resolved.init(params), jnp.ones((4096, 8))
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    activations = 6 * 4096 * 8 * 4
    assert temporary(resolved.reuse) < temporary(plain) + 0.3 * activations


def test_values_out_of_range():
    with pytest.raises(ValueError, match="`strength` must be at least"):
        refreshed_gradient(terms, -1.0)
    with pytest.raises(TypeError, match="rule"):
        refreshed_gradient(terms, 1.0, rule="dtnh")


def test_names_of_regularizers_have_to_match():
    resolved = refreshed_gradient(terms, {"features": 1.0})
    for take in (resolved.refresh, resolved.reuse):
        with pytest.raises(ValueError, match="`regularizer` must be a dict with the"):
            take(PARAMS, resolved.init(PARAMS), X)
