"""Training, on a network so small that every promise can be checked quickly."""

import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_network

from dtnh_jax import regularizers, teacher_cache
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.regularizers import REGULARIZERS
from dtnh_jax.finetune.training import estimates, loop
from dtnh_jax.finetune.weights import sources

NETWORK = tiny_network.TinyNetwork(2)
SOURCE = tiny_network.TINY
VARIABLES = loop.starting_variables(SOURCE, 2, 0, METHODS["fine-tuning"])
ORIGINAL = sources.original_variables(SOURCE)
KEY = loop.training_key(0)


@functools.cache
def examples():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 16, 16, 3), np.uint8)
    labels = np.arange(20, dtype=np.int32) % 2
    images[labels == 1] //= 2  # the class can be seen
    return loading.Examples(images, labels)


@pytest.fixture(scope="module")
def batches():
    return loading.training_batches(loading.views(examples()), 8, seed=0)


@functools.cache
def known(regularizer):
    asked = regularizer and REGULARIZERS[regularizer].estimate
    if not asked:
        return loop.Known(ORIGINAL)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "estimate"
        question = estimates.Question(SOURCE, ORIGINAL, examples(), 2, 0, path)
        return loop.Known(ORIGINAL, estimates.estimate(asked, question))


@functools.cache
def trainer(regularizer, never_hurts=False):
    """Returns one trainer of four steps for all tests: compiling it takes seconds."""
    return new_trainer(regularizer, Config(methods=("all",)), 4, never_hurts)


def new_trainer(regularizer, config, steps, never_hurts=False):
    return loop.make_trainer(
        SOURCE, NETWORK, regularizer, config, steps, never_hurts=never_hurts
    )


def starting(method, seed=0):
    return loop.starting_variables(SOURCE, 2, seed, method)


def train(name, batches, strength, steps=4, variables=None, made=None):
    method = METHODS[name]
    made = made or trainer(method.regularizer, method.never_hurts)
    state, lines = None, []
    first = made.init(variables or starting(method), method, strength)
    asked = known(method.regularizer)
    for after, metrics in loop.train(made, first, batches, asked, KEY, steps):
        state = after
        lines.append(jax.device_get(metrics))
    assert state is not None
    return state, lines


def assert_same(one, other, rtol=0.0):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=0.1 * rtol)


def test_every_regularizer_has_one_function():
    for row in REGULARIZERS.values():
        assert (row.of_weights is None) != (row.of_batch is None)


@pytest.mark.parametrize(
    ("regularizer", "optimizer"),
    [(None, "sgd"), ("l2_sp", "sgd"), ("feature_map", "sgd"), ("l2_sp", "adamw")],
)
def test_every_method_learns_and_compiles_once(regularizer, optimizer, batches):
    names = ("scratch", "fine-tuning", "l2_sp", "l2_sp+dtnh")
    names = (*names, "feature_map", "feature_map+dtnh")
    config = Config(methods=names, optimizer=optimizer, learning_rate=0.1)
    made = new_trainer(regularizer, config, 40)
    for name in config.methods:
        method = METHODS[name]
        if method.regularizer != regularizer:
            continue
        state, lines = train(name, batches, 0.001, steps=40, made=made)
        assert np.mean([x["loss"] for x in lines[-5:]]) < 0.8 * lines[0]["loss"]
        assert int(state.step) == 40
        # Another seed and strength are other data.
        train(
            name, batches, 0.01, steps=2, variables=starting(method, seed=7), made=made
        )
        has_cosine = regularizer is not None
        assert ("cosine" in lines[0]) == ("regularizer" in lines[0]) == has_cosine
    assert made.step._cache_size() == 1  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.parametrize("name", [*REGULARIZERS, "scratch", "fine-tuning", "lora"])
def test_every_regularizer_acts_and_leaves_the_source_alone(name, batches):
    before = jax.tree.map(np.array, (ORIGINAL, known(METHODS[name].regularizer)))
    regularizer = REGULARIZERS.get(name)
    strength = regularizer.strength if regularizer else 0.0
    first, _ = train(name, batches, strength)
    second, lines = train(name, batches, strength)
    assert_same(first.params, second.params)
    assert_same(before, (ORIGINAL, known(METHODS[name].regularizer)))
    if regularizer:
        _, others = train(f"{name}+dtnh", batches, strength)
        assert all(np.isfinite(line["regularizer"]) for line in [*lines, *others])
        assert lines[-1]["regularizer_norm"] > 0


@pytest.mark.parametrize("name", ["l2_sp", "l2_sp+dtnh", "feature_map"])
def test_strength_zero_is_plain_fine_tuning(name, batches):
    plain, _ = train("fine-tuning", batches, 0.0)
    regularized, lines = train(name, batches, 0.0)
    assert_same(plain.params, regularized.params, rtol=1e-5)
    assert lines[-1]["regularizer_norm"] == 0


