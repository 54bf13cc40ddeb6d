"""On eight devices: the results of one, and nothing of a gradient's size on the wire.

Meshes are explicit (shardings are part of types, and an operation that would need a
guess is an error) and auto (the compiler decides). Parameters are replicated, sharded
over all devices, or sharded over both axes of a 4x2 mesh.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dtnh_jax import (
    GradientPair,
    add_regularizer,
    dtnh,
    value_and_gradient_pair,
)
from dtnh_jax.regularizers import l2_sp

SHAPES = {"conv": (3, 3, 8, 16), "dense": {"kernel": (16, 8), "bias": (8,)}}
LEAVES, CHANNELS = 3, 16
LAYOUTS = {  # mesh, and for each parameter its axes over the mesh
    "replicated": ((8, 1), {"conv": P(), "dense": {"kernel": P(), "bias": P()}}),
    "fully sharded": (
        (8, 1),
        {
            "conv": P(None, None, "x", None),
            "dense": {"kernel": P("x", None), "bias": P("x")},
        },
    ),
    "4x2": (
        (4, 2),
        {
            "conv": P(None, None, "x", "y"),
            "dense": {"kernel": P("x", "y"), "bias": P("y")},
        },
    ),
}
each_kind = pytest.mark.parametrize(
    "kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"]
)
each_scopes = pytest.mark.parametrize(
    ("scopes", "largest"),  # and how many numbers may be summed over devices at once
    [(("global", "leaf"), LEAVES), (("unit", "element"), CHANNELS)],
    ids=["global,leaf", "unit,element"],
)


def tree(seed):
    keys = iter(jax.random.split(jax.random.key(seed), LEAVES))
    return jax.tree.map(
        lambda shape: jax.random.normal(next(keys), shape),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


PARAMS, G, R = tree(0), tree(1), tree(2)


def transformations(scopes, source):
    """Every scope, with every option that could gather something."""
    found = {
        scope: dtnh(2.0, scope=scope, ema_decay=0.9, max_ratio=0.5) for scope in scopes
    }
    pull = add_regularizer(l2_sp(source), 2.0, scope=scopes[0])
    return {**found, f"l2_sp, {scopes[0]}": pull}


def run_all(scopes, g, r, states, params):
    """One update of each transformation, in one computation to compile once."""
    results = {}
    for name, tx in transformations(scopes, r).items():
        updates = g if "l2_sp" in name else GradientPair(g, r)
        results[name] = tx.update(updates, states[name], params)
    return results


def initial_states(scopes, params, source):
    return {
        name: tx.init(params) for name, tx in transformations(scopes, source).items()
    }


@functools.cache
def on_one_device(scopes):
    states = initial_states(scopes, PARAMS, R)
    return jax.jit(run_all, static_argnums=0)(scopes, G, R, states, PARAMS)


def mesh_of(kind, layout):
    return jax.make_mesh(LAYOUTS[layout][0], ("x", "y"), axis_types=(kind, kind))


def put(values, mesh, layout):
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), LAYOUTS[layout][1])
    return jax.device_put(values, shardings)


def collectives(compiled):
    """Returns the kinds of the collectives in a program, with their results' shapes."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(rf"= (.*?) ({kinds}|collective-broadcast)(-start)?\(", line)
        if match:
            dimensions = re.findall(r"\w\d+\[([\d,]*)\]", match[1])
            shapes = [tuple(map(int, d.split(","))) if d else () for d in dimensions]
            assert shapes, line
            found.append((match[2], shapes))
    return found


def assert_same_shardings(values, expected):
    for value, like in zip(jax.tree.leaves(values), jax.tree.leaves(expected)):
        assert value.sharding.is_equivalent_to(like.sharding, value.ndim)


@each_scopes
def test_types_of_replicated_parameters_stay_replicated(scopes, largest):
    del largest
    mesh = mesh_of(AxisType.Explicit, "replicated")
    params, g, r = (put(values, mesh, "replicated") for values in (PARAMS, G, R))
    with jax.set_mesh(mesh):
        states = initial_states(scopes, params, r)
        results = jax.eval_shape(
            functools.partial(run_all, scopes), g, r, states, params
        )
    for updates, _ in results.values():
        for update in jax.tree.leaves(updates):
            assert update.sharding.is_fully_replicated


