"""Options of the transformations, each against a value: none may do nothing."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from trees import STRUCTURES, lengths, pairs

from dtnh_jax import GradientPair, conflict_metrics, dtnh

SCOPES = ["global", "leaf", "unit", "element"]
each_scope = pytest.mark.parametrize("scope", SCOPES)


def once(tx, g, r):
    return tx.update(GradientPair(g, r), tx.init(g), g)[0]


def part_of(update, g):
    return jax.tree.map(
        lambda u, x: np.asarray(u, np.longdouble) - np.asarray(x), update, g
    )


class TestMovingAverage:
    """With `ema_decay`, a moving average of the loss gradient is protected."""

    def test_the_first_average_is_the_first_gradient(self):
        g, r = jnp.array([1.0, 2.0]), jnp.array([-3.0, 1.0])
        for scope in SCOPES:
            got = once(dtnh(1.0, scope=scope, ema_decay=0.9, max_ratio=0.5), g, r)
            expected = once(dtnh(1.0, scope=scope, max_ratio=0.5), g, r)
            np.testing.assert_allclose(got, expected, atol=1e-6)

    def test_it_is_the_unbiased_moving_average(self):
        """Golden: decay 1/2, gradients 4 and 1: (1/4 4 + 1/2 1) / (3/4) = 2 along x."""
        gs = [jnp.array([4.0, 0.0]), jnp.array([1.0, 3.0])]
        reference = jnp.array([2.0, 2.0])  # along y: (1/2 3) / (3/4)
        r = jnp.array([-4.0, 2.0])  # <m, r> = -4, ||m||^2 = 8
        tx = dtnh(1.0, ema_decay=0.5)
        state = tx.init(gs[0])
        for g in gs:
            got, state = tx.update(GradientPair(g, r), state)
        np.testing.assert_allclose(got, gs[1] + r + 0.5 * reference, rtol=1e-6)
        # The trust ratio is of the reference's norm, sqrt(8), not of ||g|| = sqrt(10).
        bounded = dtnh(10.0, ema_decay=0.5, max_ratio=0.5)
        state = bounded.init(gs[0])
        for g in gs:
            got, state = bounded.update(GradientPair(g, r), state)
        np.testing.assert_allclose(
            jnp.linalg.norm(got - gs[1]), 0.5 * 8**0.5, rtol=1e-5
        )

    def test_a_noisy_gradient_hides_a_conflict_from_the_rule_but_not_from_this(self):
        """The mini-batch agrees with `r` by chance; on average the loss does not."""
        r = jnp.array([-1.0, 0.0])
        average, alone = dtnh(1.0, ema_decay=0.9), dtnh(1.0)
        state = average.init(r)
        for n in range(20):
            g = jnp.array([-0.5 if n == 19 else 1.0, 0.0])
            got, state = average.update(GradientPair(g, r), state)
        np.testing.assert_allclose(got, g, atol=1e-6)
        np.testing.assert_allclose(once(alone, g, r), g + r)

    def test_a_restored_state_gives_the_same_next_update(self):
        tx = dtnh(1.0, ema_decay=0.9, scope="leaf")
        g, r = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([-3.0, 1.0])}
        _, state = tx.update(GradientPair(g, r), tx.init(g))
        restored = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state)
        a, b = (tx.update(GradientPair(r, g), s) for s in (state, restored))
        chex.assert_trees_all_equal(a, b)

    def test_a_loss_that_is_not_finite_is_forgotten(self):
        tx = dtnh(1.0, ema_decay=0.9)
        g, r = jnp.array([1.0, 2.0]), jnp.array([-3.0, 1.0])
        _, state = tx.update(GradientPair(g, r), tx.init(g))
        _, after = tx.update(GradientPair(g * jnp.nan, r), state)
        np.testing.assert_array_equal(after.ema, state.ema)
        assert after.step == state.step

    def test_half_precision_is_averaged_in_single(self):
        g = jnp.ones(3, jnp.bfloat16)
        tx = dtnh(1.0, ema_decay=0.999)
        _, state = tx.update(GradientPair(g, -g), tx.init(g))
        assert state.ema.dtype == jnp.float32
        np.testing.assert_allclose(state.ema, 0.001, rtol=1e-4)


class TestMaxRatio:
    """The regularizer's part is at most `rho` times the protected gradient."""

    @each_scope
    @pytest.mark.parametrize("structure", STRUCTURES)
    def test_the_part_is_bounded_in_every_group(self, scope, structure):
        g, r = pairs(structure, -8, 8)
        run = jax.jit(
            jax.vmap(
                lambda g, r, ratio: once(dtnh(1.0, scope=scope, max_ratio=ratio), g, r),
                in_axes=(0, 0, None),
            )
        )
        rounding = 1e-6 * lengths(g)
        for ratio in (0.0, 0.1, 1.0, 3.0):
            part = part_of(run(g, r, ratio), g)
            if scope == "global":
                limit = ratio * lengths(g) * (1 + 1e-5)
                assert np.all(lengths(part) <= limit + rounding)
                continue
            for leaves in zip(jax.tree.leaves(g), jax.tree.leaves(part)):
                x, y = (oracle.grouped(leaf, scope) for leaf in leaves)
                limit = ratio * np.sqrt(oracle.inner(x, x)) * (1 + 1e-5)
                length = np.sqrt(oracle.inner(y, y))
                assert np.all(length <= limit + rounding[:, None])

    @each_scope
    def test_a_short_part_is_left_alone(self, scope):
        g, r = jnp.array([3.0, -4.0]), jnp.array([0.1, 0.1])
        got = once(dtnh(1.0, scope=scope, max_ratio=1.0), g, r)
        np.testing.assert_array_equal(got, once(dtnh(1.0, scope=scope), g, r))

    def test_what_is_shortened_keeps_its_direction(self):
        g, r = jnp.array([1.0, 0.0]), jnp.array([-300.0, 400.0])
        got = once(dtnh(1.0, max_ratio=0.5), g, r)
        np.testing.assert_allclose(got, [1.0, 0.5], rtol=1e-5)

    def test_it_may_be_a_schedule(self):
        g, r = jnp.array([1.0, 0.0]), jnp.array([0.0, 10.0])
        tx = dtnh(1.0, max_ratio=optax.linear_schedule(0.0, 1.0, 2))
        state, seen = tx.init(g), []
        for _ in range(4):
            got, state = tx.update(GradientPair(g, r), state)
            seen.append(float(got[1]))
        np.testing.assert_allclose(seen, [0.0, 0.5, 1.0, 1.0], rtol=1e-6)

    def test_rounding_of_a_huge_regularizer_does_not_get_through(self):
        """Almost antiparallel and 1e12 times as long: what is left is rounding."""
        random = np.random.default_rng(0)
        g = jnp.asarray(random.standard_normal(1000), jnp.float32)
        r = -1e12 * g * (1 + 1e-7 * jnp.asarray(random.standard_normal(1000)))
        got = once(dtnh(1.0, max_ratio=1.0), g, r)
        assert jnp.linalg.norm(got - g) <= jnp.linalg.norm(g) * (1 + 1e-5)


