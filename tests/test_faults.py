"""What goes wrong on the way: kills, damaged files, full disks, NaN and infinity."""

import functools
import itertools
import json
import os
import pathlib
import resource
import signal

import jax
import jax.numpy as jnp
import kill_and_resume
import numpy as np
import pytest
import tiny_network

from dtnh_jax._cli import main
from dtnh_jax.finetune import shell
from dtnh_jax.finetune.config import Config
from dtnh_jax.finetune.data import loading
from dtnh_jax.finetune.methods import METHODS
from dtnh_jax.finetune.runs import cells, checkpoints, preparation
from dtnh_jax.finetune.training import loop, meshes
from dtnh_jax.finetune.weights import sources
from dtnh_jax.finetune.weights.sources import SOURCES

SOURCE = tiny_network.TINY
ORIGINAL = sources.original_variables(SOURCE)
KEY = loop.training_key(0)
OPTIONS = {
    "--source": "tiny",
    "--steps": "14",
    "--checkpoint-every": "5",
    "--image-size": "16",
    "--seeds": "1",
    "--batch-size": "4",
    "--train-per-class": "4",
    "--test-per-class": "5",
}


# Kills


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_the_same(tmp_path):
    expected, seconds = kill_and_resume.uninterrupted(tmp_path / "data", tmp_path / "a")
    for number, share in enumerate((0.35, 0.8)):
        found, _ = kill_and_resume.kill_and_resume(
            tmp_path / "data", tmp_path / f"killed-{number}", share * seconds
        )
        assert found == expected


# Checkpoints


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(path):
    files = [f for f in path.rglob("*") if f.is_file() and f.name != "digests.json"]
    return max(files, key=lambda file: file.stat().st_size)


DAMAGES = {
    "cut": lambda path: cut(largest(path)),
    "one bit": lambda path: flip(largest(path)),
    "missing": lambda path: largest(path).unlink(),
    "no digests": lambda path: (path / "digests.json").unlink(),
    "cut digests": lambda path: cut(path / "digests.json"),
    "other digests": lambda path: (path / "digests.json").write_text("[]"),
}


@pytest.fixture
def two_checkpoints(tmp_path):
    path = tmp_path / "checkpoints"
    with checkpoints.open_checkpoints(path, every=1) as manager:
        for step in (1, 2):
            checkpoints.save(manager, step, {"w": jnp.arange(500.0) * step})
    return path


def test_a_whole_checkpoint_is_found(two_checkpoints):
    assert checkpoints.newest_whole(two_checkpoints) == (2, [])
    assert checkpoints.newest_whole(two_checkpoints / "none") == (None, [])


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_falls_back_to_the_one_before(two_checkpoints, damage):
    damage(two_checkpoints / "2")
    step, (warning,) = checkpoints.newest_whole(two_checkpoints)
    assert step == 1
    assert warning.startswith("the checkpoint of step 2 is skipped: ")
    assert str(two_checkpoints / "2") in warning
    with checkpoints.open_checkpoints(two_checkpoints, every=1) as manager:
        assert manager.latest_step() == 1
        checkpoints.save(manager, 2, {"w": jnp.zeros(500)})  # the place is free
    assert checkpoints.newest_whole(two_checkpoints) == (2, [])


def test_without_a_whole_checkpoint_there_is_none(two_checkpoints):
    for step in (1, 2):
        flip(largest(two_checkpoints / str(step)))
    step, warnings = checkpoints.newest_whole(two_checkpoints)
    assert step is None
    assert len(warnings) == 2


# The command


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def run(monkeypatch, data_dir, capsys):
    """Returns a function of a run folder: exit status, output, errors."""
    monkeypatch.setattr("dtnh_jax.finetune.directories.keep_compiled", lambda _: None)
    monkeypatch.setitem(SOURCES, "tiny", SOURCE)

    def run(run_dir):
        places = ["--data-dir", str(data_dir), "--run-dir", str(run_dir)]
        options = [*itertools.chain(*OPTIONS.items()), *places]
        status = main([*options, "--methods", "fine-tuning", "l2_sp+dtnh"])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def whole(run, tmp_path):
    status, _, err = run(tmp_path / "whole")
    assert (status, err) == (0, "")
    return kill_and_resume.deterministic(tmp_path / "whole")


SPACE, HARD = resource.getrlimit(resource.RLIMIT_FSIZE)


