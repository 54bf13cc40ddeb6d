"""Loops that are nobody's framework, and what any loop may do with a train step."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import programs
import pytest
from jax import export

from dtnh_jax import (
    GradientPair,
    add_regularizer,
    conflict_metrics,
    dtnh,
    linen,
    value_and_gradient_pair,
)
from dtnh_jax.regularizers import feature_map, l2_sp, logit_distillation

X = jax.random.normal(jax.random.key(0), (8, 4))
Y = jnp.arange(8) % 3


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def mlp(layers, x):
    """Returns the outputs and the features of a network of two dense layers."""
    (w1, b1), (w2, b2) = layers
    hidden = jnp.tanh(x @ w1 + b1[None, :])
    return hidden @ w2 + b2[None, :], hidden


def dense_weights(key):
    keys = jax.random.split(key)
    return [
        (jax.random.normal(keys[0], (4, 6)), jnp.zeros(6)),
        (jax.random.normal(keys[1], (6, 3)), jnp.zeros(3)),
    ]


def as_bare_dict(layers):
    names = ("w1", "b1", "w2", "b2")
    return dict(zip(names, jax.tree.leaves(layers)))


def of_bare_dict(params, x):
    pairs = [(params["w1"], params["b1"]), (params["w2"], params["b2"])]
    return mlp(pairs, x)


def as_haiku(layers):
    return {f"mlp/~/linear_{i}": {"w": w, "b": b} for i, (w, b) in enumerate(layers)}


def of_haiku(params, x):
    return mlp([(layer["w"], layer["b"]) for _, layer in sorted(params.items())], x)


class Equinox(eqx.Module):
    layers: list
    name: str = eqx.field(static=True, default="mlp")

    def __call__(self, x):
        return mlp(self.layers, x)


def train(params, run, tx, steps=5):
    """A plain Optax loop: nothing in it knows what the parameters are."""
    _, target = run(params, X)

    def objective(params):
        logits, features = run(params, X)
        return cross_entropy(logits, Y), feature_map([features], [target])

    @jax.jit
    def step(params, state):
        values, pair = value_and_gradient_pair(objective)(params)
        updates, state = tx.update(pair, state, params)
        return optax.apply_updates(params, updates), state, values

    state, history = tx.init(params), []
    for _ in range(steps):
        params, state, values = step(params, state)
        history.append(values)
    return params, np.array(history)


@functools.cache
def history_of_a_list():
    tx = optax.chain(dtnh(1.0), optax.adam(0.05))
    return train(dense_weights(jax.random.key(1)), mlp, tx)[1]


@pytest.mark.parametrize(
    ("build", "run"),
    [
        (as_bare_dict, of_bare_dict),
        (as_haiku, of_haiku),
        (Equinox, lambda model, x: model(x)),
    ],
    ids=["bare dict", "haiku", "equinox"],
)
def test_parameters_of_any_kind_train_alike(build, run):
    tx = optax.chain(dtnh(1.0), optax.adam(0.05))
    layers = dense_weights(jax.random.key(1))
    params, history = train(build(layers), run, tx)
    np.testing.assert_allclose(history, history_of_a_list(), rtol=1e-3, atol=1e-6)
    assert jax.tree.structure(params) == jax.tree.structure(build(layers))
    assert history[-1, 0] < history[0, 0]


def test_equinox_partitions_a_model_with_functions_in_it():
    model = eqx.nn.MLP(4, 3, 6, depth=1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    pull = add_regularizer(l2_sp(params), 0.1, scope="leaf")
    tx = optax.chain(dtnh(1.0), pull, optax.sgd(0.1))

    @eqx.filter_jit
    def step(params, state):
        def objective(params):
            logits = jax.vmap(eqx.combine(params, static))(X)
            return cross_entropy(logits, Y), jnp.mean(logits**2)

        values, pair = value_and_gradient_pair(objective)(params)
        updates, state = tx.update(pair, state, params)
        return eqx.apply_updates(params, updates), state, values

    state = tx.init(params)
    params, state, (before, _) = step(params, state)
    _, _, (after, _) = step(params, state)
    assert after < before


@pytest.mark.parametrize("scope", ["global", "leaf", "unit", "element"])
def test_a_head_that_the_regularizer_does_not_reach(scope):
    """Its gradient is zero at compile time, which is no reason to drop the others."""
    params = as_bare_dict(dense_weights(jax.random.key(1)))
    tx = dtnh(1.0, scope=scope)

    def objective(params):
        logits, hidden = of_bare_dict(params, X)
        return cross_entropy(logits, Y), jnp.mean(hidden**2)

    @jax.jit
    def update(params):
        _, pair = value_and_gradient_pair(objective)(params)
        return pair, *tx.update(pair, tx.init(params), params)

    pair, updates, state = update(params)
    metrics = conflict_metrics(state)
    assert metrics["skipped"] == 0
    assert metrics["regularizer_norm"] > 0
    if scope != "global":
        chex.assert_trees_all_equal(updates["w2"], pair.loss["w2"])
    assert not np.allclose(updates["w1"], pair.loss["w1"])


class Network(nn.Module):
    """Has all that a train step has to look after."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.tanh(nn.Dense(6, name="body")(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(3, name="head")(x)


