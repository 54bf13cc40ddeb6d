"""The study of trust: its rivals against their formulas, and its arithmetic."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from dtnh_jax import GradientPair
from dtnh_jax._cli import main
from dtnh_jax.studies.trust import (
    catalogue,
    cells,
    choice,
    images,
    measure,
    methods,
    noninferiority,
    summary,
    tasks,
)

RATE = 0.1


def tree(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        "body": np.float32(scale * random.standard_normal((3, 2))),
        "head": np.float32(scale * random.standard_normal((2,))),
    }


def walk(name, value, pairs, source):
    """Steps of a method with SGD; returns all parameters."""
    tx = methods.BUILDERS[name](optax.sgd(1.0), value, source, RATE)
    params, found = source, []
    state = tx.init(params)
    for pair in pairs:
        updates, state = tx.update(pair, state, params)
        params = jax.tree.map(lambda p, u: p + RATE * u, params, updates)
        found.append(jax.device_get(params))
    return found


PAIRS = [GradientPair(tree(s), tree(20 + s)) for s in range(4)]


def test_selective_projection_decay_is_its_authors_formula():
    source, value = tree(9), 0.5
    w = source["body"].copy()
    for pair, ours in zip(PAIRS, walk("spd", value, PAIRS, source)):
        g, before = pair.loss["body"], w - source["body"]
        new = w - RATE * g
        if np.sum(g * before) > 0:
            far, near = np.linalg.norm(new - source["body"]), np.linalg.norm(before)
            ratio = np.clip((far - near) / far, 0, 1)
            new = new - value * ratio * (new - source["body"])
        w = new
        np.testing.assert_allclose(ours["body"], w, rtol=1e-5)
    # The head has no source.
    total = sum(pair.loss["head"] for pair in PAIRS)
    np.testing.assert_allclose(ours["head"], source["head"] - RATE * total, rtol=1e-5)


@pytest.mark.parametrize("kappa", [0.0, 1.0])
def test_fast_trainable_projection_is_its_authors_formula(kappa):
    source = tree(9)
    w, s = source["body"].copy(), source["body"]
    radius, m, v = np.full((1, 2), 1e-8), np.zeros((1, 2)), np.zeros((1, 2))
    slope = np.zeros_like(w)
    for t, (pair, ours) in enumerate(zip(PAIRS, walk("ftp", kappa, PAIRS, source)), 1):
        g = pair.loss["body"]
        c = w - RATE * g - s
        norms = np.abs(c).sum(0, keepdims=True) + 1e-8
        grad = (g * slope).sum(0, keepdims=True)
        grad = np.where(grad > 0, kappa * grad, grad)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        radius = np.clip(radius - 0.01 * step if t > 1 else radius, 1e-8, norms.max())
        w = s + np.clip(radius / norms, 0, 1) * c
        slope = c / norms
        np.testing.assert_allclose(ours["body"], w, rtol=1e-4, atol=1e-6)


def test_metabalance_brings_the_larger_gradient_down_leaf_by_leaf():
    pair = GradientPair(tree(1), tree(2))
    value, found = 0.4, walk("metabalance", 0.4, [pair], tree(0))[0]
    for name, g in pair.loss.items():
        r = 100 * pair.regularizer[name]
        m, n = 0.1 * np.linalg.norm(g), 0.1 * np.linalg.norm(r)
        assert n > m
        expected = tree(0)[name] - RATE * (g + (value * m / n + 1 - value) * r)
        np.testing.assert_allclose(found[name], expected, rtol=1e-4)


def test_pcd_makes_the_least_progress_that_is_asked_for():
    pair = GradientPair(tree(1), jax.tree.map(np.negative, tree(1)))  # full conflict
    start = tree(0)
    moved = walk("pcd", 0.3, [pair], start)[0]
    d = np.concatenate([((start[k] - moved[k]) / RATE).ravel() for k in start])
    g, r = (np.concatenate([t[k].ravel() for k in start]) for t in pair)
    assert d @ r > 0
    np.testing.assert_allclose(np.linalg.norm(d), np.linalg.norm(g), rtol=1e-5)
    # Where that much is made anyway, it is the loss gradient.
    along = GradientPair(tree(1), tree(1))
    moved = walk("pcd", 0.3, [along], start)[0]
    expected = jax.tree.map(lambda p, g: p - RATE * g, start, along.loss)
    for name in start:
        np.testing.assert_allclose(moved[name], expected[name], rtol=1e-5)


def numbers(values, target, right):
    """What a method comes to, with one seed."""
    found = {axis: [[x] for x in target] for axis in measure.AXES}
    judged = [[folds] for folds in right]
    judges = {"right": judged, "smooth": judged, "probability": judged}
    return {"values": values, **judges, **found}


def test_rivals_choose_on_the_first_fold_and_trust_races_over_all():
    plain = numbers([0.0], [50.0], [["1100", "1111", "1111", "1111"]])
    rival = numbers([1.0, 10.0], [40.0, 60.0], [["1110"], ["1111"]])
    found = choice.outcome_of("sum", plain, rival)
    assert found.values == [10.0]
    assert found.axes["target"] == [60.0]
    assert found.trainings == [1 + 3]
    worse = numbers([1.0], [40.0], [["1100"]])
    assert choice.outcome_of("sum", plain, worse).values == [0.0]
    # On the first fold it leads, on all of them plain fine-tuning does.
    ours = numbers([0.5], [70.0], [["1110", "0001", "0001", "1000"]])
    found = choice.outcome_of("trust", plain, ours)
    assert found.values == [0.0]
    assert found.axes["target"] == [50.0]
    assert found.trainings == [1 + 2 + 2 + 2]  # the fourth fold is not needed
    # More levels are looked at than race.
    more = numbers([0.5, 1.0], [70.0, 90.0], [["1111"] * 4, ["1111"] * 4])
    assert choice.outcome_of("trust", plain, more).values == [0.5]
    assert choice.outcome_of("trust-of-one", plain, more).values == [1.0]
    # A lead of one in four is not clear, and trusted only where any lead will do.
    close = numbers([0.5], [70.0], [["1110", "1111", "1111", "1111"]])
    assert choice.outcome_of("trust", plain, close).values == [0.0]
    assert choice.outcome_of("trust-by-any-lead", plain, close).values == [0.5]


def test_a_loss_within_the_margin_has_to_be_shown():
    differences = np.array([0.1, -0.2, 0.0, 0.3, -0.1])
    found = noninferiority.bound(differences, margin=0.3)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.9).low
    assert found.low == pytest.approx(expected)
    assert found.is_shown
    assert not noninferiority.bound(differences - 0.2, margin=0.3).is_shown
    noisy = np.array([3.0, -3.0, 2.0, -2.0])  # no significant loss, and no proof
    assert not noninferiority.bound(noisy, margin=0.3).is_shown


def test_folds_share_out_a_training_set_and_noise_is_as_asked(monkeypatch):
    pool = images.Images(
        np.zeros((300, 2, 2), np.uint8), np.repeat(np.arange(10, dtype=np.int32), 30)
    )
    clean = catalogue.Pair("dense", "fashion", "digits", 20)
    task = tasks.draw(clean, pool, seed=3)
    assert np.bincount(task.train.labels).tolist() == [20] * 10
    assert sorted(np.concatenate(task.folds)) == [*range(200)]
    noisy = tasks.draw(clean._replace(noise=0.4), pool, seed=3)
    assert np.sum(noisy.train.labels != task.train.labels) == 80
    assert set(noisy.train.labels) == set(range(10))


@pytest.fixture(scope="module")
def tiny_cells(tmp_path_factory):
    """Two cells of a pair of random images, trained for five steps."""
    data_dir = tmp_path_factory.mktemp("study")
    random = np.random.default_rng(0)

    @functools.cache
    def load(name, _):
        del name
        pixels = random.integers(0, 255, (240, 16, 16), np.uint8)
        labels = np.arange(240, dtype=np.int32) % 10
        pixels[:, 0] = (25 * labels)[:, None]
        return images.Images(pixels, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "load_images", load)
        patch.setattr(tasks, "_SOURCE_STEPS", 2)
        patch.setattr(tasks, "TEST_IMAGES", 40)
        patch.setitem(catalogue.STEPS, "dense", 5)
        pair = catalogue.Pair("dense", "fashion", "digits", 4)
        patch.setitem(catalogue.PAIRS, "tiny", pair)
        for name, method in catalogue.METHODS.items():
            if name == "early":  # which has a value for each tenth of training
                continue
            few = method._replace(values=method.values[:2])
            patch.setitem(catalogue.METHODS, name, few)
        yield [
            cells.run(cells.Cell("tiny", "sgd", regularizer), (0, 1), data_dir)
            for regularizer in (None, "feature_map")
        ]


@pytest.mark.e2e
def test_a_cell_has_all_methods_on_all_axes(tiny_cells):
    alone, regularized = tiny_cells
    names = {*alone["methods"], *regularized["methods"]} - {"plain"}
    assert names == set(catalogue.METHODS)
    for found in (alone, regularized):
        for name, method in found["methods"].items():
            for axis in measure.AXES:
                assert np.shape(method[axis]) == (len(method["values"]), 2), name
            folds = {len(seed) for value in method["right"] for seed in value}
            # Those that are made of plain fine-tuning have its folds.
            is_plain = name in ("plain", "wise-ft", "early")
            all_folds = is_plain or catalogue.METHODS[name].all_folds
            expected = 4 if all_folds else 1
            if name == "one-pass":  # its network is the last one
                expected = 0
            assert folds == {expected}
            assert {len(f) for v in method["right"] for s in v for f in s} <= {10}


@pytest.mark.e2e
def test_the_table_is_of_differences_to_plain_fine_tuning(tiny_cells, tmp_path, capsys):
    found = summary.summarize(tiny_cells)
    (cell,) = found["cells"]
    plain = np.array(tiny_cells[0]["methods"]["plain"]["target"][0])
    sums = np.array(tiny_cells[1]["methods"]["sum"]["target"])
    assert cell["best"] == pytest.approx(max(0, (sums - plain).mean(1).max()))
    assert {"trust", "sum", "one-pass", "ftp", "wise-ft"} <= set(found["methods"])
    (tmp_path / "cells").mkdir()
    for each in tiny_cells:
        path = tmp_path / "cells" / f"{each['regularizer']}.json"
        path.write_text(json.dumps(each))
    assert main(["study", "--report-only", "--run-dir", str(tmp_path)]) == 0
    assert "| never_hurt |" in capsys.readouterr().out
    for name in ("help_and_harm.png", "sweep.png", "pareto.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "`--seeds` must be at least 2"),
        (["--optimizers", "adam"], "`--optimizers` must be one of sgd, adamw"),
        (["--only", "cats"], "`--only` must occur in the name of a pair"),
        (["--report-only"], "must hold cells with a regularizer, got none"),
    ],
)
def test_what_can_not_be_meant_is_refused(arguments, message, tmp_path, capsys):
    assert main(["study", *arguments, "--run-dir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_shifts_leave_the_images_recognizable():
    random = np.random.default_rng(0)
    pixels = random.integers(0, 255, (6, 16, 16), np.uint8)
    test = images.Images(pixels, np.arange(6, dtype=np.int32))
    found = measure.shifted(test)
    assert found.pixels.shape == (24, 16, 16)
    assert found.labels.tolist() == [*range(6)] * 4
    noisy, blurred, faded, turned = np.split(np.float64(found.pixels), 4)
    assert 20 < np.abs(noisy - pixels).mean() < 60
    assert blurred.std() < 0.6 * pixels.std()
    np.testing.assert_allclose(faded.std(), pixels.std() / 3, rtol=0.05)
    assert np.corrcoef(turned.ravel(), pixels.ravel())[0, 1] > 0.05  # of noise
    assert jnp.asarray(found.inputs()).shape == (24, 16, 16, 1)
