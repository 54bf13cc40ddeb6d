"""k micro-batches, averaged in float32 and resolved once, are one joined batch."""

from contextlib import nullcontext
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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
    update_one = jax.jit(inner.update)
    one = ours = params
    for _ in range(2):
        for micro in jnp.split(x, 4):
            _, pair = gradients(one, micro)
            updates, state = update(pair, state, ours)
            ours = optax.apply_updates(ours, updates)
        _, pair = gradients(one, x)
        updates, state_of_one = update_one(pair, state_of_one, one)
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
    _, pair = jax.jit(value_and_gradient_pair(objective))(params, x)
    for n in range(6):
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


def test_a_linesearch_inside_gets_nothing_that_it_does_not_know():
    """And all that it does: two equal micro-batches are one step of `inner`."""
    inner = optax.chain(dtnh(1.0), optax.lbfgs())
    params, tx = {"w": jnp.arange(4.0)}, accumulate_pairs(inner, every_k=2)
    value, g = jax.value_and_grad(loss := lambda p: jnp.sum((p["w"] - 1) ** 2))(params)
    pair = GradientPair(g, jax.tree.map(lambda x: 0.1 * x, params))
    more = {"value": value, "grad": g, "value_fn": loss}
    update = jax.jit(lambda pair, state: tx.update(pair, state, params, **more))
    _, state = update(pair, tx.init(params))
    updates, _ = update(pair, state)
    alone = jax.jit(lambda pair, state: inner.update(pair, state, params, **more))
    expected, _ = alone(pair, inner.init(params))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_half_precision_of_parameters_and_single_of_gradients():
    """States keep their dtypes, as in `optax.MultiSteps`: also in a scan."""
    params, g = {"w": jnp.ones(3, jnp.bfloat16)}, {"w": jnp.array([1.0, -2.0, 3.0])}
    adam = optax.adam(0.1)
    tx = accumulate_pairs(optax.chain(dtnh(0.0), adam), every_k=2)

    def body(state, factor):
        pair = GradientPair(jax.tree.map(lambda x: factor * x, g), g)
        updates, state = tx.update(pair, state, params)
        return state, updates["w"]

    factors = jnp.array([0.0, 2.0, 1.0, 5.0])  # their means are 1 and 3
    state, updates = jax.lax.scan(body, tx.init(params), factors)
    chex.assert_trees_all_equal_dtypes(state, tx.init(params))
    moments = adam.init(params)
    for number, mean in ((1, 1.0), (3, 3.0)):
        np.testing.assert_array_equal(updates[number - 1], 0)
        g_of_both = jax.tree.map(lambda x, by=mean: by * x, g)
        expected, new = adam.update(g_of_both, moments, params)
        np.testing.assert_allclose(updates[number], expected["w"], rtol=2e-3)
        moments = jax.tree.map(lambda x, y: x.astype(y.dtype), new, moments)


DEVICES = 4
SPLIT = {"w": P("x"), "b": P()}
VALUES = {"w": np.linspace(-1, 2, 8, dtype=np.float32), "b": np.ones(3, np.float32)}


def four_updates(tx, params, grads, update=None):
    """Of two steps of two micro-batches each, the second of them twice as far."""
    state, found = tx.init(params), []
    for factor in (1.0, 2.0, 2.0, 4.0):
        g = jax.tree.map(lambda x, by=factor: by * x, grads)
        pair = GradientPair(g, jax.tree.map(lambda x: 1 - x, g))
        updates, state = (update or tx.update)(pair, state, params)
        found.append(updates)
    return found


def inner_with_adam(**options):
    return optax.chain(dtnh(1.0, ema_decay=0.9, **options), optax.adam(0.1))


@pytest.mark.parametrize(
    ("of_params", "is_set"),
    [(P("x"), True), (P(), False)],
    ids=["sharded", "replicated, no set_mesh"],
)
def test_on_an_explicit_mesh(of_params, is_set):
    """Types of both branches have shardings there, of parameters or of gradients."""
    mesh = jax.make_mesh(
        (DEVICES,), ("x",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4]
    )
    tx = accumulate_pairs(inner_with_adam(), every_k=2)
    expected = four_updates(tx, VALUES, VALUES, jax.jit(tx.update))

    def put(spec):
        specs = {"w": spec, "b": P()}
        return jax.device_put(VALUES, jax.tree.map(partial(NamedSharding, mesh), specs))

    with jax.set_mesh(mesh) if is_set else nullcontext():
        update = jax.jit(tx.update)
        found = four_updates(tx, put(of_params), put(P("x")), update)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    assert found[-1]["w"].sharding.spec == P("x")


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_shard_map_over_cut_parameters(check_vma):
    mesh = jax.make_mesh(
        (DEVICES,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    # Without types, what all devices hold alike would count once for each.
    mask = {"w": True, "b": check_vma}
    tx = accumulate_pairs(inner_with_adam(mask=mask), every_k=2)
    cut = accumulate_pairs(inner_with_adam(mask=mask, axis_name="x"), every_k=2)
    found = jax.shard_map(
        lambda values: four_updates(cut, values, values),
        mesh=mesh, in_specs=(SPLIT,), out_specs=[SPLIT] * 4, check_vma=check_vma,
    )  # fmt: skip
    expected = four_updates(tx, VALUES, VALUES, jax.jit(tx.update))
    chex.assert_trees_all_close(jax.jit(found)(VALUES), expected, rtol=1e-5)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`every_k` must be at least 1, got 0"):
        accumulate_pairs(dtnh(1.0), 0)
    with pytest.raises(TypeError, match="every_k"):
        accumulate_pairs(dtnh(1.0), 2.5)
    with pytest.raises(TypeError, match="inner"):
        accumulate_pairs("dtnh", 2)
