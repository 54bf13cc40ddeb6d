"""The cache of a teacher's features: right, reused, resumed, and never stale."""

import concurrent.futures
import json
import pickle

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dtnh_jax import teacher_cache
from dtnh_jax.teacher_cache import StaleCacheError, cache_features, fingerprint

LAYERS = ("body/late", "early")


def numbered(n=10):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (n, 4, 4, 3), np.uint8)
    return [{"image": image, "label": i} for i, image in enumerate(images)]


def weights(seed=0):
    random = np.random.default_rng(seed)
    return {
        "early": {"kernel": jnp.asarray(random.standard_normal((3, 5)), jnp.float32)},
        "late": {"kernel": jnp.asarray(random.standard_normal((5, 2)), jnp.bfloat16)},
    }


@jax.jit
def forward(variables, image):
    early = jnp.tanh(image.astype(jnp.float32) / 255 @ variables["early"]["kernel"])
    pooled = early.mean((1, 2)).astype(jnp.bfloat16)
    late = pooled @ variables["late"]["kernel"]
    return {"early": early, "body/late": late, "unwanted": early[:, 0, 0, 0]}


class Teacher:
    """A forward pass that counts its batches, and fails at one of them."""

    def __init__(self, variables=None, fail_at=None):
        self.variables = weights() if variables is None else variables
        self.fail_at = fail_at
        self.sizes = []

    def __call__(self, batch):
        if len(self.sizes) + 1 == self.fail_at:
            raise KeyboardInterrupt
        self.sizes.append(len(batch["image"]))
        return forward(self.variables, batch["image"])

    @property
    def calls(self):
        return len(self.sizes)

    def cached(self, folder, examples, layers=LAYERS, batch_size=4, **kwargs):
        return cache_features(
            folder,
            examples,
            self,
            teacher=self.variables,
            layers=layers,
            batch_size=batch_size,
            **kwargs,
        )


def direct(examples, batch_size=4, variables=None):
    """Returns what the teacher gives for each example, in batches of one size."""
    images = np.stack([example["image"] for example in examples])
    missing = -len(images) % batch_size
    images = np.pad(images, [(0, missing)] + [(0, 0)] * 3)
    batches = images.reshape(-1, batch_size, 4, 4, 3)
    maps = [forward(variables or weights(), batch) for batch in batches]
    return {
        layer: np.concatenate([m[layer] for m in maps])[: len(examples)]
        for layer in LAYERS
    }


def check(cached, examples, **kwargs):
    """Fails unless examples and features are those of the teacher, bit by bit."""
    expected = direct(examples, **kwargs)
    assert len(cached) == len(examples)
    for i, example in enumerate(examples):
        got = cached[i]
        np.testing.assert_array_equal(got["image"], example["image"])
        assert got["label"] == example["label"]
        assert list(got["teacher"]) == sorted(LAYERS)
        for layer in LAYERS:
            feature = got["teacher"][layer]
            assert feature.dtype == expected[layer].dtype
            np.testing.assert_array_equal(feature, expected[layer][i])


def folder_of(tmp_path):
    (folder,) = tmp_path.iterdir()
    return folder


