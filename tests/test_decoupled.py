"""Beside any optimizer, the regularizer cannot raise the loss to first order."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dtnh_jax import (
    GradientPair,
    cautious,
    conflict_metrics,
    decoupled,
    dtnh,
    first_order_harm,
)
from dtnh_jax.regularizers import l2, l2_sp

OPTIMIZERS = {
    "adabelief": optax.adabelief,
    "adadelta": optax.adadelta,
    "adafactor": optax.adafactor,
    "adagrad": optax.adagrad,
    "adam": optax.adam,
    "adamax": optax.adamax,
    "adamaxw": optax.adamaxw,
    "adamw": optax.adamw,
    "adan": optax.adan,
    "amsgrad": optax.amsgrad,
    "fromage": optax.fromage,
    "lamb": optax.lamb,
    "lars": optax.lars,
    "lion": optax.lion,
    "muon": optax.contrib.muon,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "noisy_sgd": lambda rate: optax.noisy_sgd(rate, key=0),
    "novograd": optax.novograd,
    "optimistic_gradient_descent": optax.optimistic_gradient_descent,
    "radam": optax.radam,
    "rmsprop": optax.rmsprop,
    "rprop": optax.rprop,
    "schedule_free": optax.contrib.schedule_free_adamw,
    "sgd": optax.sgd,
    "sgd with momentum": lambda rate: optax.sgd(rate, 0.9, nesterov=True),
    "sign_sgd": optax.sign_sgd,
    "sm3": optax.sm3,
    "yogi": optax.yogi,
}
SCOPES = ("global", "leaf", "unit", "element")


def random_tree(seed, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "kernel": scale * jax.random.normal(keys[0], (3, 4)),
        "bias": scale * jax.random.normal(keys[1], (4,)),
    }


def numbers(state):
    """The leaves of a state but for random keys, which have no differences."""
    leaves = jax.tree.leaves(state)
    return [x for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


def rounding(g, *updates):
    """What single precision leaves uncertain of an inner product with `g`."""
    return 1e-6 * float(optax.tree.norm(g) * max(map(optax.tree.norm, updates)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_loss_falls_as_fast_as_with_any_optimizer_alone(name):
    scope = SCOPES[list(OPTIMIZERS).index(name) % 4]
    alone = OPTIMIZERS[name](1e-2)
    tx = decoupled(alone, strength=3e-2, scope=scope)
    params = random_tree(0)
    state, state_alone = tx.init(params), alone.init(params)
    update, update_alone = jax.jit(tx.update), jax.jit(alone.update)
    conflicts = 0
    for seed in range(1, 9):
        g, r = random_tree(seed), random_tree(100 + seed, 10.0 ** (seed % 5 - 2))
        updates, state = update(GradientPair(g, r), state, params)
        without, state_alone = update_alone(g, state_alone, params)
        harm = first_order_harm(g, updates, without)
        assert harm <= rounding(g, updates, without)
        conflicts += float(conflict_metrics(state)["conflict"] > 0)
        # The optimizer inside has seen the loss alone.
        seen = numbers(state.optimizer), numbers(state_alone)
        chex.assert_trees_all_close(*seen, rtol=1e-6)
        params = optax.apply_updates(params, updates)
    assert conflicts > 0


def test_projection_before_a_sign_like_optimizer_loses_the_guarantee():
    """The counterexample: DTNH is right about `d`, but the optimizer applies sign(d).

    g = (1, 1, 1, 2), r = (-2, -2, -2, 1.25): <g, r> = -3.5 and ||g||^2 = 7, so that
    d = g + r + g / 2 = (-0.5, -0.5, -0.5, 4.25) with <g, d> = 7, but
    <g, sign(d)> = -3 + 2 = -1: the step raises the loss.
    """
    g, r = jnp.array([1.0, 1.0, 1.0, 2.0]), jnp.array([-2.0, -2.0, -2.0, 1.25])
    params = jnp.zeros(4)
    before = optax.chain(dtnh(1.0), optax.sign_sgd(1.0))
    beside = decoupled(optax.sign_sgd(1.0), strength=1.0)
    pair = GradientPair(g, r)
    d, _ = dtnh(1.0).update(pair, dtnh(1.0).init(params), params)
    assert g @ d == 7
    updates, _ = before.update(pair, before.init(params), params)
    assert g @ updates == 1  # the loss rises
    updates, _ = beside.update(pair, beside.init(params), params)
    assert g @ updates == -5  # as with sign_sgd alone: 1 + 1 + 1 + 2


def test_without_conflict_the_whole_step_is_added():
    g, r = jnp.array([1.0, 1.0]), jnp.array([1.0, 2.0])
    tx = decoupled(optax.sgd(0.1), strength=0.5)
    updates, _ = tx.update(GradientPair(g, r), tx.init(g), g)
    np.testing.assert_allclose(updates, [-0.1 - 0.5, -0.1 - 1.0], rtol=1e-6)


def test_the_length_of_the_gradient_does_not_matter():
    g, r = random_tree(0), random_tree(1)
    for scope in ("global", "element"):
        tx = decoupled(optax.sgd(0.0), strength=1e-6, scope=scope)
        steps = []
        for scale in (1e-12, 1.0, 1e12):
            scaled = jax.tree.map(lambda x, s=scale: s * x, g)
            updates, _ = tx.update(GradientPair(scaled, r), tx.init(g), g)
            steps.append(updates)
            assert first_order_harm(g, updates, jax.tree.map(jnp.zeros_like, g)) < 1e-11
        chex.assert_trees_all_close(steps[0], steps[1], steps[2], rtol=1e-4, atol=1e-12)


def test_adamw_is_decoupled_with_l2_where_nothing_conflicts():
    params = random_tree(0)
    g = jax.tree.map(lambda p: 3 * p, params)
    rate, decay = 1e-2, 0.1
    ours = decoupled(optax.adam(rate), rate * decay, regularizer=l2())
    theirs = optax.adamw(rate, weight_decay=decay)
    got, _ = ours.update(g, ours.init(params), params)
    expected, _ = theirs.update(g, theirs.init(params), params)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


def test_the_regularizer_may_have_an_optimizer_of_its_own():
    params = random_tree(0)
    own = optax.adam(1e-2)
    tx = decoupled(optax.sgd(0.1), 0.5, regularizer_optimizer=own)
    g = random_tree(1)
    state, own_state = tx.init(params), own.init(params)
    for seed in (2, 3):
        # Agrees with g in every entry, and so does Adam's step with both.
        r = jax.tree.map(lambda x, s=seed: s * jnp.sign(x), g)
        updates, state = tx.update(GradientPair(g, r), state, params)
        step, own_state = own.update(r, own_state, params)
        expected = jax.tree.map(lambda g, v: -0.1 * g + 0.5 * v, g, step)
        chex.assert_trees_all_close(updates, expected, rtol=1e-5)
    bad = jax.tree.map(lambda x: x * jnp.nan, g)
    _, state = tx.update(GradientPair(g, bad), state, params)
    assert conflict_metrics(state)["skipped"] == 1
    chex.assert_trees_all_equal(state.regularizer_optimizer, own_state)


def test_the_regularizer_s_optimizer_gets_the_value_of_the_loss_too():
    """With it, it may halve its step where the loss does not fall."""
    plateau = optax.contrib.reduce_on_plateau(0.5, patience=1)
    own = optax.chain(optax.sgd(1.0), plateau)
    tx = decoupled(optax.sgd(0.1), 0.5, regularizer_optimizer=own)
    g = {"w": jnp.array([1.0, -2.0])}
    state, lengths = tx.init(g), []
    for _ in range(3):
        updates, state = tx.update(GradientPair(g, g), state, g, value=1.0)
        lengths.append(updates["w"][0])
    np.testing.assert_allclose(lengths, [-0.6, -0.35, -0.225], rtol=1e-6)


def test_several_regularizers_each_with_its_own_state():
    params = random_tree(0)
    pulls = {"decay": l2(), "sp": l2_sp(random_tree(1))}
    tx = decoupled(
        optax.adamw(1e-3),
        {"decay": 1e-3, "sp": 1e-2},
        regularizer=pulls,
        regularizer_optimizer=optax.trace(0.9),
    )
    state = tx.init(params)
    updates, state = tx.update(random_tree(2), state, params)
    chex.assert_tree_all_finite(updates)
    assert (
        set(state.regularizer_optimizer) == set(conflict_metrics(state)) == set(pulls)
    )


@pytest.mark.parametrize("scope", SCOPES)
def test_the_max_ratio_is_of_the_update(scope):
    g, r = random_tree(0), random_tree(1, 1e6)
    inner = optax.sgd(0.1)
    tx = decoupled(inner, 1.0, scope=scope, max_ratio=0.5)
    updates, _ = tx.update(GradientPair(g, r), tx.init(g), g)
    without, _ = inner.update(g, inner.init(g))
    part = jax.tree.map(jnp.subtract, updates, without)
    assert optax.tree.norm(part) <= 0.5 * optax.tree.norm(without) * (1 + 1e-5)
    # Of elements, those in conflict have no part at all.
    least = 0.25 if scope == "element" else 0.4
    assert optax.tree.norm(part) >= least * optax.tree.norm(without)


def test_cautious_decay_asks_the_step_of_the_optimizer():
    """With momentum, the step may go where the last gradient does not."""
    params = {"w": jnp.array([2.0, 2.0])}
    tx = cautious(optax.sgd(1.0, momentum=0.9), 0.5, regularizer=l2())
    state = tx.init(params)
    for g, expected in [([1.0, -1.0], [-2.0, 1.0]), ([-0.5, 0.5], [-1.4, 0.4])]:
        updates, state = tx.update({"w": jnp.array(g)}, state, params)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
    assert conflict_metrics(state)["conflict"] == 0.5
    other = decoupled(optax.sgd(1.0), 0.5, regularizer=l2(), scope="element")
    updates, _ = other.update({"w": jnp.array(g)}, other.init(params), params)
    np.testing.assert_allclose(updates["w"], [0.5, -1.5], rtol=1e-6)


def test_masked_leaves_get_the_optimizer_alone():
    g, r = random_tree(0), random_tree(1)
    tx = decoupled(optax.adam(0.1), 1.0, mask={"kernel": True, "bias": False})
    updates, _ = tx.update(GradientPair(g, r), tx.init(g), g)
    alone, _ = optax.adam(0.1).update(g, optax.adam(0.1).init(g), g)
    chex.assert_trees_all_equal(updates["bias"], alone["bias"])
    assert np.any(updates["kernel"] != alone["kernel"])


def test_wrong_arguments_are_named():
    with pytest.raises(TypeError, match="optimizer"):
        decoupled("adam", 1.0)
    with pytest.raises(TypeError, match="regularizer"):
        decoupled(optax.sgd(0.1), 1.0, regularizer=lambda p: 0.0)
    with pytest.raises(TypeError, match="regularizer_optimizer"):
        decoupled(optax.sgd(0.1), 1.0, regularizer_optimizer=3.0)
    with pytest.raises(ValueError, match="`strength` must be at least 0"):
        decoupled(optax.sgd(0.1), -1.0)
    tx = decoupled(optax.sgd(0.1), 1.0, regularizer=l2())
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_harm_is_signed_and_ignores_what_has_no_gradient():
    g = {"a": jnp.array([1.0, -1.0]), "n": None}
    old = {"a": jnp.array([-1.0, 1.0]), "n": None}
    for change, harm in [([0.5, 0.0], 0.5), ([-0.5, 0.5], -1.0)]:
        new = {"a": old["a"] + jnp.array(change), "n": None}
        np.testing.assert_allclose(first_order_harm(g, new, old), harm)
    with pytest.raises(ValueError, match="`updates` must be a tree like `loss_grads`"):
        first_order_harm(g, {"b": old["a"]}, old)
