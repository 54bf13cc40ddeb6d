"""Loops mapped over devices, in which each holds a part of the parameters.

Eight devices (a 4x2 mesh), each leaf cut in another way: what comes out is what one
device makes of the whole, and the collectives are counted.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import programs
import pytest
from jax.sharding import PartitionSpec as P

from dtnh_jax import (
    GradientPair,
    _axes,
    add_regularizer,
    conflict_metrics,
    decoupled,
    dtnh,
    never_hurt,
    value_and_gradient_pair,
)
from dtnh_jax.regularizers import l2_sp

AXES = ("x", "y")
MESH = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2)
# Cut along both axes, along either, and not at all: that one is to count once. Last
# axes are cut or whole leaves kept together, so that units are whole.
SPECS = {"both": P(None, AXES), "x": P("x"), "y": P(None, "y"), "none": P()}
SHAPES = {"both": (2, 16), "x": (8,), "y": (3, 4), "none": (5,)}


def tree(seed):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items())}


def opposed(seed):
    """In conflict with `tree(seed)` as a whole and in most places."""
    return jax.tree.map(lambda x, noise: noise - x, tree(seed), tree(seed + 50))


PARAMS = tree(0)
LABELS = {"both": "a", "x": "b", "y": "a", "none": "b"}
# Name: a factory of one argument, the axis; how many sums over devices it takes.
FACTORIES = {
    "several": (functools.partial(dtnh, {"one": 0.5, "other": 2.0}), 2),
    "leaf": (functools.partial(dtnh, 1.0, scope="leaf", max_ratio=0.3), 1),
    "labels": (functools.partial(dtnh, 1.0, scope=LABELS, ema_decay=0.9), 1),
    "element": (functools.partial(dtnh, 1.0, scope="element", max_ratio=0.3), 1),
    "unit": (functools.partial(dtnh, 1.0, scope="unit", max_ratio=0.3), 1),
    "decoupled": (
        functools.partial(decoupled, optax.adamw(0.1), 9.0, max_ratio=1.0),
        2,
    ),
    "never_hurt": (functools.partial(never_hurt, 3.0), 1),
}
each_name = pytest.mark.parametrize("name", FACTORIES)


# Compiled programs are small and run once or twice.
QUICK = {"xla_backend_optimization_level": 0}


def gradients(name):
    """Those of two steps, stacked."""
    steps = []
    for seed in (1, 5):
        regularizer = opposed(seed)
        if name == "several":
            regularizer = {"one": regularizer, "other": tree(seed + 1)}
        steps.append(GradientPair(tree(seed), regularizer))
    return jax.tree.map(lambda *xs: jnp.stack(xs), *steps)


def updates_of(factory, axis_name, state, pairs, params):
    """Two updates, so that there is a moving average: them, and the last state."""
    tx = factory(axis_name=axis_name)

    def step(state, pair):
        return tx.update(pair, state, params)[::-1]

    return jax.lax.scan(step, state, pairs)[::-1]


def specs_of(tree, stacked=False):
    """How any tree is cut: by the names of its leaves, which parameters are part of."""

    def of_leaf(path, _):
        names = [getattr(key, "key", None) for key in path]
        cut = [SPECS[name] for name in names if name in SPECS]
        return P(None, *cut[0]) if cut and stacked else cut[0] if cut else P()

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def mapped(factory, state, pairs, **options):
    """`updates_of` of parts of the parameters, with its results put together."""
    of_state, of_pairs = specs_of(state), specs_of(pairs, stacked=True)
    return jax.shard_map(
        functools.partial(updates_of, factory, AXES),
        mesh=MESH,
        in_specs=(of_state, of_pairs, SPECS),
        out_specs=(of_pairs.loss, of_state),
        **options,
    )


@each_name
def test_parts_are_resolved_like_the_whole_and_measured_with_so_many_sums(name):
    factory, sums = FACTORIES[name]
    pairs, state = gradients(name), factory().init(PARAMS)
    run = jax.jit(mapped(factory, state, pairs))
    traced = run.trace(state, pairs, PARAMS)
    assert count_sums(traced.jaxpr) == sums
    compiled = traced.lower().compile(compiler_options=QUICK)
    collectives = re.findall(r" ([\w-]+)\(.*channel_id", compiled.as_text())
    assert set(collectives) == {"all-reduce"}
    assert len(collectives) <= sums  # the compiler may join those of two regularizers
    whole = jax.jit(updates_of, static_argnums=(0, 1), compiler_options=QUICK)
    wanted = whole(factory, None, state, pairs, PARAMS)
    got = compiled(state, pairs, PARAMS)
    chex.assert_trees_all_close(got, wanted, rtol=1e-4, atol=1e-5)
    seen = jax.tree.leaves(conflict_metrics(got[1]))
    assert len({round(float(value), 3) for value in seen}) > 3


def count_sums(jaxpr):
    """How many collectives there are in a program, and in all that it calls."""
    kinds = ("psum", "psum_invariant", "pmax", "pmin", "all_gather", "all_to_all")
    found = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        found += equation.primitive.name in kinds
        for inner in programs.inner(equation.params):
            found += count_sums(inner)
    return found


def cut(values):
    """Cuts each leaf into four parts, the leading axis of what is returned."""
    return jax.tree.map(lambda x: jnp.reshape(x, (4, -1, *x.shape[1:])), values)


WHOLE = {"w": jnp.arange(24.0).reshape(8, 3) - 9, "b": jnp.linspace(1.0, 2.0, 4)}
G = jax.tree.map(jnp.cos, WHOLE)
R = jax.tree.map(lambda x: jnp.sin(3 * x) - 2 * jnp.cos(x), WHOLE)


@pytest.mark.parametrize("size", [1.0, 1e-15], ids=["usual", "small"])
def test_parts_in_vmap(size):
    """As in `jax.pmap`."""
    pair = jax.tree.map(lambda x: x * size, GradientPair(G, R))

    def update(axis_name, pair):
        tx = dtnh(1.0, axis_name=axis_name)
        updates, state = tx.update(pair, tx.init(pair.loss))
        return updates, conflict_metrics(state)

    mapped_update = jax.vmap(functools.partial(update, "part"), axis_name="part")
    parts = jax.jit(mapped_update)(cut(pair))
    updates, metrics = jax.jit(functools.partial(update, None))(pair)
    scaled = jax.tree.map(lambda x: x / size, (cut(updates), parts[0]))
    chex.assert_trees_all_close(*scaled, rtol=1e-4, atol=1e-5)
    assert metrics["conflict"] == 1
    for name, value in metrics.items():
        np.testing.assert_allclose(parts[1][name], np.full(4, value), rtol=1e-4)


def objective(params, x):
    outputs = jnp.tanh(x @ params["w"]) + jnp.sum(params["b"])
    return jnp.mean(outputs**2), -jnp.mean(outputs)


X = jax.random.normal(jax.random.key(0), (16, 8))
SMALL = jax.tree.map(lambda x: x / 20, WHOLE)


def step(tx, params, pair):
    updates, state = tx.update(pair, tx.init(params), params)
    return optax.apply_updates(params, updates), conflict_metrics(state)


@functools.cache
def on_one_device():
    _, pair = value_and_gradient_pair(objective)(SMALL, X)
    moved = step(dtnh(2.0), SMALL, pair)
    assert moved[1]["conflict"] == 1
    return moved


@pytest.mark.parametrize("mapping", ["vmap", "shard_map"])
def test_data_parallel_gradients_are_averaged_first_and_need_no_axis_name(mapping):
    def of_part(params, x):
        own = params
        if mapping == "shard_map":  # else the gradients come summed over devices
            own = programs.varying(params, "data")
        _, pair = value_and_gradient_pair(objective)(own, x)
        return step(dtnh(2.0), params, jax.lax.pmean(pair, "data"))

    if mapping == "vmap":
        parts = X.reshape(4, 4, 8)
        run = jax.vmap(of_part, in_axes=(None, 0), out_axes=None, axis_name="data")
        got = jax.jit(run)(SMALL, parts)
    else:
        mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        run = jax.shard_map(
            of_part, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
        )
        got = jax.jit(run)(SMALL, X)
    chex.assert_trees_all_close(got, on_one_device(), rtol=1e-4, atol=1e-6)


def test_fully_sharded_parameters_that_are_gathered_for_the_forward_pass():
    """Each device has a quarter of the batch and of every leaf."""

    def of_part(params, x):
        def local(params, x):
            whole = jax.tree.map(
                lambda p: jax.lax.all_gather(p, "data", tiled=True), params
            )
            return jax.tree.map(lambda v: v / 4, objective(whole, x))

        # In the transposed gather, gradients are summed over devices.
        _, pair = value_and_gradient_pair(local)(params, x)
        return step(dtnh(2.0, axis_name="data"), params, pair)

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    run = jax.shard_map(
        of_part, mesh=mesh, in_specs=P("data"), out_specs=(P("data"), P())
    )
    got = jax.jit(run)(SMALL, X)
    chex.assert_trees_all_close(got, on_one_device(), rtol=1e-4, atol=1e-6)


def test_an_anchor_is_cut_like_the_parameters():
    pull = l2_sp(jax.tree.map(jnp.sin, WHOLE))
    grads = jax.tree.map(jnp.sign, WHOLE)

    def update(axis_name, pull, params, grads):
        tx = add_regularizer(pull, 0.5, axis_name=axis_name)
        return tx.update(grads, tx.init(params), params)[0]

    parts = jax.vmap(functools.partial(update, "part"), axis_name="part")
    got = jax.jit(parts)(cut(pull), cut(WHOLE), cut(grads))
    wanted = cut(jax.jit(functools.partial(update, None))(pull, WHOLE, grads))
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)


def test_what_is_not_finite_on_one_device_is_left_out_on_all():
    def update(pair):
        own = optax.sgd(0.1, momentum=0.9)
        tx = decoupled(optax.sgd(1.0), 1.0, regularizer_optimizer=own, axis_name="part")
        updates, state = tx.update(pair, tx.init(pair.loss), pair.loss)
        return updates, state

    bad = cut(R)
    bad["w"] = bad["w"].at[2, 0, 0].set(jnp.nan)
    run = jax.jit(jax.vmap(update, axis_name="part"))
    updates, state = run(GradientPair(cut(G), bad))
    chex.assert_trees_all_close(updates, jax.tree.map(jnp.negative, cut(G)))
    np.testing.assert_array_equal(conflict_metrics(state)["skipped"], np.ones(4))
    for trace in jax.tree.leaves(state.regularizer_optimizer):
        assert np.all(trace == 0)


@pytest.mark.parametrize(
    ("axis_name", "error", "message"),
    [
        (3, TypeError, "`axis_name` must be the name of an axis"),
        (["x"], TypeError, r"or a tuple of names, got \['x'\]"),
        ((), ValueError, "at least one name"),
        (("x", "x"), ValueError, "each only once"),
    ],
)
def test_names_of_axes_are_checked(axis_name, error, message):
    with pytest.raises(error, match=message):
        _axes.checked(axis_name)


@pytest.mark.parametrize("scope", ["global", "element"])
def test_an_axis_that_nothing_is_mapped_over(scope):
    tx = dtnh(1.0, scope=scope, axis_name="x")
    with pytest.raises(ValueError, match="must name axes over which `update` is"):
        tx.update(GradientPair(G, R), tx.init(G))


def test_gradients_of_a_devices_own_for_parameters_of_all():
    """They would be added as if they were parts of one gradient."""

    def update(params, pair):
        tx = dtnh(1.0, axis_name=AXES)
        return tx.update(pair, tx.init(params), params)[0]

    run = jax.shard_map(update, mesh=MESH, in_specs=(P(), P("x")), out_specs=P("x"))
    params = jax.tree.map(lambda x: x[: len(x) // 4], WHOLE)
    with pytest.raises(ValueError, match=r"along \['x'\] every device has the same"):
        run(params, GradientPair(G, R))
