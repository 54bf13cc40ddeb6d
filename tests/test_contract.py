"""What every Optax transformation owes its users: one table, one contract.

A new transformation or option is a new row here. New rules are found by themselves.
"""

from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest

from dtnh_jax import (
    accumulate_pairs,
    add_regularizer,
    cautious,
    conflict_metrics,
    decoupled,
    dtnh,
    never_hurt,
    resolve_conflicts,
    rules,
)
from dtnh_jax.regularizers import l2, l2_sp


def tree(seed, dtype=jnp.float32):
    random = np.random.default_rng(seed)
    return {
        "body": {"kernel": jnp.asarray(random.standard_normal((3, 4)), dtype)},
        "scale": jnp.asarray(random.standard_normal(), dtype),
    }


LABELS = {"body": "body", "scale": "head"}
RULES = [name for name in rules.__all__ if name not in ("Gram", "Rule")]

# Name: a factory of one argument, the strength.
FACTORIES = {
    "dtnh": dtnh,
    "leaf": partial(dtnh, scope="leaf", max_ratio=0.5),
    "unit": partial(dtnh, scope="unit", max_ratio=0.5),
    "element": partial(dtnh, scope="element", max_ratio=0.5, ema_decay=0.9),
    "labels": partial(dtnh, scope=LABELS, ema_decay=0.9),
    "mask": partial(dtnh, mask={"body": True, "scale": False}, ema_decay=0.9),
    "add_regularizer": lambda strength: add_regularizer(
        l2_sp(tree(9)), strength, scope="leaf", ema_decay=0.5, max_ratio=1.0
    ),
    "self-anchored": lambda strength: add_regularizer(l2_sp(), strength),
    "cautious": partial(cautious, optax.sgd(0.1, momentum=0.9)),
    "decoupled": partial(decoupled, optax.adamw(1e-2)),
    "decoupled regularizer": partial(
        decoupled,
        optax.sgd(0.1, momentum=0.9),
        regularizer=l2(),
        regularizer_optimizer=optax.adam(1e-2),
        max_ratio=1.0,
        scope="leaf",
    ),
    "never_hurt": never_hurt,
    "never_hurt regularizer": lambda strength: never_hurt(
        strength, regularizer=l2(), trust=0.5
    ),
    "accumulate": lambda strength: accumulate_pairs(dtnh(strength), every_k=2),
}
each_name = pytest.mark.parametrize("name", FACTORIES)


PAIR = tree(1), tree(51)  # gradients, which programs take as arguments


def run(tx, state, params, pair=PAIR, **extra):
    g, r = jax.tree.map(lambda x, p: x.astype(p.dtype), pair, (params, params))
    return tx.update(g, state, params, regularizer_grads=r, **extra)


def compiled(tx):
    return jax.jit(partial(run, tx))


@cache
def jitted(name):
    """A transformation and its update, compiled once for all tests that use it."""
    tx = FACTORIES[name](0.5)
    return tx, compiled(tx)


@cache
def expected(name):
    """The first update and state."""
    tx, step = jitted(name)
    return step(tx.init(tree(0)), tree(0), PAIR)


def same(a, b, **tolerance):
    chex.assert_trees_all_close(a, b, **({"rtol": 1e-4, "atol": 1e-6} | tolerance))


@each_name
def test_jitted_or_not_and_whatever_else_is_given(name):
    tx = FACTORIES[name](0.5)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    same(run(tx, tx.init(tree(0)), tree(0), value=1.0), expected(name))


def primitives(jaxpr):
    """Names of all operations of a program, those of inner programs included."""
    found = []
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found.append(equation.primitive.name)
        for inner in programs.inner(equation.params):
            found += primitives(inner)
    return found


@each_name
def test_an_update_is_a_straight_line(name):
    tx, params = FACTORIES[name](0.5), tree(0)
    found = primitives(jax.make_jaxpr(partial(run, tx))(tx.init(params), params))
    branches = [x for x in found if x in ("scan", "while", "cond")]
    assert branches == (["cond"] if name == "accumulate" else [])
    assert not [x for x in found if "callback" in x]


@each_name
def test_shapes_of_the_parameters_are_enough_for_init(name):
    tx = FACTORIES[name](0.5)
    shapes = jax.eval_shape(lambda: tree(0))
    state = jax.eval_shape(tx.init, shapes)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(tree(0)))
    if name != "self-anchored":  # anchors are values
        chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(shapes), state)


