"""What training at scale pays: memory for 100 million parameters, and collectives.

Programs are compiled for abstract arrays; nothing that is large runs.
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
    decoupled,
    dtnh,
    never_hurt,
    value_and_gradient_pair,
)
from dtnh_jax.regularizers import l2_sp

LAYERS, WIDTH = 3, 5888
TREE = 4 * LAYERS * WIDTH**2  # bytes
ADAM = optax.adam(1e-3)


def objective(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2), jnp.mean(jnp.abs(x))


def peak(make, has_pair):
    """Bytes of a train step: what it is given, what it returns, and in between."""

    def step(params, state, source, x):
        if has_pair:
            _, grads = value_and_gradient_pair(objective)(params, x)
        else:
            grads = jax.grad(lambda p: objective(p, x)[0])(params)
        updates, state = make(source).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
    state = jax.eval_shape(lambda p: make(p).init(p), params)
    x = jax.ShapeDtypeStruct((4, WIDTH), jnp.float32)
    jitted = jax.jit(step, donate_argnums=(0, 1))
    seen = jitted.lower(params, state, params, x).compile().memory_analysis()
    kept = seen.output_size_in_bytes - seen.alias_size_in_bytes
    return seen.temp_size_in_bytes + seen.argument_size_in_bytes + kept


@pytest.mark.skipif(
    jax.__version_info__ < (0, 9), reason="an older XLA needs up to a sixth more"
)
@pytest.mark.parametrize(
    ("make", "has_pair"),
    [
        (lambda s: optax.chain(add_regularizer(l2_sp(s), 0.1), ADAM), False),
        (lambda s: decoupled(ADAM, 1e-4, regularizer=l2_sp(s)), False),
        (lambda s: optax.chain(dtnh(0.1), ADAM), True),
        (lambda s: optax.chain(dtnh(0.1, scope="leaf"), ADAM), True),
    ],
    ids=["l2_sp", "l2_sp, decoupled", "pair", "pair, leaf"],
)
def test_memory_of_100_million_parameters(make, has_pair):
    """Parameters, Adam's two trees and the gradient; then the anchor, or the other.

    The whole gradient is there at once with every rule that looks at all of it, as with
    clipping by the global norm.
    """
    assert 1.0e8 < TREE / 4 < 1.1e8
    assert peak(make, has_pair) < 1.02 * 5 * TREE


MAKERS = {
    "global": (functools.partial(dtnh, 1.0), 1),
    "leaf": (functools.partial(dtnh, 1.0, scope="leaf"), 1),
    "decoupled": (functools.partial(decoupled, ADAM, 1e-3, max_ratio=1.0), 1),
    "never_hurt": (never_hurt, 1),
}


@pytest.mark.parametrize("scope", ["unit", "element"])
def test_groups_inside_of_leaves_take_no_more_memory_than_two_trees(scope):
    def make(source):
        return optax.chain(add_regularizer(l2_sp(source), 0.1, scope=scope), ADAM)

    assert peak(make, False) < 1.02 * 5 * TREE + 2 * TREE


@pytest.mark.parametrize("whole", [None, "c"], ids=["all", "but one"])
@pytest.mark.parametrize("name", MAKERS)
def test_fully_sharded_updates_take_small_sums_and_gather_nothing(name, whole):
    """Also where leaves of one shape, which are measured as one, are cut otherwise."""
    make, sums = MAKERS[name]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def spec(path, x):
        is_cut = x.size > 8 and jax.tree_util.keystr(path[-1:], simple=True) != whole
        sharding = NamedSharding(mesh, P("data") if is_cut else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    params = {"w": jnp.zeros((16, 6)), "v": jnp.zeros((8, 4))}
    params |= {"b": jnp.zeros(16), "c": jnp.zeros(16)}
    state = jax.tree.map_with_path(spec, jax.eval_shape(make().init, params))
    params = jax.tree.map_with_path(spec, params)
    update = jax.jit(lambda pair, state, params: make().update(pair, state, params))
    compiled = update.lower(GradientPair(params, params), state, params).compile()
    found = re.findall(
        r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(",
        compiled.as_text(),
    )
    assert [kind for _, kind in found] == ["all-reduce"] * sums
    for shapes, _ in found:
        for shape in re.findall(r"\w\d+\[([\d,]*)\]", shapes):
            assert math.prod(int(n) for n in shape.split(",") if n) <= len(params)


def test_never_hurt_has_a_derivative_where_gradients_are_zero():
    params = {"w": jnp.array([0.0, 1.0, -2.0]), "dead": jnp.zeros(3)}
    tx = never_hurt(2.0)
    first = jax.tree.map(jnp.cos, params)
    _, state = tx.update(GradientPair(first, first), tx.init(params), params)
    zeros = jax.tree.map(jnp.zeros_like, params)

    def size(pair, state):
        updates, _ = tx.update(pair, state, params)
        return sum(jnp.sum(u**2) + jnp.sum(u) for u in jax.tree.leaves(updates))

    slope = jax.jit(jax.grad(size, allow_int=True))
    for state_before in (tx.init(params), state):
        for pair in (GradientPair(zeros, zeros), GradientPair(params, first)):
            for x in jax.tree.leaves(slope(pair, state_before)):
                assert np.all(np.isfinite(x))
    moved = slope(GradientPair(params, first), state)
    np.testing.assert_allclose(moved.loss["dead"], np.ones(3), atol=2.0)
