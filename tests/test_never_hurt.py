"""What `never_hurt` promises: the size and the sign of what it adds, and to whom."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dtnh_jax import GradientPair, conflict_metrics, never_hurt
from dtnh_jax._never_hurt import confidence
from dtnh_jax.regularizers import l2_sp

SHAPES = {"kernel": (4, 3), "bias": (3,)}


def tree(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        name: np.float32(scale * random.standard_normal(shape))
        for name, shape in SHAPES.items()
    }


def history(tx, pairs, params=None):
    """All updates of a sequence of pairs, and the last state."""
    params = params or tree(0)
    state, found = tx.init(params), []
    update = jax.jit(tx.update)
    for pair in pairs:
        updates, state = update(pair, state, params)
        found.append(updates)
    return found, state


def exact(pairs, strength, decay, ratio):
    """The same in float64, with the weights of the average written out."""
    found = []
    for now in range(1, len(pairs) + 1):
        weights = decay ** np.arange(now)[::-1]
        weights = weights / weights.sum()
        update = {}
        for name in SHAPES:
            g = np.stack([np.float64(pair.loss[name]) for pair in pairs[:now]])
            y = strength * np.float64(pairs[now - 1].regularizer[name])
            mean = np.tensordot(weights, g, 1)
            square = np.tensordot(weights, g**2, 1)
            squares = np.sum(weights**2)
            sure = np.zeros_like(y)
            if now > 1:
                variance = (square - mean**2) / (1 - squares)  # of one gradient
                t = mean * np.sign(y) / np.sqrt(variance * squares)
                sure = np.maximum(2 * stats.t.cdf(t, 1 / squares - 1) - 1, 0)
            part = np.sign(y) * np.minimum(sure * np.abs(y), ratio * np.abs(mean))
            update[name] = g[-1] + part
        found.append(update)
    return found


@pytest.mark.parametrize("strength", [0.01, 1.0, 1e4])
@pytest.mark.parametrize(("decay", "ratio"), [(0.9, 1.0), (0.5, 0.3)])
def test_it_is_students_confidence_bounded_by_the_mean(strength, decay, ratio):
    # A signal in noise, so that some parameters are sure and some are not.
    pairs = [
        GradientPair(
            jax.tree.map(np.add, tree(1, 0.5), tree(10 + step)), tree(50 + step % 2)
        )
        for step in range(12)
    ]
    tx = never_hurt(strength, ema_decay=decay, max_ratio=ratio)
    found, _ = history(tx, pairs)
    added = 0
    for ours, theirs, pair in zip(found, exact(pairs, strength, decay, ratio), pairs):
        for name in SHAPES:
            # The normal deviate that stands for t is off by up to 0.013 in `2 p - 1`.
            allowed = 1e-4 + 0.015 * strength * np.abs(pair.regularizer[name])
            bound = np.minimum(allowed, 1e-4 + 2 * np.abs(theirs[name]))
            assert (np.abs(ours[name] - theirs[name]) <= bound).all()
            added += np.sum(ours[name] != pair.loss[name])
    assert added > 20


@pytest.mark.parametrize("freedom", [1.0, 3.0, 18.0])
def test_confidence_is_that_of_students_t(freedom):
    t = np.linspace(-6, 6, 61)
    ratio = jnp.asarray(t / np.sqrt(freedom + t**2), jnp.float32)
    expected = np.maximum(2 * stats.t.cdf(t, freedom) - 1, 0)
    ours = confidence(ratio, jnp.float32(freedom))
    np.testing.assert_allclose(ours, expected, atol=0.02 if freedom < 2 else 0.003)


@pytest.mark.parametrize("strength", [1.0, 1e6])
def test_no_parameter_goes_against_the_mean_or_far_beyond_it(strength):
    pairs = [GradientPair(tree(step), tree(90 + step)) for step in range(20)]
    found, state = history(never_hurt(strength), pairs)
    unbias = 1 / (1 - 0.9**20)
    for name in SHAPES:
        part = np.asarray(found[-1][name]) - pairs[-1].loss[name]
        mean = np.asarray(state.mean[name]) * unbias
        rounding = 1e-5
        assert (part * mean >= -rounding).all()
        assert (np.abs(part) <= np.abs(mean) + rounding).all()


def test_the_first_step_and_strength_zero_are_the_loss_alone():
    pairs = [GradientPair(tree(step), tree(7)) for step in range(3)]
    (first, *_), _ = history(never_hurt(10.0), pairs)
    chex.assert_trees_all_equal(first, pairs[0].loss)
    found, _ = history(never_hurt(0.0), pairs)
    chex.assert_trees_all_equal(found, [pair.loss for pair in pairs])


def test_numbers_that_agree_are_kept_beside_others_of_their_leaf():
    # All steps the same: nothing is uncertain, and what agrees is kept.
    g = {"kernel": np.ones((4, 3), np.float32), "bias": np.ones(3, np.float32)}
    r = {
        "kernel": np.float32([[-1, -1, 1]] * 4),
        "bias": np.float32([1, 1, -1]),
    }
    found, state = history(never_hurt(1.0), [GradientPair(g, r)] * 5)
    np.testing.assert_allclose(found[-1]["kernel"], [[1, 1, 2]] * 4, rtol=1e-5)
    np.testing.assert_allclose(found[-1]["bias"], [2, 2, 1], rtol=1e-5)
    seen = conflict_metrics(state)
    np.testing.assert_allclose(seen["conflict"], (8 + 1) / 15, rtol=1e-6)
    np.testing.assert_allclose(seen["removed"], 1 - np.sqrt(6 / 15), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-15, 1e-6, 1e6, 1e15])
def test_it_is_the_same_at_any_scale(scale):
    def pairs(scale):
        return [
            GradientPair(
                jax.tree.map(lambda a, b: scale * (a + b), tree(1), tree(10 + step)),
                jax.tree.map(lambda x: scale * x, tree(5)),
            )
            for step in range(6)
        ]

    ours, _ = history(never_hurt(3.0), pairs(np.float32(scale)))
    theirs, _ = history(never_hurt(3.0), pairs(np.float32(1)))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(one / np.float32(scale), other, rtol=1e-3)


def test_plain_gradients_with_a_regularizer_are_a_pair():
    params, source = tree(0), tree(1)
    pull = l2_sp(source)
    grads = [tree(10 + step) for step in range(4)]
    plain, state = history(never_hurt(0.5, regularizer=pull), grads, params)
    pairs = [GradientPair(g, pull.gradient(params)) for g in grads]
    paired, other = history(never_hurt(0.5), pairs, params)
    chex.assert_trees_all_close(plain, paired, rtol=1e-6)
    chex.assert_trees_all_close(state, other, rtol=1e-6)
    with pytest.raises(ValueError, match="`params` must be given"):
        never_hurt(regularizer=pull).update(grads[0], state)


def test_several_regularizers_are_judged_one_by_one():
    pairs = [GradientPair(tree(step), tree(7)) for step in range(4)]
    both = [
        GradientPair(pair.loss, {"a": pair.regularizer, "b": tree(8)}) for pair in pairs
    ]
    found, state = history(never_hurt({"a": 1.0, "b": 0.0}), both)
    alone, _ = history(never_hurt(1.0), pairs)
    chex.assert_trees_all_close(found, alone, rtol=1e-6)
    assert conflict_metrics(state)["b"]["regularizer_norm"] == 0


def test_what_is_not_finite_is_left_out_and_forgotten():
    pairs = [GradientPair(tree(step), tree(7)) for step in range(4)]
    nan = jax.tree.map(lambda x: x * np.float32(np.nan), tree(0))
    expected, kept = history(never_hurt(1.0), pairs)
    bad = [*pairs[:2], GradientPair(nan, tree(7)), *pairs[2:]]
    found, state = history(never_hurt(1.0), bad)
    assert np.isnan(found[2]["bias"]).all()
    chex.assert_trees_all_close(found[-1], expected[-1], rtol=1e-6)
    chex.assert_trees_all_close(state.mean, kept.mean, rtol=1e-6)
    found, state = history(
        never_hurt(1.0), [*pairs[:2], GradientPair(pairs[2].loss, nan)]
    )
    chex.assert_trees_all_equal(found[-1], pairs[2].loss)
    assert conflict_metrics(state)["skipped"] == 1


def test_options_out_of_range_are_named():
    with pytest.raises(ValueError, match="`ema_decay` must be at least 0 and be"):
        never_hurt(ema_decay=1.0)
    with pytest.raises(ValueError, match="`max_ratio` must be at least 0"):
        never_hurt(max_ratio=-1.0)