class TestHeldOut:
    """With `held_out_grads`, the gradient on held-out examples is protected."""

    def test_the_update_is_resolved_against_it(self):
        g, h, r = jnp.array([1.0, 5.0]), jnp.array([1.0, 0.0]), jnp.array([-2.0, 3.0])
        tx = dtnh(1.0)
        got, state = tx.update(GradientPair(g, r), tx.init(g), held_out_grads=h)
        np.testing.assert_allclose(got, [1.0, 8.0])  # r without its part against h
        np.testing.assert_allclose(conflict_metrics(state)["loss_norm"], 1.0)
        assert conflict_metrics(state)["conflict"] == 1

    def test_the_bound_is_of_its_length(self):
        g, h, r = jnp.array([9.0, 0.0]), jnp.array([0.0, 2.0]), jnp.array([0.0, 8.0])
        tx = dtnh(1.0, max_ratio=0.5)
        got, _ = tx.update(g, tx.init(g), regularizer_grads=r, held_out_grads=h)
        np.testing.assert_allclose(got, [9.0, 1.0], rtol=1e-6)

    def test_it_has_to_match(self):
        g = {"w": jnp.ones(2)}
        tx = dtnh(1.0)
        with pytest.raises(ValueError, match="`held_out_grads` must be a tree like"):
            tx.update(GradientPair(g, g), tx.init(g), held_out_grads={"v": g["w"]})


def test_metrics_per_leaf_keep_their_order_and_their_zeros():
    params = {"a": jnp.ones(2), "frozen": jnp.ones(3), "z": jnp.ones(())}
    g = {"a": jnp.array([3.0, 4.0]), "frozen": None, "z": jnp.array(2.0)}
    r = {"a": jnp.array([4.0, 3.0]), "frozen": None, "z": jnp.array(-1.0)}
    tx = dtnh(2.0, scope="leaf")
    state = tx.init(params)
    _, new = tx.update(GradientPair(g, r), state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    groups = conflict_metrics(new, per_group=True)
    np.testing.assert_allclose(groups["cosine"], [24 / 25, 0, -1], rtol=1e-6)
    np.testing.assert_allclose(groups["loss_norm"], [5, 0, 2], rtol=1e-6)
    np.testing.assert_allclose(groups["regularizer_norm"], [10, 0, 2], rtol=1e-6)


def test_a_strength_that_overflows_leaves_the_regularizer_out():
    g, r = jnp.array([1.0, 2.0]), jnp.array([1e30, 1e30])
    tx = dtnh(optax.constant_schedule(jnp.float32(1e30)))
    got, state = tx.update(GradientPair(g, r), tx.init(g))
    np.testing.assert_array_equal(got, g)
    assert conflict_metrics(state)["skipped"] == 1


def test_metrics_of_an_abstract_state_are_shapes():
    params = {"w": jnp.ones((2, 3))}
    state = jax.eval_shape(dtnh(1.0).init, params)
    assert conflict_metrics(state)["cosine"].shape == ()