def allow(size):
    """From now on no file of this process gets any longer."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, HARD))


@pytest.mark.e2e
def test_a_full_disk_and_a_damaged_checkpoint(run, whole, tmp_path, monkeypatch):
    ours = tmp_path / "ours"
    save = checkpoints.save
    checkpoint = ours / "checkpoints" / "l2_sp+dtnh-seed0"

    def full(manager, step, arrays, **options):
        if pathlib.Path(manager.directory) == checkpoint and step == 10:
            allow(0)
        try:
            save(manager, step, arrays, **options)
        finally:
            allow(SPACE)

    monkeypatch.setattr(checkpoints, "save", full)
    status, _, err = run(ours)
    assert status == 1
    assert err.startswith("dtnh: the checkpoint of step 10 can not be written to ")
    assert err.endswith("; the same command resumes from there.\n")
    assert err.count("\n") == 1
    assert (ours / "cells" / "fine-tuning-seed0.json").exists()
    assert checkpoints.newest_whole(checkpoint) == (5, [])

    def stop(manager, step, arrays, **options):
        save(manager, step, arrays, **options)
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoints, "save", stop)
    status, out, err = run(ours)
    assert status == 128 + signal.SIGTERM
    assert "l2_sp+dtnh-seed0: resumes after step 5 of 14" in out
    assert checkpoints.newest_whole(checkpoint) == (12, [])

    flip(largest(checkpoint / "12"))
    monkeypatch.setattr(checkpoints, "save", save)
    status, out, err = run(ours)
    assert (status, err) == (0, "")
    assert "l2_sp+dtnh-seed0: the checkpoint of step 12 is skipped: " in out
    assert "l2_sp+dtnh-seed0: resumes after step 10 of 14" in out
    assert kill_and_resume.deterministic(ours) == whole


def regained(function):
    """Gives the space back before a function: pytest writes what is printed."""

    def call(*arguments):
        allow(SPACE)
        return function(*arguments)

    return call


def test_a_full_disk_for_metrics(run, tmp_path, monkeypatch):
    as_json = cells._as_json

    def full(line):
        # From now on: the line is written after this returns.
        if line["step"] == 8:
            allow(0)
        return as_json(line)

    monkeypatch.setattr(cells, "_as_json", full)
    monkeypatch.setattr("dtnh_jax.finetune.shell.failed", regained(shell.failed))
    status, _, err = run(tmp_path / "run")
    assert status == 1
    assert err.startswith("dtnh: writing failed: File too large. Finished work is in ")


@pytest.mark.e2e
def test_what_is_never_finite_again_stops_the_run(run, tmp_path, monkeypatch):
    ours, real = tmp_path / "run", preparation.batches
    poison = {"on": True}

    def poisoned(*arguments):
        def spoil(number, batch):
            if number < 7 or not poison["on"]:
                return batch
            return {**batch, "image": batch["image"] * jnp.nan}

        return real(*arguments).map_with_index(spoil)

    monkeypatch.setattr(preparation, "batches", poisoned)
    status, _, err = run(ours)
    assert status == 1
    assert err.startswith(
        "dtnh: training stopped at step 12: the gradient of the loss for head/bias, "
        "or its update, holds numbers that are not finite, in 5 consecutive batches"
    )
    assert err.count("\n") == 1
    lines = [json.loads(x) for x in (ours / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_batches"] for line in lines] == [0] * 7 + [1, 2, 3, 4]
    assert lines[7]["loss"] is None  # JSON has no NaN
    assert checkpoints.newest_whole(ours / "checkpoints" / "fine-tuning-seed0")[0] == 10
    poison["on"] = False
    status, out, _ = run(ours)
    assert status == 0
    assert "fine-tuning-seed0: resumes after step 10 of 14" in out


# NaN and infinity


@functools.cache
def examples():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 16, 16, 3), np.uint8)
    return loading.Examples(images, np.arange(16, dtype=np.int32) % 2)


@functools.cache
def trainer(regularizer, never_hurts):
    config = Config(methods=("all",), learning_rate=0.1)
    return loop.make_trainer(
        SOURCE, SOURCE.module(2), regularizer, config, 20, never_hurts=never_hurts
    )


@functools.cache
def batch(number):
    """A batch of floats, which have room for what is not finite, with its teacher."""
    found = loading.training_batches(loading.views(examples()), 8, seed=0)[number]
    see = jax.jit(functools.partial(loop.look, SOURCE))
    return {
        "image": np.float32(found["image"]),
        "label": found["label"],
        "teacher": dict(see(ORIGINAL, found["image"])),
    }


def begin(name, strength=0.1):
    method = METHODS[name]
    made = trainer(method.regularizer, method.never_hurts)
    variables = loop.starting_variables(SOURCE, 2, 0, method)
    # Away from where the regularizer's gradient is zero.
    moved = jax.tree.map(lambda x: x + 0.01, variables["params"])
    return made, made.init({**variables, "params": moved}, method, strength)


def copied(state):
    return jax.tree.map(np.array, (state.params, state.opt_state, state.batch_stats))


def assert_same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


NAMES = ["fine-tuning", "l2_sp+dtnh", "feature_map+dtnh", "feature_map+never_hurt"]
each_value = pytest.mark.parametrize("value", [np.nan, np.inf])


@each_value
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_that_is_not_finite_is_skipped_and_counted(name, value):
    made, state = begin(name)
    known = loop.Known(ORIGINAL)
    state, metrics = made.step(state, batch(0), known, KEY)
    assert metrics["skipped_batches"] == 0
    before = copied(state)
    spoilt = {**batch(1), "image": batch(1)["image"].copy()}
    spoilt["image"][3, 2, 1, 0] = value
    state, metrics = made.step(state, spoilt, known, KEY)
    assert metrics["skipped_batches"] == 1
    assert metrics.get("skipped", 0) == 0  # it is not the regularizer's fault
    assert int(state.step) == 2
    assert_same(copied(state), before)
    state, metrics = made.step(state, batch(2), known, KEY)
    assert metrics["skipped_batches"] == 1
    assert np.isfinite(metrics["loss"])
    assert (np.array(state.params["mix"]["kernel"]) != before[0]["mix"]["kernel"]).any()


def spoilt_anchor(value):
    params = jax.tree.map(np.array, ORIGINAL["params"])
    params["mix"]["kernel"][1, 2] = value
    return batch(1), loop.Known({**ORIGINAL, "params": params})


def spoilt_teacher(value):
    maps = {key: np.array(x) for key, x in batch(1)["teacher"].items()}
    maps["norm"][0, 0, 0, 0] = value
    return {**batch(1), "teacher": maps}, loop.Known(ORIGINAL)


@each_value
@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("l2_sp", spoilt_anchor),
        ("l2_sp+dtnh", spoilt_anchor),
        ("l2_sp+never_hurt", spoilt_anchor),
        ("feature_map+dtnh", spoilt_teacher),
        ("feature_map+never_hurt", spoilt_teacher),
    ],
)
def test_a_regularizer_that_is_not_finite_is_left_out_and_counted(name, spoil, value):
    made, state = begin(name)
    spoilt, known = spoil(value)
    state, metrics = made.step(state, spoilt, known, KEY)
    assert metrics["skipped"] == 1
    assert metrics["skipped_batches"] == 0
    alone, expected = begin(name, 0.0)
    expected, _ = alone.step(expected, batch(1), loop.Known(ORIGINAL), KEY)
    assert_same(state.params, expected.params)  # what the loss does alone
    state, metrics = made.step(state, batch(2), loop.Known(ORIGINAL), KEY)
    assert metrics["skipped"] == 1
    assert np.isfinite(metrics["regularizer"])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))


def test_a_parameter_that_is_not_finite_is_named():
    made, state = begin("l2_sp+dtnh")
    params = jax.tree.map(np.array, state.params)
    params["norm"]["scale"][2] = np.inf
    state = state.replace(params=meshes.place(meshes.make_mesh(), params))
    batches = [batch(number % 3) for number in range(9)]
    training = loop.train(made, state, batches, loop.Known(ORIGINAL), KEY, 8)
    with pytest.raises(
        loop.NotFiniteError, match="stopped at step 5: parameter norm/scale holds"
    ):
        list(training)


def test_a_few_batches_that_are_not_finite_do_not_stop_training():
    made, state = begin("l2_sp+dtnh")
    spoilt = {**batch(1), "image": batch(1)["image"] * np.float32(np.nan)}
    bad = loop.PATIENCE - 1
    batches = [batch(0), *[spoilt] * bad, batch(2), *[spoilt] * bad, batch(0)]
    known = loop.Known(ORIGINAL)
    done = list(loop.train(made, state, batches, known, KEY, len(batches) - 1))
    assert done[-1][1]["skipped_batches"] == 2 * bad