# Right, and reused


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_features_are_those_of_the_teacher(tmp_path, n, batch_size):
    examples, teacher = numbered(n), Teacher()
    cached = teacher.cached(tmp_path, examples, batch_size=batch_size)
    check(cached, examples, batch_size=batch_size)
    # The last batch is filled up, so that the teacher compiles once.
    assert teacher.sizes == [batch_size] * -(-n // batch_size)


def test_the_second_call_computes_nothing(tmp_path):
    examples = numbered()
    Teacher().cached(tmp_path, examples)
    again = Teacher()
    for data in (examples, grain.MapDataset.source(examples)):
        for layers in (LAYERS, LAYERS[::-1]):  # their order is none of the teacher's
            check(again.cached(tmp_path, data, layers, batch_size=7), examples)
    assert again.calls == 0


def test_another_teacher_layer_or_number_of_examples_is_computed(tmp_path):
    examples = numbered()
    Teacher().cached(tmp_path, examples)
    changed = weights()
    changed["early"]["kernel"] = changed["early"]["kernel"].at[2, 4].add(1e-6)
    other = Teacher(changed)
    check(other.cached(tmp_path, examples), examples, variables=changed)
    fewer_layers, fewer_examples = Teacher(), Teacher()
    assert list(fewer_layers.cached(tmp_path, examples, ["early"])[0]["teacher"]) == [
        "early"
    ]
    check(fewer_examples.cached(tmp_path, examples[:8]), examples[:8])
    assert [other.calls, fewer_layers.calls, fewer_examples.calls] == [3, 3, 2]
    assert len(list(tmp_path.iterdir())) == 4
    first = Teacher()
    check(first.cached(tmp_path, examples), examples)
    assert first.calls == 0


def test_it_feeds_a_pipeline(tmp_path):
    examples = numbered()
    cached = Teacher().cached(tmp_path, examples)
    expected = direct(examples)
    pipeline = cached.seed(1).shuffle().repeat(3).batch(5)
    labels = []
    for batch in pipeline.to_iter_dataset():
        assert batch["teacher"]["early"].shape == (5, 4, 4, 5)
        for layer in LAYERS:
            np.testing.assert_array_equal(
                batch["teacher"][layer], expected[layer][batch["label"]]
            )
        labels.extend(batch["label"].tolist())
    assert sorted(labels) == sorted(3 * list(range(10)))
    assert labels != 3 * list(range(10))


def test_what_is_read_can_be_changed(tmp_path):
    cached = Teacher().cached(tmp_path, numbered())
    before = cached[1]["teacher"]["early"].copy()
    cached[1]["teacher"]["early"][:] = 0
    np.testing.assert_array_equal(cached[1]["teacher"]["early"], before)


def test_workers_get_paths_and_no_features(tmp_path):
    examples = numbered()
    cached = Teacher().cached(tmp_path, grain.MapDataset.range(10).map(read_numbered))
    check(cached, examples)  # the files are open now
    sent = pickle.dumps(cached._source)
    assert len(sent) < 2000
    source = pickle.loads(sent)
    np.testing.assert_array_equal(
        source[3]["teacher"]["early"], cached[3]["teacher"]["early"]
    )


def read_numbered(index):
    return numbered()[index]


def test_two_at_once_compute_everything_once(tmp_path):
    examples, teacher = numbered(), Teacher()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        calls = [pool.submit(teacher.cached, tmp_path, examples) for _ in range(3)]
    for call in calls:
        check(call.result(), examples)
    assert teacher.calls == 3


# Never stale


def test_a_changed_example_is_found_when_it_is_read(tmp_path):
    examples = numbered()
    Teacher().cached(tmp_path, examples)
    examples[7] = examples[7] | {"image": examples[7]["image"] ^ 1}
    cached = Teacher().cached(tmp_path, examples)
    assert cached[6]["label"] == 6
    with pytest.raises(StaleCacheError, match=r"Example 7 .*delete that folder"):
        cached[7]
    relabelled = numbered()
    relabelled[0] = relabelled[0] | {"label": 1}
    with pytest.raises(StaleCacheError, match="Example 0 differs"):
        Teacher().cached(tmp_path, relabelled)


class Augmented:
    """Examples that are another one whenever they are read, after some reads."""

    def __init__(self, steady_reads):
        self.steady_reads = steady_reads
        self.reads = 0

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.reads += 1
        noise = self.reads if self.reads > self.steady_reads else 0
        return {"image": np.full((4, 4, 3), noise, np.uint8), "label": index}


def test_random_augmentation_is_found_before_anything_is_computed(tmp_path):
    teacher = Teacher()
    with pytest.raises(StaleCacheError, match=r"same example.* random augmentation"):
        teacher.cached(tmp_path, Augmented(0))
    assert teacher.calls == 0


def test_random_augmentation_is_found_when_it_shows_itself_late(tmp_path):
    cached = Teacher().cached(tmp_path, Augmented(13))  # 2 to check, 10, and 1 more
    with pytest.raises(StaleCacheError, match=r"Example 4 .*drop random augmentation"):
        cached[4]


def test_augmentation_with_another_seed_is_found(tmp_path):
    def noisy(example, rng):
        return example | {"image": rng.integers(0, 256, (4, 4, 3), np.uint8)}

    plain = grain.MapDataset.source(numbered())
    fixed = plain.seed(0).random_map(noisy)
    check(Teacher().cached(tmp_path, fixed), list(fixed))
    with pytest.raises(StaleCacheError, match="Example 0"):
        Teacher().cached(tmp_path, plain.seed(1).random_map(noisy))


# Resumed, and refilled


@pytest.mark.parametrize("batch_size", [4, 3])
def test_a_killed_call_goes_on_where_it_was(tmp_path, batch_size):
    examples, killed = numbered(18), Teacher(fail_at=3)
    with pytest.raises(KeyboardInterrupt):
        killed.cached(tmp_path, examples)
    assert killed.calls == 2
    meta = json.loads((folder_of(tmp_path) / "meta.json").read_text())
    assert meta["done"] == 8
    rest = Teacher()
    cached = rest.cached(tmp_path, examples, batch_size=batch_size)
    assert rest.sizes == [batch_size] * -(-10 // batch_size)
    assert [cached[i]["label"] for i in range(18)] == list(range(18))
    if batch_size == 4:
        check(cached, examples)


def test_a_killed_call_does_not_go_on_with_other_data(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Teacher(fail_at=3).cached(tmp_path, numbered())
    other = numbered()
    other[0] = other[1]
    teacher = Teacher()
    with pytest.raises(StaleCacheError, match="Example 0"):
        teacher.cached(tmp_path, other)
    assert teacher.calls == 0


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"more")


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"\xff" * 200)


@pytest.mark.parametrize("damage", [truncate, lengthen, empty, garble, "unlink"])
@pytest.mark.parametrize(
    "file", ["features-1.npy", "features-2.npy", "digests.npy", "meta.json"]
)
def test_a_damaged_file_is_refilled(tmp_path, damage, file):
    examples = numbered()
    Teacher().cached(tmp_path, examples)
    path = folder_of(tmp_path) / file
    path.unlink() if damage == "unlink" else damage(path)
    again = Teacher()
    check(again.cached(tmp_path, examples), examples)
    assert again.calls == 3


@pytest.mark.parametrize("done", [-1, 11, "4", None])
def test_impossible_progress_is_no_progress(tmp_path, done):
    examples = numbered()
    Teacher().cached(tmp_path, examples)
    path = folder_of(tmp_path) / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"done": done}))
    again = Teacher()
    check(again.cached(tmp_path, examples), examples)
    assert again.calls == 3