@each_kind
@each_scopes
@pytest.mark.parametrize("layout", ["fully sharded", "4x2"])
def test_updates_are_those_of_one_device_and_nothing_is_gathered(
    kind, layout, scopes, largest
):
    mesh = mesh_of(kind, layout)
    params, g, r = (put(values, mesh, layout) for values in (PARAMS, G, R))
    with jax.set_mesh(mesh):
        states = initial_states(scopes, params, r)
        step = jax.jit(run_all, static_argnums=0)
        compiled = step.lower(scopes, g, r, states, params).compile()
        # Nothing else runs while eight devices wait for each other on a few cores.
        results = jax.block_until_ready(compiled(g, r, states, params))
    for name, (updates, state) in results.items():
        expected, expected_state = on_one_device(scopes)[name]
        for got, wanted in zip(
            jax.tree.leaves((updates, state)),
            jax.tree.leaves((expected, expected_state)),
        ):
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5, err_msg=name)
        assert_same_shardings(updates, params)
        if state.ema is not None:
            assert_same_shardings(states[name].ema, params)
            assert_same_shardings(state.ema, params)
    found = collectives(compiled)
    assert found
    for kind_of_collective, shapes in found:
        assert kind_of_collective == "all-reduce"
        # Sums over a whole gradient or leaf; at unit scope over each output channel.
        assert all(math.prod(shape) <= largest for shape in shapes), shapes
        assert all(len(shape) <= 1 for shape in shapes), shapes


def objective(params, x, y):
    """A dense network whose batch may be sharded, and a penalty of its features."""
    features = jnp.tanh(x @ jnp.reshape(params["conv"], (-1, 16)))
    bias = jnp.reshape(params["dense"]["bias"], (1, -1))
    outputs = features @ params["dense"]["kernel"] + bias
    return jnp.mean((outputs - y) ** 2), jnp.mean(features**2)


def plain_step(params, x, y, tx=None):
    tx = optax.sgd(0.1) if tx is None else tx
    grads = jax.grad(lambda p: objective(p, x, y)[0])(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


def l2_sp_step(params, x, y):
    tx = optax.chain(add_regularizer(l2_sp(params), 0.1), optax.sgd(0.1))
    return plain_step(params, x, y, tx)


def pair_step(params, x, y):
    tx = optax.chain(dtnh(1.0), optax.sgd(0.1))
    _, pair = value_and_gradient_pair(objective)(params, x, y)
    updates, _ = tx.update(pair, tx.init(params), params)
    return optax.apply_updates(params, updates)


@each_kind
def test_a_data_parallel_step_communicates_gradients_and_nothing_else(kind):
    x = jax.random.normal(jax.random.key(3), (16, 72))
    y = jax.random.normal(jax.random.key(4), (16, 8))
    mesh = mesh_of(kind, "replicated")
    params = put(PARAMS, mesh, "replicated")
    batch = jax.device_put((x, y), NamedSharding(mesh, P("x")))
    reduced = {}
    for step in (plain_step, l2_sp_step, pair_step):
        with jax.set_mesh(mesh):
            compiled = jax.jit(step).lower(params, *batch).compile()
            got = compiled(params, *batch)
        expected = jax.jit(step)(PARAMS, x, y)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert_same_shardings(got, params)
        found = collectives(compiled)
        assert {kind_of_collective for kind_of_collective, _ in found} == {"all-reduce"}
        reduced[step] = sorted(shape for _, shapes in found for shape in shapes)
    assert reduced[l2_sp_step] == reduced[plain_step]
    # The regularizer is of the features, so it has a gradient of one parameter more.
    body = [shape for shape in reduced[plain_step] if math.prod(shape) == 72 * 16]
    assert sorted(reduced[plain_step] + body) == reduced[pair_step]


@pytest.mark.parametrize("scope", ["global", "leaf", "unit", "element"])
def test_a_device_may_resolve_gradients_of_its_own_in_shard_map(scope):
    """Such as an ensemble with a member on each device: all types are checked."""
    mesh = jax.make_mesh((8,), ("member",), axis_types=(AxisType.Auto,))
    tx = dtnh(0.5, scope=scope)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    keys = jax.random.split(jax.random.key(0), 8)
    g = jax.vmap(
        lambda k: jax.tree.map(lambda x: jax.random.normal(k, x.shape), params)
    )
    pairs = GradientPair(g(keys), jax.tree.map(lambda x: 0.1 - x, g(keys)))

    def update(pair):
        return tx.update(pair, tx.init(params), params)[0]

    def on_one_device(pairs):
        updates = update(jax.tree.map(lambda x: x[0], pairs))
        return jax.tree.map(lambda x: x[None], updates)

    members = P("member")
    sharded = jax.shard_map(
        on_one_device, mesh=mesh, in_specs=members, out_specs=members
    )
    for ours, theirs in zip(
        jax.tree.leaves(jax.jit(sharded)(pairs)),
        jax.tree.leaves(jax.jit(jax.vmap(update))(pairs)),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
