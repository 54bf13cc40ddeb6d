"""Weights that are kept for some steps: what is exact, what it costs, what can fail."""

import functools

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def run(resolved, steps, params=PARAMS, rate=0.1):
    """Plain descent in one scan: the gradients, and the last state."""

    def step(carry, x):
        params, state = carry
        _, gradient, state = resolved.value_and_gradient(params, state, x)
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
        return (params, state), gradient

    xs = jnp.stack([X * (1 + 0.1 * i) for i in range(steps)])
    carry = params, resolved.init(params)
    (_, state), gradients = jax.jit(functools.partial(jax.lax.scan, step))(carry, xs)
    return gradients, state


def as_transformation(objective, tx):
    """The same with two backward passes in every step."""

    def value_and_gradient(params, state, x):
        values, pair = value_and_gradient_pair(objective)(params, x)
        gradient, state = tx.update(pair, state, params)
        return values, gradient, state

    resolved = refreshed_gradient(objective, 1.0, refresh_every=1)
    return resolved._replace(init=tx.init, value_and_gradient=value_and_gradient)


SCHEDULE = optax.linear_schedule(0.5, 4.0, 5)


def test_refreshed_at_every_step_it_is_dtnh():
    resolved = refreshed_gradient(terms, SCHEDULE, refresh_every=1)
    got, state = run(resolved, 6)
    wanted, expected = run(as_transformation(terms, dtnh(SCHEDULE)), 6)
    chex.assert_trees_all_equal(got, wanted)
    chex.assert_trees_all_equal(state.metrics, expected.metrics)
    assert conflict_metrics(state)["conflict"] == 1


def test_without_conflict_nothing_is_approximated_and_schedules_see_every_step():
    resolved = refreshed_gradient(agreeing, SCHEDULE, refresh_every=4)
    got, state = run(resolved, 6, rate=0.01)
    wanted, _ = run(as_transformation(agreeing, dtnh(SCHEDULE)), 6, rate=0.01)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.weights, [1, 1])
    assert state.step == 6


@pytest.mark.parametrize("rule", [rules.dtnh, rules.gate, rules.mgda])
def test_weights_are_those_of_the_last_refresh(rule):
    tx = resolve_conflicts(rule, 2.0)
    resolved = refreshed_gradient(terms, 2.0, refresh_every=3, rule=rule)
    state, gradient = resolved.init(PARAMS), jax.jit(resolved.value_and_gradient)
    for i in range(5):
        x = X * (1 + 0.2 * i)
        values, pair = value_and_gradient_pair(terms)(PARAMS, x)
        got_values, got, state = gradient(PARAMS, state, x)
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
    assert gradient._cache_size() == 1


def test_several_regularizers_and_what_cannot_be_trained():
    def objective(params, x):
        loss, regularizer = terms(params, x)
        named = {"features": regularizer, "size": jnp.sum(params["v"] ** 2)}
        return (loss, named), x[0, 0]

    strength, params = {"features": 2.0, "size": 0.5}, {**PARAMS, "count": jnp.array(3)}
    resolved = refreshed_gradient(objective, strength, refresh_every=2, has_aux=True)
    state = resolved.init(params)
    (_, aux), first, state = resolved.value_and_gradient(params, state, X)
    assert aux == X[0, 0]
    _, pair = value_and_gradient_pair(objective, has_aux=True)(params, X)
    tx = dtnh(strength)
    wanted, _ = tx.update(pair, tx.init(params), params)
    for name in PARAMS:
        np.testing.assert_allclose(first[name], wanted[name], rtol=1e-5, atol=1e-6)
    assert set(conflict_metrics(state)) == {"features", "size"}
    # With the same batch and parameters the one backward pass is that of the update.
    _, second, state = resolved.value_and_gradient(params, state, X)
    assert second["count"].dtype == jax.dtypes.float0
    for name in PARAMS:
        np.testing.assert_allclose(second[name], first[name], rtol=1e-4, atol=1e-6)


def breaking(params, x):
    """Each term has a gradient that is not finite where its part of `x` is not."""
    loss, regularizer = terms(params, x[2:])
    return loss + x[0, 0] * params["v"][0], regularizer + x[1, 0] * params["v"][0]


