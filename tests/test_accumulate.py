"""k micro-batches, averaged in float32 and resolved once, are one joined batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dtnh_jax import (
    GradientPair,
    accumulate_pairs,
    conflict_metrics,
    decoupled,
    dtnh,
    value_and_gradient_pair,
)


def objective(params, x):
    features = jnp.tanh(x @ params["body"])
    outputs = features @ params["head"]
    return jnp.mean((outputs - 1) ** 2), 0.1 * jnp.mean((features + 1) ** 2)


def setting():
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "body": jax.random.normal(keys[0], (3, 4)),
        "head": jax.random.normal(keys[1], (4, 2)),
    }
    return params, jax.random.normal(keys[2], (8, 3))


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(dtnh(3.0, scope="leaf"), optax.adam(0.1)),
        decoupled(optax.adam(0.1), 0.3, scope="element"),
    ],
    ids=["dtnh", "decoupled"],
)
def test_it_is_one_step_on_the_joined_batch(inner):
    params, x = setting()
    gradients = jax.jit(value_and_gradient_pair(objective))
    tx = accumulate_pairs(inner, every_k=4)
    state, state_of_one = tx.init(params), inner.init(params)
    chex.clear_trace_counter()  # it counts by name
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    one = ours = params
    for _ in range(2):
        for micro in jnp.split(x, 4):
            _, pair = gradients(one, micro)
            updates, state = update(pair, state, ours)
            ours = optax.apply_updates(ours, updates)
        _, pair = gradients(one, x)
        updates, state_of_one = inner.update(pair, state_of_one, one)
        one = optax.apply_updates(one, updates)
        chex.assert_trees_all_close(ours, one, rtol=1e-4, atol=1e-5)
    metrics = conflict_metrics(state)
    chex.assert_trees_all_close(
        metrics, conflict_metrics(state_of_one), rtol=1e-3, atol=1e-6
    )


def test_in_between_nothing_moves():
    params, x = setting()
    tx = accumulate_pairs(dtnh(1.0), every_k=3)
    state = tx.init(params)
    for n in range(6):
        _, pair = value_and_gradient_pair(objective)(params, x)
        updates, state = tx.update(pair.loss, state, params,
                                   regularizer_grads=pair.regularizer)  # fmt: skip
        moved = any(bool(jnp.any(u != 0)) for u in jax.tree.leaves(updates))
        assert moved == (n % 3 == 2)


def test_half_precision_is_summed_in_single():
    g = jnp.array([1.0], jnp.bfloat16)
    tx = accumulate_pairs(dtnh(0.0), every_k=512)

    def body(state, _):
        updates, state = tx.update(GradientPair(g, g), state, g)
        return state, updates

    _, updates = jax.lax.scan(body, tx.init(g), length=512)
    # A sum in bfloat16 would stall at 256.
    assert updates.dtype == jnp.bfloat16
    assert updates[-1, 0] == 1


def test_missing_leaves_and_several_regularizers():
    g = {"a": jnp.ones(2), "frozen": None}
    rs = {"x": {"a": jnp.ones(2), "frozen": None}, "y": {"a": None, "frozen": None}}
    tx = accumulate_pairs(dtnh({"x": 1.0, "y": 1.0}), every_k=2)
    state = tx.init({"a": jnp.zeros(2), "frozen": jnp.zeros(3)})
    for _ in range(2):
        updates, state = tx.update(GradientPair(g, rs), state)
    np.testing.assert_array_equal(updates["a"], [2.0, 2.0])
    assert updates["frozen"] is None


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`every_k` must be at least 1, got 0"):
        accumulate_pairs(dtnh(1.0), 0)
    with pytest.raises(TypeError, match="every_k"):
        accumulate_pairs(dtnh(1.0), 2.5)
    with pytest.raises(TypeError, match="inner"):
        accumulate_pairs("dtnh", 2)