def test_what_is_open_survives_a_refill(tmp_path):
    examples = numbered()
    cached = Teacher().cached(tmp_path, examples)
    (folder_of(tmp_path) / "meta.json").write_text("{}")
    Teacher().cached(tmp_path, examples)
    check(cached, examples)


# Errors


def test_arguments_are_checked_before_compute_is_spent(tmp_path):
    examples, teacher = numbered(), Teacher()
    repeated = grain.MapDataset.source(examples).repeat()
    for wrong, error, message in [
        ({"examples": []}, ValueError, "at least 1, got 0"),
        ({"examples": repeated}, ValueError, "got a dataset that repeats"),
        ({"examples": [np.ones(2)]}, ValueError, "`examples` must be dicts.*ndarray"),
        ({"examples": [{"teacher": np.ones(2)}]}, ValueError, "entry 'teacher', got"),
        ({"examples": [{"image": object()}]}, TypeError, "got object at 'image'"),
        ({"layers": "early"}, TypeError, "`layers` must be a list of names"),
        ({"layers": []}, ValueError, "`layers` must be different names"),
        ({"layers": ["early", "early"]}, ValueError, "`layers` must be different"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1, got 0"),
    ]:
        with pytest.raises(error, match=message):
            teacher.cached(tmp_path, **({"examples": examples} | wrong))
    assert teacher.calls == 0
    assert not list(tmp_path.iterdir())


def test_examples_that_can_not_be_batched_are_named(tmp_path):
    examples = numbered()
    examples[6] = examples[6] | {"image": np.zeros((2, 2, 3), np.uint8)}
    with pytest.raises(ValueError, match=r"entries and shapes; those from 4 to 7"):
        Teacher().cached(tmp_path, examples)
    filtered = grain.MapDataset.source(numbered()).filter(lambda x: x["label"] != 2)
    with pytest.raises(ValueError, match="`examples` must not be filtered"):
        Teacher().cached(tmp_path / "filtered", filtered)


def test_features_that_do_not_fit_are_named(tmp_path):
    examples, variables = numbered(), weights()
    with pytest.raises(
        ValueError, match=r"every layer of `layers`, got none for 'top'"
    ):
        Teacher().cached(tmp_path / "layer", examples, ["early", "top"])

    def summed(batch):
        return {"early": batch["image"].sum()}

    arguments = {"teacher": variables, "layers": ["early"], "batch_size": 4}
    with pytest.raises(ValueError, match=r"`compute` must .*'early'.*got .*\(\)"):
        cache_features(tmp_path / "scalar", examples, summed, **arguments)

    def growing(batch, sizes=iter((2, 2, 3))):  # noqa: B008
        return {"early": np.zeros((4, next(sizes)), np.float32)}

    with pytest.raises(
        ValueError, match=r"return float32 \(4, 2\).*got float32 \(4, 3\)"
    ):
        cache_features(tmp_path / "growing", examples, growing, **arguments)


# Fingerprints


def test_fingerprints_tell_trees_apart():
    tree = {"a": np.float32([1, 2]), "b": {"c": np.int32(3)}}
    trees = [
        tree,
        tree | {"a": np.float32([1, 3])},
        tree | {"a": np.float32([[1, 2]])},
        tree | {"a": np.float32([1, 2]).view(np.int32)},
        tree | {"a": np.float32([1, 2]).view(np.uint16).view(jnp.bfloat16)},
        {"z": tree["a"], "b": tree["b"]},
        {"a": tree["a"], "b": tree["b"], "d": np.zeros((0, 3))},
        {"a": tree["a"], "b": tree["b"], "d": np.zeros((0, 4))},
        tree | {"b": {"c": jax.random.key(0)}},
        tree | {"b": {"c": jax.random.key(1)}},
        {},
    ]
    assert len({fingerprint(tree) for tree in trees}) == len(trees)


def test_fingerprints_are_of_values_and_not_of_containers():
    class Pair(dict):
        pass

    tree = {"b": np.ones((2, 3), np.float32), "a": np.zeros(2)}
    reordered = {"a": np.zeros(2), "b": np.ones((3, 2), np.float32).T}
    assert fingerprint(tree) == fingerprint(reordered)
    assert fingerprint({"b": jnp.ones((2, 3)), "a": np.zeros(2)}) == fingerprint(tree)
    assert fingerprint((1.0, 2.0)) == fingerprint([1.0, 2.0])
    with pytest.raises(
        TypeError, match="must be an array or a number, got object at 'a'"
    ):
        fingerprint({"a": object()})


# Progress


def test_a_bar_is_for_terminals_alone(tmp_path, monkeypatch, capsys):
    Teacher().cached(tmp_path / "plain", numbered())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(teacher_cache.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # else rich takes CI's terminal for none
    Teacher().cached(tmp_path / "silent", numbered(), progress=False)
    assert capsys.readouterr().err == ""
    Teacher().cached(tmp_path / "bar", numbered())
    assert "Features of the teacher" in capsys.readouterr().err
