"""Trains the cells of a grid that are not done: one after the other, in one process."""

import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console

from dtnh_jax.finetune.interrupt import Interrupted, stop_signals
from dtnh_jax.matrix import cells as grid
from dtnh_jax.matrix import evaluation, progress, records, sources, targets, training
from dtnh_jax.matrix.cells import ALONE, SCRATCH, Cell, Record, Records
from dtnh_jax.matrix.config import Config
from dtnh_jax.matrix.networks import ResNet8


class Study(NamedTuple):
    """What cells share; everything is made when first asked for, and kept."""

    config: Config
    evaluator: evaluation.Network
    task: Callable[[str], targets.Task]  # of a target
    source: Callable[[str], sources.Pretrained]
    fresh: Callable[[int], training.Variables]  # random, of a seed
    data: Callable[[str, int], training.Data]  # of a target and a seed
    # Of a source, a target and a seed: with the teacher's maps.
    data_with_maps: Callable[[str, str, int], training.Data]
    # Of a regularizer or None, a rule and an optimizer.
    trainer: Callable[[str | None, str, str], training.Trainer]


def prepare(config: Config, data_dir: pathlib.Path) -> Study:
    """Reads the targets, and checks that there are images for all of them.

    Raises:
      ValueError: images can not be read, or are too few.
    """
    network = ResNet8(widths=config.widths)
    evaluator = evaluation.evaluator(network)
    rows = max(target.train_per_class for target in targets.TARGETS.values())
    rows *= network.num_classes

    @functools.cache
    def task(name: str) -> targets.Task:
        return targets.load_task(
            name, data_dir, config.validation_per_class, config.test_per_class
        )

    @functools.cache
    def source(name: str) -> sources.Pretrained:
        return sources.load_source(
            name, network, evaluator, config.source_steps, data_dir
        )

    @functools.lru_cache(maxsize=32)
    def data(target: str, seed: int) -> training.Data:
        images = task(target).training_set(seed)
        return training.make_data(images, rows, config.steps, config.batch_size, seed)

    @functools.lru_cache(maxsize=8)
    def data_with_maps(name: str, target: str, seed: int) -> training.Data:
        plain = data(target, seed)
        maps = evaluator.maps(source(name).variables, plain.images)
        return plain._replace(maps=jax.device_put(maps))

    for name in config.targets:
        task(name)
    return Study(
        config,
        evaluator,
        task,
        source,
        functools.lru_cache(lambda seed: sources.initial_variables(network, seed)),
        data,
        data_with_maps,
        functools.cache(
            lambda regularizer, rule, optimizer: training.make_trainer(
                network, regularizer, rule, optimizer, config.steps
            )
        ),
    )


def run(study: Study, path: pathlib.Path, console: Console) -> None:
    """Trains what is not done yet, and adds it to the file of records.

    Learning rates first, as all else needs them; then seed by seed, so that whatever
    is done after an interruption is about all of the grid.

    Raises:
      Interrupted: a signal came; the cell in training was finished.
    """
    done = records.read(path)
    total, complete = grid.count(study.config, done)
    if complete == total:
        return
    with (
        stop_signals() as received,
        progress.display(console, total, complete) as show,
    ):
        for cell in _todo(study.config, done):
            if received:
                raise Interrupted(received[0])
            record = run_cell(study, cell)
            records.append(path, record)
            done[cell] = record
            show(cell.name, f"validation {100 * record['validation']:.1f}%")
        if received:
            raise Interrupted(received[0])


def _todo(config: Config, done: Records) -> Iterator[Cell]:
    """Yields cells that are not in `done`, where the caller puts them."""
    wheres = list(itertools.product(grid.pairs(config), config.optimizers))
    for pair, optimizer in wheres:
        for cell in grid.tuning_cells(*pair, optimizer):
            if cell not in done:
                yield cell
    for seed in range(config.seeds):
        for pair, optimizer in wheres:
            rate = grid.chosen_rate(done, *pair, optimizer)
            assert rate is not None  # every cell above is done
            for cell in grid.grid_cells(config, *pair, optimizer, rate, seed):
                if cell not in done:
                    yield cell


def run_cell(study: Study, cell: Cell) -> Record:
    """Trains a cell, and evaluates it once at the end.

    Returns:
      The fields of the cell, and: `validation` and `test` accuracy; `loss`, the mean
      cross-entropy of the training images after training, in evaluation mode, None
      where training diverged; `cosine` and `conflict`, means over steps, None without
      a regularizer; `seconds`, compilation included.
    """
    started = time.monotonic()
    config, task = study.config, study.task(cell.target)
    source = study.source(cell.source).variables
    variables = study.fresh(cell.seed)
    if cell.rule != SCRATCH:
        variables = sources.with_new_head(source, variables)
    regularizer = None if cell.regularizer == ALONE else cell.regularizer
    data, strength = study.data(cell.target, cell.seed), 0.0
    if regularizer is not None:
        form = training.REGULARIZERS[regularizer]
        strength = cell.strength * form.reference
        if form.of_maps:
            data = study.data_with_maps(cell.source, cell.target, cell.seed)
    rule = ALONE if cell.rule == SCRATCH else cell.rule
    trainer = study.trainer(regularizer, rule, cell.optimizer)
    settings = training.Settings(strength, cell.learning_rate)
    state = training.train(trainer, variables, data, source["params"], settings)
    trained = {"params": state.params, "batch_stats": state.batch_stats}

    def evaluate(images):
        return study.evaluator.evaluate(trained, images.inputs(), images.labels)

    loss = evaluate(task.training_set(cell.seed))[1]
    seen = {"cosine": None, "conflict": None}
    if regularizer is not None:
        sums = jax.device_get({"cosine": state.cosine, "conflict": state.conflict})
        seen = {key: _known(float(x) / config.steps) for key, x in sums.items()}
    return {
        **cell._asdict(),
        "validation": evaluate(task.validation)[0],
        "test": evaluate(task.test)[0],
        "loss": _known(loss),
        **seen,
        "seconds": time.monotonic() - started,
    }


def _known(number: float) -> float | None:
    """A number ready for JSON, which has no NaN."""
    return number if math.isfinite(number) else None


def introduction(study: Study, path: pathlib.Path) -> list[str]:
    """How much there is to do, and how long that may take."""
    done = records.read(path)
    total, complete = grid.count(study.config, done)
    pairs = len(grid.pairs(study.config))
    seconds = [record["seconds"] for record in done.values()]
    budget = "no cell has been timed yet"
    if seconds:
        each = float(np.median(seconds))
        left = progress.duration((total - complete) * each)
        budget = f"{each:.1f} s each, {left} in all"
    return [
        f"{total} cells: {pairs} pairs of source and target, "
        f"{study.config.seeds} seeds, {study.config.steps} steps; folder {path.parent}",
        f"{complete} done, {total - complete} to do: {budget}",
    ]


def accuracies_of_sources(study: Study) -> Iterator[str]:
    """Loads all sources, and says how good each is."""
    for name in study.config.sources:
        started = time.monotonic()
        source = study.source(name)
        yield (
            f"Source {name}: {100 * source.held_out_accuracy:.1f}% of held-out images, "
            f"{100 * source.training_accuracy:.1f}% of its training images "
            f"({time.monotonic() - started:.0f} s, {source.path.name})"
        )
