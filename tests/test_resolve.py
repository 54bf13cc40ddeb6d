"""The transformations around the mathematics: trees, arguments, chains, state."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from dtnh_jax import (
    GradientPair,
    add_regularizer,
    conflict_metrics,
    dtnh,
    resolve_conflicts,
    rules,
)
from dtnh_jax.regularizers import WeightRegularizer, l2, l2_sp

G = {"a": jnp.array([1.0, 2.0]), "b": {"c": jnp.array([[3.0], [-1.0]])}}
R = {"a": jnp.array([-2.0, 1.0]), "b": {"c": jnp.array([[-3.0], [5.0]])}}


def update(tx, g=None, r=None, params=None):
    g, r = G if g is None else g, R if r is None else r
    return tx.update(
        GradientPair(g, r), tx.init(g if params is None else params), params
    )


class VariantTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True)
    def test_jitted_or_not_it_is_the_same(self):
        tx = dtnh(0.5, scope="leaf")
        state = tx.init(G)
        ours, _ = self.variant(tx.update)(GradientPair(G, R), state)
        # In leaf "a" <g, r> = 0; in "b" it is -14 of ||g||^2 = 10.
        chex.assert_trees_all_close(ours["a"], jnp.array([0.0, 2.5]))
        expected = G["b"]["c"] + 0.5 * (R["b"]["c"] + 1.4 * G["b"]["c"])
        chex.assert_trees_all_close(ours["b"]["c"], expected, rtol=1e-6)


def test_add_regularizer_stands_where_weight_decay_would():
    params = {"w": jnp.array([1.0, -2.0])}
    g = {"w": jnp.array([0.5, -0.5])}  # agrees with the decay
    ours, theirs = add_regularizer(l2(), 0.1), optax.add_decayed_weights(0.1)
    got, _ = ours.update(g, ours.init(params), params)
    expected, _ = theirs.update(g, theirs.init(params), params)
    np.testing.assert_array_equal(got["w"], expected["w"])


def test_add_regularizer_is_dtnh_with_the_closed_form_gradient():
    source, params = R, G
    pull = l2_sp(source)
    g = jax.tree.map(jnp.cos, params)
    ours = add_regularizer(pull, 0.3)
    pair = dtnh(0.3)
    got, _ = jax.jit(ours.update)(g, ours.init(params), params)
    expected, _ = update(pair, g, pull.gradient(params), params)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_a_gradient_in_closed_form_is_traced_once():
    calls = []

    def gradient(params):
        calls.append(params)
        return jax.tree.map(jnp.sin, params)

    tx = add_regularizer(WeightRegularizer(lambda p: jnp.zeros([]), gradient), 0.5)
    state = tx.init(G)
    got, _ = jax.jit(tx.update)(G, state, G)
    assert len(calls) == 1
    expected, _ = update(dtnh(0.5), G, jax.tree.map(jnp.sin, G), G)
    chex.assert_trees_all_close(got, expected, rtol=1e-6)


def test_a_self_anchored_regularizer_keeps_where_it_started():
    """The state has a copy, which survives donation of the first parameters."""
    start = jax.tree.map(jnp.copy, G)
    tx = add_regularizer(l2_sp(new=["b"], new_strength=0.0), 0.5)
    state = jax.jit(tx.init)(start)
    moved = jax.jit(lambda p: jax.tree.map(lambda x: x + 1, p), donate_argnums=0)(start)
    g = jax.tree.map(jnp.ones_like, moved)  # agrees with the way back
    got, state = jax.jit(tx.update)(g, state, moved)
    np.testing.assert_allclose(got["a"], [1.5, 1.5], rtol=1e-6)
    np.testing.assert_array_equal(got["b"]["c"], g["b"]["c"])
    chex.assert_trees_all_close(state.anchor["a"], G["a"])
    assert jax.tree.leaves(state.anchor["b"]) == []


def test_several_regularizers_are_resolved_each_on_its_own():
    strengths = {"kd": 0.5, "sp": 2.0}
    rs = {"kd": R, "sp": jax.tree.map(jnp.sin, G)}
    got, state = update(dtnh(strengths), G, rs)
    expected = G
    for name, r in rs.items():
        alone, _ = update(dtnh(strengths[name]), G, r)
        expected = jax.tree.map(lambda e, a, g: e + (a - g), expected, alone, G)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
    metrics = conflict_metrics(state)
    assert set(metrics) == {"kd", "sp"}
    alone = conflict_metrics(update(dtnh(0.5), G, R)[1])
    chex.assert_trees_all_close(metrics["kd"], alone)
    pull = add_regularizer({"l2": l2(), "sp": l2_sp(R)}, {"l2": 0.1, "sp": 0.2})
    chex.assert_tree_all_finite(pull.update(G, pull.init(G), G)[0])


def test_missing_leaves():
    g = {"both": jnp.ones(2), "loss": jnp.ones(2), "reg": None, "none": None}
    r = {"both": -jnp.ones(2), "loss": None, "reg": jnp.ones(3), "none": None}
    got, _ = update(dtnh(1.0), g, r)
    # <g, r> = -2 and ||g||^2 = 4: half of g is added to r.
    np.testing.assert_allclose(got["both"], [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(got["loss"], [1.5, 1.5], rtol=1e-6)
    np.testing.assert_allclose(got["reg"], [1.0, 1.0, 1.0], rtol=1e-6)
    assert got["none"] is None
    # A missing branch of the regularizer may be missing as a whole.
    g = {"body": jnp.ones(2), "head": {"kernel": jnp.ones(2), "bias": jnp.ones(1)}}
    got, _ = update(dtnh(1.0), g, {"body": jnp.ones(2), "head": None})
    np.testing.assert_array_equal(got["head"]["bias"], [1.0])


def test_leaves_that_are_no_real_numbers():
    g = {
        "int": jnp.array([3]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "masked": optax.MaskedNode(),
        "complex": jnp.array([1 + 1j]),
    }
    r = {
        "int": jnp.array([5]),
        "float0": np.zeros((2,), jax.dtypes.float0),
        "masked": jnp.ones(3),
        "complex": jnp.array([-1 + 3j]),
    }
    for scope in ("global", "leaf", "unit", "element"):
        got, _ = update(dtnh(1.0, scope=scope), g, r)
        assert got["int"] == 3
        assert got["float0"].dtype == jax.dtypes.float0
        assert isinstance(got["masked"], optax.MaskedNode)
        # Re(conj(g) r) = -1 + 3 > 0: no conflict.
        np.testing.assert_array_equal(got["complex"], [4j])
    r["complex"] = jnp.array([-3 + 1j])  # Re(conj(g) r) = -2, ||g||^2 = 2
    for scope in ("global", "unit", "element"):
        got, _ = update(dtnh(1.0, scope=scope), g, r)
        np.testing.assert_allclose(got["complex"], [-1 + 3j], rtol=1e-6)


def test_empty_trees_and_leaves():
    for tree in ({}, [], {"w": jnp.zeros((0, 3))}):
        for scope in ("global", "leaf", "unit", "element"):
            got, state = update(dtnh(1.0, scope=scope), tree, tree)
            chex.assert_trees_all_equal(got, tree)
            assert conflict_metrics(state)["cosine"] == 0


def test_masked_leaves_get_the_loss_alone_and_have_no_say():
    mask = {"a": True, "b": False}
    for given in (mask, lambda params: mask):
        got, state = update(dtnh(1.0, mask=given))
        chex.assert_trees_all_equal(got["b"], G["b"])
        np.testing.assert_array_equal(got["a"], G["a"] + R["a"])  # <g, r> = 0 there
        assert conflict_metrics(state)["cosine"] == 0


def test_labels_join_leaves_into_groups():
    g = {"x": jnp.array([1.0]), "y": jnp.array([1.0]), "z": jnp.array([1.0])}
    r = {"x": jnp.array([-3.0]), "y": jnp.array([1.0]), "z": jnp.array([-1.0])}
    labels = {"x": "body", "y": "body", "z": "head"}
    for scope in (labels, lambda params: labels):
        got, state = update(dtnh(1.0, scope=scope), g, r)
        # In "body" <g, r> = -2 of ||g||^2 = 2; in "head" all of r is against g.
        assert [float(x[0]) for x in got.values()] == [-1.0, 3.0, 1.0]
        groups = conflict_metrics(state, per_group=True)
        np.testing.assert_allclose(groups["conflict"], [1.0, 1.0])
        np.testing.assert_allclose(groups["cosine"], [-(0.2**0.5), -1.0], rtol=1e-6)


def test_a_regularizer_that_is_not_finite_is_left_out_and_counted():
    tx = dtnh(1.0)
    state = tx.init(G)
    bad = {"a": jnp.array([jnp.nan, 0.0]), "b": R["b"]}
    for step, r in enumerate([bad, R, jax.tree.map(lambda x: x * jnp.inf, R)]):
        got, state = tx.update(GradientPair(G, r), state)
        if step != 1:
            chex.assert_trees_all_equal(got, G)
    assert conflict_metrics(state)["skipped"] == 2
    assert np.isfinite(conflict_metrics(state)["cosine"])


def test_a_loss_that_is_not_finite_is_passed_on():
    bad = {"a": jnp.array([jnp.nan, 0.0]), "b": G["b"]}
    tx = optax.apply_if_finite(optax.chain(dtnh(1.0), optax.sgd(1.0)), 5)
    state = tx.init(G)
    got, state = tx.update(bad, state, G, regularizer_grads=R)
    assert state.notfinite_count == 1
    assert all(np.all(x == 0) for x in jax.tree.leaves(got))
    got, _ = update(dtnh(1.0), bad)
    chex.assert_trees_all_equal(got, bad)


def test_metrics_of_a_known_pair():
    g, r = jnp.array([3.0, 4.0]), jnp.array([-4.0, -3.0])
    for scope in ("global", "leaf"):
        metrics = conflict_metrics(update(dtnh(2.0, scope=scope), g, r)[1])
        cosine = -24 / 25
        expected = {
            "cosine": cosine,
            "conflict": 1.0,
            "loss_norm": 5.0,
            "regularizer_norm": 10.0,
            "removed": 1 - (1 - cosine**2) ** 0.5,
            "skipped": 0,
        }
        chex.assert_trees_all_close(metrics, expected, rtol=1e-5)
    g, r = jnp.array([1.0, 1.0, 2.0, 0.0]), jnp.array([3.0, -4.0, 0.0, 0.0])
    for scope in ("unit", "element"):
        metrics = conflict_metrics(update(dtnh(1.0, scope=scope), g, r)[1])
        assert metrics["conflict"] == 0.25
        np.testing.assert_allclose(metrics["removed"], 1 - 3 / 5, rtol=1e-6)
        np.testing.assert_allclose(metrics["cosine"], -1 / (5 * 6**0.5), rtol=1e-6)


def test_metrics_are_found_in_any_state():
    bare = conflict_metrics(update(dtnh(1.0))[1])
    for tx in (
        optax.chain(optax.identity(), optax.chain(dtnh(1.0), optax.adam(1e-3))),
        optax.inject_hyperparams(dtnh)(strength=1.0),
        optax.apply_if_finite(dtnh(1.0), 3),
    ):
        _, state = tx.update(G, tx.init(G), G, regularizer_grads=R)
        chex.assert_trees_all_close(conflict_metrics(state), bare)
    parts = optax.partition({"x": dtnh(1.0), "y": dtnh(2.0)}, {"a": "x", "b": "y"})
    _, state = parts.update(G, parts.init(G), G, regularizer_grads=R)
    by_place = conflict_metrics(state)
    assert len(by_place) == 2
    assert all(set(metrics) == set(bare) for metrics in by_place.values())
    with pytest.raises(ValueError, match="`opt_state` must hold the state"):
        conflict_metrics(optax.adam(1e-3).init(G))


def test_the_state_keeps_its_tree_under_scan():
    tx = dtnh(0.5, scope="leaf")

    def body(state, pair):
        got, state = tx.update(pair, state)
        return state, (got, conflict_metrics(state))

    pairs = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), GradientPair(G, R))
    state, (_, metrics) = jax.lax.scan(body, tx.init(G), pairs)
    np.testing.assert_allclose(metrics["loss_norm"], [15**0.5, 60**0.5], rtol=1e-6)
    assert state.step == 2


def test_inject_hyperparams_changes_the_strength_without_recompiling():
    tx = optax.inject_hyperparams(add_regularizer)(l2(), strength=0.0)
    state = tx.init(G)
    chex.clear_trace_counter()  # it counts by name
    step = jax.jit(chex.assert_max_traces(tx.update, 1))
    got, state = step(G, state, G)
    chex.assert_trees_all_equal(got, G)
    state.hyperparams["strength"] = jnp.float32(1.0)
    got, state = step(G, state, G)
    chex.assert_trees_all_close(got, jax.tree.map(lambda x: 2 * x, G))


def test_linen_train_states_take_a_pair():
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    tx = optax.chain(dtnh(1.0), optax.sgd(0.1))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    g, r = jax.tree.map(jnp.ones_like, params), jax.tree.map(lambda x: -x, params)

    @jax.jit
    def step(state):
        return state.apply_gradients(grads=GradientPair(g, r))

    expected, _ = update(dtnh(1.0), g, r)
    moved = jax.tree.map(lambda p, u: p - 0.1 * u, params, expected)
    chex.assert_trees_all_close(step(state).params, moved, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("as_pair", [True, False])
def test_nnx_optimizers_take_a_pair(as_pair):
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(
        model, optax.chain(dtnh(1.0), optax.sgd(0.1)), wrt=nnx.Param
    )
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))

    def grads(scale):
        return jax.tree.map(
            lambda p: scale * jnp.sin(3 * p), nnx.state(model, nnx.Param)
        )

    if as_pair:
        optimizer.update(model, GradientPair(grads(1.0), grads(-2.0)))
    else:
        optimizer.update(model, grads(1.0), regularizer_grads=grads(-2.0))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    expected = jax.tree.map(lambda p: p - 0.1 * jnp.sin(3 * p), before)
    chex.assert_trees_all_close(after, expected, rtol=1e-5, atol=1e-6)
    metrics = conflict_metrics(optimizer.opt_state)
    np.testing.assert_allclose(metrics["cosine"], -1.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: dtnh(-1.0), "`strength` must be at least 0 and finite, got -1.0"),
        (lambda: dtnh(float("nan")), "`strength` must be at least 0"),
        (lambda: dtnh(jnp.array(-2.0)), "`strength` must be at least 0"),
        (lambda: dtnh({"kd": -1.0}), r"`strength\['kd'\]` must be at least 0"),
        (lambda: dtnh({}), "`strength` must name each regularizer"),
        (lambda: dtnh(1.0, scope="layer"), "`scope` must be one of global, leaf, unit"),
        (
            lambda: dtnh(1.0, ema_decay=1.0),
            "`ema_decay` must be .* below 1",
        ),
        (lambda: dtnh(1.0, max_ratio=-1), "`max_ratio` must be at least 0"),
        (lambda: add_regularizer(l2(), {"a": 1.0}), "`regularizer` must be a dict"),
        (lambda: dtnh(1.0).update(G, dtnh(1.0).init(G)), "`regularizer_grads` must be"),
        (
            lambda: dtnh(1.0).update(
                GradientPair(G, R), dtnh(1.0).init(G), regularizer_grads=R
            ),
            "got both",
        ),
        (lambda: update(dtnh(1.0), G, {"a": R["a"]}), "got none at 'b/c'"),
        (lambda: update(dtnh(1.0), G, {**R, "d": R["a"]}), "got a leaf at 'd'"),
        (lambda: update(dtnh(1.0), G, {**R, "a": jnp.ones(3)}), "at 'a'"),
        (lambda: update(dtnh({"x": 1.0}), G, R), "dict with the keys of `strength`"),
        (lambda: update(dtnh(1.0, mask={"q": True})), "`mask` must be a prefix"),
        (lambda: update(dtnh(1.0, scope={"q": "x"})), "`scope` must be a prefix"),
        (
            lambda: add_regularizer(l2(), 1.0).update(G, dtnh(1.0).init(G)),
            "`params` must be given",
        ),
    ],
)
def test_wrong_values_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: dtnh("strong"), "strength"),
        (lambda: dtnh(True), "strength"),
        (lambda: dtnh(jnp.ones(2)), "strength"),
        (lambda: dtnh(1.0, scope=None), "scope"),
        (lambda: dtnh(1.0, max_ratio="x"), "max_ratio"),
        (lambda: resolve_conflicts("dtnh", 1.0), "rule"),
        (lambda: add_regularizer(lambda p: 0.0, 1.0), "regularizer"),
    ],
)
def test_arguments_of_another_kind_are_named(call, argument):
    with pytest.raises(TypeError, match=argument):
        call()


def test_a_rule_may_use_the_matrix_as_an_array():
    def of_the_matrix(gram):
        matrix = jnp.asarray(gram)[0] + jnp.eye(2)  # one group
        return jnp.linalg.solve(matrix, jnp.ones(2))[None]

    def by_entries(gram):
        a, b, c = gram[..., 0, 0] + 1, gram[..., 0, 1], gram[..., 1, 1] + 1
        weights = jnp.stack([c - b, a - b], axis=-1)
        return weights / (a * c - b * b)[..., None]

    a, _ = update(resolve_conflicts(of_the_matrix, 1.0))
    b, _ = update(resolve_conflicts(by_entries, 1.0))
    chex.assert_trees_all_close(a, b, rtol=1e-5)
    assert rules.dtnh(jnp.eye(2)).shape == (2,)
