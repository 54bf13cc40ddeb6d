"""The large network's part of the grid, on a few real photographs.

The network that stands for it has five layers; where shapes are all that is looked at,
it is the one with published weights.
"""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_matrix
from rich.console import Console
from tiny_matrix import TINY

from dtnh_jax.finetune.weights.sources import load_source as published
from dtnh_jax.finetune.weights.sources import original_variables
from dtnh_jax.studies.matrix import catalogue, cells, records, rules, study, training
from dtnh_jax.studies.matrix.cells import Cell
from dtnh_jax.studies.matrix.config import Photographs
from dtnh_jax.studies.matrix.regularizers import REGULARIZERS

PUBLISHED = dict(catalogue.SOURCES_OF_PHOTOGRAPHS)
CONFIG = dataclasses.replace(
    TINY,
    sources=("imagenet",),
    targets=("elpv",),
    regularizers=("l1_sp", "attention_transfer", "logit_distillation"),
    strengths=(1.0,),
    seeds=1,
)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def grid(data_dir):
    with tiny_matrix.imagenet():
        yield study.prepare(CONFIG, data_dir)


@pytest.fixture(scope="module")
def family(grid):
    return grid.family("imagenet", "elpv")


def test_cells_are_trained_with_every_kind_of_regularizer(grid, tmp_path):
    config = dataclasses.replace(CONFIG, run_dir=tmp_path / "run")
    path = records.open_folder(config)
    study.run(grid, path, Console(quiet=True))
    done = records.read(path)
    # Three learning rates with a seed, of which one is what the grid needs too.
    assert len(done) == 3 + 1 + len(CONFIG.regularizers)
    assert cells.count(CONFIG, done) == (len(done), len(done))
    for cell, record in done.items():
        assert (6 * record["test"]) % 1 == pytest.approx(0, abs=1e-9)  # 3 of 2 classes
        assert record["loss"] > 0
        assert (record["cosine"] is None) == (cell.regularizer == "none")
    losses = {record["loss"] for record in done.values()}
    assert len(losses) == len(done)
    cell, record = list(done.items())[-1]
    again = study.run_cell(grid, cell)  # with the same dropout
    assert {**again, "seconds": 0} == {**record, "seconds": 0}


def test_strengths_are_multiples_of_those_for_photographs(grid):
    cell = Cell("imagenet", "elpv", "l2_sp", 10.0, "sum", "sgd", 0, 0.01)
    expected = 10 * REGULARIZERS["l2_sp"].on_photographs
    assert study.setting(grid, cell).settings.strength == expected


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_rule_steps_from_state_to_state(grid, rule):
    name = "none" if rule == rules.ALONE else "feature_map"
    cell = Cell("imagenet", "elpv", name, 1.0, rule, "sgd", 0, 0.01)
    start = study.setting(grid, cell)
    state = jax.eval_shape(start.trainer.init, start.variables)
    settings = jax.tree.map(np.float32, start.settings)
    given = (state, start.data, start.source_params, settings)
    assert jax.eval_shape(start.trainer.step, *given) == state


def test_sets_do_not_overlap_and_only_training_depends_on_the_seed(family):
    task = family.task("elpv")
    drawn = [task.training_set(seed) for seed in (0, 1)]
    sets = [
        {image.tobytes() for image in found.pixels}
        for found in (task.validation, task.test, *drawn)
    ]
    assert [len(found) for found in sets] == [4, 6, 10, 10]
    validation, test, first, second = sets
    assert not validation & test
    assert not (first | second) & (validation | test)
    assert first != second
    for found in (task.validation, task.test, *drawn):
        assert np.bincount(found.labels).tolist() == [len(found.labels) // 2] * 2
    # As the network takes them, and not as the small ones do.
    source = published("tiny")
    expected = np.asarray(source.preprocess(drawn[0].pixels))
    np.testing.assert_array_equal(family.data("elpv", 0).images, expected)


def test_the_teacher_has_the_original_head(family):
    data = family.data_with_teacher("imagenet", "elpv", 0)
    source = published("tiny")
    logits = source.module(7).apply(
        original_variables(source), data.images, train=False
    )
    np.testing.assert_allclose(data.teacher["head"], logits, rtol=1e-5, atol=1e-6)
    assert data.teacher.keys() == {"norm", "head"}


def test_too_few_photographs_are_counted(data_dir):
    options = dataclasses.replace(TINY.photographs, train_per_class=720)
    config = dataclasses.replace(CONFIG, photographs=options)
    with pytest.raises(
        ValueError, match=r"Target elpv: Class 1 has 715 .* but 726 are"
    ):
        study.prepare(config, data_dir)


def test_the_published_network_fits_the_grid(data_dir, monkeypatch):
    monkeypatch.setitem(
        catalogue.SOURCES_OF_PHOTOGRAPHS, "imagenet", PUBLISHED["imagenet"]
    )
    size = Photographs(1, 2, 32, 2, 1, 1)
    grid = study.prepare(dataclasses.replace(CONFIG, photographs=size), data_dir)
    (line,) = study.accuracies_of_sources(grid)
    assert line.startswith("Source imagenet: efficientnet-lite0, Apache-2.0")
    family = grid.family("imagenet", "elpv")
    data, fresh = family.data("elpv", 0), family.fresh(0)
    assert data.images.shape == (4, 32, 32, 3)
    assert -127 / 128 <= data.images.min() < data.images.max() <= 1
    assert fresh["params"]["head"]["kernel"].shape == (1280, 2)
    source = family.source("imagenet").variables["params"]
    assert source["head"]["kernel"].shape == (1280, 1000)
    trainer = family.trainer("l2_sp", "sum", "sgd")
    state = jax.eval_shape(trainer.init, fresh)
    settings = training.Settings(np.float32(1), np.float32(1))
    assert jax.eval_shape(trainer.step, state, data, source, settings) == state
