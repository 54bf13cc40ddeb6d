"""What `choose_trust` promises: every example judges once, and the race is fair."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dtnh_jax import choose_trust, never_hurt, smooth_accuracy
from dtnh_jax._choose_trust import cut_in_folds, remaining
from dtnh_jax.regularizers import l2_sp


def scores_of(right, seen=None):
    """An `evaluate` that reads from a table of scores by level."""

    def evaluate(trust, train, held_out):
        if seen is not None:
            seen.append((trust, train, held_out))
        return right[trust][held_out]

    return evaluate


def test_every_example_is_held_out_once_and_never_trained_on_then():
    seen = []
    table = {0.0: np.arange(10) % 2.0, 1.0: np.arange(1, 11) % 2.0}
    choose_trust(scores_of(table, seen), 10, levels=[1.0], folds=3)
    held_out = [rows for trust, _, rows in seen if trust == 0]
    assert len(seen) == 6
    assert sorted(np.concatenate(held_out)) == [*range(10)]
    for _, train, rows in seen:
        assert sorted([*train, *rows]) == [*range(10)]


def test_of_levels_that_do_the_same_the_lowest_is_taken_at_once():
    right = np.ones(12)
    table = {0.0: 0 * right, 0.1: right, 1.0: right}
    choice = choose_trust(scores_of(table), 12, levels=[0.1, 1.0], folds=3)
    assert choice.trust == 0.1
    assert choice.trainings == 3


def test_the_best_level_wins_and_the_others_stop_early():
    random = np.random.default_rng(0)
    chance = {0.0: 0.2, 0.1: 0.3, 1.0: 0.9, 3.0: 0.1}
    table = {x: 1.0 * (random.random(400) < p) for x, p in chance.items()}
    choice = choose_trust(scores_of(table), 400, levels=[3.0, 0.1, 1.0])
    assert choice.trust == 1
    assert choice.trainings == 4  # one fold was enough
    np.testing.assert_allclose(choice.scores[1.0][0], 0.9, atol=0.06)


def test_a_close_race_takes_all_folds():
    random = np.random.default_rng(1)
    table = {x: random.random(40) for x in (0.0, 0.5)}
    taken = {choose_trust(scores_of(table), 40, seed=s).trainings for s in range(30)}
    assert max(taken) == 2 * 4
    assert min(taken) < 2 * 4  # and an easy one does not


def test_smooth_accuracy_is_the_sign_of_the_margin_softened():
    logits = np.random.default_rng(0).standard_normal((50, 4))
    labels = np.arange(50) % 4
    ours = smooth_accuracy(logits, labels)
    np.testing.assert_array_equal(ours > 0.5, logits.argmax(1) == labels)
    margins = [
        row[label] - max(x for k, x in enumerate(row) if k != label)
        for row, label in zip(logits, labels)
    ]
    scale = 0.3 * np.sqrt(np.mean(np.square(margins)))
    np.testing.assert_allclose(ours, 1 / (1 + np.exp(-np.array(margins) / scale)))
    # Confidence makes no difference, and a shift of all logits neither.
    np.testing.assert_allclose(smooth_accuracy(1e4 * logits + 3, labels), ours)
    assert smooth_accuracy(np.zeros((2, 3)), np.array([0, 1])).tolist() == [0.5, 0.5]


def test_a_lead_within_the_error_is_close():
    first = np.array([1.0, 1, 1, 1, 0, 0])
    level = np.array([1.0, 1, 1, 0, 0, 0])  # one apart, which is one standard error
    behind = np.array([1.0, 1, 0, 0, 0, 0])  # two apart; the error is 1.41
    assert remaining([first, level, behind], [0.0, 1.0, 2.0]) == [0.0, 1.0]
    assert remaining([behind, level, first], [0.0, 1.0, 2.0]) == [2.0, 1.0]


@pytest.mark.parametrize(("wins", "losses", "trust"), [(5, 1, 0.5), (3, 1, 0.0)])
def test_trust_needs_a_lead_that_is_clear(wins, losses, trust):
    """Five wins and a loss lead by 4, 1.6 errors of sqrt(6); three by 2, 1 of 2."""
    plain, trusted = np.zeros(40), np.zeros(40)
    trusted[:wins], plain[-losses:] = 1, 1
    table = {0.0: plain, 0.5: trusted}
    choices = [
        choose_trust(scores_of(table), 40, folds=2, seed=seed) for seed in range(20)
    ]
    # Those that did not end early, by the luck of the first fold.
    assert {x.trust for x in choices if x.trainings == 4} == {trust}


def test_a_level_that_diverged_is_out():
    table = {0.0: np.zeros(8), 1.0: np.full(8, np.nan)}
    assert choose_trust(scores_of(table), 8, levels=[1.0]).trust == 0
    with pytest.raises(ValueError, match="finite scores"):
        choose_trust(
            scores_of({x: np.full(8, np.nan) for x in (0.0, 1.0)}), 8, levels=[1.0]
        )


def test_folds_share_classes_evenly():
    classes = np.repeat([0, 1, 2], [8, 4, 12])
    for rows in cut_in_folds(classes, 4, seed=3):
        np.testing.assert_array_equal(np.bincount(classes[rows]), [2, 1, 3])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"folds": 1}, ValueError, "`folds`"),
        ({"folds": 41}, ValueError, "`folds`"),
        ({"examples": 0}, ValueError, "`examples`"),
        ({"examples": np.zeros((2, 2))}, ValueError, "`examples`"),
        ({"levels": [-1.0]}, ValueError, "`levels`"),
        ({"levels": [np.inf]}, ValueError, "`levels`"),
        ({"levels": []}, ValueError, "`levels`"),
        ({"evaluate": lambda *_: 0.5}, ValueError, "every held-out example"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    given = {"evaluate": lambda trust, train, rows: np.ones(len(rows)), "examples": 40}
    with pytest.raises(error, match=message):
        choose_trust(**{**given, **change})


@pytest.mark.parametrize("is_good", [True, False])
def test_a_good_source_is_trusted_and_a_bad_one_is_not(is_good):
    # Logistic regression in 100 dimensions, on 200 examples of which a fifth are wrong.
    random = np.random.default_rng(0)
    true = random.standard_normal(100)
    x = random.standard_normal((200, 100)).astype(np.float32)
    y = (x @ true > 0) ^ (random.random(200) < 0.2)
    source = np.float32(0.3 * (true if is_good else -true))

    @jax.jit
    def evaluate(trust, train, held_out):
        tx = optax.chain(
            never_hurt(1e4, regularizer=l2_sp(jnp.asarray(source)), trust=trust),
            optax.sgd(0.5),
        )

        def loss(w):
            losses = optax.sigmoid_binary_cross_entropy(x[train] @ w, 1.0 * y[train])
            return jnp.mean(losses)

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        w = jnp.asarray(source)
        (w, _), _ = jax.lax.scan(step, (w, tx.init(w)), length=100)
        return 1.0 * ((x[held_out] @ w > 0) == y[held_out])

    x, y = jnp.asarray(x), jnp.asarray(y)
    assert (choose_trust(evaluate, 200).trust > 0) == is_good
