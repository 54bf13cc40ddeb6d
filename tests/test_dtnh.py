"""What DTNH promises, on trees of any structure and scale."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.test_util import check_grads
from trees import STRUCTURES, lengths, pairs

from dtnh_jax import GradientPair, conflict_metrics, dtnh, resolve_conflicts, rules

SCOPES = ["global", "leaf", "unit", "element"]
each_scope = pytest.mark.parametrize("scope", SCOPES)
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def resolve(g, r, strength=1.0, **options):
    tx = dtnh(strength, **options)
    return tx.update(GradientPair(g, r), tx.init(g), g)[0]


@functools.cache
def of_scope(scope):
    """`resolve` of a stack of pairs, compiled once for each structure of these."""
    run = jax.vmap(functools.partial(resolve, scope=scope), in_axes=(0, 0, None))
    compiled = jax.jit(run)
    return lambda g, r, strength=1.0: compiled(g, r, jnp.float32(strength))


def assert_exact(got, g, r, scope):
    """Compares with the projection, to rounding of the longer of both gradients."""
    tolerance = 1e-5 * lengths(g, r)
    for ours, exact in zip(jax.tree.leaves(got), oracle.update(g, r, scope)):
        error = np.abs(np.asarray(ours, np.longdouble) - exact)
        assert np.all(error.reshape(len(error), -1) <= tolerance[:, None])


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@each_scope
@each_structure
def test_it_is_the_projection_onto_the_half_space(scope, structure):
    g, r = pairs(structure)
    assert_exact(of_scope(scope)(g, r), g, r, scope)


@each_scope
@each_structure
def test_gradients_of_any_two_scales(scope, structure):
    g, r = pairs(structure, -12, 12)
    assert_exact(of_scope(scope)(g, r), g, r, scope)


@each_scope
def test_pair_by_pair_and_not_compiled_it_is_the_same(scope):
    g, r = pairs("nested")
    compiled = of_scope(scope)(g, r)
    for i in range(5):
        here = [jax.tree.map(lambda x, i=i: x[i], tree) for tree in (compiled, g, r)]
        got = resolve(*here[1:], scope=scope)
        tolerance = 1e-5 * float(lengths(g, r)[i])
        chex.assert_trees_all_close(got, here[0], rtol=0, atol=tolerance)


@each_scope
@each_structure
def test_the_loss_makes_the_progress_that_it_makes_alone(scope, structure):
    g, r = pairs(structure)
    for strength in (0.01, 1.0, 100.0):
        update = oracle.flat(of_scope(scope)(g, r, strength))
        largest = lengths(g, jax.tree.map(lambda x, s=strength: s * x, r))
        rounding = 1e-5 * lengths(g) * largest
        alone = oracle.flat(g)
        got, least = oracle.inner(alone, update), oracle.inner(alone, alone)
        assert np.all(got >= least - rounding)


@each_structure
def test_a_finer_scope_keeps_the_promise_of_every_coarser_one(structure):
    g, r = pairs(structure)
    for finer in SCOPES:
        updates = jax.tree.leaves(of_scope(finer)(g, r))
        # The whole is the test above.
        for coarser in SCOPES[1 : SCOPES.index(finer) + 1]:
            for leaves in zip(jax.tree.leaves(g), jax.tree.leaves(r), updates):
                a, y, b = (oracle.grouped(leaf, coarser) for leaf in leaves)
                square, other = oracle.inner(a, a), oracle.inner(y, y)
                rounding = 1e-5 * np.sqrt(square * np.maximum(square, other))
                assert np.all(oracle.inner(a, b) >= square - rounding)


@each_scope
@each_structure
def test_without_conflict_it_is_the_plain_sum_bit_by_bit(scope, structure):
    g, r = pairs(structure)
    agreeing = jax.tree.map(lambda x, y: np.abs(y) * np.sign(x), g, r)
    plain = jax.tree.map(lambda x, y: x + np.float32(0.3) * y, g, agreeing)
    assert_equal(of_scope(scope)(g, agreeing, 0.3), plain)


@each_structure
def test_scaling_both_gradients_scales_the_update(structure):
    g, r = pairs(structure)
    update, tolerance = of_scope("global")(g, r), 1e-5 * lengths(g, r)
    for exponent in (-20, -7, -1, 3, 20):
        scale = np.float32(2.0**exponent)
        scaled = [jax.tree.map(lambda x, s=scale: s * x, tree) for tree in (g, r)]
        got = of_scope("global")(*scaled)
        for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(got)):
            error = np.abs(a - b / scale).reshape(len(a), -1)
            assert np.all(error <= tolerance[:, None])


@each_scope
@each_structure
def test_a_zero_loss_gradient_protects_nothing(scope, structure):
    g, r = pairs(structure)
    update = of_scope(scope)(jax.tree.map(np.zeros_like, g), r, 0.3)
    assert_equal(update, jax.tree.map(lambda y: np.float32(0.3) * y, r))


@each_scope
@each_structure
def test_a_zero_regularizer_changes_nothing(scope, structure):
    g, r = pairs(structure)
    assert_equal(of_scope(scope)(g, jax.tree.map(np.zeros_like, r)), g)
    assert_equal(of_scope(scope)(g, r, 0.0), g)


@each_scope
def test_it_is_continuous_where_conflict_begins(scope):
    g = jnp.array([1.0, 1.0])
    for step in (1e-2, 1e-4, 1e-6):
        with_conflict = resolve(g, jnp.array([1.0, -1.0 - step]), scope=scope)
        without = resolve(g, jnp.array([1.0, -1.0 + step]), scope=scope)
        np.testing.assert_allclose(with_conflict, without, atol=3 * step + 1e-6)


def test_order_and_shapes_of_leaves_do_not_matter():
    random = np.random.default_rng(0)
    x, y = (jnp.asarray(random.standard_normal(24), jnp.float32) for _ in range(2))
    run = jax.jit(resolve)
    whole = run(x, y)
    shuffled = random.permutation(24)

    def split(v):
        v = v[shuffled]
        return [v[:4].reshape(2, 2), {"a": v[4:5].reshape(()), "b": v[5:]}]

    parts = [leaf.reshape(-1) for leaf in jax.tree.leaves(run(split(x), split(y)))]
    np.testing.assert_allclose(np.concatenate(parts), whole[shuffled], atol=1e-6)


@pytest.mark.parametrize("g_scale", [2e-18, 1e-12, 1.0, 1e12, 1e18])
@pytest.mark.parametrize("r_scale", [2e-18, 1e-12, 1.0, 1e12, 1e18])
@pytest.mark.parametrize("jit", [False, True])
def test_norms_from_1e_minus_18_to_1e18_are_exact(g_scale, r_scale, jit):
    g = g_scale * jnp.array([0.6, 0.8, 0.0])
    r = r_scale * jnp.array([-0.8, -0.3, 0.5])
    run = jax.jit(resolve) if jit else resolve
    exact = oracle.project(g, r)
    got = np.asarray(run(g, r), np.longdouble)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6 * max(g_scale, r_scale))


@each_scope
@pytest.mark.parametrize("jit", [False, True])
def test_a_loss_gradient_whose_square_vanishes_protects_nothing(scope, jit):
    g, r = 1e-25 * jnp.array([3.0, 4.0]), jnp.array([-4.0, -3.0])
    run = jax.jit(resolve, static_argnames="scope") if jit else resolve
    np.testing.assert_array_equal(run(g, r, scope=scope), g + r)


@each_scope
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("large", ["loss", "regularizer"])
def test_a_group_whose_sums_overflow_gets_the_loss_gradient_and_is_counted(
    scope, jit, large
):
    g, r = jnp.array([3.0, 4.0]), jnp.array([-4.0, -3.0])
    scale = jnp.float32(1e25)
    pair = GradientPair(scale * g, r) if large == "loss" else GradientPair(g, scale * r)
    tx = dtnh(1.0, scope=scope)
    update = jax.jit(tx.update) if jit else tx.update
    got, state = update(pair, tx.init(g))
    np.testing.assert_array_equal(got, pair.loss)
    assert conflict_metrics(state)["skipped"] == 1


def test_only_the_group_that_is_not_finite_is_left_out():
    g = {"a": jnp.ones(2), "b": jnp.ones(2)}
    r = {"a": jnp.array([jnp.nan, 1.0]), "b": jnp.array([1.0, 2.0])}
    tx = dtnh(1.0, scope="leaf")
    got, state = tx.update(GradientPair(g, r), tx.init(g))
    np.testing.assert_array_equal(got["a"], g["a"])
    np.testing.assert_array_equal(got["b"], [2.0, 3.0])
    assert conflict_metrics(state)["skipped"] == 1


def test_small_gradients_are_no_exception():
    """With an epsilon of 1e-7 in the denominator, most of this conflict would stay."""
    g, r = jnp.array([1e-4, 0.0]), jnp.array([-1.0, 1.0])
    np.testing.assert_allclose(resolve(g, r), [1e-4, 1.0], rtol=1e-6)


@pytest.mark.parametrize("run", [lambda f: f, jax.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("strength", [1.0, 1e-6, 1e-9, 1e-14])
def test_a_conflict_is_resolved_however_small_the_regularizer_is(strength, run):
    """The weight of the loss may round to 1, which does not undo the conflict."""
    tx = dtnh(strength)
    g, r = jnp.array([1.0, 0.0]), jnp.array([-1.0, 1.0])
    update, state = run(tx.update)(GradientPair(g, r), tx.init(g))
    np.testing.assert_allclose(update, [1.0, strength], rtol=1e-6)
    seen = conflict_metrics(state)
    np.testing.assert_allclose(seen["removed"], 1 - 0.5**0.5, rtol=1e-5)


def test_an_element_is_kept_or_dropped_whole():
    random = np.random.default_rng(0)
    g, r = (jnp.asarray(random.standard_normal(1000), jnp.float32) for _ in range(2))
    for strength in (1e-6, 0.1, 1e6):
        for run in (lambda f: f, jax.jit):  # which simplifies what is to be computed
            update = run(lambda g, r, s=strength: resolve(g, r, s, scope="element"))(
                g, r
            )
            agrees = np.asarray(g * r >= 0)
            np.testing.assert_array_equal(np.asarray(update)[~agrees], g[~agrees])
            np.testing.assert_allclose(
                update[agrees], (g + strength * r)[agrees], rtol=1e-6
            )


@each_scope
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_every_precision_is_kept_and_summed_in_float32(scope, dtype):
    random = np.random.default_rng(0)
    # A thousand squares of 200 overflow float16, and stall in bfloat16.
    g = jnp.asarray(200 * random.standard_normal((100, 40)), dtype)
    r = jnp.asarray(200 * random.standard_normal((100, 40)), dtype) - g
    update = jax.jit(functools.partial(resolve, scope=scope))(g, r, 0.5)
    assert update.dtype == dtype
    (exact,) = oracle.update(g[None], 0.5 * np.asarray(r, np.longdouble)[None], scope)
    atol = 600 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(update, float), exact[0], atol=atol)


def test_mixed_precision_trees():
    g = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    r = {"a": -jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float16)}
    update = resolve(g, r, scope="leaf")
    assert [x.dtype for x in jax.tree.leaves(update)] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_array_equal(update["a"], g["a"])
    np.testing.assert_array_equal(update["b"], 2 * g["b"])


def test_double_precision_is_used_where_it_is():
    with jax.enable_x64(True):
        g, r = jnp.array([1.0, 1e-9]), jnp.array([-1e-9, 1.0 - 1e-12])
        update = jax.jit(resolve)(g, r)
        assert update.dtype == jnp.float64
        np.testing.assert_allclose(update, oracle.project(g, r), rtol=1e-13)


def test_both_ways_to_give_the_gradients_are_one():
    g, r = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.array([-3.0, 1.0])}
    tx = dtnh(0.5)
    as_pair, state = tx.update(GradientPair(g, r), tx.init(g), g)
    by_keyword, other = tx.update(g, tx.init(g), g, regularizer_grads=r)
    jax.tree.map(np.testing.assert_array_equal, (as_pair, state), (by_keyword, other))


def test_strength_is_a_number_an_array_or_a_schedule():
    g, r = jnp.array([1.0, 0.0]), jnp.array([1.0, 2.0])
    np.testing.assert_array_equal(resolve(g, r, 2), [3.0, 4.0])
    np.testing.assert_array_equal(resolve(g, r, jnp.array(2.0)), [3.0, 4.0])
    tx = dtnh(optax.linear_schedule(0.0, 1.0, 2))
    state, seen = tx.init(g), []
    for _ in range(4):
        update, state = tx.update(GradientPair(g, r), state)
        seen.append(float(update[1]))
    assert seen == [0.0, 1.0, 2.0, 2.0]


def test_dtnh_is_resolve_conflicts_with_its_rule():
    g, r = jnp.array([1.0, 2.0]), jnp.array([-3.0, 1.0])
    tx = resolve_conflicts(rules.dtnh, 0.7, scope="global")
    update, _ = tx.update(GradientPair(g, r), tx.init(g))
    np.testing.assert_array_equal(update, resolve(g, r, 0.7))


@each_scope
def test_the_weighted_sum_resolves_nothing(scope):
    g, r = jnp.array([1.0, 2.0]), jnp.array([-3.0, 1.0])
    tx = resolve_conflicts(rules.weighted_sum, 0.7, scope=scope)
    update, _ = tx.update(GradientPair(g, r), tx.init(g))
    np.testing.assert_array_equal(update, g + 0.7 * r)


@each_scope
def test_updates_have_derivatives_in_both_modes(scope):
    keys = jax.random.split(jax.random.key(0), 2)
    g, r = [{"w": jax.random.normal(k, (4, 3)), "b": jnp.ones(1)} for k in keys]
    tx = dtnh(0.5, scope=scope, max_ratio=2.0)
    state = tx.init(g)

    @jax.jit
    def outcome(g, r):
        updates, _ = tx.update(GradientPair(g, r), state, g)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(updates))

    check_grads(outcome, (g, r), order=1, rtol=1e-2, atol=1e-2)
    zeros = jax.tree.map(jnp.zeros_like, g)
    gradients = jax.jit(jax.grad(outcome, argnums=(0, 1)))
    for pair in ((zeros, r), (g, zeros), (zeros, zeros)):
        for leaf in jax.tree.leaves(gradients(*pair)):
            assert jnp.all(jnp.isfinite(leaf))
