"""What `never_hurt` promises: the size of what it adds, and how its trust moves."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dtnh_jax import GradientPair, conflict_metrics, never_hurt
from dtnh_jax.regularizers import l2_sp

SHAPES = {"kernel": (4, 3), "bias": (3,)}


def tree(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        name: np.float32(scale * random.standard_normal(shape))
        for name, shape in SHAPES.items()
    }


def norm(x):
    return np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in x.values()))


def cosine(x, y):
    inner = sum(np.sum(np.float64(x[name]) * y[name]) for name in x)
    return inner / norm(x) / norm(y)


def history(tx, pairs, params=None, held_out=None):
    """All updates of a sequence of pairs, and all states."""
    params = params or tree(0)
    state, found, states = tx.init(params), [], []
    with_held_out = jax.jit(
        lambda *given: tx.update(*given[:3], held_out_grads=given[3])
    )
    without = jax.jit(tx.update)
    for number, pair in enumerate(pairs):
        h = held_out[number] if held_out else None
        updates, state = (
            without(pair, state, params)
            if h is None
            else with_held_out(pair, state, params, h)
        )
        found.append(updates)
        states.append(state)
    return found, states


@pytest.mark.parametrize("strength", [0.01, 1.0, 1e4])
@pytest.mark.parametrize("trust", [0.1, 3.0])
def test_the_part_is_the_bounded_regularizer(strength, trust):
    pairs = [GradientPair(tree(s), tree(50 + s, 0.1 * s)) for s in range(6)]
    found, states = history(never_hurt(strength, trust=trust), pairs)
    lengths, largest = [], 0.0
    for pair, update in zip(pairs, found):
        lengths.append(norm(pair.loss))
        largest = max(largest, strength * norm(pair.regularizer))
        factor = min(1, trust * np.mean(lengths) / largest) if largest else 1
        for name in SHAPES:
            expected = pair.loss[name] + factor * strength * pair.regularizer[name]
            np.testing.assert_allclose(update[name], expected, rtol=2e-5, atol=1e-6)
        part = jax.tree.map(np.subtract, update, pair.loss)
        assert norm(part) <= trust * np.mean(lengths) * (1 + 1e-5)
    np.testing.assert_allclose(conflict_metrics(states[-1])["trust"], trust, rtol=1e-6)


def test_beyond_the_bound_strength_makes_no_difference():
    pairs = [GradientPair(tree(s), tree(50 + s)) for s in range(4)]
    ours, _ = history(never_hurt(1e2, trust=0.5), pairs)
    theirs, _ = history(never_hurt(1e8, trust=0.5), pairs)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_it_is_the_same_at_any_scale(scale):
    pairs = [GradientPair(tree(s), tree(50 + s)) for s in range(3)]
    scaled = jax.tree.map(lambda x: np.float32(scale) * x, pairs)
    ours, _ = history(never_hurt(3.0, trust=0.3), scaled)
    theirs, _ = history(never_hurt(3.0, trust=0.3), pairs)
    expected = jax.tree.map(lambda x: np.float32(scale) * x, theirs)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4)


@pytest.mark.parametrize(("strength", "trust"), [(0.0, 1.0), (10.0, 0.0)])
def test_no_strength_and_no_trust_are_the_loss_alone(strength, trust):
    pairs = [GradientPair(tree(s), tree(7)) for s in range(3)]
    found, _ = history(never_hurt(strength, trust=trust), pairs)
    chex.assert_trees_all_equal(found, [pair.loss for pair in pairs])


def test_trust_takes_a_schedule():
    path = jnp.array([0.1, 0.2, 0.3])
    pairs = [GradientPair(tree(s), tree(7)) for s in range(3)]
    _, states = history(never_hurt(1e4, trust=lambda step: path[step]), pairs)
    seen = [conflict_metrics(state)["trust"] for state in states]
    np.testing.assert_allclose(seen, path)


def test_trust_follows_the_agreement_with_held_out_gradients():
    pairs = [GradientPair(tree(s), tree(50 + s)) for s in range(50)]
    signs = [1] * 15 + [-1] * 35
    held_out = [
        jax.tree.map(lambda x, y, a=0.3 * sign: a * x + y, pair.regularizer, noise)
        for pair, sign, noise in zip(pairs, signs, map(tree, range(90, 140)))
    ]
    held_out[4] = held_out[5] = None  # not at every step
    _, states = history(never_hurt(1e3), pairs, held_out=held_out)
    agreement, trust = 0.0, 0.03
    for pair, h, state in zip(pairs, held_out, states):
        if h is not None:
            agreement = 0.9 * agreement + 0.1 * cosine(pair.regularizer, h)
            moved = np.log(trust) + 0.4 * np.tanh(30 * agreement)
            trust = np.exp(np.clip(moved, np.log(0.01), np.log(3)))
        np.testing.assert_allclose(conflict_metrics(state)["trust"], trust, rtol=1e-4)
    path = [float(state.measured.trust) for state in states]
    assert max(path) == pytest.approx(3.0)  # the cap, and then down again
    assert path[-1] == pytest.approx(0.01)  # the floor


def test_without_held_out_gradients_trust_stays_where_it_starts():
    pairs = [GradientPair(tree(s), tree(50 + s)) for s in range(3)]
    _, states = history(never_hurt(1e3), pairs)
    assert [float(s.measured.trust) for s in states] == [np.float32(0.03)] * 3


def test_each_of_several_regularizers_has_its_own_trust():
    g, good, bad = tree(1), tree(2), tree(3)
    tx = never_hurt({"good": 1e3, "bad": 1e3})
    state, params = tx.init(g), g
    for _ in range(5):
        h = jax.tree.map(lambda x, y: x / norm(good) - y / norm(bad), good, bad)
        pair = GradientPair(g, {"good": good, "bad": bad})
        updates, state = tx.update(pair, state, params, held_out_grads=h)
    seen = conflict_metrics(state)
    assert seen["good"]["trust"] > 0.1
    assert seen["bad"]["trust"] == pytest.approx(0.01)
    for name in SHAPES:
        expected = g[name] + norm(g) * (
            seen["good"]["trust"] * good[name] / norm(good)
            + seen["bad"]["trust"] * bad[name] / norm(bad)
        )
        np.testing.assert_allclose(updates[name], expected, rtol=1e-4)


def test_plain_gradients_with_a_self_anchored_regularizer_are_a_pair():
    source, params = tree(1), tree(0)
    tx = never_hurt(0.5, regularizer=l2_sp(), trust=1.0)
    state = tx.init(source)
    pull = jax.tree.map(np.subtract, params, source)
    ours, _ = tx.update(tree(10), state, params)
    pair = GradientPair(tree(10), pull)
    theirs, _ = history(never_hurt(0.5, trust=1.0), [pair])
    chex.assert_trees_all_close(ours, theirs[0], rtol=1e-5)


def test_the_state_is_scalars():
    tx = never_hurt(1.0)
    state = jax.eval_shape(tx.init, tree(0))
    assert sum(x.size for x in jax.tree.leaves(state)) <= 16
    pair = GradientPair(tree(0), tree(1))
    after = jax.eval_shape(
        functools.partial(tx.update, held_out_grads=tree(2)), pair, state, tree(0)
    )[1]
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_moves_nothing(bad):
    broken = jax.tree.map(lambda x: x * bad, tree(3))
    pairs = [GradientPair(tree(1), tree(2)), GradientPair(tree(1), broken)]
    tx = never_hurt(1e3)
    found, (first, second) = history(tx, pairs, held_out=[tree(2), tree(2)])
    chex.assert_trees_all_equal(found[1], pairs[1].loss)
    assert second.measured.skipped == 1
    assert second.largest == first.largest
    # A held-out gradient that is not finite counts as no agreement.
    _, (_, third) = history(tx, pairs[:1] * 2, held_out=[tree(2), broken])
    assert third.agreement == pytest.approx(0.9 * float(first.agreement))
    # A loss gradient is passed on, and forgotten.
    broken_loss = GradientPair(broken, tree(2))
    found, (_, last) = history(tx, [pairs[0], broken_loss], held_out=[tree(2)] * 2)
    assert not np.isfinite(found[1]["bias"]).any()
    assert last.loss_norms == first.loss_norms
    assert last.step == 1


def test_masked_leaves_are_the_loss_alone_and_lengthen_nothing():
    mask = {"kernel": True, "bias": False}
    g, r = tree(1), tree(2)
    updates, state = never_hurt(1e6, trust=1.0, mask=mask).update(
        GradientPair(g, r), never_hurt(1e6, trust=1.0, mask=mask).init(g), g
    )
    chex.assert_trees_all_equal(updates["bias"], g["bias"])
    assert state.loss_norms == pytest.approx(np.linalg.norm(g["kernel"]), rel=1e-5)


@pytest.mark.parametrize("trust", [-0.1, np.inf, np.nan])
def test_a_trust_out_of_range_is_named(trust):
    with pytest.raises(ValueError, match="`trust`"):
        never_hurt(1.0, trust=trust)


def test_it_works_as_a_hyperparameter():
    tx = optax.inject_hyperparams(never_hurt)(strength=1e3, trust=0.2)
    state = tx.init(tree(0))
    _, state = tx.update(GradientPair(tree(1), tree(2)), state, tree(0))
    assert conflict_metrics(state)["trust"] == pytest.approx(0.2)