# The others have Adam inside, which needs promotion itself.
@pytest.mark.parametrize("name", [n for n in FACTORIES if "decoupled" not in n])
def test_strict_promotion_of_types_is_enough(name):
    with jax.numpy_dtype_promotion("strict"):
        tx, params = FACTORIES[name](0.5), tree(0, jnp.bfloat16)
        updates, _ = jax.eval_shape(partial(run, tx), tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)


@each_name
def test_the_second_call_does_not_compile_again(name):
    tx, step = jitted(name)
    state, params = tx.init(tree(0)), tree(0)
    step(state, params, PAIR)
    before = step._cache_size()
    for _ in range(3):
        updates, state = step(state, params, PAIR)
        params = optax.apply_updates(params, updates)
    assert step._cache_size() == before


@each_name
def test_states_may_be_donated_and_seeds_be_a_batch_on_any_device(name):
    """The strength is a schedule here, which is to change nothing."""
    tx, params = FACTORIES[name](optax.constant_schedule(0.5)), tree(0)
    states = jax.vmap(lambda _: tx.init(params))(jnp.arange(2))
    states, params = jax.device_put((states, params), jax.devices()[1])
    batch = jax.vmap(partial(run, tx), in_axes=(0, None, None))
    step = jax.jit(batch, donate_argnums=0)
    updates, state = step(states, params, PAIR)
    for n in range(2):
        same(jax.tree.map(lambda x, n=n: x[n], (updates, state)), expected(name))
    step(state, params, PAIR)  # the new state may be donated in turn