MODEL = Network()
SOURCE = MODEL.init(jax.random.key(3), X, train=False)
BATCH = {"x": X, "y": Y}
KEY = jax.random.key(4)


STEP = linen.train_step(
    MODEL,
    forward=lambda network, batch, train: network(batch["x"], train),
    loss=lambda logits, batch: cross_entropy(logits, batch["y"]),
    regularizer=lambda student, teacher, batch: logit_distillation(
        student.output, teacher.output
    ),
)
DONATING_STEP = jax.jit(STEP, donate_argnums=0)
TX = optax.chain(dtnh(1.0, ema_decay=0.9), optax.adamw(0.05))


def linen_state():
    params = MODEL.init(jax.random.key(5), X, train=False)["params"]
    state = linen.TrainState.create(
        apply_fn=MODEL.apply, tx=TX, params=params, batch_stats=SOURCE["batch_stats"]
    )
    return jax.tree.map(jnp.array, state)  # a copy, since steps donate it


def test_a_restored_state_continues_bit_by_bit(tmp_path):
    state = linen_state()
    for _ in range(3):
        state, _ = DONATING_STEP(state, BATCH, KEY, SOURCE)
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", abstract)
    assert restored.opt_state[0].ema is not None
    for _ in range(3):
        state, metrics = DONATING_STEP(state, BATCH, KEY, SOURCE)
        restored, restored_metrics = DONATING_STEP(restored, BATCH, KEY, SOURCE)
        chex.assert_trees_all_equal(restored_metrics, metrics)
    chex.assert_trees_all_equal(restored, state)


def test_seeds_train_side_by_side():
    def train(seed):
        tx = optax.chain(dtnh(1.0, scope="leaf"), optax.sgd(0.1))
        params = dense_weights(jax.random.key(seed))

        def body(carry, _):
            params, state = carry

            def objective(params):
                logits, hidden = mlp(params, X)
                return cross_entropy(logits, Y), jnp.mean(hidden**2)

            values, pair = value_and_gradient_pair(objective)(params)
            updates, state = tx.update(pair, state, params)
            return (optax.apply_updates(params, updates), state), values

        return jax.lax.scan(body, (params, tx.init(params)), length=4)

    seeds = jnp.arange(3)
    together = jax.jit(jax.vmap(train))(seeds)
    alone = [jax.jit(train)(seed) for seed in seeds]
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close(together, expected, rtol=1e-4, atol=1e-5)


def test_a_donated_state_is_used_up_and_the_teacher_is_not():
    state = linen_state()
    new, _ = DONATING_STEP(state, BATCH, KEY, SOURCE)
    new, _ = DONATING_STEP(new, BATCH, KEY, SOURCE)
    leaves = jax.tree.leaves((state.params, state.batch_stats))
    assert all(leaf.is_deleted() for leaf in leaves)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(SOURCE))
    chex.assert_tree_all_finite(new.params)


def primitives(jaxpr):
    """The names of all primitives in a jaxpr, those of inner ones included."""
    names = set()
    for equation in jaxpr.eqns:
        names.add(equation.primitive.name)
        for inner in programs.inner(equation.params):
            names |= primitives(inner)
    return names


@pytest.mark.parametrize("scope", ["global", "leaf", "unit", "element"])
def test_no_update_calls_back_to_the_host(scope):
    params = as_haiku(dense_weights(jax.random.key(0)))
    pull = add_regularizer(
        l2_sp(params), optax.linear_schedule(0.0, 1.0, 5), scope=scope, max_ratio=0.5
    )
    tx = optax.chain(dtnh(1.0, scope=scope, ema_decay=0.9), pull)
    pair = GradientPair(params, jax.tree.map(jnp.cos, params))
    jaxpr = jax.make_jaxpr(tx.update)(pair, tx.init(params), params).jaxpr
    names = primitives(jaxpr)
    assert "reduce_sum" in names
    assert not [name for name in names if "callback" in name or "feed" in name]


def test_a_train_step_exports_for_every_platform():
    """What is built on a laptop runs on an accelerator, from its serialized bytes."""
    state = linen_state()
    leaves, structure = jax.tree.flatten(state)  # a state holds functions, bytes do not

    def flat_step(leaves, batch, key_data, teacher):
        key = jax.random.wrap_key_data(key_data)
        state, metrics = STEP(structure.unflatten(leaves), batch, key, teacher)
        return jax.tree.leaves(state), metrics

    args = leaves, BATCH, jax.random.key_data(KEY), SOURCE
    exported = export.export(jax.jit(flat_step), platforms=("cpu", "cuda", "tpu"))(
        *args
    )
    loaded = export.deserialize(bytearray(exported.serialize()))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    assert "callback" not in loaded.mlir_module()
    got, metrics = loaded.call(*args)
    expected, expected_metrics = DONATING_STEP(state, BATCH, KEY, SOURCE)
    expected = jax.tree.leaves(expected)
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-5)