@pytest.mark.parametrize(
    ("at", "by"),
    [
        (0, "value_and_gradient"),
        (1, "value_and_gradient"),
        (0, "refresh"),
        (1, "reuse"),
    ],
)
@pytest.mark.parametrize("term", ["loss", "regularizer"])
def test_what_is_not_finite_is_never_applied_and_the_one_to_blame_is_found(
    at, by, term
):
    resolved = refreshed_gradient(breaking, 2.0, refresh_every=4)
    gradient = jax.jit(resolved.value_and_gradient)
    good = jnp.concatenate([jnp.zeros((2, 2)), X])
    bad = good.at[["loss", "regularizer"].index(term), 0].set(jnp.inf)
    assert all(
        np.all(np.isfinite(x))
        for x in jax.tree.leaves(value_and_gradient_pair(breaking)(PARAMS, good))
    )
    state = resolved.init(PARAMS)
    for _ in range(at):
        _, _, state = gradient(PARAMS, state, good)
    before = state
    _, got, state = jax.jit(getattr(resolved, by))(PARAMS, state, bad)
    _, pair = value_and_gradient_pair(breaking)(PARAMS, bad)
    np.testing.assert_array_equal(state.weights, before.weights)
    if term == "regularizer":
        chex.assert_trees_all_close(got, pair.loss, rtol=1e-5)
        assert conflict_metrics(state)["skipped"] == 1
        assert state.step == at + 1
    else:
        assert not np.all(np.isfinite(got["v"]))
        assert conflict_metrics(state)["skipped"] == 0
        assert state.step == at  # so that a refresh that is due is made up for
    _, after, _ = gradient(PARAMS, state, good)
    chex.assert_tree_all_finite(after)


def products(jaxpr):
    """How many matrix products a program does, and what each conditional may do."""
    own, branches = 0, []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "cond":
            found = [products(branch) for branch in equation.params["branches"]]
            # What is resolved is measured in loops that are skipped: no products there.
            assert not any(n for _, more in found for counts in more for n in counts)
            branches.append([count for count, _ in found])
            continue
        own += equation.primitive.name == "dot_general"
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            count, more = products(inner)
            own, branches = own + count, branches + more
    return own, branches


def test_one_backward_pass_in_between_and_one_forward_pass_in_all():
    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x), jnp.mean(x**2)

    params = [jnp.eye(2)] * 3
    resolved = refreshed_gradient(deep, 1.0, refresh_every=10)
    args = params, resolved.init(params), X
    outside, branches = products(jax.make_jaxpr(resolved.value_and_gradient)(*args))
    plain, _ = products(jax.make_jaxpr(jax.grad(lambda p: deep(p, X)[0]))(params))
    assert outside == 3  # the forward pass
    backward = plain - 3
    # In the first one it is due or not, in the second the result is finite or not.
    assert [sorted(branch) for branch in branches] == [[0, backward], [0, 2 * backward]]


def test_a_loop_that_counts_needs_no_branch():
    resolved = refreshed_gradient(terms, SCHEDULE, refresh_every=3)
    refresh, reuse, either = map(
        jax.jit, (resolved.refresh, resolved.reuse, resolved.value_and_gradient)
    )
    state = other = resolved.init(PARAMS)
    for i in range(5):
        x = X * (1 + 0.2 * i)
        take = reuse if i % 3 else refresh
        values, got, state = take(PARAMS, state, x)
        expected_values, expected, other = either(PARAMS, other, x)
        chex.assert_trees_all_close(got, expected, rtol=1e-6)
        chex.assert_trees_all_close(values, expected_values, rtol=1e-6)
        chex.assert_trees_all_close(state, other, rtol=1e-6)

    args = PARAMS, state, X
    backward, _ = products(jax.make_jaxpr(jax.grad(lambda p: terms(p, X)[0]))(PARAMS))
    both, branches = products(jax.make_jaxpr(resolved.refresh)(*args))
    forward = 2
    assert both == forward + 2 * (backward - forward)
    assert not any(map(sum, branches))
    # All is done anew for a result that is not finite, for which nothing is kept.
    outside, branches = products(jax.make_jaxpr(resolved.reuse)(*args))
    assert outside == backward
    costly = [sorted(branch) for branch in branches if sum(branch)]
    assert costly == [[0, forward + 2 * (backward - forward)]]


def test_a_step_that_reuses_weights_keeps_no_more_than_a_plain_one():
    def deep(params, x):
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean(x), jnp.mean(x**2)

    def plain(params, state, x):
        return jax.grad(lambda p: sum(deep(p, x)))(params), state

    params = [jnp.zeros((8, 8))] * 6
    resolved = refreshed_gradient(deep, 1.0, refresh_every=10)

    def temporary(step):
        lowered = jax.jit(step).lower(
            params, resolved.init(params), jnp.ones((4096, 8))
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    activations = 6 * 4096 * 8 * 4
    assert temporary(resolved.reuse) < temporary(plain) + 0.3 * activations


@pytest.mark.parametrize("bad", [{"refresh_every": 0}, {"strength": -1.0}])
def test_values_out_of_range(bad):
    arguments = {"strength": 1.0, "refresh_every": 2} | bad
    (name,) = bad
    with pytest.raises(ValueError, match=f"`{name}` must be at least"):
        refreshed_gradient(terms, **arguments)


def test_names_of_regularizers_have_to_match():
    resolved = refreshed_gradient(terms, {"features": 1.0}, refresh_every=2)
    with pytest.raises(ValueError, match="`regularizer` must be a dict with the keys"):
        resolved.value_and_gradient(PARAMS, resolved.init(PARAMS), X)
