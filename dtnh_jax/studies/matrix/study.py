"""Trains the cells of a grid that are not done: one after the other, in one process."""

import functools
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from dtnh_jax.finetune.runs.interrupt import Interrupted, stop_signals
from dtnh_jax.studies.matrix import (
    batches,
    families,
    progress,
    records,
    sources,
    training,
)
from dtnh_jax.studies.matrix import cells as grid
from dtnh_jax.studies.matrix.catalogue import ALONE, SCRATCH, TARGETS_OF_PHOTOGRAPHS
from dtnh_jax.studies.matrix.cells import Cell, Record, Records
from dtnh_jax.studies.matrix.config import Config
from dtnh_jax.studies.matrix.families import Family
from dtnh_jax.studies.matrix.regularizers import REGULARIZERS

# What a cell takes on one of two cores, until some have been timed.
_SECONDS, _SECONDS_OF_PHOTOGRAPHS = 2.5, 30.0


class Study(NamedTuple):
    """A grid, and how its cells are trained."""

    config: Config
    family: Callable[[str, str], Family]  # of a source and a target


def prepare(config: Config, data_dir: pathlib.Path) -> Study:
    """Reads the targets, and checks that there are images for all of them.

    Raises:
      ValueError: images can not be read, or are too few.
    """
    small = functools.cache(lambda: families.small(config, data_dir))

    @functools.cache
    def family(source: str, target: str) -> Family:
        if target in TARGETS_OF_PHOTOGRAPHS:
            return families.of_photographs(config, source, target, data_dir)
        return small()

    for source, target in grid.pairs(config):
        family(source, target).task(target)
    return Study(config, family)


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


class Setting(NamedTuple):
    """All that the training of a cell is a function of."""

    trainer: training.Trainer
    variables: training.Variables  # to start from
    data: batches.Data
    source_params: Any
    settings: training.Settings


def setting(study: Study, cell: Cell) -> Setting:
    """Puts together what a cell is trained with."""
    family = study.family(cell.source, cell.target)
    source = family.source(cell.source).variables
    variables = family.fresh(cell.seed)
    if cell.rule != SCRATCH:
        variables = sources.with_new_head(source, variables)
    regularizer = None if cell.regularizer == ALONE else cell.regularizer
    data, strength = family.data(cell.target, cell.seed), 0.0
    if regularizer is not None:
        strength = cell.strength * family.reference(regularizer)
        if not REGULARIZERS[regularizer].of_weights:
            data = family.data_with_teacher(cell.source, cell.target, cell.seed)
    rule = ALONE if cell.rule == SCRATCH else cell.rule
    return Setting(
        family.trainer(regularizer, rule, cell.optimizer),
        variables,
        data,
        source["params"],
        training.Settings(strength, cell.learning_rate),
    )


def run_cell(study: Study, cell: Cell) -> Record:
    """Trains a cell, and evaluates it once at the end.

    Returns:
      The fields of the cell, and: `validation` and `test` accuracy; `loss`, the mean
      cross-entropy of the training images after training, in evaluation mode, None
      where training diverged; `cosine` and `conflict`, means over steps, None without
      a regularizer; `seconds`, compilation included.
    """
    started = time.monotonic()
    family = study.family(cell.source, cell.target)
    task = family.task(cell.target)
    state = training.train(*setting(study, cell))
    trained = {"params": state.params, "batch_stats": state.batch_stats}

    def evaluate(images):
        return family.evaluator.evaluate(trained, images.inputs(), images.labels)

    loss = evaluate(task.training_set(cell.seed))[1]
    seen = {"cosine": None, "conflict": None}
    if cell.regularizer != ALONE:
        sums = jax.device_get({"cosine": state.cosine, "conflict": state.conflict})
        seen = {key: _known(float(x) / family.steps) for key, x in sums.items()}
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
    lines = [
        f"{total} cells: {pairs} pairs of source and target, "
        f"{study.config.seeds} seeds; folder {path.parent}"
    ]
    left = _seconds_left(study.config, done)
    lines.append(
        f"{complete} done, {total - complete} to do: about {progress.duration(left)}, "
        f"or {progress.duration(left / 2)} as two commands on two cores"
    )
    for source, target in grid.pairs(study.config):
        licence = study.family(source, target).licence
        line = f"Images of {target}: {licence}"
        if licence and line not in lines:
            lines.append(line)
    return lines


def _seconds_left(config: Config, done: Records) -> float:
    """How long the cells to do may take, by what those of their kind took."""

    def is_small(target: str) -> bool:
        return target not in TARGETS_OF_PHOTOGRAPHS

    found = 0.0
    for target, (total, complete) in grid.count_by_target(config, done).items():
        alike = [
            record["seconds"]
            for cell, record in done.items()
            if is_small(cell.target) == is_small(target)
        ]
        usual = _SECONDS if is_small(target) else _SECONDS_OF_PHOTOGRAPHS
        each = float(np.median(alike)) if alike else usual
        found += each * (total - complete)
    return found


def accuracies_of_sources(study: Study) -> Iterator[str]:
    """Loads all sources, and says how good each is, or where it is from."""
    # One of a source's targets, for the family.
    for name, target in dict(grid.pairs(study.config)).items():
        started = time.monotonic()
        about = study.family(name, target).source(name).about
        yield f"Source {name}: {about} ({time.monotonic() - started:.0f} s)"