@pytest.mark.parametrize("regularizer", ["l2_sp", "feature_map"])
def test_never_hurt_adds_no_more_than_its_trust(regularizer, batches):
    # However large the strength, in shares of the loss gradient's mean length.
    method = METHODS[f"{regularizer}+never_hurt"]
    made = trainer(regularizer, never_hurts=True)
    for trust in (0.0, 0.3):
        state = made.init(starting(method), method, 1e6, trust)
        training = loop.train(made, state, batches, known(regularizer), KEY, 4)
        lines = [jax.device_get(metrics) for _, metrics in training]
        lengths = np.cumsum([x["loss_norm"] for x in lines]) / np.arange(1, 5)
        added = [(1 - x["removed"]) * x["regularizer_norm"] for x in lines]
        assert all(part <= 1.01 * trust * mean for part, mean in zip(added, lengths))
        assert [float(x["trust"]) for x in lines] == [np.float32(trust)] * 4
        # A sum would have been ruin.
        assert lines[-1]["regularizer_norm"] > 100 * lengths[-1]


def test_never_hurt_needs_a_trainer_of_its_own():
    with pytest.raises(ValueError, match=r"`method` must be one .* got l2_sp\+never_h"):
        trainer("l2_sp").init(VARIABLES, METHODS["l2_sp+never_hurt"], 0.1)


@pytest.mark.parametrize("name", ["l2_sp", "feature_map"])
def test_strength_pulls_to_the_source(name, batches):
    _, weak = train(name, batches, 0.0)
    _, strong = train(name, batches, 1.0)
    assert strong[-1]["regularizer"] < weak[-1]["regularizer"]


@pytest.mark.parametrize("regularizer", ["l2_sp", "feature_map"])
def test_the_rule_resolves_and_the_sum_does_not(regularizer, batches):
    # Where training leads to, and further: the way back is in conflict with the loss.
    ahead, _ = train("fine-tuning", batches, 0.0)

    def lines(name):
        found = []
        for factor in (1, 10, 30):
            params = jax.tree.map(
                lambda x, y, factor=factor: x + factor * (y - x),
                VARIABLES["params"],
                ahead.params,
            )
            moved = {**VARIABLES, "params": params}
            found += train(name, batches, 0.3, steps=2, variables=moved)[1]
        return found

    assert all(line["removed"] < 1e-5 for line in lines(regularizer))
    conflicts = [x for x in lines(f"{regularizer}+dtnh") if x["conflict"] == 1]
    assert conflicts
    for line in conflicts:  # what is left of r is its part at a right angle to g
        expected = 1 - np.sqrt(1 - line["cosine"] ** 2)
        np.testing.assert_allclose(line["removed"], expected, atol=1e-5)


def test_a_step_is_the_gradient_of_the_regularized_loss(batches):
    strength = 0.3
    statistics = VARIABLES["batch_stats"]
    # Away from where the regularizer's gradient is zero.
    params = jax.tree.map(lambda x: x + 0.01, VARIABLES["params"])
    moved = {"params": params, "batch_stats": statistics}
    state, _ = train("l2_sp", batches, strength, steps=1, variables=moved)

    def objective(params):
        logits, updated = NETWORK.apply(
            {"params": params, "batch_stats": statistics},
            SOURCE.preprocess(batches[0]["image"]),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(KEY, 0)},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, batches[0]["label"]
        )
        penalty = regularizers.l2_sp(
            VARIABLES["params"], new=lambda path: path.startswith("head/")
        )
        return losses.mean() + strength * penalty.value(params), updated

    grads, updated = jax.jit(jax.grad(objective, has_aux=True))(params)
    # Nesterov's first step is 1 + 0.9 times the gradient.
    expected = jax.tree.map(lambda p, g: p - 0.01 * 1.9 * g, params, grads)
    assert_same(state.params, expected, rtol=1e-5)
    assert_same(state.batch_stats, updated["batch_stats"], rtol=1e-5)


def test_batch_statistics_do_not_depend_on_the_method(batches):
    # Those that never hurt differ in what comes after; one stands for all of them.
    names = [name for name in METHODS if not METHODS[name].never_hurts]
    names = [name for name in names if name != "scratch"] + ["l2_sp+never_hurt"]
    first, *others = [train(name, batches, 0.1, steps=1)[0] for name in names]
    for other in others:
        assert_same(first.batch_stats, other.batch_stats, rtol=1e-6)