@each_name
def test_scan_and_cond_keep_the_tree_in_half_precision_too(name):
    tx, params = FACTORIES[name](0.5), tree(0, jnp.bfloat16)

    def body(carry, seed):
        state, params = carry
        grads = jax.tree.map(lambda x: x * seed.astype(x.dtype), tree(1, jnp.bfloat16))
        rs = tree(2, jnp.bfloat16)
        updates, new = tx.update(grads, state, params, regularizer_grads=rs)
        state = jax.lax.cond(seed < 2, lambda: new, lambda: state)
        return (state, optax.apply_updates(params, updates)), updates

    (state, moved), updates = jax.lax.scan(
        body, (tx.init(params), params), jnp.arange(3.0)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    chex.assert_trees_all_equal_dtypes(updates, moved, params)
    chex.assert_tree_all_finite(moved)


@each_name
def test_map_params_finds_what_is_like_the_parameters(name):
    tx, params = FACTORIES[name](0.5), tree(0)
    state = tx.init(params)
    kept = optax.tree.map_params(tx, lambda x: x, state)
    chex.assert_trees_all_equal(kept, state)
    marked = optax.tree.map_params(
        tx, lambda _: "param", state, transform_non_params=lambda _: None
    )
    found = sum(leaf == "param" for leaf in jax.tree.leaves(marked))
    kept_of_each = {"mask": 1}  # a frozen leaf has no moving average
    assert found % kept_of_each.get(name, len(jax.tree.leaves(params))) == 0


@each_name
def test_under_apply_if_finite(name):
    params = tree(0)
    tx = optax.apply_if_finite(FACTORIES[name](0.5), 3)
    step = compiled(tx)
    updates, state = step(tx.init(params), params, PAIR)
    same(updates, expected(name)[0])
    bad = jax.tree.map(lambda x: x * jnp.nan, tree(1))
    updates, state = step(state, params, (bad, tree(2)))
    assert state.notfinite_count == 1
    assert all(np.all(u == 0) for u in jax.tree.leaves(updates))


@each_name
def test_masked_and_partitioned(name):
    factory, params = FACTORIES[name], tree(0)
    if name in ("accumulate", "self-anchored"):  # kept pairs, and a pull of zero
        return
    masked = optax.masked(factory(0.5), {"body": True, "scale": False})
    parts = optax.partition({"body": factory(0.5), "head": optax.sgd(0.1)}, LABELS)

    @jax.jit
    def both(states, params, pair):
        return [run(tx, s, params, pair) for tx, s in zip((masked, parts), states)]

    states = [tx.init(params) for tx in (masked, parts)]
    for pair in ((tree(2), tree(52)), PAIR):
        (of_masked, left), (of_parts, state) = both(states, params, pair)
        states = [left, state]
    np.testing.assert_array_equal(of_masked["scale"], tree(1)["scale"])
    np.testing.assert_allclose(of_parts["scale"], -0.1 * tree(1)["scale"], rtol=1e-6)
    same(of_masked["body"], of_parts["body"])
    is_moved = np.any(of_parts["body"]["kernel"] != tree(1)["body"]["kernel"])
    assert is_moved == (conflict_metrics(state)["removed"] < 1)


@pytest.mark.parametrize("scope", ["leaf", "element"])
def test_every_rule_in_groups_and_by_element(scope):
    params = tree(0)
    txs = {
        name: resolve_conflicts(getattr(rules, name), 0.5, scope=scope)
        for name in RULES
    }

    @jax.jit  # all rules at once, to compile once
    def step(states, params, pair):
        return {name: run(tx, states[name], params, pair) for name, tx in txs.items()}

    states = {name: tx.init(params) for name, tx in txs.items()}
    for updates, state in step(states, params, PAIR).values():
        chex.assert_tree_all_finite((updates, state))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize(
    ("factory", "arguments", "static"),
    [
        (dtnh, {}, ()),
        (dtnh, {"ema_decay": 0.9, "max_ratio": 0.5, "scope": "leaf"}, ()),
        (dtnh, {"mask": {"body": True, "scale": False}, "scope": LABELS}, ()),
        (resolve_conflicts, {"rule": rules.gate}, ("rule",)),
        (add_regularizer, {"regularizer": l2()}, ()),
        (decoupled, {"optimizer": optax.adam(1e-2)}, ()),
        (decoupled, {"optimizer": optax.adam(1e-2), "regularizer": l2()}, ()),
    ],
)
def test_hyperparameters_can_be_injected(factory, arguments, static):
    params = tree(0)
    schedule = optax.linear_schedule(0.25, 1.0, 3)
    for strength in (0.25, schedule) if factory is dtnh and not arguments else (0.25,):
        plain = factory(strength=strength, **arguments)
        injected = optax.inject_hyperparams(factory, static_args=static)(
            strength=strength, **arguments
        )
        states = plain.init(params), injected.init(params)
        step, step_plain = compiled(injected), compiled(plain)
        for _ in range(2):
            wanted, plain_state = step_plain(states[0], params, PAIR)
            updates, injected_state = step(states[1], params, PAIR)
            same(updates, wanted)
            states = plain_state, injected_state
        assert "strength" in states[1].hyperparams


def test_decays_that_half_precision_has_rounded_to_one():
    """Injected hyperparameters have the dtype of the parameters, and 0.999 is 1 there.

    Their value cannot be seen under jit: the largest decay below 1 stands in for it.
    """
    params = jnp.ones(3, jnp.bfloat16)
    g, r = jnp.array([1.0, 2.0, 0.0]), jnp.array([-1.0, 0.0, 1.0])
    rounded = optax.inject_hyperparams(dtnh)(strength=1.0, ema_decay=0.999)
    with pytest.raises(ValueError, match=r"got 1.*pass `hyperparam_dtype"):
        rounded.init(params)
    with pytest.warns(UserWarning, match=r"`ema_decay` .* at most 0.9961.*float32"):
        found = average(rounded, params, g, r)
    exact = optax.inject_hyperparams(dtnh, hyperparam_dtype=jnp.float32)
    for injected, is_near in ((0.99609375, True), (0.999, False)):
        tx = exact(strength=1.0, ema_decay=injected)
        wanted = average(tx, params, g, r)
        assert np.allclose(found, wanted, rtol=1e-5) == is_near


def average(tx, params, g, r):
    """The moving average of three gradients, or of their squares."""
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for factor in (1.0, -3.0, 2.0):
        updates, state = update(factor * g, state, params, regularizer_grads=r)
    assert np.isfinite(updates).all()
    assert conflict_metrics(state)["skipped"] == 0
    inner = state.inner_state
    return inner.ema if hasattr(inner, "ema") else inner.mean_square


def test_multi_steps_takes_what_takes_plain_gradients():
    params = tree(0)
    tx = optax.MultiSteps(add_regularizer(l2(), 0.5), every_k_schedule=2)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(tree(1), state, params)
    alone = add_regularizer(l2(), 0.5)
    wanted, _ = alone.update(tree(1), alone.init(params), params)
    same(updates, wanted)
    assert "cosine" in conflict_metrics(state)