@pytest.mark.parametrize("name", ["l2_sp+dtnh", "feature_map+dtnh"])
def test_scope_changes_what_is_in_conflict(name, batches):
    of_scope, config = {}, Config(methods=(name,), scope="element")
    by_element = new_trainer(METHODS[name].regularizer, config, 4)
    assert Config().scope == "global"
    for scope, made in (("global", None), ("element", by_element)):
        _, lines = train(name, batches, 0.1, made=made)
        of_scope[scope] = [float(line["conflict"]) for line in lines]
    assert set(of_scope["global"]) <= {0.0, 1.0}
    assert any(0.0 < share < 1.0 for share in of_scope["element"])


def test_training_goes_on_from_any_state(batches):
    made = trainer("l2_sp", False)
    whole, lines = train("l2_sp+dtnh", batches, 0.1)
    first = made.init(VARIABLES, METHODS["l2_sp+dtnh"], 0.1)
    asked = known("l2_sp")
    *_, (half, _) = loop.train(made, first, batches, asked, KEY, 2)
    *_, (state, _) = loop.train(made, half, batches, asked, KEY, 4)
    assert_same(state, whole)
    assert len(lines) == 4


def test_seeds_differ_in_the_head_and_methods_of_a_seed_do_not():
    heads = [
        starting(METHODS["fine-tuning"], seed)["params"]["head"] for seed in (0, 1, 0)
    ]
    assert (heads[0]["kernel"] != heads[1]["kernel"]).any()
    assert_same(heads[0], heads[2])


def test_predictions_leave_the_padding_out(batches):
    state = trainer(None).init(VARIABLES, METHODS["scratch"], 0.0)
    predict = loop.make_predictor(SOURCE, NETWORK)
    batch, asked = batches[0], known(None)
    few = loading.Examples(batch["image"], batch["label"])
    in_parts = loop.logits_of(predict, state, asked, few, batch_size=3)
    at_once = loop.logits_of(predict, state, asked, few, batch_size=8)
    np.testing.assert_allclose(in_parts, at_once, rtol=1e-5, atol=1e-6)
    whole = predict(state, asked, batch["image"])
    np.testing.assert_allclose(in_parts, whole, rtol=1e-5, atol=1e-6)


def test_a_cached_teacher_is_as_good_as_one_that_looks(batches, tmp_path):
    see = jax.jit(functools.partial(loop.look, SOURCE, ORIGINAL))
    views = teacher_cache.cache_features(
        tmp_path,
        loading.views(examples()),
        lambda batch: see(batch["image"]),
        teacher=ORIGINAL,
        layers=loop.teacher_layers(SOURCE),
    )
    cached = loading.training_batches(views, 8, seed=0)
    made = new_trainer("feature_map", Config(methods=("all",)), 4)
    ours, _ = train("feature_map+dtnh", cached, 0.1, made=made)
    theirs, _ = train("feature_map+dtnh", batches, 0.1)
    assert_same(ours.params, theirs.params, rtol=1e-5)


def test_adapters_change_the_network_and_nothing_else(batches):
    method = METHODS["lora"]
    state, _ = train("lora", batches, 0.0)
    assert state.params.keys() == {"head", "adapters"}
    before = loop.network_params(starting(method)["params"], ORIGINAL["params"])
    assert_same(before["mix"], ORIGINAL["params"]["mix"])  # at first they add nothing
    after = loop.network_params(state.params, ORIGINAL["params"])
    assert_same(after["stem"], ORIGINAL["params"]["stem"])
    a, b = (state.params["adapters"]["mix"][name] for name in ("lora_a", "lora_b"))
    np.testing.assert_allclose(
        after["mix"]["kernel"] - ORIGINAL["params"]["mix"]["kernel"], a @ b, atol=1e-6
    )
    assert np.abs(a @ b).max() > 0


def test_a_probe_fits_features_that_tell_classes_apart():
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    features = np.eye(3, 8, dtype=np.float32)[labels] + rng.normal(0, 0.1, (30, 8))
    head = estimates.linear_probe(jnp.float32(features), jnp.asarray(labels), 3)
    logits = features @ head["kernel"] + head["bias"][None, :]
    assert (np.argmax(logits, axis=-1) == labels).all()


@pytest.mark.parametrize("content", [b"", b"\0" * 9, b"\x81\xa4"])
def test_a_damaged_estimate_is_measured_anew(tmp_path, content):
    path = tmp_path / "estimate"
    question = estimates.Question(SOURCE, ORIGINAL, examples(), 2, 0, path)
    path.with_suffix(".msgpack").write_bytes(content)
    found = estimates.estimate("relationship", question)
    np.testing.assert_array_equal(found, known("co_tuning").estimate)
    assert path.with_suffix(".msgpack").stat().st_size > found.nbytes
    np.testing.assert_array_equal(estimates.estimate("relationship", question), found)
